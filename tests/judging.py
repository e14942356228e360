"""Completions to judge, and a judge whose replies a test writes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from openai_server import Call, candidates

from dpo_cli.config.settings import Config, JudgeSection, PairSection
from dpo_cli.data.jsonl import read_latest, write_rows
from dpo_cli.data.records import Completions, Judgment, Message, prompt_id
from dpo_cli.progress import Silent
from dpo_cli.stages import judge

SHORT, MIDDLE, LONG = "[OTIS] No.", "[OTIS] It was raining, so I took it.", "[OTIS] " + "I only borrowed it. " * 8


def row(number: int, *texts: str) -> Completions:
    prompt: list[Message] = [{"role": "user", "content": f"[MABEL] Where is umbrella number {number}?"}]
    return Completions(
        id=prompt_id(prompt), prompt=prompt, completions=list(texts), finish_reasons=["stop"] * len(texts),
        model="writer", sampling={},
    )  # fmt: skip


def rows(count: int) -> list[Completions]:
    return [row(number, f"{SHORT} {number}", f"{MIDDLE} {number}", f"{LONG} {number}") for number in range(count)]


def config(folder: Path, url: str = "http://127.0.0.1:9/v1", pair: PairSection | None = None, **judge: Any) -> Config:
    settings = JudgeSection(**{"model": "judge-small", "url": url, "concurrency": 8, **judge})
    return Config(data=str(folder), judge=settings, pair=pair or PairSection())


def write(folder: Path, completions: list[Completions]) -> None:
    write_rows(folder / "completions.jsonl", completions)


def judgments(folder: Path) -> dict[str, Judgment]:
    return read_latest(folder / "judgments.jsonl", Judgment)


def run(settings: Config, **options: Any) -> judge.Judged:
    return judge.run(settings, Silent(), **options)


class Log(Silent):
    """Progress that keeps what was logged."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def log(self, text: str) -> None:
        self.lines.append(text)


def reply(scores: dict[str, Any], ranking: list[str] | None = None) -> str:
    ranking = ranking or sorted(scores, key=lambda label: -scores[label])
    return json.dumps({"rationale": "Why not.", "scores": scores, "ranking": ranking})


def scripted(score: Callable[[str, int], int]) -> Callable[[Call], str]:
    """A judge that scores by (text, place at which it was shown)."""

    def answer(call: Call) -> str:
        shown = candidates(call.body["messages"][-1]["content"])
        return "reply!" + reply({label: score(text, place) for place, (label, text) in enumerate(shown.items())})

    return answer
