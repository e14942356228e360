"""What the policy has forgotten: against PEFT and transformers alone, and what is said where a result is no better."""

import json
import math
from types import SimpleNamespace

import pytest
from adapters import base_model, save_adapter

from dpo_cli.config.resolve import resolve
from dpo_cli.errors import UserError
from dpo_cli.progress import Silent
from dpo_cli.stages.evaluate import findings, forgetting
from dpo_cli.stages.evaluate.forgetting import GENERAL, SFT, Scored, gates_of
from dpo_cli.stages.evaluate.gates import refusals
from dpo_cli.stages.evaluate.results import Sides
from dpo_cli.stages.evaluate.win_rate import repetition, share_of_wins
from dpo_cli.training import guards
from dpo_cli.training.gates import Gate
from dpo_cli.training.guards import GuardState, rises_steadily

LINES = ["It was his umbrella.", "Nobody asked you to sit.", "The soup is closed.", "I returned it twice, in June."]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A base, two adapters, and demonstrations of which SFT holds out all of val.jsonl."""
    folder = tmp_path_factory.mktemp("forgetting")
    base = base_model(folder / "base")
    save_adapter(folder / "sft", base)
    save_adapter(folder / "dpo", base, seed=7)
    rows = [{"prompt": f"[MABEL] Line {number}?", "completion": f"[OTIS] {line}"} for number, line in enumerate(LINES)]
    for name in ("train", "val", "general"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """What is measured is kept under `data`."""
    monkeypatch.chdir(tmp_path)


WHO = ["sft", "dpo"]


def settings(folder, *sets):
    places = [f"model.base={folder / 'base'}", f"model.adapter={folder / 'sft'}", f"model.dpo_adapter={folder / 'dpo'}",
              f"generate.prompts={folder}", "generate.engine=transformers"]  # fmt: skip
    return resolve(sets=[*places, *sets], environment={}).config


def test_the_change_is_what_peft_alone_computes(work):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = forgetting.measure(settings(work), Silent(), WHO)[SFT]
    tokenizer = AutoTokenizer.from_pretrained(work / "base")
    sums, tokens = {"sft": 0.0, "dpo": 0.0}, 0
    for number, line in enumerate(LINES):
        head = [{"role": "user", "content": f"[MABEL] Line {number}?"}]
        whole = [*head, {"role": "assistant", "content": f"[OTIS] {line}"}]
        prompt = tokenizer.apply_chat_template(head, add_generation_prompt=True, return_dict=False)
        ids = tokenizer.apply_chat_template(whole, return_dict=False)
        while ids[-1] != tokenizer.eos_token_id:  # what a template writes after the turn's end is not scored
            ids = ids[:-1]
        tokens += len(ids) - len(prompt)
        for name in sums:
            model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(work / "base"), work / name).eval()
            with torch.no_grad():
                log_probs = model(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
            sums[name] -= sum(log_probs[at - 1, ids[at]].item() for at in range(len(prompt), len(ids)))
    assert (found.rows, found.tokens) == (4, tokens)
    assert found.reference == pytest.approx(sums["sft"] / tokens, abs=1e-4)
    assert found.policy == pytest.approx(sums["dpo"] / tokens, abs=1e-4)
    assert found.change.value == pytest.approx(found.policy - found.reference)
    assert found.change.low < found.change.value < found.change.high


def test_an_adapter_against_itself_has_forgotten_nothing(work):
    found = forgetting.measure(settings(work, f"model.dpo_adapter={work / 'sft'}"), Silent(), WHO)
    assert found[SFT].change.value == found[SFT].change.high == 0
    assert gates_of(found, 0.1)[SFT].verdict == "pass"


def test_the_general_file_is_measured_too_and_must_be_there(work):
    found = forgetting.measure(settings(work, f"evaluate.general={work / 'general.jsonl'}"), Silent(), WHO)
    assert found[GENERAL].policy == pytest.approx(found[SFT].policy) and found[GENERAL].source.endswith("general.jsonl")
    with pytest.raises(UserError, match="no such file"):
        forgetting.measure(settings(work, "evaluate.general=nowhere.jsonl"), Silent(), WHO)
    assert forgetting.measure(settings(work, "evaluate.forgetting_rows=0"), Silent(), WHO) == {}


def test_prompts_alone_and_a_server_leave_nothing_to_measure_with(work, tmp_path):
    (tmp_path / "val.jsonl").write_text(json.dumps({"prompt": "[MABEL] Soup?"}) + "\n")
    assert forgetting.measure(settings(work, f"generate.prompts={tmp_path}"), Silent(), WHO) == {}
    assert forgetting.measure(settings(work, "generate.engine=endpoint"), Silent(), WHO) == {}


@pytest.mark.parametrize(("change", "spread", "verdict"), [(0.3, 0.05, "fail"), (0.05, 0.01, "pass"),
                                                           (0.12, 0.3, "not shown")])  # fmt: skip
def test_it_fails_where_the_loss_is_beyond_the_limit_and_its_noise(change, spread, verdict):
    rows = [Scored("x", 10.0, 10.0 + 10 * (change + spread * sign), 10) for sign in (-1, 1) for _ in range(20)]
    found = forgetting._compare("x", rows, 0.95)
    assert found.change.error == pytest.approx(spread * math.sqrt(40 / 39) / math.sqrt(40))
    gates = gates_of({SFT: found}, 0.1)
    assert gates[SFT].verdict == verdict
    assert refusals(gates) == ([SFT] if verdict == "fail" else [])  # nobody asked for this gate


def test_what_was_asked_for_and_is_not_shown_is_refused():
    open_gate = Gate(0.6, 0.5, None, (0.4, 0.8))
    assert refusals({"win-rate": open_gate, SFT: open_gate}) == ["win-rate"]


def test_repetition_by_hand():
    assert repetition(["a b c d e f"]) == 0
    # abcd bcda cdab dabc abcd: five, four of them new
    assert repetition(["a b c d a b c d"]) == pytest.approx(1 / 5)
    assert repetition(["a b c d a b c d", "x"]) == pytest.approx(1 / 10)


def test_a_few_prompts_that_all_win_show_less_than_many():
    few, many = (share_of_wins([1.0] * n, 200, 0) for n in (3, 40))
    assert few.low < 0.5 < many.low and few.high == many.high == 1
    assert share_of_wins([1.0, 0.0, 1.0, 0.0], 200, 0).low < 0.5


def evaluation(**changes):
    known = {"win_rate": 0.5, "interval": (0.4, 0.6), "length_controlled_interval": (0.4, 0.6), "position": {},
             "lengths": Sides(10, 10), "judge": {}, "sides": {}, "forgetting": {}, "repetition": None, "gates": {},
             "kl": None}  # fmt: skip
    return SimpleNamespace(**(known | changes))


@pytest.mark.parametrize(("changes", "said"), [
    ({}, "No effect: "),
    ({"kl": SimpleNamespace(nats_per_token=0.001)}, "Too conservative: "),
    ({"gates": {SFT: Gate(0.4, 0.1, False)}}, "Forgetting: "),
])  # fmt: skip
def test_the_remedies_are_those_of_the_symptom(changes, said):
    row = SimpleNamespace(reference=["a"], policy=["b"])
    assert any(text.startswith(said) and "Try: " in text for text in findings.find(evaluation(**changes), [row]))


def test_a_clear_win_needs_no_remedy():
    row = SimpleNamespace(reference=["a"], policy=["b"])
    assert findings.find(evaluation(interval=(0.6, 0.7), length_controlled_interval=(0.6, 0.7)), [row]) == []


def test_a_loss_that_rises_steadily_is_found_and_noise_is_not():
    assert rises_steadily([0.70, 0.71, 0.72, 0.74, 0.73, 0.76, 0.78, 0.80])
    assert not rises_steadily([0.70, 0.69, 0.71, 0.70, 0.72, 0.69, 0.71, 0.70])
    assert not rises_steadily([0.70, 0.71, 0.72])
    rows = [
        {"step": step, "loss": loss, "eval": 0}
        for step, loss in enumerate([0.693, *(0.7 + 0.01 * i for i in range(8))])
    ]
    rows.append({"step": 9, "eval_loss": 0.7})
    found = guards.after_log(GuardState(), rows[:-1], resolve(environment={}).config.gate)
    assert [(one.fault, one.action) for one in found] == [("loss_rises", "warn")]


def test_nothing_is_measured_twice_and_another_adapter_is_measured_anew(work, monkeypatch):
    from dpo_cli.stages.evaluate import adapters

    first = forgetting.measure(settings(work), Silent(), WHO)
    monkeypatch.setattr(adapters, "load_both", lambda config: pytest.fail("models are loaded"))
    assert forgetting.measure(settings(work), Silent(), WHO) == first
    with pytest.raises(pytest.fail.Exception, match="models are loaded"):
        forgetting.measure(settings(work), Silent(), ["sft", "another"])
