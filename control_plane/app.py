"""Composition root of the control plane: wires everything, runs it, drains it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING

from prometheus_client import start_http_server

from control_plane import definitions as definition_files
from control_plane.api.assign import Assignments
from control_plane.api.attempts import Attempts
from control_plane.api.generate import Generation
from control_plane.api.lifecycle import ModelLifecycle
from control_plane.api.metrics import Metrics
from control_plane.api.orchestrator import OrchestratorServicer
from control_plane.api.upstream import Upstreams
from control_plane.config import ControlPlaneSettings, SelectionSettings
from control_plane.domain.definition import Definitions
from control_plane.domain.ports import Clock
from control_plane.domain.task import Priority
from control_plane.fleet.registry import Fleet, FleetPolicy
from control_plane.fleet.scheduler import Scheduler
from control_plane.presets import compile_presets
from control_plane.scheduling.breaker import BreakerPolicy
from control_plane.scheduling.queue import FairQueue
from control_plane.scheduling.retry import RetryPolicy
from control_plane.scheduling.stats import StatsPolicy
from control_plane.selection.policy import Policy, Weights
from modelyard.program.process import announce_ready, settle_memory, told_to_stop
from modelyard.program.settings import SettingsError
from modelyard.rpc.server import bind, create_server, drain, enable_standard_services, service_handler
from modelyard.v1 import orchestrator_pb2

if TYPE_CHECKING:
    from control_plane.gateway.server import HttpServer

log = logging.getLogger(__name__)

SERVICE = orchestrator_pb2.DESCRIPTOR.services_by_name["Orchestrator"]

# Leases, queue timeouts and breaker pauses end at most this many seconds late.
_TICK = 0.05
_FILES_INTERVAL = 1.0


class SystemClock:
    """The one place where the control plane asks what time it is."""

    monotonic = staticmethod(time.monotonic)
    wall = staticmethod(time.time)


class ControlPlane:
    """Everything of one control plane process but its sockets."""

    def __init__(self, settings: ControlPlaneSettings, clock: Clock) -> None:
        self.settings = settings
        self.clock = clock
        self.metrics = Metrics()
        self.upstreams = Upstreams()
        # Bad definitions stop the start: there are no previous ones to keep.
        folder = settings.models_dir
        catalogue = definition_files.read(folder) if folder else definition_files.Catalogue(Definitions(), {})
        self.watcher = definition_files.Watcher(folder) if folder else None
        self.fleet = Fleet(_fleet_policy(settings), catalogue.definitions, clock.monotonic())
        self.scheduler = Scheduler(
            self.fleet,
            _selection_policy(settings.selection, settings.selection.weights.model_dump()),
            FairQueue(
                bounds={priority: getattr(settings.queue.bound, priority.name.lower()) for priority in Priority},
                timeouts={priority: getattr(settings.queue.timeout, priority.name.lower()) for priority in Priority},
                max_bytes=settings.queue.max_bytes,
            ),
            clock,
            on_selected=self.metrics.selection_time.observe,
            on_granted=self.metrics.granted,
        )
        self.metrics.observe(self.fleet, self.scheduler)
        orchestrator_id = uuid.uuid4().hex
        retry = settings.retry
        attempts = Attempts(
            self.scheduler,
            RetryPolicy(max_attempts=retry.max_attempts, base=retry.base, factor=retry.factor, cap=retry.cap),
            clock,
            self.metrics,
        )
        generation = Generation(
            orchestrator_id,
            self.fleet,
            attempts,
            self.upstreams,
            settings.limits,
            clock,
            self.metrics,
            self.scheduler.release,
        )
        self._generation = generation
        assignments = Assignments(
            orchestrator_id,
            self.fleet,
            self.scheduler,
            generation,
            settings.limits.ticket_lifetime,
            clock,
            self.metrics,
        )
        generation.give_back, generation.ticket_for = assignments.give_back, assignments.for_relay
        self._put_in_force(catalogue)
        self.servicer = OrchestratorServicer(
            orchestrator_id,
            self.fleet,
            self.scheduler,
            generation,
            assignments,
            ModelLifecycle(self.fleet, self.upstreams, clock),
            settings.fleet,
            clock,
            self.metrics,
        )
        self.gateway: HttpServer | None = None

    def _put_in_force(self, catalogue: definition_files.Catalogue) -> None:
        """New definitions and presets; running requests keep what they began with. Raises SettingsError."""
        settings = self.settings
        try:
            presets = compile_presets(
                catalogue.presets, default=settings.default_preset, default_provider=settings.default_provider
            )
        except ValueError as error:
            raise SettingsError(str(error)) from None
        selection = settings.selection
        self.scheduler.policies = {
            preset.name: _selection_policy(selection, {**selection.weights.model_dump(), **preset.weights})
            for preset in presets
            if preset.weights is not None
        }
        self._generation.presets = presets
        self.fleet.define(catalogue.definitions, self.clock.monotonic())

    def open_gateway(self) -> None:
        """Listen for HTTP, if the settings want it. Raises OSError."""
        settings = self.settings.gateway
        if settings.port < 0:
            return
        # Imported only where it is wanted: the HTTP stack takes memory and time.
        from control_plane.gateway.routes import Gateway
        from control_plane.gateway.server import HttpServer

        app = Gateway(
            self.servicer, self.clock, self.metrics, self.settings.limits.max_request_bytes, settings.body_timeout
        ).app
        self.gateway = HttpServer(app, settings.host, settings.port, self.settings.drain_grace)

    async def serve_gateway(self) -> None:
        """Answer HTTP requests until the drain is over."""
        if self.gateway:
            await self.gateway.serve()

    async def start(self) -> str:
        """Listen and serve; the address."""
        settings, limit = self.settings, self.settings.limits.max_request_bytes
        server = create_server(max_request_bytes=limit)
        server.add_generic_rpc_handlers((service_handler(SERVICE, self.servicer, max_request_bytes=limit),))
        self._health = enable_standard_services(server, [SERVICE.full_name])
        port = bind(server, settings.host, settings.port)
        await server.start()
        await self._health.set_serving(SERVICE.full_name, True)
        self._server = server
        return f"{settings.host}:{port}"

    async def stop(self) -> None:
        """Drain: refuse new work, let what runs end within the grace, close."""
        await drain(
            self._server,
            self._health,
            stop_accepting=self._stop_accepting,
            in_flight=self.servicer.in_flight,
            grace=self.settings.drain_grace,
        )
        if self.gateway:
            await self.gateway.ended()
        await self.upstreams.close()

    def _stop_accepting(self) -> None:
        self.servicer.stop_accepting()
        if self.gateway:
            self.gateway.stop_accepting()

    async def tick_forever(self) -> None:
        """Let time pass for fleet and queue."""
        while True:
            now = self.clock.monotonic()
            self.fleet.tick(now)
            self.scheduler.tick(now)
            self.upstreams.keep_only(server.report.identity.endpoint for server in self.fleet.servers())
            await asyncio.sleep(_TICK)

    async def watch_definitions(self) -> None:
        """Put changed model definitions in force."""
        while self.watcher:
            self.reread_definitions(self.watcher)
            await asyncio.sleep(_FILES_INTERVAL)

    def reread_definitions(self, watcher: definition_files.Watcher) -> None:
        """Put definitions and presets in force if they changed. Never raises: files that people edit must not be able
        to take a running control plane down, whatever is overlooked in reading them."""
        try:
            catalogue = watcher.poll()
            if catalogue is not None:
                self._put_in_force(catalogue)
        except SettingsError as error:
            log.error("models and presets not changed, the previous ones stay in force:\n%s", error)
        except Exception:
            log.exception("models and presets could not be read again, the previous ones stay in force")


@contextlib.asynccontextmanager
async def running(
    settings: ControlPlaneSettings, clock: Clock | None = None
) -> AsyncIterator[tuple[ControlPlane, str]]:
    """A serving control plane and its address; drained on the way out."""
    plane = ControlPlane(settings, clock or SystemClock())
    async with asyncio.TaskGroup() as group:
        # A task that dies takes the group, and so the process, with it.
        background = [
            group.create_task(plane.tick_forever(), name="ticker"),
            group.create_task(plane.watch_definitions(), name="definitions"),
        ]
        try:
            plane.open_gateway()
            background.append(group.create_task(plane.serve_gateway(), name="gateway"))
            address = await plane.start()
            try:
                yield plane, address
            finally:
                await plane.stop()
        finally:
            for task in background:
                task.cancel()


async def serve(settings: ControlPlaneSettings) -> int:
    """Run a control plane until it is told to stop; the exit status."""
    async with running(settings) as (plane, address):
        facts: dict[str, str | int] = {"address": address}
        if plane.gateway:
            facts["gateway"] = plane.gateway.url
        if settings.metrics_port >= 0:
            where = f"{settings.host}:{settings.metrics_port}"
            try:
                metrics, _ = start_http_server(
                    settings.metrics_port, addr=settings.host, registry=plane.metrics.registry
                )
            except OSError as error:
                reason = error.strerror or str(error)
                raise OSError(f"{where}: {reason}: choose another with --metrics-port, or -1 for none") from error
            facts["metrics"] = f"http://{settings.host}:{metrics.server_port}/metrics"
        settle_memory()
        # Its signal handlers stand before anybody can know that there is someone to stop.
        told = told_to_stop(watch_parent=settings.watch_parent)
        announce_ready("control-plane", **facts)
        log.info("serving on %s", address)
        why = await told
        log.info("%s: draining, at most %g s", why, settings.drain_grace)
    return 0


def _fleet_policy(settings: ControlPlaneSettings) -> FleetPolicy:
    statistics, breaker = settings.statistics, settings.breaker
    return FleetPolicy(
        lease_duration=settings.fleet.lease_duration,
        forget_after=settings.fleet.forget_after,
        warm_up=settings.fleet.warm_up,
        stats=StatsPolicy(
            alpha=statistics.alpha,
            recovery_half_life=statistics.recovery_half_life,
            initial_success=statistics.initial_success,
        ),
        breaker=BreakerPolicy(failures=breaker.failures, pause=breaker.pause, pause_cap=breaker.pause_cap),
    )


def _selection_policy(selection: SelectionSettings, weights: Mapping[str, float]) -> Policy:
    return Policy(
        weights=Weights(**weights),
        availability_threshold=selection.availability_threshold,
        latency_reference_s=selection.latency_reference,
        ttft_prior_s=selection.prior_ttft,
        tpot_prior_s=selection.prior_tpot,
        load_time_prior_s=selection.prior_load_time,
        cost_reference_usd=selection.cost_reference_usd,
        expected_output_tokens=selection.expected_output_tokens,
        provider_preference=selection.provider_preference,  # type: ignore[arg-type]
    )
