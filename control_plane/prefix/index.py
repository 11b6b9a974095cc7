"""Where the beginnings of prompts are, for all rows at once."""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterable
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from control_plane.domain.prompt import Blocks
from control_plane.prefix.cache import Cache, CacheRow, Credit, PrefixPolicy, RowKey, Touch

Floats: TypeAlias = NDArray[np.float64]

# Rows that have left the table are remembered, with their caches, for as many as it has and at least for so many.
_GONE_KEPT = 64

# Sets of fewer rows are gone through one by one.
_FEW = 8


class PrefixIndex:
    """Which rows have which blocks, as far as own dispatches and their results tell.

    `_holders` maps each live block to the rows that have it: a set of bits by slot, or ~slot where it is one row only,
    which most blocks are and which takes 28 bytes however many rows there are. Slots are of this index; `align` says
    which row of the table has which.
    """

    __slots__ = ("_caches", "_entries", "_holders", "_order", "_policy", "_slots", "_trust", "_used", "_vacant")

    def __init__(self, policy: PrefixPolicy | None = None) -> None:
        self._policy = policy or PrefixPolicy()
        self._caches: dict[RowKey, Cache] = {}
        self._holders: dict[int, int] = {}
        self._entries = 0
        self._used: OrderedDict[int, Cache] = OrderedDict()
        """By slot, the caches that are not empty, least recently used first."""
        self._slots = 0
        self._vacant: list[int] = []
        self._order: NDArray[np.intp] = np.zeros(0, dtype=np.intp)
        """Slot of each row of the table."""
        self._trust: Floats = np.ones(0)
        """By slot."""

    # --------------------------------------------------------------- the rows ---

    def align(self, rows: Iterable[CacheRow]) -> None:
        """The candidate table has these rows now, in this order. What is known of a row stays, wherever it was before;
        the cache of a server that was started anew and of a model that was unloaded is empty, and a model of another
        fingerprint is unknown."""
        order = []
        gone = dict(self._caches)
        for row in rows:
            key = row.key
            cache = self._caches.get(key)
            if cache is not None and cache.row.fingerprint != row.fingerprint:
                self._forget(key)
                cache = None
            if cache is None:
                cache = self._caches[key] = Cache(row, self._slot(), self._policy)
            elif cache.row is not row:
                self._refresh(cache, row)
            gone.pop(key, None)
            order.append(cache.slot)
        self._order = np.array(order, dtype=np.intp)
        kept = max(_GONE_KEPT, len(order))
        for key in list(gone)[: max(0, len(gone) - kept)]:
            self._forget(key)

    def clear(self, key: RowKey) -> None:
        """The row's cache is empty now. What was learned of it stays."""
        cache = self._caches.get(key)
        if cache is not None:
            self._empty(cache)

    def _refresh(self, cache: Cache, row: CacheRow) -> None:
        before, cache.row = cache.row, row
        if before.instance != row.instance or (before.resident and not row.resident) or not row.caches:
            self._empty(cache)
        if before.capacity != row.capacity:
            cache.tell(row.capacity)

    def _slot(self) -> int:
        if self._vacant:
            slot = self._vacant.pop()
        else:
            slot = self._slots
            self._slots += 1
            if slot >= self._trust.size:
                self._trust = np.concatenate([self._trust, np.ones(max(64, slot))])
        self._trust[slot] = 1.0
        return slot

    def _forget(self, key: RowKey) -> None:
        cache = self._caches.pop(key)
        self._empty(cache)
        self._vacant.append(cache.slot)

    def _empty(self, cache: Cache) -> None:
        for block in cache.live:
            self._release(cache, block)
        self._entries -= cache.size
        cache.live.clear()
        cache.ghosts.clear()
        cache.live_tokens = cache.ghost_tokens = 0
        cache.generation += 1
        self._used.pop(cache.slot, None)

    # ------------------------------------------------------------- predictions ---

    def match(self, blocks: Blocks) -> Floats:
        """Tokens of a prompt that each row of the table is expected to have in its cache, shape (rows,): those of the
        blocks believed there, times the row's trust. At most `blocks.tokens`."""
        levels = self._levels(blocks)
        if not levels:
            return np.zeros(self._order.size)
        lengths = np.zeros(self._slots)
        for tokens, rows in levels:
            if rows.bit_count() <= _FEW:
                while rows:
                    lowest = rows & -rows
                    lengths[lowest.bit_length() - 1] = tokens
                    rows ^= lowest
            else:
                packed = np.frombuffer(rows.to_bytes(-(-self._slots // 8), "little"), dtype=np.uint8)
                mask = np.unpackbits(packed, count=self._slots, bitorder="little").view(np.bool_)
                np.copyto(lengths, tokens, where=mask)
        lengths *= self._trust[: self._slots]
        return np.minimum(lengths, blocks.tokens)[self._order]

    def _levels(self, blocks: Blocks) -> list[tuple[int, int]]:
        """Tokens, and the rows (bits) that have just so many."""
        levels: list[tuple[int, int]] = []
        holders = self._holders
        rows, before, tokens = -1, 0, 0
        for block, end in zip(blocks.ids, blocks.ends, strict=True):
            held = holders.get(block)
            if held is None:
                break
            if held != before:
                before = held
                still = rows & (1 << ~held if held < 0 else held)
                if tokens and still != rows:
                    levels.append((tokens, rows ^ still))
                rows = still
                if not rows:
                    break
            tokens = end
        if tokens and rows:
            levels.append((tokens, rows))
        return levels

    def matched(self, key: RowKey, blocks: Blocks) -> int:
        """Tokens of the blocks believed to be in the row's cache, before trust."""
        cache = self._caches.get(key)
        return 0 if cache is None else cache.look_up(blocks)[0]

    def trust(self, key: RowKey) -> float:
        """Cached tokens that the row's results told for each one predicted. 1 before the first."""
        cache = self._caches.get(key)
        return 1.0 if cache is None else cache.trust

    def capacity(self, key: RowKey) -> float:
        """Tokens that the row's cache is believed to hold. 0: no such row."""
        cache = self._caches.get(key)
        return 0.0 if cache is None else cache.capacity

    @property
    def entries(self) -> int:
        """Blocks remembered, once for each row."""
        return self._entries

    @property
    def blocks(self) -> int:
        """Different blocks that some row is believed to have."""
        return len(self._holders)

    # -------------------------------------------------------------- what happens ---

    def dispatch(self, key: RowKey, blocks: Blocks) -> Credit | None:
        """A request goes to this row, and what it leaves there counts from now on. None: nothing will be learned of it.
        Else the credit ends with one of `finish`, `confirm` and `abandon`."""
        cache = self._caches.get(key)
        if cache is None or not cache.row.caches or not blocks.ids:
            return None
        matched, runs = cache.look_up(blocks)
        most = cache.capacity + cache.ghost_capacity
        count = bisect_left(blocks.ends, most) + 1  # what is more would push itself out again
        fresh, shared = self._insert(cache, blocks, min(count, len(blocks.ids)))
        self._fit(cache)
        return Credit(cache, cache.generation, blocks, matched, runs, cache.turn, fresh, shared)

    def finish(self, credit: Credit, cached_tokens: int, prompt_tokens: int) -> None:
        """The request succeeded, and this is what the server counted, in its own tokens."""
        self.confirm(credit)
        if prompt_tokens <= 0 or credit.generation != credit.cache.generation:
            return
        cache = credit.cache
        before = cache.capacity
        whole = credit.blocks.tokens
        cache.learn(credit, min(cached_tokens * whole / prompt_tokens, whole))
        self._trust[cache.slot] = cache.trust
        if cache.capacity > before:
            self._revive(cache)
        else:
            self._fit(cache)

    def confirm(self, credit: Credit) -> None:
        """The prompt was processed, for a token came; how much of it had been cached will not be told."""
        for touch in (*credit.fresh, *credit.shared):
            touch.sure = True

    def abandon(self, credit: Credit) -> None:
        """The request ended before its first token: what it was credited with is not in the cache, unless a later one
        brought it there."""
        cache = credit.cache
        if credit.generation != cache.generation:
            return
        before = cache.size
        for block in credit.blocks.ids:
            touch = cache.live.get(block)
            if touch is not None and touch in credit.fresh:
                del cache.live[block]
                cache.live_tokens -= touch.tokens
                self._release(cache, block)
        self._count(cache, before)

    # ---------------------------------------------------------------- keeping ---

    def _insert(self, cache: Cache, blocks: Blocks, count: int) -> tuple[list[Touch], list[Touch]]:
        """The first `count` blocks are the last used, the head most of all. Returns the touches of those that were not
        live, and of those that were but only on the credit of a request that is still on its way."""
        live, ghosts = cache.live, cache.ghosts
        before = cache.size
        cache.turn += 1
        fresh: list[Touch] = []
        shared: list[Touch] = []
        again: list[Touch] = []
        for number in range(count - 1, -1, -1):
            block, tokens = blocks.ids[number], blocks.sizes[number]
            old = live.get(block)
            if old is not None:
                live.move_to_end(block)
                touches = again if old.sure else shared
                cache.live_tokens += tokens - old.tokens
            else:
                touches = fresh
                cache.live_tokens += tokens
                ghost = ghosts.pop(block, None)
                if ghost is not None:
                    cache.ghost_tokens -= ghost.tokens
                self._hold(cache, block)
            if not touches or touches[-1].tokens != tokens:
                touches.append(Touch(cache.turn, tokens, touches is again))
            live[block] = touches[-1]
        self._count(cache, before)
        self._used.move_to_end(cache.slot)
        return fresh, shared

    def _fit(self, cache: Cache) -> None:
        """Let go of what is beyond the cache's capacity, and of the oldest of all beyond what may be remembered."""
        before = cache.size
        while cache.live_tokens > cache.capacity:
            block, touch = cache.live.popitem(last=False)
            cache.live_tokens -= touch.tokens
            self._release(cache, block)
            cache.ghosts[block] = touch
            cache.ghost_tokens += touch.tokens
        while cache.ghost_tokens > cache.ghost_capacity:
            cache.ghost_tokens -= cache.ghosts.popitem(last=False)[1].tokens
        self._count(cache, before)
        while self._entries > self._policy.max_entries:
            self._drop(next(iter(self._used.values())))

    def _revive(self, cache: Cache) -> None:
        """The cache is larger than was believed: the latest ghosts are in it."""
        before = cache.size
        while cache.ghosts:
            block, touch = cache.ghosts.popitem()
            if cache.live_tokens + touch.tokens > cache.capacity:
                cache.ghosts[block] = touch
                break
            cache.ghost_tokens -= touch.tokens
            cache.live[block] = touch
            cache.live.move_to_end(block, last=False)
            cache.live_tokens += touch.tokens
            self._hold(cache, block)
        self._count(cache, before)

    def _drop(self, cache: Cache) -> None:
        """Forget the cache's least recently used block."""
        before = cache.size
        if cache.ghosts:
            cache.ghost_tokens -= cache.ghosts.popitem(last=False)[1].tokens
        else:
            block, touch = cache.live.popitem(last=False)
            cache.live_tokens -= touch.tokens
            self._release(cache, block)
        self._count(cache, before)

    def _hold(self, cache: Cache, block: int) -> None:
        """The cache holds the block, which it did not before."""
        held = self._holders.get(block)
        if held is None:
            self._holders[block] = cache.alone
        else:
            self._holders[block] = (1 << ~held if held < 0 else held) | cache.bit

    def _release(self, cache: Cache, block: int) -> None:
        """The cache holds the block no more."""
        held = self._holders[block]
        if held < 0:
            del self._holders[block]
            return
        held ^= cache.bit
        self._holders[block] = held if held.bit_count() > 1 else ~(held.bit_length() - 1)

    def _count(self, cache: Cache, before: int) -> None:
        """The cache had `before` blocks."""
        self._entries += cache.size - before
        if not cache.size:
            self._used.pop(cache.slot, None)
        elif cache.slot not in self._used:
            self._used[cache.slot] = cache
