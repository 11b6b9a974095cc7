"""What the fleet makes of a slot that is held for a request that is still to come."""

from __future__ import annotations

import asyncio

import pytest
from msgspec.structs import replace

from control_plane.domain.model import ModelName, ModelState
from control_plane.domain.request import RouteRequest
from control_plane.fleet.server import Flight, Outcome, OutcomeKind
from tests.unit.control_plane.builders import card, fleet, report
from tests.unit.control_plane.test_prefill import lane, taught
from tests.unit.control_plane.test_scheduler import PAID, House, budgeted

REQUEST = RouteRequest("r", prompt_tokens=1000, max_tokens=10)
FAILURE = Outcome(OutcomeKind.FAILURE)
NEUTRAL = Outcome(OutcomeKind.NEUTRAL)


def house(slots: int = 8) -> House:
    made = House()
    made.attach(slots=slots)
    return made


def ahead(subject: House, request: RouteRequest) -> Flight | None:
    """A slot for one request."""
    return next(iter(subject.scheduler.ahead([request])), None)


def test_it_holds_a_slot_and_is_no_work() -> None:
    subject = taught()
    server = subject.server("a")
    flight = subject.begin(0, 300.0, REQUEST, ahead=True)
    assert subject.table.free[0] == 7
    assert lane(subject) == 0.0 and subject.table.streams[0] == 0 and not server.prefilling
    other = subject.begin(0, 300.0, REQUEST)
    assert other.expected.features.backlog_tokens == 0 and other.expected.features.streams == 0
    assert 300.4 < lane(subject) < 300.6, "that of the other alone"
    subject.has_come(flight, 300.1)
    assert subject.table.streams[0] == 1 and not server.idle
    requests = server.pairs[ModelName("m"), flight.provider].stats.requests
    flight.charge.count(1000, 0, 11)
    subject.end(flight, Outcome(OutcomeKind.SUCCESS, 0.5, 0.01), 301.0)
    assert server.pairs[ModelName("m"), flight.provider].stats.requests == requests + 1
    assert subject.table.streams[0] == 0 and 300.4 < lane(subject) < 300.6
    subject.end(other, NEUTRAL, 301.0)
    assert subject.table.free[0] == 8


def test_one_that_never_comes_leaves_nothing() -> None:
    subject = fleet()
    subject.attach(report(slots=8), 0.0, 0.0, lambda: None)
    flight = subject.begin(0, 1.0, REQUEST, ahead=True)
    subject.end(flight, NEUTRAL, 2.0)
    assert not subject.server("a").idle and subject.table.free[0] == 8 and subject.table.streams[0] == 0


async def test_a_quarter_is_held_until_they_come_or_not() -> None:
    subject = house()
    first, second = ahead(subject, REQUEST), ahead(subject, REQUEST)
    assert first is not None and second is not None
    assert ahead(subject, REQUEST) is None
    subject.fleet.has_come(first, subject.clock.now)
    third = ahead(subject, REQUEST)
    assert third is not None
    assert ahead(subject, REQUEST) is None
    subject.scheduler.release(third, NEUTRAL)
    assert ahead(subject, REQUEST) is not None


async def test_half_of_the_slots_stay_free() -> None:
    subject = house(4)
    grants = [(await subject.acquire()).flight for _ in range(2)]
    assert ahead(subject, RouteRequest("r")) is None
    subject.scheduler.release(grants[0], NEUTRAL)
    assert ahead(subject, RouteRequest("r")) is not None


async def test_whoever_waits_goes_first() -> None:
    subject = house()
    subject.attach("b", slots=1, models=(card("rare"),))
    rare = RouteRequest("r", model=ModelName("rare"))
    busy = await subject.acquire(rare)
    waiting = subject.acquire(rare)
    await asyncio.sleep(0)
    assert subject.scheduler.depth()[rare.priority] == 1
    assert ahead(subject, REQUEST) is None, "though nobody waits for this server"
    subject.scheduler.release(busy.flight, NEUTRAL)
    await waiting
    assert ahead(subject, REQUEST) is not None


async def test_not_where_prompts_are_worked_on_nor_to_be_loaded_nor_in_doubt() -> None:
    subject = house()
    subject.fleet.table.lane_until[:] = subject.clock.now + 0.001
    assert ahead(subject, REQUEST) is None
    subject.fleet.table.lane_until[:] = subject.clock.now
    assert ahead(subject, REQUEST) is not None
    cold = House()
    cold.attach(slots=8, models=(card(state=ModelState.COLD, load_time=1.0),))
    assert ahead(cold, REQUEST) is None


async def test_an_open_circuit_breaker_tries_a_request_that_has_come() -> None:
    subject = house()
    while subject.fleet.sound(0):
        subject.scheduler.release((await subject.acquire()).flight, FAILURE)
    subject.later(2)
    subject.fleet.table.success[:] = 1.0
    assert ahead(subject, REQUEST) is None
    trial = await subject.acquire()
    subject.scheduler.release(trial.flight, Outcome(OutcomeKind.SUCCESS, 0.1, 0.01))
    assert subject.fleet.sound(0) and ahead(subject, REQUEST) is not None


@pytest.mark.parametrize(("left", "granted"), [(2 * 1_010_000, True), (2 * 1_010_000 - 1, False)])
async def test_what_it_may_cost_is_set_aside(left: int, granted: bool) -> None:
    subject = House()
    subject.attach(slots=8, models=(PAID,))
    ledger = budgeted(subject, left)
    flight = ahead(subject, REQUEST)
    assert (flight is not None) is granted
    funds = ledger.funds("default", subject.clock.wall())
    assert funds is not None and funds[0].nano_usd == left - 1_010_000 * granted


async def test_nothing_can_be_held_where_there_is_nothing() -> None:
    assert ahead(House(), REQUEST) is None
    assert ahead(house(), replace(REQUEST, model=ModelName("nowhere"))) is None


async def test_several_for_one_client_leave_some_for_the_next() -> None:
    subject = house(32)
    requests = [replace(REQUEST, request_id=f"r{number}") for number in range(16)]
    flights = subject.scheduler.ahead(requests)
    assert [flight.request and flight.request.request_id for flight in flights] == ["r0", "r1", "r2", "r3"]
    assert len(subject.scheduler.ahead(requests)) == 1, "an eighth is held, so one more"
    assert subject.fleet.table.free[0] == 32 - 5


async def test_several_only_as_far_as_the_money_goes() -> None:
    subject = House()
    subject.attach(slots=64, models=(PAID,))
    budgeted(subject, 4 * 1_010_000)
    assert len(subject.scheduler.ahead([REQUEST] * 8)) == 3, "each leaves the money for one more"
