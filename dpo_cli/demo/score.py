"""The demo's judge, a function for `--judge function --function dpo_cli.demo.score:voices`.

It measures one thing that can be counted: do the people in the scene talk like themselves?
"""

import re

from dpo_cli.data.records import Message
from dpo_cli.demo.scenes import cast

LINE = re.compile(r"\[([A-Z]+)\] (\S.*)")
LINES = 3  # how many go on from an opening in scenes.py


def voices(prompt: list[Message], completion: str) -> float:
    """How much of a scene is in the voices of those who speak, from 0 to 10.

    Of the three lines that a scene goes on with, the share that is well-formed (`[CHARACTER] line`), has one of the
    character's own words and was not said before. Fewer lines earn less and more lines dilute it, so that neither
    short nor long answers are better for their length.
    """
    _, characters = cast()
    said = set(prompt[-1]["content"].splitlines())
    lines = completion.splitlines()
    hits = 0
    for line in lines[:LINES]:
        match = LINE.fullmatch(line)
        if match and line not in said and match[1] in characters:
            spoken = set(re.findall(r"[a-z]+", match[2].lower()))
            hits += not spoken.isdisjoint(characters[match[1]].words)
        said.add(line)
    return 10 * hits / max(LINES, len(lines))
