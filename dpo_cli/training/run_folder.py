"""The folder of one training run: what was asked for, what happened, where to go on, what came out.

`runs/<name>/` holds config.json (settings, versions, hashes of the inputs), metrics.jsonl, events.jsonl,
checkpoints/ and report.json. A checkpoint counts once its marker, written last, agrees with the files
beside it, so that a run killed while it saves goes on from the one before. Needs no torch. Not covered: file systems
on which a file's content can appear after a later file's.
"""

import json
import os
import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from dpo_cli.data import files, jsonl
from dpo_cli.data.files import read_json
from dpo_cli.data.same_settings import refuse_other_settings
from dpo_cli.errors import UserError
from dpo_cli.progress import Progress
from dpo_cli.training.guards import GuardState

MARKER = "complete.json"
GUARDS = "guards.json"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
MODEL_FILES = ("model.safetensors", "config.json", "generation_config.json")
TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "chat_template.jinja")


class RunFolder:
    """Paths of a run, and what can be read from them; `after_save` is called when a checkpoint is whole."""

    def __init__(self, path: Path, after_save: Callable[[], None] | None = None) -> None:
        self.path = path
        self.after_save = after_save
        self.config = path / "config.json"
        self.metrics = path / "metrics.jsonl"
        self.events = path / "events.jsonl"
        self.report = path / "report.json"
        self.guards = path / GUARDS
        self.checkpoints = path / "checkpoints"

    def begin(self, spec: dict[str, Any]) -> None:
        """Write config.json, or see that an earlier run of this name was asked for the same.

        Raises:
            UserError: it was not; names the keys that differ.
        """
        if self.config.exists():
            refuse_other_settings(
                "this run was started",
                read_json(self.config)["identity"],
                spec["identity"],
                where=str(self.path),
                hint="--name OTHER starts another run, --fresh starts this one over",
            )
        else:
            files.write_json(self.config, spec)

    def submission(self) -> str | None:
        """Which request started the run; None if it is not known."""
        asked: str | None = read_json(self.config).get("submission") if self.config.exists() else None
        return asked

    def clear(self) -> None:
        """Remove what a run has written, and nothing else."""
        for file in (self.report, self.config, self.metrics, self.events, self.guards):
            file.unlink(missing_ok=True)
        shutil.rmtree(self.checkpoints, ignore_errors=True)

    def complete_checkpoints(self) -> dict[int, Path]:
        """Step -> folder of every checkpoint that can be resumed from, oldest first."""
        folders = {int(folder.name.rpartition("-")[2]): folder for folder in self.checkpoints.glob("checkpoint-*")}
        return {step: folders[step] for step in sorted(folders) if _is_complete(folders[step])}

    def drop_incomplete(self) -> list[str]:
        """Remove checkpoints that a kill cut short; their names."""
        complete = set(self.complete_checkpoints().values())
        torn = [folder for folder in self.checkpoints.glob("checkpoint-*") if folder not in complete]
        for folder in torn:
            shutil.rmtree(folder)
        return sorted(folder.name for folder in torn)

    def guard_state(self) -> GuardState:
        """What the guards had changed where the run goes on: at its newest checkpoint, or since."""
        checkpoints = self.complete_checkpoints()
        newest = max(checkpoints, default=0)
        since = read_json(self.guards) if self.guards.exists() else {}
        if since.get("step") == newest:
            return msgspec.convert(since["state"], GuardState)
        return msgspec.convert(read_json(checkpoints[newest] / GUARDS), GuardState) if checkpoints else GuardState()

    def save_guard_state(self, step: int, state: GuardState) -> None:
        """Note what the guards have changed since the checkpoint of a step was saved."""
        files.write_json(self.guards, {"step": step, "state": state})

    def drop_after(self, step: int) -> None:
        """Remove the checkpoints after a step."""
        for later, folder in self.complete_checkpoints().items():
            if later > step:
                shutil.rmtree(folder)

    def last_event(self, name: str) -> dict[str, Any] | None:
        """Details of the last event of a name."""
        if not self.events.exists():
            return None
        rows = [row for _, row in jsonl.read_rows(self.events, dict[str, Any]) if row["event"] == name]
        return {key: value for key, value in rows[-1].items() if key not in ("event", "step", "time")} if rows else None

    def trainer_state(self) -> dict[str, Any]:
        """The trainer's state in the newest complete checkpoint; empty without one."""
        checkpoint = next(reversed(self.complete_checkpoints().values()), None)
        # Python's own parser, since the trainer writes NaN as NaN.
        return json.loads((checkpoint / "trainer_state.json").read_text()) if checkpoint else {}


class RunContext(NamedTuple):
    """A run in progress: its folder, where it records what happens, and who is told where it stands.

    `pause_at` is the step at which it rests, with a checkpoint; None: it goes on to its end.
    """

    folder: RunFolder
    events: jsonl.Journal
    progress: Progress
    pause_at: int | None = None

    def record(self, name: str, step: int, **details: Any) -> None:
        """Add a line to events.jsonl."""
        self.events.append(event(name, step, **details))


def mark_complete(checkpoint: Path) -> None:
    """Mark a checkpoint as complete, once all of it is on the disk."""
    sizes = {}
    for file in sorted(checkpoint.iterdir()):
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
        sizes[file.name] = file.stat().st_size
    files.write_json(checkpoint / MARKER, sizes)


def event(name: str, step: int, **details: Any) -> dict[str, Any]:
    """One line of events.jsonl."""
    return {"event": name, "step": step, "time": datetime.now(UTC).isoformat(timespec="seconds"), **details}


def metric_rows(log_history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl: a trainer's log without its closing summary."""
    return [row for row in log_history if "loss" in row or "eval_loss" in row]


def publish(checkpoint: Path, folder: Path, base: str, tokenizer: Path | None = None) -> None:
    """Put a checkpoint's adapter, or its whole model, alone into `folder`: all of it or nothing.

    Args:
        checkpoint: where it is.
        folder: replaced if it holds an adapter or a model.
        base: folder or Hub id of the base model, for adapter_config.json.
        tokenizer: folder whose tokenizer goes with a whole model.

    Raises:
        UserError: `folder` holds something else.
    """
    check_replaceable(folder)
    with files.replacing_folder(folder) as staged:
        _stage(checkpoint, staged, base, tokenizer)


def _stage(checkpoint: Path, staged: Path, base: str, tokenizer: Path | None) -> None:
    """Copy what is published of a checkpoint."""
    if (checkpoint / ADAPTER_FILES[0]).exists():
        for name in ADAPTER_FILES:
            shutil.copyfile(checkpoint / name, staged / name)
        settings = read_json(staged / ADAPTER_FILES[0])
        files.write_json(staged / ADAPTER_FILES[0], settings | {"base_model_name_or_path": base})
    else:
        sources = [checkpoint / name for name in MODEL_FILES]
        sources += [file for pattern in TOKENIZER_FILES for file in (tokenizer.glob(pattern) if tokenizer else ())]
        for source in filter(Path.exists, sources):
            shutil.copyfile(source, staged / source.name)


def weights_file(folder: Path) -> Path:
    """The file that holds an adapter's weights, or those of a whole model."""
    adapter = folder / ADAPTER_FILES[1]
    return adapter if adapter.exists() else folder / MODEL_FILES[0]


def check_replaceable(folder: Path) -> None:
    """Refuse to write an adapter or a model over anything but an adapter or a model.

    Raises:
        UserError: the folder holds something else.
    """
    ours = any((folder / name).exists() for name in (ADAPTER_FILES[0], MODEL_FILES[0]))
    if folder.exists() and not ours and (folder.is_file() or any(folder.iterdir())):
        raise UserError("holds something that is no adapter; it would be overwritten", where=str(folder))


def _is_complete(checkpoint: Path) -> bool:
    try:
        sizes = msgspec.json.decode((checkpoint / MARKER).read_bytes(), type=dict[str, int])
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, msgspec.MsgspecError):
        return False


def merged_folder(adapter: Path) -> Path:
    """Where an adapter's merged model goes: beside it."""
    return adapter.with_name(f"{adapter.name}-merged")
