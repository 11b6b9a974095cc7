"""How likely an answer is a good one: of each model at each kind of work, from outcomes and from what clients say."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

from control_plane.domain.task import TaskType
from control_plane.prediction.policy import SuccessPolicy
from control_plane.prediction.state import TallyState

Key = TypeVar("Key")

_TASKS = frozenset(TaskType)


@dataclass(frozen=True, slots=True)
class Success:
    rate: float
    """[0, 1]."""
    evidence: float
    """Effective number of observations of this model at this kind of work."""


@dataclass(slots=True)
class Tally:
    """Of a Beta distribution."""

    good: float = 0.0
    bad: float = 0.0
    at: float = 0.0

    def weight(self, now: float, half_life: float) -> float:
        """What the observations count now, of what they counted at `at`."""
        return math.exp2(-max(0.0, now - self.at) / half_life)

    def add(self, score: float, weight: float, now: float, half_life: float) -> None:
        left = self.weight(now, half_life)
        self.good = self.good * left + score * weight
        self.bad = self.bad * left + (1 - score) * weight
        self.at = max(now, self.at)


class SuccessModel:
    """(model, kind of work) <- model, each a Beta distribution whose prior is the mean of the one above. Models are no
    kin: what one does badly says nothing of another. One thread; `now` is monotonic seconds."""

    def __init__(self, policy: SuccessPolicy | None = None) -> None:
        self.policy = policy or SuccessPolicy()
        self._models: OrderedDict[str, Tally] = OrderedDict()
        self._pairs: OrderedDict[tuple[str, TaskType], Tally] = OrderedDict()

    def observe(self, model: str, task: TaskType, succeeded: bool, now: float) -> None:
        """An answer came, or failed by the model's fault."""
        self.feedback(model, task, float(succeeded), now)

    def feedback(self, model: str, task: TaskType, score: float, now: float, weight: float = 1.0) -> None:
        """Somebody judged an answer: score in [0, 1], counting as `weight` observations. What is no number is
        ignored, what is out of range clamped."""
        if math.isnan(score) or not weight > 0:
            return
        score, weight = min(max(score, 0.0), 1.0), min(weight, self.policy.most_weight)
        half_life = self.policy.half_life_s
        _kept(self._models, model, self.policy.kept).add(score, weight, now, half_life)
        _kept(self._pairs, (model, task), self.policy.kept).add(score, weight, now, half_life)

    def expect(self, model: str, task: TaskType, now: float) -> Success:
        """Of the next answer."""
        rate, evidence = self.policy.initial, 0.0
        for tally in (self._models.get(model), self._pairs.get((model, task))):
            good = bad = 0.0
            if tally is not None:
                left = tally.weight(now, self.policy.half_life_s)
                good, bad = tally.good * left, tally.bad * left
            evidence = good + bad
            rate = (good + self.policy.kin_weight * rate) / (evidence + self.policy.kin_weight)
        return Success(rate, evidence)

    def state(self, now: float) -> tuple[TallyState, ...]:
        """What outlives this process."""
        entries = [(model, 0, tally) for model, tally in self._models.items()]
        entries += [(model, int(task), tally) for (model, task), tally in self._pairs.items()]
        return tuple(TallyState(model, task, t.good, t.bad, max(0.0, now - t.at)) for model, task, t in entries)

    def restore(self, state: Iterable[TallyState], now: float) -> None:
        """Take over what an earlier process learned. What cannot be is left out."""
        for entry in state:
            if not all(0 <= value < math.inf for value in (entry.good, entry.bad, entry.age)):
                continue
            if not entry.task:
                tally = _kept(self._models, entry.model, self.policy.kept)
            elif entry.task in _TASKS:
                tally = _kept(self._pairs, (entry.model, TaskType(entry.task)), self.policy.kept)
            else:
                continue
            tally.good, tally.bad, tally.at = entry.good, entry.bad, now - entry.age


def _kept(tallies: OrderedDict[Key, Tally], key: Key, most: int) -> Tally:
    """The tally of a key, a new one if there is none; beyond `most` the one that was used least recently goes."""
    tally = tallies.get(key)
    if tally is None:
        tally = tallies[key] = Tally()
        if len(tallies) > most:
            tallies.popitem(last=False)
    tallies.move_to_end(key)
    return tally
