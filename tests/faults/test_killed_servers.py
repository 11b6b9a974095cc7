"""Two model servers of unlike speed, one of them killed: nothing that had not begun is lost."""

from __future__ import annotations

import asyncio
import time

import pytest

from tests.harness.front_door import SUSPECT, ask, attempts_of, front_door
from tests.harness.programs import simulated_server, until

FAST = {"decode_tokens_per_second": 60, "aggregate_tokens_per_second": 0, "answer_tokens": 8, "slots": 2}
SLOW = {"decode_tokens_per_second": 40, "aggregate_tokens_per_second": 0, "answer_tokens": 8, "slots": 2}
TERMINAL_WITHIN = 1.0


async def learn(door) -> None:
    """Let the control plane measure both servers."""
    for server_id in ("fast", "slow"):
        await door.until_ready(server_id)
        assert (await door.generate(ask(server_id=server_id))).done


async def test_the_faster_server_is_preferred_and_the_decision_says_why():
    async with (
        front_door() as door,
        simulated_server("fast", door.address, **FAST),
        simulated_server("slow", door.address, **SLOW),
    ):
        await learn(door)
        reply = await door.generate(ask(explain=True))
        assert reply.done.server_id == "fast"
        (decision,) = reply.decisions
        assert [candidate.server_id for candidate in decision.candidates] == ["fast", "slow"]
        parts = [{part.scorer: part for part in candidate.parts} for candidate in decision.candidates]
        for candidate, named in zip(decision.candidates, parts, strict=True):
            assert set(named) == {"capability", "success", "latency", "cost", "load", "provider"}
            total = sum(part.weight for part in candidate.parts)
            mean = sum(part.value * part.weight for part in candidate.parts) / total
            assert candidate.score == pytest.approx(mean)
            assert not candidate.rejections
        assert parts[0]["latency"].value > parts[1]["latency"].value
        assert "fast" in decision.summary and "latency" in decision.summary


async def test_killing_the_preferred_server_loses_no_request_that_had_not_begun():
    count = 24
    async with (
        front_door() as door,
        simulated_server("fast", door.address, **FAST) as fast,
        simulated_server("slow", door.address, **SLOW),
    ):
        await learn(door)
        streams = [door.stream(ask(f"request {n}", request_id=f"r{n}")) for n in range(count)]

        async def queued() -> bool:
            busy = sum(status.in_flight for status in (await door.servers()).values())
            return busy == 4 and sum(door.plane.scheduler.depth().values()) >= count - 10

        await until(queued)
        readers = [asyncio.create_task(stream.rest()) for stream in streams]

        async def some_have_begun_there() -> bool:
            return (await door.server("fast")).in_flight == 2 and any(stream.reply.deltas for stream in streams)

        await until(some_have_begun_there)
        fast.kill()
        killed = time.monotonic()
        await door.until_server("fast", lambda status: status.lease_state == SUSPECT)
        assert time.monotonic() - killed < TERMINAL_WITHIN
        replies = await asyncio.gather(*readers)
        begun = [reply for reply in replies if reply.error and reply.deltas]
        lost = [reply for reply in replies if reply.error and not reply.deltas]
        assert not lost, [repr(reply.error) for reply in lost]
        assert len(begun) <= 2  # its slots
        assert {reply.reason for reply in begun} <= {"STREAM_BROKEN"}
        assert {reply.refused.metadata["server_id"] for reply in begun} <= {"fast"}
        complete = [reply for reply in replies if not reply.error]
        assert all(reply.done.usage.completion_tokens == 8 for reply in complete)
        assert {reply.done.request_id for reply in complete} <= {f"r{n}" for n in range(count)}
        after = [attempts_of(reply.done) for reply in complete if len(reply.done.attempts) > 1]
        assert all(attempts[-1] == ("slow", "") for attempts in after)
        await door.until_idle()


async def test_every_stream_of_a_killed_server_gets_its_status_in_time():
    engine = {
        "decode_tokens_per_second": 20,
        "aggregate_tokens_per_second": 0,
        "answer_tokens": 100_000,
        "context_length": 200_000,
        "slots": 20,
    }
    async with front_door() as door, simulated_server("fast", door.address, **engine) as server:
        await door.until_ready("fast")
        streams = [await door.stream(ask(f"{n}")).first_delta() for n in range(20)]
        ends: list[float] = []

        async def to_the_end(stream) -> str:
            reply = await stream.rest()
            ends.append(time.monotonic())
            return reply.reason

        readers = [asyncio.create_task(to_the_end(stream)) for stream in streams]
        server.kill()
        killed = time.monotonic()
        assert await asyncio.gather(*readers) == ["STREAM_BROKEN"] * 20
        assert max(ends) - killed < TERMINAL_WITHIN
        await door.until_idle()


async def test_a_server_that_crashes_on_a_request_does_not_take_the_others_along():
    crash = {"kind": "crash", "at_request": 1}
    async with (
        front_door() as door,
        simulated_server("a-first", door.address, instant=True, faults=[crash]) as first,
        simulated_server("b-second", door.address, instant=True),
    ):
        await door.until_ready("a-first", "b-second")
        replies = await asyncio.gather(*(door.generate(ask(f"{n}")) for n in range(8)))
        assert {reply.done.server_id for reply in replies if not reply.error} == {"b-second"}
        # It ends without a token, so nobody notices but the list of attempts.
        assert not [repr(reply.error) for reply in replies if reply.error]
        assert any(attempts_of(reply.done)[0][0] == "a-first" for reply in replies)
        assert await asyncio.wait_for(first.process.wait(), 10) == 70
