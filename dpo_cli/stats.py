"""What `inspect` says about pairs, completions, judgments and runs: pure numbers, printed as they are by `--json`.

Takes records and metric files; prints nothing. Lengths are in words (what spaces and line ends part) and characters,
since no tokenizer is at hand. What the judgments tell of their judge is `audit`'s.
"""

import json
import math
import statistics
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from dpo_cli import config as configuration
from dpo_cli.errors import UserError
from dpo_cli.judges._agreement import wilson
from dpo_cli.schema import Completions, Judgment, Message, Order, Preference, Usage

BINS = 10


class Spread(Struct):
    """Where a set of numbers lies."""

    n: int
    min: float
    median: float
    mean: float
    max: float


class Histogram(Struct):
    """Counts from one edge up to, and without, the next; `edges` has one element more than `counts`.

    `whole` says that the values are whole numbers and each bin is one of them.
    """

    edges: list[float]
    counts: list[int]
    whole: bool = False

    @property
    def labels(self) -> list[str]:
        """What each bin holds, in words."""
        names = [f"{edge:,.6g}" for edge in self.edges]
        return names[:-1] if self.whole else [f"{low} – {high}" for low, high in pairwise(names)]


class Proportion(Struct):
    """A share with its 95% Wilson interval; `z` is the distance from one half in standard errors."""

    count: int
    n: int
    share: float
    low: float
    high: float
    z: float


class Lengths(Struct):
    """Lengths of texts."""

    words: Spread | None
    characters: Spread | None


class PairStats(Struct, kw_only=True):
    """`inspect pairs --stats`.

    `pairs` and `prompts` count by side (train, val). `cut` counts completions that the token limit ended, where that
    is known. `longer_chosen` is over the pairs whose sides differ in characters. `duplicate_pairs` counts rows beyond
    the first of the same three texts, `repeated_prompts` prompts with more than one pair, `shared_prompts` prompts
    that stand on more than one side of the split, `contradictory_pairs` pairs that another row holds the other way
    round, `identical_sides` rows whose chosen text is the rejected one.
    """

    pairs: dict[str, int]
    prompts: dict[str, int]
    gaps: Spread | None
    gap_histogram: Histogram | None
    chosen: Lengths
    rejected: Lengths
    longer_chosen: Proportion | None
    chosen_cut: Proportion | None
    rejected_cut: Proportion | None
    duplicate_pairs: int
    repeated_prompts: int
    shared_prompts: int
    contradictory_pairs: int
    identical_sides: int


class CompletionStats(Struct, kw_only=True):
    """`inspect completions --stats`.

    `per_prompt` counts prompts by their number of completions, `identical` completions that repeat an earlier one
    of their prompt (white space apart), `empty` those without text.
    """

    prompts: int
    completions: int
    per_prompt: dict[int, int]
    finish_reasons: dict[str, int]
    models: dict[str, int]
    identical: int
    empty: int
    lengths: Lengths
    usage: Usage


class Run(Struct, kw_only=True):
    """`inspect run`: what a run folder holds.

    `series` maps a metric's name to its points (step, value) and holds evaluations under their `eval_` names; a value
    that is not a number is NaN (`null` in JSON). `last` is the last point of each. `config` is what the run was asked
    for: settings, versions, hashes of its inputs.
    """

    name: str
    series: dict[str, list[tuple[float, float]]]
    last: dict[str, float]
    events: list[dict[str, Any]]
    report: dict[str, Any] | None
    config: dict[str, Any] | None = None

    def acts(self) -> list[dict[str, Any]]:
        """What the guards found and did, in order: events with an action, rollbacks, the end."""
        told = [event for event in self.events if "action" in event or event.get("event") in ("rolled_back", "ended")]
        return [event for event in told if isinstance(event.get("step"), int | float)]


class Setting(Struct):
    """One row of `inspect config`."""

    key: str
    value: Any
    source: str
    description: str


def spread(values: Sequence[float]) -> Spread | None:
    """Where numbers lie; None if there are none."""
    if not len(values):
        return None
    return Spread(len(values), min(values), statistics.median(values), statistics.fmean(values), max(values))


def histogram(values: Sequence[float]) -> Histogram | None:
    """Counts in at most ten or so bins whose width is 1, 2 or 5 times a power of ten; None if there are no numbers."""
    if not len(values):
        return None
    low, high = min(values), max(values)
    # Gaps of scores are whole or half numbers; finer bins would stand empty between them.
    grain = next((grain for grain in (1.0, 0.5) if all(value % grain == 0 for value in values)), 0.0)
    width = max(grain, _round_width((high - low) / BINS))
    first = math.floor(low / width)
    counts = [0] * (math.floor(high / width) - first + 1)
    for value in values:
        counts[math.floor(value / width) - first] += 1
    return Histogram([(first + i) * width for i in range(len(counts) + 1)], counts, whole=grain == width == 1)


def _round_width(least: float) -> float:
    if least == 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least)


def proportion(count: int, n: int) -> Proportion | None:
    """A share with its Wilson score interval; None if n is 0."""
    if n == 0:
        return None
    share = count / n
    return Proportion(count, n, share, *wilson(count, n), (share - 0.5) / math.sqrt(0.25 / n))


def text_of(messages: list[Message]) -> str:
    """The texts of messages as one."""
    return messages[0]["content"] if len(messages) == 1 else "\n".join(message["content"] for message in messages)


def rationale(order: Order) -> str:
    """The evidence that a judge gave with an order, where it is readable; else its words as they came."""
    try:
        said = msgspec.json.decode(order.raw)
        found = said["rationale"]
    except (msgspec.DecodeError, KeyError, TypeError):
        return order.raw
    return found if isinstance(found, str) else order.raw


def words(text: str) -> int:
    """Length in words. Counted by separators: ten times as fast as splitting, which a million pairs notice."""
    text = text.strip()
    return text.count(" ") + text.count("\n") + 1 if text else 0


def pair_stats(sides: Mapping[str, Iterable[Preference]]) -> PairStats:
    """Numbers of the pairs, read once as a stream.

    Args:
        sides: name of a side of the split (train, val) to its pairs.
    """
    pairs, prompts = dict.fromkeys(sides, 0), dict.fromkeys(sides, 0)
    gaps, lengths = array("d"), {side: _LengthCounter() for side in ("chosen", "rejected")}
    longer = unequal = duplicates = identical = 0
    cut: dict[str, Counter[bool]] = {"chosen": Counter(), "rejected": Counter()}
    # Hashes of 64 bits stand for texts: a million pairs fit in memory, and a collision is one in ten million.
    seen: set[int] = set()
    prompt_sides: dict[int, int] = {}
    prompt_pairs: Counter[int] = Counter()
    reversed_pairs: set[int] = set()
    contradictory = 0
    for bit, (side, rows) in enumerate(sides.items()):
        for row in rows:
            chosen, rejected = text_of(row.chosen), text_of(row.rejected)
            prompt = hash(tuple((message["role"], message["content"]) for message in row.prompt))
            pairs[side] += 1
            mask = prompt_sides.get(prompt, 0)
            prompts[side] += not mask >> bit & 1
            prompt_sides[prompt] = mask | 1 << bit
            prompt_pairs[prompt] += 1
            gap = _gap(row)
            if gap is not None:
                gaps.append(gap)
            lengths["chosen"].add(chosen)
            lengths["rejected"].add(rejected)
            longer += len(chosen) > len(rejected)
            unequal += len(chosen) != len(rejected)
            for name, reason in (("chosen", row.chosen_finish_reason), ("rejected", row.rejected_finish_reason)):
                if reason is not None:
                    cut[name][reason == "length"] += 1
            if chosen == rejected:
                identical += 1
                continue
            pair = hash((prompt, chosen, rejected))
            if pair in seen:
                duplicates += 1
                continue
            seen.add(pair)
            contradictory += pair in reversed_pairs
            reversed_pairs.add(hash((prompt, rejected, chosen)))
    return PairStats(
        pairs=pairs,
        prompts=prompts,
        gaps=spread(gaps),
        gap_histogram=histogram(gaps),
        chosen=lengths["chosen"].result(),
        rejected=lengths["rejected"].result(),
        longer_chosen=proportion(longer, unequal),
        chosen_cut=proportion(cut["chosen"][True], cut["chosen"].total()),
        rejected_cut=proportion(cut["rejected"][True], cut["rejected"].total()),
        duplicate_pairs=duplicates,
        repeated_prompts=sum(count > 1 for count in prompt_pairs.values()),
        shared_prompts=sum(mask & (mask - 1) > 0 for mask in prompt_sides.values()),
        contradictory_pairs=contradictory,
        identical_sides=identical,
    )


def completion_stats(rows: Iterable[Completions]) -> CompletionStats:
    """Numbers of the completions; one row a prompt."""
    prompts = identical = empty = 0
    per_prompt: Counter[int] = Counter()
    reasons: Counter[str] = Counter()
    models: Counter[str] = Counter()
    lengths, usage = _LengthCounter(), Usage()
    for row in rows:
        prompts += 1
        per_prompt[len(row.completions)] += 1
        reasons.update(row.finish_reasons)
        models[row.model] += 1
        identical += len(row.completions) - len({" ".join(text.split()) for text in row.completions})
        empty += sum(not text.strip() for text in row.completions)
        for text in row.completions:
            lengths.add(text)
        usage += row.usage
    return CompletionStats(
        prompts=prompts,
        completions=len(lengths.words),
        per_prompt=dict(sorted(per_prompt.items())),
        finish_reasons=dict(reasons.most_common()),
        models=dict(models.most_common()),
        identical=identical,
        empty=empty,
        lengths=lengths.result(),
        usage=usage,
    )


def judge_name(row: Judgment) -> str:
    """What a judgment says of its judge: the models or the function, or all of it."""
    for key in ("model", "function", "judge", "name"):
        value = row.judge.get(key)
        if isinstance(value, str):
            return value
        if isinstance(value, list):
            return ", ".join(map(str, value))
    return json.dumps(row.judge, ensure_ascii=False) if row.judge else "unnamed"


def read_run(folder: Path) -> Run:
    """Metrics, events and report of a run folder; of a run in progress, what is there.

    Raises:
        UserError: there is no such folder, or a file in it is not what it should be.
    """
    if not folder.is_dir():
        near = sorted(path.name for path in folder.parent.iterdir() if path.is_dir()) if folder.parent.is_dir() else []
        hint = f"runs there: {', '.join(near)}" if near else "nothing-dpo train makes one"
        raise UserError("no such run", where=str(folder), hint=hint)
    series: dict[str, list[tuple[float, float]]] = {}
    for row in _json_lines(folder / "metrics.jsonl"):
        step = row.get("step")
        if not isinstance(step, int | float):
            continue
        for name, value in row.items():
            if name != "step" and (value is None or isinstance(value, int | float)):
                series.setdefault(name, []).append((step, math.nan if value is None else float(value)))
    report, config = folder / "report.json", folder / "config.json"
    return Run(
        name=folder.name,
        series=series,
        last={name: points[-1][1] for name, points in series.items()},
        events=_json_lines(folder / "events.jsonl"),
        report=_object(report.read_text("utf-8"), str(report)) if report.exists() else None,
        config=_object(config.read_text("utf-8"), str(config)) if config.exists() else None,
    )


def settings(resolved: configuration.Resolved) -> list[Setting]:
    """Every setting with its value and where it came from."""
    return [
        Setting(key, configuration.get(resolved.config, key), source, configuration.describe(key))
        for key, source in resolved.sources.items()
    ]


class _LengthCounter:
    def __init__(self) -> None:
        self.words = array("q")
        self.characters = array("q")

    def add(self, text: str) -> None:
        self.words.append(words(text))
        self.characters.append(len(text))

    def result(self) -> Lengths:
        return Lengths(spread(self.words), spread(self.characters))


def _gap(row: Preference) -> float | None:
    if row.score_gap is not None or row.chosen_score is None or row.rejected_score is None:
        return row.score_gap
    return row.chosen_score - row.rejected_score


def _json_lines(path: Path) -> list[dict[str, Any]]:
    """Objects of a JSONL file; none if there is no file. Python's own parser, since trainers write bare NaN."""
    if not path.exists():
        return []
    lines = path.read_text("utf-8").split("\n")
    torn = lines.pop()  # what follows the last newline is nothing, or is still being written
    rows = [_object(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    try:
        return [*rows, _object(torn, str(path))]
    except UserError:
        return rows


def _object(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"not a JSON object: {error}", where=where) from None
    if not isinstance(value, dict):
        raise UserError("not a JSON object", where=where)
    return msgspec.convert(value, dict[str, Any])
