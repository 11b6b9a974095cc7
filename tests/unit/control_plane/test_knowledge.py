"""What predictors know outlives the process."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from control_plane.domain.request import RouteRequest
from control_plane.fleet.registry import Fleet
from control_plane.fleet.server import Outcome, OutcomeKind
from tests.unit.control_plane.builders import fleet, report

REQUEST = RouteRequest("r", prompt_tokens=1000, tenant="t")


def taught() -> Fleet:
    subject = fleet()
    subject.attach(report(slots=8), 0.0, 0.0, lambda: None)
    for number in range(20):
        now = 10.0 * number
        flight = subject.begin(0, now, REQUEST)
        subject.first_token(flight, now + 3.0)
        flight.charge.count(1000, 0, 40)
        subject.end(flight, Outcome(OutcomeKind.SUCCESS, 3.0, 0.02), now + 4.0)
    assert subject.judge("t", "r", 0.0, 200.0)
    return subject


def ttft(subject: Fleet) -> float:
    return float(subject.table.ttft[0] + 1000 * subject.table.per_prompt_token[0])


def decoding(subject: Fleet, now: float) -> float:
    expected = subject.begin(0, now, REQUEST).expected
    return expected.end_at - expected.first_at


def test_the_next_process_knows_what_this_one_has_learned() -> None:
    before = taught()
    kept = before.knowledge(200.0)
    assert before.knowledge(200.0).keys() == kept.keys(), "until it is kept"
    before.knowledge_kept()
    assert before.knowledge(200.0) == {}, "only what is new"
    after = fleet()
    after.know(kept, 5.0)
    after.attach(report(slots=8), 5.0, 0.0, lambda: None)
    assert abs(ttft(after) - ttft(before)) < 0.1 and abs(ttft(after) - 3.0) < 0.5
    assert decoding(after, 6.0) == pytest.approx(decoding(before, 210.0)), "the length of answers, too"
    good = {float(column[0]) for column in after.table.good.values()}
    assert good and all(0.5 < share < 1.0 for share in good), "and who has complained"


def test_what_somebody_says_is_handed_out_though_nothing_was_measured_since() -> None:
    subject = taught()
    subject.knowledge(200.0)
    subject.knowledge_kept()
    flight = subject.begin(0, 210.0, replace(REQUEST, request_id="s"))
    subject.end(flight, Outcome(OutcomeKind.SUCCESS), 211.0)
    subject.knowledge(211.0)
    subject.knowledge_kept()
    assert subject.judge("t", "s", 0.0, 212.0)
    assert "success" in subject.knowledge(212.0)


def test_what_cannot_be_read_is_left_out() -> None:
    subject = fleet()
    subject.know({"latency": "{", "latency/a/b/c": "[]", "lengths": "1", "success": '{"a": 1}', "else": ""}, 0.0)
    subject.attach(report(slots=8), 0.0, 0.0, lambda: None)
    assert len(subject.table) == 1


def test_a_model_of_another_make_begins_anew() -> None:
    kept = taught().knowledge(200.0)
    after = fleet()
    after.know(kept, 5.0)
    other = report(slots=8)
    other = replace(other, models=tuple(replace(card, fingerprint="another") for card in other.models))
    after.attach(other, 5.0, 0.0, lambda: None)
    assert after.table.sigmas[0, 0] > 0.3
