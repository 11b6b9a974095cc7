"""Has models loaded before they are needed, by the forecast of what will come; shows the forecast."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from control_plane.api.lifecycle import LOAD, ModelLifecycle
from control_plane.domain.errors import DomainError
from control_plane.domain.model import ModelCard, ModelName, ModelState
from control_plane.domain.ports import Clock
from control_plane.domain.server import LeaseState
from control_plane.fleet.registry import Fleet, placements
from control_plane.fleet.server import Flight, Server
from control_plane.predictors.forecast import Expected, Forecast, Key
from modelyard.program import privacy
from modelyard.rpc.errors import Refusal
from modelyard.v1 import orchestrator_pb2

log = logging.getLogger(__name__)

HORIZON = 600.0
"""Seconds that the exported forecast looks ahead."""
INTERVAL = 2.0
"""Seconds between two looks ahead."""
_PAUSE, _PAUSE_CAP = 60.0, 3600.0
"""Seconds after a load until the same model may be ordered again; twice as long each time that it fails."""
_LONGEST = 3600.0
"""Seconds that a load may take."""


@dataclass(frozen=True, slots=True)
class WarmPolicy:
    """See the settings `forecast.*`."""

    requests: float
    """Expected ones for which a model is loaded; 0: none is."""
    margin: float
    """Seconds that are looked ahead beyond the load time."""
    load_time: float
    """Seconds, of a model whose server does not know."""


def due(
    servers: Iterable[Server], expected: Callable[[str, float], float], policy: WarmPolicy
) -> list[tuple[Server, ModelCard]]:
    """What is to be loaded, and where: models that are cold wherever they are, of which enough is expected. The server
    is one that manages models and is idle, or has the least to do; of equals the one that loads fastest.

    `expected(model, seconds)` is the mean number of requests within that time.
    """
    found = []
    for name, places in placements(servers).items():
        here = [(server, card) for server, card in places if server.lease.state is LeaseState.LIVE]
        if any(card.state in (ModelState.WARM, ModelState.LOADING) for _, card in here):
            continue
        able = [
            (server, card)
            for server, card in here
            if card.state is ModelState.COLD and server.report.manages_models and server.ready and not server.draining
        ]
        if not able:
            continue
        chosen = min(able, key=lambda one: (len(one[0].flights), _load_time(one[1], policy), one[0].id))
        if expected(name, _load_time(chosen[1], policy) + policy.margin) >= policy.requests:
            found.append(chosen)
    return found


def _load_time(card: ModelCard, policy: WarmPolicy) -> float:
    return policy.load_time if card.load_time is None else card.load_time


@dataclass(slots=True)
class _Pause:
    """Of a model that was ordered."""

    until: float = -math.inf
    """Monotonic seconds; infinite while the order is under way."""
    seconds: float = _PAUSE


class Warmer:
    """Counts what comes, and looks ahead."""

    def __init__(
        self,
        forecast: Forecast,
        fleet: Fleet,
        lifecycle: ModelLifecycle,
        policy: WarmPolicy,
        clock: Clock,
        registry: CollectorRegistry,
    ) -> None:
        self._forecast = forecast
        self._fleet = fleet
        self._lifecycle = lifecycle
        self._policy = policy
        self._clock = clock
        self._pauses: dict[ModelName, _Pause] = {}
        self._states = _States()
        registry.register(self._states)
        self._warmed = Counter(
            "modelyard_warmed_ahead",
            "Models that were loaded because the forecast said so, by outcome: ok, or the reason of the failure.",
            ("model", "outcome"),
            registry=registry,
        )

    def ended(self, flight: Flight) -> None:
        """An attempt has ended: counted when it does, if it was sent at all."""
        if flight.charge.sent:
            self._forecast.add((flight.charge.task_type, flight.model), self._clock.wall())

    async def run(self) -> None:
        """Look ahead now and then. Ends only by cancellation."""
        async with asyncio.TaskGroup() as group:
            while True:
                self.look_ahead(group)
                await asyncio.sleep(INTERVAL)

    def look_ahead(self, group: asyncio.TaskGroup) -> None:
        """Show what is expected, and order what is due."""
        wall, now = self._clock.wall(), self._clock.monotonic()
        self._states.rows = [(key, self._forecast.expect(key, wall, HORIZON)) for key in self._forecast.known()]
        if not self._policy.requests:
            return
        servers = self._fleet.servers()
        for server, card in due(servers, lambda model, ahead: self._forecast.model(model, wall, ahead), self._policy):
            pause = self._pauses.get(card.name, _Pause())
            if now >= pause.until:
                pause.until = math.inf
                self._pauses[card.name] = pause
                group.create_task(self._load(server, card, pause), name=f"warm-{card.name}")

    async def _load(self, server: Server, card: ModelCard, pause: _Pause) -> None:
        log.info("%s: loading %s ahead of what the forecast expects", server.id, card.id)
        request = orchestrator_pb2.LoadModelRequest(model=card.name, server_id=server.id)
        outcome = "ok"
        try:
            await self._lifecycle.serve(LOAD, request, _Nobody())
        except (Refusal, DomainError) as error:
            outcome = str(getattr(error.reason, "value", error.reason))
            log.warning("%s: %s was not loaded ahead: %s", server.id, card.id, outcome)
        except Exception as error:
            outcome = "INTERNAL"
            log.error("%s: %s was not loaded ahead: %s", server.id, card.id, privacy.where(error))
        pause.seconds = _PAUSE if outcome == "ok" else min(2 * pause.seconds, _PAUSE_CAP)
        pause.until = self._clock.monotonic() + pause.seconds
        self._warmed.labels(card.name, outcome).inc()


class _Nobody:
    """A caller that does not listen, and has time."""

    async def write(self, message: Any) -> None:
        pass

    def time_remaining(self) -> float | None:
        return _LONGEST


class _States(Collector):
    """The forecast as it was at the last look: it is the event loop's, and collecting happens on another thread."""

    def __init__(self) -> None:
        self.rows: list[tuple[Key, Expected]] = []

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        minutes = f"{HORIZON / 60:g} minutes"
        labels = ["task_type", "model"]
        rate = GaugeMetricFamily(
            "modelyard_forecast_requests_per_minute",
            f"Requests per minute that are expected on average in the next {minutes}.",
            labels=labels,
        )
        high = GaugeMetricFamily(
            "modelyard_forecast_requests_p90",
            f"Requests that nine of ten times will not be exceeded in the next {minutes}.",
            labels=labels,
        )
        for (kind, model), expected in self.rows:
            rate.add_metric([kind.name.lower(), model], expected.per_minute)
            high.add_metric([kind.name.lower(), model], expected.p90)
        yield from (rate, high)
