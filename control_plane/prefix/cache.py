"""What one model on one server is believed to have cached."""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass

from control_plane.domain.model import ModelName, Provider, ServerId
from control_plane.domain.prompt import Blocks

RowKey = tuple[ServerId, ModelName, Provider]

# Of capacity, at one result that speaks for more or for less.
_GROWTH = 1.1
_SHRINKAGE = 0.9
_SHRINKAGE_MOST = 0.5

# Weight of trust before the first result, tokens: less than one usual prompt.
_PRIOR_TOKENS = 1000.0


@dataclass(frozen=True, slots=True)
class PrefixPolicy:
    """How much is remembered, and how fast it is corrected.

    Raises:
        ValueError: a value is out of its range; names the field.
    """

    max_entries: int = 200_000
    """Blocks of all servers together, about 300 bytes each."""
    capacity: int = 1_000_000
    """Tokens that a cache is taken to hold until results tell, if the server does not say. Rather too much: what is
    predicted in vain is soon corrected, what is not predicted is not tried."""
    least_capacity: int = 1_024
    """Tokens under which no cache is believed to be: it could not be seen to work again. At most `capacity`."""
    ghosts: float = 0.5
    """Of capacity: what is remembered of what the cache should have dropped. Hits there show that it is larger."""
    memory: float = 0.95
    """Weight of all earlier results against one more, in how far predictions are trusted; [0, 1)."""

    def __post_init__(self) -> None:
        if self.max_entries < 1:
            raise ValueError(f"max_entries must be >= 1, is {self.max_entries}")
        if not 1 <= self.least_capacity <= self.capacity:
            raise ValueError(f"least_capacity must be >= 1 and <= capacity, is {self.least_capacity}")
        if not 0 <= self.ghosts < math.inf:
            raise ValueError(f"ghosts must be finite and >= 0, is {self.ghosts}")
        if not 0 <= self.memory < 1:
            raise ValueError(f"memory must be in [0, 1), is {self.memory}")


@dataclass(frozen=True, slots=True)
class CacheRow:
    """One row of the candidate table, as far as caching goes."""

    server_id: ServerId
    model: ModelName
    provider: Provider
    instance: str = ""
    """Of the server. Another one begins with an empty cache."""
    fingerprint: str = ""
    """Of the model. Under another one nothing learned holds."""
    caches: bool = True
    """Its card has PREFIX_CACHE."""
    resident: bool = True
    """In memory, or on its way there; if it was and is no more, its cache is gone."""
    capacity: int | None = None
    """Tokens that the server says its cache holds. None or 0: it does not say."""

    @property
    def key(self) -> RowKey:
        return self.server_id, self.model, self.provider


@dataclass(eq=False, slots=True)
class Touch:
    """The last use of blocks: one object for all of one size in one request."""

    turn: int
    """Of the cache, when that was."""
    tokens: int
    """Of one block."""
    sure: bool
    """A request that has got so far put the blocks into the cache."""


@dataclass(frozen=True, slots=True)
class Run:
    """Blocks in a row that were last used together."""

    begin: int
    end: int
    """Tokens from the beginning of the prompt."""
    turn: int
    """Of the cache, when that was."""
    live: bool
    """False: ghosts."""
    sure: bool


@dataclass(eq=False, slots=True)
class Credit:
    """A dispatch on its way, credited with what it will leave in the cache."""

    cache: Cache
    generation: int
    blocks: Blocks
    matched: int
    """Tokens that should have been there."""
    runs: tuple[Run, ...]
    turn: int
    """Of the cache, that of this dispatch."""
    fresh: list[Touch]
    """Of the blocks that were not there."""
    shared: list[Touch]
    """Of the blocks that other requests on their way were credited with."""


class Cache:
    """Mirror of one server's cache: what was used last is `live`, up to `capacity`; what was used before that, up to a
    share of it, are `ghosts`. Both are ordered by last use, and of one prompt the tail is older than the head. So the
    tail goes before the head, as in engines, and whoever has a block has all before it."""

    __slots__ = (
        "_expected",
        "_found",
        "_misses",
        "_policy",
        "alone",
        "bit",
        "capacity",
        "generation",
        "ghost_tokens",
        "ghosts",
        "live",
        "live_tokens",
        "row",
        "slot",
        "turn",
    )

    def __init__(self, row: CacheRow, slot: int, policy: PrefixPolicy) -> None:
        self.row = row
        self.slot = slot
        self.bit = 1 << slot
        self.alone = ~slot
        self.live: OrderedDict[int, Touch] = OrderedDict()
        self.ghosts: OrderedDict[int, Touch] = OrderedDict()
        self.live_tokens = self.ghost_tokens = 0
        self.turn = 0
        """Dispatches so far."""
        self.generation = 0
        """Times that the cache was emptied."""
        self._policy = policy
        self.capacity = float(row.capacity or policy.capacity)
        """Tokens."""
        self._misses = 0
        """Results in a row that spoke for a smaller cache."""
        self._expected = self._found = _PRIOR_TOKENS

    @property
    def size(self) -> int:
        """Blocks remembered."""
        return len(self.live) + len(self.ghosts)

    @property
    def trust(self) -> float:
        """Tokens found for each token expected, >= 0; may be more than 1, as answers are cached too."""
        return self._found / self._expected

    @property
    def ghost_capacity(self) -> float:
        return self.capacity * self._policy.ghosts

    def look_up(self, blocks: Blocks) -> tuple[int, tuple[Run, ...]]:
        """Tokens of the live blocks that the prompt begins with, and these and the ghosts after them as runs."""
        matched = begin = end = 0
        runs: list[Run] = []
        current: tuple[int, bool, bool] | None = None
        for block, block_end in zip(blocks.ids, blocks.ends, strict=True):
            touch = self.live.get(block)
            live = touch is not None
            if touch is None:
                touch = self.ghosts.get(block)
                if touch is None:
                    break
            # One that never comes after a ghost: then ids are no chain, and the rest counts as a ghost.
            live = live and matched == end
            found = (touch.turn, live, touch.sure)
            if found != current:
                if current is not None:
                    runs.append(Run(begin, end, *current))
                current, begin = found, end
            end = block_end
            if live:
                matched = end
        if current is not None:
            runs.append(Run(begin, end, *current))
        return matched, tuple(runs)

    def tell(self, told: int | None) -> None:
        """The server says another capacity than before."""
        if told:
            self.capacity = float(told)

    def learn(self, credit: Credit, cached: float) -> None:
        """The prompt of `credit` had `cached` tokens in the cache, in the blocks' own measure."""
        matched = credit.matched
        if matched:
            memory = self._policy.memory
            self._expected = memory * self._expected + matched
            # An answer adds to what is found; twice as much is another tenant's prompt, or the same by other ways.
            self._found = memory * self._found + min(cached, 2.0 * matched)
        error = credit.blocks.error
        surely = cached * (1 - error)
        # Engines count whole blocks of their own, and compute at least the last token.
        at_most = cached * (1 + error) + credit.blocks.sizes[0]
        larger = surely
        if any(not run.live and run.begin < surely for run in credit.runs):
            larger = max(surely, _GROWTH * self.capacity)
        if larger > self.capacity:
            self.capacity = larger
        else:
            missed = next((run for run in credit.runs if run.live and run.end > at_most), None)
            if missed is None:
                self._misses = 0
            # What was not in the cache yet when this prompt came says nothing of how much the cache holds.
            elif missed.sure:
                self._misses += 1
                depth = missed.begin + self._between(missed.turn, credit.turn)
                shrunk = self.capacity * max(_SHRINKAGE**self._misses, _SHRINKAGE_MOST)
                self.capacity = min(self.capacity, max(shrunk, depth, self._policy.least_capacity))

    def _between(self, before: int, turn: int) -> int:
        """Tokens of the live blocks that were last used after the turn `before` and ahead of `turn`."""
        tokens = 0
        for touch in reversed(self.live.values()):
            if touch.turn <= before:
                break
            if touch.turn < turn:
                tokens += touch.tokens
        return tokens
