"""A control plane without a fleet."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from google.protobuf.duration_pb2 import Duration
from grpc.aio import ServicerContext

from modelyard.rpc.errors import Refusal
from modelyard.rpc.reasons import Reason
from modelyard.testing.server import FakeServer, ScriptItem, append, play
from modelyard.v1 import fleet_pb2, generation_pb2, orchestrator_pb2, selection_pb2

REQUEST_ID_KEY = "modelyard-request-id"


class FakeOrchestrator(FakeServer):
    """Answers Generate and Complete by script, embeds a text as (length, 1), keeps what Attach reports."""

    service = orchestrator_pb2.DESCRIPTOR.services_by_name["Orchestrator"]

    def __init__(self) -> None:
        super().__init__()
        self.models: list[fleet_pb2.Model] = []
        """Answer of ListModels and GetModel."""
        self.servers: list[fleet_pb2.ModelServerStatus] = []
        """Answer of ListModelServers and first message of WatchFleet."""
        self.decision = selection_pb2.Decision(
            verdict=selection_pb2.VERDICT_CHOSEN, server_id="fake-1", model="fake", provider="fake"
        )
        """Answer of ExplainSelection, and of Generate and Complete where they are asked to explain."""
        self.summary = orchestrator_pb2.GenerationSummary(
            finish_reason=generation_pb2.FINISH_REASON_STOP,
            usage=generation_pb2.Usage(prompt_tokens=3),
            server_id="fake-1",
            model="fake",
            provider="fake",
            attempts=[orchestrator_pb2.Attempt(server_id="fake-1", model="fake", provider="fake")],
        )
        """End of every answer; request id and completion tokens are filled in."""
        self.on_generate: Callable[[orchestrator_pb2.GenerateRequest], tuple[ScriptItem, ...]] | None = None
        """Makes the script of a request; takes precedence over `answer`."""
        self.reports: list[fleet_pb2.ServerReport] = []
        """Every report of every model server, in the order of arrival."""
        self.steps: tuple[fleet_pb2.ModelProgress | asyncio.Event | Refusal, ...] = ()
        """Script of PullModel, LoadModel and UnloadModel: steps are sent, events waited for, refusals raised. Where
        there is none, the one step that ends such a call."""
        self.assignment: orchestrator_pb2.AssignResponse | None = None
        """Answer of Assign. None: it knows nothing of direct mode, and such calls are not logged."""
        self.presets: list[orchestrator_pb2.Preset] = []
        """Answer of ListPresets."""
        self.next_report_in = 1.0
        self.lease_duration = 3.0
        self._script: tuple[ScriptItem, ...] = ("Hello", ", ", "world")
        self._summary = True
        self._desired: dict[str, fleet_pb2.DesiredState] = {}
        self._attached: dict[str, asyncio.Queue[Refusal | None]] = {}
        self._watchers: list[asyncio.Queue[orchestrator_pb2.WatchFleetResponse]] = []
        self._epoch = 0

    def answer(self, *items: ScriptItem, summary: bool = True) -> None:
        """Script of all Generate and Complete calls from now on; without `summary` the answer just ends."""
        self._script, self._summary = items, summary

    def publish(self, change: orchestrator_pb2.WatchFleetResponse) -> None:
        """Send a change to everyone who watches the fleet."""
        for watcher in self._watchers:
            watcher.put_nowait(change)

    def desire(self, server_id: str, state: fleet_pb2.DesiredState) -> None:
        """Direct a model server, at once if it is attached."""
        self._desired[server_id] = state
        if server_id in self._attached:
            self._attached[server_id].put_nowait(None)

    def detach(self, server_id: str, refusal: Refusal) -> None:
        """End the report stream of a model server."""
        self._attached[server_id].put_nowait(refusal)

    @property
    def attached(self) -> frozenset[str]:
        """Ids of the model servers that have a report stream."""
        return frozenset(self._attached)

    # -------------------------------------------------------------- service ---

    async def Generate(
        self, request: orchestrator_pb2.GenerateRequest, context: ServicerContext
    ) -> AsyncIterator[orchestrator_pb2.GenerateResponse]:
        request_id = request.request_id or f"fake-{len(self.calls)}"
        context.set_trailing_metadata(((REQUEST_ID_KEY, request_id),))
        async with self._received("Generate", context, request):
            script = self._script if self.on_generate is None else self.on_generate(request)
            if request.explain:
                yield orchestrator_pb2.GenerateResponse(decision=self.decision)
            tokens = 0
            async for delta in play(script):
                tokens += delta.tokens
                yield orchestrator_pb2.GenerateResponse(delta=delta)
            if self._summary:
                end = orchestrator_pb2.GenerateResponse(summary=self.summary)
                end.summary.request_id = request_id
                end.summary.usage.completion_tokens = tokens
                yield end

    async def Complete(
        self, request: orchestrator_pb2.CompleteRequest, context: ServicerContext
    ) -> orchestrator_pb2.CompleteResponse:
        request_id = request.request_id or f"fake-{len(self.calls)}"
        context.set_trailing_metadata(((REQUEST_ID_KEY, request_id),))
        async with self._received("Complete", context, request):
            asked = orchestrator_pb2.GenerateRequest.FromString(request.SerializeToString())
            script = self._script if self.on_generate is None else self.on_generate(asked)
            response = orchestrator_pb2.CompleteResponse(decisions=[self.decision] if request.explain else [])
            async for delta in play(script):
                append(response.delta, delta)
            if self._summary:
                response.summary.CopyFrom(self.summary)
                response.summary.request_id = request_id
                response.summary.usage.completion_tokens = response.delta.tokens
            return response

    async def Assign(
        self, request: orchestrator_pb2.AssignRequest, context: ServicerContext
    ) -> orchestrator_pb2.AssignResponse:
        if self.assignment is None:
            raise Refusal(Reason.UNSUPPORTED, "this control plane assigns nothing")
        async with self._received("Assign", context, request):
            return self.assignment

    async def Embed(
        self, request: orchestrator_pb2.EmbedRequest, context: ServicerContext
    ) -> orchestrator_pb2.EmbedResponse:
        request_id = request.request_id or f"fake-{len(self.calls)}"
        context.set_trailing_metadata(((REQUEST_ID_KEY, request_id),))
        async with self._received("Embed", context, request):
            return orchestrator_pb2.EmbedResponse(
                embeddings=[generation_pb2.Embedding(values=[len(text), 1]) for text in request.inputs],
                usage=generation_pb2.Usage(prompt_tokens=len(request.inputs)),
                server_id="fake-1",
                model="fake",
                provider="fake",
                request_id=request_id,
            )

    async def ListModels(
        self, request: orchestrator_pb2.ListModelsRequest, context: ServicerContext
    ) -> orchestrator_pb2.ListModelsResponse:
        async with self._received("ListModels", context, request):
            return orchestrator_pb2.ListModelsResponse(models=self.models)

    async def GetModel(
        self, request: orchestrator_pb2.GetModelRequest, context: ServicerContext
    ) -> orchestrator_pb2.GetModelResponse:
        async with self._received("GetModel", context, request):
            for model in self.models:
                if model.name == request.name:
                    return orchestrator_pb2.GetModelResponse(model=model)
            raise Refusal(Reason.UNKNOWN_MODEL, f"no model {request.name!r}")

    async def ListModelServers(
        self, request: orchestrator_pb2.ListModelServersRequest, context: ServicerContext
    ) -> orchestrator_pb2.ListModelServersResponse:
        async with self._received("ListModelServers", context, request):
            return orchestrator_pb2.ListModelServersResponse(servers=self.servers)

    async def WatchFleet(
        self, request: orchestrator_pb2.WatchFleetRequest, context: ServicerContext
    ) -> AsyncIterator[orchestrator_pb2.WatchFleetResponse]:
        changes: asyncio.Queue[orchestrator_pb2.WatchFleetResponse] = asyncio.Queue()
        self._watchers.append(changes)
        try:
            async with self._received("WatchFleet", context, request):
                yield orchestrator_pb2.WatchFleetResponse(snapshot=True, servers=self.servers)
                while True:
                    yield await changes.get()
        finally:
            self._watchers.remove(changes)

    async def ExplainSelection(
        self, request: orchestrator_pb2.ExplainSelectionRequest, context: ServicerContext
    ) -> orchestrator_pb2.ExplainSelectionResponse:
        async with self._received("ExplainSelection", context, request):
            return orchestrator_pb2.ExplainSelectionResponse(decision=self.decision, estimated_prompt_tokens=3)

    async def ReportFeedback(
        self, request: orchestrator_pb2.ReportFeedbackRequest, context: ServicerContext
    ) -> orchestrator_pb2.ReportFeedbackResponse:
        async with self._received("ReportFeedback", context, request):
            return orchestrator_pb2.ReportFeedbackResponse(counted=True)

    async def DrainModelServer(
        self, request: orchestrator_pb2.DrainModelServerRequest, context: ServicerContext
    ) -> orchestrator_pb2.DrainModelServerResponse:
        async with self._received("DrainModelServer", context, request):
            for server in self.servers:
                if server.report.identity.server_id == request.server_id:
                    live, draining = fleet_pb2.LEASE_STATE_LIVE, fleet_pb2.LEASE_STATE_DRAINING
                    server.lease_state = live if request.undo else draining
                    return orchestrator_pb2.DrainModelServerResponse(server=server)
            raise Refusal(Reason.UNKNOWN_SERVER, f"no model server {request.server_id!r}")

    async def PullModel(
        self, request: orchestrator_pb2.PullModelRequest, context: ServicerContext
    ) -> AsyncIterator[orchestrator_pb2.PullModelResponse]:
        async with self._received("PullModel", context, request):
            async for step in self._play_steps(fleet_pb2.MODEL_STATE_COLD):
                yield orchestrator_pb2.PullModelResponse(server_id=request.server_id or "fake-1", progress=step)

    async def LoadModel(
        self, request: orchestrator_pb2.LoadModelRequest, context: ServicerContext
    ) -> AsyncIterator[orchestrator_pb2.LoadModelResponse]:
        async with self._received("LoadModel", context, request):
            async for step in self._play_steps(fleet_pb2.MODEL_STATE_WARM):
                yield orchestrator_pb2.LoadModelResponse(server_id=request.server_id or "fake-1", progress=step)

    async def UnloadModel(
        self, request: orchestrator_pb2.UnloadModelRequest, context: ServicerContext
    ) -> AsyncIterator[orchestrator_pb2.UnloadModelResponse]:
        async with self._received("UnloadModel", context, request):
            async for step in self._play_steps(fleet_pb2.MODEL_STATE_COLD):
                yield orchestrator_pb2.UnloadModelResponse(server_id=request.server_id or "fake-1", progress=step)

    async def _play_steps(self, end: fleet_pb2.ModelState) -> AsyncIterator[fleet_pb2.ModelProgress]:
        for step in self.steps or (fleet_pb2.ModelProgress(state=end),):
            if isinstance(step, Refusal):
                raise step
            if isinstance(step, asyncio.Event):
                await step.wait()
            else:
                yield step

    async def ListPresets(
        self, request: orchestrator_pb2.ListPresetsRequest, context: ServicerContext
    ) -> orchestrator_pb2.ListPresetsResponse:
        async with self._received("ListPresets", context, request):
            return orchestrator_pb2.ListPresetsResponse(presets=self.presets)

    async def Attach(self, requests: AsyncIterator[fleet_pb2.ServerReport], context: ServicerContext) -> None:
        async with self._received("Attach", context) as call:
            first = await anext(aiter(requests), None)
            if first is None:
                return
            server_id = first.identity.server_id
            self._epoch += 1
            epoch = self._epoch
            told: asyncio.Queue[Refusal | None] = asyncio.Queue()
            if previous := self._attached.get(server_id):
                previous.put_nowait(Refusal(Reason.SUPERSEDED, f"a newer instance of {server_id} has attached"))
            self._attached[server_id] = told

            async def read() -> None:
                self._report(call.requests, first, told)
                async for report in requests:
                    self._report(call.requests, report, told)

            reading = asyncio.create_task(read())
            telling = asyncio.create_task(told.get())
            try:
                while True:
                    await asyncio.wait((reading, telling), return_when=asyncio.FIRST_COMPLETED)
                    if not telling.done():
                        reading.result()
                        return
                    if refusal := telling.result():
                        raise refusal
                    telling = asyncio.create_task(told.get())
                    await context.write(self._directive(server_id, epoch))
            finally:
                reading.cancel()
                telling.cancel()
                if self._attached.get(server_id) is told:
                    del self._attached[server_id]
                self._tell()

    def _report(
        self,
        log: list[fleet_pb2.ServerReport],
        report: fleet_pb2.ServerReport,
        told: asyncio.Queue[Refusal | None],
    ) -> None:
        log.append(report)
        self.reports.append(report)
        told.put_nowait(None)
        self._tell()

    def _directive(self, server_id: str, epoch: int) -> fleet_pb2.ServerDirective:
        return fleet_pb2.ServerDirective(
            orchestrator_id="fake-orchestrator",
            lease_epoch=epoch,
            lease_duration=_duration(self.lease_duration),
            next_report_in=_duration(self.next_report_in),
            desired_state=self._desired.get(server_id, fleet_pb2.DESIRED_STATE_SERVE),
        )


def _duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromNanoseconds(round(seconds * 1e9))
    return duration
