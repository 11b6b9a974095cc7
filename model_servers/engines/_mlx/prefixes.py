"""KV caches of finished sequences, kept for prompts that begin alike.

Ours rather than mlx_lm's LRUPromptCache: that one evicts by age of insertion, not of use, and its search for a
longer entry copies lists once per token (quadratic). With a few entries, comparing arrays is exact and takes
microseconds.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Cache = list[Any]
"""One mlx_lm cache object per layer, batch size 1."""


@dataclass(eq=False, slots=True)
class _Entry:
    tokens: NDArray[np.int32]
    cache: Cache
    nbytes: int
    trimmable: bool
    used: int


class PrefixCache:
    """Bounded in entries and bytes; the least recently used entry goes first. Not thread-safe."""

    def __init__(
        self,
        max_entries: int,
        max_bytes: int,
        can_trim: Callable[[Cache], bool],
        trim: Callable[[Cache, int], Any],
    ) -> None:
        """`can_trim(cache)`, `trim(cache, n)`: drop the last n tokens, in place (mlx_lm's functions)."""
        self._max_entries = max_entries
        self._max_bytes = max_bytes
        self._can_trim = can_trim
        self._trim = trim
        self._entries: list[_Entry] = []
        self._uses = 0

    @property
    def enabled(self) -> bool:
        return self._max_entries > 0 and self._max_bytes > 0

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def fetch(self, tokens: Sequence[int]) -> tuple[Cache | None, int]:
        """The cache of the longest known beginning of `tokens` and its length.

        At least one token is left over: its logits are what generation starts from. The arrays of the cache are
        shared and must not be written to; BatchGenerator copies them into its batch.
        """
        wanted = np.asarray(tokens, dtype=np.int32)
        best: _Entry | None = None
        best_length = 0
        for entry in self._entries:
            length = min(_common(entry.tokens, wanted), wanted.size - 1)
            if length < entry.tokens.size and not entry.trimmable:
                continue
            if length > best_length:
                best, best_length = entry, length
        if best is None:
            return None, 0
        self._uses += 1
        best.used = self._uses
        # Trimming moves an offset, which lives in the copied object, and leaves shared arrays alone. Nested caches
        # and states without keys change in other ways: those are copied whole.
        cache = [copy.copy(layer) if hasattr(layer, "keys") else copy.deepcopy(layer) for layer in best.cache]
        surplus = best.tokens.size - best_length
        if surplus:
            self._trim(cache, surplus)
        return cache, best_length

    def insert(self, tokens: Sequence[int], cache: Cache) -> None:
        """Keeps `cache`, which holds exactly `tokens`."""
        added = np.asarray(tokens, dtype=np.int32)
        nbytes = sum(int(layer.nbytes) for layer in cache)
        if not self.enabled or nbytes > self._max_bytes or not added.size:
            return
        trimmable = self._can_trim(cache)
        kept: list[_Entry] = []
        for entry in self._entries:
            common = _common(entry.tokens, added)
            if common == added.size and (entry.trimmable or common == entry.tokens.size):
                self._uses += 1
                entry.used = self._uses
                return  # known already
            # What can be cut out of the new entry need not be kept.
            if not (trimmable and common == entry.tokens.size):
                kept.append(entry)
        self._uses += 1
        kept.append(_Entry(added, cache, nbytes, trimmable, self._uses))
        self._entries = kept
        while len(self._entries) > self._max_entries or self.nbytes > self._max_bytes:
            self._entries.remove(min(self._entries, key=lambda entry: entry.used))

    def clear(self) -> None:
        self._entries.clear()


def _common(one: NDArray[np.int32], other: NDArray[np.int32]) -> int:
    """Length of the common beginning."""
    size = min(one.size, other.size)
    differs = one[:size] != other[:size]
    first = int(differs.argmax()) if size else 0
    return first if size and differs[first] else size
