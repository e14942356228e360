"""The generated list of commands: each one's help. `python tests/readme.py --write` renews it."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
COMMANDS = ROOT / ".github" / "commands.md"
BLOCK = re.compile(r"(<!-- help: (.*?) -->\n```text\n)(.*?)(```\n)", re.DOTALL)


def help_of(command: str) -> str:
    """What `nothing-dpo COMMAND --help` prints at 100 columns."""
    code = (
        "import os, sys; os.environ['COLUMNS'] = os.environ['TERMINAL_WIDTH'] = '100';"
        "from dpo_cli.cli import app; app(sys.argv[1:], prog_name='nothing-dpo')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *command.split(), "--help"], capture_output=True, text=True, check=True
    )
    return done.stdout


def renewed(text: str) -> str:
    """The list with the help texts as they are now."""
    return BLOCK.sub(lambda match: match[1] + help_of(match[2]) + match[4], text)


def main() -> None:
    text = COMMANDS.read_text("utf-8")
    if "--write" in sys.argv:
        COMMANDS.write_text(renewed(text), "utf-8")
    elif renewed(text) != text:
        sys.exit("the help texts are out of date: python tests/readme.py --write")


if __name__ == "__main__":
    main()
