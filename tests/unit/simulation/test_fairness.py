"""A tenant that floods the control plane, and what is left for the others."""

from __future__ import annotations

import pytest

from tests.benchmarks.fairness import FLEETS, case


@pytest.mark.parametrize("rate", [0.09, 0.3])
def test_a_tenant_that_asks_for_a_hundred_times_as_much_leaves_the_others_their_share(rate: float) -> None:
    found = case("alike", FLEETS["alike"], rate, 60.0)
    assert (found.asked < 0.6) is (rate == 0.09)  # the one asks for less than its share, the other for all of it
    assert found.least >= 0.8
    if found.asked < 0.6:
        assert found.complete == 1.0
