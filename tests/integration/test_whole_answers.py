"""Answers that are wanted whole: asked for with Complete, by stream where that is not possible."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest

from model_servers.engine import Delta, Finished, FinishReason, GenerationRequest, ToolCallDelta, Usage
from modelyard.rpc.channels import MAX_MESSAGE_BYTES
from modelyard.rpc.errors import Refusal, from_rpc_error
from modelyard.rpc.reasons import Reason
from modelyard.testing import FakeModelServer
from modelyard.v1 import generation_pb2, model_server_pb2, orchestrator_pb2
from modelyard.v1.generation_pb2 import GenerationDelta
from modelyard.v1.orchestrator_pb2 import GenerateRequest, GenerationSummary
from tests.harness.front_door import PATIENCE, FrontDoor, ask, attached, attempts_of, front_door
from tests.harness.model_servers import model_server, request
from tests.harness.programs import until
from tests.integration.test_model_server import OddEngine

FIRST, SECOND = "a", "b"  # of equals the lesser id is tried first


class Whole:
    """A sink that wants the answer whole."""

    def __init__(self) -> None:
        self.deltas: list[GenerationDelta] = []
        self.summary = GenerationSummary()
        self.calls = 0

    async def write(self, message: bytes) -> None:
        raise AssertionError("nothing is written to who wants the answer whole")

    def whole(self, deltas: Sequence[GenerationDelta], summary: GenerationSummary) -> None:
        self.deltas.extend(deltas)
        self.summary = summary
        self.calls += 1

    def time_remaining(self) -> float:
        return 10.0

    def invocation_metadata(self) -> None:
        return None

    def set_trailing_metadata(self, trailing_metadata: Any) -> None: ...

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self.deltas)


async def whole(door: FrontDoor, asked: GenerateRequest | None = None) -> Whole:
    sink = Whole()
    assert door.plane is not None
    await door.plane.servicer.Generate(asked or ask(), sink)
    assert sink.calls == 1
    return sink


class Old(FakeModelServer):
    """Knows no Complete, and answers as gRPC itself does."""

    asked = 0

    async def Complete(self, request: Any, context: grpc.aio.ServicerContext) -> Any:
        self.asked += 1
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")


class Sharing(FakeModelServer):
    shares_streams = True


async def joined(door: FrontDoor, fake: FakeModelServer) -> None:
    """The control plane's next call of a server that offers it shares a stream."""
    async with asyncio.timeout(10):
        while not door.plane.upstreams.get(fake.address).channel.shared:
            await whole(door)


@asynccontextmanager
async def fleet(*fakes: FakeModelServer, **given: Any) -> AsyncIterator[FrontDoor]:
    async with front_door(**given) as door, attached(door, *fakes):
        yield door


# ------------------------------------------------------------ control plane ---


async def test_one_message_carries_it_all() -> None:
    fake = FakeModelServer(FIRST)
    async with fleet(fake) as door:
        got = await whole(door)
        assert got.text == "Hello, world" and len(got.deltas) == 1
        assert got.summary.usage.completion_tokens == 3
        assert [call.method for call in fake.calls] == ["Complete"]
        assert (await door.generate()).text == "Hello, world"
        assert [call.method for call in fake.calls] == ["Complete", "Generate"]


@pytest.mark.parametrize("kind", [FakeModelServer, Old])
async def test_what_fails_after_tokens_is_done_elsewhere(kind: type[FakeModelServer]) -> None:
    """Nobody has seen them: this is no broken stream."""
    failing, honest = kind(FIRST), FakeModelServer(SECOND)
    failing.answer("Hel", Refusal(Reason.ENGINE_FAILED, "it broke"))
    async with fleet(failing, honest) as door:
        got = await whole(door)
        assert got.text == "Hello, world"
        assert attempts_of(got.summary) == [(FIRST, "ENGINE_FAILED"), (SECOND, "")]


async def test_a_server_without_complete_is_asked_by_stream_and_remembered() -> None:
    old = Old(FIRST)
    async with fleet(old) as door:
        for _ in range(3):
            got = await whole(door)
            assert got.text == "Hello, world" and attempts_of(got.summary) == [(FIRST, "")]
        assert old.asked == 1
        assert len(old.calls_of("Generate")) == 3
        assert (await door.server(FIRST)).models[0].failures == 0
        await old.detach()
        old.instance_id = uuid.uuid4().hex  # another process at the same address may know more
        await old.attach(door.address)
        assert (await whole(door)).text == "Hello, world"
        assert old.asked == 2


async def test_a_server_that_lacks_a_feature_has_complete_all_the_same() -> None:
    first, second = FakeModelServer(FIRST), FakeModelServer(SECOND)
    first.inject_error("Complete", Refusal(Reason.UNSUPPORTED, "no such thing here"))
    async with fleet(first, second) as door:
        assert attempts_of((await whole(door)).summary) == [(FIRST, "UNSUPPORTED"), (SECOND, "")]
        assert not first.calls_of("Generate")


async def test_log_probabilities_are_asked_for_by_stream() -> None:
    fake = FakeModelServer(FIRST)
    async with fleet(fake) as door:
        asked = ask()
        asked.input.sampling.logprobs = True
        assert (await whole(door, asked)).text == "Hello, world"
        assert [call.method for call in fake.calls] == ["Generate"]


class Rogue(FakeModelServer):
    raw = b""

    async def Complete(self, request: Any, context: grpc.aio.ServicerContext) -> Any:
        async with self._received("Complete", context, request):
            return self.raw


_DELTA = model_server_pb2.ModelServerCompleteResponse(delta=GenerationDelta(text="x", tokens=1)).SerializeToString()


@pytest.mark.parametrize(
    "raw",
    [b"", b"\xff\xfe garbage", _DELTA, b"\x1a\x7f\x08\x01"],
    ids=["nothing", "garbage", "no result", "truncated"],
)
async def test_what_is_no_answer_is_asked_elsewhere(raw: bytes) -> None:
    rogue = Rogue(FIRST)
    rogue.raw = raw
    async with fleet(rogue, FakeModelServer(SECOND)) as door:
        got = await whole(door)
        assert got.text == "Hello, world"
        assert [server for server, _ in attempts_of(got.summary)] == [FIRST, SECOND]


async def test_more_than_a_message_may_have_is_a_refusal_too() -> None:
    rogue = Rogue(FIRST)
    rogue.raw = bytes(MAX_MESSAGE_BYTES + 1)
    async with fleet(rogue) as door:
        with pytest.raises(Refusal, match="too large"):
            await whole(door)
        await door.until_idle()


@pytest.mark.parametrize("told", [0.0, 3600.0, -5.0, 315_576_000_000.0])
async def test_a_server_cannot_claim_what_did_not_happen(told: float) -> None:
    """How long it took is measured; the server only tells how that divides."""
    fake = FakeModelServer(FIRST)
    fake.timings = generation_pb2.Timings()
    for name in ("ttft", "tpot", "total"):
        getattr(fake.timings, name).seconds = int(told)
    async with fleet(fake) as door:
        began = time.monotonic()
        got = await whole(door)
        took = time.monotonic() - began
        timings = got.summary.timings
        ttft, tpot = timings.ttft.ToNanoseconds() / 1e9, timings.tpot.ToNanoseconds() / 1e9
        assert 0 <= ttft <= took and 0 <= tpot <= took / 2
        total = timings.total.ToNanoseconds() / 1e9
        # The two of them make up what was measured, whatever was told.
        assert ttft + 2 * tpot == pytest.approx(total, abs=max(0.1, took / 2))
        assert timings.HasField("tpot") == (told > 0)


@pytest.mark.parametrize("kind", [FakeModelServer, Sharing])
async def test_a_lease_that_runs_out_ends_the_wait(kind: type[FakeModelServer]) -> None:
    fake, other = kind(FIRST), FakeModelServer(SECOND)
    async with fleet(fake, fleet={"report_interval": 0.1, "lease_duration": 3.0}) as door:
        if fake.shares_streams:
            await joined(door, fake)
        gate = fake.gate("Complete")
        waiting = asyncio.create_task(whole(door))
        await gate.arrived.wait()
        async with attached(door, other):
            await fake.detach()
            got = await waiting
        assert attempts_of(got.summary) == [(FIRST, "SERVERS_AWAY"), (SECOND, "")]
        await fake.until(lambda: fake.calls_of("Complete")[-1].outcome == "cancelled")


@pytest.mark.parametrize("kind", [FakeModelServer, Sharing])
async def test_who_leaves_stops_the_work(kind: type[FakeModelServer]) -> None:
    fake = kind(FIRST)
    async with fleet(fake) as door:
        if fake.shares_streams:
            await joined(door, fake)
        gate = fake.gate("Complete")
        waiting = asyncio.create_task(whole(door))
        await gate.arrived.wait()
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await fake.until(lambda: fake.calls_of("Complete")[-1].outcome == "cancelled")
        await door.until_idle()


@pytest.mark.parametrize("dies", [True, False])
async def test_servers_that_come_and_go_fail_nobody(dies: bool) -> None:
    """Those that wait over the stream of a server that dies are answered elsewhere; one that stops answers them."""
    first = Sharing(FIRST)
    async with AsyncExitStack() as stack:
        door = await stack.enter_async_context(front_door())
        second = await stack.enter_async_context(
            model_server(server_id=SECOND, orchestrators=(door.address,), engine_settings={"answer_tokens": 3})
        )
        await stack.enter_async_context(attached(door, first))
        await door.until_ready(FIRST, SECOND)
        ended = asyncio.Event()

        async def caller() -> int:
            made = 0
            while not ended.is_set():
                assert (await whole(door)).text
                made += 1
            return made

        upstreams = door.plane.upstreams
        callers = [asyncio.create_task(caller()) for _ in range(12)]
        await until(lambda: as_task(upstreams.get(first.address).channel.shared), PATIENCE)
        if dies:
            await first.stop()
            await first.start(first.port)
            await first.attach(door.address)
        else:
            await until(lambda: as_task(upstreams.get(second.address).channel.shared), PATIENCE)
            second.stopping.set()
            await second.task
        before = len(first.calls_of("Complete"))
        await until(lambda: as_task(len(first.calls_of("Complete")) > before + 50), PATIENCE)
        ended.set()
        assert min(await asyncio.gather(*callers)) > 0
        await door.until_idle()


async def as_task(holds: bool) -> bool:
    return holds


# ------------------------------------------------------------- model server ---


def complete(asked: model_server_pb2.ModelServerGenerateRequest) -> model_server_pb2.ModelServerCompleteRequest:
    """The bytes of one are the other."""
    return model_server_pb2.ModelServerCompleteRequest.FromString(asked.SerializeToString())


async def test_pieces_are_put_together() -> None:
    async def pieces(request: GenerationRequest) -> AsyncGenerator[Delta | Finished, None]:
        yield Delta("", 1, reasoning_text="Hm")
        yield Delta("He", 1, reasoning_text="m.")
        yield Delta("llo", 2, tool_calls=(ToolCallDelta(1, "id-1", "g", "{}"), ToolCallDelta(0, "id-0", "f", '{"a":')))
        yield Delta("", 1, tool_calls=(ToolCallDelta(0, arguments_json=" 1}"),))
        yield Finished(FinishReason.TOOL_CALLS, Usage(5, 0, 6), last=Delta("!", 1))

    async with model_server(OddEngine(pieces)) as server:
        answer = await server.stub.Complete(complete(request(model="odd")))
    delta = answer.delta
    assert (delta.text, delta.reasoning_text, delta.tokens) == ("Hello!", "Hmm.", 6)
    calls = [(call.index, call.id, call.name, call.arguments_json) for call in delta.tool_calls]
    assert calls == [(0, "id-0", "f", '{"a": 1}'), (1, "id-1", "g", "{}")]
    assert answer.result.usage.completion_tokens == 6 and answer.result.timings.HasField("ttft")


async def test_an_empty_answer_has_no_delta() -> None:
    async def nothing(request: GenerationRequest) -> AsyncGenerator[Delta | Finished, None]:
        yield Finished(FinishReason.STOP, Usage(5, 0, 0))

    async with model_server(OddEngine(nothing)) as server:
        answer = await server.stub.Complete(complete(request(model="odd")))
    assert answer.HasField("result") and not answer.HasField("delta")


async def test_an_answer_too_large_for_one_message_is_refused() -> None:
    async def endless(request: GenerationRequest) -> AsyncGenerator[Delta | Finished, None]:
        for _ in range((MAX_MESSAGE_BYTES >> 22) + 1):
            yield Delta("x" * (4 << 20), 1)
        yield Finished(FinishReason.STOP, Usage(5, 0, 17))

    async with model_server(OddEngine(endless)) as server:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await server.stub.Complete(complete(request(model="odd")), timeout=20)
        refusal = from_rpc_error(caught.value)
        assert refusal.reason is Reason.UNSUPPORTED and not refusal.transport
        await server.until_load(running=0)


async def test_a_stall_ends_a_whole_answer() -> None:
    engine = {"faults": [{"kind": "hang", "tokens": 3}]}
    async with model_server(engine_settings=engine, stall_seconds=0.3, canary_seconds=0) as server:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await server.stub.Complete(complete(request(max_tokens=40)), timeout=20)
    refusal = from_rpc_error(caught.value)
    assert refusal.reason is Reason.ENGINE_FAILED and "stopped working" in refusal.message


# ------------------------------------------------------------- Complete itself ---


def complete_request(**fields: Any) -> orchestrator_pb2.CompleteRequest:
    return orchestrator_pb2.CompleteRequest.FromString(ask(**fields).SerializeToString())


async def test_complete_tells_all_of_it_in_one_message() -> None:
    first, second = FakeModelServer(FIRST), Old(SECOND)
    first.inject_error("Complete", Refusal(Reason.ENGINE_FAILED, "it broke"))
    second.answer(
        GenerationDelta(reasoning_text="Hm. ", tokens=1),
        "Hel",
        "lo",
        GenerationDelta(tool_calls=[generation_pb2.ToolCallDelta(index=1, id="c", name="n", arguments_json='{"a":')]),
        GenerationDelta(tool_calls=[generation_pb2.ToolCallDelta(index=1, arguments_json="1}")], tokens=1),
    )
    async with fleet(first, second) as door:
        asked = complete_request(explain=True, request_id="mine")
        call = door.stub.Complete(asked, timeout=10)
        response = await call
        assert response.delta == GenerationDelta(
            text="Hello",
            reasoning_text="Hm. ",
            tokens=4,
            tool_calls=[generation_pb2.ToolCallDelta(index=1, id="c", name="n", arguments_json='{"a":1}')],
        )
        assert attempts_of(response.summary) == [(FIRST, "ENGINE_FAILED"), (SECOND, "")]
        assert [decision.server_id for decision in response.decisions] == [FIRST, SECOND]
        assert response.summary.request_id == "mine"
        assert ("modelyard-request-id", "mine") in tuple(await call.trailing_metadata())
        first.answer(GenerationDelta())
        assert not (await door.stub.Complete(orchestrator_pb2.CompleteRequest(input=asked.input))).decisions


async def test_complete_is_refused_as_generate_is() -> None:
    async with fleet(FakeModelServer(FIRST), limits={"max_request_bytes": 1024}) as door:
        for asked, reason in (
            (orchestrator_pb2.CompleteRequest(), Reason.INVALID_REQUEST),
            (orchestrator_pb2.CompleteRequest(preset="x" * 2000), Reason.INVALID_REQUEST),
            (
                orchestrator_pb2.CompleteRequest.FromString(ask(model="nowhere").SerializeToString()),
                Reason.UNKNOWN_MODEL,
            ),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await door.stub.Complete(asked, timeout=10)
            refusal = from_rpc_error(caught.value)
            assert refusal.reason is reason and not refusal.transport


async def test_whoever_leaves_a_complete_stops_the_model() -> None:
    fake = FakeModelServer(FIRST)
    async with fleet(fake) as door:
        gate = fake.gate("Complete")
        call = door.stub.Complete(complete_request())
        waiting = asyncio.ensure_future(call)
        await gate.arrived.wait()
        call.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await fake.until(lambda: fake.calls[0].outcome == "cancelled")
        assert (await door.server(FIRST)).in_flight == 0
