"""What a unary call costs when it shares a stream (modelyard/v1/calls.proto), against a plain one, in one run.

    python -m tests.benchmarks.calls [--json] [--quick]

One asyncio client calls ListModels of a control plane without servers: a call that does next to nothing, so that what
is measured is the calling. Plain and shared calls take turns over one connection; figures are medians of turns.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from typing import Any

from modelyard.program.process import run
from modelyard.rpc.calls import SharedChannel
from modelyard.rpc.channels import channel
from modelyard.v1 import orchestrator_pb2
from modelyard.v1.orchestrator_pb2_grpc import OrchestratorStub
from tests.benchmarks.relay import cpu_seconds
from tests.harness.programs import control_plane


@dataclass(frozen=True)
class Row:
    """One measured figure of both ways."""

    what: str
    plain: float
    shared: float
    unit: str


@dataclass(frozen=True)
class Turn:
    """Calls per second, p50 in seconds, CPU seconds per call of client and server."""

    rate: float
    p50: float
    client: float
    server: float


async def joined(link: SharedChannel) -> None:
    """Call until calls share a stream."""
    stub = OrchestratorStub(link)
    async with asyncio.timeout(10):
        while not link.shared:
            await stub.ListModels(orchestrator_pb2.ListModelsRequest())


async def turn(call: Callable[[], Awaitable[Any]], calls: int, concurrency: int, pid: int) -> Turn:
    """So many calls, so many at a time."""
    left, times = iter(range(calls)), []

    async def worker() -> None:
        for _ in left:
            began = time.perf_counter()
            await call()
            times.append(time.perf_counter() - began)

    own, theirs, began = time.process_time(), cpu_seconds(pid), time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(concurrency)))
    seconds = time.perf_counter() - began
    return Turn(
        calls / seconds,
        statistics.median(times),
        (time.process_time() - own) / calls,
        (cpu_seconds(pid) - theirs) / calls,
    )


async def measure(quick: bool) -> list[Row]:
    """Everything."""
    rows = []
    async with control_plane("--log-level", "warning") as plane:
        link = SharedChannel(channel(plane.address))
        await joined(link)
        ways = [OrchestratorStub(each).ListModels for each in (link.plain, link)]
        for concurrency in (1, 16, 64):
            calls = (300 if quick else 3000) * (1 if concurrency == 1 else 2)
            turns: list[list[Turn]] = [[], []]
            for number in range(6):
                for way, taken in zip(ways, turns, strict=True):
                    made = await turn(
                        lambda way=way: way(orchestrator_pb2.ListModelsRequest(), timeout=30),
                        calls, concurrency, plane.pid,
                    )  # fmt: skip
                    if number:  # the first turn warms up
                        taken.append(made)
            for name, unit, factor, what in (
                ("rate", "1/s", 1.0, "calls per second"),
                ("p50", "ms", 1e3, "p50"),
                ("client", "µs", 1e6, "client CPU per call"),
                ("server", "µs", 1e6, "control plane CPU per call"),
            ):
                plain, shared = (factor * statistics.median(getattr(t, name) for t in taken) for taken in turns)
                rows.append(Row(f"{concurrency} at a time: {what}", plain, shared, unit))
        await link.close()
    return rows


async def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON array instead of the table")
    parser.add_argument("--quick", action="store_true", help="a tenth of the work: for trying the benchmark itself")
    given = parser.parse_args()
    table = await measure(given.quick)
    if given.json:
        json.dump([asdict(row) for row in table], sys.stdout, indent=1)
        return 0
    print(f"{'figure':44} {'plain':>10} {'shared':>10} {'':4} {'ratio':>6}")
    for row in table:
        print(f"{row.what:44} {row.plain:10,.2f} {row.shared:10,.2f} {row.unit:4} {row.shared / row.plain:6.2f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main()))
