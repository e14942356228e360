"""What the policy has forgotten: both adapters on tasks of lm-evaluation-harness, `evaluate --harness TASKS`.

Needs the extra `harness`, and base and adapters on this machine. A task is one of the harness's own names, whose data
it downloads, or a YAML file of a task; scores and standard errors are the harness's (github.com/EleutherAI/
lm-evaluation-harness). Writes evaluation.harness.json in `data`. Not covered: resuming, and models behind an endpoint.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from msgspec import Struct

from dpo_cli.config.settings import Config
from dpo_cli.data.files import write_json
from dpo_cli.errors import UserError, require
from dpo_cli.progress import Progress

RESULT = "evaluation.harness.json"


class TaskScore(Struct):
    """One metric of one task, for both adapters; `error` is the standard error, None where the harness gives none."""

    task: str
    metric: str
    reference: float
    policy: float
    reference_error: float | None
    policy_error: float | None


class Harnessed(Struct, kw_only=True):
    """What the harness measured."""

    scores: list[TaskScore]
    path: str


def harness(config: Config, progress: Progress, tasks: Sequence[str], limit: int | None = None) -> Harnessed:
    """Run the tasks with the reference, then with the policy.

    Args:
        config: `[model]` and `generate.batch_size` are read.
        progress: where to report; units are adapters.
        tasks: names, or YAML files.
        limit: only the first so many rows of each task.

    Raises:
        UserError: the extra is not installed, no such task, or what the harness says.
    """
    require("harness", "evaluate --harness")
    import torch
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    files = [Path(task) for task in tasks if task.endswith((".yaml", ".yml"))]
    names = [task if Path(task) not in files else _task_of(Path(task)) for task in tasks]
    manager = TaskManager(include_path=[str(file.parent) for file in files] or None)
    found: list[dict[str, dict[str, Any]]] = []
    progress.begin("harness", 2)
    try:
        for adapter in (config.model.adapter, config.model.dpo_adapter):
            model = {"pretrained": config.model.base} | ({"peft": adapter} if adapter else {})
            try:
                done = simple_evaluate(
                    model="hf",
                    model_args=model,
                    tasks=names,
                    task_manager=manager,
                    limit=limit,
                    log_samples=False,
                    batch_size=config.generate.batch_size,
                    device="cuda" if torch.cuda.is_available() else "cpu",
                )
            except (KeyError, ValueError, OSError) as error:
                raise UserError(f"the harness: {' '.join(str(error).split())[:300]}", where="--harness") from error
            found.append(done["results"])
            progress.update(len(found))
    finally:
        progress.end()
    result = Harnessed(scores=_scores(*found), path=str(Path(config.data) / RESULT))
    write_json(Path(result.path), result)
    return result


def _scores(reference: dict[str, dict[str, Any]], policy: dict[str, dict[str, Any]]) -> list[TaskScore]:
    """What both have, by task and metric; the harness writes a metric as `name,filter`."""
    return [
        TaskScore(
            task,
            key.partition(",")[0],
            float(value),
            float(policy[task][key]),
            _error(reference[task], key),
            _error(policy[task], key),
        )
        for task, metrics in reference.items()
        for key, value in metrics.items()
        if "," in key and "_stderr," not in key and isinstance(value, int | float)
    ]


def _error(metrics: dict[str, Any], key: str) -> float | None:
    value = metrics.get(key.replace(",", "_stderr,", 1))
    return float(value) if isinstance(value, int | float) else None


def _task_of(file: Path) -> str:
    """The name that a task's file gives it."""
    try:
        found = re.search(r"^task:\s*[\"']?([\w.-]+)", file.read_text("utf-8"), re.MULTILINE)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"no task: {error}", where=str(file)) from None
    if found is None:
        raise UserError("no task: it has no line `task: NAME`", where=str(file))
    return found[1]
