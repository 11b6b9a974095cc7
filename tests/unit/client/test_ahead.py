"""Tickets that a client takes ahead of need, against a control plane that says what it is told to."""

from __future__ import annotations

import asyncio
import itertools
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
        self.most = 1
        """Tickets at a time; an older control plane gives one."""
        self._numbers = itertools.count(1)

    async def Assign(self, asked: Any, timeout: float) -> orchestrator_pb2.AssignResponse:
        self.asked.append(asked)
        await self.answer.wait()
        if self.failure:
            raise self.failure
        first, *more = [self._ticket() for _ in range(min(max(1, asked.ahead_requests), self.most))]
        first.more.extend(more)
        return first

    def _ticket(self) -> orchestrator_pb2.AssignResponse:
        response = orchestrator_pb2.AssignResponse(ticket=b"%d" % next(self._numbers) if self.seconds else b"")
        response.valid_for.FromNanoseconds(round(self.seconds * 1e9))
        return response


def asked(prompt_tokens: int) -> orchestrator_pb2.AssignRequest:
    return orchestrator_pb2.AssignRequest(
        request=orchestrator_pb2.GenerateRequest(preset="p"), prompt_tokens=prompt_tokens
    )


async def called(shape: Shape, stub: Stub, tokens: int = 10, took: float = 0.01) -> bytes:
    """A call, with the ticket that it had."""
    followed = shape.begins()
    ticket = await shape.take(tokens)
    if followed:
        shape.begun(stub, asked)
    shape.ended(stub, asked, took, followed=followed)
    return ticket.ticket if ticket else b""


async def test_from_the_second_call_on_there_is_one_at_a_time() -> None:
    stub, shape = Stub(), Shape()
    assert [await called(shape, stub, took=0.1) for _ in range(4)] == [b"", b"", b"1", b"2"]
    await asyncio.sleep(0)
    assert len(stub.asked) == 3 and all(each.ahead and each.ahead_requests == 1 for each in stub.asked)
    assert {each.prompt_tokens for each in stub.asked} == {room(10)}


async def test_calls_that_follow_at_once_take_several_before_the_last_is_used() -> None:
    stub, shape = Stub(), Shape()
    stub.most = 99
    got = [await called(shape, stub, took=1e-6) for _ in range(40)]
    assert got == [b"", b"", *(b"%d" % number for number in range(1, 39))], "each once, in order, none waited for"
    assert {each.ahead_requests for each in stub.asked[1:]} == {_ahead._MOST // 2 + 1}
    assert len(stub.asked) <= 2 + 40 / (_ahead._MOST // 2)


async def test_no_more_are_asked_for_at_a_time_than_were_to_be_had() -> None:
    stub, shape = Stub(), Shape()
    stub.most = 2
    for _ in range(20):
        await called(shape, stub, took=1e-6)
        await asyncio.sleep(0)
    assert [each.ahead_requests for each in stub.asked[:1]] == [_ahead._MOST]
    assert {each.ahead_requests for each in stub.asked[1:]} <= {1, 2}
    assert len(stub.asked) <= 12


async def test_those_that_came_with_one_that_was_refused_are_not_used() -> None:
    stub, shape = Stub(), Shape()
    stub.most = 99
    for _ in range(3):
        await called(shape, stub, took=1e-6)
        await asyncio.sleep(0)
    shape.refused()
    assert await shape.take(10) is None


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


async def test_the_shapes_that_are_remembered_are_bounded_and_dropped_in_the_end() -> None:
    stub, tickets = Stub(), TicketsAhead()
    oldest = tickets.shape("oldest")
    assert oldest is not None
    for _ in range(2):
        await called(oldest, stub)
    for number in range(_ahead._MOST_SHAPES):
        tickets.shape(number)
    assert await oldest.take(10) is None, "dropped with its ticket"
    assert tickets.shape("oldest") is not oldest
    tickets.close()
    assert tickets.shape("oldest") is None
