"""How the predictors learn: the numbers behind every formula of README.md."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LatencyPolicy:
    """Validated.

    Raises:
        ValueError: a value is out of its range; names the field.
    """

    levels: tuple[float, ...] = (0.5, 0.9)
    """Quantiles that are predicted, ascending, each in (0, 1); the first is that of the typical case."""
    drift_per_minute: float = 0.05
    """Standard deviation of ln(speed) by which a host may change in a minute, > 0. More forgets faster."""
    overdue_half_life_s: float = 30.0
    """Seconds in which the suspicion against a host that does not answer halves, > 0."""
    kept_groups: int = 4096
    """Groups of kin that are remembered, >= 16; the one that was used least recently is forgotten."""
    most_per_second: float = 50.0
    """Answers of one row that are learned from, > 0, once the row is known. Speeds do not change in milliseconds: more
    would cost more and tell nothing new."""

    def __post_init__(self) -> None:
        _check_levels(self.levels)
        _check_positive(self, "drift_per_minute", "overdue_half_life_s", "most_per_second")
        if self.kept_groups < 16:
            raise ValueError(f"kept_groups must be >= 16, is {self.kept_groups}")


@dataclass(frozen=True, slots=True)
class LengthPolicy:
    """Validated.

    Raises:
        ValueError: a value is out of its range; names the field.
    """

    levels: tuple[float, ...] = (0.5, 0.9)
    """Quantiles that are predicted, ascending, each in (0, 1)."""
    expected_tokens: int = 256
    """Median length of an answer before any was seen, >= 1."""
    kin_weight: float = 10.0
    """Observations for which the histogram above counts, > 0."""
    window: float = 500.0
    """Observations after which an old one counts 1/e, > 1."""
    kept: int = 4096
    """Pairs of a kind of work and a model that are remembered, >= 1."""

    def __post_init__(self) -> None:
        _check_levels(self.levels)
        _check_positive(self, "kin_weight")
        if self.expected_tokens < 1:
            raise ValueError(f"expected_tokens must be >= 1, is {self.expected_tokens}")
        if not 1 < self.window < math.inf:
            raise ValueError(f"window must be finite and > 1, is {self.window}")
        if self.kept < 1:
            raise ValueError(f"kept must be >= 1, is {self.kept}")


@dataclass(frozen=True, slots=True)
class SuccessPolicy:
    """Validated.

    Raises:
        ValueError: a value is out of its range; names the field.
    """

    initial: float = 1.0
    """Probability that an answer is a good one before any was seen, [0, 1]."""
    kin_weight: float = 5.0
    """Observations for which the rate above counts, > 0."""
    half_life_s: float = 86400.0
    """Seconds in which an observation comes to count half, > 0."""
    most_weight: float = 100.0
    """Observations for which one judgement can count at most, > 0."""
    kept: int = 4096
    """Models, and pairs of a model and a kind of work, that are remembered, >= 1."""

    def __post_init__(self) -> None:
        if not 0 <= self.initial <= 1:
            raise ValueError(f"initial must be in [0, 1], is {self.initial}")
        _check_positive(self, "kin_weight", "half_life_s", "most_weight")
        if self.kept < 1:
            raise ValueError(f"kept must be >= 1, is {self.kept}")


def _check_levels(levels: tuple[float, ...]) -> None:
    if not levels or any(not 0 < level < 1 for level in levels) or list(levels) != sorted(set(levels)):
        raise ValueError(f"levels must be ascending and within (0, 1), are {levels}")


def _check_positive(policy: object, *names: str) -> None:
    for name in names:
        value = getattr(policy, name)
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be finite and > 0, is {value}")
