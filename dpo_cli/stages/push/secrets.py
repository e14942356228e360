"""Secrets in what is about to leave this machine: credentials by their shape, and the environment's own by their value.

Reads text files; weights are not searched. Says where, and what kind; never the secret.
"""

import os
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from dpo_cli.storage import Source

TEXT = (".json", ".jsonl", ".md", ".jinja", ".txt", ".toml", ".yaml")
SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASSWORD", re.IGNORECASE)
LEAST = 12  # characters of a value of the environment that could be nothing but a secret
SHAPES = {
    "a Hugging Face token": rb"\bhf_[A-Za-z0-9]{30,}",
    "an OpenAI key": rb"\bsk-[A-Za-z0-9_-]{32,}",
    "a GitHub token": rb"\bgh[pousr]_[A-Za-z0-9]{36,}",
    "a Modal token": rb"\ba[ks]-[A-Za-z0-9]{20,}",
    "an AWS key": rb"\bAKIA[0-9A-Z]{16}\b",
    "a Google key": rb"\bAIza[0-9A-Za-z_-]{35}",
    "a private key": rb"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "a URL with a password": rb"\b[a-z][a-z0-9+.-]*://[^/\s:@\"']+:[^/\s:@\"']+@[\w.-]+",
}


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
    patterns = {what: re.compile(shape) for what, shape in SHAPES.items()}
    patterns |= {
        f"the value of {name}": re.compile(re.escape(value.encode()))
        for name, value in environment.items()
        if SECRET_NAME.search(name) and len(value) >= LEAST
    }
    return [
        Leak(f"{name}:{number}", what)
        for name, source in files.items()
        if name.endswith(TEXT)
        for number, line in enumerate(_lines(source), 1)
        for what, pattern in patterns.items()
        if pattern.search(line)
    ]


def _lines(source: Source) -> Iterator[bytes]:
    if isinstance(source, bytes):
        yield from source.splitlines()
        return
    with source.open("rb") as file:
        yield from file
