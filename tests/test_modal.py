"""`--backend modal`: the app as it stands, and the real client against a server of ours (`modal_server.py`)."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
from adapters import base_model, save_adapter
from modal_server import OK, ModalServer
from packaging.requirements import Requirement
from training import AtStep, Lines, metrics, pair, read_rows, settings, write_data, write_rows

from dpo_cli.config.resolve import resolve
from dpo_cli.data.messages import prompt_id
from dpo_cli.demo.scenes import cast
from dpo_cli.errors import Exit, UserError
from dpo_cli.jobs import launch, progress_lines, registry, worker
from dpo_cli.jobs import spec as jobs_spec
from dpo_cli.jobs.backends import _modal_cards
from dpo_cli.jobs.backends import modal as backend
from dpo_cli.progress import Silent
from dpo_cli.stages import judge, train

LOCKS = Path(jobs_spec.__file__).parent / "locks"
api_pb2 = pytest.importorskip("modal_proto.api_pb2")
SECRETS = {"hf-secret": {"HF_TOKEN": "hf-value"}, "wandb-secret": {}}


def test_the_app_needs_modal_and_the_standard_library_alone():
    code = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"msgspec", "yaml", "genai_prices", "torch", "trl", "numpy", "kubernetes"}:
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
import dpo_cli.jobs.backends._modal_app as app
print(sorted(name for name in sys.modules if name.startswith("dpo_cli")), app.run.info().single_use_containers)
"""
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    ours = "['dpo_cli', 'dpo_cli.errors', 'dpo_cli.jobs', 'dpo_cli.jobs.backends', 'dpo_cli.jobs.backends._modal_app']"
    assert printed.strip() == f"{ours} True"


@pytest.fixture
def plain(tmp_path, monkeypatch):
    """Settings of an empty folder."""
    monkeypatch.chdir(tmp_path)
    return resolve(environment={}).config


def test_the_function_is_what_the_settings_say(plain):
    spec = jobs_spec.make(plain, "train", gpu="l4")
    info = backend._app(backend.settings(spec, plain)).run.info()
    assert (info.gpus, info.timeout, info.max_retries) == ([("L4", 1)], 86400, 10)
    assert {path: volume.name for path, volume in info.volumes.items()} == {
        "/vol": "nothing-gpt-vol",
        "/cache": "nothing-gpt-hf-cache",
    }
    assert [name.split("'")[1] for name in info.secrets] == ["hf-secret", "wandb-secret"]
    plain.modal.timeout, plain.modal.retries, plain.modal.wandb_secret = 60, 0, None
    spec = jobs_spec.make(plain, "train", gpu="A100-80GB", gpus=2)
    info = backend._app(backend.settings(spec, plain)).run.info()
    assert (info.gpus, info.timeout, info.max_retries) == ([("A100-80GB", 2)], 60, 0)
    assert len(info.secrets) == 2, "the container makes as many objects, whatever the settings are"
    judging = backend.settings(jobs_spec.make(plain, "judge"), plain)
    assert (judging["gpu"], judging["second_secret"]) == (None, "openai-secret")
    assert judging["app"] == "nothing-gpt-dpo-train-judge"


def locked(name):
    """Package -> version of one of the locks."""
    pins = re.findall(r"^([\w.-]+)==(\S+) \\$", (LOCKS / f"{name}.txt").read_text(), re.MULTILINE)
    return {package.lower().replace("_", "-"): version for package, version in pins}


def test_the_images_hold_what_pyproject_asks_for_as_the_tests_pin_it(plain):
    project = tomllib.loads((LOCKS.parents[2] / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    constraints = (LOCKS.parents[2] / ".ci/constraints.txt").read_text().split()
    pairs = [line.split("==") for line in constraints if "==" in line]
    tested = {name.lower().replace("_", "-"): version for name, version in pairs}
    wanted = {"light": project["dependencies"], "train": project["dependencies"] + extras["train"] + extras["qlora"]}
    for name, lines in wanted.items():
        pins = locked(name)
        for requirement in map(Requirement, lines):
            assert pins[requirement.name.lower()] in requirement.specifier, requirement
        assert {package: pins[package] for package in pins.keys() & tested.keys()} == {
            package: tested[package] for package in pins.keys() & tested.keys()
        }
    assert "torch" not in locked("light")
    for command, lock in (("train", "train.txt"), ("judge", "light.txt")):
        shown = json.loads(backend.render(jobs_spec.make(plain, command, gpu="L4"), plain))["image"]
        assert (shown["requirements"], shown["python"]) == (lock, project["requires-python"].removeprefix(">="))


def test_the_image_is_built_from_the_lock_with_its_hashes(modal):
    server, config, _ = modal
    launch.cancel(launch.submit("modal", asked(config), config, Silent()), config)
    commands = "\n".join(command for image in server.images for command in image.dockerfile_commands)
    assert "--require-hashes" in commands and "train.txt" in "".join(
        [file.filename for image in server.images for file in image.context_files] + [commands]
    )


@pytest.mark.parametrize(
    ("card", "count", "word"),
    [
        ("Z9", 1, "no card 'Z9'"),
        ("L4", 9, "9 × L4"),
        ("A10:5", 1, "5 × A10"),
        ("L4:x", 1, "no number"),
        ("L4:0", 0, "0 ×"),
    ],
)
def test_cards_that_modal_does_not_have_are_refused(card, count, word):
    with pytest.raises(UserError, match=word):
        _modal_cards.card(card, count)


@pytest.mark.parametrize("setting", ["modal.timeout=86401", "modal.timeout=0", "modal.retries=11", "modal.retries=-1"])
def test_bounds_that_the_client_does_not_check_are_checked(setting):
    with pytest.raises(UserError, match=setting.partition("=")[0]):
        resolve(sets=[setting], environment={})
    assert _modal_cards.card("H100:8", 1) == "H100:8" and _modal_cards.card("b200", 2) == "B200:2"


def test_the_cost_is_said_to_be_an_estimate():
    assert _modal_cards.cost("L4:2", 3600) == "about 7,200 GPU-seconds of L4, $1.60 at list price: an estimate, no bill"


# --- the real client


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Inputs, and what an uninterrupted run on this machine makes of them."""
    import torch

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("whole")
    base = base_model(folder / "base")
    save_adapter(folder / "sft", base)
    write_data(folder)
    train.run(settings(folder, base), Silent())
    return folder


@pytest.fixture(scope="module")
def only_server(tmp_path_factory):
    """One for all tests: to start it takes longer than most of them."""
    folder = tmp_path_factory.mktemp("modal")
    with ModalServer(folder, folder / "vol") as server:
        yield server


@pytest.fixture
def modal(only_server, whole, tmp_path, monkeypatch):
    """A server on which nothing has happened, and the settings of a run whose inputs are those of `whole`."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setattr(backend, "VOLUME", str(only_server.mount))
    config = settings(whole, whole / "base", f"runs={work / 'runs'}", f"model.dpo_adapter={work / 'out'}")
    only_server.forget()
    only_server.secrets = dict(SECRETS)
    return only_server, config, work


def asked(config, **given):
    return launch.spec("modal", config, "train", **given)


class Interrupted(Lines):
    """Somebody presses Ctrl-C when a line with this word appears."""

    def __init__(self, word):
        super().__init__()
        self.word = word

    def log(self, text):
        super().log(text)
        if self.word in text:
            raise KeyboardInterrupt


def test_uploaded_spawned_preempted_left_found_again_and_fetched(modal, whole):
    server, config, work = modal
    server.preempt = lambda call, line: '"saved"' in line and not call.attempts
    left = launch.run("modal", asked(config), config, progress := Interrupted("preempted"))
    assert left.status.state == "running" and not left.status.ended
    assert "preempted: attempt 2 goes on from the last checkpoint" in progress.lines
    [call] = server.calls.values()
    assert server.apps[left.job.handle["app_id"]].app_state == api_pb2.APP_STATE_DETACHED
    uploads = list(server.uploaded)
    assert any(name.endswith("data/train.jsonl") for name in uploads)

    found = launch.run("modal", asked(config), config, progress := Lines())
    assert "attaching to it" in progress.lines[0] and len(server.calls) == 1
    assert (found.status.state, found.status.exit_code) == ("succeeded", Exit.OK)
    assert found.result["resumed_from"] == 3 and found.result["adapter"] == str(work / "out")
    assert sum("held-out loss" in line for line in progress.lines) == 3, "each line once, from the first on"
    assert any("GPU-seconds of L4" in line for line in progress.lines)
    assert len(call.attempts) == 2 and server.commits >= 4
    assert metrics(work / "runs" / "dpo") == metrics(whole / "runs" / "dpo")
    weights = Path("out", "adapter_model.safetensors")
    assert (work / weights).read_bytes() == (whole / weights).read_bytes()
    settings_file = json.loads((work / "out" / "adapter_config.json").read_text())
    assert settings_file["base_model_name_or_path"] == config.model.base
    assert not (work / "runs" / "dpo" / "checkpoints").exists(), "they stay on the volume"
    assert not any("hf-value" in path.read_text(errors="ignore") for path in work.rglob("*") if path.is_file())

    # The same again: nothing is sent, nothing is trained. Another beta under this name: refused there, once.
    again = launch.run("modal", asked(config), config, Silent())
    assert again.result["finished_before"] and server.uploaded == uploads
    config.train.beta = 0.3
    refused = launch.run("modal", asked(config), config, Silent())
    assert (refused.status.state, refused.status.exit_code) == ("failed", Exit.USAGE)
    assert "train.beta was 0.1, now 0.3" in refused.status.reason and "--fresh" in refused.hint
    assert len(list(server.calls.values())[-1].attempts) == 1, "what fails again is not tried again"


def test_an_attempt_that_saved_nothing_is_not_tried_again(modal, whole):
    server, config, work = modal
    config.model.base = str(work / "base")
    for file in (whole / "base").iterdir():
        (work / "base").mkdir(exist_ok=True)
        (work / "base" / file.name).write_bytes(file.read_bytes())
    (work / "base" / "tokenizer.json").write_text("{}")
    launched = launch.run("modal", asked(config), config, Silent())
    assert (launched.status.state, launched.status.exit_code) == ("failed", Exit.USAGE)
    assert "\n" not in launched.status.reason and len(next(iter(server.calls.values())).attempts) == 1


def test_an_attempt_that_saved_is_tried_again_and_its_fault_is_one_line(monkeypatch):
    from dpo_cli.jobs.backends import _modal_app

    def fails(spec, saved):
        saved()
        raise OSError("the card\nis gone")

    commits = []
    monkeypatch.setattr(worker, "serve_json", fails)
    monkeypatch.setattr(_modal_app, "volume", SimpleNamespace(commit=lambda: commits.append(1)))
    with pytest.raises(RuntimeError, match="OSError: the card"):
        _modal_app.run.local("{}")
    assert len(commits) == 2


def test_a_submission_that_was_killed_before_it_knew_its_call_is_known_and_can_be_ended(modal):
    server, config, _ = modal
    server.lost_call = True
    with pytest.raises(UserError):
        launch.submit("modal", asked(config), config, Silent())
    half = registry.get("modal", config)
    assert "call_id" not in half.handle and backend.status(half, config).state == "pending"
    with pytest.raises(UserError, match="cut short") as raised:
        launch.run("modal", asked(config), config, Silent())
    assert raised.value.hint == "nothing-dpo jobs cancel modal-train-dpo, then the same command"
    launch.cancel(half, config)
    assert server.stopped == [half.handle["app_id"]]
    assert backend.status(registry.get("modal", config), config).state == "cancelled"


def test_cancelled_it_ends_and_is_not_tried_again(modal):
    server, config, _ = modal
    submitted = launch.submit("modal", asked(config), config, Silent())
    launch.cancel(submitted, config)
    assert launch.attach(registry.get("modal", config), config, Silent()).status.state == "cancelled"
    [call] = server.calls.values()
    assert call.cancelled and len(call.attempts) <= 1


RESULTS = {
    "timeout": (api_pb2.GenericResult.GENERIC_STATUS_TIMEOUT, b"", "failed", "longer than modal.timeout"),
    "own exception": (api_pb2.GenericResult.GENERIC_STATUS_FAILURE, b"no pickle", "failed", "deserialize"),
    "lost": (api_pb2.GenericResult.GENERIC_STATUS_INTERNAL_FAILURE, b"", "failed", "worker lost"),
    "done": (OK, None, "succeeded", ""),
}


@pytest.mark.parametrize("case", RESULTS)
def test_every_end_of_a_call_is_an_end(modal, case):
    from modal_server import Call

    server, config, _ = modal
    code, data, state, word = RESULTS[case]
    call = server.calls["fc-x"] = Call("fc-x", "fu-x", None)
    known = registry.Job(id="x", backend="modal", spec=asked(config), handle={"call_id": "fc-x"})
    assert backend.status(known, config).state == "running"
    if data is None:
        from modal._serialization import serialize

        data = serialize('{"exit_code": 0}')
    result = api_pb2.GenericResult(status=code, data=data, exception="worker lost")
    call.result = api_pb2.FunctionPutOutputsItem(result=result, data_format=api_pb2.DATA_FORMAT_PICKLE)
    found = backend.status(known, config)
    assert found.state == state and word in (found.reason or "")
    gone = registry.Job(id="y", backend="modal", spec=known.spec, handle={"call_id": "fc-gone"})
    with pytest.raises(UserError, match="no function call fc-gone"):
        backend.status(gone, config)


def test_every_missing_thing_is_a_line_with_its_command(modal):
    server, config, _ = modal
    server.secrets = {}
    with pytest.raises(UserError) as refused:
        launch.submit("modal", asked(config), config, Silent())
    lines = str(refused.value).splitlines()[1:]
    wandb, token = "modal secret create wandb-secret WANDB_API_KEY=...", "modal secret create hf-secret HF_TOKEN=..."
    assert [line.split(": ")[1] for line in lines] == [wandb], "a base that is uploaded needs no token of the Hub"
    hub = asked(config)
    hub.config["model"]["base"] = "meta-llama/Llama-3.2-3B-Instruct"
    with pytest.raises(UserError) as refused:
        launch.submit("modal", hub, config, Silent())
    assert [line.split(": ")[1] for line in str(refused.value).splitlines()[1:]] == [token, wandb]
    server.secrets = dict(SECRETS)
    config.model.adapter = "adapters/none-here"
    with pytest.raises(UserError, match="neither here nor at modal://nothing-gpt-vol") as refused:
        launch.submit("modal", asked(config), config, Silent())
    assert "nothing-dpo push adapter modal://nothing-gpt-vol/adapters/none-here" in refused.value.hint
    assert server.volume("nothing-gpt-vol").is_dir(), "created"
    assert not server.calls


def test_an_image_that_can_not_be_built_is_one_line(modal):
    server, config, _ = modal
    server.broken_image = True
    with pytest.raises(UserError, match=r"the image can't be built: .*no such package"):
        launch.submit("modal", asked(config), config, Silent())
    assert not server.calls and launch.listed(config) == []


@pytest.mark.parametrize("case", ["token", "silent", "nobody there"])
def test_a_preflight_that_fails_does_so_within_seconds(modal, case):
    server = modal[0]
    variable, value, word = {
        "token": ("MODAL_TOKEN_SECRET", "as-wrong", "not logged in"),
        "silent": ("MODAL_TOKEN_ID", "ak-test", "does not answer"),
        "nobody there": ("MODAL_SERVER_URL", "http://127.0.0.1:9", "does not answer"),
    }[case]
    server.silent = case == "silent"
    done = subprocess.run(
        [sys.executable, "-c", PREFLIGHT], capture_output=True, text=True, timeout=60,
        env={**os.environ, variable: value},
    )  # fmt: skip
    assert word in done.stdout, done.stderr


PREFLIGHT = """
from dpo_cli.jobs.backends import modal
from dpo_cli.config.resolve import resolve
from dpo_cli.errors import UserError
modal.CONNECT_SECONDS = 0.5
config = resolve(environment={}).config
try:
    with modal.translate_errors(config):
        modal.preflight(config, [])
except UserError as error:
    print(error)
"""


def test_a_simulated_preemption_is_let_through_and_the_run_goes_on_from_its_checkpoint(whole, tmp_path, capsys):
    from modal.exception import simulate_preemption

    config = settings(whole, whole / "base", f"runs={tmp_path / 'runs'}", f"model.dpo_adapter={tmp_path / 'out'}")
    spec = jobs_spec.make(config, "train", volume=None)
    saves = []

    def preempted() -> None:
        simulate_preemption(1)
        time.sleep(30)

    handler = signal.getsignal(signal.SIGALRM)
    try:
        with pytest.raises(KeyboardInterrupt, match="preemption"):
            worker.run(spec, AtStep(5, preempted), lambda: saves.append(1))
    finally:
        signal.alarm(0)  # the second interrupt, 30 s later, would end whatever runs then
        signal.signal(signal.SIGALRM, handler)
    assert saves == [1]
    outcome = worker.serve(spec, lambda: saves.append(1))
    assert outcome.exit_code == Exit.OK and outcome.result["resumed_from"] == 3 and len(saves) == 3
    last = progress_lines.parse(capsys.readouterr().out.splitlines()[-1])
    assert last is not None and last.outcome is not None and last.outcome.exit_code == Exit.OK
    assert metrics(tmp_path / "runs" / "dpo") == metrics(whole / "runs" / "dpo")


COMMAND = """
import sys
from dpo_cli.jobs.backends import modal
modal.VOLUME = sys.argv.pop(1)
from dpo_cli.cli import main
main()
"""


def test_ctrl_c_leaves_it_running_and_says_how_to_come_back(modal, whole):
    work = modal[2]
    (work / "nothing-dpo.toml").write_text(
        f'data = "{whole}/data"\n[model]\nbase = "{whole}/base"\nadapter = "{whole}/sft"\ndpo_adapter = "out"\n'
        "[train]\nallow_cpu = true\n"
    )
    command = [sys.executable, "-c", COMMAND, backend.VOLUME, "train", "--backend", "modal"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("plan:") and "steps on" in line:  # from the container: it is being followed
                process.send_signal(signal.SIGINT)
                break
        left, printed = process.stderr.read(), process.stdout.read()
    assert process.returncode == Exit.INTERRUPTED
    assert "nothing-dpo jobs attach modal-train-dpo" in left and "Traceback" not in left and "running" in printed
    here = resolve(file=Path("nothing-dpo.toml"), environment={}).config
    assert [one.status.state for one in launch.listed(here)] == ["running"]
    launch.cancel(registry.get("modal", here), here)
    assert launch.listed(here)[0].status.state == "cancelled"


def test_judging_there_goes_on_with_what_was_judged_here_and_its_pairs_come_home(modal, tmp_path):
    server, config, work = modal
    config.data, config.judge.judge, config.judge.function = str(work / "data"), "function", "dpo_cli.demo.score:voices"
    server.secrets["openai-secret"] = {}
    name, character = next(iter(cast()[1].items()))
    texts = [f"[{name}] {sorted(character.words)[0]}", "no line at all"]
    rows = [
        {
            "id": prompt_id(pair(number)["prompt"]), "prompt": pair(number)["prompt"], "completions": texts,
            "finish_reasons": ["stop", "stop"], "model": "m", "sampling": {}, "usage": {"input": 1, "output": 1},
        }
        for number in range(12)
    ]  # fmt: skip
    write_rows(work / "data" / "completions.jsonl", rows)
    assert judge.run(config, Silent(), limit=5).judged == 5
    launched = launch.run("modal", launch.spec("modal", config, "judge"), config, Silent())
    assert launched.status.exit_code == Exit.OK, launched.status.reason
    assert launched.result["judged"]["judged"] == 7, "five were judged before"
    assert len(read_rows(work / "data" / "judgments.jsonl")) == 12
    assert (work / "data" / "train.jsonl").exists() and not server.functions.popitem()[1].resources.gpu_config.count
