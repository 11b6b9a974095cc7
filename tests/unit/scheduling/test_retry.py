"""RetryPolicy: bounded, growing, jittered; and the sorting of reasons."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from control_plane.scheduling.retry import RetryPolicy, blames_server, repeatable, retryable

POLICY = RetryPolicy(base=0.1, factor=2.0, cap=1.0)


def test_grows_to_the_cap() -> None:
    assert [POLICY.delay(attempt, 1.0) for attempt in (1, 2, 3, 4, 5, 6)] == [0.1, 0.2, 0.4, 0.8, 1.0, 1.0]
    assert POLICY.delay(2, 0.0) == 0.0


@given(st.integers(1, 10**9), st.floats(0, 1), st.floats(1, 1e300))
def test_stays_within_its_bounds(attempt: int, jitter: float, factor: float) -> None:
    assert 0 <= RetryPolicy(base=0.1, factor=factor, cap=1.0).delay(min(attempt, 1000), jitter) <= 1.0


@pytest.mark.parametrize(("name", "bad"), [("max_attempts", 0), ("base", -1.0), ("factor", 0.5), ("cap", -1.0)])
def test_a_bad_value_is_named(name: str, bad: float) -> None:
    with pytest.raises(ValueError, match=name):
        RetryPolicy(**{name: bad})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("reason", "elsewhere", "same", "blame"),
    [
        ("ENGINE_FAILED", True, True, True),
        ("STREAM_BROKEN", True, True, True),
        ("SERVERS_AWAY", True, True, True),
        ("INTERNAL", True, True, True),
        ("SERVER_BUSY", True, True, False),
        ("DRAINING", True, False, False),
        ("UNKNOWN_MODEL", True, False, False),
        ("UNSUPPORTED", True, False, False),
        ("INVALID_REQUEST", False, False, False),
        ("SLOW_READER", False, False, False),
        ("DEADLINE_EXCEEDED", False, False, False),
    ],
)
def test_reasons(reason: str, elsewhere: bool, same: bool, blame: bool) -> None:
    assert (retryable(reason), repeatable(reason), blames_server(reason)) == (elsewhere, same, blame)
