"""What can't run on a machine that is not this one, refused before anything is submitted.

Not covered: names that only the network there can tell, and what a firewall keeps apart.
"""

import ipaddress
from urllib.parse import urlsplit

from dpo_cli.config.settings import Config
from dpo_cli.errors import UserError
from dpo_cli.jobs.spec import Command

LOOPBACK_NAMES = ("localhost", "ip6-localhost", "host.docker.internal")


def refuse(config: Config, command: Command, backend: str) -> None:
    """See that a command finds there what it needs.

    Raises:
        UserError: an endpoint that is on this machine or in its private network, or work that wants a card or files
            which only training gets there.
    """
    if backend == "local":
        return
    if command == "generate":
        if config.generate.engine == "transformers":
            hint = "serve the adapter and set generate.url, or leave --backend out: it is sampled on this machine"
            raise UserError(f"--engine transformers gets no card on {backend}", where="generate.engine", hint=hint)
        _refuse_url(config.generate.url, "generate.url", backend)
    if command == "judge":
        ours = (config.judge.function or "").startswith("dpo_cli.")  # of this package, which is there
        if config.judge.judge != "llm" and not (config.judge.judge == "function" and ours):
            hint = "leave --backend out: it runs on this machine"
            raise UserError(f"--judge {config.judge.judge} does not run on {backend}", where="judge.judge", hint=hint)
        _refuse_url(config.judge.url, "judge.url", backend)


def _refuse_url(url: str | None, where: str, backend: str) -> None:
    """See that an address means there what it means here. A cluster may reach private addresses, Modal none."""
    host = urlsplit(url or "").hostname or ""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        address = None
    here = host.lower() in LOOPBACK_NAMES or (address is not None and (address.is_loopback or address.is_unspecified))
    private = address is not None and (address.is_private or address.is_link_local)
    if here or (private and backend == "modal"):
        what = "this machine" if here else "a private network"
        hint = f"--set {where}=https://… that can be reached from there, or leave --backend out"
        raise UserError(f"{url} is {what}: it can't be reached from {backend}", where=where, hint=hint)
