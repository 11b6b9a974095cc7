"""A second server is asked while the first is slow to begin: one answers, the other is told to stop."""

from __future__ import annotations

import asyncio

import pytest

from modelyard.rpc.errors import Refusal
from modelyard.rpc.reasons import Reason
from modelyard.testing import FakeModelServer
from modelyard.v1 import fleet_pb2
from tests.harness.front_door import ask, attached, front_door
from tests.harness.model_servers import eventually
from tests.harness.programs import until

FIRST, SECOND = "a-first", "b-second"
HEDGING = {"hedging": 1.0, "max_attempts": 3}


def attempts(reply) -> list[tuple[str, str, bool]]:
    return [(one.server_id, one.failure_reason, one.overtaken) for one in reply.done.attempts]


async def taught(door, *fakes: FakeModelServer) -> list[FakeModelServer]:
    """Both are known to begin at once; the one that is asked first is the first."""
    for fake in fakes:
        for _ in range(8):
            await door.generate(ask(server_id=fake.server_id))
    await door.until_idle()
    chosen = (await door.explain(ask())).server_id
    return sorted(fakes, key=lambda fake: fake.server_id != chosen)


def hedged(door) -> float:
    return door.plane.metrics.registry.get_sample_value("modelyard_hedged_total", {"model": "fake"}) or 0.0


async def test_the_second_answers_where_the_first_does_not_begin():
    first, second = FakeModelServer(FIRST), FakeModelServer(SECOND)
    async with front_door(retry=HEDGING) as door, attached(door, first, second):
        first, second = await taught(door, first, second)
        gate = first.gate("Generate")
        reply = await door.generate()
        assert reply.text == "Hello, world" and reply.done.server_id == second.server_id
        assert attempts(reply) == [(first.server_id, "", True), (second.server_id, "", False)]
        await first.until(lambda: first.calls_of("Generate")[-1].outcome == "cancelled")
        gate.open()
        await door.until_idle()
        assert hedged(door) >= 1
        assert (await door.server(first.server_id)).models[0].breaker == fleet_pb2.BREAKER_STATE_CLOSED


async def test_the_first_may_still_be_sooner():
    first, second = FakeModelServer(FIRST), FakeModelServer(SECOND)
    async with front_door(retry=HEDGING) as door, attached(door, first, second):
        first, second = await taught(door, first, second)
        one, two = first.gate("Generate"), second.gate("Generate")
        asked = asyncio.create_task(door.generate())
        await asyncio.gather(one.arrived.wait(), two.arrived.wait())
        one.open()
        reply = await asked
        assert attempts(reply) == [(first.server_id, "", False), (second.server_id, "", True)]
        await second.until(lambda: second.calls_of("Generate")[-1].outcome == "cancelled")
        await door.until_idle()


@pytest.mark.parametrize("last", [FIRST, SECOND])
async def test_one_that_fails_leaves_the_other(last):
    fakes = {name: FakeModelServer(name) for name in (FIRST, SECOND)}
    other = SECOND if last == FIRST else FIRST
    async with front_door(retry=HEDGING) as door, attached(door, *fakes.values()):
        await taught(door, *fakes.values())
        gates = {name: fake.gate("Generate") for name, fake in fakes.items()}
        asked = asyncio.create_task(door.generate())
        await asyncio.gather(*(gate.arrived.wait() for gate in gates.values()))
        fakes[other].answer(Refusal(Reason.ENGINE_FAILED, "broken"))
        gates[other].open()

        async def known() -> bool:
            return bool((await door.server(other)).models[0].failures)

        await until(known)
        gates[last].open()
        reply = await asked
        assert reply.done.server_id == last
        assert {(other, "ENGINE_FAILED", False), (last, "", False)} <= set(attempts(reply))
        await door.until_idle()


async def test_a_client_that_leaves_stops_both():
    first, second = FakeModelServer(FIRST), FakeModelServer(SECOND)
    async with front_door(retry=HEDGING) as door, attached(door, first, second):
        first, second = await taught(door, first, second)
        for fake in (first, second):
            fake.gate("Generate")
        asked = asyncio.create_task(door.generate())
        await asyncio.gather(*(fake.until(lambda f=fake: len(f.calls_of("Generate")) == 9) for fake in (first, second)))
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)
        for fake in (first, second):
            await fake.until(lambda f=fake: f.calls_of("Generate")[-1].outcome == "cancelled")
        await door.until_idle()


async def test_it_is_off_unless_asked_for_and_bounded():
    first, second = FakeModelServer(FIRST), FakeModelServer(SECOND)
    async with front_door(retry={"hedging": 0.05}) as door, attached(door, first, second):
        first, second = await taught(door, first, second)  # 16 requests: less than one may be asked twice
        gate = first.gate("Generate")
        asked = asyncio.create_task(door.generate())
        await gate.arrived.wait()
        (flight,) = door.plane.fleet.server(first.server_id).flights
        await eventually(lambda: door.plane.clock.monotonic() > flight.expected.slow_at)
        await door.explain(ask())  # and it has had a turn since
        assert len(second.calls_of("Generate")) == 8 and not hedged(door)
        gate.open()
        assert (await asked).done.server_id == first.server_id
