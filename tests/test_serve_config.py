"""Which adapters are refused and why, and what is written for those that are served."""

import json
import shlex
import shutil
from pathlib import Path

import pytest
import yaml
from adapters import BROKEN, WRONG, base_model, edit_settings, edit_weights, save_adapter

from dpo_cli.adapter import check_adapter
from dpo_cli.config.resolve import resolve
from dpo_cli.errors import Exit, UserError
from dpo_cli.stages import serve_config
from dpo_cli.stages.serve_config.plan import plan
from dpo_cli.stages.serve_config.server import start


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A base and two adapters on it, of ranks 4 and 12."""
    folder = tmp_path_factory.mktemp("saved")
    base = base_model(folder / "base")
    save_adapter(folder / "sft", base)
    save_adapter(folder / "dpo", base, seed=1, rank_pattern={"q_proj": 12})
    return folder


@pytest.fixture
def work(saved, tmp_path):
    """A copy of them to break."""
    shutil.copytree(saved, tmp_path / "work")
    edit_settings(base_model_name_or_path=str(tmp_path / "work/base"))(tmp_path / "work/sft")
    return tmp_path / "work"


def render(config, form):
    return serve_config.render(plan(config), config, form)


def settings(folder: Path, **flags):
    model = {"base": folder / "base", "adapter": folder / "sft", "dpo_adapter": folder / "dpo"}
    flags = {f"model.{key}": str(value) for key, value in model.items()} | flags
    return resolve(flags, environment={}).config


def test_both_adapters_are_served_under_their_names_at_the_rank_they_need(saved):
    content = json.loads(render(settings(saved), "json"))
    assert [(module["name"], module["path"]) for module in content["lora_modules"]] == [
        ("seinfeld", str(saved / "sft")),
        ("seinfeld-dpo", str(saved / "dpo")),
    ]
    assert content["model"] == str(saved / "base")
    assert content["arguments"]["max-loras"] == 2
    assert content["arguments"]["max-lora-rank"] == 16  # the smallest allowed that holds the 12 of one module
    assert content["arguments"]["enable-lora"] is True


def test_every_serve_setting_reaches_the_command(saved):
    values = {"host": "0.0.0.0", "port": 8123, "dtype": "float16", "max_model_len": 512,
              "gpu_memory_utilization": 0.5, "chat_template": "/templates/a.jinja"}  # fmt: skip
    words = shlex.split(render(settings(saved, **{f"serve.{key}": value for key, value in values.items()}), "cli"))
    for key, value in values.items():
        assert words[words.index(f"--{key.replace('_', '-')}") + 1] == str(value)


def test_all_formats_say_the_same(saved):
    config = settings(saved, **{"model.name": 'it\'s $HOME; `a` \\ "b"'})
    as_json = json.loads(render(config, "json"))
    as_yaml = yaml.safe_load(render(config, "yaml"))
    words = shlex.split(render(config, "cli"))
    assert as_yaml.pop("model") == words[2] == as_json["model"]
    assert [json.loads(module) for module in as_yaml.pop("lora-modules")] == as_json["lora_modules"]
    assert [json.loads(word) for word in words[words.index("--lora-modules") + 1 :]] == as_json["lora_modules"]
    assert as_yaml == as_json["arguments"]
    assert not any("_" in key for key in as_yaml)  # vLLM drops `some_key: false` without a word


def test_the_chat_template_has_the_variables_of_training(saved):
    words = shlex.split(render(settings(saved, **{"model.chat_template_kwargs": {"date_string": "1 May 2020"}}), "cli"))
    assert json.loads(words[words.index("--default-chat-template-kwargs") + 1]) == {"date_string": "1 May 2020"}
    assert "--default-chat-template-kwargs" not in render(settings(saved, **{"model.chat_template_kwargs": {}}), "cli")


def test_an_unknown_format_is_refused(saved):
    with pytest.raises(UserError, match="xml") as caught:
        render(settings(saved), "xml")
    assert "cli, json, yaml" in caught.value.hint


def test_without_a_dpo_adapter_the_sft_adapter_is_served_alone(saved):
    made = plan(settings(saved, **{"model.dpo_adapter": str(saved / "none")}))
    assert list(made.adapters) == ["seinfeld"]
    assert made.arguments["max-loras"] == 1
    assert made.arguments["max-lora-rank"] == 8
    assert any("no DPO adapter" in note for note in made.notes)


def test_an_adapter_that_was_trained_on_the_bare_base_is_served_alone(saved):
    config = settings(saved)
    config.model.adapter = None
    assert list(plan(config).adapters) == ["seinfeld-dpo"]


def test_no_adapter_at_all_is_refused(saved):
    with pytest.raises(UserError, match="no adapter at"):
        plan(settings(saved, **{"model.adapter": "none", "model.dpo_adapter": "none"}))


@pytest.mark.parametrize("name", [*BROKEN, *WRONG])
def test_an_adapter_that_vllm_could_not_serve_is_refused_with_the_reason(work, name):
    break_it, words = (BROKEN | WRONG)[name]
    break_it(work / "sft")
    with pytest.raises(UserError) as caught:
        plan(settings(work))
    assert words in str(caught.value)
    assert str(work / "sft") in str(caught.value)
    assert caught.value.code == Exit.USAGE


def test_a_pickled_adapter_is_read_as_data_and_one_in_a_subfolder_is_pointed_out(work):
    import torch
    from safetensors.torch import load_file

    as_saved = check_adapter(work / "dpo", str(work / "base"))
    tensors = load_file(work / "dpo/adapter_model.safetensors")
    (work / "dpo/adapter_model.safetensors").unlink()
    torch.save(tensors, work / "dpo/adapter_model.bin")
    pickled = check_adapter(work / "dpo", str(work / "base"))
    assert (pickled.rank, pickled.target_modules) == (as_saved.rank, as_saved.target_modules)
    torch.save(tensors | {"x": Path("/")}, work / "dpo/adapter_model.bin")
    with pytest.raises(UserError, match="it names pathlib"):
        check_adapter(work / "dpo", str(work / "base"))
    with pytest.raises(UserError) as caught:
        check_adapter(work, str(work / "base"))
    assert str(work / "dpo") in caught.value.hint


def test_what_peft_saves_beside_plain_lora_is_accepted(saved, tmp_path):
    modules = ["q_proj", "embed_tokens", "lm_head"]
    save_adapter(tmp_path / "rs", saved / "base", target_modules=modules, use_rslora=True, alpha_pattern={"q_proj": 2})
    adapter = check_adapter(tmp_path / "rs", str(saved / "base"))
    assert adapter.target_modules == sorted(modules)
    assert (adapter.rank, adapter.alpha) == (4, 8)


@pytest.mark.parametrize(
    ("trained_on", "served", "same"),
    [
        ("meta-llama/Llama-3.2-3B-Instruct", "meta-llama/Llama-3.2-3B-Instruct", True),
        ("unsloth/llama-3.2-3b-instruct-unsloth-bnb-4bit", "meta-llama/Llama-3.2-3B-Instruct", True),
        ("/c/hub/models--meta-llama--Llama-3.2-3B-Instruct/snapshots/0cb8", "meta-llama/Llama-3.2-3B-Instruct", True),
        ("/elsewhere/Llama-3.2-3B-Instruct/", "/vol/Llama-3.2-3B-Instruct", True),
        (None, "meta-llama/Llama-3.2-3B-Instruct", True),
        ("meta-llama/Llama-3.2-1B-Instruct", "meta-llama/Llama-3.2-3B-Instruct", False),
        ("meta-llama/Llama-3.2-3B", "meta-llama/Llama-3.2-3B-Instruct", False),
    ],
)
def test_bases_are_compared_by_what_they_are(work, monkeypatch, trained_on, served, same):
    monkeypatch.setenv("HF_HUB_CACHE", str(work / "empty"))
    edit_settings(base_model_name_or_path=trained_on)(work / "sft")
    if same:
        assert check_adapter(work / "sft", served).base == trained_on
    else:
        with pytest.raises(UserError, match="was trained on") as caught:
            check_adapter(work / "sft", served)
        assert f"BASE_MODEL={trained_on}" in caught.value.hint


def test_a_base_in_the_hub_cache_is_read_there(work, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(work / "hub"))
    snapshot = work / "hub/models--tiny--base/snapshots/abc"
    shutil.copytree(work / "base", snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs/main").write_text("abc")
    made = plan(settings(work, **{"model.base": "tiny/base"}))
    assert made.model == "tiny/base"
    assert made.arguments["max-model-len"] == 2048
    BROKEN["other shape"][0](work / "sft")
    with pytest.raises(UserError, match=r"is \[64, 192\] in tiny/base"):
        plan(settings(work, **{"model.base": "tiny/base"}))


def test_a_context_longer_than_the_base_has_is_cut_and_told(saved):
    made = plan(settings(saved))
    assert made.arguments["max-model-len"] == 2048
    assert any("2048" in note and "4096" in note for note in made.notes)
    assert plan(settings(saved, **{"serve.max_model_len": 512})).arguments["max-model-len"] == 512


def test_a_chat_template_that_vllm_would_ignore_is_told(work):
    def notes(**flags):
        return [note for note in plan(settings(work, **flags)).notes if "chat template" in note]

    template = (work / "base/chat_template.jinja").read_text()
    (work / "dpo/chat_template.jinja").write_text(template)
    assert not notes()
    (work / "dpo/chat_template.jinja").write_text(template + "{# other #}")
    assert notes() and notes()[0].startswith("seinfeld-dpo")
    assert not notes(**{"serve.chat_template": str(work / "dpo/chat_template.jinja")})


def test_adapters_that_change_nothing_or_are_one_and_the_same_are_told(work):
    edit_weights(lambda tensors: [tensor.zero_() for key, tensor in tensors.items() if "lora_B" in key])(work / "sft")
    assert "seinfeld: changes nothing: every lora_B is zero" in plan(settings(work)).notes
    made = plan(settings(work, **{"model.adapter": str(work / "dpo")}))
    assert "both adapters have the same weights" in made.notes


@pytest.mark.parametrize("names", [("a", "a"), ("", "b"), ("base", "b"), ("a", "base")])
def test_names_that_collide_are_refused(saved, names):
    names = [str(saved / "base") if name == "base" else name for name in names]
    with pytest.raises(UserError, match="named"):
        plan(settings(saved, **{"model.name": names[0], "model.dpo_name": names[1]}))


def test_more_of_vllms_flags_win_and_are_written_with_hyphens(saved):
    own = {"enable_chunked_prefill": False, "max-lora-rank": 32, "max_loras": 8, "compilation_config": {"level": 0}}
    config = settings(saved, **{"serve.arguments": own})
    assert yaml.safe_load(render(config, "yaml"))["enable-chunked-prefill"] is False
    words = shlex.split(render(config, "cli"))
    assert "--no-enable-chunked-prefill" in words
    assert words[words.index("--max-lora-rank") + 1] == "32"
    assert json.loads(words[words.index("--compilation-config") + 1]) == {"level": 0}
    assert words.count("--max-loras") == 1


@pytest.mark.parametrize(
    ("own", "said"),
    [({"max-lora-rank": 8}, "one of 16, 32"), ({"max_lora_rank": 48}, "one of 16, 32"),
     ({"lora-modules": ["a=b"]}, "not yours"), ({"enable_lora": False}, "not yours")],
)  # fmt: skip
def test_flags_with_which_the_server_would_not_serve_the_adapters_are_refused(saved, own, said):
    with pytest.raises(UserError, match=said):
        plan(settings(saved, **{"serve.arguments": own}))


def test_runtime_loading_is_said_in_every_form(saved):
    config = settings(saved, **{"serve.runtime_loading": True})
    assert render(config, "cli").startswith("VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve ")
    assert json.loads(render(config, "json"))["environment"] == {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1" in render(config, "yaml").splitlines()[0]
    assert "model" in yaml.safe_load(render(config, "yaml"))


def test_run_without_vllm_says_how_to_get_it(saved, monkeypatch):
    monkeypatch.setenv("PATH", str(saved))
    with pytest.raises(UserError, match="no command vllm") as caught:
        start(plan(settings(saved)))
    assert "--format k8s" in caught.value.hint
