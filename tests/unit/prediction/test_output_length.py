"""OutputLength: pooled histograms of answers' tokens."""

from __future__ import annotations

import json
import math
import random

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from control_plane.domain.task import TaskType
from control_plane.prediction.output_length import BINS, OutputLength
from control_plane.prediction.policy import LengthPolicy
from control_plane.prediction.state import HistogramState

CODE, CHAT = TaskType.CODE_GENERATION, TaskType.CHAT


def lengths(count: int, median: float, spread: float = 0.8, seed: int = 1) -> list[int]:
    rng = random.Random(seed)
    return [max(1, round(median * rng.lognormvariate(0, spread))) for _ in range(count)]


def test_begins_with_what_is_expected_of_any() -> None:
    length = OutputLength(LengthPolicy(expected_tokens=300)).expect(CHAT, "m")
    assert length.quantiles[0] == pytest.approx(300, rel=0.2)
    assert length.quantiles[0] < length.mean < length.quantiles[1]


@pytest.mark.parametrize("median", [12, 700])
def test_learns_mean_and_quantiles(median: float) -> None:
    model, seen = OutputLength(), lengths(400, median)
    for tokens in seen:
        model.observe(CODE, "m", tokens)
    length = model.expect(CODE, "m")
    assert length.quantiles[0] == pytest.approx(np.quantile(seen, 0.5), rel=0.15)
    assert length.quantiles[1] == pytest.approx(np.quantile(seen, 0.9), rel=0.2)
    assert length.mean == pytest.approx(np.mean(seen), rel=0.15)


def test_kinds_of_work_differ_and_a_new_model_starts_from_its_kind() -> None:
    model = OutputLength()
    for short, long in zip(lengths(200, 10), lengths(200, 1000), strict=True):
        model.observe(CODE, "a", short)
        model.observe(CHAT, "a", long)
    assert model.expect(CODE, "new").quantiles[0] < 20
    assert model.expect(CHAT, "new").quantiles[0] > 500
    assert 20 < model.expect(TaskType.PLANNING, "new").quantiles[0] < 500
    for tokens in lengths(40, 200):
        model.observe(CODE, "new", tokens)
    assert 80 < model.expect(CODE, "new").quantiles[0] < 250


def test_forgets() -> None:
    model = OutputLength(LengthPolicy(window=100))
    for tokens in (*lengths(500, 1000), *lengths(300, 20)):
        model.observe(CHAT, "m", tokens)
    assert model.expect(CHAT, "m").quantiles[0] < 40


def test_is_bounded_by_the_limit() -> None:
    model, seen = OutputLength(), lengths(400, 300)
    for tokens in seen:
        model.observe(CHAT, "m", tokens)
    length = model.expect(CHAT, "m", max_tokens=256)
    assert length.mean == pytest.approx(np.mean(np.minimum(seen, 256)), rel=0.15)
    assert length.quantiles == pytest.approx((256, 256))
    assert model.expect(CHAT, "m", max_tokens=1) == model.expect(CHAT, "m", max_tokens=0)


def test_an_answer_that_was_cut_would_have_been_longer() -> None:
    naive, censored, seen = OutputLength(), OutputLength(), lengths(500, 400)
    for number, tokens in enumerate(seen):
        limit = 10**6 if number % 3 == 0 else 200
        naive.observe(CHAT, "m", min(tokens, limit))
        censored.observe(CHAT, "m", min(tokens, limit), cut=tokens > limit)
    median, high = np.quantile(seen, [0.5, 0.9])
    assert naive.expect(CHAT, "m").quantiles[0] < 0.6 * median
    assert censored.expect(CHAT, "m").quantiles == pytest.approx((median, high), rel=0.25)
    # Where no answer was ever let go on, nobody knows, but that they are longer.
    blind = OutputLength()
    for tokens in seen:
        blind.observe(CHAT, "m", min(tokens, 500), cut=tokens > 500)
    assert 700 < blind.expect(CHAT, "m").quantiles[1] < 3000


def test_what_is_left_after_what_was_produced() -> None:
    model, seen = OutputLength(), lengths(500, 100)
    for tokens in seen:
        model.observe(CHAT, "m", tokens)
    longer = [tokens for tokens in seen if tokens >= 200]
    length = model.expect(CHAT, "m", produced=200)
    assert length.mean == pytest.approx(np.mean(longer), rel=0.2)
    assert length.quantiles[0] >= 200
    assert model.expect(CHAT, "m", max_tokens=200, produced=300).mean == 200


def test_memory_is_bounded() -> None:
    model = OutputLength(LengthPolicy(kept=10))
    for number in range(50):
        model.observe(CHAT, f"m{number}", 10)
        model.expect(CHAT, f"m{number}")
        model.expect(CHAT, f"never-{number}")
    kinds = len(TaskType)
    assert len(model.state()) <= 10 + kinds + 1
    assert len(model._cache) <= 10


def test_outlives_the_process_and_leaves_out_what_cannot_be() -> None:
    model = OutputLength()
    for tokens in lengths(100, 30):
        model.observe(CODE, "m", tokens)
    wire = msgspec.json.encode(model.state())
    again = OutputLength()
    again.restore(msgspec.json.decode(wire, type=tuple[HistogramState, ...]))
    assert again.expect(CODE, "m").mean == pytest.approx(model.expect(CODE, "m").mean, rel=0.05)
    broken = OutputLength()
    broken.restore([
        HistogramState(2**20, "", (1.0,) * BINS), HistogramState(0, "", (1.0,)), HistogramState(1, "m", (-1.0,) * BINS),
        HistogramState(1, "m", (math.nan,) * BINS),
    ])  # fmt: skip
    assert broken.state() == ()
    assert json.loads(wire)


anything = st.floats(allow_nan=True, allow_infinity=True) | st.integers(-5, 10**7)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(anything, st.booleans()), max_size=30), st.none() | anything, anything)
def test_stays_sensible_whatever_comes(seen: list[tuple[float, bool]], most: float | None, produced: float) -> None:
    model = OutputLength()
    for tokens, cut in seen:
        model.observe(CHAT, "m", tokens, cut=cut)
    length = model.expect(CHAT, "m", most, produced)
    assert 1 <= length.mean < math.inf
    assert 1 <= length.quantiles[0] <= length.quantiles[1] < math.inf
    if most is not None and most >= 1:
        assert max(length.mean, *length.quantiles) <= most


@pytest.mark.parametrize(
    ("name", "bad"),
    [("levels", (0.0,)), ("expected_tokens", 0), ("kin_weight", 0.0), ("window", 1.0), ("kept", 0)],
)
def test_a_bad_value_is_named(name: str, bad: object) -> None:
    with pytest.raises(ValueError, match=name):
        LengthPolicy(**{name: bad})  # type: ignore[arg-type]
