"""Tickets that a client takes ahead of need, against a control plane that says what it is told to."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc.aio

from modelyard.client import _ahead
from modelyard.client._ahead import Shape, TicketsAhead, room
from modelyard.v1 import orchestrator_pb2


class Stub:
    def __init__(self, seconds: float = 60.0) -> None:
        self.seconds = seconds
        self.asked: list[orchestrator_pb2.AssignRequest] = []
        self.answer = asyncio.Event()
        self.answer.set()
        self.failure: Exception | None = None

    async def Assign(self, asked: Any, timeout: float) -> orchestrator_pb2.AssignResponse:
        self.asked.append(asked)
        await self.answer.wait()
        if self.failure:
            raise self.failure
        response = orchestrator_pb2.AssignResponse(ticket=b"%d" % len(self.asked) if self.seconds else b"")
        response.valid_for.FromNanoseconds(round(self.seconds * 1e9))
        return response


def wanted(tokens: int = 10, **fields: Any) -> orchestrator_pb2.AssignRequest:
    return orchestrator_pb2.AssignRequest(
        request=orchestrator_pb2.GenerateRequest(**{"preset": "p", **fields}), prompt_tokens=tokens
    )


async def called(shape: Shape, stub: Stub, tokens: int = 10) -> bytes:
    """A call, with the ticket that it had."""
    asked = wanted(tokens)
    followed = shape.begins()
    ticket = await shape.take(tokens)
    if followed:
        shape.begun(stub, asked)
    shape.ended(stub, asked, 0.01, followed=followed)
    return ticket.ticket if ticket else b""


def shape_of(tickets: TicketsAhead, **fields: Any) -> Shape | None:
    return tickets.shape(wanted(**fields))


async def test_from_the_second_call_on_there_is_one_at_a_time() -> None:
    stub, shape = Stub(), Shape()
    assert [await called(shape, stub) for _ in range(4)] == [b"", b"", b"1", b"2"]
    await asyncio.sleep(0)
    assert len(stub.asked) == 3 and all(each.ahead for each in stub.asked)
    assert {each.prompt_tokens for each in stub.asked} == {room(10)}


async def test_two_calls_never_get_the_same() -> None:
    stub, shape = Stub(), Shape()
    stub.answer.clear()
    for _ in range(2):
        await called(shape, stub)
    taking = [asyncio.ensure_future(shape.take(10)) for _ in range(3)]
    await asyncio.sleep(0)
    stub.answer.set()
    assert sorted(ticket.ticket if ticket else b"" for ticket in await asyncio.gather(*taking)) == [b"", b"", b"1"]


async def test_a_prompt_of_quite_another_length_leaves_it_alone() -> None:
    stub, shape = Stub(), Shape()
    for _ in range(2):
        await called(shape, stub, 1000)
    assert room(1000) == 1250 and room(10) == 138
    for tokens in (1251, 10, 100):
        assert await shape.take(tokens) is None
    assert (await shape.take(1250) or orchestrator_pb2.AssignResponse()).ticket == b"1"
    assert await shape.take(1250) is None


async def test_an_old_one_is_not_used_but_replaced() -> None:
    stub, shape = Stub(seconds=1e-9), Shape()
    for number in range(4):
        assert await called(shape, stub) == b""
        await asyncio.sleep(0)  # it comes, too late
        assert len(stub.asked) >= number


async def test_after_a_refusal_or_a_failure_there_is_a_pause() -> None:
    for stub in (Stub(seconds=0), Stub()):
        if stub.seconds:
            stub.failure = grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, grpc.aio.Metadata(), grpc.aio.Metadata())
        shape = Shape()
        for _ in range(10):
            assert await called(shape, stub) == b""
        assert len(stub.asked) <= 2, "once during a call, once after one"


async def test_a_control_plane_that_does_not_answer_holds_nobody_up() -> None:
    stub, shape = Stub(), Shape()
    stub.answer.clear()
    for _ in range(2):
        await called(shape, stub)
    async with asyncio.timeout(10):
        assert await shape.take(10) is None
    stub.answer.set()


def test_what_makes_a_shape() -> None:
    tickets = TicketsAhead()
    first = shape_of(tickets)
    assert first is shape_of(tickets, tokens=99) and first is not None
    assert shape_of(tickets, task_type=1) is not first
    assert shape_of(tickets, explain=True) is None
    assert shape_of(tickets, request_id="mine") is None


async def test_the_shapes_that_are_remembered_are_bounded_and_dropped_in_the_end() -> None:
    stub, tickets = Stub(), TicketsAhead()
    oldest = shape_of(tickets)
    assert oldest is not None
    for _ in range(2):
        await called(oldest, stub)
    for number in range(_ahead._MOST_SHAPES):
        shape_of(tickets, preset=str(number))
    assert await oldest.take(10) is None, "dropped with its ticket"
    assert shape_of(tickets) is not oldest
    tickets.close()
    assert shape_of(tickets) is None
