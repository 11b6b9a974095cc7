"""Policies side by side: scenarios, and what capacity a fleet has for a trace.

Capacity is the highest arrival rate, the time of the trace scaled, that least in-flight sustains: one at which its
completions keep up with the arrivals over the trace, so that at the last arrival at least `KEEPS_UP` of all requests
are complete. Clients are patient in that run, for one that leaves would make room, and no host fails. It is found by
bisection to `PRECISION`. A long trace is judged by its first `MOST_JOBS` jobs, a short one is repeated until it has
`FEWEST_JOBS`: in a short one the last long answer, not the fleet, decides.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from control_plane.simulation.baselines import LeastInflight
from control_plane.simulation.engine import HostSpec
from control_plane.simulation.fleet import FaultEntry, Fleet, events
from control_plane.simulation.harness import Settings, blind, simulate
from control_plane.simulation.metrics import Objective, Summary, summary
from control_plane.simulation.policies import makers
from control_plane.simulation.traces import Trace

KEEPS_UP = 0.99
PRECISION = 0.01
MOST_JOBS = 20_000
FEWEST_JOBS = 3_000

Progress = Callable[[str, int, int], None]
"""What is being done, how many jobs of it, of how many."""


def capacity(trace: Trace, hosts: Sequence[HostSpec], progress: Progress | None = None) -> float:
    """Arrivals per second. Raises ValueError for a trace too short to have a backlog."""
    trace = trace.part(0, MOST_JOBS)
    if len(trace.jobs) * (1.0 - KEEPS_UP) < 1.0:
        raise ValueError(f"{len(trace.jobs)} requests are too few to measure capacity: give --rate")
    if not trace.rate:
        raise ValueError("all requests arrive at once, so there is no rate to scale: slice another part of the trace")
    trace = trace.looped(-(-FEWEST_JOBS // len(trace.jobs)))
    prompt = sum(job.prompt_tokens for job in trace.jobs) / len(trace.jobs)
    # Something to begin with: prefill lanes that are never idle.
    low = high = sum(host.prefill for host in hosts) / prompt

    def sustained(rate: float) -> bool:
        return _keeps_up(trace.at_rate(rate), hosts, progress)

    if sustained(high):
        while sustained(high := low * 2.0):
            low = high
            if high > 1e9:
                raise ValueError("no rate is too high for this fleet and trace")
    else:
        while not sustained(low := high / 2.0):
            high = low
            if low < 1e-9:
                raise ValueError("no rate is low enough for this fleet and trace")
    while high / low > 1.0 + PRECISION:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if sustained(middle) else (low, middle)
    return low


def _keeps_up(trace: Trace, hosts: Sequence[HostSpec], progress: Progress | None) -> bool:
    patient = Settings(client_timeout=1e12)
    count = len(trace.jobs)
    result = simulate(trace, hosts, blind(LeastInflight), settings=patient, progress=_told(progress, "capacity", count))
    last = trace.jobs[-1].arrival
    complete = sum(outcome.end_at <= last for outcome in result.outcomes)
    return complete >= KEEPS_UP * count


def _told(progress: Progress | None, what: str, count: int) -> Callable[[int], None] | None:
    return None if progress is None else lambda done: progress(what, done, count)


@dataclass(frozen=True, slots=True)
class Row:
    """One policy in one scenario."""

    policy: str
    strategy: str
    """Which of several did it, for `oracle`; else the policy."""
    rate: float
    """Arrivals per second."""
    load: float | None
    """Share of the capacity, where it was measured."""
    summary: Summary
    wall_seconds: float
    """Of the run, and for `oracle` of all that were tried."""
    requests_per_minute: float
    """Simulated per minute of the run's own time."""


def rows(
    trace: Trace,
    fleet: Fleet,
    policies: Sequence[str],
    rates: Sequence[tuple[float, float | None]],
    *,
    faults: Sequence[FaultEntry] = (),
    settings: Settings = Settings(),
    objective: Objective = Objective(),
    seed: int = 0,
    progress: Progress | None = None,
) -> Iterator[Row]:
    """A row for each rate, with its share of the capacity if that is known, and policy. Raises FleetError."""
    for rate, load in rates:
        scaled = trace.at_rate(rate)
        script = events(faults, fleet, scaled.span)
        for policy in policies:
            started = time.perf_counter()
            tried: list[tuple[str, Summary, float]] = []
            for strategy, maker in makers(policy, seed).items():
                told = _told(progress, f"{strategy} at {rate:.3g}/s", len(scaled.jobs))
                begun = time.perf_counter()
                result = simulate(scaled, fleet.hosts, maker, faults=script, settings=settings, progress=told)
                tried.append((strategy, summary(result, objective), time.perf_counter() - begun))
            strategy, best, took = max(tried, key=lambda entry: (entry[1].goodput, -entry[1].ttft_p99))
            wall = time.perf_counter() - started
            yield Row(policy, strategy, rate, load, best, wall, best.requests / took * 60.0)
