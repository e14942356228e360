"""Both adapters on one base in this process, for what compares them token by token."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, TypeAlias

from peft import PeftModel

from dpo_cli.config.settings import Config
from dpo_cli.engines.transformers import Model, load
from dpo_cli.errors import UserError

As: TypeAlias = Callable[[], AbstractContextManager[Any]]


def load_both(config: Config) -> tuple[Model, As]:
    """The base with the policy's adapter, and a context in which it, the value, is the reference.

    Without an adapter of its own, the reference is the base.

    Raises:
        UserError: no base, or no LoRA adapter where one is named.
    """
    model = load(config.model.base, None, config.model.chat_template_kwargs)
    network = PeftModel.from_pretrained(model.network, _folder(config.model.dpo_adapter), adapter_name="policy")
    if config.model.adapter is not None:
        network.load_adapter(_folder(config.model.adapter), adapter_name="reference")
    model.network = network.requires_grad_(False).eval()

    @contextmanager
    def as_reference() -> Iterator[Any]:
        if config.model.adapter is None:
            with network.disable_adapter():
                yield network
        else:
            network.set_adapter("reference")
            try:
                yield network
            finally:
                network.set_adapter("policy")

    return model, as_reference


def _folder(adapter: str) -> str:
    if not (Path(adapter) / "adapter_config.json").is_file():
        raise UserError(f"no LoRA adapter at '{adapter}' (no adapter_config.json there)")
    return adapter
