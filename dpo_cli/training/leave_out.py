"""Libraries that PEFT and TRL import wherever they are installed, left out of a process that has no use for them.

bitsandbytes and wandb take a quarter of what it takes to import the trainers. An import of a module that stands as
None in `sys.modules` fails as that of one that is not installed does, which both libraries are made for. That can't be
taken back, so it is done only in a process that trains once and ends. Not covered: sweeps, rounds and other commands,
whose settings may change on the way.
"""

import os
import sys
from typing import Any

from dpo_cli import errors
from dpo_cli.config.settings import Config
from dpo_cli.models.base_model import find_base
from dpo_cli.training.inputs import Stage


def leave_out(config: Config, stage: Stage) -> list[str]:
    """Leave out what a run with these settings does not need; the names of what is left out."""
    modules: dict[str, Any] = sys.modules
    if not errors.one_command:
        return []
    section = config.train if stage == "dpo" else config.sft
    unused = [] if section.load_in_4bit or _may_be_quantised(config.model.base) else ["bitsandbytes"]
    if section.report_to in (None, "none") and not os.environ.get("WANDB_API_KEY"):
        unused.append("wandb")
    unused = [name for name in unused if name not in modules]
    modules |= dict.fromkeys(unused)
    return unused


def _may_be_quantised(base: str) -> bool:
    """Whether the base comes with quantised weights, or is not here yet."""
    folder = find_base(base)
    file = None if folder is None else folder / "config.json"
    return file is None or not file.is_file() or b'"quantization_config"' in file.read_bytes()
