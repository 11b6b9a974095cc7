"""Direct mode seen from the wire: asking for tickets, using them, and a model server that is nothing but reports."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc.aio

from control_plane.api.tenant import TENANT_KEY
from modelyard.rpc.errors import Refusal, from_rpc_error
from modelyard.testing import model_info
from modelyard.v1 import (
    fleet_pb2,
    generation_pb2,
    model_server_pb2,
    model_server_pb2_grpc,
    orchestrator_pb2,
    ticket_pb2,
)
from tests.harness.front_door import PATIENCE, FrontDoor, ask
from tests.harness.model_servers import text_input
from tests.harness.programs import until


async def assign(
    door: FrontDoor,
    *,
    ahead: bool = False,
    ahead_requests: int = 0,
    prompt_tokens: int = 5,
    prompt_hashes: Sequence[int] = (),
    tenant: str = "default",
    timeout: float | None = None,
    **fields: Any,
) -> orchestrator_pb2.AssignResponse:
    """A ticket; fields as for `ask`."""
    outline = ask(**fields)
    del outline.input.messages[:]
    asked = orchestrator_pb2.AssignRequest(
        request=outline,
        prompt_tokens=prompt_tokens,
        prompt_hashes=prompt_hashes,
        ahead=ahead,
        ahead_requests=ahead_requests,
    )
    return await door.stub.Assign(asked, timeout=timeout, metadata=((TENANT_KEY, tenant),))


async def use(
    assigned: orchestrator_pb2.AssignResponse, stub: model_server_pb2_grpc.ModelServerStub, **changes: Any
) -> generation_pb2.GenerationResult | Refusal:
    """Call a model server with a ticket, or with some of that changed; the result, or why it was refused."""
    asked = {"model": assigned.model, "ticket": assigned.ticket, "input": text_input(max_tokens=3), **changes}
    try:
        async for message in stub.Generate(model_server_pb2.ModelServerGenerateRequest(**asked)):
            if message.HasField("result"):
                return message.result
    except grpc.aio.AioRpcError as error:
        return from_rpc_error(error)
    raise AssertionError("the stream ended without a result")


async def until_direct(door: FrontDoor, *server_ids: str) -> None:
    """Wait until these servers can tell tickets from forged ones."""

    async def known() -> bool:
        servers = {server.id: server for server in door.plane.fleet.servers()}
        return all(each in servers and servers[each].direct and servers[each].ready for each in server_ids)

    await until(known, PATIENCE, every=0.005)


def counted(door: FrontDoor, outcome: str) -> float:
    """Tickets that ended in this way."""
    labels = {"method": "Direct", "outcome": outcome}
    return door.plane.metrics.registry.get_sample_value("modelyard_requests_total", labels) or 0.0


async def until_counted(door: FrontDoor, outcome: str, times: int) -> None:
    async def reached() -> bool:
        return counted(door, outcome) == times

    await until(reached, PATIENCE, every=0.005)


class Scripted:
    """The report stream of a server that says what it is told to say."""

    def __init__(self, door: FrontDoor, server_id: str, endpoint: str, slots: int, instance_id: str) -> None:
        self._door = door
        self._whole = fleet_pb2.ServerReport(models=[model_info()], health=fleet_pb2.SERVER_HEALTH_READY)
        identity = self._whole.identity
        identity.server_id, identity.instance_id, identity.endpoint = server_id, instance_id, endpoint
        self._whole.engine.name, self._whole.load.slots = "scripted", slots
        self._call: Any = None
        self.directive = fleet_pb2.ServerDirective()

    async def open(self) -> None:
        """Attach anew."""
        self.close()
        self._call = self._door.stub.Attach()
        self._whole.tickets.SetInParent()
        self._whole.lease_epoch = 0
        self._whole.tickets.Clear()
        self._whole.tickets.SetInParent()
        await self._say(self._whole)
        self._whole.lease_epoch = self.directive.lease_epoch
        await self.report()

    def close(self) -> None:
        """Break the stream."""
        if self._call is not None:
            self._call.cancel()

    async def report(self, *outcomes: ticket_pb2.TicketOutcome, in_use: tuple[int, ...] = (), ahead: float = 0) -> None:
        """A whole report, `ahead` seconds after the last directive on the control plane's clock."""
        told = self._whole.tickets
        told.Clear()
        told.orchestrator_id = self.directive.orchestrator_id
        told.outcomes.extend(outcomes)
        told.in_use.extend(in_use)
        clock = self.directive.tickets.clock.ToNanoseconds() / 1e9
        told.as_of.FromNanoseconds(round((clock + ahead) * 1e9))
        await self._say(self._whole)

    async def report_alone(self, *outcomes: ticket_pb2.TicketOutcome) -> None:
        """A report of tickets alone."""
        report = fleet_pb2.ServerReport(lease_epoch=self.directive.lease_epoch)
        report.tickets.orchestrator_id = self.directive.orchestrator_id
        report.tickets.outcomes.extend(outcomes)
        await self._say(report)

    async def _say(self, report: fleet_pb2.ServerReport) -> None:
        async with asyncio.timeout(PATIENCE):
            await self._call.write(report)
            self.directive = await self._call.read()


@asynccontextmanager
async def scripted(
    door: FrontDoor, server_id: str = "scripted", endpoint: str = "127.0.0.1:1", slots: int = 4, instance_id: str = "1"
) -> AsyncIterator[Scripted]:
    server = Scripted(door, server_id, endpoint, slots, instance_id)
    await server.open()
    try:
        yield server
    finally:
        server.close()


def outcome(sequence: int, ticket_id: int, failure: str = "", **times: float) -> ticket_pb2.TicketOutcome:
    """The end of a request of 5 + 3 tokens; times in seconds."""
    made = ticket_pb2.TicketOutcome(sequence=sequence, ticket_id=ticket_id, failure_reason=failure)
    if not failure:
        made.result.usage.prompt_tokens, made.result.usage.completion_tokens = 5, 3
        made.result.finish_reason = generation_pb2.FINISH_REASON_LENGTH
        for name, seconds in times.items():
            getattr(made.result.timings, name).FromNanoseconds(round(seconds * 1e9))
    return made
