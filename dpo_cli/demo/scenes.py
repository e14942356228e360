"""Scenes for the demo, put together from the hand-written lines of scenes.txt: the same ones for the same seed.

A scene is about one thing that broke; two lines open it, three go on, and who spoke last does not speak next. Each
line is in its speaker's voice with a probability that the caller sets, so that training data can be lukewarm.
"""

import random
from functools import cache
from importlib.resources import files

from msgspec import Struct, field


class Character(Struct):
    """One regular: the words that give the voice away, and lines by kind."""

    words: list[str] = field(default_factory=list)
    opens: list[str] = field(default_factory=list)
    voice: list[str] = field(default_factory=list)
    plain: list[str] = field(default_factory=list)


class Scene(Struct):
    """The two lines that open a scene, and the three that go on."""

    opening: str
    rest: str


@cache
def cast() -> tuple[list[str], dict[str, Character]]:
    """The things that break, and the characters by name."""
    things: list[str] = []
    characters: dict[str, Character] = {}
    current: list[str] = things
    for line in files("dpo_cli.demo").joinpath("scenes.txt").read_text("utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        if line.isupper():
            character = characters[line] = Character()
        elif line == "things":
            current = things
        elif line in Character.__struct_fields__:
            current = getattr(character, line)
        elif current is things or current is character.words:
            current += line.split()
        else:
            current.append(line)
    return things, characters


def make_scenes(count: int, voiced: float, seed: int) -> list[Scene]:
    """Distinct scenes, no two with the same opening.

    Args:
        count: how many; there are about 19,000 openings.
        voiced: probability that a line after the first is in its speaker's voice.
        seed: the same one gives the same scenes.
    """
    things, characters = cast()
    draw = random.Random(seed)
    scenes: dict[str, Scene] = {}
    while len(scenes) < count:
        thing = draw.choice(things)
        speaker = draw.choice(list(characters))
        lines = [(speaker, draw.choice(characters[speaker].opens))]
        while len(lines) < 5:
            speaker = draw.choice([name for name in characters if name != speaker])
            kind = characters[speaker].voice if draw.random() < voiced else characters[speaker].plain
            lines.append((speaker, draw.choice([line for line in kind if (speaker, line) not in lines])))
        said = [f"[{name}] {line.replace('{thing}', thing)}" for name, line in lines]
        scene = Scene("\n".join(said[:2]), "\n".join(said[2:]))
        scenes.setdefault(scene.opening, scene)
    return list(scenes.values())
