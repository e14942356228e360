"""Rules about rows taken together: copies, contradictions, leakage across the split, length bias, outliers."""

import re
import statistics
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache

from dpo_cli.analysis.lint.findings import Finding, Pair, error, warning
from dpo_cli.analysis.lint.rules import SIDES
from dpo_cli.analysis.lint.similar import near_duplicates
from dpo_cli.data.records import text_of
from dpo_cli.statistics import Interval, proportion

OUTLIER = 6.0  # robust standard deviations
SPREAD_LEAST = 0.05  # of a share; in data that is all alike, a little is no outlier
OUTLIER_SHARE = 0.05  # what more rows than this share have in common is a style
OUTLIER_ROWS = 20  # fewer tell no style at all
EXAMPLES = 10

_LETTER = re.compile(r"[^\W\d_]")
_NOT_ASCII_LETTERS = dict.fromkeys(code for code in range(128) if not chr(code).isalpha())
_LINE = re.compile(r"^.*\S.*$", re.MULTILINE)
_NAMED_LINE = re.compile(r"^\[[^\]\n]{1,40}\][ \t]+\S", re.MULTILINE)


def held_out_first(pairs: Iterable[Pair]) -> list[Pair]:
    """The order in which of several copies the first is kept: losing a row of train changes no evaluation."""
    return sorted(pairs, key=lambda pair: pair.side != "val")


def check_duplicates(pairs: Sequence[Pair]) -> Iterator[Finding]:
    """Pairs that stand there more than once."""
    for group in _groups(held_out_first(pairs), lambda pair: (pair.prompt_key, pair.chosen_key, pair.rejected_key)):
        yield error("duplicate", group, f"{len(group)} copies of one pair")


def check_near_duplicates(pairs: Sequence[Pair]) -> Iterator[Finding]:
    """Pairs whose prompt, chosen and rejected are each almost those of another pair."""
    for group in near_groups(unique(pairs)):
        yield warning("near-duplicate", group, f"{len(group)} pairs that are almost the same")


def unique(pairs: Sequence[Pair]) -> list[Pair]:
    """One of each pair, the held-out one where it is on both sides."""
    first: dict[tuple[str, str, str], Pair] = {}
    for pair in held_out_first(pairs):
        first.setdefault((pair.prompt_key, pair.chosen_key, pair.rejected_key), pair)
    return list(first.values())


def near_groups(pairs: Sequence[Pair]) -> list[list[Pair]]:
    """Groups of two or more near-duplicates, the one to keep first."""
    texts = [(_conversation(pair), text_of(pair.row.chosen), text_of(pair.row.rejected)) for pair in pairs]
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
    for group in _groups(pairs, prompt_groups(pairs)):
        if len({pair.side for pair in group}) > 1 and len({pair.prompt_key for pair in group}) > 1:
            yield warning("near-leakage", group, "almost the same prompt is in train and in val")


def prompt_groups(pairs: Sequence[Pair]) -> Callable[[Pair], str]:
    """What names the group of near-same prompts that a pair's prompt is in."""
    prompts: dict[str, str] = {pair.prompt_key: _conversation(pair) for pair in held_out_first(pairs)}
    keys = list(prompts)
    leader = {keys[later]: keys[earlier] for earlier, later in near_duplicates([(text,) for text in prompts.values()])}
    return lambda pair: leader.get(pair.prompt_key, pair.prompt_key)


def longer_chosen(pairs: Sequence[Pair]) -> Interval | None:
    """How often the longer side (in characters) is the chosen one; None where no pair's sides differ in length."""
    differences = [difference for difference in map(_excess, pairs) if difference]
    return proportion(sum(difference > 0 for difference in differences), len(differences))


def check_length_bias(pairs: Sequence[Pair], limit: float) -> Iterator[Finding]:
    """A preference for the longer or the shorter side, where the whole interval is beyond the limit."""
    found = longer_chosen(pairs)
    if found is None or not (found.low > limit or found.high < 1 - limit):
        return
    longer = found.low > limit
    extreme = sorted(pairs, key=_excess, reverse=longer)[:EXAMPLES]
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
    sides = [(pair, side) for pair in pairs for side in SIDES]
    texts = [text_of(getattr(pair.row, side)) for pair, side in sides]
    if len(pairs) < OUTLIER_ROWS:
        return
    letters = [_scripts(text) for text in texts]
    totals: Counter[str] = Counter()
    for counts in letters:
        totals.update(counts)
    main = max(totals, key=lambda script: totals[script], default="LATIN")
    features = {
        f"of its letters are {main.capitalize()}": [
            counts[main] / counts.total() if counts.total() else None for counts in letters
        ],
        "of its characters are letters": [
            counts.total() / size if (size := len(text) - sum(map(text.count, " \n"))) > 0 else None
            for counts, text in zip(letters, texts, strict=True)
        ],
        "of its lines are `[NAME] text`": [
            len(_NAMED_LINE.findall(text)) / count if (count := len(_LINE.findall(text))) else None for text in texts
        ],
    }
    for what, shares in features.items():
        usual, odd = _outliers(shares)
        for index in odd:
            pair, side = sides[index]
            yield warning("outlier", [pair], f"{side}: {shares[index]:.0%} {what}; {usual:.0%} is usual")


def _scripts(text: str) -> Counter[str]:
    """How many letters a text has of each script."""
    if text.isascii():
        return Counter(LATIN=len(text.translate(_NOT_ASCII_LETTERS)))
    return Counter(map(_script, _LETTER.findall(text)))


@cache
def _script(letter: str) -> str:
    """The first word of a letter's Unicode name: LATIN, CYRILLIC, CJK, HIRAGANA …"""
    return unicodedata.name(letter, "OTHER").partition(" ")[0]


def _outliers(values: Sequence[float | None]) -> tuple[float, list[int]]:
    """The median, and where the values lie that are far from it; nowhere if they are many."""
    known = [value for value in values if value is not None]
    if not known:
        return 0.0, []
    median = statistics.median(known)
    spread = max(SPREAD_LEAST, statistics.median(abs(value - median) for value in known) / 0.6745)
    far = [index for index, value in enumerate(values) if value is not None and abs(value - median) > OUTLIER * spread]
    return median, far if len(far) <= OUTLIER_SHARE * len(known) else []


def _groups(pairs: Iterable[Pair], key: Callable[[Pair], object]) -> Iterator[list[Pair]]:
    """Groups of two or more pairs of one key, in the order of their first."""
    groups: defaultdict[object, list[Pair]] = defaultdict(list)
    for pair in pairs:
        groups[key(pair)].append(pair)
    return (group for group in groups.values() if len(group) > 1)
