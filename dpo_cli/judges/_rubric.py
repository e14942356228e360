"""The criteria of a judge: the user's rubric or the one that is shipped, as a whole or criterion by criterion."""

import re
from pathlib import Path

from msgspec import Struct

from dpo_cli.errors import UserError

_SECTION = re.compile(r"^##[ \t]+(.+?)[ \t]*#*[ \t]*$", re.M)
_COMMON = re.compile(r"^#[ \t]+\S.*$", re.M)  # a heading of the first level ends the criterion before it
_WEIGHT = re.compile(r"[\s(\[]*\b(?:weight|weighs)[\s:=]*(\d+(?:\.\d+)?)[\s)\]]*$", re.I)
_WORD = re.compile(r"^criterion\b[\s:.\d-]*", re.I)
_ALONE = "Judge by this criterion alone, as if the others did not matter."


class Criterion(Struct, frozen=True):
    """What is asked in one request: the text that the judge reads, and how much its scores count.

    `name` is empty where the rubric is asked as a whole.
    """

    name: str
    text: str
    weight: float = 1.0


def read_criteria(path: str | None) -> list[Criterion]:
    """The criteria of a rubric, each to be scored apart.

    Each section under a `##` heading is a criterion, if there are two or more; its heading may end with `(weight 2)`.
    What stands before the first of them, or under a `#` heading after them, belongs to each.

    Raises:
        UserError: as `read_rubric`; two criteria of one name, or no weight above 0.
    """
    rubric = read_rubric(path)
    headings = list(_SECTION.finditer(rubric))
    if len(headings) < 2:
        return [Criterion("", rubric)]
    common, found = [rubric[: headings[0].start()].strip()], []
    for heading, following in zip(headings, [*headings[1:], None], strict=True):
        end = following.start() if following else len(rubric)
        own = rubric[heading.end() : end]
        if after := _COMMON.search(own):
            common.append(own[after.start() :].strip())
            own = own[: after.start()]
        weight = _WEIGHT.search(heading[1])
        name = _WORD.sub("", heading[1][: weight.start()] if weight else heading[1]).strip() or heading[1]
        found.append(Criterion(name, own.strip(), float(weight[1]) if weight else 1.0))
    names = [one.name for one in found]
    if len(set(names)) < len(names):
        raise UserError("two criteria have the same name", where=path, hint="other ## headings")
    if not any(one.weight for one in found):
        raise UserError("no criterion has a weight above 0", where=path, hint="## Name (weight 1)")
    shared = "\n\n".join(part for part in common if part)
    return [Criterion(one.name, _alone(shared, one), one.weight) for one in found if one.weight]


def _alone(shared: str, criterion: Criterion) -> str:
    return "\n\n".join(part for part in (shared, f"# {criterion.name}", criterion.text, _ALONE) if part)


def read_rubric(path: str | None) -> str:
    """The criteria as text: the user's file, or the one that is shipped.

    Raises:
        UserError: the file can't be read or is empty.
    """
    file = Path(path) if path else Path(__file__).with_name("rubric.md")
    try:
        text = file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"can't read the rubric: {error}", where="judge.rubric") from None
    if not text.strip():
        raise UserError("the rubric is empty", where=str(file))
    return text
