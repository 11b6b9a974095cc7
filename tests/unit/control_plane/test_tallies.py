"""Counters and histograms of our own say what those of the library would."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import Sample

from control_plane.api.tallies import Counts, Distribution

BOUNDS = (0.1, 0.5, 2.0)
values = st.one_of(st.sampled_from((0.0, *BOUNDS, math.inf)), st.floats(0, 10))


def samples(registry: CollectorRegistry) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    found: list[Sample] = [sample for metric in registry.collect() for sample in metric.samples]
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for sample in found
        if not sample.name.endswith("_created")
    }


@given(st.lists(st.tuples(st.sampled_from("ab"), values)))
def test_a_distribution_is_a_histogram(observed: list[tuple[str, float]]) -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    mine = Distribution("seconds", "Of something.", ("model",), BOUNDS, ours)
    other = Histogram("seconds", "Of something.", ("model",), buckets=BOUNDS, registry=theirs)
    for model, value in observed:
        mine.observe(value, (model,))
        other.labels(model).observe(value)
    assert samples(ours) == pytest.approx(samples(theirs), nan_ok=True)


def test_a_distribution_without_labels_is_there_from_the_start() -> None:
    registry = CollectorRegistry()
    Distribution("seconds", "Of something.", (), BOUNDS, registry)
    assert b'seconds_bucket{le="+Inf"} 0.0' in generate_latest(registry)


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 5))))
def test_counts_are_a_counter(added: list[tuple[str, int]]) -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    mine = Counts("tokens", "Of something.", ("model",), ours)
    other = Counter("tokens", "Of something.", ("model",), registry=theirs)
    for model, amount in added:
        mine.add((model,), amount)
        other.labels(model).inc(amount)
    assert samples(ours) == samples(theirs)
    names = [metric.name for metric in ours.collect()]
    assert names == ["tokens"]
