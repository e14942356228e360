"""Pairs across judged prompts: the thresholds are shares of the range of all scores, which lie on any scale.

Reads every prompt once, and of it keeps the numbers of its sides; those that are drawn are read again. Writes nothing.
"""

from array import array
from collections import defaultdict

from dpo_cli.config.settings import PairSection
from dpo_cli.data.records import Preference, message_key, prompt_id
from dpo_cli.stages.pair.judged import JudgedPrompt, JudgedPrompts, NoPair, inverted, side_of
from dpo_cli.stages.pair.rollouts import Rollout, make_pair
from dpo_cli.stages.pair.stratified import stratified_scores


class AcrossPrompts:
    """The candidates of each prompt: those whose chosen side answers it.

    Args:
        prompts: what was judged.
        settings: `[pair]`.
        min_gap: least difference of the scores.
    """

    def __init__(self, prompts: JudgedPrompts, settings: PairSection, min_gap: float) -> None:
        self._prompts = prompts
        self._reasons: dict[str, str] = {}  # of prompts that give no pair
        # Of each side: which prompt it is of, which completion, its score, its prompt's id and a hash of what it says.
        self._places, self._indices, self._scores = array("Q"), array("L"), array("d")
        asked, said = array("Q"), array("q")
        for place, key in enumerate(prompts.keys):
            try:
                prompt = prompts[key]
            except NoPair as reason:
                self._reasons[key] = str(reason)
                continue
            asks = int(prompt_id(prompt.row.prompt, prompt.row.tools), 16)
            for index in prompt.ranking:
                self._places.append(place)
                self._indices.append(index)
                self._scores.append(prompt.scores[index])
                asked.append(asks)
                said.append(hash(message_key(prompt.row.answer(index))))
        drawn = stratified_scores(self._scores, asked, said, settings, min_gap)
        wanted = {asked[good] for good, _ in drawn}
        # Of several rows of the same prompt the last has the pairs.
        owners = {asks: self._places[side] for side, asks in enumerate(asked) if asks in wanted}
        self._drawn: defaultdict[str, list[tuple[int, int]]] = defaultdict(list)
        for good, bad in drawn:
            self._drawn[prompts.keys[owners[asked[good]]]].append((good, bad))

    def candidates(self, key: str) -> list[tuple[Preference, bool]]:
        """The pairs of a prompt, and whether an order of the judge inverts each: none shows completions of two prompts.

        Raises:
            NoPair: it gives none, whatever the thresholds.
        """
        if key in self._reasons:
            raise NoPair(self._reasons[key])
        if key not in self._drawn:
            return []
        prompt = self._prompts[key]
        pairs = [make_pair(self._side(good), self._side(bad)) for good, bad in self._drawn[key]]
        return [(pair, _is_inverted(prompt, pair)) for pair in pairs]

    def _side(self, place: int) -> Rollout:
        row = self._prompts.completions(self._prompts.keys[self._places[place]])
        return side_of(row, self._indices[place], self._scores[place])


def _is_inverted(prompt: JudgedPrompt, pair: Preference) -> bool:
    answers = prompt.row.answers
    sides = [pair.chosen[0], pair.rejected[0]]
    return all(side in answers for side in sides) and inverted(prompt, *map(answers.index, sides))
