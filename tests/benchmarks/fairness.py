"""Whether a tenant that asks for a hundred times as much leaves the others their share, under the simulated clock.

    python -m tests.benchmarks.fairness [--seconds 300] [--json]

Five tenants send requests of the same kind to one control plane; each of four asks for the stated part of an equal
share of the fleet, the fifth for a hundred times as much as one of them. Counted are predicted seconds of service, as
the queue counts them, of requests that were granted a server from a tenth of the time on until the arrivals end. A
tenant's share is an equal part of all that was granted in that time, or what it asked for, if that is less.

Shown of the four: the least of what one got, as a part of its share, and how many of their requests had a complete
answer, and how many were within the objective, beside the same without the fifth tenant. Wanted: at least 0.8 of the
share, and all answers where they ask for less than that.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from control_plane.domain.request import RouteRequest
from control_plane.fleet.registry import Fleet
from control_plane.fleet.server import Flight
from control_plane.simulation import fleet
from control_plane.simulation.engine import HostSpec
from control_plane.simulation.harness import Outcome, Result, World, simulate
from control_plane.simulation.metrics import Objective
from control_plane.simulation.ours import Ours
from control_plane.simulation.traces import Job, Trace, trace

_MAC, _CPU = fleet.CLASSES["mac"], fleet.CLASSES["cpu"]
FLEETS = {
    "alike": (replace(_MAC, id="mac-1"), replace(_MAC, id="mac-2")),
    "mixed": (replace(_MAC, id="mac-1"), replace(_CPU, id="cpu-1"), replace(_CPU, id="cpu-2")),
}
"""Small, for a hundred times the share of a large one is a great many requests."""
GREEDY = "greedy"
OTHERS = ("ann", "ben", "cem", "dot")
TIMES = 100
ASKED = (0.5, 0.9, 1.5, 4.0)
"""Of an equal share, by each of the others."""


@dataclass(frozen=True)
class Case:
    """What the others got."""

    fleet: str
    asked: float
    """Part of an equal share that each of them asked for, as measured."""
    least: float
    """Part of its share that the one with the least got."""
    complete: float
    """Share of their requests with a complete answer."""
    goodput: float
    """Share of them within the objective."""
    goodput_alone: float
    """The same without the greedy one."""


def crowd(rate: float, seconds: float, greedy: bool, seed: int = 1) -> Trace:
    """Every other tenant sends `rate` requests per second, the greedy one a hundred times as many."""
    draw = random.Random(seed)
    entries = []
    for tenant, each in (*((name, rate) for name in OTHERS), *([(GREEDY, TIMES * rate)] if greedy else [])):
        now = draw.expovariate(each)
        while now < seconds:
            prompt = int(min(8_000, draw.lognormvariate(7.0, 0.8))) + 10
            entries.append((Job(0, now, prompt, tenant=tenant), draw.randrange(20, 200)))
            now += draw.expovariate(each)
    return trace("crowd", entries)


def granted(work: Trace, hosts: Sequence[HostSpec], since: float) -> tuple[Result, dict[str, float]]:
    """The run, and by tenant the predicted seconds of service of what was granted from `since` on."""
    seconds: dict[str, float] = defaultdict(float)
    last = work.jobs[-1].arrival

    def ours(world: World) -> Ours:
        made = Ours(world.infos, world.streams, 0)
        _note(made._fleet, seconds, since, last)
        return made

    return simulate(work, hosts, ours), seconds


def _note(fleet: Fleet, seconds: dict[str, float], since: float, until: float) -> None:
    begin = fleet.begin

    def noted(row: int, now: float, request: RouteRequest | None = None, *more: float, **how: bool) -> Flight:
        flight = begin(row, now, request, *more, **how)
        if request is not None and since <= now <= until:
            seconds[request.tenant] += flight.expected.work
        return flight

    fleet.begin = noted  # type: ignore[method-assign]


def case(name: str, hosts: Sequence[HostSpec], rate: float, seconds: float) -> Case:
    """The others send `rate` requests per second each."""
    since = seconds / 10
    result, got = granted(crowd(rate, seconds, greedy=True), hosts, since)
    equal = sum(got.values()) / (1 + len(OTHERS))
    mine = [outcome for outcome in result.outcomes if outcome.job.tenant != GREEDY]
    least, asked = 1.0, 0.0
    for tenant in OTHERS:
        theirs = [outcome for outcome in mine if outcome.job.tenant == tenant and outcome.job.arrival >= since]
        # What was not granted would have taken as long as what was.
        begun = sum(outcome.attempts > 0 for outcome in theirs)
        wanted = got[tenant] * len(theirs) / max(begun, 1)
        asked += wanted / equal / len(OTHERS)
        least = min(least, got[tenant] / min(equal, wanted) if begun else 0.0)
    alone = simulate(crowd(rate, seconds, greedy=False), hosts, lambda world: Ours(world.infos, world.streams, 0))
    return Case(
        name,
        asked,
        least,
        sum(not outcome.error for outcome in mine) / len(mine),
        _good(mine),
        _good(alone.outcomes),
    )


def _good(outcomes: Sequence[Outcome]) -> float:
    return sum(map(Objective().met, outcomes)) / len(outcomes)


def rate_of_a_share(hosts: Sequence[HostSpec], seconds: float) -> float:
    """Requests per second that a fifth of the fleet serves when there are too many, about."""
    work = crowd(0.2, seconds, greedy=True)
    result, _ = granted(work, hosts, 0.0)
    done = sum(outcome.end_at <= work.jobs[-1].arrival for outcome in result.outcomes)
    return done / seconds / (1 + len(OTHERS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120.0, help="of arrivals (%(default)g)")
    parser.add_argument("--fleet", default=",".join(FLEETS), help="or those of `modelyard simulate` (%(default)s)")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    found = []
    for name in given.fleet.split(","):
        hosts = FLEETS[name] if name in FLEETS else fleet.fleet(name).hosts
        share = rate_of_a_share(hosts, given.seconds / 3)
        found += [case(name, hosts, part * share, given.seconds) for part in ASKED]
    if given.json:
        print(json.dumps([asdict(each) for each in found], indent=2))
        return
    print(f"{'fleet':10} {'asked':>6} {'least':>6} {'complete':>9} {'goodput':>8} {'alone':>6}")
    for each in found:
        print(
            f"{each.fleet:10} {each.asked:6.2f} {each.least:6.2f} {each.complete:9.3f} {each.goodput:8.3f} "
            f"{each.goodput_alone:6.3f}"
        )


if __name__ == "__main__":
    main()
