"""Rules about rows taken together: copies, contradictions, leakage across the split, length bias, outliers."""

import heapq
import math
import re
import statistics
import unicodedata
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from typing import Any

from dpo_cli.analysis.lint.findings import Finding, Pair, PairKeys, Selection, error, keys_of, warning
from dpo_cli.analysis.lint.rules import SIDES
from dpo_cli.analysis.lint.similar import near_duplicates
from dpo_cli.data.records import text_of
from dpo_cli.statistics import Interval, proportion

OUTLIER = 6.0  # robust standard deviations
SPREAD_LEAST = 0.05  # of a share; in data that is all alike, a little is no outlier
OUTLIER_SHARE = 0.05  # what more rows than this share have in common is a style
OUTLIER_ROWS = 20  # fewer tell no style at all
SCRIPT_ROWS = 2000  # that the script of most letters is told from
EXAMPLES = 10

_LETTER = re.compile(r"[^\W\d_]")
_NOT_ASCII_LETTERS = dict.fromkeys(code for code in range(128) if not chr(code).isalpha())
_LINE = re.compile(r"^.*\S.*$", re.MULTILINE)
_NAMED_LINE = re.compile(r"^\[[^\]\n]{1,40}\][ \t]+\S", re.MULTILINE)


def held_out_first(pairs: Sequence[Pair]) -> list[int]:
    """Indices in the order in which the first of copies is kept: losing a row of train changes no evaluation."""
    sides = [keys.side for keys in keys_of(pairs)]
    return sorted(range(len(sides)), key=lambda index: sides[index] != "val")


def check_duplicates(pairs: Sequence[Pair]) -> Iterator[Finding]:
    """Pairs that stand there more than once."""
    order = held_out_first(pairs)
    for group in _groups(pairs, lambda pair: (pair.prompt_key, pair.chosen_key, pair.rejected_key), order):
        yield error("duplicate", group, f"{len(group)} copies of one pair")


def check_near_duplicates(pairs: Sequence[Pair]) -> Iterator[Finding]:
    """Pairs whose prompt, chosen and rejected are each almost those of another pair."""
    for group in near_groups(unique(pairs)):
        yield warning("near-duplicate", group, f"{len(group)} pairs that are almost the same")


def unique(pairs: Sequence[Pair]) -> Sequence[Pair]:
    """One of each pair, the held-out one where it is on both sides."""
    keys = array("q", (hash((pair.prompt_key, pair.chosen_key, pair.rejected_key)) for pair in keys_of(pairs)))
    seen: set[int] = set()
    return Selection(pairs, _first_of_each(held_out_first(pairs), keys, seen))


def _first_of_each(order: Iterable[int], keys: Sequence[int], seen: set[int]) -> Iterator[int]:
    for index in order:
        if keys[index] not in seen:
            seen.add(keys[index])
            yield index


def near_groups(pairs: Sequence[Pair]) -> list[list[Pair]]:
    """Groups of two or more near-duplicates, the one to keep first."""
    texts = _Texts(pairs, lambda pair: (_conversation(pair), text_of(pair.row.chosen), text_of(pair.row.rejected)))
    groups: dict[int, list[Pair]] = {}
    for earlier, later in near_duplicates(texts):
        groups.setdefault(earlier, [pairs[earlier]]).append(pairs[later])
    return list(groups.values())


def _conversation(pair: Pair) -> str:
    """The prompt without its system messages, which all prompts of a task share."""
    return "\n".join(message["content"] for message in pair.row.prompt if message["role"] != "system")


def check_contradictions(pairs: Sequence[Pair]) -> Iterator[Finding]:
    """Pairs of one prompt that prefer A over B and B over A."""
    for group in _groups(pairs, lambda pair: (pair.prompt_key, *sorted((pair.chosen_key, pair.rejected_key)))):
        if len({pair.chosen_key for pair in group}) > 1:
            yield error("contradiction", group, "the same two texts are preferred both ways round")


def check_leakage(pairs: Sequence[Pair]) -> Iterator[Finding]:
    """Prompts that stand in train and in val."""
    for group in _groups(pairs, lambda pair: pair.prompt_key):
        if len({pair.side for pair in group}) > 1:
            yield error("leakage", group, "the same prompt is in train and in val")


def check_near_leakage(pairs: Sequence[Pair]) -> Iterator[Finding]:
    """Prompts in train that are almost those of val."""
    if len({keys.side for keys in keys_of(pairs)}) < 2:
        return
    for group in _groups(pairs, prompt_groups(pairs)):
        if len({pair.side for pair in group}) > 1 and len({pair.prompt_key for pair in group}) > 1:
            yield warning("near-leakage", group, "almost the same prompt is in train and in val")


def prompt_groups(pairs: Sequence[Pair]) -> Callable[[PairKeys | Pair], int]:
    """What names the group of near-same prompts that a pair's prompt is in."""
    keys = array("Q", (pair.prompt_key for pair in keys_of(pairs)))
    prompts = array("L", _first_of_each(held_out_first(pairs), keys, set()))
    texts = _Texts(Selection(pairs, prompts), lambda pair: (_conversation(pair),))
    leader = {keys[prompts[later]]: keys[prompts[earlier]] for earlier, later in near_duplicates(texts)}
    return lambda pair: leader.get(pair.prompt_key, pair.prompt_key)


class _Texts(Sequence[tuple[str, ...]]):
    """Texts of pairs, taken from them when they are looked at."""

    def __init__(self, pairs: Sequence[Pair], texts: Callable[[Pair], tuple[str, ...]]) -> None:
        self._pairs = pairs
        self._texts = texts

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: Any) -> Any:
        return self._texts(self._pairs[index])


def longer_chosen(pairs: Sequence[Pair]) -> Interval | None:
    """How often the longer side (in characters) is the chosen one; None where no pair's sides differ in length."""
    differences = array("l", filter(None, map(_excess, pairs)))
    return proportion(sum(difference > 0 for difference in differences), len(differences))


def check_length_bias(pairs: Sequence[Pair], limit: float) -> Iterator[Finding]:
    """A preference for the longer or the shorter side, where the whole interval is beyond the limit."""
    found = longer_chosen(pairs)
    if found is None or not (found.low > limit or found.high < 1 - limit):
        return
    longer = found.low > limit
    excess = array("l", map(_excess, pairs))
    most = (heapq.nlargest if longer else heapq.nsmallest)(EXAMPLES, range(len(excess)), key=excess.__getitem__)
    extreme = [pairs[index] for index in most]
    yield warning(
        "length-bias",
        extreme,
        f"the longer side is chosen in {found.value:.0%} ({found.low:.0%} to {found.high:.0%}) of {found.n} pairs, "
        f"{'more' if longer else 'less'} than {limit if longer else 1 - limit:.0%}: length alone may be learned; "
        "the most extreme rows are named",
    )


def _excess(pair: Pair) -> int:
    return len(text_of(pair.row.chosen)) - len(text_of(pair.row.rejected))


def check_outliers(pairs: Sequence[Pair]) -> Iterator[Finding]:
    """Sides whose script, share of letters, or `[NAME] text` lines differ from the rest.

    By the modified z-score, 0.6745 (x - median) / MAD (Iglewicz and Hoaglin 1993). Languages of one script are not
    told apart.
    """
    if len(pairs) < OUTLIER_ROWS:
        return
    main = _main_script(pairs[:: max(1, len(pairs) // SCRIPT_ROWS)])
    features = {
        f"of its letters are {main.capitalize()}": array("d"),
        "of its characters are letters": array("d"),
        "of its lines are `[NAME] text`": array("d"),
    }
    in_main, letters, named = features.values()
    for pair in pairs:
        for side in SIDES:
            text = text_of(getattr(pair.row, side))
            counts = _scripts(text)
            total = counts.total()
            in_main.append(_share(counts[main], total))
            letters.append(_share(total, len(text) - text.count(" ") - text.count("\n")))
            named.append(_share(len(_NAMED_LINE.findall(text)), len(_LINE.findall(text))))
    for what, shares in features.items():
        usual, odd = _outliers(shares)
        for index in odd:
            side = SIDES[index % len(SIDES)]
            pair = pairs[index // len(SIDES)]
            yield warning("outlier", [pair], f"{side}: {shares[index]:.0%} {what}; {usual:.0%} is usual")


def _main_script(pairs: Sequence[Pair]) -> str:
    totals: Counter[str] = Counter()
    for pair in pairs:
        for side in SIDES:
            totals.update(_scripts(text_of(getattr(pair.row, side))))
    return max(totals, key=lambda script: totals[script], default="LATIN")


def _share(part: int, whole: int) -> float:
    """NaN where there is nothing to have a share of."""
    return part / whole if whole > 0 else math.nan


def _scripts(text: str) -> Counter[str]:
    """How many letters a text has of each script."""
    if text.isascii():
        return Counter(LATIN=len(text.translate(_NOT_ASCII_LETTERS)))
    return Counter(map(_script, _LETTER.findall(text)))


@cache
def _script(letter: str) -> str:
    """The first word of a letter's Unicode name: LATIN, CYRILLIC, CJK, HIRAGANA …"""
    return unicodedata.name(letter, "OTHER").partition(" ")[0]


def _outliers(values: Sequence[float]) -> tuple[float, list[int]]:
    """The median, and where the values lie that are far from it; nowhere if they are many."""
    known = array("d", (value for value in values if not math.isnan(value)))
    if not known:
        return 0.0, []
    median = statistics.median(known)
    spread = max(SPREAD_LEAST, statistics.median(array("d", (abs(value - median) for value in known))) / 0.6745)
    far = [index for index, value in enumerate(values) if abs(value - median) > OUTLIER * spread]  # NaN is not
    return median, far if len(far) <= OUTLIER_SHARE * len(known) else []


def _groups(
    pairs: Sequence[Pair], key: Callable[[PairKeys | Pair], object], order: Sequence[int] | None = None
) -> Iterator[list[Pair]]:
    """Groups of two or more pairs of one key, by their first; `order` are all indices, unset: as they stand."""
    hashes = array("q", (hash(key(keys)) for keys in keys_of(pairs)))
    seen: set[int] = set()
    repeated: set[int] = set()
    for value in hashes:
        (repeated if value in seen else seen).add(value)
    del seen
    groups: defaultdict[int, list[int]] = defaultdict(list)
    for index in (range(len(hashes)) if order is None else order) if repeated else ():
        if hashes[index] in repeated:
            groups[hashes[index]].append(index)
    return ([pairs[index] for index in group] for group in groups.values())
