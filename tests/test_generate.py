import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest
from openai_server import Server, first, scene

from dpo_cli.config import resolve
from dpo_cli.data.jsonl import Journal, read_latest
from dpo_cli.data.records import Completions, canonical, prompt_id
from dpo_cli.endpoint import client
from dpo_cli.errors import Exit, UserError
from dpo_cli.progress import Silent
from dpo_cli.stages import generate

SYSTEM = {"role": "system", "content": "Write the next lines."}


class Lines(Silent):
    """Progress that keeps its lines."""

    def __init__(self):
        self.lines = []

    def log(self, text):
        self.lines.append(text)


@pytest.fixture(autouse=True)
def short_backoff(monkeypatch):
    monkeypatch.setattr(client, "MAX_BACKOFF_SECONDS", 0.05)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with 12 prompts in data/val.jsonl."""
    monkeypatch.chdir(tmp_path)
    write_prompts(tmp_path / "data" / "val.jsonl", [{"prompt": messages(number)} for number in range(12)])
    return tmp_path


def messages(number):
    return [SYSTEM, {"role": "user", "content": f"[OTIS] This is scene {number}."}]


def write_prompts(path, rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(server, progress=None, limit=None, dry_run=False, **settings):
    flags = {"generate.url": server and server.url, "model.name": "writer", "generate.timeout": 5.0}
    flags |= {key.replace("__", "."): value for key, value in settings.items()}
    resolved = resolve.resolve(flags, environment={}).config
    return generate.run(resolved, progress or Silent(), limit=limit, dry_run=dry_run)


def rows(folder, data="data/dpo"):
    return read_latest(folder / data / "completions.jsonl", Completions)


def texts(folder, data="data/dpo"):
    return {key: row.completions for key, row in rows(folder, data).items()}


def test_every_prompt_gets_n_completions_in_one_request(folder):
    with Server() as server:
        result = run(server)
        assert server.calls.total() == 12
        sent = server.bodies[0]
    assert (result.prompts, result.owed_prompts, result.owed_completions, result.completions) == (12, 12, 36, 36)
    assert {name: sent[name] for name in ("n", "temperature", "top_p", "max_tokens", "frequency_penalty")} == {
        "n": 3, "temperature": 0.9, "top_p": 1.0, "max_tokens": 256, "frequency_penalty": 0.5,
    }  # fmt: skip
    row = rows(folder)[prompt_id(messages(4))]
    assert row.prompt == messages(4)
    assert len({canonical(text) for text in row.completions}) == 3
    assert row.finish_reasons == ["stop"] * 3
    assert row.model == "writer"
    assert row.usage.output > 0
    assert result.usage.output == sum(row.usage.output for row in rows(folder).values())


def test_running_again_asks_nothing(folder):
    with Server() as server:
        run(server)
        before = (folder / "data/dpo/completions.jsonl").read_bytes()
        result = run(server)
        assert server.calls.total() == 12
    assert (result.done_before, result.owed_prompts, result.completions) == (12, 0, 0)
    assert (folder / "data/dpo/completions.jsonl").read_bytes() == before


def test_a_larger_n_adds_what_is_missing(folder):
    with Server() as server:
        run(server, generate__n=2)
        before = texts(folder)
        result = run(server, generate__n=5)
        assert {body["n"] for body in server.bodies[12:]} == {3}
        after = texts(folder)
        assert all(after[key][:2] == before[key] for key in before)
        assert result.owed_completions == 36
        assert {len(row.finish_reasons) for row in rows(folder).values()} == {5}
        run(server, generate__n=5, data="at-once")
    assert texts(folder, "at-once") == after
    assert len((folder / "data/dpo/completions.jsonl").read_bytes().splitlines()) == 12


@pytest.mark.parametrize("fault", ["400:n", "fewer", "400!n must be 1 when using greedy sampling"])
def test_a_server_without_n_gives_the_same_rows(folder, fault):
    def strike(call):
        return fault if call.body["n"] > 1 else None

    with Server() as server:
        run(server, data="plain")
    with Server(fault=strike) as server:
        progress = Lines()
        run(server, progress, generate__concurrency=1)
        # One request finds out that n is refused; `fewer` counts, so nothing is paid in vain.
        assert server.paid.total() == 36
        assert server.calls.total() == 36 + (fault != "fewer")
    assert texts(folder) == texts(folder, "plain")
    assert len(progress.lines) == (fault != "fewer")


@pytest.mark.parametrize("name", ["frequency_penalty", "top_p", "seed", "chat_template_kwargs"])
def test_a_parameter_that_the_server_refuses_is_left_out_once(folder, name):
    progress = Lines()
    with Server(fault=lambda call: f"400:{name}") as server:
        result = run(server, progress, generate__concurrency=1)
        assert [name in body for body in server.bodies] == [True] + [False] * 12
        assert "temperature" in server.bodies[-1]
    assert result.failed == 0
    assert len(progress.lines) == 1
    assert name in progress.lines[0]


def test_max_tokens_takes_its_newer_name(folder):
    text = "400!Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
    with Server(fault=lambda call: text if "max_tokens" in call.body else None) as server:
        result = run(server, generate__max_tokens=3)
        assert server.bodies[-1]["max_completion_tokens"] == 3
    assert result.failed == 0
    assert result.cut == 36


def test_without_seeds_completions_are_asked_for_one_by_one_and_none_twice(folder):
    def strike(call):
        return "400:seed" if "seed" in call.body else "400:n" if call.body["n"] > 1 else None

    with Server(fault=strike) as server:
        run(server)
        # The bodies of a prompt are the same now, and still each is paid: three, and three more for the identical.
        assert max(server.paid.values()) >= 3


def test_identical_completions_are_sampled_once_more(folder):
    def strike(call):
        return "same" if "scene 3." in call.text and call.body["n"] == 3 else None

    with Server(fault=strike) as server:
        result = run(server)
        assert server.calls.total() == 13
    (again,) = [body for body in server.bodies if body["n"] == 2]
    row = rows(folder)[prompt_id(messages(3))]
    assert row.completions[1:] == [scene(again, index)[0] for index in range(2)]
    assert len(set(row.completions)) == 3
    assert result.identical == 0
    assert len(rows(folder)) == 12


def test_what_stays_identical_is_recorded_and_counted(folder):
    with Server(fault=lambda call: "reply![OTIS] Always this." if "scene 3." in call.text else None) as server:
        result = run(server)
        assert server.calls.total() == 13
        assert run(server).owed_prompts == 0
        assert texts(folder)[prompt_id(messages(3))] == ["[OTIS] Always this."] * 3
        assert result.identical == 2
        server.fault = None
        run(server, generate__n=4)  # what is recorded stays, identical or not
        assert [body["n"] for body in server.bodies[13:]] == [1] * 12
    assert texts(folder)[prompt_id(messages(3))][:3] == ["[OTIS] Always this."] * 3


def test_a_prompt_that_is_refused_fails_alone_and_is_asked_again(folder):
    progress = Lines()
    with Server(fault=lambda call: "400!This prompt is too long." if "scene 3." in call.text else None) as server:
        result = run(server, progress)
        assert (result.failed, result.completions) == (1, 33)
        assert "too long" in result.error
        assert "too long" in progress.lines[0]
        assert prompt_id(messages(3)) not in rows(folder)
        server.fault = None
        result = run(server)
    assert (result.done_before, result.owed_prompts, result.failed) == (11, 1, 0)
    assert len(rows(folder)) == 12


def test_faults_of_all_kinds_leave_the_same_rows(folder):
    with Server() as server:
        run(server, data="plain")
    kinds = ["429", "429:0.1", "500", "503", "drop", "malformed", "hang"]
    with Server(fault=lambda call: random.Random(call.key).choice(kinds) if call.attempt == 1 else None) as server:
        result = run(server, generate__timeout=0.5)
        assert result.receipt.resent == server.paid_twice > 0
        assert result.receipt.retries >= 12
    assert texts(folder) == texts(folder, "plain")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"generate__temperature": 0.5}, "temperature was 0.9, now 0.5"),
        ({"generate__keep_lines": "x"}, "keep_lines was None, now x"),
        ({"generate__seed": 1}, "seed was 42, now 1"),
        ({"model__name": "other"}, "model was writer, now other"),
    ],
)
def test_rows_of_two_kinds_are_never_mixed(folder, change, named):
    with Server() as server:
        run(server)
        with pytest.raises(UserError) as raised:
            run(server, generate__n=9, **change)
        assert server.calls.total() == 12
    assert named in raised.value.message
    assert raised.value.message.count(", now ") == 1
    assert raised.value.where.endswith("completions.jsonl:1")
    assert "--data" in raised.value.hint
    assert raised.value.code == Exit.USAGE


def test_only_matching_lines_are_kept(folder):
    reply = "reply!Sure!\n[OTIS] One.\nnarrator\n[RUTH] Two.\n"
    with Server(fault=lambda call: reply) as server:
        run(server, limit=1, generate__n=1, generate__keep_lines=r"^\[[A-Z]+\] .+")
    assert list(texts(folder).values()) == [["[OTIS] One.\n[RUTH] Two."]]


def test_forms_of_prompts_are_one_prompt(folder):
    write_prompts(
        folder / "data" / "val.jsonl",
        [
            {"prompt": messages(0)},
            {"messages": messages(0)},
            {"messages": [*messages(0), {"role": "assistant", "content": "x"}]},
            {"prompt": messages(0), "completion": [{"role": "assistant", "content": "x"}]},
            {"prompt": [{**message, "name": None} for message in messages(0)]},
            {"prompt": "A bare string."},
        ],
    )
    with Server() as server:
        result = run(server)
        assert server.calls.total() == 2
        assert [message["role"] for message in server.bodies[-1]["messages"]] in (["system", "user"], ["user"])
    assert (result.prompts, result.merged) == (2, 4)


@pytest.mark.parametrize(
    ("text", "where", "message"),
    [
        ('{"prompt": "a"}\n{"prompt": 3}\n', "val.jsonl:2", '"prompt" is not a string'),
        (
            '{"prompt": "a"}\n{"prompt": [{"role": "user", "content": 3}]}\n',
            "val.jsonl:2",
            'has a message whose "content" is not a text',
        ),
        ('{"text": "a"}\n', "val.jsonl:1", 'no "prompt"'),
        ('{"prompt": " "}\n', "val.jsonl:1", "no text"),
        ("[]\n", "val.jsonl", "empty"),
        ("", "val.jsonl", "empty"),
        (None, "val.jsonl", "no prompts there"),
    ],
)
def test_bad_prompts_are_named_by_file_and_line(folder, text, where, message):
    file = folder / "data" / "val.jsonl"
    file.unlink() if text is None else file.write_text(text)
    with Server() as server:
        with pytest.raises(UserError, match=message) as raised:
            run(server)
        assert raised.value.where.endswith(where)
        assert raised.value.code == Exit.USAGE
        assert server.calls.total() == 0


def test_a_dry_run_says_what_is_owed_and_does_nothing(folder):
    with Server() as server:
        result = run(server, dry_run=True, limit=5)
        assert (result.owed_prompts, result.owed_completions) == (5, 15)
        assert server.calls.total() == 0
        assert not (folder / "data" / "dpo").exists()


def test_a_limit_takes_the_first_prompts(folder):
    with Server() as server:
        run(server, limit=5)
        assert set(texts(folder)) == {prompt_id(messages(number)) for number in range(5)}
        result = run(server, limit=8)
        assert server.calls.total() == 8
    assert (result.done_before, result.owed_prompts) == (5, 3)


def test_without_endpoint_or_adapter_both_ways_on_are_shown(folder):
    with pytest.raises(UserError) as raised:
        run(None)
    assert "SERVE_URL" in raised.value.hint
    assert "--engine transformers" in raised.value.hint
    assert raised.value.code == Exit.USAGE
    assert not (folder / "data" / "dpo").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"generate__keep_lines": "["}, "is no pattern"),
        ({"generate__temperature": 0}, "temperature 0 gives 3 times the same"),
    ],
)
def test_settings_that_make_no_sense(folder, change, message):
    with Server() as server:
        with pytest.raises(UserError, match=message):
            run(server, **change)
        assert server.calls.total() == 0


def test_a_model_that_is_not_served_is_named_with_those_that_are(folder):
    with (
        Server(models=["base", "seinfeld"]) as server,
        pytest.raises(UserError, match="no model 'writer'") as raised,
    ):
        run(server)
    assert "base, seinfeld" in raised.value.hint


def test_two_commands_do_not_write_one_file(folder):
    with Server() as server, Journal(folder / "data/dpo/completions.jsonl"):
        with pytest.raises(UserError, match="another nothing-dpo command"):
            run(server)
        assert server.calls.total() == 0


def command(server, *arguments):
    environment = os.environ | {"SERVE_URL": server.url, "SERVE_MODEL": "writer"}
    line = [sys.executable, "-m", "dpo_cli", "generate", "--quiet", "--concurrency", "8", *arguments]
    return subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("fault", [None, "400:n"])
def test_after_kill_9_at_random_moments_the_rows_are_those_of_one_run(folder, fault):
    write_prompts(folder / "data" / "val.jsonl", [{"prompt": messages(number)} for number in range(60)])
    with Server() as server:
        run(server, data="plain")
    rng = random.Random(7)
    kills = 0
    with Server(latency=0.03, fault=lambda call: fault) as server:
        while kills < 4:
            process = command(server)
            target = server.calls.total() + rng.randint(1, 30)
            while server.calls.total() < target and process.poll() is None:
                time.sleep(rng.random() / 100)
            if process.poll() is not None:
                break
            process.send_signal(signal.SIGKILL)
            process.communicate()
            kills += 1
        process = command(server)
        _, errors = process.communicate()
        assert process.returncode == 0, errors
        assert kills >= 2
        # Only what was in flight, at most 8 each time, was paid again.
        assert server.paid_twice <= 8 * kills
    file = folder / "data/dpo/completions.jsonl"
    assert len(file.read_bytes().splitlines()) == 60
    assert texts(folder) == texts(folder, "plain")


def test_an_interrupt_exits_130_and_the_next_run_goes_on(folder):
    write_prompts(folder / "data" / "val.jsonl", [{"prompt": messages(number)} for number in range(60)])
    with Server(latency=0.05) as server:
        process = command(server)
        while server.calls.total() < 20:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
        assert process.returncode == Exit.INTERRUPTED
        assert "Traceback" not in errors
        assert re.search(r"next: nothing-dpo generate .*, which goes on from there", errors), errors
        process = command(server)
        process.communicate()
        assert process.returncode == 0
        assert server.paid_twice <= 8
    assert len(rows(folder)) == 60


def test_failed_prompts_give_exit_code_1(folder):
    with Server(fault=lambda call: "400!no" if "scene 3." in call.text else None) as server:
        process = command(server)
        process.communicate()
    assert process.returncode == Exit.FAILED
    assert len(rows(folder)) == 11


def test_a_fault_before_the_first_reply_is_one_line(folder):
    with Server(fault=first(99, "401")) as server:
        process = command(server)
        _, errors = process.communicate()
    assert process.returncode == Exit.USAGE
    assert server.url in errors
    assert "Traceback" not in errors


def test_a_server_that_asks_for_a_key_is_given_it_or_the_variable_is_named(folder, monkeypatch):
    monkeypatch.delenv("SERVE_API_KEY", raising=False)
    with Server(api_key="secret") as server:
        with pytest.raises(UserError) as raised:
            run(server)
        assert raised.value.hint == "export SERVE_API_KEY=..."
        monkeypatch.setenv("SERVE_API_KEY", "secret")
        assert run(server).completions == 36
    assert not any("secret" in file.read_text() for file in (folder / "data/dpo").iterdir())
