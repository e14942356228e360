"""genai-prices' table, from its data file: the library itself loads pydantic and an HTTP client, a fifth of a second.

What the library's code makes of its data is restated here as far as tokens of text are priced, and holds where that
code is the one of `KNOWN`, whatever newer data it comes with; else the library is asked. A test compares every price.
Left out: prices of images, audio, pages and searches, which no request of ours has.
"""

import gc
import re
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, date, datetime, time
from decimal import Decimal
from functools import cache
from importlib.machinery import SourceFileLoader
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, cast

# CRC-32 of the modules that say how a price is looked up and added up: those of genai-prices 0.2.3.
KNOWN = {
    "types.py": 0x5DF96D52,
    "data_snapshot.py": 0x38547CFB,
    "decompose.py": 0xECCEE99C,
    "units.py": 0x4BD595D7,
    "data_units.py": 0x37420E71,
}
TOKENS = 1000  # that are priced at once: a million would fall into the price of long contexts
_COMPACT_DATE = re.compile(r"(-)(20\d{2})(0[1-9]|1[0-2])(0[1-9]|[12]\d|3[01])(?=-|:|$)")


class _Data:
    """What the data file makes of one entry; a field that it does not give is None."""

    def __init__(self, **given: Any) -> None:
        self.__dict__ = given

    def __getattr__(self, name: str) -> None:
        return None


_NAMES = (
    "Provider", "UsageExtractorMapping", "UsageExtractor", "ModelInfo", "ModelPrice", "TieredPrices", "Tier",
    "ConditionalPrice", "PriceVariant", "StartDateConstraint", "TimeOfDateConstraint", "ClauseStartsWith",
    "ClauseEndsWith", "ClauseContains", "ClauseRegex", "ClauseEquals", "ClauseOr", "ClauseAnd", "ArrayMatch",
)  # fmt: skip
_TYPES: dict[str, type[_Data]] = {name: type(name, (_Data,), {}) for name in _NAMES}


def look_up(url: str, model: str, context: Mapping[str, str]) -> tuple[float, float, float] | None:
    """Dollars per million tokens: input, cached input, output; None if the table does not know the model there.

    `context` are the library's words for a tier.
    """
    read = _read()
    if read is None:
        return _ask_library(url, model, context)
    found = _find(read, url, model)
    if found is None:
        return None
    provider, info = found
    # Variants are of the provider's own models, not of those that it passes on.
    own = context if any(info is one for one in provider.models) else {}
    prices = _in_force(info, own)
    fresh = _total(prices, "input_mtok")
    cached = fresh if prices.get("cache_read_mtok") is None else _total(prices, "cache_read_mtok")
    return fresh, cached, _total(prices, "output_mtok")


def providers() -> Sequence[Any]:
    """Every provider with its models."""
    read = _read()
    if read is not None:
        return read
    from genai_prices.data import providers

    return list(providers)


def version() -> str:
    """The version of genai-prices that is installed."""
    folders = list(_folder().parent.glob("genai_prices-*.dist-info"))
    if len(folders) == 1:  # importlib.metadata would take 30 ms for the same
        return folders[0].name.removesuffix(".dist-info").partition("-")[2]
    from importlib import metadata

    return metadata.version("genai-prices")


def start_dates() -> Iterator[date]:
    """The days from which prices hold that have changed."""
    for provider in providers():
        for model in provider.models:
            for price in model.prices if isinstance(model.prices, list) else []:
                day = getattr(price.constraint, "start_date", None)
                if day is not None:
                    yield day


def _folder() -> Path:
    spec = find_spec("genai_prices")
    assert spec is not None and spec.origin is not None  # it is a dependency
    return Path(spec.origin).parent


@cache
def _read() -> list[_Data] | None:
    """The providers of the data file; None where the library's code is not the one that is restated here."""
    folder = _folder()
    try:
        if any(zlib.crc32((folder / name).read_bytes()) != known for name, known in KNOWN.items()):
            return None
    except OSError:  # in an archive
        return None
    types = ModuleType(f"{__name__}.types")
    types.__dict__.update(_TYPES)
    loader = SourceFileLoader(f"{__name__}.data", str(folder / "data.py"))
    data = ModuleType(loader.name)
    data.__package__ = __name__  # the file begins with "from .types import *"
    sys.modules[types.__name__] = types
    paused = gc.isenabled()
    gc.disable()  # thousands of objects that all stay: looking through them again and again takes a third of the time
    try:
        loader.exec_module(data)
    except NameError:  # newer data of a kind that nothing here knows
        return None
    finally:
        del sys.modules[types.__name__]
        if paused:
            gc.enable()
    return list(data.providers)


def _find(read: list[_Data], url: str, name: str) -> tuple[Any, Any] | None:
    """The provider of a URL, and its model, or the one of a provider whose models it passes on."""
    provider: Any = next((one for one in read if re.match(str(one.api_pattern), url)), None)
    if provider is None:
        return None
    name = name.lower()
    places: list[Any] = [provider]
    for fallback in provider.fallback_model_providers or []:
        places += [one for one in read if one.id == fallback][:1]
    for form in dict.fromkeys((name, _COMPACT_DATE.sub(_dashed, name))):
        for place in places:
            for info in place.models:
                if _matches(info.match, form):
                    return provider, info
    return None


def _dashed(match: re.Match[str]) -> str:
    year, month, day = match[2], match[3], match[4]
    try:
        date(int(year), int(month), int(day))
    except ValueError:
        return match[0]
    return f"{match[1]}{year}-{month}-{day}"


def _matches(clause: Any, text: str) -> bool:
    """Whether a clause is true of a name in lower case."""
    match type(clause).__name__:
        case "ClauseEquals":
            return bool(text == clause.equals.lower())
        case "ClauseStartsWith":
            return text.startswith(clause.starts_with.lower())
        case "ClauseEndsWith":
            return text.endswith(clause.ends_with.lower())
        case "ClauseContains":
            return clause.contains.lower() in text
        case "ClauseRegex":
            return bool(re.search(clause.regex, text))
        case "ClauseOr":
            return any(_matches(one, text) for one in clause.or_)
    return all(_matches(one, text) for one in clause.and_)


def _in_force(info: Any, context: Mapping[str, str]) -> dict[str, Any]:
    """The prices of a model now, by the unit's name: the last condition that holds, then the first variant of each."""
    prices = info.prices
    if isinstance(prices, list):
        holding = [one for one in prices if _holds(one.constraint)]
        prices = (holding[-1] if holding else prices[0]).prices
    found = dict(prices.__dict__)
    overrides: dict[str, Any] = {}
    for variant in (info.price_variants or ()) if context else ():
        if _holds(variant.constraint) and all(context.get(key) == value for key, value in variant.when.items()):
            for unit, price in variant.prices.__dict__.items():
                if price is not None:
                    overrides.setdefault(unit, price)
    return found | overrides


def _holds(constraint: Any) -> bool:
    """Whether a condition on the day or the hour holds now, in UTC."""
    if constraint is None:
        return True
    now = datetime.now(UTC)
    if constraint.start_date is not None:
        return bool(now.date() >= constraint.start_date)
    begin, end, clock = _utc(constraint.start_time), _utc(constraint.end_time), now.timetz()
    return begin <= clock < end if begin <= end else clock >= begin or clock < end


def _utc(clock: time) -> time:
    if clock.tzinfo is None:
        return clock.replace(tzinfo=UTC)
    return datetime.combine(date(1970, 1, 1), clock).astimezone(UTC).timetz()


def _total(prices: Mapping[str, Any], unit: str) -> float:
    """Dollars for a million tokens of a kind, asked for a thousand at a time; each request may have a price of its own.

    A cached token is an input token too: thresholds are of those.
    """
    context = 0 if unit == "output_mtok" else TOKENS
    total = sum(
        (
            _at(prices.get(name), context) * count / per
            for name, count, per in ((unit, TOKENS, 1_000_000), ("requests_kcount", 1, 1000))
        ),
        Decimal(0),
    )
    return 1000 * float(total)


def _at(price: Any, context: int) -> Decimal:
    """A price at a length of the context, in tokens."""
    if not isinstance(price, _Data):
        return Decimal(price or 0)
    tiers: Any = price.tiers
    above = [tier.price for tier in sorted(tiers, key=lambda tier: tier.start) if context > tier.start]
    return Decimal(above[-1] if above else cast(Any, price.base))


def _ask_library(url: str, model: str, context: Mapping[str, str]) -> tuple[float, float, float] | None:
    from genai_prices import Usage as Tokens
    from genai_prices import calc_price

    def million(**tokens: int) -> float:
        found: Any = calc_price(Tokens(**tokens), model, provider_api_url=url, price_context=context)
        return 1000 * float(found.total_price)

    try:
        return (
            million(input_tokens=TOKENS),
            million(input_tokens=TOKENS, cache_read_tokens=TOKENS),
            million(output_tokens=TOKENS),
        )
    except LookupError:
        return None
