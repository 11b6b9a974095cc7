"""The comparison of the simulator, live: one slice of a trace, on a fleet of simulated engines, over real gRPC.

    python -m tests.benchmarks.live --trace TRACE [--minutes 10] [--speed 1] [--load 0.75] [--json] [--quick]

Every host of the fleet is a model server process with the simulated engine, at the host's speeds, slots and cache. The
requests of the slice are sent open loop, each when its time has come: under `modelyard` to a control plane of this
process, in its default settings, which relays them; under the baselines by a relay of the benchmark, which asks the
simulator's own code for the server and calls it. Beside each live row stands what the simulator says of the same slice,
fleet and rate, and both say how well modelyard foretells: |expected - measured| / the greater of the two, of the TTFT
from the dispatch, over all requests that were answered. `--load` is a share of the capacity that the simulator finds
for the whole trace.

With `--speed 4` all durations of the engines, arrivals, objectives and time-outs are a quarter, and figures are scaled
back. What does not scale are the calls themselves, the 50 ms in which a control plane looks at the clock, and the times
that it does not let anybody set, such as the second before a first token can be overdue: so 1 is the true figure.

All of it has to fit into the machine. A run in which one process took more than 70 % of a core, or in which timers of
the client and the control plane were late, is void, and says so.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import resource
import sys
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from control_plane.app import running
from control_plane.config import ControlPlaneSettings, SelectionSettings
from control_plane.simulation import compare, fleet, traces
from control_plane.simulation.baselines import BASELINES
from control_plane.simulation.engine import HostSpec
from control_plane.simulation.harness import Settings, World, blind, simulate
from control_plane.simulation.metrics import Summary, summary
from control_plane.simulation.ours import Ours
from control_plane.simulation.traces import BLOCK_TOKENS, Trace
from modelyard.program.process import run
from modelyard.rpc.channels import channel
from tests.benchmarks.relay import cpu_seconds
from tests.benchmarks.replay import (
    MODEL,
    Stopwatch,
    ThroughBaseline,
    ThroughControlPlane,
    all_ready,
    foretold,
    replay,
)
from tests.harness.programs import Program, simulated_server, until

OURS = "modelyard"
DEFAULT = (OURS, "least_inflight", "round_robin")
BUSY = 0.7
"""Share of a core of one process from which on a run is void."""
LATE = 0.1
"""The 99th percentile of the lateness of timers, seconds of the trace, from which on it is: 5 % of the shortest TTFT
that is wanted."""
CONTEXT = 2**20


@dataclass(frozen=True)
class Foretold:
    """How well TTFT was foretold."""

    requests: int
    median_error: float
    """|expected - measured| / the greater of the two."""
    p90_error: float


@dataclass(frozen=True)
class Row:
    """One policy, live or simulated."""

    policy: str
    live: bool
    summary: Summary
    foretold: Foretold | None = None
    own_cpu: float = 0.0
    """Cores that client, control plane and relay took, which are one process."""
    server_cpu: float = 0.0
    """Cores that the busiest model server took."""
    lateness: float = 0.0
    """99th percentile of the lateness of timers, seconds of the trace."""

    @property
    def void(self) -> bool:
        """Whether the machine was too slow for the run to count."""
        return max(self.own_cpu, self.server_cpu) > BUSY or self.lateness > LATE


def judged(pairs: Sequence[tuple[float, float]]) -> Foretold | None:
    if not pairs:
        return None
    expected, measured = np.array(pairs).T
    errors = np.abs(expected - measured) / np.maximum(expected, measured)
    return Foretold(len(pairs), float(np.median(errors)), float(np.quantile(errors, 0.9)))


# ---------------------------------------------------------------- simulated ---


def simulated(policy: str, trace: Trace, hosts: Sequence[HostSpec], settings: Settings) -> Row:
    """What the simulator says."""
    pairs: list[tuple[float, float]] = []

    def ours(world: World) -> Ours:
        made = Ours(world.infos, world.streams, 0)
        nonlocal pairs
        pairs = foretold(made._fleet)
        return made

    maker = ours if policy == OURS else blind(BASELINES[policy])
    return Row(policy, False, summary(simulate(trace, hosts, maker, settings=settings)), judged(pairs))


# --------------------------------------------------------------------- live ---


def engine(spec: HostSpec, speed: float) -> dict[str, Any]:
    """Settings of the simulated engine for a host of the simulator."""
    if spec.models:
        raise SystemExit(f"{spec.id}: hosts that serve some models only are for the simulator alone")
    return {
        "models": [{"name": MODEL, "load_seconds": spec.load_seconds, "state": "cold" if spec.cold else "warm"}],
        "slots": spec.slots,
        "prefill_tokens_per_second": spec.prefill,
        "decode_tokens_per_second": spec.decode_single,
        "aggregate_tokens_per_second": spec.decode_aggregate,
        "prefill_interference": spec.interference,
        "block_tokens": BLOCK_TOKENS,
        "cache_blocks": spec.cache_tokens // BLOCK_TOKENS,
        "context_length": CONTEXT,
        "device": spec.hardware,
        "told_answers": True,
        "time_scale": 1.0 / speed,
    }


@contextlib.asynccontextmanager
async def servers(hosts: Sequence[HostSpec], address: str, speed: float) -> AsyncIterator[dict[str, Program]]:
    """Model servers that report to a control plane, by id. A queue of their own holds what a baseline sends too many;
    nobody is taken for stuck over a prompt of minutes."""
    async with contextlib.AsyncExitStack() as stack:
        patient = ("--max-waiting", "100000", "--stall-seconds", "86400", "--canary-seconds", "0")
        programs = await asyncio.gather(
            *(
                stack.enter_async_context(
                    simulated_server(spec.id, address, *patient, "--log-level", "warning", **engine(spec, speed))
                )
                for spec in hosts
            )
        )
        yield dict(zip((spec.id for spec in hosts), programs, strict=True))


def scaled(speed: float, patience: float) -> ControlPlaneSettings:
    """The default settings, with all times divided by `speed`; requests wait as long as their clients."""
    usual = SelectionSettings()
    times = (
        "ttft_objective", "ttft_objective_per_prompt_token", "tpot_objective", "late_binding", "latency_reference",
        "prior_ttft", "prior_tpot", "prior_load_time",
    )  # fmt: skip
    return ControlPlaneSettings.model_validate(
        {
            "port": 0,
            "metrics_port": -1,
            "gateway": {"port": -1},
            "tasks": {"store": ""},
            "drain_grace": 1.0,
            "fleet": {"report_interval": 1.0 / speed},
            "queue": {"timeout": dict.fromkeys(("low", "normal", "high", "critical"), patience / speed)},
            "selection": {name: getattr(usual, name) / speed for name in times},
        }
    )


async def lived(
    policies: Sequence[str], trace: Trace, hosts: Sequence[HostSpec], settings: Settings, speed: float
) -> list[Row]:
    """One policy after the other on the same servers; prompts differ from run to run, so that none finds the caches of
    the one before."""
    rows = []
    async with contextlib.AsyncExitStack() as stack:
        plane, address = await stack.enter_async_context(running(scaled(speed, settings.client_timeout)))
        pairs = foretold(plane.fleet)
        programs = await stack.enter_async_context(servers(hosts, address, speed))

        async def ready() -> bool:
            return all_ready(plane.fleet, len(hosts))

        await until(ready, 30)
        front = await stack.enter_async_context(channel(address, own_connection=True))
        links: dict[str, grpc.aio.Channel] = {}
        for name, program in programs.items():
            links[name] = await stack.enter_async_context(channel(program.address, own_connection=True))
        for number, policy in enumerate(policies):
            watch = Stopwatch(speed)
            if policy == OURS:
                serve = ThroughControlPlane(front, watch).serve
            else:
                infos = [spec.info for spec in hosts]
                serve = ThroughBaseline(BASELINES[policy], infos, links, watch, 0).serve
            before = {name: cpu_seconds(program.pid) for name, program in programs.items()}
            own, began = _own_cpu(), asyncio.get_running_loop().time()
            result = await replay(trace, serve, watch, f"run{number}", settings)
            took = asyncio.get_running_loop().time() - began
            rows.append(
                Row(
                    policy,
                    True,
                    summary(result),
                    judged(pairs) if policy == OURS else None,
                    (_own_cpu() - own) / took,
                    max(cpu_seconds(program.pid) - before[name] for name, program in programs.items()) / took,
                    float(np.quantile(watch.lateness, 0.99)) * speed,
                )
            )
            print(f"{policy}: {took:.0f} s", file=sys.stderr)
    return rows


def _own_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


# -------------------------------------------------------------------- shown ---


COLUMNS = (
    "policy", "", "goodput", "TTFT p50", "p99", "errors", "truncated", "prefix hits", "TTFT foretold: median error",
    "p90", "CPU", "of a server", "late",
)  # fmt: skip


def cells(row: Row) -> list[str]:
    found, told = row.summary, row.foretold
    return [
        row.policy,
        "live" if row.live else "simulated",
        f"{found.goodput:.3f}",
        f"{found.ttft_p50:.2f}",
        f"{found.ttft_p99:.1f}",
        " ".join((f"{found.errors:.3f}", *(f"{kind}:{count}" for kind, count in found.kinds.items()))),
        f"{found.truncated:.3f}",
        f"{found.prefix_hits:.3f}",
        f"{told.median_error:.1%} of {told.requests}" if told else "-",
        f"{told.p90_error:.1%}" if told else "-",
        f"{row.own_cpu:.0%}" if row.live else "-",
        f"{row.server_cpu:.0%}" if row.live else "-",
        (f"{row.lateness * 1e3:.0f} ms" + (" VOID" if row.void else "")) if row.live else "-",
    ]


def table(rows: Sequence[Row]) -> str:
    lines = [list(COLUMNS), *map(cells, rows)]
    widths = [max(len(line[place]) for line in lines) for place in range(len(COLUMNS))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", required=True, type=Path, help="as for `modelyard simulate`")
    parser.add_argument("--fleet", default="yardstick", help="likewise (%(default)s)")
    parser.add_argument("--load", type=float, default=0.75, help="share of the capacity (%(default)s)")
    parser.add_argument("--rate", type=float, help="arrivals per second instead")
    parser.add_argument("--minutes", type=float, default=10.0, help="of the trace, at that rate (%(default)g)")
    parser.add_argument("--start", type=float, default=0.0, help="where in it, in minutes (%(default)g)")
    parser.add_argument("--speed", type=float, default=1.0, help="seconds of the trace in a real second (%(default)g)")
    parser.add_argument("--policy", default=",".join(DEFAULT), help="(%(default)s)")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true", help="half a minute in all: for trying the benchmark itself")
    found = parser.parse_args()
    if found.quick:
        found.minutes, found.speed, found.policy = 0.5, 4.0, ",".join(DEFAULT[:2])
    unknown = [name for name in found.policy.split(",") if name != OURS and name not in BASELINES]
    if unknown:
        parser.error(f"--policy: {', '.join(unknown)}: there are {', '.join((OURS, *BASELINES))}")
    return found


def main() -> int:
    given = _arguments()
    hosts, whole = fleet.fleet(given.fleet).hosts, traces.read(given.trace)
    capacity = None if given.rate else compare.capacity(whole, hosts)
    rate = given.rate or given.load * capacity
    start = 60.0 * given.start
    trace = whole.at_rate(rate).between(start, start + 60.0 * given.minutes)
    settings = Settings(client_timeout=20.0 if given.quick else 120.0)
    policies = given.policy.split(",")
    rows: list[Row] = []

    async def measured() -> int:
        rows.extend(await lived(policies, trace, hosts, settings, given.speed))
        return 0

    run(measured())
    rows += [simulated(policy, trace, hosts, settings) for policy in policies]
    rows.sort(key=lambda row: (policies.index(row.policy), not row.live))
    if given.json:
        facts = {"trace": trace.name, "requests": len(trace.jobs), "rate": rate, "capacity": capacity}
        shown = [{**asdict(row), "void": row.void} for row in rows]
        print(json.dumps({**facts, "minutes": given.minutes, "speed": given.speed, "rows": shown}, indent=2))
    else:
        share = "" if capacity is None else f", {given.load:.0%} of the capacity that least in-flight sustains"
        print(f"{trace.name}: {len(trace.jobs)} requests in {given.minutes:g} minutes, {rate:.2f} a second{share}")
        print(f"{len(hosts)} model servers, {given.speed:g} seconds of the trace in one; times in seconds of the trace")
        print(table(rows))
    return 1 if any(row.void for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
