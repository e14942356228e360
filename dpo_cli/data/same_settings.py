"""Rows, runs and jobs that were made with other settings are never mixed with new ones: one check, one wording."""

from collections.abc import Callable, Mapping
from typing import Any

from dpo_cli.errors import UserError


def refuse_other_settings(
    subject: str,
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    where: str,
    hint: str,
    name: Callable[[str], str] = str,
) -> None:
    """See that something was made with the settings of now.

    Args:
        subject: what was made: `made`, `the run was started`.
        before: the settings that it was made with, nested or not.
        now: those of now.
        where: the file, with its line, or the name.
        hint: the ways to go on.
        name: a setting's full name from its key.

    Raises:
        UserError: it was not; names the settings that differ.
    """
    then, today = flat(before), flat(now)
    changes = [
        f"{name(key)} was {then.get(key)}, now {today.get(key)}"
        for key in dict.fromkeys([*then, *today])
        if then.get(key) != today.get(key)
    ]
    if changes:
        raise UserError(f"{subject} with other settings: {'; '.join(changes)}", where=where, hint=hint)


def flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as dotted keys."""
    found: dict[str, Any] = {}
    for key, inner in value.items():
        found |= flat(inner, f"{prefix}{key}.") if isinstance(inner, dict) else {f"{prefix}{key}": inner}
    return found
