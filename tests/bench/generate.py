"""Rows a second of `generate` against a server that takes 200 ms, at 32, 256 and 1024 in flight, and of resuming.

    python tests/bench/generate.py

The server is a process of its own; give it and the client a core each. `share` is the part of the ideal (in flight /
latency) that the whole command reached, starting, ramping up and writing included. `probe` answers how much of what
is missing is the client's: the same requests through bare aiohttp with nothing kept.
"""

import asyncio
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import aiohttp

from dpo_cli import config, generate
from dpo_cli.progress import Silent

LATENCY = 0.2
SECONDS = 4  # that each measurement should take at the ideal rate
SERVER = Path(__file__).parents[1] / "openai_server.py"


def write_prompts(path: Path, count: int) -> None:
    scene = "[OTIS] You borrowed a ladder from a man who sells umbrellas? " * 10
    with path.open("w") as file:
        for number in range(count):
            file.write(json.dumps({"prompt": f"Scene {number}. {scene}"}) + "\n")


def sample(url: str, folder: Path, prompts: Path, concurrency: int) -> tuple[float, float]:
    """(wall, CPU) seconds of a run."""
    flags = {"data": str(folder), "generate.prompts": str(prompts), "generate.url": url}
    settings = config.resolve(flags | {"generate.concurrency": concurrency}, environment={}).config
    wall, cpu = time.perf_counter(), time.process_time()
    result = generate.run(settings, Silent())
    assert result.failed == 0
    return time.perf_counter() - wall, time.process_time() - cpu


async def probe(url: str, prompts: Path, concurrency: int) -> float:
    """Wall seconds of the same requests with nothing around them."""
    lines = iter(prompts.read_text().splitlines())
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def work() -> None:
            for line in lines:
                message = {"role": "user", "content": json.loads(line)["prompt"]}
                body = {"model": "writer", "messages": [message], "n": 3}
                async with session.post(f"{url}/chat/completions", json=body) as response:
                    await response.json()

        start = time.perf_counter()
        await asyncio.gather(*(work() for _ in range(concurrency)))
        return time.perf_counter() - start


def main() -> None:
    command = [sys.executable, str(SERVER), "--latency", str(LATENCY)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    url = server.stdout.readline().strip()
    print(f"{'in flight':>9} {'rows':>6} {'ideal/s':>8} {'rows/s':>8} {'share':>6} {'probe/s':>8} {'CPU ms a row':>13}")
    try:
        with tempfile.TemporaryDirectory() as folder:
            for concurrency in (32, 256, 1024):
                ideal = concurrency / LATENCY
                count = int(ideal * SECONDS)
                prompts = Path(folder) / f"{concurrency}.jsonl"
                write_prompts(prompts, count)
                data = Path(folder) / str(concurrency)
                wall, cpu = sample(url, data, prompts, concurrency)
                bare = count / asyncio.run(probe(url, prompts, concurrency))
                rate = count / wall
                print(
                    f"{concurrency:>9} {count:>6} {ideal:>8.0f} {rate:>8.0f} {rate / ideal:>6.2f} {bare:>8.0f} "
                    f"{1000 * cpu / count:>13.2f}"
                )
            wall, cpu = sample(url, data, prompts, concurrency)
            print(f"resuming {count} finished rows: {wall:.2f} s, {cpu:.2f} s of CPU")
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
