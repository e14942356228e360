"""The protocol of topics: its file, its decisions, and adapters that are stacked. examples/protocol runs all of it."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from adapters import base_model, save_adapter

from dpo_cli.config import resolve
from dpo_cli.errors import UserError
from dpo_cli.progress import Silent
from dpo_cli.workflows import protocol
from dpo_cli.workflows.protocol import Mark, Protocol, Topic

EXAMPLE = Path(__file__).parents[1] / "examples" / "protocol"
FILE = """
accuracy = 0.6

[[topics]]
name = "one"
content = "content.jsonl"
quiz = "quiz.jsonl"
prompts = "prompts.jsonl"
"""
TOPIC = Topic(name="one", content="content.jsonl", quiz="quiz.jsonl", prompts="prompts.jsonl", pairs="pairs.jsonl")


def write(folder, text):
    for name in ("content", "quiz", "prompts"):
        (folder / f"{name}.jsonl").touch()
    file = folder / "protocol.toml"
    file.write_text(text)
    return file


def test_a_file_is_read_with_its_defaults_and_paths(tmp_path):
    found = protocol.read(write(tmp_path, FILE))
    assert (found.accuracy, found.voice, found.adapters) == (0.6, 0.75, "merge")
    assert found.topics[0].quiz == str(tmp_path / "quiz.jsonl") and found.topics[0].pairs is None


@pytest.mark.parametrize(
    ("change", "said", "hint"),
    [
        (("accuracy = 0.6", "acuracy = 0.6"), "unknown key 'acuracy'", "did you mean 'accuracy'"),
        (('quiz = "', 'quizz = "'), "topic 1: unknown key 'quizz'", "did you mean 'quiz'"),
        (("accuracy = 0.6", "accuracy = 6"), "accuracy", None),
        (('name = "one"', 'name = "a/b"'), "name", None),
        (("quiz.jsonl", "gone.jsonl"), "topic one: quiz is not there", None),
        ((FILE, FILE + FILE.partition("\n\n")[2]), "two topics are named 'one'", None),
        ((FILE, "topics = []"), "topics", None),
    ],
)
def test_a_file_that_is_wrong_says_where(tmp_path, change, said, hint):
    with pytest.raises(UserError) as refused:
        protocol.read(write(tmp_path, FILE.replace(*change)))
    assert said in str(refused.value) and "protocol.toml" in str(refused.value)
    assert hint is None or hint in refused.value.hint


@pytest.mark.parametrize(
    ("sft", "dpo", "gates", "kept", "why"),
    [
        ((0.6, 0.2), None, "pass", "sft", "more SFT, not DPO"),
        ((0.9, 0.75), None, "pass", "sft", "good enough"),
        ((0.7, 0.74), (0.7, 0.8), "pass", "dpo", "bettered"),
        ((0.9, 0.5), (0.65, 0.9), "pass", "sft", "quiz is below"),
        ((0.9, 0.5), (0.95, 0.5), "pass", "sft", "did not better"),
        ((0.9, 0.5), None, "fail", "sft", "gates: KL"),
    ],
)
def test_what_is_done_and_what_is_kept(monkeypatch, sft, dpo, gates, kept, why):
    marks = {"reference": Mark(*sft), "policy": dpo and Mark(*dpo)}
    trained = []

    def train(config, progress, stage, name, data):
        trained.append(name)
        return SimpleNamespace(verdict=gates if stage == "dpo" else "pass", reasons=["KL"])

    monkeypatch.setattr(protocol.train, "run", train)
    monkeypatch.setattr(protocol, "_mark", lambda topic, file, config, side, progress: (marks[side], 1.0))
    mine = protocol.of_topic(resolve.resolve({"model.dpo_adapter": "adapters/x"}, environment={}).config, TOPIC, "base")
    found = protocol._learn(TOPIC, Protocol(topics=[TOPIC]), mine, Silent())
    assert found.kept == f"adapters/one-{kept}" and why in found.why
    assert trained == ["one-sft"] + ["one-dpo"] * (dpo is not None or gates == "fail")
    assert found.usd == (2.0 if dpo else 1.0) and found.ok == (sft[0] >= 0.7)


def test_a_stacked_adapter_does_what_its_parts_do_together(tmp_path):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from dpo_cli.adapter import check_adapter
    from dpo_cli.training.stack_adapters import stack

    base = base_model(tmp_path / "base")
    parts = [
        save_adapter(tmp_path / "one", base, seed=1, r=2, lora_alpha=3),
        save_adapter(tmp_path / "two", base, seed=2, r=3, lora_alpha=12, target_modules=["q_proj", "down_proj"]),
    ]
    stack(parts, tmp_path / "both", str(base))
    model = AutoModelForCausalLM.from_pretrained(base)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        stacked = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "both")
        for part in parts:
            model = PeftModel.from_pretrained(model, part).merge_and_unload()
        assert torch.allclose(stacked(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-4)
        assert not torch.allclose(plain, model(input_ids=ids).logits, atol=1e-2)
    assert check_adapter(tmp_path / "both", str(base)).rank == 5


def test_an_endpoint_is_refused():
    mine = resolve.resolve({"generate.url": "http://127.0.0.1:1/v1"}, environment={}).config
    with pytest.raises(UserError, match="adapters change at every stage"):
        protocol.run(Protocol(topics=[TOPIC]), mine, Silent())


def test_a_dry_run_tells_every_stage_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(EXAMPLE)
    before = sorted(EXAMPLE.rglob("*"))
    sets = [f"runs={tmp_path}/runs", f"data={tmp_path}/data", f"model.dpo_adapter={tmp_path}/adapters/sailor"]
    config = resolve.resolve(sets=sets, environment={}).config
    told = protocol.plan(protocol.read(EXAMPLE / "protocol.toml"), config)
    assert [(step.topic, step.stage) for step in told] == [
        (topic, stage) for topic in ("tides", "knots") for stage in ("sft", "quiz", "voice", "dpo", "fold")
    ]
    assert (
        "demonstrations, 120 steps" in told[0].what
        and "6 questions" in told[1].what
        and "6 pairs, 30 steps" in told[3].what
    )
    assert {step.state for step in told} == {"to do", "perhaps"}
    (tmp_path / "runs" / "tides-sft").mkdir(parents=True)
    (tmp_path / "runs" / "tides-sft" / "report.json").write_text("{}")
    assert protocol.plan(protocol.read(EXAMPLE / "protocol.toml"), config)[0].state == "done"
    assert sorted(EXAMPLE.rglob("*")) == before
    config.generate.url, config.generate.engine = "http://127.0.0.1:1/v1", "endpoint"
    with pytest.raises(UserError, match="adapters change at every stage"):
        protocol.plan(protocol.read(EXAMPLE / "protocol.toml"), config)
