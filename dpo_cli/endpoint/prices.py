"""What tokens cost: the user's own price, nothing on this machine, else genai-prices' dated table (offline)."""

import re
from datetime import date
from functools import cache
from typing import Literal, TypeAlias
from urllib.parse import urlsplit

from msgspec import Struct

from dpo_cli.data.records import Usage
from dpo_cli.endpoint import price_table
from dpo_cli.endpoint.shutdowns import shutdown_of
from dpo_cli.errors import UserError

MOST_OTHERS = 5  # cheaper models that are shown
# Names of models that write no text, or only of one kind, and of open weights under a provider's own name.
_OTHER_KIND = re.compile(
    r"audio|image|realtime|embed|tts|whisper|transcri|moderation|search|computer|code|research|oss|cyber|live|rosalind"
    r"|vision|guard|translate|:|ocr|instruct-\d|latest|preview"
)

Tier: TypeAlias = Literal["batch", "flex"]

# How genai-prices is asked for a tier. Where it has no price for one, its standard price stands: never too low.
_CONTEXT = {None: {}, "batch": {"processing": "batch"}, "flex": {"service_tier": "flex"}}


class Price(Struct, frozen=True):
    """Dollars per million tokens."""

    input: float
    cached: float
    output: float

    def usd(self, usage: Usage) -> float:
        """Dollars that these tokens cost."""
        fresh = usage.input - usage.cached
        return (fresh * self.input + usage.cached * self.cached + usage.output * self.output) / 1e6


def price_of(url: str, model: str, override: str | None = None, tier: Tier | None = None) -> Price | None:
    """What the model costs there: `override` (`IN,CACHED,OUT`), nothing on this machine, else the price table.

    The override is what is paid, on every tier. None if nobody knows; whoever has a budget must then refuse, not guess.

    Raises:
        UserError: the override is not three numbers.
    """
    if override is not None:
        return _read_price(override)
    if is_local(url):
        return Price(0.0, 0.0, 0.0)
    return _look_up(url, model, tier)


def cheaper_models(url: str, model: str, tier: Tier | None = None) -> dict[str, Price]:
    """Prices of the provider's current models of the same family that cost less, cheapest first.

    Current is what the table does not call deprecated and nobody has announced the end of; the family is what the name
    begins with. Empty where nobody knows what the model itself costs.
    """
    if is_local(url) or (own := _look_up(url, model, tier)) is None:
        return {}
    found: dict[str, Price] = {}
    for provider in price_table.providers():
        if not re.search(provider.api_pattern, url):
            continue
        for other in provider.models:
            if other.id == model or other.deprecated or not _is_alike(other.id, model):
                continue
            price = _look_up(url, other.id, tier)
            if price is not None and 0 < price.output < own.output and price.input <= own.input:
                found[other.id] = price
    return dict(sorted(found.items(), key=lambda item: (item[1].output, item[0]))[:MOST_OTHERS])


def _is_alike(name: str, model: str) -> bool:
    """Whether a name is that of a model of text, of the same family and not a generation older, that goes on."""
    family = model[: first.start()] if (first := re.search(r"\d", model)) else model
    if not name.startswith(family) or _OTHER_KIND.search(name) or _generation(name) < _generation(model) - 1:
        return False
    parts = [name, *(name[: dash.start()] for dash in re.finditer("-", name))]
    return all(shutdown_of(part) is None for part in parts)


def _generation(name: str) -> float:
    """The version in a model's name; 0: there is none."""
    number = re.search(r"\d+(\.\d+)?", name)
    return float(number[0]) if number else 0.0


def is_local(url: str) -> bool:
    """Whether the URL points to this machine."""
    host = urlsplit(url).hostname or ""
    return host in ("localhost", "::1", "0.0.0.0") or host.startswith("127.") or host.endswith(".localhost")


def table_date() -> str:
    """Name of the price table, and the day of its newest change that is in force."""
    newest = max(day for day in price_table.start_dates() if day <= date.today())
    return f"genai-prices {price_table.version()}, newest change {newest}"


def _read_price(text: str) -> Price:
    try:
        fresh, cached, output = map(float, text.split(","))
    except ValueError:
        raise UserError(f"'{text}' is not IN,CACHED,OUT", hint="dollars per million tokens: 0.75,0.075,4.5") from None
    if not all(0 <= value < float("inf") for value in (fresh, cached, output)):
        raise UserError(f"'{text}' is no price", hint="dollars per million tokens: 0.75,0.075,4.5")
    return Price(fresh, cached, output)


@cache
def _look_up(url: str, model: str, tier: Tier | None) -> Price | None:
    found = price_table.look_up(url, model, _CONTEXT[tier])
    return Price(*found) if found else None
