"""Forgetting, by lm-evaluation-harness itself: a task of a file, two adapters of a tiny model, no network."""

import json
import math
import sys
from pathlib import Path

import pytest
from test_evaluate import two_adapters

from dpo_cli import errors
from dpo_cli.config.settings import Config
from dpo_cli.data.jsonl import write_rows
from dpo_cli.errors import UserError
from dpo_cli.progress import Silent
from dpo_cli.stages.evaluate import harness

TASK = """
task: kettles
dataset_path: json
dataset_kwargs: {{data_files: "{rows}"}}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: label
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def test_without_the_extra_its_install_command_is_named(monkeypatch):
    monkeypatch.setitem(errors.EXTRAS, "harness", "no_such_module")
    with pytest.raises(UserError) as error:
        harness.harness(Config(), Silent(), ["arc_easy"])
    assert error.value.hint == "pip install 'nothing-dpo[harness]'"


def test_a_file_that_is_no_task_is_named(tmp_path):
    pytest.importorskip("lm_eval")
    (tmp_path / "bad.yaml").write_text("group: x")
    with pytest.raises(UserError, match="no task"):
        harness.harness(Config(), Silent(), [str(tmp_path / "bad.yaml")])


def test_both_adapters_are_scored_as_by_hand(tmp_path: Path):
    """Accuracy is the share of the rows whose right ending has the higher log-probability under the adapter."""
    pytest.importorskip("lm_eval")
    import torch

    from dpo_cli.engines.transformers import load

    endings = ["sing at noon", "of the laundromat"]
    rows = [{"question": f"all the kettles {'and ' * n}nobody", "choices": endings, "label": n % 2} for n in range(8)]
    write_rows(tmp_path / "rows.jsonl", rows)
    (tmp_path / "kettles.yaml").write_text(TASK.format(rows=tmp_path / "rows.jsonl"))
    settings = two_adapters(tmp_path)
    result = harness.harness(settings, Silent(), [str(tmp_path / "kettles.yaml")])
    (score,) = [score for score in result.scores if score.metric == "acc"]

    def accuracy(adapter: str | None) -> float:
        model = load(settings.model.base, adapter)

        def log_prob(question: str, ending: str) -> float:
            start = len(model.tokenizer(question)["input_ids"])
            ids = torch.tensor([model.tokenizer(question + ending)["input_ids"]])
            found = model.network(ids).logits[0].log_softmax(-1)
            return sum(found[place - 1, ids[0, place]].item() for place in range(start, ids.shape[1]))

        likelier = [max((0, 1), key=lambda i: log_prob(row["question"], f" {endings[i]}")) for row in rows]
        return sum(best == row["label"] for best, row in zip(likelier, rows, strict=True)) / len(rows)

    assert (score.reference, score.policy) == (accuracy(settings.model.adapter), accuracy(settings.model.dpo_adapter))
    assert score.policy_error == pytest.approx(math.sqrt(score.policy * (1 - score.policy) / 7), abs=1e-6)
    assert json.loads((tmp_path / "evaluation.harness.json").read_text())["scores"][0]["task"] == "kettles"
    assert "lm_eval" in sys.modules
