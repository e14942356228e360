"""The training loop around a trainer: resuming, stopping on a signal, and doing what the guards decide.

A trainer is made anew for each attempt: after a rollback or a lack of memory the run goes on exactly as it would after
a kill, from a checkpoint. What the guards have changed is in `State`, which each checkpoint carries. Writes
metrics.jsonl, events.jsonl and guards.json of the run folder. Not covered: a single forward and backward that takes
longer than the time between SIGTERM and SIGKILL.
"""

import gc
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NoReturn

import msgspec
import torch
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dpo_cli.config.settings import GateSection
from dpo_cli.data import jsonl
from dpo_cli.errors import Exit, UserError
from dpo_cli.interrupts import Interrupted, Stop
from dpo_cli.training import distributed, guards
from dpo_cli.training.guards import GuardFinding, GuardState
from dpo_cli.training.remedies import REMEDIES, advice
from dpo_cli.training.run_folder import RunContext, metric_rows
from dpo_cli.training.trainer import Diverged, peak_memory

LoopResult = Literal["done", "stopped", "rollback", "nan", "out_of_memory"]


class RunCallback(TrainerCallback):  # type: ignore[misc]
    """Writes metrics.jsonl, shows progress, asks the guards, and ends the run when a signal asks for it."""

    def __init__(
        self,
        trainer: Any,
        run: RunContext,
        metrics: jsonl.Journal,
        stop: Stop,
        state: GuardState,
        gate: GateSection | None,
    ) -> None:
        self.trainer = trainer
        self.run = run
        self.metrics = metrics
        self.stop = stop
        self.guards = state
        self.gate = gate
        self.resumed_from: Path | None = None
        self.rollback = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        if self.resumed_from is not None:
            self.trainer.restore_meters(self.resumed_from)
            # A signal came during the evaluation of the step that was saved.
            args.eval_on_start = self.trainer.owes_evaluation
        # As many steps as the rows that were encoded make.
        self.run.progress.begin("train", state.max_steps, state.global_step)
        self._apply()
        return control

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        for row in metric_rows(state.log_history[-1:]):
            self.metrics.append(row)
            if "eval_loss" in row:
                self.run.progress.log(f"step {row['step']}: {_evaluation(row)}")
            else:
                rows = metric_rows(state.log_history)
                beta = getattr(self.trainer, "beta", 1.0)
                found = guards.after_log(self.guards, rows, self.gate or GateSection(), beta)
                self._report(state.global_step, found)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        args.eval_on_start = False
        if self.gate is not None:
            rows = metric_rows(state.log_history)
            found = guards.after_evaluation(self.guards, rows, self.gate, self.trainer.args.beta)
            self._report(state.global_step, found)
            self._apply()
            if any(finding.action == "rollback" for finding in found):
                self.rollback = control.should_training_stop = True
                control.should_save = False
            elif self.guards.ended is not None:
                control.should_training_stop = control.should_save = True
        self.trainer.remember_step(owes_evaluation=False)
        return control

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        self.trainer.finish_step()
        if state.global_step >= state.max_steps:
            control.should_log = True
        elif self._asked_to_stop() or state.global_step == self.run.pause_at:
            control.should_save = control.should_training_stop = True
        self.run.progress.update(state.global_step, memory_gb=peak_memory(), **self.trainer.counters())
        return control

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.run.folder.after_save is not None:
            self.run.folder.after_save()

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.trainer.remember_step(owes_evaluation=False)

    def on_substep_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._leave_mid_step(state.global_step)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if not self.trainer.owes_evaluation:  # before KL is measured, under a random state of its own
            self.trainer.remember_step(owes_evaluation=True)
        self._leave_mid_step(state.global_step)

    def _asked_to_stop(self) -> bool:
        """Whether a signal has come to any of the processes."""
        if distributed.several():
            accelerator = self.trainer.accelerator
            if self.stop.signal is not None:
                accelerator.set_trigger()
            if accelerator.check_trigger():
                self.stop.signal = self.stop.signal or signal.SIGTERM
        return self.stop.signal is not None

    def _leave_mid_step(self, step: int) -> None:
        """Save the last whole step and leave, if a signal came; several processes end their step together instead."""
        if self.stop.signal is None or distributed.several():
            return
        if step and step not in self.run.folder.complete_checkpoints():
            self.trainer.save_remembered_step()
        raise Interrupted

    def _apply(self) -> None:
        """Put the guards' learning rate and beta in force; exactly what is there already, if they have changed none."""
        scheduler, optimizer = self.trainer.lr_scheduler, self.trainer.optimizer
        wanted = self.trainer.args.learning_rate * self.guards.lr_scale
        if scheduler.base_lrs[0] not in (0, wanted):
            ratio = wanted / scheduler.base_lrs[0]
            scheduler.base_lrs = [wanted for _ in scheduler.base_lrs]
            for group in optimizer.param_groups:
                group["lr"] *= ratio
                group["initial_lr"] = wanted
            scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]  # what the next log says
        if self.guards.beta is not None:
            self.trainer.beta = self.guards.beta

    def _report(self, step: int, found: list[GuardFinding]) -> None:
        for finding in found:
            report_finding(finding, step, self.run)


def report_finding(finding: GuardFinding, step: int, run: RunContext) -> None:
    """Record and show what a guard found and does."""
    run.record(finding.fault, step, action=finding.action, **finding.details)
    numbers = ", ".join(
        f"{name.replace('_', ' ')} {value:.4g}" if isinstance(value, float) else f"{name.replace('_', ' ')} {value}"
        for name, value in finding.details.items()
    )
    text = f"step {step}: {finding.fault} ({numbers}): {finding.action}"
    if finding.fault in REMEDIES:
        text += f". {REMEDIES[finding.fault].symptom}; {advice(finding.fault)}"
    run.progress.log(text)


def fit(
    make: Callable[[GuardState], Any],
    run: RunContext,
    gate: GateSection | None = None,
) -> None:
    """Train from the newest complete checkpoint, or from the start, to the end that max_steps or a guard sets.

    Args:
        make: makes a trainer, as the guards' state says.
        run: where everything is.
        gate: what the guards look for; None: signals and lack of memory alone.

    Raises:
        UserError: SIGTERM came, the last whole step is saved (exit 143); memory lacks for a single row; the loss is
            not a number before there is a checkpoint.
        KeyboardInterrupt: Ctrl-C came, the last whole step is saved.
    """
    folder = run.folder
    if note := distributed.restart_note(folder.path):
        found = note["finding"] and msgspec.convert(note["finding"], GuardFinding)
        _smaller_batch(found, gate is None or gate.smaller_batch, note["step"], run)
    state = folder.guard_state()
    with Stop() as stop:
        while state.ended is None:
            try:
                outcome, step, trainer = _attempt(make, run, stop, state, gate)
            except Interrupted as early:  # before the first step of this attempt
                _raise_stopped(stop, max(folder.complete_checkpoints(), default=0), run, str(early))
            forwards = trainer.args.gradient_accumulation_steps * distributed.count()
            batch = trainer.args.per_device_train_batch_size, forwards
            eval_batch, budget = trainer.args.per_device_eval_batch_size, trainer.token_budget
            may_checkpoint = trainer.may_checkpoint
            del trainer
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if outcome == "done":
                break
            if outcome == "stopped":
                _raise_stopped(stop, step, run)
            if outcome == "out_of_memory":
                halve = gate is None or gate.smaller_batch
                finding = None
                if halve:
                    finding = guards.after_out_of_memory(state, batch, eval_batch, budget, may_checkpoint)
                folder.save_guard_state(max(folder.complete_checkpoints(), default=0), state)
                if distributed.several():
                    distributed.restart(folder.path, {"step": step, "finding": finding})
                _smaller_batch(finding, halve, step, run)
                continue
            if outcome == "nan":
                report_finding(guards.after_nan(state, gate or GateSection()), step, run)
            if state.ended is None:
                _roll_back(run, state, step, gate)
    if state.ended is not None:
        newest = max(folder.complete_checkpoints(), default=0)
        if not newest:
            raise UserError(
                "the loss is not a number, and no checkpoint was good",
                where=str(run.folder.path),
                hint=advice("nan"),
                code=Exit.FAILED,
            )
        if distributed.is_main_process():
            folder.save_guard_state(newest, state)
        run.record("ended", newest, reason=state.ended)


def _smaller_batch(finding: GuardFinding | None, halve: bool, step: int, run: RunContext) -> None:
    """Tell that forwards take fewer rows from now on.

    Raises:
        UserError: they can't, or must not.
    """
    if finding is None:
        raise UserError(
            f"the memory does not suffice for {'one row' if halve else 'a forward'}",
            where=str(run.folder.path),
            hint=advice("out_of_memory"),
            code=Exit.FAILED,
        )
    report_finding(finding, step, run)


def _attempt(
    make: Callable[[GuardState], Any],
    run: RunContext,
    stop: Stop,
    state: GuardState,
    gate: GateSection | None,
) -> tuple[LoopResult, int, Any]:
    """Train until something happens: the outcome, the step, and the trainer.

    metrics.jsonl is written anew from the checkpoint's own log first, so that no step is there twice or missing.
    """
    folder = run.folder
    checkpoint = next(reversed(folder.complete_checkpoints().values()), None)
    distributed.write_rows_once(folder.metrics, metric_rows(folder.trainer_state().get("log_history", [])))
    trainer = make(state)
    trainer.guard_state = state
    outcome: LoopResult = "done"
    with distributed.journal(folder.metrics) as metrics:
        callback = RunCallback(trainer, run, metrics, stop, state, gate)
        callback.resumed_from = checkpoint
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(callback)
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except Interrupted:
            outcome = "stopped"
        except Diverged:
            outcome = "nan"
        except torch.OutOfMemoryError:
            outcome = "out_of_memory"
    step = trainer.state.global_step
    if callback.rollback:
        outcome = "rollback"
    elif outcome == "done" and stop.signal is not None and step < trainer.state.max_steps:
        outcome = "stopped"
    return outcome, step, trainer


def _roll_back(run: RunContext, state: GuardState, step: int, gate: GateSection | None) -> None:
    """Go back to the last good checkpoint, or to the start."""
    folder = run.folder
    limit = gate.kl_limit if gate else float("inf")
    rows = [row for _, row in jsonl.read_rows(folder.metrics, dict[str, Any])]
    good = distributed.broadcast(guards.last_good(folder.complete_checkpoints(), rows, limit) or 0)
    if distributed.is_main_process():
        folder.save_guard_state(good, state)
        folder.drop_after(good)
    distributed.broadcast(good)  # the others go on from there when it is done
    run.record("rolled_back", step, to=good)
    run.progress.log(f"step {step}: rolled back to {f'checkpoint-{good}' if good else 'the start'}")


def _raise_stopped(stop: Stop, step: int, run: RunContext, early: str = "") -> NoReturn:
    """End a run on a signal; `early` is what was kept where no step was taken."""
    assert stop.signal is not None
    saved = max(run.folder.complete_checkpoints(), default=0)
    run.record("stopped", step, signal=signal.Signals(stop.signal).name)
    came_to = f"after step {step}; step {saved} is saved" if step else "before the first step"
    said = "; ".join(filter(None, (f"stopped by {signal.Signals(stop.signal).name} {came_to}", early)))
    if stop.signal == signal.SIGINT:
        raise KeyboardInterrupt(said)
    raise UserError(said, where=str(run.folder.path), hint="the same command goes on from there", code=Exit.PREEMPTED)


def _evaluation(row: dict[str, Any]) -> str:
    names = {
        "held-out loss": "eval_loss",
        "margin": "eval_rewards/margins",
        "accuracy": "eval_rewards/accuracies",
        "KL in nats a token": "eval_kl_nats_per_token",
    }
    return ", ".join(f"{name} {row[key]:.4f}" for name, key in names.items() if key in row)
