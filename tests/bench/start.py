"""Wall seconds of whole commands that have little to do: help, and resuming 100,000 rows of which none is missing.

    python tests/bench/start.py

Runs take turns; `python -c pass` and `import typer` are what no command written with typer can go below.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from dpo_cli.config import resolve
from dpo_cli.data.jsonl import write_rows
from dpo_cli.data.records import Completions, prompt_id
from dpo_cli.stages import generate

ROWS = 100_000
ROUNDS = 7
COMMAND = [sys.executable, "-m", "dpo_cli"]
SCENE = "[OTIS] You borrowed a ladder from a man who sells umbrellas? " * 6
ANSWER = "[MABEL] In July, Otis. He was not using it, and neither were you, so the soup got cold.\n[OTIS] Fine.\n" * 3


def write_finished(folder: Path) -> list[str]:
    """Prompts, and a row of three completions for each; the arguments that resume them."""
    flags = {
        "data": str(folder),
        "generate.prompts": str(folder / "prompts.jsonl"),
        "generate.url": "http://127.0.0.1:9",
    }
    settings = resolve.resolve(flags, environment={}).config
    sampling = generate.made_with(settings, "endpoint")
    prompts = [[{"role": "user", "content": f"Scene {number}. {SCENE}"}] for number in range(ROWS)]
    write_rows(folder / "prompts.jsonl", ({"prompt": prompt} for prompt in prompts))
    write_rows(
        folder / "completions.jsonl",
        (
            Completions(
                id=prompt_id(prompt), prompt=prompt, completions=[ANSWER] * 3, finish_reasons=["stop"] * 3,
                model=settings.model.name, sampling=sampling,
            )
            for prompt in prompts
        ),
    )  # fmt: skip
    return ["--data", flags["data"], "--prompts", flags["generate.prompts"], "--url", flags["generate.url"]]


def main() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    with tempfile.TemporaryDirectory() as scratch:
        commands = {
            "python -c pass": [sys.executable, "-c", "pass"],
            "import typer": [sys.executable, "-c", "import typer"],
            "--help": [*COMMAND, "--help"],
            "generate --help": [*COMMAND, "generate", "--help"],
            f"resume {ROWS:,} finished rows": [*COMMAND, "generate", *write_finished(Path(scratch)), "--json"],
        }
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(ROUNDS):
            for name, command in commands.items():
                start = time.perf_counter()
                output = subprocess.run(command, env=environment, check=True, capture_output=True).stdout
                seconds[name].append(time.perf_counter() - start)
                if name.startswith("resume"):
                    assert json.loads(output)["done_before"] == ROWS
    for name, found in seconds.items():
        print(f"{name:<30} {statistics.median(found):.3f} s ({min(found):.3f} to {max(found):.3f})")


if __name__ == "__main__":
    main()
