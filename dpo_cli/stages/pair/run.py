"""Judgments, scored rollouts or imported pairs to preference pairs: writes train.jsonl and val.jsonl.

Reads completions.jsonl and judgments.jsonl, or a file of others. Pure and free: the same files and settings give the
same bytes. Which completions of a prompt are paired is `pair.strategy`'s choice; what is a tie, too close, inverted by
an order of the judge, or says the same on both sides is no pair whatever proposed it, and a completion without text is
never a side. Which file a pair goes to depends on its prompt alone, so that no prompt is in both and adding prompts
moves none across; only the rejected text of a stratified pair may be an answer to a prompt of the other side.
"""

from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from msgspec import Struct

from dpo_cli.analysis.length_bias import without_length_effect
from dpo_cli.config.settings import MIN_GAP, MIN_REWARD_GAP, Config, PairSection
from dpo_cli.data.bad_rows import BadRows
from dpo_cli.data.files import write_files
from dpo_cli.data.jsonl import RowReader, encode_rows, read_latest, starts_by_id
from dpo_cli.data.records import (
    Completions,
    Judgment,
    Preference,
    canonical,
    completions_id,
    message_key,
    preference_id,
    prompt_id,
    said,
    split_side,
)
from dpo_cli.errors import UserError
from dpo_cli.judges._ranking import any_inverts
from dpo_cli.stages.pair import imports
from dpo_cli.stages.pair.reasons import (
    FAILED,
    INVERTED,
    NOT_HIGH,
    POSITION,
    SMALL_GAP,
    TIE,
    TOO_CLOSE,
    counted,
    no_judgments,
    no_pair,
    warn_of_split,
)
from dpo_cli.stages.pair.rollouts import Rollout, RolloutStatistics, pair_rollouts, stratified
from dpo_cli.stages.pair.strategies import STRATEGIES, weigh
from dpo_cli.statistics import count_alike

COMPLETIONS, JUDGMENTS = "completions.jsonl", "judgments.jsonl"
EPSILON = 1e-9  # means of integers, such as 7.000000000000001


class Paired(Struct, kw_only=True, omit_defaults=True):
    """How many pairs went where, and why others are none: by prompt for judgments, by row for files of others.

    `format` is that of an imported file, `dropped` the columns of it that were left out, `bad_rows` the rows that could
    not be read, by reason, and `rejected_path` where they are; `rollouts` are the numbers of the guide. `example` is
    the first pair of what came from elsewhere.
    """

    train: int
    val: int
    skipped: dict[str, int]
    warnings: list[str]
    train_path: str
    val_path: str
    format: str | None = None
    rollouts: RolloutStatistics | None = None
    dropped: dict[str, int] = {}
    bad_rows: dict[str, int] = {}
    rejected_path: str | None = None
    example: Preference | None = None


class _NoPair(Exception):
    """Why a prompt gives no pair."""


class _Judged(Struct):
    """A prompt with its judgment; `ranking` holds the completions that may be a side, best first."""

    row: Completions
    judgment: Judgment
    scores: list[float]
    ranking: list[int]


# A pair that is proposed, and whether an order of the judge inverts it.
_Candidate = tuple[Preference, bool]


def run(config: Config, dry_run: bool = False) -> Paired:
    """Make the pairs of the judgments and replace both files; with `dry_run` only count them.

    Raises:
        UserError: no judgments, or no pair comes out of them; the files are as they were.
    """
    settings = config.pair
    if settings.strategy == "stratified" or settings.length_control:
        return _run_together(config, dry_run)
    return _run_one_by_one(config, dry_run)


def _run_together(config: Config, dry_run: bool) -> Paired:
    """Pairs that depend on all prompts: everything is read first."""
    data, settings = Path(config.data), config.pair
    judgments = read_latest(data / JUDGMENTS, Judgment)
    if not judgments:
        raise no_judgments(data / JUDGMENTS)
    completions = read_latest(data / COMPLETIONS, Completions)
    used = without_length_effect(judgments, completions) if settings.length_control else judgments
    prompts: dict[str, _Judged] = {}
    skipped: Counter[str] = Counter()
    for key in sorted(judgments.keys() | completions.keys()):
        try:
            prompts[key] = _usable(completions.get(key), used.get(key))
        except _NoPair as reason:
            skipped[str(reason)] += 1
    min_gap = MIN_GAP if settings.min_gap is None else settings.min_gap
    proposed = _across(prompts, settings, min_gap) if settings.strategy == "stratified" else _within(prompts, settings)
    sides: dict[bool, list[Preference]] = {False: [], True: []}
    for key in prompts:
        pairs, reasons = _filter(proposed[key], settings, min_gap)
        if not pairs:
            skipped[reasons[0] if reasons else NOT_HIGH] += 1
        sides[split_side(key, settings.seed, settings.val_share)] += pairs
    if not any(sides.values()):
        raise no_pair(skipped, min_gap, Counter(count_alike(row.error for row in judgments.values())))
    return _write(config, sides, skipped, dry_run)


def _run_one_by_one(config: Config, dry_run: bool) -> Paired:
    """Pairs of each prompt by itself: of all rows only their places are kept, and each is read once, in its turn."""
    data, settings = Path(config.data), config.pair
    paths = data / JUDGMENTS, data / COMPLETIONS
    judged, answered = (starts_by_id(path) if path.exists() else {} for path in paths)
    if not judged:
        raise no_judgments(data / JUDGMENTS)
    keys = sorted(judged.keys() | answered.keys())
    min_gap = MIN_GAP if settings.min_gap is None else settings.min_gap
    skipped: Counter[str] = Counter()
    errors: list[str] = []
    made: dict[bool, int] = {False: 0, True: 0}
    with ExitStack() as files:
        opened = [files.enter_context(path.open("rb")) if path.exists() else None for path in paths]
        judgments = RowReader(opened[0], paths[0], Judgment) if opened[0] else None
        completions = RowReader(opened[1], paths[1], Completions) if opened[1] else None

        def pairs_of(side: bool, last: bool) -> Iterator[Preference]:
            for key in keys:
                if split_side(key, settings.seed, settings.val_share) != side:
                    continue
                row = completions.at(answered[key]) if completions and key in answered else None
                judgment = judgments.at(judged[key]) if judgments and key in judged else None
                if judgment is not None and judgment.error is not None:
                    errors.append(judgment.error)
                try:
                    prompt = _usable(row, judgment)
                except _NoPair as reason:
                    skipped[str(reason)] += 1
                    continue
                pairs, reasons = _filter(_within({key: prompt}, settings)[key], settings, min_gap)
                if not pairs:
                    skipped[reasons[0] if reasons else NOT_HIGH] += 1
                made[side] += len(pairs)
                yield from pairs
            if last and not any(made.values()):  # before any file is replaced
                raise no_pair(skipped, min_gap, Counter(count_alike(errors)))

        val, train = pairs_of(True, last=False), pairs_of(False, last=True)
        if dry_run:
            for pairs in (val, train):
                deque(pairs, maxlen=0)
        else:
            write_files({data / "val.jsonl": encode_rows(val), data / "train.jsonl": encode_rows(train)}, private=True)
    return _paired(config, made, skipped)


def run_rollouts(path: Path, config: Config, dry_run: bool = False) -> Paired:
    """Make the pairs of a file of scored rollouts and replace both files.

    Best against worst is the guide's same-prompt definition. Thresholds and gaps are in rewards as they stand.

    Raises:
        UserError: as `pair_rollouts`, with its advice when no pair comes out; the files are as they were.
    """
    settings = config.pair
    min_gap = MIN_REWARD_GAP if settings.min_gap is None else settings.min_gap
    strategy = "same-prompt" if settings.strategy in ("auto", "best-worst") else settings.strategy
    bad = BadRows(settings.skip_bad, offer=True)
    pairs, statistics = pair_rollouts(
        path,
        strategy,
        bad,
        min_gap=min_gap,
        high=settings.high,
        low=settings.low,
        max_pairs=settings.max_pairs,
        seed=settings.seed,
    )
    result = _take_in(pairs, config, min_gap, dry_run)
    result.rollouts = statistics
    _tell_bad(result, bad, config, dry_run)
    return result


def run_import(paths: Sequence[Path], config: Config, dry_run: bool = False) -> Paired:
    """Take in the pairs of preference files of other tools and replace both files.

    Rows without scores have no gap and pass; `pair.min_gap` is on the file's scale.

    Raises:
        UserError: as `imports.read`, or no row is a pair; the files are as they were.
    """
    min_gap = config.pair.min_gap or 0.0
    found = imports.read(paths, config.pair, min_gap)
    result = _take_in(found.pairs, config, min_gap, dry_run, found.unpaired, where=", ".join(map(str, paths)))
    result.format = ", ".join(name for name, _ in found.formats.most_common())
    result.dropped = dict(found.dropped.most_common())
    _tell_bad(result, found.bad, config, dry_run)
    return result


def _tell_bad(result: Paired, bad: BadRows, config: Config, dry_run: bool) -> None:
    result.bad_rows = bad.reasons
    if not dry_run:
        result.rejected_path = bad.write(Path(config.data))


def _take_in(
    pairs: Iterable[Preference],
    config: Config,
    min_gap: float,
    dry_run: bool,
    skipped: Counter[str] | None = None,
    where: str | None = None,
) -> Paired:
    """Filter and split pairs that were made elsewhere, in their order; of copies the first stays."""
    skipped = Counter() if skipped is None else skipped
    seen: set[str] = set()
    by_prompt: defaultdict[str, list[_Candidate]] = defaultdict(list)
    for pair in pairs:
        content = preference_id(pair.prompt, pair.chosen, pair.rejected, pair.tools)
        if content in seen:
            skipped["a copy of another pair"] += 1
            continue
        seen.add(content)
        by_prompt[prompt_id(pair.prompt, pair.tools)].append((pair, False))
    sides: dict[bool, list[Preference]] = {False: [], True: []}
    for key, candidates in by_prompt.items():
        kept, reasons = _filter(candidates, config.pair, min_gap)
        skipped.update(reasons)
        sides[split_side(key, config.pair.seed, config.pair.val_share)] += kept
    if not any(sides.values()):
        raise UserError(
            f"no row is a pair: {counted(skipped)}",
            where=where,
            hint=f"a lower --min-gap (now {min_gap:g}), or pairs whose sides and scores differ",
        )
    result = _write(config, sides, skipped, dry_run)
    result.example = next(pair for pair in (*sides[False], *sides[True]))
    return result


def _write(config: Config, sides: dict[bool, list[Preference]], skipped: Counter[str], dry_run: bool) -> Paired:
    data, (train, val) = Path(config.data), (sides[False], sides[True])
    if not dry_run:
        write_files({data / "val.jsonl": encode_rows(val), data / "train.jsonl": encode_rows(train)}, private=True)
    return _paired(config, {side: len(pairs) for side, pairs in sides.items()}, skipped)


def _paired(config: Config, made: dict[bool, int], skipped: Counter[str]) -> Paired:
    data = Path(config.data)
    return Paired(
        train=made[False],
        val=made[True],
        skipped=dict(skipped.most_common()),
        warnings=warn_of_split(made[False], made[True], config.pair),
        train_path=str(data / "train.jsonl"),
        val_path=str(data / "val.jsonl"),
    )


def _usable(row: Completions | None, judgment: Judgment | None) -> _Judged:
    """A prompt of which two completions or more may be sides.

    Raises:
        _NoPair: it gives no pair, whatever the strategy; says why.
    """
    if judgment is None:
        raise _NoPair("not judged yet")
    if row is None:
        raise _NoPair("judged, but no longer in completions.jsonl")
    if judgment.error is not None:
        raise _NoPair(FAILED)
    if judgment.skipped is not None:
        raise _NoPair(judgment.skipped.partition(":")[0])
    if judgment.completions_id != completions_id(row.completions, row.messages):
        raise _NoPair("judged before its completions changed")
    scores, ranking = judgment.scores or [], judgment.ranking or []
    if len(scores) != len(row.completions) or sorted(ranking) != list(range(len(scores))):
        raise _NoPair("the judgment does not fit its completions")
    # Of identical texts the first stands for all: it is the one that the judge saw.
    keys = [message_key(answer) for answer in row.answers]
    first = {key: index for index, key in reversed(list(enumerate(keys)))}
    ranking = [index for index in ranking if first[keys[index]] == index]
    ranking = [index for index in ranking if canonical(said(row.answer(index)))]
    if len(ranking) < 2:
        raise _NoPair("fewer than two different texts")
    return _Judged(row, judgment, scores, ranking)


def _within(prompts: dict[str, _Judged], settings: PairSection) -> dict[str, list[_Candidate]]:
    """What the strategy proposes for each prompt."""
    propose = STRATEGIES[settings.strategy]
    return {
        key: [
            (_preference(prompt, chosen, rejected), _inverted(prompt, chosen, rejected))
            for chosen, rejected in propose(prompt.scores, prompt.ranking)
        ]
        for key, prompt in prompts.items()
    }


def _across(prompts: dict[str, _Judged], settings: PairSection, min_gap: float) -> dict[str, list[_Candidate]]:
    """High scores against low ones, also of different prompts, by the prompt of the chosen side.

    The thresholds are shares of the range of all scores: rewards go from 0 to 1, judges' scores on any scale.
    """
    rollouts = [
        Rollout(row.prompt, [row.answer(index)], prompt.scores[index], row.finish_reasons[index], row.tools)
        for prompt, row in ((prompt, prompt.row) for prompt in prompts.values())
        for index in prompt.ranking
    ]
    rewards = [rollout.reward for rollout in rollouts]
    lowest, highest = min(rewards, default=0.0), max(rewards, default=0.0)
    high, low = (round(lowest + share * (highest - lowest), 9) for share in (settings.high, settings.low))
    by_prompt = {prompt_id(prompt.row.prompt, prompt.row.tools): key for key, prompt in prompts.items()}
    proposed: dict[str, list[_Candidate]] = {key: [] for key in prompts}
    for pair in stratified(
        rollouts, min_gap=min_gap, high=high, low=low, max_pairs=settings.max_pairs, seed=settings.seed
    ):
        key = by_prompt[prompt_id(pair.prompt, pair.tools)]
        answers = prompts[key].row.answers
        sides = [pair.chosen[0], pair.rejected[0]]
        # No order of the judge shows completions of two prompts.
        of_prompt = all(side in answers for side in sides)
        proposed[key].append((pair, of_prompt and _inverted(prompts[key], *map(answers.index, sides))))
    return proposed


def _filter(candidates: list[_Candidate], settings: PairSection, min_gap: float) -> tuple[list[Preference], list[str]]:
    """Of one prompt's candidates those that are pairs, as many as are allowed, and why the others are none."""
    kept, reasons = [], []
    for pair, inverted in candidates:
        reason = _fault(pair, min_gap)
        if inverted and (settings.require_consistent if reason is None else reason in TOO_CLOSE):
            reason = INVERTED if reason is None else POSITION
        if reason:
            reasons.append(reason)
            continue
        if settings.margin_column:
            pair.margin = pair.score_gap
        kept.append(pair)
    widest = sorted(range(len(kept)), key=lambda index: -(kept[index].score_gap or 0.0))
    kept = [kept[index] for index in sorted(widest[: settings.max_pairs_per_prompt])]
    if settings.weights != "none":  # else a row's own weight stays
        for pair, weight in zip(kept, weigh([pair.score_gap for pair in kept], settings.weights), strict=True):
            pair.weight = weight
    return kept, reasons


def _fault(pair: Preference, min_gap: float) -> str | None:
    """Why this teaches nothing; a gap that is not known is no fault."""
    if [*map(message_key, pair.chosen)] == [*map(message_key, pair.rejected)]:
        return "both sides say the same"
    if pair.score_gap is None:
        return None
    if pair.score_gap < -EPSILON:
        return "the rejected side has the higher score"
    if pair.score_gap <= EPSILON:
        return TIE
    return SMALL_GAP if pair.score_gap < min_gap - EPSILON else None


def _inverted(prompt: _Judged, chosen: int, rejected: int) -> bool:
    """Whether the judge, in any order, preferred the rejected completion; never so if it did not see it.

    `consistent` is about the best and the worst: it speaks for other pairs only where no orders do.
    """
    orders = prompt.judgment.orders or []
    if orders and rejected not in orders[0].order:
        return False
    meant = not orders or (chosen, rejected) == (prompt.ranking[0], prompt.ranking[-1])
    if meant and prompt.judgment.consistent is False:
        return True
    return any_inverts(orders, chosen, rejected, prompt.judgment.weights)


def _preference(prompt: _Judged, chosen: int, rejected: int) -> Preference:
    row, scores = prompt.row, prompt.scores
    good, bad = [row.answer(chosen)], [row.answer(rejected)]
    return Preference(
        id=preference_id(row.prompt, good, bad, row.tools),
        prompt=row.prompt,
        tools=row.tools,
        chosen=good,
        rejected=bad,
        chosen_score=scores[chosen],
        rejected_score=scores[rejected],
        score_gap=scores[chosen] - scores[rejected],
        chosen_finish_reason=row.finish_reasons[chosen],
        rejected_finish_reason=row.finish_reasons[rejected],
    )
