"""Steps of two processes on a CPU (gloo, one thread each): ours beside TRL's padded path, and their losses.

    python tests/bench/processes.py [--model small] [--pairs 8] [--steps 3] [--rounds 2]

Each variant runs under torchrun in turns, `rounds` times; the pairs of a step are halved between the processes, at the
lengths of real pairs. Processor time is of one process and a step, wall time of a step as both see it; of each the
fastest round counts, ratios are of that. Losses are means over both processes, and of ours those of one process too.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from gpu import pairs
from variants import MODELS, Child, Variant, quiet

VARIANTS = {
    "TRL": Variant("TRL, padded"),
    "ours": Variant("ours", ours=True),
    "kept": Variant("ours, kept reference", ours=True, kept=True),
}


def child(options: argparse.Namespace) -> None:
    """One process of a variant: its times and the losses of all, printed by the first."""
    import torch.distributed

    quiet()
    rank, count = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    own = options.pairs // count
    made = pairs(options.pairs * options.steps, 1)
    trainer = Child(VARIANTS[options.child], "dpo", options.model, made, own, Path(options.folder) / str(rank), 8)
    found = []
    for step in (0, *range(options.steps)):  # the first warms up
        began, clock = time.perf_counter(), time.process_time()
        _, loss = trainer.step(step * options.pairs + rank * own, own)
        found.append((time.process_time() - clock, time.perf_counter() - began, loss))
    every: list[Any] = [found] * count
    if count > 1:
        torch.distributed.all_gather_object(every, found)
    if rank == 0:
        steps = list(zip(*every, strict=True))[1:]
        result = {
            "processor": sum(one[0] for step in steps for one in step) / count / options.steps,
            "wall": sum(max(one[1] for one in step) for step in steps) / options.steps,
            "losses": [sum(one[2] for one in step) / count for step in steps],
        }
        print("RESULT " + json.dumps(result), flush=True)


def measure(name: str, processes: int, arguments: list[str]) -> dict[str, Any]:
    """What a variant comes to in so many processes."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command += [__file__, "--child", name, "--folder", folder, *arguments]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        ended = subprocess.run(command, capture_output=True, text=True, env=environment)
    lines = [line for line in ended.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        sys.exit(ended.stderr[-2000:])
    found: dict[str, Any] = json.loads(lines[0].removeprefix("RESULT "))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="small")
    parser.add_argument("--pairs", type=int, default=8, help="pairs a step, of both processes")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--child", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options)
        return
    arguments = ["--model", options.model, "--pairs", str(options.pairs), "--steps", str(options.steps)]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in VARIANTS}
    for _ in range(options.rounds):
        for name in VARIANTS:
            found[name].append(measure(name, 2, arguments))
    best = {
        name: {key: min(one[key] for one in rounds) for key in ("processor", "wall")} for name, rounds in found.items()
    }
    one = measure("ours", 1, arguments)["losses"]
    print("| two processes | processor s a process and step | times | wall s a step | times | loss differs by |")
    print("|---|---|---|---|---|---|")
    for name, variant in VARIANTS.items():
        times = {key: best["TRL"][key] / best[name][key] for key in best[name]}
        off = max(abs(a - b) for a, b in zip(found[name][0]["losses"], found["TRL"][0]["losses"], strict=True))
        print(
            f"| {variant.name} | {best[name]['processor']:.2f} | {times['processor']:.2f} | {best[name]['wall']:.2f} "
            f"| {times['wall']:.2f} | {off:.1e} |"
        )
    off = max(abs(a - b) for a, b in zip(found["ours"][0]["losses"], one, strict=True))
    print(f"\nOurs in two processes and in one: losses differ by at most {off:.1e}.")


if __name__ == "__main__":
    main()
