"""Calls over one stream: the same as plain ones in everything but their price."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelyard.rpc.calls import MOST_BYTES, MOST_CALLS, PATH, SharedChannel, next_batch
from modelyard.rpc.calls_server import CallsServicer, add_services
from modelyard.rpc.channels import MAX_MESSAGE_BYTES, channel
from modelyard.rpc.errors import Refusal, Violation, from_rpc_error
from modelyard.rpc.reasons import Reason
from modelyard.rpc.server import bind, create_server, service_handler
from modelyard.v1 import calls_pb2, orchestrator_pb2, orchestrator_pb2_grpc
from tests.unit.rpc.test_channels import Cable

SERVICE = orchestrator_pb2.DESCRIPTOR.services_by_name["Orchestrator"]
METHOD = "/modelyard.v1.Orchestrator/"
DETAILS = "grpc-status-details-bin"


class Servicer:
    """GetModel does what its request names; ListModels answers at once."""

    def __init__(self) -> None:
        self.does: dict[str, Callable[[Any], Any]] = {}
        self.cancelled: list[str] = []
        self.hurdle = asyncio.Event()
        self.waiting = 0
        self.listed = 0

    async def ListModels(self, request: Any, context: Any) -> Any:
        self.listed += 1
        return orchestrator_pb2.ListModelsResponse()

    async def GetModel(self, request: Any, context: Any) -> Any:
        if request.name in self.does:
            return await self.does[request.name](context)
        self.waiting += 1
        try:
            await self.hurdle.wait()
        except asyncio.CancelledError:
            self.cancelled.append(request.name)
            raise
        finally:
            self.waiting -= 1
        return answer(request.name)


def answer(name: str) -> orchestrator_pb2.GetModelResponse:
    made = orchestrator_pb2.GetModelResponse()
    made.model.name = name
    return made


def asked(name: str) -> orchestrator_pb2.GetModelRequest:
    return orchestrator_pb2.GetModelRequest(name=name)


class Scene:
    """A server, and a channel to it."""

    def __init__(self, servicer: Servicer, link: SharedChannel, server: grpc.aio.Server, calls: Any, port: int) -> None:
        self.servicer = servicer
        self.link = link
        self.server = server
        self.calls: CallsServicer = calls
        self.port = port
        self.stub = orchestrator_pb2_grpc.OrchestratorStub(link)
        self.plain = orchestrator_pb2_grpc.OrchestratorStub(link.plain)

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not condition():
                await asyncio.sleep(0.005)

    async def both(self, name: str) -> list[grpc.aio.AioRpcError]:
        """How GetModel fails over the stream, and as a plain call."""
        assert self.link.shared
        return [await failure_of(stub.GetModel(asked(name))) for stub in (self.stub, self.plain)]

    async def joined(self) -> None:
        """The next call shares a stream."""
        async with asyncio.timeout(10):
            while not self.link.shared:
                await self.stub.ListModels(orchestrator_pb2.ListModelsRequest())


async def begin(servicer: object, *, port: int = 0, shares: bool = True) -> tuple[grpc.aio.Server, Any, int]:
    server = create_server()
    handler = service_handler(SERVICE, servicer)
    calls = None
    if shares:
        calls = add_services(server, handler)
    else:
        server.add_generic_rpc_handlers((handler,))
    port = bind(server, "127.0.0.1", port)
    await server.start()
    return server, calls, port


@asynccontextmanager
async def scene(*, shares: bool = True, joined: bool = True, idle: float = 10.0) -> AsyncIterator[Scene]:
    servicer = Servicer()
    server, calls, port = await begin(servicer, shares=shares)
    link = SharedChannel(channel(f"127.0.0.1:{port}"), idle=idle)
    made = Scene(servicer, link, server, calls, port)
    try:
        if joined and shares:
            await made.joined()
        yield made
    finally:
        await link.close()
        await server.stop(0)


async def failure_of(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


# ------------------------------------------------------------------ sameness ---

TEXT = st.text(max_size=60)
REFUSALS = st.builds(
    Refusal,
    st.sampled_from(Reason),
    TEXT,
    st.lists(st.builds(Violation, TEXT, TEXT), max_size=3),
    retry_after=st.none() | st.floats(0, 1e6),
    metadata=st.dictionaries(TEXT, TEXT, max_size=3),
)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(REFUSALS, st.booleans()), min_size=1, max_size=20))
def test_refusals_are_those_of_plain_calls(refusals: list[tuple[Refusal, bool]]) -> None:
    async def main() -> None:
        async with scene() as here:
            for number, (refusal, named) in enumerate(refusals):

                async def refuse(context: Any, refusal: Refusal = refusal, named: bool = named) -> None:
                    if named:
                        context.set_trailing_metadata((("modelyard-request-id", "r-1"),))
                    raise refusal

                here.servicer.does[str(number)] = refuse
            for number in range(len(refusals)):
                shared, plain = await here.both(str(number))
                assert shared.code() is plain.code()
                assert shared.details() == plain.details()
                assert sorted(shared.trailing_metadata()) == sorted(plain.trailing_metadata())
                assert vars(from_rpc_error(shared)) == vars(from_rpc_error(plain))

    asyncio.run(main())


async def test_what_is_no_refusal_ends_as_plain_calls_do() -> None:
    async def bug(context: Any) -> None:
        raise ZeroDivisionError

    async def abort(context: Any) -> None:
        await context.abort(grpc.StatusCode.ALREADY_EXISTS, "there", (("k", "v"),))

    async def nonsense(context: Any) -> object:
        return object()

    async with scene() as here:
        here.servicer.does |= {"bug": bug, "abort": abort, "nonsense": nonsense}
        for name, same_details in (("bug", False), ("abort", True), ("nonsense", False)):
            shared, plain = await here.both(name)
            assert shared.code() is plain.code(), name
            assert shared.details() == plain.details() or not same_details
        assert dict((await failure_of(here.stub.GetModel(asked("abort")))).trailing_metadata()) == {"k": "v"}
        for method in ("NoSuch", "Generate", "Attach"):  # the latter are streams
            refusal = from_rpc_error(await failure_of(here.link.unary_unary(METHOD + method)(b"")))
            assert refusal.code is grpc.StatusCode.UNIMPLEMENTED and refusal.transport
        for link in (here.link, here.link.plain):
            refusal = from_rpc_error(await failure_of(link.unary_unary(METHOD + "GetModel")(b"\xff\xff")))
            assert refusal.reason is Reason.INVALID_REQUEST and "do not parse" in refusal.message


async def test_metadata_of_the_stream_come_before_those_of_the_call() -> None:
    """Whoever forwards streams and adds whose they are is not talked out of it by what is inside."""

    async def tell(context: Any) -> Any:
        told = [value for key, value in context.invocation_metadata() if key.startswith("who")]
        return answer(repr(told))

    async with scene() as here:
        here.servicer.does["tell"] = tell
        got = await here.stub.GetModel(asked("tell"), metadata=(("who", "a"), ("who-bin", b"\xff")))
        assert got.model.name == repr(["a", b"\xff"])
        call = here.link.plain.stream_stream(PATH)(metadata=(("who", "proxy"),))
        start = calls_pb2.CallStart(id=1, method=METHOD + "GetModel", request=asked("tell").SerializeToString())
        start.metadata.add(key="who", value=b"me")
        await call.write(calls_pb2.MultiplexRequest(starts=[start]).SerializeToString())
        assert await call.read() == b""
        (end,) = calls_pb2.MultiplexResponse.FromString(await call.read()).ends
        assert orchestrator_pb2.GetModelResponse.FromString(end.response).model.name == repr(["proxy", "me"])


# --------------------------------------------------------------- many at once ---


async def test_calls_are_answered_as_they_end() -> None:
    async with scene() as here:
        slow = [asyncio.ensure_future(here.stub.GetModel(asked(f"slow-{n}"))) for n in range(20)]
        await here.until(lambda: here.servicer.waiting == 20)
        await here.stub.ListModels(orchestrator_pb2.ListModelsRequest(), timeout=5)
        assert not any(call.done() for call in slow)
        here.servicer.hurdle.set()
        assert [got.model.name for got in await asyncio.gather(*slow)] == [f"slow-{n}" for n in range(20)]


async def test_more_calls_than_a_stream_takes_are_plain() -> None:
    async with scene() as here:
        many = [asyncio.ensure_future(here.stub.GetModel(asked(str(n)))) for n in range(MOST_CALLS + 50)]
        await here.until(lambda: here.servicer.waiting == MOST_CALLS + 50)
        here.servicer.hurdle.set()
        assert len({got.model.name for got in await asyncio.gather(*many)}) == MOST_CALLS + 50


@settings(deadline=None)
@given(st.lists(st.binary(min_size=1, max_size=3).map(lambda raw: raw * 20_000), max_size=12))
def test_batches_keep_order_and_bounds(frames: list[bytes]) -> None:
    waiting, sent, counted = deque(frames), [], 0
    while waiting:
        before = len(waiting)
        batch, count = next_batch(waiting)
        assert count == before - len(waiting) > 0
        assert count == 1 or len(batch) <= MOST_BYTES
        if waiting:
            assert len(batch) + len(waiting[0]) > MOST_BYTES  # no room is left unused
        sent.append(batch)
        counted += count
    assert b"".join(sent) == b"".join(frames) and counted == len(frames)


async def test_large_requests_are_plain_and_large_answers_come_in_pieces() -> None:
    async def large(context: Any) -> bytes:
        return answer("x" * (40 << 20)).SerializeToString()

    async with scene() as here:
        here.servicer.hurdle.set()
        name = "n" * (2 * MOST_BYTES)
        assert (await here.stub.GetModel(asked(name))).model.name == name
        here.servicer.does["large"] = large
        call = asyncio.ensure_future(here.stub.GetModel(asked("large")))
        answered_between = 0
        while not call.done():
            await here.stub.ListModels(orchestrator_pb2.ListModelsRequest())
            answered_between += 1
        assert len((await call).model.name) == 40 << 20
        assert answered_between > 3


async def test_an_answer_that_is_too_large_fails_as_a_plain_call_does() -> None:
    async def huge(context: Any) -> bytes:
        return bytes(MAX_MESSAGE_BYTES + 1)

    async with scene() as here:
        here.servicer.does["huge"] = huge
        shared, plain = await here.both("huge")
        assert shared.code() is plain.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert from_rpc_error(shared).reason is from_rpc_error(plain).reason is Reason.INVALID_REQUEST
        await here.stub.ListModels(orchestrator_pb2.ListModelsRequest())
        assert here.link.shared


async def test_an_answer_that_does_not_parse() -> None:
    async def garbage(context: Any) -> bytes:
        return b"\xff\xff"

    async with scene() as here:
        here.servicer.does["garbage"] = garbage
        assert await here.stub.GetModel(asked("garbage")) is None
        assert await here.plain.GetModel(asked("garbage")) is None


# ---------------------------------------------------------- ends of a call ---


async def test_cancelling_stops_the_handler_and_nothing_else() -> None:
    async with scene() as here:
        doomed, spared = (asyncio.ensure_future(here.stub.GetModel(asked(name))) for name in ("doomed", "spared"))
        call = here.stub.GetModel(asked("by call"))
        await here.until(lambda: here.servicer.waiting == 3)
        doomed.cancel()  # the task that waits
        assert call.cancel()  # the call itself, as a lost lease does
        with pytest.raises(asyncio.CancelledError):
            await call
        assert not call.cancel()
        await here.until(lambda: here.servicer.waiting == 1)
        assert sorted(here.servicer.cancelled) == ["by call", "doomed"]
        here.servicer.hurdle.set()
        assert (await spared).model.name == "spared"


async def test_deadlines_hold_on_both_ends() -> None:
    left: list[float] = []

    async def look(context: Any) -> Any:
        left.append(context.time_remaining())
        return answer("")

    async with scene() as here:
        here.servicer.does["look"] = look
        await here.stub.GetModel(asked("look"), timeout=7)
        await here.stub.GetModel(asked("look"))
        assert 6 < left[0] <= 7 and left[1] is None
        refusal = from_rpc_error(await failure_of(here.stub.GetModel(asked("late"), timeout=0.05)))
        assert refusal.reason is Reason.DEADLINE_EXCEEDED and refusal.transport
        await here.until(lambda: here.servicer.cancelled == ["late"])
        # A client that does not look at the clock is told.
        call = here.link.plain.stream_stream(PATH)()
        start = calls_pb2.CallStart(id=9, method=METHOD + "GetModel")
        start.timeout.FromMilliseconds(30)
        await call.write(calls_pb2.MultiplexRequest(starts=[start]).SerializeToString())
        assert await call.read() == b""
        (end,) = calls_pb2.MultiplexResponse.FromString(await call.read()).ends
        assert (end.id, end.code) == (9, grpc.StatusCode.DEADLINE_EXCEEDED.value[0])


# -------------------------------------------------------- ends of a stream ---


async def test_a_peer_without_the_service_gets_plain_calls() -> None:
    async with scene(shares=False) as here:
        opened: list[int] = []
        make = here.link._open
        here.link._open = lambda: opened.append(1) or make()
        for _ in range(20):
            await here.stub.ListModels(orchestrator_pb2.ListModelsRequest())
        assert here.servicer.listed == 20 and not here.link.shared
        assert len(opened) == 1  # it is remembered


async def test_who_calls_seldom_opens_no_stream_and_an_idle_one_is_closed() -> None:
    async with scene(joined=False, idle=0.1) as here:
        await here.stub.ListModels(orchestrator_pb2.ListModelsRequest())
        await asyncio.sleep(0.15)
        await here.stub.ListModels(orchestrator_pb2.ListModelsRequest())
        assert here.link._stream is None
        await here.joined()
        waits = asyncio.ensure_future(here.stub.GetModel(asked("long")))
        await here.until(lambda: here.servicer.waiting == 1)
        await asyncio.sleep(0.3)
        assert here.link.shared  # not while a call is under way
        here.servicer.hurdle.set()
        await waits
        await here.until(lambda: here.link._stream is None)
        await here.joined()


async def test_a_broken_stream_fails_its_calls_as_a_broken_connection_does() -> None:
    async with scene() as here:
        pending = [asyncio.ensure_future(stub.GetModel(asked("x"))) for stub in (here.stub, here.stub, here.plain)]
        await here.until(lambda: here.servicer.waiting == 3)
        await here.server.stop(0)
        one, two, plain = [from_rpc_error(await failure_of(call)) for call in pending]
        assert one.transport and two.transport and plain.transport
        assert one.code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
        await here.until(lambda: here.servicer.cancelled == ["x"] * 3)
        again, _, _ = await begin(here.servicer, port=here.port)
        try:
            async with asyncio.timeout(10):
                while not here.link.shared:  # another stream, on another connection
                    with contextlib.suppress(grpc.aio.AioRpcError):
                        await here.stub.ListModels(orchestrator_pb2.ListModelsRequest())
                    await asyncio.sleep(0.05)
            here.servicer.hurdle.set()
            assert (await here.stub.GetModel(asked("anew"))).model.name == "anew"
        finally:
            await again.stop(0)


async def test_a_peer_that_falls_silent_is_noticed() -> None:
    servicer = Servicer()
    server, _, port = await begin(servicer)
    async with Cable(port) as cable:
        link = SharedChannel(channel(f"127.0.0.1:{cable.port}"))
        here = Scene(servicer, link, server, None, port)
        await here.joined()
        call = asyncio.ensure_future(here.stub.GetModel(asked("x")))
        await here.until(lambda: servicer.waiting == 1)
        began = asyncio.get_running_loop().time()
        cable.cut()
        refusal = from_rpc_error(await failure_of(call))
        assert refusal.code is grpc.StatusCode.UNAVAILABLE and refusal.transport
        assert asyncio.get_running_loop().time() - began < 10
        await link.close()
    await server.stop(0)


async def test_a_server_that_stops_fails_nobody() -> None:
    async with scene() as here:
        held = [asyncio.ensure_future(here.stub.GetModel(asked(str(n)))) for n in range(5)]
        await here.until(lambda: here.servicer.waiting == 5)
        ended = asyncio.Event()

        async def keep_calling() -> int:
            made = 0
            while not ended.is_set():
                await here.stub.ListModels(orchestrator_pb2.ListModelsRequest())
                made += 1
            return made

        callers = [asyncio.ensure_future(keep_calling()) for _ in range(8)]
        await here.until(lambda: here.servicer.listed > 50)
        here.calls.stop()
        await here.until(lambda: not here.link.shared)
        before = here.servicer.listed
        await here.until(lambda: here.servicer.listed > before + 50)  # by plain calls
        assert not any(call.done() for call in held)
        doomed = held.pop()
        doomed.cancel()  # is heard even now
        await here.until(lambda: here.servicer.cancelled == ["4"])
        here.servicer.hurdle.set()
        assert [got.model.name for got in await asyncio.gather(*held)] == list("0123")
        await here.until(lambda: here.link._stream is None)  # the stream has ended
        ended.set()
        assert sum(await asyncio.gather(*callers)) > 0


async def test_a_server_that_has_stopped_before_a_stream_began() -> None:
    async with scene(joined=False) as here:
        here.calls.stop()
        for _ in range(20):
            await here.stub.ListModels(orchestrator_pb2.ListModelsRequest())
            assert not here.link.shared


async def test_closing_cancels_what_runs() -> None:
    async with scene() as here:
        call = here.stub.GetModel(asked("x"))
        await here.until(lambda: here.servicer.waiting == 1)
        await here.link.close()
        with pytest.raises(asyncio.CancelledError):
            await call
        await here.until(lambda: here.servicer.cancelled == ["x"])


# ------------------------------------------------------------ the bare stream ---


class Bare:
    """A client that does not know what is good for it."""

    def __init__(self, here: Scene) -> None:
        self.call = here.link.plain.stream_stream(PATH)()

    async def send(self, **fields: Any) -> None:
        await self.call.write(calls_pb2.MultiplexRequest(**fields).SerializeToString())

    async def ends(self) -> list[calls_pb2.CallEnd]:
        while not (raw := await self.call.read()):
            pass
        assert raw is not grpc.aio.EOF
        return list(calls_pb2.MultiplexResponse.FromString(raw).ends)


def start(number: int) -> calls_pb2.CallStart:
    return calls_pb2.CallStart(id=number, method=METHOD + "GetModel")


async def test_one_call_too_many_is_refused() -> None:
    async with scene() as here:
        bare = Bare(here)
        await bare.send(starts=[start(n) for n in range(MOST_CALLS + 1)])
        (end,) = await bare.ends()
        assert (end.id, end.code) == (MOST_CALLS, grpc.StatusCode.RESOURCE_EXHAUSTED.value[0])
        assert [each.key for each in end.trailing_metadata] == [DETAILS]
        await bare.send(cancels=[0, 77_777])
        await bare.send(starts=[start(0)])  # there is room again, and the id is free
        await here.until(lambda: here.servicer.waiting == MOST_CALLS)
        here.servicer.hurdle.set()
        await bare.call.done_writing()
        answered: list[int] = []
        while (raw := await bare.call.read()) is not grpc.aio.EOF:
            answered += [each.id for each in calls_pb2.MultiplexResponse.FromString(raw).ends]
        assert sorted(answered) == list(range(MOST_CALLS))
        assert await bare.call.code() is grpc.StatusCode.OK


@pytest.mark.parametrize("twice", [True, False])
async def test_what_is_malformed_ends_the_stream(twice: bool) -> None:
    async with scene() as here:
        bare = Bare(here)
        await bare.send(starts=[start(1)])
        await here.until(lambda: here.servicer.waiting == 1)
        if twice:
            await bare.send(starts=[start(1)])
        else:
            await bare.call.write(b"\xff\xff")
        refusal = from_rpc_error(await failure_of(bare.ends()))
        assert refusal.reason is Reason.INVALID_REQUEST and not refusal.transport
        await here.until(lambda: here.servicer.waiting == 0)


async def test_a_client_that_leaves_stops_its_calls() -> None:
    async with scene() as here:
        bare = Bare(here)
        await bare.send(starts=[start(n) for n in range(10)])
        await here.until(lambda: here.servicer.waiting == 10)
        bare.call.cancel()
        await here.until(lambda: len(here.servicer.cancelled) == 10)
