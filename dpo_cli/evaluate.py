"""Is the DPO adapter better than the SFT adapter? Both answer held-out prompts, and the user's function scores them.

Reads the prompts of `evaluate.prompts`, or those of val.jsonl; writes evaluation.jsonl in `data`: a line a prompt
with both adapters' completions, as they came (`generate.keep_lines` does not apply), and their scores. Sampling is
that of `[generate]`, engine and settings alike, with seeds of its own. Judges other than `function` are not covered,
nor is resuming.
"""

import random
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from msgspec import Struct
from msgspec.structs import replace

from dpo_cli import engines
from dpo_cli.engines import Request, Sampled
from dpo_cli.errors import Exit, UserError
from dpo_cli.judges import function
from dpo_cli.progress import Progress
from dpo_cli.schema import Message, prompt_id, read_prompt
from dpo_cli.settings import Config
from dpo_cli.store import parse_rows, write_rows

CONFIDENCE = 0.95


class Compared(Struct, kw_only=True):
    """One line of evaluation.jsonl: what each adapter answered to one prompt, and how it scored."""

    id: str
    prompt: list[Message]
    reference: list[str]
    policy: list[str]
    reference_scores: list[float]
    policy_scores: list[float]


class Sides(Struct):
    """One number for each adapter."""

    reference: float
    policy: float


class Evaluation(Struct, kw_only=True):
    """Policy against reference on `n` prompts.

    `win_rate` is the share of comparisons that the policy wins, ties counted half, and `interval` its 95% bootstrap
    interval by prompt; `scores` are mean scores, `lengths` mean completion lengths in characters; `failed` prompts
    are left out.
    """

    win_rate: float
    interval: tuple[float, float]
    scores: Sides
    lengths: Sides
    n: int
    failed: int
    usd: float
    path: str


def run(config: Config, progress: Progress) -> Evaluation:
    """Sample both adapters on the held-out prompts and compare their scores.

    Raises:
        UserError: no prompts, no function to score with, or what the engine raises.
    """
    settings = config.evaluate
    if config.judge.judge != "function":
        raise UserError(f"evaluate has no judge '{config.judge.judge}'", where="judge.judge", hint="--judge function")
    score = function.load(config.judge.function)
    prompts = _read_prompts(Path(settings.prompts) if settings.prompts else Path(config.data) / "val.jsonl")
    # Seeds differ: with the same draws for both, a policy that moved by a hair would win or tie every comparison.
    reference = replace(config, generate=replace(config.generate, seed=settings.seed))
    policy = replace(
        config,
        model=replace(config.model, adapter=config.model.dpo_adapter, name=config.model.dpo_name),
        generate=replace(config.generate, seed=settings.seed + 1),
    )
    progress.begin("evaluate", 2 * len(prompts))
    try:
        before = _sample(reference, prompts, progress, 0)
        after = _sample(policy, prompts, progress, len(prompts))
    finally:
        progress.end()

    rows = [
        Compared(
            id=key, prompt=prompts[key], reference=before[key], policy=after[key],
            reference_scores=[score(prompts[key], text) for text in before[key]],
            policy_scores=[score(prompts[key], text) for text in after[key]],
        )
        for key in prompts if before[key] and after[key]
    ]  # fmt: skip
    if not rows:
        raise UserError("no prompt was answered by both adapters", code=Exit.FAILED)
    path = Path(config.data) / "evaluation.jsonl"
    write_rows(path, rows)
    wins = [win_rate(row.reference_scores, row.policy_scores) for row in rows]
    return Evaluation(
        win_rate=fmean(wins),
        interval=bootstrap(wins, settings.bootstrap, settings.seed),
        scores=Sides(
            fmean(fmean(row.reference_scores) for row in rows), fmean(fmean(row.policy_scores) for row in rows)
        ),
        lengths=Sides(
            fmean(len(text) for row in rows for text in row.reference),
            fmean(len(text) for row in rows for text in row.policy),
        ),
        n=len(rows),
        failed=len(prompts) - len(rows),
        usd=0.0,
        path=str(path),
    )


def win_rate(reference: Sequence[float], policy: Sequence[float]) -> float:
    """Share of all pairs, one score from each side, in which the policy's is higher; a tie counts half."""
    wins = sum((ours > theirs) + 0.5 * (ours == theirs) for ours in policy for theirs in reference)
    return wins / (len(policy) * len(reference))


def bootstrap(values: Sequence[float], resamples: int, seed: int) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean (Efron 1979), at 95% confidence.

    It knows no spread but that of `values`: if all are equal, it has no width.
    """
    draw = random.Random(seed)
    means = sorted(fmean(draw.choices(values, k=len(values))) for _ in range(resamples))
    outside = int(resamples * (1 - CONFIDENCE) / 2)
    return means[outside], means[-1 - outside]


def _read_prompts(path: Path) -> dict[str, list[Message]]:
    if not path.exists():
        raise UserError("no held-out prompts there", where=str(path), hint="--set evaluate.prompts=FILE")
    prompts = {prompt_id(prompt): prompt for _, prompt in parse_rows(path, read_prompt)}
    if not prompts:
        raise UserError("no prompts in it", where=str(path), hint="--set evaluate.prompts=FILE")
    return prompts


def _sample(
    config: Config, prompts: dict[str, list[Message]], progress: Progress, done_before: int
) -> dict[str, list[str]]:
    """Completions by prompt id; none for a prompt that failed."""
    answers: dict[str, list[str]] = {}
    tokens = 0

    def deliver(sampled: Sampled) -> None:
        nonlocal tokens
        answers[sampled.id] = [] if sampled.error else sampled.texts
        tokens += sampled.usage.output
        progress.update(done_before + len(answers), tokens=tokens)
        if sampled.error:
            progress.log(f"prompt {sampled.id}: {sampled.error}")

    requests = [
        Request(id=key, prompt=prompt, have=[], need=config.evaluate.samples) for key, prompt in prompts.items()
    ]
    engines.load(config.generate.engine)(requests, config, deliver, progress)
    return answers
