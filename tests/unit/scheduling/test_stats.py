"""RuntimeStats: moving averages that forgive with time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from control_plane.scheduling.stats import RuntimeStats, StatsPolicy

POLICY = StatsPolicy(alpha=0.5, recovery_half_life=10.0)


@pytest.mark.parametrize(
    ("name", "bad"), [("alpha", 0.0), ("alpha", 1.1), ("recovery_half_life", 0.0), ("initial_success", -0.1)]
)
def test_a_bad_value_is_named(name: str, bad: float) -> None:
    with pytest.raises(ValueError, match=name):
        StatsPolicy(**{name: bad})


def test_begins_with_what_it_is_given() -> None:
    assert RuntimeStats.initial(POLICY).success_at(123.0) == 1.0
    stats = RuntimeStats.initial(POLICY, success=0.7, ttft=0.5)
    assert (stats.success_at(1e9), stats.ttft, stats.tpot, stats.requests) == (0.7, 0.5, None, 0)


def test_averages_move_by_alpha() -> None:
    stats = RuntimeStats.initial(POLICY).observe_success(1.0, None, now=5.0)
    assert (stats.ttft, stats.tpot) == (1.0, None)
    stats = stats.observe_success(2.0, 0.1, now=5.0).observe_success(None, None, now=5.0)
    assert (stats.ttft, stats.tpot, stats.requests, stats.failures) == (1.5, 0.1, 3, 0)
    stats = stats.observe_failure(now=5.0)
    assert (stats.success, stats.requests, stats.failures) == (0.5, 4, 1)
    assert stats.observe_failure(now=5.0).success == 0.25


def test_the_service_time_moves_where_it_was_measured() -> None:
    stats = RuntimeStats.initial(POLICY).observe_success(1.0, None, now=5.0)
    assert stats.service is None
    stats = stats.observe_success(1.0, None, now=5.0, service=4.0).observe_success(1.0, None, now=5.0, service=2.0)
    assert stats.service == 3.0
    assert stats.observe_success(1.0, None, now=6.0).observe_failure(now=7.0).service == 3.0


def test_recovers_half_way_each_half_life() -> None:
    stats = RuntimeStats.initial(POLICY).observe_failure(now=100.0)
    assert stats.success_at(100.0) == 0.5
    assert stats.success_at(110.0) == pytest.approx(0.75)
    assert stats.success_at(120.0) == pytest.approx(0.875)
    assert stats.observe_failure(now=110.0).success == pytest.approx(0.375)


@given(
    st.lists(st.tuples(st.booleans(), st.floats(0, 1e6)), max_size=30),
    st.floats(0.01, 1.0),
    st.floats(0, 1),
)
def test_stays_a_rate_and_always_recovers(outcomes: list[tuple[bool, float]], alpha: float, prior: float) -> None:
    stats, now = RuntimeStats.initial(StatsPolicy(alpha=alpha), success=prior), 0.0
    for succeeded, elapsed in outcomes:
        now += elapsed
        stats = stats.observe_success(0.1, 0.01, now) if succeeded else stats.observe_failure(now)
        assert 0 <= stats.success <= 1
    assert stats.success_at(now) == pytest.approx(stats.success)
    assert stats.success_at(now + 60 * 40) == pytest.approx(prior)
    assert stats.requests == len(outcomes)
