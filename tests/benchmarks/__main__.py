"""All benchmarks as one table, with ratios to the direct call to a model server.

    python -m tests.benchmarks [--json] [--quick]

Everything runs on loopback with real processes: one control plane, one model server with the
simulated engine in its instant mode. Throughput is driven by h2load (C, from Debian's
nghttp2-client), which posts one gRPC-framed request again and again; that every call really
succeeded is read from the control plane's own metrics. Added latency is measured with one
asyncio client that takes turns between the direct and the relayed call.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from tests.benchmarks import relay, startup
from tests.benchmarks import select as selection


@dataclass(frozen=True)
class Row:
    """One measured figure."""

    what: str
    value: float
    unit: str
    ratio: str = ""
    """To the direct call, measured in the same run."""
    bar: str = ""
    """What the project wants of it."""


def rows(quick: bool) -> Iterator[Row]:
    for name, value in selection.run().items():
        yield Row(f"select(): {name}", value, "µs", bar="< 100" if name.startswith("select, 100 ") else "")
    figures = asyncio.run(relay.run(quick))
    yield Row("direct: chunks", figures.direct_chunks, "1/s")
    yield Row(
        "relayed: chunks", figures.relayed_chunks, "1/s",
        f"{figures.relayed_chunks / figures.direct_chunks:.2f}", ">= 10000",
    )  # fmt: skip
    yield Row("direct: short Generate", figures.direct_calls, "1/s")
    yield Row(
        "relayed: short Generate", figures.relayed_calls, "1/s",
        f"{figures.relayed_calls / figures.direct_calls:.2f}", ">= 1000",
    )  # fmt: skip
    yield Row("control plane CPU per short Generate", figures.cpu_per_call * 1e6, "µs")
    yield Row("control plane CPU per relayed chunk", figures.cpu_per_chunk * 1e6, "µs")
    yield Row("direct: TTFT p50", figures.direct_ttft * 1e3, "ms")
    yield Row(
        "relayed: TTFT p50", figures.relayed_ttft * 1e3, "ms", f"{figures.relayed_ttft / figures.direct_ttft:.2f}"
    )
    yield Row("added TTFT p50", figures.added_ttft * 1e3, "ms", bar="< 2")
    yield Row("idle control plane RSS", figures.idle_rss / 2**20, "MB", bar="< 90")
    for name, value in startup.run(quick).items():
        yield Row(name, value, "s", bar="< 0.4")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON array instead of the table")
    parser.add_argument("--quick", action="store_true", help="a tenth of the work: for trying the benchmark itself")
    arguments = parser.parse_args()
    table = list(rows(arguments.quick))
    if arguments.json:
        json.dump([asdict(row) for row in table], sys.stdout, indent=1)
        return
    print(f"{'figure':44} {'value':>12} {'':4} {'ratio':>6}  wanted")
    for row in table:
        print(f"{row.what:44} {row.value:12,.2f} {row.unit:4} {row.ratio:>6}  {row.bar}")


if __name__ == "__main__":
    main()
