"""Answers with scores, of rows of other tools: put aside by prompt, then paired within prompts or across them.

Answers to one prompt are taken together from wherever they stand. Of a row is kept where it was put, so that a million
of them fit in memory. Reads and writes nothing but a temporary file.
"""

from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from msgspec import Struct

from dpo_cli.config.settings import PairSection
from dpo_cli.data.formats.ratings import ScoredAnswers
from dpo_cli.data.places import Places
from dpo_cli.data.records import Preference, message_key, prompt_id
from dpo_cli.data.spool import Spool
from dpo_cli.stages.pair.rollouts import Rollout, make_pair
from dpo_cli.stages.pair.strategies import STRATEGIES
from dpo_cli.stages.pair.stratified import stratified_scores


class _Row(Struct):
    format: str
    found: ScoredAnswers


class RatedRows:
    """Rows of answers with scores, by prompt in the order in which the prompts first come."""

    def __init__(self) -> None:
        self._rows = Spool(_Row)
        self._places = Places()  # by the prompt's id

    def append(self, name: str, found: ScoredAnswers) -> None:
        """Put a row of a format aside."""
        self._places.add(int(prompt_id(found.prompt, found.tools), 16), len(self._rows))
        self._rows.append(_Row(name, found))

    def pairs(self, settings: PairSection, min_gap: float, unpaired: Counter[str]) -> Iterator[Preference]:
        """The pairs that the strategy makes; counts the answers that are in none."""
        if settings.strategy == "stratified":
            yield from self._across(settings, min_gap)
            return
        propose = STRATEGIES[settings.strategy]
        for key in self._places:
            rows = [self._rows[place] for place in self._places[key]]
            whole, name = rows[0].found, rows[-1].format
            for row in rows[1:]:
                whole.answers += row.found.answers
                whole.scores += row.found.scores
            yield from _within(whole, propose, name == "kto", unpaired)

    def _across(self, settings: PairSection, min_gap: float) -> Iterator[Preference]:
        """High scores against low ones, also of different prompts; the thresholds are shares of the scores' range."""
        # Of each side: its row's place, which answer it is, its score, its prompt's id and a hash of what it says.
        places, indices, scores = array("Q"), array("L"), array("d")
        asked, said = array("Q"), array("q")
        for key in self._places:
            for place in self._places[key]:
                found = self._rows[place].found
                for index, answer in enumerate(found.answers):
                    places.append(place)
                    indices.append(index)
                    scores.append(found.scores[index])
                    asked.append(key)
                    said.append(hash(tuple(map(message_key, answer))))
        drawn = stratified_scores(scores, asked, said, settings, min_gap)

        def side(number: int) -> Rollout:
            found, first = (self._rows[place].found for place in (places[number], self._places[asked[number]][0]))
            index = indices[number]
            return Rollout(first.prompt, found.answers[index], found.scores[index], None, first.tools)

        for good, bad in drawn:
            yield make_pair(side(good), side(bad))


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
