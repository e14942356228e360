"""Is an adapter served under its name? If not, a vLLM that was started for it loads it at run time.

An adapter that was trained a moment ago is loaded even where its name is served already: what the server holds under
it is older. What is written here for vLLM (`GET /models` with `root`, `POST /load_lora_adapter`) other servers may
lack; then a name that is listed must do. Writes nothing.
"""

import asyncio
from pathlib import Path

import msgspec
from msgspec import Struct

from dpo_cli.endpoint.http import Again, Connection, Down, Rejected
from dpo_cli.errors import Exit, UserError

LOAD = "/load_lora_adapter"
TIMEOUT = 120.0  # seconds; a large adapter is read from a disk


class _Served(Struct):
    id: str
    root: str | None = None


class _Listing(Struct):
    data: list[_Served]


def ensure_served(url: str, key_variable: str, name: str, adapter: Path, anew: bool) -> str:
    """See that the server answers to `name` with `adapter`; how that is known, in a few words.

    Args:
        url: of the server.
        key_variable: environment variable that holds its key.
        name: under which the adapter is to be served.
        adapter: its folder, as this machine sees it.
        anew: whether its weights are newer than whatever the server may hold.

    Raises:
        UserError: it does not, and can't be made to.
    """
    return asyncio.run(_ensure(url, key_variable, name, adapter, anew))


async def _ensure(url: str, key_variable: str, name: str, adapter: Path, anew: bool) -> str:
    async with Connection(url, key_variable, api_key_required=False, timeout=TIMEOUT) as connection:
        try:
            listing = msgspec.json.decode(await connection.send("GET", "/models"), type=_Listing)
        except (Down, Again, Rejected, msgspec.MsgspecError) as error:
            raise UserError(
                f"it does not say what it serves: {error}", where=connection.url, hint="is the server up?",
                code=Exit.FAILED,
            ) from None  # fmt: skip
        found = next((one for one in listing.data if one.id == name), None)
        if found is not None and not anew:
            _check_root(connection.url, found, adapter)
            return "served"
        body = {"lora_name": name, "lora_path": str(adapter.resolve()), "load_inplace": found is not None}
        try:
            await connection.send("POST", LOAD, json=body)
        except (Down, Again, Rejected) as error:
            raise _not_served(connection.url, name, adapter, str(error), found is not None) from None
        return "loaded at run time"


def _check_root(url: str, served: _Served, adapter: Path) -> None:
    """Refuse a name that stands for another adapter; on another machine only the folder's own name compares."""
    if served.root is not None and Path(served.root).name != adapter.name:
        raise UserError(
            f"'{served.id}' is {served.root} there, not {adapter}", where=url,
            hint="serve each adapter under a name of its own, or set model.dpo_name to another",
        )  # fmt: skip


def _not_served(url: str, name: str, adapter: Path, said: str, older: bool) -> UserError:
    problem = f"what it serves as '{name}' is older than {adapter}" if older else f"'{name}' is not served"
    return UserError(
        f"{problem}, and it loads no adapter at run time ({said})", where=url,
        hint=f"start vLLM with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, or restart it with --lora-modules {name}={adapter}, "
        "then the same command",
    )  # fmt: skip
