"""Preference rows of other tools, each told by its columns: a pair, or one prompt's answers with their scores.

Reads TRL (conversational, plain, with the prompt inside both sides), UltraFeedback (binarized and raw), Anthropic HH,
OpenAI (also Azure, Fireworks, Together), LLaMA-Factory, axolotl, ms-swift, Argilla and distilabel, NeMo RL, KTO, two
answers with what compares them, and (prompt, good, bad). Writes nothing. The forms are those of the tools' own readers
and documents in November 2026.
Plain `chosen` and `rejected` without a prompt are divided where TRL divides them, at what both begin with.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

from dpo_cli.data.bad_rows import Fault
from dpo_cli.data.columns import (
    ANSWER,
    ASKED,
    BAD,
    GOOD,
    LABEL,
    MESSAGES,
    Cells,
    read_conversation,
    read_turns,
    with_system,
)
from dpo_cli.data.formats.compared import is_compared, read_compared
from dpo_cli.data.formats.pairs import (
    HH_TURN,
    divide,
    last_turn,
    longer,
    make,
    read_side,
    stripped,
    transcript,
    transcript_prompt,
    without_chosen,
)
from dpo_cli.data.formats.ratings import ScoredAnswers, is_ranked, is_rated, is_raw, read_kto, read_nemo_rl, read_rated
from dpo_cli.data.messages import Message, Prompt, is_plain, read_messages, read_tools
from dpo_cli.data.records import Preference, preference_id

HINT = (
    'rows with "prompt", "chosen" and "rejected" (texts or lists of {"role", "content"} messages), '
    "or --columns prompt=NAME,chosen=NAME,rejected=NAME"
)

LARGEST = 1e300  # of a number that is read without a closer look
_NUMBERS = ("chosen_score", "rejected_score", "score_gap", "margin", "weight")
_OURS = {"id", "prompt", "chosen", "rejected", "chosen_finish_reason", "rejected_finish_reason", *_NUMBERS}


def read_row(
    row: dict[str, Any], mapping: dict[str, str] | None = None, dropped: Counter[str] | None = None
) -> tuple[str, Preference | ScoredAnswers]:
    """Name of the format of a row, and what it says.

    Args:
        row: as the file has it.
        mapping: what columns mean, as `columns.read_mapping` gives it.
        dropped: counts columns that are left out.

    Raises:
        ValueError: it is of no known format, or the field that is wrong.
    """
    if not mapping and (ours := read_ours(row)) is not None:
        return "trl-conversational", ours
    cells = Cells(row, mapping, dropped)
    name, read = detect(cells)
    try:
        found = read(cells)
    except ValueError as error:
        hint = error.hint if isinstance(error, Fault) else None
        raise Fault(f"{error} (read as {name})", hint=hint) from None
    cells.finish()
    return name, found


def read_pair(cells: Cells) -> tuple[str, Preference]:
    """As `read_row`, of a row that is a pair.

    Raises:
        ValueError: it is none.
    """
    name, read = detect(cells)
    found = read(cells)
    if isinstance(found, ScoredAnswers):
        raise ValueError(
            f"no pair but several answers with scores ({name}): nothing-dpo pair --import makes pairs of it"
        )
    cells.finish()
    return name, found


def read_ours(row: dict[str, Any]) -> Preference | None:
    """The pair of a row as `pair` writes most: what `read_pair` makes of it, in a tenth of the time; None of others."""
    prompt, chosen, rejected = row.get("prompt"), row.get("chosen"), row.get("rejected")
    if not (row.keys() <= _OURS and is_plain(prompt) and is_plain(chosen) and is_plain(rejected)):
        return None
    if not chosen[0]["role"] == rejected[0]["role"] == "assistant" or prompt[-1]["role"] == chosen[-1]["role"]:
        return None
    if HH_TURN.match(prompt[0]["content"]) or not any(message["content"].strip() for message in prompt):
        return None
    numbers = [row.get(name) for name in _NUMBERS]
    if not all(one is None or (type(one) in (int, float) and -LARGEST < one < LARGEST) for one in numbers):
        return None
    good, bad, gap, margin, weight = (None if one is None else float(one) for one in numbers)
    own, reasons = row.get("id"), [row.get(f"{side}_finish_reason") for side in ("chosen", "rejected")]
    return Preference(
        id=own if isinstance(own, str) and own else preference_id(prompt, chosen, rejected),
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        chosen_score=good,
        rejected_score=bad,
        score_gap=gap if good is None or bad is None else good - bad,
        chosen_finish_reason=reasons[0] if isinstance(reasons[0], str) else None,
        rejected_finish_reason=reasons[1] if isinstance(reasons[1], str) else None,
        margin=margin,
        weight=weight,
    )


def detect(cells: Cells) -> tuple[str, Callable[[Cells], Preference | ScoredAnswers]]:
    """Name and reader of the format that a row is of.

    Raises:
        Fault: it is of no known format.
    """
    for name, fits, read in _OTHERS:
        if fits(cells):
            return name, read
    good, bad = (cells.peek(cells.has(names)) for names in (GOOD, BAD))
    if good is None or bad is None:
        missing = "chosen" if good is None else "rejected"
        if cells.has((*ASKED, *MESSAGES)):
            raise Fault(f'no "{missing}"; the row has {", ".join(cells.names)}', hint=HINT)
        raise Fault(f"no known preference format; the row has {', '.join(cells.names) or 'nothing'}", hint=HINT)
    asked = cells.has(("prompt", *MESSAGES, *ASKED))
    if asked is None:
        if not isinstance(good, str):
            return "trl-implicit-prompt", _pair
        return ("hh", _hh) if HH_TURN.match(good) else ("trl-implicit-prompt-plain", _common_text)
    return _named(cells, asked, isinstance(good, str)), _pair


def _named(cells: Cells, asked: str, plain: bool) -> str:
    """Which tool calls the columns of a pair with a prompt so."""
    if "score_chosen" in cells and "score_rejected" in cells and not plain:
        return "ultrafeedback"
    if "chosen" in cells and "rejected" in cells:
        known = {"prompt": "trl-plain" if plain else "trl-conversational", "messages": "axolotl-chat-template",
                 "conversations": "llama-factory-sharegpt", "instruction": "llama-factory-alpaca",
                 "question": "axolotl-intel"}  # fmt: skip
        return known.get(asked, "prompt-good-bad")
    return "prompt-good-bad"


def _pair(cells: Cells) -> Preference:
    """A prompt and two sides; sides that hold the whole conversation share its beginning, which is the prompt."""
    chosen, rejected = (read_side(cells, names, side) for names, side in ((GOOD, "chosen"), (BAD, "rejected")))
    given = read_conversation(cells, keep_answer=True) if cells.has(("prompt", *MESSAGES, *ASKED)) else None
    if given is not None:
        asked = transcript_prompt(given)
        if asked is not given:
            chosen, rejected = stripped(chosen), stripped(rejected)
        given = without_chosen(asked, chosen)
    if given is not None and chosen[0]["role"] == rejected[0]["role"] == "assistant":
        return make(cells, given, chosen, rejected)
    prompt, chosen, rejected = divide(chosen, rejected)
    if given is not None:
        return make(cells, Prompt(longer(prompt, given.messages), given.tools), chosen, rejected)
    prompt = with_system(prompt, cells)
    return make(cells, Prompt(prompt, read_tools(cells.take("tools"))), chosen, rejected)


def _common_text(cells: Cells) -> Preference:
    """Two texts whose common beginning is the prompt; it ends where TRL ends it, before a blank."""
    good, bad = (cells.take(*names) for names in (GOOD, BAD))
    if not isinstance(good, str) or not isinstance(bad, str):
        raise ValueError('"chosen" and "rejected" are not both texts')
    end = next((index for index, (a, b) in enumerate(zip(good, bad, strict=False)) if a != b), min(len(good), len(bad)))
    end -= end > 0 and good[end - 1] == " "
    if not good[:end].strip():
        raise ValueError('no "prompt", and "chosen" and "rejected" have no beginning in common that could be it')
    prompt: list[Message] = [{"role": "user", "content": good[:end]}]
    sides: list[list[Message]] = [[{"role": "assistant", "content": text[end:]}] for text in (good, bad)]
    return make(cells, Prompt(with_system(prompt, cells)), *sides)


def _hh(cells: Cells) -> Preference:
    r"""Anthropic HH: each side is a transcript, `\n\nHuman: … \n\nAssistant: …`, its last turn the answer."""
    sides = [transcript(cells.take(*names), side) for names, side in ((GOOD, "chosen"), (BAD, "rejected"))]
    prompt, chosen, rejected = divide(*sides)
    return make(cells, Prompt(with_system(prompt, cells)), chosen, rejected)


def _openai(cells: Cells) -> Preference:
    """`{"input": {"messages", "tools"}, "preferred_output", "non_preferred_output"}`."""
    chosen, rejected = (read_side(cells, names, side) for names, side in ((GOOD, "chosen"), (BAD, "rejected")))
    asked = cells.peek("input")
    if not isinstance(asked, dict):
        return make(cells, read_conversation(cells), chosen, rejected)
    cells.take("input")
    inner = Cells(asked, dropped=cells.dropped)
    prompt = read_conversation(inner, keep_answer=True)
    inner.finish()
    return make(cells, prompt, chosen, rejected)


def _ms_swift(cells: Cells) -> Preference:
    """`messages` that end with the chosen answer, or `query` and `response`; beside them `rejected_response`."""
    whole = cells.has(MESSAGES)
    if whole and "query" not in cells:
        messages = read_turns(cells.peek(whole), cells.own(whole))
        start = last_turn(messages)
        if not start:
            raise ValueError(f'"{cells.own(whole)}" does not end with an assistant message')
        prompt = read_conversation(cells, keep_answer=True)
        # A system text may have come before them.
        start += len(prompt.messages) - len(messages)
        prompt, chosen = Prompt(prompt.messages[:start], prompt.tools), prompt.messages[start:]
    else:
        prompt = read_conversation(cells)
        chosen = read_messages(cells.take(*ANSWER), "response", role="assistant")
    other = cells.take("rejected_messages")
    if other is None:
        return make(cells, prompt, chosen, read_messages(cells.take(*BAD), "rejected_response", role="assistant"))
    rejected = read_turns(other, "rejected_messages", cells.dropped)
    if prompt.messages[0]["role"] == "system" and rejected[0]["role"] != "system":
        rejected = [prompt.messages[0], *rejected]
    both, chosen, rejected = divide(prompt.messages + chosen, rejected)
    return make(cells, Prompt(both, prompt.tools), chosen, rejected)


def _is_ms_swift(cells: Cells) -> bool:
    if cells.has(GOOD):
        return False
    return "rejected_messages" in cells or (
        "rejected_response" in cells and cells.has((*MESSAGES, *ANSWER)) is not None
    )


# Formats that are not a prompt with `chosen` and `rejected`: name, how it is told, its reader.
_OTHERS: list[tuple[str, Callable[[Cells], bool], Callable[[Cells], Preference | ScoredAnswers]]] = [
    ("openai", lambda cells: cells.has(("preferred_output", "preferred_completion")) is not None, _openai),
    ("nemo-rl", is_ranked, read_nemo_rl),
    ("ultrafeedback-raw", is_raw, read_rated),
    ("distilabel", is_rated, read_rated),
    ("ms-swift", _is_ms_swift, _ms_swift),
    ("two-answers", is_compared, read_compared),
    ("kto", lambda cells: cells.has(LABEL) is not None and cells.has((*GOOD, *BAD)) is None, read_kto),
]
