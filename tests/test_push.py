"""What leaves this machine, what is refused, and what the card says: of a run that was really trained."""

import json
import re
import shutil

import pytest
import yaml
from adapters import base_model, save_adapter
from training import read_rows, settings, write_data

from dpo_cli.cli import main
from dpo_cli.data.files import write_json
from dpo_cli.errors import Exit, UserError
from dpo_cli.models.base_model import fingerprint
from dpo_cli.progress import Silent
from dpo_cli.stages import train
from dpo_cli.stages.push import run as push
from dpo_cli.stages.push import secrets

ADAPTER = {"README.md", "adapter_config.json", "adapter_model.safetensors", "COMPLETE"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Base, SFT adapter, data, a run of eight steps, and the adapter that it published; as if it passed its gates."""
    folder = tmp_path_factory.mktemp("trained")
    save_adapter(folder / "sft", base_model(folder / "base"))
    write_data(folder)
    train.run(settings(folder, folder / "base"), Silent())
    write_report(folder, verdict="pass", reasons=[])
    return folder


@pytest.fixture
def work(trained, tmp_path, monkeypatch):
    """A copy of all that, to change; the working folder, so that the report's relative paths hold."""
    shutil.copytree(trained, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    write_report(tmp_path / "work", adapter="out")
    return tmp_path / "work"


def write_report(folder, **changes):
    file = folder / "runs/dpo/report.json"
    write_json(file, json.loads(file.read_text()) | changes)


def send(work, what, *sets, **options):
    """Push to `there`; what was sent, and what lies there."""
    pushed = push.run(settings(work, work / "base", *sets), Silent(), what, str(work / "there"), **options)
    return pushed, {
        file.relative_to(work / "there").as_posix() for file in (work / "there").rglob("*") if file.is_file()
    }


def card(work):
    text = (work / "there/README.md").read_text()
    header, body = re.fullmatch(r"---\n(.*?)\n---\n(.*)", text, re.DOTALL).groups()
    return yaml.safe_load(header), body


def test_an_adapter_goes_alone_and_once(work):
    for stray in ("ref/adapter_model.safetensors", "optimizer.pt", "training_args.bin", ".env", "notes.txt"):
        (work / "out" / stray).parent.mkdir(exist_ok=True)
        (work / "out" / stray).write_text("stray")
    pushed, there = send(work, "adapter")
    assert there == ADAPTER
    assert pushed.verdict == "pass"
    assert (work / "there/adapter_model.safetensors").read_bytes() == (
        work / "out/adapter_model.safetensors"
    ).read_bytes()
    again, _ = send(work, "adapter")
    assert (again.result.sent, again.result.bytes) == ({}, 0)


def test_a_run_goes_with_its_adapter_and_without_the_optimizer(work):
    assert list((work / "runs/dpo/checkpoints").rglob("optimizer.pt"))
    _, there = send(work, "run")
    assert there == {
        "README.md", "COMPLETE", "config.json", "metrics.jsonl", "events.jsonl", "report.json",
        "adapter/adapter_config.json", "adapter/adapter_model.safetensors",
    }  # fmt: skip


def test_data_goes_without_locks_and_other_files(work):
    (work / "data/.completions.jsonl.lock").touch()
    (work / "data/private.txt").write_text("mine")
    _, there = send(work, "data")
    assert there == {"README.md", "COMPLETE", "train.jsonl", "val.jsonl"}
    header, body = card(work)
    assert header["configs"][0]["data_files"] == [
        {"split": "train", "path": "train.jsonl"}, {"split": "validation", "path": "val.jsonl"},
    ]  # fmt: skip
    assert "22 in train.jsonl and 5 in val.jsonl" in body


@pytest.mark.parametrize("what", ["adapter", "run"])
def test_what_did_not_pass_its_gates_is_refused_and_forced_it_says_so(work, what):
    write_report(work, verdict="fail", reasons=["kl_nats_per_token fails (value 3, limit 0.1)"])
    with pytest.raises(UserError, match=r"did not pass its gates: kl_nats_per_token fails") as caught:
        send(work, what)
    assert caught.value.code == Exit.GATE
    assert not (work / "there").exists()
    pushed, _ = send(work, what, force=True)
    assert "**Gates: fail.**" in card(work)[1]
    assert pushed.notes and "did not pass" in pushed.notes[0]


def test_weights_that_no_report_knows_are_refused_and_forced_the_card_claims_nothing(work):
    save_adapter(work / "out", work / "base", seed=5)
    with pytest.raises(UserError, match="has the hash of these weights") as caught:
        send(work, "adapter")
    assert caught.value.code == Exit.GATE
    send(work, "adapter", force=True)
    _, body = card(work)
    assert "**No report**" in body
    assert "Direct Preference Optimization" not in body


def test_the_run_is_found_by_the_hash_of_the_weights(work):
    other = work / "runs/aborted"
    shutil.copytree(work / "runs/dpo", other)
    write_json(other / "report.json", json.loads((other / "report.json").read_text()) | {"policy_sha256": "0" * 64})
    assert send(work, "adapter")[0].verdict == "pass"
    with pytest.raises(UserError, match="the run aborted has the hash"):
        send(work, "adapter", name="aborted")


def test_the_card_has_the_runs_own_numbers(work):
    report = json.loads((work / "runs/dpo/report.json").read_text())
    send(work, "adapter")
    header, body = card(work)
    assert header == {
        "library_name": "peft", "pipeline_tag": "text-generation", "tags": ["dpo", "lora", "nothing-dpo"],
    }  # fmt: skip
    assert "rank 4 (alpha 8)" in body
    assert "22 preference pairs, 5 held out" in body
    for name, gate in report["gates"].items():
        assert f"| `{name}` | {gate['value']:.4g} |" in body
    for known in (report["policy_sha256"], report["reference_sha256"]):
        assert known in body
    config = json.loads((work / "runs/dpo/config.json").read_text())
    assert config["identity"]["data"]["sha256"]["train.jsonl"] in body
    assert "## Evaluation" not in body


def test_the_header_names_a_base_that_is_on_the_hub(work, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(work / "none"))
    config = json.loads((work / "out/adapter_config.json").read_text())
    write_json(work / "out/adapter_config.json", config | {"base_model_name_or_path": "tiny/base"})
    send(work, "adapter", "model.base=tiny/base")
    from huggingface_hub import ModelCard

    data = ModelCard((work / "there/README.md").read_text()).data
    assert (data.base_model, data.base_model_relation) == ("tiny/base", "adapter")


@pytest.mark.parametrize("is_this_adapter", [True, False])
def test_the_win_rate_is_on_the_card_of_the_adapter_that_won_it(work, is_this_adapter):
    hash_of = fingerprint(work / ("out" if is_this_adapter else "sft"))[:16]
    write_json(work / "data/evaluation.json", {
        "win_rate": 0.625, "interval": [0.52, 0.71], "length_controlled_win_rate": 0.6, "n": 128,
        "judge": {"judge": "llm", "models": ["judge-1"]}, "sides": {"policy": {"adapter": hash_of}},
    })  # fmt: skip
    send(work, "adapter")
    said = "win rate 0.625 (95% interval 0.520 to 0.710), length-controlled 0.600. Judged by: judge `llm`"
    assert (said in card(work)[1]) == is_this_adapter


def test_a_merged_model_says_the_same_as_the_adapter(work):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    pushed, there = send(work, "adapter", merge=True)
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= there
    assert "adapter_model.safetensors" not in there
    assert pushed.merged.mean_difference < 1e-4
    merged = AutoModelForCausalLM.from_pretrained(work / "there")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(work / "base"), work / "out")
    ids = torch.tensor([[3, 5, 7, 11, 13]])
    with torch.no_grad():
        assert torch.allclose(merged(ids).logits, model(ids).logits, atol=1e-4)
    header, body = card(work)
    assert header["library_name"] == "transformers"
    assert "folded into" in body and "nats a token" in body
    assert send(work, "adapter", merge=True)[0].result.sent == {}


def test_a_dry_run_sends_and_merges_nothing(work):
    for options in ({}, {"merge": True}):
        pushed, there = send(work, "adapter", dry_run=True, **options)
        assert pushed.result.dry_run and pushed.result.sent["README.md"] > 0
        assert there == set()
    assert not (work / "out-merged").exists()


def test_somebody_elses_readme_is_not_overwritten(work):
    (work / "there").mkdir()
    (work / "there/README.md").write_text("# My project\n")
    with pytest.raises(UserError, match="would be overwritten"):
        send(work, "adapter")
    assert (work / "there/README.md").read_text() == "# My project\n"


SECRETS = {
    "hub": "hf_" + "aB3" * 12, "openai": "sk-proj-" + "x1Y" * 12, "github": "ghp_" + "a1" * 18,
    "modal": "as-" + "Ab1" * 8, "aws": "AKIA" + "A1B2" * 4, "url": "http://ann:s3cret@10.0.0.1:8000/v1",
    "key": "-----BEGIN RSA PRIVATE KEY-----",
}  # fmt: skip


@pytest.mark.parametrize("name", SECRETS)
def test_a_secret_in_a_setting_or_in_a_text_is_refused_and_not_shown(work, name):
    config = json.loads((work / "runs/dpo/config.json").read_text())
    config["config"]["generate"]["url"] = SECRETS[name]
    write_json(work / "runs/dpo/config.json", config)
    rows = read_rows(work / "data/train.jsonl")
    rows[2]["chosen"][0]["content"] += f" {SECRETS[name]}"
    (work / "data/train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for what, place in (("run", r"config.json:\d+"), ("data", r"train.jsonl:3")):
        with pytest.raises(UserError) as caught:
            send(work, what)
        assert re.fullmatch(place, caught.value.where)
        assert SECRETS[name] not in f"{caught.value} {caught.value.hint}"
    assert not (work / "there").exists()


def test_the_environments_own_secrets_are_found_by_their_value():
    environment = {"WANDB_API_KEY": "0123456789abcdef", "HOME": "/home/somebody", "TOKENIZERS_PARALLELISM": "false"}
    files = {"a.json": b'{"home": "/home/somebody",\n"is": "false", "key": "0123456789abcdef"}'}
    assert secrets.find(files, environment) == [("a.json:2", "the value of WANDB_API_KEY")]


def test_a_secret_far_down_a_file_is_found_with_its_line(tmp_path):
    """Files are looked through in blocks: words that only look like a secret stand in each."""
    rows = [
        f'{{"text": "task-{number}, was-not, the ask-and-tell of http://here/{number}:8 @"}}' for number in range(9000)
    ]
    rows[4321] += SECRETS["openai"]
    rows[8999] += f" {SECRETS['url']} {SECRETS['aws']}"
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    found = secrets.find({"a.jsonl": tmp_path / "a.jsonl"}, {})
    assert found == [
        ("a.jsonl:4322", "an OpenAI key"), ("a.jsonl:9000", "an AWS key"), ("a.jsonl:9000", "a URL with a password"),
    ]  # fmt: skip


def test_the_command_pushes_and_its_exit_code_says_when_a_gate_says_no(work, capsys, monkeypatch):
    sets = ["--set", f"runs={work}/runs", "--set", f"model.base={work}/base", "--dpo-adapter", f"{work}/out"]

    def run(*words):
        monkeypatch.setattr("sys.argv", ["nothing-dpo", "push", *words, *sets])
        with pytest.raises(SystemExit) as caught:
            main()
        return caught.value.code, capsys.readouterr()

    code, said = run("adapter", "there", "--json")
    assert code == 0
    assert set(json.loads(said.out)["result"]["sent"]) == ADAPTER
    code, said = run("adapter", "there")
    assert "0 files, 0 B; 4 were there" in said.out
    write_report(work, verdict="fail", reasons=["loss fails"])
    code, said = run("adapter", "elsewhere")
    assert code == Exit.GATE
    assert "--force" in said.err
