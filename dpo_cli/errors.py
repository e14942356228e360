"""The one error that a person sees, the exit codes, and the check for optional extras.

Everything that can go wrong in a way that a user can mend is a `UserError`: what failed, where
(`completions.jsonl:412`) and the next command to type. `cli.main` turns it into one line and an exit code.
"""

import os
from enum import IntEnum
from importlib.util import find_spec

one_command = False  # whether this process runs one command and ends


class Exit(IntEnum):
    """Exit codes; they mean the same in every command and on every backend."""

    OK = 0
    FAILED = 1
    USAGE = 2  # usage, configuration or bad input
    GATE = 3  # done, but a quality gate says no
    BUDGET = 4  # budget reached, resumable
    INTERRUPTED = 130  # resumable
    PREEMPTED = 143  # resumable


STOPPED = (Exit.INTERRUPTED, Exit.PREEMPTED)  # from outside, by a signal


class UserError(Exception):
    """A fault that the user can mend.

    Args:
        message: what failed, one sentence.
        where: file, `file:line`, or configuration key.
        hint: what to do next, ideally a command to type.
        code: the exit code.
    """

    def __init__(
        self, message: str, *, where: str | None = None, hint: str | None = None, code: Exit = Exit.USAGE
    ) -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.hint = hint
        self.code = code

    def __str__(self) -> str:
        return f"{self.where}: {self.message}" if self.where else self.message


# The module that shows whether an extra is installed. The extras themselves are in pyproject.toml.
EXTRAS = {
    "train": "trl", "qlora": "bitsandbytes", "modal": "modal", "gke": "kubernetes", "gcs": "google_crc32c",
    "hub": "huggingface_hub", "harness": "lm_eval",
}  # fmt: skip


def require(extra: str, purpose: str) -> None:
    """Raise the install command if an optional extra is missing.

    Raises:
        UserError: naming `pip install 'nothing-dpo[extra]'`.
    """
    if find_spec(EXTRAS[extra]) is None:
        raise UserError(f"{purpose} needs the extra '{extra}'", hint=f"pip install 'nothing-dpo[{extra}]'")
    _settle_libraries()


def _settle_libraries() -> None:
    """What must be set before the optional libraries load."""
    import logging

    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # a kernel for CPUs is missing, it says at every start
