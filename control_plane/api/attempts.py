"""The life of one request: wait for a server, try it, try another while nothing was sent yet."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from random import random
from typing import TypeVar

import grpc
from google.protobuf.message import DecodeError

from control_plane.api.convert import timestamp
from control_plane.api.metrics import Metrics
from control_plane.domain.errors import DomainError
from control_plane.domain.ports import Clock
from control_plane.domain.request import RouteRequest
from control_plane.domain.server import Failed
from control_plane.fleet.charge import Charge
from control_plane.fleet.scheduler import Grant, Outlook, Scheduler
from control_plane.fleet.server import Flight, Outcome, OutcomeKind
from control_plane.scheduling.retry import REQUEST_REASONS, RetryPolicy, blames_server, repeatable, retryable
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
    lost: bool = False
    """The server's lease ran out during the attempt."""
    overdue: bool = False
    """Its first token was so late that another server is asked."""
    may_leave: Callable[[], bool] = lambda: False
    """Whether there is another."""
    call: UnaryCall | grpc.aio.Call | None = None

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


class Attempts:
    """Runs requests against the fleet."""

    def __init__(self, scheduler: Scheduler, policy: RetryPolicy, clock: Clock, metrics: Metrics) -> None:
        self._scheduler = scheduler
        self._policy = policy
        self._clock = clock
        self._metrics = metrics

    async def run(
        self,
        request: RouteRequest,
        attempt: Callable[[Grant, Progress], Awaitable[tuple[T, Outcome]]],
        history: list[Attempt],
        on_grant: Callable[[Grant], Awaitable[None]] | None = None,
        size: int = 0,
        avoid: Iterable[Failed] = (),
    ) -> T:
        """Return what the first successful attempt returns; `history` gets one entry per attempt. `size` is that of
        the request in bytes; those to `avoid` have failed it before it came here.

        A server that failed is avoided while there is another that can do it. If there is none, it is asked again,
        unless it would say the same; one that could not be reached is waited for, as it may be starting anew.

        Raises Refusal or DomainError when no attempt can be made or none succeeded.
        """
        place, arrived = self._scheduler.take_place(), self._clock.monotonic()
        unfit: frozenset[Failed] = frozenset()
        failed: Mapping[Failed, Flight | None] = dict.fromkeys(avoid)
        """Those that may do another time; with the flight if there was no word from the server."""
        unsuited: Refusal | None = None
        """What the latest server said, if the request suits none of those asked."""
        while True:
            try:
                grant = await self._scheduler.acquire(
                    request,
                    unfit.union(failed),
                    explain=on_grant is not None,
                    size=size,
                    place=place,
                    again=bool(history),
                    arrived=arrived,
                )
            except DomainError as error:
                if not (history or failed) or error.reason not in ("NO_CAPABLE_SERVER", "SERVERS_AWAY"):
                    raise
                if not failed:
                    raise unsuited or exhausted(history, error.message) from error
                # Nobody else is there. Whoever fell silent must first give a sign of life, or be given up.
                silent = {server: flight for server, flight in failed.items() if flight is not None}
                if len(silent) == len(failed):
                    await first_of(*(self._scheduler.heard_from(flight) for flight in silent.values()))
                    silent = {}
                failed = silent
                continue
            flight = grant.flight
            server = Failed(flight.server_id, flight.server.report.identity.instance_id)
            entry = Attempt(server_id=flight.server_id, model=flight.model, provider=flight.provider)
            entry.started_at.CopyFrom(timestamp(self._clock.wall()))
            history.append(entry)
            progress = Progress()
            flight.on_lost = progress.lose
            tried = unfit.union(failed, {server})

            def may_leave(tried: frozenset[Failed] = tried) -> bool:
                more = len(history) < self._policy.max_attempts
                return more and self._scheduler.outlook(request, tried) is Outlook.HERE

            progress.may_leave = may_leave
            try:
                if on_grant:
                    await on_grant(grant)
                result, outcome = await judged(attempt(grant, progress), progress)
            except AttemptFailed as failure:
                refusal = failure.refusal
            except BaseException:
                self._scheduler.release(flight, NEUTRAL)
                raise
            else:
                self._scheduler.release(flight, outcome)
                return result
            reason = refusal.reason
            foreign = is_foreign(refusal)
            self._scheduler.release(flight, outcome_of(refusal, flight, server.instance_id))
            entry.failure_reason = reason
            entry.failure_message = refusal.message
            # Not the message: it is for the caller and may quote the request (modelyard.program.privacy).
            log.info("%s: attempt on %s failed: %s", request.request_id, flight.server_id, reason)
            if not retryable(reason):
                raise refusal
            if progress.tokens_sent:
                raise broken(flight, refusal)
            suits = foreign or reason not in REQUEST_REASONS
            unsuited = None if suits or (unsuited is None and len(history) > 1) else refusal
            if len(history) >= self._policy.max_attempts:
                raise unsuited or exhausted(history)
            if repeatable(reason):
                failed = {**failed, server: flight if refusal.transport else None}
            else:
                unfit |= {server}
            self._metrics.retries.labels(reason=reason).inc()
            await asyncio.sleep(self._policy.delay(len(history), random()))


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


def outcome_of(refusal: Refusal, flight: Flight, instance_id: str) -> Outcome:
    """What a failed attempt says of the server, which was this instance then."""
    # A process that is gone has no use for blame, and the one that has taken its place is not to have it.
    gone = flight.server.report.identity.instance_id != instance_id
    blamed = (is_foreign(refusal) or blames_server(refusal.reason)) and not gone
    return FAILURE if blamed else NEUTRAL


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
