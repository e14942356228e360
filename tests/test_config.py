"""Settings: one order, with provenance, and nothing unknown accepted."""

import ast
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dpo_cli.cli import app
from dpo_cli.config import presets, resolve
from dpo_cli.errors import UserError
from dpo_cli.safe_text import check_run_name

PACKAGE = Path(resolve.__file__).parents[1]


def test_each_layer_beats_the_ones_below_it(tmp_path, monkeypatch):
    monkeypatch.setitem(presets.PRESETS, "p", {"generate.n": 2, "model.name": "preset", "model.base": "preset"})
    file = tmp_path / "c.toml"
    file.write_text('preset = "p"\n[generate]\nn = 3\n[model]\nname = "file"\n')
    resolved = resolve.resolve(
        flags={"generate.n": 5, "generate.seed": None}, sets=["generate.n=4", "model.name=set"], file=file,
        environment={"SERVE_MODEL": "env", "ADAPTER_PATH": "env"},
    )  # fmt: skip
    keys = ["generate.n", "model.name", "model.adapter", "model.base", "generate.seed"]
    assert [resolve.get(resolved.config, key) for key in keys] == [5, "set", "env", "preset", 42]
    assert [resolved.sources[key] for key in keys] == ["flag", "--set", "env ADAPTER_PATH", "preset p", "default"]
    without = resolve.resolve(file=file, environment={"SERVE_MODEL": "env"})
    assert (without.config.generate.n, without.config.model.name) == (3, "env")
    assert without.sources["generate.n"] == str(file)


@pytest.mark.parametrize("name", ["c.toml", "c.yaml"])
def test_toml_and_yaml_mean_the_same(tmp_path, name):
    file = tmp_path / name
    if name == "c.toml":
        file.write_text('[train]\nlearning_rate = 5e-6\ntarget_modules = ["q_proj"]\nbf16 = true\n')
    else:
        file.write_text("train:\n  learning_rate: 5e-6\n  target_modules: [q_proj]\n  bf16: yes\n")
    train = resolve.resolve(file=file, environment={}).config.train
    assert (train.learning_rate, train.target_modules, train.bf16) == (5e-6, ["q_proj"], True)


@pytest.mark.parametrize("variable", resolve.ENVIRONMENT)
def test_each_environment_variable_sets_its_key(variable):
    key = resolve.ENVIRONMENT[variable]
    resolved = resolve.resolve(environment={variable: "/somewhere/else"})
    assert resolve.get(resolved.config, key) == "/somewhere/else"
    assert resolved.sources[key] == f"env {variable}"


@pytest.mark.parametrize(
    "text, hint",
    [
        ("train.lerning_rate=1", "did you mean 'train.learning_rate'?"),
        ("temperature=1", "did you mean 'generate.temperature'?"),
        ("judge.api_key=sk-1", "secrets come from the environment only"),
        ("zebra=1", "nothing-dpo inspect config"),
    ],
)
def test_unknown_keys_are_refused_with_a_suggestion(text, hint):
    with pytest.raises(UserError) as caught:
        resolve.resolve(sets=[text], environment={})
    assert hint in str(caught.value.hint)
    assert caught.value.code == 2


@pytest.mark.parametrize("text", ["generate.n=0", "generate.n=three", "generate.top_p=1.5", "train.beta=-1"])
def test_values_out_of_bounds_are_refused_by_name(text):
    with pytest.raises(UserError, match=text.partition("=")[0]):
        resolve.resolve(sets=[text], environment={})


def test_a_value_that_is_none_of_the_few_is_refused_with_those_that_there_are(tmp_path):
    keys = [key for key in resolve.fields() if resolve.choices(key)]
    assert {"train.loss_type", "gate.kl_actions", "train.bf16", "train.lr_scheduler_type", "serve.dtype"} <= set(keys)
    for key in keys:
        is_list = key == "gate.kl_actions"
        section, name = key.split(".")
        file = tmp_path / "c.toml"
        file.write_text(f"[{section}]\n{name} = {['surely-none'] if is_list else 'surely-none'!r}\n")
        given = '["surely-none"]' if is_list else "surely-none"
        for where in ({"sets": [f"{key}={given}"]}, {"file": file}):
            with pytest.raises(UserError) as refused:
                resolve.resolve(environment={}, **where)
            assert f"'surely-none' is none of {', '.join(resolve.choices(key))}" in str(refused.value), key
    for text in ("[]", '["sigmoid", "surely-none"]'):
        with pytest.raises(UserError, match=r"(one|none) of sigmoid, hinge, .*rebel"):
            resolve.resolve(sets=[f"train.loss_type={text}"], environment={})
    with pytest.raises(UserError, match=r'a list is expected, such as \["stop"\]'):
        resolve.resolve(sets=["gate.kl_actions=stop"], environment={})
    assert resolve.resolve(sets=["model.name="], environment={}).config.model.name == ""


@pytest.mark.parametrize("content", ["[generate\n", "generate = 3\n", '[generate]\nn = "x"\n', "a = 1\n"])
def test_a_broken_file_is_named(tmp_path, content):
    file = tmp_path / "broken.toml"
    file.write_text(content)
    with pytest.raises(UserError, match=r"broken\.toml"):
        resolve.resolve(file=file, environment={})


def test_none_unsets_an_optional_value():
    assert (
        resolve.resolve(sets=["generate.url=none"], environment={"SERVE_URL": "http://x"}).config.generate.url is None
    )


def test_every_setting_is_documented_and_read():
    read = set()
    for file in PACKAGE.rglob("*.py"):
        if file.parent.name != "config" and file.name != "cli.py":
            read |= {node.attr for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Attribute)}
    for key in resolve.fields():
        assert resolve.describe(key).endswith("."), key
        assert key.rpartition(".")[2] in read, f"no room reads {key}"


def test_what_is_piped_is_not_wrapped(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "60")
    done = CliRunner().invoke(app, ["inspect", "config", "--set", f"model.base={'x' * 300}"])
    lines = done.stdout.splitlines()
    assert any(line.startswith("model.base") and "x" * 300 in line for line in lines)
    assert any(line.startswith("train.per_device_train_batch_size ") for line in lines), "no name is broken"


@pytest.mark.parametrize(
    "name", ["", " ", "..", "a..b", "../x", "a/b", "a\\b", "a\nb", "a\x1b[31mb", ".", "a ", "a\u202eb"]
)
def test_a_name_that_is_no_folders_is_refused_everywhere(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="is no name for a run"):
        check_run_name(name)
    elsewhere = ["train", "--name", name, "--backend", "modal"]
    for command in (
        ["inspect", "run", name], ["train", "--name", name], elsewhere, ["push", "run", "there", "--name", name]
    ):  # fmt: skip
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 2 and "is no name for a run" in done.stderr, (command, done.output)
        assert "\x1b[31m" not in done.stderr
    assert check_run_name("round-1_é.v2") == "round-1_é.v2"


def test_an_empty_destination_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for dest in ("", " "):
        done = CliRunner().invoke(app, ["push", "data", dest])
        assert done.exit_code == 2 and "is no place to send to" in done.stderr
