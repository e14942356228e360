"""What `--check` makes of a server. It is ours, and answers with the log-probabilities of an adapter on disk that the
test chooses for each name, so that each way of being wrong can be set up; test_vllm.py asks a real vLLM."""

import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
from adapters import base_model, save_adapter
from training import pair, write_rows

from dpo_cli.cli import main
from dpo_cli.config.resolve import resolve
from dpo_cli.errors import Exit, UserError
from dpo_cli.progress import Silent
from dpo_cli.stages import serve_config
from dpo_cli.stages.serve_config.check import BASE, check
from dpo_cli.stages.serve_config.log_probs import log_probs
from dpo_cli.stages.serve_config.server import ensure_served, load


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    base = base_model(folder / "base")
    save_adapter(folder / "sft", base)
    save_adapter(folder / "dpo", base, seed=1)
    write_rows(folder / "data/val.jsonl", [pair(number) for number in range(6)])
    return folder


class Server:
    """`serves`: name -> folder of an adapter, or None for the bare base; `noise` is added to each log-probability."""

    def __init__(self, saved):
        self.saved = saved
        self.serves = {"seinfeld": "sft", "seinfeld-dpo": "dpo"}
        self.parent = "base"
        self.noise = 0.0
        self.asked = []
        self.headers = []
        self.answers = {}

    def models(self):
        found = [
            {"id": name, "parent": self.parent, "root": f"{self.saved}/{self.serves[name]}"} for name in self.serves
        ]
        return 200, {"data": [{"id": "base", "parent": None, "root": "base"}, *found]}

    def completions(self, body):
        folder, ids = self.serves[body["model"]], body["prompt"]
        self.asked.append(ids)
        bare, known = log_probs(self.saved / "base", {folder: self.saved / folder} if folder else {}, [ids])
        values = known[folder] if folder else bare
        found = [None] + [{str(i): {"logprob": v + self.noise}} for i, v in zip(ids[1:], values, strict=True)]
        return 200, {"choices": [{"prompt_logprobs": found}]}


@pytest.fixture
def server(saved):
    served = Server(saved)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.reply(*served.models())

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            served.headers.append(dict(self.headers))
            path = self.path.removeprefix("/v1/")
            self.reply(*(served.answers[path](body) if path in served.answers else served.completions(body)))

        def reply(self, status, content):
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(content).encode())

        def log_message(self, *arguments):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served.url = f"http://127.0.0.1:{http.server_port}"
    Thread(target=http.serve_forever, daemon=True).start()
    yield served
    http.shutdown()
    http.server_close()


def settings(saved, *sets):
    own = [f"model.base={saved}/base", f"model.adapter={saved}/sft", f"model.dpo_adapter={saved}/dpo",
           f"data={saved}/data", "serve.dtype=float32"]  # fmt: skip
    return resolve(sets=[*own, *sets], environment={}).config


def run(server, *sets):
    config = settings(server.saved, *sets)
    return check(serve_config.plan(config), config, server.url, Silent())


def test_what_is_on_disk_passes(server):
    found = run(server)
    assert (found.verdict, found.prompts, found.notes) == ("pass", 6, [])
    assert all(set(one.differences) == {"seinfeld", "seinfeld-dpo", BASE} for one in found.served)
    assert len({tuple(ids) for ids in server.asked}) == 6
    assert all(one.tokens == sum(len(ids) - 1 for ids in server.asked) / 2 for one in found.served)


WRONG = {
    "swapped": ({"seinfeld": "dpo", "seinfeld-dpo": "sft"}, "seinfeld", "answers as seinfeld-dpo"),
    "one for both": ({"seinfeld": "sft", "seinfeld-dpo": "sft"}, "seinfeld-dpo", "answers as seinfeld "),
    "no adapter": ({"seinfeld": "sft", "seinfeld-dpo": None}, "seinfeld-dpo", "answers as the bare base"),
    "missing": ({"seinfeld": "sft"}, "seinfeld-dpo", "is not served"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_not_on_disk_fails_and_what_it_is_is_named(server, name):
    server.serves, wrong, reason = WRONG[name]
    found = run(server)
    assert found.verdict == "fail"
    assert {one.name: one.reason for one in found.served if not one.ok}[wrong].startswith(reason)


def test_another_adapter_of_the_same_name_fails(server, saved, tmp_path):
    save_adapter(saved / "later", saved / "base", seed=7)
    server.serves["seinfeld-dpo"] = "later"
    found = run(server)
    [fault] = [one for one in found.served if not one.ok]
    assert "more than serve.dtype explains" in fault.reason or "answers as" in fault.reason


def test_a_base_under_the_adapters_name_fails(server):
    server.parent = None
    assert {one.reason for one in run(server).served} == {"is served as a base model, not as an adapter"}


def test_noise_passes_where_the_type_explains_it_and_not_where_it_does_not(server):
    server.noise = 0.01
    assert run(server).verdict == "fail"
    assert run(server, "serve.dtype=bfloat16").verdict == "pass"


def test_adapters_that_noise_makes_alike_are_said_to_be_so(server, saved):
    server.noise = 0.01
    server.serves["seinfeld-dpo"] = "sft"
    found = run(server, "serve.dtype=bfloat16", f"model.dpo_adapter={saved}/sft")
    assert found.verdict == "pass"
    assert any("too close to seinfeld" in note for note in found.notes)


def test_prompts_alone_will_do(server, tmp_path):
    write_rows(tmp_path / "p.jsonl", [{"prompt": f"[OTIS] Scene {number}."} for number in range(3)])
    found = run(server, f"data={tmp_path}/none", f"generate.prompts={tmp_path}/p.jsonl")
    assert (found.verdict, found.prompts) == ("pass", 3)
    with pytest.raises(UserError, match="no rows to compare on"):
        run(server, f"data={tmp_path}/none", f"generate.prompts={tmp_path}/none")


def test_the_key_of_the_server_is_sent_and_no_other(server, monkeypatch):
    monkeypatch.setenv("SERVE_API_KEY", "serve-key")
    monkeypatch.setenv("OPENAI_API_KEY", "openai-key")
    run(server)
    assert {headers["Authorization"] for headers in server.headers} == {"Bearer serve-key"}


def test_the_command_ends_with_the_code_of_a_gate_and_without_a_server_with_failure(server, capsys, monkeypatch):
    saved = server.saved

    def command(*words):
        monkeypatch.setattr("sys.argv", [
            "nothing-dpo", "serve-config", *words, "--base", f"{saved}/base", "--adapter", f"{saved}/sft",
            "--dpo-adapter", f"{saved}/dpo", "--data", f"{saved}/data", "--dtype", "float32", "--quiet",
        ])  # fmt: skip
        with pytest.raises(SystemExit) as caught:
            main()
        return caught.value.code, capsys.readouterr()

    assert command("--check", server.url)[0] == Exit.OK
    server.serves = {"seinfeld": "dpo", "seinfeld-dpo": "sft"}
    code, said = command("--check", server.url)
    assert code == Exit.GATE
    assert "✗ seinfeld answers as seinfeld-dpo" in said.out
    code, said = command("--check", "http://127.0.0.1:9")
    assert code == Exit.FAILED
    assert "serve-config --run" in said.err


def test_loading_replaces_and_says_what_is_in_the_way(server, saved):
    loaded = []
    server.answers["load_lora_adapter"] = lambda body: loaded.append(body) or (200, {})
    plan = serve_config.plan(settings(saved))
    assert load(plan, f"{server.url}/v1") == ["seinfeld", "seinfeld-dpo"]
    assert loaded[1] == {"lora_name": "seinfeld-dpo", "lora_path": f"{saved}/dpo", "load_inplace": True}
    server.answers["load_lora_adapter"] = lambda body: (404, {"detail": "Not Found"})
    with pytest.raises(UserError, match="loads no adapters") as caught:
        load(plan, server.url)
    assert "--runtime-loading" in caught.value.hint
    server.answers["load_lora_adapter"] = lambda body: (400, {"error": {"message": "rank 64 is\ntoo large"}})
    with pytest.raises(UserError, match="seinfeld: rank 64 is too large"):
        load(plan, server.url)


def test_what_is_served_is_loaded_only_if_it_is_newer_here(server, saved):
    loaded = []
    server.answers["load_lora_adapter"] = lambda body: loaded.append(body["lora_name"]) or (200, {})
    assert ensure_served(server.url, "seinfeld", saved / "sft", anew=False) == "served"
    assert loaded == []
    ensure_served(server.url, "seinfeld", saved / "sft", anew=True)
    ensure_served(server.url, "seinfeld-new", saved / "sft", anew=False)
    assert loaded == ["seinfeld", "seinfeld-new"]
    with pytest.raises(UserError, match=r"'seinfeld' is .*sft there, not .*dpo"):
        ensure_served(server.url, "seinfeld", saved / "dpo", anew=False)
    server.answers["load_lora_adapter"] = lambda body: (404, {"detail": "Not Found"})
    with pytest.raises(UserError, match="what it serves as 'seinfeld' is older") as caught:
        ensure_served(server.url, "seinfeld", saved / "sft", anew=True)
    assert "--runtime-loading" in caught.value.hint
