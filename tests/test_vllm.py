"""What `serve-config` writes, run by a real vLLM: each name answers as its adapter, and refusals are vLLM's own."""

import json
import os
import shlex
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
import vllm_server
from adapters import BROKEN, WRONG, base_model, save_adapter
from msgspec.structs import replace
from training import pair

from dpo_cli.config.resolve import resolve
from dpo_cli.data.jsonl import write_rows
from dpo_cli.engines._engine import Request as Sampling
from dpo_cli.errors import UserError
from dpo_cli.progress import Silent
from dpo_cli.stages import generate, serve_config
from dpo_cli.stages.serve_config import check as checking
from dpo_cli.stages.serve_config.server import load

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(
        vllm_server.VARIABLE not in os.environ, reason=f"no vLLM environment: {vllm_server.VARIABLE} is not set"
    ),
]

PROMPT = [
    {"role": "system", "content": "You write the next lines of a scene."},
    {"role": "user", "content": "[MABEL] You returned the umbrella?\n[OTIS] It was raining, Mabel — wasn't it? 🙂"},
]
TEXT = "[MABEL] A year! Nobody stands under anything for a year. [OTIS] It was his umbrella."


def render(config, form):
    return serve_config.render(serve_config.plan(config), config, form)


def call(url, body=None):
    """POST (or GET) JSON; the status and the reply, which may be plain text."""
    request = Request(url, json.dumps(body).encode() if body else None, {"Content-Type": "application/json"})
    try:
        with urlopen(request, timeout=300) as reply:
            status, content = reply.status, reply.read()
    except HTTPError as error:
        status, content = error.code, error.read()
    try:
        return status, json.loads(content)
    except json.JSONDecodeError:
        return status, content.decode()


def chat(url, model, **settings):
    body = {"model": model, "messages": PROMPT, "max_tokens": 24, "temperature": 0.9, "top_p": 1.0, "seed": 7}
    status, reply = call(f"{url}/chat/completions", body | settings)
    assert status == 200, reply
    return [choice["message"]["content"] for choice in reply["choices"]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vllm") / "it's a folder; $HOME"
    base = base_model(folder / "base")
    save_adapter(folder / "sft", base)
    save_adapter(folder / "dpo", base, seed=1, r=12, rank_pattern={"q_proj": 3}, alpha_pattern={"v_proj": 5})
    return folder


@pytest.fixture(scope="module")
def config(saved):
    model = {"base": saved / "base", "adapter": saved / "sft", "dpo_adapter": saved / "dpo"}
    flags = {f"model.{key}": str(value) for key, value in model.items()}
    flags |= {"serve.port": vllm_server.free_port(), "serve.dtype": "float32"}
    return resolve(flags, environment={}).config


@pytest.fixture(scope="module")
def url(saved, config):
    """The server, started from the YAML file."""
    file = saved / "serve.yaml"
    file.write_text(render(config, "yaml"))
    with vllm_server.serve(f"vllm serve --config {shlex.quote(str(file))}", saved) as address:
        yield address


def listed(url):
    return {model["id"]: (model["root"], model["parent"]) for model in call(f"{url}/models")[1]["data"]}


def expected(saved):
    base = str(saved / "base")
    return {base: (base, None), "seinfeld": (f"{saved}/sft", base), "seinfeld-dpo": (f"{saved}/dpo", base)}


def test_both_adapters_are_listed_and_answer_each_in_its_way(url, saved):
    assert listed(url) == expected(saved)
    answers = {model: chat(url, model, temperature=0)[0] for model in ("seinfeld", "seinfeld-dpo", f"{saved}/base")}
    assert len(set(answers.values())) == 3, answers


def test_the_command_line_starts_the_same_server_from_a_shell(saved, config, tmp_path):
    flags = ["--port", str(vllm_server.free_port())]
    with vllm_server.serve(render(config, "cli"), tmp_path, *flags) as address:
        assert listed(address) == expected(saved)


@pytest.mark.parametrize(("name", "folder"), [("seinfeld", "sft"), ("seinfeld-dpo", "dpo")])
def test_log_probabilities_are_those_of_the_adapter_of_that_name(url, saved, name, folder):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(saved / "base")(TEXT).input_ids
    body = {"model": name, "prompt": ids, "max_tokens": 1, "prompt_logprobs": 0}
    reply = call(f"{url}/completions", body)[1]["choices"][0]["prompt_logprobs"]
    served = [entry[str(token)]["logprob"] for token, entry in zip(ids[1:], reply[1:], strict=True)]

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(saved / "base"), saved / folder).eval()
    with torch.no_grad():
        logps = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)  # (tokens - 1, vocabulary)
    trained = logps.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
    assert served == pytest.approx(trained, abs=1e-4)


def test_three_at_once_are_the_three_of_the_next_seeds(url):
    together = chat(url, "seinfeld", n=3, seed=40)
    with ThreadPoolExecutor() as pool:
        alone = pool.map(lambda seed: chat(url, "seinfeld", seed=seed)[0], (40, 41, 42))
    assert together == list(alone)
    assert len(set(together)) == 3


def test_the_transformers_engine_sees_the_same_prompt_and_answers_the_same(url, config):
    from dpo_cli.engines import transformers as engine

    body = {"model": "seinfeld", "messages": PROMPT, "add_generation_prompt": True}
    served = call(url.removesuffix("/v1") + "/tokenize", body)[1]["tokens"]
    assert served == engine.load(config.model.base, config.model.adapter).encode(PROMPT)

    greedy = {"generate.temperature": 0, "generate.max_tokens": 48, "generate.frequency_penalty": 0.5}
    flags = {"model.base": config.model.base, "model.adapter": config.model.adapter} | greedy
    found = []
    request = Sampling(id="a", prompt=PROMPT, have=[], need=1)
    engine.sample([request], resolve(flags, environment={}).config, found.append, Silent())
    answer = chat(url, "seinfeld", temperature=0, max_tokens=48, frequency_penalty=0.5)[0]
    assert found[0].texts[0].rstrip("\ufffd") == answer.rstrip("\ufffd")  # vLLM drops a character that is cut in half


@pytest.mark.parametrize("name", sorted({*BROKEN, *WRONG}))
def test_vllm_refuses_what_is_called_broken_and_loads_what_is_called_wrong(url, saved, tmp_path, name):
    shutil.copytree(saved / "sft", tmp_path / "adapter")
    (BROKEN | WRONG)[name][0](tmp_path / "adapter")
    body = {"lora_name": f"extra {name}", "lora_path": str(tmp_path / "adapter")}
    status, reply = call(f"{url}/load_lora_adapter", body)
    assert (status == 200) == (name in WRONG), reply


def test_generate_gets_every_completion_once(url, config, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"[OTIS] Scene {number}."}) + "\n" for number in range(5)))
    flags = {"generate.prompts": str(prompts), "data": str(tmp_path), "generate.url": url, "generate.max_tokens": 16}
    first = generate.run(resolve(flags, environment={}).config, Silent())
    assert (first.completions, first.failed, first.receipt.retries) == (15, 0, 0)
    more = generate.run(resolve(flags | {"generate.n": 4}, environment={}).config, Silent())
    assert (more.completions, more.failed) == (5, 0)
    rows = [json.loads(line) for line in (tmp_path / "completions.jsonl").read_text().splitlines()]
    assert [len(set(row["completions"])) for row in rows] == [4] * 5
    assert {reason for row in rows for reason in row["finish_reasons"]} <= {"stop", "length"}
    assert 0 < first.usage.output <= 15 * 16


def swapped(config):
    """As if the server had each adapter under the other's name."""
    model = replace(config.model, adapter=config.model.dpo_adapter, dpo_adapter=config.model.adapter)
    return replace(config, model=model)


@pytest.fixture(scope="module")
def with_pairs(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    write_rows(folder / "val.jsonl", [pair(number) for number in range(20)])
    return replace(config, data=str(folder))


def check(config, url):
    return checking.check(serve_config.plan(config), config, url, Silent())


def test_check_passes_for_what_is_on_disk_and_fails_when_the_adapters_are_swapped(url, with_pairs):
    found = check(with_pairs, url)
    assert (found.verdict, found.prompts, found.notes) == ("pass", 20, [])
    for one in found.served:
        assert one.differences[one.name] < 1e-5
        assert min(value for name, value in one.differences.items() if name != one.name) > 0.1
    found = check(swapped(with_pairs), url)
    assert found.verdict == "fail"
    assert [one.reason.partition(" (")[0] for one in found.served] == [
        "answers as seinfeld-dpo", "answers as seinfeld",
    ]  # fmt: skip


def test_an_adapter_that_is_loaded_while_it_runs_is_the_one_that_answers(url, with_pairs, saved, tmp_path):
    save_adapter(tmp_path / "new", saved / "base", seed=9)
    new = replace(with_pairs, model=replace(with_pairs.model, dpo_adapter=str(tmp_path / "new")))
    assert check(new, url).verdict == "fail"
    try:
        load(serve_config.plan(new), url)
        assert check(new, url).verdict == "pass"
    finally:
        load(serve_config.plan(with_pairs), url)
    assert check(with_pairs, url).verdict == "pass"
    with pytest.raises(UserError, match=r"seinfeld-dpo: .*No adapter found"):
        plan = serve_config.plan(with_pairs)
        plan.adapters["seinfeld-dpo"].path = tmp_path / "none"
        load(plan, url)


def test_a_point_beyond_both_adapters_is_one_adapter_that_the_server_loads(url, with_pairs, saved, tmp_path):
    """Its log-probabilities are those of PEFT, and not those of the adapter that it goes on from."""
    from dpo_cli.training.scale_adapter import scale_adapter

    base = str(saved / "base")
    far = save_adapter(tmp_path / "far", saved / "base", seed=9)
    made = scale_adapter(saved / "sft", far, tmp_path / "scaled", 1.5, base)
    assert made.rank == 8  # 4 and 4
    scaled, whole = (
        replace(with_pairs, model=replace(with_pairs.model, dpo_adapter=str(folder))) for folder in (made.path, far)
    )
    try:
        load(serve_config.plan(scaled), url)
        assert check(scaled, url).verdict == "pass"
        assert check(whole, url).verdict == "fail"
    finally:
        load(serve_config.plan(with_pairs), url)


def test_run_becomes_the_server_and_in_bfloat16_check_still_tells_which_is_which(saved, with_pairs, tmp_path):
    """Its settings come from a file; without `runtime_loading` it loads nothing while it runs."""
    port = vllm_server.free_port()
    model = {"base": saved / "base", "adapter": saved / "sft", "dpo_adapter": saved / "dpo"}
    (tmp_path / "nothing-dpo.toml").write_text(
        "[model]\n" + "".join(f"{key} = {json.dumps(str(value))}\n" for key, value in model.items())
        + f"[serve]\nport = {port}\ndtype = 'bfloat16'\n[serve.arguments]\n"
        + "distributed-executor-backend = 'uni'\nenable_chunked_prefill = false\nmax-num-batched-tokens = 4096\n"
        + "kv-cache-memory-bytes = 268435456\n"
    )  # fmt: skip
    command = f"env -u VLLM_ALLOW_RUNTIME_LORA_UPDATING {shlex.quote(sys.executable)} -m dpo_cli serve-config --run"
    command += f" --config {shlex.quote(str(tmp_path / 'nothing-dpo.toml'))}"
    with vllm_server.serve(command, tmp_path, small=[]) as address:
        half = replace(with_pairs, serve=replace(with_pairs.serve, dtype="bfloat16"))
        found = check(half, address)
        assert found.verdict == "pass"
        assert all(1e-4 < one.differences[one.name] < 6e-2 for one in found.served)
        assert check(swapped(half), address).verdict == "fail"
        assert check(with_pairs, address).verdict == "fail"  # not in float32, as these settings say
        with pytest.raises(UserError, match="loads no adapters while it runs"):
            load(serve_config.plan(with_pairs), address)
