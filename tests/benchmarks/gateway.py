"""What the OpenAI-compatible gateway adds to an instant upstream, measured with one client in one run.

    python -m tests.benchmarks.gateway [--engine openai_compatible|simulated] [--json] [--quick]

Everything runs on loopback with real processes. The client is h2load (C, from Debian's
nghttp2-client) over HTTP/1.1. It calls the upstream directly and through modelyard: gateway and
control plane (one process), a model server with the engine `openai_compatible`, the upstream. With
`--engine simulated` the model server answers by itself, in its instant mode: that leaves out what the
engine's own HTTP costs. Turns alternate, figures are medians of turns.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import shutil
import statistics
import sys
import tempfile
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import aiohttp

from tests.benchmarks.relay import SLOTS, cpu_seconds
from tests.harness.programs import Program, control_plane, program, simulated_server, until

SHORT, LONG = 1, 1000  # pieces of an answer
PATH = "/v1/chat/completions"
JSON = {"content-type": "application/json"}

# Measured elsewhere on 2 cores: LiteLLM 93 requests a second and 14 ms; the goal is 15 times the
# throughput and a fifth of the added latency. SMG, a relay in Rust: 10,100 and 0.35 ms.
WANTED_RATE, WANTED_MS = 15 * 93, 14 / 5


@dataclass(frozen=True)
class Row:
    """One measured figure."""

    what: str
    direct: float
    through: float
    unit: str
    wanted: str = ""

    @property
    def ratio(self) -> float:
        return self.through / self.direct


@dataclass(frozen=True)
class Load:
    """One run of h2load."""

    seconds: float
    latencies: list[float]
    """Seconds of each request."""


def body(tokens: int, *, stream: bool, model: str = "auto") -> bytes:
    messages = [{"role": "user", "content": "What is modelyard?"}]
    return json.dumps({"model": model, "messages": messages, "max_tokens": tokens, "stream": stream}).encode()


async def h2load(address: str, content: bytes, requests: int, concurrency: int) -> Load:
    """Post `content` so many times; raises unless every request was answered with 200."""
    with tempfile.TemporaryDirectory() as folder:
        file, log = Path(folder) / "body", Path(folder) / "log"
        file.write_bytes(content)
        process = await asyncio.create_subprocess_exec(
            "h2load", "--h1", "-n", str(requests), "-c", str(concurrency), "-d", str(file),
            f"--log-file={log}", "-H", "content-type: application/json", f"http://{address}{PATH}",
            stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        output = (await process.communicate())[0].decode()
        lines = [line.split("\t") for line in log.read_text().splitlines()]
    found = re.search(r"finished in ([\d.]+)(ms|s)", output)
    if process.returncode or not found or [line[1] for line in lines] != ["200"] * requests:
        raise RuntimeError(f"h2load failed:\n{output}")
    seconds = float(found[1]) / (1000 if found[2] == "ms" else 1)
    return Load(seconds, [int(line[2]) / 1e6 for line in lines])


async def pieces(address: str) -> int:
    """Events with text of one long stream, counted by a client that reads them."""
    found = 0
    async with (
        aiohttp.ClientSession() as client,
        client.post(f"http://{address}{PATH}", data=body(LONG, stream=True), headers=JSON) as answer,
    ):
        async for line in answer.content:
            found += b'"content":' in line
    return found


async def run(engine: str, quick: bool) -> list[Row]:
    """Start everything and measure."""
    if shutil.which("h2load") is None:
        raise SystemExit("h2load is needed: apt-get install nghttp2-client")
    async with AsyncExitStack() as stack:
        upstream = await stack.enter_async_context(program("tests.benchmarks.upstream"))
        plane = await stack.enter_async_context(control_plane("--log-level", "warning"))
        if engine == "simulated":
            server = await stack.enter_async_context(
                simulated_server("bench", plane.address, instant=True, answer_tokens=LONG, slots=SLOTS)
            )
        else:
            settings = {"base_url": f"http://{upstream.address}/v1", "slots": SLOTS}
            server = await stack.enter_async_context(
                program(
                    "model_servers", "--engine", engine, "--server-id", "bench",
                    "--orchestrators", json.dumps([plane.address]), "--engine-settings", json.dumps(settings),
                )
            )  # fmt: skip
        gateway = str(plane.facts["gateway"]).removeprefix("http://")

        async def live() -> bool:
            async with aiohttp.ClientSession() as client, client.get(f"http://{gateway}/v1/models") as answer:
                return bool((await answer.json())["data"])

        await until(live)
        return await _measure(upstream.address, gateway, plane, server, 0.1 if quick else 1.0)


async def _measure(direct: str, gateway: str, plane: Program, server: Program, scale: float) -> list[Row]:
    for address in (direct, gateway):
        if (found := await pieces(address)) != LONG:
            raise RuntimeError(f"{address} sent {found} of {LONG} pieces")

    async def turns(content: bytes, requests: int, concurrency: int) -> tuple[Load, Load, float, float]:
        """The middle turns, and CPU seconds per request of control plane and model server."""
        requests = max(concurrency, int(requests * scale))
        straight, through, cpu = [], [], []
        for turn in range(4):
            there = await h2load(direct, content, requests, concurrency)
            before = cpu_seconds(plane.pid), cpu_seconds(server.pid)
            here = await h2load(gateway, content, requests, concurrency)
            after = cpu_seconds(plane.pid), cpu_seconds(server.pid)
            if turn:  # the first turn warms up
                straight.append(there)
                through.append(here)
                cpu.append([(b - a) / requests for a, b in zip(before, after, strict=True)])

        def middle(loads: list[Load]) -> Load:
            return sorted(loads, key=lambda load: load.seconds)[len(loads) // 2]

        control, model = (statistics.median(column) for column in zip(*cpu, strict=True))
        return middle(straight), middle(through), control, model

    rows = []
    short = body(SHORT, stream=False)
    one_direct, one_through, *_ = await turns(short, 2000, 1)
    p50 = [statistics.median(load.latencies) * 1e3 for load in (one_direct, one_through)]
    rows.append(Row("latency p50 at concurrency 1", p50[0], p50[1], "ms"))
    rows.append(Row("added latency p50", p50[0], p50[1] - p50[0], "ms", f"< {WANTED_MS:.1f}"))
    many = max(16, int(8000 * scale))
    direct_load, through_load, control, model = await turns(short, 8000, 16)
    rows.append(
        Row("requests at concurrency 16", many / direct_load.seconds, many / through_load.seconds, "1/s",
            f">= {WANTED_RATE}")
    )  # fmt: skip
    rows.append(Row("control plane CPU per request", 0.0, control * 1e6, "µs"))
    rows.append(Row("model server CPU per request", 0.0, model * 1e6, "µs"))
    streams = max(8, int(64 * scale))
    direct_load, through_load, control, model = await turns(body(LONG, stream=True), 64, 8)
    rows.append(
        Row("streamed chunks", streams * LONG / direct_load.seconds, streams * LONG / through_load.seconds, "1/s")
    )
    rows.append(Row("control plane CPU per chunk", 0.0, control * 1e6 / LONG, "µs"))
    rows.append(Row("model server CPU per chunk", 0.0, model * 1e6 / LONG, "µs"))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", default="openai_compatible", help="engine of the model server in between")
    parser.add_argument("--json", action="store_true", help="one JSON array instead of the table")
    parser.add_argument("--quick", action="store_true", help="a tenth of the work: for trying the benchmark itself")
    arguments = parser.parse_args()
    table = asyncio.run(run(arguments.engine, arguments.quick))
    if arguments.json:
        json.dump([asdict(row) for row in table], sys.stdout, indent=1)
        return
    print(f"{'figure':32} {'direct':>12} {'through':>12} {'':4} {'ratio':>7}  wanted")
    for row in table:
        direct = f"{row.direct:12,.2f}" if row.direct else " " * 12
        ratio = f"{row.ratio:7.2f}" if row.direct else " " * 7
        print(f"{row.what:32} {direct} {row.through:12,.2f} {row.unit:4} {ratio}  {row.wanted}")


if __name__ == "__main__":
    main()
