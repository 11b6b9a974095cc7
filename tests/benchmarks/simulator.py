"""How fast the simulator is: requests per minute of one core, per policy.

    python -m tests.benchmarks.simulator [TRACE] [--policy A,B,...] [--rate R]

Without a trace, one is made: prompts of 100 to 8,000 tokens, a third of them with a prefix that others share, on the
yardstick fleet at 2 requests/s, which is 3/4 of what it can do and more. Processor time is counted, not wall time, so
that other work on the machine counts as little as possible; the best of three runs is shown. Wanted are 250,000
requests a minute for the baselines, and 100,000 for a policy of ours.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path

from control_plane.simulation.baselines import BASELINES
from control_plane.simulation.fleet import fleet
from control_plane.simulation.harness import simulate
from control_plane.simulation.policies import POLICIES, makers
from control_plane.simulation.traces import BLOCK_TOKENS, Job, Trace, read, trace

RUNS = 3
REQUESTS = 10_000


def made(seed: int = 1) -> Trace:
    """A trace with prefixes in common."""
    rng = random.Random(seed)
    entries = []
    arrival = 0.0
    for number in range(REQUESTS):
        arrival += rng.expovariate(1.0)
        prompt = int(min(100 * 2 ** rng.uniform(0, 6.4), 8000))
        shared = rng.randrange(200) if rng.random() < 1 / 3 else 1000 + number
        blocks = tuple(shared * 1000 + place for place in range(prompt // BLOCK_TOKENS))
        entries.append((Job(0, arrival, prompt, blocks), 1 + int(rng.expovariate(1 / 80))))
    return trace("made", entries)


def per_minute(given: Trace, policy: str) -> float:
    """The best of some runs."""
    hosts = fleet("yardstick").hosts
    best = 0.0
    for _ in range(RUNS):
        (maker,) = makers(policy, 0).values()
        started = time.process_time()
        simulate(given, hosts, maker)
        best = max(best, len(given.jobs) / (time.process_time() - started) * 60.0)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", nargs="?", type=Path)
    parser.add_argument("--policy", default=",".join([*POLICIES, "oracle_late_slack"]))
    parser.add_argument("--rate", type=float, default=2.0, help="arrivals per second (%(default)s)")
    arguments = parser.parse_args()
    given = (read(arguments.trace) if arguments.trace else made()).at_rate(arguments.rate)
    print(f"{given.name}: {len(given.jobs)} requests at {arguments.rate:g}/s")
    print(f"{'policy':24} {'requests/min':>12}  wanted")
    for policy in arguments.policy.split(","):
        wanted = ">= 250000" if policy in BASELINES else "" if policy.startswith("oracle") else ">= 100000"
        print(f"{policy:24} {per_minute(given, policy):12,.0f}  {wanted}")


if __name__ == "__main__":
    main()
