"""The TaskQueue service on a real SQLite store behind real gRPC; tests play the dispatcher."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio

from control_plane.api.metrics import Metrics
from control_plane.api.task_queue import TaskQueueServicer
from control_plane.domain.errors import unknown_model
from control_plane.domain.model import ModelName, Provider, ServerId
from control_plane.presets import compile_presets
from control_plane.tasks.location import located
from control_plane.tasks.model import Claim, LaneId, Placement
from control_plane.tasks.opening import open_store
from control_plane.tasks.store import SqlTaskStore, StorePolicy
from modelyard.rpc.channels import channel
from modelyard.rpc.errors import Refusal, from_rpc_error
from modelyard.rpc.server import InFlight, bind, create_server, service_handler
from modelyard.v1 import generation_pb2, orchestrator_pb2, selection_pb2, task_queue_pb2, task_queue_pb2_grpc
from modelyard.v1.task_queue_pb2 import SubmitTaskRequest, TaskResult, TaskSpec

SERVICE = task_queue_pb2.DESCRIPTOR.services_by_name["TaskQueue"]
PLACE = Placement(ServerId("one"), "i-1", ModelName("swift"), Provider("fake"))
MAX_REQUEST_BYTES = 1 << 20


class Known:
    """Presets and models, as `Generation` knows them."""

    def __init__(self) -> None:
        self.presets = compile_presets({})
        self.models = ["swift"]

    def pinned(self, requirements: selection_pb2.Requirements) -> tuple[ModelName, Provider | None] | None:
        if requirements.model not in self.models:
            raise unknown_model(requirements.model, tuple(self.models))
        return ModelName(requirements.model), None


class Dispatcher:
    """What a dispatcher tells of itself."""

    running_here = 3
    workers = 7

    def waiting_for(self, lane: LaneId) -> str:
        return f"lane {lane} waits for a free slot"


@dataclass
class Queue:
    address: str
    channel: grpc.aio.Channel
    stub: Any
    store: SqlTaskStore
    servicer: TaskQueueServicer
    known: Known
    in_flight: InFlight

    async def submit(self, text: str = "hi", key: str = "", **fields: Any) -> task_queue_pb2.Task:
        response = await self.stub.SubmitTask(SubmitTaskRequest(spec=spec(text, **fields), idempotency_key=key))
        return response.task

    async def refusal(self, call: Any) -> Refusal:
        """Why a call is refused."""
        try:
            answer = await call
        except grpc.aio.AioRpcError as error:
            return from_rpc_error(error)
        raise AssertionError(f"succeeded: {answer}")

    async def claim(self, count: int = 1, places: Sequence[Placement] = ()) -> list[Claim]:
        """Take tasks in hand, of whatever lane."""
        claims: list[Claim] = []
        for lane in await self.store.waiting_lanes():
            wanted = places or [PLACE] * (count - len(claims))
            if wanted:
                claims += await self.store.claim(lane.id, wanted)
        return claims

    async def succeed(self, claim: Claim, text: str = "Hello") -> None:
        """Run a task to its end."""
        assert await self.store.started(claim.id, claim.epoch)
        assert await self.store.succeeded(claim.id, claim.epoch, result(text), 1500)


def result(text: str) -> bytes:
    summary = orchestrator_pb2.GenerationSummary(
        finish_reason=generation_pb2.FINISH_REASON_STOP, server_id="one", model="swift", provider="fake"
    )
    return TaskResult(text=text, summary=summary).SerializeToString()


def spec(text: str = "hi", **fields: Any) -> TaskSpec:
    if "input" not in fields:
        fields["input"] = {"messages": [{"role": generation_pb2.ROLE_USER, "content": [{"text": text}]}]}
    return TaskSpec(**fields)


@asynccontextmanager
async def queue(
    folder: Path, *, keeps: bool = True, write_timeout: float = 10.0, policy: StorePolicy | None = None
) -> AsyncIterator[Queue]:
    """A queue in this process, with its database in the folder; `keeps` False: one without a store."""
    store = await open_store(located(f"sqlite:///{folder / 'tasks.db'}", {}), policy or StorePolicy())
    known, in_flight = Known(), InFlight()
    servicer = TaskQueueServicer(
        store if keeps else None,
        known,
        Metrics(),
        in_flight,
        max_attempts=5,
        write_timeout=write_timeout,
        dispatcher=Dispatcher(),
    )
    server = create_server(max_request_bytes=MAX_REQUEST_BYTES)
    server.add_generic_rpc_handlers((service_handler(SERVICE, servicer, max_request_bytes=MAX_REQUEST_BYTES),))
    address = f"127.0.0.1:{bind(server, '127.0.0.1', 0)}"
    await server.start()
    try:
        async with channel(address, own_connection=True) as link:
            stub = task_queue_pb2_grpc.TaskQueueStub(link)
            yield Queue(address, link, stub, store, servicer, known, in_flight)
    finally:
        servicer.stop_accepting()
        await server.stop(0.2)
        await store.close()
