from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from control_plane.domain.task import TaskType
from control_plane.predictors import rules
from control_plane.predictors.attempt import Attempt, from_lines, to_lines
from control_plane.predictors.rules import Rules
from tests.harness.attempts import attempt, history, question

attempts = st.builds(
    attempt,
    seconds=st.floats(0, 1e6),
    ok=st.booleans(),
    tokens=st.none() | st.integers(0, 10**6),
    task_type=st.sampled_from(TaskType),
    model=st.sampled_from(["llama", "mistral"]),
    server_id=st.sampled_from(["a", "b", "c"]),
    max_tokens=st.none() | st.integers(1, 4096),
)


@given(st.lists(attempts, max_size=50), attempts)
def test_whatever_was_seen_a_prediction_makes_sense(seen: list[Attempt], asked: Attempt) -> None:
    told = Rules(seen).predict(asked.question)
    assert 0 < told.seconds_p50 <= told.seconds_p90 < float("inf")
    assert 0 <= told.success <= 1
    assert told.completion_tokens >= 0
    if asked.question.max_tokens is not None:
        assert told.completion_tokens <= asked.question.max_tokens


def test_what_is_known_of_a_server_prevails_with_evidence_and_lends_to_its_kin() -> None:
    learned = Rules(attempt(8.0, server_id="slow") for _ in range(100))
    assert learned.predict(question(server_id="slow")).seconds_p50 == pytest.approx(8.0, rel=0.05)
    kin = learned.predict(question(server_id="new")).seconds_p50
    stranger = learned.predict(question(task_type=TaskType.VISION, model="other")).seconds_p50
    nobody = Rules().predict(question()).seconds_p50
    assert nobody < stranger < kin <= 8.0
    few = Rules([*(attempt(8.0, server_id="slow") for _ in range(100)), attempt(1.0, server_id="new")])
    assert 4.0 < few.predict(question(server_id="new")).seconds_p50 < kin, "one attempt does not say much"


def test_nine_of_ten_are_within_p90() -> None:
    seen = [one for one in history(2000, seconds=lambda asked: 3.0) if one.ok]
    told = Rules(seen[:1000])
    within = [one.seconds <= told.predict(one.question).seconds_p90 for one in seen[1000:]]
    assert 0.85 <= sum(within) / len(within) <= 0.96


def test_it_follows_a_change_and_forgets_what_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    learned = Rules(attempt(1.0) for _ in range(2000))
    for _ in range(1500):
        learned.observe(attempt(10.0))
    assert learned.predict(question()).seconds_p50 > 8.0
    monkeypatch.setattr(rules, "GROUPS", 20)
    for number in range(200):
        learned.observe(attempt(model=f"m-{number}"))
    assert len(learned._groups) <= 20


@given(st.lists(attempts, max_size=20))
def test_attempts_in_a_file_are_the_same_ones(some: list[Attempt]) -> None:
    there = list(from_lines(to_lines(some)))
    hours = [(one.question, one.at, one.seconds, one.ok, one.completion_tokens) for one in there]
    assert hours == [
        (replace(one.question, hour=there[0].question.hour), one.at, one.seconds, one.ok, one.completion_tokens)
        for one in some
    ]


@pytest.mark.parametrize("line", [b"{", b'{"at": 1}', b'{"at":1,"task_type":"x"}', b"[]", b"\xff"])
def test_a_line_that_makes_no_sense_is_named(line: bytes) -> None:
    good = next(iter(to_lines([attempt()])))
    with pytest.raises(ValueError, match="line 2: "):
        list(from_lines([good, line]))
