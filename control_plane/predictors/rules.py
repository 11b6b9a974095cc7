"""What attempts are like that nothing was trained for: means that are shrunk towards those of wider groups.

    all <- task type <- (task type, model) <- (task type, model, server)

ln(seconds) and ln(1 + tokens) of a group are taken for normal, with the mean of the group drawn from that of the
group above it, which counts for PRIOR attempts of its own: mean = (n * own + PRIOR * above) / (n + PRIOR). The same
with variances, and with successes (a beta distribution). This is normal-normal and beta-binomial partial pooling with
known variances (Gelman et al., Bayesian Data Analysis, chapters 2 and 5). Quantiles are those of a normal distribution.

Memory and time: at most GROUPS groups, a few sums each; an observation changes four.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from control_plane.domain.task import TaskType
from control_plane.predictors.attempt import Attempt, Prediction, Question

PRIOR = 10.0
"""Attempts for which the group above counts."""
WINDOW = 500.0
"""Attempts after which an old one counts for 1/e: hosts and prompts change."""
GROUPS = 10_000
Z90 = 1.2815515655446004
"""Of the standard normal distribution."""

Key = tuple[str, ...]


@dataclass(slots=True)
class Sums:
    """Of the attempts of one group, old ones discounted."""

    attempts: float = 0.0
    succeeded: float = 0.0
    timed: float = 0.0
    seconds: float = 0.0
    """Of ln(seconds)."""
    squares: float = 0.0
    counted: float = 0.0
    tokens: float = 0.0
    """Of ln(1 + tokens)."""

    def add(self, attempt: Attempt) -> None:
        """Learn of one more."""
        fade = 1.0 - 1.0 / WINDOW
        self.attempts = fade * self.attempts + 1.0
        self.succeeded = fade * self.succeeded + attempt.ok
        if not attempt.ok:
            return
        told = math.log(max(attempt.seconds, 1e-3))
        self.timed = fade * self.timed + 1.0
        self.seconds = fade * self.seconds + told
        self.squares = fade * self.squares + told * told
        if attempt.completion_tokens is not None:
            self.counted = fade * self.counted + 1.0
            self.tokens = fade * self.tokens + math.log1p(attempt.completion_tokens)


@dataclass(slots=True)
class _Belief:
    """Of a group; that of nobody is where `all` begins: 2 s, give or take a factor of 4, 128 tokens, success."""

    success: float = 0.98
    mean: float = math.log(2.0)
    variance: float = math.log(4.0) ** 2
    tokens: float = math.log1p(128)

    def of(self, sums: Sums) -> _Belief:
        """Of a group within this one."""
        mean = (sums.seconds + PRIOR * self.mean) / (sums.timed + PRIOR)
        # Around the mean that is believed in, so that a shrunk mean does not look surer than it is.
        spread = sums.squares - 2.0 * mean * sums.seconds + sums.timed * mean * mean
        return _Belief(
            (sums.succeeded + PRIOR * self.success) / (sums.attempts + PRIOR),
            mean,
            max(1e-6, (max(0.0, spread) + PRIOR * self.variance) / (sums.timed + PRIOR)),
            (sums.tokens + PRIOR * self.tokens) / (sums.counted + PRIOR),
        )


class Rules:
    """Predicts and learns in microseconds."""

    def __init__(self, attempts: Iterable[Attempt] = ()) -> None:
        self._groups: OrderedDict[Key, Sums] = OrderedDict()
        for attempt in attempts:
            self.observe(attempt)

    def observe(self, attempt: Attempt) -> None:
        """Learn from an attempt that has ended."""
        for key in _chain(attempt.question):
            sums = self._groups.get(key)
            if sums is None:
                sums = self._groups[key] = Sums()
                if len(self._groups) > GROUPS:
                    self._groups.popitem(last=False)
            else:
                self._groups.move_to_end(key)
            sums.add(attempt)

    def predict(self, question: Question) -> Prediction:
        """Never fails: of what nobody has seen, it says what is usual."""
        belief = _Belief()
        for key in _chain(question):
            sums = self._groups.get(key)
            if sums is not None:
                belief = belief.of(sums)
        deviation = math.sqrt(belief.variance)
        tokens = math.expm1(belief.tokens)
        return Prediction(
            math.exp(belief.mean),
            math.exp(belief.mean + Z90 * deviation),
            min(1.0, max(0.0, belief.success)),
            tokens if question.max_tokens is None else min(tokens, float(question.max_tokens)),
        )


def _chain(question: Question) -> tuple[Key, ...]:
    """The groups of an attempt, the widest first."""
    path = (TaskType(question.task_type).name, question.model, question.server_id)
    return tuple(path[:depth] for depth in range(len(path) + 1))
