"""Modal's cards: their names, list prices and how many a container can have."""

from dpo_cli.errors import UserError

# Modal's list price of each card, in dollars a second, and how many a container can have.
CARDS = {
    "T4": (0.000164, 8), "L4": (0.000222, 8), "A10": (0.000306, 4), "L40S": (0.000542, 8), "A100": (0.000583, 8),
    "A100-40GB": (0.000583, 8), "A100-80GB": (0.000694, 8), "RTX-PRO-6000": (0.000842, 8), "H100": (0.001097, 8),
    "H100!": (0.001097, 8), "H200": (0.001261, 8), "B200": (0.001736, 8), "B200+": (0.001736, 8),
}  # fmt: skip


def card(name: str, count: int) -> str:
    """A card and its number, as Modal writes them.

    Raises:
        UserError: Modal has no such card, or not so many in one container.
    """
    name, _, written = name.partition(":")
    name = name.upper()
    if name not in CARDS:
        raise UserError(f"Modal has no card '{name}'", where="--gpu", hint=f"one of: {', '.join(CARDS)}")
    if written and not written.isdigit():
        raise UserError(f"'{written}' is no number of cards", where="--gpu", hint=f"--gpu {name} --gpus 2")
    count = max(count, int(written or 1))
    if not 1 <= count <= CARDS[name][1]:
        raise UserError(f"{count} × {name} in one container", where="--gpus", hint=f"at most {CARDS[name][1]}")
    return name if count == 1 else f"{name}:{count}"


def usd_per_second(cards: str) -> float:
    """List price of cards as `card` writes them."""
    name, _, count = cards.partition(":")
    return CARDS[name][0] * int(count or 1)


def cost(cards: str, seconds: float) -> str:
    """What so many seconds of cards cost, about."""
    name, _, count = cards.partition(":")
    used, usd = seconds * int(count or 1), seconds * usd_per_second(cards)
    return f"about {used:,.0f} GPU-seconds of {name}, ${usd:.2f} at list price: an estimate, no bill"
