"""How alike texts are by their words and the parts of their words, without a language model.

Words are alike if they differ in case, accents, punctuation or a common ending of English ("reviews", "reviewing"),
less so if they only share most of their letter triples ("postgres", "postgresql").
"""

from __future__ import annotations

import math
import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

_WORD = re.compile(r"[^\W_]+[+#]*")
"""Letters and digits; "c++" and "c#" are words, too."""

_ENDINGS = (
    ("izations", "iz"), ("ization", "iz"), ("isations", "is"), ("isation", "is"), ("ions", ""), ("ion", ""),
    ("ings", ""), ("ing", ""), ("ers", ""), ("er", ""), ("ors", ""), ("or", ""), ("ies", "y"), ("ed", ""),
    ("es", ""), ("e", ""), ("s", ""),
)  # fmt: skip
_KEPT = ("ss", "us", "is")
"""No plurals."""
_SHORTEST = 3
"""Letters that an ending must leave."""

# fmt: off
_EMPTY = frozenset((
    "a", "an", "and", "are", "as", "at", "be", "by", "for", "from", "has", "have", "in", "into", "is", "it", "its",
    "of", "on", "or", "that", "the", "their", "this", "to", "was", "were", "which", "who", "will", "with",
    "you", "your",
))
# fmt: on

_BUCKETS = 1 << 15
_TRIPLE_WEIGHT = 0.4
"""Of a letter triple, where a word has 1."""
_MOST_CHARACTERS = 2000
"""Of a text that are looked at."""


def words(text: str) -> list[str]:
    """The words of a text, without case and accents."""
    plain = "".join(c for c in unicodedata.normalize("NFKD", text.casefold()) if not unicodedata.combining(c))
    return _WORD.findall(plain)


@lru_cache(4096)
def stem(word: str) -> str:
    """A word without its ending."""
    if word.endswith(_KEPT):
        return word
    for ending, put in _ENDINGS:
        if word.endswith(ending) and len(word) - len(ending) + len(put) >= _SHORTEST:
            left = word[: -len(ending)] + put
            if ending in ("ing", "ings", "ed", "er", "ers") and left[-1] == left[-2] and left[-1] not in "lsz":
                left = left[:-1]
            return left
    return word


def normalised(text: str) -> str:
    """A name such that names that are the same but for their form are equal."""
    return " ".join(stem(word) for word in words(text))


# ------------------------------------------------------------------ skills ---

_EXTRA = 0.9
"""Factor for each word that an offered skill has more than the required one."""


@lru_cache(8192)
def covers(required: str, offered: str) -> float:
    """How far an offered skill is the required one, [0, 1]; 1 if they are the same but for their form.

    Every required word must have its like; words more make the offered one more special, which costs little:
    "german translation" covers "translation" with 0.9, but not the other way round.
    """
    wanted, given = words(required), words(offered)
    if not wanted or not given:
        return float(required.casefold() == offered.casefold())
    if normalised(required) == normalised(offered) or stem("".join(wanted)) == stem("".join(given)):
        return 1.0
    worst = min(max(_alike(one, other) for other in given) for one in wanted)
    return worst * _EXTRA ** max(0, len(given) - len(wanted))


@lru_cache(8192)
def _alike(one: str, other: str) -> float:
    """Of two words, [0, 1]. Forms of a word differ at its end: what begins differently ("unsupervised") is another."""
    if stem(one) == stem(other):
        return 1.0
    if one[0] != other[0]:
        return 0.0
    ours, theirs = set(_triples(one)), set(_triples(other))
    return min(1.0, len(ours & theirs) / math.sqrt(len(ours) * len(theirs)))


def _triples(word: str) -> list[str]:
    padded = f" {word} "
    return [padded[i : i + 3] for i in range(len(padded) - 2)]


# ------------------------------------------------------------------- texts ---


@dataclass(frozen=True, slots=True, eq=False)
class Sketch:
    """A text as hashed words and letter triples."""

    buckets: NDArray[np.uint16]
    """Distinct."""
    weights: NDArray[np.float32]
    """1 + ln(how often), times the weight of the kind."""


def sketch(text: str) -> Sketch:
    """Of the beginning of a text. Costs about a microsecond a character."""
    counts: Counter[str] = Counter()
    for word in words(text[:_MOST_CHARACTERS]):
        if word not in _EMPTY:
            root = stem(word)
            counts[root + "="] += 1
            counts.update(_triples(root))
    found: dict[int, float] = {}
    for feature, count in counts.items():
        bucket = zlib.crc32(feature.encode()) % _BUCKETS
        weight = (1.0 if feature.endswith("=") else _TRIPLE_WEIGHT) * (1.0 + math.log(count))
        found[bucket] = found.get(bucket, 0.0) + weight
    return Sketch(np.fromiter(found, np.uint16, len(found)), np.fromiter(found.values(), np.float32, len(found)))


def similarities(query: Sketch, texts: Sequence[Sketch]) -> list[float]:
    """Cosine of the TF-IDF vectors of the query and of each text, [0, 1]; rare are the words that few of the texts
    have (smoothed as in scikit-learn's TfidfTransformer)."""
    if not texts:
        return []
    buckets = np.concatenate([text.buckets for text in texts])
    owners = np.repeat(np.arange(len(texts)), [len(text.buckets) for text in texts])
    frequency = np.bincount(buckets, minlength=_BUCKETS)

    def rarity(at: NDArray[np.uint16]) -> NDArray[np.float64]:
        rare: NDArray[np.float64] = np.log((1.0 + len(texts)) / (1.0 + frequency[at])) + 1.0
        return rare

    asked = query.weights * rarity(query.buckets)
    wanted = np.zeros(_BUCKETS)
    wanted[query.buckets] = asked
    weights = np.concatenate([text.weights for text in texts]) * rarity(buckets)
    products = np.bincount(owners, wanted[buckets] * weights, minlength=len(texts))
    scales = np.sqrt(np.bincount(owners, weights * weights, minlength=len(texts)) * (asked * asked).sum())
    cosines = np.divide(products, scales, out=np.zeros(len(texts)), where=scales > 0.0)
    found: list[float] = np.minimum(cosines, 1.0).tolist()
    return found
