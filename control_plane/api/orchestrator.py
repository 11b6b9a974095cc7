"""The Orchestrator service: parse -> call -> render."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

import grpc

from control_plane.api import convert, fleet_view
from control_plane.api.assign import Assignments
from control_plane.api.generate import Generation
from control_plane.api.lifecycle import LOAD, PULL, UNLOAD, ModelLifecycle
from control_plane.api.metrics import Metrics
from control_plane.api.tenant import tenant_of
from control_plane.config import FleetSettings
from control_plane.domain.errors import DomainError, draining, unknown_model, unknown_request
from control_plane.domain.ports import Clock
from control_plane.domain.server import Report
from control_plane.fleet.registry import Fleet, superseded
from control_plane.fleet.scheduler import Scheduler
from control_plane.fleet.server import Attachment
from control_plane.scheduling.pace import TokenBucket
from modelyard.rpc.errors import Refusal, Violation, invalid
from modelyard.rpc.reasons import Reason
from modelyard.rpc.server import InFlight, Unread, reads_as, takes_unread
from modelyard.rpc.validation import check_feedback, check_generate_request, check_report, check_ticket_report
from modelyard.v1 import fleet_pb2, orchestrator_pb2

T = TypeVar("T")

# Reports of one stream: so many are read at once, then so many per report interval. A server reports once per interval
# and when something changes; one that never stops is slowed by gRPC's flow control, and as each report tells
# everything, what is read late is all that is lost.
_REPORTS_AT_ONCE = 20
_REPORTS_PER_INTERVAL = 10

# The same for reports of tickets alone, of which a busy server sends up to a hundred a second.
_TICKET_REPORTS_AT_ONCE = 200
_TICKET_REPORT_SECONDS = 0.005


def served(method: Callable[..., Awaitable[T]]) -> Callable[..., Awaitable[T]]:
    """Around every method: domain errors become refusals, the outcome is counted, under the name of
    the method unless the caller knows a better one."""
    name = method.__name__

    @functools.wraps(method)
    async def wrapped(
        self: OrchestratorServicer, request: Any, context: grpc.aio.ServicerContext, *, counted_as: str = name
    ) -> T:
        outcome = "ok"
        try:
            return await method(self, request, context)
        except DomainError as error:
            outcome = error.reason
            raise Refusal(Reason(error.reason), error.message, retry_after=error.retry_after) from error
        except Refusal as refusal:
            outcome = refusal.reason
            raise
        except asyncio.CancelledError:
            outcome = "cancelled"
            raise
        except Exception:
            outcome = Reason.INTERNAL
            raise
        finally:
            self.metrics.finished(counted_as, outcome)

    return wrapped


class OrchestratorServicer:
    """All methods of the service. Once `stop_accepting` was called, new work is refused with
    DRAINING and endless streams end; what runs goes on."""

    def __init__(
        self,
        orchestrator_id: str,
        fleet: Fleet,
        scheduler: Scheduler,
        generation: Generation,
        assignments: Assignments,
        lifecycle: ModelLifecycle,
        settings: FleetSettings,
        clock: Clock,
        metrics: Metrics,
    ) -> None:
        self.metrics = metrics
        self.in_flight: InFlight = assignments.in_flight
        self._orchestrator_id = orchestrator_id
        self._fleet = fleet
        self._scheduler = scheduler
        self._generation = generation
        self._assignments = assignments
        self._lifecycle = lifecycle
        self._settings = settings
        self._clock = clock
        self._stopping = asyncio.Event()

    def stop_accepting(self) -> None:
        """Refuse new work from now on."""
        self._stopping.set()

    @property
    def stopping(self) -> bool:
        """Whether new work is refused."""
        return self._stopping.is_set()

    def _admit(self) -> InFlight:
        if self._stopping.is_set():
            raise draining()
        return self.in_flight

    # ---------------------------------------------------------------- work ---

    @takes_unread
    @served
    async def Generate(
        self,
        request: Unread[orchestrator_pb2.GenerateRequest] | orchestrator_pb2.GenerateRequest,
        context: grpc.aio.ServicerContext,
    ) -> None:
        with self._admit():
            await self._generation.generate(request, context)

    @reads_as(orchestrator_pb2.GenerateRequest)
    @takes_unread
    @served
    async def Complete(
        self,
        request: Unread[orchestrator_pb2.GenerateRequest] | orchestrator_pb2.GenerateRequest,
        context: grpc.aio.ServicerContext,
    ) -> orchestrator_pb2.CompleteResponse:
        with self._admit():
            return await self._generation.complete(request, context)

    @served
    async def Assign(
        self, request: orchestrator_pb2.AssignRequest, context: grpc.aio.ServicerContext
    ) -> orchestrator_pb2.AssignResponse:
        with self._admit():
            return await self._assignments.assign(request, context)

    @takes_unread
    @served
    async def Embed(
        self,
        request: Unread[orchestrator_pb2.EmbedRequest] | orchestrator_pb2.EmbedRequest,
        context: grpc.aio.ServicerContext,
    ) -> orchestrator_pb2.EmbedResponse:
        with self._admit():
            return await self._generation.embed(request, context)

    @served
    async def ExplainSelection(
        self, request: orchestrator_pb2.ExplainSelectionRequest, context: grpc.aio.ServicerContext
    ) -> orchestrator_pb2.ExplainSelectionResponse:
        if not request.HasField("request"):
            raise invalid([Violation("request", "is required")])
        inner, _ = self._generation.presets.fill(request.request)
        violations = check_generate_request(inner, path="request.")
        if violations:
            raise invalid(violations)
        pinned = self._generation.pinned(inner.requirements)
        route = convert.route_request(inner, "explain", tenant_of(context), pinned)
        await self._generation.funded(route)
        return orchestrator_pb2.ExplainSelectionResponse(
            decision=convert.decision(self._scheduler.explain(route)),
            estimated_prompt_tokens=route.prompt_tokens,
        )

    @served
    async def ReportFeedback(
        self, request: orchestrator_pb2.ReportFeedbackRequest, context: grpc.aio.ServicerContext
    ) -> orchestrator_pb2.ReportFeedbackResponse:
        violations = check_feedback(request)
        if violations:
            raise invalid(violations)
        now = self._clock.monotonic()
        counted = self._fleet.judge(tenant_of(context), request.request_id, request.score, now)
        if counted is None:
            raise unknown_request(request.request_id)
        return orchestrator_pb2.ReportFeedbackResponse(counted=counted)

    @served
    async def ListPresets(
        self, request: orchestrator_pb2.ListPresetsRequest, context: grpc.aio.ServicerContext
    ) -> orchestrator_pb2.ListPresetsResponse:
        return orchestrator_pb2.ListPresetsResponse(
            presets=[
                orchestrator_pb2.Preset(name=preset.name, description=preset.description, defaults=preset.defaults)
                for preset in self._generation.presets
            ]
        )

    # --------------------------------------------------------------- fleet ---

    @served
    async def ListModels(
        self, request: orchestrator_pb2.ListModelsRequest, context: grpc.aio.ServicerContext
    ) -> orchestrator_pb2.ListModelsResponse:
        return orchestrator_pb2.ListModelsResponse(models=fleet_view.models(self._fleet).values())

    @served
    async def GetModel(
        self, request: orchestrator_pb2.GetModelRequest, context: grpc.aio.ServicerContext
    ) -> orchestrator_pb2.GetModelResponse:
        if not request.name:
            raise invalid([Violation("name", "is required")])
        found = self._fleet.resolve(request.name)
        if found is None:
            raise unknown_model(request.name, self._fleet.model_names())
        return orchestrator_pb2.GetModelResponse(model=fleet_view.models(self._fleet)[found[0]])

    @served
    async def ListModelServers(
        self, request: orchestrator_pb2.ListModelServersRequest, context: grpc.aio.ServicerContext
    ) -> orchestrator_pb2.ListModelServersResponse:
        now = self._clock.monotonic()
        return orchestrator_pb2.ListModelServersResponse(
            servers=[fleet_view.server_status(server, now) for server in self._fleet.servers()]
        )

    @served
    async def DrainModelServer(
        self, request: orchestrator_pb2.DrainModelServerRequest, context: grpc.aio.ServicerContext
    ) -> orchestrator_pb2.DrainModelServerResponse:
        if not request.server_id:
            raise invalid([Violation("server_id", "is required")])
        server = self._fleet.drain(request.server_id, request.undo)
        return orchestrator_pb2.DrainModelServerResponse(
            server=fleet_view.server_status(server, self._clock.monotonic())
        )

    @served
    async def PullModel(self, request: orchestrator_pb2.PullModelRequest, context: grpc.aio.ServicerContext) -> None:
        with self._admit():
            await self._lifecycle.serve(PULL, request, context)

    @served
    async def LoadModel(self, request: orchestrator_pb2.LoadModelRequest, context: grpc.aio.ServicerContext) -> None:
        with self._admit():
            await self._lifecycle.serve(LOAD, request, context)

    @served
    async def UnloadModel(
        self, request: orchestrator_pb2.UnloadModelRequest, context: grpc.aio.ServicerContext
    ) -> None:
        with self._admit():
            await self._lifecycle.serve(UNLOAD, request, context)

    @served
    async def WatchFleet(self, request: orchestrator_pb2.WatchFleetRequest, context: grpc.aio.ServicerContext) -> None:
        watch = fleet_view.Watch(self._fleet)
        try:
            await context.write(watch.snapshot(self._clock.monotonic()))
            while await self._unless_stopping(watch.changed()):
                await context.write(watch.changes(self._clock.monotonic()))
        finally:
            watch.close()
        raise draining()

    async def _unless_stopping(self, event: Awaitable[object]) -> bool:
        """Wait for the event; False if the process stops first."""
        over = asyncio.ensure_future(self._over())
        waiting = {asyncio.ensure_future(event), over}
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            return not over.done()
        finally:
            for task in waiting:
                task.cancel()

    async def _over(self) -> None:
        """Return when the process stops and nothing runs any more. Until then servers report:
        without a lease what they still generate would be given up, and the queue would stand still."""
        await self._stopping.wait()
        await self.in_flight.idle()

    # ----------------------------------------------------- model servers ---

    @served
    async def Attach(self, requests: AsyncIterator[fleet_pb2.ServerReport], context: grpc.aio.ServicerContext) -> None:
        self._admit()
        stream = _ReportStream(self._fleet, self._assignments, self._settings, self._clock, requests)
        reader = asyncio.create_task(stream.read(), name="attach-reader")
        reader.add_done_callback(lambda _: stream.wake.set())
        try:
            while await self._unless_stopping(stream.wake.wait()):
                stream.wake.clear()
                attachment = stream.attachment
                if attachment and attachment.superseded:
                    raise superseded(attachment.server.id)
                if reader.done():
                    reader.result()
                    return
                if attachment:
                    await context.write(self._directive(attachment, stream.acknowledged))
        finally:
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)
            if stream.attachment:
                self._fleet.detach(stream.attachment, expected=self._stopping.is_set())
        raise draining()

    def _directive(self, attachment: Attachment, acknowledged: int) -> fleet_pb2.ServerDirective:
        server = attachment.server
        directive = fleet_pb2.ServerDirective(
            orchestrator_id=self._orchestrator_id,
            lease_epoch=server.lease.epoch,
            lease_duration=convert.duration(self._settings.lease_duration),
            next_report_in=convert.duration(self._settings.report_interval),
            desired_state=fleet_pb2.DESIRED_STATE_DRAIN if server.drain_ordered else fleet_pb2.DESIRED_STATE_SERVE,
        )
        self._assignments.direct(directive, server, acknowledged)
        return directive


class _ReportStream:
    """The reading half of an Attach call."""

    def __init__(
        self,
        fleet: Fleet,
        assignments: Assignments,
        settings: FleetSettings,
        clock: Clock,
        requests: AsyncIterator[fleet_pb2.ServerReport],
    ) -> None:
        self.wake = asyncio.Event()
        self.attachment: Attachment | None = None
        self.acknowledged = 0
        """Sequence of the last outcome that has come in this stream."""
        self._fleet = fleet
        self._assignments = assignments
        self._clock = clock
        self._requests = requests
        self._pace = TokenBucket(_REPORTS_AT_ONCE, settings.report_interval / _REPORTS_PER_INTERVAL)
        self._ticket_pace = TokenBucket(_TICKET_REPORTS_AT_ONCE, _TICKET_REPORT_SECONDS)

    async def read(self) -> None:
        before: tuple[fleet_pb2.ServerReport, Report] | None = None
        async for message in self._requests:
            if self.attachment is not None and not message.HasField("identity") and message.HasField("tickets"):
                await self._hear_tickets(self.attachment, message)
                continue
            violations = check_report(message)
            if violations:
                raise invalid(violations)
            report = convert.report(message, before)
            before = message, report
            now, wall = self._clock.monotonic(), self._clock.wall()
            if self.attachment is None:
                self.attachment = self._fleet.attach(report, now, wall, self.wake.set)
            else:
                self._fleet.update(self.attachment, report, now, wall)
            self._take_note(self.attachment, message)
            self.wake.set()
            pause = self._pace.take(now)
            if pause:
                await asyncio.sleep(pause)

    async def _hear_tickets(self, attachment: Attachment, message: fleet_pb2.ServerReport) -> None:
        """A report of tickets alone: many come, each costs little."""
        violations = check_ticket_report(message.tickets)
        if violations:
            raise invalid(violations)
        now = self._clock.monotonic()
        self._fleet.heard(attachment, message.lease_epoch, now)
        self._take_note(attachment, message)
        self.wake.set()
        pause = self._ticket_pace.take(now)
        if pause:
            await asyncio.sleep(pause)

    def _take_note(self, attachment: Attachment, message: fleet_pb2.ServerReport) -> None:
        if message.HasField("tickets"):
            self.acknowledged = max(self.acknowledged, self._assignments.heard(attachment.server, message.tickets))
