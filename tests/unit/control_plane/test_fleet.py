from __future__ import annotations

import pytest

from control_plane.domain.definition import Definitions, ModelDefinition
from control_plane.domain.errors import DomainError
from control_plane.domain.model import ModelName, Price, Provider
from control_plane.domain.server import BreakerState, Health, LeaseState
from control_plane.fleet.registry import Fleet, Flight, Outcome, OutcomeKind
from tests.unit.control_plane.builders import card, fleet, report

FAILURE = Outcome(OutcomeKind.FAILURE)
NEUTRAL = Outcome(OutcomeKind.NEUTRAL)


def nothing() -> None: ...


def free(subject: Fleet) -> list[int]:
    return [int(count) for count in subject.table.free]


def ready(subject: Fleet) -> list[bool]:
    return [bool(value) for value in subject.table.ready]


def begin(subject: Fleet, now: float = 0.0) -> Flight:
    return subject.begin(0, now)


def test_a_broken_stream_makes_suspect_at_once_and_lost_at_expiry() -> None:
    subject = fleet()
    attachment = subject.attach(report(), 0.0, 0.0, nothing)
    assert subject.server("a").state is LeaseState.LIVE
    assert ready(subject) == [True]
    subject.detach(attachment)
    assert subject.server("a").state is LeaseState.SUSPECT
    assert ready(subject) == [False]
    subject.tick(2.9)
    assert subject.server("a").state is LeaseState.SUSPECT
    subject.tick(3.0)
    assert subject.server("a").state is LeaseState.LOST
    subject.tick(3.0 + 60.1)
    assert subject.servers() == []


def test_a_silent_stream_is_lost_too_and_its_next_report_begins_a_new_epoch() -> None:
    subject = fleet()
    attachment = subject.attach(report(), 0.0, 0.0, nothing)
    subject.update(attachment, report(), 1.0, 1.0)
    subject.tick(4.0)
    assert subject.server("a").state is LeaseState.LOST
    subject.update(attachment, report(), 5.0, 5.0)
    assert subject.server("a").state is LeaseState.LIVE
    assert subject.server("a").lease.epoch == 2
    assert ready(subject) == [True]


def test_every_stream_gets_a_higher_epoch_and_a_newer_one_supersedes() -> None:
    subject = fleet()
    told: list[str] = []
    first = subject.attach(report(), 0.0, 0.0, lambda: told.append("first"))
    second = subject.attach(report(instance="2"), 1.0, 1.0, nothing)
    assert told == ["first"]
    assert first.superseded and not second.superseded
    assert subject.server("a").lease.epoch == 2
    with pytest.raises(DomainError) as refused:
        subject.update(first, report(), 2.0, 2.0)
    assert refused.value.reason == "SUPERSEDED"
    subject.detach(first)
    assert subject.server("a").state is LeaseState.LIVE


def test_a_stream_may_not_change_its_server() -> None:
    subject = fleet()
    attachment = subject.attach(report(), 0.0, 0.0, nothing)
    with pytest.raises(DomainError) as refused:
        subject.update(attachment, report("b"), 1.0, 1.0)
    assert refused.value.reason == "INVALID_REQUEST"


def test_a_slot_is_taken_given_back_once_and_counts_foreign_work() -> None:
    subject = fleet()
    attachment = subject.attach(report(slots=3, foreign=1), 0.0, 0.0, nothing)
    assert free(subject) == [2]
    flight = begin(subject)
    assert free(subject) == [1]
    subject.update(attachment, report(slots=3, foreign=0), 0.5, 0.5)
    assert free(subject) == [2]
    subject.end(flight, NEUTRAL, 1.0)
    subject.end(flight, FAILURE, 1.0)
    assert free(subject) == [3]
    assert subject.server("a").pairs[ModelName("m"), Provider("sim")].stats.requests == 0


def test_own_work_survives_a_change_of_models() -> None:
    subject = fleet()
    attachment = subject.attach(report(), 0.0, 0.0, nothing)
    flight = begin(subject)
    subject.update(attachment, report(models=(card("other"), card("third"))), 1.0, 1.0)
    assert free(subject) == [1, 1]
    subject.end(flight, NEUTRAL, 1.0)
    assert free(subject) == [2, 2]


def test_lost_servers_end_their_flights() -> None:
    subject = fleet()
    subject.attach(report(), 0.0, 0.0, nothing)
    lost: list[str] = []
    begin(subject).on_lost = lambda: lost.append("x")
    subject.tick(2.0)
    assert lost == []
    subject.tick(3.0)
    assert lost == ["x"]


def test_drain_is_ordered_told_and_undone() -> None:
    subject = fleet()
    told: list[str] = []
    subject.attach(report(), 0.0, 0.0, lambda: told.append("x"))
    subject.drain("a", undo=False)
    subject.drain("a", undo=False)
    assert told == ["x"]
    assert subject.server("a").state is LeaseState.DRAINING
    assert bool(subject.table.draining[0])
    subject.drain("a", undo=True)
    assert subject.server("a").state is LeaseState.LIVE
    subject.drain("a", undo=False)
    subject.attach(report(instance="2"), 1.0, 1.0, nothing)
    assert subject.server("a").state is LeaseState.LIVE, "the order was for the old process"
    with pytest.raises(DomainError) as refused:
        subject.drain("nobody", undo=False)
    assert refused.value.reason == "UNKNOWN_SERVER"


def test_a_server_that_drains_by_itself_gets_nothing() -> None:
    subject = fleet()
    subject.attach(report(draining=True), 0.0, 0.0, nothing)
    assert subject.server("a").state is LeaseState.DRAINING
    assert bool(subject.table.draining[0])


def test_the_breaker_opens_pauses_tries_and_closes() -> None:
    subject = fleet()
    attachment = subject.attach(report(), 0.0, 0.0, nothing)
    pair = subject.server("a").pairs[ModelName("m"), Provider("sim")]
    for _ in range(2):
        subject.end(begin(subject), FAILURE, 0.0)
    assert pair.breaker.state is BreakerState.OPEN
    assert bool(subject.table.breaker_open[0])
    subject.update(attachment, report(), 1.0, 1.0)
    subject.tick(1.1)
    assert not bool(subject.table.breaker_open[0]), "the pause is over: one trial may go"
    trial = begin(subject, 1.1)
    assert bool(subject.table.breaker_open[0]), "only one"
    subject.end(trial, Outcome(OutcomeKind.SUCCESS, 0.1, 0.01), 1.2)
    assert pair.breaker.state is BreakerState.CLOSED
    assert not bool(subject.table.breaker_open[0])


def test_what_was_learned_survives_a_reconnect() -> None:
    subject = fleet()
    attachment = subject.attach(report(), 0.0, 0.0, nothing)
    subject.end(begin(subject), Outcome(OutcomeKind.SUCCESS, 0.25, 0.02), 0.5)
    subject.detach(attachment)
    subject.attach(report(), 1.0, 1.0, nothing)
    assert float(subject.table.ttft[0]) == 0.25
    assert float(subject.table.tpot[0]) == 0.02


def test_definitions_apply_and_change() -> None:
    definition = ModelDefinition(
        Provider("sim"), ModelName("m"), price=Price(completion=5.0), context_length=1000, initial_ttft=0.7
    )
    subject = fleet(definitions=[definition])
    subject.attach(report(), 0.0, 0.0, nothing)
    assert subject.server("a").cards[0].context_length == 1000
    assert subject.server("a").cards[0].price.completion == 5.0
    assert float(subject.table.ttft[0]) == 0.7
    assert subject.resolve("sim/m") == ("m", "sim")
    flight = begin(subject)
    subject.define(Definitions([ModelDefinition(Provider("x"), ModelName("elsewhere"))]), 1.0)
    assert subject.server("a").cards[0].context_length == 4096
    assert subject.resolve("elsewhere") == ("elsewhere", None)
    assert subject.model_names() == ("elsewhere", "m")
    assert free(subject) == [1]
    subject.end(flight, NEUTRAL, 1.0)
    assert free(subject) == [2]


def test_health_decides() -> None:
    subject = fleet()
    attachment = subject.attach(report(health=Health.STARTING), 0.0, 0.0, nothing)
    assert ready(subject) == [False]
    subject.update(attachment, report(), 0.5, 0.5)
    assert ready(subject) == [True]
    subject.update(attachment, report(health=Health.UNHEALTHY), 0.6, 0.6)
    assert ready(subject) == [False]


def test_listeners_hear_what_is_urgent() -> None:
    subject = fleet()
    heard: list[tuple[str, bool]] = []
    stop = subject.listen(lambda server_id, urgent: heard.append((server_id, urgent)))
    attachment = subject.attach(report(), 0.0, 0.0, nothing)
    assert ("a", True) in heard
    heard.clear()
    subject.update(attachment, report(foreign=1), 0.5, 0.5)
    assert {urgent for _, urgent in heard} == {False}
    subject.detach(attachment)
    assert heard[-1] == ("a", True)
    stop()
    heard.clear()
    subject.tick(10.0)
    assert heard == []
