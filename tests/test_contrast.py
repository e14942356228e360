"""A good and a bad answer a prompt, from two system prompts: ordinary completions that a judge must still believe."""

import pytest
from judging import config as judge_config
from openai_server import Server, first, scene
from test_generate import SYSTEM, folder, messages, rows, run, short_backoff

from dpo_cli.config.settings import GenerateSection
from dpo_cli.data.records import prompt_id
from dpo_cli.engines._contrast import split
from dpo_cli.engines._engine import Request
from dpo_cli.errors import UserError
from dpo_cli.progress import Silent
from dpo_cli.stages import judge
from dpo_cli.stages.pair import run as pair

__all__ = ["folder", "short_backoff"]

GOOD, BAD = "Answer well.", "Answer badly."
CONTRAST = {"generate__contrast": True, "generate__good_system": GOOD, "generate__bad_system": BAD}


def side(body):
    return GOOD if GOOD in body["messages"][0]["content"] else BAD


def test_each_prompt_has_one_completion_of_each_kind_in_that_order(folder):
    with Server() as server:
        result = run(server, **CONTRAST)
        assert (result.completions, result.receipt.calls) == (24, 24)
        made = {(body["messages"][1]["content"], side(body)): scene(body, 0)[0] for body in server.bodies}
    for number in range(12):
        row = rows(folder)[prompt_id(messages(number))]
        text = messages(number)[1]["content"]
        assert row.prompt == messages(number)  # without the system prompt that it was made from
        assert row.completions == [made[text, GOOD], made[text, BAD]]
        assert row.sampling["contrast"] == {"good": GOOD, "bad": BAD}
    assert {body["messages"][0]["content"] for body in server.bodies} == {
        f"{SYSTEM['content']}\n\n{GOOD}", f"{SYSTEM['content']}\n\n{BAD}",
    }  # fmt: skip


def test_a_prompt_without_a_system_text_gets_one():
    request = Request(id="x", prompt=[{"role": "user", "content": "Hello"}], have=[], need=2)
    good, bad = split(request, GOOD, BAD)
    assert good.prompt == [{"role": "system", "content": GOOD}, {"role": "user", "content": "Hello"}]
    assert bad.prompt[0]["content"] == BAD
    (again,) = split(Request(id="x", prompt=request.prompt, have=["same", "same"], need=1), GOOD, BAD)
    assert (again.prompt, again.id not in (good.id, bad.id)) == (bad.prompt, True)


def test_identical_sides_are_sampled_once_more_from_the_bad_one(folder):
    with Server() as server:
        server.fault = lambda call: "reply!same" if call.number <= 24 else None
        result = run(server, **CONTRAST)
        assert {side(body) for body in server.bodies[24:]} == {BAD}
    assert (result.identical, len(server.bodies)) == (0, 36)
    assert all(row.completions[0] == "same" != row.completions[1] for row in rows(folder).values())


def test_one_side_that_fails_is_owed_alone(folder):
    with Server() as server:
        server.fault = lambda call: "400!too long" if side(call.body) == BAD and "scene 3." in call.text else None
        result = run(server, **CONTRAST)
        assert (result.failed, len(rows(folder))) == (1, 11)
        server.fault = None
        result = run(server, **CONTRAST)
        assert (result.receipt.calls, result.receipt.reused, result.failed) == (1, 1, 0)
    assert len(rows(folder)) == 12


def test_an_external_model_makes_both_with_its_own_key(folder, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-strong")
    with Server(models=["strong"], api_key="sk-strong", fault=first(1, "400:frequency_penalty")) as strong:
        external = {"generate__contrast_url": strong.url, "generate__contrast_model": "strong"}
        assert run(None, **CONTRAST, **external).completions == 24
    assert {row.model for row in rows(folder).values()} == {"strong"}
    assert strong.keys == {"sk-strong"}


def test_the_two_kinds_of_rows_do_not_mix(folder):
    with Server() as server:
        run(server, **CONTRAST)
        with pytest.raises(UserError, match="contrast"):
            run(server)
        with pytest.raises(UserError, match="contrast"):
            run(server, **CONTRAST | {"generate__bad_system": "Answer otherwise."})


def test_the_estimate_counts_both(folder):
    found = run(Server(port=9), dry_run=True, **CONTRAST, generate__price="1,0.1,10").estimate
    assert (found.calls, found.output_worst) == (24, 24 * GenerateSection().max_tokens)


def test_the_judge_decides_which_is_chosen(folder):
    def fault(call):
        if call.body["model"] == "judge-small":
            return None
        # In scene 0 the answer that was meant to be bad is the better one.
        better = (side(call.body) == GOOD) != ("scene 0." in call.text)
        return "reply![OTIS] " + ("A long and careful answer to all of it. " * 5 if better else "Well.")

    with Server(fault=fault) as server:
        run(server, **CONTRAST)
        settings = judge_config(folder / "data" / "dpo", server.url)
        judge.run(settings, Silent())
        pair.run(settings)
    pairs = [row for name in ("train", "val") for row in _pairs(folder / "data" / "dpo" / f"{name}.jsonl")]
    assert len(pairs) == 12
    completions = rows(folder)
    prompts = {prompt_id(one.prompt): one.chosen[0]["content"] for one in pairs}
    chosen = {key: completions[key].completions.index(text) for key, text in prompts.items()}
    assert chosen == {key: int(key == prompt_id(messages(0))) for key in completions}


def _pairs(path):
    from dpo_cli.data.jsonl import read_rows
    from dpo_cli.data.records import Preference

    return [row for _, row in read_rows(path, Preference)]
