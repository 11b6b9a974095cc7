"""How well and how fast latency is predicted, by several methods, on the given traces.

    python -m tests.benchmarks.prediction AZURE.csv MOONCAKE.jsonl [--seed N]

Every method sees the same log in the same order: it predicts at dispatch, and learns when the first token and when the
last one comes. Boosted trees take part where lightgbm is installed.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from time import thread_time
from typing import NamedTuple, Protocol

import numpy as np

from control_plane.domain.model import ModelName, Provider, ServerId
from control_plane.prediction.features import Features, Kin, RowKey, predict, tpot, ttft
from control_plane.prediction.latency import LatencyModel
from tests.benchmarks.prediction_data import FLEET, Arrival, Host, Request, azure, generate, mooncake

try:
    import lightgbm
except ImportError:
    lightgbm = None

Quantiles = tuple[float, float]
Log = list[tuple[float, str, Request]]


class Told(NamedTuple):
    """At dispatch, seconds."""

    ttft: Quantiles
    """0.5, 0.9."""
    tpot: Quantiles
    promised: tuple[float, float] = (0.0, 0.0)
    """Medians before calibration."""


NOTHING = Told((0.0, 0.0), (0.0, 0.0))


class Method(Protocol):
    def predict(self, host: Host, features: Features, now: float) -> Told: ...

    def observe(
        self, host: Host, features: Features, first: float | None, each: float | None, now: float, told: Told = NOTHING
    ) -> None: ...


class Pooled:
    """Ours."""

    def __init__(self, kin: Callable[[Host], Kin] = lambda host: host.kin) -> None:
        self.model = LatencyModel()
        self._kin = kin
        self._declared: set[int] = set()

    def _key(self, host: Host, now: float) -> RowKey:
        key = ServerId(f"{host.name}-{host.number}"), ModelName("model"), Provider("engine")
        if host.number not in self._declared:
            self._declared.add(host.number)
            self.model.declare(key, self._kin(host), now)
        return key

    def predict(self, host: Host, features: Features, now: float) -> Told:
        coefficients = self.model.coefficients(self._key(host, now), now)
        first, each = predict(coefficients, features)
        promised = (
            ttft(coefficients, features.uncached_tokens, features.backlog_tokens, features.waiting),
            tpot(coefficients, features.streams),
        )
        return Told((first[0], first[1]), (each[0], each[1]), promised)

    def observe(
        self, host: Host, features: Features, first: float | None, each: float | None, now: float, told: Told = NOTHING
    ) -> None:
        self.model.observe(
            self._key(host, now), features, first, each, now,
            promised_ttft=told.promised[0], promised_tpot=told.promised[1],
        )  # fmt: skip


class Average:
    """The moving averages that there were before: alpha 0.2, blind to the request. The 0.9 quantile as if normal, with
    a moving average of the squared error."""

    ALPHA = 0.2

    def __init__(self) -> None:
        self._state: dict[tuple[int, int], tuple[float, float]] = {}

    def predict(self, host: Host, features: Features, now: float) -> Told:
        result = []
        for kind, prior in ((0, 0.5), (1, 0.05)):
            mean, variance = self._state.get((host.number, kind), (prior, prior**2))
            result.append((mean, mean + 1.28 * math.sqrt(variance)))
        return Told(result[0], result[1])

    def observe(
        self, host: Host, features: Features, first: float | None, each: float | None, now: float, told: Told = NOTHING
    ) -> None:
        for kind, value in ((0, first), (1, each)):
            if value is not None:
                mean, variance = self._state.get((host.number, kind), (value, 0.0))
                variance += self.ALPHA * ((value - mean) ** 2 - variance)
                self._state[host.number, kind] = mean + self.ALPHA * (value - mean), variance


class LeastSquares:
    """Recursive least squares with forgetting, one per host, relative errors; no pooling. The 0.9 quantile from a
    moving average of the squared relative error."""

    FORGET = 0.99

    def __init__(self) -> None:
        self._state: dict[tuple[int, int], tuple[np.ndarray, np.ndarray, float]] = {}

    def _inputs(self, features: Features, kind: int) -> np.ndarray:
        if kind:
            return np.array([1.0, features.streams])
        return np.array([1.0, features.uncached_tokens, features.backlog_tokens, features.waiting])

    def _get(self, host: Host, kind: int) -> tuple[np.ndarray, np.ndarray, float]:
        weights = np.array([0.04, 0.004]) if kind else np.array([0.2, 1e-3, 1e-3, 0.3])
        return self._state.get((host.number, kind), (weights, np.diag((2 * weights) ** 2), 0.09))

    def predict(self, host: Host, features: Features, now: float) -> Told:
        result = []
        for kind in (0, 1):
            weights, _, variance = self._get(host, kind)
            median = max(float(weights @ self._inputs(features, kind)), 1e-4)
            result.append((median, median * math.exp(1.28 * math.sqrt(variance))))
        return Told(result[0], result[1])

    def observe(
        self, host: Host, features: Features, first: float | None, each: float | None, now: float, told: Told = NOTHING
    ) -> None:
        for kind, value in ((0, first), (1, each)):
            if value is None:
                continue
            weights, covariance, variance = self._get(host, kind)
            raw = self._inputs(features, kind)
            error = min(max(math.log(value / max(float(weights @ raw), 1e-4)), -3.0), 3.0)
            inputs = raw / value
            gain = covariance @ inputs / (self.FORGET * 0.09 + float(inputs @ covariance @ inputs))
            weights = np.maximum(weights + gain * (1.0 - float(weights @ inputs)), 0.0)
            covariance = (covariance - np.outer(gain, inputs @ covariance)) / self.FORGET
            covariance *= min(1.0, 1e6 / max(float(np.trace(covariance)), 1e-12))
            self._state[host.number, kind] = weights, covariance, variance + 0.05 * (error**2 - variance)


class Trees:
    """Gradient-boosted quantile trees of ln(seconds), trained anew on the latest answers of all hosts."""

    EVERY, LATEST = 250, 4000

    def __init__(self) -> None:
        self._rows: tuple[list[list[float]], list[list[float]]] = ([], [])
        self._values: tuple[list[float], list[float]] = ([], [])
        self._models: dict[tuple[int, float], object] = {}
        self._fallback = Average()
        self.seconds = 0.0
        """Spent on training."""

    @staticmethod
    def _inputs(host: Host, features: Features) -> list[float]:
        return [
            float(host.number), float(FLEET.index(host.name)), features.uncached_tokens, features.backlog_tokens,
            features.uncached_tokens + features.backlog_tokens, features.streams, features.waiting,
        ]  # fmt: skip

    def predict(self, host: Host, features: Features, now: float) -> Told:
        result = list(self._fallback.predict(host, features, now))
        row = np.array([self._inputs(host, features)])
        for kind in (0, 1):
            if (kind, 0.5) in self._models:
                low, high = (math.exp(self._models[kind, level].predict(row, num_threads=1)[0]) for level in (0.5, 0.9))  # type: ignore[attr-defined]
                result[kind] = low, max(low, high)
        return Told(result[0], result[1])

    def observe(
        self, host: Host, features: Features, first: float | None, each: float | None, now: float, told: Told = NOTHING
    ) -> None:
        self._fallback.observe(host, features, first, each, now)
        for kind, value in ((0, first), (1, each)):
            if value is None:
                continue
            rows, values = self._rows[kind], self._values[kind]
            rows.append(self._inputs(host, features))
            values.append(math.log(max(value, 1e-5)))
            if len(values) % self.EVERY == 0:
                began = thread_time()
                for level in (0.5, 0.9):
                    data = lightgbm.Dataset(
                        np.array(rows[-self.LATEST :]), np.array(values[-self.LATEST :]), categorical_feature=[0, 1]
                    )
                    self._models[kind, level] = lightgbm.train(
                        {
                            "objective": "quantile", "alpha": level, "num_leaves": 15, "learning_rate": 0.1,
                            "min_data_in_leaf": 10, "verbose": -1, "num_threads": 1,
                        },
                        data, 80,
                    )  # fmt: skip
                self.seconds += thread_time() - began


class Scores:
    """Of one method: errors relative to the larger of observation and median, how often the 0.9 quantile held, and its
    pinball loss in logarithms."""

    def __init__(self) -> None:
        self.errors: list[float] = []
        self.held: list[bool] = []
        self.pinball: list[float] = []

    def add(self, quantiles: Quantiles, observed: float) -> None:
        median, high = quantiles
        self.errors.append(1 - min(observed, median) / max(observed, median))
        self.held.append(observed <= high)
        gap = math.log(observed / max(high, 1e-9))
        self.pinball.append(max(0.9 * gap, -0.1 * gap))

    def row(self) -> str:
        median, high = np.quantile(self.errors, [0.5, 0.9])
        return f"{median:6.1%} {high:6.1%} {np.mean(self.held):6.1%} {np.mean(self.pinball):6.3f}"


def replay(method: Method, hosts: list[Host], log: Log) -> tuple[Scores, Scores, float, float]:
    """Scores of TTFT and TPOT, microseconds per prediction and per observation of one kind."""
    first, each = Scores(), Scores()
    told: dict[int, Told] = {}
    spent, observations = [0.0, 0.0], 0
    for at, event, request in log:
        host = hosts[request.host]
        began = thread_time()
        if event == "dispatch":
            told[id(request)] = method.predict(host, request.features, at)
            spent[0] += thread_time() - began
            continue
        if event == "first":
            method.observe(host, request.answered, request.ttft, None, at, told[id(request)])
            spent[1] += thread_time() - began
            observations += 1
            first.add(told[id(request)].ttft, request.ttft)
        elif request.tpot is not None:
            method.observe(host, request.answered, None, request.tpot, at, told[id(request)])
            spent[1] += thread_time() - began
            observations += 1
            each.add(told[id(request)].tpot, request.tpot)
    return first, each, spent[0] / len(told) * 1e6, spent[1] / max(observations, 1) * 1e6


def cold_start(
    hosts: list[Host], log: Log, target: int, counts: Iterable[int], kin: Callable[[Host], Kin], *, alone: bool
) -> dict[int, float]:
    """Median relative error of TTFT over the first 300 answers of a host that was observed so many times; `alone`: no
    other host was observed before."""
    answers = [request for _, event, request in log if event == "first" and request.host == target]
    result = {}
    for seen in counts:
        method = Pooled(kin)
        if not alone:
            for at, event, request in log:
                if event == "first" and request.host != target:
                    method.observe(hosts[request.host], request.answered, request.ttft, None, at)
        now = log[-1][0] if not alone else 0.0
        for request in answers[:seen]:
            method.observe(hosts[target], request.answered, request.ttft, None, now)
        scores = Scores()
        for request in answers[10:310]:
            scores.add(method.predict(hosts[target], request.features, now).ttft, request.ttft)
        result[seen] = float(np.median(scores.errors))
    return result


def drift(method: Method, arrivals: list[Arrival], seed: int) -> tuple[float, float]:
    """Answers until the error of TTFT is back under 50% (mean of 3 in a row) after host 0 became ten times slower for
    the middle third of the trace, and after it recovered."""
    begin, end = arrivals[len(arrivals) // 3].at, arrivals[2 * len(arrivals) // 3].at
    hosts, log = generate(arrivals, seed, lambda host, at: 10.0 if host == 0 and begin <= at < end else 1.0)
    errors: list[tuple[float, float]] = []
    for at, event, request in log:
        host = hosts[request.host]
        if event == "first":
            # What it would say just before it learns.
            median = method.predict(host, request.answered, at).ttft[0]
            if request.host == 0:
                errors.append((at, abs(math.log(request.ttft / median))))
            method.observe(host, request.answered, request.ttft, None, at)

    def until(time: float) -> float:
        later = [error for at, error in errors if at >= time]
        return next((n for n in range(len(later) - 3) if np.mean(later[n : n + 3]) < math.log(1.5)), math.inf)

    return until(begin), until(end)


def methods() -> dict[str, Callable[[], Method]]:
    found: dict[str, Callable[[], Method]] = {"average": Average, "least squares": LeastSquares, "pooled": Pooled}
    if lightgbm is not None:
        found["trees"] = Trees
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("azure", type=Path)
    parser.add_argument("mooncake", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    for name, read, path in (("azure", azure, args.azure), ("mooncake", mooncake, args.mooncake)):
        for load in (0.25, 0.4):
            hosts, log = generate(read(path, load), args.seed)
            print(f"\n{name}, load {load}: relative error p50, p90; 0.9 quantile holds, its pinball loss; us per call")
            print(f"{'':16}{'TTFT':^30}{'TPOT':^30}{'predict':>9}{'observe':>9}")
            for label, make in methods().items():
                method = make()
                first, each, predicting, observing = replay(method, hosts, log)
                extra = f"  (training {method.seconds:.1f} s)" if isinstance(method, Trees) else ""
                print(f"{label:16}{first.row():30}{each.row():30}{predicting:9.1f}{observing:9.1f}{extra}")
        hosts, log = generate(read(path, 0.25), args.seed)
        print("\ncold start: median relative error of TTFT after so many answers (target gpu-1, mac-3, cpu-6)")
        for label in ("nothing known", "same engine only", "same hardware"):
            for target in (1, 3, 6):

                def kin(host: Host, label: str = label, target: int = target) -> Kin:
                    new = label == "same engine only" and host.number == target
                    return Kin("engine", "new", "model", "fp") if new else host.kin

                errors = cold_start(hosts, log, target, (0, 1, 3, 10), kin, alone=label == "nothing known")
                print(f"{label:18}{FLEET[target]:5}", "  ".join(f"{n}: {error:7.1%}" for n, error in errors.items()))
        print("\nanswers until 10x slower is learned, and recovery (error of TTFT < 50%)")
        for label, make in methods().items():
            if label != "trees":
                slower, again = drift(make(), read(path, 0.2), args.seed)
                print(f"{label:16}{slower:5.0f}{again:5.0f}")


if __name__ == "__main__":
    main()
