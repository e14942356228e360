"""Processor seconds of whole commands that have little to do: help, a look at files, a dry run, a resume.

    python tests/bench/start.py                    this checkout
    python tests/bench/start.py --beside FOLDER    and another one, run by run in turns

`python -c pass` and `import typer` are what no command written with typer can go below. The resume is of 100,000 rows
of which none is missing.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from dpo_cli.config import resolve
from dpo_cli.data.jsonl import write_rows
from dpo_cli.data.records import Completions, Preference, prompt_id
from dpo_cli.stages import generate

HERE = Path(__file__).parents[2]
ROWS, FEW = 100_000, 200
ROUNDS = 9
COMMAND = [sys.executable, "-m", "dpo_cli"]
SCENE = "[OTIS] You borrowed a ladder from a man who sells umbrellas? " * 6
ANSWER = "[MABEL] In July, Otis. He was not using it, and neither were you, so the soup got cold.\n[OTIS] Fine.\n" * 3


def write_finished(folder: Path, rows: int, texts: list[str]) -> list[str]:
    """Prompts, and a row of completions for each; the arguments that resume them."""
    flags = {
        "data": str(folder),
        "generate.prompts": str(folder / "prompts.jsonl"),
        "generate.url": "http://127.0.0.1:9",
    }
    settings = resolve.resolve(flags, environment={}).config
    sampling = generate.made_with(settings, "endpoint")
    prompts = [[{"role": "user", "content": f"Scene {number}. {SCENE}"}] for number in range(rows)]
    write_rows(folder / "prompts.jsonl", ({"prompt": prompt} for prompt in prompts))
    write_rows(
        folder / "completions.jsonl",
        (
            Completions(
                id=prompt_id(prompt), prompt=prompt, completions=texts, finish_reasons=["stop"] * len(texts),
                model=settings.model.name, sampling=sampling,
            )
            for prompt in prompts
        ),
    )  # fmt: skip
    write_rows(
        folder / "train.jsonl",
        (
            Preference(
                id=prompt_id(prompt), prompt=prompt, chosen=[{"role": "assistant", "content": ANSWER}],
                rejected=[{"role": "assistant", "content": "Fine."}], chosen_score=8.0, rejected_score=3.0,
                score_gap=5.0,
            )
            for prompt in prompts[:FEW]
        ),
    )  # fmt: skip
    return ["--data", flags["data"], "--prompts", flags["generate.prompts"], "--url", flags["generate.url"]]


def processor_seconds(command: list[str], checkout: Path, folder: Path) -> tuple[float, bytes]:
    """What one run of a command takes of the processor, and what it writes to stdout."""
    # Compiled modules are kept, as they are where nothing-dpo is installed.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        command, env=environment | {"PYTHONPATH": str(checkout)}, cwd=folder, check=True, capture_output=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime, done.stdout


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--beside", type=Path, help="another checkout")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--without-resume", action="store_true")
    asked = parser.parse_args()
    checkouts = {"here": HERE} | ({"beside": asked.beside.resolve()} if asked.beside else {})
    with tempfile.TemporaryDirectory() as scratch:
        few, many = Path(scratch) / "few", Path(scratch) / "many"
        few.mkdir()
        many.mkdir()
        write_finished(few, FEW, [ANSWER, "Fine.", "It rains."])
        commands = {
            "python -c pass": [sys.executable, "-c", "pass"],
            "import typer": [sys.executable, "-c", "import typer"],
            "--help": [*COMMAND, "--help"],
            "generate --help": [*COMMAND, "generate", "--help"],
            "inspect config": [*COMMAND, "inspect", "config"],
            "inspect pairs": [*COMMAND, "inspect", "pairs", "--data", str(few)],
            "inspect completions": [*COMMAND, "inspect", "completions", "--data", str(few)],
            "judge --dry-run": [*COMMAND, "judge", "--dry-run", "--data", str(few)],
        }
        if not asked.without_resume:
            commands[f"resume of {ROWS:,} rows"] = [
                *COMMAND, "generate", *write_finished(many, ROWS, [ANSWER] * 3), "--json",
            ]  # fmt: skip
        seconds: dict[tuple[str, str], list[float]] = {}
        for _ in range(asked.rounds + 1):  # the first round compiles
            for name, command in commands.items():
                for label, checkout in checkouts.items():
                    spent, output = processor_seconds(command, checkout, few)
                    seconds.setdefault((name, label), []).append(spent)
                    if name.startswith("resume"):
                        assert json.loads(output)["done_before"] == ROWS
    for name in commands:
        columns = []
        for label in checkouts:
            found = seconds[name, label][1:]
            columns.append(f"{label} {statistics.median(found):.3f} s ({min(found):.3f} to {max(found):.3f})")
        print(f"{name:<24} {'   '.join(columns)}")


if __name__ == "__main__":
    main()
