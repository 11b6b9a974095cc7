"""When a slot may be held for a request that is still to come."""

from __future__ import annotations

import pytest

from control_plane.scheduling.ahead import spares


@pytest.mark.parametrize(
    ("slots", "free", "ahead", "spared"),
    [
        (4, 4, 0, True),
        (4, 3, 0, True),
        (4, 2, 0, False),  # one of four would be left
        (4, 4, 1, False),  # a quarter is held already
        (8, 7, 1, True),
        (8, 6, 2, False),
        (8, 5, 0, True),
        (8, 4, 0, False),
        (3, 3, 0, False),
        (1, 1, 0, False),
        (0, 0, 0, False),
        (4, -1, 0, False),
    ],
)
def test_half_stays_free_and_a_quarter_is_the_most(slots: int, free: int, ahead: int, spared: bool) -> None:
    assert spares(slots, free, ahead) is spared


def test_who_has_one_leaves_an_eighth_to_others() -> None:
    assert spares(8, 8, 0, more=True) and not spares(8, 7, 1, more=True)
    assert spares(16, 15, 1, more=True) and not spares(16, 14, 2, more=True)
    assert not spares(4, 4, 0, more=True)
