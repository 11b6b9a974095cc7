"""The dispatcher: brings tasks from the store to servers that can start them, and what becomes of them back.

A lane with tasks that could start has one place in the scheduler's queue, in the background of its class. When a server
is free for it, the slots that are free are taken, then as many tasks are claimed as there are slots. So a task is bound
to a server when it starts and not before, and what waits in the store costs no memory here.

In memory: a place for every waiting lane, the tasks in hand (at most `workers`), the lanes seen lately. An event costs
what it changes: a lane that gets a task stands in the queue already or is put there, and the queue looks at none that
the event is no news for.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
import math
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from random import random
from typing import Protocol

from msgspec.structs import replace

from control_plane.domain.errors import DomainError
from control_plane.domain.request import RouteRequest
from control_plane.domain.server import Failed
from control_plane.domain.task import Priority
from control_plane.fleet.grants import Grant, Outlook, Standing
from control_plane.fleet.registry import Fleet
from control_plane.fleet.scheduler import Scheduler
from control_plane.fleet.server import Outcome, OutcomeKind
from control_plane.scheduling.retry import RetryPolicy
from control_plane.tasks import lanes
from control_plane.tasks.lanes import Failure
from control_plane.tasks.model import Changes, Claim, Lane, LaneId, Placement, TaskId, TaskState
from control_plane.tasks.ports import Executor, TaskStore

log = logging.getLogger(__name__)

STORE_REASONS = frozenset({"STORE_UNAVAILABLE", "STORE_FULL"})
"""The store may do another time."""

_NEUTRAL = Outcome(OutcomeKind.NEUTRAL)

# Tasks that one claim takes at most: more would let a slot wait for long.
_PER_CLAIM = 64

# Lanes that are asked about in one statement.
_LANES_PER_QUERY = 500

# Lanes that are remembered without having tasks: another task of such a lane needs no look into the store.
_LANES_KEPT = 4096

# Tasks that ended while claims were under way; one that is not noted runs in vain.
_ENDED_KEPT = 10_000

# Seconds between two tries of a store that failed.
_STORE_PAUSE, _STORE_PAUSE_CAP = 0.1, 2.0

# Seconds between two looks at whether a lane should hope for other servers; so many lanes are looked at in one step.
_RECONSIDER, _AT_A_TIME = 1.0, 50

# Seconds after which every lane is looked for, should a hint have been lost.
_LOOK_AROUND = 30.0

# Seconds that the timers of gRPC and of the event loop may be apart.
_CLOCK_SLACK = 0.01

# Characters of a server's own words that are kept.
_MESSAGE = 1000

# Seconds that writes may take after the grace of a drain is over.
_LAST_WRITES = 5.0


@dataclass(frozen=True, slots=True)
class DispatchPolicy:
    workers: int = 256
    """Most tasks in hand."""
    ageing: float = 60.0
    """Seconds of waiting that raise the class of a task by one."""
    retry: RetryPolicy = field(default_factory=lambda: RetryPolicy(base=1.0, factor=2.0, cap=60.0))
    """Pauses between the attempts of a task; how many there are, the task says."""
    lease: float = 10.0
    """Seconds after which the tasks of a dispatcher that is not heard of are taken from it."""
    sweep: float = 0.2
    """Seconds between two looks at what has become due."""
    debug: bool = False
    """Log why each server was chosen."""


class Observer(Protocol):
    """Is told what happens to tasks; metrics."""

    def entered(self, state: TaskState) -> None:
        """A task has entered a state; what the store did by itself is not told."""
        ...

    def attempted(self, outcome: str) -> None:
        """An attempt has ended: ok, expired, taken_away, given_back, or the reason of its failure."""
        ...

    def handed_over(self, seconds: float) -> None:
        """A task went to its server so long after its slot was granted."""
        ...

    def refused_write(self) -> None:
        """A write came too late: the task has passed into other hands."""
        ...


class _Interruption(Enum):
    TAKEN_AWAY = "taken_away"
    """Cancelled, or in other hands: nothing may be written any more."""
    GIVEN_BACK = "given_back"
    """This process ends."""


@dataclass(slots=True, eq=False)
class _Attempt:
    epoch: int
    scope: asyncio.Timeout | None = None
    """Around the work of the server, while that lasts."""
    why: _Interruption | None = None

    def interrupt(self, why: _Interruption) -> None:
        if self.why is None:
            self.why = why
            if self.scope is not None and not self.scope.expired():
                self.scope.reschedule(asyncio.get_running_loop().time())


@dataclass(slots=True, eq=False)
class _Place:
    """A lane with tasks that wait."""

    id: LaneId
    lane: Lane
    oldest: float
    """Of the store's clock: no task of it waits for longer."""
    number: int
    """In the queue; a lane that was served goes behind the others."""
    request: RouteRequest
    avoid: frozenset[Failed]
    standing: Standing | None = None
    parked: bool = False
    news: bool = False
    """It got tasks while a claim was under way, which may not have seen them."""
    batch: int = 1
    """Tasks to claim at once: as few as it turned out to have, twice as many each time that it had more."""

    @property
    def waits(self) -> bool:
        """For a server, and none is on its way."""
        return self.standing is not None and not self.standing.future.done()


class Dispatcher:
    """Runs the tasks of a store on the fleet. `run` it, `drain` it once."""

    def __init__(
        self,
        store: TaskStore,
        fleet: Fleet,
        scheduler: Scheduler,
        executor: Executor,
        policy: DispatchPolicy,
        observer: Observer,
        in_flight: Callable[[], AbstractContextManager[object]],
    ) -> None:
        """`in_flight` is entered around every attempt: what a drain of the process waits for."""
        self._store = store
        self._fleet = fleet
        self._scheduler = scheduler
        self._executor = executor
        self._policy = policy
        self._observer = observer
        self._in_flight = in_flight
        self._places: dict[LaneId, _Place] = {}
        self._kept: OrderedDict[LaneId, Lane] = OrderedDict()
        self._parked: list[tuple[int, int, LaneId]] = []
        """Heap of those that had a server but no worker: by class, then by number."""
        self._unknown: set[LaneId] = set()
        self._look = asyncio.Event()
        self._fleet_changed = asyncio.Event()
        self._running: dict[TaskId, _Attempt] = {}
        self._free = policy.workers
        self._claims = 0
        self._ended: set[tuple[TaskId, int]] = set()
        """Told while claims were under way, whose tasks are not known yet."""
        self._store_away = False
        """A call has failed, and nothing was written since."""
        self._trial = False
        """It can be read again: one claim may show whether it can be written, too."""
        self._stopped = False
        self._last_words = False
        """What cannot be written now will not be written."""
        self._idle = asyncio.Event()
        self._idle.set()
        self._group: asyncio.TaskGroup | None = None

    # ------------------------------------------------------------- reading ---

    @property
    def workers(self) -> int:
        """Tasks that may be in hand at the same time."""
        return self._policy.workers

    @property
    def running_here(self) -> int:
        """Tasks in hand."""
        return len(self._running)

    @property
    def store(self) -> TaskStore:
        """Whose tasks these are."""
        return self._store

    def oldest(self) -> float | None:
        """When the first of the tasks that wait for a server was submitted, by the store's clock. Safe from another
        thread."""
        return min((place.oldest for place in list(self._places.values())), default=None)

    def waiting_for(self, lane: LaneId) -> str:
        """Why the first task of a lane has not started, one sentence for people; empty if nobody knows."""
        place = self._places.get(lane)
        if place is None:
            return ""
        if self._stopped:
            return "this control plane is shutting down"
        if not self._may_claim:
            return "the task store does not answer"
        if place.parked:
            return f"all {self._policy.workers} workers are busy (tasks.workers)"
        return self._scheduler.explain(place.request, place.avoid).summary

    # ------------------------------------------------------------- running ---

    async def run(self) -> None:
        """Dispatch until `drain` is done. Cancelling ends everything at once and leaves tasks to their lease."""
        deaf = [self._store.listen(self._told), self._fleet.listen(self._note)]
        try:
            async with asyncio.TaskGroup() as group:
                self._group = group
                side = [
                    group.create_task(self._look_for_lanes(), name="task-lanes"),
                    group.create_task(self._grow_older(), name="task-ageing"),
                    group.create_task(self._reconsider(), name="task-fleet"),
                    group.create_task(self._repeat(self._store.heartbeat, self._policy.lease / 3), name="task-lease"),
                    group.create_task(self._repeat(self._store.sweep, self._policy.sweep), name="task-sweep"),
                ]
                self._look.set()
                await self._over()
                for task in side:
                    task.cancel()
        finally:
            self._group = None
            for stop in deaf:
                stop()

    async def _over(self) -> None:
        self._drained = asyncio.get_running_loop().create_future()
        await self._drained

    async def drain(self, grace: float) -> None:
        """Claim nothing more, let what runs end within `grace` seconds, give the rest back."""
        self._stopped = True
        for place in list(self._places.values()):
            self._leave(place)
        if self._group is None:
            return
        if not await self._idle_within(grace):
            log.warning("%d tasks were still running after %g s and are given back", len(self._running), grace)
            for attempt in list(self._running.values()):
                attempt.interrupt(_Interruption.GIVEN_BACK)
            if not await self._idle_within(_LAST_WRITES):
                self._last_words = True
                await self._idle_within(_STORE_PAUSE_CAP + 1)
        if not self._drained.done():
            self._drained.set_result(None)

    async def _idle_within(self, seconds: float) -> bool:
        try:
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    async def _repeat(self, work: Callable[[], Awaitable[None]], every: float) -> None:
        """Now and then, whether the store answers or not."""
        quiet = False
        while True:
            try:
                await work()
                quiet = False
            except Exception as error:
                if not quiet:
                    log.warning("%s", _words(error))
                quiet = True
            await asyncio.sleep(every)

    # -------------------------------------------------------------- events ---

    def _told(self, changes: Changes) -> None:
        for task_id, epoch in changes.ended:
            attempt = self._running.get(task_id)
            if attempt is not None and attempt.epoch <= epoch:
                attempt.interrupt(_Interruption.TAKEN_AWAY)
            elif self._claims and len(self._ended) < _ENDED_KEPT:
                self._ended.add((task_id, epoch))  # it may be one that is being claimed
        if self._stopped:
            return
        for lane_id in changes.lanes:
            place = self._places.get(lane_id)
            if place is not None:
                place.news = True
            elif lane_id in self._kept and not self._store_away:
                self._open(lane_id, self._kept[lane_id], self._store.now())
            else:
                self._unknown.add(lane_id)
                self._look.set()

    def _note(self, server_id: str, urgent: bool) -> None:
        if urgent:
            self._fleet_changed.set()

    # --------------------------------------------------------------- lanes ---

    async def _look_for_lanes(self) -> None:
        """Open a place for every lane that has tasks: at the start, where one is told of that is not known, when the
        store is back, and now and then."""
        everything, pause = True, _STORE_PAUSE
        while True:
            asked = None if everything or self._store_away else list(self._unknown)
            self._unknown.clear()
            self._look.clear()
            try:
                for chunk in [None] if asked is None else _chunks(asked, _LANES_PER_QUERY):
                    for waiting in await self._store.waiting_lanes(chunk):
                        self._open(waiting.id, waiting.lane, waiting.oldest)
            except Exception as error:
                self._store_failed(error)
            else:
                if self._store_away:
                    self._try_a_claim()
                else:
                    pause = _STORE_PAUSE
            try:
                async with asyncio.timeout(_LOOK_AROUND):
                    await self._look.wait()
                everything = False
            except TimeoutError:
                everything = True
            if not self._may_claim:
                await asyncio.sleep(pause)
                pause = min(2 * pause, _STORE_PAUSE_CAP)

    @property
    def _may_claim(self) -> bool:
        return self._trial or not self._store_away

    def _store_failed(self, error: Exception) -> None:
        if not self._store_away:
            log.warning("no task is started until the store is back: %s", _words(error))
            self._store_away = True
        self._trial = False
        self._look.set()

    def _try_a_claim(self) -> None:
        """The lane that gets a server first may see whether the store can be written: a full disk can still be read."""
        self._trial = True
        self._unpark_all()

    def _store_wrote(self) -> None:
        if self._store_away:
            self._store_away = self._trial = False
            log.warning("the task store answers again")
            self._look.set()
            self._unpark_all()

    def _open(self, lane_id: LaneId, lane: Lane, oldest: float) -> None:
        """A lane has tasks."""
        if self._stopped:
            return
        place = self._places.get(lane_id)
        if place is not None:
            place.news = True
            return
        number = self._scheduler.take_place(background=True)
        place = self._places[lane_id] = _Place(lane_id, lane, oldest, number, lane.route, frozenset())
        self._kept.pop(lane_id, None)
        self._stand(place)

    def _close(self, place: _Place) -> None:
        """A lane has no tasks any more."""
        del self._places[place.id]
        self._kept[place.id] = place.lane
        if len(self._kept) > _LANES_KEPT:
            self._kept.popitem(last=False)

    def _stand(self, place: _Place) -> None:
        """Wait in the queue, in the class that its age gives it."""
        if self._stopped:
            return
        request, place.avoid = self._hope(place.lane)
        place.request = replace(request, priority=self._urgency(place))
        standing = self._scheduler.stand(place.request, place.avoid, place.number, explain=self._policy.debug)
        place.standing = standing
        standing.future.add_done_callback(lambda _: self._granted(place, standing))

    def _hope(
        self, lane: Lane, seen: dict[tuple[RouteRequest, frozenset[Failed]], Outlook] | None = None
    ) -> tuple[RouteRequest, frozenset[Failed]]:
        """Needs, and whom to avoid: as strict as there is hope. `seen` remembers for lanes with the same needs."""
        seen = {} if seen is None else seen
        strictest: tuple[RouteRequest, frozenset[Failed]] | None = None
        away: tuple[RouteRequest, frozenset[Failed]] | None = None
        for choice in lanes.avoidances(lane):
            strictest = strictest or choice
            outlook = seen.get(choice)
            if outlook is None:
                outlook = seen[choice] = self._scheduler.outlook(*choice)
            if outlook is Outlook.HERE:
                return choice
            if outlook is Outlook.AWAY:
                away = away or choice
        return away or strictest or (lane.route, lane.unfit)

    def _leave(self, place: _Place) -> None:
        standing, place.standing = place.standing, None
        if standing is not None:
            self._scheduler.leave(standing)

    async def _grow_older(self) -> None:
        """Raise the classes of lanes that have waited for long."""
        while True:
            await asyncio.sleep(min(1.0, self._policy.ageing / 10))
            for number, place in enumerate(list(self._places.values()), 1):
                if place.waits and self._urgency(place) > place.request.priority:
                    self._leave(place)
                    self._stand(place)
                if number % _AT_A_TIME == 0:
                    await asyncio.sleep(0)

    def _urgency(self, place: _Place) -> Priority:
        return lanes.effective_class(place.lane.priority, place.oldest, self._store.now(), self._policy.ageing)

    async def _reconsider(self) -> None:
        """When the fleet has changed, let lanes hope for what there is now."""
        while True:
            await self._fleet_changed.wait()
            self._fleet_changed.clear()
            seen: dict[tuple[RouteRequest, frozenset[Failed]], Outlook] = {}
            for number, place in enumerate(list(self._places.values()), 1):
                if place.waits:
                    request, avoid = self._hope(place.lane, seen)
                    if avoid != place.avoid or replace(request, priority=place.request.priority) != place.request:
                        self._leave(place)
                        self._stand(place)
                if number % _AT_A_TIME == 0:
                    await asyncio.sleep(0)
                    seen = {}  # the fleet may be another one
            await asyncio.sleep(_RECONSIDER)

    # -------------------------------------------------------------- claims ---

    def _granted(self, place: _Place, standing: Standing) -> None:
        """A server is free for a lane."""
        if place.standing is not standing:
            return  # it has left, and the grant was given back
        place.standing = None
        grant = standing.future.result()
        if self._stopped or not self._may_claim or not self._free or self._group is None:
            self._scheduler.release(grant.flight, _NEUTRAL)
            self._park(place)
            return
        grants = [grant]
        while len(grants) < min(place.batch, self._free):
            more = self._scheduler.try_acquire(place.request, place.avoid, place.number, explain=self._policy.debug)
            if more is None:
                break
            grants.append(more)
        self._trial = False
        self._free -= len(grants)
        self._claims += 1
        self._idle.clear()
        place.news = False
        self._group.create_task(self._claim(place, grants))

    async def _claim(self, place: _Place, grants: Sequence[Grant]) -> None:
        since = asyncio.get_running_loop().time()
        placements = [_placement(grant) for grant in grants]
        claims: Sequence[Claim] = ()
        failed = False
        try:
            claims = await self._store.claim(place.id, placements)
        except Exception as error:
            failed = True
            self._store_failed(error)
        finally:
            self._claims -= 1
            for grant in grants[len(claims) :]:
                self._scheduler.release(grant.flight, _NEUTRAL)
            for _ in grants[len(claims) :]:
                self._put_back_worker()
        assert self._group is not None
        for claim, grant, placement in zip(claims, grants, placements, strict=False):
            self._observer.entered(TaskState.SCHEDULED)
            if self._policy.debug and grant.record is not None:
                log.debug("%s epoch %d: %s", claim.id, claim.epoch, grant.record.summary)
            attempt = self._running[claim.id] = _Attempt(claim.epoch)
            if self._stopped:
                attempt.why = _Interruption.GIVEN_BACK
            if (claim.id, claim.epoch) in self._ended:
                attempt.why = _Interruption.TAKEN_AWAY
            self._group.create_task(self._attempt(attempt, claim, grant, placement, since))
        if not self._claims:
            self._ended.clear()
        if claims:
            self._store_wrote()
        elif self._store_away and not failed:
            self._try_a_claim()  # a claim of nothing writes nothing
        if failed:
            self._park(place)
        elif len(claims) == len(grants) and (claims[-1].more or place.news):
            place.batch = min(2 * place.batch, _PER_CLAIM)
            place.oldest = max(place.oldest, claims[-1].record.created_at)
            place.number = self._scheduler.take_place(background=True)
            self._stand(place)
        elif place.news:
            place.batch = 1
            self._stand(place)
        else:
            self._close(place)

    def _park(self, place: _Place) -> None:
        if not place.parked:
            place.parked = True
            heapq.heappush(self._parked, (-place.request.priority, place.number, place.id))

    def _unpark(self) -> None:
        while self._parked:
            _, _, lane_id = heapq.heappop(self._parked)
            place = self._places.get(lane_id)
            if place is not None and place.parked:
                place.parked = False
                self._stand(place)
                return

    def _unpark_all(self) -> None:
        for _ in range(len(self._parked)):
            self._unpark()

    def _put_back_worker(self) -> None:
        self._free += 1
        if self._free == self._policy.workers and not self._claims:
            self._idle.set()
        if self._may_claim:
            self._unpark()

    # ------------------------------------------------------------ attempts ---

    async def _attempt(self, attempt: _Attempt, claim: Claim, grant: Grant, placement: Placement, since: float) -> None:
        """Run a task once, and write down what has become of it."""
        try:
            with self._in_flight():
                await self._carry_out(attempt, claim, grant, placement, since)
        finally:
            self._scheduler.release(grant.flight, _NEUTRAL)
            if self._running.get(claim.id) is attempt:
                del self._running[claim.id]
            self._put_back_worker()

    async def _carry_out(
        self, attempt: _Attempt, claim: Claim, grant: Grant, placement: Placement, since: float
    ) -> None:
        store, record = self._store, claim.record
        done: tuple[bytes, int] | None = None
        failure: Failure | None = None
        left = math.inf if record.deadline is None else record.deadline - store.now()
        if attempt.why is None and left > 0:
            assert self._group is not None
            self._group.create_task(self._tell_started(attempt, claim))
            self._observer.handed_over(asyncio.get_running_loop().time() - since)
            try:
                async with asyncio.timeout(None if math.isinf(left) else left) as attempt.scope:
                    done = await self._executor.run(claim, grant, left)
            except TimeoutError:
                pass  # the deadline, or an interruption
            except DomainError as error:
                over = record.deadline is not None and store.now() >= record.deadline - _CLOCK_SLACK
                failure = None if over else Failure(error.reason, error.message, error.retry_after)
            except Exception as error:
                log.error("%s: a bug in modelyard: %s", claim.id, _words(error))
                failure = Failure("INTERNAL", "a bug in modelyard")
            finally:
                attempt.scope = None
                self._scheduler.release(grant.flight, _NEUTRAL)  # no slot waits for the store
        if attempt.why is _Interruption.TAKEN_AWAY:
            self._observer.attempted(attempt.why.value)
        elif done is not None:
            await self._write(claim, partial(store.succeeded, claim.id, claim.epoch, *done), TaskState.SUCCEEDED, "ok")
        elif attempt.why is _Interruption.GIVEN_BACK:
            await self._write(
                claim, partial(store.give_back, claim.id, claim.epoch, "DRAINING"), TaskState.QUEUED, attempt.why.value
            )
        elif failure is None:
            await self._write(claim, partial(store.expired, claim.id, claim.epoch), TaskState.EXPIRED, "expired")
        else:
            await self._failed(claim, placement, failure)

    async def _failed(self, claim: Claim, placement: Placement, failure: Failure) -> None:
        lane = lanes.after_failure(claim, placement, failure.reason)
        others = any(self._scheduler.outlook(*choice) is not Outlook.NONE for choice in lanes.avoidances(lane))
        store = self._store
        retry = lanes.retry_of(claim, placement, failure, others, self._policy.retry, store.now(), random())
        log.info(
            "%s: attempt %d on %s failed: %s%s",
            claim.id, claim.record.attempts, placement.server_id, failure.reason, "" if retry else ", for good",
        )  # fmt: skip
        await self._write(
            claim,
            partial(store.attempt_failed, claim.id, claim.epoch, failure.reason, _storable(failure.message), retry),
            TaskState.QUEUED if retry else TaskState.FAILED,
            failure.reason,
        )

    async def _tell_started(self, attempt: _Attempt, claim: Claim) -> None:
        try:
            valid = await self._store.started(claim.id, claim.epoch)
        except Exception:
            return  # for people only: that the attempt is under way is written already
        if valid:
            self._observer.entered(TaskState.RUNNING)
        elif self._running.get(claim.id) is attempt and attempt.scope is not None:
            attempt.interrupt(_Interruption.TAKEN_AWAY)

    async def _write(self, claim: Claim, write: Callable[[], Awaitable[bool]], state: TaskState, outcome: str) -> None:
        """Write down how an attempt ended, however long the store is away: it is the only one who knows."""
        self._observer.attempted(outcome)
        pause = _STORE_PAUSE
        while True:
            try:
                if await write():
                    self._store_wrote()
                    self._observer.entered(state)
                else:
                    self._observer.refused_write()
                return
            except DomainError as error:
                if error.reason not in STORE_REASONS:
                    self._observer.refused_write()  # the task is gone
                    return
                self._store_failed(error)
            except Exception as error:
                if state is TaskState.FAILED:
                    log.error("%s: its failure cannot be written: %s", claim.id, _words(error))
                    return
                log.error("%s: its end cannot be written, so it has failed: %s", claim.id, _words(error))
                state, store = TaskState.FAILED, self._store
                write = partial(
                    store.attempt_failed, claim.id, claim.epoch, "INTERNAL", "the result could not be kept", None
                )
                continue
            if self._last_words:
                log.error("%s: its end could not be written: it will run again", claim.id)
                return
            await asyncio.sleep(pause)
            pause = min(2 * pause, _STORE_PAUSE_CAP)


def _words(error: Exception) -> str:
    """For logs: the text of an exception that is not ours may quote a task."""
    return error.message if isinstance(error, DomainError) else type(error).__name__


def _storable(message: str) -> str:
    """What a server said, as every database takes it."""
    return message[:_MESSAGE].replace("\0", " ").encode("utf-8", "replace").decode()


def _placement(grant: Grant) -> Placement:
    flight = grant.flight
    return Placement(flight.server_id, flight.server.report.identity.instance_id, flight.model, flight.provider)


def _chunks(ids: Sequence[LaneId], size: int) -> Iterator[Sequence[LaneId]]:
    for start in range(0, len(ids), size):
        yield ids[start : start + size]
