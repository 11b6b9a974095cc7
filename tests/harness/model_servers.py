"""A model server in this process, real gRPC on a free port, and a control plane that only hears reports."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc.aio

from model_servers import registry
from model_servers.app import ModelServer
from model_servers.config import ModelServerSettings
from model_servers.engine import Engine
from modelyard.rpc.channels import channel
from modelyard.rpc.errors import Refusal
from modelyard.rpc.server import bind, create_server, service_handler
from modelyard.v1 import fleet_pb2, generation_pb2, model_server_pb2, model_server_pb2_grpc, orchestrator_pb2

PATIENCE = 10.0
PREFIX = "/modelyard.v1.ModelServer/"


async def eventually(condition: Callable[[], Any]) -> Any:
    """Wait until the condition (a function, or one that returns an awaitable) holds; returns its value."""
    async with asyncio.timeout(PATIENCE):
        while True:
            value = condition()
            if asyncio.iscoroutine(value):
                value = await value
            if value:
                return value
            await asyncio.sleep(0.005)


def text_input(text: str = "Hello", **sampling: Any) -> generation_pb2.GenerationInput:
    content = generation_pb2.GenerationInput(
        messages=[
            generation_pb2.Message(role=generation_pb2.ROLE_USER, content=[generation_pb2.ContentPart(text=text)])
        ]
    )
    if sampling:
        content.sampling.CopyFrom(generation_pb2.SamplingParams(**sampling))
    return content


def request(
    text: str = "Hello", *, model: str = "simulated", orchestrator_id: str = "", **sampling: Any
) -> model_server_pb2.ModelServerGenerateRequest:
    return model_server_pb2.ModelServerGenerateRequest(
        model=model, input=text_input(text, **sampling), orchestrator_id=orchestrator_id
    )


class Answer:
    def __init__(self) -> None:
        self.deltas: list[generation_pb2.GenerationDelta] = []
        self.result: generation_pb2.GenerationResult | None = None

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self.deltas)


class Running:
    """A running model server, seen by a client."""

    def __init__(self, facts: dict[str, Any], connection: grpc.aio.Channel, task: asyncio.Task[int]) -> None:
        self.facts = facts
        self.address: str = facts["address"]
        self.channel = connection
        self.stub = model_server_pb2_grpc.ModelServerStub(connection)
        self.task = task
        self.stopping = asyncio.Event()

    async def generate(self, asked: model_server_pb2.ModelServerGenerateRequest, **options: Any) -> Answer:
        answer = Answer()
        async for response in self.stub.Generate(asked, **options):
            if response.HasField("delta"):
                answer.deltas.append(response.delta)
            if response.HasField("result"):
                answer.result = response.result
        return answer

    async def report(self) -> fleet_pb2.ServerReport:
        return (await self.stub.Describe(model_server_pb2.DescribeRequest())).report

    async def until_load(self, running: int, waiting: int = 0) -> None:
        async def reached() -> bool:
            load = (await self.report()).load
            return (load.running, load.waiting) == (running, waiting)

        await eventually(reached)


@asynccontextmanager
async def model_server(
    engine: Engine | None = None,
    *,
    engine_settings: dict[str, Any] | None = None,
    wait_ready: bool = True,
    metered: bool = False,
    **settings: Any,
) -> AsyncIterator[Running]:
    """A server with the simulated engine in instant mode, if nothing else is said."""
    if engine is None:
        plugin = registry.find("simulated")
        engine = registry.create(plugin, registry.validate(plugin, {"instant": True, **(engine_settings or {})}))
    validated = ModelServerSettings(**{"server_id": "tested", "orchestrators": (), "drain_grace": 5, **settings})
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[dict[str, Any]] = loop.create_future()
    stopping = asyncio.Event()

    async def stop() -> str:
        await stopping.wait()
        return "the test is over"

    def announce(program: str, **facts: str | int) -> None:
        ready.set_result(facts)

    task = asyncio.create_task(ModelServer(validated, engine, metered=metered).run(stop(), announce))
    try:
        if wait_ready:
            await asyncio.wait({ready, task}, timeout=PATIENCE, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                task.result()
            facts = ready.result()
        else:
            facts = {"address": f"127.0.0.1:{validated.port}"}
        async with channel(facts["address"], own_connection=True) as connection:
            server = Running(facts, connection, task)
            server.stopping = stopping
            yield server
    finally:
        stopping.set()
        async with asyncio.timeout(PATIENCE):
            await task


class ReportHearer:
    """The Attach half of a control plane: keeps reports, answers as it is told."""

    def __init__(self, orchestrator_id: str = "cp-1", interval: float = 0.05) -> None:
        self.orchestrator_id = orchestrator_id
        self.interval = interval
        self.reports: list[fleet_pb2.ServerReport] = []
        self.streams = 0
        self.refusal: Refusal | None = None
        self.silent = False
        self.desired = fleet_pb2.DESIRED_STATE_SERVE
        self._contexts: list[grpc.aio.ServicerContext] = []
        self._server: grpc.aio.Server | None = None

    async def Attach(self, requests: AsyncIterator[fleet_pb2.ServerReport], context: Any) -> None:
        self.streams += 1
        self._contexts.append(context)
        epoch = self.streams
        async for report in requests:
            self.reports.append(report)
            if self.refusal is not None:
                raise self.refusal
            if not self.silent:
                await context.write(self._directive(epoch))

    def _directive(self, epoch: int) -> fleet_pb2.ServerDirective:
        directive = fleet_pb2.ServerDirective(
            orchestrator_id=self.orchestrator_id, lease_epoch=epoch, desired_state=self.desired
        )
        directive.next_report_in.FromNanoseconds(round(self.interval * 1e9))
        directive.lease_duration.FromNanoseconds(round(3 * self.interval * 1e9))
        return directive

    async def order(self, desired: fleet_pb2.DesiredState) -> None:
        self.desired = desired
        await self._contexts[-1].write(self._directive(self.streams))

    async def start(self, port: int = 0) -> int:
        self._server = create_server()
        service = orchestrator_pb2.DESCRIPTOR.services_by_name["Orchestrator"]
        self._server.add_generic_rpc_handlers((service_handler(service, self),))
        bound = bind(self._server, "127.0.0.1", port)
        await self._server.start()
        return bound

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop(0)

    async def until(self, condition: Callable[[fleet_pb2.ServerReport], bool]) -> fleet_pb2.ServerReport:
        """Wait for a report that satisfies the condition."""
        return await eventually(lambda: next((report for report in self.reports if condition(report)), None))


@asynccontextmanager
async def report_hearer(**settings: Any) -> AsyncIterator[tuple[ReportHearer, str]]:
    hearer = ReportHearer(**settings)
    port = await hearer.start()
    try:
        yield hearer, f"127.0.0.1:{port}"
    finally:
        await hearer.stop()
