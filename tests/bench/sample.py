"""Tokens a processor second of the in-process engine against plain `model.generate`, side by side on the same model.

    python tests/bench/sample.py [--rounds 5] [--batch 32] [--prompts 64] [--n 3]    a tiny model with a LoRA adapter
    python tests/bench/sample.py --base FOLDER --prompts 12 --max-tokens 24          a model of yours, without one

Both sample the same prompts at the same batch size, temperature and token limit, in turns, so that a busy machine
slows both. Plain `generate` keeps the adapter apart, pads in file order and prefills each copy of a prompt, as one
would write it.
"""

import argparse
import random
import statistics
import tempfile
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from dpo_cli.config.settings import GenerateSection
from dpo_cli.data.records import prompt_id
from dpo_cli.demo.tiny import make_base
from dpo_cli.engines._engine import Request
from dpo_cli.engines.transformers import Model, load, run
from dpo_cli.progress import Silent

SENTENCE = "the kettle of a landlord never boils while somebody counts it twice and writes that down in ledger"
WORDS = SENTENCE.split()


def scene(random_: random.Random) -> str:
    """A scene of 3 to 12 lines, as long as real ones."""
    return "\n".join(
        f"[{random_.choice(['ADA', 'BRUNO', 'CLEO'])}] " + " ".join(random_.choices(WORDS, k=random_.randint(4, 18)))
        for _ in range(random_.randint(3, 12))
    )


def make_model(folder: Path, texts: list[str]) -> tuple[str, str]:
    """A base of 4 layers and a LoRA adapter of rank 16 that changes what it says."""
    base = make_base(folder / "base", texts, hidden=256, layers=4, heads=4)
    torch.manual_seed(0)
    network = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"),
    )
    network.save_pretrained(folder / "adapter")
    return str(base), str(folder / "adapter")


def plain(model: Model, requests: list[Request], settings: GenerateSection) -> int:
    """Tokens that `generate` samples, batch by batch."""
    rows = [model.encode(request.prompt) for request in requests for _ in range(request.need)]
    made = 0
    for start in range(0, len(rows), settings.batch_size):
        batch = model.tokenizer.pad({"input_ids": rows[start : start + settings.batch_size]}, padding_side="left",
                                    return_tensors="pt")  # fmt: skip
        with torch.inference_mode():
            output = model.network.generate(
                **batch, do_sample=True, temperature=settings.temperature, top_k=0, top_p=1.0,
                max_new_tokens=settings.max_tokens,
            )  # fmt: skip
        new = output[:, batch["input_ids"].shape[1] :]
        ended = (new == model.tokenizer.eos_token_id).cumsum(-1) - (new == model.tokenizer.eos_token_id).long() > 0
        made += int((~ended).sum())
    return made


def ours(model: Model, requests: list[Request], settings: GenerateSection) -> int:
    """Tokens that the engine samples."""
    made = []
    run(model, requests, settings, lambda sampled: made.append(sampled.usage.output), Silent())
    return sum(made)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--n", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--base", help="folder of a model")
    parser.add_argument("--bf16", action="store_true", help="and the engine in bfloat16")
    options = parser.parse_args()
    random_ = random.Random(0)
    texts = [scene(random_) for _ in range(options.prompts)]
    requests = []
    for text in texts:
        prompt = [{"role": "user", "content": text}]
        requests.append(Request(id=prompt_id(prompt), prompt=prompt, have=[], need=options.n))
    settings = GenerateSection(
        n=options.n, temperature=0.9, frequency_penalty=0.0, max_tokens=options.max_tokens, batch_size=options.batch
    )
    if options.base:
        model = load(options.base, None)
        models = {"generate": model, "engine": model}
        if options.bf16:
            models["engine, bfloat16"] = load(options.base, None, bf16=True)
    else:
        with tempfile.TemporaryDirectory() as folder:
            base, adapter = make_model(Path(folder), texts)
            model = load(base, adapter, merge=False)
            models = {"generate, LoRA": model, "engine, LoRA": model, "engine, merged": load(base, adapter)}
    lengths = sorted(len(model.encode(request.prompt)) for request in requests)
    print(f"{options.prompts} prompts of {lengths[0]}-{lengths[-1]} tokens x {options.n} x {options.max_tokens}, "
          f"batch {options.batch}, {torch.get_num_threads()} threads")  # fmt: skip
    speeds: dict[str, list[float]] = {name: [] for name in models}
    for number in range(options.rounds + 1):
        for name, one in models.items():
            start = time.process_time()
            made = (plain if name.startswith("generate") else ours)(one, requests, settings)
            if number:  # the first round warms up
                speeds[name].append(made / (time.process_time() - start))
    basis = speeds[next(iter(models))]
    for name, values in speeds.items():
        ratios = sorted(value / other for value, other in zip(values, basis, strict=True))
        print(f"{name:16} {statistics.median(values):7.0f} tokens/s   x{statistics.median(ratios):.2f} "
              f"({ratios[0]:.2f}-{ratios[-1]:.2f})")  # fmt: skip


if __name__ == "__main__":
    main()
