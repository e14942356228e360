"""A DPO step of ours against TRL as it comes and TRL at its best, side by side on the same LoRA model and rows.

    OMP_NUM_THREADS=1 python tests/bench/train.py [--rows pairs.jsonl] [--models small large] [--svg steps.svg]

With `--results results.jsonl` several calls add up: table and plot show all that the file holds.

Every variant starts from the same weights and takes the same steps in turns, so that a busy machine slows all alike.
`TRL, compact` scores completions only, as TRL does on a GPU by itself; `kept` variants have their reference's
log-probabilities at hand, TRL's by its own `precompute_ref_log_probs`. `3 epochs` includes computing those once.
Memory is the peak of one step over what was held before, in a process of its own on a CPU. A time is the median of
the steps; of one thread it is the time on the processor, to which the machine's other work counts little. With a GPU:
bfloat16, a 3B-shaped model, gradient checkpointing, and MFU.
"""

import argparse
import ctypes
import json
import logging
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import trl.trainer.utils
from datasets import Dataset, disable_progress_bars
from packing import Packed, Plain, rows, tokenizer
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from trl import DPOConfig

from dpo_cli.demo.tiny import make_base
from dpo_cli.progress import Silent
from dpo_cli.training.forward import packed, reference_cache

MODELS: dict[str, dict[str, int]] = {
    "small": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 4,
              "num_key_value_heads": 2, "vocab_size": 8192},
    "large": {"hidden_size": 384, "intermediate_size": 1152, "num_hidden_layers": 8, "num_attention_heads": 6,
              "num_key_value_heads": 2, "vocab_size": 8192},
    "3B": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24,
           "num_key_value_heads": 8, "vocab_size": 128256},
}  # fmt: skip
SHAPES = {"600:150": (600, 150), "1124:141": (1124, 141), "211:190": (211, 190)}
CUDA = torch.cuda.is_available()
COMPACT = trl.trainer.utils._use_triton


def _clock() -> float:
    return time.perf_counter() if CUDA or torch.get_num_threads() > 1 else time.process_time()


class Variant:
    """One trainer and its steps so far."""

    def __init__(self, name: str, ours: bool, compact: bool, kept: bool) -> None:
        self.name, self.ours, self.compact, self.kept = name, ours, compact, kept
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.fill = 0.0  # seconds that the reference took, where it is kept

    def start(self, size: str, pairs: list[dict[str, list[int]]], batch: int, folder: Path) -> None:
        """Make the trainer, and its reference's log-probabilities if they are kept."""
        model = network(size)
        arguments = DPOConfig(
            output_dir=str(folder), bf16=CUDA, report_to="none", max_length=None, gradient_checkpointing=CUDA,
            per_device_train_batch_size=batch, learning_rate=1e-4, disable_tqdm=True,
            precompute_ref_log_probs=self.kept and not self.ours,
        )  # fmt: skip
        self._be_compact()
        began = _clock()
        self.trainer = (Packed if self.ours else Plain)(
            model=model, args=arguments, train_dataset=Dataset.from_list(pairs), processing_class=tokenizer()
        )
        with torch.no_grad():  # the policy has moved: at step zero every loss is ln 2, whatever is wrong
            generator = torch.Generator(model.device).manual_seed(1)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    noise = torch.randn(parameter.shape, generator=generator, device=parameter.device)
                    parameter += 0.01 * noise.to(parameter.dtype)
        if self.ours:
            reason = packed.enable(self.trainer)
            assert reason is None, reason
            began = _clock()
            if self.kept:
                reference_cache.keep_reference(self.trainer, folder / "reference", Silent(), wanted=True)
        self.fill = _clock() - began if self.kept else 0.0
        self.trainer.current_gradient_accumulation_steps = 1
        self.trainer.create_optimizer()
        self.data = self.trainer.train_dataset.to_list()

    def step(self, first: int, count: int) -> None:
        """One optimizer step on some pairs."""
        self._be_compact()
        began = _clock()
        batch = self.trainer._prepare_inputs(self.trainer.data_collator(self.data[first : first + count]))
        loss = self.trainer.training_step(self.trainer.model, batch)
        self.trainer.optimizer.step()
        self.trainer.optimizer.zero_grad()
        self.losses.append(loss.item())
        if CUDA:
            torch.cuda.synchronize()
        self.seconds.append(_clock() - began)

    def _be_compact(self) -> None:
        trl.trainer.utils._use_triton = (lambda device: True) if self.compact else COMPACT


def variants() -> list[Variant]:
    return [
        Variant("TRL as it comes", ours=False, compact=False, kept=False),
        Variant("TRL, compact", ours=False, compact=True, kept=False),
        Variant("TRL, compact, kept reference", ours=False, compact=True, kept=True),
        Variant("ours", ours=True, compact=False, kept=False),
        Variant("ours, kept reference", ours=True, compact=False, kept=True),
    ]


def network(size: str) -> Any:
    """A random Llama with a random LoRA, always the same."""
    torch.manual_seed(0)
    config = LlamaConfig(**MODELS[size], max_position_embeddings=4096, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    with torch.device("cuda" if CUDA else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if CUDA else torch.float32)
    lora = LoraConfig(task_type="CAUSAL_LM", r=32 if CUDA else 8, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(model, lora)


def peak_memory(step: Callable[[], None]) -> float:
    """MB that one call takes at its peak; a CPU's call runs in a fork, whose memory starts as ours."""
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 1e6

    def measure(result: Any) -> None:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD: what is freed is given back at once
        libc.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
        before = _status("VmRSS")
        step()
        result.put(_status("VmHWM") - before)

    context = multiprocessing.get_context("fork")
    result = context.Queue()
    process = context.Process(target=measure, args=(result,))
    process.start()
    peak: float = result.get()
    process.join()
    return peak


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1000 for line in lines if line.startswith(name))


def encoded(path: Path, count: int, vocabulary: int, folder: Path) -> list[dict[str, list[int]]]:
    """Pairs of a JSONL file in TRL's conversational format, with a tokenizer made from them."""
    pairs = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    sides = ("prompt", "chosen", "rejected")
    texts = [message["content"] for pair in pairs for side in sides for message in pair[side]]
    encoder = AutoTokenizer.from_pretrained(make_base(folder, texts, vocabulary=vocabulary))

    def ids(messages: list[dict[str, str]], answer_next: bool) -> list[int]:
        text = encoder.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer_next)
        return encoder(text, add_special_tokens=False)["input_ids"]

    made = []
    for pair in pairs[:count]:
        prompt = ids(pair["prompt"], True)
        chosen, rejected = (ids(pair["prompt"] + pair[side], False)[len(prompt) :] for side in sides[1:])
        made.append({"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected})
    return made


def measure(size: str, name: str, pairs: list[dict[str, list[int]]], batch: int, folder: Path) -> list[dict[str, Any]]:
    """One line a variant."""
    made = variants()
    for number, variant in enumerate(made):
        variant.start(size, pairs, batch, folder / str(number))
    steps = len(pairs) // batch
    for step in range(steps):
        for variant in made:
            variant.step(step * batch, batch)
    tokens = sum(2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in pairs)
    longest = max(range(steps), key=lambda step: sum(len(row["prompt_ids"]) for row in pairs[step * batch :][:batch]))
    lines = []
    for variant in made:
        seconds = statistics.median(variant.seconds)
        lines.append(
            {
                "model": size, "pairs": name, "variant": variant.name, "seconds": seconds,
                "tokens/s": tokens / steps / seconds,
                "ratio": statistics.median(
                    theirs / own for theirs, own in zip(made[0].seconds, variant.seconds, strict=True)
                ),
                "3 epochs": 3 * sum(made[0].seconds) / (3 * sum(variant.seconds) + variant.fill),
                "MB": peak_memory(lambda own=variant: own.step(longest * batch, batch)),
                "loss differs by": max(
                    abs(one - other) for one, other in zip(made[0].losses, variant.losses[:steps], strict=True)
                ),
                "MFU": _mfu(size, pairs, steps, seconds),
            }
        )  # fmt: skip
    return lines


def _mfu(size: str, pairs: list[dict[str, list[int]]], steps: int, seconds: float) -> float:
    """Share of the card's peak that goes into necessary work: 6 FLOPs a parameter and token, each prompt once."""
    peak = trl.trainer.utils.get_peak_flops(torch.cuda.get_device_name(), "bf16") if CUDA else None
    shape = MODELS[size]
    hidden, keys = shape["hidden_size"], shape["num_key_value_heads"] / shape["num_attention_heads"]
    layer = hidden * hidden * (2 + 2 * keys) + 3 * hidden * shape["intermediate_size"]
    tokens = sum(len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in pairs)
    scored = sum(len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in pairs)
    needed = 6 * (layer * shape["num_hidden_layers"] * tokens + hidden * shape["vocab_size"] * scored) / steps
    return needed / seconds / peak if peak else float("nan")


def table(lines: list[dict[str, Any]]) -> str:
    columns = [
        "model",
        "pairs",
        "variant",
        "seconds",
        "tokens/s",
        "ratio",
        "3 epochs",
        "MB",
        "memory",
        "loss differs by",
    ]
    columns += ["MFU"] if CUDA else []
    formats = {"seconds": ".2f", "tokens/s": ".0f", "ratio": ".2f", "3 epochs": ".2f", "MB": ".0f", "memory": ".2f",
               "loss differs by": ".0e", "MFU": ".2f"}  # fmt: skip
    text = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for line in lines:
        theirs = next(one for one in lines if (one["model"], one["pairs"]) == (line["model"], line["pairs"]))
        line = line | {"memory": line["MB"] / theirs["MB"]}
        text.append("| " + " | ".join(format(line[name], formats.get(name, "")) for name in columns) + " |")
    return "\n".join(text)


def plot(lines: list[dict[str, Any]]) -> str:
    """Bars of steps a second over TRL as it comes, as SVG."""
    scale, height = 110, 16
    parts = []
    for number, line in enumerate(lines):
        top = 20 + number * height + (number // len(variants())) * height
        colour = "#2a6f97" if line["variant"].startswith("ours") else "#b0b0b0"
        parts.append(
            f'<text x="300" y="{top + 11}" text-anchor="end">{line["model"]} {line["pairs"]}: {line["variant"]}</text>'
            f'<rect x="306" y="{top}" width="{line["ratio"] * scale:.0f}" height="{height - 3}" fill="{colour}"/>'
            f'<text x="{312 + line["ratio"] * scale:.0f}" y="{top + 11}">{line["ratio"]:.2f}</text>'
        )
    depth = 40 + (len(lines) + len(lines) // len(variants())) * height
    style = 'font-family="sans-serif" font-size="11"'
    paper = '<rect width="100%" height="100%" fill="#fff"/>'  # where the page around it is dark
    title = '<text x="306" y="14">steps a second, TRL as it comes = 1</text>'
    size = f'width="980" height="{depth}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>{paper}{title}{"".join(parts)}</svg>\n'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=Path, help="pairs in TRL's conversational format")
    parser.add_argument("--models", nargs="*", choices=MODELS, default=["3B"] if CUDA else ["small", "large"])
    parser.add_argument("--shapes", nargs="*", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--svg", type=Path, help="where to write the plot")
    parser.add_argument("--results", type=Path, help="JSONL file of earlier results, to be added to")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    os.environ["TQDM_DISABLE"] = "1"
    disable_progress_bars()
    lines = _read(options.results)
    with tempfile.TemporaryDirectory() as folder:
        for size in options.models:
            count = options.batch * options.steps
            sets = {
                name: rows([(prompt, round(length * share), round(length * (2 - share))) for share in _shares(count)])
                for name, (prompt, length) in ((name, SHAPES[name]) for name in options.shapes)
            }
            if options.rows:
                sets["real"] = encoded(options.rows, count, MODELS["small"]["vocab_size"], Path(folder) / "base")
            for name, pairs in sets.items():
                lines += measure(size, name, pairs, options.batch, Path(folder) / size / name)
                print(table(lines[-len(variants()) :]), flush=True)
                if options.results:
                    options.results.write_text("".join(json.dumps(line) + "\n" for line in lines))
    print("\n" + table(lines))
    if options.svg:
        options.svg.write_text(plot(lines))


def _read(results: Path | None) -> list[dict[str, Any]]:
    return [json.loads(line) for line in results.read_text().splitlines()] if results and results.exists() else []


def _shares(count: int) -> list[float]:
    """Chosen's length over the mean, pair by pair: from 0.7 to 1.3."""
    return [0.7 + 0.6 * index / max(1, count - 1) for index in range(count)]


if __name__ == "__main__":
    main()
