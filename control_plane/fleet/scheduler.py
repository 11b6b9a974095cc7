"""Late binding: a request waits here, not at a server, until a capable server has a free slot.

What an event costs. Between two events no row of the candidate table that is open is of use to anybody who waits: they
were all offered it when it opened, or when they came. So an event offers only rows that have opened since, to the kinds
of requests that such a row can serve, in fair order, until they are taken: about as much work as requests start. That
waiting has become of no use is looked for when the picture of the fleet has changed. Neither holds the event loop for
longer than a moment; what is left to do is done in its next round.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from msgspec.structs import replace

from control_plane.domain.decision import DecisionRecord, Verdict
from control_plane.domain.errors import (
    DomainError,
    budget_exhausted,
    fleet_warming_up,
    no_capable_server,
    queue_timeout,
    servers_away,
)
from control_plane.domain.model import ModelName, ServerId
from control_plane.domain.ports import Clock
from control_plane.domain.request import RouteRequest
from control_plane.domain.server import Failed, Health, LeaseState
from control_plane.domain.task import Priority
from control_plane.fleet.accounts import Accounts, no_accounts
from control_plane.fleet.grants import Grant, Loop, Offer, Outlook, Standing, Waiter, Wanted
from control_plane.fleet.registry import Fleet
from control_plane.fleet.server import Flight, Outcome, OutcomeKind
from control_plane.scheduling.ahead import spares
from control_plane.scheduling.queue import FairQueue, KindKey, Waiting
from control_plane.selection.filters import FREE, passing, permanent, present
from control_plane.selection.forecast import Planned
from control_plane.selection.patience import in_vain, sooner
from control_plane.selection.policy import Policy
from control_plane.selection.query import Query
from control_plane.selection.select import Choice, explain, select
from control_plane.selection.table import Floats, Mask
from control_plane.selection.triage import Case, triage

# A dispatch rate below this says nothing about when a place in the queue will be free.
_SLOWEST_RATE = 0.1

# Seconds of work after which the event loop gets its turn.
_STRETCH = 0.002

# Requests that may decline what is free, hoping for better, before an event is over, and seconds until they are asked
# again.
_DECLINES = 16
_RECONSIDER = 1.0

# Requests that are planned for at a time, those and the rows that they are planned on multiplied, and seconds for which
# it is good enough to know what caches have of their prompts.
_PLANNED = 128
_PLANNED_ROWS = 1 << 16
_CACHED = 1.0
# The time between two plans is so many times what the first took: under a flood of events they take a tenth of it.
_BETWEEN_PLANS = 9.0

_ANY = RouteRequest("any")


class Scheduler:
    """Gives each request a server as soon as one can start it."""

    def __init__(
        self,
        fleet: Fleet,
        policy: Policy,
        queue: FairQueue[Waiter],
        clock: Clock,
        on_selected: Callable[[float], None],
        on_granted: Callable[[Priority, float], None],
        loop: Loop | None = None,
        draw: Callable[[], float] = random.random,
    ) -> None:
        """`loop`: None takes asyncio's. `draw`: uniform in [0, 1), where a policy explores."""
        self._fleet = fleet
        self._policy = policy
        self.policies: Mapping[str, Policy] = {}
        """Of presets with weights of their own, by name."""
        self.on_explored: Callable[[ModelName, float], None] = lambda model, propensity: None
        """Told of each request that explores."""
        self.class_policies: Mapping[Priority, Policy] = {}
        """Of classes with weights of their own."""
        self._queue = queue
        self._clock = clock
        self._on_selected = on_selected
        self._on_granted = on_granted
        self._own_loop = loop
        self._draw = draw
        self._granted = 0
        self._rate = 0.0
        self._ticked = clock.monotonic()
        self._table = fleet.table
        self._reach: dict[KindKey, Mask] = {}
        self._known: Mask | None = None
        """Open rows that are of no use to anybody who waits. None: every row has to be offered."""
        self._offer: Offer | None = None
        self._picture_changed = False
        self._doubtful: list[Waiting[Waiter]] = []
        """For whom waiting may have become of no use."""
        self._hoping = False
        """Somebody waits for a server whose models are not known yet."""
        self._later: object | None = None
        self._planned = self._nothing = Planned.nothing(0)
        """What those who wait, and were asked so far, are expected to take of each row first."""
        self._ahead: list[tuple[Priority, float, slice, float]] = []
        """Of those among them that are expected to be served well: class, when their answer is due, rows, seconds."""
        self._reconsider_at = math.inf
        """Somebody waits for a busy server although another is free; time may change that."""
        self._declines = 0
        self._plan_again_at = -math.inf
        self._short: set[str] = set()
        """Tenants of whom somebody may wait for money."""
        self.pay_from(no_accounts())
        fleet.on_capacity = self._pump
        fleet.listen(self._note)

    def pay_from(self, accounts: Accounts) -> None:
        """Whose budgets hold, and who takes down what is used. To be called before any request."""
        self._accounts = accounts
        self._fleet.on_end = accounts.close
        accounts.on_change = self._funds_changed

    def depth(self) -> Mapping[Priority, int]:
        """Waiting requests per class."""
        return self._queue.depth()

    def explain(self, request: RouteRequest, avoid: frozenset[Failed] = frozenset()) -> DecisionRecord:
        """What would be decided now."""
        return explain(self._query(request, avoid, self._clock.monotonic()))

    def take_place(self, *, background: bool = False) -> int:
        """The place in the queue of a request that arrives now; it keeps it through all its attempts. One in the
        background is behind every other request of its class, whenever that comes."""
        return self._queue.take_place(background=background)

    async def acquire(
        self,
        request: RouteRequest,
        avoid: frozenset[Failed] = frozenset(),
        *,
        explain: bool = False,
        size: int = 0,
        place: int | None = None,
        again: bool = False,
        arrived: float | None = None,
        leaves: float = math.inf,
    ) -> Grant:
        """Wait for a server that is not in `avoid`; end the grant with `release`.

        `size` is that of the request in bytes, `place` from `take_place`, `arrived` (monotonic seconds) when it came
        first, `leaves` when its client goes away. A request that comes `again` after a failed
        attempt was let in before: a full queue does not turn it away, and it waits for servers whose models are not
        known yet.

        Raises DomainError: NO_CAPABLE_SERVER, FLEET_WARMING_UP, SERVERS_AWAY, QUEUE_FULL,
        QUEUE_TIMEOUT, BUDGET_EXHAUSTED; TimeoutError: its client has gone away. Cancelling gives up the place in the
        queue.
        """
        standing = self.enter(
            request, avoid, explain=explain, size=size, place=place, again=again, arrived=arrived,
            leaves=leaves,
        )  # fmt: skip
        if standing.entry is None:
            return standing.future.result()
        left = leaves - self._clock.monotonic()
        try:
            async with asyncio.timeout(left if left < math.inf else None):
                return await standing.future
        except (asyncio.CancelledError, TimeoutError):
            self.leave(standing)
            raise

    def enter(
        self,
        request: RouteRequest,
        avoid: frozenset[Failed] = frozenset(),
        *,
        explain: bool = False,
        size: int = 0,
        place: int | None = None,
        again: bool = False,
        arrived: float | None = None,
        leaves: float = math.inf,
    ) -> Standing:
        """As `acquire`, for whoever does not await: the future has a grant, or will have one or an exception."""
        now = self._clock.monotonic()
        since = now if arrived is None else arrived
        if place is None:
            place = self.take_place()
        if len(self._queue):
            self._pump()  # those who wait go first
        due = since + self._policy_for(request).ttft_objective(request.prompt_tokens)
        # They cannot use what is open now, unless there was no time yet to offer it.
        overtake = self._later is None and not self._queue.goes_before(request, avoid, place, due)
        wanted = Wanted(request, avoid, since, now, explain, patient=again, late=due < now, due=due, leaves=leaves)
        grant = self._place(wanted, now, overtake=overtake)
        future = self._loop.create_future()
        if grant:
            future.set_result(grant)
            return Standing(future, None)
        rate = max(self._rate, _SLOWEST_RATE)
        entry = self._queue.push(
            request, Waiter(future, explain, leaves), now=now, avoid=avoid, rate=rate, size=size, place=place,
            again=again, due=due, arrived=since,
        )  # fmt: skip
        self._welcome(now)
        return Standing(future, entry)

    def stand(self, request: RouteRequest, avoid: frozenset[Failed], place: int, *, explain: bool = False) -> Standing:
        """Let work wait in the background, at a `place` that was taken for that, until a server can start it: for as
        long as it takes, whatever becomes of the fleet. End it with its grant or with `leave`."""
        now = self._clock.monotonic()
        waiter = Waiter(self._loop.create_future(), explain)
        grant = self._without_waiting(request, avoid, place, now, explain)
        if grant is not None:
            waiter.future.set_result(grant)
            return Standing(waiter.future, None)
        entry = self._queue.push(request, waiter, now=now, avoid=avoid, rate=1.0, place=place)
        self._welcome(now)
        return Standing(waiter.future, entry)

    def leave(self, standing: Standing) -> None:
        """End the waiting of work in the background; a grant that it has already is given back."""
        if standing.entry is not None and self._queue.remove(standing.entry):
            self._known = None  # the next of its lane may need less
        if not standing.future.done():
            standing.future.cancel()
        elif not standing.future.cancelled() and standing.future.exception() is None:
            self.release(standing.future.result().flight, Outcome(OutcomeKind.NEUTRAL))

    def try_acquire(
        self, request: RouteRequest, avoid: frozenset[Failed], place: int, *, explain: bool = False
    ) -> Grant | None:
        """A server for work in the background if one is free that nobody waits for; None if not."""
        return self._without_waiting(request, avoid, place, self._clock.monotonic(), explain)

    def ahead(self, requests: Sequence[RouteRequest], avoid: frozenset[Failed] = frozenset()) -> list[Flight]:
        """Slots of one server for requests that are still to come, all the same to routing: one if it is in nobody's
        way, and more while they are in nobody's (see `scheduling.ahead`). Raises nothing: there is time to find out
        why not when the requests come."""
        if len(self._queue) or self._later is not None:
            return []
        now = self._clock.monotonic()
        table = self._fleet.table
        if not len(table) or not self._accounts.spare(requests[0], table):
            return []
        query = self._query(requests[0], avoid, now)
        choice = select(query)
        row = choice.row
        if choice.verdict is not Verdict.CHOSEN or (table.cold is not None and table.cold[row]):
            return []
        server = self._fleet.server(table.rows[row].server_id)
        if table.waiting[row] or table.lane_until[row] > now or not self._fleet.sound(row):
            return []
        flights: list[Flight] = []
        for request in requests[:1] if choice.explored else requests:
            slots, free, more = int(table.slots[row]), int(table.free[row]), bool(flights)
            if not spares(slots, free, len(server.idle), more=more):
                break
            if more:
                if not self._accounts.spare(request, table):
                    break
                query = replace(query, request=request)
            flight = self._take(query, choice, ahead=True)
            if flight is None:
                break
            flights.append(flight)
        return flights

    def outlook(self, request: RouteRequest, avoid: frozenset[Failed] = frozenset()) -> Outlook:
        """Whether waiting for a server is of use."""
        choice = select(self._query(request, avoid, self._clock.monotonic()))
        if choice.verdict is Verdict.IMPOSSIBLE and not choice.unaffordable:
            return Outlook.NONE
        return Outlook.AWAY if choice.all_away or choice.unaffordable else Outlook.HERE

    def sooner_elsewhere(
        self, request: RouteRequest, avoid: frozenset[Failed], elapsed: float, leaves: float = math.inf
    ) -> bool:
        """Whether a request whose first token is overdue after so many seconds, on a server that is among those in
        `avoid`, is to be taken from there; its client `leaves` then, monotonic seconds. See `patience.sooner`."""
        now = self._clock.monotonic()
        return sooner(self._query(request, avoid, now, left=leaves - now), elapsed)

    def release(self, flight: Flight, outcome: Outcome) -> None:
        """Give the slot back. A second call does nothing."""
        self._fleet.end(flight, outcome, self._clock.monotonic())

    async def heard_from(self, flight: Flight) -> None:
        """Return when the server of a flight has given a sign of life, or is not expected to."""
        server, lease = flight.server, flight.server.lease
        if lease.state is not LeaseState.LIVE:
            return
        heard = asyncio.get_running_loop().create_future()

        def note(server_id: ServerId, urgent: bool) -> None:
            if server.lease is not lease and not heard.done():
                heard.set_result(None)

        stop = self._fleet.listen(note)
        try:
            await heard
        finally:
            stop()

    def tick(self, now: float) -> None:
        """Let time pass: entries expire, and what time alone made possible is started."""
        elapsed = now - self._ticked
        if elapsed > 0:
            self._rate += min(1.0, elapsed) * (self._granted / elapsed - self._rate)
            self._granted, self._ticked = 0, now
        expired = self._queue.expire(now)
        for entry in expired:
            record = explain(self._query(entry.request, entry.avoid, now, now - entry.arrived))
            _fail(entry, queue_timeout(now - entry.enqueued_at, record.summary))
        if expired:
            self._known = None  # the next of their lanes may need less
        if self._hoping:
            self._hoping, self._picture_changed = False, True
        if now >= self._reconsider_at:
            self._reconsider_at, self._known = math.inf, None
        if not len(self._queue):
            self._short.clear()
        for tenant in [tenant for tenant in self._short if self._accounts.renewed(tenant)]:
            self._funds_changed(tenant)
        self._pump()

    # -------------------------------------------------------------- events ---

    def _note(self, server_id: ServerId, urgent: bool) -> None:
        self._picture_changed |= urgent

    def _funds_changed(self, tenant: str) -> None:
        """A tenant may have more to spend, or nothing left to wait for."""
        if tenant in self._short:
            self._short.discard(tenant)
            self._known, self._picture_changed = None, True
            if self._offer is not None:
                self._offer.missed = True  # it may have come past those who wait for the money already
            self._pump()

    def _pump(self) -> None:
        """Start every waiting request that can start, refuse those for whom waiting is of no use any more."""
        if self._later is not None:
            return  # what is going on goes on at once, and sees all that has changed
        if not len(self._queue):
            self._known, self._offer, self._doubtful, self._picture_changed = None, None, [], False
            self._reconsider_at = math.inf
            if self._planned.anything:
                self._plan_anew(len(self._fleet.table))
            return
        now = self._clock.monotonic()

        def going() -> bool:
            return self._clock.monotonic() - now < _STRETCH

        if not (self._start(now, going) and self._refuse(now, going)):
            self._later = self._loop.call_soon(self._go_on)

    def _go_on(self) -> None:
        self._later = None
        self._pump()

    def _welcome(self, now: float) -> None:
        """Somebody new waits, who could use nothing that was open at `now`; what has opened by time alone since is
        news."""
        if self._later is not None:
            # Not offered anything yet.
            self._known = None
            if self._offer is not None:
                self._offer.missed = True
            return
        open_now = self._open(now)
        if len(self._queue) == 1:
            self._table, self._reach, self._known = self._fleet.table, {}, open_now
        elif self._known is not None:
            self._known = self._known & open_now  # when one of the others opens, it is news
        if self._fleet.table.cold is not None:
            self._pump()  # with one more who waits, loading a cold model may pay

    # ------------------------------------------------------- start, refuse ---

    def _start(self, now: float, going: Callable[[], bool]) -> bool:
        """Offer what has opened to those who wait, in fair order. False: there is more to do."""
        self._queue.demote(now)
        open_now = self._open(now)
        if self._fleet.table is not self._table:
            self._table, self._reach, self._known, self._offer = self._fleet.table, {}, None, None
        fresh = open_now if self._known is None else open_now & ~self._known
        if self._table.cold is not None:
            fresh = fresh | (open_now & self._table.cold)  # whether loading pays depends on who waits and who is there
        offer = self._offer
        if offer is None and not fresh.any():
            self._known = open_now
            return True
        if offer is None or (fresh & ~offer.rows).any():
            # From the top: the first in order may be waiting for what has opened just now.
            self._triage(now)
            offer = self._offer = Offer(fresh, self._reaches())
            self._plan_anew(len(self._table))
            self._declines = 0
        offer.narrow(fresh, self._servers)

        def try_place(entry: Waiting[Waiter]) -> bool:
            waiter = entry.payload
            if waiter.future.done():  # its caller went away a moment ago
                return True
            if not self._suits(entry, offer.choices[entry.kind]):
                return False
            wanted = Wanted(
                entry.request, entry.avoid, entry.arrived, entry.enqueued_at, waiter.explain,
                background=entry.background, late=entry.late, leaves=waiter.leaves,
            )  # fmt: skip
            try:
                grant = self._place(wanted, now, queued=self._queue.behind(entry))
            except DomainError as error:
                if entry.background:
                    return False  # the fleet may change
                _fail(entry, error)
                return True
            if grant is None:
                return False
            waiter.future.set_result(grant)
            left = offer.rows & self._open(now)
            if left.sum() < offer.rows.sum():
                offer.narrow(left, self._servers)
            return True

        declined = self._declines

        def deeper(entry: Waiting[Waiter]) -> bool:
            """It rather waits: the next may not."""
            nonlocal declined
            rather, declined = self._declines > declined, self._declines
            return rather and declined < _DECLINES

        told = self._queue.dispatch(
            try_place, kinds=offer.choices, after=offer.reached, going=lambda: bool(offer.choices) and going(),
            deeper=deeper,
        )  # fmt: skip
        if told.reached is not None and offer.choices:
            offer.reached = told.reached
            return False
        self._offer = None
        self._known = None if offer.missed else self._open(now)
        return not offer.missed

    def _triage(self, now: float) -> None:
        """Let those who cannot be served well, or give way so that others can, go behind those others."""
        if now < self._plan_again_at:
            return
        started = self._clock.monotonic()
        table = self._fleet.table
        waiting = self._queue.foremost(now, min(_PLANNED, _PLANNED_ROWS // len(table) + 1))
        if len(waiting) < 2:
            return
        reaches = self._reaches()
        cases = [
            Case(
                entry.request, self._policy_for(entry.request), now - entry.arrived, rank, reaches[entry.kind],
                self._avoided(entry.avoid), self._cached(entry, now),
            )
            for entry, rank in waiting
        ]  # fmt: skip
        for (entry, _), in_time in zip(waiting, triage(table, cases, now), strict=True):
            self._queue.judge(entry, in_time)
        ended = self._clock.monotonic()
        self._plan_again_at = ended + _BETWEEN_PLANS * (ended - started)

    def _cached(self, entry: Waiting[Waiter], now: float) -> Floats | None:
        """Looked up now and then."""
        waiter = entry.payload
        if waiter.cached is None or len(waiter.cached) != len(self._fleet.table) or now >= waiter.cached_at + _CACHED:
            waiter.cached, waiter.cached_at = self._fleet.cached(entry.request), now
        return waiter.cached

    def _refuse(self, now: float, going: Callable[[], bool]) -> bool:
        """End the waiting of those for whom it is of no use any more. False: there is more to do."""
        while self._doubtful or self._picture_changed:
            if not self._doubtful:
                self._picture_changed = False
                self._doubtful = self._queue.firsts()
            present = self._fleet.table.ready & ~self._fleet.table.draining
            choices = {kind: self._servers(mask & present) for kind, mask in self._reaches().items()}
            while self._doubtful:
                entry = self._queue.first_like(self._doubtful.pop())
                # Most of them: a server that can serve it is there.
                if (
                    entry is not None
                    and not entry.background
                    and not self._suits(entry, choices[entry.kind], priced=True)
                    and self._given_up(entry, now)
                ):
                    self._doubtful.append(entry)  # for the next of its lane
                if not going():
                    return False
        return True

    def _given_up(self, entry: Waiting[Waiter], now: float) -> bool:
        try:
            self._place(Wanted(entry.request, entry.avoid, now, now, False), now, overtake=False)
        except DomainError as error:
            self._queue.remove(entry)
            _fail(entry, error)
            return True
        return False

    # ---------------------------------------------------- who can use what ---

    @property
    def _loop(self) -> Loop:
        if self._own_loop is None:
            self._own_loop = asyncio.get_running_loop()  # asked for once: it makes a system call each time
        return self._own_loop

    def _query(
        self, request: RouteRequest, avoid: frozenset[Failed], now: float, waited: float = 0.0, **more: Any
    ) -> Query:
        """The question to the selector; `more` are fields of it that depend on who else waits."""
        policy = self._policy_for(request)
        return Query(
            self._fleet.table, request, policy, self._avoided(avoid), now=now, waited=waited,
            funds=self._accounts.funds(request.tenant), cached=self._fleet.cached(request),
            draw=self._draw() if policy.exploration else 0.0, **more,
        )  # fmt: skip

    def _open(self, now: float) -> Mask:
        """Rows that take a request at this moment."""
        anything = Query(self._fleet.table, _ANY, self._policy, now=now)
        return passing(FREE, anything, present(anything))

    def _reaches(self) -> dict[KindKey, Mask]:
        """The rows that can serve each kind that waits, however much it needs and whatever it does not want."""
        kinds = dict(self._queue.kinds())
        self._reach = {kind: mask for kind, mask in self._reach.items() if kind in kinds}
        for kind in kinds.keys() - self._reach.keys():
            request = kinds[kind].request
            least = replace(
                request, prompt_tokens=0, max_tokens=None, min_context_length=0, excluded=frozenset(),
                max_cost_nano_usd=0,
            )  # fmt: skip
            self._reach[kind] = permanent(Query(self._table, least, self._policy))
        return self._reach

    def _servers(self, rows: Mask) -> list[tuple[ServerId, int]]:
        """The servers of some rows, each with the longest context that it has there."""
        table = self._fleet.table
        longest: dict[ServerId, int] = {}
        for row in rows.nonzero()[0].tolist():
            server_id, length = table.rows[row].server_id, table.rows[row].card.context_length
            longest[server_id] = max(length, longest.get(server_id, 0))
        return list(longest.items())

    def _suits(self, entry: Waiting[Waiter], choices: list[tuple[ServerId, int]], *, priced: bool = False) -> bool:
        """Whether one of these servers, which can serve its kind, can serve this very request; `priced`: for certain,
        where the price or what its tenant may spend is limited."""
        if priced and (entry.request.max_cost_nano_usd or self._accounts.limited(entry.request.tenant)):
            return False  # looked at more closely
        needed, excluded, avoided = entry.request.context_needed, entry.request.excluded, self._avoided(entry.avoid)
        return any(
            length >= needed and server_id not in excluded and server_id not in avoided for server_id, length in choices
        )

    def _avoided(self, avoid: frozenset[Failed]) -> frozenset[ServerId]:
        """Those that have not been started anew since they failed."""
        return frozenset(
            failed.server_id for failed in avoid if self._fleet.instance(failed.server_id) == failed.instance_id
        )

    # --------------------------------------------------------------- place ---

    def _without_waiting(
        self, request: RouteRequest, avoid: frozenset[Failed], place: int, now: float, with_record: bool
    ) -> Grant | None:
        """A grant for work in the background, unless somebody who waits may have a use for it."""
        if len(self._queue):
            self._pump()
        if self._later is not None or self._queue.goes_before(request, avoid, place):
            return None
        try:
            return self._place(Wanted(request, avoid, now, now, with_record, background=True), now)
        except DomainError:
            return None  # the fleet may change

    def _place(self, wanted: Wanted, now: float, *, overtake: bool = True, queued: int = 0) -> Grant | None:
        """A grant if a server is to start the request now, None if it must wait; raises if waiting is no use. Without
        `overtake` others wait already and go first; `queued` wait behind it."""
        request = wanted.request
        if len(self._planned.lane) != len(self._fleet.table):
            self._plan_anew(len(self._fleet.table))
        planned = self._planned if wanted.due is None else self._planned_before(request.priority, wanted.due)
        started = self._clock.monotonic()
        query = self._query(
            request, wanted.avoid, now, now - wanted.arrived,
            queued=queued, planned=planned if overtake else None, content=wanted.background,
            late=wanted.late, left=wanted.leaves - now,
        )  # fmt: skip
        choice = select(query)
        self._on_selected(self._clock.monotonic() - started)
        # Where many decline, it is for the last of them: a server that others could use is not to be idle.
        may_decline = wanted.late and len(self._queue) > 1 and self._declines < _DECLINES - 1
        if choice.verdict is Verdict.CHOSEN and may_decline and in_vain(query, choice.row):
            self._decline(now)
            return None
        if choice.verdict is Verdict.CHOSEN:
            if not overtake:
                return None
            record = explain(query) if wanted.explain else None
            flight = self._take(query, choice)
            if flight is None:
                self._short.add(request.tenant)
                return None
            if not wanted.background:
                self._on_granted(request.priority, now - wanted.since)
            return Grant(flight, now - wanted.since, record)
        if query.funds is not None and (choice.verdict is Verdict.WAIT or wanted.background):
            self._short.add(request.tenant)
            if choice.verdict is Verdict.WAIT and choice.lacking is not None:
                self._accounts.want(request.tenant, choice.lacking)
        if choice.verdict is Verdict.IMPOSSIBLE or (choice.all_away and not self._may_return()):
            if wanted.patient and self._fleet.warming_up(now):
                self._hoping = True
                return None
            raise self._refusal(choice, query)
        if choice.later >= 0:
            span = query.table.span(choice.later)
            self._planned.add(span, choice.prefill)
            if not wanted.late:
                due = wanted.arrived + query.policy.ttft_objective(request.prompt_tokens)
                self._ahead.append((request.priority, due, span, choice.prefill))
            if choice.prefers:
                self._decline(now)
        return None

    def _decline(self, now: float) -> None:
        """Somebody leaves what is free to the next."""
        self._declines += 1
        self._reconsider_at = min(self._reconsider_at, now + _RECONSIDER)

    def _take(self, query: Query, choice: Choice, *, ahead: bool = False) -> Flight | None:
        """The slot that was chosen. None: its tenant lacks the money after all."""
        request, row = query.request, choice.row
        # What it may cost is set aside in the same step in which it was seen to be there.
        charge = self._accounts.open(request, query.table.rows[row].card)
        if charge is None:
            return None
        there = 0.0 if query.cached is None else float(query.cached[row])
        patience = query.policy.ttft_objective(request.prompt_tokens)
        flight = self._fleet.begin(row, query.now, request, there, patience, ahead=ahead)
        self._queue.charge(request.tenant, request.priority, flight.expected.work)
        flight.charge = charge
        self._granted += 1
        if choice.explored:
            self.on_explored(flight.model, choice.propensity)
        return flight

    def _plan_anew(self, rows: int) -> None:
        self._planned = Planned.nothing(rows)
        if len(self._nothing.lane) != rows:
            self._nothing = Planned.nothing(rows)
        self._ahead.clear()

    def _planned_before(self, priority: Priority, due: float) -> Planned:
        """What those who wait are expected to take before one that comes now."""
        if not self._ahead:
            return self._nothing
        before = [
            (span, prefill)
            for other, when, span, prefill in self._ahead
            if other > priority or (other == priority and when < due)
        ]
        if not before:
            return self._nothing
        planned = Planned.nothing(len(self._fleet.table))
        for span, prefill in before:
            planned.add(span, prefill)
        return planned

    def _policy_for(self, request: RouteRequest) -> Policy:
        own = self.policies.get(request.preset) if request.preset else None
        return own or self.class_policies.get(request.priority, self._policy)

    def _may_return(self) -> bool:
        """Whether some server is expected back at any moment."""
        return any(
            server.lease.state is LeaseState.SUSPECT
            or (server.lease.state is LeaseState.LIVE and server.report.health is Health.STARTING)
            for server in self._fleet.servers()
        )

    def _refusal(self, choice: Choice, query: Query) -> DomainError:
        left = self._fleet.warming_up(query.now)
        if left and not query.avoid:
            return fleet_warming_up(left)
        summary = explain(query).summary
        if choice.unaffordable:
            there, retry_after = self._accounts.wait(query.request.tenant, choice.lacking)
            return budget_exhausted(query.request.tenant, there, summary, retry_after)
        if choice.verdict is Verdict.IMPOSSIBLE:
            return no_capable_server(summary)
        return servers_away(summary, 1.0)


def _fail(entry: Waiting[Waiter], error: DomainError) -> None:
    if not entry.payload.future.done():
        entry.payload.future.set_exception(error)
