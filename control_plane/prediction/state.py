"""What predictors hand over to their successors: plain values that any serializer takes. Times are ages in seconds, for
monotonic clocks begin anew with each process."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from control_plane.prediction.belief import SIZE, lower
from control_plane.prediction.features import Kin


@dataclass(frozen=True, slots=True)
class RatiosState:
    quantiles: tuple[tuple[float, ...], ...]
    """Of TTFT and TPOT, one for each level."""
    noise: tuple[float, ...]
    miss: tuple[float, ...]
    count: tuple[float, ...]

    def sound(self, levels: int) -> bool:
        """Whether it can be taken over."""
        shaped = [len(part) for part in (*self.quantiles, self.noise, self.miss, self.count)] == [
            levels,
            levels,
            2,
            2,
            2,
        ]
        return shaped and _finite(*self.quantiles, self.noise, self.miss, self.count) and min(self.count) >= 0


@dataclass(frozen=True, slots=True)
class RowState:
    key: tuple[str, str, str]
    kin: Kin
    mean: tuple[float, ...]
    covariance: tuple[float, ...]
    """The lower triangle, row by row."""
    prior: tuple[float, ...]
    prior_variance: tuple[float, ...]
    ratios: RatiosState
    uncertain: tuple[float, ...]
    observed: int
    evidence: float
    age: float
    """Seconds since the latest observation."""

    @property
    def sound(self) -> bool:
        """Whether it can be taken over: of the right shape, finite, and its covariance is one."""
        parts = self.mean, self.covariance, self.prior, self.prior_variance, self.uncertain
        shaped = [len(part) for part in parts] == [SIZE, SIZE * (SIZE + 1) // 2, SIZE, SIZE, 2]
        if not shaped or not _finite(*parts, (self.evidence, self.age)):
            return False
        if min(*self.prior_variance, *self.uncertain, self.evidence, self.age) < 0 or min(self.prior_variance) == 0:
            return False
        return bool(np.linalg.eigvalsh(lower(self.covariance))[0] > 0) and self.observed > 0


@dataclass(frozen=True, slots=True)
class GroupState:
    path: tuple[str, ...]
    gone: tuple[float, ...]
    """What rows have left behind that are no more, shape (3, coefficients), flat."""


@dataclass(frozen=True, slots=True)
class LatencyState:
    levels: tuple[float, ...]
    rows: tuple[RowState, ...]
    groups: tuple[GroupState, ...]
    ratios: RatiosState


@dataclass(frozen=True, slots=True)
class HistogramState:
    task: int
    """0: of all kinds of work."""
    model: str
    """Empty: of all models."""
    bins: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class TallyState:
    model: str
    task: int
    """0: of all kinds of work."""
    good: float
    bad: float
    age: float


def _finite(*parts: tuple[float, ...]) -> bool:
    return all(math.isfinite(value) for part in parts for value in part)
