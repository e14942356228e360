"""Bounds that settings share, and the description that each of them carries."""

from typing import Annotated

from msgspec import Meta

Count = Annotated[int, Meta(ge=1)]
Seconds = Annotated[float, Meta(gt=0)]
Positive = Annotated[float, Meta(gt=0)]
Share = Annotated[float, Meta(ge=0, le=1)]
NonNegative = Annotated[float, Meta(ge=0)]
Quantity = Annotated[str, Meta(pattern=r"^[0-9]+(\.[0-9]+)?(m|[kMGT]|[KMGT]i)?$")]  # Kubernetes'


def description(text: str) -> Meta:
    """What a setting is, for `--help` and `inspect config`."""
    return Meta(description=text)
