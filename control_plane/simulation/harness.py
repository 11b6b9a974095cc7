"""Runs a trace through a fleet under a policy: the event loop of the simulated clock.

Between control plane and hosts every message takes `Settings.network` seconds each way. What a client waits for is
measured where the control plane is: TTFT from the arrival of the request to the first token of its answer there.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from control_plane.simulation.dispatcher import Cancel, Dispatcher, Factory, GiveUp, Send, Streams, Usage
from control_plane.simulation.engine import Fault, Host, HostSpec, Run
from control_plane.simulation.traces import Job, Trace


class PolicyError(Exception):
    """A dispatcher has asked for something that makes no sense, as sending a request that is over."""


@dataclass(frozen=True, slots=True)
class FaultEvent:
    """At `at` seconds a fault begins on a host; NONE ends the one that is there."""

    at: float
    host: str
    fault: Fault
    factor: float = 10.0
    """Of a SLOWDOWN."""
    healthy: bool = True
    """What the host reports of its health from then on."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Seconds, all of them."""

    network: float = 0.001
    """One way between control plane and host."""
    report_interval: float = 1.0
    client_timeout: float = 120.0
    """From arrival to the end of the answer; then the client leaves, which is an error."""


class Outcome:
    """What became of a job."""

    __slots__ = (
        "attempts",
        "bound",
        "cached",
        "cut",
        "end_at",
        "error",
        "first_at",
        "host",
        "job",
        "over",
        "runs",
        "silent",
        "tokens",
    )

    def __init__(self, job: Job) -> None:
        self.job = job
        self.first_at = math.inf
        """When its first token came to the control plane."""
        self.end_at = math.inf
        self.host = ""
        """Whose answer the client got, or began to get."""
        self.tokens = 0
        """Output tokens that came."""
        self.cached = 0
        self.attempts = 0
        self.error = ""
        """Empty for a complete answer; else the kind of failure, or the reason of the dispatcher."""
        self.cut = False
        """The answer ended after its first token and before its last, for another reason than that the client left."""
        self.silent = False
        """Cut, and the dispatcher did not say so."""
        self.over = False
        self.bound: Run | None = None
        """The run whose answer the client gets."""
        self.runs: list[Run] = []

    @property
    def ttft(self) -> float:
        """Seconds; infinite where there was no first token."""
        return self.first_at - self.job.arrival

    @property
    def tpot(self) -> float:
        """Mean seconds per output token after the first; 0 where there was one only."""
        return (self.end_at - self.first_at) / (self.tokens - 1) if self.tokens > 1 else 0.0


@dataclass(frozen=True, slots=True)
class HostUse:
    """What a host did."""

    id: str
    hardware: str
    finished: int
    """Complete answers, wanted or not."""
    prefilled_tokens: int
    cached_tokens: int
    output_tokens: int
    busy: float
    """Share of the time with a request in a slot."""
    slots: float
    """Mean share of slots in use."""


@dataclass(frozen=True, slots=True)
class Result:
    """A run of the simulation. `outcomes` are in order of `Job.id`."""

    outcomes: tuple[Outcome, ...]
    hosts: tuple[HostUse, ...]
    ended_at: float
    """Simulated seconds at the end of the last job."""
    events: int
    settings: Settings


class World:
    """The true state of everything, which only an oracle may look at."""

    def __init__(self, trace: Trace, specs: Sequence[HostSpec], settings: Settings = Settings()) -> None:
        self.settings = settings
        self.infos = [spec.info for spec in specs]
        self.simulation = _Simulation(trace, specs, settings)
        self.hosts: dict[str, Host] = self.simulation.hosts
        self.streams: Streams = self.simulation
        self._output = trace.output_tokens

    def output_tokens(self, job: Job) -> int:
        return self._output[job.id]


Maker = Callable[[World], Dispatcher]
"""Makes the dispatcher of one run."""


def blind(factory: Factory, seed: int = 0) -> Maker:
    """A dispatcher that sees nothing but what a control plane sees."""
    return lambda world: factory(world.infos, world.streams, seed)


def simulate(
    trace: Trace,
    specs: Sequence[HostSpec],
    maker: Maker,
    *,
    faults: Iterable[FaultEvent] = (),
    settings: Settings = Settings(),
    progress: Callable[[int], None] | None = None,
) -> Result:
    """Runs every job of the trace to its end. `progress` is told now and then how many jobs have arrived.

    Raises PolicyError, and ValueError where two hosts have one id."""
    world = World(trace, specs, settings)
    ordered = sorted(faults, key=lambda event: event.at)
    return world.simulation.run(maker(world), ordered, progress)


_HOSTS, _ARRIVAL, _TIMEOUT, _WAKE = range(4)
"""What happens next."""

_IDLE_WAKES = 100_000
"""In a row, with nothing else between them: a policy that goes round in circles."""

_Handler = Callable[[Any, float], bool]
"""Does what is due; whether the dispatcher has seen any of it."""


class _Simulation:
    def __init__(self, trace: Trace, specs: Sequence[HostSpec], settings: Settings) -> None:
        self.settings = settings
        self.jobs = trace.jobs
        self.output = trace.output_tokens
        self.hosts = {spec.id: Host(spec, self) for spec in specs}
        if len(self.hosts) != len(specs):
            raise ValueError("two hosts have one id")
        self.healthy = dict.fromkeys(self.hosts, True)
        self.outcomes = [Outcome(job) for job in trace.jobs]
        self.open = len(trace.jobs)
        self.dispatcher: Dispatcher
        self._heap: list[tuple[float, int, _Handler, Any]] = []
        self._sequence = 0

    # ------------------------------------------------------------------- loop ---

    def run(
        self, dispatcher: Dispatcher, faults: Sequence[FaultEvent], progress: Callable[[int], None] | None
    ) -> Result:
        self.dispatcher = dispatcher
        heap, jobs, outcomes = self._heap, self.jobs, self.outcomes
        interval, patience = self.settings.report_interval, self.settings.client_timeout
        for event in faults:
            self._at(event.at, self._fault, event)
        for number, host in enumerate(self.hosts.values()):
            # Reports come one by one, as those of servers that know nothing of each other.
            self._at(interval * number / len(self.hosts), self._report, host)
        arrivals, count = 0, len(jobs)
        next_arrival = jobs[0].arrival if count else math.inf
        leaving: deque[Outcome] = deque()
        wake = math.inf
        events = idle_wakes = 0
        now = 0.0
        decide, wake_at, arrive = dispatcher.decide, dispatcher.wake_at, dispatcher.arrive
        while self.open:
            events += 1
            now, cause = heap[0][0], _HOSTS
            if next_arrival <= now:
                now, cause = next_arrival, _ARRIVAL
            while leaving and leaving[0].over:
                leaving.popleft()
            if leaving and leaving[0].job.arrival + patience <= now:
                now, cause = leaving[0].job.arrival + patience, _TIMEOUT
            if wake < now:
                now, cause = wake, _WAKE
                idle_wakes += 1
                if idle_wakes > _IDLE_WAKES:
                    raise PolicyError(f"woken {_IDLE_WAKES} times in a row at {now:g} s")
            else:
                idle_wakes = 0
            seen = True
            if cause == _HOSTS:
                _, _, handler, what = heapq.heappop(heap)
                seen = handler(what, now)
            elif cause == _ARRIVAL:
                outcome = outcomes[arrivals]
                leaving.append(outcome)
                arrive(outcome.job, now)
                arrivals += 1
                next_arrival = jobs[arrivals].arrival if arrivals < count else math.inf
                if progress is not None and not arrivals % 1000:
                    progress(arrivals)
            elif cause == _TIMEOUT:
                self._client_leaves(leaving.popleft(), now)
            if seen:
                self._act(decide(now), now)
                wanted = wake_at()
                wake = math.inf if wanted is None else wanted if wanted > now else math.nextafter(now, math.inf)
        return Result(
            tuple(outcomes), tuple(_use(host, now) for host in self.hosts.values()), now, events, self.settings
        )

    def _at(self, when: float, handler: _Handler, what: Any) -> None:
        self._sequence += 1
        heapq.heappush(self._heap, (when, self._sequence, handler, what))

    def _schedule(self, host: Host) -> None:
        when = host.next_event()
        if when < host.scheduled:
            host.scheduled = when
            self._at(when, self._step, host)

    # ------------------------------------------------------------------ events ---

    def _step(self, host: Host, now: float) -> bool:
        # An event that was meant for an earlier state of the host is none.
        if host.scheduled == now:
            host.scheduled = math.inf
            host.step(now)
            self._schedule(host)
        return False

    def _accept(self, run: Run, now: float) -> bool:
        if not _dropped(run):
            run.host.accept(run, now)
            self._schedule(run.host)
        return False

    def _cancel(self, run: Run, now: float) -> bool:
        run.host.cancel(run, now)
        self._schedule(run.host)
        return False

    def _report(self, host: Host, now: float) -> bool:
        self._at(now + self.settings.report_interval, self._report, host)
        if host.fault is Fault.GONE:
            return False
        self.dispatcher.report(host.id, host.report(self.healthy[host.id], now), now)
        return True

    def _fault(self, event: FaultEvent, now: float) -> bool:
        host = self.hosts[event.host]
        if event.fault is Fault.NONE:
            host.end_fault(now)
        else:
            host.begin(event.fault, event.factor, now)
        self._schedule(host)
        if self.healthy[host.id] == event.healthy:
            return False
        self.healthy[host.id] = event.healthy
        self.dispatcher.report(host.id, host.report(event.healthy, now), now)
        return True

    # What hosts do (engine.Sink); it comes to the control plane a moment later.

    def first(self, run: Run, now: float) -> None:
        self._at(now + self.settings.network, self._first, run)

    def finish(self, run: Run, now: float) -> None:
        self._at(now + self.settings.network, self._finish, run)

    def fail(self, run: Run, kind: str, now: float) -> None:
        self._at(now + self.settings.network, self._fail, (run, kind))

    def _first(self, run: Run, now: float) -> bool:
        outcome: Outcome = run.owner
        if _dropped(run):
            return False
        run.seen = True
        if outcome.bound is not None:
            return False
        if not run.held:
            self._bind(outcome, run, now)
        self.dispatcher.first_token(outcome.job, run.host.id, now, run.cached)
        return True

    def _bind(self, outcome: Outcome, run: Run, now: float) -> None:
        """From now on the client gets this answer."""
        outcome.bound = run
        outcome.first_at = now
        outcome.host = run.host.id
        outcome.cached = run.cached

    def _finish(self, run: Run, now: float) -> bool:
        outcome: Outcome = run.owner
        if _dropped(run):
            return False
        if run.held and outcome.bound is None:
            self._bind(outcome, run, now)
        if outcome.bound is not run:
            # An answer that nobody gets has come to its end.
            outcome.runs.remove(run)
            return False
        outcome.tokens = run.output
        outcome.runs.remove(run)
        self._end(outcome, "", now)
        usage = Usage(outcome.job.prompt_tokens, run.cached, run.output)
        self.dispatcher.finished(outcome.job, run.host.id, now, usage)
        return True

    def _fail(self, what: tuple[Run, str], now: float) -> bool:
        run, kind = what
        outcome: Outcome = run.owner
        if _dropped(run):
            return False
        outcome.runs.remove(run)
        tokens = run.host.tokens(run, now) if run.seen else 0
        self.dispatcher.failed(outcome.job, run.host.id, kind, now, tokens)
        if outcome.bound is run:
            outcome.tokens = tokens
            outcome.cut = outcome.silent = True
            outcome.error = kind
            self._act(self.dispatcher.decide(now), now)
            if not outcome.over:
                self._end(outcome, kind, now)
        return True

    def _client_leaves(self, outcome: Outcome, now: float) -> None:
        left = [(run.host.id, self.tokens(outcome.job, run.host.id, now)) for run in outcome.runs] or [("", 0)]
        if outcome.bound is not None:
            outcome.tokens = self.tokens(outcome.job, outcome.host, now)
        self._end(outcome, "timeout", now)
        for host, tokens in left:
            self.dispatcher.failed(outcome.job, host, "timeout", now, tokens)

    # ----------------------------------------------------------------- actions ---

    def _act(self, actions: Iterable[Send | Cancel | GiveUp], now: float) -> None:
        for action in actions:
            outcome = self.outcomes[action.job.id]
            if outcome.over:
                raise PolicyError(f"job {action.job.id} is over: {type(action).__name__}")
            if type(action) is Send:
                self._send(outcome, action, now)
            elif type(action) is Cancel:
                run = next((run for run in outcome.runs if run.host.id == action.host), None)
                if run is None or run is outcome.bound:
                    raise PolicyError(f"job {action.job.id} has nothing to cancel on {action.host}")
                outcome.runs.remove(run)
                self._at(now + self.settings.network, self._cancel, run)
            elif type(action) is GiveUp:
                if outcome.bound is not None and not outcome.cut:
                    outcome.cut = True
                    outcome.tokens = self.tokens(outcome.job, outcome.host, now)
                outcome.silent = False
                self._end(outcome, action.reason or "given up", now)

    def _send(self, outcome: Outcome, action: Send, now: float) -> None:
        to = action.host
        host = self.hosts.get(to)
        if host is None:
            raise PolicyError(f"no host {to!r}")
        if outcome.bound is not None:
            raise PolicyError(f"job {outcome.job.id} has an answer already")
        if any(run.host is host for run in outcome.runs):
            raise PolicyError(f"job {outcome.job.id} is on {to} already")
        run = Run(outcome.job, self.output[outcome.job.id], host, outcome)
        run.held = action.held
        outcome.runs.append(run)
        outcome.attempts += 1
        self._at(now + self.settings.network, self._accept, run)

    def _end(self, outcome: Outcome, error: str, now: float) -> None:
        """The job is over; hosts that still work on it are told."""
        outcome.over = True
        outcome.error = error
        outcome.end_at = now
        outcome.bound = None
        self.open -= 1
        for run in outcome.runs:
            self._at(now + self.settings.network, self._cancel, run)
        outcome.runs.clear()

    # ----------------------------------------------------------------- Streams ---

    def tokens(self, job: Job, host: str, now: float) -> int:
        for run in self.outcomes[job.id].runs:
            if run.host.id == host:
                # What was made just now is on its way.
                return run.host.tokens(run, now - self.settings.network) if run.seen else 0
        return 0

    def deadline(self, job: Job) -> float:
        return job.arrival + self.settings.client_timeout


def _dropped(run: Run) -> bool:
    """Nobody waits for it any more."""
    return run not in run.owner.runs


def _use(host: Host, now: float) -> HostUse:
    time = max(now, 1e-9)
    return HostUse(
        host.id,
        host.spec.hardware,
        host.finished,
        host.prefilled_tokens,
        host.cached_tokens,
        host.output_tokens,
        host.busy_seconds / time,
        host.slot_seconds / time / host.spec.slots,
    )
