"""What became of a run: judged by its best checkpoint, whose adapter is put in its place, and reported.

Reads the run's folder; writes its report and the adapter that comes out. Importing this needs no torch.
"""

import math
from pathlib import Path
from typing import Any

import msgspec

from dpo_cli.config.settings import Config
from dpo_cli.data import files
from dpo_cli.data.files import sha256
from dpo_cli.errors import Exit, UserError
from dpo_cli.progress import Progress
from dpo_cli.training.encode_inputs import exchange
from dpo_cli.training.gates import check_gates, describe, has_moved, open_gates, why_unmoved, worst
from dpo_cli.training.guards import KL, best_step
from dpo_cli.training.inputs import Inputs
from dpo_cli.training.run_folder import RunFolder, merged_folder, metric_rows, publish, weights_file
from dpo_cli.training.run_history import Merged, Retreat, StepZero, Trained
from dpo_cli.training.run_identity import model_hashes

RETREAT = "retreat"  # the scaled adapter, in the run's folder
BEST = {"dpo": ("eval_rewards/margins", 1), "sft": ("eval_loss", -1)}


def paused(result: Trained, folder: RunFolder, config: Config, step: int) -> Trained:
    """What a run had measured by a step, up to its best evaluation, however far it has gone since."""
    rows = [row for row in metric_rows(folder.trainer_state()["log_history"]) if row["step"] <= step]
    evaluated = [row["step"] for row in rows if "eval_loss" in row] or [step]
    best = best_step(evaluated, rows, *BEST[result.stage], config.gate.kl_limit)
    rows = [row for row in rows if row["step"] <= best]
    result.step, result.step_zero = step, step_zero(folder)
    result.metrics = {key: value for row in rows for key, value in row.items()}
    held_out = (folder.last_event("encoded") or {}).get("held_out", 0)
    result.gates = check_gates(result.stage, rows, config, held_out)
    return result


def finish(
    result: Trained,
    folder: RunFolder,
    output: Path,
    config: Config,
    base: Path,
    inputs: Inputs,
    identity: dict[str, Any],
    progress: Progress,
) -> Trained:
    """Judge the run by its best checkpoint, put its adapter in its place, write the report."""
    state = folder.trainer_state()
    checkpoints = folder.complete_checkpoints()
    rows = metric_rows(state["log_history"])
    best = best_step(checkpoints, rows, *BEST[result.stage], config.gate.kl_limit)
    chosen = checkpoints[best]
    retreat = _retreat(config, base, inputs, folder, checkpoints, rows, progress) if result.stage == "dpo" else None
    if retreat is not None:
        result.retreat, row = retreat
        best, chosen = row["step"], folder.path / RETREAT
        rows = [other for other in rows if other["step"] < best or "loss" in other] + [row]
    encoded = folder.last_event("encoded") or {}
    result.step, result.steps = state["global_step"], state["max_steps"]
    result.shortened, result.refused = encoded["shortened"], encoded["refused"]
    result.step_zero = step_zero(folder)
    result.metrics = {key: value for row in rows if row["step"] <= best for key, value in row.items()}
    result.best_of = len({row["step"] for row in rows if "eval_loss" in row}) or 1
    until = [row for row in rows if row["step"] <= best]
    result.gates = check_gates(result.stage, until, config, encoded["held_out"], result.best_of)
    result.verdict = worst(gate.verdict for gate in result.gates.values())
    result.reasons = [describe(name, result.gates[name]) for name in open_gates(result.gates)]
    if result.stage == "dpo" and not has_moved(result.gates):
        result.verdict = worst([result.verdict, "not shown"])
        result.reasons.insert(0, why_unmoved(result.gates, config.train, result.steps, config.gate.kl_limit))
    kl = result.gates.get("kl_nats_per_token")
    if kl is not None and not kl.ok:
        result.reasons.append("no checkpoint is within the KL limit: this is the one of least KL; keep the SFT adapter")
    result.ended = folder.guard_state().ended
    result.best_checkpoint = checkpoints[best].name
    result.policy_sha256 = sha256(weights_file(chosen))
    result.reference_sha256 = model_hashes(identity)["reference_sha256"]
    publish(chosen, output, config.model.base, base)
    if result.stage == "dpo" and config.train.merge and not config.train.full:
        result.merged = _merge(config, base, output, inputs)
    files.write_json(folder.report, result)
    return result


def _retreat(
    config: Config,
    base: Path,
    inputs: Inputs,
    folder: RunFolder,
    checkpoints: dict[int, Path],
    rows: list[dict[str, Any]],
    progress: Progress,
) -> tuple[Retreat, dict[str, Any]] | None:
    """The checkpoint of the best margin, scaled back to the KL limit, and its evaluation; None where it is within."""
    if not config.gate.retreat or config.train.full or config.train.load_in_4bit:
        return None
    furthest = best_step(checkpoints, rows, *BEST["dpo"], math.inf)
    kl = next((row[KL] for row in reversed(rows) if row["step"] == furthest and row.get(KL) is not None), 0.0)
    if not kl > config.gate.kl_limit:
        return None
    from dpo_cli.training import trainer
    from dpo_cli.training.retreat import retreat

    with trainer.redirect_logs(progress):
        encoder = trainer.load_encoder(base, config.model, config.train.max_length)
        held_out = encoder.encode(list(map(exchange, inputs.held_out))).rows
        start = Path(config.model.adapter) if config.model.adapter else None
        output = folder.path / RETREAT
        found, metrics = retreat(config, base, start, checkpoints[furthest], kl, output, encoder, held_out, progress)
    return found, {"step": furthest, **metrics}


def step_zero(folder: RunFolder) -> StepZero | None:
    """What the check before the first update found; None: it has not come to that."""
    found = folder.last_event("step_zero")
    return (
        msgspec.convert({key: math.nan if one is None else one for key, one in found.items()}, StepZero)
        if found
        else None
    )


def _merge(config: Config, base: Path, adapter: Path, inputs: Inputs) -> Merged:
    """Fold the adapter into the base beside it, checked on a few of the rows."""
    from dpo_cli.training.merge_adapter import merge

    return merge(base, adapter, merged_folder(adapter), texts(inputs), config.model)


def texts(inputs: Inputs) -> list[str]:
    """A few rows, to compare models on."""
    return [row.prompt[-1]["content"] + "\n" + row.completions[0][0]["content"] for row in inputs.rows[:4]]


def finished_before(result: Trained, folder: RunFolder, output: Path, base: str) -> Trained:
    """The result of a run that has nothing left to do; its adapter is put back if it is gone."""
    result.finished_before, result.adapter = True, str(output)
    if not output.exists():
        checkpoint = folder.path / RETREAT if result.retreat else folder.checkpoints / str(result.best_checkpoint)
        if not checkpoint.exists():
            raise UserError(
                "this run is finished, but its adapter and its checkpoints are gone",
                where=str(folder.path),
                hint="--fresh trains again",
                code=Exit.FAILED,
            )
        publish(checkpoint, output, base)
    return result
