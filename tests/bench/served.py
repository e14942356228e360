"""Tokens a second of `generate` and of `vllm bench serve`, taking turns at one real vLLM server and the same prompts.

    NOTHING_DPO_VLLM_PYTHON=... python tests/bench/served.py [--prompts FILE] [--count 200] [--rounds 3]

The server is the CPU build with a tiny model and a LoRA adapter, started from what `serve-config` writes (its
environment needs pandas for `bench serve`). Both clients send the same sampling parameters, a seed included, one
completion a prompt, with the same number in flight. What is timed is each client's own run: of `generate` with its
ledger, journal and progress; of the other as it reports it.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import vllm_server
from adapters import base_model, save_adapter

from dpo_cli.config import resolve
from dpo_cli.config.settings import Config
from dpo_cli.stages import generate
from dpo_cli.stages.serve_config import render
from dpo_cli.view.progress import make_progress

IN_FLIGHT = 64
TOKENS = 64
SENTENCE = "you see the soup was never mine and the ladder was only borrowed from a man who sells umbrellas"


def write_prompts(path: Path, source: Path | None, count: int) -> None:
    """Texts of `source`'s prompts, or made-up ones, as both clients read them."""
    if source is None:
        texts = [" ".join(random.Random(number).choices(SENTENCE.split(), k=60)) for number in range(count)]
    else:
        texts = [prompt[-1]["content"] for prompt in generate.read_prompts(source)]
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in list(dict.fromkeys(texts))[:count]))


def ours(settings: Config) -> float:
    """Tokens a second of `generate`."""
    start = time.perf_counter()
    result = generate.run(settings, make_progress())
    assert not result.failed
    return result.usage.output / (time.perf_counter() - start)


def theirs(folder: Path, url: str, prompts: Path, settings: Config) -> float:
    """Tokens a second as `vllm bench serve` reports them."""
    sampling = {"seed": settings.generate.seed, "frequency_penalty": settings.generate.frequency_penalty}
    command = [
        str(folder / "bin/vllm"), "bench", "serve", "--backend", "openai-chat", "--endpoint", "/v1/chat/completions",
        "--base-url", url.removesuffix("/v1"), "--model", settings.model.name, "--tokenizer", settings.model.base,
        "--dataset-name", "custom", "--dataset-path", str(prompts), "--skip-chat-template", "--disable-shuffle",
        "--num-prompts", str(len(prompts.read_text().splitlines())), "--custom-output-len", str(TOKENS),
        "--max-concurrency", str(IN_FLIGHT), "--temperature", str(settings.generate.temperature),
        "--top-p", str(settings.generate.top_p), "--extra-body", json.dumps(sampling), "--disable-tqdm",
        "--save-result", "--result-dir", str(folder), "--result-filename", "result.json",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | vllm_server.CPU_ENVIRONMENT)
    if done.returncode:
        raise SystemExit(f"vllm bench serve failed:\n{done.stderr[-3000:]}")
    result = json.loads((folder / "result.json").read_text())
    assert not result["failed"]
    return float(result["output_throughput"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=Path)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        base = base_model(folder / "base")
        save_adapter(folder / "sft", base)
        prompts = folder / "prompts.jsonl"
        write_prompts(prompts, options.prompts, options.count)
        flags = {
            "model.base": str(base), "model.adapter": str(folder / "sft"), "model.dpo_adapter": str(folder / "none"),
            "serve.port": vllm_server.free_port(), "serve.dtype": "float32", "serve.max_model_len": 2048,
            "generate.prompts": str(prompts), "generate.n": 1, "generate.max_tokens": TOKENS,
            "generate.concurrency": IN_FLIGHT,
        }  # fmt: skip
        command = render(resolve.resolve(flags, environment={}).config, "cli")
        rates: dict[str, list[float]] = {"generate": [], "vllm bench serve": []}
        with vllm_server.serve(command, folder) as url:
            for turn in range(options.rounds + 1):
                more = {"generate.url": url, "data": str(folder / f"data{turn}")}
                settings = resolve.resolve(flags | more, environment={}).config
                pair = ours(settings), theirs(folder, url, prompts, settings)
                if turn:  # the first warms the server up
                    for kept, rate in zip(rates.values(), pair, strict=True):
                        kept.append(rate)
    print(f"{options.count} prompts, {TOKENS} tokens, {IN_FLIGHT} in flight, {options.rounds} turns")
    for name, found in rates.items():
        print(f"{name:<17} {statistics.median(found):>6.0f} tokens/s ({min(found):.0f} to {max(found):.0f})")
    ratios = [one / other for one, other in zip(*rates.values(), strict=True)]
    print(f"{'ratio':<17} {statistics.median(ratios):>6.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
