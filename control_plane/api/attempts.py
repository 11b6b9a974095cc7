"""The life of one request: wait for a server, try it, try another while nothing was sent yet."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from random import random
from typing import Generic, TypeVar

import grpc
from google.protobuf.message import DecodeError

from control_plane.api.convert import timestamp
from control_plane.api.metrics import Metrics
from control_plane.domain.errors import DomainError
from control_plane.domain.ports import Clock
from control_plane.domain.request import RouteRequest
from control_plane.domain.server import Failed
from control_plane.fleet.charge import Charge
from control_plane.fleet.grants import Grant
from control_plane.fleet.scheduler import Scheduler
from control_plane.fleet.server import Flight, Outcome, OutcomeKind
from control_plane.scheduling.retry import REQUEST_REASONS, Allowance, RetryPolicy, blames_server, repeatable, retryable
from modelyard.program.process import first_of
from modelyard.rpc.calls import UnaryCall
from modelyard.rpc.errors import Refusal, from_rpc_error
from modelyard.rpc.reasons import Reason
from modelyard.v1.orchestrator_pb2 import Attempt

log = logging.getLogger(__name__)

T = TypeVar("T")

NEUTRAL = Outcome(OutcomeKind.NEUTRAL)
FAILURE = Outcome(OutcomeKind.FAILURE)


class AttemptFailed(Exception):
    """The server did not do what was asked."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.message)
        self.refusal = refusal


@dataclass(slots=True)
class Progress:
    """How far an attempt has come; written by the attempt, read when it fails."""

    tokens_sent: bool = False
    tokens: int = 0
    """That have come, at least."""
    held: list[bytes] = field(default_factory=list)
    """Messages that are passed on when the answer is whole, for its server may break it off."""
    lost: bool = False
    """The server's lease ran out during the attempt."""
    overdue: bool = False
    """Its first token was so late that another server is asked."""
    may_leave: Callable[[], bool] = lambda: False
    """Whether there is another that is expected to be sooner."""
    call: UnaryCall | grpc.aio.Call | None = None
    on_begin: Callable[[Progress], None] | None = None
    """Of an attempt beside which there may be another."""

    def begin(self) -> None:
        """The server has something to say, and nothing of it was passed on. Raises CancelledError where another server
        was sooner."""
        if self.on_begin is not None:
            self.on_begin(self)

    def leave(self) -> None:
        """End the attempt because its first token is overdue, if there is another server to ask."""
        if self.call is not None and not self.tokens_sent and self.may_leave():
            self.overdue = True
            self.call.cancel()

    def lose(self) -> None:
        """End the attempt because nothing will come from its server any more."""
        self.lost = True
        if self.call is not None:
            self.call.cancel()


@dataclass(slots=True, eq=False)
class _Try:
    """One attempt."""

    grant: Grant
    entry: Attempt
    progress: Progress
    server: Failed
    task: asyncio.Task[object] | None = None
    """Where it is one of two."""


class Attempts:
    """Runs requests against the fleet."""

    def __init__(
        self,
        scheduler: Scheduler,
        policy: RetryPolicy,
        clock: Clock,
        metrics: Metrics,
        hedging: Allowance | None = None,
    ) -> None:
        """`hedging`: for how many requests two servers may be asked. None: for none."""
        self.scheduler = scheduler
        self.policy = policy
        self.clock = clock
        self.metrics = metrics
        self._hedging = hedging

    async def run(
        self,
        request: RouteRequest,
        attempt: Callable[[Grant, Progress], Awaitable[tuple[T, Outcome]]],
        history: list[Attempt],
        on_grant: Callable[[Grant], Awaitable[None]] | None = None,
        size: int = 0,
        avoid: Iterable[Failed] = (),
        *,
        hedge: bool = False,
        leaves: float = math.inf,
    ) -> T:
        """Return what the first successful attempt returns; `history` gets one entry per attempt. `size` is that of
        the request in bytes; those to `avoid` have failed it before it came here; its client `leaves` at that time,
        monotonic seconds.

        A server that failed is avoided while there is another that can do it. If there is none, it is asked again,
        unless it would say the same; one that could not be reached is waited for, as it may be starting anew.

        With `hedge` a second server may be asked while the first is slow; `attempt` then says with `Progress.begin`
        that it has something, before it passes anything on.

        Raises Refusal or DomainError when no attempt can be made or none succeeded.
        """
        life = _Life(self, request, attempt, history, on_grant, size, avoid, leaves)
        hedging = self._hedging if hedge and on_grant is None else None
        if hedging is not None:
            hedging.request()
        while True:
            grant = await life.next()
            try:
                if hedging is None:
                    return await life.ask(life.begin(grant))
                return await life.race(grant, hedging)
            except AttemptFailed as failure:
                self.metrics.retries.labels(reason=failure.refusal.reason).inc()
            await asyncio.sleep(self.policy.delay(len(history), random()))


class _Life(Generic[T]):
    """What one request goes through."""

    def __init__(
        self,
        owner: Attempts,
        request: RouteRequest,
        attempt: Callable[[Grant, Progress], Awaitable[tuple[T, Outcome]]],
        history: list[Attempt],
        on_grant: Callable[[Grant], Awaitable[None]] | None,
        size: int,
        avoid: Iterable[Failed],
        leaves: float = math.inf,
    ) -> None:
        self._owner = owner
        self._request = request
        self._attempt = attempt
        self._history = history
        self._on_grant = on_grant
        self._size = size
        self._leaves = leaves
        self._place, self._arrived = owner.scheduler.take_place(), owner.clock.monotonic()
        self._unfit: frozenset[Failed] = frozenset()
        self._failed: Mapping[Failed, Flight | None] = dict.fromkeys(avoid)
        """Those that may do another time; with the flight if there was no word from the server."""
        self._unsuited: Refusal | None = None
        """What the latest server said, if the request suits none of those asked."""
        self._going: list[_Try] = []
        self._winner: Progress | None = None

    async def next(self) -> Grant:
        """A server that can be asked. Raises Refusal or DomainError if there is none."""
        while True:
            try:
                return await self._owner.scheduler.acquire(
                    self._request,
                    self._unfit.union(self._failed),
                    explain=self._on_grant is not None,
                    size=self._size,
                    place=self._place,
                    again=bool(self._history),
                    arrived=self._arrived,
                    leaves=self._leaves,
                )
            except DomainError as error:
                known = self._history or self._failed
                if not known or error.reason not in ("NO_CAPABLE_SERVER", "SERVERS_AWAY"):
                    raise
                if not self._failed:
                    raise self._unsuited or exhausted(self._history, error.message) from error
            # Nobody else is there. Whoever fell silent must first give a sign of life, or be given up.
            silent = {server: flight for server, flight in self._failed.items() if flight is not None}
            if len(silent) == len(self._failed):
                await first_of(*(self._owner.scheduler.heard_from(flight) for flight in silent.values()))
                silent = {}
            self._failed = silent

    def begin(self, grant: Grant) -> _Try:
        """Note that a server is asked now."""
        flight = grant.flight
        entry = Attempt(server_id=flight.server_id, model=flight.model, provider=flight.provider)
        entry.started_at.CopyFrom(timestamp(self._owner.clock.wall()))
        self._history.append(entry)
        server = Failed(flight.server_id, flight.server.report.identity.instance_id)
        one = _Try(grant, entry, Progress(), server)
        self._going.append(one)
        tried = self._tried()

        def may_leave() -> bool:
            more = len(self._history) < self._owner.policy.max_attempts
            elapsed = self._owner.clock.monotonic() - flight.began
            return more and self._owner.scheduler.sooner_elsewhere(self._request, tried, elapsed, self._leaves)

        one.progress.may_leave = may_leave
        flight.on_lost = one.progress.lose
        return one

    async def ask(self, one: _Try) -> T:
        """What the server answers. Raises AttemptFailed if another may do, Refusal or DomainError if none will."""
        grant, progress, scheduler = one.grant, one.progress, self._owner.scheduler
        try:
            if self._on_grant:
                await self._on_grant(grant)
            result, outcome = await judged(self._attempt(grant, progress), progress)
        except AttemptFailed as failure:
            self._going.remove(one)
            outcome = outcome_of(failure.refusal, grant.flight, one.server.instance_id, begun=bool(progress.tokens))
            scheduler.release(grant.flight, outcome)
            self._note(one, failure.refusal)
            raise
        except BaseException:
            self._going.remove(one)
            scheduler.release(grant.flight, NEUTRAL)
            raise
        scheduler.release(grant.flight, outcome)
        return result

    def _note(self, one: _Try, refusal: Refusal) -> None:
        """A server has failed. Raises Refusal if no other is to be asked."""
        reason, history = refusal.reason, self._history
        one.entry.failure_reason = reason
        one.entry.failure_message = refusal.message
        # Not the message: it is for the caller and may quote the request (modelyard.program.privacy).
        log.info("%s: attempt on %s failed: %s", self._request.request_id, one.server.server_id, reason)
        if not retryable(reason):
            raise refusal
        if one.progress.tokens_sent:
            raise broken(one.grant.flight, refusal)
        suits = is_foreign(refusal) or reason not in REQUEST_REASONS
        self._unsuited = None if suits or (self._unsuited is None and len(history) > 1) else refusal
        if len(history) >= self._owner.policy.max_attempts and not self._going:
            raise self._unsuited or exhausted(history)
        if repeatable(reason):
            self._failed = {**self._failed, one.server: one.grant.flight if refusal.transport else None}
        else:
            self._unfit |= {one.server}

    # --------------------------------------------------------------- hedging ---

    async def race(self, grant: Grant, hedging: Allowance) -> T:
        """As `ask`; while nothing has come from a server that should have begun to answer, another is asked, too. The
        first that has something to say goes on, the other is told to stop."""
        wait = grant.flight.expected.slow_at - self._owner.clock.monotonic()
        tasks = {self._started(grant)}
        try:
            ended, _ = await asyncio.wait(tasks, timeout=max(0.0, wait) if wait < math.inf else None)
            if not ended and self._winner is None and len(self._history) < self._owner.policy.max_attempts:
                scheduler = self._owner.scheduler
                other = scheduler.try_acquire(self._request, self._tried(), self._place) if hedging.left() else None
                if other is not None:
                    hedging.spend()
                    self._owner.metrics.hedged.labels(model=other.flight.model).inc()
                    tasks.add(self._started(other))
            while True:
                ended, tasks = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                failures = [error for task in ended if (error := _failure(task)) is not None]
                for task in ended:
                    if not task.cancelled() and task.exception() is None:
                        return task.result()
                final = next((error for error in failures if not isinstance(error, AttemptFailed)), None)
                if final is not None or not tasks:
                    raise final or (failures[0] if failures else asyncio.CancelledError())
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _started(self, grant: Grant) -> asyncio.Task[T]:
        one = self.begin(grant)
        one.progress.on_begin = self._won
        task = one.task = asyncio.ensure_future(self.ask(one))
        # One that is told to stop before its first step never gets to release its slot itself.
        task.add_done_callback(lambda _: self._owner.scheduler.release(grant.flight, NEUTRAL))
        return task

    def _won(self, winner: Progress) -> None:
        """One has something to say. Raises CancelledError if another was sooner."""
        if self._winner is None:
            self._winner = winner
            for one in self._going:
                if one.progress is not winner and one.task is not None:
                    one.entry.overtaken = True
                    one.task.cancel()
        elif self._winner is not winner:
            raise asyncio.CancelledError

    def _tried(self) -> frozenset[Failed]:
        """Everybody who is being asked or has failed."""
        return self._unfit.union(self._failed, (one.server for one in self._going))


def _failure(task: asyncio.Task[T]) -> BaseException | None:
    """What a task that has ended raised; None if it was told to stop."""
    return None if task.cancelled() else task.exception()


@contextmanager
def charged(charge: Charge, progress: Progress) -> Iterator[None]:
    """Around the work of a server: an attempt that ends without its result is taken down with what is known of it.

    A server that refuses has done nothing. One that was cut off, by its client or by the clock, has read the prompt.
    """
    charge.begin()
    try:
        yield
    except BaseException as error:
        if progress.tokens or isinstance(error, asyncio.CancelledError):
            charge.break_off(progress.tokens)
        raise


async def judged(attempt: Awaitable[T], progress: Progress) -> T:
    """The attempt's result; whatever the server did wrong is raised as AttemptFailed."""
    try:
        return await attempt
    except grpc.aio.AioRpcError as error:
        raise AttemptFailed(from_rpc_error(error)) from error
    except DecodeError as error:
        raise AttemptFailed(Refusal(Reason.ENGINE_FAILED, "the server sent what is no answer")) from error
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if progress.overdue and (task is None or not task.cancelling()):
            raise AttemptFailed(Refusal(Reason.ENGINE_FAILED, "its first token was overdue")) from None
        if not progress.lost or (task is not None and task.cancelling()):
            raise  # the caller went away
        raise AttemptFailed(Refusal(Reason.SERVERS_AWAY, "the server's lease ran out during the attempt")) from None


def is_foreign(refusal: Refusal) -> bool:
    """Without details nobody of ours spoke: what answers there is no model server."""
    return refusal.transport and refusal.reason in (Reason.UNSUPPORTED, Reason.UNKNOWN_MODEL)


def outcome_of(refusal: Refusal, flight: Flight, instance_id: str, *, begun: bool = False) -> Outcome:
    """What a failed attempt says of the server, which was this instance then; `begun`: it had its first token."""
    # A process that is gone has no use for blame, and the one that has taken its place is not to have it.
    gone = flight.server.report.identity.instance_id != instance_id
    blamed = (is_foreign(refusal) or blames_server(refusal.reason)) and not gone
    return Outcome(OutcomeKind.FAILURE, broken_off=begun) if blamed else NEUTRAL


def broken(flight: Flight, refusal: Refusal) -> Refusal:
    """The answer broke off: tokens were sent, so nobody but the client may start again."""
    return Refusal(
        Reason.STREAM_BROKEN,
        f"{flight.server_id} broke off the answer: {refusal.message}",
        metadata={"server_id": flight.server_id, "cause": refusal.reason},
    )


def exhausted(history: list[Attempt], now: str = "") -> Refusal:
    """Every attempt failed; `now` is why there is no other."""
    tried = "; ".join(f"{entry.server_id}: {entry.failure_reason} {entry.failure_message}" for entry in history)
    count = "1 attempt" if len(history) == 1 else f"{len(history)} attempts"
    return Refusal(
        Reason.ATTEMPTS_EXHAUSTED,
        f"{count} failed: {tried}" + (f"; now: {now}" if now else ""),
        metadata={"servers": ",".join(entry.server_id for entry in history)},
    )
