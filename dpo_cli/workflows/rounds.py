"""The whole chain from the settings, once or several times: generate, judge, pair, train, evaluate.

In round k > 1 the adapter of round k - 1 gives the completions, and is the reference: iterative DPO (arXiv:2312.16682).
A round has its own folder of data (`data`/round-k), its own run (`runs`/round-k) and its own adapter
(`model.dpo_adapter`-round-k); a round that passes its gates is copied to `model.dpo_adapter`, so that whatever reads
that finds the last good one. A round may have prompts of its own (`run.prompts`), and may train on the pairs of the
rounds before as well (`run.old_pairs`). `run.max_usd` is one budget over all of it. Each stage goes on where it was
stopped; what round.json in the run's folder says is only for the table. Not covered: rounds of whole models
(`train.full`).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from dpo_cli.config.settings import Config
from dpo_cli.data.files import write_json
from dpo_cli.data.jsonl import read_rows, write_rows
from dpo_cli.data.records import Preference
from dpo_cli.endpoint.costs import Estimate
from dpo_cli.errors import Exit, UserError
from dpo_cli.jobs import launch
from dpo_cli.progress import Progress
from dpo_cli.stages import generate, judge, serve_config
from dpo_cli.stages.evaluate import run as evaluate
from dpo_cli.stages.evaluate.gates import refusals
from dpo_cli.stages.evaluate.results import Evaluation
from dpo_cli.stages.pair import run as pair
from dpo_cli.stages.serve_config.server import ensure_served
from dpo_cli.training.gates import describe
from dpo_cli.training.run_folder import RunFolder, publish
from dpo_cli.training.run_history import Trained, read_finished
from dpo_cli.workflows import spending

NEEDED = "adapter_config.json"
EVEN = 0.5


class Round(Struct, kw_only=True):
    """One round: where it started, what it made, and why it was the last one (`stopped`), if its gates said no.

    `sampling_usd` is for completions to train on, `judging_usd` for their judgments.
    """

    number: int
    reference: str | None
    adapter: str
    completions: int = 0
    pairs: int = 0
    held_out: int = 0
    sampling_usd: float = 0.0
    judging_usd: float = 0.0
    trained: Trained | None = None
    evaluation: Evaluation | None = None
    stopped: str | None = None

    @property
    def usd(self) -> float:
        """What all of it has cost."""
        return self.sampling_usd + self.judging_usd + (self.evaluation.usd if self.evaluation else 0.0)


class RoundsResult(Struct, kw_only=True):
    """Every round so far; `adapter` is the last one that passed, None if none did, and `serve_config` serves it."""

    rounds: list[Round]
    verdict: Literal["pass", "fail"]
    adapter: str | None
    usd: float
    serve_config: str | None


class Step(Struct):
    """One stage of one round, as a dry run tells it."""

    round: int
    stage: str
    state: Literal["done", "to do"]
    what: str
    estimate: Estimate | None = None


def run(config: Config, progress: Progress, backend: str = "local", limit: int | None = None) -> RoundsResult:
    """Do every round, or go on with them.

    Args:
        config: every setting; `[run]` says how many rounds.
        progress: where each stage reports.
        backend: where training runs.
        limit: only the first so many prompts.

    Raises:
        UserError: what the stages raise; too many prompts of a stage failed, or are still in a batch (exit 1); the
            server can't be made to serve the adapter of the last round.
    """
    _check(config)
    rounds: list[Round] = []
    for number in range(1, config.run.rounds + 1):
        progress.log(f"round {number} of {config.run.rounds}")
        one = _Stages(config, number, progress, limit)
        rounds.append(one.finish(backend))
        if one.round.stopped:
            break
        publish(Path(one.round.adapter), Path(config.model.dpo_adapter), config.model.base)
    good = [done for done in rounds if not done.stopped]
    return RoundsResult(
        rounds=rounds,
        verdict="pass" if len(good) == len(rounds) else "fail",
        adapter=config.model.dpo_adapter if good else None,
        usd=sum(done.usd for done in rounds),
        serve_config=serve_config.render(serve_config.plan(config), config, "cli") if good else None,
    )


def of_round(config: Config, number: int) -> Config:
    """The settings of one round: its folders, the adapter that it starts from, and the names of both on a server."""
    model = config.model
    this, last = f"-round-{number}", f"-round-{number - 1}"
    mine = replace(model, dpo_adapter=model.dpo_adapter + this, dpo_name=model.dpo_name + this)
    if number > 1:
        mine.adapter, mine.name = model.dpo_adapter + last, model.dpo_name + last
    prompts = config.run.prompts[number - 1] if config.run.prompts else config.generate.prompts
    return replace(
        config,
        data=str(Path(config.data) / f"round-{number}"),
        model=mine,
        generate=replace(config.generate, prompts=prompts),
    )


def plan(config: Config, progress: Progress, limit: int | None = None) -> list[Step]:
    """What `run` would do, stage by stage; samples nothing, asks nobody and writes nothing.

    Raises:
        UserError: as `run`, as far as it can be known.
    """
    _check(config)
    return [
        step for number in range(1, config.run.rounds + 1) for step in _Stages(config, number, progress, limit).steps()
    ]


def _check(config: Config) -> None:
    if config.run.prompts and len(config.run.prompts) < config.run.rounds:
        raise UserError(
            f"{config.run.rounds} rounds, and prompts for {len(config.run.prompts)}",
            where="run.prompts",
            hint="one file or folder a round, or none for the same prompts in every round",
        )
    if config.train.full and config.run.rounds > 1:
        raise UserError("a whole model is no reference for the next round", where="train.full", hint="--rounds 1")


class _Stages:
    """The stages of one round, in order."""

    def __init__(self, config: Config, number: int, progress: Progress, limit: int | None) -> None:
        self.whole = config
        self.config = of_round(config, number)
        self.name = f"round-{number}"
        self.progress = progress
        self.limit = limit
        self.folder = RunFolder(Path(config.runs) / self.name)
        self.file = self.folder.path / "round.json"
        self.round = self._read() or Round(
            number=number, reference=self.config.model.adapter, adapter=self.config.model.dpo_adapter
        )

    def finish(self, backend: str) -> Round:
        """Whatever is left to do."""
        made = self.round
        # A run that has begun is trained on the pairs that it began with.
        if not (self.folder.config.exists() and made.pairs):
            self._make_pairs()
        was = read_finished(self.folder.path)
        made.trained = launch.train(
            backend,
            self.config,
            self.progress,
            name=self.name,
            data=self._training_data(),
            fresh=False,
            limit=self.limit,
        )
        self._write()
        if made.trained.verdict == "fail":
            return self._stop("; ".join(made.trained.reasons) or "training did not pass its gates")
        self._serve(made.number, self.config.model.dpo_name, made.adapter, anew=was is None)
        made.evaluation = evaluate.run(self._capped(), self.progress, limit=self.limit)
        self._tolerate("evaluate", made.evaluation.failed, made.evaluation.n, made.evaluation.errors)
        self._refuse_waiting(made.evaluation.waiting)
        self._write()
        for name in refusals(made.evaluation.gates):
            return self._stop(describe(name, made.evaluation.gates[name], "held-out prompts"))
        if made.evaluation.interval[1] < EVEN:
            return self._stop(f"it loses to what it started from: win rate {made.evaluation.win_rate:.3f}")
        return self._stop(None)

    def steps(self) -> Iterator[Step]:
        """What is left to do, stage by stage."""
        number, done = self.round.number, read_finished(self.folder.path) is not None
        begun = self.folder.config.exists() and self.round.pairs > 0
        starts = self.config.model.adapter is None or (Path(self.config.model.adapter) / NEEDED).exists()
        if begun:
            yield Step(number, "generate", "done", f"{self.round.completions:,} completions")
            yield Step(number, "judge", "done", f"{self.round.pairs:,} pairs, {self.round.held_out:,} held out")
        elif number > 1 and not starts:
            prompts = len(list(generate.read_prompts(self.config))[: self.limit])
            text = f"{prompts * self.config.generate.n:,} completions by the adapter of round {number - 1}"
            yield Step(number, "generate", "to do", text)
            yield Step(number, "judge", "to do", f"{prompts:,} prompts")
        else:
            yield from self._data_steps()
        step = max(self.folder.complete_checkpoints(), default=0)
        where = f", from step {step:,}" if step else ""
        yield Step(number, "train", "done" if done else "to do", f"{self.round.adapter}{'' if done else where}")
        held = self.config.evaluate.prompts or "the pairs' held-out prompts"
        told = self.round.evaluation is not None
        yield Step(number, "evaluate", "done" if told else "to do", f"on {held}")

    def _data_steps(self) -> Iterator[Step]:
        number = self.round.number
        sampled = generate.run(self.config, self.progress, limit=self.limit, dry_run=True)
        state: Literal["done", "to do"] = "to do" if sampled.owed_completions else "done"
        text = f"{sampled.owed_completions:,} completions of {sampled.owed_prompts:,} prompts"
        yield Step(number, "generate", state, text, sampled.estimate)
        if sampled.done_before:
            asked = judge.run(self.config, self.progress, limit=self.limit, dry_run=True)
            missing = f"{asked.owed:,} of {asked.total:,} prompts"
            missing += f" and {sampled.owed_prompts:,} to come" if sampled.owed_prompts else ""
            state = "to do" if asked.owed or sampled.owed_prompts else "done"
            yield Step(number, "judge", state, missing, asked.estimate)
        else:
            yield Step(number, "judge", "to do", f"{sampled.prompts:,} prompts")

    def _make_pairs(self) -> None:
        made, limit = self.round, self.limit
        if made.number > 1:
            self._serve(made.number - 1, self.config.model.name, str(made.reference), anew=False)
        sampled = generate.run(self._capped(), self.progress, limit=limit)
        made.sampling_usd = spending.sampling_usd(self.config)
        self._write()
        self._tolerate("generate", sampled.failed, sampled.prompts, [sampled.error or ""])
        judged = judge.run(self._capped(), self.progress, limit=limit)
        made.judging_usd = judged.usd
        self._tolerate("judge", sum(judged.errors.values()), judged.total, judged.errors)
        self._refuse_waiting(judged.receipt.waiting if judged.receipt else 0)
        paired = pair.run(self.config)
        made.completions = self.config.generate.n * sampled.prompts
        made.pairs, made.held_out = paired.train, paired.val
        self._write()

    def _capped(self) -> Config:
        """The round's settings, with what is left of the budget of all rounds."""
        most = self.whole.run.max_usd
        if most is None:
            return self.config
        rounds = (of_round(self.whole, number) for number in range(1, self.whole.run.rounds + 1))
        return spending.capped(self.config, max(0.0, most - spending.spent(rounds)))

    def _training_data(self) -> Path:
        """The round's pairs, or a folder that holds those of the rounds before as well; held out are its own alone.

        No prompt is on both sides, since its side depends on nothing but the prompt.
        """
        mine = Path(self.config.data)
        earlier = [Path(of_round(self.whole, number).data) for number in range(1, self.round.number)]
        if not (earlier and self.whole.run.old_pairs):
            return mine
        folder = mine / "with-old-pairs"
        rows = {row.id: row for data in (*earlier, mine) for _, row in read_rows(data / "train.jsonl", Preference)}
        write_rows(folder / "train.jsonl", rows.values())
        write_rows(folder / "val.jsonl", [row for _, row in read_rows(mine / "val.jsonl", Preference)])
        self.progress.log(f"training on {len(rows):,} pairs of {self.round.number} rounds")
        return folder

    def _serve(self, number: int, name: str, adapter: str, anew: bool) -> None:
        """See that the server has the adapter of a round, where one serves."""
        if self.config.generate.engine == "endpoint" and self.config.generate.url:
            how = ensure_served(self.config.generate.url, name, Path(adapter), anew)
            self.progress.log(f"{name}: {how}")

    def _tolerate(self, stage: str, failed: int, total: int, reasons: list[str] | dict[str, int]) -> None:
        """Stop if too many failed: what comes after would rest on what is left."""
        if failed > self.config.run.max_failed * total:
            why = next(iter(reasons), "")
            raise UserError(
                f"{stage}: {failed:,} of {total:,} prompts failed; the first: {why}",
                where=self.name,
                hint="the same command tries them again; run.max_failed is the share that may fail",
                code=Exit.FAILED,
            )

    def _refuse_waiting(self, count: int) -> None:
        if count:
            raise UserError(
                f"{count:,} requests are in batches that have not ended",
                where=self.name,
                hint="the same command takes them in; a batch ends within a day",
                code=Exit.FAILED,
            )

    def _stop(self, reason: str | None) -> Round:
        self.round.stopped = reason
        self._write()
        return self.round

    def _read(self) -> Round | None:
        try:
            return msgspec.json.decode(self.file.read_bytes(), type=Round)
        except (FileNotFoundError, msgspec.MsgspecError):
            return None

    def _write(self) -> None:
        write_json(self.file, self.round)
