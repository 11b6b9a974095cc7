"""Composition root of the model server: everything is made, started, watched and stopped here."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Awaitable, Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Protocol

import grpc.aio

from model_servers import config, convert
from model_servers.admission import Admission
from model_servers.condition import Condition
from model_servers.config import ModelServerSettings
from model_servers.description import SelfDescription
from model_servers.engine import Engine, EngineFailed, Health
from model_servers.lifecycle import Lifecycle
from model_servers.models import Keeper
from model_servers.performance import Recorder
from model_servers.reporter import Reporter
from model_servers.servicer import SERVICE, ModelServerServicer
from model_servers.tickets import Tickets
from model_servers.watchdog import Watchdog
from modelyard.rpc.calls_server import CALLS, CallsServicer, add_services
from modelyard.rpc.server import HealthHandle, bind, create_server, enable_standard_services, service_handler

_log = logging.getLogger(__name__)

_LOOK_SECONDS = 0.1
"""How often the engine is asked whether something changed that is worth a report at once."""
_TELL_SECONDS = 0.5
"""How long stopping waits for the control planes to hear of it."""
_FAIL_SECONDS = 2.0
"""How long requests that the closed engine has failed may take to say so."""
_LOCAL_STALL_SECONDS, _METERED_STALL_SECONDS = 10.0, 120.0
"""Silence that is a stall where nothing else is set. Hosted models may think for a minute and send nothing."""


class Announce(Protocol):
    """Tells whoever started the program that it is ready."""

    def __call__(self, program: str, **facts: str | int) -> None: ...


class ModelServer:
    """One model server process around one engine."""

    def __init__(
        self,
        settings: ModelServerSettings,
        engine: Engine,
        *,
        metered: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`metered`: see EnginePlugin."""
        self._settings = settings
        self._engine = engine
        self._clock = clock
        self._lifecycle = Lifecycle()
        self._recorder = Recorder(clock)
        self._admission = Admission(
            slots=lambda: max(engine.status().load.slots, 1),
            max_waiting=settings.max_waiting,
            draining=lambda: self._lifecycle.draining,
            clock=clock,
        )
        self._tickets = Tickets(required=settings.require_ticket, clock=clock)
        self._keeper = Keeper(
            engine,
            keep_warm=settings.keep_warm,
            idle_unload_seconds=settings.idle_unload_seconds,
            memory_limit_bytes=settings.memory_limit_bytes,
            paused=lambda: self._lifecycle.draining or self._watchdog.ailing,
            clock=clock,
        )
        self._watchdog = Watchdog(
            engine,
            self._keeper,
            self._recorder,
            stall_seconds=settings.stall_seconds or (_METERED_STALL_SECONDS if metered else _LOCAL_STALL_SECONDS),
            canary_seconds=settings.canary_seconds,
            metered=metered,
            draining=lambda: self._lifecycle.draining,
            stuck=self._stuck,
            clock=clock,
        )
        self._condition = Condition(engine, self._keeper, self._watchdog)
        self._reporters: list[Reporter] = []
        self._started = False
        self._over: asyncio.Future[tuple[str, int]] | None = None

    async def run(self, stop: Awaitable[str], announce: Announce) -> int:
        """Serve until `stop` returns why; the exit status. Raises OSError if the port is taken."""
        settings = self._settings
        self._over = asyncio.get_running_loop().create_future()
        server = create_server(max_request_bytes=settings.max_request_bytes)
        port = bind(server, settings.host, settings.port)
        identity = convert.Identity(
            server_id=settings.identity_name(),
            instance_id=uuid.uuid4().hex,
            endpoint=config.endpoint(settings, port),
            labels=settings.labels,
            version=_own_version(),
        )
        description = SelfDescription(
            identity,
            self._condition,
            self._admission,
            self._lifecycle,
            self._recorder,
            manages_models=self._keeper.manages,
        )
        servicer = ModelServerServicer(
            self._engine,
            self._condition,
            description,
            self._admission,
            self._tickets,
            self._recorder,
            self._keeper,
            self._watchdog,
            draining=lambda: self._lifecycle.draining,
            max_seconds=settings.max_generation_seconds,
            slow_reader_seconds=settings.slow_reader_seconds,
            clock=self._clock,
        )
        handler = service_handler(SERVICE, servicer, max_request_bytes=settings.max_request_bytes)
        calls = add_services(server, handler)
        health = enable_standard_services(server, [SERVICE.full_name, CALLS.full_name])
        await health.set_serving(CALLS.full_name, True)
        self._tickets.server_id, self._tickets.instance_id = identity.server_id, identity.instance_id
        self._reporters = [
            Reporter(target, description, self._lifecycle, self._tickets) for target in settings.orchestrators
        ]

        async def come_up() -> None:
            await self._start_engine(
                lambda: announce(
                    "model-server", server_id=identity.server_id, address=identity.endpoint, engine=settings.engine
                )
            )

        await server.start()
        _log.info("%s listens on %s, engine %s", identity.server_id, identity.endpoint, settings.engine)
        try:
            async with asyncio.TaskGroup() as group:
                side = [
                    group.create_task(self._wait_for(stop), name="stop-signal"),
                    group.create_task(self._watch_engine(health, description), name="engine-watch"),
                    group.create_task(come_up(), name="engine-start"),
                    group.create_task(self._keeper.run(), name="model-upkeep"),
                    group.create_task(self._watchdog.watch(), name="watchdog"),
                    group.create_task(self._watchdog.tend(), name="watchdog-mend"),
                    *(group.create_task(self._report(each), name=f"report-{each.target}") for each in self._reporters),
                ]
                why, status = await self._over
                _log.log(logging.ERROR if status else logging.INFO, "stopping: %s", why)
                await self._drain(server, calls, health)
                for task in side:
                    task.cancel()
        finally:
            await self._keeper.close()
            await self._engine.close()
            await server.stop(0)
        return status

    async def _start_engine(self, ready: Callable[[], None]) -> None:
        try:
            await self._engine.start()
        except EngineFailed as error:
            self._end(f"the engine {self._settings.engine!r} does not start: {error}", 1)
            return
        self._started = True
        self._lifecycle.changes.tell()
        ready()

    async def _wait_for(self, stop: Awaitable[str]) -> None:
        self._end(await stop, 0)

    async def _report(self, reporter: Reporter) -> None:
        await reporter.run()
        self._reporters.remove(reporter)
        if not self._reporters:
            self._end("a newer instance with this server id has taken over at every control plane", 1)

    def _stuck(self, why: str) -> None:
        if self._settings.exit_when_stuck:
            self._end(f"the engine is stuck: {why}", 1)

    def _end(self, why: str, status: int) -> None:
        if self._over is not None and not self._over.done():
            self._over.set_result((why, status))

    async def _watch_engine(self, health: HealthHandle, description: SelfDescription) -> None:
        """Turn what the engine says of itself into health and prompt reports."""
        changes = self._lifecycle.changes
        known = description.news()
        while True:
            ready = self._condition.status().health is Health.READY and self._started and not self._lifecycle.draining
            await health.set_serving(SERVICE.full_name, ready)
            seen = changes.version
            try:
                async with asyncio.timeout(_LOOK_SECONDS):
                    await changes.beyond(seen)
            except TimeoutError:
                pass
            news = description.news()
            if news != known:
                known = news
                changes.tell()

    async def _drain(self, server: grpc.aio.Server, calls: CallsServicer, health: HealthHandle) -> None:
        """In the one order that loses nothing; see modelyard.rpc.server.drain, which knows no engine."""
        await health.shut_down()
        # Tells the control planes and shuts the door in one move. A request that is already on its
        # way here is refused with DRAINING, which its control plane answers by going elsewhere.
        self._lifecycle.stop()
        calls.stop()
        try:
            async with asyncio.timeout(_TELL_SECONDS):
                await asyncio.gather(*(reporter.delivered() for reporter in self._reporters))
        except TimeoutError:
            pass
        in_flight = self._admission.in_flight
        try:
            async with asyncio.timeout(self._settings.drain_grace):
                await in_flight.idle()
        except TimeoutError:
            _log.warning("%d requests are still running and are ended now", in_flight.count)
        # What still runs fails with ENGINE_FAILED, which tells its caller that a retry may help.
        await self._engine.close()
        try:
            async with asyncio.timeout(_FAIL_SECONDS):
                await in_flight.idle()
        except TimeoutError:
            pass
        try:
            async with asyncio.timeout(_TELL_SECONDS):
                await asyncio.gather(*(reporter.settled() for reporter in self._reporters))
        except TimeoutError:
            pass
        await server.stop(0.2)


def _own_version() -> str:
    try:
        return version("modelyard")
    except PackageNotFoundError:
        return ""
