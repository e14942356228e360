"""Data, an adapter, or a run with its adapter -> a Modal volume, Cloud Storage, the Hub or a folder.

Reads what `train`, `judge` and `evaluate` wrote, and `[model]` for where; writes nothing here but, with `merge`, the
merged model beside the adapter. What is sent is named below, file by file, so that no optimizer state, no reference
adapter and no stray file goes with it; a card of the run's own numbers does. Not covered: taking files away from there.
"""

import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import msgspec
from msgspec import Struct

from dpo_cli.adapter import Adapter, is_model, read_adapter
from dpo_cli.analysis.data_stats import pair_stats
from dpo_cli.config.settings import Config
from dpo_cli.data.columns import Cells
from dpo_cli.data.files import read_json, sha256
from dpo_cli.data.formats.preferences import read_ours, read_pair
from dpo_cli.data.jsonl import read_rows
from dpo_cli.data.reader import parse_rows
from dpo_cli.data.records import Judgment, Preference, text_of
from dpo_cli.errors import Exit, UserError, require
from dpo_cli.models.base_model import fingerprint
from dpo_cli.progress import Progress
from dpo_cli.safe_text import check_run_name
from dpo_cli.stages.push import card, secrets
from dpo_cli.stages.push.card import Facts
from dpo_cli.storage import PutResult, Source, Stored, sync
from dpo_cli.training.fold import folded
from dpo_cli.training.run_folder import ADAPTER_FILES, MODEL_FILES, TOKENIZER_FILES, merged_folder, weights_file
from dpo_cli.training.run_history import Merged, Trained, read_report

What = Literal["data", "adapter", "run"]

DATA = ("train.jsonl", "val.jsonl", "completions.jsonl", "judgments.jsonl", "evaluation.jsonl", "evaluation.json")
RUN = ("config.json", "metrics.jsonl", "events.jsonl", "report.json")
MODEL = (*ADAPTER_FILES, *MODEL_FILES, "model-*.safetensors", "model.safetensors.index.json", *TOKENIZER_FILES)
CARD = "README.md"
CHECK_TEXTS = 4  # pairs on which a merged model is held against its adapter


class Pushed(Struct, kw_only=True):
    """What was sent; `merged` is how the merged model compares with the adapter; `notes` are for the user."""

    what: What
    result: PutResult
    verdict: str | None = None
    merged: Merged | None = None
    notes: list[str] = msgspec.field(default_factory=list)


def run(
    config: Config,
    progress: Progress,
    what: What,
    dest: str,
    *,
    name: str | None = None,
    merge: bool = False,
    force: bool = False,
    dry_run: bool = False,
) -> Pushed:
    """Send data, the DPO adapter, or a run.

    Args:
        config: names the folders of data, adapter and runs.
        progress: told of megabytes.
        what: which of them.
        dest: `modal://volume/path`, `gs://bucket/path`, `hf://owner/name` (of `data`: a dataset's), or a folder.
        name: the run; unset: of an adapter, the one whose report has its hash; of a run, `dpo`.
        merge: send the adapter folded into its base.
        force: send an adapter that did not pass its gates.
        dry_run: say what would be sent.

    Raises:
        UserError: an adapter that did not pass its gates, or that no run made (exit code 3); a secret in what would be
            sent; or what the storage raises.
    """
    if not dest.strip() or dest.strip() != dest:
        hint = "modal://volume/path, gs://bucket/path, hf://owner/name, or a folder"
        raise UserError(f"'{dest}' is no place to send to", hint=hint)
    if name is not None:
        check_run_name(name)
    config = folded(config) if what != "data" else config
    if merge and what != "adapter":
        raise UserError("--merge is for an adapter", hint=f"nothing-dpo push adapter {dest} --merge")
    _check_card(dest)
    known: dict[str, Stored] = {}
    if what == "data":
        (files, known), pushed = _data(config, dest), Pushed(what=what, result=_nothing(dest))
        dest = re.sub("^hf://(?!datasets/)", "hf://datasets/", dest)
    else:
        files, pushed = _trained(config, what, dest, name, merge, force, dry_run)
    if found := secrets.find(files):
        raise UserError(
            f"holds {found[0].what}" + (f", and there are {len(found) - 1} more like it" if found[1:] else ""),
            where=found[0].where,
            hint="take it out of the file; what was ever sent elsewhere, revoke",
        )
    pushed.result = sync.put(files, dest, progress, dry_run=dry_run, known=known)
    return pushed


def _nothing(dest: str) -> PutResult:
    return PutResult(dest=dest, sent={}, skipped={}, bytes=0)


def _data(config: Config, dest: str) -> tuple[dict[str, Source], dict[str, Stored]]:
    """The files of a data set with their card, and the hashes that the card names."""
    folder = Path(config.data)
    files: dict[str, Source] = {name: folder / name for name in DATA if (folder / name).is_file()}
    if not files:
        raise UserError("no data to push", where=str(folder), hint="nothing-dpo judge")
    sides = {name: folder / f"{name}.jsonl" for name in ("train", "val") if f"{name}.jsonl" in files}
    numbers = pair_stats({name: _pairs(file) for name, file in sides.items()})
    known = {name: sync.hashed(source) for name, source in files.items()}
    hashes = {name: str(one.checksum).removeprefix("sha256:") for name, one in known.items()}
    text = card.of_data(_last(dest), numbers, _judge(folder), hashes)
    return {CARD: text.encode(), **files}, known


def _trained(
    config: Config, what: What, dest: str, name: str | None, merge: bool, force: bool, dry_run: bool
) -> tuple[dict[str, Source], Pushed]:
    """The files of an adapter or a run, once its gates are known."""
    runs = Path(config.runs)
    folder = Path(config.model.dpo_adapter)
    if what == "run":
        name = name or "dpo"
        folder = Path(_read_report(runs / name).adapter)
    weights = weights_file(folder)
    if not weights.is_file():
        raise UserError("no adapter there", where=str(folder), hint="nothing-dpo train, or DPO_ADAPTER_PATH=FOLDER")
    made_by, reason = _find_run(runs, name, sha256(weights))
    if reason and not force:
        raise UserError(reason, where=str(folder), hint="--force pushes it all the same", code=Exit.GATE)
    adapter = None if is_model(folder) else read_adapter(folder, config.model.base, config.model.same_base)
    pushed = Pushed(what=what, result=_nothing(dest), notes=[reason] if reason else [])
    facts = Facts(name=_last(dest), base=config.model.base, adapter=adapter, served_as=config.model.dpo_name)
    if made_by is not None:
        report = _read_report(made_by)
        facts.report, facts.config = report, _read_config(made_by)
        facts.judge = _judge_of_run(Path(config.data), facts.config)
        facts.evaluation = _evaluation(Path(config.data), folder)
        pushed.verdict = report.verdict
    if merge:
        folder = _merge(config, folder, pushed, dry_run)
        facts.is_merged, facts.merged = True, pushed.merged
    files: dict[str, Source] = {
        file.name: file for pattern in MODEL for file in sorted(folder.glob(pattern)) if file.is_file()
    }
    if what == "run" and made_by is not None:
        files = {f"adapter/{key}": file for key, file in files.items()}
        files |= {key: made_by / key for key in RUN if (made_by / key).is_file()}
    pushed.notes += _local_base(adapter, merge)
    return {CARD: card.of_model(facts).encode(), **files}, pushed


def _find_run(runs: Path, name: str | None, weights: str) -> tuple[Path | None, str | None]:
    """The run that made weights of a hash, and the reason why they should not be pushed."""
    named = [runs / name] if name else sorted(report.parent for report in runs.glob("*/report.json"))
    reports = {folder: _read_report(folder) for folder in named}
    made_by = next((folder for folder, report in reports.items() if report.policy_sha256 == weights), None)
    if made_by is None:
        return None, f"no report of {f'the run {name}' if name else f'a run in {runs}'} has the hash of these weights"
    report = reports[made_by]
    if report.verdict != "pass":
        return made_by, f"run {made_by.name} did not pass its gates: {'; '.join(report.reasons) or 'no verdict'}"
    return made_by, None


def _read_report(folder: Path) -> Trained:
    file = folder / "report.json"
    if not file.is_file():
        raise UserError(
            "no report: the run is not finished, or there is none",
            where=str(folder),
            hint=f"nothing-dpo train --name {folder.name}",
        )
    return read_report(file)


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    return read_json(file) if file.is_file() else {}


def _merge(config: Config, folder: Path, pushed: Pushed, dry_run: bool) -> Path:
    """The folder of the merged model, made anew and checked; of a dry run, what an earlier one left."""
    output = merged_folder(folder)
    if dry_run:
        if not output.is_dir():
            pushed.notes.append(f"the merged model is not made yet, so its files are not listed: {output}")
        return output
    require("train", "--merge")
    from dpo_cli.training.inputs import download_base
    from dpo_cli.training.merge_adapter import merge

    file = next((path for side in ("val", "train") if (path := Path(config.data) / f"{side}.jsonl").is_file()), None)
    if file is None:
        raise UserError("no pairs to check the merged model on", where=config.data, hint="--data FOLDER")
    pairs = islice(_pairs(file), CHECK_TEXTS)
    texts = [f"{pair.prompt[-1]['content']}\n{text_of(pair.chosen)}" for pair in pairs]
    pushed.merged = merge(download_base(config.model.base), folder, output, texts, config.model)
    return output


def _pairs(file: Path) -> Iterator[Preference]:
    return (pair for _, pair in parse_rows(file, lambda row: read_ours(row) or read_pair(Cells(row))[1]))


def _judge(data: Path) -> dict[str, Any]:
    """Who judged what lies in a folder; empty if nobody did."""
    file = data / "judgments.jsonl"
    rows = read_rows(file, Judgment) if file.is_file() else ()
    return next((row.judge for _, row in rows if row.judge), {})


def _judge_of_run(data: Path, run_config: dict[str, Any]) -> dict[str, Any]:
    """Who judged the pairs that a run trained on, if they are still those in the folder."""
    trained_on = run_config["identity"]["data"]["sha256"].get("train.jsonl")
    file = data / "train.jsonl"
    return _judge(data) if file.is_file() and sha256(file) == trained_on else {}


def _evaluation(data: Path, adapter: Path) -> dict[str, Any]:
    """The result of `evaluate`, if it is this adapter's."""
    file = data / "evaluation.json"
    found = read_json(file) if file.is_file() else {}
    policy = found.get("sides", {}).get("policy", {}).get("adapter")
    return found if policy and fingerprint(adapter).startswith(policy) else {}


def _local_base(adapter: Adapter | None, merge: bool) -> list[str]:
    if adapter is None or merge or adapter.base is None or card.is_hub_id(adapter.base):
        return []
    return [f"adapter_config.json names the base by a path of this machine: {adapter.base}"]


def _check_card(dest: str) -> None:
    """Refuse to write the card over somebody's README."""
    file = Path(dest).expanduser() / CARD
    if "://" not in dest and file.is_file() and card.TAG not in file.read_text("utf-8", "replace"):
        raise UserError("would be overwritten", where=str(file), hint="push to a folder of its own")


def _last(dest: str) -> str:
    return dest.rstrip("/").rpartition("/")[2]
