"""One tool, one file of prompts, one endpoint: `python peers.py TOOL URL PROMPTS IN_FLIGHT`, in the tool's environment.

Prints rows, wall seconds and CPU seconds (children's too) of the tool's own call, imports not included. Each tool is
set as its documentation says for this many requests at once, with its caches and telemetry off. `bare` is no tool: it
sends the same requests and keeps nothing, so it shows what the server and the machine can do. So do `sdk` and
`sdk-aiohttp`, through the OpenAI SDK.
"""

import asyncio
import json
import logging
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

MAX_TOKENS = 256
Run = Callable[[], int]


def bare(url: str, prompts: list[str], in_flight: int, folder: str) -> Run:
    """aiohttp and nothing else."""
    import aiohttp

    async def ask() -> int:
        rows = iter(prompts)
        answered = 0
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

            async def work() -> None:
                nonlocal answered
                for prompt in rows:
                    message = {"role": "user", "content": prompt}
                    body = {"model": "writer", "messages": [message], "n": 1, "max_tokens": MAX_TOKENS}
                    async with session.post(f"{url}/chat/completions", json=body) as response:
                        answered += len((await response.json())["choices"])

            await asyncio.gather(*(work() for _ in range(in_flight)))
        return answered

    return lambda: asyncio.run(ask())


def sdk(url: str, prompts: list[str], in_flight: int, folder: str) -> Run:
    """The OpenAI SDK and nothing else, as it comes."""
    return _sdk(url, prompts, in_flight, None)


def sdk_aiohttp(url: str, prompts: list[str], in_flight: int, folder: str) -> Run:
    """The OpenAI SDK with its aiohttp transport."""
    from openai import DefaultAioHttpClient

    return _sdk(url, prompts, in_flight, DefaultAioHttpClient)


def _sdk(url: str, prompts: list[str], in_flight: int, transport: Any) -> Run:
    from openai import AsyncOpenAI

    async def ask() -> int:
        rows = iter(prompts)
        answered = 0
        client = AsyncOpenAI(base_url=url, api_key="none", max_retries=0, http_client=transport and transport())
        async with client:

            async def work() -> None:
                nonlocal answered
                for prompt in rows:
                    reply = await client.chat.completions.create(
                        model="writer", messages=[{"role": "user", "content": prompt}], n=1, max_tokens=MAX_TOKENS
                    )
                    answered += len(reply.choices)

            await asyncio.gather(*(work() for _ in range(in_flight)))
        return answered

    return lambda: asyncio.run(ask())


def nothing_dpo(url: str, prompts: list[str], in_flight: int, folder: str) -> Run:
    """`nothing-dpo generate`, as in a log file: with plain progress, its ledger and its journal."""
    import aiohttp  # noqa: F401, as `bare` has it before the clock starts

    from dpo_cli.config import resolve
    from dpo_cli.engines import endpoint  # noqa: F401
    from dpo_cli.stages import generate
    from dpo_cli.view.progress import make_progress

    file = Path(folder) / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    flags = {"data": folder, "generate.prompts": str(file), "generate.url": url, "generate.n": 1}
    flags |= {"generate.concurrency": in_flight, "generate.max_tokens": MAX_TOKENS}
    settings = resolve.resolve(flags, environment={}).config
    return lambda: generate.run(settings, make_progress()).completions


def curator(url: str, prompts: list[str], in_flight: int, folder: str) -> Run:
    """bespokelabs-curator, its online OpenAI backend without a rate limit.

    Its tokenizer, which it only counts with, comes from the network: here each byte is a token, which costs it less.
    """
    os.environ |= {"TELEMETRY_ENABLED": "0", "CURATOR_DISABLE_CACHE": "1", "CURATOR_CACHE_DIR": folder}
    os.environ.setdefault("OPENAI_API_KEY", "none")
    import tiktoken

    tokens = {bytes([byte]): byte for byte in range(256)}
    counter = tiktoken.Encoding("bytes", pat_str=r"\s*\S+", mergeable_ranks=tokens, special_tokens={})
    tiktoken.get_encoding = tiktoken.encoding_for_model = lambda _: counter
    from bespokelabs.curator import LLM
    from datasets import Dataset

    class Writer(LLM):
        def prompt(self, row: dict[str, str]) -> str:
            return row["prompt"]

        def parse(self, row: dict[str, str], response: str) -> dict[str, str]:
            return {"text": response}

    limits = {"max_requests_per_minute": 10**7, "max_tokens_per_minute": 10**10, "max_concurrent_requests": in_flight}

    def run() -> int:
        writer = Writer(
            model_name="gpt-4o-mini", backend="openai", backend_params={"base_url": url, **limits},
            generation_params={"max_tokens": MAX_TOKENS},
        )  # fmt: skip
        return len(writer(Dataset.from_list([{"prompt": prompt} for prompt in prompts])).dataset)

    return run


def distilabel(url: str, prompts: list[str], in_flight: int, folder: str) -> Run:
    """distilabel, a pipeline of one TextGeneration step whose batches are as large as the requests in flight."""
    from distilabel.models.llms import OpenAILLM
    from distilabel.pipeline import Pipeline
    from distilabel.steps import LoadDataFromDicts
    from distilabel.steps.tasks import TextGeneration

    logging.getLogger("httpx2").setLevel(logging.WARNING)  # it silences httpx alone, and a line a request costs it half

    def run() -> int:
        with Pipeline(name="bench", cache_dir=folder) as pipeline:
            rows = LoadDataFromDicts(data=[{"instruction": prompt} for prompt in prompts], batch_size=in_flight)
            limits = {"max_new_tokens": MAX_TOKENS}
            model = OpenAILLM(model="writer", base_url=url, api_key="none", generation_kwargs=limits)
            rows >> TextGeneration(llm=model, input_batch_size=in_flight)
        return len(pipeline.run(use_cache=False)["default"]["train"])

    return run


TOOLS = {
    "bare": bare, "nothing-dpo": nothing_dpo, "sdk": sdk, "sdk-aiohttp": sdk_aiohttp, "curator": curator,
    "distilabel": distilabel,
}  # fmt: skip


def cpu() -> float:
    """CPU seconds of this process and its finished children."""
    parts = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(part.ru_utime + part.ru_stime for part in parts)


def main() -> None:
    tool, url, file, in_flight = sys.argv[1:]
    prompts = [json.loads(line)["prompt"] for line in Path(file).read_text().splitlines()]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        run = TOOLS[tool](url, prompts, int(in_flight), folder)
        wall, spent = time.perf_counter(), cpu()
        rows = run()
        print(json.dumps({"rows": rows, "wall": time.perf_counter() - wall, "cpu": cpu() - spent}))


if __name__ == "__main__":
    main()
