"""`nothing-dpo run`: rounds that start from one another, gates between them, kill -9 anywhere, and what is served."""

import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from adapters import base_model, save_adapter
from aiohttp import web
from openai_server import Server
from training import read_rows, write_rows

from dpo_cli import html
from dpo_cli.config import resolve
from dpo_cli.data.files import sha256
from dpo_cli.errors import Exit, UserError
from dpo_cli.progress import Silent
from dpo_cli.workflows import rounds

SETTINGS = {
    "model.base": "base", "model.adapter": "sft", "model.dpo_adapter": "dpo", "model.name": "writer",
    "model.dpo_name": "writer-dpo", "generate.prompts": "data", "generate.n": 3, "generate.max_tokens": 24,
    "generate.concurrency": 1, "judge.model": "judge", "judge.concurrency": 1, "judge.orders": 1, "pair.min_gap": 0.1,
    "pair.val_share": 0.0, "train.learning_rate": 1e-2, "train.num_train_epochs": 4.0,
    "train.per_device_train_batch_size": 4, "train.gradient_accumulation_steps": 1, "train.warmup_steps": 0,
    "train.logging_steps": 2, "train.eval_steps": 100, "train.save_steps": 5, "train.kl_prompts": 2,
    "train.kl_tokens": 8, "gate.kl_limit": 1e9, "evaluate.prompts": "heldout.jsonl", "evaluate.rate": False,
    "run.rounds": 2,
}  # fmt: skip
WEIGHTS = "adapter_model.safetensors"


class Vllm(Server):
    """The server, which says where each adapter is from, and loads more if it may."""

    def __init__(self, loads: bool = True) -> None:
        super().__init__(models=["writer", "judge"], quality=lambda text: 1 + len(text) % 9)
        self.loads = loads
        self.roots: dict[str, str] = {}
        self.loaded: list[str] = []

    def routes(self, app: web.Application) -> None:
        super().routes(app)
        if self.loads:
            app.router.add_post("/v1/load_lora_adapter", self._load)

    async def _models(self, _: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": name, "root": self.roots.get(name)} for name in self.models or []]})

    async def _load(self, request: web.Request) -> web.Response:
        body = await request.json()
        name = body["lora_name"]
        if name in self.roots and not body.get("load_inplace"):
            return web.json_response({"error": {"message": f"'{name}' is loaded already", "code": 400}}, status=400)
        assert (Path(body["lora_path"]) / WEIGHTS).is_file()
        assert self.models is not None
        self.models += [name] * (name not in self.models)
        self.roots[name] = body["lora_path"]
        self.loaded.append(name)
        return web.Response(text="Success")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    base_model(folder / "base")
    return folder


@pytest.fixture
def folder(models, tmp_path, monkeypatch):
    """A working folder with 16 prompts, and as many of others held out."""
    monkeypatch.chdir(tmp_path)
    Path("base").symlink_to(models / "base")
    save_adapter(Path("sft"), Path("base"))
    for file, first in (("data/val.jsonl", 0), ("heldout.jsonl", 100)):
        write_rows(Path(file), [{"prompt": f"[OTIS] Scene {number}."} for number in range(first, first + 16)])
    return tmp_path


def settings(server, **changes):
    flags = SETTINGS | {"generate.url": server.url, "judge.url": server.url}
    flags |= {key.replace("__", "."): value for key, value in changes.items()}
    return resolve.resolve(flags, environment={}).config


# A process that a signal ends while it trains, after so many steps, where that is asked for.
KILLED = """
import os, signal, sys
from dpo_cli import html
from dpo_cli.config import resolve
from dpo_cli.workflows import rounds
from dpo_cli.progress import Silent

class Until(Silent):
    def begin(self, stage, total, done=0):
        self.stage = stage

    def update(self, done, **counters):
        if [self.stage, str(done)] == ["train", sys.argv[2]]:
            os.kill(os.getpid(), signal.SIGKILL)

rounds.run(resolve.resolve(sets=sys.argv[1].splitlines(), environment={}).config, Until())
"""


class Stages(Silent):
    """Keeps which stages began."""

    def __init__(self):
        self.begun = []

    def begin(self, stage, total, done=0):
        self.begun.append(stage)


def of(name):
    """What a round left, but for the clock."""
    return [
        sha256(Path(f"dpo-{name}") / WEIGHTS),
        *(sorted(Path(f"data/dpo/{name}/{file}.jsonl").read_text().splitlines()) for file in ("train", "val")),
        json.loads(Path(f"data/dpo/{name}/evaluation.json").read_text())["win_rate"],
    ]


def test_each_round_starts_from_the_one_before_and_nothing_is_done_twice(folder):
    with Vllm() as server:
        result = rounds.run(settings(server), Silent())
        one, two = result.rounds
        assert result.verdict == "pass" and result.adapter == "dpo"
        assert one.trained.reference_sha256 == sha256(Path("sft") / WEIGHTS)
        assert two.trained.reference_sha256 == one.trained.policy_sha256 == sha256(Path("dpo-round-1") / WEIGHTS)
        assert (Path("dpo") / WEIGHTS).read_bytes() == (Path("dpo-round-2") / WEIGHTS).read_bytes()
        asked = [body["model"] for body in server.bodies if "judge" not in body["model"]]
        assert list(dict.fromkeys(asked)) == ["writer", "writer-dpo-round-1", "writer-dpo-round-2"]
        assert server.loaded == ["writer-dpo-round-1", "writer-dpo-round-2"]
        assert server.roots["writer-dpo-round-1"] == str(Path("dpo-round-1").resolve())
        assert two.evaluation.n == 16 and '"path":"' in result.serve_config
        for name in ("round-1", "round-2"):
            rows = Path(f"data/dpo/{name}/completions.jsonl").read_text().splitlines()
            assert len(rows) == 16 and Path(f"runs/{name}/report.json").is_file()

        calls, again = len(server.bodies), Stages()
        rounds.run(settings(server), again)
        assert again.begun == [] and len(server.bodies) == calls
        assert [step.state for step in rounds.plan(settings(server), Silent())] == ["done"] * 8


def test_a_run_that_is_killed_at_every_stage_ends_where_another_does(folder):
    """kill -9 while it samples, judges, trains, samples for the evaluation and compares; at most that call is lost."""
    with Vllm() as server:
        mine = settings(server, run__rounds=1)
        sets = "\n".join(f"{key}={resolve.get(mine, key)}" for key in [*SETTINGS, "generate.url", "judge.url"])
        kills = [("writer", 5), ("judge", 5), ("train", 7), ("writer-dpo-round-1", 3), ("judge", 4)]
        for model, count in kills:
            step = str(count) if model == "train" else "never"
            process = subprocess.Popen([sys.executable, "-c", KILLED, sets, step])
            server.fault = killing(process, model, count)
            assert process.wait(120) == -9, (model, count)
            assert not Path("dpo").exists()
        server.fault = None
        assert rounds.run(mine, Silent()).verdict == "pass"
        assert server.paid_twice <= len(kills)
        continued = of("round-1")
    for made in ("data/dpo", "runs"):
        Path(made).rename(f"{made}-killed")
    with Vllm() as server:
        rounds.run(settings(server, run__rounds=1), Silent())
    assert of("round-1") == continued


def killing(process, model, count):
    """A fault that kills the process at the n-th call for a model, which is paid."""
    seen = itertools.count(1)

    def fault(call):
        if call.body["model"] != model or next(seen) != count:
            return None
        process.kill()
        return "drop"

    return fault


def test_a_gate_ends_the_rounds_and_publishes_nothing(folder):
    with Vllm() as server:
        result = rounds.run(
            settings(server, pair__val_share=0.3, gate__kl_limit=1e-9, gate__kl_actions=["stop"]), Silent()
        )
    assert result.verdict == "fail" and result.adapter is None and not Path("dpo").exists()
    [only] = result.rounds
    assert "kl_nats_per_token" in only.stopped and only.evaluation is None


def test_a_gate_of_the_evaluation_counts_as_well(folder):
    with Vllm() as server:
        result = rounds.run(settings(server, evaluate__gate="win-rate>0.99"), Silent())
    assert len(result.rounds) == 1 and "win-rate" in result.rounds[0].stopped and not Path("dpo").exists()


def test_a_server_that_has_another_adapter_is_refused(folder):
    with Vllm(loads=False) as server:
        mine = settings(server, run__rounds=1)
        with pytest.raises(UserError, match="'writer-dpo-round-1' is not served") as refused:
            rounds.run(mine, Silent())
        assert "serve-config --runtime-loading" in refused.value.hint
        server.models.append("writer-dpo-round-1")
        server.roots["writer-dpo-round-1"] = "/elsewhere/other"
        with pytest.raises(UserError, match="is /elsewhere/other there"):
            rounds.run(mine, Silent())
        server.roots["writer-dpo-round-1"] = "/mounted/dpo-round-1"
        assert rounds.run(mine, Silent()).verdict == "pass"


def test_failures_stop_the_chain_unless_they_may_be(folder):
    def fault(call):
        return "400!no" if call.text.endswith("Scene 3.") else None

    with Vllm() as server:
        server.fault = fault
        with pytest.raises(UserError, match=r"generate: 1 of 16 prompts failed; the first: .*no") as stopped:
            rounds.run(settings(server, run__rounds=1), Silent())
        assert stopped.value.code == Exit.FAILED and not Path("data/dpo/round-1/train.jsonl").exists()
        assert rounds.run(settings(server, run__rounds=1, run__max_failed=0.1), Silent()).verdict == "pass"


def test_a_budget_is_exit_4_and_goes_on(folder):
    with Vllm() as server:
        price = {"run__rounds": 1, "judge__price": "1000,1000,1000"}
        with pytest.raises(UserError) as stopped:
            rounds.run(settings(server, **price, judge__max_usd=2.5), Silent())
        assert stopped.value.code == Exit.BUDGET
        result = rounds.run(settings(server, **price), Silent())
        assert result.verdict == "pass" and result.usd > 2.5 and server.paid_twice == 0


def test_a_whole_model_is_no_reference(folder):
    with Vllm() as server, pytest.raises(UserError, match="no reference for the next round"):
        rounds.run(settings(server, train__full=True), Silent())


def test_a_round_may_have_prompts_of_its_own_and_the_pairs_before_as_well(folder):
    write_rows(Path("more.jsonl"), [{"prompt": f"[OTIS] Another scene {number}."} for number in range(6)])
    with Vllm() as server:
        changes = {"run__prompts": ["data", "more.jsonl"], "run__old_pairs": True, "evaluate__samples": 1}
        result = rounds.run(settings(server, **changes), Silent())
        one, two = result.rounds
        assert (one.completions, two.completions) == (48, 18)
        assert two.trained.rows == one.pairs + two.pairs > two.pairs
        page = html.rounds(result)
        assert all(f"{done.evaluation.win_rate:.3f}" in page and f">{done.pairs}<" in page for done in result.rounds)
        assert page.count("<svg") >= 1 and "every round passed" in page
        prompts = {
            row["prompt"][0]["content"] for row in read_rows(Path("data/dpo/round-2/with-old-pairs/train.jsonl"))
        }
        assert any("Another" in text for text in prompts) and any("Another" not in text for text in prompts)
        with pytest.raises(UserError, match="3 rounds, and prompts for 2"):
            rounds.run(settings(server, **changes | {"run__rounds": 3}), Silent())


def test_one_budget_is_for_all_rounds_and_attempts(folder):
    """Stopped by it again and again, the run never spends more, and more money takes it to the same end."""
    prices = {"generate__price": "100,100,100", "judge__price": "100,100,100"}

    def dollars():
        return 100e-6 * server.tokens  # by the server's own count

    with Vllm() as server:
        whole = rounds.run(settings(server, **prices), Silent())
        cost = dollars()
        assert whole.usd == pytest.approx(cost, rel=1e-6) and cost > 0
    for made in ("data/dpo", "runs", "dpo", "dpo-round-1", "dpo-round-2"):
        shutil.rmtree(made)
    with Vllm() as server:
        for _ in range(3):
            with pytest.raises(UserError) as stopped:
                rounds.run(settings(server, run__max_usd=cost * 0.7, **prices), Silent())
            assert stopped.value.code == Exit.BUDGET
            assert cost * 0.3 < dollars() <= cost * 0.7
        again = rounds.run(settings(server, run__max_usd=cost * 1.5, **prices), Silent())
        assert [one.pairs for one in again.rounds] == [one.pairs for one in whole.rounds]
        assert dollars() <= cost * 1.1
