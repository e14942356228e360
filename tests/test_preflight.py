"""The plan by hand, tokens against a server, sweeps and merges."""

import json
import math
import shutil
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from adapters import save_adapter
from training import Lines, settings

from dpo_cli.config.settings import PlanSection, TrainSection
from dpo_cli.errors import Exit, UserError
from dpo_cli.progress import Silent
from dpo_cli.stages import train
from dpo_cli.training import plan, preflight, remedies
from dpo_cli.training.plan import TokenLengths
from dpo_cli.training.trained_parameters import of_fresh_adapter
from dpo_cli.workflows import sweep

ADAPTER = 48_627_712  # weights of rank 32 on all linear layers of a 3B Llama


def made(lengths, **section):
    return plan.make(
        TrainSection(**section), PlanSection(), preflight.USUAL_SHAPE, ADAPTER, lengths, lengths[:50], "hand"
    )


def test_the_memory_of_a_3b_model_is_what_its_sizes_say():
    shape = preflight.USUAL_SHAPE
    assert shape.linear_parameters() + shape.embedding_parameters() == 3_212_574_720
    assert of_fresh_adapter(TrainSection(r=32), shape, None) == (ADAPTER, [])
    few = TrainSection(r=1, target_modules="q_proj,k_proj,w1")
    assert of_fresh_adapter(few, shape, None) == (28 * (3072 + 3072 + 3072 + 1024), ["w1"])
    parts = plan.memory_gb(TrainSection(), shape, ADAPTER, 0, 0)
    assert math.isclose(parts["weights"], 6.425, rel_tol=1e-3)
    assert math.isclose(
        sum(parts[name] for name in ("adapter", "reference", "gradients", "optimizer")), 0.9726, rel_tol=1e-3
    )
    four = plan.memory_gb(TrainSection(load_in_4bit=True), shape, ADAPTER, 0, 0)
    assert math.isclose(four["weights"], 2.24, rel_tol=1e-2)
    plain, checkpointed = (
        plan.memory_gb(TrainSection(gradient_checkpointing=on), shape, ADAPTER, 1000, 0)["activations"]
        for on in (False, True)
    )
    assert math.isclose(plain, 3.34, rel_tol=1e-2)
    assert math.isclose(checkpointed, (6.144e3 * 28 + 119.3e3) * 1000 / 1e9, rel_tol=1e-2)


def test_checkpointing_is_planned_where_the_longest_batch_needs_it():
    few, many = made([TokenLengths(450, [150, 150])] * 400), made([TokenLengths(1500, [400, 400])] * 400)
    assert (
        few.largest == 3000
        and not few.checkpointing
        and math.isclose(few.memory_gb["activations"], 10.02, rel_tol=1e-2)
    )
    assert many.checkpointing and many.fits and many.memory_gb["activations"] < 3
    assert made([TokenLengths(1500, [400, 400])] * 400, tokens_per_batch=3000).checkpointing is False
    assert made([TokenLengths(450, [150, 150])] * 400, gradient_checkpointing=True).checkpointing
    assert few.hours < made([TokenLengths(450, [150, 150])] * 400, gradient_checkpointing=True).hours


def test_steps_tokens_and_warnings_by_hand():
    result = made([TokenLengths(600, [200, 100])] * 320)
    assert (result.steps, result.evaluations, result.longest, result.too_long) == (20, 1, 800, 0)
    assert result.tokens == 320 * 900 and result.largest == 4 * 900 and result.warmup_share == 0.1
    assert result.forward == "packed, each prompt once"
    assert math.isclose(result.memory_gb["logits"], 4 * 300 * 32768 * 4 / 1e9)
    assert [warning.split()[0] for warning in result.warnings] == ["320", "chosen"]
    for warning, number in zip(result.warnings, ("generate.n", "pair.length_control"), strict=True):
        assert number in warning
    [longer] = [
        text for text in made([TokenLengths(600, [9, 9])] * 4000, warmup_steps=300).warnings if "warmup" in text
    ]
    assert "warmup is 120% of 250 steps: set train.warmup_ratio = 0.1, now 300 steps" in longer
    [ratio] = [text for text in made([TokenLengths(600, [9, 9])] * 4000, warmup_ratio=0.2).warnings if "warmup" in text]
    assert "set train.warmup_ratio = 0.1, now 0.2" in ratio
    assert not [text for text in made([TokenLengths(600, [9, 9])] * 64).warnings if "warmup" in text]  # 1 of 4 steps
    calm = made([TokenLengths(600, [100, 100])] * 4000)
    assert calm.fits and calm.warnings == []
    loud = made([TokenLengths(3000, [100, 100])] * 4000, learning_rate=1e-3, gradient_checkpointing=False)
    assert not loud.fits and loud.longest == 2048 and loud.too_long == 4000
    assert [
        any(word in text for text in loud.warnings)
        for word in ("learning_rate", "the longest is 3100", "train_batch_size")
    ] == [True] * 3


def test_the_largest_forward_is_that_of_the_longest_rows_or_of_the_budget():
    rows = [TokenLengths(100, [10, 20])] * 50 + [TokenLengths(700, [100, 200]), TokenLengths(500, [300, 100])]

    def largest(packs=True, **section):
        return plan.largest_forward(TrainSection(**section), rows, packs)

    assert largest() == (1000 + 900 + 2 * 130, 300 + 400 + 2 * 30)
    assert largest(packs=False) == (2 * 4 * 900, 300 + 400 + 2 * 30)
    assert largest(tokens_per_batch=2000)[0] == 2000 and largest(tokens_per_batch=10)[0] == 1000
    assert largest(tokens_per_batch=10**6)[0] == 1000 + 900 + 50 * 130


def test_a_kept_reference_is_reckoned_once():
    rows = [TokenLengths(600, [150, 150])] * 1600
    one, three, live = (made(rows, num_train_epochs=epochs, keep_reference=keep, eval_steps=10**6).hours
                        for epochs, keep in ((1, None), (3, None), (3, False)))  # fmt: skip
    assert math.isclose(live - three, one * 2 * 2 / 6, rel_tol=0.03)  # two of three passes of 2 operations in 6


# The least of what these families' config.json files hold, and what is said of rows of up to 300 tokens.
FAMILIES = {
    "llama": ({}, "packed"),
    "qwen2": ({"sliding_window": 128, "use_sliding_window": False}, "packed"),
    "qwen3": ({"head_dim": 64, "use_sliding_window": False, "sliding_window": None}, "packed"),
    "mistral": ({"sliding_window": 4096}, "packed"),
    "mistral of old": ({"sliding_window": 128}, "padded, since attention slides over 128 tokens"),
    "gemma": ({"head_dim": 256}, "packed"),
    "gemma2": ({"sliding_window": 4096, "attn_logit_softcapping": 50.0}, "padded, since attention scores are capped"),
    "gemma3_text": ({"sliding_window": 128, "layer_types": ["sliding_attention", "full_attention"]}, "padded"),
    "mixtral": ({"num_local_experts": 8}, "packed"),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_other_families_than_llama_have_a_plan_that_says_its_forward(tmp_path, name):
    changes, forward = FAMILIES[name]
    sizes = {
        "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 8,
        "vocab_size": 1000, "model_type": name.partition(" ")[0],
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(sizes | changes))
    shape = plan.read_shape(tmp_path)
    assert shape.embedding_parameters() == 512_000 * (1 if name.startswith("gemma") else 2)
    result = plan.make(TrainSection(), PlanSection(), shape, 1_000_000, [TokenLengths(200, [100, 50])] * 16, [], "hand")
    assert result.forward.startswith(forward) and result.forward in plan.line(result)
    assert result.tokens == 16 * (350 if forward == "packed" else 600)
    assert result.memory_gb["weights"] > 0 and result.hours > 0


def test_steps_at_most_caps_the_epochs_alone():
    section = TrainSection(num_train_epochs=3, steps_at_most=10)
    assert plan.steps(section, 1600) == 10 and plan.capped_steps(section, 1600) == 10
    assert plan.steps(section, 16) == 3
    assert plan.capped_steps(TrainSection(), 1600) == -1 and plan.capped_steps(TrainSection(max_steps=7), 1600) == 7


def test_the_plan_of_files_counts_with_the_bases_tokenizer(start):
    config = settings(start, start / "base")
    result = preflight.run(config)
    assert (result.pairs, result.held_out, result.steps) == (22, 5, 8)
    assert result.counted_by == "the base's tokenizer" and 20 < result.longest < 200
    config.model.base = str(start / "nowhere")
    with pytest.raises(UserError, match="not on this machine"):
        preflight.run(config)


@pytest.mark.parametrize(
    ("ours", "theirs", "answer_next", "said"),
    [
        ([0, 5, 6], [0, 0, 5, 6], True, "the server doubles BOS"),
        ([0, 0, 5, 6], [0, 5, 6], True, "training doubles BOS"),
        ([0, 5, 6], [5, 6], True, "the server lacks BOS"),
        ([5, 6], [0, 5, 6], True, "training lacks BOS"),
        ([0, 5, 6, 7], [0, 5], True, "the server lacks the generation prompt"),
        ([0, 5], [0, 5, 6, 7], True, "training lacks the generation prompt"),
        ([0, 5, 1], [0, 5], False, "the server lacks the EOS"),
        ([0, 5], [0, 5, 1], False, "training lacks the EOS"),
        ([0, 5, 6], [0, 5, 7], True, "from token 2 on"),
    ],
)
def test_a_difference_of_tokens_is_named(start, ours, theirs, answer_next, said):
    from transformers import AutoTokenizer

    from dpo_cli.training.template_check import difference

    tokenizer = AutoTokenizer.from_pretrained(start / "base")
    assert said in difference(ours, theirs, tokenizer, "the server", answer_next)


@pytest.fixture
def tokenizer_server(start):
    """A server that answers /tokenize with the base's own tokenizer; `change` may alter ids, given the request."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(start / "base")

    keys = []

    class Handler(BaseHTTPRequestHandler):
        change = staticmethod(lambda ids, answer_next: ids)

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            keys.append(self.headers["Authorization"])
            answer_next = body["add_generation_prompt"]
            text = tokenizer.apply_chat_template(body["messages"], tokenize=False, add_generation_prompt=answer_next)
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            answer = json.dumps({"tokens": Handler.change(ids, answer_next)}).encode()
            self.send_response(200 if self.path == "/tokenize" else 404)
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1", Handler, keys
    server.shutdown()
    thread.join()
    server.server_close()


def events(run):
    return [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]


def test_training_stops_where_the_server_sees_other_tokens(start, tmp_path, tokenizer_server, monkeypatch):
    url, handler, keys = tokenizer_server
    config = settings(
        start, start / "base", f"runs={tmp_path}", f"model.dpo_adapter={tmp_path / 'out'}", "train.max_steps=1",
        f"generate.url={url}",
    )  # fmt: skip
    for change, cause in (
        (lambda ids, answer_next: ids[:-3] if answer_next else ids, "the server lacks the generation prompt"),
        (lambda ids, answer_next: ids if answer_next else ids[:-1], "the server lacks the EOS"),
        (lambda ids, answer_next: [ids[0], *ids], "the server doubles BOS"),
    ):
        handler.change = staticmethod(change)
        with pytest.raises(UserError, match=f"template mismatch: {cause}") as stopped:
            train.run(config, Silent())
        assert stopped.value.code == Exit.FAILED and cause in str(events(tmp_path / "dpo")[-2])
        assert events(tmp_path / "dpo")[-1]["event"] == "refused"
    handler.change = staticmethod(lambda ids, answer_next: ids)
    monkeypatch.setenv("SERVE_API_KEY", "secret")
    progress = Lines()
    train.run(config, progress)
    assert keys[-1] == "Bearer secret" and keys[0] is None
    assert "tokens: 10 rows are the same tokens on the server" in progress.lines
    assert any(row["event"] == "tokens" and row["ok"] and row["rows"] == 10 for row in events(tmp_path / "dpo"))
    assert any(line.startswith("plan: 1 steps on 22 pairs (5 held out)") for line in progress.lines)


def test_an_sft_adapter_that_learnt_another_chat_template_is_named(start, tmp_path):
    """Step zero can't see it: policy and reference read the same wrong tokens."""
    from dpo_cli.demo.tiny import CHAT_TEMPLATE

    adapter = shutil.copytree(start / "sft", tmp_path / "sft")
    places = (f"runs={tmp_path / 'runs'}", f"model.dpo_adapter={tmp_path / 'out'}", "train.max_steps=1")
    config = settings(start, start / "base", f"model.adapter={adapter}", *places)
    (adapter / "chat_template.jinja").write_text(CHAT_TEMPLATE.replace("assistant\n", "assistant: "))
    with pytest.raises(UserError, match=r"template mismatch: from token .* by the SFT adapter's chat template"):
        train.run(config, Silent())
    config.gate.token_rows = 0
    assert train.run(config, Silent(), fresh=True).step == 1
    config.gate.token_rows = 10
    (adapter / "chat_template.jinja").unlink()
    (adapter / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}))
    assert train.run(config, Silent(), fresh=True).step == 1


def test_a_sweep_is_a_run_for_each_value_and_names_the_best_that_passes(start, tmp_path):
    places = [f"runs={tmp_path / 'runs'}", f"model.dpo_adapter={tmp_path / 'out'}", "train.max_steps=3"]
    config = settings(start, start / "base", "gate.kl_limit=100", *places)
    result = sweep.run(config, Silent(), "beta=0.05,0.5")
    assert [point.value for point in result.points] == [0.05, 0.5]
    passing = [point for point in result.points if point.verdict == "pass"]
    assert result.best == (max(passing, key=lambda point: (point.accuracy, -point.loss)).value if passing else None)
    assert sweep.page_path(result) == tmp_path / "runs" / "dpo-beta.html"
    assert [run.name for run in sweep.runs_of(result).values()] == ["dpo-beta-0.05", "dpo-beta-0.5"]
    assert all(len(point.accuracy_interval) == len(point.margin_interval) == 2 for point in result.points)
    for value in ("0.05", "0.5"):
        run = tmp_path / "runs" / f"dpo-beta-{value}"
        assert json.loads((run / "config.json").read_text())["config"]["train"]["beta"] == float(value)
        assert (tmp_path / f"out-beta-{value}" / "adapter_model.safetensors").exists()
    config.gate.kl_limit = 1e-9
    assert sweep.run(config, Silent(), "beta=0.05", fresh=True).best is None
    for text in ("gamma=1", "beta=", "beta"):
        with pytest.raises(UserError, match="--sweep"):
            sweep.parse(text)
    with pytest.raises(UserError, match="rank is the SFT adapter's"):
        sweep.run(config, Silent(), "r=4,8")


def test_a_merged_model_says_what_base_and_adapter_said(start, tmp_path):
    places = [f"runs={tmp_path / 'runs'}", f"model.dpo_adapter={tmp_path / 'out'}", "train.max_steps=1"]
    result = train.run(settings(start, start / "base", "train.merge=true", *places), Silent())
    assert result.merged.mean_difference < 1e-4 and result.merged.dtype == "float32"
    assert (tmp_path / "out-merged" / "model.safetensors").exists()
    assert (tmp_path / "out-merged" / "tokenizer.json").exists()


def test_a_runs_own_checkpoint_is_no_adapter_to_start_from(start, tmp_path):
    runs = tmp_path / "runs"
    save_adapter(runs / "dpo/checkpoints/checkpoint-3", start / "base")
    config = settings(start, start / "base", f"runs={runs}", f"model.adapter={runs / 'dpo/checkpoints/checkpoint-3'}")
    with pytest.raises(UserError, match="a run's own checkpoint") as refused:
        train.run(config, Silent())
    assert "--name" in refused.value.hint


def test_remedies_are_shown_for_what_the_events_name():
    assert remedies.shown_by([{"event": "loss_spike"}, {"event": "ended", "reason": "nan"}]) == ["loss_spike", "nan"]
    assert remedies.shown_by([{"event": "step_zero", "ok": True}, {"event": "tokens", "ok": True}]) == []
    assert remedies.shown_by([{"event": "tokens", "ok": False}, {"event": "step_zero", "ok": False}]) == [
        "step_zero", "tokens",
    ]  # fmt: skip


FRESH = ("model.adapter=none", "train.r=4")


@pytest.mark.parametrize(
    ("targets", "lost"),
    [
        ("all-linear", ()),
        ("q_proj,up_proj", ()),
        ("q_proj,qkv_proj,w1", ("qkv_proj", "w1")),
        (r".*layers\.1\..*_proj", ()),
    ],
)
@pytest.mark.parametrize("dora", ["false", "true"])
def test_the_plan_counts_the_weights_that_peft_trains(start, targets, lost, dora):
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    from dpo_cli.training.trainer import fresh_lora

    config = settings(start, start / "base", *FRESH, f"train.target_modules={targets}", f"train.use_dora={dora}")
    result = preflight.run(config)
    model = AutoModelForCausalLM.from_pretrained(start / "base")
    assert (
        result.trained
        == get_peft_model(model, fresh_lora(config.train, model, Silent())).get_nb_trainable_parameters()[0]
    )
    said = [text for text in result.warnings if "no layer is called" in text]
    assert said == [f"no layer is called {', '.join(lost)}: train.target_modules counts without"] * bool(lost)


def test_the_plan_counts_a_saved_adapter_as_it_is_and_refuses_targets_that_match_nothing(start, tmp_path):
    from safetensors.torch import load_file

    adapter = save_adapter(tmp_path / "one", start / "base", target_modules=["q_proj"], layers_to_transform=[1], r=2)
    held = sum(value.numel() for value in load_file(adapter / "adapter_model.safetensors").values())
    assert preflight.run(settings(start, start / "base", f"model.adapter={adapter}")).trained == held
    for targets in ("w1,w2", ".*w1"):
        with pytest.raises(UserError, match=r"no layer of the base is called .*w1"):
            preflight.run(settings(start, start / "base", *FRESH, f"train.target_modules={targets}"))
        with pytest.raises(UserError, match=r"no layer of the base is called .*w1"):
            train.run(
                settings(
                    start, start / "base", *FRESH, f"train.target_modules={targets}", f"runs={tmp_path / targets}"
                ),
                Silent(),
            )
