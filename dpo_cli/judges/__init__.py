"""Who ranks the completions: one module a judge, whose name is the value of `--judge`, with hyphens for underscores.

A judge module has the three functions of `Judge`. Optional: `estimate(tasks, config)` says what the tasks would cost,
for judges that are paid; `settle(tasks, judgments, config)` goes through all tasks twice and yields the judgments that
change once all are there; `ABSOLUTE = True` says that each completion is scored by itself; `FORMS` names other
questions about one completion, of which `judge` then takes one as `form`. A judge gets tasks, one a prompt, and builds
each `Judgment` with `conclude`, which also scores the completions that were not shown.
"""

import pkgutil
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, cast

from dpo_cli.errors import require

if TYPE_CHECKING:  # the names of judges are wanted for --help, the rest is not
    from dpo_cli.config.settings import Config
    from dpo_cli.data.records import Judgment
    from dpo_cli.endpoint.costs import Receipt
    from dpo_cli.judges._task import Task
    from dpo_cli.progress import Progress


class Judge(Protocol):
    """What a judge module offers."""

    def identity(self, config: "Config") -> dict[str, Any]:
        """The settings that make a judgment comparable with others; one file holds judgments of one identity."""

    def calls(self, shown: "Iterable[int]", config: "Config") -> int:
        """How many paid calls are owed at most by tasks that show so many completions each."""

    def judge(
        self, tasks: "Sequence[Task]", config: "Config", deliver: "Callable[[Judgment], None]", progress: "Progress"
    ) -> "Receipt | None":
        """Judge every task and deliver its judgment as soon as it is there, in any order; return what was paid."""


def names() -> list[str]:
    """Every judge's name."""
    found = (module.name for module in pkgutil.iter_modules(__path__))
    return sorted(name.replace("_", "-") for name in found if not name.startswith("_"))


def load(name: str) -> Judge:
    """The judge of a name that `names` lists.

    Raises:
        UserError: it needs an extra that is not installed.
    """
    if name == "reward-model":
        require("train", "--judge reward-model")
    return cast(Judge, import_module(f"{__name__}.{name.replace('-', '_')}"))
