"""The states that Prometheus reads, while the event loop changes them."""

from __future__ import annotations

from collections import Counter

from msgspec.structs import replace
from prometheus_client import generate_latest

from control_plane.api.metrics import Metrics
from control_plane.domain.model import ModelName, Provider
from control_plane.domain.task import Priority
from control_plane.fleet.scheduler import Scheduler
from control_plane.fleet.server import Pair
from control_plane.scheduling.queue import FairQueue
from control_plane.selection.policy import Policy
from tests.unit.control_plane.builders import ManualClock, card, fleet, report


def shown(*reports: object) -> tuple[Metrics, object]:
    clock = ManualClock()
    house = fleet(clock.now)
    for told in reports:
        house.attach(told, clock.now, 0.0, lambda: None)  # type: ignore[arg-type]
    metrics = Metrics()
    queue = FairQueue(dict.fromkeys(Priority, 1), dict.fromkeys(Priority, 1.0))  # type: ignore[var-annotated]
    metrics.observe(house, Scheduler(house, Policy(), queue, clock, lambda _: None, lambda *_: None))
    return metrics, house


def test_models_may_come_and_go_while_prometheus_reads() -> None:
    metrics, house = shown(report("a", models=(card("x"), card("y"))))
    server = house.server("a")  # type: ignore[attr-defined]

    class Meddling(Pair):
        """What the event loop may do at any moment."""

        @property
        def stats(self) -> object:  # type: ignore[override]
            server.pairs[ModelName(f"new-{len(server.pairs)}"), Provider("p")] = honest
            house._servers.pop("a", None)  # type: ignore[attr-defined]
            return honest.stats

    key, honest = next(iter(server.pairs.items()))
    meddling = object.__new__(Meddling)
    meddling.breaker = honest.breaker
    server.pairs[key] = meddling
    assert b'modelyard_success_rate{model="y"' in generate_latest(metrics.registry)


def test_no_two_series_have_the_same_labels() -> None:
    metrics, _ = shown(report("a", models=(card("m"), replace(card("m"), provider=Provider("p2")))))
    lines = generate_latest(metrics.registry).decode().splitlines()
    series = Counter(line.rsplit(" ", 1)[0] for line in lines if not line.startswith("#"))
    assert [name for name, times in series.items() if times > 1] == []
    assert 'modelyard_success_rate{model="m",provider="p2",server="a"}' in series
