"""A training step of ours against TRL as it comes and TRL at its best, side by side on the same LoRA model and rows.

    OMP_NUM_THREADS=1 python tests/bench/train.py [--stage sft] [--rows pairs.jsonl] [--models small] [--svg steps.svg]

With `--results results.jsonl` several calls add up: table and plot show all that the file holds.

Each variant has a process of its own. All start from the same weights and take the same steps: on a CPU in turns, so
that a busy machine slows all alike; on a GPU, which would have to hold them all, one variant after another. TRL's best
is `compact`: it scores completions only, which it does on a GPU by itself and here by a patch of one of its internals
(`trl.trainer.utils._use_triton`). `grouped` takes the same rows in batches of like lengths, so that its losses are of
other batches. `kept` variants have their reference's log-probabilities at hand, TRL's by its own
`precompute_ref_log_probs`; `3 epochs` includes computing those once. Memory is the peak of the longest step over what
was held before. A time is the median of the steps, ratios are of whole passes; of one thread it is the time on the
processor. `--profile` adds where one step's time goes, of each variant. With a GPU: bfloat16 under accelerate's
autocast, a 3B-shaped model, gradient checkpointing, MFU.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import profiled
from packing import rows
from transformers import AutoTokenizer
from trl.trainer.utils import get_peak_flops
from variants import CUDA, MODELS, Remote, Variant, quiet

from dpo_cli.demo.tiny import make_base

SHAPES = {"600:150": (600, 150), "1124:141": (1124, 141), "211:190": (211, 190)}
VARIANTS = {
    "dpo": [
        Variant("TRL as it comes"),
        Variant("TRL, compact", compact=True),
        Variant("TRL, compact, grouped", compact=True, grouped=True),
        Variant("TRL, compact, grouped, kept reference", compact=True, grouped=True, kept=True),
        Variant("TRL, bfloat16", bf16=True),
        Variant("ours", ours=True),
        Variant("ours, kept reference", ours=True, kept=True),
        Variant("ours, bfloat16", ours=True, bf16=True),
        Variant("ours, bfloat16, kept reference", ours=True, kept=True, bf16=True),
    ],
    "sft": [
        Variant("TRL as it comes"),
        Variant("TRL, compact", compact=True),
        Variant("TRL, compact, grouped", compact=True, grouped=True),
        Variant("ours", ours=True),
    ],
}


def encoded(path: Path, count: int, base: str | None, vocabulary: int, folder: Path) -> list[dict[str, list[int]]]:
    """Pairs of a JSONL file in TRL's conversational format, by a base's tokenizer or one that is made from them."""
    pairs = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    sides = ("prompt", "chosen", "rejected")
    texts = [message["content"] for pair in pairs for side in sides for message in pair[side]]
    encoder = AutoTokenizer.from_pretrained(base or make_base(folder, texts, vocabulary=vocabulary))

    def ids(messages: list[dict[str, str]], answer_next: bool) -> list[int]:
        text = encoder.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer_next)
        return encoder(text, add_special_tokens=False)["input_ids"]

    made = []
    for pair in pairs[:count]:
        prompt = ids(pair["prompt"], True)
        chosen, rejected = (ids(pair["prompt"] + pair[side], False)[len(prompt) :] for side in sides[1:])
        made.append({"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected})
    return made


def demonstrations(pairs: list[dict[str, list[int]]]) -> list[dict[str, list[int]]]:
    """Rows of SFT: prompt and chosen, the prompt's tokens without a label."""
    return [
        {
            "input_ids": pair["prompt_ids"] + pair["chosen_ids"],
            "labels": [-100] * len(pair["prompt_ids"]) + pair["chosen_ids"],
        }
        for pair in pairs
    ]


def measure(
    stage: str, size: str, name: str, pairs: list[dict[str, list[int]]], batch: int, rank: int, folder: Path,
    names: list[str], profile: bool = False,
) -> list[dict[str, Any]]:  # fmt: skip
    """One line a variant of these names, with its `profile` if that is asked for."""
    examples = pairs if stage == "dpo" else demonstrations(pairs)
    variants = [(number, variant) for number, variant in enumerate(VARIANTS[stage]) if variant.name in names]
    steps = len(pairs) // batch
    tokens = sum(sum(map(len, row.values())) - len(row.get("labels", [])) for row in examples)
    tokens += sum(len(row.get("prompt_ids", [])) for row in examples)
    longest = max(range(steps), key=lambda step: sum(len(row["prompt_ids"]) for row in pairs[step * batch :][:batch]))
    lines: list[dict[str, Any]] = []
    first: Remote | None = None
    for together in [[one] for one in variants] if CUDA else [variants]:
        made = [
            Remote(variant, stage, size, examples, batch, folder / str(number), rank) for number, variant in together
        ]
        first = first or made[0]
        for step in range(-1, steps):  # the first one warms up
            for child in made:
                child.step(max(step, 0) * batch, batch)
        for child in made:
            child.ask("trim")  # before the first peak is measured
        for child in made:
            taken = child.seconds[1:]
            grouped = child.variant.grouped
            largest = 0 if grouped else longest * batch
            differences = [abs(one - other) for one, other in zip(first.losses, child.losses, strict=True)]
            lines.append(
                {
                    "stage": stage, "model": size, "rows": name, "variant": child.variant.name,
                    "seconds": statistics.median(taken), "tokens/s": tokens / sum(taken),
                    "ratio": sum(first.seconds[1:]) / sum(taken),
                    "3 epochs": 3 * sum(first.seconds[1:]) / (3 * sum(taken) + child.fill),
                    "MB": child.ask("memory", largest, batch),
                    "loss differs by": float("nan") if grouped else max(differences),
                    "MFU": _mfu(size, pairs, sum(taken), 4 if child.variant.kept or stage == "sft" else 6),
                }
            )  # fmt: skip
            if profile:
                lines[-1]["profile"] = child.ask("profile", largest, batch)
        for child in made:
            child.close()
    return lines


def _mfu(size: str, pairs: list[dict[str, list[int]]], seconds: float, operations: int) -> float:
    """Share of the card's peak that goes into necessary work, each prompt once.

    Of a frozen weight and a token that is 2 operations of the forward and 2 of the gradient that passes through, and 2
    more where the reference is computed.
    """
    import torch

    peak = get_peak_flops(torch.cuda.get_device_name(), "bf16") if CUDA else None
    if not peak or size not in MODELS:
        return float("nan")
    shape = MODELS[size]
    hidden, keys = shape["hidden_size"], shape["num_key_value_heads"] / shape["num_attention_heads"]
    layer = hidden * hidden * (2 + 2 * keys) + 3 * hidden * shape["intermediate_size"]
    tokens = sum(len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in pairs)
    scored = sum(len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in pairs)
    needed = operations * (layer * shape["num_hidden_layers"] * tokens + hidden * shape["vocab_size"] * scored)
    return needed / seconds / peak


def table(lines: list[dict[str, Any]]) -> str:
    columns = ["stage", "model", "rows", "variant", "seconds", "tokens/s", "ratio", "3 epochs", "MB", "memory"]
    columns += ["loss differs by"] + (["MFU"] if CUDA else [])
    formats = {"seconds": ".2f", "tokens/s": ".0f", "ratio": ".2f", "3 epochs": ".2f", "MB": ".0f", "memory": ".2f",
               "loss differs by": ".0e", "MFU": ".2f"}  # fmt: skip
    text = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for line in lines:
        theirs = next(one for one in lines if _same_set(one, line))
        line = line | {"memory": line["MB"] / theirs["MB"]}
        text.append("| " + " | ".join(format(line[name], formats.get(name, "")) for name in columns) + " |")
    return "\n".join(text)


def _same_set(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(one[key] == other[key] for key in ("stage", "model", "rows"))


def plot(lines: list[dict[str, Any]]) -> str:
    """Bars of steps a second over TRL as it comes, as SVG."""
    scale, height = 110, 16
    parts = []
    top = 4
    for number, line in enumerate(lines):
        top += height * (1 if number and _same_set(line, lines[number - 1]) else 2)
        colour = "#2a6f97" if line["variant"].startswith("ours") else "#b0b0b0"
        name = f"{line['stage']} {line['model']} {line['rows']}: {line['variant']}"
        parts.append(
            f'<text x="400" y="{top + 11}" text-anchor="end">{name}</text>'
            f'<rect x="406" y="{top}" width="{line["ratio"] * scale:.0f}" height="{height - 3}" fill="{colour}"/>'
            f'<text x="{412 + line["ratio"] * scale:.0f}" y="{top + 11}">{line["ratio"]:.2f}</text>'
        )
    depth = top + 2 * height
    style = 'font-family="sans-serif" font-size="11"'
    paper = '<rect width="100%" height="100%" fill="#fff"/>'  # where the page around it is dark
    title = '<text x="406" y="14">steps a second, TRL as it comes = 1</text>'
    size = f'width="1080" height="{depth}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>{paper}{title}{"".join(parts)}</svg>\n'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stage", choices=VARIANTS, default="dpo")
    parser.add_argument("--rows", type=Path, help="pairs in TRL's conversational format")
    parser.add_argument("--models", nargs="*", choices=MODELS, default=["3B"] if CUDA else ["small", "large"])
    parser.add_argument("--base", help="folder of a model to measure, with its tokenizer, in place of random ones")
    parser.add_argument("--shapes", nargs="*", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rank", type=int, default=32 if CUDA else 8)
    parser.add_argument("--bf16", action="store_true", help="also bfloat16, on a CPU; a GPU computes in it anyway")
    parser.add_argument("--only", nargs="*", help="names of variants; the first is what ratios are of")
    parser.add_argument("--profile", action="store_true", help="also a step's time by kind of operation")
    parser.add_argument("--svg", type=Path, help="where to write the plot")
    parser.add_argument("--results", type=Path, help="JSONL file of earlier results, to be added to")
    options = parser.parse_args()
    quiet()
    of_stage = [variant for variant in VARIANTS[options.stage] if options.bf16 or not variant.bf16]
    names = options.only or [variant.name for variant in of_stage]
    lines = _read(options.results)
    with tempfile.TemporaryDirectory() as folder:
        for size in [options.base] if options.base else options.models:
            count = options.batch * options.steps
            sets = {
                name: rows([(prompt, round(length * share), round(length * (2 - share))) for share in _shares(count)])
                for name, (prompt, length) in ((name, SHAPES[name]) for name in options.shapes)
            }
            if options.rows:
                vocabulary = MODELS["small"]["vocab_size"]
                sets["real"] = encoded(options.rows, count, options.base, vocabulary, Path(folder) / "base")
            for number, (name, pairs) in enumerate(sets.items()):
                place = Path(folder) / Path(size).name / str(number)
                lines += measure(
                    options.stage, size, name, pairs, options.batch, options.rank, place, names, options.profile
                )
                print(table([line for line in lines if _same_set(line, lines[-1])]), flush=True)
                if options.results:
                    options.results.write_text("".join(json.dumps(line) + "\n" for line in lines))
    print("\n" + table(lines))
    if options.profile:
        print("\n" + profiled.table([line for line in lines if "profile" in line]))
    if options.svg:
        options.svg.write_text(plot(lines))


def _read(results: Path | None) -> list[dict[str, Any]]:
    return [json.loads(line) for line in results.read_text().splitlines()] if results and results.exists() else []


def _shares(count: int) -> list[float]:
    """Chosen's length over the mean, pair by pair: from 0.7 to 1.3."""
    return [0.7 + 0.6 * index / max(1, count - 1) for index in range(count)]


if __name__ == "__main__":
    main()
