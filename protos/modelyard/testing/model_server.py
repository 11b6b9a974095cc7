"""A model server without an engine."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from types import TracebackType

from grpc.aio import ServicerContext

from modelyard.rpc.channels import channel
from modelyard.rpc.errors import Refusal
from modelyard.rpc.reasons import Reason
from modelyard.testing.server import FakeServer, ScriptItem, append, play
from modelyard.v1 import fleet_pb2, generation_pb2, model_server_pb2, orchestrator_pb2_grpc, task_pb2


def model_info(name: str = "fake", provider: str = "fake", **overrides: object) -> fleet_pb2.ModelInfo:
    """A free model that is fairly good at everything and can do everything."""
    values: dict[str, object] = {
        "name": name,
        "provider": provider,
        "context_length": 8192,
        "capabilities": [
            fleet_pb2.Capability(task_type=name, score=0.5) for name, number in task_pb2.TaskType.items() if number
        ],
        "features": [number for number in fleet_pb2.ModelFeature.values() if number],
    }
    return fleet_pb2.ModelInfo(**{**values, **overrides})  # type: ignore[arg-type]


StepItem = fleet_pb2.ModelProgress | asyncio.Event | Refusal
"""One step of a scripted pull, load or unload: progress is sent, an event is waited for, a refusal raised."""


def model_progress(state: fleet_pb2.ModelState, completed: int = 0, total: int = 0) -> fleet_pb2.ModelProgress:
    """Progress in bytes."""
    return fleet_pb2.ModelProgress(state=state, completed_bytes=completed, total_bytes=total)


_STEPS: Mapping[str, tuple[StepItem, ...]] = {
    "PullModel": (
        model_progress(fleet_pb2.MODEL_STATE_PULLING, 0, 100),
        model_progress(fleet_pb2.MODEL_STATE_PULLING, 50, 100),
        model_progress(fleet_pb2.MODEL_STATE_COLD, 100, 100),
    ),
    "LoadModel": (
        model_progress(fleet_pb2.MODEL_STATE_LOADING),
        model_progress(fleet_pb2.MODEL_STATE_WARM),
    ),
    "UnloadModel": (model_progress(fleet_pb2.MODEL_STATE_COLD),),
}


class FakeModelServer(FakeServer):
    """Answers Generate and Complete by script, embeds a text as (length, 1), counts a token per four bytes.

    PullModel, LoadModel and UnloadModel play a script, too (see `steps`); each state on the way becomes that of the
    model and is reported.

    `attach` reports to a control plane as a real one does. `models`, `load`, `status` and `state`
    may be changed at any time; `report_now` tells.
    """

    service = model_server_pb2.DESCRIPTOR.services_by_name["ModelServer"]

    def __init__(
        self, server_id: str = "fake-1", models: Sequence[fleet_pb2.ModelInfo] | None = None, slots: int = 4
    ) -> None:
        super().__init__()
        self.server_id = server_id
        self.instance_id = uuid.uuid4().hex
        self.models = list(models if models is not None else [model_info()])
        self.load = fleet_pb2.ServerLoad(slots=slots)
        self.status: fleet_pb2.ServerHealth = fleet_pb2.SERVER_HEALTH_READY
        self.state: fleet_pb2.DesiredState = fleet_pb2.DESIRED_STATE_SERVE
        self.manages_models = False
        """Whether the report says that models can be pulled, loaded and unloaded; the methods answer in any case."""
        self.on_generate: Callable[[model_server_pb2.ModelServerGenerateRequest], tuple[ScriptItem, ...]] | None = None
        """Makes the script of a request; takes precedence over `answer`."""
        self.finish_reason: generation_pb2.FinishReason = generation_pb2.FINISH_REASON_STOP
        self.timings: generation_pb2.Timings | None = None
        """Told with every result; None: not told."""
        self.directives: list[fleet_pb2.ServerDirective] = []
        """Every directive received, in order."""
        self._script: tuple[ScriptItem, ...] = ("Hello", ", ", "world")
        self._result = True
        self._steps = dict(_STEPS)
        self._due = asyncio.Event()
        self._attaching: asyncio.Task[None] | None = None

    def answer(self, *items: ScriptItem, result: bool = True) -> None:
        """Script of all Generate and Complete calls from now on; without `result` the stream just ends, the whole
        answer lacks it."""
        self._script, self._result = items, result

    def steps(self, method: str, *items: StepItem) -> None:
        """Script of all calls of PullModel, LoadModel or UnloadModel from now on."""
        self._steps[method] = items

    def report(self) -> fleet_pb2.ServerReport:
        """The whole state now."""
        epoch = self.directives[-1].lease_epoch if self.directives else 0
        return fleet_pb2.ServerReport(
            identity=fleet_pb2.ServerIdentity(
                server_id=self.server_id, instance_id=self.instance_id, endpoint=self.address
            ),
            engine=fleet_pb2.EngineInfo(name="fake", manages_models=self.manages_models),
            models=self.models,
            load=self.load,
            health=self.status,
            lease_epoch=epoch,
            state=self.state,
        )

    async def attach(self, address: str) -> None:
        """Open a report stream to a control plane and keep it until `detach`; waits for the first directive."""
        seen = len(self.directives)
        self._attaching = asyncio.create_task(self._attach(address))
        waiting = asyncio.create_task(self.until(lambda: len(self.directives) > seen))
        await asyncio.wait((waiting, self._attaching), return_when=asyncio.FIRST_COMPLETED)
        if not waiting.done():
            waiting.cancel()
            self._attaching.result()  # raises why the stream ended
        waiting.result()

    async def detach(self) -> None:
        """Break the report stream."""
        if self._attaching is not None:
            attaching, self._attaching = self._attaching, None
            attaching.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await attaching

    def report_now(self) -> None:
        """Send a report at once."""
        self._due.set()

    async def _attach(self, address: str) -> None:
        async with channel(address, own_connection=True) as link:
            call = orchestrator_pb2_grpc.OrchestratorStub(link).Attach()  # type: ignore[no-untyped-call]

            async def send() -> None:
                interval = 1.0
                while True:
                    self._due.clear()
                    await call.write(self.report())
                    if self.directives:
                        interval = self.directives[-1].next_report_in.ToNanoseconds() / 1e9 or interval
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(interval):
                            await self._due.wait()

            sending = asyncio.create_task(send())
            try:
                async for directive in call:
                    self.directives.append(directive)
                    self._tell()
            finally:
                sending.cancel()
                call.cancel()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.detach()
        await self.stop()

    # -------------------------------------------------------------- service ---

    async def Describe(
        self, request: model_server_pb2.DescribeRequest, context: ServicerContext
    ) -> model_server_pb2.DescribeResponse:
        async with self._received("Describe", context, request):
            report = self.report()
            report.lease_epoch = 0
            return model_server_pb2.DescribeResponse(report=report)

    async def Generate(
        self, request: model_server_pb2.ModelServerGenerateRequest, context: ServicerContext
    ) -> AsyncIterator[model_server_pb2.ModelServerGenerateResponse]:
        async with self._received("Generate", context, request):
            tokens = 0
            async for delta in play(self._script if self.on_generate is None else self.on_generate(request)):
                tokens += delta.tokens
                yield model_server_pb2.ModelServerGenerateResponse(delta=delta)
            if self._result:
                yield model_server_pb2.ModelServerGenerateResponse(result=self._end(request.input, tokens))

    async def Complete(
        self, request: model_server_pb2.ModelServerCompleteRequest, context: ServicerContext
    ) -> model_server_pb2.ModelServerCompleteResponse:
        async with self._received("Complete", context, request):
            asked = model_server_pb2.ModelServerGenerateRequest.FromString(request.SerializeToString())
            answer = model_server_pb2.ModelServerCompleteResponse()
            async for delta in play(self._script if self.on_generate is None else self.on_generate(asked)):
                append(answer.delta, delta)
            if self._result:
                answer.result.CopyFrom(self._end(request.input, answer.delta.tokens))
            return answer

    def _end(self, asked: generation_pb2.GenerationInput, tokens: int) -> generation_pb2.GenerationResult:
        usage = generation_pb2.Usage(prompt_tokens=_tokens(asked), completion_tokens=tokens)
        return generation_pb2.GenerationResult(finish_reason=self.finish_reason, usage=usage, timings=self.timings)

    async def Embed(
        self, request: model_server_pb2.ModelServerEmbedRequest, context: ServicerContext
    ) -> model_server_pb2.ModelServerEmbedResponse:
        async with self._received("Embed", context, request):
            return model_server_pb2.ModelServerEmbedResponse(
                embeddings=[generation_pb2.Embedding(values=[len(text), 1]) for text in request.inputs],
                usage=generation_pb2.Usage(prompt_tokens=len(request.inputs)),
            )

    async def CountTokens(
        self, request: model_server_pb2.CountTokensRequest, context: ServicerContext
    ) -> model_server_pb2.CountTokensResponse:
        async with self._received("CountTokens", context, request):
            return model_server_pb2.CountTokensResponse(prompt_tokens=_tokens(request.input))

    async def PullModel(
        self, request: model_server_pb2.ModelServerPullModelRequest, context: ServicerContext
    ) -> AsyncIterator[model_server_pb2.ModelServerPullModelResponse]:
        async with self._received("PullModel", context, request):
            async for progress in self._take("PullModel", request.model):
                yield model_server_pb2.ModelServerPullModelResponse(progress=progress)

    async def LoadModel(
        self, request: model_server_pb2.ModelServerLoadModelRequest, context: ServicerContext
    ) -> AsyncIterator[model_server_pb2.ModelServerLoadModelResponse]:
        async with self._received("LoadModel", context, request):
            async for progress in self._take("LoadModel", request.model):
                yield model_server_pb2.ModelServerLoadModelResponse(progress=progress)

    async def UnloadModel(
        self, request: model_server_pb2.ModelServerUnloadModelRequest, context: ServicerContext
    ) -> AsyncIterator[model_server_pb2.ModelServerUnloadModelResponse]:
        async with self._received("UnloadModel", context, request):
            async for progress in self._take("UnloadModel", request.model):
                yield model_server_pb2.ModelServerUnloadModelResponse(progress=progress)

    async def _take(self, method: str, model: str) -> AsyncIterator[fleet_pb2.ModelProgress]:
        info = next((info for info in self.models if info.name == model), None)
        if info is None:
            raise Refusal(Reason.UNKNOWN_MODEL, f"no model is called {model!r}")
        for item in self._steps[method]:
            if isinstance(item, Refusal):
                raise item
            if isinstance(item, asyncio.Event):
                await item.wait()
            else:
                info.state = item.state
                self.report_now()
                yield item


def _tokens(given: generation_pb2.GenerationInput) -> int:
    texts = [given.prompt, *(part.text for message in given.messages for part in message.content)]
    return max(1, sum(len(text.encode()) for text in texts) // 4)
