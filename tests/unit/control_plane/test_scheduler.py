from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from msgspec.structs import replace

from control_plane.domain.decision import Verdict
from control_plane.domain.errors import DomainError
from control_plane.domain.funds import Amounts, Reckoning
from control_plane.domain.model import ModelName, ModelState, Price, ServerId
from control_plane.domain.request import RouteRequest
from control_plane.domain.server import Failed, Health
from control_plane.domain.task import Priority
from control_plane.fleet.accounts import Accounts
from control_plane.fleet.grants import Grant, Outlook, Standing
from control_plane.fleet.registry import Fleet
from control_plane.fleet.scheduler import Scheduler
from control_plane.fleet.server import Outcome, OutcomeKind
from control_plane.scheduling.budgets import Answer, Budget, Ledger, Unit, Window
from control_plane.scheduling.queue import FairQueue
from control_plane.selection.policy import Policy
from tests.unit.control_plane.builders import POLICY, ManualClock, card, fleet, report

NEUTRAL = Outcome(OutcomeKind.NEUTRAL)
NOBODY: frozenset[Failed] = frozenset()


def failed(server_id: str, instance: str = "1") -> Failed:
    return Failed(ServerId(server_id), instance)


class House:
    """A scheduler over a fleet, and the clock of both."""

    def __init__(self, bound: int = 100, max_bytes: int | None = None) -> None:
        self.clock = ManualClock()
        self.selections = 0
        self.selection_takes = 0.0
        self.fleet: Fleet = fleet(self.clock.now)
        self.granted: list[tuple[Priority, float]] = []
        self.scheduler = Scheduler(
            self.fleet,
            Policy(),
            FairQueue(dict.fromkeys(Priority, bound), dict.fromkeys(Priority, 10.0), max_bytes=max_bytes),
            self.clock,
            on_selected=self.selected,
            on_granted=lambda priority, queued: self.granted.append((priority, queued)),
        )

    def selected(self, seconds: float) -> None:
        self.selections += 1
        self.clock.now += self.selection_takes

    def counted(self, event: Callable[..., object], *args: object) -> int:
        """Selections that an event costs."""
        before = self.selections
        event(*args)
        return self.selections - before

    def attach(self, *args: object, **kwargs: object) -> object:
        return self.fleet.attach(report(*args, **kwargs), self.clock.now, 0.0, lambda: None)  # type: ignore[arg-type]

    def acquire(
        self, request: RouteRequest | None = None, avoid: frozenset[Failed] = NOBODY, **more: Any
    ) -> asyncio.Task[Grant]:
        return asyncio.ensure_future(self.scheduler.acquire(request or RouteRequest("r"), avoid, **more))

    def stand(self, request: RouteRequest | None = None) -> Standing:
        place = self.scheduler.take_place(background=True)
        return self.scheduler.stand(request or RouteRequest("r"), NOBODY, place)

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


@pytest.mark.parametrize("before", [0, 1])
async def test_a_server_that_opens_while_one_is_turned_away_is_offered_to_it(before: int) -> None:
    """Time passes while a request is looked at: what was not open then, and is now, is news."""
    house = House()
    house.attach(slots=8)
    house.fleet.table.lane_until[:] = house.clock.now + Policy().late_binding_s + 0.0105
    waiting = [house.acquire() for _ in range(before)]
    await settle()
    house.clock.now += 0.01
    house.selection_takes = 0.001
    waiting.append(house.acquire())
    await settle()
    assert not any(each.done() for each in waiting)
    house.later(0.01)
    await settle()
    assert all(each.done() for each in waiting)


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
    assert error.message.startswith("servers are still coming up")  # the control plane may be there for days
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
    grant = await house.acquire(avoid=frozenset({failed("a")}))
    assert grant.flight.server_id == "b"
    house.later(2.5)
    error = await refused(house.acquire(avoid=frozenset({failed("a"), failed("b")})))
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


# ------------------------------------------------------ what an event costs ---


def distinct(number: int, **fields: Any) -> RouteRequest:
    """One whose needs nobody shares."""
    return RouteRequest(f"r{number}", excluded=frozenset({ServerId(f"x{number}")}), **fields)


async def crowd(house: House, count: int, **fields: Any) -> list[asyncio.Task[Grant]]:
    """So many wait, no two with the same needs."""
    tasks = [house.acquire(distinct(number, **fields)) for number in range(count)]
    await settle()
    assert sum(house.scheduler.depth().values()) == count
    return tasks


async def give_up(tasks: list[asyncio.Task[Grant]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_an_event_costs_what_it_starts_however_unlike_those_who_wait_are() -> None:
    house = House(2000)
    house.later(3.0)
    attachment: Any = house.attach(slots=1)
    held = await house.acquire()
    before = house.selections
    tasks = await crowd(house, 1000)
    assert house.selections - before == 1000, "one who comes is offered what is open, and nobody else is"
    assert house.counted(house.later, 0.05) == 0
    assert house.counted(house.fleet.update, attachment, report(slots=1), house.clock.now, 0.0) == 0
    for task in tasks[:5]:
        assert house.counted(house.scheduler.release, held.flight, NEUTRAL) == 1
        held = await task
    await give_up(tasks)


async def test_plans_take_a_tenth_of_the_time_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    house = House(2000)
    house.attach(slots=1)
    held = await house.acquire()
    tasks = await crowd(house, 20)
    plans: list[float] = []

    def plan(table: object, cases: list[object], now: float) -> list[bool]:
        plans.append(now)
        house.clock.now += 0.01
        return [True] * len(cases)

    monkeypatch.setattr("control_plane.fleet.scheduler.triage", plan)
    for _ in range(12):
        house.scheduler.release(held.flight, NEUTRAL)
        house.clock.now += 0.02
        await settle()
        held = next(task for task in tasks if task.done()).result()
        tasks = [task for task in tasks if not task.done()]
    assert len(plans) == 3, plans
    assert all(later - sooner >= 0.1 - 1e-9 for sooner, later in pairwise(plans))
    await give_up(tasks)


async def test_what_opens_for_others_costs_those_who_wait_nothing() -> None:
    house = House(2000)
    house.later(3.0)
    house.attach("busy", slots=1, models=(card("m"),))
    house.attach("idle", slots=1, models=(card("other"),))
    await house.acquire(RouteRequest("r", model=ModelName("m")))
    tasks = await crowd(house, 1000, model=ModelName("m"))
    tasks += [
        house.acquire(RouteRequest("r", excluded=frozenset({ServerId("idle"), ServerId(f"{n}")}))) for n in range(500)
    ]
    await settle()

    async def pass_through() -> None:
        grant = await house.acquire(RouteRequest("r", model=ModelName("other")))
        house.scheduler.release(grant.flight, NEUTRAL)

    before = house.selections
    for _ in range(10):
        await pass_through()
    assert house.selections - before == 10
    await give_up(tasks)


async def test_reports_that_change_the_table_cost_those_who_wait_nothing() -> None:
    house = House(2000)
    house.later(3.0)
    attachment: Any = house.attach(slots=1)
    await house.acquire()
    tasks = await crowd(house, 1000)
    measured = report(slots=1, models=(replace(card(), ttft=0.3),))
    assert house.counted(house.fleet.update, attachment, measured, house.clock.now, 0.0) == 0
    await give_up(tasks)


async def test_the_event_loop_gets_its_turn_between_many_starts() -> None:
    house = House()
    house.later(3.0)
    house.attach("a", slots=1)
    await house.acquire()
    tasks = await crowd(house, 60)
    house.selection_takes = 0.001
    assert house.counted(lambda: house.attach("b", slots=50)) <= 3
    late = house.acquire()  # comes while the others are being started
    await asyncio.wait(tasks[:50], timeout=5)
    assert [task.done() for task in tasks] == [True] * 50 + [False] * 10
    assert not late.done()
    await give_up([*tasks, late])


async def test_the_event_loop_gets_its_turn_between_many_refusals() -> None:
    house = House()
    house.later(3.0)
    attachment: Any = house.attach(slots=1)
    await house.acquire()
    tasks = await crowd(house, 60)
    house.selection_takes = 0.001
    other = report(slots=1, models=(card(code_generation=0.5),))
    assert house.counted(house.fleet.update, attachment, other, house.clock.now, 0.0) <= 3
    reasons = [(await refused(task)).reason for task in tasks]
    assert reasons == ["NO_CAPABLE_SERVER"] * 60


async def test_a_lane_moves_on_when_its_first_goes_away() -> None:
    house = House()
    house.attach("small", models=(card(context_length=5000),), slots=1)
    house.attach("large", models=(card(context_length=9000),), slots=1)
    await house.acquire(RouteRequest("r", prompt_tokens=6000))
    held = await house.acquire(RouteRequest("r", prompt_tokens=4500))
    needs_more = house.acquire(RouteRequest("r", prompt_tokens=5100))
    await settle()
    house.clock.now += 1.0  # so that it is not its turn yet, although a short prompt has to start sooner
    needs_less = house.acquire(RouteRequest("r", prompt_tokens=4500))
    await settle()
    house.scheduler.release(held.flight, NEUTRAL)
    await settle()
    assert not needs_less.done()  # of the same lane, as documented
    needs_more.cancel()
    await settle()
    house.later(0.05)
    assert (await needs_less).flight.server_id == "small"


# -------------------------------------------------------- after a failure ---


async def test_a_server_that_was_started_anew_is_not_avoided() -> None:
    house = House()
    house.attach("a", slots=1)
    house.attach("b", slots=1)
    await house.acquire(RouteRequest("r", server_id=ServerId("b")))
    retried = house.acquire(avoid=frozenset({failed("a")}), again=True)
    await settle()
    assert not retried.done()
    house.attach("a", instance="2", slots=1)
    assert (await retried).flight.server_id == "a"


async def test_the_failures_of_a_process_die_with_it() -> None:
    house = House()
    house.attach("a", slots=30)
    grants = [await house.acquire() for _ in range(30)]
    for grant in grants:
        house.scheduler.release(grant.flight, Outcome(OutcomeKind.FAILURE))
    house.later(1.5)  # its breaker is ready for a trial
    assert "fails too often" in house.scheduler.explain(RouteRequest("r")).summary
    house.attach("a", instance="2", slots=30)
    grant = await house.acquire()
    house.scheduler.release(grant.flight, Outcome(OutcomeKind.SUCCESS))
    assert [(await house.acquire()).flight.server_id for _ in range(30)] == ["a"] * 30


async def test_a_retry_keeps_its_place() -> None:
    house = House()
    house.attach(slots=1)
    place = house.scheduler.take_place()
    held = await house.acquire()
    others = [house.acquire(RouteRequest(str(number))) for number in range(3)]
    await settle()
    retried = house.acquire(place=place, again=True)
    await settle()
    house.scheduler.release(held.flight, NEUTRAL)
    held = await retried
    house.scheduler.release(held.flight, NEUTRAL)
    await others[0]
    await give_up(others)


async def test_a_retry_is_not_turned_away_and_waits_for_models_to_be_known() -> None:
    house = House(bound=0)
    house.later(3.0)
    house.attach(health=Health.STARTING, models=())
    assert (await refused(house.acquire())).reason == "FLEET_WARMING_UP"
    retried = house.acquire(again=True)
    await settle()
    house.later(0.05)
    assert not retried.done()
    house.attach()
    assert (await retried).flight.server_id == "a"


async def test_a_retry_does_not_wait_for_nobody() -> None:
    house = House()
    house.later(3.0)
    attachment: Any = house.attach(health=Health.STARTING, models=())
    retried = house.acquire(again=True)
    await settle()
    house.fleet.detach(attachment)
    house.later(3.5)
    await settle()
    assert (await refused(retried)).reason in ("NO_CAPABLE_SERVER", "SERVERS_AWAY")


async def test_a_sign_of_life_is_waited_for() -> None:
    house = House()
    attachment: Any = house.attach()
    flight = (await house.acquire()).flight
    hearing = asyncio.ensure_future(house.scheduler.heard_from(flight))
    house.attach("b")
    await settle()
    assert not hearing.done()
    house.fleet.update(attachment, report(), house.clock.now, 0.0)
    await asyncio.wait_for(hearing, 5)
    hearing = asyncio.ensure_future(house.scheduler.heard_from(flight))
    await settle()
    house.fleet.detach(attachment)
    await asyncio.wait_for(hearing, 5)
    await asyncio.wait_for(house.scheduler.heard_from(flight), 5)


async def test_the_bytes_of_those_who_wait_are_bounded() -> None:
    house = House(max_bytes=100)
    house.attach(slots=1)
    held = await house.acquire(size=1000)  # does not wait
    waiting = house.acquire(size=60)
    await settle()
    error = await refused(house.acquire(size=41))
    assert error.reason == "QUEUE_FULL" and "queue.max_bytes" in error.message
    assert error.retry_after and error.retry_after > 0
    small = house.acquire(size=40)
    await settle()
    house.scheduler.release(held.flight, NEUTRAL)
    await waiting
    small.cancel()


# ---------------------------------------------------------- in the background ---


async def test_the_background_gives_way_to_its_class_and_goes_before_lower_ones() -> None:
    house = House(bound=1)
    house.attach(slots=1)
    held = await house.acquire()
    work = house.stand()
    low, normal = house.acquire(RouteRequest("low", priority=Priority.LOW)), house.acquire()
    await settle()
    assert house.scheduler.depth()[Priority.NORMAL] == 1
    for task in (normal, work.future, low):
        assert not task.done()
        house.scheduler.release(held.flight, NEUTRAL)
        held = await asyncio.wait_for(task, 5)
    assert house.granted.count((Priority.NORMAL, 0.0)) == 2, "the background is not among the waiting times"


async def test_the_background_waits_whatever_becomes_of_the_fleet() -> None:
    house = House()
    house.later(3.0)
    work = house.stand(RouteRequest("r", model=ModelName("m")))
    attachment: Any = house.attach(models=(card("other"),))
    house.later(100.0)
    house.fleet.detach(attachment)
    house.later(1000.0)
    await settle()
    assert not work.future.done()
    house.attach("b", models=(card("m"),))
    assert (await asyncio.wait_for(work.future, 5)).flight.server_id == "b"


async def test_what_is_free_is_taken_unless_somebody_waits_for_it() -> None:
    house = House()
    house.later(3.0)
    house.attach(slots=2)
    place = house.scheduler.take_place(background=True)
    first = house.scheduler.try_acquire(RouteRequest("r"), NOBODY, place)
    second = house.scheduler.try_acquire(RouteRequest("r"), NOBODY, place)
    assert first and second and house.scheduler.try_acquire(RouteRequest("r"), NOBODY, place) is None
    waiting = house.acquire()
    await settle()
    house.scheduler.release(first.flight, NEUTRAL)
    assert house.scheduler.try_acquire(RouteRequest("r"), NOBODY, place) is None
    await waiting


async def test_who_leaves_the_background_leaves_no_trace() -> None:
    house = House()
    house.attach(slots=1)
    at_once = house.stand()
    work, next_one = house.stand(), house.stand()
    house.scheduler.leave(work)
    house.scheduler.leave(at_once)
    assert (await asyncio.wait_for(next_one.future, 5)).flight.server_id == "a"
    assert len(house.fleet.server("a").flights) == 1
    house.scheduler.leave(next_one)
    assert not house.fleet.server("a").flights


async def test_an_event_costs_the_background_nothing_either() -> None:
    house = House()
    house.later(3.0)
    attachment: Any = house.attach(slots=1)
    held = await house.acquire()
    works = [house.stand(distinct(number)) for number in range(1000)]
    works += [house.stand(RouteRequest("r", model=ModelName("nowhere"))) for number in range(100)]
    assert house.counted(house.later, 0.05) == 0
    assert house.counted(house.fleet.update, attachment, report(slots=1), house.clock.now, 0.0) == 0
    measured = report(slots=1, models=(replace(card(), ttft=0.3),))
    assert house.counted(house.fleet.update, attachment, measured, house.clock.now, 0.0) == 0
    for work in works[:5]:
        assert house.counted(house.scheduler.release, held.flight, NEUTRAL) == 1
        held = await asyncio.wait_for(work.future, 5)
    for work in works[5:]:
        house.scheduler.leave(work)


async def test_a_price_that_nobody_offers_any_more_is_refused() -> None:
    house = House()
    house.later(3.0)
    cheap = replace(card(), price=Price(0.0, 0.0, 1.0))
    attachment: Any = house.attach(slots=1, models=(cheap,))
    await house.acquire()
    limited = RouteRequest("r", max_tokens=100, max_cost_nano_usd=100_000)
    waiting = house.acquire(limited)
    await settle()
    assert not waiting.done()
    dear = replace(cheap, price=Price(0.0, 0.0, 2.0))
    house.fleet.update(attachment, report(slots=1, models=(dear,)), house.clock.now, 0.0)
    error = await refused(waiting)
    assert error.reason == "NO_CAPABLE_SERVER" and "expected to cost" in error.message
    assert (await refused(house.acquire(limited))).reason == "NO_CAPABLE_SERVER"


# ---------------------------------------------------------------- fairness ---

kinds = st.sampled_from(["m1", "m2"])
servers = st.sampled_from(["s1", "s2", "s3"])


class Traffic(RuleBasedStateMachine):
    """Whatever happens: nobody waits who could start, and nobody who starts was preceded by one who could have."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.house = House()
        self.house.later(3.0)  # no warming up
        self.waiting: dict[int, tuple[RouteRequest, asyncio.Future[Grant]]] = {}
        self.background: dict[int, Standing] = {}
        self.held: list[Grant] = []
        self.count = 0

    def teardown(self) -> None:
        for number, standing in self.background.items():
            self.house.scheduler.leave(standing)
            del self.waiting[number]
        self.loop.run_until_complete(give_up([task for _, task in self.waiting.values()]))
        self.loop.close()

    def on_loop(self, event: Callable[[], Any]) -> None:
        async def run() -> None:
            event()
            await settle()

        self.loop.run_until_complete(run())
        self.settle_accounts()

    def could_use(self, request: RouteRequest, server_id: ServerId) -> bool:
        offered = {card.name for card in self.house.fleet.server(server_id).cards}
        return server_id not in request.excluded and (request.model is None or request.model in offered)

    def settle_accounts(self) -> None:
        started = {number: task for number, (_, task) in self.waiting.items() if task.done()}
        order = sorted(
            self.waiting, key=lambda number: (-self.waiting[number][0].priority, number in self.background, number)
        )
        for number, task in started.items():
            if task.exception() is not None:
                continue
            server_id = task.result().flight.server_id
            for earlier in order[: order.index(number)]:
                if earlier not in started:
                    request = self.waiting[earlier][0]
                    assert not self.could_use(request, server_id), f"{number} overtook {earlier} on {server_id}"
            self.held.append(task.result())
        for number in started:
            del self.waiting[number]
            self.background.pop(number, None)

    @rule(server_id=servers, models=st.sets(kinds, min_size=1), slots=st.integers(1, 3), instance=st.sampled_from("12"))
    def attach(self, server_id: str, models: set[str], slots: int, instance: str) -> None:
        cards = tuple(card(name) for name in sorted(models))
        self.on_loop(lambda: self.house.attach(server_id, instance=instance, slots=slots, models=cards))

    @precondition(lambda self: self.house.fleet.servers())
    @rule(model=st.none() | kinds, excluded=st.sets(servers), priority=st.sampled_from(Priority))
    def arrive(self, model: str | None, excluded: set[str], priority: Priority) -> None:
        request = RouteRequest(
            str(self.count),
            priority=priority,
            model=ModelName(model) if model else None,
            excluded=frozenset(ServerId(server_id) for server_id in excluded),
        )

        def event() -> None:
            self.waiting[self.count] = request, self.house.acquire(request)

        self.on_loop(event)
        self.count += 1

    @rule(model=st.none() | kinds, excluded=st.sets(servers), priority=st.sampled_from(Priority))
    def stand(self, model: str | None, excluded: set[str], priority: Priority) -> None:
        request = RouteRequest(
            str(self.count),
            priority=priority,
            model=ModelName(model) if model else None,
            excluded=frozenset(ServerId(server_id) for server_id in excluded),
        )

        def event() -> None:
            standing = self.background[self.count] = self.house.stand(request)
            self.waiting[self.count] = request, standing.future

        self.on_loop(event)
        self.count += 1

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        grant = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.on_loop(lambda: self.house.scheduler.release(grant.flight, NEUTRAL))

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.waiting)))
        _, task = self.waiting.pop(number)
        standing = self.background.pop(number, None)
        self.on_loop(task.cancel if standing is None else partial(self.house.scheduler.leave, standing))

    @rule()
    def drain_and_back(self) -> None:
        for server in self.house.fleet.servers()[:1]:
            self.on_loop(partial(self.house.fleet.drain, server.id, undo=False))
            self.on_loop(partial(self.house.fleet.drain, server.id, undo=True))

    @rule(seconds=st.sampled_from([0.05, 1.0]))
    def later(self, seconds: float) -> None:
        self.on_loop(lambda: self.house.later(seconds))

    @invariant()
    def nobody_waits_who_could_start(self) -> None:
        self.on_loop(lambda: self.house.scheduler.tick(self.house.clock.now))
        for number, (request, _) in self.waiting.items():
            verdict = self.house.scheduler.explain(request).verdict
            assert verdict is Verdict.WAIT or (number in self.background and verdict is Verdict.IMPOSSIBLE)


TestTraffic = Traffic.TestCase
TestTraffic.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


# ----------------------------------------------------------------- budgets ---


def budgeted(house: House, limit: int) -> Ledger:
    """An hourly budget of money for everybody, all of it here."""
    house.clock.now += POLICY.warm_up
    ledger = Ledger((Budget(Unit.NANO_USD, Window.HOUR, limit),))
    house.scheduler.pay_from(Accounts(ledger, Reckoning(prompt_factor=1.0), house.clock.wall))
    share(house, ledger)
    return ledger


def share(house: House, ledger: Ledger) -> None:
    ledger.need("default", Amounts(10**9, 0), house.clock.wall())
    wishes = ledger.wishes(house.clock.wall())
    ledger.answered(wishes, {wish.key: Answer(0, wish.share) for wish in wishes})


PAID = replace(card(), price=Price(prompt=1.0, completion=1.0))
"""A token costs 1,000 nano-dollars."""
DEAR = RouteRequest("r", prompt_tokens=10, max_tokens=90)


async def test_a_request_waits_for_money_that_is_set_aside_and_is_refused_when_it_is_spent() -> None:
    house = House()
    house.attach("a", slots=4, models=(PAID,))
    budgeted(house, 250_000)
    first, second = await house.acquire(DEAR), await house.acquire(DEAR)
    waiting, poorer = house.acquire(DEAR), house.acquire(DEAR)
    await settle()
    assert not waiting.done() and house.scheduler.depth()[Priority.NORMAL] == 2
    assert "costs more than is left" in house.scheduler.explain(DEAR).summary
    assert house.scheduler.outlook(DEAR) is Outlook.HERE
    first.flight.charge.begin()
    first.flight.charge.count(10, 0, 20)
    house.scheduler.release(first.flight, NEUTRAL)  # 30,000 were used, 120,000 are free
    third = await waiting
    assert not poorer.done()
    for grant in (second, third):
        grant.flight.charge.begin()
        grant.flight.charge.count(10, 0, 90)
        house.scheduler.release(grant.flight, NEUTRAL)
    error = await refused(poorer)
    assert error.reason == "BUDGET_EXHAUSTED" and error.retry_after is not None and 0 < error.retry_after <= 3600
    assert house.scheduler.outlook(DEAR) is Outlook.AWAY


async def test_work_in_the_background_waits_for_the_next_window() -> None:
    house = House()
    house.attach("a", models=(PAID,))
    ledger = budgeted(house, 150_000)
    held = await house.acquire(DEAR)
    held.flight.charge.begin()
    held.flight.charge.count(10, 0, 90)
    house.scheduler.release(held.flight, NEUTRAL)
    standing = house.stand(DEAR)
    await settle()
    assert not standing.future.done()
    house.clock.now += 3600
    share(house, ledger)
    house.scheduler.tick(house.clock.now)
    assert (await standing.future).flight.server_id == "a"


async def test_nothing_is_set_aside_for_who_gives_up() -> None:
    house = House()
    house.attach("a", slots=1, models=(PAID,))
    ledger = budgeted(house, 1_000_000)
    held = await house.acquire(DEAR)
    waiting = house.acquire(DEAR)
    await settle()
    waiting.cancel()
    house.scheduler.release(held.flight, NEUTRAL)
    await settle()
    (pot,) = ledger.pots("default", house.clock.wall())
    assert (pot.reserved, pot.used) == (0, 0)


async def test_money_that_comes_while_others_are_offered_a_slot_is_not_overlooked() -> None:
    """The offer has come past the one who waits for it and is interrupted before its end."""
    house = House()
    house.attach("a", slots=8, models=(PAID,))
    budgeted(house, 150_000)
    held = await house.acquire(DEAR)
    waiting = house.acquire(DEAR)
    others = [house.acquire(replace(DEAR, tenant=f"t{number}")) for number in range(5)]
    await settle()
    held.flight.charge.begin()
    held.flight.charge.count(10, 0, 1)
    scheduler, seen = house.scheduler, []

    def selected(seconds: float) -> None:
        """Each selection takes so long that the round ends after it."""
        house.selected(seconds)
        house.clock.now += 1.0
        seen.append(seconds)
        if len(seen) == 2:
            scheduler.release(held.flight, NEUTRAL)

    scheduler._on_selected = selected
    scheduler._known = None
    scheduler._pump()
    async with asyncio.timeout(5):
        await waiting
    for other in others:
        other.cancel()
    await asyncio.gather(*others, return_exceptions=True)


# --------------------------------------------------------------------- spill ---


async def test_a_request_waits_for_home_and_spills_when_that_is_too_late() -> None:
    house = House()
    house.scheduler.class_policies = {Priority.NORMAL: Policy(spill_usd=1.0)}
    paid = replace(card("big"), price=Price(10.0, 0.0, 10.0))
    attachments: list[Any] = [house.attach("api", models=(paid,), slots=8), house.attach("mac", slots=1)]

    def later(seconds: float) -> None:
        for attachment in attachments:
            house.fleet.heard(attachment, 1, house.clock.now)
        house.later(seconds)

    for _ in range(20):
        quick = await house.acquire(RouteRequest("quick", prompt_tokens=10, max_tokens=10))
        quick.flight.charge.count(10, 0, 10)
        house.scheduler.release(quick.flight, Outcome(OutcomeKind.SUCCESS, 0.1, 0.01))
        later(1.0)
    first = await house.acquire(RouteRequest("first", prompt_tokens=10, max_tokens=10))
    assert first.flight.server_id == "mac"
    house.fleet.first_token(first.flight, house.clock.now)
    waiting = house.acquire(RouteRequest("second", prompt_tokens=10, max_tokens=10))
    await asyncio.sleep(0)
    assert not waiting.done(), "the one at home is nearly through"
    for _ in range(40):
        later(0.25)
        await asyncio.sleep(0)
        if waiting.done():
            break
    grant = await waiting
    assert grant.flight.server_id == "api" and 0.5 <= grant.queued <= 4.0


async def test_one_that_is_late_and_would_come_too_late_leaves_the_server_to_the_next() -> None:
    house = House()
    house.attach(slots=1)
    busy, now = await house.acquire(), house.clock.now
    vain = house.acquire(RouteRequest("vain", prompt_tokens=2000), arrived=now - 900.0, leaves=now + 0.5)
    next_one = house.acquire(RouteRequest("next", prompt_tokens=2000), arrived=now - 800.0, leaves=now + 500.0)
    await settle()
    house.scheduler.release(busy.flight, NEUTRAL)
    await settle()
    assert next_one.done() and not vain.done()
    house.scheduler.release(next_one.result().flight, NEUTRAL)
    house.later(0.6)
    await settle()
    assert vain.done(), "nobody else wants it, and it is only an estimate"
    house.scheduler.release(vain.result().flight, NEUTRAL)


async def test_a_server_is_not_idle_because_many_come_too_late() -> None:
    house, now = House(), 100.0
    house.attach(slots=1)
    busy = await house.acquire()
    house.fleet.first_token(busy.flight, house.clock.now)
    asked = [
        house.acquire(RouteRequest(f"vain {n}", prompt_tokens=2000), arrived=now - 900.0 + n, leaves=now + 0.1)
        for n in range(40)
    ]
    await settle()
    house.scheduler.release(busy.flight, NEUTRAL)
    await settle()
    started = [each for each in asked if each.done()]
    assert len(started) == 1
    house.scheduler.release(started[0].result().flight, NEUTRAL)
    for each in asked:
        each.cancel()
