"""Bounded, fair queue for late binding: requests wait here, not at a server, until one can start them."""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeAlias, TypeVar

from control_plane.domain.errors import queue_full
from control_plane.domain.model import ServerId
from control_plane.domain.request import RouteRequest
from control_plane.domain.task import Priority

T = TypeVar("T")

LaneKey: TypeAlias = tuple[object, ...]

# Bounds of the advice to a client that was turned away, seconds: sooner it would only be turned away again, later it
# would miss places that are free by then.
_RETRY_SOONEST = 0.5
_RETRY_LATEST = 30.0

# Dead entries that the expiry heap may hold beside as many as there are live ones.
_SLACK = 64


@dataclass(frozen=True, slots=True, eq=False)
class Waiting(Generic[T]):
    """A request in the queue."""

    request: RouteRequest
    payload: T
    avoid: frozenset[ServerId]
    """Servers that failed in earlier attempts of the request."""
    enqueued_at: float
    """Monotonic seconds."""
    expires_at: float
    """Monotonic seconds."""
    seq: int
    """Order of arrival, over all classes."""
    lane: LaneKey


# An OrderedDict is a queue by order of arrival whose members can also leave from the middle in O(1).
_Lanes: TypeAlias = dict[LaneKey, OrderedDict[int, Waiting[T]]]


class FairQueue(Generic[T]):
    """Higher priority first, first come first served within a class.

    Requests with the same needs share a lane, and only the first of a lane is tried: if it cannot start, neither can
    those behind it. A wave of thousands for one busy model so costs one try per event, and holds nobody else up.

    Args:
        bounds: most waiting requests per class, >= 0.
        timeouts: seconds that a request may wait, per class, > 0.
        total: most waiting requests in all; None: the bounds are enough.

    Raises:
        ValueError: a class has no bound or timeout, or one is out of its range.
    """

    def __init__(
        self, bounds: Mapping[Priority, int], timeouts: Mapping[Priority, float], total: int | None = None
    ) -> None:
        for priority in Priority:
            if bounds.get(priority, -1) < 0:
                raise ValueError(f"bounds.{priority.name.lower()} must be given and >= 0")
            if not timeouts.get(priority, 0.0) > 0:
                raise ValueError(f"timeouts.{priority.name.lower()} must be given and > 0")
        if total is not None and total < 0:
            raise ValueError(f"total must be >= 0, is {total}")
        self._bounds = {priority: bounds[priority] for priority in Priority}
        self._timeouts = {priority: timeouts[priority] for priority in Priority}
        self._total = sum(self._bounds.values()) if total is None else total
        self._lanes: dict[Priority, _Lanes[T]] = {priority: {} for priority in sorted(Priority, reverse=True)}
        self._depth = dict.fromkeys(self._lanes, 0)
        self._live: dict[int, Waiting[T]] = {}
        self._expiry: list[tuple[float, int]] = []
        self._seq = 0
        self._dispatching = False
        self._again = False

    def __len__(self) -> int:
        return len(self._live)

    def depth(self) -> dict[Priority, int]:
        """Waiting requests per class, highest class first."""
        return dict(self._depth)

    def behind(self, entry: Waiting[T]) -> int:
        """Requests of the same needs and class that wait behind the first of their lane."""
        return len(self._lanes[entry.request.priority][entry.lane]) - 1

    def next_expiry(self) -> float | None:
        """Monotonic seconds at which the next request runs out of time; None if none waits."""
        while self._expiry and self._expiry[0][1] not in self._live:
            heapq.heappop(self._expiry)
        return self._expiry[0][0] if self._expiry else None

    def push(
        self,
        request: RouteRequest,
        payload: T,
        *,
        now: float,
        rate: float,
        avoid: frozenset[ServerId] = frozenset(),
        deadline: float | None = None,
    ) -> Waiting[T]:
        """Let a request wait, until `deadline` (monotonic seconds) or the timeout of its class, whichever is sooner.

        `rate` is that of recent dispatches per second, from which a refused client learns when to come again.
        Raises DomainError QUEUE_FULL.
        """
        priority = request.priority
        self._admit(self._depth[priority], self._bounds[priority], rate)
        self._admit(len(self._live), self._total, rate)
        expires_at = now + self._timeouts[priority]
        if deadline is not None:
            expires_at = min(expires_at, deadline)
        entry = Waiting(request, payload, avoid, now, expires_at, self._seq, lane_of(request, avoid))
        self._seq += 1
        self._lanes[priority].setdefault(entry.lane, OrderedDict())[entry.seq] = entry
        self._live[entry.seq] = entry
        self._depth[priority] += 1
        heapq.heappush(self._expiry, (entry.expires_at, entry.seq))
        return entry

    def remove(self, entry: Waiting[T]) -> bool:
        """Take a request out, O(1). False if it is out already."""
        if self._live.get(entry.seq) is not entry:
            return False
        del self._live[entry.seq]
        priority = entry.request.priority
        lane = self._lanes[priority][entry.lane]
        del lane[entry.seq]
        if not lane:
            del self._lanes[priority][entry.lane]
        self._depth[priority] -= 1
        # The heap is cleaned when it is half dead, so that its upkeep stays O(log n) per request.
        if len(self._expiry) > 2 * len(self._live) + _SLACK:
            self._expiry = [(live.expires_at, live.seq) for live in self._live.values()]
            heapq.heapify(self._expiry)
        return True

    def expire(self, now: float) -> list[Waiting[T]]:
        """Take out the requests whose time is over, in the order in which it was over."""
        expired = []
        while self._expiry and self._expiry[0][0] <= now:
            entry = self._live.get(heapq.heappop(self._expiry)[1])
            if entry is not None:
                self.remove(entry)
                expired.append(entry)
        return expired

    def drain(self) -> list[Waiting[T]]:
        """Take out all requests, in the order of their arrival."""
        entries = list(self._live.values())
        for entry in entries:
            self.remove(entry)
        return entries

    def dispatch(self, try_place: Callable[[Waiting[T]], bool]) -> int:
        """Offer requests in fair order; returns how many left the queue.

        `try_place` returns whether the request is done with waiting, be it started or refused for good. If it is not,
        its lane is left alone for this time. It must not change the queue, but may bring about a nested call (a slot
        that it gives back is an event like any other): that one returns 0, and this one goes round once more.
        """
        if self._dispatching:
            self._again = True
            return 0
        self._dispatching = self._again = True
        left = 0
        try:
            while self._again:
                self._again = False
                for lanes in self._lanes.values():
                    left += self._dispatch_class(lanes, try_place)
        finally:
            self._dispatching = False
        return left

    # ------------------------------------------------------------- private ---

    def _dispatch_class(self, lanes: _Lanes[T], try_place: Callable[[Waiting[T]], bool]) -> int:
        # Lanes by the arrival of their first request; a lane that must wait drops out.
        heads = [_first(lane) for lane in lanes.values()]
        heapq.heapify(heads)
        left = 0
        while heads:
            entry = self._live[heads[0]]
            if try_place(entry):
                self.remove(entry)
                left += 1
                lane = lanes.get(entry.lane)
                if lane:
                    heapq.heapreplace(heads, _first(lane))
                    continue
            heapq.heappop(heads)
        return left

    def _admit(self, waiting: int, bound: int, rate: float) -> None:
        if waiting >= bound:
            # By then those who wait now have gone, so that a crowd that was turned away finds places.
            pause = waiting / rate if rate > 0 else _RETRY_LATEST
            raise queue_full(waiting, bound, min(max(pause, _RETRY_SOONEST), _RETRY_LATEST))


def lane_of(request: RouteRequest, avoid: Iterable[ServerId] = ()) -> LaneKey:
    """What requests must share for one to be startable wherever the other is.

    Context is rounded up to a power of two, as context lengths mostly are: exact lengths would give almost every
    request a lane of its own. A shorter request may so wait behind one that needs up to twice as much.
    """
    return (
        request.task_type,
        request.model,
        request.provider,
        request.server_id,
        request.excluded.union(avoid),
        int(request.features),
        request.labels,
        (max(request.context_needed, 1) - 1).bit_length(),
    )


def _first(lane: Iterable[int]) -> int:
    return next(iter(lane))
