from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from control_plane.domain.definition import Definitions, ModelDefinition
from control_plane.domain.errors import DomainError
from control_plane.domain.model import ModelName, ModelState, Price, Provider
from control_plane.domain.request import RouteRequest
from control_plane.domain.server import BreakerState, Health, LeaseState
from control_plane.fleet.registry import Fleet, InitialStats
from control_plane.fleet.server import Flight, Outcome, OutcomeKind, Pair
from control_plane.selection.table import CandidateTable
from tests.unit.control_plane.builders import POLICY, card, fleet, report

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
    stats = served(subject).stats
    assert (stats.ttft, stats.tpot) == (0.25, 0.02)


def columns(table: CandidateTable) -> dict[str, list[object]]:
    names = [name for name in CandidateTable.__slots__ if isinstance(getattr(table, name), np.ndarray)]
    return {name: np.nan_to_num(getattr(table, name), nan=-1.0).tolist() for name in names}


def test_a_request_may_end_on_a_model_that_has_gone_and_come_back() -> None:
    subject, models = fleet(), (card(), card("n"))
    attachment = subject.attach(report(models=models), 0.0, 0.0, nothing)
    flight = subject.begin(1, 0.0)
    subject.update(attachment, report(models=models[:1]), 0.5, 0.5)
    subject.end(flight, FAILURE, 0.6)
    subject.update(attachment, report(models=models), 0.7, 0.7)
    assert free(subject) == [2, 2]
    assert subject.table.success[1] < 1.0


def test_a_table_that_takes_over_what_is_known_is_as_one_made_anew() -> None:
    subject = fleet()
    models = (card(), card("n"))
    first = subject.attach(report(models=models), 0.0, 0.0, nothing)
    subject.attach(report("b"), 0.0, 0.0, nothing)
    for row, outcome in ((0, Outcome(OutcomeKind.SUCCESS, 0.25, 0.02)), (2, FAILURE), (2, FAILURE)):
        subject.end(subject.begin(row, 0.0, RouteRequest("r", prompt_tokens=100)), outcome, 0.5)
    subject.begin(1, 0.5, RouteRequest("r", prompt_tokens=100))
    subject.attach(report("aa", models=(card("n"),)), 0.5, 0.5, nothing)
    subject.detach(first)
    subject.attach(report(models=models[:1], instance="2"), 0.5, 0.5, nothing)
    after = columns(subject.table)
    assert after["breaker_open"] == [False, False, True] and after["ttft"][0] != after["ttft"][2]
    subject._table = CandidateTable([])  # nothing to take over
    subject._rebuild(0.5)
    assert columns(subject.table) == after
    assert subject.table.predicted and not subject.table.measured


def learned(subject: Fleet) -> tuple[int, int, float | None, BreakerState]:
    pair = subject.server("a").pairs[ModelName("m"), Provider("sim")]
    return pair.stats.requests, pair.stats.failures, pair.stats.ttft, pair.breaker.state


ANEW = (0, 0, None, BreakerState.CLOSED)


def taught(fingerprint: str) -> Fleet:
    """A fleet that has learned something of a model and opened its breaker."""
    subject = fleet()
    subject.attach(report(models=(card(fingerprint=fingerprint),)), 0.0, 0.0, nothing)
    subject.end(begin(subject), Outcome(OutcomeKind.SUCCESS, 0.25, 0.02), 0.5)
    for _ in range(2):
        subject.end(begin(subject), FAILURE, 0.5)
    assert learned(subject) == (3, 2, 0.25, BreakerState.OPEN)
    return subject


@pytest.mark.parametrize("way", ["a report", "a reconnect", "a restart"])
@pytest.mark.parametrize(
    ("fingerprints", "kept"),
    [
        (["x", "x"], True),
        (["x", "y"], False),
        (["x", ""], True),
        (["", "x"], True),
        (["", ""], True),
        (["x", "", "x"], True),
        (["x", "", "y"], False),
        (["x", "y", "x"], False),
    ],
)
def test_what_was_learned_lasts_as_long_as_the_fingerprint(way: str, fingerprints: list[str], kept: bool) -> None:
    subject = taught(fingerprints[0])
    attachment = subject.server("a").attachment
    assert attachment
    for number, fingerprint in enumerate(fingerprints[1:]):
        models = (card(fingerprint=fingerprint),)
        if way == "a report":
            subject.update(attachment, report(models=models), 0.6, 0.6)
        else:
            subject.detach(attachment)
            instance = str(number) if way == "a restart" else "1"
            attachment = subject.attach(report(models=models, instance=instance), 0.6, 0.6, nothing)
    assert (learned(subject) == ANEW) is not kept
    assert bool(subject.table.breaker_open[0]) is kept
    if not kept:
        assert float(subject.table.success[0]) == 1.0
        assert subject._troubled == set()


def test_another_model_keeps_what_was_learned_of_it() -> None:
    subject = fleet()
    attachment = subject.attach(report(models=(card("m", fingerprint="x"), card("n", fingerprint="x"))), 0, 0, nothing)
    subject.end(subject.begin(1, 0.0), FAILURE, 0.5)
    subject.update(attachment, report(models=(card("m", fingerprint="y"), card("n", fingerprint="x"))), 0.6, 0.6)
    assert subject.server("a").pairs[ModelName("n"), Provider("sim")].stats.failures == 1


def test_a_request_from_before_teaches_nothing_of_the_new_one() -> None:
    subject = fleet()
    attachment = subject.attach(report(models=(card(fingerprint="x"),)), 0.0, 0.0, nothing)
    flights = [begin(subject), begin(subject)]
    subject.update(attachment, report(models=(card(fingerprint="y"),)), 0.5, 0.5)
    for flight in flights:
        subject.end(flight, FAILURE, 0.6)
    assert learned(subject) == ANEW
    assert free(subject) == [2]


def test_the_service_time_is_learned_and_loading_is_not() -> None:
    subject = fleet()
    attachment = subject.attach(report(models=(card(state=ModelState.COLD),)), 0.0, 0.0, nothing)
    subject.end(begin(subject, 1.0), Outcome(OutcomeKind.SUCCESS, 11.0, 0.02), 13.0)
    stats = subject.server("a").pairs[ModelName("m"), Provider("sim")].stats
    assert (stats.requests, stats.ttft, stats.tpot, stats.service) == (1, None, 0.02, None)
    subject.update(attachment, report(), 14.0, 14.0)
    subject.end(begin(subject, 14.0), Outcome(OutcomeKind.SUCCESS, 0.5, 0.02), 16.5)
    assert float(subject.table.service[0]) == 2.5
    assert served(subject).stats.ttft == 0.5


def test_states_reach_the_table() -> None:
    subject = fleet()
    attachment = subject.attach(report(models=(card(state=ModelState.PULLING),)), 0.0, 0.0, nothing)
    assert subject.table.here is not None and not subject.table.here[0]
    subject.update(attachment, report(models=(card(state=ModelState.COLD, load_time=3.0),)), 0.5, 0.5)
    assert subject.table.here is None and subject.table.cold is not None
    assert float(subject.table.load_time[0]) == 3.0
    subject.update(attachment, report(), 0.6, 0.6)
    assert subject.table.cold is None


def test_definitions_apply_and_change() -> None:
    definition = ModelDefinition(
        Provider("sim"), ModelName("m"), price=Price(completion=5.0), context_length=1000, initial_ttft=0.7
    )
    subject = fleet(definitions=[definition])
    subject.attach(report(), 0.0, 0.0, nothing)
    assert subject.server("a").cards[0].context_length == 1000
    assert subject.server("a").cards[0].price.completion == 5.0
    assert served(subject).stats.ttft == 0.7
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


# ------------------------------------------------- what outlives a process ---


def served(house: Fleet, server_id: str = "a", model: str = "m") -> Pair:
    return house.server(server_id).pairs[ModelName(model), Provider("sim")]


def used(house: Fleet, now: float, *outcomes: Outcome) -> None:
    for outcome in outcomes:
        house.end(house.begin(0, now), outcome, now)


def attach(house: Fleet, now: float, fingerprint: str = "f") -> None:
    house.attach(report(models=(card(fingerprint=fingerprint),)), now, 0.0, lambda: None)


def test_what_was_learned_comes_back_under_the_same_fingerprint() -> None:
    first = fleet()
    attach(first, 1.0)
    assert first.learned(1.0, 1000.0) == [], "nothing was measured"
    used(first, 2.0, Outcome(OutcomeKind.SUCCESS, ttft=0.5, tpot=0.1), Outcome(OutcomeKind.FAILURE))
    kept = first.learned(2.0, 1000.0)
    before = served(first).stats

    same, other = fleet(), fleet()
    for house in (same, other):
        house.remember(kept, 50.0, 1000.0)
    attach(same, 50.0)
    attach(other, 50.0, fingerprint="another")
    after = served(same).stats
    assert (after.ttft, after.tpot, after.requests, after.failures) == (0.5, 0.1, 2, 1)
    assert after.success_at(50.0) == pytest.approx(before.success_at(2.0))
    assert served(other).stats.requests == 0
    assert other.server("a").pairs[ModelName("m"), Provider("sim")].stats.ttft is None


def test_a_bad_record_fades_while_the_control_plane_is_away() -> None:
    first = fleet()
    attach(first, 1.0)
    used(first, 2.0, Outcome(OutcomeKind.FAILURE))
    kept = first.learned(2.0, 1000.0)
    later = fleet()
    later.remember(kept, 10.0, 1000.0 + 60.0)  # the half-life of a record
    attach(later, 10.0)
    assert served(later).stats.success_at(10.0) == pytest.approx(1 - (1 - kept[0].success) / 2)


def test_what_was_measured_here_is_not_overwritten_by_memories() -> None:
    first = fleet()
    attach(first, 1.0)
    used(first, 2.0, Outcome(OutcomeKind.SUCCESS, ttft=0.5))
    kept = first.learned(2.0, 0.0)
    house = fleet()
    attach(house, 1.0)
    used(house, 1.0, Outcome(OutcomeKind.SUCCESS, ttft=9.0))
    house.remember(kept, 2.0, 0.0)
    house.attach(report(instance="2", models=(card(fingerprint="f"),)), 3.0, 0.0, lambda: None)
    assert served(house).stats.ttft == 9.0


def test_initial_statistics_by_name_by_provider_and_by_definition() -> None:
    initial = {"m": InitialStats(success=0.5, ttft=1.0), "sim/n": InitialStats(tpot=0.2), "n": InitialStats(tpot=9.0)}
    definition = ModelDefinition(Provider("sim"), ModelName("m"), initial_ttft=2.0)
    house = Fleet(replace(POLICY, initial=initial), Definitions([definition]), 0.0)
    house.attach(report(models=(card("m"), card("n"), card("o"))), 1.0, 0.0, lambda: None)
    stats = served(house, model="m").stats
    assert (stats.success, stats.ttft, stats.tpot) == (0.5, 2.0, None)
    assert served(house, model="n").stats.tpot == 0.2
    assert served(house, model="o").stats.success == 1.0


BROKEN_OFF = Outcome(OutcomeKind.FAILURE, broken_off=True)


def held(subject: Fleet) -> bool:
    """Whether an answer that begins now would be held back."""
    flight = begin(subject)
    subject.end(flight, Outcome(OutcomeKind.NEUTRAL), 0.0)
    return flight.held


def test_what_breaks_off_an_answer_is_held_back_until_it_has_given_a_whole_one() -> None:
    subject = fleet()
    subject.attach(report(slots=8), 0.0, 0.0, nothing)
    subject.end(begin(subject), FAILURE, 0.0)
    assert not held(subject), "it never began"
    subject.end(begin(subject), Outcome(OutcomeKind.SUCCESS), 0.0)
    older = begin(subject)
    subject.end(begin(subject), BROKEN_OFF, 0.0)
    assert held(subject) and not older.held and not subject.sound(0)
    subject.end(older, Outcome(OutcomeKind.SUCCESS), 0.0)
    assert held(subject), "that one began before"
    subject.end(begin(subject), Outcome(OutcomeKind.SUCCESS), 0.0)
    assert not held(subject) and subject.sound(0)


def test_a_new_process_is_not_held_back_for_what_the_old_one_broke_off() -> None:
    subject = fleet()
    subject.attach(report(), 0.0, 0.0, nothing)
    subject.end(begin(subject), BROKEN_OFF, 0.0)
    subject.attach(report(), 1.0, 1.0, nothing)
    assert held(subject), "it has only connected anew"
    subject.attach(report(instance="2"), 2.0, 2.0, nothing)
    assert not held(subject)
