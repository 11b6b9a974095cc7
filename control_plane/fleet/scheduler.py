"""Late binding: a request waits here, not at a server, until a capable server has a free slot."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from control_plane.domain.decision import DecisionRecord, Verdict
from control_plane.domain.errors import (
    DomainError,
    fleet_warming_up,
    no_capable_server,
    queue_timeout,
    servers_away,
)
from control_plane.domain.model import ServerId
from control_plane.domain.ports import Clock
from control_plane.domain.request import RouteRequest
from control_plane.domain.server import Health, LeaseState
from control_plane.domain.task import Priority
from control_plane.fleet.registry import Fleet, Flight, Outcome, OutcomeKind
from control_plane.scheduling.queue import FairQueue, Waiting
from control_plane.selection.policy import Policy
from control_plane.selection.select import Choice, explain, select

# A dispatch rate below this says nothing about when a place in the queue will be free.
_SLOWEST_RATE = 0.1


@dataclass(frozen=True, slots=True)
class Grant:
    """A server for a request, its slot taken."""

    flight: Flight
    queued: float
    """Seconds waited."""
    record: DecisionRecord | None
    """The whole decision, if it was asked for."""


@dataclass(slots=True)
class _Waiter:
    """What the queue carries for a request."""

    future: asyncio.Future[Grant]
    explain: bool


class Scheduler:
    """Gives each request a server as soon as one can start it."""

    def __init__(
        self,
        fleet: Fleet,
        policy: Policy,
        queue: FairQueue[_Waiter],
        clock: Clock,
        on_selected: Callable[[float], None],
        on_granted: Callable[[Priority, float], None],
    ) -> None:
        self._fleet = fleet
        self._policy = policy
        self.policies: Mapping[str, Policy] = {}
        """Of presets with weights of their own, by name."""
        self._queue = queue
        self._clock = clock
        self._on_selected = on_selected
        self._on_granted = on_granted
        self._granted = 0
        self._rate = 0.0
        self._ticked = clock.monotonic()
        fleet.on_capacity = self._pump

    def depth(self) -> Mapping[Priority, int]:
        """Waiting requests per class."""
        return self._queue.depth()

    def explain(self, request: RouteRequest) -> DecisionRecord:
        """What would be decided now."""
        return explain(self._fleet.table, request, self._policy_for(request))

    async def acquire(self, request: RouteRequest, avoid: frozenset[ServerId], *, explain: bool = False) -> Grant:
        """Wait for a server that is not in `avoid`; end the grant with `release`.

        Raises DomainError: NO_CAPABLE_SERVER, FLEET_WARMING_UP, SERVERS_AWAY, QUEUE_FULL,
        QUEUE_TIMEOUT. Cancelling gives up the place in the queue.
        """
        now = self._clock.monotonic()
        grant = self._place(request, avoid, now, now, explain, overtake=not len(self._queue))
        if grant:
            return grant
        waiter = _Waiter(asyncio.get_running_loop().create_future(), explain)
        entry = self._queue.push(request, waiter, now=now, avoid=avoid, rate=max(self._rate, _SLOWEST_RATE))
        self._pump()
        try:
            return await waiter.future
        except asyncio.CancelledError:
            if waiter.future.done() and not waiter.future.cancelled() and not waiter.future.exception():
                self.release(waiter.future.result().flight, Outcome(OutcomeKind.NEUTRAL))
            self._queue.remove(entry)
            raise

    def release(self, flight: Flight, outcome: Outcome) -> None:
        """Give the slot back. A second call does nothing."""
        self._fleet.end(flight, outcome, self._clock.monotonic())

    def tick(self, now: float) -> None:
        """Let time pass: entries expire, and what time alone made possible is started."""
        elapsed = now - self._ticked
        if elapsed > 0:
            self._rate += min(1.0, elapsed) * (self._granted / elapsed - self._rate)
            self._granted, self._ticked = 0, now
        for entry in self._queue.expire(now):
            record = explain(self._fleet.table, entry.request, self._policy_for(entry.request), entry.avoid)
            _fail(entry, queue_timeout(now - entry.enqueued_at, record.summary))
        self._pump()

    # ------------------------------------------------------------- private ---

    def _pump(self) -> None:
        """Start every waiting request that can start."""
        if not len(self._queue):
            return
        now = self._clock.monotonic()

        def try_place(entry: Waiting[_Waiter]) -> bool:
            waiter = entry.payload
            if waiter.future.done():  # its caller went away a moment ago
                return True
            try:
                grant = self._place(
                    entry.request, entry.avoid, entry.enqueued_at, now, waiter.explain, queued=self._queue.behind(entry)
                )
            except DomainError as error:
                _fail(entry, error)
                return True
            if grant is None:
                return False
            waiter.future.set_result(grant)
            return True

        self._queue.dispatch(try_place)

    def _place(
        self,
        request: RouteRequest,
        avoid: frozenset[ServerId],
        since: float,
        now: float,
        with_record: bool,
        overtake: bool = True,
        queued: int = 0,
    ) -> Grant | None:
        """A grant if a server can start the request now, None if it must wait; raises if
        waiting is no use. Without `overtake` others wait already and go first; `queued` wait behind it."""
        table, policy = self._fleet.table, self._policy_for(request)
        started = self._clock.monotonic()
        choice = select(table, request, policy, avoid, queued)
        self._on_selected(self._clock.monotonic() - started)
        if choice.verdict is Verdict.CHOSEN and overtake:
            record = explain(table, request, policy, avoid, queued) if with_record else None
            flight = self._fleet.begin(choice.row, now)
            self._granted += 1
            self._on_granted(request.priority, now - since)
            return Grant(flight, now - since, record)
        if choice.verdict is Verdict.IMPOSSIBLE or (choice.all_away and not self._may_return()):
            raise self._refusal(choice, request, avoid, now)
        return None

    def _policy_for(self, request: RouteRequest) -> Policy:
        return self.policies.get(request.preset, self._policy) if request.preset else self._policy

    def _may_return(self) -> bool:
        """Whether some server is expected back at any moment."""
        return any(
            server.lease.state is LeaseState.SUSPECT
            or (server.lease.state is LeaseState.LIVE and server.report.health is Health.STARTING)
            for server in self._fleet.servers()
        )

    def _refusal(self, choice: Choice, request: RouteRequest, avoid: frozenset[ServerId], now: float) -> DomainError:
        left = self._fleet.warming_up(now)
        if left and not avoid:
            return fleet_warming_up(left)
        summary = explain(self._fleet.table, request, self._policy_for(request), avoid).summary
        if choice.verdict is Verdict.IMPOSSIBLE:
            return no_capable_server(summary)
        return servers_away(summary, 1.0)


def _fail(entry: Waiting[_Waiter], error: DomainError) -> None:
    if not entry.payload.future.done():
        entry.payload.future.set_exception(error)
