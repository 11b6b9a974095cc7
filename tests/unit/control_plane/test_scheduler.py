from __future__ import annotations

import asyncio

import pytest

from control_plane.domain.errors import DomainError
from control_plane.domain.model import ModelName, ModelState, ServerId
from control_plane.domain.request import RouteRequest
from control_plane.domain.server import Health
from control_plane.domain.task import Priority
from control_plane.fleet.registry import Fleet, Outcome, OutcomeKind
from control_plane.fleet.scheduler import Grant, Scheduler
from control_plane.scheduling.queue import FairQueue
from control_plane.selection.policy import Policy
from tests.unit.control_plane.builders import ManualClock, card, fleet, report

NEUTRAL = Outcome(OutcomeKind.NEUTRAL)
NOBODY: frozenset[ServerId] = frozenset()


class House:
    """A scheduler over a fleet, and the clock of both."""

    def __init__(self, bound: int = 100) -> None:
        self.clock = ManualClock()
        self.fleet: Fleet = fleet(self.clock.now)
        self.granted: list[tuple[Priority, float]] = []
        self.scheduler = Scheduler(
            self.fleet,
            Policy(),
            FairQueue(dict.fromkeys(Priority, bound), dict.fromkeys(Priority, 10.0)),
            self.clock,
            on_selected=lambda _: None,
            on_granted=lambda priority, queued: self.granted.append((priority, queued)),
        )

    def attach(self, *args: object, **kwargs: object) -> object:
        return self.fleet.attach(report(*args, **kwargs), self.clock.now, 0.0, lambda: None)  # type: ignore[arg-type]

    def acquire(self, request: RouteRequest | None = None, avoid: frozenset[ServerId] = NOBODY) -> asyncio.Task[Grant]:
        return asyncio.ensure_future(self.scheduler.acquire(request or RouteRequest("r"), avoid))

    def later(self, seconds: float) -> None:
        self.clock.now += seconds
        self.fleet.tick(self.clock.now)
        self.scheduler.tick(self.clock.now)


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def refused(task: asyncio.Task[Grant]) -> DomainError:
    with pytest.raises(DomainError) as caught:
        await task
    return caught.value


async def test_a_free_slot_is_granted_at_once() -> None:
    house = House()
    house.attach()
    grant = await house.acquire()
    assert grant.flight.server_id == "a"
    assert grant.queued == 0.0
    assert house.granted == [(Priority.NORMAL, 0.0)]


async def test_late_binding_waits_for_whichever_server_is_free_first() -> None:
    house = House()
    house.attach("a", slots=1)
    house.attach("b", slots=1)
    held = [await house.acquire(), await house.acquire()]
    assert {grant.flight.server_id for grant in held} == {"a", "b"}
    waiting = house.acquire()
    await settle()
    assert not waiting.done()
    assert house.scheduler.depth()[Priority.NORMAL] == 1
    house.clock.now += 0.5
    house.scheduler.release(held[1].flight, NEUTRAL)
    grant = await waiting
    assert grant.flight.server_id == held[1].flight.server_id
    assert grant.queued == pytest.approx(0.5)


async def test_higher_classes_go_first_and_nobody_overtakes_in_a_class() -> None:
    house = House()
    house.attach(slots=1)
    held = await house.acquire()
    order: list[str] = []

    async def run(name: str, priority: Priority) -> None:
        grant = await house.scheduler.acquire(RouteRequest(name, priority=priority), NOBODY)
        order.append(name)
        house.scheduler.release(grant.flight, NEUTRAL)

    names = [("low", Priority.LOW), ("n1", Priority.NORMAL), ("n2", Priority.NORMAL), ("top", Priority.CRITICAL)]
    tasks = [asyncio.ensure_future(run(name, priority)) for name, priority in names]
    await settle()
    house.scheduler.release(held.flight, NEUTRAL)
    await asyncio.gather(*tasks)
    assert order == ["top", "n1", "n2", "low"]


async def test_a_cancelled_waiter_leaves_no_trace() -> None:
    house = House()
    house.attach(slots=1)
    held = await house.acquire()
    gone, stays = house.acquire(), house.acquire()
    await settle()
    gone.cancel()
    await settle()
    assert house.scheduler.depth()[Priority.NORMAL] == 1
    house.scheduler.release(held.flight, NEUTRAL)
    await stays
    assert len(house.fleet.server("a").flights) == 1


async def test_a_grant_that_meets_a_cancellation_is_given_back() -> None:
    house = House()
    house.attach(slots=1)
    held = await house.acquire()
    waiting = house.acquire()
    await settle()
    house.scheduler.release(held.flight, NEUTRAL)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert len(house.fleet.server("a").flights) == 0


async def test_impossible_requests_are_refused_with_the_nearest_miss() -> None:
    house = House()
    house.attach()
    house.later(2.5)
    error = await refused(house.acquire(RouteRequest("r", prompt_tokens=9999)))
    assert error.reason == "NO_CAPABLE_SERVER"
    assert "4096" in error.message and "a" in error.message


async def test_the_first_moments_are_unavailable_not_final() -> None:
    house = House()
    error = await refused(house.acquire())
    assert error.reason == "FLEET_WARMING_UP"
    assert error.retry_after == pytest.approx(2.0)
    house.later(2.1)
    assert (await refused(house.acquire())).reason == "NO_CAPABLE_SERVER"


async def test_a_server_that_does_not_know_its_models_yet_keeps_the_fleet_warming_up() -> None:
    house = House()
    house.attach(health=Health.STARTING, models=())
    house.later(2.5)
    error = await refused(house.acquire())
    assert error.reason == "FLEET_WARMING_UP"
    assert error.retry_after and error.retry_after > 0
    house.attach()
    assert (await house.acquire()).flight.server_id == "a"


async def test_requests_wait_for_a_suspect_server_and_fail_when_it_is_lost() -> None:
    house = House()
    attachment = house.attach()
    house.later(2.5)
    house.fleet.detach(attachment)  # type: ignore[arg-type]
    waiting = house.acquire()
    await settle()
    assert not waiting.done()
    house.later(1.0)
    assert (await refused(waiting)).reason == "SERVERS_AWAY"
    assert (await refused(house.acquire())).reason == "SERVERS_AWAY"


async def test_requests_wait_for_a_server_that_starts() -> None:
    house = House()
    house.attach(health=Health.STARTING)
    waiting = house.acquire()
    await settle()
    house.attach()
    assert (await waiting).flight.server_id == "a"


async def test_the_queue_is_bounded_and_says_when_to_come_back() -> None:
    house = House(bound=1)
    house.attach(slots=1)
    await house.acquire()
    waiting = house.acquire()
    await settle()
    error = await refused(house.acquire())
    assert error.reason == "QUEUE_FULL"
    assert error.retry_after and error.retry_after > 0
    waiting.cancel()


async def test_waiting_ends_at_the_timeout_of_the_class() -> None:
    house = House()
    attachment = house.attach(slots=1)
    await house.acquire()
    waiting = house.acquire()
    await settle()
    for _ in range(5):
        house.fleet.update(attachment, report(slots=1), house.clock.now, 0.0)  # type: ignore[arg-type]
        house.later(2.1)
    error = await refused(waiting)
    assert error.reason == "QUEUE_TIMEOUT"
    assert "no free slot" in error.message


async def test_servers_that_failed_are_avoided() -> None:
    house = House()
    house.attach("a")
    house.attach("b")
    grant = await house.acquire(avoid=frozenset({ServerId("a")}))
    assert grant.flight.server_id == "b"
    house.later(2.5)
    error = await refused(house.acquire(avoid=frozenset({ServerId("a"), ServerId("b")})))
    assert error.reason == "NO_CAPABLE_SERVER"


async def test_a_cold_model_is_loaded_when_the_queue_for_the_warm_one_grows_long() -> None:
    house = House()
    house.attach("cold", slots=4, models=(card(state=ModelState.COLD, load_time=5.0),))
    house.attach("warm", slots=1)
    held = await house.acquire()
    house.clock.now += 2.0
    house.fleet.end(held.flight, Outcome(OutcomeKind.SUCCESS), house.clock.now)  # a request takes 2 s
    held = await house.acquire()
    assert held.flight.server_id == "warm"
    waiting = [house.acquire()]
    await settle()
    assert not waiting[0].done(), "2 s of waiting are less than 5 s of loading"
    waiting.append(house.acquire())
    await settle()
    assert not waiting[0].done(), "4 s still are"
    waiting.append(house.acquire())
    await settle()
    assert (await waiting[0]).flight.server_id == "cold", "the third one would wait for 6 s"
    assert not waiting[1].done() and not waiting[2].done()
    for task in waiting[1:]:
        task.cancel()


async def test_a_model_that_failed_everywhere_is_refused_and_one_on_its_way_is_waited_for() -> None:
    house = House()
    house.later(2.5)
    house.attach(models=(card(state=ModelState.FAILED),))
    error = await refused(house.acquire())
    assert error.reason == "SERVERS_AWAY" and "the model has failed" in error.message
    house.attach(models=(card(state=ModelState.PULLING),))
    waiting = house.acquire()
    await settle()
    assert not waiting.done()
    house.attach(models=(card(state=ModelState.COLD),))
    assert (await waiting).flight.server_id == "a"


async def test_one_busy_model_does_not_hold_up_another() -> None:
    house = House()
    house.attach("a", slots=1, models=(card("busy"),))
    house.attach("b", slots=1, models=(card("free"),))
    await house.acquire(RouteRequest("r", model=ModelName("busy")))
    stuck = house.acquire(RouteRequest("r", model=ModelName("busy")))
    await settle()
    grant = await house.acquire(RouteRequest("r", model=ModelName("free")))
    assert grant.flight.server_id == "b"
    stuck.cancel()
