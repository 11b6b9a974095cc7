"""What the fleet knows of requests on their way to the first token."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from control_plane.domain.request import RouteRequest
from control_plane.domain.server import Load
from control_plane.fleet.registry import Fleet
from control_plane.fleet.server import Expected, Flight, Outcome, OutcomeKind, Prefilling
from tests.unit.control_plane.builders import fleet, report

REQUEST = RouteRequest("r", prompt_tokens=1000)
NEUTRAL = Outcome(OutcomeKind.NEUTRAL)


def house() -> Fleet:
    subject = fleet()
    subject.attach(report(slots=8), 0.0, 0.0, lambda: None)
    return subject


def answered(subject: Fleet, now: float, ttft: float, tpot: float = 0.01) -> None:
    flight = subject.begin(0, now, REQUEST)
    subject.first_token(flight, now + ttft)
    flight.charge.count(1000, 0, 11)
    subject.end(flight, Outcome(OutcomeKind.SUCCESS, ttft, tpot), now + ttft + 10 * tpot)


def taught(ttft: float = 0.5) -> Fleet:
    subject = house()
    for number in range(20):
        answered(subject, 10.0 * number, ttft)
    return subject


def lane(subject: Fleet) -> float:
    return float(subject.table.lane_until[0])


def test_the_prefill_is_busy_until_the_first_token() -> None:
    subject = taught()
    first = subject.begin(0, 300.0, REQUEST)
    assert 300.1 < lane(subject) < 301.0
    second = subject.begin(0, 300.0, REQUEST)
    assert lane(subject) > 300.6
    assert subject.table.streams[0] == 0
    subject.first_token(first, 300.2)
    assert 300.3 < lane(subject) < 301.0 and subject.table.streams[0] == 1
    subject.end(second, NEUTRAL, 300.3)
    assert lane(subject) == 0.0
    subject.end(first, NEUTRAL, 301.0)
    assert subject.table.streams[0] == 0


def test_a_first_token_that_is_late_keeps_the_prefill_busy() -> None:
    subject = taught()
    flight = subject.begin(0, 300.0, REQUEST)
    flight.on_overdue = lambda: None
    subject.tick(302.0)
    assert lane(subject) > 302.5, "it may take as long again as it is late"


def test_one_that_nobody_tells_of_is_through_when_it_should_be() -> None:
    subject = taught()
    subject.begin(0, 300.0, REQUEST)
    subject.tick(302.0)
    assert subject.table.streams[0] == 1 and lane(subject) <= 302.0


def test_who_is_overdue_is_told_once_and_the_server_counts_as_slow() -> None:
    subject = taught()
    told: list[Flight] = []
    flight = subject.begin(0, 300.0, REQUEST)
    flight.on_overdue = lambda: told.append(flight)
    before = float(subject.table.per_prompt_token[0])
    subject.tick(300.6)
    assert not told
    for now in (310.0, 311.0, 312.0):
        subject.tick(now)
    assert told == [flight]
    assert subject.table.per_prompt_token[0] > 5 * before
    subject.first_token(flight, 312.5)
    subject.end(flight, NEUTRAL, 312.5)
    for number in range(3):
        answered(subject, 320.0 + number, 0.5)
    assert subject.table.per_prompt_token[0] < 3 * before, "answers clear it"


def test_a_prompt_that_was_not_cached_after_all_is_not_overdue() -> None:
    subject = taught()
    told: list[int] = []
    flight = subject.begin(0, 300.0, REQUEST, 990.0)
    flight.on_overdue = lambda: told.append(1)
    assert lane(subject) < 300.2
    subject.tick(301.0)
    assert not told, "it may take as long as one of which nothing is cached"
    subject.tick(310.0)
    assert told


def test_the_prefill_is_busy_for_as_long_as_the_prompt_takes_itself() -> None:
    """However little requests before it have waited for others."""
    subject = taught()
    flight = subject.begin(0, 300.0, REQUEST)
    expected = flight.expected.features.uncached_tokens * float(subject.table.per_prompt_token[0])
    assert lane(subject) == 300.0 + expected > 300.3


def test_where_nothing_is_known_nobody_is_waited_for_longer_than_the_objective() -> None:
    subject = house()
    told: list[int] = []
    flight = subject.begin(0, 0.0, REQUEST, 0.0, 3.0)
    flight.on_overdue = lambda: told.append(1)
    subject.tick(2.9)
    assert not told
    subject.tick(3.1)
    assert told


def test_a_full_server_tells_when_its_next_slot_is_free() -> None:
    subject = taught()
    flights = [subject.begin(0, 300.0 + number, REQUEST) for number in range(8)]
    for flight in flights:
        subject.first_token(flight, 309.0)
    assert 309.0 <= subject.table.slot_at[0] < 320.0
    for flight in flights:
        subject.end(flight, NEUTRAL, 310.0)


def test_a_report_that_leaves_as_much_room_wakes_nobody() -> None:
    subject = fleet()
    attachment = subject.attach(report(slots=8), 0.0, 0.0, lambda: None)
    woken: list[int] = []
    subject.on_capacity = lambda: woken.append(1)
    subject.update(attachment, replace(report(slots=8), load=Load(slots=8, running=3)), 1.0, 1.0)
    assert not woken
    subject.update(attachment, report(slots=9), 2.0, 2.0)
    assert woken == [1] and subject.table.free[0] == 9
    subject.tick(50.0)
    assert not subject.table.ready[0]
    subject.update(attachment, report(slots=9), 51.0, 51.0)
    assert woken == [1, 1] and subject.table.ready[0], "it is back, with as much room as before"


def test_of_a_prompt_that_is_nearly_through_little_is_still_ahead() -> None:
    subject = taught()
    first = subject.begin(0, 300.0, REQUEST)
    half = 300.0 + (first.expected.first_at - 300.0) / 2
    second = subject.begin(0, half, REQUEST)
    assert 400.0 < second.expected.features.backlog_tokens < 700.0
    late = first.expected.first_at + 10.0
    assert subject.begin(0, late, REQUEST).expected.features.backlog_tokens < 1000.0, "that of the second at most"


def test_a_server_that_has_just_failed_is_not_given_the_time_of_a_prompt_that_is_not_cached() -> None:
    subject = taught()
    subject.end(subject.begin(0, 290.0, REQUEST), Outcome(OutcomeKind.FAILURE), 290.0)
    told: list[int] = []
    flight = subject.begin(0, 300.0, replace(REQUEST, prompt_tokens=10_000), 9_990.0)
    flight.on_overdue = lambda: told.append(1)
    subject.tick(302.0)
    assert told


class Underway:
    """As much of a flight as its prefill is."""

    def __init__(self, first_at: float, uncached: float, lane: float) -> None:
        self.expected = Expected(first_at=first_at, uncached=uncached, lane=lane)


def left(flights: list[Underway], now: float) -> float:
    """Tokens, from the first flight on: those before one that has not begun are through, or in the middle."""
    done = 0.0
    for flight in flights:
        expected = flight.expected
        seconds = max(0.0, expected.first_at - now)
        if seconds and seconds >= expected.lane:
            break
        done += expected.uncached * (1 - seconds / expected.lane) if seconds else expected.uncached
    return sum(flight.expected.uncached for flight in flights) - done


seconds = st.floats(0, 100)
steps = st.one_of(
    st.builds(Underway, seconds, st.floats(0, 1e5), st.sampled_from((0.0, 0.5, 5.0, 50.0))),
    st.integers(0, 20),  # one of them has its first token
    st.floats(0, 20),  # time passes
)


@given(st.lists(steps, max_size=30))
def test_the_backlog_is_what_a_look_at_all_of_them_says(happened: list[Underway | int | float]) -> None:
    prefilling, flights, now = Prefilling(), list[Underway](), 0.0
    for step in happened:
        if isinstance(step, Underway):
            prefilling.add(step)  # type: ignore[arg-type]
            flights.append(step)
        elif isinstance(step, float):
            now += step
        elif flights:
            gone = flights.pop(step % len(flights))
            assert prefilling.discard(gone)  # type: ignore[arg-type]
        whole = left(flights, now)
        assert prefilling.backlog(now) == pytest.approx(whole, abs=1e-3)
