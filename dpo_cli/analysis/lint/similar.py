"""Near-duplicate texts: sets of three-word shingles whose Jaccard similarity is high, found without comparing all.

Candidates agree in one of eight bands of four minimal shingle hashes each (MinHash with banding: Broder 1997,
doi:10.1109/SEQUEN.1997.666900; Leskovec, Rajaraman, Ullman, "Mining of Massive Datasets", 3.4). The minima are those of
the ranges that the hash space is cut into, so that one hash a shingle suffices (Shrivastava and Li 2014,
arXiv:1406.4784). Each candidate is then checked exactly. At a similarity of 0.8 a candidate is found with probability
1 - (1 - 0.8^4)^8 = 0.985, at 0.9 with 0.9997. Shingles that a tenth of the texts have are boilerplate and count for
nothing, so that prompts of one template are told apart by what fills it. Deterministic; pure Python, the same time a
document however many there are, and 64 bytes of each are kept. Not covered: paraphrases, and a group of near-duplicates
that is itself a tenth of the data.
"""

import re
import zlib
from array import array
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from functools import lru_cache
from operator import eq

NEAR = 0.8  # one changed word of thirty
SAMPLE = 500  # texts that boilerplate is told from
BOILERPLATE = 0.1  # share of those, and at least so many texts:
BOILERPLATE_LEAST = 20
BANDS, BAND = 8, 4  # minima of 16 bits, so that a band is one integer of 64
LIKELY = 0.45  # share of equal minima of a half below which a pair is not checked: 3.5 standard deviations under 0.8
NEIGHBORS = 4  # of those in one bucket, so many first and so many last ones are candidates
NUMBERED = 1 << 19  # words that are numbered as they come
LEADERS = 4096  # whose shingles are kept at hand

# Scripts without spaces between words: a character is a word.
_UNSPACED = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]")


class _Numbers(dict[str, int]):
    """Words to numbers: a checksum, which is kept for the first words."""

    def __missing__(self, word: str) -> int:
        number = zlib.crc32(word.encode("utf-8", "surrogatepass"))
        if len(self) < NUMBERED:
            self[word] = number
        return number


class Shingler:
    """Texts to sets of 64-bit hashes of their three-word shingles.

    Words go by a checksum and Python's hash of a tuple of integers is not salted: the same texts give the same hashes
    in every process.
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
        documents: texts in parts, of one number of parts. Read in order once, then where candidates are.
    """
    if len(documents) < 2:
        return
    shingler = Shingler()
    boilerplate = _boilerplate(documents, shingler)

    def parts_of(texts: tuple[str, ...]) -> list[set[int]]:
        found = (shingler.shingles(text) for text in texts)
        return [shingles - common or shingles for shingles, common in zip(found, boilerplate, strict=True)]

    sketches = array("H")
    for texts in documents:
        sketches.extend(_sketch(parts_of(texts)))
    at_hand = lru_cache(LEADERS)(lambda index: parts_of(documents[index]))
    leader_of: dict[int, int] = {}
    for later, earlier in _candidates(sketches).items():
        parts = parts_of(documents[later])
        leaders = dict.fromkeys(leader_of.get(index, index) for index in sorted(earlier))
        near = next((leader for leader in leaders if _near(parts, at_hand(leader))), None)
        if near is not None:
            leader_of[later] = near
            yield near, later


def _sketch(parts: Sequence[set[int]]) -> list[int]:
    """The minima of a document's hashes: half of each band of its first part (a prompt), half of the rest (answers)."""
    first = sorted(parts[0])
    if len(parts) == 1:
        return _minima(first, BANDS * BAND)
    half = BANDS * BAND // 2
    one, two = _minima(first, half), _minima(sorted(set().union(*parts[1:])), half)
    found: list[int] = []
    for start in range(0, half, BAND // 2):
        found += one[start : start + BAND // 2]
        found += two[start : start + BAND // 2]
    return found


_EDGES = {
    count: [(part << 64) // count - (1 << 63) for part in range(count)] for count in (BANDS * BAND // 2, BANDS * BAND)
}


def _minima(ordered: list[int], count: int) -> list[int]:
    """16 bits of the smallest hash of each range of the hash space; an empty range takes the next one's.

    Args:
        ordered: hashes, ascending, at least one.
        count: of ranges.
    """
    size = len(ordered)
    places = [bisect_left(ordered, edge) for edge in _EDGES[count]]
    return [ordered[place if place < size else 0] & 0xFFFF for place in places]


def _candidates(sketches: "array[int]") -> dict[int, set[int]]:
    """Earlier documents that may be near a later one, by the later one, in order."""
    width = BANDS * BAND
    keys = array("Q", sketches.tobytes())
    found: defaultdict[int, set[int]] = defaultdict(set)
    for band in range(BANDS):
        column = keys[band::BANDS]
        repeated = {key for key, count in Counter(column).items() if count > 1}
        buckets: defaultdict[int, list[int]] = defaultdict(list)
        for index, key in enumerate(column):
            if key not in repeated:
                continue
            bucket = buckets[key]
            sketch = sketches[index * width : (index + 1) * width]
            for earlier in bucket if len(bucket) <= 2 * NEIGHBORS else bucket[:NEIGHBORS] + bucket[-NEIGHBORS:]:
                if earlier not in found[index] and _likely(sketch, sketches[earlier * width : (earlier + 1) * width]):
                    found[index].add(earlier)
            bucket.append(index)
    return {index: found[index] for index in sorted(found) if found[index]}


def _likely(sketch: "array[int]", other: "array[int]") -> bool:
    """Whether two documents may be near: enough minima of both halves are equal."""
    equal = list(map(eq, sketch, other))
    half = BAND // 2
    first = sum(sum(equal[start : start + half]) for start in range(0, len(equal), BAND))
    least = LIKELY * BANDS * half
    return first >= least and sum(equal) - first >= least


def _near(parts: Sequence[set[int]], others: Sequence[set[int]]) -> bool:
    return all(len(one & other) >= NEAR * len(one | other) for one, other in zip(parts, others, strict=True))


def _boilerplate(documents: Sequence[tuple[str, ...]], shingler: Shingler) -> list[set[int]]:
    """For each part the shingles that many different texts of a sample have."""
    common = []
    sample = [documents[index] for index in range(0, len(documents), max(1, len(documents) // SAMPLE))]
    for texts in zip(*sample, strict=True):
        different = dict.fromkeys(texts)
        counts = Counter(shingle for text in different for shingle in shingler.shingles(text))
        least = max(BOILERPLATE_LEAST, BOILERPLATE * len(different))
        common.append({shingle for shingle, count in counts.items() if count >= least})
    return common
