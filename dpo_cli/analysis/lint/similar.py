"""Near-duplicate texts: sets of three-word shingles whose Jaccard similarity is high, found without comparing all.

Candidates share one of the smallest shingle hashes (bottom-k sketches, Broder 1997, doi:10.1109/SEQUEN.1997.666900);
each is then checked exactly. Shingles that a tenth of the texts have are boilerplate and count for nothing, so that
prompts of one template are told apart by what fills it. Deterministic; pure Python, about 1 ms a pair. Not
covered: paraphrases, and a group of near-duplicates that is itself a tenth of the data.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import product

NEAR = 0.8  # one changed word of thirty
SAMPLE = 500  # texts that boilerplate is told from
BOILERPLATE = 0.1  # share of those, and at least so many texts:
BOILERPLATE_LEAST = 20
KEYS = 3  # smallest hashes; at a similarity of 0.8 two texts share none with probability 0.2 ** 3
CANDIDATES = 32  # most earlier texts that a key leads to

# Scripts without spaces between words: a character is a word.
_UNSPACED = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]")


class _Numbers(dict[str, int]):
    """Words numbered as they come."""

    def __missing__(self, word: str) -> int:
        self[word] = number = len(self)
        return number


class Shingler:
    """Texts to sets of 64-bit hashes of their three-word shingles.

    Words are numbered as they come and Python's hash of a tuple of integers is not salted: the same texts in the same
    order give the same hashes in every process.
    """

    def __init__(self) -> None:
        self._number = _Numbers().__getitem__

    def shingles(self, text: str) -> set[int]:
        """A text of fewer than three words is one shingle."""
        text = text.lower() if text.isascii() else _UNSPACED.sub(r" \g<0> ", text.lower())
        words = list(map(self._number, text.split()))
        if len(words) < 3:
            return {hash(tuple(words))}
        return set(map(hash, zip(words, words[1:], words[2:], strict=False)))


def near_duplicates(documents: Sequence[tuple[str, ...]]) -> Iterator[tuple[int, int]]:
    """Yield (earlier, later) for each document that is near an earlier one.

    The earlier one is near none before it: it stands for its group. Documents are near where each of their parts is.

    Args:
        documents: texts in parts, of one number of parts.
    """
    shingler = Shingler()
    boilerplate = _boilerplate(documents, shingler)

    def parts_of(index: int) -> Iterator[set[int]]:
        for text, common in zip(documents[index], boilerplate, strict=True):
            shingles = shingler.shingles(text)
            yield shingles - common or shingles

    leaders: dict[int, list[int]] = {}
    for index in range(len(documents)):
        parts = list(parts_of(index))
        keys = _keys(parts)
        seen = dict.fromkeys(leader for key in keys for leader in leaders.get(key, ()))
        near = next((leader for leader in seen if _near(parts, parts_of(leader))), None)
        if near is not None:
            yield near, index
            continue
        for key in keys:
            bucket = leaders.setdefault(key, [])
            if len(bucket) < CANDIDATES:
                bucket.append(index)


def _keys(parts: Sequence[set[int]]) -> list[int]:
    """Where a document is looked up: by its first part (a prompt, shared by many) and by the rest (its answers)."""
    first, rest = parts[0], set().union(*parts[1:])
    return [hash(pair) for pair in product(sorted(first)[:KEYS], sorted(rest)[:KEYS] or [0])]


def _near(parts: Sequence[set[int]], others: Iterator[set[int]]) -> bool:
    return all(len(one & other) >= NEAR * len(one | other) for one, other in zip(parts, others, strict=True))


def _boilerplate(documents: Sequence[tuple[str, ...]], shingler: Shingler) -> list[set[int]]:
    """For each part the shingles that many different texts of a sample have."""
    common = []
    for texts in zip(*documents[:: max(1, len(documents) // SAMPLE)], strict=True):
        different = dict.fromkeys(texts)
        counts = Counter(shingle for text in different for shingle in shingler.shingles(text))
        least = max(BOILERPLATE_LEAST, BOILERPLATE * len(different))
        common.append({shingle for shingle, count in counts.items() if count >= least})
    return common
