"""Judgments, scored rollouts or imported pairs to preference pairs: writes train.jsonl and val.jsonl.

Reads completions.jsonl and judgments.jsonl, or a file of others. Pure and free: the same files and settings give the
same bytes. Which completions of a prompt are paired is `pair.strategy`'s choice; what is a tie, too close, inverted by
an order of the judge, or says the same on both sides is no pair whatever proposed it, and a completion without text is
never a side. Which file a pair goes to depends on its prompt alone, so that no prompt is in both and adding prompts
moves none across; only the rejected text of a stratified pair may be an answer to a prompt of the other side.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from msgspec import Struct

from dpo_cli.config.settings import MIN_GAP, MIN_REWARD_GAP, Config, PairSection
from dpo_cli.data.bad_rows import BadRows
from dpo_cli.data.bulk import paused_collection
from dpo_cli.data.files import write_files
from dpo_cli.data.jsonl import encode_rows
from dpo_cli.data.places import Places
from dpo_cli.data.records import Preference, message_key, preference_id, prompt_id, split_side
from dpo_cli.data.spool import Spool
from dpo_cli.errors import UserError
from dpo_cli.stages.pair import current, imports
from dpo_cli.stages.pair.across import AcrossPrompts
from dpo_cli.stages.pair.judged import (
    COMPLETIONS,
    JUDGMENTS,
    JudgedPrompts,
    NoPair,
    inverted,
    judged_prompts,
    preference,
)
from dpo_cli.stages.pair.reasons import (
    INVERTED,
    NOT_HIGH,
    POSITION,
    SAME,
    SMALL_GAP,
    TIE,
    TOO_CLOSE,
    counted,
    no_judgments,
    no_pair,
    warn_of_split,
)
from dpo_cli.stages.pair.rollouts import RolloutStatistics, pair_rollouts
from dpo_cli.stages.pair.strategies import STRATEGIES, weigh
from dpo_cli.statistics import count_alike

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


class _Candidate(NamedTuple):
    """A pair that is proposed: whether an order of the judge inverts it, and whether its sides say the same."""

    pair: Preference
    inverted: bool = False
    same: bool = False


def run(config: Config, dry_run: bool = False, reuse: bool = False) -> Paired:
    """Make the pairs of the judgments and replace both files; with `dry_run` only count them.

    Args:
        config: `data` and `[pair]` are read.
        dry_run: replace nothing.
        reuse: make nothing where the files are known to be what would be made.

    Raises:
        UserError: no judgments, or no pair comes out of them; the files are as they were.
    """
    data, settings = Path(config.data), config.pair
    if reuse and not dry_run and (counts := current.known(config, (JUDGMENTS, COMPLETIONS))) is not None:
        return _paired(config, {False: counts.train, True: counts.val}, Counter(counts.skipped))
    inputs = current.stand(data, (JUDGMENTS, COMPLETIONS))
    with paused_collection(), judged_prompts(data, settings.length_control) as prompts:
        if prompts is None:
            raise no_judgments(data / JUDGMENTS)
        result = _run(config, prompts, dry_run)
    if not dry_run:
        current.keep(config, inputs, current.PairCounts(result.train, result.val, result.skipped))
    return result


def _run(config: Config, prompts: JudgedPrompts, dry_run: bool) -> Paired:
    """Make the pairs of each prompt when their turn to be written comes."""
    data, settings = Path(config.data), config.pair
    min_gap = MIN_GAP if settings.min_gap is None else settings.min_gap
    skipped: Counter[str] = Counter()
    made: dict[bool, int] = {False: 0, True: 0}
    keys: dict[bool, list[str]] = {False: [], True: []}
    for key in prompts.keys:
        keys[split_side(key, settings.seed, settings.val_share)].append(key)
    propose: Callable[[str], list[tuple[Preference, bool]]]
    if settings.strategy == "stratified":
        propose = AcrossPrompts(prompts, settings, min_gap).candidates
    else:
        propose = partial(_within, prompts, settings)

    def pairs_of(side: bool, last: bool) -> Iterator[Preference]:
        for key in keys[side]:
            try:
                pairs, reasons = _filter([_Candidate(*one) for one in propose(key)], settings, min_gap)
            except NoPair as reason:
                skipped[str(reason)] += 1
                continue
            if not pairs:
                skipped[reasons[0] if reasons else NOT_HIGH] += 1
            made[side] += len(pairs)
            yield from pairs
        if last and not any(made.values()):  # before any file is replaced
            raise no_pair(skipped, min_gap, Counter(count_alike(prompts.errors)))

    val, train = pairs_of(True, last=False), pairs_of(False, last=True)
    if dry_run:
        for pairs in (val, train):
            deque(pairs, maxlen=0)
    else:
        write_files({data / "val.jsonl": encode_rows(val), data / "train.jsonl": encode_rows(train)}, private=True)
    return _paired(config, made, skipped)


def _within(prompts: JudgedPrompts, settings: PairSection, key: str) -> list[tuple[Preference, bool]]:
    """What the strategy proposes for a prompt, and whether an order inverts it.

    Raises:
        NoPair: it gives none.
    """
    prompt = prompts[key]
    places = STRATEGIES[settings.strategy](prompt.scores, prompt.ranking)
    return [(preference(prompt, *place), inverted(prompt, *place)) for place in places]


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
    with paused_collection():
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
    pairs: Sequence[Preference] | Spool[Preference],
    config: Config,
    min_gap: float,
    dry_run: bool,
    skipped: Counter[str] | None = None,
    where: str | None = None,
) -> Paired:
    """Filter and split pairs that were made elsewhere, in their order; of copies the first stays."""
    skipped = Counter() if skipped is None else skipped
    seen: set[int] = set()
    by_prompt = Places()
    for place, pair in enumerate(pairs):
        content = int(preference_id(pair.prompt, pair.chosen, pair.rejected, pair.tools), 16)
        if content in seen:
            skipped["a copy of another pair"] += 1
            continue
        seen.add(content)
        by_prompt.add(int(prompt_id(pair.prompt, pair.tools), 16), place)
    sides = {side: Spool(Preference) for side in (False, True)}
    for key in by_prompt:
        kept, reasons = _filter([_candidate(pairs[place]) for place in by_prompt[key]], config.pair, min_gap)
        skipped.update(reasons)
        sides[split_side(f"{key:016x}", config.pair.seed, config.pair.val_share)].extend(kept)
    if not any(map(len, sides.values())):
        raise UserError(
            f"no row is a pair: {counted(skipped)}",
            where=where,
            hint=f"a lower --min-gap (now {min_gap:g}), or pairs whose sides and scores differ",
        )
    data, train, val = Path(config.data), sides[False], sides[True]
    if not dry_run:
        write_files({data / "val.jsonl": val.lines(), data / "train.jsonl": train.lines()}, private=True)
    result = _paired(config, {side: len(made) for side, made in sides.items()}, skipped)
    result.example = train[0] if len(train) else val[0]
    return result


def _candidate(pair: Preference) -> _Candidate:
    return _Candidate(pair, same=[*map(message_key, pair.chosen)] == [*map(message_key, pair.rejected)])


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


def _filter(candidates: list[_Candidate], settings: PairSection, min_gap: float) -> tuple[list[Preference], list[str]]:
    """Of one prompt's candidates those that are pairs, as many as are allowed, and why the others are none."""
    kept, reasons = [], []
    for pair, inverted_by_an_order, same in candidates:
        reason = SAME if same else _fault(pair, min_gap)
        if inverted_by_an_order and (settings.require_consistent if reason is None else reason in TOO_CLOSE):
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
    if pair.score_gap is None:
        return None
    if pair.score_gap < -EPSILON:
        return "the rejected side has the higher score"
    if pair.score_gap <= EPSILON:
        return TIE
    return SMALL_GAP if pair.score_gap < min_gap - EPSILON else None
