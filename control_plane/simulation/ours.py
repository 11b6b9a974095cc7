"""modelyard's own policy: the fleet, the queue and the selector of the control plane, under the simulated clock.

Nothing is copied or simplified: `Fleet` learns from the reports and outcomes of simulated hosts, `Scheduler` lets
requests wait in `FairQueue` and asks `select`. What is left here is what servicers do around them: send what was
granted, tell of first tokens and ends, repeat elsewhere what failed before its first token.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from control_plane.domain.definition import Definitions
from control_plane.domain.errors import DomainError
from control_plane.domain.model import ModelCard, ModelName, Provider, ServerId
from control_plane.domain.request import RouteRequest
from control_plane.domain.server import Failed, Hardware, Health, Identity, Load
from control_plane.domain.server import Report as ServerReport
from control_plane.domain.task import Feature, Priority, TaskType
from control_plane.fleet.grants import Grant, Standing
from control_plane.fleet.registry import Fleet, FleetPolicy
from control_plane.fleet.scheduler import Scheduler
from control_plane.fleet.server import Attachment, Flight, Outcome, OutcomeKind
from control_plane.prefix.blocks import known_blocks
from control_plane.scheduling.breaker import BreakerPolicy
from control_plane.scheduling.queue import FairQueue
from control_plane.scheduling.stats import StatsPolicy
from control_plane.selection.policy import Policy
from control_plane.simulation.dispatcher import Action, Cancel, GiveUp, HostInfo, Report, Send, Streams, Usage
from control_plane.simulation.traces import BLOCK_TOKENS, Job

TICK = 0.1
"""Seconds between two looks at the clock, as in a control plane."""
MAX_ATTEMPTS = 3
_INSTANCE = "1"
_CONTEXT = 2**20
_MODEL = "any"
_ENDLESS = 1e6
_CAPABLE = MappingProxyType(dict.fromkeys(TaskType, 0.5))
_NEUTRAL = Outcome(OutcomeKind.NEUTRAL)
_FAILURE = Outcome(OutcomeKind.FAILURE)
_BROKEN_OFF = Outcome(OutcomeKind.FAILURE, broken_off=True)


class SimulatedClock:
    """Stands where it is put."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def wall(self) -> float:
        return self.now


class Promised:
    """A future without an event loop: callbacks run when it is asked to, in order."""

    def __init__(self, loop: SimulatedLoop) -> None:
        self._loop = loop
        self._result: Grant | None = None
        self._exception: BaseException | None = None
        self._cancelled = False
        self._callbacks: list[Callable[[Promised], object]] = []

    def done(self) -> bool:
        return self._cancelled or self._result is not None or self._exception is not None

    def cancelled(self) -> bool:
        return self._cancelled

    def cancel(self) -> bool:
        if self.done():
            return False
        self._cancelled = True
        return True

    def result(self) -> Grant:
        if self._exception is not None:
            raise self._exception
        assert self._result is not None
        return self._result

    def exception(self) -> BaseException | None:
        return self._exception

    def set_result(self, result: Grant, /) -> None:
        self._result = result
        self._call()

    def set_exception(self, exception: BaseException, /) -> None:
        self._exception = exception
        self._call()

    def add_done_callback(self, callback: Callable[[Any], object], /) -> None:
        self._callbacks.append(callback)
        if self.done():
            self._call()

    def __await__(self) -> Generator[Any, None, Grant]:
        raise TypeError("there is nothing to await in a simulation")

    def _call(self) -> None:
        for callback in self._callbacks:
            self._loop.call_soon(lambda callback=callback: callback(self))  # type: ignore[misc]
        self._callbacks.clear()


class SimulatedLoop:
    """What is to be done at once, but not here."""

    def __init__(self) -> None:
        self._ready: list[Callable[[], object]] = []

    def create_future(self) -> Promised:
        return Promised(self)

    def call_soon(self, callback: Callable[[], object], /) -> object:
        self._ready.append(callback)
        return callback

    def run(self) -> None:
        """Until nothing is left to do."""
        while self._ready:
            ready, self._ready = self._ready, []
            for callback in ready:
                callback()


@dataclass(slots=True, eq=False)
class _Attempt:
    """A job that is not over."""

    job: Job
    request: RouteRequest
    place: int
    standing: Standing | None = None
    flight: Flight | None = None
    sent_at: float = 0.0
    first_at: float = 0.0
    failures: int = 0
    avoid: frozenset[Failed] = field(default_factory=frozenset)


class Ours:
    """See the module."""

    def __init__(self, hosts: Sequence[HostInfo], streams: Streams, seed: int, policy: Policy | None = None) -> None:
        self._streams = streams
        self._clock, self._loop = SimulatedClock(), SimulatedLoop()
        self._fleet = Fleet(
            FleetPolicy(
                lease_duration=3.0, forget_after=600.0, warm_up=0.0, stats=StatsPolicy(), breaker=BreakerPolicy()
            ),
            Definitions(),
            0.0,
        )
        self._scheduler = Scheduler(
            self._fleet,
            policy or Policy(),
            FairQueue(dict.fromkeys(Priority, 1 << 30), dict.fromkeys(Priority, _ENDLESS)),
            self._clock,
            on_selected=lambda seconds: None,
            on_granted=lambda priority, queued: None,
            loop=self._loop,
            draw=random.Random(seed).random,
        )
        self._infos = {info.id: info for info in hosts}
        self._lasting = {
            info.id: (
                Identity(ServerId(info.id), _INSTANCE, info.id),
                Hardware(device=info.hardware),
                tuple(_card(name, info) for name in info.models or (_MODEL,)),
            )
            for info in hosts
        }
        """What is the same in each report of a host."""
        self._attachments: dict[str, Attachment] = {}
        self._jobs: dict[Job, _Attempt] = {}
        self._actions: list[Action] = []
        self._next_tick = TICK
        for info in hosts:
            self._attach(info, Report(info.slots, 0, 0, 0.0, True))

    # ---------------------------------------------------------------- events ---

    def arrive(self, job: Job, now: float) -> None:
        self._clock.now = now
        request = RouteRequest(
            str(job.id),
            task_type=TaskType[job.task_type.upper()] if job.task_type else TaskType.CHAT,
            priority=Priority(min(max(job.priority, 0) + Priority.NORMAL, Priority.CRITICAL)),
            prompt_tokens=job.prompt_tokens,
            max_tokens=job.max_tokens,
            model=ModelName(job.model) if job.model else None,
            tenant=job.tenant or "default",
            blocks=known_blocks(job.blocks, job.prompt_tokens, BLOCK_TOKENS) if job.blocks else None,
        )
        attempt = self._jobs[job] = _Attempt(job, request, self._scheduler.take_place())
        self._enter(attempt)

    def first_token(self, job: Job, host_id: str, now: float, cached_tokens: int) -> None:
        self._clock.now = now
        attempt = self._jobs[job]
        attempt.first_at = now
        if attempt.flight is not None:
            self._fleet.first_token(attempt.flight, now)

    def finished(self, job: Job, host_id: str, now: float, usage: Usage) -> None:
        self._clock.now = now
        attempt = self._jobs.pop(job)
        if attempt.flight is not None:
            tokens = usage.output_tokens
            attempt.flight.charge.count(usage.prompt_tokens, usage.cached_tokens, tokens)
            self._release(
                attempt,
                Outcome(
                    OutcomeKind.SUCCESS,
                    ttft=attempt.first_at - attempt.sent_at,
                    tpot=(now - attempt.first_at) / (tokens - 1) if tokens > 1 else None,
                ),
            )

    def failed(self, job: Job, host_id: str, kind: str, now: float, tokens_so_far: int) -> None:
        self._clock.now = now
        attempt = self._jobs[job]
        if kind == "timeout":
            del self._jobs[job]
            if attempt.flight is not None:
                self._release(attempt, _NEUTRAL)
            elif attempt.standing is not None:
                self._scheduler.leave(attempt.standing)
            return
        attempt.failures += 1
        held = attempt.flight is not None and attempt.flight.held
        self._release(attempt, _BROKEN_OFF if attempt.first_at else _FAILURE)
        if attempt.first_at and not held:
            self._give_up(attempt, "STREAM_BROKEN")
        elif attempt.failures >= MAX_ATTEMPTS:
            self._give_up(attempt, "ATTEMPTS_EXHAUSTED")
        else:
            attempt.first_at = 0.0
            attempt.avoid |= {Failed(ServerId(host_id), _INSTANCE)}
            self._enter(attempt)

    def report(self, host_id: str, reported: Report, now: float) -> None:
        self._clock.now = now
        self._fleet.update(self._attachments[host_id], self._report(self._infos[host_id], reported), now, now)

    def decide(self, now: float) -> Iterable[Action]:
        self._clock.now = now
        if now >= self._next_tick:
            self._next_tick = now + TICK
            self._fleet.tick(now)
            self._scheduler.tick(now)
        self._loop.run()
        actions, self._actions = self._actions, []
        return actions

    def wake_at(self) -> float | None:
        return self._next_tick if self._jobs else None

    # --------------------------------------------------------------- private ---

    def _attach(self, info: HostInfo, reported: Report) -> None:
        report = self._report(info, reported)
        self._attachments[info.id] = self._fleet.attach(report, self._clock.now, 0.0, lambda: None)

    def _report(self, info: HostInfo, reported: Report) -> ServerReport:
        identity, hardware, models = self._lasting[info.id]
        return ServerReport(
            identity=identity,
            engine="simulated",
            engine_version="1",
            hardware=hardware,
            models=models,
            load=Load(reported.slots, reported.running, 0, 0, reported.kv),
            health=Health.READY if reported.healthy else Health.UNHEALTHY,
        )

    def _enter(self, attempt: _Attempt) -> None:
        try:
            standing = self._scheduler.enter(
                attempt.request, attempt.avoid, place=attempt.place, again=bool(attempt.failures),
                arrived=attempt.job.arrival, leaves=self._streams.deadline(attempt.job),
            )  # fmt: skip
        except DomainError as error:
            if attempt.avoid:
                attempt.avoid = frozenset()  # nobody else can do it: whoever failed is asked again
                self._enter(attempt)
            else:
                self._give_up(attempt, error.reason)
            return
        attempt.standing = standing
        standing.future.add_done_callback(lambda future: self._granted(attempt, future))

    def _granted(self, attempt: _Attempt, future: Promised) -> None:
        if future.cancelled() or attempt.job not in self._jobs:
            return  # it is over: `failed` has given its place back
        attempt.standing = None
        error = future.exception()
        if error is not None:
            self._give_up(attempt, str(getattr(error, "reason", error)))
            return
        attempt.flight = flight = future.result().flight
        flight.on_overdue = lambda: self._overdue(attempt, flight)
        attempt.sent_at = self._clock.now
        self._actions.append(Send(attempt.job, flight.server_id, flight.held))

    def _overdue(self, attempt: _Attempt, flight: Flight) -> None:
        if attempt.flight is not flight or attempt.first_at or attempt.failures + 1 >= MAX_ATTEMPTS:
            return
        tried = attempt.avoid | {Failed(flight.server_id, _INSTANCE)}
        elapsed, leaves = self._clock.now - flight.began, self._streams.deadline(attempt.job)
        if not self._scheduler.sooner_elsewhere(attempt.request, tried, elapsed, leaves):
            return
        self._actions.append(Cancel(attempt.job, flight.server_id))
        attempt.failures += 1
        self._release(attempt, _FAILURE)
        attempt.avoid = tried
        self._loop.call_soon(lambda: self._enter(attempt))

    def _release(self, attempt: _Attempt, outcome: Outcome) -> None:
        if attempt.flight is not None:
            self._scheduler.release(attempt.flight, outcome)
            attempt.flight = None

    def _give_up(self, attempt: _Attempt, reason: str) -> None:
        self._jobs.pop(attempt.job, None)
        self._actions.append(GiveUp(attempt.job, reason))


def _card(name: str, info: HostInfo) -> ModelCard:
    features = Feature.STREAMING | (Feature.PREFIX_CACHE if info.cache_tokens else Feature.NONE)
    return ModelCard(ModelName(name), Provider("simulated"), _CONTEXT, _CAPABLE, features)


assert math.isfinite(_ENDLESS)
