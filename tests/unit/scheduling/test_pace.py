"""TokenBucket: a burst at once, then a steady rate."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from control_plane.scheduling.pace import TokenBucket


def test_a_burst_then_a_steady_rate() -> None:
    bucket = TokenBucket(burst=3, interval=0.5)
    assert [bucket.take(100.0) for _ in range(4)] == [0.0, 0.0, 0.5, 1.0]
    assert [bucket.take(101.5) for _ in range(2)] == [0.0, 0.5]
    # A pause gives the burst back, and no more than that.
    assert [bucket.take(1000.0) for _ in range(3)] == [0.0, 0.0, 0.5]


@given(st.integers(1, 20), st.floats(0.01, 10), st.lists(st.floats(0, 5), max_size=50))
def test_never_more_than_burst_and_rate(burst: int, interval: float, pauses: list[float]) -> None:
    bucket, now, times = TokenBucket(burst, interval), 0.0, []
    for pause in pauses:
        times.append(now)
        now += max(pause, bucket.take(now))
    for first in range(len(times)):
        for last in range(first, len(times)):
            assert last - first + 1 <= burst + (times[last] - times[first]) / interval + 1e-6


@pytest.mark.parametrize(("burst", "interval", "name"), [(0, 1.0, "burst"), (1, 0.0, "interval")])
def test_a_bad_value_is_named(burst: int, interval: float, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        TokenBucket(burst, interval)
