"""How many tokens an answer will have: a histogram per kind of work and model, pooled."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from control_plane.domain.task import TaskType
from control_plane.prediction.features import Vector, count
from control_plane.prediction.policy import LengthPolicy
from control_plane.prediction.state import HistogramState

EDGES: Vector = np.unique(np.round(2 ** (np.arange(0, 41) / 2)))
"""Bin i holds lengths in [EDGES[i], EDGES[i + 1]): a factor of 1.4 each, from 1 to a million tokens."""
_LOWER, _UPPER = EDGES[:-1], EDGES[1:]
_WIDTH = np.log(_UPPER / _LOWER)
_MEAN: Vector = (_UPPER - _LOWER) / _WIDTH
"""Of a length that is uniform in the logarithm within its bin."""
BINS = len(_LOWER)
_TASKS = frozenset(TaskType)
MOST_TOKENS = float(EDGES[-1]) - 1
_EDGES: list[float] = EDGES.tolist()
_LARGEST_UNIT = 1e100
_LENGTHS_KEPT = 256


@dataclass(frozen=True, slots=True)
class Length:
    """Of an answer, tokens, >= 1 and at most as many as it may have."""

    mean: float
    quantiles: tuple[float, ...]
    """One for each of the policy's levels."""


@dataclass(slots=True)
class Histogram:
    """All that was observed counts less with every observation: instead of making every bin smaller, each observation
    is entered with a larger weight than the one before."""

    entered: list[float] = field(default_factory=lambda: [0.0] * BINS)
    unit: float = 1.0
    """What counts as one observation."""
    weight: float = 0.0
    """Of all bins, observations."""
    observed: int = 0

    @property
    def bins(self) -> Vector:
        """Observations, shape (BINS,)."""
        return np.array(self.entered) / self.unit

    def add(self, first: int, shares: Sequence[float], decay: float) -> None:
        """One observation, in `shares` of the bins from the `first` on; those before count `decay` as much."""
        self.unit /= decay
        for number, share in enumerate(shares, first):
            self.entered[number] += share * self.unit
        self.weight = self.weight * decay + 1
        self.observed += 1
        if self.unit > _LARGEST_UNIT:
            self.entered, self.unit = self.bins.tolist(), 1.0


@dataclass(slots=True)
class _Cached:
    share: Vector
    """Of each bin, shape (BINS,), sum 1."""
    until: tuple[int, int, int]
    """`observed` of the histograms from which it no longer holds."""
    lengths: dict[float, Length] = field(default_factory=dict)
    """What was expected with it, by the most tokens that an answer may have."""


class OutputLength:
    """(kind of work, model) <- kind of work <- all. One thread."""

    def __init__(self, policy: LengthPolicy | None = None) -> None:
        self.policy = policy or LengthPolicy()
        # Wide, log-normal around what is expected of any.
        centre = math.log(self.policy.expected_tokens)
        density = np.exp(-0.5 * ((np.log(_LOWER) + _WIDTH / 2 - centre) / 1.5) ** 2) * _WIDTH
        self._prior: Vector = density / density.sum()
        self._all = Histogram()
        self._tasks: dict[TaskType, Histogram] = {task: Histogram() for task in TaskType}
        self._models: OrderedDict[tuple[TaskType, str], Histogram] = OrderedDict()
        self._cache: dict[tuple[TaskType, str], _Cached] = {}

    def observe(self, task: TaskType, model: str, tokens: float, *, cut: bool = False) -> None:
        """An answer had so many tokens; `cut`: it was ended by its limit, and would have had at least as many."""
        if not 1 <= tokens < math.inf:
            return
        number = min(bisect_right(_EDGES, tokens) - 1, BINS - 1)
        later: list[float] | None = None
        if cut and number + 1 < BINS:
            # To the right, as those went that were not cut. Source: Efron, "The two sample problem with censored
            # data", 5th Berkeley Symposium, 1967.
            tail = self._known(task, model).share[number:].copy()
            tail[0] *= math.log(_UPPER[number] / tokens) / _WIDTH[number]
            total = float(tail.sum())
            later = (tail / total).tolist() if total > 0 else None
        decay = 1 - 1 / self.policy.window
        for histogram in self._chain(task, model):
            histogram.add(number, (1.0,) if later is None else later, decay)

    def expect(self, task: TaskType, model: str, max_tokens: float | None = None, produced: float = 0) -> Length:
        """Of an answer of at most `max_tokens` that has `produced` tokens already."""
        most = MOST_TOKENS if max_tokens is None else min(max(1.0, count(max_tokens)), MOST_TOKENS)
        known = self._known(task, model)
        if produced:
            return self._expect(known.share, most, min(count(produced), most))
        length = known.lengths.get(most)
        if length is None:
            length = self._expect(known.share, most, 0.0)
            if len(known.lengths) < _LENGTHS_KEPT:
                known.lengths[most] = length
        return length

    def _expect(self, share: Vector, most: float, done: float) -> Length:
        upper = _UPPER
        if done > 1:
            # What is left of each bin beyond what is produced already.
            left = np.clip(np.log(np.maximum(_UPPER, done) / np.maximum(_LOWER, done)) / _WIDTH, 0, 1)
            share = share * left
            total = float(share.sum())
            if total <= 0:
                return Length(done, (done,) * len(self.policy.levels))
            share = share / total
        lower = np.minimum(np.maximum(_LOWER, done), upper)
        width = np.log(upper / lower)
        mean = np.where(width > 1e-9, (upper - lower) / np.maximum(width, 1e-9), lower)
        # A bin that the limit cuts: as many tokens as the limit where it is passed.
        capped = float(share @ np.minimum(mean, most))
        cumulative = np.cumsum(share)
        quantiles = []
        for level in self.policy.levels:
            number = min(int(np.searchsorted(cumulative, level)), BINS - 1)
            before = float(cumulative[number]) - float(share[number])
            part = (level - before) / float(share[number]) if share[number] > 0 else 0.0
            value = float(lower[number]) * math.exp(float(width[number]) * min(max(part, 0.0), 1.0))
            quantiles.append(min(max(value, done, 1.0), most))
        return Length(min(max(capped, done, 1.0), most), tuple(quantiles))

    def state(self) -> tuple[HistogramState, ...]:
        """What outlives this process."""
        entries = [(0, "", self._all)]
        entries += [(int(task), "", histogram) for task, histogram in self._tasks.items()]
        entries += [(int(task), model, histogram) for (task, model), histogram in self._models.items()]
        return tuple(HistogramState(task, model, tuple(h.bins.tolist())) for task, model, h in entries if h.weight)

    def restore(self, state: Iterable[HistogramState]) -> None:
        """Take over what an earlier process learned. What cannot be is left out."""
        for entry in state:
            if len(entry.bins) != BINS or not all(0 <= weight < math.inf for weight in entry.bins):
                continue
            if not entry.task:
                histogram = self._all
            elif entry.task not in _TASKS:
                continue
            elif not entry.model:
                histogram = self._tasks[TaskType(entry.task)]
            else:
                histogram = self._chain(TaskType(entry.task), entry.model)[-1]
            histogram.entered, histogram.unit, histogram.weight = list(entry.bins), 1.0, sum(entry.bins)
        self._cache.clear()

    def _chain(self, task: TaskType, model: str) -> tuple[Histogram, Histogram, Histogram]:
        key = task, model
        own = self._models.get(key)
        if own is None:
            own = self._models[key] = Histogram()
            if len(self._models) > self.policy.kept:
                gone, _ = self._models.popitem(last=False)
                self._cache.pop(gone, None)
        self._models.move_to_end(key)
        return self._all, self._tasks[task], own

    def _known(self, task: TaskType, model: str) -> _Cached:
        """The expected share of each bin: each histogram, and the one above as `kin_weight` observations of it."""
        key = task, model
        cached = self._cache.get(key)
        own = self._models.get(key) or Histogram()
        chain = self._all, self._tasks[task], own
        if cached is not None:
            ends = cached.until
            if chain[0].observed < ends[0] and chain[1].observed < ends[1] and own.observed < ends[2]:
                return cached
        share = self._prior
        for histogram in chain:
            kin = self.policy.kin_weight
            share = (histogram.bins + kin * share) / (histogram.weight + kin)
        first, second, third = (one.observed + 1 + int(0.02 * one.weight) for one in chain)
        known = _Cached(share, (first, second, third))
        if key in self._models:
            self._cache[key] = known
        return known
