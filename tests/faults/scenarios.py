"""The faults of the reliability bar, each as one run that is bounded in time and ends with a report.

A scenario raises only when it could not be carried out. What it found is in the report: `violations` of the promises,
and figures. The tests run them small; `python -m tests.faults --full` runs them in full size.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from modelyard.v1 import generation_pb2, orchestrator_pb2, selection_pb2, task_queue_pb2
from tests.faults.cluster import Cluster, Restartable, cluster, restart_now_and_then, spec
from tests.faults.history import History, violations
from tests.harness.postgres import Postgres, postgres


@dataclass
class Report:
    """What a scenario found."""

    name: str
    figures: dict[str, float | int | str] = field(default_factory=dict)
    violations: list[str] = field(default_factory=list)

    def judge(self, history: History) -> Report:
        self.violations += violations(history)
        self.figures["tasks"] = len(history.tasks)
        self.figures["events"] = len(history.events)
        self.figures["attempts"] = sum(task.attempt_count for task in history.tasks.values())
        requeued = sum(event.type == task_queue_pb2.TASK_EVENT_TYPE_REQUEUED for event in history.events)
        self.figures["runs lost and repeated"] = requeued
        succeeded = sum(task.state == task_queue_pb2.TASK_STATE_SUCCEEDED for task in history.tasks.values())
        self.figures["succeeded"] = succeeded
        if succeeded != len(history.tasks):
            self.violations.append(f"only {succeeded} of {len(history.tasks)} tasks succeeded")
        return self


Database = Callable[[], AbstractAsyncContextManager[tuple[str, Postgres | None]]]
"""Opens an empty database: the URL for control planes, and the server behind it if it is a process."""


def sqlite(folder: Path) -> Database:
    @asynccontextmanager
    async def opened() -> AsyncIterator[tuple[str, None]]:
        yield f"sqlite:///{folder / 'tasks.db'}", None

    return opened


def real_postgres() -> Database:
    @asynccontextmanager
    async def opened() -> AsyncIterator[tuple[str, Postgres]]:
        with postgres("fsync=on") as server:
            yield await server.tables(), server

    return opened


async def _with_chaos(running: Cluster, keys: list[str], chaos: list[Any], *, within: float, **fields: Any) -> History:
    """Submit while the `chaos` goes on, then until all is done; the chaos ends with the submissions' work."""
    background = [asyncio.create_task(each) for each in chaos]
    try:
        acknowledged = await running.submit(keys, **fields)
        await running.until_terminal(len(keys), within)
    finally:
        for task in background:
            task.cancel()
        for ended in await asyncio.gather(*background, return_exceptions=True):
            if isinstance(ended, Exception):
                raise ended
    return await running.history(acknowledged)


async def control_plane_killed(
    database: Database, *, tasks: int, kills: int, servers_die: float | None = 4.0, seed: int = 1
) -> Report:
    """kill -9 of the only control plane, again and again, while tasks are submitted and run."""
    report = Report("control plane killed")
    took: list[float] = []
    async with database() as (url, _), cluster(url, seed=seed) as running:
        keys = [f"k{n}" for n in range(tasks)]
        done = 0

        async def killer() -> None:
            nonlocal done
            plane = running.planes[0]
            while done < kills:
                # Each kill at another share of the work: while submitting, while running, near the end.
                goal = tasks * (done + 0.5) / kills
                while await _terminal(running) < goal * 0.9:
                    await asyncio.sleep(0.02)
                await plane.kill()
                took.append(await plane.start())
                done += 1

        chaos = [killer()]
        if servers_die:
            chaos.append(restart_now_and_then(running, running.servers, servers_die))
        history = await _with_chaos(running, keys, chaos, within=60 + tasks / 20)
    if done < kills:
        raise RuntimeError(f"only {done} of {kills} kills happened before the work was done")
    report.judge(history)
    report.figures |= {"kills": done, "ready again after, worst s": round(max(took), 2)}
    return report


async def _terminal(running: Cluster) -> int:
    """Tasks that are terminal; what was known before if nobody answers now."""
    with contextlib.suppress(grpc.aio.AioRpcError):
        stats = await running.tasks(0).GetQueueStats(task_queue_pb2.GetQueueStatsRequest(), timeout=2)
        return sum(each.count for each in stats.states if each.state >= task_queue_pb2.TASK_STATE_SUCCEEDED)
    return 0


async def postgres_killed(database: Database, *, tasks: int, kills: int, seed: int = 2) -> Report:
    """kill -9 of the database under the control plane."""
    report = Report("database killed")
    back: list[float] = []
    async with database() as (url, server), cluster(url, seed=seed) as running:
        assert server, "needs PostgreSQL"
        done = 0

        async def killer() -> None:
            nonlocal done
            while done < kills:
                goal = tasks * (done + 0.5) / kills
                while await _terminal(running) < goal * 0.9:
                    await asyncio.sleep(0.02)
                await asyncio.to_thread(server.kill)
                await asyncio.sleep(running.random.uniform(0, 1))
                await asyncio.to_thread(server.start)
                began = time.monotonic()
                await running.patiently(
                    lambda stub: stub.GetQueueStats(task_queue_pb2.GetQueueStatsRequest(), timeout=5)
                )
                back.append(time.monotonic() - began)
                done += 1

        chaos = [killer(), restart_now_and_then(running, running.servers, 4.0)]
        history = await _with_chaos(running, [f"k{n}" for n in range(tasks)], chaos, within=60 + tasks / 20)
    if done < kills:
        raise RuntimeError(f"only {done} of {kills} kills happened before the work was done")
    report.judge(history)
    report.figures |= {"kills": done, "served again after the database, worst s": round(max(back), 2)}
    if max(back) > 5:
        report.violations.append(f"served again only {max(back):.1f} s after the database")
    return report


UNHEEDING = ("tests.faults.unheeding",)
"""A control plane that is not interrupted when its tasks are taken from it, so that it tries to write."""

# Tasks that a dispatcher has in hand when it is stopped, at least: enough that some of its writes come too late.
_HELD = 10


async def zombie(
    database: Database,
    *,
    tasks: int,
    rounds: int,
    planes: int = 2,
    program: Sequence[str] = ("control_plane",),
    seed: int = 3,
) -> Report:
    """A dispatcher is stopped past its lease while others take its tasks over, then goes on as if nothing had been."""
    report = Report("zombie")
    # Slow enough that tasks are running when their dispatcher is stopped.
    engine = {"decode_tokens_per_second": 4, "aggregate_tokens_per_second": 0, "answer_tokens": 4, "slots": 16}
    async with (
        database() as (url, _),
        cluster(url, planes=planes, seed=seed, program=program, engine=engine) as running,
    ):
        frozen = running.planes[-1]
        at_once: list[int] = []

        async def freezer() -> None:
            for _ in range(rounds):
                patience = asyncio.get_running_loop().time() + 30
                while (held := await _running_here(running, len(running.planes) - 1)) < _HELD:
                    if asyncio.get_running_loop().time() > patience:
                        raise RuntimeError(f"only {held} tasks are running in the dispatcher to be stopped")
                    await asyncio.sleep(0.02)
                at_once.append(held)
                frozen.stop()
                await asyncio.sleep(4.5)  # its lease is 2 s; the others sweep each second
                frozen.resume()
                await asyncio.sleep(1.5)

        chaos = asyncio.create_task(freezer())
        try:
            acknowledged = await running.submit([f"k{n}" for n in range(tasks)])
            await chaos
        finally:
            chaos.cancel()
            frozen.resume()
        await running.until_terminal(tasks, 60 + tasks / 10)
        refused = sum(metric(port, "modelyard_task_refused_writes_total") for port in running.metrics)
        history = await running.history(acknowledged)
    report.judge(history)
    report.figures |= {
        "rounds": rounds,
        "running when stopped": sum(at_once),
        "stale writes refused": int(refused),
    }
    return report


async def _running_here(running: Cluster, plane: int) -> int:
    with contextlib.suppress(grpc.aio.AioRpcError):
        stats = await running.tasks(plane).GetQueueStats(task_queue_pb2.GetQueueStatsRequest(), timeout=2)
        return int(stats.running_here)
    return 0


def metric(port: int, name: str) -> float:
    """The sum of a metric over its labels."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        text = answer.read().decode()
    found = re.findall(rf"^{name}(?:\{{[^}}]*\}})? ([\d.e+-]+)$", text, re.MULTILINE)
    return sum(map(float, found))


async def replicas(database: Database, *, tasks: int, planes: int = 3, seed: int = 4) -> Report:
    """Several control planes on one database, each stopped for random times, one killed now and then."""
    report = Report("replicas")
    async with database() as (url, _), cluster(url, planes=planes, seed=seed) as running:

        async def pauses(plane: Restartable) -> None:
            while True:
                await asyncio.sleep(running.random.uniform(0.5, 3))
                plane.stop()
                try:
                    await asyncio.sleep(running.random.uniform(0.1, 4))
                finally:
                    plane.resume()

        async def deaths() -> None:
            while True:
                await asyncio.sleep(running.random.uniform(2, 5))
                await running.planes[0].restart()

        chaos = [
            deaths(),
            *(pauses(plane) for plane in running.planes[1:]),
            restart_now_and_then(running, running.servers, 5.0),
        ]
        history = await _with_chaos(running, [f"k{n}" for n in range(tasks)], chaos, within=120 + tasks / 10)
        starts = sum(plane.starts for plane in running.planes)
    report.judge(history)
    report.figures |= {"replicas": planes, "control planes killed": starts - planes}
    return report


async def same_key(database: Database, *, at_once: int = 100, seed: int = 5) -> Report:
    """One key from many clients at once, and again after the control plane died with its answer on the way."""
    report = Report("same key")
    async with database() as (url, _), cluster(url, servers=1, seed=seed) as running:
        request = task_queue_pb2.SubmitTaskRequest(spec=spec("once"), idempotency_key="once")
        answers = await asyncio.gather(
            *(running.patiently(lambda stub: stub.SubmitTask(request), n) for n in range(at_once))
        )
        lost = asyncio.gather(
            *(running.tasks(0).SubmitTask(request, timeout=5) for _ in range(at_once)), return_exceptions=True
        )
        await asyncio.sleep(0.01)
        await running.planes[0].kill()
        await lost
        await running.planes[0].start()
        answers.append(await running.patiently(lambda stub: stub.SubmitTask(request)))
        await running.until_terminal(1, 30)
        history = await running.history([("once", answer.task.id) for answer in answers])
    report.judge(history)
    report.figures |= {"calls": at_once * 2 + 1, "created": sum(answer.created for answer in answers)}
    if report.figures["created"] != 1:
        report.violations.append(f"{report.figures['created']} calls created it")
    return report


async def model_servers_killed(*, kills: int, streams: int = 4, seed: int = 6) -> Report:
    """kill -9 of model servers in the middle of streams: each stream ends at once, with the truth."""
    report = Report("model servers killed mid-stream")
    engine = {"decode_tokens_per_second": 50, "aggregate_tokens_per_second": 0, "answer_tokens": 2000, "slots": 8}
    took: list[float] = []
    truncated = 0
    # A server that is killed all the time would be left alone for a while.
    patient = ("--breaker.failures", "1000000")
    async with cluster("", servers=4, seed=seed, engine=engine, argv=patient) as running:
        left = iter(range(kills))

        async def executioner(n: int) -> None:
            nonlocal truncated
            server, name = running.servers[n], f"sim-{n}"
            for _ in left:
                await _live(running, name)
                calls = [_stream(running, name) for _ in range(streams)]
                firsts = await asyncio.gather(*(call.read() for call in calls))
                assert all(firsts)
                await server.kill()
                killed = time.monotonic()
                ends = await asyncio.gather(*(_end(call) for call in calls))
                took.extend(ended - killed for ended, _ in ends)
                truncated += sum(whole is None for _, whole in ends)
                await server.start()

        async with asyncio.TaskGroup() as group:
            for n in range(len(running.servers)):
                group.create_task(executioner(n))
    report.figures |= {"kills": kills, "streams": len(took), "terminal status after, worst s": round(max(took), 3)}
    if truncated:
        report.violations.append(f"{truncated} streams ended as if they were whole")
    if max(took) > 1:
        report.violations.append(f"a stream ended only {max(took):.2f} s after the reset")
    return report


async def _live(running: Cluster, server_id: str) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        listed = await running.fleet(0).ListModelServers(orchestrator_pb2.ListModelServersRequest())
        if any(s.report.identity.server_id == server_id and s.lease_state == 1 for s in listed.servers):
            return
        await asyncio.sleep(0.02)
    raise TimeoutError(f"{server_id} did not come back")


def _stream(running: Cluster, server_id: str) -> Any:
    request = orchestrator_pb2.GenerateRequest(
        input=generation_pb2.GenerationInput(
            messages=[
                generation_pb2.Message(role=generation_pb2.ROLE_USER, content=[generation_pb2.ContentPart(text="hi")])
            ],
            sampling=generation_pb2.SamplingParams(max_tokens=2000),
        ),
        requirements=selection_pb2.Requirements(server_id=server_id),
    )
    return running.fleet(0).Generate(request, timeout=60)


async def _end(call: Any) -> tuple[float, grpc.StatusCode | None]:
    """When the stream ended, and its status; None if it ended well without a summary."""
    summary = False
    try:
        while (message := await call.read()) is not grpc.aio.EOF:
            summary |= message.HasField("summary")
    except grpc.aio.AioRpcError as error:
        return time.monotonic(), error.code()
    return time.monotonic(), grpc.StatusCode.OK if summary else None


async def half_open(*, seed: int = 7) -> Report:
    """A peer that is there and does nothing: a model server, then a control plane, are stopped."""
    report = Report("half-open")
    async with cluster("", planes=2, servers=2, seed=seed) as running:
        began = time.monotonic()
        running.servers[0].stop()
        try:
            while True:
                listed = await running.fleet(0).ListModelServers(orchestrator_pb2.ListModelServersRequest())
                states = {s.report.identity.server_id: s.lease_state for s in listed.servers}
                if states["sim-0"] != 1:
                    break
                if time.monotonic() > began + 60:
                    raise TimeoutError("a stopped model server is LIVE after a minute")
                await asyncio.sleep(0.02)
            report.figures["stopped model server noticed after s"] = server = round(time.monotonic() - began, 2)
        finally:
            running.servers[0].resume()
        await running.ready(2, 0)
        # The other control plane serves on while the first one is stopped; its lease is given up by the servers.
        running.planes[0].stop()
        began = time.monotonic()
        try:
            await (
                running.fleet(1)
                .Generate(orchestrator_pb2.GenerateRequest(input=spec("still there").input), timeout=10)
                .read()
            )
            report.figures["other replica answers after s"] = replica = round(time.monotonic() - began, 2)
        finally:
            running.planes[0].resume()
        began = time.monotonic()
        await running.ready(2, 0)
        report.figures["resumed control plane has its fleet after s"] = round(time.monotonic() - began, 2)
    if server > 3 + 1:  # the lease of a model server, and a tick
        report.violations.append(f"a stopped model server was LIVE for {server} s")
    if replica > 5:
        report.violations.append(f"the other replica needed {replica} s")
    return report
