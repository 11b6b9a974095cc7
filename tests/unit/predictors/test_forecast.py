from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from control_plane.domain.task import TaskType
from control_plane.predictors import forecast as module
from control_plane.predictors.forecast import HOUR, MINUTE, WEEK, Forecast, Series, quantile

BEGIN = 1_700_000_000.0 // WEEK * WEEK
KEY = (TaskType.CHAT, "llama")


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0, 3 * 86400), st.integers(0, 1000)), max_size=15), st.floats(0, 2 * WEEK))
def test_what_is_expected_is_finite_and_of_one_piece(steps: list[tuple[float, int]], ahead: float) -> None:
    series, now = Series(BEGIN, 10.0), BEGIN
    for pause, count in steps:
        now += pause
        series.add(now, count)
    whole = series.expect(now, ahead)
    assert 0 <= whole.mean < float("inf") and 0 <= whole.p90 < float("inf")
    assert whole.mean == pytest.approx(
        series.expect(now, ahead / 2).mean + _between(series, now, ahead / 2, ahead), rel=1e-6, abs=1e-6
    )
    assert Series.load(series.dump(), 10.0).expect(now, ahead).mean == pytest.approx(whole.mean, rel=0.01, abs=0.01)


def _between(series: Series, now: float, begin: float, end: float) -> float:
    return series.expect(now, end).mean - series.expect(now, begin).mean


def test_a_steady_stream_is_expected_to_go_on() -> None:
    rng, series = random.Random(1), Series(BEGIN, 10.0)
    for minute in range(2 * 1440):
        series.add(BEGIN + minute * MINUTE, rng.choice((4, 5, 6)))
    told = series.expect(BEGIN + 2 * 1440 * MINUTE, 600.0)
    assert told.mean == pytest.approx(50, rel=0.1) and told.per_minute == pytest.approx(5, rel=0.1)
    assert told.mean < told.p90 < 75


def test_it_falls_silent_and_comes_back() -> None:
    series = Series(BEGIN, 10.0)
    for minute in range(600):
        series.add(BEGIN + minute * MINUTE, 10)
    end = BEGIN + 600 * MINUTE
    busy, quiet = series.expect(end, 60.0).mean, series.expect(end + 3 * HOUR, 60.0).mean
    assert busy == pytest.approx(10, rel=0.15) and quiet < busy / 2
    series.add(end + 3 * HOUR, 20)
    assert series.expect(end + 3 * HOUR, 60.0).mean > 1.5 * quiet, "what comes just now counts at once"


def test_the_hours_of_the_week_are_learned() -> None:
    """Three weeks with requests from nine to ten on workdays only: at 8:50 of the fourth they are expected."""
    rng, series = random.Random(2), Series(BEGIN, 10.0)
    for day in range(21):
        for minute in range(1440):
            busy = minute // 60 == 9 and day % 7 < 5
            series.add(BEGIN + day * 86400 + minute * MINUTE, rng.choice((1, 2, 3)) if busy else 0)
    before = BEGIN + 21 * 86400 + 8.8 * HOUR
    assert series.expect(before, 600.0).mean < 2.0, "not before nine"
    soon = series.expect(before, 1.2 * HOUR).mean
    assert 70 < soon < 160, "about 120 come"
    weekend = BEGIN + 26 * 86400 + 8.8 * HOUR
    assert series.expect(weekend, 1.2 * HOUR).mean < soon / 4


def test_a_long_silence_costs_no_time_and_a_clock_that_jumps_back_no_sense() -> None:
    series = Series(0.0, 10.0)
    series.add(0.0)
    series.add(1_700_000_000.0)
    assert series.expect(1_700_000_000.0, 60.0).mean < 1.0
    series.add(1_600_000_000.0)
    assert series.dump().minute == 1_700_000_000 // 60 and series.dump().count == 2


@given(st.floats(0.001, 5000), st.floats(0.01, 1e6))
def test_quantiles_are_in_order_and_bounded(mean: float, shape: float) -> None:
    low, high = quantile(0.5, mean, shape), quantile(0.9, mean, shape)
    deviation = (mean + mean * mean / shape) ** 0.5
    assert 0 <= low <= high <= mean + 20 * deviation + 21


@pytest.mark.parametrize(("mean", "p90"), [(0.0, 0), (0.1, 0), (1.0, 2), (10.0, 14), (100.0, 113)])
def test_with_a_known_rate_it_is_poissons(mean: float, p90: float) -> None:
    assert quantile(0.9, mean, 1e9) == p90  # from tables


def test_memory_is_bounded_and_the_least_wanted_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SERIES", 10)
    forecast = Forecast(600.0)
    forecast.add(KEY, BEGIN, 1000)
    for number in range(50):
        forecast.add((TaskType.CHAT, f"m-{number}"), BEGIN + number)
    assert len(forecast.known()) == 10 and KEY in forecast.known()


def test_what_is_kept_is_taken_over_and_nonsense_left_out() -> None:
    forecast, later = Forecast(600.0), Forecast(600.0)
    for minute in range(60):
        forecast.add(KEY, BEGIN + minute * MINUTE, 3)
        forecast.add((TaskType.VISION, "llama"), BEGIN + minute * MINUTE)
    kept = forecast.changed()
    assert [key for key, _ in kept] == sorted(forecast.known()) and forecast.changed() == []
    forecast.unkept(kept)
    assert forecast.changed() == kept
    broken = forecast._series[KEY].dump()
    broken.seen = [float("nan")] * 3
    later.load([*kept, ((TaskType.CHAT, "broken"), broken)])
    now = BEGIN + HOUR
    assert later.known() == forecast.known()
    assert later.model("llama", now, 600.0) == pytest.approx(forecast.model("llama", now, 600.0), rel=0.01)
    assert later.model("llama", now, 600.0) == pytest.approx(40, rel=0.1)
    assert later.expect((TaskType.CHAT, "unheard of"), now, 600.0).p90 == 0
