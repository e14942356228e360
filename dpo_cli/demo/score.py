"""The demo's judge, a function for `--judge function --function dpo_cli.demo.score:voices`.

It measures one thing that can be counted: do the people in the scene talk like themselves?
"""

import re

from dpo_cli.demo.scenes import cast
from dpo_cli.schema import Message

LINE = re.compile(r"\[([A-Z]+)\] (\S.*)")


def voices(prompt: list[Message], completion: str) -> float:
    """Share of the lines, times ten, that are in the voice of who says them: 0 to 10, whatever the number of lines.

    A line counts if it is `[CHARACTER] line`, has one of the character's own words, and was not said before in the
    scene.
    """
    _, characters = cast()
    said = set(prompt[-1]["content"].splitlines())
    lines = completion.splitlines()
    hits = 0
    for line in lines:
        match = LINE.fullmatch(line)
        if match and line not in said and match[1] in characters:
            spoken = set(re.findall(r"[a-z]+", match[2].lower()))
            hits += not spoken.isdisjoint(characters[match[1]].words)
        said.add(line)
    return 10 * hits / len(lines) if lines else 0.0
