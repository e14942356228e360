"""The server itself: start it, load adapters into it while it runs, ask it something.

`SERVE_API_KEY` is sent where it is set. Not covered: installing vLLM, which wants an environment of its own.
"""

import json
import os
import shutil
import urllib.error
import urllib.request
from typing import Any, NoReturn

from dpo_cli.errors import Exit, UserError
from dpo_cli.serve_config.formats import flags
from dpo_cli.serve_config.served import RUNTIME_LOADING, ServePlan

TIMEOUT = 300.0  # seconds; a cold server compiles before its first answer


def start(plan: ServePlan) -> NoReturn:
    """Become vLLM: this process is replaced by it, so that signals and the exit code are its own.

    Raises:
        UserError: there is no `vllm` command.
    """
    program = shutil.which("vllm")
    if program is None:
        hint = (
            "pip install vllm, in an environment of its own whose bin folder is on PATH; or --format k8s|modal|compose"
        )
        raise UserError("there is no command vllm here", hint=hint)
    words = [word for argument in flags(plan) for word in argument]
    os.execve(program, ["vllm", "serve", plan.model, *words], os.environ | plan.environment)


def load(plan: ServePlan, url: str) -> list[str]:
    """Load each adapter into a running server, in the place of one of its name; the names.

    Raises:
        UserError: the server does not answer, was not started with `serve.runtime_loading`, or finds no such folder.
    """
    for name, adapter in plan.adapters.items():
        body = {"lora_name": name, "lora_path": str(adapter.path), "load_inplace": True}
        status, reply = ask(url, "load_lora_adapter", body)
        if status == 404 and "detail" in reply:
            hint = f"start it with {RUNTIME_LOADING}=1: nothing-dpo serve-config --runtime-loading"
            raise UserError("this server loads no adapters while it runs", where=url, hint=hint)
        if status != 200:
            raise UserError(f"{name}: {said(reply)}", where=url, code=Exit.FAILED)
    return list(plan.adapters)


def ask(url: str, path: str, body: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
    """GET, or POST JSON; the status and the reply (empty if it is no JSON object).

    Args:
        url: with or without `/v1`.
        path: below `/v1`.
        body: what to post.

    Raises:
        UserError: nobody answers.
    """
    address = f"{url.rstrip('/').removesuffix('/v1')}/v1/{path}"
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("SERVE_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(address, json.dumps(body).encode() if body else None, headers)
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as reply:
            status, content = reply.status, reply.read()
    except urllib.error.HTTPError as error:
        status, content = error.code, error.read()
    except (OSError, ValueError) as error:
        hint = "nothing-dpo serve-config --run starts one"
        raise UserError(f"no server answers: {error}", where=address, hint=hint, code=Exit.FAILED) from None
    try:
        found = json.loads(content)
    except ValueError:
        found = None
    return status, found if isinstance(found, dict) else {}


def said(reply: dict[str, Any]) -> str:
    """The message of an error of vLLM's, on one line."""
    error = reply.get("error")
    message = error.get("message") if isinstance(error, dict) else reply.get("detail")
    return " ".join(str(message or "no reason given").split())
