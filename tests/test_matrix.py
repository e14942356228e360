"""Every architecture and every kind of adapter from base to merged model: a spread of them here, all by --matrix.

Each cell is a real run of few steps on a tiny model of transformers' own class. `python tests/test_matrix.py` prints
the tables of the README from these very data.
"""

import shutil
from pathlib import Path

import pytest
from architectures import ARCHITECTURES, make, save_adapter
from training import AtStep, Lines, exit_code_of, kill_this_process, metrics, settings, write_data, write_rows

from dpo_cli.errors import UserError
from dpo_cli.progress import Silent
from dpo_cli.stages import generate, serve_config, train

SPREAD = ("qwen3_5_text", "qwen3_moe", "gemma3_text", "gpt2")  # in every run of the tests; the others by --matrix
# kind -> (what PEFT is told, what the base is made with, what vLLM does not serve of it)
ADAPTERS = {
    "plain": ({}, {}, None),
    "rslora": ({"use_rslora": True}, {}, None),
    "dora": ({"use_dora": True}, {}, "DoRA"),
    "modules_to_save": ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, {}, "modules_to_save"),
    "trained biases": ({"bias": "lora_only"}, {}, "bias = lora_only"),
    "trained tokens": ({"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [1, 2]}}, {},
                       "trainable_token_indices"),
    "embedding": ({"target_modules": ["q_proj", "embed_tokens"]}, {}, None),
    "embedding, tied head": ({"target_modules": ["q_proj", "embed_tokens"]}, {"tie_word_embeddings": True}, None),
    "rank_pattern": ({"rank_pattern": {"q_proj": 2}}, {}, None),
    "one layer": ({"target_modules": ["q_proj"], "layers_to_transform": [1]}, {}, None),
    ".bin": ({}, {}, None),
    "moved base": ({}, {}, None),
    "sharded base": ({}, {}, None),
}  # fmt: skip
ADAPTER_SPREAD = ("dora", "trained biases", "embedding, tied head", "moved base")
FEW = ("train.max_steps=4", "gate.kl_limit=100", "train.learning_rate=1e-3", "gate.retreat=false")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    import torch

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("data")
    write_data(folder)
    return folder / "data"


def cells(names, spread):
    return [name if name in spread else pytest.param(name, marks=pytest.mark.matrix) for name in names]


def goes_through(folder, base, data, *sets):
    """DPO with KL sampling, sampling from the result, merging it."""
    from dpo_cli.training.merge_adapter import merge

    config = settings(folder, base, f"data={data}", *FEW, *sets)
    progress = Lines()
    result = train.run(config, progress)
    assert abs(result.step_zero.loss - 0.693147) < 1e-5 and result.step_zero.margin < 1e-5
    assert result.metrics["eval_kl_nats_per_token"] >= 0
    more = (f"data={folder / 'sampled'}", f"generate.prompts={data / 'val.jsonl'}", "generate.max_tokens=6",
            "generate.engine=transformers", f"model.adapter={folder / 'out'}")  # fmt: skip
    assert generate.run(settings(folder, base, *more), Silent()).completions > 0
    made = merge(base, folder / "out", folder / "merged", ["the kettle sings"])
    assert made.mean_difference < 1e-5 and made.effect > made.mean_difference
    return config, result, progress


@pytest.mark.parametrize("kind", cells(ARCHITECTURES, SPREAD))
def test_an_architecture_goes_from_base_to_merged_model(tmp_path, data, kind):
    base = make(tmp_path / "base", kind)
    save_adapter(tmp_path / "sft", base, **({"exclude_modules": ["router"]} if kind.startswith("llama4") else {}))
    config, _, _ = goes_through(tmp_path, base, data)
    if kind != "gpt2":  # vLLM has no LoRA for it
        assert serve_config.plan(config).arguments["max-loras"] == 2
    # Exact resume: killed between two checkpoints, the run ends as the one that was not.
    again = settings(tmp_path, base, f"data={data}", f"runs={tmp_path / 'again'}",
                     f"model.dpo_adapter={tmp_path / 'second'}", *FEW)  # fmt: skip
    assert exit_code_of(lambda: train.run(again, AtStep(4, kill_this_process))) < 0
    assert train.run(again, Silent()).resumed_from == 3
    assert metrics(tmp_path / "again" / "dpo") == metrics(tmp_path / "runs" / "dpo")
    weights = [folder / "adapter_model.safetensors" for folder in (tmp_path / "out", tmp_path / "second")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    rows = [{"prompt": [{"role": "user", "content": f"count {n}"}], "completion": f"that is {n}"} for n in range(9)]
    demonstrations = write_rows(tmp_path / "demonstrations.jsonl", rows)
    fresh = settings(tmp_path, base, f"model.adapter={tmp_path / 'fresh'}", "sft.max_steps=2")
    assert train.run(fresh, Silent(), stage="sft", name="sft", data=demonstrations).verdict is not None


@pytest.mark.parametrize("kind", cells(ADAPTERS, ADAPTER_SPREAD))
def test_a_kind_of_adapter_trains_all_its_tensors_and_merges(tmp_path, data, kind):
    from peft.utils.save_and_load import load_peft_weights

    asked, changes, unserved = ADAPTERS[kind]
    base = make(tmp_path / "base", "llama", **changes)
    save_adapter(tmp_path / "sft", base, **asked)
    base = BY_HAND.get(kind, lambda folder: folder / "base")(tmp_path)
    config, _, progress = goes_through(tmp_path, base, data)
    before, after = (load_peft_weights(str(tmp_path / name), device="cpu") for name in ("sft", "out"))
    kept = {name for name in before.keys() & after.keys() if before[name].equal(after[name])}
    assert before.keys() >= after.keys() and not kept, f"not trained: {kept}"
    if unserved is None:
        assert "seinfeld-dpo" in serve_config.plan(config).adapters
    else:
        assert any("vLLM does not serve" in line and unserved in line for line in progress.lines), progress.lines
        with pytest.raises(UserError, match=unserved) as refused:
            serve_config.plan(config)
        assert "--merge" in refused.value.hint


def pickled(folder: Path) -> Path:
    import torch
    from safetensors.torch import load_file

    file = folder / "sft" / "adapter_model.safetensors"
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()
    return folder / "base"


def moved(folder: Path) -> Path:
    """The same weights in a folder of another name, the one that the adapter names being there as well."""
    shutil.copytree(folder / "base", folder / "elsewhere")
    return folder / "elsewhere"


def sharded(folder: Path) -> Path:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    (folder / "base" / "model.safetensors").unlink()
    model.save_pretrained(folder / "base", max_shard_size="20KB")
    assert (folder / "base" / "model.safetensors.index.json").is_file()
    return folder / "base"


BY_HAND = {".bin": pickled, "moved base": moved, "sharded base": sharded}


def tables() -> str:
    """What is tried, as the README shows it; which forward a model takes is asked of the model."""
    forwards: dict[str, list[str]] = {}
    for kind in ARCHITECTURES:
        forwards.setdefault(forward_of(kind), []).append(kind)
    lines = ["| forward | architectures |", "|---|---|"]
    lines += [f"| {name} | {', '.join(kinds)} |" for name, kinds in forwards.items()]
    lines += ["", "| served by vLLM | adapters |", "|---|---|"]
    for name, served in (("as they are", True), ("merged", False)):
        kinds = [kind for kind, (_, _, unserved) in ADAPTERS.items() if (unserved is None) == served]
        lines.append(f"| {name} | {'; '.join(kinds)} |")
    return "\n".join(lines)


def forward_of(kind: str) -> str:
    """Packed, or TRL's own and why, for rows of 256 tokens."""
    import tempfile

    from transformers import AutoModelForCausalLM

    from dpo_cli.training.forward.packed import unsupported

    with tempfile.TemporaryDirectory() as folder:
        reason = unsupported(AutoModelForCausalLM.from_pretrained(make(Path(folder) / "base", kind)), 256)
    return "packed" if reason is None else f"TRL's: {reason}"


if __name__ == "__main__":
    print(tables())
