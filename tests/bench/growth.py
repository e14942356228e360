"""Processor time a row and peak memory of every command that reads many rows, at growing numbers of rows.

    python tests/bench/growth.py                     # 10,000 and 100,000 rows
    python tests/bench/growth.py --rows 1000000 --only lint --only pair

Each command runs in a process of its own; user and system time and the peak of resident memory are the kernel's.
Texts are words drawn by Zipf's law, two in a hundred pairs almost another's. Files are kept in `--folder` for the next
run. A command whose time a row grows does more than one pass a row: the last column is the ratio to the smallest size.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path

from dpo_cli.config import resolve
from dpo_cli.data.jsonl import write_rows
from dpo_cli.data.records import Completions, Judgment, Order, Preference, completions_id, preference_id, prompt_id
from dpo_cli.stages import generate

COMMAND = [sys.executable, "-m", "dpo_cli"]
JUDGE = {"judge": "llm", "model": ["judge-small"]}
WORDS, PROMPT, ANSWER, ANSWERS = 20_000, 24, 40, 3
NEAR = 0.02  # of the prompts come again, with one word changed

# Name -> arguments; `{here}` is the folder of a size.
COMMANDS = {
    "generate, nothing owed": "generate --data {here} --prompts {here}/prompts.jsonl --url http://127.0.0.1:9",
    "generate --dry-run": "generate --dry-run --data {here}/new --prompts {here}/prompts.jsonl --url http://127.0.0.1",
    "judge --dry-run": "judge --data {here}/unjudged --url http://127.0.0.1:9 --model small --dry-run",
    "judge by a function": "judge --data {here}/scored --judge function --function {here}/score.py:score",
    "judge, nothing owed": "judge --data {here}/scored --judge function --function {here}/score.py:score",
    "pair": "pair --data {here}",
    "pair, stratified": "pair --data {here} --strategy stratified",
    "pair --length-control": "pair --data {here} --length-control",
    "pair --import": "pair --data {here}/imported --import {here}/pairs/train.jsonl",
    "pair --import, rated": "pair --data {here}/imported --import {here}/rated.jsonl",
    "inspect completions --stats": "inspect completions --data {here} --stats",
    "inspect completions": "inspect completions --data {here}",
    "inspect judgments --stats": "inspect judgments --data {here} --stats",
    "inspect pairs": "inspect pairs --data {here}/pairs",
    "inspect pairs --stats": "inspect pairs --data {here}/pairs --stats",
    "inspect pairs --lint": "inspect pairs --data {here}/pairs --lint",
    "push data": "push data {here}/there --data {here}/pairs",
}


def texts(count: int) -> Iterator[tuple[str, list[str]]]:
    """A prompt and its answers, the same each time."""
    draw = random.Random(11)
    words = [f"w{number:x}" for number in range(WORDS)]
    weights = list(accumulate(1 / (rank + 5) for rank in range(WORDS)))
    former: list[str] = []
    for number in range(count):
        if former and draw.random() < NEAR:
            drawn = former.copy()
            drawn[-1] = f"n{number:x}"
        else:
            drawn = draw.choices(words, cum_weights=weights, k=PROMPT + ANSWERS * ANSWER)
            former = drawn
        answers = [drawn[PROMPT + start : PROMPT + start + ANSWER] for start in range(0, ANSWERS * ANSWER, ANSWER)]
        yield f"{number:x} " + " ".join(drawn[:PROMPT]), [" ".join(answer) for answer in answers]


def completions(count: int, sampling: dict) -> Iterator[Completions]:
    for text, answers in texts(count):
        prompt = [{"role": "user", "content": text}]
        yield Completions(
            id=prompt_id(prompt), prompt=prompt, completions=answers, finish_reasons=["stop"] * ANSWERS,
            model="seinfeld", sampling=sampling,
        )  # fmt: skip


def judgment(row: Completions, number: int) -> Judgment:
    scores = [float(1 + (number * 7 + place * 3) % 10) for place in range(ANSWERS)]
    orders = [[0, 1, 2], [2, 1, 0]]
    return Judgment(
        id=row.id,
        completions_id=completions_id(row.completions),
        scores=scores,
        ranking=sorted(range(ANSWERS), key=lambda place: -scores[place]),
        orders=[
            Order(order, dict(zip("ABC", (scores[place] for place in order), strict=True)), '{"rationale": "so"}')
            for order in orders
        ],
        consistent=True,
        judge=JUDGE,
    )


def pair(row: Completions) -> Preference:
    chosen, rejected = ([{"role": "assistant", "content": text}] for text in row.completions[:2])
    return Preference(
        id=preference_id(row.prompt, chosen, rejected), prompt=row.prompt, chosen=chosen, rejected=rejected,
        chosen_score=8.0, rejected_score=3.0, score_gap=5.0,
    )  # fmt: skip


def rated(row: Completions, number: int) -> dict:
    """A row as UltraFeedback has it: one prompt's answers with a score each."""
    answers = [
        {"response": text, "overall_score": 1 + (number * 7 + at * 3) % 10} for at, text in enumerate(row.completions)
    ]
    return {"instruction": row.prompt[0]["content"], "completions": answers}


def write(here: Path, count: int) -> None:
    """Every file that the commands read."""
    if (here / "whole").exists():
        return
    settings = resolve.resolve({"generate.url": "http://127.0.0.1:9"}, environment={}).config
    sampling = generate.made_with(settings, "endpoint")
    write_rows(here / "prompts.jsonl", ({"prompt": text} for text, _ in texts(count)))
    write_rows(here / "completions.jsonl", completions(count, sampling))
    write_rows(here / "judgments.jsonl", (judgment(row, at) for at, row in enumerate(completions(count, sampling))))
    write_rows(here / "pairs" / "train.jsonl", map(pair, completions(count, sampling)))
    write_rows(here / "rated.jsonl", (rated(row, at) for at, row in enumerate(completions(count, sampling))))
    for folder in ("scored", "unjudged"):  # judged by the command, and never
        (here / folder).mkdir(exist_ok=True)
        (here / folder / "completions.jsonl").unlink(missing_ok=True)
        os.link(here / "completions.jsonl", here / folder / "completions.jsonl")
    (here / "score.py").write_text("def score(prompt, completion):\n    return len(completion) % 97 / 10\n")
    (here / "whole").touch()


def measure(arguments: list[str]) -> tuple[float, float]:
    """Processor seconds and peak megabytes of a command."""
    process = subprocess.Popen(
        [*COMMAND, *arguments, "--quiet"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=os.environ
    )
    assert process.stderr is not None
    errors = process.stderr.read()
    _, status, used = os.wait4(process.pid, 0)
    code = os.waitstatus_to_exitcode(status)
    if code not in (0, 3):
        sys.exit(f"{' '.join(arguments)} ended with {code}: {errors.decode()[-500:]}")
    return used.ru_utime + used.ru_stime, used.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, action="append", help="numbers of rows")
    parser.add_argument("--only", action="append", default=[], help="commands whose name holds this")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "growth")
    arguments = parser.parse_args()
    rows = arguments.rows or [10_000, 100_000]
    small = measure(["inspect", "config"])[0]  # what a command takes that reads nothing
    first: dict[str, float] = {}
    print(
        "| command | rows | s | µs a row | MB | growth |\n|---|---:|---:|---:|---:|---:|\n"
        f"| inspect config | | {small:.2f} |"
    )
    for count in rows:
        here = arguments.folder / str(count)
        here.mkdir(parents=True, exist_ok=True)
        write(here, count)
        for name, line in COMMANDS.items():
            if arguments.only and not any(part in name for part in arguments.only):
                continue
            if name == "judge by a function":
                (here / "scored" / "judgments.jsonl").unlink(missing_ok=True)
            seconds, megabytes = measure(line.format(here=here).split())
            each = (seconds - small) / count * 1e6
            growth = each / first.setdefault(name, each)
            print(f"| {name} | {count:,} | {seconds:.2f} | {each:.1f} | {megabytes:,.0f} | {growth:.2f} |", flush=True)
    print(json.dumps({"rows": rows, "python": sys.version.split()[0]}))


if __name__ == "__main__":
    main()
