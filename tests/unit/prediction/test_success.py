"""SuccessModel: pooled rates that forget."""

from __future__ import annotations

import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from control_plane.domain.task import TaskType
from control_plane.prediction.policy import SuccessPolicy
from control_plane.prediction.state import TallyState
from control_plane.prediction.success import SuccessModel

CODE, CHAT = TaskType.CODE_GENERATION, TaskType.CHAT


def test_begins_with_its_prior_and_learns_a_rate() -> None:
    model = SuccessModel(SuccessPolicy(initial=0.9))
    assert (model.expect("m", CODE, 0.0).rate, model.expect("m", CODE, 0.0).evidence) == (0.9, 0)
    for number in range(100):
        model.observe("m", CODE, number % 4 != 0, 0.0)
    told = model.expect("m", CODE, 0.0)
    assert told.rate == pytest.approx(0.75, abs=0.02)
    assert told.evidence == 100


def test_a_model_carries_over_to_other_work_and_not_to_other_models() -> None:
    model = SuccessModel()
    for _ in range(50):
        model.observe("bad", CODE, False, 0.0)
        model.observe("good", CODE, True, 0.0)
    assert model.expect("bad", CHAT, 0.0).rate < 0.2
    assert model.expect("good", CHAT, 0.0).rate > 0.8
    assert model.expect("new", CHAT, 0.0).rate == 1.0
    for _ in range(30):
        model.observe("bad", CHAT, True, 0.0)
    assert model.expect("bad", CHAT, 0.0).rate > 0.85
    assert model.expect("bad", CODE, 0.0).rate < 0.15


def test_feedback_counts_by_score_and_weight() -> None:
    model = SuccessModel()
    for _ in range(20):
        model.feedback("m", CODE, 0.4, 0.0, weight=5)
    assert model.expect("m", CODE, 0.0).rate == pytest.approx(0.4, abs=0.03)
    assert model.expect("m", CODE, 0.0).evidence == 100
    model.feedback("m", CODE, 1.0, 0.0, weight=1e300)
    assert model.expect("m", CODE, 0.0).evidence == 200


def test_forgets_with_time() -> None:
    model = SuccessModel(SuccessPolicy(half_life_s=100, initial=1.0))
    for _ in range(40):
        model.observe("m", CODE, False, 0.0)
    assert model.expect("m", CODE, 0.0).rate < 0.02
    assert model.expect("m", CODE, 100.0).evidence == 20
    assert model.expect("m", CODE, 2000.0).rate > 0.99
    for _ in range(10):
        model.observe("m", CODE, True, 400.0)
    assert model.expect("m", CODE, 400.0).rate > 0.75


def test_memory_is_bounded() -> None:
    model = SuccessModel(SuccessPolicy(kept=5))
    for number in range(50):
        model.observe(f"m{number}", CODE, True, 0.0)
    assert len(model.state(0.0)) == 5 + 5
    assert model.expect("m49", CODE, 0.0).evidence == 1
    assert model.expect("m0", CODE, 0.0).evidence == 0


def test_outlives_the_process_and_leaves_out_what_cannot_be() -> None:
    model = SuccessModel()
    for _ in range(9):
        model.observe("m", CODE, False, 50.0)
    wire = msgspec.json.encode(model.state(60.0))
    again = SuccessModel()
    again.restore(msgspec.json.decode(wire, type=tuple[TallyState, ...]), 5.0)
    assert again.expect("m", CODE, 5.0).rate == pytest.approx(model.expect("m", CODE, 60.0).rate)
    broken = SuccessModel()
    broken.restore(
        [TallyState("m", 1, math.nan, 1, 0), TallyState("m", 1, 1, -1, 0), TallyState("m", 1, 1, 1, math.inf),
         TallyState("m", 10**6, 1, 1, 0)], 0.0,
    )  # fmt: skip
    assert broken.expect("m", CHAT, 0.0).evidence == 0


@given(st.lists(st.tuples(st.floats(), st.floats(), st.floats(0, 1e6)), max_size=30))
def test_stays_a_rate_whatever_comes(steps: list[tuple[float, float, float]]) -> None:
    model, now = SuccessModel(), 0.0
    for score, weight, elapsed in steps:
        now += elapsed
        model.feedback("m", CODE, score, now, weight=weight)
    told = model.expect("m", CODE, now)
    assert 0 <= told.rate <= 1 + 1e-12
    assert 0 <= told.evidence < math.inf


@pytest.mark.parametrize(
    ("name", "bad"),
    [("initial", 1.5), ("kin_weight", 0.0), ("half_life_s", -1.0), ("most_weight", 0.0), ("kept", 0)],
)
def test_a_bad_value_is_named(name: str, bad: object) -> None:
    with pytest.raises(ValueError, match=name):
        SuccessPolicy(**{name: bad})  # type: ignore[arg-type]
