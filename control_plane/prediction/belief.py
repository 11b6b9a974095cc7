"""The belief about one row: a Kalman filter of the logarithms of its coefficients.

ln TTFT = ln(sum_i exp(theta_i) x_i) + noise, the same for TPOT; theta is Gaussian. The derivative by theta_i is the
share of term i in the sum, so every gain is free of units, every coefficient positive, and a host that is a hundred
times slower is learned in the same number of steps.

Lists and plain arithmetic: for six numbers numpy costs several times as much.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from control_plane.prediction.features import Features, Vector, count

Matrix: TypeAlias = list[list[float]]

TTFT, TPOT = 0, 1
TERMS = (range(4), range(4, 6))
"""Of TTFT: base, prompt, backlog, waiting. Of TPOT: base, streams."""
SIZE = 6

# ln seconds: of each coefficient before anything is known, and what it may be.
CENTRE: Vector = np.log([0.2, 1e-3, 1e-3, 0.3, 0.04, 0.004])
BOUNDS: tuple[tuple[float, float], ...] = tuple(
    (math.log(least), math.log(most))
    for least, most in ((1e-4, 1e3), (1e-8, 1e1), (1e-8, 1e1), (1e-5, 1e3), (1e-5, 1e2), (1e-7, 1e1))
)

# What a faster host is faster in: in everything somewhat, in its own prompt and that of others alike.
ALIKE = np.full((SIZE, SIZE), 0.5)
ALIKE[1, 2] = ALIKE[2, 1] = 0.9
np.fill_diagonal(ALIKE, 1.0)


def triangle(matrix: Matrix) -> tuple[float, ...]:
    """The lower one of a symmetric matrix, row by row."""
    return tuple(value for index, row in enumerate(matrix) for value in row[: index + 1])


def lower(values: Sequence[float]) -> NDArray[np.float64]:
    """The symmetric matrix of which this is the lower triangle, shape (6, 6)."""
    matrix = np.zeros((SIZE, SIZE))
    matrix[np.tril_indices(SIZE)] = values
    return matrix + np.tril(matrix, -1).T


CLIP = 2.5
"""Standard deviations of surprise beyond which an observation counts no more than at it (Huber)."""
SLACK, ALARM = 1.0, 9.0
"""Of the CUSUM of surprise in standard deviations: what is ordinary, and what is a change."""
MOST_SURPRISE = 6.0
"""Standard deviations that one observation adds to it at most: no single one raises the alarm."""
MOST_VARIANCE = 4.0
APART = 0.04
"""Variance by which a drift moves one term apart from the others, as a share of that by which it moves all."""
LONGEST_IDLE = 3600.0
"""Seconds after which a belief drifts no more."""


@dataclass(slots=True)
class Belief:
    """theta ~ N(mean, covariance), 6 and 6 x 6."""

    mean: list[float]
    covariance: Matrix
    at: float
    """Monotonic seconds up to which the drift is in the covariance."""
    up: list[float] = field(default_factory=lambda: [0.0, 0.0])
    """CUSUM of being slower than thought, for TTFT and TPOT."""
    down: list[float] = field(default_factory=lambda: [0.0, 0.0])

    def drift(self, rate: float, now: float) -> None:
        """Know less as time passes. rate: variance per second. In steps of a second: it is little, and costs some."""
        idle = now - self.at
        if idle >= 1.0:
            self.at = now
            more = rate * min(idle, LONGEST_IDLE)
            for kind in (TTFT, TPOT):
                self._widen(kind, more)
            for index in range(SIZE):
                self.covariance[index][index] += APART * more
            self._bound()

    def _widen(self, kind: int, variance: float) -> None:
        """The terms of TTFT, or of TPOT, may have moved together."""
        terms = TERMS[kind]
        for i in terms:
            row = self.covariance[i]
            for j in terms:
                row[j] += variance

    def _bound(self) -> None:
        covariance = self.covariance
        for i in range(SIZE):
            variance = covariance[i][i]
            if variance > MOST_VARIANCE:
                scale = math.sqrt(MOST_VARIANCE / variance)
                for j in range(SIZE):
                    covariance[i][j] *= scale
                    covariance[j][i] *= scale

    def expected(self, kind: int, features: Features) -> tuple[float, list[float]]:
        """Median seconds, and the share of each term in them."""
        mean = self.mean
        if kind == TTFT:
            parts = [
                math.exp(mean[0]),
                math.exp(mean[1]) * features.uncached_tokens,
                math.exp(mean[2]) * count(features.backlog_tokens),
                math.exp(mean[3]) * count(features.waiting),
            ]
        else:
            parts = [math.exp(mean[4]), math.exp(mean[5]) * count(features.streams)]
        total = sum(parts)
        return total, [part / total for part in parts]

    def gain(self, kind: int, shares: Sequence[float]) -> tuple[list[float], float]:
        """covariance @ shares, and the variance of ln(expected)."""
        if kind == TTFT:
            a, b, c, d = shares
            gain = [row[0] * a + row[1] * b + row[2] * c + row[3] * d for row in self.covariance]
            return gain, gain[0] * a + gain[1] * b + gain[2] * c + gain[3] * d
        a, b = shares
        gain = [row[4] * a + row[5] * b for row in self.covariance]
        return gain, gain[4] * a + gain[5] * b

    def update(self, kind: int, shares: Sequence[float], surprise: float, noise: float) -> float:
        """Learn from ln(observed / expected) = `surprise` of TTFT or TPOT with a variance of `noise`.

        Returns the variance of ln(expected) before. Outliers are clipped; once several in the same direction make a
        change of speed likely, the level of all terms is free to move, while how they relate stays known.
        Sources: Huber, "Robust Estimation of a Location Parameter", 1964; Page, "Continuous Inspection Schemes", 1954.
        """
        gain, uncertain = self.gain(kind, shares)
        deviation = math.sqrt(uncertain + noise)
        z = surprise / deviation
        ordinary = -MOST_SURPRISE if z < -MOST_SURPRISE else z if z < MOST_SURPRISE else MOST_SURPRISE
        up, down = self.up[kind] + ordinary - SLACK, self.down[kind] - ordinary - SLACK
        self.up[kind], self.down[kind] = up if up > 0 else 0.0, down if down > 0 else 0.0
        if up > ALARM or down > ALARM:
            self.up[kind] = self.down[kind] = 0.0
            self._widen(kind, min(surprise * surprise, MOST_VARIANCE))
            self._bound()
            gain, widened = self.gain(kind, shares)
            self.correct(gain, surprise, widened + noise)
        else:
            if not -CLIP <= z <= CLIP:
                surprise = math.copysign(CLIP * deviation, z)
            self.correct(gain, surprise, uncertain + noise)
        return uncertain

    def correct(self, gain: list[float], surprise: float, total: float) -> None:
        """The step of a Kalman filter; total: variance of the surprise."""
        step = surprise / total
        mean = self.mean
        for index, part in enumerate(gain):
            moved = mean[index] + part * step
            least, most = BOUNDS[index]
            mean[index] = moved if least <= moved <= most else least if moved < least else most
        a, b, c, d, e, f = gain
        covariance = self.covariance
        for index, part in enumerate(gain):
            scale = part / total
            u, v, w, x, y, z = covariance[index]
            covariance[index] = [
                u - scale * a,
                v - scale * b,
                w - scale * c,
                x - scale * d,
                y - scale * e,
                z - scale * f,
            ]
