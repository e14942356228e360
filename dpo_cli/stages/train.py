"""Preference pairs to a DPO adapter, or demonstrations to an SFT adapter: the one entry that every backend runs.

Reads train.jsonl and val.jsonl (or one file, split by prompt), the base model and the SFT adapter; writes the run's
folder and, at the end, the adapter of the best checkpoint alone. The same call goes on with a run that was killed,
and does nothing for one that is finished. Importing this needs no torch.
"""

import signal
from collections.abc import Callable
from pathlib import Path

from msgspec.structs import replace

from dpo_cli import errors
from dpo_cli.adapter import Adapter, read_adapter
from dpo_cli.config.resolve import as_dict
from dpo_cli.config.settings import Config
from dpo_cli.data import files, jsonl
from dpo_cli.data.formats.prompts import counted
from dpo_cli.errors import Exit, UserError
from dpo_cli.interrupts import Interrupted, Stop, interruptible
from dpo_cli.models.base_model import check_base
from dpo_cli.progress import Progress, Silent
from dpo_cli.safe_text import check_run_name
from dpo_cli.training import distributed, plan
from dpo_cli.training.device_check import check_device
from dpo_cli.training.encode_inputs import encode_inputs, exchange
from dpo_cli.training.fold import fold_base, folded
from dpo_cli.training.inputs import Inputs, Stage, download_base, read_inputs
from dpo_cli.training.outcome import finish, finished_before, paused, step_zero, texts
from dpo_cli.training.precision import with_precision
from dpo_cli.training.preflight import of_encoded
from dpo_cli.training.run_folder import (
    RunContext,
    RunFolder,
    check_replaceable,
    event,
)
from dpo_cli.training.run_history import Trained, read_finished
from dpo_cli.training.run_identity import identity_of, model_hashes, versions
from dpo_cli.training.template_check import check_tokens


def run(
    config: Config,
    progress: Progress,
    stage: Stage = "dpo",
    name: str = "dpo",
    data: Path | None = None,
    fresh: bool = False,
    limit: int | None = None,
    dry_run: bool = False,
    after_save: Callable[[], None] | None = None,
    submission: str | None = None,
    pause_at: int | None = None,
    card: str | None = None,
) -> Trained:
    """Train, or go on training, the run `name`.

    Args:
        config: every setting.
        progress: where the run stands.
        stage: `dpo` from the SFT adapter, or `sft` to make one.
        name: the run's name.
        data: folder with train.jsonl and perhaps val.jsonl, or one file to be split by prompt; unset: for dpo
            `config.data`, for sft the folder of `config.generate.prompts`.
        fresh: start over, replacing what an earlier run of this name made.
        limit: train on the first so many rows only.
        dry_run: read and check everything, write nothing.
        after_save: called whenever a checkpoint is whole on the disk.
        submission: which request for this run it is: a second attempt of the same one does not start over again.
        card: type of the card that the job was given, if it was given one.
        pause_at: step at which to stop with a checkpoint, as if interrupted; a later call goes on from there.

    Raises:
        UserError: bad input, a run of this name with other settings, a step zero that is not ln 2 (exit 1), or
            SIGTERM (exit 143, with a checkpoint).
        KeyboardInterrupt: Ctrl-C, with a checkpoint.
    """
    check_run_name(name)
    errors.require("train", "training")
    folder = RunFolder(Path(config.runs) / name, after_save)
    inputs = read_inputs(config, stage, data, limit)
    if inputs.dropped:
        progress.log(f"columns left out: {counted(inputs.dropped)}")
    base = download_base(config.model.base)
    found = check_base(str(base))
    adapter = _sft_adapter(config) if stage == "dpo" else None
    output = _output(config, stage)
    if adapter and config.model.adapter_into_base and not dry_run:
        if distributed.is_main_process():
            fold_base(config, base, texts(inputs), progress)
        distributed.broadcast(None)
        config = folded(config)
        base, adapter = Path(config.model.base), None
    section = config.train if stage == "dpo" else config.sft
    result = Trained(
        stage=stage,
        run=str(folder.path),
        adapter=str(output),
        rows=len(inputs.rows),
        held_out=len(inputs.held_out),
        steps=plan.steps(section, len(inputs.rows)),
    )
    if dry_run:
        result.step = max(folder.complete_checkpoints(), default=0)
        return result
    check_device(found, card, section.allow_cpu, config.model.base)
    config = with_precision(config, stage, found, adapter.path if adapter else None, progress)
    if not distributed.is_main_process():
        return _assist(result, config, base, adapter, inputs, folder, pause_at)
    if fresh and not (submission and folder.submission() == submission):
        with jsonl.Journal(folder.events):
            folder.clear()
    with jsonl.Journal(folder.events) as events:
        identity = identity_of(config, stage, base, adapter, inputs, limit)
        folder.begin(
            {
                "submission": submission,
                "identity": identity,
                "config": as_dict(config),
                "versions": versions(),
                **model_hashes(identity),
            }
        )
        report = read_finished(folder.path)
        if report is not None:
            distributed.broadcast(False)
            return finished_before(report, folder, output, config.model.base)
        checkpoints = folder.complete_checkpoints()
        result.resumed_from = max(checkpoints, default=None)
        if stage == "sft" and output.exists() and not fresh and not checkpoints:
            raise UserError(
                "there is an SFT adapter already",
                where=str(output),
                hint="set model.adapter to another folder, or replace it with --fresh",
            )
        trains = not (_is_trained(folder) or is_reached(folder, pause_at))
        if trains:
            for torn in folder.drop_incomplete():
                progress.log(f"{torn} was cut short and is dropped")
        if distributed.broadcast(trains):
            progress.begin("load the model", None)
            try:
                with Stop() as stop:  # before the trainer has one of its own
                    _train(config, stage, base, adapter, inputs, RunContext(folder, events, progress, pause_at))
            except Interrupted:
                raise stopped_early(stop, folder) from None
            except UserError as error:
                if error.code != Exit.PREEMPTED:
                    events.append(event("refused", max(checkpoints, default=0), reason=error.message))
                result.step_zero = step_zero(folder)
                if result.step_zero is not None and not result.step_zero.ok:
                    result.verdict = "fail"
                    files.write_json(folder.report, result)
                raise
            finally:
                progress.end()
        if pause_at is not None and not _is_trained(folder):
            return paused(result, folder, config, pause_at)
        return finish(result, folder, output, config, base, inputs, identity, progress)


def stopped_early(stop: Stop, folder: RunFolder) -> BaseException:
    """What ends a run that a signal reached before there was a trainer."""
    step = max(folder.complete_checkpoints(), default=0)
    name = signal.Signals(stop.signal or signal.SIGTERM).name
    said = f"stopped by {name} " + (f"before it went on; step {step} is saved" if step else "before the first step")
    if stop.signal == signal.SIGINT:
        return KeyboardInterrupt(said)
    return UserError(said, where=str(folder.path), hint="the same command goes on from there", code=Exit.PREEMPTED)


def _assist(
    result: Trained,
    config: Config,
    base: Path,
    adapter: Adapter | None,
    inputs: Inputs,
    folder: RunFolder,
    pause_at: int | None,
) -> Trained:
    """Train in a process that is not the first: what is written and told is the first one's."""
    if distributed.broadcast(False):
        with distributed.journal(folder.events) as events:
            _train(config, result.stage, base, adapter, inputs, RunContext(folder, events, Silent(), pause_at))
    return result


def _train(
    config: Config,
    stage: Stage,
    base: Path,
    adapter: Adapter | None,
    inputs: Inputs,
    run: RunContext,
) -> None:
    """Encode the rows and run the stage's trainer; everything that needs torch is imported here."""
    from dpo_cli.training import trackers, trainer

    section = config.train if stage == "dpo" else config.sft
    with trainer.redirect_logs(run.progress), trackers.tracked(section, run.folder.path, run.progress):
        with interruptible():
            encoder, rows, held_out = encode_inputs(config.model, section, base, inputs, run)
        if stage == "dpo":
            from dpo_cli.training import dpo

            made = _say_plan(config, base, rows.rows.lengths(), held_out.rows.lengths(), run.progress)
            start = adapter.path if adapter else None
            if adapter and adapter.unserved:
                what = ", ".join(adapter.unserved)
                run.progress.log(
                    f"vLLM does not serve {what}: nothing-dpo push adapter FOLDER --merge when it is trained"
                )
            asked = [exchange(row) for row in inputs.rows[: config.gate.token_rows]]
            check_tokens(encoder, asked, config.generate.url, start, run)
            checkpointing = made.checkpointing if made else None
            dpo.train(config, base, start, encoder.tokenizer, rows.rows, held_out.rows, run, checkpointing)
        else:
            from dpo_cli.training import sft

            sft.train(config.sft, base, encoder.tokenizer, rows.rows, held_out.rows, run)


def _say_plan(
    config: Config, base: Path, rows: list[plan.TokenLengths], held_out: list[plan.TokenLengths], progress: Progress
) -> plan.Plan | None:
    """Tell what the run will need, in one line, and what to change; None: nothing is known of such a model."""
    from dpo_cli.training.trainer import card_gb

    if (card := card_gb()) is not None:  # the one that is here, not the one that is configured
        config = replace(config, plan=replace(config.plan, gpu_memory_gb=card))
    try:
        made = of_encoded(config, base, rows, held_out)
    except UserError as error:  # of another family than Llama: it trains all the same
        progress.log(f"plan: {error}")
        return None
    progress.log(plan.line(made))
    for warning in made.warnings:
        progress.log(f"plan: {warning}")
    return made


def is_reached(folder: RunFolder, step: int | None) -> bool:
    """Whether a run has a checkpoint of this step or a later one."""
    return step is not None and max(folder.complete_checkpoints(), default=0) >= step


def _is_trained(folder: RunFolder) -> bool:
    state = folder.trainer_state()
    return bool(state) and (state["global_step"] >= state["max_steps"] or folder.guard_state().ended is not None)


def _sft_adapter(config: Config) -> Adapter | None:
    """The adapter that is policy and reference; None only where the configuration says that there is none."""
    if not config.model.adapter:
        return None
    path = Path(config.model.adapter)
    if Path(config.runs).resolve() in path.resolve().parents:
        raise UserError(
            "this is a run's own checkpoint, not an adapter to start from",
            where=str(path),
            hint="to resume the run: the same command with its --name; to start from its result: --adapter FOLDER with "
            "the folder that it published, another --dpo-adapter and another --name",
        )
    if not path.exists():
        raise UserError(
            "no SFT adapter here",
            where=str(path),
            hint="nothing-dpo train --stage sft makes one; --set model.adapter=none trains a fresh LoRA instead",
        )
    section = config.model
    return read_adapter(path, section.base, section.same_base, resizes=section.adapter_into_base)


def _output(config: Config, stage: Stage) -> Path:
    """Where the adapter will go."""
    chosen = config.model.dpo_adapter if stage == "dpo" else config.model.adapter
    if not chosen:
        raise UserError("model.adapter names no folder for the SFT adapter", hint="--set model.adapter=FOLDER")
    output = Path(chosen)
    if stage == "dpo" and config.model.adapter:
        start = Path(config.model.adapter).resolve()
        if start == output.resolve() or start in output.resolve().parents or output.resolve() in start.parents:
            raise UserError(
                "the DPO adapter would overwrite the SFT adapter",
                where=str(output),
                hint="to start from its result: another --dpo-adapter and --name; to resume: leave out --adapter",
            )
    check_replaceable(output)
    return output
