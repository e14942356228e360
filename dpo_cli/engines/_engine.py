"""What an engine is asked and what it gives; which one the settings mean, and what an endpoint would cost."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import Struct, field

from dpo_cli.adapter import is_model, read_adapter
from dpo_cli.config.settings import Config, GenerateSection, ModelSection
from dpo_cli.data.records import Message, Tool, Usage
from dpo_cli.errors import UserError
from dpo_cli.models.base_model import check_base, find_base
from dpo_cli.progress import Progress

if TYPE_CHECKING:
    from dpo_cli.endpoint.costs import Estimate

UNLIMITED = 1024  # tokens that a completion without a limit is thought to have


class Request(Struct, kw_only=True):
    """`need` more completions for one prompt.

    `have` are the completions that exist; a new one's index, and with it its seed, continues after them. `tools` are
    the prompt's.
    """

    id: str
    prompt: list[Message]
    have: list[str]
    need: int
    tools: list[Tool] | None = None


class Sampled(Struct, kw_only=True):
    """What came of one request: texts and finish reasons in step, fewer than were asked for if there is an `error`.

    `missing` counts the completions that are none by the reason, which `ADVICE` may have something to say of. `changes`
    are the settings that were sent otherwise than they were meant: name -> what was sent, None if it was left out.
    `messages` is in step with the texts where any completion is more than its text (`Completions.messages`).
    """

    id: str
    texts: list[str]
    finish_reasons: list[str]
    usage: Usage
    error: str | None = None
    messages: list[Message | None] = []
    missing: dict[str, int] = field(default_factory=dict)
    changes: dict[str, Any] = field(default_factory=dict)

    def as_sent(self, sampling: dict[str, Any]) -> dict[str, Any]:
        """The settings of a row as they were sent: what the server refused is None, and named in `refused`."""
        if not self.changes:
            return sampling
        refused = sorted({*sampling.get("refused", ()), *self.changes})
        return (
            sampling | {name: value for name, value in self.changes.items() if name in sampling} | {"refused": refused}
        )


class Sampling(Struct):
    """`[generate]` for an engine in this process, to which no server has defaults of its own to add."""

    temperature: float
    top_p: float
    max_tokens: int
    frequency_penalty: float
    seed: int
    batch_size: int


def sampling(settings: GenerateSection) -> Sampling:
    """The settings of an engine in this process.

    Raises:
        UserError: one of them is `none`, which leaves it to a server.
    """
    values = {name: getattr(settings, name) for name in Sampling.__struct_fields__}
    unset = [name for name, value in values.items() if value is None]
    if unset:
        hint = "give a value: none leaves it to a server's default"
        raise UserError(f"{' and '.join(unset)}: none", where="generate.engine = transformers", hint=hint)
    return Sampling(**values)


def choose(config: Config, progress: Progress) -> str:
    """The engine of the settings; without an endpoint, the one that needs none.

    Raises:
        UserError: there is neither.
    """
    if config.generate.engine == "transformers":
        _check_models(config.model)
    if config.generate.engine != "endpoint" or config.generate.url is not None:
        return config.generate.engine
    base, adapter = config.model.base, config.model.adapter
    if find_base(base) is None if adapter is None else not Path(adapter).is_dir():
        missing = f"base model at {base}" if adapter is None else f"adapter at {adapter}"
        raise UserError(
            f"nothing to sample from: no endpoint, and no {missing}",
            hint="export SERVE_URL=http://HOST:PORT/v1, or --engine transformers --base MODEL --adapter FOLDER",
        )
    _check_models(config.model)
    progress.log(f"no SERVE_URL: sampling in this process from {base}" + (f" with {adapter}" if adapter else " alone"))
    return "transformers"


def _check_models(section: ModelSection) -> None:
    """Refuse a damaged base or adapter before anything is loaded, sampled or paid."""
    if section.adapter is not None and is_model(Path(section.adapter)):
        check_base(section.adapter)
        return
    check_base(section.base)
    if section.adapter is not None:
        read_adapter(Path(section.adapter), section.base, section.same_base)


def estimate(requests: Iterable[Request], config: Config) -> "Estimate":
    """What an endpoint would cost that answers these, in one request each; they are gone through once."""
    from dpo_cli.endpoint.costs import estimate
    from dpo_cli.endpoint.prices import cheaper_models, price_of

    settings = config.generate
    calls = size = completions = 0
    for request in requests:
        calls += 1
        size += len(msgspec.json.encode(request.prompt))
        completions += request.need
    worst = completions * (settings.max_tokens or UNLIMITED)
    price = price_of(settings.url or "", config.model.name, settings.price)
    return estimate(
        calls,
        size,
        worst // 2,
        worst,
        price,
        given=settings.price is not None,
        typical="half of max_tokens",
        others={} if settings.price is not None else cheaper_models(settings.url or "", config.model.name),
    )
