"""The belief about one row: a Kalman filter of the logarithms of its coefficients.

ln TTFT = ln(sum_i exp(theta_i) x_i) + noise, the same for TPOT; theta is Gaussian. The derivative by theta_i is the
share of term i in the sum, so every gain is free of units, every coefficient positive, and a host that is a hundred
times slower is learned in the same number of steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Vector: TypeAlias = NDArray[np.float64]
Matrix: TypeAlias = NDArray[np.float64]

TTFT, TPOT = 0, 1
TERMS = (slice(0, 4), slice(4, 6))
"""Of TTFT: base, prompt, backlog, waiting. Of TPOT: base, streams."""
SIZE = 6

# ln seconds: of each coefficient before anything is known, and what it may be.
CENTRE: Vector = np.log([0.2, 1e-3, 1e-3, 0.3, 0.04, 0.004])
LEAST: Vector = np.log([1e-4, 1e-8, 1e-8, 1e-5, 1e-5, 1e-7])
MOST: Vector = np.log([1e3, 1e1, 1e1, 1e3, 1e2, 1e1])

# What a faster host is faster in: in everything somewhat, in its own prompt and that of others alike.
ALIKE: Matrix = np.full((SIZE, SIZE), 0.5)
ALIKE[1, 2] = ALIKE[2, 1] = 0.9
np.fill_diagonal(ALIKE, 1.0)

# A drift moves all terms of TTFT, or of TPOT, together, and each of them a little.
_BLOCKS: Matrix = np.zeros((SIZE, SIZE))
for _terms in TERMS:
    _BLOCKS[_terms, _terms] = 1.0
DRIFT: Matrix = _BLOCKS + 0.04 * np.eye(SIZE)
_JUMPS: tuple[Matrix, ...] = tuple(
    np.outer(*2 * (np.isin(np.arange(SIZE), np.arange(SIZE)[terms]).astype(float),)) for terms in TERMS
)

CLIP = 2.5
"""Standard deviations of surprise beyond which an observation counts no more than at it (Huber)."""
SLACK, ALARM = 1.0, 5.0
"""Of the CUSUM of surprise in standard deviations: what is ordinary, and what is a change."""
MOST_VARIANCE = 4.0


@dataclass(slots=True)
class Belief:
    """theta ~ N(mean, covariance), shapes (6,) and (6, 6)."""

    mean: Vector
    covariance: Matrix
    at: float
    """Monotonic seconds of the latest observation."""
    up: list[float]
    """CUSUM of being slower than thought, for TTFT and TPOT."""
    down: list[float]

    def drift(self, rate: float, now: float) -> None:
        """Know less as time passes. rate: variance per second."""
        idle = min(max(now - self.at, 0.0), 3600.0)
        self.at = max(now, self.at)
        self.covariance += (rate * idle) * DRIFT
        if idle > 10 or self.covariance[0, 0] > MOST_VARIANCE:
            self._bound()

    def _bound(self) -> None:
        variance = np.diagonal(self.covariance)
        if (variance > MOST_VARIANCE).any():
            scale = np.sqrt(np.minimum(1.0, MOST_VARIANCE / variance))
            self.covariance *= scale[:, None] * scale

    def update(self, kind: int, shares: Vector, surprise: float, noise: float) -> float:
        """Learn from ln(observed / expected) = `surprise` of TTFT or TPOT with a variance of `noise`.

        shares: of each term in the expected value, shape (6,), sum 1. Returns the variance of what was expected
        without the noise; a change of speed that is found adds to it first.
        """
        gain = self.covariance @ shares
        uncertain = float(gain @ shares)
        deviation = math.sqrt(uncertain + noise)
        z = surprise / deviation
        up = self.up[kind] = max(0.0, self.up[kind] + min(z, 4.0) - SLACK)
        down = self.down[kind] = max(0.0, self.down[kind] - max(z, -4.0) - SLACK)
        if up > ALARM or down > ALARM:
            # The host has changed: how its coefficients relate is still known, their level is not.
            self.up[kind] = self.down[kind] = 0.0
            self.covariance += min(surprise * surprise, MOST_VARIANCE) * _JUMPS[kind]
            self._bound()
            gain = self.covariance @ shares
            total = float(gain @ shares) + noise
        else:
            total = uncertain + noise
            surprise = min(max(surprise, -CLIP * deviation), CLIP * deviation)
        self.mean = np.minimum(np.maximum(self.mean + gain * (surprise / total), LEAST), MOST)
        self.covariance -= np.outer(gain, gain / total)
        return uncertain
