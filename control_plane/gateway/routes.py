"""The routes of the gateway: parse -> call the same servicer as gRPC does -> render."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from starlette.routing import Route, Router
from starlette.types import Receive, Scope, Send

from control_plane.api.metrics import Metrics
from control_plane.api.orchestrator import OrchestratorServicer
from control_plane.domain.ports import Clock
from control_plane.gateway import chat, completions, embeddings, responses
from control_plane.gateway.answers import Dialect, encode
from control_plane.gateway.errors import HttpRefusal
from control_plane.gateway.exchange import Exchange, Gone
from control_plane.gateway.hints import apply, apply_routing, hints
from control_plane.gateway.sinks import Sink, StreamSink, WholeSink
from modelyard.openai import wire
from modelyard.rpc.errors import Refusal
from modelyard.v1 import fleet_pb2, orchestrator_pb2

T = TypeVar("T")


class Endpoint:
    """The ASGI application of one route."""

    def __init__(self, methods: tuple[str, ...], serve: Callable[[Exchange], Awaitable[None]]) -> None:
        self._methods = methods
        self._serve = serve

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        http = Exchange(scope, receive, send)
        try:
            http.check(self._methods)
            await self._serve(http)
        except asyncio.CancelledError as error:
            # Cancelled by its client or at the end of the drain: either way this is where it ends.
            task = asyncio.current_task()
            if task is not None:
                task.uncancel()
            await http.fail(error)
        except Exception as error:
            await http.fail(error)


class Gateway:
    """OpenAI's API, served by the fleet. `max_request_bytes` bounds bodies, `body_timeout` (seconds)
    the time that one may take to arrive."""

    def __init__(
        self,
        servicer: OrchestratorServicer,
        clock: Clock,
        metrics: Metrics,
        max_request_bytes: int,
        body_timeout: float,
    ) -> None:
        self._servicer = servicer
        self._clock = clock
        self._metrics = metrics
        self._limit = max_request_bytes
        self._within = body_timeout
        self.app = Router(
            [
                *(
                    Route(path, Endpoint(("POST",), self._generating(dialect)))
                    for path, dialect in (
                        ("/v1/chat/completions", chat.DIALECT),
                        ("/v1/completions", completions.DIALECT),
                        ("/v1/responses", responses.DIALECT),
                    )
                ),
                Route("/v1/embeddings", Endpoint(("POST",), self._embed)),
                Route("/v1/models", Endpoint(("GET",), self._list_models)),
                Route("/v1/models/{model:path}", Endpoint(("GET",), self._get_model)),
                Route("/health", Endpoint(("GET", "HEAD"), self._health)),
                Route("/ready", Endpoint(("GET", "HEAD"), self._ready)),
            ],
            redirect_slashes=False,
            default=Endpoint(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"), _nothing_here),
        )

    # ---------------------------------------------------------------- work ---

    def _generating(self, dialect: Dialect) -> Callable[[Exchange], Awaitable[None]]:
        async def serve(http: Exchange) -> None:
            asked = await self._parsed(http, dialect.label, dialect.parse)
            http.rename = asked.rename
            given = self._checked(dialect.label, hints, http.headers, asked.metadata)
            request = asked.request
            apply(given, request)
            request.request_id = http.request_id
            if asked.stream:
                stream = StreamSink(http, self._clock, given.timeout, asked)
                await http.unless_gone(self._servicer.Generate(request, stream, counted_as=dialect.label))
                return
            whole = WholeSink(http, self._clock, given.timeout)
            await http.unless_gone(self._servicer.Generate(request, whole, counted_as=dialect.label))
            await http.respond(asked.render(whole.head(), whole.answer))

        return serve

    async def _embed(self, http: Exchange) -> None:
        label = embeddings.LABEL
        asked = await self._parsed(http, label, embeddings.parse)
        http.rename = embeddings.rename
        given = self._checked(label, hints, http.headers, asked.metadata)
        apply_routing(given, asked.request)
        asked.request.request_id = http.request_id
        sink = Sink(http, self._clock, given.timeout)
        response = await http.unless_gone(self._servicer.Embed(asked.request, sink, counted_as=label))
        await http.respond(embeddings.render(response, asked.base64))

    async def _parsed(self, http: Exchange, label: str, parse: Callable[[bytes], T]) -> T:
        try:
            return parse(await http.body(self._limit, self._within))
        except Refusal as refusal:
            self._metrics.finished(label, refusal.reason)
            raise
        except (Gone, asyncio.CancelledError):
            self._metrics.finished(label, "cancelled")
            raise

    def _checked(self, label: str, check: Callable[..., T], *arguments: Any) -> T:
        try:
            return check(*arguments)
        except Refusal as refusal:
            self._metrics.finished(label, refusal.reason)
            raise

    # --------------------------------------------------------------- fleet ---

    async def _list_models(self, http: Exchange) -> None:
        listed = await self._servicer.ListModels(orchestrator_pb2.ListModelsRequest(), None, counted_as="http_models")
        models = [_model(model) for model in listed.models if _is_offered(model)]
        await http.respond(encode(wire.ModelList(data=models)))

    async def _get_model(self, http: Exchange) -> None:
        request = orchestrator_pb2.GetModelRequest(name=http.scope["path_params"]["model"])
        found = await self._servicer.GetModel(request, None, counted_as="http_models")
        await http.respond(encode(_model(found.model)))

    # -------------------------------------------------------------- health ---

    async def _health(self, http: Exchange) -> None:
        await http.respond(b'{"status":"ok"}')

    async def _ready(self, http: Exchange) -> None:
        if self._servicer.stopping:
            await http.respond(b'{"status":"draining"}', 503)
        else:
            await http.respond(b'{"status":"ready"}')


async def _nothing_here(http: Exchange) -> None:
    raise HttpRefusal(404, f"there is no {http.scope['method']} {http.scope['path'][:200]}")


def _is_offered(model: fleet_pb2.Model) -> bool:
    """Whether some server that is not lost has it; definitions name others too."""
    return any(placement.lease_state != fleet_pb2.LEASE_STATE_LOST for placement in model.placements)


def _model(model: fleet_pb2.Model) -> wire.Model:
    return wire.Model(id=model.name, owned_by=",".join(model.providers), max_model_len=model.context_length)
