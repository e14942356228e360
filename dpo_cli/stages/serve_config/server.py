"""The server itself: start it, load adapters into it while it runs, ask it something.

`SERVE_API_KEY` is sent where it is set. Not covered: installing vLLM, which wants an environment of its own.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any, NoReturn

from dpo_cli.endpoint.plain import request
from dpo_cli.engines.endpoint import KEY_VARIABLE
from dpo_cli.errors import Exit, UserError
from dpo_cli.stages.serve_config.formats import flags
from dpo_cli.stages.serve_config.plan import RUNTIME_LOADING, ServePlan

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
        _load(url, name, adapter.path)
    return list(plan.adapters)


def ensure_served(url: str, name: str, adapter: Path, anew: bool) -> str:
    """See that a running server answers to a name with an adapter; how that is known, in a few words.

    Args:
        url: of the server.
        name: under which the adapter is to be served.
        adapter: its folder, as this machine sees it.
        anew: whether its weights are newer than whatever the server may hold, so that it is loaded in any case.

    Raises:
        UserError: it does not, and can't be made to.
    """
    served = listed(url)
    if name in served and not anew:
        root = served[name].get("root")
        # The server may run on another machine: of the folder only its own name compares.
        if root is not None and Path(root).name != adapter.name:
            hint = "serve each adapter under a name of its own, or set model.dpo_name to another"
            raise UserError(f"'{name}' is {root} there, not {adapter}", where=url, hint=hint)
        return "served"
    try:
        _load(url, name, adapter.resolve())
    except UserError as error:
        problem = f"what it serves as '{name}' is older than {adapter}" if name in served else f"'{name}' is not served"
        raise UserError(f"{problem}: {error.message}", where=url, hint=error.hint, code=error.code) from None
    return "loaded at run time"


def listed(url: str) -> dict[str, dict[str, Any]]:
    """What a server lists, by name: vLLM's adapters have a `parent` and a `root`.

    Raises:
        UserError: it lists nothing.
    """
    status, reply = ask(url, "models")
    if status != 200 or not isinstance(reply.get("data"), list):
        raise UserError(f"it does not say what it serves: {status}, {said(reply)}", where=url, code=Exit.FAILED)
    return {model["id"]: model for model in reply["data"]}


def _load(url: str, name: str, adapter: Path) -> None:
    status, reply = ask(url, "load_lora_adapter", {"lora_name": name, "lora_path": str(adapter), "load_inplace": True})
    if status == 404 and "error" not in reply:  # there is no such route; a folder that is missing is an error
        hint = f"start it with {RUNTIME_LOADING}=1: nothing-dpo serve-config --runtime-loading"
        raise UserError("this server loads no adapters while it runs", where=url, hint=hint)
    if status != 200:
        raise UserError(f"{name}: {said(reply)}", where=url, code=Exit.FAILED)


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
    try:
        status, content = request(address, body, key=os.environ.get(KEY_VARIABLE), timeout=TIMEOUT)
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
