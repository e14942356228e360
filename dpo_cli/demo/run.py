"""The whole pipeline on this machine: no key, no GPU, no network; on a tiny base of its own, or on a model of yours.

Makes a folder with everything that a real project has (base model, demonstrations, prompts, configuration file), all
of it small and from text that ships with the package, then calls the stages that every other command calls. In that
folder each command can be run by hand afterwards. The same call goes on where an earlier one stopped. Only texts, and
the tiny base, are the demo's own; the settings are the preset `demo`, or `demo-base` on a small instruct model of
yours, which is read where it lies.
"""

import contextlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from msgspec import Struct

from dpo_cli import errors
from dpo_cli.config import resolve
from dpo_cli.config.settings import Config
from dpo_cli.data.files import write_file
from dpo_cli.data.jsonl import read_rows, write_rows
from dpo_cli.data.records import Compared, Message
from dpo_cli.demo.scenes import Scene, make_scenes
from dpo_cli.errors import UserError
from dpo_cli.progress import Progress
from dpo_cli.stages import generate, judge, serve_config, train
from dpo_cli.stages.evaluate import run as evaluate
from dpo_cli.stages.evaluate.results import Evaluation
from dpo_cli.stages.generate import Generated
from dpo_cli.stages.judge import Judged
from dpo_cli.stages.pair import run as pair
from dpo_cli.stages.pair.run import Paired
from dpo_cli.training.run_history import Trained

SETTINGS = """\
# Made by `nothing-dpo demo`. The preset holds all settings of the demo; `nothing-dpo inspect config` prints them,
# and what is written here wins over it.
preset = "demo"
"""
SETTINGS_WITH_BASE = (
    SETTINGS.replace('"demo"', '"demo-base"')
    + """
[model]
base = {base}
"""
)
MADE_BY = "# Made by `nothing-dpo demo`."
MADE = ("base", "adapters", "data", "runs")  # what `fresh` removes
SEED = 7
VOICED = 0.35  # share of the lines that are in their speaker's voice: what DPO has to raise
TUNED_ON = 128  # scenes on which the preset's settings were chosen; those that measure come after them


class Sizes(Struct):
    """How much of everything: scenes for each purpose, and steps of pretraining."""

    base: int = 1600
    demonstrations: int = 512
    prompts: int = 512
    held_out: int = 128
    steps: int = 300


WITH_BASE = Sizes(base=0, demonstrations=192, prompts=112, held_out=64, steps=0)  # a quarter of an hour on two cores


class Demonstrated(Struct, kw_only=True):
    """What was made, and whether the DPO adapter is better: `verdict` is pass if the win rate's interval clears 0.5.

    `base` is the model that was given, None if the demo made its own. `seconds` is by stage. `example` is the first
    held-out scene that tells the adapters apart.
    """

    folder: str
    base: str | None = None
    sft: Trained
    generated: Generated
    judged: Judged
    paired: Paired
    dpo: Trained
    evaluation: Evaluation
    example: "SceneSample | None"
    serve_config: str
    seconds: dict[str, float]
    verdict: Literal["pass", "fail"]
    next: list[str]


class SceneSample(Struct):
    """One held-out prompt and both adapters' answers."""

    prompt: list[Message]
    reference: str
    policy: str
    reference_score: float
    policy_score: float


def run(
    folder: Path | None, progress: Progress, fresh: bool = False, sizes: Sizes | None = None, base: str | None = None
) -> Demonstrated:
    """Make the folder and run every stage in it; what an earlier run finished is kept.

    Args:
        folder: a new or empty one, or one that an earlier run made; unset: `demo`, with a base `demo-` and its name.
        progress: where each stage reports.
        fresh: start over.
        sizes: smaller for tests.
        base: folder or Hub id of a small instruct model; unset: the demo makes a tiny one.

    Raises:
        UserError: the folder holds something else, the extra `train` is missing, or what the stages raise.
    """
    errors.require("train", "the demo")
    if base is None:
        # Matrices this small gain nothing from a second thread, and on a busy machine lose 6 times to waiting for it.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    elif Path(base).is_dir():
        base = str(Path(base).resolve())
    folder = folder or Path(f"demo-{Path(base).name}" if base else "demo")
    _claim(folder, fresh, SETTINGS if base is None else SETTINGS_WITH_BASE.format(base=json.dumps(base)))
    sizes = sizes or (Sizes() if base is None else WITH_BASE)
    seconds: dict[str, float] = {}
    with contextlib.chdir(folder):  # so that paths and results are those of the same commands typed there
        settings = resolve.resolve(file=Path(resolve.DEFAULT_FILE), environment={}).config
        with _clock(seconds, "base"):
            _make_inputs(settings, sizes)
            if base is None:
                _make_base(settings, sizes, progress)
        with _clock(seconds, "sft"):
            sft = train.run(settings, progress, stage="sft", name="sft")
        with _clock(seconds, "generate"):
            generated = generate.run(settings, progress)
        with _clock(seconds, "judge"):
            judged = judge.run(settings, progress)
            paired = pair.run(settings)
        with _clock(seconds, "dpo"):
            dpo = train.run(settings, progress, stage="dpo", name="dpo")
        with _clock(seconds, "evaluate"):
            evaluation = evaluate.run(settings, progress)
            example = _example(Path(evaluation.path))
        served = serve_config.render(serve_config.plan(settings), settings, "cli")
    return Demonstrated(
        folder=str(folder),
        base=base,
        sft=sft,
        generated=generated,
        judged=judged,
        paired=paired,
        dpo=dpo,
        evaluation=evaluation,
        example=example,
        serve_config=served,
        seconds=seconds,
        verdict="pass" if evaluation.interval[0] > 0.5 else "fail",
        next=[
            f"cd {folder}",
            "nothing-dpo inspect pairs --browse",
            "nothing-dpo inspect run dpo",
            f"nothing-dpo train --name again --beta {0.1 if base is None else 0.3:g}",
        ],
    )


def _claim(folder: Path, fresh: bool, settings: str) -> None:
    """Make the folder the demo's own, or refuse one that is somebody else's, or of another base."""
    file = folder / resolve.DEFAULT_FILE
    there = file.read_text("utf-8") if file.exists() else ""
    ours = _marks(settings) <= set(there.splitlines())
    if folder.exists() and not ours and (not folder.is_dir() or any(folder.iterdir())):
        other = "the demo made this folder for another base" if MADE_BY in there else "this is no folder of the demo's"
        raise UserError(other, where=str(folder), hint="nothing-dpo demo --folder NEW")
    if fresh:
        for name in MADE:
            shutil.rmtree(folder / name, ignore_errors=True)
    if not ours:
        write_file(file, settings.encode())


def _marks(settings: str) -> set[str]:
    """The lines that stay when a user adds settings of their own: preset and base."""
    return {line for line in settings.splitlines() if line.startswith(("preset", "base"))}


def _make_inputs(settings: Config, sizes: Sizes) -> None:
    """Scenes for every purpose, no two with the same opening."""
    _, demonstrations, prompts, _, held_out = _scenes(sizes)
    data = Path(settings.generate.prompts)
    write_rows(data / "train.jsonl", map(_demonstration, demonstrations))
    write_rows(data / "val.jsonl", map(_demonstration, prompts))
    write_rows(Path(settings.evaluate.prompts or data / "heldout.jsonl"), map(_demonstration, held_out))


def _make_base(settings: Config, sizes: Sizes, progress: Progress) -> None:
    """The tiny base model, unless it is there."""
    base = Path(settings.model.base)
    if base.exists():
        return
    from dpo_cli.demo import tiny

    texts = [f"{scene.opening}\n{scene.rest}" for scene in _scenes(sizes)[0]]
    unfinished = base.with_name(f".{base.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    tiny.make_base(unfinished, texts, vocabulary=1024, hidden=96, heads=3, context=512)
    tiny.pretrain(unfinished, texts, progress, steps=sizes.steps)
    unfinished.rename(base)


def _scenes(sizes: Sizes) -> list[list[Scene]]:
    counts = (sizes.base, sizes.demonstrations, sizes.prompts, TUNED_ON, sizes.held_out)
    scenes = iter(make_scenes(sum(counts), VOICED, SEED))
    return [[next(scenes) for _ in range(count)] for count in counts]


def _demonstration(scene: Scene) -> dict[str, list[Message]]:
    return {
        "prompt": [{"role": "user", "content": scene.opening}],
        "completion": [{"role": "assistant", "content": scene.rest}],
    }


def _example(path: Path) -> SceneSample | None:
    for _, row in read_rows(path, Compared):
        if row.policy_scores[0] > row.reference_scores[0]:
            return SceneSample(
                row.prompt, row.reference[0], row.policy[0], row.reference_scores[0], row.policy_scores[0]
            )
    return None


@contextlib.contextmanager
def _clock(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.monotonic()
    yield
    seconds[stage] = round(time.monotonic() - start, 1)
