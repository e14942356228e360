"""Rows a second of whole tools against a server that takes 200 ms, 256 requests in flight, on one core.

    python tests/bench/clients.py [--environments DIR] [--in-flight 256] [--rounds 3] [--rows 3840] [--latency 0.2]
    python tests/bench/clients.py --tools bare,nothing-dpo,sdk,sdk-aiohttp --beside FOLDER

`--beside` is another checkout, whose nothing-dpo takes its turn as well.

curator and distilabel get an environment each under DIR, made if it is not there (1.5 GB). The tools take turns, each
in a process of its own on the first core; the server has the second. `ideal` is requests in flight / 0.2 s; imports are
not counted, ramping up and writing are. `bare` bounds what any client could reach on this machine, and the last line
says what the server answers when a bare client has four times as many in flight: it does not hold the others back.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
PEERS = {
    "curator": ["bespokelabs-curator==0.1.31"],
    "distilabel": ["distilabel[openai]==1.5.3", "requests"],  # which it imports and does not name
}


def environment(folder: Path, packages: list[str]) -> str:
    """The Python of an environment that holds the packages; made where it is missing."""
    python = folder / "bin/python"
    if not python.exists():
        print(f"making {folder}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
    return str(python)


def write_prompts(path: Path, count: int) -> None:
    scene = "[OTIS] You borrowed a ladder from a man who sells umbrellas? " * 10
    with path.open("w") as file:
        for number in range(count):
            file.write(json.dumps({"prompt": f"Scene {number}. {scene}"}) + "\n")


def measure(
    tool: str, python: str, url: str, prompts: Path, in_flight: int, checkout: Path = HERE.parents[1]
) -> dict[str, float]:
    """Run a tool on the first core; what it printed last."""
    command = [python, str(checkout / "tests/bench/peers.py"), tool, url, str(prompts), str(in_flight)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(checkout)},
        preexec_fn=lambda: os.sched_setaffinity(0, {0}),
    )  # fmt: skip
    output, errors = process.communicate()
    if process.returncode:
        raise SystemExit(f"{tool} failed:\n{errors[-3000:]}")
    found: dict[str, float] = json.loads(output.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Throughput of whole tools, side by side.")
    parser.add_argument("--environments", type=Path, default=Path("~/.cache/nothing-dpo-bench").expanduser())
    parser.add_argument("--in-flight", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=3840)
    parser.add_argument("--latency", type=float, default=0.2, help="seconds that the server takes")
    parser.add_argument("--tools", default="bare,nothing-dpo,sdk,sdk-aiohttp,curator,distilabel")
    parser.add_argument("--beside", type=Path, help="another checkout")
    options = parser.parse_args()
    in_flight, ideal = options.in_flight, options.in_flight / options.latency
    pythons = {
        name: environment(options.environments / name, PEERS[name]) if name in PEERS else sys.executable
        for name in options.tools.split(",")
    }
    if options.beside:
        pythons["beside"] = sys.executable
    server = subprocess.Popen(
        [sys.executable, str(HERE / "fixed_server.py"), str(options.latency)], stdout=subprocess.PIPE, text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, {1}),
    )  # fmt: skip
    assert server.stdout is not None
    url = server.stdout.readline().strip()
    runs: dict[str, list[dict[str, float]]] = {tool: [] for tool in pythons}
    try:
        with tempfile.TemporaryDirectory() as folder:
            prompts = Path(folder) / "prompts.jsonl"
            write_prompts(prompts, options.rows)
            for _ in range(options.rounds):
                for tool, python in pythons.items():
                    if tool == "beside":
                        found = measure("nothing-dpo", python, url, prompts, in_flight, options.beside.resolve())
                    else:
                        found = measure(tool, python, url, prompts, in_flight)
                    assert found["rows"] == options.rows, f"{tool} made {found['rows']} rows"
                    runs[tool].append(found)
            server_rate = options.rows / measure("bare", sys.executable, url, prompts, 4 * in_flight)["wall"]
    finally:
        server.terminate()
        server.wait()
    print(f"{options.rows} rows, {in_flight} in flight, {options.latency} s an answer: at most {ideal:.0f} rows/s")
    print(f"{'':<12} {'rows/s':>7} {'of ideal':>9} {'least':>6} {'most':>6} {'CPU ms a row':>13} {'of bare':>8}")
    base = statistics.median(run["cpu"] for run in runs.get("bare") or runs[next(iter(runs))])
    for tool, found in runs.items():
        rates = [options.rows / run["wall"] for run in found]
        rate, cpu = statistics.median(rates), statistics.median(run["cpu"] for run in found)
        print(
            f"{tool:<12} {rate:>7.0f} {rate / ideal:>9.2f} {min(rates) / ideal:>6.2f} {max(rates) / ideal:>6.2f} "
            f"{1000 * cpu / options.rows:>13.3f} {cpu / base:>8.2f}"
        )
    print(f"the server gives a bare client with {4 * in_flight} in flight {server_rate:.0f} answers/s")


if __name__ == "__main__":
    main()
