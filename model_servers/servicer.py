"""The ModelServer service: parse, hand to the engine, render."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import replace

import grpc.aio

from model_servers import convert
from model_servers.admission import Admission
from model_servers.condition import Condition
from model_servers.description import SelfDescription
from model_servers.engine import (
    Delta,
    Embeddings,
    Engine,
    EngineError,
    Feature,
    Finished,
    GenerationRequest,
    Health,
)
from model_servers.models import Keeper, Step
from model_servers.performance import Recorder, Timing
from model_servers.tickets import Tickets, Use
from model_servers.watchdog import Run, Watchdog, prompt_tokens, text_tokens
from modelyard.rpc import validation
from modelyard.rpc.channels import MAX_MESSAGE_BYTES
from modelyard.rpc.errors import Refusal, Violation, invalid
from modelyard.rpc.reasons import Reason
from modelyard.v1 import fleet_pb2, generation_pb2, model_server_pb2

_log = logging.getLogger(__name__)

SERVICE = model_server_pb2.DESCRIPTOR.services_by_name["ModelServer"]

_LOOKS = 4
"""How often a write is looked at before its reader counts as too slow."""


class ModelServerServicer:
    """Methods are called by `modelyard.rpc.server.service_handler`, which renders Refusals."""

    def __init__(
        self,
        engine: Engine,
        condition: Condition,
        description: SelfDescription,
        admission: Admission,
        tickets: Tickets,
        recorder: Recorder,
        keeper: Keeper,
        watchdog: Watchdog,
        *,
        draining: Callable[[], bool],
        max_seconds: float,
        slow_reader_seconds: float,
        clock: Callable[[], float],
    ) -> None:
        self._engine = engine
        self._condition = condition
        self._description = description
        self._admission = admission
        self._tickets = tickets
        self._recorder = recorder
        self._keeper = keeper
        self._watchdog = watchdog
        self._draining = draining
        self._max_seconds = max_seconds
        self._slow_reader_seconds = slow_reader_seconds
        self._clock = clock

    async def Describe(
        self, request: model_server_pb2.DescribeRequest, context: grpc.aio.ServicerContext
    ) -> model_server_pb2.DescribeResponse:
        return model_server_pb2.DescribeResponse(report=self._description.report())

    async def Generate(
        self, request: model_server_pb2.ModelServerGenerateRequest, context: grpc.aio.ServicerContext
    ) -> None:
        await self._generate(request, context, _Reader(context, self._slow_reader_seconds))

    async def Complete(
        self, request: model_server_pb2.ModelServerCompleteRequest, context: grpc.aio.ServicerContext
    ) -> bytes:
        whole = _Whole()
        await self._generate(request, context, whole)
        return whole.message

    async def Embed(
        self, request: model_server_pb2.ModelServerEmbedRequest, context: grpc.aio.ServicerContext
    ) -> model_server_pb2.ModelServerEmbedResponse:
        if violations := validation.check_model_server_embed_request(request):
            raise invalid(violations)
        with (
            self._tickets.use(request.ticket, request.model, request.orchestrator_id) as use,
            self._admission.place(use.orchestrator_id),
        ):
            self._check(request.model, Feature.EMBEDDING)
            embeddings: Embeddings
            run: Run | None = None
            try:
                async with asyncio.timeout(self._limit(context)) as scope:
                    with _translated("inputs"):
                        async with self._at_work(request.model, text_tokens(request.inputs), scope) as run:
                            embeddings = await self._engine.embed(request.model, tuple(request.inputs))
                            run.at = self._clock()
            except TimeoutError:
                if not scope.expired():
                    raise
                raise self._too_late(run) from None
            answer = convert.embed_response(embeddings)
            use.end(generation_pb2.GenerationResult(usage=answer.usage))
        return answer

    async def CountTokens(
        self, request: model_server_pb2.CountTokensRequest, context: grpc.aio.ServicerContext
    ) -> model_server_pb2.CountTokensResponse:
        if violations := validation.check_model_server_generate_request(request):
            raise invalid(violations)
        generation = convert.generation_request(request.model, request.input)
        self._check(generation.model, convert.needed_features(generation))
        with _translated("input"):
            tokens = await self._engine.count_tokens(generation)
        return model_server_pb2.CountTokensResponse(prompt_tokens=tokens)

    async def PullModel(
        self, request: model_server_pb2.ModelServerPullModelRequest, context: grpc.aio.ServicerContext
    ) -> AsyncGenerator[model_server_pb2.ModelServerPullModelResponse, None]:
        async with aclosing(self._take_step(Step.PULL, request.model)) as steps:
            async for progress in steps:
                yield model_server_pb2.ModelServerPullModelResponse(progress=progress)

    async def LoadModel(
        self, request: model_server_pb2.ModelServerLoadModelRequest, context: grpc.aio.ServicerContext
    ) -> AsyncGenerator[model_server_pb2.ModelServerLoadModelResponse, None]:
        async with aclosing(self._take_step(Step.LOAD, request.model)) as steps:
            async for progress in steps:
                yield model_server_pb2.ModelServerLoadModelResponse(progress=progress)

    async def UnloadModel(
        self, request: model_server_pb2.ModelServerUnloadModelRequest, context: grpc.aio.ServicerContext
    ) -> AsyncGenerator[model_server_pb2.ModelServerUnloadModelResponse, None]:
        async with aclosing(self._take_step(Step.UNLOAD, request.model)) as steps:
            async for progress in steps:
                yield model_server_pb2.ModelServerUnloadModelResponse(progress=progress)

    async def _take_step(self, step: Step, model: str) -> AsyncGenerator[fleet_pb2.ModelProgress, None]:
        if not model:
            raise invalid((Violation("model", "is required"),))
        self._refuse_when_draining()
        if self._engine.status().health is Health.STARTING:
            raise Refusal(Reason.SERVER_BUSY, "the engine is still starting", retry_after=1.0)
        try:
            with _translated("model"):
                async with aclosing(self._keeper.follow(step, model)) as steps:
                    async for progress in steps:
                        yield convert.model_progress(progress)
        except Refusal:
            self._refuse_when_draining()  # what ends with the server did not fail
            raise

    def _refuse_when_draining(self) -> None:
        if self._draining():
            raise Refusal(Reason.DRAINING, "this model server is draining; its models stay as they are")

    def _check(self, name: str, needed: Feature) -> None:
        """Refuse what the engine cannot do at all, or not now."""
        status = self._condition.status()
        model = next((model for model in status.models if model.name == name), None)
        if status.health is Health.STARTING:
            raise Refusal(Reason.SERVER_BUSY, "the engine is still starting", retry_after=1.0)
        if status.health is Health.UNHEALTHY:
            raise Refusal(Reason.ENGINE_FAILED, f"the engine is not healthy: {status.health_detail or 'no details'}")
        if model is None:
            known = ", ".join(model.name for model in status.models) or "none"
            raise Refusal(Reason.UNKNOWN_MODEL, f"no model is called {name[:100]!r}; this server has: {known}")
        if missing := needed & ~model.features:
            names = ", ".join(str(f.name).lower() for f in Feature if f and f in missing)
            raise Refusal(Reason.UNSUPPORTED, f"model {name!r} lacks: {names}")

    def _limit(self, context: grpc.aio.ServicerContext) -> float:
        remaining = context.time_remaining()
        return self._max_seconds if remaining is None else min(remaining, self._max_seconds)

    def _too_late(self, run: Run | None) -> Refusal:
        """Why a request whose time was cut off has ended."""
        if run is not None and run.stalled:
            return Refusal(Reason.ENGINE_FAILED, f"the engine stopped working: {run.stalled}")
        return Refusal(
            Reason.DEADLINE_EXCEEDED,
            f"the request took longer than its deadline or the server's {self._max_seconds:g} s allow",
        )

    @asynccontextmanager
    async def _at_work(
        self,
        model: str,
        tokens: int,
        scope: asyncio.Timeout,
        *,
        blocked: Callable[[], bool] = lambda: False,
        holds_back: bool = False,
    ) -> AsyncIterator[Run]:
        """Use a model, loaded first if it is cold, under the eyes of the watchdog, which may end the scope."""
        waited = await self._keeper.enter(model)
        run = self._watchdog.begin(
            model, tokens, end=lambda: _expire(scope), blocked=blocked, holds_back=holds_back, waited=waited
        )
        try:
            yield run
        finally:
            self._watchdog.end(run)
            self._keeper.leave(model)

    async def _generate(
        self,
        asked: model_server_pb2.ModelServerGenerateRequest | model_server_pb2.ModelServerCompleteRequest,
        context: grpc.aio.ServicerContext,
        outlet: _Reader | _Whole,
    ) -> None:
        received = self._clock()
        if violations := validation.check_model_server_generate_request(asked):
            raise invalid(violations)
        request = convert.generation_request(asked.model, asked.input, asked.request_id)
        run: Run | None = None
        with (
            self._tickets.use(asked.ticket, asked.model, asked.orchestrator_id) as use,
            self._admission.place(use.orchestrator_id),
        ):
            self._check(request.model, convert.needed_features(request))
            try:
                async with asyncio.timeout(self._limit(context)) as scope:
                    outlet.open(scope)
                    with _translated("input"):
                        async with self._at_work(
                            request.model,
                            prompt_tokens(request),
                            scope,
                            blocked=outlet.blocked,
                            holds_back=bool(request.tools),
                        ) as run:
                            await self._pass_on(request, received, outlet, run, use)
            except TimeoutError:
                if not scope.expired():
                    raise
                if outlet.too_slow:
                    # Told to the log as well: the caller will not read it soon.
                    _log.warning("request %r: cut off, its reader is too slow", request.request_id)
                    raise Refusal(
                        Reason.SLOW_READER, f"a piece of the answer was not read for {self._slow_reader_seconds:g} s"
                    ) from None
                raise self._too_late(run) from None
            finally:
                outlet.close()

    async def _pass_on(
        self, request: GenerationRequest, received: float, outlet: _Reader | _Whole, run: Run, use: Use
    ) -> None:
        clock = self._clock
        take = outlet.take
        first = last = 0.0
        tokens = deltas = 0
        finished: Finished | None = None
        timing: Timing | None = None
        self._recorder.begin(request.model)
        try:
            # Closing the generator is what stops the engine, whatever ends this block.
            async with aclosing(self._engine.generate(request)) as items:
                async for item in items:
                    if type(item) is Delta:
                        last = run.at = clock()
                        if not deltas:
                            first = last
                        deltas += 1
                        tokens += item.tokens
                        await take(item)
                    else:
                        finished = item  # type: ignore[assignment]
                        run.at = clock()
            if finished is None:
                raise Refusal(Reason.ENGINE_FAILED, "the engine ended its answer without a result")
            if finished.last is not None:
                last = run.at
                if not deltas:
                    first = last
                deltas += 1
                tokens += finished.last.tokens
            generated = finished.usage.completion_tokens
            timing = Timing(
                queued=finished.queued + run.waited,
                ttft=first - received if deltas else None,
                tpot=(last - first) / (tokens - 1) if tokens > 1 and deltas > 1 else None,
                total=clock() - received,
            )
            await outlet.end(finished, timing, use)
        finally:
            use.tokens = tokens
            if finished is None or timing is None:
                self._recorder.end(request.model, None)
            else:
                computed = finished.usage.prompt_tokens - finished.usage.cached_prompt_tokens
                if run.waited and timing.ttft is not None:
                    # What loading took is told by itself: it says nothing of the next request.
                    timing = replace(timing, queued=finished.queued, ttft=timing.ttft - run.waited)
                self._recorder.end(request.model, timing, computed=computed, generated=generated)


class _Whole:
    """Keeps an answer until it is complete."""

    too_slow = False

    def __init__(self) -> None:
        self._pieces: list[Delta] = []
        self.message = b""

    def open(self, scope: asyncio.Timeout) -> None:
        """Nobody reads yet."""

    async def take(self, delta: Delta) -> None:
        self._pieces.append(delta)

    async def end(self, finished: Finished, timing: Timing, use: Use) -> None:
        if finished.last is not None:
            self._pieces.append(finished.last)
        self.message = convert.result_bytes(finished, timing, convert.merged(self._pieces))
        if len(self.message) > MAX_MESSAGE_BYTES:
            raise Refusal(
                Reason.UNSUPPORTED,
                f"the answer has {len(self.message)} bytes, more than one message may have: ask for it as a stream",
            )
        use.ends_with(self.message)

    def blocked(self) -> bool:
        return False

    def close(self) -> None:
        """Nothing to end."""


class _Reader:
    """Writes to the caller and notices when a write does not get through.

    One timer looks now and then instead of a timeout around each write: writing happens once
    per token. What piles up meanwhile is bounded by the connection's flow control window, since
    the engine is not asked for more while a write is pending.
    """

    def __init__(self, context: grpc.aio.ServicerContext, patience: float) -> None:
        self._write = context.write
        self._patience = patience
        self._loop = asyncio.get_running_loop()
        self._writes = 0
        self._pending = False
        self._seen = 0
        self._looks = 0
        self._scope: asyncio.Timeout | None = None
        self._timer: asyncio.TimerHandle | None = None
        self.too_slow = False

    def open(self, scope: asyncio.Timeout) -> None:
        """Watch from now on; the scope is ended if a write does not get through."""
        self._scope = scope
        self._timer = self._loop.call_later(self._patience / _LOOKS, self._look)

    async def take(self, delta: Delta) -> None:
        await self._send(convert.delta_bytes(delta))

    async def end(self, finished: Finished, timing: Timing, use: Use) -> None:
        message = convert.result_bytes(finished, timing, finished.last)
        use.ends_with(message)
        await self._send(message)

    async def _send(self, message: bytes) -> None:
        self._writes += 1
        self._pending = True
        await self._write(message)
        self._pending = False

    def blocked(self) -> bool:
        """Whether a piece is being written, so that the engine is not asked for the next."""
        return self._pending

    def _look(self) -> None:
        # Stuck means: the very write that was pending at the first of several looks still is.
        self._looks = self._looks + 1 if self._pending and self._seen == self._writes else 0
        self._seen = self._writes
        if self._looks >= _LOOKS:
            self.too_slow = True
            if self._scope is not None:
                _expire(self._scope)
        else:
            self._timer = self._loop.call_later(self._patience / _LOOKS, self._look)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()


def _expire(scope: asyncio.Timeout) -> None:
    """End what runs in the scope, unless its end has come already."""
    if not scope.expired():
        scope.reschedule(asyncio.get_running_loop().time())


@contextmanager
def _translated(field: str) -> Iterator[None]:
    try:
        yield
    except EngineError as error:
        raise convert.refusal(error, field) from error
