"""LatencyModel: what it learns, from whom, how fast, and what it does not let itself be told."""

from __future__ import annotations

import json
import math
import random
import sys
from collections.abc import Iterator

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from control_plane.domain.model import ModelName, Provider, ServerId
from control_plane.prediction.features import Coefficients, Features, Kin, RowKey, predict, tpot, ttft
from control_plane.prediction.latency import LatencyModel
from control_plane.prediction.policy import LatencyPolicy
from control_plane.prediction.state import LatencyState

GPU = Kin("vllm", "gpu", "llama", "a")
MAC = Kin("mlx", "mac", "llama", "b")


def key(name: str) -> RowKey:
    return ServerId(name), ModelName("llama"), Provider("local")


class Host:
    """Answers as its speed says, times a noise of about `noise`."""

    def __init__(self, prefill: float, *, base: float = 0.05, decode: float = 0.02, noise: float = 0.1, seed: int = 1):
        self.prefill, self.base, self.decode, self.noise = prefill, base, decode, noise
        self.random = random.Random(seed)

    def request(self) -> Features:
        pick = self.random.choice
        return Features(pick((100, 1000, 4000)), 0, pick((0, 0, 1000, 8000)), pick((0, 1, 4)))

    def ttft(self, features: Features) -> float:
        exact = self.base + (features.uncached_tokens + features.backlog_tokens) / self.prefill
        return exact * self.random.lognormvariate(0, self.noise)

    def tpot(self, features: Features) -> float:
        return self.decode * (1 + 0.1 * features.streams) * self.random.lognormvariate(0, self.noise)

    def teach(self, model: LatencyModel, row: RowKey, count: int, now: float = 0.0, slow: float = 1.0) -> float:
        for _ in range(count):
            now += 1.0
            features = self.request()
            model.observe(row, features, slow * self.ttft(features), slow * self.tpot(features), now)
        return now


def error(model: LatencyModel, row: RowKey, host: Host, now: float, slow: float = 1.0) -> float:
    """Mean |ln(true median TTFT / predicted)|."""
    coefficients = model.coefficients(row, now)
    errors = []
    for prompt in (200, 1000, 4000):
        for backlog in (0, 4000):
            features = Features(prompt, 0, backlog)
            true = slow * (host.base + (prompt + backlog) / host.prefill)
            errors.append(abs(math.log(true / predict(coefficients, features)[0][0])))
    return sum(errors) / len(errors)


# ------------------------------------------------------------------ learning ---


@pytest.mark.parametrize("prefill", [100.0, 10_000.0])
def test_learns_a_host_of_any_speed_from_a_few_answers(prefill: float) -> None:
    model, host = LatencyModel(), Host(prefill, base=500 / prefill)
    model.declare(key("h"), GPU, 0.0)
    assert model.coefficients(key("h"), 0.0).evidence == 0
    before = error(model, key("h"), host, 0.0)
    now = host.teach(model, key("h"), 3)
    assert error(model, key("h"), host, now) < min(0.5, before / 3)
    now = host.teach(model, key("h"), 60, now)
    assert error(model, key("h"), host, now) < 0.12
    learned = model.coefficients(key("h"), now)
    assert learned.per_prompt_token == pytest.approx(1 / prefill, rel=0.25)
    assert learned.per_backlog_token == pytest.approx(1 / prefill, rel=0.25)
    assert learned.tpot_base == pytest.approx(0.02, rel=0.15)
    assert learned.tpot_per_stream == pytest.approx(0.002, rel=0.5)
    assert 50 < learned.evidence <= 63


def test_a_guess_is_wide_and_narrows() -> None:
    model, host = LatencyModel(), Host(1000)
    model.declare(key("h"), GPU, 0.0)
    spreads = [model.coefficients(key("h"), 0.0).ttft_spread[1]]
    now = 0.0
    for count in (1, 3, 30):
        now = host.teach(model, key("h"), count, now)
        spreads.append(model.coefficients(key("h"), now).ttft_spread[1])
    assert spreads == sorted(spreads, reverse=True)
    assert spreads[0] > 8 and spreads[-1] < 1.5


def test_outliers_do_not_ruin_it() -> None:
    model, host = LatencyModel(), Host(1000)
    model.declare(key("h"), GPU, 0.0)
    now = host.teach(model, key("h"), 50)
    before = error(model, key("h"), host, now)
    for number in range(100):
        features = host.request()
        factor = 100.0 if number % 20 == 7 else 1.0
        now += 1
        model.observe(key("h"), features, factor * host.ttft(features), None, now)
        assert error(model, key("h"), host, now) < before + 0.35
    assert error(model, key("h"), host, now) < 0.2


def test_a_slowdown_and_the_recovery_are_learned_within_a_few_answers() -> None:
    model, host = LatencyModel(), Host(1000)
    model.declare(key("h"), GPU, 0.0)
    now = host.teach(model, key("h"), 300)
    assert error(model, key("h"), host, now) < 0.1
    now = host.teach(model, key("h"), 3, now, slow=10.0)
    assert error(model, key("h"), host, now, slow=10.0) < 0.3
    assert model.coefficients(key("h"), now).tpot_base == pytest.approx(0.2, rel=0.3)
    now = host.teach(model, key("h"), 3, now)
    assert error(model, key("h"), host, now) < 0.3


def test_a_creeping_drift_is_followed() -> None:
    model, host = LatencyModel(), Host(1000)
    model.declare(key("h"), GPU, 0.0)
    now, slow = host.teach(model, key("h"), 100), 1.0
    for _ in range(200):
        slow *= 1.01
        now = host.teach(model, key("h"), 1, now, slow=slow)
    assert slow > 7
    assert error(model, key("h"), host, now, slow) < 0.25


def test_a_cold_answer_says_nothing_of_the_first_token() -> None:
    model = LatencyModel()
    model.declare(key("h"), GPU, 0.0)
    before = model.coefficients(key("h"), 1.0)
    model.observe(key("h"), Features(100, cold=True), 40.0, None, 1.0)
    assert model.coefficients(key("h"), 1.0) == before
    model.observe(key("h"), Features(100, cold=True), 40.0, 0.02, 1.0)
    assert model.coefficients(key("h"), 1.0).tpot_base < before.tpot_base


# -------------------------------------------------------------------- pooling ---


def test_a_new_host_starts_from_its_kin_and_not_from_others() -> None:
    model, gpu, mac = LatencyModel(), Host(10_000), Host(500, decode=0.1)
    for name in ("gpu-1", "gpu-2"):
        model.declare(key(name), GPU, 0.0)
        gpu.teach(model, key(name), 40)
    for name in ("mac-1", "mac-2"):
        model.declare(key(name), MAC, 0.0)
        mac.teach(model, key(name), 40)
    model.declare(key("gpu-3"), GPU, 50.0)
    model.declare(key("mac-3"), MAC, 50.0)
    assert error(model, key("gpu-3"), gpu, 50.0) < 0.2
    assert error(model, key("mac-3"), mac, 50.0) < 0.2
    fresh, known = model.coefficients(key("mac-3"), 50.0), model.coefficients(key("mac-1"), 50.0)
    assert fresh.evidence == 0
    assert fresh.ttft_spread[1] > known.ttft_spread[1]


def test_the_nearer_the_kin_the_nearer_the_guess() -> None:
    model, gpu = LatencyModel(), Host(50_000, base=0.01)
    for number in range(3):
        model.declare(key(f"gpu-{number}"), GPU, 0.0)
        gpu.teach(model, key(f"gpu-{number}"), 40)
    errors = []
    for number, kin in enumerate((
        GPU, Kin("vllm", "gpu", "llama", "other"), Kin("vllm", "gpu", "qwen"), Kin("vllm", "tpu", "qwen"), MAC,
    )):  # fmt: skip
        model.declare(key(f"new-{number}"), kin, 50.0)
        errors.append(error(model, key(f"new-{number}"), gpu, 50.0))
    assert errors == sorted(errors)
    assert errors[0] < 0.2 < errors[-1]


def test_kin_that_learn_later_move_a_row_that_knows_nothing_yet() -> None:
    model, host = LatencyModel(), Host(50_000)
    model.declare(key("new"), GPU, 0.0)
    model.declare(key("old"), GPU, 0.0)
    assert set(model.moved(0.0)) == {key("new"), key("old")}
    assert model.moved(0.0) == []
    now = host.teach(model, key("old"), 30)
    assert set(model.moved(now)) == {key("new"), key("old")}
    assert error(model, key("new"), host, now) < 0.3
    assert model.moved(now) == []


def test_a_row_of_its_own_mind_is_not_moved_by_kin() -> None:
    model, fast, slow = LatencyModel(), Host(10_000), Host(500)
    model.declare(key("slow"), GPU, 0.0)
    model.declare(key("fast"), GPU, 0.0)
    now = slow.teach(model, key("slow"), 30)
    now = fast.teach(model, key("fast"), 100, now)
    assert error(model, key("slow"), slow, now) < 0.25


def test_a_host_that_is_gone_is_remembered_by_its_kin() -> None:
    model, host = LatencyModel(), Host(50_000)
    model.declare(key("old"), GPU, 0.0)
    now = host.teach(model, key("old"), 40)
    model.forget(key("old"))
    model.forget(key("old"))
    assert len(model) == 0
    with pytest.raises(KeyError):
        model.coefficients(key("old"), now)
    model.declare(key("new"), GPU, now)
    assert error(model, key("new"), host, now) < 0.3


def test_another_fingerprint_begins_anew_the_same_does_not() -> None:
    model, host = LatencyModel(), Host(50_000)
    model.declare(key("h"), GPU, 0.0)
    now = host.teach(model, key("h"), 40)
    learned = model.coefficients(key("h"), now)
    model.declare(key("h"), Kin("vllm", "gpu", "llama", "a", ttft=9.0), now)
    assert model.coefficients(key("h"), now) == learned
    model.declare(key("h"), Kin("vllm", "gpu", "llama", "quantized"), now)
    assert model.coefficients(key("h"), now).evidence == 0


def test_what_a_server_says_is_believed_until_it_is_measured() -> None:
    model, host = LatencyModel(), Host(1000, decode=0.1)
    model.declare(key("silent"), Kin("e", "d", "m"), 0.0)
    model.declare(key("h"), Kin("e", "d", "m", prefill=10_000, decode=100), 0.0)
    told = model.coefficients(key("h"), 0.0)
    assert told.per_prompt_token == pytest.approx(1 / 10_000, rel=0.9)
    assert told.tpot_base == pytest.approx(1 / 100, rel=0.5)
    assert told.ttft_spread[1] < model.coefficients(key("silent"), 0.0).ttft_spread[1]
    # It boasted.
    now = host.teach(model, key("h"), 10)
    assert error(model, key("h"), host, now) < 0.3
    assert model.coefficients(key("h"), now).tpot_base == pytest.approx(0.1, rel=0.3)


@pytest.mark.parametrize("told", [math.nan, math.inf, -1.0, 0.0, 1e-300, 1e300])
def test_nonsense_that_a_server_says_is_survived(told: float) -> None:
    model = LatencyModel()
    model.declare(key("h"), Kin("e", "d", "m", prefill=told, decode=told, ttft=told, tpot=told), 0.0)
    assert_physical(model.coefficients(key("h"), 0.0))


# -------------------------------------------------------------------- overdue ---


def test_a_host_that_hangs_is_seen_before_it_answers() -> None:
    model, host = LatencyModel(), Host(1000)
    model.declare(key("h"), GPU, 0.0)
    now = host.teach(model, key("h"), 60)
    waiting, known = Features(1000), model.coefficients(key("h"), now)
    expected = predict(known, waiting)[0][0]
    model.overdue(key("h"), waiting, expected * 1.1, now)
    assert model.coefficients(key("h"), now) == known, "that is still ordinary"
    model.moved(now)
    model.overdue(key("h"), waiting, expected * 8, now)
    assert predict(model.coefficients(key("h"), now), waiting)[0][0] == pytest.approx(expected * 8, rel=0.1)
    model.overdue(key("h"), waiting, expected * 4, now)
    assert predict(model.coefficients(key("h"), now), waiting)[0][0] == pytest.approx(expected * 8, rel=0.1)
    assert model.moved(now) == [key("h")]


def test_any_wait_tells_of_a_host_that_is_not_known() -> None:
    model, waiting = LatencyModel(), Features(1000)
    model.declare(key("h"), GPU, 0.0)
    expected = predict(model.coefficients(key("h"), 0.0), waiting)[0][0]
    believed = [expected]
    for share in (0.1, 0.3, 1.0, 3.0, 30.0, 3000.0):
        model.overdue(key("h"), waiting, expected * share, 0.0)
        believed.append(predict(model.coefficients(key("h"), 0.0), waiting)[0][0])
    assert believed == sorted(believed)
    assert 2 * expected < believed[3] < 10 * expected
    assert 1000 * expected < believed[-1] < 10_000 * expected
    model.observe(key("h"), waiting, expected / 10, None, 1.0)
    assert predict(model.coefficients(key("h"), 1.0), waiting)[0][0] < expected / 3, "the answer is what counts"


def test_suspicion_ends_with_answers_and_with_time() -> None:
    def suspected() -> tuple[LatencyModel, Host, float, float]:
        model, host = LatencyModel(), Host(1000)
        model.declare(key("h"), GPU, 0.0)
        now = host.teach(model, key("h"), 60)
        expected = predict(model.coefficients(key("h"), now), Features(1000))[0][0]
        model.overdue(key("h"), Features(1000), expected * 50, now)
        return model, host, now, expected

    model, host, now, expected = suspected()
    now = host.teach(model, key("h"), 3, now)
    assert error(model, key("h"), host, now) < 0.3

    model, host, now, expected = suspected()
    model.moved(now)
    later = now + 30
    halved = predict(model.coefficients(key("h"), later), Features(1000))[0][0]
    assert halved == pytest.approx(expected * math.sqrt(50), rel=0.1)
    assert model.moved(later) == [key("h")], "it changes as time passes"
    assert model.moved(now + 1000) == [key("h")]
    assert model.moved(now + 1001) == []
    assert error(model, key("h"), host, now + 1000) < 0.2


def test_a_cold_or_unknown_row_is_never_overdue() -> None:
    model = LatencyModel()
    model.declare(key("h"), GPU, 0.0)
    before = model.coefficients(key("h"), 1.0)
    model.overdue(key("h"), Features(10, cold=True), 1e4, 1.0)
    model.overdue(key("x"), Features(10), 1e4, 1.0)
    model.overdue(key("h"), Features(10), math.nan, 1.0)
    assert model.coefficients(key("h"), 1.0) == before


# ---------------------------------------------------------------- calibration ---


@pytest.mark.parametrize("heavy", [False, True])
def test_quantiles_hold_as_often_as_they_say(heavy: bool) -> None:
    model, host = LatencyModel(), Host(1000, noise=0.3, seed=3)
    model.declare(key("h"), GPU, 0.0)
    held = np.zeros((2, 2))
    now, count = host.teach(model, key("h"), 100), 1500
    for _ in range(count):
        now += 1
        features = host.request()
        first, each = host.ttft(features), host.tpot(features)
        if heavy:
            first *= host.random.paretovariate(2.5)
        told = model.coefficients(key("h"), now)
        quantiles = predict(told, features)
        held += np.array([[first <= at for at in quantiles[0]], [each <= at for at in quantiles[1]]])
        model.observe(
            key("h"), features, first, each, now,
            promised_ttft=ttft(told, features.uncached_tokens, features.backlog_tokens, 0.0),
            promised_tpot=tpot(told, features.streams),
        )  # fmt: skip
    assert held[:, 0] / count == pytest.approx([0.5, 0.5], abs=0.06)
    assert held[:, 1] / count == pytest.approx([0.9, 0.9], abs=0.04)


def test_quantiles_learn_from_what_was_promised_not_from_hindsight() -> None:
    """Promises that are always half of what comes, while what would be said now is right."""
    model, host = LatencyModel(), Host(1000, noise=0.05)
    model.declare(key("h"), GPU, 0.0)
    now = 0.0
    for _ in range(300):
        now += 1
        features = host.request()
        first = host.ttft(features)
        model.observe(key("h"), features, first, None, now, promised_ttft=first / 2)
    assert model.coefficients(key("h"), now).ttft_spread == pytest.approx((2.0, 2.0), rel=0.25)


def test_levels_are_configurable() -> None:
    model, host = LatencyModel(LatencyPolicy(levels=(0.25, 0.5, 0.99))), Host(1000, noise=0.3)
    model.declare(key("h"), GPU, 0.0)
    now = host.teach(model, key("h"), 100)
    low, middle, high = model.coefficients(key("h"), now).ttft_spread
    assert low < middle < high and low < 1 < high


# ------------------------------------------------------------- whatever comes ---


def assert_physical(coefficients: Coefficients[float]) -> None:
    single = (
        coefficients.base, coefficients.per_prompt_token, coefficients.per_backlog_token, coefficients.per_waiting,
        coefficients.tpot_base, coefficients.tpot_per_stream, coefficients.evidence,
    )  # fmt: skip
    for value in (*single, *coefficients.ttft_spread, *coefficients.tpot_spread):
        assert 0 <= value < math.inf
    assert list(coefficients.ttft_spread) == sorted(coefficients.ttft_spread)
    assert list(coefficients.tpot_spread) == sorted(coefficients.tpot_spread)


anything = st.floats(allow_nan=True, allow_infinity=True)
absurd = st.builds(Features, anything, anything, anything, anything, anything, anything, st.booleans())
seconds = st.none() | anything | st.floats(1e-6, 1e5)
calls = st.sampled_from(("observe", "overdue", "forget", "declare"))
steps = st.lists(
    st.tuples(calls, absurd, seconds, seconds, st.floats(0, 1e7)),
    max_size=40,
)


@settings(max_examples=60, deadline=None)
@given(steps)
def test_stays_physical_and_monotone_whatever_comes(steps: list[tuple[str, Features, float, float, float]]) -> None:
    model, now = LatencyModel(), 0.0
    model.declare(key("h"), GPU, now)
    model.declare(key("kin"), GPU, now)
    for what, features, first, second, elapsed in steps:
        now += elapsed
        if what == "observe":
            model.observe(key("h"), features, first, second, now, promised_ttft=second, promised_tpot=first)
        elif what == "overdue":
            model.overdue(key("h"), features, first if first is not None else 1.0, now)
        elif what == "forget":
            model.forget(key("h"))
        else:
            model.declare(key("h"), Kin("vllm", "gpu", "llama", "a", first, second, first, second), now)
    model.declare(key("h"), GPU, now)
    for row in (key("h"), key("kin")):
        coefficients = model.coefficients(row, now)
        assert_physical(coefficients)
        smaller = predict(coefficients, Features(100, 0, 100, 1, 0))
        larger = predict(coefficients, Features(200, 0, 300, 2, 1))
        assert all(a <= b for few, many in zip(smaller, larger, strict=True) for a, b in zip(few, many, strict=True))
        assert predict(coefficients, Features(1000, 600))[0] <= predict(coefficients, Features(1000, 0))[0]
        for quantile in (*predict(coefficients, Features(math.nan, -1, math.inf))[0],):
            assert 0 <= quantile < math.inf


def test_recovers_from_absurd_answers() -> None:
    model, host = LatencyModel(), Host(1000)
    model.declare(key("h"), GPU, 0.0)
    now = host.teach(model, key("h"), 20)
    for value in (1e300, 1e-300, 0.0, -5.0, math.nan, math.inf) * 10:
        now += 1
        model.observe(key("h"), Features(1e300, math.nan, -3, math.inf), value, value, now)
    now = host.teach(model, key("h"), 40, now)
    assert error(model, key("h"), host, now) < 0.3


def test_unknown_rows_are_ignored() -> None:
    model = LatencyModel()
    model.observe(key("h"), Features(10), 1.0, 0.1, 0.0)
    assert len(model) == 0 and model.moved(0.0) == []


def sizes(value: object) -> Iterator[int]:
    """Of everything that is reachable, in bytes."""
    seen: set[int] = set()
    stack = [value]
    while stack:
        one = stack.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        yield sys.getsizeof(one)
        if isinstance(one, dict):
            stack += [*one.keys(), *one.values()]
        elif isinstance(one, (list, tuple, set)) or type(one).__name__ in ("deque", "OrderedDict"):
            stack += list(one)
        else:
            stack += [getattr(one, name) for name in getattr(type(one), "__slots__", ())]
            stack += list(getattr(one, "__dict__", {}).values())


def test_memory_is_bounded() -> None:
    model, host = LatencyModel(LatencyPolicy(kept_groups=32)), Host(1000)
    model.declare(key("h"), GPU, 0.0)
    now = host.teach(model, key("h"), 10)
    before = sum(sizes(model))
    now = host.teach(model, key("h"), 500, now)
    assert sum(sizes(model)) < before * 1.1
    for number in range(300):
        model.declare(key("other"), Kin(f"e{number}", f"d{number}", f"m{number}"), now)
        host.teach(model, key("other"), 1, now)
    model.forget(key("other"))
    assert sum(sizes(model)) < before + 40_000


# ------------------------------------------------------------------- survival ---


def learned() -> tuple[LatencyModel, Host, float]:
    model, host = LatencyModel(), Host(5000)
    for name in ("a", "b", "gone"):
        model.declare(key(name), GPU, 0.0)
        now = host.teach(model, key(name), 30, 0.0)
    model.declare(key("blank"), MAC, 0.0)
    model.forget(key("gone"))
    return model, host, now


def test_what_was_learned_outlives_the_process() -> None:
    model, host, now = learned()
    wire = msgspec.json.encode(model.state(now))
    assert len(wire) < 5000
    again = LatencyModel()
    again.restore(msgspec.json.decode(wire, type=LatencyState), 7.0)
    assert len(again) == 2, "a row that has learned nothing is not kept"
    again.declare(key("a"), GPU, 7.0)
    old, new = model.coefficients(key("a"), now), again.coefficients(key("a"), 7.0)
    for name in ("base", "per_prompt_token", "per_backlog_token", "tpot_base", "evidence"):
        assert getattr(new, name) == pytest.approx(getattr(old, name), rel=0.05), name
    assert new.ttft_spread == pytest.approx(old.ttft_spread, rel=0.05)
    again.declare(key("new"), GPU, 7.0)
    assert error(again, key("new"), host, 7.0) < 0.3
    assert again.state(7.0).rows[0].mean == pytest.approx(model.state(now).rows[0].mean, rel=0.05)


def test_a_state_that_cannot_be_is_left_out() -> None:
    model, _, now = learned()
    state = json.loads(msgspec.json.encode(model.state(now)))
    state["rows"][0]["mean"][0] = math.nan
    state["rows"][1]["covariance"] = [-value for value in state["rows"][1]["covariance"]]
    state["groups"][0]["gone"] = [1.0]
    state["ratios"]["noise"] = [math.inf, 1.0]
    again = LatencyModel()
    again.restore(msgspec.convert(state, LatencyState), 0.0)
    assert len(again) == 0
    again.declare(key("a"), GPU, 0.0)
    assert_physical(again.coefficients(key("a"), 0.0))


def test_other_levels_keep_the_speed_and_begin_the_quantiles_anew() -> None:
    model, host, now = learned()
    again = LatencyModel(LatencyPolicy(levels=(0.5, 0.8, 0.95)))
    again.restore(model.state(now), 0.0)
    told = again.coefficients(key("a"), 0.0)
    assert len(told.ttft_spread) == 3
    assert error(again, key("a"), host, 0.0) < 0.2


# -------------------------------------------------------------------- columns ---


def test_formulas_work_on_columns_as_on_numbers() -> None:
    model, host = LatencyModel(), Host(1000)
    rows = [key(f"h{number}") for number in range(3)]
    for number, row in enumerate(rows):
        model.declare(row, GPU, 0.0)
        host.teach(model, row, 5 * number)
    single = [model.coefficients(row, 20.0) for row in rows]
    columns = Coefficients(
        *(np.array([getattr(one, name) for one in single]) for name in (
            "base", "per_prompt_token", "per_backlog_token", "per_waiting", "tpot_base", "tpot_per_stream",
        )), (), (), np.zeros(3),
    )  # fmt: skip
    uncached, backlog, waiting = np.array([10.0, 20.0, 0.0]), np.array([0.0, 500.0, 9.0]), np.array([0.0, 1.0, 2.0])
    together = ttft(columns, uncached, backlog, waiting)
    alone = [ttft(*of) for of in zip(single, uncached.tolist(), backlog.tolist(), waiting.tolist(), strict=True)]
    assert together.tolist() == pytest.approx(alone)
    assert tpot(columns, waiting).tolist() == pytest.approx(
        [tpot(of, streams) for of, streams in zip(single, waiting.tolist(), strict=True)]
    )


@pytest.mark.parametrize(
    ("name", "bad"),
    [("levels", ()), ("levels", (0.9, 0.5)), ("levels", (0.5, 1.0)), ("drift_per_minute", 0.0),
     ("overdue_half_life_s", math.inf), ("kept_groups", 3)],
)  # fmt: skip
def test_a_bad_value_is_named(name: str, bad: object) -> None:
    with pytest.raises(ValueError, match=name):
        LatencyPolicy(**{name: bad})  # type: ignore[arg-type]


def test_a_flood_of_answers_costs_no_more_than_a_stream_and_teaches_as_much() -> None:
    model, host = LatencyModel(), Host(1000.0)
    model.declare(key("h"), GPU, 0.0)
    now = host.teach(model, key("h"), 100)
    model.coefficients(key("h"), now)
    learned = 0
    for _ in range(5000):  # 2,500 a second, three times as slow from one to the next
        now += 1 / 2500
        features = host.request()
        model.observe(key("h"), features, 3 * host.ttft(features), 3 * host.tpot(features), now)
        if model.has_moved(key("h")):
            learned += 1
            model.coefficients(key("h"), now)
    most = model.policy.most_per_second
    assert most <= learned <= 3 * most + 1
    assert error(model, key("h"), host, now, slow=3.0) < 0.25


def test_a_row_that_is_suspected_learns_from_the_first_answer_of_a_flood() -> None:
    model, host = LatencyModel(LatencyPolicy(most_per_second=1e-9)), Host(1000.0)
    model.declare(key("h"), GPU, 0.0)
    now = host.teach(model, key("h"), 100)
    model.overdue(key("h"), Features(1000), 100.0, now)
    slow = model.coefficients(key("h"), now)
    model.observe(key("h"), Features(1000), host.ttft(Features(1000)), 0.02, now)
    assert model.coefficients(key("h"), now).base < slow.base / 2
