"""Where the processor time of a whole training run goes, from the start of the process, at the default settings.

    OMP_NUM_THREADS=1 python tests/bench/whole_run.py --base FOLDER --rows pairs.jsonl [--pairs 96] [--held-out 10]
    python tests/bench/whole_run.py ... --set train.eval_steps=3

Trains a fresh LoRA adapter on pairs of a JSONL file, the first of which are held out. `steps` are forward, backward and
optimizer; parts with an indent are of the part above them. Times are of one process and all its threads.
"""

import argparse
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

spent: dict[str, float] = defaultdict(float)
order: list[str] = []


def timed(owner: Any, method: str, part: str) -> None:
    """Count the processor time of a function or method under a name."""
    function = getattr(owner, method)
    order.append(part)

    def counted(*arguments: Any, **named: Any) -> Any:
        began = time.process_time()
        try:
            return function(*arguments, **named)
        finally:
            spent[part] += time.process_time() - began

    setattr(owner, method, counted)


def run(base: str, rows: list[str], held_out: int, sets: list[str], folder: Path) -> None:
    """Train, and print the table."""
    from dpo_cli.config.resolve import resolve
    from dpo_cli.training.leave_out import leave_out

    given = [
        f"data={folder}/data", f"runs={folder}/runs", f"model.base={base}", "model.adapter=none",
        f"model.dpo_adapter={folder}/adapter", "train.allow_cpu=true",
    ]  # fmt: skip
    config = resolve(sets=[*given, *sets], environment={}).config
    leave_out(config, "dpo")  # as the command does

    import torch

    from dpo_cli.progress import Silent
    from dpo_cli.stages import train
    from dpo_cli.training import dpo, kl, trainer
    from dpo_cli.training.forward import packed

    first: list[float] = []

    class Watched(Silent):
        def begin(self, *_: Any, **__: Any) -> None:
            first.append(time.process_time())

        def log(self, text: str) -> None:
            print(f"{time.process_time():7.1f} s  {text}", file=sys.stderr, flush=True)

    imported = time.process_time()
    (folder / "data").mkdir()
    for name, part in (("train", rows[held_out:]), ("val", rows[:held_out])):
        (folder / "data" / f"{name}.jsonl").write_text("".join(f"{row}\n" for row in part))
    timed(train, "encode_inputs", "token ids")
    timed(dpo, "_models", "loading the model")
    timed(packed, "enable", "check of the packed forward")
    timed(dpo, "keep_reference", "kept reference")
    timed(dpo.DpoTrainer, "training_step", "steps")
    timed(torch.optim.AdamW, "step", "optimizer")
    timed(dpo.DpoTrainer, "evaluation_loop", "evaluation")
    timed(dpo.DpoTrainer, "prediction_step", "  held-out pairs")
    timed(kl.SampledKl, "measure", "  KL")
    timed(kl.SampledKl, "of_reference", "  samples of the reference")
    timed(trainer.ResumableTrainer, "_save_checkpoint", "checkpoints")
    train.run(config, Watched(), "dpo", "run")
    whole = time.process_time()
    spent["imports"] = imported
    spent["steps"] += spent.pop("optimizer")
    print(f"{len(rows) - held_out} pairs, {held_out} held out, {' '.join(sets) or 'defaults'}: {whole:.1f} s, "
          f"the first step begins after {first[-1]:.1f} s")  # fmt: skip
    for part in ("imports", *(name for name in order if name != "optimizer")):
        print(f"  {part:<30} {spent[part]:8.1f} s {spent[part] / whole:6.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", required=True, help="folder of a model")
    parser.add_argument("--rows", type=Path, required=True, help="preference pairs")
    parser.add_argument("--pairs", type=int, default=96)
    parser.add_argument("--held-out", type=int, default=10)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()
    rows = options.rows.read_text("utf-8").splitlines()[: options.pairs + options.held_out]
    with tempfile.TemporaryDirectory() as folder:
        run(options.base, rows, options.held_out, options.set, Path(folder))


if __name__ == "__main__":
    main()
