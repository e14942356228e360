"""Where the rows of each prompt stand, for a million prompts of a row or two: an integer a prompt, a list for few."""

from collections.abc import Iterator


class Places:
    """Places by a key, in the order in which the keys first come; keys are hashes of 64 bits."""

    def __init__(self) -> None:
        self._first: dict[int, int] = {}
        self._more: dict[int, list[int]] = {}

    def add(self, key: int, place: int) -> None:
        """Add a place of a key."""
        if self._first.setdefault(key, place) != place:
            self._more.setdefault(key, []).append(place)

    def __iter__(self) -> Iterator[int]:
        return iter(self._first)

    def __getitem__(self, key: int) -> list[int]:
        return [self._first[key], *self._more.get(key, ())]
