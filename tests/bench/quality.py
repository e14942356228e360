"""DPO in a world whose true reward is known (tests/worlds.py): win rate and KL of each setting, beside best-of-N.

    python tests/bench/quality.py [--folder DIR] [--svg FILE] [--only NAME ...]

Each line is a run of the stages themselves: judge, pair, train. Labels err in the lines that say so. It is measured on
prompts that nothing was trained or tuned on, by plain transformers. Best of N from the SFT adapter, whose win rate is
N/(N+1) at a KL of log N - (N-1)/N, is nearly the most that any policy wins at its KL (arXiv:2406.00832).
In a folder that is kept, finished runs are not trained again.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import torch
from worlds import Judged, Point, align, best_of_rate, make

from dpo_cli.html import svg

# name -> what differs from beta 0.1, the world's learning rate and true labels
RUNS: dict[str, dict[str, Any]] = {
    "lr 1e-4": {"learning_rate": 1e-4},
    "lr 2e-4": {},
    "lr 4e-4": {"learning_rate": 4e-4},
    "lr 8e-4": {"learning_rate": 8e-4},
    "lr 4e-4, beta 0.5": {"learning_rate": 4e-4, "beta": 0.5},
    "lr 4e-4, beta 2": {"learning_rate": 4e-4, "beta": 2.0},
    "10% flipped": {"label": "flipped_10"},
    "20% flipped": {"label": "flipped_20"},
    "30% flipped": {"label": "flipped_30"},
    "half flipped": {"label": "coin"},
    "all flipped": {"label": "swapped"},
}
BEST_OF = (2, 4, 8, 16)
SEED = 2026  # of the reported world; settings were chosen with seed 1


def line(name: str, point: Point, accuracy: float | None = None) -> str:
    low, high = point.interval
    held, most = "     " if accuracy is None else f"{accuracy:5.3f}", best_of_rate(point.kl)
    return (f"{name:20} {held}  {point.win_rate:5.3f} [{low:.3f}, {high:.3f}]  {point.kl:6.2f}  {most:5.3f}   "
            f"{point.reward:5.2f}  {point.topical:5.3f}  {point.words:5.1f}")  # fmt: skip


def frontier(points: dict[str, Point]) -> str:
    """The picture: win rate against KL, the curve of best-of-N, and where each run came to lie."""
    most = 1.1 * max(point.kl for point in points.values())
    curve = [(kl, best_of_rate(kl)) for kl in (most * (step / 100) ** 2 for step in range(1, 101))]
    groups = {
        "true labels": [name for name in points if name.startswith("lr")],
        "flipped labels": [name for name in points if name.endswith("flipped")],
    }
    dots = {
        group: [(points[name].kl ** 0.5, points[name].win_rate, name) for name in names]
        for group, names in groups.items()
    }
    drawn = svg.against(
        "Win rate against KL: DPO and best-of-N",
        ("best of N", [(0.0, 0.5), *((kl**0.5, rate) for kl, rate in curve)]), dots,
        "root of KL(policy || SFT adapter), nats an answer", "win rate by the true reward",
    )  # fmt: skip
    return svg.standalone(drawn)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="kept between calls; unset: a temporary one")
    parser.add_argument("--svg", type=Path)
    parser.add_argument("--only", nargs="*", default=list(RUNS))
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp())
    torch.set_num_threads(1)
    config = make(folder, seed=SEED)
    eyes = Judged(config)
    print("                      held   win rate                       KL  best-N  reward  topic  words")
    for count in BEST_OF:
        print(line(f"best of {count}", eyes.best_of(count)), flush=True)
    points = {}
    for name in options.only:
        mine, trained = align(config, name.replace(" ", "-"), **RUNS[name])
        points[name] = eyes.point(mine.model.dpo_adapter)
        print(line(name, points[name], trained.metrics.get("eval_rewards/accuracies")), flush=True)
    if options.svg:
        options.svg.write_text(frontier(points))


if __name__ == "__main__":
    main()
