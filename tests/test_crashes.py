"""Crash at every write: the same command again ends in the same rows, and nothing is paid but what was in flight.

A sample of the points by default; all of them with NOTHING_DPO_ALL_CRASHES=1 (some minutes).
"""

import errno
import fcntl
import json
import os
from pathlib import Path

import pytest
from batch_server import BatchServer
from crashes import Disk, Scenario, points
from judging import judgments, rows, write
from openai_server import Call, Server

from dpo_cli.config import resolve
from dpo_cli.config.settings import Config
from dpo_cli.data.jsonl import read_latest, write_rows
from dpo_cli.data.records import Completions, Preference
from dpo_cli.endpoint import batch
from dpo_cli.jobs import registry
from dpo_cli.jobs.spec import Spec
from dpo_cli.progress import Silent
from dpo_cli.stages import generate, judge
from dpo_cli.stages.evaluate import run as evaluate
from dpo_cli.stages.pair import run as pair
from dpo_cli.stages.push import run as push

ALL = bool(os.environ.get("NOTHING_DPO_ALL_CRASHES"))
SHARE, SEED = 0.04, 13  # of the points, beyond the first of each kind
CONCURRENCY = 2
PROMPTS = [f"[MABEL] Where is umbrella number {number}?" for number in range(4)]


@pytest.fixture(autouse=True)
def no_waits(monkeypatch):
    monkeypatch.setattr(batch, "FIRST_POLL_SECONDS", 0.001)
    monkeypatch.setattr(batch, "MAX_POLL_SECONDS", 0.002)
    monkeypatch.setattr(batch, "SETTLE_SECONDS", 0.001)


@pytest.fixture(scope="module")
def server():
    def twins(call: Call) -> str | None:
        """The writer says the same twice to one prompt."""
        return "same" if call.body["model"] == "writer" and PROMPTS[1] in call.text else None

    with BatchServer(fault=twins) as server:
        yield server


def settings(folder: Path, server: Server | None = None, **more) -> Config:
    flags = {
        "data": str(folder / "dpo"),
        "runs": str(folder / "runs"),
        "generate.prompts": str(folder / "prompts.jsonl"),
    }
    if server is not None:
        flags |= {
            "generate.url": server.url,
            "judge.url": server.url,
            "judge.model": "judge-small",
            "model.name": "writer",
        }
    flags |= {"generate.n": 2, "generate.concurrency": CONCURRENCY, "judge.concurrency": CONCURRENCY}
    flags |= {key.replace("__", "."): value for key, value in more.items()}
    return resolve.resolve(flags, environment={}).config


def forgetting(server):
    def forget() -> None:
        for counted in (server.calls, server.paid, server.bodies, server.files, server.batches):
            counted.clear()

    return forget


def generating(server):
    def result(folder):
        found = read_latest(folder / "dpo" / "completions.jsonl", Completions)
        return {key: (row.completions, row.finish_reasons) for key, row in found.items()}

    return Scenario(
        "generate",
        prepare=lambda folder: write_rows(folder / "prompts.jsonl", [{"prompt": text} for text in PROMPTS]),
        command=lambda folder: generate.run(settings(folder, server), Silent()),
        result=result,
        forget=forgetting(server),
        paid_twice=lambda: server.paid_twice,
        in_flight=CONCURRENCY,
    )


def judging(server, in_batches):
    return Scenario(
        "judge --batch" if in_batches else "judge",
        prepare=lambda folder: write(folder / "dpo", [*rows(3), rows(1)[0].__class__(
            id="alike", prompt=[{"role": "user", "content": "?"}], completions=["a", "a"],
            finish_reasons=["stop"] * 2, model="", sampling={},
        )]),
        command=lambda folder: judge.run(settings(folder, server, judge__batch=in_batches), Silent()),
        result=lambda folder: {
            key: (row.scores, row.ranking, row.skipped, row.error) for key, row in judgments(folder / "dpo").items()
        },
        forget=forgetting(server),
        paid_twice=lambda: server.paid_twice,
        in_flight=CONCURRENCY,
    )  # fmt: skip


def pairing(server):
    """Pairs of four prompts take the place of those of three, which were held out otherwise."""

    def prepare(folder):
        write(folder / "dpo", rows(6))
        judge.run(settings(folder, server), Silent())
        pair.run(settings(folder, pair__seed=1, pair__val_share=0.5))
        prepared[folder] = sides(folder)

    def sides(folder):
        files = {side: folder / "dpo" / f"{side}.jsonl" for side in ("train", "val")}
        return {side: sorted(read_latest(file, Preference)) if file.exists() else None for side, file in files.items()}

    def look(folder):
        found = sides(folder)
        assert found in (prepared[folder], scenario.expected) or found["train"] is None, "old and new pairs together"

    prepared: dict[Path, dict] = {}
    scenario = Scenario(
        "pair",
        prepare=prepare,
        command=lambda folder: pair.run(settings(folder, pair__seed=2, pair__val_share=0.5)),
        result=sides,
        look=look,
        forget=forgetting(server),
    )
    return scenario


def evaluating(server):
    def config(folder):
        return settings(
            folder, server, model__adapter=None, model__dpo_adapter="not/here", model__dpo_name="dpo",
            evaluate__prompts=str(folder / "prompts.jsonl"), evaluate__kl_prompts=0, generate__max_tokens=40,
        )  # fmt: skip

    def result(folder):
        found = json.loads((folder / "dpo" / "evaluation.json").read_text())
        found.pop("path"), found.pop("receipt")  # the folder's own, and what this run has paid
        return found, sorted((folder / "dpo" / "evaluation.jsonl").read_text().splitlines())

    return Scenario(
        "evaluate",
        prepare=lambda folder: write_rows(folder / "prompts.jsonl", [{"prompt": text} for text in PROMPTS[2:]]),
        command=lambda folder: evaluate.run(config(folder), Silent()),
        result=result,
        forget=forgetting(server),
        paid_twice=lambda: server.paid_twice,
        in_flight=CONCURRENCY,
    )


def pushing(server):
    def prepare(folder):
        write(folder / "dpo", rows(3))
        judge.run(settings(folder, server, judge__concurrency=1), Silent())  # in one order, since files are compared
        pair.run(settings(folder))

    return Scenario(
        "push",
        prepare=prepare,
        command=lambda folder: push.run(settings(folder), Silent(), "data", str(folder / "there")),
        result=lambda folder: {file.name: file.read_bytes() for file in (folder / "there").glob("[!.]*")},
        forget=forgetting(server),
    )


def job_records(server):
    def command(folder):
        config = settings(folder)
        with registry.claimed("one", config):
            job = registry.find("one", config) or registry.Job(
                id="one", backend="local", spec=Spec(command="train", name="one", config={})
            )
            job.handle["pid"] = "1"
            registry.save(job, config)
        job.cancelled = True
        registry.save(job, config)

    def result(folder):
        jobs, unreadable = registry.all_jobs(settings(folder))
        return [(job.id, job.cancelled) for job in jobs], unreadable

    return Scenario("jobs", prepare=lambda folder: None, command=command, result=result)


SCENARIOS = {
    "generate": generating,
    "judge": lambda server: judging(server, in_batches=False),
    "batch": lambda server: judging(server, in_batches=True),
    "pair": pairing,
    "evaluate": evaluating,
    "push": pushing,
    "jobs": job_records,
}


@pytest.mark.parametrize("name", SCENARIOS)
def test_whatever_is_struck_the_same_command_again_mends_it(name, server, tmp_path):
    scenario = SCENARIOS[name](server)
    operations = scenario.operations(tmp_path / "whole")
    struck = 0
    for point, way in points(operations, 1.0 if ALL else SHARE, SEED):
        scenario.strike(tmp_path / f"{point}-{way}", point, way)
        struck += 1
    print(f"{name}: {struck} of {len(operations)} operations × 4 ways struck, {len(scenario.faults)} faults")
    assert not scenario.faults, "\n".join(scenario.faults)
    assert struck > len(operations) or not ALL


def test_a_file_system_without_fsync_and_locks_is_used_and_named(server, tmp_path, monkeypatch, capsys):
    def refuse(code):
        def operate(*_):
            raise OSError(code, os.strerror(code))

        return operate

    monkeypatch.setattr(os, "fsync", refuse(errno.EINVAL))
    monkeypatch.setattr(fcntl, "flock", refuse(errno.ENOLCK))
    scenario = generating(server)
    with Disk(tmp_path):
        scenario.operations(tmp_path / "whole")
    assert len(scenario.expected) == len(PROMPTS)
    said = capsys.readouterr().err
    assert said.count("no fsync there") == 1 and said.count("no locks there") == 1
