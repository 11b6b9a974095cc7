"""The ModelServer service: parse, hand to the engine, render."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from contextlib import aclosing, contextmanager

import grpc.aio

from model_servers import convert
from model_servers.admission import Admission
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
from model_servers.performance import Recorder, Timing
from modelyard.rpc import validation
from modelyard.rpc.errors import Refusal, invalid
from modelyard.rpc.reasons import Reason
from modelyard.v1 import model_server_pb2

_log = logging.getLogger(__name__)

SERVICE = model_server_pb2.DESCRIPTOR.services_by_name["ModelServer"]

_LOOKS = 4
"""How often a write is looked at before its reader counts as too slow."""


class ModelServerServicer:
    """Methods are called by `modelyard.rpc.server.service_handler`, which renders Refusals."""

    def __init__(
        self,
        engine: Engine,
        description: SelfDescription,
        admission: Admission,
        recorder: Recorder,
        *,
        max_seconds: float,
        slow_reader_seconds: float,
        clock: Callable[[], float],
    ) -> None:
        self._engine = engine
        self._description = description
        self._admission = admission
        self._recorder = recorder
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
        received = self._clock()
        if violations := validation.check_model_server_generate_request(request):
            raise invalid(violations)
        generation = convert.generation_request(request.model, request.input, request.request_id)
        with self._admission.place(request.orchestrator_id):
            self._check(generation.model, convert.needed_features(generation))
            await self._generate(generation, received, context)

    async def Embed(
        self, request: model_server_pb2.ModelServerEmbedRequest, context: grpc.aio.ServicerContext
    ) -> model_server_pb2.ModelServerEmbedResponse:
        if violations := validation.check_model_server_embed_request(request):
            raise invalid(violations)
        with self._admission.place(request.orchestrator_id):
            self._check(request.model, Feature.EMBEDDING)
            embeddings: Embeddings
            try:
                async with asyncio.timeout(self._limit(context)) as scope:
                    with _translated("inputs"):
                        embeddings = await self._engine.embed(request.model, tuple(request.inputs))
            except TimeoutError:
                if not scope.expired():
                    raise
                raise self._too_late() from None
        return convert.embed_response(embeddings)

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

    def _check(self, name: str, needed: Feature) -> None:
        """Refuse what the engine cannot do at all, or not now."""
        status = self._engine.status()
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

    def _too_late(self) -> Refusal:
        return Refusal(
            Reason.DEADLINE_EXCEEDED,
            f"the request took longer than its deadline or the server's {self._max_seconds:g} s allow",
        )

    async def _generate(self, request: GenerationRequest, received: float, context: grpc.aio.ServicerContext) -> None:
        reader: _Reader | None = None
        try:
            async with asyncio.timeout(self._limit(context)) as scope:
                reader = _Reader(context, scope, self._slow_reader_seconds)
                with _translated("input"):
                    await self._stream(request, received, reader)
        except TimeoutError:
            if not scope.expired():
                raise
            if reader is not None and reader.too_slow:
                # Told to the log as well: the caller will not read it soon.
                _log.warning("request %r: cut off, its reader is too slow", request.request_id)
                raise Refusal(
                    Reason.SLOW_READER, f"a piece of the answer was not read for {self._slow_reader_seconds:g} s"
                ) from None
            raise self._too_late() from None
        finally:
            if reader is not None:
                reader.close()

    async def _stream(self, request: GenerationRequest, received: float, reader: _Reader) -> None:
        clock = self._clock
        write = reader.write
        encode = convert.delta_bytes
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
                        last = clock()
                        if not deltas:
                            first = last
                        deltas += 1
                        tokens += item.tokens
                        await write(encode(item))
                    else:
                        finished = item  # type: ignore[assignment]
            if finished is None:
                raise Refusal(Reason.ENGINE_FAILED, "the engine ended its answer without a result")
            if finished.last is not None:
                last = clock()
                if not deltas:
                    first = last
                deltas += 1
                tokens += finished.last.tokens
            generated = finished.usage.completion_tokens
            timing = Timing(
                queued=finished.queued,
                ttft=first - received if deltas else None,
                tpot=(last - first) / (tokens - 1) if tokens > 1 and deltas > 1 else None,
                total=clock() - received,
            )
            await write(convert.result_bytes(finished, timing))
        finally:
            if finished is None or timing is None:
                self._recorder.end(request.model, None)
            else:
                computed = finished.usage.prompt_tokens - finished.usage.cached_prompt_tokens
                self._recorder.end(request.model, timing, computed=computed, generated=generated)


class _Reader:
    """Writes to the caller and notices when a write does not get through.

    One timer looks now and then instead of a timeout around each write: writing happens once
    per token. What piles up meanwhile is bounded by the connection's flow control window, since
    the engine is not asked for more while a write is pending.
    """

    def __init__(self, context: grpc.aio.ServicerContext, scope: asyncio.Timeout, patience: float) -> None:
        self._write = context.write
        self._scope = scope
        self._patience = patience
        self._loop = asyncio.get_running_loop()
        self._writes = 0
        self._pending = False
        self._seen = 0
        self._looks = 0
        self._timer = self._loop.call_later(patience / _LOOKS, self._look)
        self.too_slow = False

    async def write(self, message: bytes) -> None:
        self._writes += 1
        self._pending = True
        await self._write(message)
        self._pending = False

    def _look(self) -> None:
        # Stuck means: the very write that was pending at the first of several looks still is.
        self._looks = self._looks + 1 if self._pending and self._seen == self._writes else 0
        self._seen = self._writes
        if self._looks >= _LOOKS:
            self.too_slow = True
            self._scope.reschedule(self._loop.time())
        else:
            self._timer = self._loop.call_later(self._patience / _LOOKS, self._look)

    def close(self) -> None:
        self._timer.cancel()


@contextmanager
def _translated(field: str) -> Iterator[None]:
    try:
        yield
    except EngineError as error:
        raise convert.refusal(error, field) from error
