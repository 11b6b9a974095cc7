"""Predictors of tasks and the forecast, put together: what they begin with, what is put in force, what is kept."""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry

from control_plane.api.lifecycle import ModelLifecycle
from control_plane.api.predicting import Foreteller, PredictingExecutor
from control_plane.api.task_convert import completion_tokens
from control_plane.api.warming import Warmer, WarmPolicy
from control_plane.config import ControlPlaneSettings
from control_plane.domain.ports import Clock
from control_plane.fleet.registry import Fleet
from control_plane.fleet.server import Flight
from control_plane.predictors.artefact import RULES, ArtefactError
from control_plane.predictors.attempt import Attempt
from control_plane.predictors.forecast import Forecast
from control_plane.predictors.live import Live, Role
from control_plane.predictors.shelf import Entry, Registry, Shelf
from control_plane.predictors.trees import Trees, TreesError
from modelyard.program import privacy

if TYPE_CHECKING:
    from control_plane.tasks.location import Location
    from control_plane.tasks.ports import Executor
    from control_plane.tasks.store import SqlTaskStore

log = logging.getLogger(__name__)

_LOOK = 1.0
"""Seconds between two looks at the folder of predictors."""
_PAGES = 10
"""Of the latest attempts in the store, that the rules begin with."""
_SINCE = 7 * 86400.0
"""Seconds that they may be old."""


class Foresight:
    """What this control plane expects of tasks and of the hours to come."""

    def __init__(
        self,
        settings: ControlPlaneSettings,
        fleet: Fleet,
        lifecycle: ModelLifecycle,
        clock: Clock,
        registry: CollectorRegistry,
    ) -> None:
        self.live = Live()
        self.forecast = Forecast(settings.forecast.half_life)
        self.foreteller = Foreteller(self.live, clock, registry)
        policy = WarmPolicy(settings.forecast.warm_ahead, settings.forecast.margin, settings.selection.prior_load_time)
        self.warmer = Warmer(self.forecast, fleet, lifecycle, policy, clock, registry)
        self._folder = settings.predictors.dir
        self._clock = clock
        self._shelf: Shelf | None = None
        self._seen: object = None
        self._taken: dict[Role, tuple[str, str]] = {}
        """Version and checksum of what has a place."""
        close = fleet.on_end

        def ended(flight: Flight) -> None:
            close(flight)
            self.warmer.ended(flight)

        fleet.on_end = ended

    def predicting(self, executor: Executor) -> Executor:
        """The executor, with its attempts predicted and learned from."""
        return PredictingExecutor(executor, self.foreteller, self._clock)

    async def open(self, store: SqlTaskStore, place: Location) -> None:
        """Begin with what the store knows, and with the predictor in force. Never raises: it goes without, too."""
        from control_plane.tasks import forecasts
        from control_plane.tasks.location import predictors_folder

        try:
            self.forecast.load(await store.database.read(forecasts.kept))
            for attempt in await self._recent(store):
                self.live.rules.observe(attempt)
        except Exception as error:
            log.warning("predictions begin with nothing, the store does not say what was: %s", privacy.kind(error))
        folder = predictors_folder(self._folder, place)
        self._shelf = Shelf(folder) if folder else None
        await self.look()

    async def _recent(self, store: SqlTaskStore) -> list[Attempt]:
        """The latest attempts, in their order."""
        from control_plane.tasks import history

        found: list[Attempt] = []
        before = ""
        for _ in range(_PAGES):
            since = store.now() - _SINCE
            page = partial(history.page, before=before, since=since, tokens_of=completion_tokens)
            some, before = await store.database.read(page)
            found += some
            if not before:
                break
        return sorted(found, key=lambda attempt: attempt.at)

    async def keep(self, store: SqlTaskStore) -> None:
        """Write down the forecast, what has changed of it. Raises DomainError."""
        from control_plane.tasks import forecasts

        changed = self.forecast.changed()
        try:
            await forecasts.keep(store.database, changed)
        except BaseException:
            self.forecast.unkept(changed)
            raise

    # ------------------------------------------------------------ hot swap ---

    async def watch(self) -> None:
        """Take over what is put in force. Ends only by cancellation."""
        while True:
            await asyncio.sleep(_LOOK)
            await self.look()

    async def look(self) -> None:
        """One look at the folder, if there is one. Never raises: a folder that people change must not be able to take a
        running control plane down."""
        shelf = self._shelf
        if shelf is None:
            return
        try:
            stamp = shelf.stamp
            if stamp == self._seen:
                return
            self._seen = stamp
            registry = await asyncio.to_thread(shelf.registry)
        except Exception as error:
            self._lose(Role.PROMOTED, "the folder of predictors", error)
            self._lose(Role.SHADOW, "", None)
            return
        promoted = None if registry.promoted == RULES else registry.promoted
        await self._place(shelf, registry, Role.PROMOTED, promoted)
        await self._place(shelf, registry, Role.SHADOW, registry.candidate)

    async def _place(self, shelf: Shelf, registry: Registry, role: Role, version: str | None) -> None:
        if version is None:
            if role in self._taken:
                log.info("predictors: no version is %s any more", role.value)
            self._lose(role, "", None)
            return
        try:
            entry = registry.entry(version)
            if self._taken.get(role) == (entry.version, entry.sha256):
                return
            trees = await asyncio.to_thread(_read, shelf, entry)
        except Exception as error:
            self._lose(role, f"predictor {version}", error)
            return
        self._taken[role] = entry.version, entry.sha256
        self.live.put(role, entry.version, trees)
        log.info("predictors: %s is %s now", entry.version, role.value)

    def _lose(self, role: Role, what: str, error: Exception | None) -> None:
        """Nobody has this place now."""
        self._taken.pop(role, None)
        self.live.put(role, "", None)
        if error is not None:
            ours = isinstance(error, ArtefactError | TreesError)
            log.error("%s cannot be used, the rules hold: %s", what, error if ours else privacy.kind(error))
            self.foreteller.fallbacks.labels("unreadable").inc()


def _read(shelf: Shelf, entry: Entry) -> Trees:
    return shelf.artefact(entry).trees()
