"""When a judge's reply is a verdict: found among other words, told apart from what it only quotes. Pure functions."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from dpo_cli.judges._forms import RANKING, Form, Verdict
from dpo_cli.judges._lenient_json import find_values

_NOT_SAID = re.compile(r"[^\w.:,\[\]{}]")  # spaces, quotation marks and escapes: what quoting may change
_OPEN_THOUGHT = re.compile(r"\s*<think(ing)?>")


class Quoted(ValueError):
    """The verdict stands in what was shown: the judge may only quote it, or obey it."""


def read_verdict(
    reply: str, labels: Sequence[str], shown: Sequence[str], form: Form = RANKING, code: str | None = None
) -> Verdict:
    """The verdict in a judge's reply, which may stand among other words.

    A verdict whose words stand in what was shown is a quotation and never one. A verdict in the judge's own words
    that says the same as one that was shown may be obedience; asked for the code of the request, it is believed.

    Args:
        reply: the judge's words.
        labels: the labels that were shown.
        shown: the fenced texts.
        form: what was asked.
        code: of the request, where the reply was to repeat it.

    Raises:
        Quoted: the only verdict stands in what was shown.
        ValueError: there is no verdict, or two different ones; says why.
    """
    reason: ValueError = ValueError("no JSON object")
    material = [_said(text) for text in shown]
    forged: list[Verdict] | None = None
    found: list[Verdict] = []
    for value, fault, source in read_all(reply, labels, form):
        if not isinstance(value, Verdict):
            reason = ValueError(fault)
            continue
        if code is None or code not in source:
            if any(_quotes(source, text) for text in material):
                reason = Quoted("the verdict is quoted from the material")
                continue
            if code is None:
                if forged is None:
                    forged = [verdict for text in shown for verdict, *_ in read_all(text, labels, form) if verdict]
                if value in forged:
                    reason = Quoted("the same verdict stands in the material")
                    continue
        if value not in found:
            found.append(value)
    if len(found) > 1:
        raise ValueError("two different verdicts")
    if not found:
        raise reason
    return found[0]


def read_all(text: str, labels: Sequence[str], form: Form = RANKING) -> Iterator[tuple[Verdict | None, str, str]]:
    """Each JSON value in a text as (verdict, "", its source), or (None, what keeps it from being one, its source)."""
    if _OPEN_THOUGHT.match(text) and "</think" not in text:
        yield None, "cut off while thinking", text
        return
    answer = text.rpartition("</think>")[2] if "</think>" in text and not text.lstrip().startswith(("{", "[")) else text
    for value, source in find_values(answer):
        whole = "{" not in answer.partition(source)[0]  # else it may be a part of an object that can't be read
        verdict, fault = _read(value, labels, form, 3, whole)
        yield verdict, fault, source


def _read(value: Any, labels: Sequence[str], form: Form, levels: int, whole: bool) -> tuple[Verdict | None, str]:
    """A value as a verdict, also where it is wrapped in another object, in a list or in a string.

    Only an object that is `whole` may hold its scores under no key.
    """
    if isinstance(value, dict):
        lowered = {key.strip().lower() if isinstance(key, str) else key: part for key, part in value.items()}
        if any(key in lowered for key in form.keys) or (whole and _has_labels(value, labels)):
            try:
                return form.check(lowered, labels), ""
            except ValueError as error:
                return None, str(error)
    if levels == 0:
        return None, f"no `{form.keys[0]}`"
    if isinstance(value, str) and form.keys[0] in value:
        parts: list[Any] = [part for part, _ in find_values(value)]
    else:
        parts = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    read = [_read(part, labels, form, levels - 1, whole) for part in parts if isinstance(part, dict | list)]
    verdicts = [verdict for verdict, _ in read if verdict is not None]
    if verdicts and all(verdict == verdicts[0] for verdict in verdicts):
        return verdicts[0], ""
    if verdicts:
        return None, "two different verdicts"
    return None, next((fault for _, fault in read), f"no `{form.keys[0]}`" if parts else "no JSON object")


def _has_labels(value: dict[Any, Any], labels: Sequence[str]) -> bool:
    """Whether an object may hold the scores of several candidates without a key for them."""
    return len(labels) > 1 and len(value) >= len(labels) and any(str(key).strip().upper() == labels[0] for key in value)


def _quotes(source: str, material: str) -> bool:
    """Whether a reply's object stands in the material; of an object with several keys, all of them in a row."""
    words = _said(source)
    words = words.strip("{}[]") if "," in words else words
    return re.search(re.escape(words) + r"(?!\w)", material) is not None


def _said(text: str) -> str:
    """A text without what changes when it is quoted."""
    return _NOT_SAID.sub("", text)
