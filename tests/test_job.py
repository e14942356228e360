"""Specs, jobs and the lines that carry progress: what every backend builds on."""

import io
import json
from pathlib import Path

import msgspec
import pytest

from dpo_cli.config.resolve import resolve
from dpo_cli.errors import UserError
from dpo_cli.jobs import progress_lines, registry
from dpo_cli.jobs import spec as jobs_spec
from dpo_cli.jobs.progress_lines import Outcome, Relay
from dpo_cli.jobs.registry import Job
from dpo_cli.progress import Silent


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A working folder with data and an SFT adapter; and the settings."""
    monkeypatch.chdir(tmp_path)
    for name in ("data/dpo/train.jsonl", "data/dpo/val.jsonl", "data/val.jsonl", "adapters/nothing-gpt/a.json"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(name)
    Path("data/dpo/completions.jsonl").write_text('{"id": "1"}\n')
    return resolve(environment={}).config


def test_inputs_go_to_paths_made_from_their_content_and_results_to_their_own_under_the_volume(work):
    spec = jobs_spec.make(work, "train")
    there = {upload.there: upload.here for upload in spec.uploads}
    assert spec.config["data"].startswith("/vol/uploads/") and spec.config["data"].endswith("/dpo")
    assert {f"{spec.config['data']}/train.jsonl", f"{spec.config['model']['adapter']}/a.json"} < there.keys()
    assert not any("completions" in path for path in there)
    assert spec.config["model"]["base"] == "meta-llama/Llama-3.2-3B-Instruct"
    assert spec.results == {"/vol/runs/dpo": "runs/dpo", "/vol/adapters/nothing-gpt-dpo": "adapters/nothing-gpt-dpo"}
    before = spec.config["data"], spec.hash
    Path("data/dpo/train.jsonl").write_text("other")
    after = jobs_spec.make(work, "train")
    assert after.config["data"] != before[0] and after.hash != before[1]
    assert after.config["model"]["adapter"] == spec.config["model"]["adapter"]


def test_what_is_not_here_is_expected_there_under_its_own_path(work):
    work.model.adapter, work.data = "adapters/other", "/vol/data/dpo"
    spec = jobs_spec.make(work, "train")
    assert (spec.config["model"]["adapter"], spec.config["data"]) == ("/vol/adapters/other", "/vol/data/dpo")
    assert spec.uploads == []


def test_paths_outside_the_working_folder_stay_within_the_volume(work):
    work.runs, work.model.dpo_adapter = "/somewhere/else/runs", "../sibling/out"
    spec = jobs_spec.make(work, "train")
    assert spec.results == {"/vol/runs/dpo": "/somewhere/else/runs/dpo", "/vol/out": "../sibling/out"}


def test_the_sft_stage_writes_where_dpo_reads(work):
    spec = jobs_spec.make(work, "train", stage="sft", data=Path("data/val.jsonl"))
    assert spec.name == "sft" and spec.results["/vol/adapters/nothing-gpt"] == "adapters/nothing-gpt"
    assert spec.data and spec.data.endswith("/val.jsonl") and len(spec.uploads) == 1


def test_generate_and_judge_go_on_with_the_rows_that_are_here(work):
    generate = jobs_spec.make(work, "generate")
    assert list(generate.seeds.values()) == ["/vol/data/dpo/completions.jsonl"]
    assert generate.seeds.keys() < {upload.there for upload in generate.uploads}
    Path("data/dpo/judgments.jsonl").write_text('{"id": "1"}\n')
    judge = jobs_spec.make(work, "judge")
    assert judge.config["data"].startswith("/vol/uploads/")
    assert list(judge.seeds.values()) == [f"{judge.config['data']}/judgments.jsonl"]
    assert judge.results[f"{judge.config['data']}/judgments.jsonl"] == "data/dpo/judgments.jsonl"


def test_the_id_depends_on_backend_command_and_name_alone_and_is_a_kubernetes_name(work):
    spec = jobs_spec.make(work, "train", name="beta 0.2/".strip("/"))
    assert jobs_spec.identity("gke", spec) == jobs_spec.identity("gke", spec) != jobs_spec.identity("modal", spec)
    names = ["dpo", "Beta_0.2", "Beta 0.2", "x" * 200, "x" * 201, "日本"]
    ids = [jobs_spec.identity("gke", jobs_spec.make(work, "train", name=name)) for name in names]
    assert len(set(ids)) == len(names) and ids[0] == "gke-train-dpo"
    for one in ids:
        assert len(one) <= 50 and all(part.isalnum() and part.isascii() for part in one.split("-")), one
        assert one == one.lower()


def test_a_fresh_start_is_the_same_work_and_each_asks_anew(work):
    one, other, plain = (jobs_spec.make(work, "train", fresh=fresh) for fresh in (True, True, False))
    assert one.hash == other.hash == plain.hash and one.fresh != other.fresh and plain.fresh is None


def test_another_spec_under_a_running_id_is_refused_by_key(work):
    running = jobs_spec.make(work, "train")
    registry.refuse_another(running, jobs_spec.make(work, "train"), "id")
    work.train.beta = 0.2
    with pytest.raises(UserError, match=r"config\.train\.beta was 0\.1, now 0\.2") as refused:
        registry.refuse_another(running, jobs_spec.make(work, "train"), "id")
    assert "jobs cancel id" in refused.value.hint
    with pytest.raises(UserError, match="can't be started over"):
        registry.refuse_another(running, msgspec.structs.replace(running, fresh="x"), "id")


def test_jobs_are_found_by_the_beginning_of_their_id(work):
    spec = jobs_spec.make(work, "train")
    for name in ("modal-train-dpo", "modal-train-sft"):
        registry.save(Job(id=name, backend="modal", spec=spec, handle={"call": "fc-1"}), work)
    assert registry.get("modal-train-d", work).handle == {"call": "fc-1"}
    assert registry.get("modal-train-dpo", work).spec.hash == spec.hash
    for name, word in (("modal", "beginning of several"), ("gke", "no job 'gke'")):
        with pytest.raises(UserError, match=word):
            registry.get(name, work)
    (registry.folder(work) / "modal-train-dpo.json").write_text("{")
    with pytest.raises(UserError, match=r"modal-train-dpo\.json"):
        registry.get("modal-train-dpo", work)


def test_two_shells_do_not_submit_the_same_job_at_once(work):
    with registry.claimed("id", work), pytest.raises(UserError, match="is submitting it"), registry.claimed("id", work):
        pass
    with registry.claimed("id", work):
        pass


class Recorder(Silent):
    def __init__(self):
        self.calls = []

    def begin(self, *arguments):
        self.calls.append(("begin", *arguments))

    def update(self, done, **counters):
        self.calls.append(("update", done, counters))

    def log(self, text):
        self.calls.append(("log", text))

    def end(self):
        self.calls.append(("end",))


def test_progress_arrives_as_it_was_reported(monkeypatch):
    stream, now, shown = io.StringIO(), [0.0], Recorder()
    told = Relay(stream, clock=lambda: now[0])
    told.begin("train", 8, 3)
    for done in (4, 5, 6):
        told.update(done, loss=0.5)
    told.log("line 1\nline 2 \u2028 \x1b[31m")
    now[0] += 10
    told.update(7, loss=float("nan"))
    told.end()
    told.outcome(Outcome(exit_code=3, result={"verdict": "fail"}))
    lines = stream.getvalue().splitlines(keepends=True)
    assert all(line.startswith(progress_lines.PREFIX) and line.isascii() for line in lines)
    outcomes = [progress_lines.replay("2026-11-25T00:00:00Z " + line, shown) for line in lines]
    assert outcomes[-1].exit_code == 3 and not any(outcomes[:-1])
    assert shown.calls[0] == ("begin", "train", 8, 3)
    assert [call[1] for call in shown.calls if call[0] == "update"] == [4, 6, 7], "held back, but the last is said"
    assert ("log", "line 1\nline 2 \u2028 \x1b[31m") in shown.calls and shown.calls[-1] == ("end",)


def test_other_output_is_kept_and_torn_lines_do_no_harm():
    shown = Recorder()
    torn = (progress_lines.PREFIX + json.dumps({"log": "whole"}))[:-4]
    for line in ("Downloading shards", "", torn, progress_lines.PREFIX + '{"begin": "no"}'):
        assert progress_lines.replay(line, shown) is None
    assert shown.calls == [("log", "Downloading shards")]
