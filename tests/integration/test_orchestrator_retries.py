"""When an attempt fails: another server while no token was sent, the truth when one was, and who is blamed."""

from __future__ import annotations

import asyncio

import pytest

from modelyard.rpc.errors import Refusal, Violation
from modelyard.rpc.reasons import CODES, Reason
from modelyard.testing import FakeModelServer
from modelyard.v1 import fleet_pb2, orchestrator_pb2
from tests.harness.front_door import SUSPECT, ask, attached, attempts_of, front_door
from tests.harness.programs import until

CLOSED, OPEN = fleet_pb2.BREAKER_STATE_CLOSED, fleet_pb2.BREAKER_STATE_OPEN

# Of two equal servers the one with the lesser id is chosen.
FIRST, SECOND = "a-first", "b-second"


def pair() -> tuple[FakeModelServer, FakeModelServer]:
    return FakeModelServer(FIRST), FakeModelServer(SECOND)


def failed(reason: Reason = Reason.ENGINE_FAILED) -> Refusal:
    return Refusal(reason, "out of memory")


async def runtime(door, server_id: str) -> fleet_pb2.ModelRuntime:
    return (await door.server(server_id)).models[0]


@pytest.mark.parametrize(
    "reason",
    [
        Reason.ENGINE_FAILED,
        Reason.INTERNAL,
        Reason.SERVER_BUSY,
        Reason.DRAINING,
        Reason.UNKNOWN_MODEL,
        Reason.UNSUPPORTED,
        Reason.STREAM_BROKEN,
    ],
)
async def test_another_server_answers(reason):
    async with front_door() as door, attached(door, *pair()) as (first, second):
        first.inject_error("Generate", failed(reason), times=3)
        reply = await door.generate(ask(explain=True))
        assert reply.text == "Hello, world"
        attempts = attempts_of(reply.done)
        assert attempts[0] == (FIRST, reason) and attempts[-1] == (SECOND, "")
        assert reply.done.attempts[0].failure_message == "out of memory"
        # One decision per attempt.
        assert [decision.server_id for decision in reply.decisions] == [server for server, _ in attempts]
        assert reply.events[-1] == "summary"
        assert len(second.calls_of("Generate")) == 1
        await door.until_idle()


async def test_a_server_that_cannot_be_reached_is_passed_over():
    async with front_door() as door, attached(door, *pair()) as (first, _):
        await first.stop()  # its report stream lives on
        attempts = attempts_of((await door.generate()).done)
        assert attempts == [(FIRST, "SERVERS_AWAY"), (SECOND, "")]


async def test_a_stream_that_ends_without_a_result_has_failed():
    async with front_door() as door, attached(door, *pair()) as (first, _):
        first.answer(result=False)
        assert attempts_of((await door.generate()).done) == [(FIRST, "ENGINE_FAILED"), (SECOND, "")]
        first.answer("half an", result=False)
        reply = await door.generate(ask(server_id=FIRST))
        assert reply.reason == "STREAM_BROKEN" and reply.text == "half an"


async def test_after_a_broken_stream_nothing_is_passed_on_until_an_answer_is_whole():
    async with front_door() as door, attached(door, FakeModelServer("one")) as (fake,):
        broken, whole = ("Hel", failed()), ("Hello", ", ", "world")
        scripts = iter([broken, broken, whole, broken])
        fake.on_generate = lambda request: next(scripts)
        assert (await door.generate()).reason == "STREAM_BROKEN"
        reply = await door.generate()
        assert attempts_of(reply.done) == [("one", "ENGINE_FAILED"), ("one", "")]
        assert [delta.text for delta in reply.deltas] == list(whole)
        timings = reply.done.timings
        assert timings.ttft.ToNanoseconds() <= timings.total.ToNanoseconds() and not timings.HasField("tpot")
        reply = await door.generate()
        assert (reply.reason, reply.text) == ("STREAM_BROKEN", "Hel"), "it was trusted again"
        await door.until_idle()


async def test_embed_is_repeated_too():
    async with front_door() as door, attached(door, *pair()) as (first, _):
        first.inject_error("Embed", failed())
        answer = await door.stub.Embed(orchestrator_pb2.EmbedRequest(inputs=["ab"]))
        assert answer.server_id == SECOND and list(answer.embeddings[0].values) == [2, 1]
        assert (await runtime(door, FIRST)).failures == 1
        await door.until_idle()


async def test_all_fail():
    async with front_door() as door, attached(door, *pair()) as fakes:
        for fake in fakes:
            fake.inject_error("Generate", failed(), times=10)
        refusal = (await door.generate()).refused
        assert refusal.reason is Reason.ATTEMPTS_EXHAUSTED and refusal.code is CODES[Reason.ATTEMPTS_EXHAUSTED]
        # Each is asked once before one is asked again.
        assert refusal.metadata["servers"] in (f"{FIRST},{SECOND},{FIRST}", f"{FIRST},{SECOND},{SECOND}")
        assert refusal.message.startswith("3 attempts failed: ") and "out of memory" in refusal.message
        assert sum(len(fake.calls_of("Generate")) for fake in fakes) == 3
        await door.until_idle()


async def test_the_only_server_is_asked_again():
    async with front_door() as door, attached(door, FakeModelServer("one")) as (fake,):
        fake.inject_error("Generate", failed(), times=2)
        assert attempts_of((await door.generate()).done) == [("one", "ENGINE_FAILED")] * 2 + [("one", "")]


@pytest.mark.parametrize("reason", [Reason.UNKNOWN_MODEL, Reason.DRAINING])
async def test_what_the_only_server_would_say_again_is_not_asked_again(reason):
    async with front_door() as door, attached(door, FakeModelServer("one")) as (fake,):
        fake.inject_error("Generate", failed(reason), times=3)
        refusal = (await door.generate()).refused
        assert refusal.reason is Reason.ATTEMPTS_EXHAUSTED
        assert refusal.message.startswith(f"1 attempt failed: one: {reason} out of memory; now: ")
        assert len(fake.calls_of("Generate")) == 1


async def test_the_only_server_is_waited_for_while_it_starts_anew():
    async with front_door() as door, attached(door, FakeModelServer("one")) as (old,):
        gate = old.gate("Generate")
        asked = asyncio.create_task(door.generate())
        await gate.arrived.wait()
        await old.stop()
        await old.detach()
        await door.until_server("one", lambda status: status.lease_state == SUSPECT)
        async with attached(door, FakeModelServer("one")) as (new,):
            reply = await asked
            assert attempts_of(reply.done)[0][0] == "one" and reply.text == "Hello, world"
            assert len(new.calls_of("Generate")) == 1


async def test_a_server_that_cannot_be_reached_is_asked_again_after_a_sign_of_life():
    async with front_door() as door, attached(door, FakeModelServer("one")) as (fake,):
        port = fake.port
        await fake.stop()  # its report stream lives on
        asked = asyncio.create_task(door.generate())

        async def failed_once() -> bool:
            counted = door.plane.metrics.registry.get_sample_value
            return bool(counted("modelyard_retries_total", {"reason": "SERVERS_AWAY"}))

        await until(failed_once)
        await fake.start(port)
        attempts = attempts_of((await asked).done)
        assert attempts[-1] == ("one", "") and {reason for _, reason in attempts[:-1]} == {"SERVERS_AWAY"}


async def test_a_restarted_server_takes_its_own_back_in_order():
    async with (
        front_door() as door,
        attached(door, FakeModelServer(FIRST), FakeModelServer(SECOND, slots=1)) as (old, second),
    ):
        gates = [old.gate("Generate"), second.gate("Generate")]
        holding = door.stream(ask(server_id=SECOND))
        await second.until(lambda: bool(second.calls_of("Generate")))
        asked = []
        for n in range(4):
            asked.append(asyncio.create_task(door.generate(ask(str(n)))))
            await old.until(lambda n=n: len(old.calls_of("Generate")) == n + 1)
        await old.stop()
        await old.detach()

        async def all_wait() -> bool:
            return sum(door.plane.scheduler.depth().values()) == 4

        await until(all_wait)
        # It comes back with one slot and is used at once, though it failed each of them before.
        async with attached(door, FakeModelServer(FIRST, slots=1)) as (new,):
            replies = await asyncio.gather(*asked)
            assert {reply.done.server_id for reply in replies} == {FIRST}
            order = [call.request.input.messages[0].content[0].text for call in new.calls_of("Generate")]
            assert order == ["0", "1", "2", "3"]
        for gate in gates:
            gate.open()
        assert (await holding.rest()).done


async def test_what_nobody_supports_is_not_a_matter_of_waiting():
    async with front_door() as door, attached(door, *pair()) as fakes:
        for fake in fakes:
            fake.inject_error("Generate", Refusal(Reason.UNSUPPORTED, "no 'not' in schemas"), times=10)
        refusal = (await door.generate()).refused
        assert refusal.reason is Reason.UNSUPPORTED and "no 'not'" in refusal.message
        assert [len(fake.calls_of("Generate")) for fake in fakes] == [1, 1]


async def test_messages_of_servers_are_for_the_caller_not_for_the_log(caplog):
    caplog.set_level("DEBUG")
    async with front_door() as door, attached(door, *pair()) as fakes:
        for fake in fakes:
            fake.inject_error("Generate", Refusal(Reason.ENGINE_FAILED, "token 'SECRET'"), times=10)
        assert "SECRET" in (await door.generate()).refused.message
        assert "ENGINE_FAILED" in caplog.text and "SECRET" not in caplog.text


async def test_the_number_of_attempts_is_bounded():
    fakes = [FakeModelServer(f"s{n}") for n in range(5)]
    async with front_door(retry={"max_attempts": 3}) as door, attached(door, *fakes):
        for fake in fakes:
            fake.inject_error("Generate", failed())
        refusal = (await door.generate()).refused
        assert refusal.reason is Reason.ATTEMPTS_EXHAUSTED
        assert refusal.metadata["servers"] == "s0,s1,s2"
        assert sum(len(fake.calls_of("Generate")) for fake in fakes) == 3


async def test_nothing_is_repeated_after_the_first_token():
    async with front_door() as door, attached(door, *pair()) as (first, second):
        first.answer("one", "two", failed())
        reply = await door.generate()
        assert reply.text == "onetwo"
        refusal = reply.refused
        assert refusal.reason is Reason.STREAM_BROKEN and refusal.code is CODES[Reason.STREAM_BROKEN]
        assert dict(refusal.metadata) == {"server_id": FIRST, "cause": "ENGINE_FAILED"}
        assert not second.calls_of("Generate")
        assert (await runtime(door, FIRST)).failures == 1
        await door.until_idle()


@pytest.mark.parametrize("reason", [Reason.SERVER_BUSY, Reason.DRAINING, Reason.UNKNOWN_MODEL])
async def test_a_blameless_failure_does_not_count(reason):
    async with front_door(breaker={"failures": 1}) as door, attached(door, *pair()) as (first, _):
        first.inject_error("Generate", failed(reason))
        assert (await door.generate()).done
        learned = await runtime(door, FIRST)
        assert (learned.failures, learned.breaker, learned.success_rate) == (0, CLOSED, 1.0)


async def test_a_fault_of_the_request_is_final():
    async with front_door(breaker={"failures": 1}) as door, attached(door, *pair()) as (first, second):
        violation = Violation("input", "4000 tokens do not fit")
        first.inject_error("Generate", Refusal(Reason.INVALID_REQUEST, "too long", [violation]))
        refusal = (await door.generate()).refused
        assert (refusal.reason, refusal.message) == (Reason.INVALID_REQUEST, "too long")
        assert refusal.violations == (violation,)
        assert not second.calls_of("Generate")
        learned = await runtime(door, FIRST)
        assert (learned.failures, learned.breaker) == (0, CLOSED)
        await door.until_idle()


async def test_the_breaker_opens_and_a_good_trial_closes_it():
    async with (
        front_door(
            breaker={"failures": 3, "pause": 0.4},
            selection={"availability_threshold": 0.0},
            retry={"max_attempts": 1},
        ) as door,
        attached(door, FakeModelServer("one")) as (fake,),
    ):
        fake.inject_error("Generate", failed(), times=3)
        for count in (1, 2, 3):
            assert (await runtime(door, "one")).breaker == CLOSED
            assert (await door.generate()).reason == "ATTEMPTS_EXHAUSTED"
            assert (await runtime(door, "one")).failures == count
        assert (await runtime(door, "one")).breaker == OPEN
        # Who comes now waits for the trial, which succeeds.
        replies = await asyncio.gather(*(door.generate() for _ in range(3)))
        assert all(reply.done for reply in replies)
        assert (await runtime(door, "one")).breaker == CLOSED
        assert len(fake.calls_of("Generate")) == 6


async def test_an_open_breaker_sends_requests_elsewhere():
    async with front_door(breaker={"failures": 2, "pause": 30.0}) as door, attached(door, *pair()) as (first, second):
        first.inject_error("Generate", failed(), times=2)
        pinned = door.stream(ask(server_id=FIRST))

        async def waits() -> bool:
            return sum(door.plane.scheduler.depth().values()) == 1

        await until(waits)  # its third attempt is for later
        for _ in range(3):
            assert attempts_of((await door.generate()).done) == [(SECOND, "")]
        assert len(first.calls_of("Generate")) == 2
        assert len(second.calls_of("Generate")) == 3
        pinned.cancel()


async def test_a_busy_server_is_tried_again_when_it_is_the_only_one():
    async with front_door(retry={"max_attempts": 3}) as door, attached(door, FakeModelServer("one")) as (fake,):
        fake.inject_error("Generate", failed(Reason.SERVER_BUSY), times=2)
        assert attempts_of((await door.generate()).done) == [("one", "SERVER_BUSY")] * 2 + [("one", "")]


async def test_retries_are_counted():
    async with front_door() as door, attached(door, *pair()) as (first, _):
        first.inject_error("Generate", failed())
        await door.generate()
        counted = door.plane.metrics.registry.get_sample_value
        assert counted("modelyard_retries_total", {"reason": "ENGINE_FAILED"}) == 1


async def test_a_retry_may_wait_for_a_slot():
    async with front_door() as door, attached(door, FakeModelServer(FIRST), FakeModelServer(SECOND, slots=1)) as fakes:
        first, second = fakes
        gate = second.gate("Generate")
        holding = door.stream(ask(server_id=SECOND))
        await gate.arrived.wait()
        first.inject_error("Generate", failed())
        retried = door.stream(ask())

        async def waits() -> bool:
            return sum(door.plane.scheduler.depth().values()) == 1

        await until(waits)
        gate.open()
        assert attempts_of((await retried.rest()).done) == [(FIRST, "ENGINE_FAILED"), (SECOND, "")]
        assert (await holding.rest()).done
