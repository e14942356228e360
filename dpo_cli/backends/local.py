"""`--backend local`: training in this process, on this machine's GPU or CPU."""

from pathlib import Path

from dpo_cli.progress import Progress
from dpo_cli.settings import Config
from dpo_cli.train import Trained, run
from dpo_cli.training.inputs import Stage


def train(
    config: Config, progress: Progress, stage: Stage = "dpo", name: str = "dpo", data: Path | None = None,
    fresh: bool = False, limit: int | None = None, dry_run: bool = False,
) -> Trained:  # fmt: skip
    """As `train.run`, which does it."""
    return run(config, progress, stage, name, data, fresh, limit, dry_run)
