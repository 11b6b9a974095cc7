"""Composition root of the control plane: wires everything, runs it, drains it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
import uuid
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from prometheus_client import start_http_server

from control_plane import definitions as definition_files
from control_plane import delivery
from control_plane.api.accounting import AccountingServicer
from control_plane.api.agents import AgentsServicer, route_policy
from control_plane.api.assign import Assignments
from control_plane.api.attempts import Attempts
from control_plane.api.beliefs import BeliefsServicer
from control_plane.api.execute import TaskExecutor
from control_plane.api.generate import Generation
from control_plane.api.lifecycle import ModelLifecycle
from control_plane.api.metrics import Metrics
from control_plane.api.orchestrator import OrchestratorServicer
from control_plane.api.similarity import Embedder
from control_plane.api.task_queue import TaskQueueServicer
from control_plane.api.upstream import Upstreams
from control_plane.config import ControlPlaneSettings
from control_plane.domain.definition import Definitions
from control_plane.domain.errors import DomainError
from control_plane.domain.funds import Reckoning
from control_plane.domain.ports import Clock
from control_plane.domain.task import Priority
from control_plane.fleet.accounts import Accounts
from control_plane.fleet.registry import Fleet
from control_plane.fleet.scheduler import Scheduler
from control_plane.foresight import Foresight
from control_plane.gateway.door import HttpDoor
from control_plane.policies import class_policies, fleet_policy, selection_policy
from control_plane.presets import compile_presets
from control_plane.routing.router import TaskRouter
from control_plane.scheduling.budgets import Ledger
from control_plane.scheduling.queue import FairQueue
from control_plane.scheduling.retry import Allowance, RetryPolicy
from control_plane.tasks.dispatcher import Dispatcher, DispatchPolicy
from modelyard.program import privacy
from modelyard.program.process import announce_ready, settle_memory, told_to_stop
from modelyard.program.settings import SettingsError
from modelyard.rpc.calls_server import CALLS, add_services
from modelyard.rpc.server import bind, create_server, drain, enable_standard_services, service_handler
from modelyard.v1 import accounting_pb2, agents_pb2, belief_pb2, orchestrator_pb2, task_queue_pb2

if TYPE_CHECKING:
    from control_plane.gateway.server import HttpServer
    from control_plane.tasks.agents import AgentStore
    from control_plane.tasks.beliefs import Beliefs
    from control_plane.tasks.bookkeeper import Bookkeeper
    from control_plane.tasks.deliverer import Deliverer
    from control_plane.tasks.deliveries import Deliveries
    from control_plane.tasks.store import SqlTaskStore

log = logging.getLogger(__name__)

SERVICE = orchestrator_pb2.DESCRIPTOR.services_by_name["Orchestrator"]
BELIEFS = belief_pb2.DESCRIPTOR.services_by_name["Beliefs"]
ACCOUNTING = accounting_pb2.DESCRIPTOR.services_by_name["Accounting"]
AGENTS = agents_pb2.DESCRIPTOR.services_by_name["Agents"]
TASK_QUEUE = task_queue_pb2.DESCRIPTOR.services_by_name["TaskQueue"]

# Leases, queue timeouts and breaker pauses end at most this many seconds late.
_TICK = 0.05
_FILES_INTERVAL = 1.0

# Seconds between two times at which what was learned of the fleet is written down.
_LEARNED_INTERVAL = 30.0

# Rows of what was learned of agents that are kept, and half-lives after which one is forgotten.
_MOST_LEARNED_OF_AGENTS = 100_000
_AGENT_HALF_LIVES = 30


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
        self.fleet = Fleet(fleet_policy(settings), catalogue.definitions, clock.monotonic())
        self.scheduler = Scheduler(
            self.fleet,
            selection_policy(settings.selection),
            FairQueue(
                bounds={priority: getattr(settings.queue.bound, priority.name.lower()) for priority in Priority},
                timeouts={priority: getattr(settings.queue.timeout, priority.name.lower()) for priority in Priority},
                max_bytes=settings.queue.max_bytes,
                floors={priority: getattr(settings.queue.floor, priority.name.lower()) for priority in Priority},
            ),
            clock,
            on_selected=self.metrics.selection_time.observe,
            on_granted=self.metrics.granted,
        )
        self.scheduler.on_explored = self.metrics.explore
        self.scheduler.class_policies = class_policies(settings.selection)
        self.metrics.observe(self.fleet, self.scheduler)
        self.accounts = Accounts(
            Ledger(
                settings.budgets.default.budgets(),
                {tenant: limits.budgets() for tenant, limits in settings.budgets.tenants.items()},
            ),
            Reckoning(settings.budgets.prompt_factor, settings.budgets.max_output_tokens),
            clock.wall,
        )
        self.scheduler.pay_from(self.accounts)
        self._orchestrator_id = orchestrator_id = uuid.uuid4().hex
        retry = settings.retry
        attempts = Attempts(
            self.scheduler,
            RetryPolicy(max_attempts=retry.max_attempts, base=retry.base, factor=retry.factor, cap=retry.cap),
            clock,
            self.metrics,
            Allowance(retry.hedging) if retry.hedging else None,
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
            self.accounts,
        )
        self._generation = generation
        assignments = Assignments(
            orchestrator_id,
            self.fleet,
            self.scheduler,
            generation,
            settings.limits.ticket_lifetime,
            min(settings.limits.ticket_ahead_lifetime, settings.limits.ticket_lifetime),
            clock,
            self.metrics,
        )
        generation.give_back, generation.ticket_for = assignments.give_back, assignments.for_relay
        self._put_in_force(catalogue)
        lifecycle = ModelLifecycle(self.fleet, self.upstreams, clock)
        self.foresight = Foresight(settings, self.fleet, lifecycle, clock, self.metrics.registry)
        self.servicer = OrchestratorServicer(
            orchestrator_id,
            self.fleet,
            self.scheduler,
            generation,
            assignments,
            lifecycle,
            settings.fleet,
            clock,
            self.metrics,
        )
        self.router = TaskRouter(route_policy(settings.agents))
        self.agents = AgentsServicer(
            self.router,
            Embedder(generation.embed, self.fleet, clock, settings.agents.embedding),
            self.fleet,
            settings.agents,
            clock,
            self.metrics,
            self.servicer.in_flight,
        )
        self.agent_store: AgentStore | None = None
        self.gateway: HttpDoor | None = None
        self.store: SqlTaskStore | None = None
        self.dispatcher: Dispatcher | None = None
        self.beliefs: Beliefs | None = None
        self.deliveries: Deliveries | None = None
        self.deliverer: Deliverer | None = None
        self.bookkeeper: Bookkeeper | None = None

    async def open_tasks(self) -> None:
        """Open the store of durable tasks, if the settings want one. Raises SettingsError."""
        tasks = self.settings.tasks
        if not tasks.store:
            if self.settings.budgets.any:
                raise SettingsError("budgets need a database to be kept in: set tasks.store")
            return
        delivery.check(tasks.callbacks, os.environ)
        # Imported only where it is wanted: the database layer takes memory and time.
        from control_plane.tasks.location import StoreError, located
        from control_plane.tasks.opening import open_store
        from control_plane.tasks.store import StorePolicy

        try:
            place = located(tasks.store, os.environ)
            policy = StorePolicy(lease=tasks.lease, max_lost=tasks.max_lost, retention=tasks.retention)
            self.store = store = await open_store(place, policy, self.metrics.store_time.observe)
            learned, knowledge = await store.learned(), await store.knowledge()
            await self._open_agents(store)
            await self.foresight.open(store, place)
        except (StoreError, DomainError) as error:
            raise SettingsError(str(error)) from None
        log.info("tasks are kept in %s", place.shown)
        self.fleet.remember(learned, self.clock.monotonic(), self.clock.wall())
        self.fleet.know(knowledge, self.clock.monotonic())
        retry = tasks.retry
        self.dispatcher = Dispatcher(
            store,
            self.fleet,
            self.scheduler,
            self.foresight.predicting(
                TaskExecutor(
                    self._orchestrator_id,
                    self._generation,
                    self.upstreams,
                    self.settings.limits,
                    self.clock,
                    self.metrics,
                    self.scheduler.release,
                )
            ),
            DispatchPolicy(
                workers=tasks.workers,
                ageing=tasks.ageing,
                retry=RetryPolicy(base=retry.base, factor=retry.factor, cap=retry.cap),
                lease=tasks.lease,
                debug=self.settings.debug,
            ),
            self.metrics,
            lambda: self.servicer.in_flight,
        )
        self.metrics.observe_tasks(self.dispatcher)
        self._open_deliveries(store)
        self._open_accounts(store)

    async def _open_agents(self, store: SqlTaskStore) -> None:
        """What was learned of agents. Raises DomainError."""
        from control_plane.tasks.agents import AgentStore

        self.agent_store = AgentStore(store.database)
        self.router.remember(
            await self.agent_store.learned(_MOST_LEARNED_OF_AGENTS), self.clock.monotonic(), self.clock.wall()
        )

    def _open_deliveries(self, store: SqlTaskStore) -> None:
        """What is told to others of tasks, and beliefs."""
        from control_plane.api.notices import Notices
        from control_plane.tasks.beliefs import Beliefs
        from control_plane.tasks.deliveries import Deliveries

        settings = self.settings.tasks.callbacks
        self.beliefs = Beliefs(store.database)
        self.deliveries = Deliveries(store.database, delivery.rules(settings))
        self.deliverer = delivery.deliverer(
            settings,
            os.environ,
            self.deliveries,
            Notices(store).render,
            lambda outcome: self.metrics.callbacks.labels(outcome).inc(),
        )

    def _open_accounts(self, store: SqlTaskStore) -> None:
        """What tenants have used, and their budgets."""
        from control_plane.tasks.accounting import Accounting
        from control_plane.tasks.bookkeeper import Bookkeeper

        self.accounts.now = store.now
        kept = Accounting(store.database, self.settings.tasks.lease)
        self.bookkeeper = Bookkeeper(self.accounts, kept, self.settings.budgets.usage_retention)

    async def keep_books(self) -> None:
        """Write down usage and share budgets with other control planes."""
        if self.bookkeeper:
            await self.bookkeeper.run()

    async def deliver_callbacks(self) -> None:
        """Tell receivers of tasks that have ended, until the drain is over."""
        if self.deliverer:
            await self.deliverer.run()

    async def close_tasks(self) -> None:
        """Close the store, when nothing runs any more."""
        if self.store is not None:
            if self.bookkeeper is not None:
                await self.bookkeeper.close()
            await self._keep_learned(self.store)
            await self.store.close()

    async def run_tasks(self) -> None:
        """Dispatch durable tasks until the drain is over."""
        if self.dispatcher:
            await self.dispatcher.run()

    async def keep_learned(self) -> None:
        """Write down now and then what was learned of the fleet, for the next process."""
        while self.store is not None:
            await asyncio.sleep(_LEARNED_INTERVAL)
            await self._keep_learned(self.store)

    async def _keep_learned(self, store: SqlTaskStore) -> None:
        learned = self.fleet.learned(self.clock.monotonic(), self.clock.wall())
        try:
            if learned:
                await store.keep_learned(learned)
            await store.keep_knowledge(self.fleet.knowledge(self.clock.monotonic()))
            self.fleet.knowledge_kept()
            await self.foresight.keep(store)
        except Exception as error:
            log.warning("what was learned of the fleet is not kept for now: %s", privacy.kind(error))
        await self._keep_agents()

    async def _keep_agents(self) -> None:
        if self.agent_store is None:
            return
        wall = self.clock.wall()
        changed = self.router.experience.changed(self.clock.monotonic(), wall)
        try:
            before = wall - _AGENT_HALF_LIVES * self.settings.agents.half_life
            await self.agent_store.keep(changed, before, _MOST_LEARNED_OF_AGENTS)
        except Exception as error:
            self.router.experience.again(changed)
            log.warning("what was learned of agents is not kept for now: %s", privacy.kind(error))

    def _put_in_force(self, catalogue: definition_files.Catalogue) -> None:
        """New definitions and presets; running requests keep what they began with. Raises SettingsError."""
        settings = self.settings
        try:
            presets = compile_presets(
                catalogue.presets, default=settings.default_preset, default_provider=settings.default_provider
            )
        except ValueError as error:
            raise SettingsError(str(error)) from None
        self.scheduler.policies = {
            preset.name: selection_policy(settings.selection, preset.weights)
            for preset in presets
            if preset.weights is not None
        }
        self._generation.presets = presets
        self.fleet.define(catalogue.definitions, self.clock.monotonic())

    def open_gateway(self) -> None:
        """Listen for HTTP, if the settings want it. Raises OSError."""
        settings = self.settings.gateway
        if settings.port >= 0:
            self.gateway = HttpDoor(self._load_gateway, settings.host, settings.port)

    def _load_gateway(self) -> HttpServer:
        from control_plane.gateway.routes import Gateway
        from control_plane.gateway.server import HttpServer

        most, patience = self.settings.limits.max_request_bytes, self.settings.gateway.body_timeout
        app = Gateway(self.servicer, self.clock, self.metrics, most, patience).app
        return HttpServer(app, self.settings.drain_grace)

    async def serve_gateway(self) -> None:
        """Answer HTTP requests until the drain is over."""
        if self.gateway:
            await self.gateway.serve()

    async def start(self) -> str:
        """Listen and serve; the address."""
        settings, limit = self.settings, self.settings.limits.max_request_bytes
        server = create_server(max_request_bytes=limit)
        tasks = self.settings.tasks
        self._task_queue = TaskQueueServicer(
            self.store,
            self._generation,
            self.metrics,
            self.servicer.in_flight,
            max_attempts=tasks.max_attempts,
            write_timeout=self.settings.limits.write_timeout,
            dispatcher=self.dispatcher,
            deliveries=self.deliveries,
            predicted=self.foresight.foreteller.of,
        )
        self._beliefs = BeliefsServicer(self.beliefs, self.metrics)
        self._accounting = AccountingServicer(self.bookkeeper, self.metrics)
        self._calls = add_services(
            server,
            service_handler(SERVICE, self.servicer, max_request_bytes=limit),
            service_handler(TASK_QUEUE, self._task_queue, max_request_bytes=limit),
            service_handler(BELIEFS, self._beliefs, max_request_bytes=limit),
            service_handler(ACCOUNTING, self._accounting, max_request_bytes=limit),
            service_handler(AGENTS, self.agents, max_request_bytes=limit),
        )
        self._health = enable_standard_services(
            server, [service.full_name for service in (SERVICE, TASK_QUEUE, BELIEFS, ACCOUNTING, AGENTS, CALLS)]
        )
        port = bind(server, settings.host, settings.port)
        await server.start()
        for service in (SERVICE, AGENTS, CALLS):
            await self._health.set_serving(service.full_name, True)
        for service in (TASK_QUEUE, BELIEFS, ACCOUNTING):
            await self._health.set_serving(service.full_name, self.store is not None)
        self._server = server
        return f"{settings.host}:{port}"

    async def stop(self) -> None:
        """Drain: refuse new work, let what runs end within the grace, give tasks back, close."""
        grace = self.settings.drain_grace
        async with asyncio.TaskGroup() as group:
            if self.dispatcher:
                group.create_task(self.dispatcher.drain(grace), name="task-drain")
            if self.deliverer:
                group.create_task(self.deliverer.drain(grace), name="callback-drain")
            await drain(
                self._server,
                self._health,
                stop_accepting=self._stop_accepting,
                in_flight=self.servicer.in_flight,
                grace=grace,
            )
        if self.gateway:
            await self.gateway.ended()
        await self.upstreams.close()

    def _stop_accepting(self) -> None:
        self.servicer.stop_accepting()
        self._task_queue.stop_accepting()
        self._beliefs.stop_accepting()
        self._accounting.stop_accepting()
        self.agents.stop_accepting()
        self._calls.stop()
        if self.gateway:
            self.gateway.stop_accepting()

    async def tick_forever(self) -> None:
        """Let time pass for fleet and queue."""
        while True:
            now = self.clock.monotonic()
            self.fleet.tick(now)
            self.scheduler.tick(now)
            self.agents.tick()
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
    await plane.open_tasks()
    try:
        async with asyncio.TaskGroup() as group:
            # A task that dies takes the group, and so the process, with it.
            background = [
                group.create_task(plane.tick_forever(), name="ticker"),
                group.create_task(plane.watch_definitions(), name="definitions"),
                group.create_task(plane.run_tasks(), name="tasks"),
                group.create_task(plane.keep_learned(), name="learned"),
                group.create_task(plane.keep_books(), name="books"),
                group.create_task(plane.deliver_callbacks(), name="callbacks"),
                group.create_task(plane.foresight.watch(), name="predictors"),
                group.create_task(plane.foresight.warmer.run(), name="forecast"),
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
    finally:
        await plane.close_tasks()


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
