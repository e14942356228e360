"""README and list of commands say what the program says."""

from readme import BLOCK, COMMANDS, README, renewed

from dpo_cli.cli import app, inspector


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
