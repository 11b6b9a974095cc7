"""Control planes, model servers and a database as real processes that can be killed, stopped and started again."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import grpc

from modelyard.rpc.channels import channel
from modelyard.v1 import generation_pb2, orchestrator_pb2, orchestrator_pb2_grpc, task_queue_pb2, task_queue_pb2_grpc
from tests.faults.history import TERMINAL, History
from tests.harness.ports import free_port

T = TypeVar("T")

QUICK = {"decode_tokens_per_second": 400, "aggregate_tokens_per_second": 0, "answer_tokens": 4, "slots": 8}

# What a client of a restarting service has to expect, and repeats.
_PASSING = frozenset(
    {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.RESOURCE_EXHAUSTED}
)


class Restartable:
    """A program that is started again and again with the same arguments, on the same port."""

    def __init__(self, module: str, *argv: str) -> None:
        self._command = (sys.executable, "-m", module, *argv)
        self._process: asyncio.subprocess.Process | None = None
        self._log: asyncio.Task[None] | None = None
        self.log = bytearray()
        self.starts = 0

    @property
    def pid(self) -> int:
        assert self._process
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.returncode is None

    async def start(self) -> float:
        """Seconds until it was ready."""
        began = time.monotonic()
        self.starts += 1
        process = self._process = await asyncio.create_subprocess_exec(
            *self._command, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={key: value for key, value in os.environ.items() if not key.startswith("MODELYARD_")},
        )  # fmt: skip
        assert process.stdout and process.stderr
        self._log = asyncio.create_task(self._collect(process.stderr))
        async with asyncio.timeout(60):  # wait_for of Python 3.11 can lose the cancellation of what goes on for ever
            line = await process.stdout.readline()
        if not line:
            await process.wait()
            await self._log
            raise RuntimeError(f"{self._command} ended with {process.returncode}:\n{self.log.decode()[-4000:]}")
        return time.monotonic() - began

    async def _collect(self, stream: asyncio.StreamReader) -> None:
        while line := await stream.readline():
            self.log += line
            del self.log[: -(1 << 20)]

    async def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        if self._process is None:
            return
        if self._process.returncode is None:
            self._process.send_signal(signal.SIGCONT)
            self._process.kill()
        await self._process.wait()
        if self._log:
            await self._log

    async def restart(self) -> None:
        """Kill and start; who is cancelled meanwhile leaves it running all the same."""
        restarting = asyncio.create_task(self._kill_and_start())
        try:
            await asyncio.shield(restarting)
        except asyncio.CancelledError:
            await restarting
            raise

    async def _kill_and_start(self) -> None:
        await self.kill()
        await self.start()

    def stop(self) -> None:
        """SIGSTOP: it is there, and does nothing."""
        assert self._process
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self._process
        self._process.send_signal(signal.SIGCONT)

    async def terminate(self) -> int:
        """SIGTERM; the exit status."""
        assert self._process
        if self._process.returncode is None:
            self._process.terminate()
        status = await asyncio.wait_for(self._process.wait(), 60)
        if self._log:
            await self._log
        return status


@dataclass
class Cluster:
    """Everything that runs, and a client that does what a patient client would."""

    planes: list[Restartable]
    addresses: list[str]
    metrics: list[int]
    servers: list[Restartable]
    random: random.Random
    channels: list[grpc.aio.Channel] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.channels = [channel(address) for address in self.addresses]

    def tasks(self, n: int) -> task_queue_pb2_grpc.TaskQueueStub:
        return task_queue_pb2_grpc.TaskQueueStub(self.channels[n % len(self.channels)])

    def fleet(self, n: int) -> orchestrator_pb2_grpc.OrchestratorStub:
        return orchestrator_pb2_grpc.OrchestratorStub(self.channels[n % len(self.channels)])

    async def patiently(
        self, call: Callable[[task_queue_pb2_grpc.TaskQueueStub], Awaitable[T]], n: int = 0, within: float = 120.0
    ) -> T:
        """Repeat a call, on one control plane after the other, until one has answered."""
        end = time.monotonic() + within
        while True:
            try:
                return await call(self.tasks(n))
            except grpc.aio.AioRpcError as error:
                if error.code() not in _PASSING or time.monotonic() > end:
                    raise
            n += 1
            await asyncio.sleep(0.05)

    async def submit(self, keys: Sequence[str], concurrency: int = 32, **fields: Any) -> list[tuple[str, str]]:
        """Submit a task for each key; what was acknowledged."""
        acknowledged: list[tuple[str, str]] = []
        waiting = iter(enumerate(keys))

        async def submitter() -> None:
            for n, key in waiting:
                request = task_queue_pb2.SubmitTaskRequest(spec=spec(key, **fields), idempotency_key=key)
                answer = await self.patiently(lambda stub, request=request: stub.SubmitTask(request, timeout=10), n)
                acknowledged.append((key, answer.task.id))

        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(submitter())
        return acknowledged

    async def until_terminal(self, count: int, within: float) -> None:
        """Wait until so many tasks are terminal. Raises TimeoutError, with where they stand."""
        end = time.monotonic() + within
        while True:
            stats = await self.patiently(
                lambda stub: stub.GetQueueStats(task_queue_pb2.GetQueueStatsRequest(), timeout=5)
            )
            counts = {each.state: each.count for each in stats.states}
            if sum(n for state, n in counts.items() if state in TERMINAL) >= count:
                return
            if time.monotonic() > end:
                named = {task_queue_pb2.TaskState.Name(state): n for state, n in counts.items()}
                waiting = [lane.waiting_for for lane in stats.lanes]
                raise TimeoutError(f"after {within} s: {named}, lanes {waiting}")
            await asyncio.sleep(0.1)

    async def history(self, acknowledged: list[tuple[str, str]]) -> History:
        """What the service tells in the end."""
        history = History(acknowledged=acknowledged)
        ids = {task_id for _, task_id in acknowledged}
        stats = await self.patiently(lambda stub: stub.GetQueueStats(task_queue_pb2.GetQueueStatsRequest()))
        watch = self.tasks(0).WatchTasks(task_queue_pb2.WatchTasksRequest(after_event_id=0))
        async for told in watch:
            if told.HasField("event"):
                history.events.append(told.event)
                ids.add(told.event.task_id)
            if told.position >= stats.last_event_id:
                break
        watch.cancel()
        limit = asyncio.Semaphore(32)

        async def fetch(task_id: str) -> None:
            async with limit:
                try:
                    answer = await self.patiently(
                        lambda stub: stub.GetTask(task_queue_pb2.GetTaskRequest(id=task_id), timeout=10)
                    )
                except grpc.aio.AioRpcError as error:
                    if error.code() is grpc.StatusCode.NOT_FOUND:
                        return
                    raise
                history.tasks[task_id] = answer.task

        async with asyncio.TaskGroup() as group:
            for task_id in ids:
                group.create_task(fetch(task_id))
        return history

    async def ready(self, servers: int, plane: int = 0, within: float = 30.0) -> float:
        """Wait until a control plane answers and has so many live servers; seconds waited."""
        began = time.monotonic()
        while time.monotonic() < began + within:
            try:
                listed = await self.fleet(plane).ListModelServers(orchestrator_pb2.ListModelServersRequest(), timeout=2)
                if sum(status.lease_state == 1 for status in listed.servers) >= servers:
                    return time.monotonic() - began
            except grpc.aio.AioRpcError as error:
                if error.code() not in _PASSING:
                    raise
            await asyncio.sleep(0.02)
        raise TimeoutError(f"control plane {plane} has not {servers} servers after {within} s")


def spec(text: str, **fields: Any) -> task_queue_pb2.TaskSpec:
    """A task that asks for little; enough attempts that only a bug can use them up."""
    return task_queue_pb2.TaskSpec(
        input=generation_pb2.GenerationInput(
            messages=[
                generation_pb2.Message(role=generation_pb2.ROLE_USER, content=[generation_pb2.ContentPart(text=text)])
            ],
            sampling=generation_pb2.SamplingParams(max_tokens=4),
        ),
        **{"max_attempts": 100, **fields},
    )


@asynccontextmanager
async def cluster(
    store: str,
    *,
    planes: int = 1,
    servers: int = 3,
    seed: int = 0,
    program: Sequence[str] = ("control_plane",),
    engine: dict[str, Any] | None = None,
    argv: Sequence[str] = (),
) -> AsyncIterator[Cluster]:
    """Started, ready, and ended whatever happens. `program` is the module of the control
    planes with arguments that come first, `argv` those that come last."""
    ports = [(free_port(), free_port()) for _ in range(planes)]
    addresses = [f"127.0.0.1:{port}" for port, _ in ports]
    common = [
        "--tasks.store", store, "--log-level", "info", "--gateway.port", "-1", "--tasks.lease", "2",
        "--tasks.retry.base", "0.05", "--tasks.retry.cap", "0.5", *argv,
    ]  # fmt: skip
    async with AsyncExitStack() as stack:
        made = Cluster(
            [
                Restartable(*program, "--port", str(port), "--metrics-port", str(metrics), *common)
                for port, metrics in ports
            ],
            addresses,
            [metrics for _, metrics in ports],
            [
                Restartable(
                    "model_servers", "--engine", "simulated", "--server-id", f"sim-{n}", "--port", str(free_port()),
                    "--orchestrators", json.dumps(addresses), "--engine-settings", json.dumps(engine or QUICK),
                )
                for n in range(servers)
            ],
            random.Random(seed),
        )  # fmt: skip
        for each in (*made.planes, *made.servers):
            stack.push_async_callback(each.kill)
        for each in made.channels:
            stack.push_async_callback(each.close)
        await asyncio.gather(*(each.start() for each in (*made.planes, *made.servers)))
        for n in range(planes):
            await made.ready(servers, n)
        yield made


async def restart_now_and_then(cluster: Cluster, programs: list[Restartable], every: float) -> None:
    """Kill one of the programs and start it again, for ever. The pause is about so many seconds."""
    while True:
        await asyncio.sleep(cluster.random.uniform(0.5, 1.5) * every)
        await cluster.random.choice(programs).restart()
