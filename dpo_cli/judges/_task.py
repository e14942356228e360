"""What a judge is given: one prompt's completions, each distinct usable one to be shown once."""

from collections.abc import Callable, Sequence

from msgspec import Struct

from dpo_cli.data.records import Completions, Message, Tool, canonical, completions_id, said


class Task(Struct, kw_only=True):
    """One prompt's completions, to be judged.

    `stands` has, for each completion, the index of the one that stands for it: its own, that of an earlier identical
    one, or None if the completion is not usable. `failures` counts the former runs that ended in an error. A completion
    that is more than its text is its message as `said` writes it; `tools` are the prompt's.
    """

    id: str
    completions_id: str
    prompt: list[Message]
    completions: list[str]
    stands: list[int | None]
    failures: int = 0
    tools: list[Tool] | None = None

    @property
    def shown(self) -> list[int]:
        """Indices of the completions that a judge sees: usable, and no two identical."""
        return [index for index, stand in enumerate(self.stands) if stand == index]


def make_task(row: Completions, usable: Callable[[str], bool], failures: int = 0) -> Task:
    """A task for one prompt's completions; identical (see `canonical`) and unusable ones will not be shown."""
    texts = said_by(row)
    return Task(
        id=row.id,
        completions_id=completions_id(row.completions, row.messages),
        prompt=row.prompt,
        completions=texts,
        stands=stands_of(texts, usable),
        failures=failures,
        tools=row.tools,
    )


def said_by(row: Completions) -> list[str]:
    """One prompt's completions as a judge reads them."""
    return [said(answer) for answer in row.answers] if any(row.messages) else row.completions


def stands_of(texts: Sequence[str], usable: Callable[[str], bool]) -> list[int | None]:
    """`Task.stands` of completions."""
    first: dict[str, int] = {}
    return [
        first.setdefault(key, index) if (key := canonical(text)) and usable(text) else None
        for index, text in enumerate(texts)
    ]
