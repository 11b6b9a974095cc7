"""Bounded, fair queue for late binding: requests wait here, not at a server, until one can start them."""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeAlias, TypeVar

import msgspec

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

FAIR_QUANTUM = 2.0
"""Seconds of service that a tenant may be ahead of another before its requests go behind."""

_MOST_OWED = 20.0
"""Requests of typical size: what a class could not use is not saved up."""
_NEWEST = 0.1
"""Weight of the newest request in what is typical."""

# Tenants without waiting requests that are remembered, about.
_TENANTS = 1000

# Dead entries that the expiry heap may hold beside as many as there are live ones.
_SLACK = 64


class Turn(NamedTuple):
    """Order within a class, the least first."""

    standing: int
    """0: can still be served well; 1: it is, or will be, too late for that; 2: in the background."""
    due: float
    """Monotonic seconds by when its answer must begin for it to be served well."""
    place: int


_ON_TIME, _LATE, _BEHIND = range(3)
_FIRST = Turn(-1, 0.0, 0)


@dataclass(slots=True, eq=False)
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
    arrived: float
    """Monotonic seconds; before it was enqueued, where it comes again."""
    turn: Turn
    """Set by the queue: who has become late goes behind those who are not."""

    @property
    def background(self) -> bool:
        """Nobody waits for it at this moment."""
        return self.place >= BACKGROUND

    @property
    def late(self) -> bool:
        """It is, or will be, too late to serve it well."""
        return self.turn.standing == _LATE


class Round(msgspec.Struct, Generic[T], frozen=True):
    """What came of a dispatch."""

    left: int
    """Requests that left the queue."""
    reached: Reached[T] | None
    """Where it was interrupted; None: it went through."""


# In order; of a few thousand, taking one from the middle costs less than any cleverer structure.
_Turns: TypeAlias = list[Turn]


@dataclass(slots=True)
class _Share:
    """What a tenant has had of the fleet."""

    granted: float
    """Seconds of service, lifted to those of others when it comes back."""
    waiting: int = 0


class Reached(msgspec.Struct, Generic[T], frozen=True):
    """How far down the queue a dispatch has come."""

    entry: Waiting[T]
    """The last that was tried."""
    turns: dict[str, Turn]
    """The last of each tenant in that class."""


class FairQueue(Generic[T]):
    """Higher priority first, but for classes with a floor: one that waits is owed that share of the service that all
    get, and goes first while it is owed a request's worth. Within a class the tenants share by seconds of service, not
    tokens: who has had less by `FAIR_QUANTUM` goes first, be its requests late or not, or one that floods the queue
    with new ones would take all.
    One that comes back after a pause starts at most that much ahead of those who wait: the little that it asks for is
    not held up by the much that others do, and nobody saves up.
    Source: the virtual token counter of Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024.

    Of one tenant, and of tenants that are level, first comes whose time is first by which its answer must begin for it
    to be served well, and those for which it is too late come behind those for which it is not. Requests that name no
    such time: first come, first served.

    Requests with the same needs share a lane, and only the first of a lane is tried: if it cannot start, neither can
    those behind it. A wave of thousands for one busy model so costs one try per event, and holds nobody else up.
    Lanes that differ in which servers they exclude or avoid, and in size only, are of one kind: a dispatch that is told
    which kinds may start does not even look at the others.

    Requests in the background wait behind all others of their class. They stand for work that waits elsewhere: no bound
    holds for them, no depth counts them, no time ends their waiting.

    Args:
        bounds: most waiting requests per class, >= 0.
        timeouts: seconds that a request may wait, per class, > 0.
        floors: shares of the service, in seconds, that a class gets at least while it waits, in [0, 1), less than 1
            together.
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
        floors: Mapping[Priority, float] | None = None,
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
        self._floors = {priority: share for priority, share in (floors or {}).items() if share}
        if not all(0 <= share < 1 for share in self._floors.values()) or sum(self._floors.values()) >= 1:
            raise ValueError(f"floors must be in [0, 1) and less than 1 together, are {dict(floors or {})}")
        self._owed = dict.fromkeys(self._floors, 0.0)
        """Seconds of service."""
        self._typical = 0.0
        """Seconds of service that a request takes, a moving average."""
        self._bounds = {priority: bounds[priority] for priority in Priority}
        self._timeouts = {priority: timeouts[priority] for priority in Priority}
        self._total = sum(self._bounds.values()) if total is None else total
        self._max_bytes = max_bytes
        classes = sorted(Priority, reverse=True)
        self._lanes: dict[Priority, dict[LaneKey, _Turns]] = {priority: {} for priority in classes}
        # The first of all lanes of a kind.
        self._heads: dict[Priority, dict[str, dict[KindKey, _Turns]]] = {priority: {} for priority in classes}
        self._depth = dict.fromkeys(classes, 0)
        self._bytes = 0
        self._live: dict[int, Waiting[T]] = {}
        self._expiry: list[tuple[float, int]] = []
        self._lateness: list[tuple[float, int]] = []
        self._shares: dict[str, _Share] = {}
        self._order: list[Priority] = list(classes)
        """Classes in the order of the dispatch that is going on."""
        self._deeper: list[Waiting[T]] = []
        """Beside the first of each lane, what the dispatch that is going on has come to."""
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
        due: float = math.inf,
        arrived: float | None = None,
    ) -> Waiting[T]:
        """Let a request wait, until `deadline` (monotonic seconds) or the timeout of its class, whichever is sooner.

        `rate` is that of recent dispatches per second, from which a refused client learns when to come again. One that
        was let in before and comes `again` after a failed attempt is not turned away. `due`: monotonic seconds by when
        its answer must begin for it to be served well.
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
        if background:
            turn = Turn(_BEHIND, math.inf, place)
        else:
            turn = Turn(_LATE if due < now else _ON_TIME, due, place)
            self._share(request.tenant).waiting += 1
            self._depth[priority] += 1
        since = now if arrived is None else arrived
        entry = Waiting(request, payload, avoid, now, expires_at, place, kind, lane, size, since, turn)
        self._live[place] = entry
        self._bytes += size
        self._line_up(entry)
        if expires_at < math.inf:
            heapq.heappush(self._expiry, (expires_at, place))
        if now <= due < math.inf and not background:
            heapq.heappush(self._lateness, (due, place))
        return entry

    def charge(self, tenant: str, priority: Priority, work: float) -> None:
        """A tenant gets seconds of service, for a request of a class."""
        self._share(tenant).granted += work
        self._typical += _NEWEST * (work - self._typical)
        for owed, share in self._floors.items():
            if not self._depth[owed]:
                self._owed[owed] = 0.0
            elif owed is priority:
                self._owed[owed] -= (1 - share) * work
            else:
                most = _MOST_OWED * max(FAIR_QUANTUM, self._typical)
                self._owed[owed] = min(self._owed[owed] + share * work, most)

    def demote(self, now: float) -> None:
        """Let those who cannot be served well any more go behind those who can."""
        while self._lateness and self._lateness[0][0] < now:
            due, place = heapq.heappop(self._lateness)
            entry = self._live.get(place)
            if entry is not None and entry.turn.due == due:
                self.judge(entry, in_time=False)

    def foremost(self, now: float, most: int) -> list[tuple[Waiting[T], Hashable]]:
        """Those whose answers are not due yet, at most so many, in fair order and within that by when they are due;
        each with what it shares with those of its class whose tenants have had as much. To be judged: what is beyond
        them goes behind them."""
        found: list[tuple[int, int, float, int]] = []
        for priority, lanes in self._lanes.items():
            for turns in lanes.values():
                quanta = self._quanta(self._live[turns[0].place].request.tenant)
                first = bisect_left(turns, Turn(_LATE, now, 0))
                last = bisect_left(turns, Turn(_BEHIND, -math.inf, 0))
                near = turns[: bisect_left(turns, Turn(_LATE, -math.inf, 0))] + turns[first : min(first + most, last)]
                found += [(-priority, quanta, turn.due, turn.place) for turn in near if turn.due >= now]
        found.sort()
        for *_, place in found[most:]:
            self.judge(self._live[place], in_time=False)
        return [(self._live[place], (priority, quanta)) for priority, quanta, _, place in found[:most]]

    def judge(self, entry: Waiting[T], in_time: bool) -> None:
        """Whether a request that waits is expected to be served well; if not, it goes behind those that are."""
        standing = _ON_TIME if in_time else _LATE
        if entry.turn.standing not in (standing, _BEHIND):
            self._step_out(entry)
            entry.turn = entry.turn._replace(standing=standing)
            self._line_up(entry)

    def goes_before(self, request: RouteRequest, avoid: frozenset[Failed], place: int, due: float = math.inf) -> bool:
        """Whether a request of the same class and needs waits whose turn is before one with this place."""
        turns = self._lanes[request.priority].get(lane_of(request, avoid))
        return turns is not None and turns[0] < Turn(_BEHIND if place >= BACKGROUND else _ON_TIME, due, place)

    def remove(self, entry: Waiting[T]) -> bool:
        """Take a request out. False if it is out already."""
        if self._live.get(entry.place) is not entry:
            return False
        del self._live[entry.place]
        self._step_out(entry)
        if not entry.background:
            self._depth[entry.request.priority] -= 1
            self._shares[entry.request.tenant].waiting -= 1
        self._bytes -= entry.size
        # The heap is cleaned when it is half dead, so that its upkeep stays O(log n) per request.
        if len(self._expiry) > 2 * len(self._live) + _SLACK:
            live = [(live.expires_at, live.place) for live in self._live.values() if live.expires_at < math.inf]
            self._expiry = live
            heapq.heapify(self._expiry)
        if len(self._lateness) > 2 * len(self._live) + _SLACK:
            self._lateness = [(live.turn.due, live.place) for live in self._live.values() if live.turn.due < math.inf]
            heapq.heapify(self._lateness)
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
        for tenants in self._heads.values():
            for kinds in tenants.values():
                for kind, heads in kinds.items():
                    yield kind, self._live[heads[0].place]

    def firsts(self) -> list[Waiting[T]]:
        """The first of every lane, in no order, but for those in the background."""
        return [
            self._live[turns[0].place]
            for lanes in self._lanes.values()
            for turns in lanes.values()
            if turns[0].standing != _BEHIND
        ]

    def first_like(self, entry: Waiting[T]) -> Waiting[T] | None:
        """The first in the lane of a request, which may have left."""
        turns = self._lanes[entry.request.priority].get(entry.lane)
        return self._live[turns[0].place] if turns else None

    def next_like(self, entry: Waiting[T]) -> Waiting[T] | None:
        """Who comes after a request that waits, in its lane."""
        turns = self._lanes[entry.request.priority][entry.lane]
        position = bisect_right(turns, entry.turn)
        return self._live[turns[position].place] if position < len(turns) else None

    def dispatch(
        self,
        try_place: Callable[[Waiting[T]], bool],
        *,
        kinds: Collection[KindKey] | None = None,
        after: Reached[T] | None = None,
        going: Callable[[], bool] = lambda: True,
        deeper: Callable[[Waiting[T]], bool] = lambda entry: False,
    ) -> Round[T]:
        """Offer requests in fair order, those of some `kinds` only or of all.

        `try_place` returns whether the request is done with waiting, be it started or refused for good. If it is not,
        its lane is left alone for this time. It must not change the queue, but may bring about a nested call (a slot
        that it gives back is an event like any other): that one does nothing, and this one goes round once more.

        Where one could start but rather waits, the next of its lane may have no reason to: `deeper` says of one that
        was not placed whether that is so.

        Ends as soon as `going`, asked after each try, says no; a later call may go on `after` the request that was
        reached. `kinds` may change on the way.
        """
        if self._dispatching:
            self._again = True
            return Round(0, None)
        self._dispatching = True
        if after is None:
            self._from_the_top()
        left = 0
        try:
            while True:
                self._again = False
                while (entry := self._following(after, kinds)) is not None:
                    same = after is not None and after.entry.request.priority is entry.request.priority
                    turns = after.turns if after is not None and same else {}
                    turns[entry.request.tenant] = entry.turn
                    after = Reached(entry, turns)
                    following = self.next_like(entry)
                    first = self._owes(entry.request.priority)
                    if try_place(entry):
                        self.remove(entry)
                        left += 1
                        if first and not self._owes(entry.request.priority):
                            after = None  # the others come first again
                            self._from_the_top()
                            continue
                        if following is not None and entry in self._deeper:  # not the first of its lane
                            self._deeper.append(following)
                    elif following is not None and deeper(entry):
                        self._deeper.append(following)
                    if not going():
                        return Round(left, after)
                after = None
                self._from_the_top()
                if not self._again:
                    return Round(left, None)
        finally:
            self._dispatching = False

    # ------------------------------------------------------------- private ---

    def _owes(self, priority: Priority) -> bool:
        """Whether a class is owed service that is worth going first for."""
        return self._owed.get(priority, 0.0) >= max(FAIR_QUANTUM, self._typical)

    def _from_the_top(self) -> None:
        """A dispatch begins with the first in order."""
        self._deeper.clear()
        if self._floors:
            self._order = sorted(self._order, key=lambda priority: (not self._owes(priority), -priority))

    def _following(self, after: Reached[T] | None, kinds: Collection[KindKey] | None) -> Waiting[T] | None:
        """The next in fair order among the first of each lane; who was reached may have left."""
        begin = 0 if after is None else self._order.index(after.entry.request.priority)
        for priority in self._order[begin:]:
            tenants = self._heads[priority]
            reached = after.turns if after is not None and priority is after.entry.request.priority else {}
            best: tuple[bool, int, Turn] | None = None
            for tenant, by_kind in tenants.items():
                floor = reached.get(tenant, _FIRST)
                quanta = self._quanta(tenant)
                for kind in by_kind if kinds is None else kinds:
                    heads = by_kind.get(kind, ())
                    position = bisect_right(heads, floor)
                    if position < len(heads):
                        turn = heads[position]
                        order = turn.standing == _BEHIND, quanta, turn
                        if best is None or order < best:
                            best = order
            for entry in self._deeper:
                tenant, turn = entry.request.tenant, entry.turn
                if entry.request.priority is not priority or turn.place not in self._live:
                    continue
                if reached.get(tenant, _FIRST) < turn and (kinds is None or entry.kind in kinds):
                    order = turn.standing == _BEHIND, self._quanta(tenant), turn
                    if best is None or order < best:
                        best = order
            if best is not None:
                return self._live[best[2].place]
        return None

    def _line_up(self, entry: Waiting[T]) -> None:
        """Put a request into its lane."""
        priority, turn = entry.request.priority, entry.turn
        turns = self._lanes[priority].setdefault(entry.lane, [])
        if not turns or turn < turns[0]:
            heads = self._heads[priority].setdefault(entry.request.tenant, {}).setdefault(entry.kind, [])
            if turns:
                _drop(heads, turns[0])
            insort(heads, turn)
        insort(turns, turn)

    def _step_out(self, entry: Waiting[T]) -> None:
        """Take a request out of its lane."""
        lanes, tenants = self._lanes[entry.request.priority], self._heads[entry.request.priority]
        turns = lanes[entry.lane]
        if turns[0] == entry.turn:
            kinds = tenants[entry.request.tenant]
            heads = kinds[entry.kind]
            _drop(heads, entry.turn)
            if len(turns) > 1:
                insort(heads, turns[1])
            if not heads:
                del kinds[entry.kind]
                if not kinds:
                    del tenants[entry.request.tenant]
        _drop(turns, entry.turn)
        if not turns:
            del lanes[entry.lane]

    def _quanta(self, tenant: str) -> int:
        share = self._shares.get(tenant)
        return int(share.granted / FAIR_QUANTUM) if share is not None else 0

    def _share(self, tenant: str) -> _Share:
        """Of a tenant that asks for something."""
        share = self._shares.get(tenant)
        if share is None:
            if len(self._shares) >= _TENANTS:
                self._shares = {name: kept for name, kept in self._shares.items() if kept.waiting}
            share = self._shares[tenant] = _Share(0.0)
        if not share.waiting and len(self._shares) > 1:
            least = min((other.granted for other in self._shares.values() if other.waiting), default=0.0)
            share.granted = max(share.granted, least - FAIR_QUANTUM)
        return share

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


def _drop(turns: _Turns, turn: Turn) -> None:
    del turns[bisect_left(turns, turn)]
