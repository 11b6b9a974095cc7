"""What durable tasks cost, measured from outside.

    python -m tests.benchmarks.tasks [--store sqlite|postgres] [--deep N] [--json] [--quick]

Everything runs on loopback with real processes. Submissions are driven by h2load (C, from Debian's nghttp2-client):
64 at a time, each acknowledged only when its task is on disk; that every one is there is counted afterwards. No model
server is attached then: what is measured is accepting tasks. The same is done over streams that calls share, as the
SDK makes them, by an asyncio client. Then one model server with the simulated engine in its instant mode attaches and
the tasks run. `--deep N` fills the queue with N tasks first (1,000,000 takes some minutes), and submits, claims and
memory are measured again on top of them.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from modelyard.rpc.calls import SharedChannel
from modelyard.rpc.channels import channel
from modelyard.v1 import task_queue_pb2 as pb
from modelyard.v1.task_queue_pb2_grpc import TaskQueueStub
from tests.benchmarks.calls import joined, turn
from tests.benchmarks.relay import SLOTS, cpu_seconds, h2load, request, rss
from tests.harness.postgres import postgres
from tests.harness.programs import Program, control_plane, simulated_server, until

SUBMIT = "/modelyard.v1.TaskQueue/SubmitTask"
CONCURRENCY = 64


@dataclass(frozen=True)
class Row:
    """One measured figure."""

    what: str
    value: float
    unit: str
    ratio: str = ""
    wanted: str = ""


@asynccontextmanager
async def opened(store: str) -> AsyncIterator[str]:
    """The URL of an empty database."""
    if store == "postgres":
        with postgres("fsync=on") as server:
            yield await server.tables()
    else:
        with tempfile.TemporaryDirectory() as folder:
            yield f"sqlite:///{Path(folder) / 'tasks.db'}"


def spec(not_before: float = 0.0) -> pb.TaskSpec:
    made = pb.TaskSpec(input=request(1))
    if not_before:
        made.not_before.seconds = int(not_before)
    return made


async def counts(stub: TaskQueueStub) -> dict[int, int]:
    stats = await stub.GetQueueStats(pb.GetQueueStatsRequest())
    return {each.state: each.count for each in stats.states}


async def submit(plane: Program, calls: int, concurrency: int) -> tuple[float, float]:
    """Submissions per second, and CPU seconds of the control plane for each."""
    body = pb.SubmitTaskRequest(spec=spec()).SerializeToString()
    cpu = cpu_seconds(plane.pid)
    seconds = await h2load(plane.address, SUBMIT, body, calls, concurrency)
    return calls / seconds, (cpu_seconds(plane.pid) - cpu) / calls


async def submitting(plane: Program, stub: TaskQueueStub, calls: int) -> tuple[float, float]:
    """Medians of turns; the first turn warms up. Raises if a task that was acknowledged is not there."""
    turns = []
    for number in range(4):
        before = sum((await counts(stub)).values())
        measured = await submit(plane, calls, CONCURRENCY)
        added = sum((await counts(stub)).values()) - before
        if added != calls:
            raise RuntimeError(f"{calls} submissions were acknowledged, {added} tasks are there")
        if number:
            turns.append(measured)
    rates, cpu = zip(*turns, strict=True)
    return statistics.median(rates), statistics.median(cpu)


async def sharing(plane: Program, stub: TaskQueueStub, calls: int, connections: int) -> tuple[float, float]:
    """As `submitting`, by 64 clients of the SDK's kind, whose SubmitTask calls share a stream per connection. They take
    their part of the machine."""
    links = [SharedChannel(channel(plane.address, own_connection=True)) for _ in range(connections)]
    for link in links:
        await joined(link)
    stubs = itertools.cycle([TaskQueueStub(link) for link in links])
    request = pb.SubmitTaskRequest(spec=spec())
    turns = []
    for number in range(4):
        before = sum((await counts(stub)).values())
        made = await turn(lambda: next(stubs).SubmitTask(request, timeout=60), calls, CONCURRENCY, plane.pid)
        added = sum((await counts(stub)).values()) - before
        if added != calls:
            raise RuntimeError(f"{calls} submissions were acknowledged, {added} tasks are there")
        if number:
            turns.append(made)
    for link in links:
        await link.close()
    return statistics.median(each.rate for each in turns), statistics.median(each.server for each in turns)


async def streaming(plane: Program, stub: TaskQueueStub, calls: int) -> float:
    """Submissions per second of 64 clients that hold a BatchSubmitTasks stream each and wait for every answer."""
    before = sum((await counts(stub)).values())
    left = iter(range(calls))
    began = time.perf_counter()

    async def client() -> None:
        call = stub.BatchSubmitTasks()
        for _ in left:
            await call.write(pb.BatchSubmitTasksRequest(spec=spec()))
            answer = await call.read()
            if not answer.created:
                raise RuntimeError(f"not accepted: {answer}")
        await call.done_writing()

    await asyncio.gather(*(client() for _ in range(CONCURRENCY)))
    seconds = time.perf_counter() - began
    added = sum((await counts(stub)).values()) - before
    if added != calls:
        raise RuntimeError(f"{calls} submissions were acknowledged, {added} tasks are there")
    return calls / seconds


async def finished(stub: TaskQueueStub, tasks: int, within: float) -> float:
    """Seconds until so many tasks have succeeded."""
    began = time.perf_counter()

    async def done() -> bool:
        return (await counts(stub)).get(pb.TASK_STATE_SUCCEEDED, 0) >= tasks

    await until(done, within, every=0.05)
    return time.perf_counter() - began


async def latencies(stub: TaskQueueStub, tasks: int) -> tuple[float, float, float]:
    """Medians in seconds, one task at a time: submission, claimed to sent, acknowledged to sent."""
    answered, claimed, begun = [], [], []
    for _ in range(tasks):
        started = time.perf_counter()
        answer = await stub.SubmitTask(pb.SubmitTaskRequest(spec=spec()))
        answered.append(time.perf_counter() - started)
        at: dict[int, float] = {}
        async for told in stub.WatchTask(pb.WatchTaskRequest(id=answer.task.id)):
            at[told.event.type] = told.event.at.seconds + told.event.at.nanos * 1e-9
        running = at[pb.TASK_EVENT_TYPE_RUNNING]
        claimed.append(running - at[pb.TASK_EVENT_TYPE_SCHEDULED])
        begun.append(running - at[pb.TASK_EVENT_TYPE_SUBMITTED])
    return statistics.median(answered), statistics.median(claimed), statistics.median(begun)


async def run(store: str, deep: int, quick: bool) -> list[Row]:
    """Measure everything."""
    if shutil.which("h2load") is None:
        raise SystemExit("h2load is needed: apt-get install nghttp2-client")
    calls = 1_000 if quick else 10_000
    wanted = 2_000 if store == "sqlite" else 1_000
    rows: list[Row] = []
    async with AsyncExitStack() as stack:
        url = await stack.enter_async_context(opened(store))
        plane = await stack.enter_async_context(control_plane("--log-level", "warning", "--tasks.store", url))
        stub = TaskQueueStub(await stack.enter_async_context(channel(plane.address)))
        await counts(stub)
        idle = rss(plane.pid)
        rows.append(Row("idle control plane with tasks: RSS", idle / 2**20, "MB", wanted="< 90"))
        shallow, cpu = await submitting(plane, stub, calls)
        rows.append(Row(f"durable submits, {CONCURRENCY} clients", shallow, "1/s", wanted=f">= {wanted}"))
        rows.append(Row("control plane CPU per submit", cpu * 1e6, "µs"))
        for connections in (1, 4):
            rate, cpu = await sharing(plane, stub, calls, connections)
            over = f"{connections} shared stream{'s' if connections > 1 else ''}"
            rows.append(Row(f"durable submits, {CONCURRENCY} clients, {over}", rate, "1/s", wanted=f">= {wanted}"))
            rows.append(Row(f"control plane CPU per submit, {over}", cpu * 1e6, "µs"))
        await streaming(plane, stub, calls // 10)
        cpu = cpu_seconds(plane.pid)
        streamed = await streaming(plane, stub, calls)
        rows.append(Row(f"durable submits, {CONCURRENCY} open streams", streamed, "1/s"))
        cpu = (cpu_seconds(plane.pid) - cpu) / calls
        rows.append(Row("control plane CPU per submit in a stream", cpu * 1e6, "µs"))
        if deep:
            body = pb.SubmitTaskRequest(spec=spec()).SerializeToString()
            while (there := sum((await counts(stub)).values())) < deep:
                await h2load(plane.address, SUBMIT, body, min(50_000, deep - there), 512)
            full, _ = await submitting(plane, stub, calls)
            rows.append(Row(f"the same on top of {deep:,} tasks", full, "1/s", f"{full / shallow:.2f}", ">= 0.5"))
            rows.append(Row(f"RSS with {deep:,} tasks", rss(plane.pid) / 2**20, "MB", f"{rss(plane.pid) / idle:.2f}"))
        await stack.enter_async_context(
            simulated_server("bench", plane.address, instant=True, answer_tokens=1, slots=SLOTS)
        )
        base = (await counts(stub)).get(pb.TASK_STATE_SUCCEEDED, 0)

        async def begun() -> bool:
            return (await counts(stub)).get(pb.TASK_STATE_SUCCEEDED, 0) > base

        await until(begun, 30)
        before = (await counts(stub)).get(pb.TASK_STATE_SUCCEEDED, 0)
        batch = calls // 2
        seconds = await finished(stub, before + batch, 300)
        done = (await counts(stub)).get(pb.TASK_STATE_SUCCEEDED, 0) - before
        what = f"tasks run, {deep:,} queued" if deep else "tasks run, instant engine"
        rows.append(Row(what, done / seconds, "1/s"))
        if not deep:
            total = sum((await counts(stub)).values())
            await finished(stub, total, 600)
            answered, claimed, started = await latencies(stub, 50 if quick else 500)
            rows.append(Row("idle: submission p50", answered * 1e3, "ms"))
            rows.append(Row("idle: claimed to sent p50", claimed * 1e3, "ms", wanted="< 10"))
            rows.append(Row("idle: submitted to sent p50", started * 1e3, "ms", wanted="< 10"))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", choices=("sqlite", "postgres"), default="sqlite")
    parser.add_argument("--deep", type=int, default=0, metavar="N", help="fill the queue with so many tasks first")
    parser.add_argument("--json", action="store_true", help="one JSON array instead of the table")
    parser.add_argument("--quick", action="store_true", help="a tenth of the work: for trying the benchmark itself")
    given = parser.parse_args()
    table = asyncio.run(run(given.store, given.deep, given.quick))
    if given.json:
        json.dump([asdict(row) for row in table], sys.stdout, indent=1)
        return
    print(f"{'figure, ' + given.store:44} {'value':>12} {'':4} {'ratio':>6}  wanted")
    for row in table:
        print(f"{row.what:44} {row.value:12,.2f} {row.unit:4} {row.ratio:>6}  {row.wanted}")


if __name__ == "__main__":
    main()
