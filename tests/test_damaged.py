"""Damaged bases and adapters: one true line, exit 2, from train, generate and serve-config alike."""

import json
import shutil
from pathlib import Path

import pytest
from adapters import base_model, edit_settings, edit_weights, save_adapter
from training import Lines, read_rows, settings, write_data

from dpo_cli.errors import Exit, UserError
from dpo_cli.progress import Silent
from dpo_cli.stages import generate, serve_config, train
from dpo_cli.training import preflight

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


def edit(file, **changes):
    """A breakage of a JSON file of the base."""

    def change(folder: Path) -> None:
        path = folder / "base" / file
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def gone(name):
    return lambda folder: (folder / name).unlink()


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


def cut(name):
    def truncate(folder: Path) -> None:
        file = folder / name
        file.write_bytes(file.read_bytes()[:-200])

    return truncate


def nan_in_base(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = folder / "base/model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})


def pickle_weights(folder: Path, change=lambda tensors: None, zip_file: bool = True) -> Path:
    """The base's or the adapter's weights as torch.save writes them."""
    import torch
    from safetensors.torch import load_file

    file = next(folder.glob("*model.safetensors"))
    tensors = load_file(file)
    change(tensors)
    file.unlink()
    name = "pytorch_model.bin" if folder.name == "base" else "adapter_model.bin"
    torch.save(tensors, folder / name, _use_new_zipfile_serialization=zip_file)
    return folder / name


def nan_somewhere(tensors):
    """In a tensor that is a part of a larger storage, with steps in it."""
    name = next(name for name in tensors if "down_proj" in name)
    tensors[name] = tensors[name].repeat(2, 1)[: len(tensors[name])].T.contiguous().T
    tensors[name][1, 2] = float("nan")


def lacks_a_layer(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = folder / "base/model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})


def no_template(folder: Path) -> None:
    (folder / "base/chat_template.jinja").unlink()


def remote_code(folder: Path) -> None:
    edit("config.json", model_type="mine", auto_map={"AutoConfig": "mine.Config"})(folder)
    (folder / "base/mine.py").write_text("print('it runs')")


def in_adapter(change):
    return lambda folder: change(folder / "sft")


def base_as_file(folder: Path) -> None:
    shutil.rmtree(folder / "base")
    (folder / "base").write_text("a model")


def integers(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = folder / "base/model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"].char()
    save_file(tensors, file, metadata={"format": "pt"})


def wider(tensors):
    for key, value in tensors.items():
        tensors[key] = value.repeat(1, 2) if "lora_A" in key else value.repeat(2, 1)


def deeper(tensors):
    for key in list(tensors):
        tensors[key.replace("layers.1.", "layers.9.")] = tensors.pop(key)


DAMAGED = {
    "no config": (gone("base/config.json"), "no config.json"),
    "empty config": (write("base/config.json", "{}"), "names no model_type"),
    "garbage config": (write("base/config.json", "{nonsense"), "not a JSON object"),
    "unknown model": (edit("config.json", model_type="nobody-knows"), "nobody-knows"),
    "size that is none": (edit("config.json", hidden_size="x"), "hidden_size is 'x'"),
    "other sizes": (edit("config.json", intermediate_size=128), "intermediate_size|in the weights|other shapes"),
    "remote code": (remote_code, "needs code of its own"),
    "no weights": (gone("base/model.safetensors"), "no weights"),
    "truncated weights": (cut("base/model.safetensors"), "cut short"),
    "weights that are a pointer": (write("base/model.safetensors", POINTER), "Git LFS pointer"),
    "weights without a layer": (lacks_a_layer, "lack 1 tensors|has no layer"),
    "NaN in weights": (nan_in_base, "model.norm.weight holds NaN"),
    "NaN in a .bin": (
        lambda folder: pickle_weights(folder / "base", nan_somewhere),
        r"pytorch_model.bin: .*down_proj.weight holds NaN",
    ),
    "NaN in an adapter's .bin": (
        lambda folder: pickle_weights(folder / "sft", nan_somewhere),
        r"adapter_model.bin: .*down_proj.lora_A.weight holds NaN",
    ),
    "truncated .bin": (
        lambda folder: pickle_weights(folder / "base") and cut("base/pytorch_model.bin")(folder), "or cut short"
    ),
    "index without its shards": (
        write("base/model.safetensors.index.json", '{"weight_map": {"a": "model-00001-of-00002.safetensors"}}'),
        "weights are missing: model-00001-of-00002",
    ),
    "no tokenizer": (gone("base/tokenizer.json"), "no tokenizer"),
    "garbage tokenizer": (write("base/tokenizer.json", '{"a": 1}'), "has no vocabulary"),
    "truncated tokenizer": (cut("base/tokenizer.json"), "not a JSON object"),
    "tokenizer that is a pointer": (write("base/tokenizer.json", POINTER), "Git LFS pointer"),
    "no template": (no_template, "no chat template"),
    "an adapter as base": (
        lambda folder: shutil.copyfile(folder / "sft/adapter_config.json", folder / "base/adapter_config.json")
        and (folder / "base/config.json").unlink(),
        "no config.json",
    ),
    "base that is a file": (base_as_file, "a file, not the folder|no such folder"),
    "an adapter beside the model": (
        lambda folder: shutil.copyfile(folder / "sft/adapter_config.json", folder / "base/adapter_config.json"),
        "holds an adapter beside the model",
    ),
    "config that is a list": (write("base/config.json", "[]"), "not a JSON object"),
    "config that links to itself": (
        lambda folder: gone("base/config.json")(folder) or (folder / "base/config.json").symlink_to("config.json"),
        "can't be read: Too many levels of symbolic links",
    ),
    "weights whose link leads nowhere": (
        lambda folder: gone("base/model.safetensors")(folder)
        or (folder / "base/model.safetensors").symlink_to("/nowhere/blob"),
        "can't be read: No such file",
    ),
    "fewer layers than the weights": (edit("config.json", num_hidden_layers=1), "the weights have 2 layers"),
    "fewer tokens than the weights": (edit("config.json", vocab_size=10), "the embedding in the weights has"),
    "text_config that is none": (edit("config.json", text_config="x"), "text_config is 'x', which is no object"),
    "no positions": (edit("config.json", max_position_embeddings=0), "max_position_embeddings is 0"),
    "integers for weights": (integers, "is of type I8"),
    "weights of another name": (
        lambda folder: (folder / "base/model.safetensors").rename(folder / "base/consolidated.safetensors"),
        "no weights: .*, but consolidated.safetensors",
    ),
    "tokens without a number": (
        edit("tokenizer.json", model={"type": "BPE", "vocab": {"a": "x"}, "merges": []}), "tokens without a number"
    ),
    "garbage tokenizer settings": (write("base/tokenizer_config.json", "{nope"), "not a JSON object"),
    "length that is none": (edit("tokenizer_config.json", model_max_length="x"), "model_max_length is 'x'"),
    "garbage generation settings": (write("base/generation_config.json", "[]"), "not a JSON object"),
    "end that is no token": (edit("generation_config.json", eos_token_id={"a": 1}), "eos_token_id is .* no token"),
    "template that is no text": (
        lambda folder: (folder / "base/chat_template.jinja").write_bytes(b"\xff{{"), "not UTF-8"
    ),
    "template that ends too early": (write("base/chat_template.jinja", "{{ messages"), "refuses this conversation"),
    "no token that ends": (gone("base/tokenizer_config.json"), "names no eos_token"),
    "adapter settings that are a list": (write("sft/adapter_config.json", "[]"), "not a JSON object"),
    "rank 0": (in_adapter(edit_settings(r=0)), "rank 0 is none"),
    "rank that is text": (in_adapter(edit_settings(r="16")), "rank '16' is none"),
    "alpha that is null": (in_adapter(edit_settings(lora_alpha=None)), "lora_alpha is None"),
    "pattern that does not compile": (in_adapter(edit_settings(target_modules="(*")), "which is no pattern"),
    "targets that the file does not hold": (in_adapter(edit_settings(target_modules=["w1"])), "PEFT would skip it"),
    "adapter of a classifier": (in_adapter(edit_settings(task_type="SEQ_CLS")), "task_type is 'SEQ_CLS'"),
    "dropout of 2": (in_adapter(edit_settings(lora_dropout=2)), "lora_dropout is 2"),
    "modules_to_save that is a name": (in_adapter(edit_settings(modules_to_save="lm_head")), "is no list of modules"),
    "adapter of another width": (in_adapter(edit_weights(wider)), "and the adapter is for"),
    "adapter of integers": (
        in_adapter(edit_weights(lambda tensors: tensors.update({key: one.int() for key, one in tensors.items()}))),
        "is of type I32",
    ),
    "alpha that is no number": (in_adapter(edit_settings(lora_alpha="x")), "lora_alpha is 'x'"),
    "no targets": (in_adapter(edit_settings(target_modules=[])), "target_modules is empty"),
    "targets that are numbers": (in_adapter(edit_settings(target_modules=[1])), "names no modules"),
    "pattern that is none": (in_adapter(edit_settings(rank_pattern=[4])), "rank_pattern"),
    "garbage adapter settings": (write("sft/adapter_config.json", "nonsense"), "not a JSON object"),
    "adapter that is a pointer": (write("sft/adapter_model.safetensors", POINTER), "Git LFS pointer"),
    "adapter of a deeper model": (in_adapter(edit_weights(deeper)), "has no layer"),
}  # fmt: skip
# What vLLM finds out for itself, and a plan has no need of.
NOT_SERVED_FROM = {
    "no template", "unknown model", "other sizes", "weights without a layer", "template that ends too early",
    "no token that ends",
}  # fmt: skip
NOT_MERGED_FROM = {"no template", "template that ends too early", "no token that ends"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    import torch

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("whole")
    save_adapter(folder / "sft", base_model(folder / "base"))
    write_data(folder)
    return folder


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_base_or_adapter_is_refused_in_one_line_by_every_command(whole, tmp_path, name):
    from dpo_cli.training.merge_adapter import merge

    damage, words = DAMAGED[name]
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    edit_settings(base_model_name_or_path=str(tmp_path / "base"))(tmp_path / "sft")
    damage(tmp_path)
    config = settings(
        tmp_path, tmp_path / "base", "generate.engine=transformers", f"generate.prompts={tmp_path / 'data/val.jsonl'}"
    )
    commands = {"train": lambda: train.run(config, Silent()), "generate": lambda: generate.run(config, Silent())}
    if name not in NOT_SERVED_FROM:
        commands["serve-config"] = lambda: serve_config.plan(config)
        commands["inspect plan"] = lambda: preflight.run(config)
    if name not in NOT_MERGED_FROM:
        commands["push --merge"] = lambda: merge(
            tmp_path / "base", tmp_path / "sft", tmp_path / "merged", ["the kettle"]
        )
    for command, run in commands.items():
        with pytest.raises(UserError, match=words) as refused:
            run()
        assert refused.value.code == Exit.USAGE, command
        at_data = "data/" in str(refused.value) or "prompt '" in str(refused.value)
        assert (str(tmp_path) in str(refused.value) or at_data) and "\n" not in refused.value.message, command


@pytest.mark.parametrize("zip_file", [True, False], ids=["zip", "before torch 1.6"])
def test_weights_that_torch_saved_are_known_as_safetensors_are(whole, tmp_path, zip_file):
    """NaN in a storage beside what a tensor shows of it is none of the tensor's."""
    import torch

    from dpo_cli.models.base_model import check_base
    from dpo_cli.models.pickled import read_pickled

    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)

    def beside(tensors):
        name = "model.norm.weight"
        storage = torch.full((3 * len(tensors[name]),), float("nan"))
        tensors[name] = storage[len(tensors[name]) : -len(tensors[name])].copy_(tensors[name])

    file = pickle_weights(tmp_path / "base", beside, zip_file)
    safetensors = check_base(str(whole / "base")).shapes
    if zip_file:
        assert {name: one.shape for name, one in read_pickled(file).items()} == {
            name: one.shape for name, one in safetensors.items()
        }
    config = settings(tmp_path, tmp_path / "base", "train.max_steps=1", "gate.kl_limit=100", "model.same_base=true")
    assert train.run(config, Silent()).step_zero.ok


@pytest.mark.parametrize("prefix", ["base_model.model._orig_mod.model.", "base_model.model.model.language_model."])
def test_layers_under_another_prefix_are_renamed_and_said_and_refused_where_vllm_would_skip_them(
    whole, tmp_path, prefix
):
    """As torch.compile and multimodal models save them; PEFT and vLLM would apply none of them, without a word."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)

    def rename(tensors):
        for key in list(tensors):
            tensors[key.replace("base_model.model.model.", prefix)] = tensors.pop(key)

    edit_weights(rename)(tmp_path / "sft")
    edit_settings(base_model_name_or_path=str(tmp_path / "base"))(tmp_path / "sft")
    config = settings(
        tmp_path, tmp_path / "base", "train.max_steps=1", "gate.kl_limit=100", "generate.engine=transformers",
        f"generate.prompts={tmp_path / 'data/val.jsonl'}", f"data={tmp_path / 'data'}", "generate.temperature=0",
        "generate.n=1",
    )  # fmt: skip
    progress = Lines()
    assert train.run(config, progress).step_zero.ok
    assert any("its layers" in line and "are the base's" in line for line in progress.lines)
    with pytest.raises(UserError, match="vLLM would answer as the base does"):
        serve_config.plan(config)
    generate.run(config, Silent())
    plain = settings(
        whole, whole / "base", "generate.engine=transformers", f"data={tmp_path / 'plain'}", "generate.temperature=0",
        f"generate.prompts={tmp_path / 'data/val.jsonl'}", "generate.n=1",
    )  # fmt: skip
    generate.run(plain, Silent())
    answers = [read_rows(folder / "completions.jsonl") for folder in (tmp_path / "data", tmp_path / "plain")]
    assert [row["completions"] for row in answers[0]] == [row["completions"] for row in answers[1]]


RESIZED = {
    "saved whole beside copies": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "saved whole, unasked": {"target_modules": ["q_proj", "v_proj"]},
}


@pytest.mark.parametrize("kind", RESIZED)
def test_an_adapter_of_a_resized_vocabulary_is_folded_as_peft_computes_it(whole, tmp_path, kind):
    """Tokens that SFT added: PEFT saves the embeddings whole, and the tokenizer lies beside the adapter."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(whole / "base")
    tokenizer.add_tokens(["<mabel>", "<otis>"], special_tokens=True)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(whole / "base")
    model.resize_token_embeddings(len(tokenizer))
    wanted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False, **RESIZED[kind]))
    adapter = tmp_path / "resized"
    wanted.save_pretrained(adapter, save_embedding_layers=True)
    tokenizer.save_pretrained(adapter)
    sets = ("train.max_steps=1", f"model.adapter={adapter}", f"runs={tmp_path / 'runs'}", f"data={whole / 'data'}")
    config = settings(tmp_path, whole / "base", *sets)
    for command in (lambda: train.run(config, Silent()), lambda: serve_config.plan(config)):
        with pytest.raises(
            UserError, match=r"the vocabulary was resized: .* 2?\d+ rows|vLLM does not serve"
        ) as refused:
            command()
        assert "adapter_into_base=true" in refused.value.hint or "--merge" in refused.value.hint
    assert train.run(settings(tmp_path, whole / "base", *sets, "model.adapter_into_base=true"), Silent()).step_zero.ok
    folded = tmp_path / "resized-merged"
    ids = torch.tensor([AutoTokenizer.from_pretrained(folded).encode("<mabel> Nobody stands <otis>")])
    assert ids.max() == len(tokenizer) - 1
    with torch.no_grad():
        difference = AutoModelForCausalLM.from_pretrained(folded)(ids).logits - wanted.eval()(ids).logits
    assert difference.abs().max() < 1e-5


def test_embeddings_in_an_adapters_file_are_the_bases_or_are_folded(whole, tmp_path):
    """Copies change nothing; others would take the base's place without a word."""
    from safetensors.torch import load_file

    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    rows = load_file(whole / "base/model.safetensors")["model.embed_tokens.weight"]
    config = settings(tmp_path, tmp_path / "base", "train.max_steps=1", "model.same_base=true")
    for name, value in {"copies": rows, "others": rows + 0.1}.items():
        edit_weights(
            lambda tensors, value=value: tensors.update({"base_model.model.model.embed_tokens.weight": value})
        )(tmp_path / "sft")
        if name == "copies":
            assert train.run(config, Silent(), name=name).step_zero.ok
        else:
            with pytest.raises(UserError, match="other embeddings than the base has") as refused:
                train.run(config, Silent(), name=name)
            assert "adapter_into_base=true" in refused.value.hint
