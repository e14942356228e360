"""What calls cost: before they are made, an estimate; after, a receipt."""

from collections.abc import Mapping

import msgspec
from msgspec import Struct

from dpo_cli.data.records import Usage
from dpo_cli.endpoint.prices import Price, table_date

BYTES_A_TOKEN = 3.5  # of a request, at most


class Receipt(Struct, kw_only=True):
    """What a run asked of an endpoint, and what that cost.

    `calls` were answered and paid, `reused` came from the ledger, `failed` were given up. `retries` are of any kind;
    `resent` those of requests that may have been paid already, `interrupted` the requests that a former run had in
    flight when it was stopped, sent again: both may be paid twice. `unseen_usd` is at most what the lost answers cost.
    `waiting` requests are in batches that have not ended.
    """

    calls: int = 0
    reused: int = 0
    failed: int = 0
    retries: int = 0
    resent: int = 0
    interrupted: int = 0
    waiting: int = 0
    usage: Usage = msgspec.field(default_factory=Usage)
    usd: float = 0.0
    unseen_usd: float = 0.0

    def __add__(self, other: "Receipt") -> "Receipt":
        both = ((name, getattr(self, name) + getattr(other, name)) for name in self.__struct_fields__)
        return Receipt(**dict(both))

    def in_words(self) -> str:
        """One line, for a run that ends before it could show a table."""
        usage = self.usage
        said = [
            f"{self.calls:,} calls paid",
            f"{self.failed:,} failed",
            f"{usage.input:,} tokens in ({usage.cached:,} cached)",
            f"{usage.output:,} out ({usage.reasoning:,} reasoning)",
            f"${self.usd:,.4f}",
        ]
        if twice := self.resent + self.interrupted:
            said.append(f"{twice:,} perhaps paid twice")
        return " · ".join(said)


class Estimate(Struct, kw_only=True):
    """What a run would ask and cost.

    Dollars are None where nobody knows the price. `assumptions` say what the numbers rest on. `cheaper` are the
    dollars, low and worst, that the same would cost with other models.
    """

    calls: int
    input: int
    output_low: int
    output_worst: int
    usd_low: float | None = None
    usd_worst: float | None = None
    assumptions: list[str] = []
    cheaper: dict[str, tuple[float, float]] = {}

    def __add__(self, other: "Estimate") -> "Estimate":
        """Both together; without dollars if those of either are unknown."""

        def both(one: float | None, two: float | None) -> float | None:
            return None if one is None or two is None else one + two

        return Estimate(
            calls=self.calls + other.calls,
            input=self.input + other.input,
            output_low=self.output_low + other.output_low,
            output_worst=self.output_worst + other.output_worst,
            usd_low=both(self.usd_low, other.usd_low),
            usd_worst=both(self.usd_worst, other.usd_worst),
            assumptions=list(dict.fromkeys(self.assumptions + other.assumptions)),
            cheaper=self._cheaper_with(other),
        )

    def _cheaper_with(self, other: "Estimate") -> dict[str, tuple[float, float]]:
        """What both cost together if each model stands in wherever it is the cheaper one."""
        own = [(one.usd_low or 0.0, one.usd_worst or 0.0) for one in (self, other)]
        both: dict[str, tuple[float, float]] = {}
        for name in [*self.cheaper, *other.cheaper]:
            mine, theirs = self.cheaper.get(name, own[0]), other.cheaper.get(name, own[1])
            both[name] = mine[0] + theirs[0], mine[1] + theirs[1]
        return both


def estimate(
    calls: int,
    size: int,
    output_low: int,
    output_worst: int,
    price: Price | None,
    given: bool,
    typical: str,
    others: Mapping[str, Price] | None = None,
) -> Estimate:
    """Price what is owed.

    Args:
        calls: how many requests.
        size: their bytes in all.
        output_low: tokens of output that are to be expected.
        output_worst: tokens of output if every reply is as long as its cap.
        price: of the model and tier.
        given: whether the price is the user's own.
        typical: what `output_low` rests on.
        others: prices of other models.
    """
    tokens = int(size / BYTES_A_TOKEN)
    found = Estimate(calls=calls, input=tokens, output_low=output_low, output_worst=output_worst)
    found.assumptions = [
        f"input: a token for {BYTES_A_TOKEN:g} characters",
        f"low: {typical}; worst: every reply as long as its cap; what must be asked again comes on top",
    ]
    if price is not None:
        found.usd_low = price.usd(Usage(tokens, 0, output_low))
        found.usd_worst = price.usd(Usage(tokens, 0, output_worst))
        rate = f"${price.input:g} in, ${price.output:g} out per million tokens"
        source = "--price" if given else table_date() if price.output else "an endpoint on this machine"
        found.assumptions.append(f"{rate} ({source})")
    low, worst = Usage(tokens, 0, output_low), Usage(tokens, 0, output_worst)
    found.cheaper = {name: (other.usd(low), other.usd(worst)) for name, other in (others or {}).items()}
    return found
