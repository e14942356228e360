"""README, list of commands and example scripts say what the program says."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import typer
from readme import BLOCK, COMMANDS, README, ROOT, renewed
from training import write_rows
from typer.testing import CliRunner

from dpo_cli.cli import app, inspector
from dpo_cli.config.resolve import resolve
from dpo_cli.data.records import prompt_id
from dpo_cli.stages import generate

SHELL = re.compile(r"```bash\n(.*?)```", re.DOTALL)
CODE = re.compile(r"`([^`\n]+)`")
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]*")
DRY = {f"{command} --dry-run" for command in ("generate", "judge", "train", "evaluate", "push")}
OF_OTHERS = {"--extra-index-url"}  # flags of pip


def command_lines():
    """(file, command) of every `nothing-dpo …` in shell blocks, inline code and example scripts."""
    texts = {path: path.read_text("utf-8") for path in [README, *sorted((ROOT / "examples").rglob("*.sh"))]}
    for path, text in texts.items():
        blocks = SHELL.findall(text) if path == README else [text]
        lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
        lines += CODE.findall(text) if path == README else []
        for line in lines:
            for words in commands_of(line):
                names = [place for place, word in enumerate(words) if word.rpartition("/")[2] == "nothing-dpo"]
                if names and "COMMAND" not in words and words[names[0] + 1 :]:
                    yield path.name, words[names[0] + 1 :]


def commands_of(line):
    """The words of each command of a shell line, as far as `&&`, `|`, `;` and `>` part them."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words = []
    for word in lexer:
        if set(word) <= set("&|;<>"):
            yield words
            words = []
        else:
            words.append(word)
    yield words


def parse(words):
    """Have typer parse a command line, and run nothing.

    Raises:
        click's UsageError: there is no such command, flag or choice.
    """
    group, context = typer.main.get_command(app), None
    while hasattr(group, "commands") and words:
        context = group.make_context("nothing-dpo", [], parent=context, resilient_parsing=True)
        name, group, words = group.resolve_command(context, list(words))
        assert group is not None, name
    group.make_context(group.name, list(words), parent=context)


@pytest.mark.parametrize(
    ("file", "words"), [pytest.param(*found, id=f"{found[0]}: {shlex.join(found[1])}") for found in command_lines()]
)
def test_every_command_line_of_the_readme_and_the_examples_is_one(file, words):
    parse([word for word in words if word not in ("…", "...")])


def test_a_flag_that_does_not_exist_is_found():
    with pytest.raises(Exception, match="report-to"):
        parse(["train", "--report-to", "wandb"])


@pytest.fixture
def workspace(tmp_path, start, monkeypatch):
    """A folder as the README presumes it: prompts, an adapter, its base, completions and pairs."""
    monkeypatch.chdir(tmp_path)
    for variable, value in (("SERVE_URL", "http://127.0.0.1:9/v1"), ("OPENAI_API_KEY", "none"), ("BASE_MODEL", "base")):
        monkeypatch.setenv(variable, value)
    shutil.copytree(start / "base", "base")
    shutil.copytree(start / "sft", "adapters/nothing-gpt")
    shutil.copytree(start / "sft", "adapters/nothing-gpt-dpo")
    shutil.copytree(start / "data", "data/dpo")
    prompts = [json.loads(line)["prompt"] for line in Path("data/dpo/val.jsonl").read_text().splitlines()]
    write_rows(Path("data/val.jsonl"), [{"prompt": prompt} for prompt in prompts])
    sampling = generate.made_with(resolve().config, "endpoint")
    write_rows(
        Path("data/dpo/completions.jsonl"),
        [
            {
                "id": prompt_id(prompt),
                "prompt": prompt,
                "completions": ["[OTIS] One.", "[OTIS] Two."],
                "model": "seinfeld",
                "finish_reasons": ["stop", "stop"],
                "sampling": sampling,
            }
            for prompt in prompts
        ],
    )


def test_the_two_minutes_dry_run_as_they_stand(workspace):
    """Each command of the block that knows --dry-run; the others need a server, and are parsed above."""
    block = next(block for block in SHELL.findall(README.read_text("utf-8")) if "generate --n 3" in block)
    lines = [words for line in block.splitlines() for words in commands_of(line) if words[:1] == ["nothing-dpo"]]
    dry = [words[1:] for words in lines if f"{words[1]} --dry-run" in DRY and "hf://you/name" not in words]
    assert len(dry) >= 4
    for words in dry:
        done = CliRunner().invoke(app, [*words, "--dry-run"] if "--dry-run" not in words else words)
        assert done.exit_code == 0, (words, done.output)


def test_every_flag_that_the_readme_names_exists():
    known = set(FLAG.findall(COMMANDS.read_text("utf-8"))) | OF_OTHERS
    ours = [code for code in CODE.findall(README.read_text("utf-8")) if not code.startswith(("python", "bash"))]
    named = {flag for code in ours for flag in FLAG.findall(code)}
    assert named and named <= known, sorted(named - known)


def test_help_texts_are_those_of_the_program():
    text = COMMANDS.read_text("utf-8")
    assert renewed(text) == text, "python tests/readme.py --write"


def test_every_command_is_documented():
    documented = {match[2].split()[0] for match in BLOCK.finditer(COMMANDS.read_text("utf-8")) if match[2]}
    commands = {command.name for command in app.registered_commands} | {"inspect"}
    assert commands <= documented
    inspected = {match[2] for match in BLOCK.finditer(COMMANDS.read_text("utf-8"))}
    assert {f"inspect {command.name}" for command in inspector.registered_commands} <= inspected


def test_the_readme_is_read_in_ten_minutes_and_names_every_command():
    text = README.read_text("utf-8")
    assert len(text.splitlines()) <= 400
    for command in [*app.registered_commands, *inspector.registered_commands]:
        assert f"`{command.name}`" in text, f"no row for {command.name}"
