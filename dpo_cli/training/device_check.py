"""Whether the card that a run was asked to train on is there: a rented one is paid for by the hour, used or not.

Asks torch for CUDA and the driver for its version. Needs torch only where it is asked.
"""

import subprocess
from math import prod
from pathlib import Path

from dpo_cli.errors import UserError
from dpo_cli.models.base_model import Base

LARGE = 1e9  # parameters, from which on a CPU is a mistake rather than a choice


def check_device(base: Base | None, card: str | None, allow_cpu: bool, model: str) -> None:
    """Refuse to train on a CPU where a card was asked for, or the base is large.

    Args:
        base: what is known of it; None: nothing.
        card: type of the card that the job was given; None: none was asked for.
        allow_cpu: go on all the same.
        model: what the base is called.

    Raises:
        UserError: naming the versions of driver and CUDA.
    """
    size = sum(prod(tensor.shape) for tensor in base.shapes.values()) if base is not None else 0
    if allow_cpu or (card is None and size <= LARGE):
        return
    import torch

    if torch.cuda.is_available():
        return
    what = f"a {card} was asked for" if card else f"{model} has {size / 1e9:.1f} billion parameters"
    built = torch.version.cuda
    needs = (
        f"torch {torch.__version__} is built for CUDA {built}" if built else f"torch {torch.__version__} has no CUDA"
    )
    raise UserError(
        f"{what}, and there is no GPU that torch can use: {needs}, {_driver()}",
        where="the device",
        hint="a driver for that CUDA (580 or newer for CUDA 13) or another torch; --allow-cpu trains on the CPU",
    )


def _driver() -> str:
    """What is known of the NVIDIA driver."""
    try:
        asked = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        found = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=True).stdout.split("\n")[0]
        name, _, version = found.partition(",")
        return f"the driver of {name.strip()} is {version.strip()}"
    except (OSError, subprocess.SubprocessError):
        pass
    file = Path("/proc/driver/nvidia/version")
    return f"the driver says {file.read_text().splitlines()[0]}" if file.is_file() else "there is no NVIDIA driver"
