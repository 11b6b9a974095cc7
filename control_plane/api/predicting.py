"""Predictions of tasks: made when a task goes to its server, held to what it took, shown in GetTask and as metrics."""

from __future__ import annotations

import logging
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from control_plane.domain.errors import DomainError
from control_plane.domain.ports import Clock
from control_plane.fleet.grants import Grant
from control_plane.predictors.attempt import Attempt, Prediction, Question, hour_of
from control_plane.predictors.live import Foretold, Live, Role
from control_plane.predictors.scores import TARGETS
from control_plane.tasks.model import Claim
from control_plane.tasks.ports import Executor
from modelyard.program import privacy

log = logging.getLogger(__name__)

KEPT = 10_000
"""Attempts whose predictions are remembered, to be shown."""
_SLACK = 0.05
"""Seconds before its deadline at which an attempt that is cut off counts as cut off by it."""


@dataclass(frozen=True, slots=True)
class Shown:
    """What was predicted of an attempt."""

    version: str
    """Of a trained predictor, or "rules"."""
    prediction: Prediction
    cost_nano_usd: int
    """Of its tokens at the model's price, 1e-9 US dollars."""


class Foreteller:
    """Predicts attempts of tasks and learns from their ends."""

    def __init__(self, live: Live, clock: Clock, registry: CollectorRegistry) -> None:
        self.live = live
        self._clock = clock
        self._shown: OrderedDict[tuple[str, int], Shown] = OrderedDict()
        self._errors = Histogram(
            "modelyard_predictor_error",
            "Errors of predictions of tasks, by predictor (rules, promoted, shadow) and target: |ln(took / p50)| for "
            "seconds, the same for completion_tokens, |predicted - happened| for success.",
            ("predictor", "target"),
            buckets=(0.02, 0.05, 0.1, 0.2, 0.35, 0.7, 1.1, 1.6, 2.3, 4.6),
            registry=registry,
        )
        self.fallbacks = Counter(
            "modelyard_predictor_fallbacks",
            "Times that the rules took the place of a trained predictor, by why: unreadable, failed, or worse.",
            ("why",),
            registry=registry,
        )
        registry.register(_States(live))

    def of(self, task_id: str, number: int) -> Shown | None:
        """What was predicted of an attempt of a task; None: it was not here, or long ago."""
        return self._shown.get((task_id, number))

    def begin(self, claim: Claim, grant: Grant) -> Foretold:
        """An attempt begins."""
        flight, route = grant.flight, claim.lane.route
        question = Question(
            claim.record.task_type, flight.model, flight.provider, flight.server_id, route.prompt_tokens,
            route.max_tokens, claim.record.priority, hour_of(self._clock.wall()),
        )  # fmt: skip
        try:
            foretold = self.live.predict(question)
        except Exception as error:  # the library's: no task may fail for it
            log.error("trained predictors are out of use, the rules hold: %s", privacy.kind(error))
            self.fallbacks.labels("failed").inc()
            for role in (Role.PROMOTED, Role.SHADOW):
                self.live.put(role, "", None)
            foretold = self.live.predict(question)
        told = foretold.prediction
        cost = flight.price.nano_usd(question.prompt_tokens, 0, round(told.completion_tokens))
        self._shown[claim.id, claim.record.attempts] = Shown(foretold.version, told, cost)
        if len(self._shown) > KEPT:
            self._shown.popitem(last=False)
        return foretold

    def end(self, foretold: Foretold, at: float, seconds: float, *, ok: bool, tokens: int | None = None) -> None:
        """It has ended, after so many seconds."""
        attempt = Attempt(foretold.question, at, seconds, ok, tokens)
        before = self.live.worse
        for role in self.live.observe(foretold, attempt):
            for target, error in _errors(foretold.predictions[role], attempt).items():
                self._errors.labels(role.value, target).observe(error)
        if self.live.worse and not before:
            self.fallbacks.labels("worse").inc()
            version = self.live.version_of(Role.PROMOTED)
            log.warning("predictor %s is worse than the rules in %s: they hold", version, ", ".join(self.live.worse))
        elif before and not self.live.worse:
            log.info("predictor %s is no worse than the rules any more: it holds again", self.live.version)


class PredictingExecutor:
    """See `control_plane.tasks.ports.Executor`: one that another one does the work for."""

    def __init__(self, executor: Executor, foreteller: Foreteller, clock: Clock) -> None:
        self._executor = executor
        self._foreteller = foreteller
        self._clock = clock

    async def run(self, claim: Claim, grant: Grant, timeout: float) -> tuple[bytes, int]:
        foretold = self._foreteller.begin(claim, grant)
        began, at = self._clock.monotonic(), self._clock.wall()
        try:
            done = await self._executor.run(claim, grant, timeout)
        except DomainError:
            took = self._clock.monotonic() - began
            if took < timeout - _SLACK:  # else it was the task that had no time left
                self._foreteller.end(foretold, at, took, ok=False)
            raise
        used = grant.flight.charge.used
        tokens = used.completion if used is not None and used.whole else None
        self._foreteller.end(foretold, at, self._clock.monotonic() - began, ok=True, tokens=tokens)
        return done


def _errors(told: Prediction, attempt: Attempt) -> dict[str, float]:
    found = {"success": abs(told.success - attempt.ok)}
    if attempt.ok:
        found["seconds"] = abs(math.log(max(attempt.seconds, 1e-3) / max(told.seconds_p50, 1e-3)))
        if attempt.completion_tokens is not None:
            expected = max(0.0, told.completion_tokens)
            found["completion_tokens"] = abs(math.log1p(attempt.completion_tokens) - math.log1p(expected))
    return found


class _States(Collector):
    """Collects on a thread of the metrics server: what may change its size in between is copied first."""

    def __init__(self, live: Live) -> None:
        self._live = live

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        live = self._live
        force = GaugeMetricFamily(
            "modelyard_predictor_in_force",
            "1 for the version of the predictor of tasks whose word holds; `rules`: none is trained, or it is worse.",
            labels=["version"],
        )
        force.add_metric([live.version], 1.0)
        yield force
        loss = GaugeMetricFamily(
            "modelyard_predictor_loss",
            "Mean loss over about the last 200 attempts, by predictor and target: pinball loss of ln(seconds), Brier "
            "score of success, absolute error of ln(1 + completion_tokens).",
            labels=["predictor", "target"],
        )
        for role, rolling in list(live.rolling.items()):
            for target in TARGETS:
                value = rolling.means.get(target)
                if value is not None:
                    loss.add_metric([role.value, target], value)
        yield loss


Predicted = Callable[[str, int], Shown | None]
"""What was predicted of an attempt of a task, by id and number."""
