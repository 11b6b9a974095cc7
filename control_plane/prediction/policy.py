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
    drift_per_minute: float = 0.1
    """Standard deviation of ln(speed) by which a host may change in a minute, > 0. More forgets faster."""
    overdue_half_life_s: float = 30.0
    """Seconds in which the suspicion against a host that does not answer halves, > 0."""
    kept_groups: int = 4096
    """Groups of kin that are remembered, >= 16; the one that was used least recently is forgotten."""

    def __post_init__(self) -> None:
        if (
            not self.levels
            or any(not 0 < level < 1 for level in self.levels)
            or list(self.levels) != sorted(set(self.levels))
        ):
            raise ValueError(f"levels must be ascending and within (0, 1), are {self.levels}")
        for name in ("drift_per_minute", "overdue_half_life_s"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be finite and > 0, is {getattr(self, name)}")
        if self.kept_groups < 16:
            raise ValueError(f"kept_groups must be >= 16, is {self.kept_groups}")
