"""Small training inputs: pairs over invented scenes, settings for few steps, and a process that can be killed."""

import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dpo_cli.config.resolve import resolve
from dpo_cli.config.settings import Config
from dpo_cli.progress import Silent

SYSTEM = {"role": "system", "content": "You write the next lines of a scene. Each line is [NAME] text."}
CLOCK_KEYS = {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}


def pair(number: int) -> dict[str, Any]:
    """One pair in TRL's format, without our ids."""
    return {
        "prompt": [SYSTEM, {"role": "user", "content": f"[MABEL] The umbrella raining {number} times a year."}],
        "chosen": [{"role": "assistant", "content": f"[OTIS] It was his umbrella. {'Nobody ' * (number % 4)}stands."}],
        "rejected": [{"role": "assistant", "content": f"[MABEL] You returned it? {number % 7} times."}],
    }


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def settings(folder: Path, base: Path, *sets: str) -> Config:
    """Everything under `folder`; steps are logged every 2, evaluated and saved every 3, 8 in all."""
    few = [
        f"data={folder / 'data'}", f"runs={folder / 'runs'}", f"model.base={base}", f"model.adapter={folder / 'sft'}",
        f"model.dpo_adapter={folder / 'out'}",
    ]  # fmt: skip
    for section in ("train", "sft"):
        few += [
            f"{section}.{key}={value}"
            for key, value in {
                "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 8, "warmup_steps": 1,
                "logging_steps": 2, "eval_steps": 3, "save_steps": 3, "learning_rate": 1e-2, "r": 4, "max_length": 256,
                "allow_cpu": "true",
            }.items()
        ]  # fmt: skip
    # Of five held-out pairs, all of them right show little at the usual level, after several evaluations.
    few += ["train.kl_prompts=2", "train.kl_tokens=8", "gate.confidence=0.6"]
    return resolve(sets=[*few, *sets], environment={}).config


def write_data(folder: Path) -> None:
    write_rows(folder / "data" / "train.jsonl", [pair(number) for number in range(22)])
    write_rows(folder / "data" / "val.jsonl", [pair(number) for number in range(22, 27)])


def metrics(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what depends on the clock."""
    return [
        {key: value for key, value in row.items() if key not in CLOCK_KEYS} for row in read_rows(run / "metrics.jsonl")
    ]


class AtStep(Silent):
    """Progress that calls `act` once a step is done."""

    def __init__(self, step: int, act: Callable[[], None]) -> None:
        self.step = step
        self.act = act

    def update(self, done: int, **counters: float) -> None:
        if done == self.step:
            self.act()


class Lines(Silent):
    """Progress that keeps what is logged."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def log(self, text: str) -> None:
        self.lines.append(text)


def kill_this_process() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def exit_code_of(work: Callable[[], Any]) -> int:
    """Do `work` in a process of its own; negative: the signal that ended it."""
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(120)
    assert process.exitcode is not None
    return process.exitcode


def config_of(start, folder, *sets):
    """Settings of a run in a folder of its own, from the fixture `start`, that no KL stops."""
    places = [f"runs={folder / 'runs'}", f"model.dpo_adapter={folder / 'out'}"]
    return settings(start, start / "base", "gate.kl_limit=100", *places, *sets)
