"""Bounded, fair queue for late binding: requests wait here, not at a server, until one can start them."""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Generic, TypeAlias, TypeVar

from control_plane.domain.errors import queue_bytes_full, queue_full
from control_plane.domain.request import RouteRequest
from control_plane.domain.server import Failed
from control_plane.domain.task import Priority

T = TypeVar("T")

KindKey: TypeAlias = tuple[object, ...]
LaneKey: TypeAlias = tuple[object, ...]

# Bounds of the advice to a client that was turned away, seconds: sooner it would only be turned away again, later it
# would miss places that are free by then.
_RETRY_SOONEST = 0.5
_RETRY_LATEST = 30.0

BACKGROUND = 1 << 62
"""Places from here on are in the background: behind every request that somebody waits for, class by class."""

# Dead entries that the expiry heap may hold beside as many as there are live ones.
_SLACK = 64


@dataclass(frozen=True, slots=True, eq=False)
class Waiting(Generic[T]):
    """A request in the queue."""

    request: RouteRequest
    payload: T
    avoid: frozenset[Failed]
    """What failed in earlier attempts of the request."""
    enqueued_at: float
    """Monotonic seconds."""
    expires_at: float
    """Monotonic seconds; infinite in the background."""
    place: int
    """Order of the request's first arrival, over all classes: a request that comes again keeps it."""
    kind: KindKey
    lane: LaneKey
    size: int
    """Bytes."""

    @property
    def background(self) -> bool:
        """Nobody waits for it at this moment."""
        return self.place >= BACKGROUND


@dataclass(frozen=True, slots=True)
class Round(Generic[T]):
    """What came of a dispatch."""

    left: int
    """Requests that left the queue."""
    reached: Waiting[T] | None
    """Where it was interrupted; None: it went through."""


# Places in order; of a few thousand, taking one from the middle costs less than any cleverer structure.
_Places: TypeAlias = list[int]


class FairQueue(Generic[T]):
    """Higher priority first, first come first served within a class.

    Requests with the same needs share a lane, and only the first of a lane is tried: if it cannot start, neither can
    those behind it. A wave of thousands for one busy model so costs one try per event, and holds nobody else up.
    Lanes that differ in which servers they exclude or avoid, and in size only, are of one kind: a dispatch that is told
    which kinds may start does not even look at the others.

    Requests in the background wait behind all others of their class. They stand for work that waits elsewhere: no bound
    holds for them, no depth counts them, no time ends their waiting.

    Args:
        bounds: most waiting requests per class, >= 0.
        timeouts: seconds that a request may wait, per class, > 0.
        total: most waiting requests in all; None: the bounds are enough.
        max_bytes: most bytes of all waiting requests together, >= 0; None: no limit.

    Raises:
        ValueError: a class has no bound or timeout, or one is out of its range.
    """

    def __init__(
        self,
        bounds: Mapping[Priority, int],
        timeouts: Mapping[Priority, float],
        total: int | None = None,
        max_bytes: int | None = None,
    ) -> None:
        for priority in Priority:
            if bounds.get(priority, -1) < 0:
                raise ValueError(f"bounds.{priority.name.lower()} must be given and >= 0")
            if not timeouts.get(priority, 0.0) > 0:
                raise ValueError(f"timeouts.{priority.name.lower()} must be given and > 0")
        if total is not None and total < 0:
            raise ValueError(f"total must be >= 0, is {total}")
        if max_bytes is not None and max_bytes < 0:
            raise ValueError(f"max_bytes must be >= 0, is {max_bytes}")
        self._bounds = {priority: bounds[priority] for priority in Priority}
        self._timeouts = {priority: timeouts[priority] for priority in Priority}
        self._total = sum(self._bounds.values()) if total is None else total
        self._max_bytes = max_bytes
        classes = sorted(Priority, reverse=True)
        self._lanes: dict[Priority, dict[LaneKey, _Places]] = {priority: {} for priority in classes}
        # The first places of all lanes of a kind.
        self._heads: dict[Priority, dict[KindKey, _Places]] = {priority: {} for priority in classes}
        self._depth = dict.fromkeys(classes, 0)
        self._bytes = 0
        self._live: dict[int, Waiting[T]] = {}
        self._expiry: list[tuple[float, int]] = []
        self._next_place = 0
        self._dispatching = False
        self._again = False

    def __len__(self) -> int:
        return len(self._live)

    def depth(self) -> dict[Priority, int]:
        """Waiting requests per class, highest class first, without those in the background."""
        return dict(self._depth)

    def behind(self, entry: Waiting[T]) -> int:
        """Requests of the same needs and class that wait behind the first of their lane."""
        return len(self._lanes[entry.request.priority][entry.lane]) - 1

    @property
    def bytes(self) -> int:
        """Bytes of all waiting requests."""
        return self._bytes

    def next_expiry(self) -> float | None:
        """Monotonic seconds at which the next request runs out of time; None if none waits."""
        while self._expiry:
            expires_at, place = self._expiry[0]
            entry = self._live.get(place)
            if entry is not None and entry.expires_at == expires_at:
                break
            heapq.heappop(self._expiry)
        return self._expiry[0][0] if self._expiry else None

    def take_place(self, *, background: bool = False) -> int:
        """The place of a request that arrives now, to be given to `push` whenever it has to wait."""
        place = self._next_place
        self._next_place += 1
        return place + BACKGROUND if background else place

    def push(
        self,
        request: RouteRequest,
        payload: T,
        *,
        now: float,
        rate: float,
        avoid: frozenset[Failed] = frozenset(),
        deadline: float | None = None,
        size: int = 0,
        place: int | None = None,
        again: bool = False,
    ) -> Waiting[T]:
        """Let a request wait, until `deadline` (monotonic seconds) or the timeout of its class, whichever is sooner.

        `rate` is that of recent dispatches per second, from which a refused client learns when to come again. One that
        was let in before and comes `again` after a failed attempt is not turned away.
        Raises DomainError QUEUE_FULL.
        """
        priority = request.priority
        if place is None:
            place = self.take_place()
        background = place >= BACKGROUND
        if not again and not background:
            waiting = sum(self._depth.values())
            self._admit(self._depth[priority], self._bounds[priority], rate)
            self._admit(waiting, self._total, rate)
            if self._max_bytes is not None and self._bytes + size > self._max_bytes:
                raise queue_bytes_full(self._bytes, self._max_bytes, _pause(waiting, rate))
        expires_at = math.inf if background else now + self._timeouts[priority]
        if deadline is not None:
            expires_at = min(expires_at, deadline)
        kind, lane = kind_of(request), lane_of(request, avoid)
        entry = Waiting(request, payload, avoid, now, expires_at, place, kind, lane, size)
        self._live[place] = entry
        if not background:
            self._depth[priority] += 1
        self._bytes += size
        places = self._lanes[priority].setdefault(lane, [])
        if not places or place < places[0]:
            heads = self._heads[priority].setdefault(kind, [])
            if places:
                _drop(heads, places[0])
            insort(heads, place)
        insort(places, place)
        if expires_at < math.inf:
            heapq.heappush(self._expiry, (expires_at, place))
        return entry

    def goes_before(self, request: RouteRequest, avoid: frozenset[Failed], place: int) -> bool:
        """Whether a request of the same class and needs waits that arrived before `place`."""
        places = self._lanes[request.priority].get(lane_of(request, avoid))
        return places is not None and places[0] < place

    def remove(self, entry: Waiting[T]) -> bool:
        """Take a request out. False if it is out already."""
        if self._live.get(entry.place) is not entry:
            return False
        del self._live[entry.place]
        priority = entry.request.priority
        lanes, kinds = self._lanes[priority], self._heads[priority]
        places = lanes[entry.lane]
        if places[0] == entry.place:
            heads = kinds[entry.kind]
            _drop(heads, entry.place)
            if len(places) > 1:
                insort(heads, places[1])
            if not heads:
                del kinds[entry.kind]
        _drop(places, entry.place)
        if not places:
            del lanes[entry.lane]
        if not entry.background:
            self._depth[priority] -= 1
        self._bytes -= entry.size
        # The heap is cleaned when it is half dead, so that its upkeep stays O(log n) per request.
        if len(self._expiry) > 2 * len(self._live) + _SLACK:
            live = [(live.expires_at, live.place) for live in self._live.values() if live.expires_at < math.inf]
            self._expiry = live
            heapq.heapify(self._expiry)
        return True

    def expire(self, now: float) -> list[Waiting[T]]:
        """Take out the requests whose time is over, in the order in which it was over."""
        expired = []
        while self._expiry and self._expiry[0][0] <= now:
            expires_at, place = heapq.heappop(self._expiry)
            entry = self._live.get(place)
            # The same place may have been left and taken again in the meantime.
            if entry is not None and entry.expires_at == expires_at:
                self.remove(entry)
                expired.append(entry)
        return expired

    def drain(self) -> list[Waiting[T]]:
        """Take out all requests, in the order of their arrival."""
        entries = [self._live[place] for place in sorted(self._live)]
        for entry in entries:
            self.remove(entry)
        return entries

    def kinds(self) -> Iterator[tuple[KindKey, Waiting[T]]]:
        """Every kind that waits, with one request of it; a kind of several classes comes several times."""
        for kinds in self._heads.values():
            for kind, heads in kinds.items():
                yield kind, self._live[heads[0]]

    def firsts(self) -> list[Waiting[T]]:
        """The first of every lane, in no order, but for those in the background."""
        return [
            self._live[places[0]]
            for lanes in self._lanes.values()
            for places in lanes.values()
            if places[0] < BACKGROUND
        ]

    def first_like(self, entry: Waiting[T]) -> Waiting[T] | None:
        """The first in the lane of a request, which may have left."""
        places = self._lanes[entry.request.priority].get(entry.lane)
        return self._live[places[0]] if places else None

    def dispatch(
        self,
        try_place: Callable[[Waiting[T]], bool],
        *,
        kinds: Collection[KindKey] | None = None,
        after: Waiting[T] | None = None,
        going: Callable[[], bool] = lambda: True,
    ) -> Round[T]:
        """Offer requests in fair order, those of some `kinds` only or of all.

        `try_place` returns whether the request is done with waiting, be it started or refused for good. If it is not,
        its lane is left alone for this time. It must not change the queue, but may bring about a nested call (a slot
        that it gives back is an event like any other): that one does nothing, and this one goes round once more.

        Ends as soon as `going`, asked after each try, says no; a later call may go on `after` the request that was
        reached. `kinds` may change on the way.
        """
        if self._dispatching:
            self._again = True
            return Round(0, None)
        self._dispatching = True
        left = 0
        try:
            while True:
                self._again = False
                while (entry := self._following(after, kinds)) is not None:
                    after = entry
                    if try_place(entry):
                        self.remove(entry)
                        left += 1
                    if not going():
                        return Round(left, after)
                after = None
                if not self._again:
                    return Round(left, None)
        finally:
            self._dispatching = False

    # ------------------------------------------------------------- private ---

    def _following(self, after: Waiting[T] | None, kinds: Collection[KindKey] | None) -> Waiting[T] | None:
        """The next in fair order among the first of each lane; `after` may have left."""
        for priority, by_kind in self._heads.items():
            if after is not None and priority > after.request.priority:
                continue
            floor = after.place if after is not None and priority is after.request.priority else -1
            best = None
            for kind in by_kind if kinds is None else kinds:
                heads = by_kind.get(kind, ())
                position = bisect_right(heads, floor)
                if position < len(heads) and (best is None or heads[position] < best):
                    best = heads[position]
            if best is not None:
                return self._live[best]
        return None

    def _admit(self, waiting: int, bound: int, rate: float) -> None:
        if waiting >= bound:
            raise queue_full(waiting, bound, _pause(waiting, rate))


def _pause(waiting: int, rate: float) -> float:
    """Seconds until those who wait now have gone, so that a crowd that was turned away finds places."""
    return min(max(waiting / rate if rate > 0 else _RETRY_LATEST, _RETRY_SOONEST), _RETRY_LATEST)


def kind_of(request: RouteRequest) -> KindKey:
    """What a request needs of a server, leaving aside how much, and which servers it does not want."""
    return (
        request.task_type,
        request.model,
        request.provider,
        request.server_id,
        int(request.features),
        request.labels,
        request.excluded_models,
    )


def lane_of(request: RouteRequest, avoid: Iterable[Hashable] = ()) -> LaneKey:
    """What requests must share for one to be startable wherever the other is.

    Context is rounded up to a power of two, as context lengths mostly are: exact lengths would give almost every
    request a lane of its own. A shorter request may so wait behind one that needs up to twice as much. A limited price
    depends on each token: such requests share a lane only if they are of the same size. What one tenant's budget does
    not allow, another's may.
    """
    unwanted: frozenset[Hashable] = frozenset(request.excluded).union(avoid)
    price = (request.max_cost_nano_usd, request.prompt_tokens, request.max_tokens) if request.max_cost_nano_usd else ()
    context = (max(request.context_needed, 1) - 1).bit_length()
    return (kind_of(request), unwanted, context, price, request.tenant)


def _drop(places: _Places, place: int) -> None:
    del places[bisect_left(places, place)]
