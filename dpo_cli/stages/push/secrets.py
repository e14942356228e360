"""Secrets in what is about to leave this machine: credentials by their shape, and the environment's own by their value.

Reads text files; weights are not searched. Says where, and what kind; never the secret.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from dpo_cli.storage import Source

TEXT = (".json", ".jsonl", ".md", ".jinja", ".txt", ".toml", ".yaml")
SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASSWORD", re.IGNORECASE)
LEAST = 12  # characters of a value of the environment that could be nothing but a secret
# What it is -> how it looks, and what it begins with: to look for these words first takes a tenth of the time.
SHAPES = {
    "a Hugging Face token": (rb"\bhf_[A-Za-z0-9]{30,}", (b"hf_",)),
    "an OpenAI key": (rb"\bsk-[A-Za-z0-9_-]{32,}", (b"sk-",)),
    "a GitHub token": (rb"\bgh[pousr]_[A-Za-z0-9]{36,}", (b"ghp_", b"gho_", b"ghu_", b"ghs_", b"ghr_")),
    "a Modal token": (rb"\ba[ks]-[A-Za-z0-9]{20,}", (b"ak-", b"as-")),
    "an AWS key": (rb"\bAKIA[0-9A-Z]{16}\b", (b"AKIA",)),
    "a Google key": (rb"\bAIza[0-9A-Za-z_-]{35}", (b"AIza",)),
    "a private key": (rb"-----BEGIN [A-Z ]*PRIVATE KEY-----", (b"-----BEGIN ",)),
    "a URL with a password": (rb"\b[a-z][a-z0-9+.-]*://[^/\s:@\"']+:[^/\s:@\"']+@[\w.-]+", (b"://",)),
}
BLOCK_BYTES = 1 << 16  # looked through at once


class _Shape(NamedTuple):
    """What is looked for: its name, its expression, and words of which one is in whatever that matches."""

    what: str
    pattern: re.Pattern[bytes]
    words: tuple[bytes, ...]

    def may_be_in(self, text: bytes) -> bool:
        return any(word in text for word in self.words)


class Leak(NamedTuple):
    """Where a secret stands (`file:line`), and what it is."""

    where: str
    what: str


def find(files: Mapping[str, Source], environment: Mapping[str, str] | None = None) -> list[Leak]:
    """Everything that looks like a secret, or is the value of a variable that is named like one.

    Args:
        files: name -> file or content.
        environment: defaults to the process's.
    """
    environment = os.environ if environment is None else environment
    shapes = [_Shape(what, re.compile(pattern), words) for what, (pattern, words) in SHAPES.items()]
    shapes += [
        _Shape(f"the value of {name}", re.compile(re.escape(value.encode())), (value.encode(),))
        for name, value in environment.items()
        if SECRET_NAME.search(name) and len(value) >= LEAST
    ]
    return [
        Leak(f"{name}:{number}", shape.what)
        for name, source in files.items()
        if name.endswith(TEXT)
        for first, lines in _blocks(source)
        if (possible := _possible(shapes, b"".join(lines)))
        for number, line in enumerate(lines, first)
        for shape in _possible(possible, line)
        if shape.pattern.search(line)
    ]


def _possible(shapes: Iterable[_Shape], text: bytes) -> list[_Shape]:
    return [shape for shape in shapes if shape.may_be_in(text)]


def _blocks(source: Source) -> Iterator[tuple[int, list[bytes]]]:
    """Yield (number of the first, lines), some at a time."""
    if isinstance(source, bytes):
        yield 1, source.splitlines()
        return
    number = 1
    with source.open("rb") as file:
        while lines := file.readlines(BLOCK_BYTES):
            yield number, lines
            number += len(lines)
