"""Both adapters on one base in this process, for what compares them token by token."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, TypeAlias

from dpo_cli.adapter import is_model, read_adapter
from dpo_cli.config.settings import Config
from dpo_cli.engines._model import Model
from dpo_cli.engines.transformers import load
from dpo_cli.model_loading import attach

As: TypeAlias = Callable[[], AbstractContextManager[Any]]


def load_both(config: Config) -> tuple[Model, As]:
    """The policy, and a context whose value is the reference.

    Two adapters share one base; where either is a whole model, there are two networks. Without an adapter of its own,
    the reference is the base.

    Raises:
        UserError: no base, or no adapter or model where one is named.
    """
    section, policy = config.model, Path(config.model.dpo_adapter)
    if is_model(policy) or (section.adapter is not None and is_model(Path(section.adapter))):
        model = load(section.base, section.dpo_adapter, section, merge=False)
        other = load(section.base, section.adapter, section, merge=False).network

        @contextmanager
        def as_other() -> Iterator[Any]:
            yield other

        return model, as_other
    read_adapter(policy, section.base, section.same_base)
    model = load(section.base, None, section)
    network = attach(model.network, policy, "policy")
    if section.adapter is not None:
        read_adapter(Path(section.adapter), section.base, section.same_base)
        attach(network, Path(section.adapter), "reference")
        network.set_adapter("policy")
    model.network = network.requires_grad_(False).eval()

    @contextmanager
    def as_reference() -> Iterator[Any]:
        if section.adapter is None:
            with network.disable_adapter():
                yield network
        else:
            network.set_adapter("reference")
            try:
                yield network
            finally:
                network.set_adapter("policy")

    return model, as_reference
