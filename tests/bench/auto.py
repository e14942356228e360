"""`train --auto` against a full grid of the same rates, in worlds whose true reward is known (tests/worlds.py).

    python tests/bench/auto.py [--folder DIR] [--seeds 11 12 13] [--kl-limit 0.1] [--beyond 3e-3 1e-2] [--small]

Each line is a rate trained to its end under the KL limit, measured by the true reward on prompts that nothing was
trained or tuned on; the star is the one that the search took. The last line says how much better the best of the grid
is, paired by prompt, with its 95% interval. `--beyond` adds rates to the grid that the search does not try. In a
folder that is kept, finished runs are not trained again.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).parents[1]))
import torch
import worlds
from msgspec.structs import replace

from dpo_cli.progress import Silent
from dpo_cli.stages import judge, train
from dpo_cli.stages.evaluate.win_rate import win_rate
from dpo_cli.stages.pair import run as pair
from dpo_cli.statistics import bootstrap
from dpo_cli.workflows import auto

SMALL = worlds.Sizes(base=1500, hidden=64, steps=200, demonstrations=256, prompts=384, measured=128)


class Said(Silent):
    def log(self, text: str) -> None:
        if text.startswith("auto"):
            print(f"  {text}", flush=True)


def wins_of(eyes: worlds.Judged, adapter: str) -> list[float]:
    """Share of the comparisons with the SFT adapter that the adapter wins, by prompt."""
    answers, _ = eyes._sample(eyes.load(adapter), eyes.seed + 1)
    return [
        win_rate([worlds.zest([], text) for text in theirs], [worlds.zest([], text) for text in ours])
        for theirs, ours in zip(eyes.answers, answers, strict=True)
    ]


def one_world(
    folder: Path, seed: int, limit: float, beyond: list[float], sizes: worlds.Sizes | None
) -> tuple[list[float], list[float]]:
    config = worlds.make(folder, sizes, seed=seed)
    config = replace(config, gate=replace(config.gate, kl_limit=limit))
    judge.run(config, Silent())
    pair.run(config)
    found = auto.run(config, Said())
    eyes = worlds.Judged(config)
    unit = train.run(config, Silent(), name="none", dry_run=True).steps // auto.LEAST_STEPS
    wins = {}
    for rate in (*auto.rates(config), *beyond):
        key = f"{rate:g}"
        one = auto._of_rate(config, rate, unit, key)
        trained = train.run(one, Silent(), name=f"dpo-auto-{key}")
        point = eyes.point(one.model.dpo_adapter)
        wins[rate] = wins_of(eyes, one.model.dpo_adapter)
        low, high = point.interval
        print(f"  {'*' if rate == found.best else ' '} lr {key:8} win {point.win_rate:.3f} [{low:.3f}, {high:.3f}]  "
              f"KL {point.kl:5.2f} an answer  topic {point.topical:.2f}  {trained.verdict}", flush=True)  # fmt: skip
    best = max(wins, key=lambda rate: fmean(wins[rate]))
    return wins[best], wins[found.best]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="*", default=[11, 12, 13])
    parser.add_argument("--kl-limit", type=float, default=0.1)
    parser.add_argument("--beyond", type=float, nargs="*", default=[])
    parser.add_argument("--small", action="store_true", help="worlds of a third of the size")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp())
    torch.set_num_threads(1)
    for seed in options.seeds:
        print(f"world {seed}", flush=True)
        best, taken = one_world(
            folder / str(seed), seed, options.kl_limit, options.beyond, SMALL if options.small else None
        )
        off = bootstrap([one - other for one, other in zip(best, taken, strict=True)], 2000, seed=0)
        print(f"  best of the grid less the search: {off.value:+.3f} [{off.low:+.3f}, {off.high:+.3f}]", flush=True)


if __name__ == "__main__":
    main()
