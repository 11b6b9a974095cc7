"""What direct mode costs: Assign calls per second, and the latency that one adds to a call of the model server itself.

    python -m tests.benchmarks.direct [--quick]

Assign is driven by h2load, a C client. Each of its calls takes a slot of a model server that has 256, so it goes on
only as fast as slots are given back. They are given back as in life, by outcomes in reports on the report stream, each
with result and timings; but the server that sends them is a stand-in, for a real one in Python would be what is
measured. h2load does not show it the tickets: it reads from ListModelServers how many slots are reserved, fifty times a
second, and reports as many of the oldest; ids of tickets are consecutive. That every ticket was signed, counted as done
and learned from is read from the control plane's metrics in the end. What any call costs, whatever it does, is that of
a health check of the same process in the same run.

The SDK's calls share a stream, which h2load does not speak: the same is measured with one asyncio client that makes 64
calls at a time over one connection, and takes its share of the machine.

The added latency is that of the whole cycle with real programs: one asyncio client takes turns between calling the
model server, and Assign followed by the same call with its ticket, Assign once as a plain call and once over a stream
as the SDK makes it. Beside it stands one Assign as h2load sees it.

What tickets ahead of need make of it is measured in a run of its own, once with a pause after each call, and once back
to back, where taking the ticket competes with the call itself for the machine: Assign over a stream and the call, the
same with the ticket taken ahead by the class that does so in the SDK, and the SDK's direct calls without and with it,
its own work included; each against the plain call.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import re
import statistics
import struct
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from modelyard.client._ahead import TicketsAhead
from modelyard.client._direct import DirectCall, Hosts
from modelyard.rpc.calls import SharedChannel
from modelyard.rpc.channels import channel
from modelyard.testing import model_info
from modelyard.v1 import fleet_pb2, generation_pb2, model_server_pb2, orchestrator_pb2, ticket_pb2
from modelyard.v1.orchestrator_pb2_grpc import OrchestratorStub
from tests.benchmarks.calls import Turn, joined, turn
from tests.benchmarks.relay import MODEL_SERVER, SLOTS, cpu_seconds, request
from tests.harness.programs import Program, control_plane, simulated_server, until

ASSIGN = "/modelyard.v1.Orchestrator/Assign"
HEALTH = "/grpc.health.v1.Health/Check"


@dataclass(frozen=True)
class Figures:
    """Rates per second, times in seconds."""

    assigned: float
    assigned_cpu: float
    shared: float
    shared_cpu: float
    bare: float
    bare_cpu: float
    bare_p50: float
    assign_p50: float
    call_p50: float
    added_p50: float
    added_shared_p50: float
    client_call_p50: float


@dataclass(frozen=True)
class Ahead:
    """Medians, seconds."""

    call: float
    """The plain call."""
    added: list[float]
    """By Assign, by a ticket ahead, by the SDK's direct call without and with one."""
    early: float
    """Share of the calls with tickets ahead that had one."""
    asked: float
    """Assign calls for each of those calls."""


def assignment() -> bytes:
    outline = orchestrator_pb2.GenerateRequest()
    outline.input.sampling.max_tokens = 1
    return orchestrator_pb2.AssignRequest(request=outline, prompt_tokens=5).SerializeToString()


async def h2load(address: str, path: str, body: bytes, calls: int, concurrency: int) -> tuple[float, float]:
    """Calls per second, and the median of their seconds."""
    with tempfile.TemporaryDirectory() as folder:
        file, log = Path(folder) / "body", Path(folder) / "log"
        file.write_bytes(struct.pack(">BI", 0, len(body)) + body)
        connections = min(4, concurrency)
        process = await asyncio.create_subprocess_exec(
            "h2load", "-n", str(calls), "-c", str(connections), "-m", str(max(1, concurrency // connections)),
            "-d", str(file), "-H", "content-type: application/grpc", "-H", "te: trailers", f"--log-file={log}",
            f"http://{address}{path}",
            stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        output = (await process.communicate())[0].decode()
        found = re.search(r"finished in ([\d.]+)(ms|s)", output)
        if process.returncode or not found or f" {calls} succeeded" not in output:
            raise RuntimeError(f"h2load failed:\n{output}")
        taken = float(found[1]) / (1000 if found[2] == "ms" else 1)
        return calls / taken, statistics.median(int(line.split()[2]) for line in log.read_text().splitlines()) / 1e6


class StandIn:
    """The report stream of a model server that has answered every ticket as soon as it hears of it."""

    def __init__(self, stub: OrchestratorStub) -> None:
        self._stub = stub
        self._answered = 0
        self.acknowledged = 0
        self._orchestrator_id = ""
        self._epoch = 0
        self._clock = 0.0

    def _report(self, whole: bool, outcomes: int = 0) -> fleet_pb2.ServerReport:
        report = fleet_pb2.ServerReport(lease_epoch=self._epoch)
        if whole:
            report.identity.server_id, report.identity.instance_id = "stand-in", "1"
            report.identity.endpoint, report.engine.name = "127.0.0.1:1", "none"
            report.models.append(model_info())
            report.load.slots, report.health = SLOTS, fleet_pb2.SERVER_HEALTH_READY
        report.tickets.orchestrator_id = self._orchestrator_id
        for _ in range(outcomes):
            self._answered += 1
            result = generation_pb2.GenerationResult(
                finish_reason=generation_pb2.FINISH_REASON_LENGTH,
                usage=generation_pb2.Usage(prompt_tokens=5, completion_tokens=1),
            )
            result.timings.ttft.nanos = result.timings.total.nanos = 1_000_000
            report.tickets.outcomes.append(
                ticket_pb2.TicketOutcome(sequence=self._answered, ticket_id=self._answered, result=result)
            )
        return report

    async def run(self, ready: asyncio.Event) -> None:
        call = self._stub.Attach()
        await call.write(self._report(True))
        directive = await call.read()
        self._orchestrator_id, self._epoch = directive.orchestrator_id, directive.lease_epoch
        await call.write(self._report(True))
        reader = asyncio.create_task(self._read(call))
        ready.set()
        whole = time.monotonic()
        try:
            while not reader.done():
                servers = (await self._stub.ListModelServers(orchestrator_pb2.ListModelServersRequest())).servers
                if time.monotonic() > whole + 0.5:
                    whole = time.monotonic()
                    await call.write(self._report(True))
                if servers[0].assigned:
                    await call.write(self._report(False, servers[0].assigned))
                await asyncio.sleep(0.015)
        finally:
            reader.cancel()
            call.cancel()

    async def _read(self, call: grpc.aio.StreamStreamCall) -> None:
        while (directive := await call.read()) is not grpc.aio.EOF:
            self.acknowledged = directive.tickets.acknowledged


@contextlib.asynccontextmanager
async def stand_in(stub: OrchestratorStub) -> AsyncIterator[StandIn]:
    server, ready = StandIn(stub), asyncio.Event()
    task = asyncio.create_task(server.run(ready))
    try:
        await ready.wait()
        yield server
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def counted(plane: Program, method: str) -> float:
    """Calls that the control plane has counted as ok."""
    with urllib.request.urlopen(str(plane.facts["metrics"])) as answer:
        pattern = rb'modelyard_requests_total\{method="%b",outcome="ok"\} ([\d.e+]+)' % method.encode()
        found = re.search(pattern, answer.read())
    return float(found[1]) if found else 0.0


async def throughput(scale: float) -> tuple[tuple[float, float, float], tuple[float, float, float], Turn]:
    """Of Assign and of a health check: calls per second at concurrency 64, CPU seconds of the control plane for each,
    p50 at concurrency 1. Then the same of Assign over a stream."""
    calls = int(20_000 * scale)
    async with control_plane("--log-level", "warning") as plane, channel(plane.address) as link:
        async with stand_in(OrchestratorStub(link)) as server:
            rates: list[list[float]] = []
            shared: list[Turn] = []
            sharing = SharedChannel(channel(plane.address, own_connection=True))
            await joined(sharing)
            assign = sharing.unary_unary(ASSIGN)
            outline = assignment()
            for number in range(4):
                row = [float(number)]
                for path, body in ((ASSIGN, assignment()), (HEALTH, b"")):
                    cpu = cpu_seconds(plane.pid)
                    rate, _ = await h2load(plane.address, path, body, calls, 64)
                    row += [rate, (cpu_seconds(plane.pid) - cpu) / calls]
                    row.append((await h2load(plane.address, path, body, calls // 4, 1))[1])
                rates.append(row)
                shared.append(await turn(lambda: assign(outline, timeout=30), calls, 64, plane.pid))
            await sharing.close()
            _, *assigned = (statistics.median(column) for column in zip(*rates[1:], strict=True))  # the first warms up
            made = 4 * (2 * calls + calls // 4)

            async def all_done() -> bool:
                return server.acknowledged == counted(plane, "Direct") == counted(plane, "Assign") == made

            await until(all_done)
            best = sorted(shared[1:], key=lambda each: each.rate)[1]
            return (assigned[0], assigned[1], assigned[2]), (assigned[3], assigned[4], assigned[5]), best


async def latency(scale: float) -> tuple[float, float, float, float]:
    """Seconds, medians: one call of the model server as h2load sees it; what Assign before it adds to a call as an
    asyncio client sees it, plain and over a stream, and that call without."""
    async with control_plane("--log-level", "warning") as plane, channel(plane.address) as link:
        stub = OrchestratorStub(link)
        async with simulated_server(
            "bench", plane.address, instant=True, answer_tokens=1, slots=SLOTS
        ) as server, channel(server.address) as straight:  # fmt: skip

            async def live() -> bool:
                try:
                    await stub.Assign(orchestrator_pb2.AssignRequest.FromString(assignment()))
                except grpc.aio.AioRpcError:
                    return False
                return True

            await until(live)
            plain = model_server_pb2.ModelServerGenerateRequest(model="simulated", input=request(1))
            _, call_p50 = await h2load(server.address, MODEL_SERVER, plain.SerializeToString(), int(4000 * scale), 1)
            generate = straight.unary_stream(MODEL_SERVER)
            sharing = SharedChannel(link)
            await joined(sharing)
            ways = [
                each.unary_unary(ASSIGN, response_deserializer=orchestrator_pb2.AssignResponse.FromString)
                for each in (link, sharing)
            ]
            outline, plain_body = assignment(), plain.SerializeToString()
            times: list[list[float]] = []
            for _ in range(int(2000 * scale)):
                began = time.perf_counter()
                await _whole(generate(plain_body))
                row = [time.perf_counter() - began]
                for assign in ways:
                    began = time.perf_counter()
                    assigned = await assign(outline)
                    plain.ticket = assigned.ticket
                    await _whole(generate(plain.SerializeToString()))
                    row.append(time.perf_counter() - began)
                times.append(row)
            await until(lambda: _settled(plane))
            added, shared = (statistics.median(row[way] - row[0] for row in times) for way in (1, 2))
            return call_p50, added, shared, statistics.median(row[0] for row in times)


async def ahead(turns: int, block: int, pause: float) -> Ahead:
    """Blocks of so many calls, with so many seconds between two calls; the ways take turns by blocks."""
    async with control_plane("--log-level", "warning") as plane, channel(plane.address) as link:
        async with simulated_server(
            "bench", plane.address, instant=True, answer_tokens=1, slots=SLOTS
        ) as server, channel(server.address) as straight:  # fmt: skip
            sharing = SharedChannel(link)
            await joined(sharing)
            ways = Ways(sharing, Hosts(plane.address), straight.unary_stream(MODEL_SERVER))

            async def live() -> bool:
                try:
                    await ways.fresh()
                except grpc.aio.AioRpcError:
                    return False
                return True

            await until(live)
            ways.made.clear()
            each: list[Callable[[], Awaitable[None]]] = [
                ways.plain, ways.fresh, ways.early, lambda: ways.sdk(None), lambda: ways.sdk(ways.tickets),
            ]  # fmt: skip
            rows: list[list[float]] = []
            for _ in range(turns):
                row = []
                for way in each:
                    times = []
                    for _ in range(block):
                        await asyncio.sleep(pause)
                        began = time.perf_counter()
                        await way()
                        times.append(time.perf_counter() - began)
                    row.append(statistics.median(times[block // 8 :]))  # the first may have no ticket yet
                rows.append(row)
            ways.tickets.close()
            await ways.hosts.close()
            calls = turns * block
            return Ahead(
                statistics.median(row[0] for row in rows),
                [statistics.median(row[way] - row[0] for row in rows) for way in range(1, len(each))],
                1 - (ways.made.count(False) - 2 * calls) / (2 * calls),
                (len(ways.made) - 2 * calls) / (2 * calls),
            )


class Ways:
    """To have a request answered."""

    def __init__(self, sharing: SharedChannel, hosts: Hosts, generate: grpc.aio.UnaryStreamMultiCallable) -> None:
        self._assign = sharing.unary_unary(ASSIGN, response_deserializer=orchestrator_pb2.AssignResponse.FromString)
        self.hosts = hosts
        self._generate = generate
        self.tickets = TicketsAhead()
        self.made: list[bool] = []
        """Of every Assign call, whether it was ahead."""
        self._wanted = orchestrator_pb2.AssignRequest.FromString(assignment())
        self._asked = model_server_pb2.ModelServerGenerateRequest(model="simulated", input=request(1))

    def Assign(self, wanted: orchestrator_pb2.AssignRequest, timeout: float | None) -> Any:
        """As the SDK calls it."""
        self.made.append(wanted.ahead)
        return self._assign(wanted.SerializeToString(), timeout=timeout)

    async def plain(self) -> None:
        self._asked.ticket = b""
        await _whole(self._generate(self._asked.SerializeToString()))

    async def fresh(self) -> None:
        self._asked.ticket = (await self.Assign(self._wanted, 30)).ticket
        await _whole(self._generate(self._asked.SerializeToString()))

    async def early(self) -> None:
        shape = self.tickets.shape(self._wanted)
        assert shape is not None
        followed = shape.begins()
        assigned = await shape.take(self._wanted.prompt_tokens) or await self.Assign(self._wanted, 30)
        self._asked.ticket = assigned.ticket
        call, sent = self._generate(self._asked.SerializeToString()), time.perf_counter()
        if followed:
            shape.begun(self, self._wanted)
        await _whole(call)
        shape.ended(self, self._wanted, time.perf_counter() - sent, followed=followed)

    async def sdk(self, tickets: TicketsAhead | None) -> None:
        asked = orchestrator_pb2.GenerateRequest(input=request(1))
        call = DirectCall(self, self.hosts, asked, None, must=True, ahead=tickets)
        while await call.read() is not grpc.aio.EOF:
            pass


async def _whole(call: grpc.aio.UnaryStreamCall) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass


async def _settled(plane: Program) -> bool:
    """Whether all but the one ticket that was taken to see whether the fleet is there have been used."""
    return counted(plane, "Direct") == counted(plane, "Assign") - 1


async def run(quick: bool = False) -> Figures:
    scale = 0.1 if quick else 1.0
    (assigned, cpu, alone), bare, over_stream = await throughput(scale)
    call_p50, *rest = await latency(scale)
    return Figures(assigned, cpu, over_stream.rate, over_stream.server, *bare, alone, call_p50, *rest)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the work: for trying the benchmark itself")
    quick = parser.parse_args().quick
    found = asyncio.run(run(quick))
    paused = asyncio.run(ahead(40 if quick else 400, 1, 0.01))
    tight = asyncio.run(ahead(4 if quick else 40, 25, 0.0))
    print(f"Assign at concurrency 64            {found.assigned:9,.0f} 1/s   wanted: 2,500")
    print(f"control plane CPU per Assign cycle  {found.assigned_cpu * 1e6:9,.0f} us")
    print(f"Assign over one stream, 64 at once  {found.shared:9,.0f} 1/s   wanted: 2,500")
    print(f"control plane CPU per such cycle    {found.shared_cpu * 1e6:9,.0f} us")
    print(f"bare call at concurrency 64         {found.bare:9,.0f} 1/s   {found.bare_cpu * 1e6:.0f} us CPU")
    print(f"bare call alone, p50                {found.bare_p50 * 1e3:9.3f} ms")
    print(f"Assign alone, p50, C client         {found.assign_p50 * 1e3:9.3f} ms    wanted: below 0.35")
    print(f"  to a call of the model server     {found.assign_p50 / found.call_p50:9.2f}")
    print(f"added by Assign, p50, Python client {found.added_p50 * 1e3:9.3f} ms")
    print(f"  to the same call without          {found.added_p50 / found.client_call_p50:9.2f}")
    print(f"the same with Assign over a stream  {found.added_shared_p50 * 1e3:9.3f} ms    wanted: below 0.35")
    print(f"  to the same call without          {found.added_shared_p50 / found.client_call_p50:9.2f}")
    for what, figures in (("a pause of 10 ms after each", paused), ("back to back", tight)):
        print(f"plain call, {what:23} {figures.call * 1e3:9.3f} ms")
        for who, added in zip(
            ("Assign over a stream", "a ticket ahead", "the SDK, without", "the SDK, with"), figures.added, strict=True
        ):
            print(f"  added by {who:23}  {added * 1e3:9.3f} ms    {added / figures.call:.2f} of it")
        print(f"  calls that had a ticket ahead     {figures.early:9.1%}     Assign for each: {figures.asked:.3f}")


if __name__ == "__main__":
    main()
