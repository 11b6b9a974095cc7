"""Counters and histograms that one event loop writes to, several times per request.

Those of prometheus_client take a lock for each number; these are plain numbers, which Prometheus reads from another
thread: at worst it sees a request in one of them and not yet in the next.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString


class Counts(Collector):
    """A counter for each combination of labels."""

    def __init__(self, name: str, documentation: str, labels: Sequence[str], registry: CollectorRegistry) -> None:
        self._name, self._documentation, self._labels = name, documentation, tuple(labels)
        self._values: dict[tuple[str, ...], float] = {}
        registry.register(self)

    def add(self, labels: tuple[str, ...], amount: float = 1.0) -> None:
        """Labels in the order in which they were declared."""
        self._values[labels] = self._values.get(labels, 0.0) + amount

    def value(self, *labels: str) -> float:
        """What was counted so far."""
        return self._values.get(labels, 0.0)

    def describe(self) -> list[Metric]:
        return [CounterMetricFamily(self._name, self._documentation, labels=self._labels)]

    def collect(self) -> Iterator[Metric]:
        family = CounterMetricFamily(self._name, self._documentation, labels=self._labels)
        for labels, value in list(self._values.items()):
            family.add_metric(labels, value)
        yield family


class Distribution(Collector):
    """A histogram for each combination of labels. bounds: the upper ones of the buckets, ascending, inclusive."""

    def __init__(
        self, name: str, documentation: str, labels: Sequence[str], bounds: Sequence[float], registry: CollectorRegistry
    ) -> None:
        self._name, self._documentation, self._labels = name, documentation, tuple(labels)
        self._bounds = tuple(bounds)
        self._names = [floatToGoString(bound) for bound in (*bounds, math.inf)]  # type: ignore[no-untyped-call]
        self._values: dict[tuple[str, ...], tuple[list[int], list[float]]] = {}
        """How often in each bucket, and the sum."""
        if not labels:
            self._begin(())
        registry.register(self)

    def observe(self, value: float, labels: tuple[str, ...] = ()) -> None:
        """Labels in the order in which they were declared."""
        if value != value:
            return  # no number
        buckets, total = self._values.get(labels) or self._begin(labels)
        buckets[bisect_left(self._bounds, value)] += 1
        total[0] += value

    def describe(self) -> list[Metric]:
        return [HistogramMetricFamily(self._name, self._documentation, labels=self._labels)]

    def collect(self) -> Iterator[Metric]:
        family = HistogramMetricFamily(self._name, self._documentation, labels=self._labels)
        for labels, (buckets, total) in list(self._values.items()):
            seen = 0
            named = []
            for name, count in zip(self._names, list(buckets), strict=True):
                seen += count
                named.append((name, seen))
            family.add_metric(labels, named, total[0])
        yield family

    def _begin(self, labels: tuple[str, ...]) -> tuple[list[int], list[float]]:
        return self._values.setdefault(labels, ([0] * len(self._names), [0.0]))
