"""Model servers that do everything wrong: the control plane serves the others, and stays small."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import resource
from collections.abc import AsyncIterator
from pathlib import Path
from statistics import median

import grpc
import grpc.aio
import pytest
from google.protobuf.json_format import MessageToJson

from modelyard.rpc.errors import DETAILS_KEY, from_rpc_error
from modelyard.rpc.reasons import Reason
from modelyard.rpc.server import bind, create_server, service_handler
from modelyard.rpc.validation import MAX_MODELS
from modelyard.testing import FakeModelServer, model_info
from modelyard.v1 import fleet_pb2, generation_pb2, model_server_pb2, orchestrator_pb2
from tests.harness.front_door import LIVE, ask, attached, attempts_of, front_door
from tests.harness.programs import until

ROGUE, HONEST = "a-rogue", "b-honest"  # of equals the lesser id is tried first

Result = generation_pb2.GenerationResult
Answer = model_server_pb2.ModelServerGenerateResponse
DELTA = Answer(delta=generation_pb2.GenerationDelta(text="x", tokens=1)).SerializeToString()
RESULT = Answer(result=Result(finish_reason=generation_pb2.FINISH_REASON_STOP)).SerializeToString()


def resident() -> int:
    """Bytes of memory that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


class Rogue(FakeModelServer):
    """A model server whose answers are any bytes, or any behaviour at all."""

    def __init__(self, server_id: str = ROGUE, **fields) -> None:
        super().__init__(server_id, **fields)
        self.pieces: tuple[bytes, ...] = ()
        self.embedding: bytes = b""
        self.sent = 0

    async def Generate(self, request, context) -> AsyncIterator[bytes]:
        async with self._received("Generate", context, request):
            async for piece in self.stream(context):
                self.sent += 1
                yield piece

    async def stream(self, context) -> AsyncIterator[bytes]:
        for piece in self.pieces:
            yield piece

    async def Embed(self, request, context) -> bytes:
        async with self._received("Embed", context, request):
            return self.embedding


async def healthy(door) -> None:
    """The control plane answers, and the honest server works."""
    assert (await door.generate(ask(server_id=HONEST))).text == "Hello, world"
    await door.until_idle()


BROKEN_BEFORE_A_TOKEN = {
    "nothing at all": (),
    "an empty message": (b"",),
    "garbage": (b"\xff\xfe\xfd garbage",),
    "a truncated result": (b"\x1a\x7f\x08\x01",),
    "another message": (orchestrator_pb2.GenerateResponse(summary={"request_id": "forged"}).SerializeToString(),),
    "a field nobody knows": (b"\xfa\x3f\x03abc",),
    "a decision": (orchestrator_pb2.GenerateResponse(decision={"summary": "forged"}).SerializeToString(),),
}


@pytest.mark.parametrize("name", BROKEN_BEFORE_A_TOKEN)
async def test_a_broken_answer_is_repeated_elsewhere(name):
    async with front_door() as door, attached(door, Rogue(), FakeModelServer(HONEST)) as (rogue, _):
        rogue.pieces = BROKEN_BEFORE_A_TOKEN[name]
        reply = await door.generate()
        assert attempts_of(reply.done) == [(ROGUE, "ENGINE_FAILED"), (HONEST, "")]
        assert reply.text == "Hello, world" and set(reply.events) == {"delta", "summary"}
        assert (await door.server(ROGUE)).models[0].failures == 1
        await healthy(door)


async def test_garbage_after_a_token_ends_the_answer_as_broken():
    async with front_door() as door, attached(door, Rogue(), FakeModelServer(HONEST)) as (rogue, _):
        for garbage in (b"\xff\xfe\xfd", b"\x1a\x7f\x08", b"\x1a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01"):
            rogue.pieces = (DELTA, garbage)
            reply = await door.generate(ask(server_id=ROGUE))
            assert reply.reason == "STREAM_BROKEN", repr(reply.error)
            assert reply.text == "x"
        await healthy(door)


FORGED = orchestrator_pb2.GenerateResponse(summary={"server_id": HONEST, "request_id": "forged"}).SerializeToString()


@pytest.mark.parametrize(
    "piece",
    [b"\x12\xff\xff\xff\x0fno delta", b"\x12\x05ab", b"\x12", DELTA + b"\xff\xff", DELTA + FORGED, DELTA + RESULT],
    ids=["a wild length", "too short", "a tag alone", "a tail of garbage", "a forged summary", "two in one"],
)
async def test_only_a_delta_passes_unread(piece):
    async with front_door() as door, attached(door, Rogue(), FakeModelServer(HONEST)) as (rogue, _):
        rogue.pieces = (piece, RESULT)
        reply = await door.generate()
        # Either it is no answer at all, or its delta came through; never what the server has no say in.
        assert reply.error is None or reply.reason == "STREAM_BROKEN", repr(reply.error)
        if reply.summary is not None:
            assert reply.events.count("summary") == 1 and reply.done.request_id != "forged"
        await healthy(door)


async def test_a_server_that_goes_on_after_its_result_is_left_alone():
    class Endless(Rogue):
        async def stream(self, context) -> AsyncIterator[bytes]:
            yield DELTA
            yield RESULT
            while True:
                yield DELTA * 10_000

    async with front_door() as door, attached(door, Endless(slots=2), FakeModelServer(HONEST)) as (rogue, _):
        before = resident()
        for _ in range(10):
            reply = await door.generate(ask(server_id=ROGUE))
            assert reply.events == ["delta", "summary"]
        await door.until_idle()
        # Its calls are not left open until some deadline minutes away.
        await rogue.until(lambda: all(call.outcome == "cancelled" for call in rogue.calls_of("Generate")), timeout=8)
        assert resident() - before < 200e6
        await healthy(door)


async def test_a_server_that_keeps_its_call_open_after_the_result_holds_nobody_up():
    class Lingering(Rogue):
        async def stream(self, context) -> AsyncIterator[bytes]:
            yield DELTA
            yield RESULT
            await asyncio.Event().wait()

    async with front_door() as door, attached(door, Lingering(slots=1)) as (rogue,):
        for _ in range(5):
            assert (await door.generate()).done
        await rogue.until(lambda: all(call.outcome == "cancelled" for call in rogue.calls_of("Generate")), timeout=8)
        await door.until_idle()


async def test_endless_deltas_end_with_the_deadline_and_need_no_memory():
    class Endless(Rogue):
        async def stream(self, context) -> AsyncIterator[bytes]:
            big = Answer(delta=generation_pb2.GenerationDelta(text="x" * 50_000)).SerializeToString()
            while True:
                yield big

    async with front_door() as door, attached(door, Endless(), FakeModelServer(HONEST)) as (rogue, _):
        call = door.stream(ask(server_id=ROGUE), timeout=2.0)
        await call.first_delta()
        before = resident()
        quick = [(await door.generate(ask(server_id=HONEST), timeout=10)).text for _ in range(5)]
        assert quick == ["Hello, world"] * 5
        reply = call.reply
        while await call.read():
            reply.deltas.clear()
            reply.events.clear()
        assert reply.reason == "DEADLINE_EXCEEDED"
        assert resident() - before < 200e6
        await rogue.until(lambda: rogue.calls_of("Generate")[0].outcome == "cancelled")
        await healthy(door)


async def test_absurd_usage_is_rendered_all_the_same():
    price = fleet_pb2.Price(prompt_usd_per_million_tokens=1e9, completion_usd_per_million_tokens=1e9)
    usage = generation_pb2.Usage(
        prompt_tokens=2**32 - 1, cached_prompt_tokens=2**32 - 1, completion_tokens=2**32 - 1, reasoning_tokens=7
    )
    async with front_door() as door, attached(door, Rogue(models=[model_info(price=price)])) as (rogue,):
        rogue.pieces = (DELTA, Answer(result=Result(finish_reason=99, usage=usage)).SerializeToString())
        summary = (await door.generate()).done
        assert summary.cost_nano_usd == 2**63 - 1  # more than there is: the most that fits
        assert summary.usage == usage


@pytest.mark.parametrize(
    "embedding",
    [
        b"\xff\xff\xff",
        b"",
        model_server_pb2.ModelServerEmbedResponse(embeddings=[{"values": [1.0]}] * 3).SerializeToString(),
    ],
    ids=["garbage", "none", "too many"],
)
async def test_a_broken_embedding_is_repeated_elsewhere(embedding):
    async with front_door() as door, attached(door, Rogue(), FakeModelServer(HONEST)) as (rogue, _):
        rogue.embedding = embedding
        answer = await door.stub.Embed(orchestrator_pb2.EmbedRequest(inputs=["ab", "c"]))
        assert (answer.server_id, len(answer.embeddings)) == (HONEST, 2)
        await healthy(door)


BOGUS_DETAILS = [b"\xff\xff garbage", b"", b"\x08\x03\x12\xff\xff\xff\x7f", b"x" * 7000]


async def test_bogus_status_details_are_survived():
    class Failing(Rogue):
        async def stream(self, context) -> AsyncIterator[bytes]:
            details = BOGUS_DETAILS[len(self.calls) % len(BOGUS_DETAILS)]
            context.set_trailing_metadata(((DETAILS_KEY, details),))
            await context.abort(grpc.StatusCode.UNKNOWN, "\n\t€ " * 50)
            yield b""

    async with front_door() as door, attached(door, Failing(), FakeModelServer(HONEST)):
        for _ in BOGUS_DETAILS:
            reply = await door.generate()
            assert attempts_of(reply.done)[-1] == (HONEST, "")
        await healthy(door)


async def test_an_endpoint_where_nobody_listens():
    async with front_door() as door, attached(door, FakeModelServer(HONEST)), Rogue() as rogue:
        gone = rogue.port
        await rogue.stop()
        rogue.port = gone
        await rogue.attach(door.address)
        assert attempts_of((await door.generate()).done) == [(ROGUE, "SERVERS_AWAY"), (HONEST, "")]
        await healthy(door)


async def test_an_endpoint_that_is_the_control_plane_itself():
    async with front_door() as door, attached(door, FakeModelServer(HONEST)), Rogue() as rogue:
        own = rogue.port
        rogue.port = int(door.address.rpartition(":")[2])
        await rogue.attach(door.address)
        for _ in range(10):
            assert attempts_of((await door.generate()).done)[-1] == (HONEST, "")
        refusal = (await door.generate(ask(server_id=ROGUE))).refused
        assert refusal.reason in (Reason.ATTEMPTS_EXHAUSTED, Reason.SERVERS_AWAY)
        # It cannot serve, and is not asked for ever.
        assert (await door.server(ROGUE)).models[0].failures > 0
        rogue.port = own
        await healthy(door)


async def test_an_endpoint_that_speaks_no_grpc():
    async def hello(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\nhello")
        with contextlib.suppress(ConnectionError):
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(hello, "127.0.0.1", 0)
    async with server, front_door() as door, attached(door, FakeModelServer(HONEST)), Rogue() as rogue:
        own, rogue.port = rogue.port, server.sockets[0].getsockname()[1]
        await rogue.attach(door.address)
        assert attempts_of((await door.generate()).done)[-1] == (HONEST, "")
        rogue.port = own
        await healthy(door)


# ----------------------------------------------------------------- reports ---


def report(**fields) -> fleet_pb2.ServerReport:
    values = {
        "identity": {"server_id": ROGUE, "instance_id": "i", "endpoint": "127.0.0.1:1"},
        "engine": {"name": "e"},
        "models": [model_info()],
        "load": {"slots": 1},
        "health": fleet_pb2.SERVER_HEALTH_READY,
    }
    return fleet_pb2.ServerReport(**{**values, **fields})


async def attach(door, *reports) -> str:
    """Send the reports on one stream; why it ended, or "" if the last one was answered."""
    call = door.stub.Attach()
    try:
        for each in reports:
            await call.write(each)
            if await asyncio.wait_for(call.read(), 20) is grpc.aio.EOF:
                return "ended"
        return ""
    except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
        if isinstance(error, grpc.aio.AioRpcError):
            return from_rpc_error(error).reason
        return "ended"
    finally:
        call.cancel()


MALFORMED_REPORTS = {
    "nothing": fleet_pb2.ServerReport(),
    "no slots": report(load={"slots": 0}),
    "a score that is no number": report(
        models=[model_info(capabilities=[fleet_pb2.Capability(task_type=1, score=float("nan"))])]
    ),
    "a negative price": report(models=[model_info(price={"prompt_usd_per_million_tokens": -1.0})]),
    "an infinite price": report(models=[model_info(price={"prompt_usd_per_million_tokens": float("inf")})]),
    "negative time": report(models=[model_info(performance={"ttft": {"seconds": -5}})]),
    "no context": report(models=[model_info(context_length=0)]),
    "an endless name": report(identity={"server_id": "x" * 5000, "instance_id": "i", "endpoint": "h:1"}),
    "a path for an endpoint": report(
        identity={"server_id": ROGUE, "instance_id": "i", "endpoint": "unix:/run/docker.sock"}
    ),
    "a port out of range": report(identity={"server_id": ROGUE, "instance_id": "i", "endpoint": "h:99999"}),
    "many labels": report(
        identity={
            "server_id": ROGUE,
            "instance_id": "i",
            "endpoint": "h:1",
            "labels": {str(n): "v" for n in range(33)},
        }
    ),
    "a model twice": report(models=[model_info(), model_info()]),
    "a duration beyond all time": report(models=[model_info(performance={"ttft": {"seconds": 2**63 - 1}})]),
    "a novel": report(health_detail="x" * 8_000_000),
    "an unknown feature": report(models=[model_info(features=[99])]),
    "an unknown state of a model": report(models=[model_info(state=99)]),
    "a load that ends before it begins": report(models=[model_info(load_time={"seconds": -5})]),
    "an endless fingerprint": report(models=[model_info(fingerprint="x" * 5000)]),
    "too many models": report(models=[model_info(f"m{n}") for n in range(4097)]),
}


@pytest.mark.parametrize("name", MALFORMED_REPORTS)
async def test_a_malformed_report_is_refused(name):
    async with front_door() as door:
        assert await attach(door, MALFORMED_REPORTS[name]) == Reason.INVALID_REQUEST
        assert not await door.servers()


async def test_huge_numbers_in_reports_do_no_harm():
    huge = 2**32 - 1
    models = [
        model_info(
            context_length=huge,
            price={"prompt_usd_per_million_tokens": 1e9, "completion_usd_per_million_tokens": 1e9},
            performance={
                "ttft": {"seconds": 315_575_999_999},
                "tpot": {"seconds": 315_575_999_999, "nanos": 999_999_999},
                "decode_tokens_per_second": 1e9,
            },
            state=fleet_pb2.MODEL_STATE_COLD,
            state_detail="\x1b[31m" * 100_000,
            memory_bytes=2**64 - 1,
            load_time={"seconds": 315_575_999_999, "nanos": 999_999_999},
        )
    ]
    load = {"slots": huge, "running": huge, "waiting": huge, "foreign": huge, "kv_cache_utilization": 1.0}
    wild = report(
        models=models,
        load=load,
        hardware={"memory_bytes": 2**64 - 1, "memory_used_bytes": 2**64 - 1, "cpu_cores": huge},
        pool={"size": huge, "in_use": huge, "opened": 2**64 - 1, "reused": 2**64 - 1},
    )
    async with front_door() as door, attached(door, FakeModelServer(HONEST)):
        assert await attach(door, wild, wild) == ""
        told = (await door.server(ROGUE)).report
        assert (told.load.slots, told.pool.reused, told.hardware.memory_used_bytes) == (huge, 2**64 - 1, 2**64 - 1)
        assert len(told.models[0].state_detail) <= 300
        decision = await door.explain(ask())
        assert all(0 <= candidate.score <= 1 for candidate in decision.candidates)
        listed = await door.stub.ListModels(orchestrator_pb2.ListModelsRequest())
        assert MessageToJson(listed) and MessageToJson(await door.server(ROGUE))
        assert (await door.generate(ask(explain=True))).done.server_id == HONEST
        await healthy(door)


async def test_as_many_models_in_a_report_as_are_accepted():
    models = [model_info(f"model-{n:05}") for n in range(MAX_MODELS)]
    # A rogue at the pace of every server: each second it costs what converting and checking cost.
    fleet = {"report_interval": 1.0}
    async with front_door(fleet=fleet) as door, attached(door, FakeModelServer(HONEST), Rogue(models=models)):
        assert len((await door.stub.ListModels(orchestrator_pb2.ListModelsRequest())).models) == MAX_MODELS + 1
        assert (await door.generate(ask(model="model-04000"))).reason == "ATTEMPTS_EXHAUSTED"
        await healthy(door)
        for _ in range(20):
            assert (await door.generate(ask(server_id=HONEST), timeout=10)).done


async def test_ever_new_models_leave_nothing_behind():
    async with front_door() as door, attached(door, FakeModelServer(HONEST)):
        for wave in range(4):
            reports = [report(models=[model_info(f"m-{wave}-{n}-{k}") for k in range(100)]) for n in range(10)]
            assert await attach(door, *reports) == ""
        server = door.plane.fleet.server(ROGUE)
        assert len(server.cards) == 100
        assert len(server.pairs) <= 200, "what was learned of models that are gone is kept for ever"
        await healthy(door)


async def test_a_flood_of_reports_does_not_starve_the_others():
    async with front_door() as door, attached(door, FakeModelServer(HONEST)):
        stop = asyncio.Event()

        async def flood(server_id: str) -> int:
            identity = {"server_id": server_id, "instance_id": "i", "endpoint": "127.0.0.1:1"}
            call, sent = door.stub.Attach(), 0
            while not stop.is_set():
                await call.write(report(identity=identity, models=[model_info(f"m{sent % 2}")]))
                sent += 1
            call.cancel()
            return sent

        floods = [asyncio.create_task(flood(f"flood-{n}")) for n in range(2)]
        for _ in range(10):
            assert (await door.generate(ask(server_id=HONEST), timeout=10)).done
        assert (await door.server(HONEST)).lease_state == LIVE
        stop.set()
        assert all(sent > 10 for sent in await asyncio.gather(*floods))
        await healthy(door)


async def test_a_flood_of_reports_is_read_at_a_steady_rate():
    async with front_door(fleet={"report_interval": 1.0}) as door:
        call = door.stub.Attach()
        heard: dict[str, float] = {}

        def note(server_id: str, urgent: bool) -> None:
            name = door.plane.fleet.server(server_id).cards[0].name
            heard.setdefault(name, asyncio.get_running_loop().time())

        door.plane.fleet.listen(note)

        async def flood() -> None:
            for n in itertools.count():
                await call.write(report(models=[model_info(f"m{n}-{k}") for k in range(50)]))

        flooding = asyncio.create_task(flood())

        async def read_enough() -> bool:
            return len(heard) >= 25

        await until(read_enough)
        flooding.cancel()
        # At once as many as an honest server ever needs, then ten a second.
        times = list(heard.values())
        assert times[24] - times[0] > 0.3
        assert median(later - earlier for earlier, later in itertools.pairwise(times[:19])) < 0.05
        call.cancel()


async def test_a_stream_that_never_says_anything_is_nobody():
    async with front_door() as door:
        calls = [door.stub.Attach() for _ in range(50)]
        for call in calls:
            await call.done_writing()
        for call in calls:
            assert await call.read() is grpc.aio.EOF
        silent = door.stub.Attach()
        assert not await door.servers()
        silent.cancel()


async def test_one_stream_cannot_speak_for_another_server():
    async with front_door() as door, attached(door, FakeModelServer(HONEST)):
        other = report(identity={"server_id": HONEST, "instance_id": "i", "endpoint": "127.0.0.1:1"})
        assert await attach(door, report(), other) == Reason.INVALID_REQUEST
        await healthy(door)


async def test_unimplemented_everything():
    server = create_server()
    service = model_server_pb2.DESCRIPTOR.services_by_name["ModelServer"]
    server.add_generic_rpc_handlers((service_handler(service, object()),))
    port = bind(server, "127.0.0.1", 0)
    await server.start()
    async with front_door() as door, attached(door, FakeModelServer(HONEST)), Rogue() as rogue:
        own, rogue.port = rogue.port, port
        await rogue.attach(door.address)
        assert attempts_of((await door.generate()).done)[-1] == (HONEST, "")
        rogue.port = own
        await healthy(door)
    await server.stop(0)
