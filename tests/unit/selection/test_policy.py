"""Policy: refuses values out of range, naming the field."""

from __future__ import annotations

import math
from dataclasses import astuple

import pytest

from control_plane.domain.model import Provider
from control_plane.selection.policy import Policy, Weights


@pytest.mark.parametrize("bad", [-0.1, math.nan, math.inf])
def test_a_bad_weight_is_named(bad: float) -> None:
    with pytest.raises(ValueError, match=r"weights\.cost"):
        Weights(cost=bad)


def test_some_weight_must_count() -> None:
    with pytest.raises(ValueError, match="weights"):
        Weights(0, 0, 0, 0, 0, 0)


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("availability_threshold", 1.1),
        ("availability_threshold", math.nan),
        ("latency_reference_s", 0.0),
        ("cost_reference_usd", math.inf),
        ("ttft_prior_s", -1.0),
        ("tpot_prior_s", math.nan),
        ("load_time_prior_s", -1.0),
        ("expected_output_tokens", 0),
        ("provider_preference", {Provider("mlx"): -1.0}),
    ],
)
def test_a_bad_value_is_named(name: str, bad: object) -> None:
    with pytest.raises(ValueError, match=name):
        Policy(**{name: bad})  # type: ignore[arg-type]


def test_shares_sum_to_one_for_any_size_of_weights() -> None:
    for scale in (1e-300, 1.0, 1e300):
        policy = Policy(weights=Weights(scale, scale, scale, scale, scale, 0))
        assert sum(astuple(policy.shares)) == pytest.approx(1)
        assert policy.shares.capability == pytest.approx(0.2)


def test_equal_policies_are_equal() -> None:
    assert Policy() == Policy()
    assert Policy() != Policy(availability_threshold=0.9)
