"""What `inspect` says about pairs, completions, judgments and runs: pure numbers, printed as they are by `--json`.

Takes records and metric files; prints nothing. Lengths are in words (what spaces and line ends part) and characters,
since no tokenizer is at hand. What the judgments tell of their judge is `audit`'s.
"""

from array import array
from collections import Counter
from collections.abc import Iterable, Mapping

from msgspec import Struct

from dpo_cli.data.records import Completions, Preference, Usage, text_of
from dpo_cli.statistics import Histogram, Interval, Spread, histogram, proportion, spread


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
    longer_chosen: Interval | None
    chosen_cut: Interval | None
    rejected_cut: Interval | None
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
