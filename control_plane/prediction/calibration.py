"""How far observations are from what was expected: quantiles of their ratio, and the noise."""

from __future__ import annotations

import math
from dataclasses import dataclass

from control_plane.prediction.state import RatiosState

NOISE = 0.09
"""Variance of ln(observed / expected) before it was measured."""
LEAST_NOISE, MOST_NOISE = 0.0025, 4.0


@dataclass(slots=True)
class Ratios:
    """Quantiles of ln(observed / promised) in standard deviations, and the noise; TTFT and TPOT."""

    quantiles: list[list[float]]
    """One for each level."""
    noise: list[float]
    """Variance of ln(observed / expected just before)."""
    miss: list[float]
    """Variance of ln(observed / promised): more, where answers come late or requests were not what they seemed."""
    count: list[float]

    def copy(self) -> Ratios:
        return Ratios([list(of) for of in self.quantiles], list(self.noise), list(self.miss), [0.0, 0.0])

    def learn(
        self, kind: int, levels: tuple[float, ...], surprise: float, broken: float, uncertain: float, slowest: float
    ) -> None:
        """From ln(observed / expected), just before it was learned, and ln(observed / promised), at dispatch.

        A step of stochastic gradient descent on the pinball loss, and a moving average of the square.
        Source: Koenker and Bassett, "Regression Quantiles", Econometrica, 1978.
        """
        seen = self.count[kind] = self.count[kind] + 1
        z = broken / math.sqrt(self.miss[kind] + uncertain)
        step = max(slowest / 2, 1 / (seen + 10))
        quantiles = self.quantiles[kind]
        for number, level in enumerate(levels):
            quantiles[number] += step * (level if z > quantiles[number] else level - 1)
        step = max(slowest, 1 / (seen + 5))
        self.noise[kind] = _moved(self.noise[kind], surprise, uncertain, step)
        self.miss[kind] = _moved(self.miss[kind], broken, uncertain, step)

    def state(self) -> RatiosState:
        return RatiosState(
            tuple(tuple(of) for of in self.quantiles), tuple(self.noise), tuple(self.miss), tuple(self.count)
        )

    def restore(self, state: RatiosState) -> None:
        """Take over what another has learned, if it can be."""
        if state.sound(len(self.quantiles[0])):
            self.quantiles = [list(of) for of in state.quantiles]
            self.noise = [min(max(noise, LEAST_NOISE), MOST_NOISE) for noise in state.noise]
            self.miss = [min(max(miss, LEAST_NOISE), MOST_NOISE) for miss in state.miss]
            self.count = list(state.count)


def _moved(variance: float, residual: float, uncertain: float, step: float) -> float:
    """Moving average of the part of a squared residual that is not for want of knowledge; outliers are clipped."""
    square = min(residual * residual, 9 * (variance + uncertain))
    variance += step * (square - uncertain - variance)
    return LEAST_NOISE if variance < LEAST_NOISE else variance if variance < MOST_NOISE else MOST_NOISE
