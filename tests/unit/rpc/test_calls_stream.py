"""The server's side of a shared stream, where it is the writing that is slow."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from modelyard.rpc.calls import MOST_CALLS
from modelyard.rpc.calls_server import PIECE_BYTES, _Stream
from modelyard.v1 import calls_pb2

PIECES = 8


class Method:
    """A handler of bytes."""

    response_serializer = bytes

    def __init__(self, answer: bytes) -> None:
        self._answer = answer

    async def unary_unary(self, request: bytes, context: object) -> bytes:
        return self._answer


class Methods:
    """Answers of a byte and of many, by the name of the method."""

    def service(self, details: Any) -> Method | None:
        return {"small": Method(b"x"), "large": Method(bytes(PIECES * PIECE_BYTES))}.get(details.method)


class Wire:
    """The client, as the server sees it: what it says, and what it has read."""

    def __init__(self) -> None:
        self.reads = asyncio.Event()
        self.ends: list[calls_pb2.CallEnd] = []
        self.on_read: Callable[[], Awaitable[None]] | None = None
        self._said: asyncio.Queue[calls_pb2.MultiplexRequest | None] = asyncio.Queue()

    def invocation_metadata(self) -> tuple[()]:
        return ()

    async def write(self, message: bytes) -> None:
        await self.reads.wait()
        await asyncio.sleep(0)
        self.ends += calls_pb2.MultiplexResponse.FromString(message).ends
        if self.on_read is not None:
            await self.on_read()

    async def says(self) -> AsyncIterator[calls_pb2.MultiplexRequest]:
        while (said := await self._said.get()) is not None:
            yield said

    def starts(self, method: str, *ids: int) -> None:
        self._said.put_nowait(
            calls_pb2.MultiplexRequest(starts=[calls_pb2.CallStart(id=number, method=method) for number in ids])
        )

    def cancels(self, *ids: int) -> None:
        self._said.put_nowait(calls_pb2.MultiplexRequest(cancels=ids))

    def leaves(self) -> None:
        self._said.put_nowait(None)


@pytest.fixture
async def wire() -> Wire:
    return Wire()


async def served(wire: Wire) -> None:
    """Until the client has left and has every answer."""
    stream = _Stream([Methods()], wire)  # type: ignore[arg-type, list-item]
    async with asyncio.timeout(30):
        await stream.read(wire.says())
        await stream.answered()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0)


async def test_a_large_answer_is_sent_among_small_ones_that_never_end(wire: Wire) -> None:
    last, passed = 1, 0

    async def more() -> None:
        """While the large answer is on its way, there are always small ones to send."""
        nonlocal last, passed
        passed += 1
        if [end.more for end in wire.ends if end.id == 1][-1:] == [False] or passed > 500:
            wire.leaves()
            wire.on_read = None
        else:
            wire.starts("small", *range(last + 1, last + 9))
            last += 8

    wire.on_read = more
    wire.reads.set()
    wire.starts("large", 1)
    wire.starts("small", 2)
    last = 2
    await served(wire)
    assert [end.more for end in wire.ends if end.id == 1] == [True] * (PIECES - 1) + [False]
    assert passed <= 500
    assert {end.code for end in wire.ends} == {0}


async def test_a_call_may_be_cancelled_between_two_pieces_of_its_answer(wire: Wire) -> None:
    failed: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: failed.append(context))

    async def cancel() -> None:
        wire.on_read = None
        wire.cancels(1)
        wire.starts("small", 2)
        wire.leaves()

    wire.on_read = cancel
    wire.reads.set()
    wire.starts("large", 1)
    await served(wire)
    gc.collect()  # what no task was asked for is told when it goes
    assert not failed
    assert [end.id for end in wire.ends if not end.more] == [2]


async def test_who_has_answers_to_read_may_still_have_as_many_calls_as_it_likes(wire: Wire) -> None:
    large = range(1, MOST_CALLS // 2 + 3)
    wire.starts("large", *large)
    wire.starts("small", 1000)
    serving = asyncio.create_task(served(wire))
    for _ in range(100):
        await asyncio.sleep(0)
    wire.starts("small", 1001)
    wire.reads.set()
    wire.leaves()
    await serving
    assert {end.code for end in wire.ends} == {0}
    assert {end.id for end in wire.ends if not end.more} == {*large, 1000, 1001}


async def test_who_does_not_read_is_not_let_in_without_end(wire: Wire) -> None:
    serving = asyncio.create_task(served(wire))
    wire.starts("small", *range(1, MOST_CALLS + 2))
    for _ in range(100):
        await asyncio.sleep(0)
    wire.starts("small", *range(1000, 1000 + 2 * MOST_CALLS))
    wire.leaves()
    for _ in range(100):
        await asyncio.sleep(0)
    assert not serving.done() and not wire.ends
    wire.reads.set()
    await serving
    refused = [end for end in wire.ends if end.code]
    assert refused and len(wire.ends) == 3 * MOST_CALLS + 1
