"""A request that is given up stops everywhere: in the queue, in the relay and in the engine."""

from __future__ import annotations

import asyncio
import random
import time

from modelyard.rpc.reasons import Reason
from modelyard.testing import FakeModelServer
from modelyard.v1 import generation_pb2, orchestrator_pb2
from tests.harness.front_door import ask, attached, client, front_door
from tests.harness.model_servers import model_server
from tests.harness.programs import until

# Slow enough that no answer ends by itself during a test.
SLOW = {
    "instant": False,
    "decode_tokens_per_second": 20,
    "answer_tokens": 100_000,
    "slots": 4,
    "context_length": 200_000,
}
SOON = 2.0
"""Seconds that cancelling may take on a busy machine; by itself it takes milliseconds."""


async def waiting(door, count: int) -> None:
    async def reached() -> bool:
        return sum(door.plane.scheduler.depth().values()) == count

    await until(reached)


async def test_cancelling_stops_the_engine():
    async with front_door() as door, model_server(orchestrators=(door.address,), engine_settings=SLOW) as server:
        await door.until_ready("tested")
        streams = [await door.stream(ask(f"{n}")).first_delta() for n in range(3)]
        await server.until_load(running=3)
        assert (await door.server("tested")).in_flight == 3
        cancelled = time.monotonic()
        for stream in streams:
            stream.cancel()
        await server.until_load(running=0)
        assert time.monotonic() - cancelled < SOON
        await door.until_idle()
        learned = (await door.server("tested")).models[0]
        assert (learned.requests, learned.failures) == (0, 0)  # a client's whim says nothing of the server


async def test_the_deadline_stops_the_engine():
    async with front_door() as door, model_server(orchestrators=(door.address,), engine_settings=SLOW) as server:
        await door.until_ready("tested")
        stream = await door.stream(ask(), timeout=0.5).first_delta()
        assert (await stream.rest()).refused.reason is Reason.DEADLINE_EXCEEDED
        ended = time.monotonic()
        await server.until_load(running=0)
        assert time.monotonic() - ended < SOON
        await door.until_idle()


async def test_a_client_that_vanishes_stops_the_engine():
    async with front_door() as door, model_server(orchestrators=(door.address,), engine_settings=SLOW) as server:
        await door.until_ready("tested")
        await door.stream(ask()).first_delta()
        await server.until_load(running=1)
        await door.channel.close()
        await server.until_load(running=0)


async def test_cancelling_leaves_the_queue():
    async with front_door() as door, attached(door, FakeModelServer("one", slots=1)) as (fake,):
        gate = fake.gate("Generate")
        running = door.stream(ask())
        await gate.arrived.wait()
        queued = [door.stream(ask(f"{n}")) for n in range(5)]
        await waiting(door, 5)
        for stream in queued[:4]:
            stream.cancel()
        await waiting(door, 1)
        gate.open()
        assert (await running.rest()).done
        assert (await queued[4].rest()).done
        assert len(fake.calls_of("Generate")) == 2
        await door.until_idle()


async def test_cancelling_before_the_first_token_reaches_the_server():
    async with front_door() as door, attached(door, FakeModelServer("one")) as (fake,):
        gate = fake.gate("Generate")
        stream = door.stream(ask())
        await gate.arrived.wait()
        stream.cancel()
        await fake.until(lambda: fake.calls[-1].outcome == "cancelled")
        await door.until_idle()


async def test_cancelling_an_embedding_reaches_the_server():
    async with front_door() as door, attached(door, FakeModelServer("one")) as (fake,):
        gate = fake.gate("Embed")
        call = door.stub.Embed(orchestrator_pb2.EmbedRequest(inputs=["x"]))
        await gate.arrived.wait()
        call.cancel()
        await fake.until(lambda: fake.calls[-1].outcome == "cancelled")
        await door.until_idle()


async def test_cancelling_at_any_moment_gives_every_slot_back():
    chance = random.Random(7)
    engine = {"instant": False, "decode_tokens_per_second": 500, "answer_tokens": 20, "slots": 3}
    async with front_door() as door, model_server(orchestrators=(door.address,), engine_settings=engine) as server:
        await door.until_ready("tested")

        async def one(moment: float) -> str:
            stream = door.stream(ask(f"{moment}"))
            reading = asyncio.create_task(stream.rest())
            await asyncio.wait((reading,), timeout=moment)
            stream.cancel()
            (outcome,) = await asyncio.gather(reading, return_exceptions=True)
            return "cancelled" if isinstance(outcome, asyncio.CancelledError) else outcome.reason or "ok"

        outcomes = await asyncio.gather(*(one(chance.uniform(0, 1.2)) for _ in range(150)))
        assert set(outcomes) <= {"cancelled", "ok"} and "cancelled" in outcomes
        await door.until_idle()
        await server.until_load(running=0)
        await waiting(door, 0)
        assert (await door.generate()).done


async def test_a_client_that_does_not_read_is_cut_off():
    async with (
        front_door(limits={"write_timeout": 0.6}) as door,
        attached(door, FakeModelServer("one", slots=1)) as (fake,),
    ):
        fake.answer(*[generation_pb2.GenerationDelta(text="x" * 100_000, tokens=1)] * 400)
        lazy = door.stream(ask())
        await fake.until(lambda: len(fake.calls_of("Generate")) == 1)
        fake.on_generate = lambda request: ("next",)
        # Its slot returns although it still holds the call open; the next request gets it.
        assert (await door.generate()).text == "next"
        await fake.until(lambda: fake.calls[0].outcome == "cancelled")
        await door.until_idle()
        refusal = (await lazy.rest()).refused
        assert refusal.reason is Reason.SLOW_READER and not refusal.transport
        assert 0 < len(lazy.reply.deltas) < 400
        learned = (await door.server("one")).models[0]
        assert learned.failures == 0


async def test_a_client_that_reads_slowly_but_steadily_is_served():
    async with front_door(limits={"write_timeout": 1.5}) as door, attached(door, FakeModelServer("one")) as (fake,):
        fake.answer(*[generation_pb2.GenerationDelta(text="x" * 500_000, tokens=1)] * 60)
        stream = door.stream(ask())
        while await stream.read():
            await asyncio.sleep(0.03)  # the pace of the reader is what is tested
        assert stream.reply.done.usage.completion_tokens == 60


async def test_others_are_not_held_up_by_one_that_does_not_read():
    async with (
        front_door(limits={"write_timeout": 30.0}) as door,
        attached(door, FakeModelServer("one", slots=8)) as (fake,),
    ):
        big = tuple([generation_pb2.GenerationDelta(text="x" * 100_000, tokens=1)] * 400)
        fake.on_generate = lambda request: big if request.request_id == "lazy" else ("quick",)
        async with client(door.address) as other:
            lazy = await other.stream(ask(request_id="lazy")).first_delta()
            for _ in range(20):
                assert (await door.generate(timeout=10)).text == "quick"
            lazy.cancel()
        await door.until_idle()
