"""Everything that only a GPU can show, within nine minutes on one card and without a network.

    python tests/bench/gpu.py --out DIR [--smoke]

Writes DIR/gpu.json after each part, and DIR/gpu.md at the end: the tests of the attention kernels; loss and gradient in
bfloat16 of each attention path, and of TRL, against float32; the steps of a 3B-shaped random Llama with LoRA r=32 at
the lengths of real pairs, beside TRL as it comes and at its best, as tokens a second, MFU and share of the card's own
matrix-product ceiling; peak memory against `inspect plan` for six settings; a run that really lacks memory; weights in
4 bits; what torch.compile and Liger's kernels add. A part that fails is written down as such, and the next one runs.
`--smoke` does all of it on a CPU with a tiny model, as far as a CPU can. It has not been run on a card.
"""

import argparse
import io
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from packing import Packed, Plain, configuration, make, outcome, rows
from trl.trainer.utils import get_peak_flops
from variants import CUDA, MODELS, Remote, Variant, quiet, why_not

from dpo_cli.config.settings import TrainSection
from dpo_cli.training import plan
from dpo_cli.training.forward import attention, packed
from dpo_cli.training.trained_parameters import of_fresh_adapter

TESTS = Path(__file__).parents[1]
MINUTES = 9.0
# Tokens of prompt, chosen and rejected of 32 real pairs: scenes continued by a small model.
LENGTHS = [
    (271, 283, 166), (191, 118, 186), (259, 261, 159), (185, 289, 193), (222, 279, 264), (237, 290, 242),
    (302, 286, 202), (216, 285, 279), (236, 302, 287), (221, 84, 264), (222, 277, 270), (220, 292, 283),
    (270, 279, 277), (268, 279, 275), (240, 272, 43), (230, 288, 284), (233, 286, 291), (295, 259, 229),
    (243, 272, 288), (228, 281, 284), (225, 289, 283), (220, 276, 143), (275, 291, 279), (238, 91, 124),
    (211, 250, 169), (203, 258, 291), (224, 264, 291), (236, 283, 285), (261, 293, 290), (317, 258, 283),
    (244, 291, 292), (265, 283, 246),
]  # fmt: skip
SPEED = [
    Variant("TRL as it comes"),
    Variant("TRL with Liger", liger=True),
    Variant("TRL, grouped, kept reference", grouped=True, kept=True),
    Variant("ours", ours=True),
    Variant("ours, kept reference", ours=True, kept=True),
]
FUSED = [
    Variant("ours, kept reference", ours=True, kept=True),
    Variant("ours, kept reference, compiled", ours=True, kept=True, compiled=True),
    Variant("ours, kept reference, with Liger", ours=True, kept=True, liger=True),
]
PATHS = {"split": attention.split_attention, "variable length": attention.varlen_attention}


def pairs(count: int, shorter: int) -> list[dict[str, list[int]]]:
    """Random pairs of the real lengths, `shorter` times shorter."""
    lengths = [LENGTHS[number % len(LENGTHS)] for number in range(count)]
    return rows([tuple(max(2, size // shorter) for size in row) for row in lengths])  # type: ignore[misc]


def kernels(smoke: bool, folder: Path) -> dict[str, Any]:
    """The kernels' own tests, which are skipped where there is no card."""
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", str(TESTS / "test_packed.py"), "-k", "cuda"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=TESTS.parent)
    last = (ended.stdout.splitlines() or [ended.stderr[-300:]])[-1].strip("= ")
    return {"failed": last} if ended.returncode else {"result": last}


def equality(smoke: bool, folder: Path) -> dict[str, Any]:
    """Loss and gradient in bfloat16, by attention path, against TRL's in float32."""
    config = configuration("Llama", hidden_size=256, intermediate_size=512, max_position_embeddings=1024)
    made = pairs(4, 8 if smoke else 1)
    arguments = {"pairs": made, "use_cpu": not CUDA}
    with redirect_stdout(io.StringIO()):
        exact = outcome(make(Plain, folder / "exact", config, **arguments))
    found = {"TRL": _against(exact, make(Plain, folder / "trl", config, bf16=True, **arguments))}
    chosen = attention._kernel
    for name, kernel in PATHS.items():
        if not CUDA and name != "split":
            found[name] = {"skipped": "needs a card"}
            continue
        attention._kernel = lambda *_, kernel=kernel: kernel  # type: ignore[assignment]
        try:
            trainer = make(Packed, folder / name, config, bf16=True, **arguments)
            reason = packed.enable(trainer)
            found[name] = {"not packed": reason} if reason else _against(exact, trainer)
        finally:
            attention._kernel = chosen
    return found


def _against(exact: dict[str, Any], trainer: Any) -> dict[str, float]:
    with redirect_stdout(io.StringIO()):  # a trainer's log
        ours = outcome(trainer)
    gradients = [
        ((ours["gradient"][name] - value).norm() / value.norm().clamp(min=1e-12)).item()
        for name, value in exact["gradient"].items()
    ]
    difference = abs(ours["logged"]["loss"] - exact["logged"]["loss"])
    return {"loss differs by": difference, "gradients differ by at most": max(gradients)}


def ceiling(smoke: bool, folder: Path) -> dict[str, Any]:
    """TFLOPS of the card's own matrix products, at the sizes of a step."""
    device, size = ("cuda", 8192) if CUDA else ("cpu", 256)
    dtype = torch.bfloat16 if CUDA else torch.float32
    one, other = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = math.inf
    for _ in range(10):
        _wait()
        began = time.perf_counter()
        one @ other
        _wait()
        best = min(best, time.perf_counter() - began)
    peak = get_peak_flops(torch.cuda.get_device_name(), "bf16") if CUDA else None
    return {"TFLOPS": 2 * size**3 / best / 1e12, "data sheet": peak / 1e12 if peak else None}


def _wait() -> None:
    if CUDA:
        torch.cuda.synchronize()


def speed(smoke: bool, folder: Path) -> dict[str, Any]:
    """Steps of 4 pairs, each variant in a process of its own, one after another: the card holds one model."""
    asked = [(variant, True) for variant in SPEED] + [(SPEED[-1], False)]
    return _timed(asked, smoke, folder)


def fused(smoke: bool, folder: Path) -> dict[str, Any]:
    """Ours with norms, SwiGLU and rotary embedding as kernels of torch.compile's and of Liger's."""
    return _timed([(variant, False) for variant in FUSED], smoke, folder)


def _timed(asked: list[tuple[Variant, bool]], smoke: bool, folder: Path) -> dict[str, Any]:
    """Steps of each variant, with checkpointing or without it; ratios are of the first."""
    size, count, steps = ("tiny", 2, 2) if smoke else ("3B", 4, 6)
    made = pairs(count * steps, 8 if smoke else 1)
    limit = ceiling(smoke, folder)["TFLOPS"] * 1e12
    found: dict[str, Any] = {}
    for variant, checkpointing in asked:
        name = variant.name + ("" if checkpointing else ", no checkpointing")
        if reason := why_not(variant):
            found[name] = {"not applied here": reason}
            continue
        operations = (4 if variant.kept else 6) * _multiplications(size, made)
        try:
            child = Remote(variant, "dpo", size, made, count, folder / name, 32, checkpointing=checkpointing)
            for step in range(-1, steps):
                child.step(max(step, 0) * count, count)
        except OSError as error:  # memory lacks
            found[name] = {"failed": str(error) or "see stderr"}
            continue
        seconds = sum(child.seconds[1:])
        tokens = sum(sum(map(len, row.values())) + len(row["prompt_ids"]) for row in made)
        found[name] = {
            "tokens/s": tokens / seconds, "seconds a step": seconds / steps, "first step": child.seconds[0],
            "seconds of the reference": child.fill, "share of the ceiling": operations / seconds / limit,
            "TFLOPS": operations / seconds / 1e12, "GB": child.ask("peak_gb"), "loss": child.losses[-1],
        }  # fmt: skip
        child.close()
    first = next(iter(found.values())).get("tokens/s")
    for one in found.values():
        one["ratio"] = one["tokens/s"] / first if first and "tokens/s" in one else None
    return found


def _multiplications(size: str, made: list[dict[str, list[int]]]) -> float:
    """Weights times the tokens that meet them in a forward, each prompt once; two operations each."""
    shape = _shape(size)
    scored = sum(len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in made)
    tokens = scored + sum(len(row["prompt_ids"]) for row in made)
    return shape.linear_parameters() * tokens + shape.vocab_size * shape.hidden_size * scored


def _shape(size: str) -> plan.Shape:
    return plan.Shape(**MODELS[size], tie_word_embeddings=False)


def memory(smoke: bool, folder: Path) -> dict[str, Any]:
    """Peak memory of a step against what `inspect plan` reckons, with and without checkpointing at three batches."""
    size = "tiny" if smoke else "3B"
    found: dict[str, Any] = {}
    for checkpointing in (True, False):
        for batch in (1, 2, 4):
            made = pairs(batch, 8 if smoke else 1)
            child = Remote(
                Variant("ours", ours=True), "dpo", size, made, batch, folder / f"{checkpointing}{batch}", 32,
                checkpointing=checkpointing,
            )  # fmt: skip
            child.step(0, batch)
            scored = sum(len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in made)
            tokens = scored + sum(len(row["prompt_ids"]) for row in made)
            section = TrainSection(gradient_checkpointing=checkpointing)
            adapter, _ = of_fresh_adapter(section, _shape(size), None)
            parts = plan.memory_gb(section, _shape(size), adapter, tokens, scored)
            found[f"batch {batch}, {'' if checkpointing else 'no '}checkpointing"] = {
                "measured GB": child.ask("peak_gb"), "plan GB": sum(parts.values()) - parts["context"],
            }  # fmt: skip
            child.close()
    return found


def out_of_memory(smoke: bool, folder: Path) -> dict[str, Any]:
    """A run on a card whose memory is made to lack: it must go on with fewer rows a forward and end."""
    if not CUDA:
        return {"skipped": "needs a card"}
    from adapters import base_model, save_adapter
    from training import Lines, settings, write_data

    from dpo_cli.stages import train

    save_adapter(folder / "sft", base_model(folder / "base"))
    write_data(folder)
    free, whole = torch.cuda.mem_get_info()
    said = Lines()
    config = settings(folder, folder / "base", "train.per_device_train_batch_size=8", "gate.kl_limit=100")
    for megabytes in (600, 400, 300, 200, 150, 100):  # until a batch of 8 does not fit
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(megabytes * 1e6 / whole)
        result = train.run(config, said, name=f"oom{megabytes}")
        if any("out_of_memory" in line for line in said.lines):
            break
    torch.cuda.set_per_process_memory_fraction(1.0)
    lines = [line for line in said.lines if "out_of_memory" in line]
    return {"MB allowed": megabytes, "said": lines, "steps": result.step, "free before": free / 1e9}


def four_bit(smoke: bool, folder: Path) -> dict[str, Any]:
    """Weights in 4 bits: packed against TRL's log-probabilities, and the memory that they take."""
    from transformers import AutoModelForCausalLM

    from dpo_cli.training.trainer import keep_differentiable, load_base

    config = configuration("Llama", hidden_size=256, intermediate_size=512)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "base")

    def load() -> Any:
        return load_base(folder / "base", TrainSection(load_in_4bit=True))

    trainer = make(Packed, folder / "run", config, load=load, use_cpu=not CUDA)
    keep_differentiable(trainer.model)
    reason = packed.enable(trainer)
    with redirect_stdout(io.StringIO()):  # a trainer's log
        return {"not packed": reason, "loss": outcome(trainer)["logged"]["loss"]}


PARTS: list[Callable[[bool, Path], dict[str, Any]]] = [
    kernels, equality, ceiling, speed, memory, out_of_memory, four_bit, fused,
]  # fmt: skip


def table(results: dict[str, Any]) -> str:
    """The parts as Markdown."""
    lines = [f"# {results['device']}, torch {results['torch']}", ""]
    for part, found in results["parts"].items():
        lines += [f"## {part}", ""]
        tables = {name: one for name, one in found.items() if isinstance(one, dict)}
        lines += [f"- {name}: {_shown(one)}" for name, one in found.items() if name not in tables]
        columns = list(dict.fromkeys(column for one in tables.values() for column in one))
        if tables:
            lines += [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
            lines += [
                f"| {name} | {' | '.join(_shown(one.get(column, '')) for column in columns)} |"
                for name, one in tables.items()
            ]
        lines.append("")
    return "\n".join(lines)


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu.json and gpu.md")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, as far as a CPU goes")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="parts that have not begun by then are left out")
    parser.add_argument("--parts", nargs="*", choices=[part.__name__ for part in PARTS], help="only these")
    options = parser.parse_args()
    if not CUDA and not options.smoke:
        parser.error("no CUDA device here; --smoke runs on a CPU")
    quiet()
    options.out.mkdir(parents=True, exist_ok=True)
    ends = time.monotonic() + 60 * options.minutes
    device = torch.cuda.get_device_name() if CUDA else "CPU (smoke test)"
    results: dict[str, Any] = {"device": device, "torch": torch.__version__, "parts": {}}
    for part in PARTS:
        if options.parts and part.__name__ not in options.parts:
            continue
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            if began > ends:
                found = {"skipped": f"the {options.minutes:g} minutes are over"}
            else:
                try:
                    found = part(options.smoke, Path(folder))
                except Exception as error:
                    found = {"failed": f"{type(error).__name__}: {error}"[:500]}
        results["parts"][part.__name__] = found | {"took": f"{time.monotonic() - began:.0f} s"}
        (options.out / "gpu.json").write_text(json.dumps(results, indent=2))
        print(part.__name__, json.dumps(found), flush=True)
    (options.out / "gpu.md").write_text(table(results))
    sys.exit(any("failed" in found for found in results["parts"].values()))


if __name__ == "__main__":
    main()
