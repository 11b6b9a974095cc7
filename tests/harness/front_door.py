"""A control plane seen by its clients: one in this process or the address of another, and what its answers hold."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio

from control_plane.app import ControlPlane, running
from control_plane.config import ControlPlaneSettings
from modelyard.rpc.channels import channel
from modelyard.rpc.errors import Refusal, from_rpc_error
from modelyard.testing import FakeModelServer
from modelyard.v1 import (
    fleet_pb2,
    generation_pb2,
    orchestrator_pb2,
    orchestrator_pb2_grpc,
    selection_pb2,
)
from tests.harness.programs import until

PATIENCE = 30.0
"""Seconds after which a test gives up on something that a busy machine still does in a few."""

LIVE, SUSPECT = fleet_pb2.LEASE_STATE_LIVE, fleet_pb2.LEASE_STATE_SUSPECT
LOST, DRAINING = fleet_pb2.LEASE_STATE_LOST, fleet_pb2.LEASE_STATE_DRAINING


def ask(text: str = "Hello", **fields: Any) -> orchestrator_pb2.GenerateRequest:
    """A chat request. Sampling and requirements are recognised by name, the rest are fields of the request."""
    sampling = {name: fields.pop(name) for name in list(fields) if name in _SAMPLING}
    requirements = {name: fields.pop(name) for name in list(fields) if name in _REQUIREMENTS}
    request = orchestrator_pb2.GenerateRequest(**fields)
    if not request.HasField("input"):
        message = request.input.messages.add(role=generation_pb2.ROLE_USER)
        message.content.add(text=text)
    if sampling:
        request.input.sampling.CopyFrom(generation_pb2.SamplingParams(**sampling))
    if requirements:
        request.requirements.CopyFrom(selection_pb2.Requirements(**requirements))
    return request


_SAMPLING = frozenset(generation_pb2.SamplingParams.DESCRIPTOR.fields_by_name)
_REQUIREMENTS = frozenset(selection_pb2.Requirements.DESCRIPTOR.fields_by_name)


@dataclass
class Reply:
    """Everything that came back for one Generate call, failed or not."""

    events: list[str] = field(default_factory=list)
    decisions: list[selection_pb2.Decision] = field(default_factory=list)
    deltas: list[generation_pb2.GenerationDelta] = field(default_factory=list)
    summary: orchestrator_pb2.GenerationSummary | None = None
    error: Refusal | None = None
    trailing: dict[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self.deltas)

    @property
    def done(self) -> orchestrator_pb2.GenerationSummary:
        """The summary of an answer that must have succeeded."""
        assert self.error is None, repr(self.error)
        assert self.summary is not None, self.events
        return self.summary

    @property
    def refused(self) -> Refusal:
        """The refusal of a request that must have failed."""
        assert self.error is not None, f"succeeded: {self.events}"
        assert self.summary is None
        return self.error

    @property
    def reason(self) -> str:
        return "" if self.error is None else self.error.reason.value

    def take(self, response: orchestrator_pb2.GenerateResponse) -> None:
        self.events += [field.name for field, _ in response.ListFields()] or ["nothing"]
        if response.HasField("decision"):
            self.decisions.append(response.decision)
        if response.HasField("delta"):
            self.deltas.append(response.delta)
        if response.HasField("summary"):
            self.summary = response.summary


class Streaming:
    """A Generate call under way: its reply grows as it is read."""

    def __init__(self, call: grpc.aio.UnaryStreamCall) -> None:
        self.call = call
        self.reply = Reply()

    async def read(self) -> bool:
        """Take the next event; False at the end, whatever it is."""
        try:
            response = await self.call.read()
        except grpc.aio.AioRpcError as error:
            self.reply.error = from_rpc_error(error)
            response = grpc.aio.EOF
        if response is grpc.aio.EOF:
            self.reply.trailing = dict(await self.call.trailing_metadata() or ())
            return False
        self.reply.take(response)
        return True

    async def first_delta(self) -> Streaming:
        """Read until the first delta has come."""
        while not self.reply.deltas:
            assert await self.read(), f"ended before the first delta: {self.reply.error!r}"
        return self

    async def rest(self) -> Reply:
        async with asyncio.timeout(PATIENCE):
            while await self.read():
                pass
        return self.reply

    def cancel(self) -> None:
        self.call.cancel()


class FrontDoor:
    """A client of a control plane."""

    def __init__(self, address: str, link: grpc.aio.Channel, plane: ControlPlane | None = None) -> None:
        self.address = address
        self.channel = link
        self.stub = orchestrator_pb2_grpc.OrchestratorStub(link)
        self._plane = plane

    @property
    def plane(self) -> ControlPlane:
        """The control plane itself, where it lives in this process."""
        assert self._plane is not None
        return self._plane

    def stream(self, request: orchestrator_pb2.GenerateRequest, **options: Any) -> Streaming:
        return Streaming(self.stub.Generate(request, **options))

    async def generate(self, request: orchestrator_pb2.GenerateRequest | None = None, **options: Any) -> Reply:
        return await self.stream(ask() if request is None else request, **options).rest()

    async def refusal(self, call: Any) -> Refusal:
        """Why a unary call is refused."""
        try:
            answer = await call
        except grpc.aio.AioRpcError as error:
            return from_rpc_error(error)
        raise AssertionError(f"succeeded: {answer}")

    async def explain(self, request: orchestrator_pb2.GenerateRequest) -> selection_pb2.Decision:
        wrapped = orchestrator_pb2.ExplainSelectionRequest(request=request)
        return (await self.stub.ExplainSelection(wrapped)).decision

    async def servers(self) -> dict[str, fleet_pb2.ModelServerStatus]:
        listed = await self.stub.ListModelServers(orchestrator_pb2.ListModelServersRequest(), wait_for_ready=True)
        return {server.report.identity.server_id: server for server in listed.servers}

    async def server(self, server_id: str) -> fleet_pb2.ModelServerStatus:
        return (await self.servers())[server_id]

    async def until_server(
        self, server_id: str, condition: Callable[[fleet_pb2.ModelServerStatus], Any]
    ) -> fleet_pb2.ModelServerStatus:
        async def holds() -> fleet_pb2.ModelServerStatus | None:
            status = (await self.servers()).get(server_id)
            return status if status is not None and condition(status) else None

        return await until(holds, PATIENCE)

    async def until_ready(self, *server_ids: str) -> None:
        for server_id in server_ids:
            await self.until_server(server_id, ready)

    async def until_idle(self) -> None:
        """Wait until every slot that this control plane took was given back."""

        async def idle() -> bool:
            return all(not server.in_flight for server in (await self.servers()).values())

        await until(idle, PATIENCE)

    async def drain(self, server_id: str, undo: bool = False) -> fleet_pb2.ModelServerStatus:
        request = orchestrator_pb2.DrainModelServerRequest(server_id=server_id, undo=undo)
        return (await self.stub.DrainModelServer(request)).server


def ready(status: fleet_pb2.ModelServerStatus) -> bool:
    return status.lease_state == LIVE and status.report.health == fleet_pb2.SERVER_HEALTH_READY


def settings(**given: Any) -> ControlPlaneSettings:
    """Free ports, no metrics, gateway or warm-up, short intervals; `given` takes precedence, sections are merged."""
    values: dict[str, Any] = {
        "port": 0,
        "metrics_port": -1,
        "gateway": {"port": -1},
        "drain_grace": 1.0,
        "tasks": {"store": ""},
        "fleet": {"report_interval": 0.2, "lease_duration": 10.0, "warm_up": 0.0},
        "retry": {"base": 0.001, "cap": 0.01},
    }
    for key, value in given.items():
        values[key] = {**values.get(key, {}), **value} if isinstance(value, dict) else value
    return ControlPlaneSettings(**values)


@asynccontextmanager
async def front_door(**given: Any) -> AsyncIterator[FrontDoor]:
    """A control plane in this process and a client of it."""
    async with running(settings(**given)) as (plane, address), client(address, plane) as door:
        yield door


@asynccontextmanager
async def client(address: str, plane: ControlPlane | None = None) -> AsyncIterator[FrontDoor]:
    """A client with a connection of its own."""
    async with channel(address, own_connection=True) as link:
        yield FrontDoor(address, link, plane)


@asynccontextmanager
async def attached(door: FrontDoor, *fakes: FakeModelServer) -> AsyncIterator[tuple[FakeModelServer, ...]]:
    """Start fakes and attach them."""
    async with AsyncExitStack() as stack:
        for fake in fakes:
            await stack.enter_async_context(fake)
            await fake.attach(door.address)
        yield fakes


class Watching:
    """A WatchFleet call whose messages are kept as they come."""

    def __init__(self, call: grpc.aio.UnaryStreamCall) -> None:
        self.messages: list[orchestrator_pb2.WatchFleetResponse] = []
        self.error: Refusal | None = None
        self._call = call
        self._news = asyncio.Event()

    async def run(self) -> None:
        try:
            async for message in self._call:
                self.messages.append(message)
                self._news.set()
        except grpc.aio.AioRpcError as error:
            self.error = from_rpc_error(error)
            self._news.set()

    async def until(self, condition: Callable[[], Any]) -> None:
        async with asyncio.timeout(PATIENCE):
            while not condition():
                self._news.clear()
                await self._news.wait()

    def states(self, server_id: str) -> list[int]:
        """The lease states that a server went through, repetitions left out."""
        states: list[int] = []
        for message in self.messages:
            for server in message.servers:
                if server.report.identity.server_id == server_id and states[-1:] != [server.lease_state]:
                    states.append(server.lease_state)
        return states

    @property
    def removed(self) -> set[str]:
        return {server_id for message in self.messages for server_id in message.removed_server_ids}


@asynccontextmanager
async def watching(door: FrontDoor) -> AsyncIterator[Watching]:
    call = door.stub.WatchFleet(orchestrator_pb2.WatchFleetRequest())
    watch = Watching(call)
    task = asyncio.create_task(watch.run())
    try:
        await watch.until(lambda: watch.messages or watch.error)
        yield watch
    finally:
        call.cancel()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def attempts_of(summary: orchestrator_pb2.GenerationSummary) -> list[tuple[str, str]]:
    """(server, reason of the failure) of every attempt."""
    return [(attempt.server_id, attempt.failure_reason) for attempt in summary.attempts]


def succeeded(replies: Iterable[Reply]) -> list[Reply]:
    return [reply for reply in replies if reply.error is None]
