"""The Modal app: one function, which runs a spec in a container.

The container imports this file before anything else, so its imports are modal and the standard library only. The
settings of `[modal]` arrive through an environment variable where the app is submitted; in the container there are
none, and Modal puts the objects that were submitted in the places of those made here: their number and order must be
the same in both, whatever the settings are.
"""

import json
import os
import re
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path
from typing import Any

import modal

SETTINGS = "NOTHING_DPO_MODAL"
CACHE = "/cache"
MOUNT = "/vol"

settings: dict[str, Any] = json.loads(os.environ.get(SETTINGS, "{}"))


def lock(name: str) -> Path:
    """The file of exact packages and hashes of an image: `train`, or `light` for what needs no card."""
    return Path(__file__).parents[1] / "locks" / f"{name}.txt"


def python() -> str | None:
    """The oldest Python that this package takes."""
    try:
        found = re.search(r">=(\d+\.\d+)", metadata("nothing-dpo")["Requires-Python"])
    except PackageNotFoundError:
        return None
    return found[1] if found else None


def secret(name: str | None) -> modal.Secret:
    """A secret by its name; an empty one if there is no name, since there must be one."""
    return modal.Secret.from_name(name) if name else modal.Secret.from_dict({})


image = (
    modal.Image.debian_slim(python_version=python())
    .uv_pip_install(requirements=[str(lock(settings.get("lock", "light")))], extra_options="--require-hashes")
    .env({"HF_HOME": CACHE, "PYTHONUNBUFFERED": "1", **settings.get("env", {})})
)
volume = modal.Volume.from_name(settings.get("volume", "volume"), create_if_missing=True)
cache = modal.Volume.from_name(settings.get("cache_volume", "cache"), create_if_missing=True)
secrets = [secret(settings.get("first_secret")), secret(settings.get("second_secret"))]
app = modal.App(settings.get("app", "app"))


def runs(call: str) -> bool:
    """Whether a function call still runs, by Modal's word; where it gives none, it does."""
    try:
        modal.FunctionCall.from_id(call).get(timeout=0)
    except (TimeoutError, modal.exception.ConnectionError):
        return True
    except Exception:  # whatever it raised, or that it is no longer known
        return False
    return False


@app.function(
    image=image,
    gpu=settings.get("gpu"),
    timeout=settings.get("timeout", 86400),
    startup_timeout=settings.get("startup_timeout", 1800),  # unset, it would be the timeout: a card for a day
    retries=modal.Retries(max_retries=settings.get("retries", 0), initial_delay=0.0),
    volumes={settings.get("mount", MOUNT): volume, CACHE: cache},
    secrets=secrets,
    single_use_containers=True,
)
def run(spec_json: str) -> str:
    """Run a spec; returns its outcome as JSON.

    A fault that a second attempt meets again is an outcome: one that was foreseen, or an attempt that saved nothing,
    since ten of those would cost ten cards. Raises RuntimeError for any other, so that Modal tries again from the last
    checkpoint, and lets KeyboardInterrupt through, which is how Modal preempts.
    """
    from dpo_cli.jobs import lease, worker

    saves: list[bool] = []
    call = modal.current_function_call_id()

    def saved() -> None:
        volume.commit()
        saves.append(True)

    try:
        if call is None:  # not in a container
            return worker.serve_json(spec_json, saved)
        spec = json.loads(spec_json)
        folder = Path(spec["config"]["runs"]) / ".leases" / lease.name_of(spec["results"])
        with lease.hold(folder, call, spec["owner"], runs, volume.reload, volume.commit):
            return worker.serve_json(spec_json, saved)
    except lease.Held as held:
        return worker.refused_json(f"run '{spec['name']}' is being written: {held}")
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
        if saves:
            raise RuntimeError(said) from None
        return worker.failed_json(said)
    finally:
        volume.commit()
