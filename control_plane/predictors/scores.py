"""How wrong predictions are, and which of two predictors is worse.

Errors of times and lengths are taken on logarithms: twice as long as predicted is as wrong for 1 s as for 100 s.

    seconds            pinball loss of ln(seconds) at the quantiles 0.5 and 0.9, the mean of both (Koenker and Bassett,
                       Regression Quantiles, 1978); of attempts that succeeded
    success            Brier score, (predicted - happened)^2 (Brier, 1950)
    completion_tokens  |ln((1 + tokens) / (1 + predicted))|
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

from control_plane.predictors.attempt import Attempt, Prediction

TOLERANCE = 0.05
"""A loss that is larger by this share, and by more than SLACK, is worse."""
SLACK = {"seconds": 0.005, "success": 0.002, "completion_tokens": 0.01}
"""Differences that mean nothing."""
ENOUGH = 100
"""Attempts on which a comparison must rest."""


@dataclass(frozen=True, slots=True)
class Losses:
    """Of one attempt, or means over several; None: nothing to be measured by."""

    seconds: float | None
    success: float | None
    completion_tokens: float | None


TARGETS = tuple(each.name for each in fields(Losses))


@dataclass(frozen=True, slots=True)
class Score:
    """Of a predictor on some attempts."""

    attempts: int
    losses: Losses
    covered: float | None
    """Share of those that succeeded which took no longer than seconds_p90: 0.9 is right."""


def losses(predicted: Prediction, attempt: Attempt) -> Losses:
    """Of one prediction. An attempt that failed says nothing of times and lengths."""
    success = (predicted.success - attempt.ok) ** 2
    if not attempt.ok:
        return Losses(None, success, None)
    took = math.log(max(attempt.seconds, 1e-3))
    seconds = 0.5 * (
        _pinball(0.5, took - math.log(max(predicted.seconds_p50, 1e-3)))
        + _pinball(0.9, took - math.log(max(predicted.seconds_p90, 1e-3)))
    )
    tokens = None
    if attempt.completion_tokens is not None:
        tokens = abs(math.log1p(attempt.completion_tokens) - math.log1p(max(0.0, predicted.completion_tokens)))
    return Losses(seconds, success, tokens)


def _pinball(quantile: float, too_low_by: float) -> float:
    return max(quantile * too_low_by, (quantile - 1.0) * too_low_by)


def score(predicted: Sequence[Prediction], attempts: Sequence[Attempt]) -> Score:
    """Means over attempts, each with its prediction."""
    each = [losses(one, attempt) for one, attempt in zip(predicted, attempts, strict=True)]
    within = [
        attempt.seconds <= one.seconds_p90 for one, attempt in zip(predicted, attempts, strict=True) if attempt.ok
    ]
    means = (_mean([value for one in each if (value := getattr(one, target)) is not None]) for target in TARGETS)
    return Score(len(attempts), Losses(*means), _mean([float(one) for one in within]))


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def worse_in(candidate: Losses, other: Losses, tolerance: float = TOLERANCE) -> tuple[str, ...]:
    """Targets in which the candidate is worse, by name; where one of both was not measured nothing is said."""
    found = []
    for target in TARGETS:
        mine, theirs = getattr(candidate, target), getattr(other, target)
        if mine is not None and theirs is not None and mine > theirs * (1.0 + tolerance) + SLACK[target]:
            found.append(target)
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A candidate beside what is in force, on the same attempts, all of them later than what either was trained on."""

    against: str
    """Version, or "rules"."""
    at: float
    """When it was made, seconds since 1970."""
    since: float
    """Of the attempts: the first began then."""
    until: float
    """The last one."""
    candidate: Score
    other: Score
    worse: tuple[str, ...]
    """Targets in which the candidate is worse."""

    @property
    def enough(self) -> bool:
        """Whether it rests on enough attempts to say something."""
        return self.candidate.attempts >= ENOUGH


def objections(evaluation: Evaluation | None, against: str) -> tuple[str, ...]:
    """Why a candidate must not take the place of `against`, sentences for people; empty: it may."""
    if evaluation is None:
        return (f"it was not evaluated beside {against}",)
    found = []
    if not evaluation.enough:
        found.append(f"it was evaluated on {evaluation.candidate.attempts} attempts, {ENOUGH} are needed")
    for target in evaluation.worse:
        mine, theirs = getattr(evaluation.candidate.losses, target), getattr(evaluation.other.losses, target)
        found.append(
            f"its loss in {target} is {mine:.4f}, that of {against} {theirs:.4f}: more than {TOLERANCE:.0%} worse"
        )
    return tuple(found)
