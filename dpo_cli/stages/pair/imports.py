"""Files of other tools to pairs: rows that are pairs as they are, answers with scores by a strategy.

Reads the files; writes nothing but, with `skip_bad`, the rows that it left out. Answers to one prompt are taken
together from wherever they stand, so that KTO's rows, one answer each, make pairs.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from msgspec import Struct, field

from dpo_cli.config.settings import PairSection
from dpo_cli.data.bad_rows import BadRows
from dpo_cli.data.columns import read_mapping
from dpo_cli.data.formats.preferences import HINT, read_row
from dpo_cli.data.formats.ratings import ScoredAnswers
from dpo_cli.data.reader import parse_rows
from dpo_cli.data.records import Preference, message_key, prompt_id
from dpo_cli.data.spool import Spool
from dpo_cli.errors import UserError
from dpo_cli.stages.pair.rollouts import Rollout, make_pair, stratified
from dpo_cli.stages.pair.strategies import STRATEGIES
from dpo_cli.stages.pair.stratified import thresholds

HEADERLESS = ("prompt", "good", "bad")


class Imported(Struct, kw_only=True):
    """What was read: pairs in the order of the rows, rows by format, columns left out, answers that are in no pair."""

    pairs: Spool[Preference] = field(default_factory=lambda: Spool(Preference))
    formats: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    unpaired: Counter[str] = field(default_factory=Counter)
    bad: BadRows


def read(paths: Sequence[Path], settings: PairSection, min_gap: float) -> Imported:
    """The pairs of these files.

    Raises:
        UserError: a file can't be read or holds no rows; or `file:line` of a row that can't, without `skip_bad`.
    """
    mapping = read_mapping(settings.columns)
    result = Imported(bad=BadRows(settings.skip_bad, offer=True))
    rated: dict[str, ScoredAnswers] = {}
    formats: dict[str, str] = {}
    for path in paths:
        before = result.formats.total() + len(result.bad.rows)
        rows = parse_rows(path, lambda row: read_row(row, mapping, result.dropped), result.bad, HEADERLESS)
        for _, (name, found) in rows:
            result.formats[name] += 1
            if isinstance(found, Preference):
                result.pairs.append(found)
                continue
            key = prompt_id(found.prompt, found.tools)
            known = rated.setdefault(key, ScoredAnswers(found.prompt, found.tools, [], []))
            known.answers += found.answers
            known.scores += found.scores
            formats[key] = name
        if result.formats.total() + len(result.bad.rows) == before:
            raise UserError("the file holds no rows", where=str(path), hint=HINT)
    if settings.strategy == "stratified":
        result.pairs.extend(_across(rated, settings, min_gap))
        return result
    for key, one in rated.items():
        result.pairs.extend(_within(one, STRATEGIES[settings.strategy], formats[key] == "kto", result.unpaired))
    return result


def _within(
    rated: ScoredAnswers,
    propose: Callable[[Sequence[float], Sequence[int]], list[tuple[int, int]]],
    labelled: bool,
    unpaired: Counter[str],
) -> list[Preference]:
    """One prompt's pairs; of equal answers the first stands for all, of equal scores the last is the worst."""
    keys = [tuple(map(message_key, answer)) for answer in rated.answers]
    ranking = [index for index, key in enumerate(keys) if keys.index(key) == index]
    ranking.sort(key=lambda index: -rated.scores[index])
    if labelled and len({rated.scores[index] for index in ranking}) < 2:
        unpaired[f"all answers to its prompt are labelled {'good' if rated.scores[0] else 'bad'}"] += len(ranking)
        return []
    if len(ranking) < 2:
        unpaired["fewer than two different answers with a score"] += 1
        return []
    places = [
        (good, bad)
        for good, bad in propose(rated.scores, ranking)
        if not labelled or rated.scores[good] > rated.scores[bad]
    ]
    if labelled:
        left = len(ranking) - len({place for pair in places for place in pair})
        unpaired.update({"an answer beyond the pair of its prompt (--strategy all)": left} if left else {})
    return [_pair(rated, good, bad) for good, bad in places]


def _pair(rated: ScoredAnswers, good: int, bad: int) -> Preference:
    def side(index: int) -> Rollout:
        return Rollout(rated.prompt, rated.answers[index], rated.scores[index], None, rated.tools)

    return make_pair(side(good), side(bad))


def _across(rated: dict[str, ScoredAnswers], settings: PairSection, min_gap: float) -> list[Preference]:
    """High scores against low ones, also of different prompts; the thresholds are shares of the scores' range."""
    rollouts = [
        Rollout(one.prompt, answer, score, None, one.tools)
        for one in rated.values()
        for answer, score in zip(one.answers, one.scores, strict=True)
    ]
    high, low = thresholds([rollout.reward for rollout in rollouts], settings.high, settings.low)
    return stratified(rollouts, min_gap=min_gap, high=high, low=low, max_pairs=settings.max_pairs, seed=settings.seed)
