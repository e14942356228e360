"""Judging through batches: what the live judge would ask next is put into a batch, until it would ask nothing more.

An invalid verdict is asked again in the next batch, as the live judge would, at most `ROUNDS` batches deep; what is
without a verdict then is an error, which the next run tries again.
"""

from collections.abc import Awaitable, Callable, Sequence

from dpo_cli.endpoint.batch import Batches, PendingRequest
from dpo_cli.judges._task import Task

ROUNDS = 4


async def answer(
    tasks: Sequence[Task], owed: Callable[[Task], Awaitable[list[PendingRequest]]], batches: Batches, wait: bool
) -> Sequence[Task]:
    """Have everything answered that the tasks owe.

    Args:
        tasks: what is to be judged.
        owed: what a task would ask next.
        batches: where it is asked.
        wait: whether to wait for batches; else they are sent only.

    Returns:
        The tasks that wait for nothing.
    """
    for _ in range(ROUNDS):
        requests = {task.id: await owed(task) for task in tasks}
        if not any(requests.values()):
            break
        if not await batches.collect([one for asked in requests.values() for one in asked], wait):
            return [task for task in tasks if not requests[task.id]]
    return tasks
