"""What holds about the engine: what it says of itself, mended by what is known better here.

The one place where health and model states are decided; reports, the door and health checks ask here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from model_servers.engine import Engine, EngineLoad, EngineModel, EngineStatus, Health, ModelState
from model_servers.models import Keeper
from model_servers.watchdog import Watchdog


class Condition:
    def __init__(self, engine: Engine, keeper: Keeper, watchdog: Watchdog) -> None:
        self._engine = engine
        self._keeper = keeper
        self._watchdog = watchdog

    def status(self) -> EngineStatus:
        """As Engine.status, and as cheap."""
        said = self._engine.status()
        keeper, watchdog = self._keeper, self._watchdog
        if not (keeper.knows_more or watchdog.ailing or watchdog.canaries):
            return said
        return combine(
            said,
            states=keeper.states(),
            load_seconds=keeper.load_seconds,
            ailments=watchdog.ailments(),
            canaries=watchdog.canaries,
        )


def combine(
    said: EngineStatus,
    *,
    states: Mapping[str, tuple[ModelState, str]],
    load_seconds: Mapping[str, float],
    ailments: Mapping[str, str],
    canaries: int = 0,
) -> EngineStatus:
    """`ailments` make the engine unhealthy and their models failed. `canaries` are no load.

    Of a model's state the engine knows when it is reached; what leads there is known from the step.
    """
    health, detail = said.health, said.health_detail
    if ailments:
        own = (detail,) if health is Health.UNHEALTHY and detail else ()
        health, detail = Health.UNHEALTHY, "; ".join((*ailments.values(), *own))
    models = tuple(
        _model(model, states.get(model.name), load_seconds.get(model.name), ailments.get(model.name))
        for model in said.models
    )
    return replace(said, health=health, health_detail=detail, models=models, load=_without(said.load, canaries))


def _model(
    said: EngineModel, known: tuple[ModelState, str] | None, load_seconds: float | None, ailment: str | None
) -> EngineModel:
    state, detail = said.state, said.state_detail
    if ailment is not None:
        state, detail = ModelState.FAILED, ailment
    elif known is not None:
        found, why = known
        # A model that is fetched anew is still here; one that the engine has loaded by itself did not fail.
        overtaken = found is not ModelState.COLD and said.state is ModelState.WARM
        refreshed = found is ModelState.PULLING and said.state is ModelState.COLD
        if not (overtaken or refreshed):
            state, detail = found, why
    if load_seconds is None:
        load_seconds = said.load_seconds
    if (state, detail, load_seconds) == (said.state, said.state_detail, said.load_seconds):
        return said
    return replace(said, state=state, state_detail=detail, load_seconds=load_seconds)


def _without(load: EngineLoad, canaries: int) -> EngineLoad:
    if not canaries:
        return load
    from_running = min(canaries, load.running)
    return replace(load, running=load.running - from_running, waiting=max(load.waiting - canaries + from_running, 0))
