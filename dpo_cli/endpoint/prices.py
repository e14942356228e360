"""What tokens cost: the user's own price, nothing on this machine, else genai-prices' dated table (offline)."""

from urllib.parse import urlsplit

from msgspec import Struct

from dpo_cli.errors import UserError
from dpo_cli.schema import Usage


class Price(Struct, frozen=True):
    """Dollars per million tokens."""

    input: float
    cached: float
    output: float

    def usd(self, usage: Usage) -> float:
        """Dollars that these tokens cost."""
        fresh = usage.input - usage.cached
        return (fresh * self.input + usage.cached * self.cached + usage.output * self.output) / 1e6


def price_of(url: str, model: str, override: str | None = None) -> Price | None:
    """What the model costs there: `override` (`IN,CACHED,OUT`), nothing on this machine, else the price table.

    None if nobody knows; a caller with a budget must then refuse, not guess.

    Raises:
        UserError: the override is not three numbers.
    """
    if override is not None:
        try:
            fresh, cached, output = map(float, override.split(","))
        except ValueError:
            raise UserError(
                f"'{override}' is not IN,CACHED,OUT", hint="dollars per million tokens: 0.75,0.075,4.5"
            ) from None
        return Price(fresh, cached, output)
    if is_local(url):
        return Price(0.0, 0.0, 0.0)
    from genai_prices import Usage as Tokens
    from genai_prices import calc_price

    def million(**tokens: int) -> float:
        # A thousand at a time: a million would fall into the price of long contexts.
        return 1000 * float(calc_price(Tokens(**tokens), model, provider_api_url=url).total_price)

    try:
        return Price(
            input=million(input_tokens=1000),
            cached=million(input_tokens=1000, cache_read_tokens=1000),
            output=million(output_tokens=1000),
        )
    except LookupError:
        return None


def is_local(url: str) -> bool:
    """Whether the URL points to this machine."""
    host = urlsplit(url).hostname or ""
    return host in ("localhost", "::1", "0.0.0.0") or host.startswith("127.") or host.endswith(".localhost")
