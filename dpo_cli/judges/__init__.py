"""Who ranks the completions: one module a judge, whose name is the value of `--judge`, with hyphens for underscores.

A judge module has the three functions of `Judge`; one that is paid has a fourth, `estimate(tasks, config)`, for what
the tasks would cost, and one whose judgments depend on each other `settle(tasks, judgments, config)`, for those that
must change. A judge that scores each completion by itself says so with `ABSOLUTE = True`; one that can be asked about
one completion in other forms names them in `FORMS`, and takes one as `form`. It is handed tasks, one a prompt, and
builds each `Judgment` with `conclude`, which gives what was never shown its score: a twin that of its like, what is
unusable the lowest.
"""

import pkgutil
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, cast

from msgspec import Struct

from dpo_cli.config.settings import Config
from dpo_cli.data.records import Completions, Judgment, Message, canonical, completions_id
from dpo_cli.data.records import Order as Order
from dpo_cli.errors import require
from dpo_cli.progress import Progress

if TYPE_CHECKING:  # the names of engines and judges are wanted for --help, asyncio is not
    from dpo_cli.endpoint.costs import Receipt


class Task(Struct, kw_only=True):
    """One prompt's completions, to be judged.

    `stands` has, for each completion, the index of the one that stands for it: its own, that of an earlier identical
    one, or None if the completion is not usable. `failures` counts the former runs that ended in an error.
    """

    id: str
    completions_id: str
    prompt: list[Message]
    completions: list[str]
    stands: list[int | None]
    failures: int = 0

    @property
    def shown(self) -> list[int]:
        """Indices of the completions that a judge sees: usable, and no two identical."""
        return [index for index, stand in enumerate(self.stands) if stand == index]


class Judge(Protocol):
    """What a judge module offers."""

    def identity(self, config: Config) -> dict[str, Any]:
        """The settings that make a judgment comparable with others; one file holds judgments of one identity."""

    def calls(self, tasks: Sequence[Task], config: Config) -> int:
        """How many paid calls the tasks owe at most."""

    def judge(
        self, tasks: Sequence[Task], config: Config, deliver: Callable[[Judgment], None], progress: Progress
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


def make_task(row: Completions, usable: Callable[[str], bool], failures: int = 0) -> Task:
    """A task for one prompt's completions; identical (see `canonical`) and unusable ones will not be shown."""
    first: dict[str, int] = {}
    stands = [
        first.setdefault(canonical(text), index) if canonical(text) and usable(text) else None
        for index, text in enumerate(row.completions)
    ]
    return Task(
        id=row.id,
        completions_id=completions_id(row.completions),
        prompt=row.prompt,
        completions=row.completions,
        stands=stands,
        failures=failures,
    )
