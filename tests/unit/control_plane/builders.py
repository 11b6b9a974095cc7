"""Small fleets for tests."""

from __future__ import annotations

from collections.abc import Iterable

from control_plane.domain.definition import Definitions, ModelDefinition
from control_plane.domain.model import ModelCard, ModelName, ModelState, Provider, ServerId
from control_plane.domain.server import Hardware, Health, Identity, Load, Report
from control_plane.domain.task import Feature, TaskType
from control_plane.fleet.registry import Fleet, FleetPolicy
from control_plane.scheduling.breaker import BreakerPolicy
from control_plane.scheduling.stats import StatsPolicy

POLICY = FleetPolicy(
    lease_duration=3.0,
    forget_after=60.0,
    warm_up=2.0,
    stats=StatsPolicy(),
    breaker=BreakerPolicy(failures=2, pause=1.0),
)


class ManualClock:
    """Time that moves when the test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    def wall(self) -> float:
        return 1.7e9 + self.now


def card(
    name: str = "m",
    context_length: int = 4096,
    *,
    state: ModelState = ModelState.WARM,
    load_time: float | None = None,
    fingerprint: str = "",
    **scores: float,
) -> ModelCard:
    capabilities = {TaskType[kind.upper()]: score for kind, score in (scores or {"chat": 0.5}).items()}
    return ModelCard(
        ModelName(name),
        Provider("sim"),
        context_length,
        capabilities,
        Feature.STREAMING,
        state=state,
        load_time=load_time,
        fingerprint=fingerprint,
    )


def report(
    server_id: str = "a",
    *,
    instance: str = "1",
    slots: int = 2,
    foreign: int = 0,
    health: Health = Health.READY,
    draining: bool = False,
    models: tuple[ModelCard, ...] | None = None,
) -> Report:
    return Report(
        identity=Identity(ServerId(server_id), instance, f"127.0.0.1:{1000 + len(server_id)}"),
        engine="simulated",
        engine_version="1",
        hardware=Hardware(),
        models=(card(),) if models is None else models,
        load=Load(slots=slots, foreign=foreign),
        health=health,
        draining=draining,
    )


def fleet(now: float = 0.0, definitions: Iterable[ModelDefinition] = ()) -> Fleet:
    return Fleet(POLICY, Definitions(definitions), now)
