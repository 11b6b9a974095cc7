"""PullModel, LoadModel and UnloadModel: find the model server that is meant, relay what it tells of its progress."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Protocol

import grpc
from google.protobuf.message import DecodeError

from control_plane.api.upstream import Upstream, Upstreams
from control_plane.domain.errors import (
    DomainError,
    fleet_warming_up,
    no_capable_server,
    servers_away,
    unknown_model,
)
from control_plane.domain.model import ServerId
from control_plane.domain.ports import Clock
from control_plane.domain.server import LeaseState
from control_plane.fleet.registry import Fleet
from control_plane.fleet.server import Server
from modelyard.rpc.errors import Refusal, Violation, from_rpc_error, invalid
from modelyard.rpc.reasons import Reason
from modelyard.v1 import fleet_pb2, model_server_pb2, orchestrator_pb2

# What a model server may say of such an order; anything else is a failure of its engine to the caller.
_PASSED_ON = frozenset(
    {
        Reason.INVALID_REQUEST,
        Reason.UNKNOWN_MODEL,
        Reason.UNSUPPORTED,
        Reason.SERVER_BUSY,
        Reason.RATE_LIMITED,
        Reason.CREDENTIALS_REJECTED,
        Reason.OUT_OF_MEMORY,
        Reason.SERVERS_AWAY,
        Reason.DEADLINE_EXCEEDED,
        Reason.ENGINE_FAILED,
    }
)

_AWAY_RETRY = 1.0

# Characters of a step's own words that are passed on.
_DETAIL_LENGTH = 300


class Caller(Protocol):
    """Who is told of the progress: the context of a call."""

    def write(self, message: Any) -> Awaitable[None]: ...

    def time_remaining(self) -> float | None:
        """Seconds; None: as long as it takes."""
        ...


@dataclass(frozen=True, slots=True)
class Step:
    """One of the three things that can be done to a model on a server."""

    verb: str
    call: Callable[[Upstream], grpc.aio.UnaryStreamMultiCallable]
    request: Callable[..., Any]
    """Message of the model server."""
    progress: Callable[[bytes], Any]
    """Parses an answer of the model server."""
    response: Callable[..., Any]
    """Message to the caller."""
    ends: frozenset[int]
    """States that the last message may tell."""
    holds: bool
    """Only a server that lists the model can do it."""


_COLD, _WARM = fleet_pb2.MODEL_STATE_COLD, fleet_pb2.MODEL_STATE_WARM

PULL = Step(
    "pull",
    lambda upstream: upstream.pull_model,
    model_server_pb2.ModelServerPullModelRequest,
    model_server_pb2.ModelServerPullModelResponse.FromString,
    orchestrator_pb2.PullModelResponse,
    frozenset({_COLD, _WARM}),
    holds=False,
)
LOAD = Step(
    "load",
    lambda upstream: upstream.load_model,
    model_server_pb2.ModelServerLoadModelRequest,
    model_server_pb2.ModelServerLoadModelResponse.FromString,
    orchestrator_pb2.LoadModelResponse,
    frozenset({_WARM}),
    holds=True,
)
UNLOAD = Step(
    "unload",
    lambda upstream: upstream.unload_model,
    model_server_pb2.ModelServerUnloadModelRequest,
    model_server_pb2.ModelServerUnloadModelResponse.FromString,
    orchestrator_pb2.UnloadModelResponse,
    frozenset({_COLD, fleet_pb2.MODEL_STATE_ABSENT}),
    holds=True,
)


class ModelLifecycle:
    """Orders about models, each to one model server."""

    def __init__(self, fleet: Fleet, upstreams: Upstreams, clock: Clock) -> None:
        self._fleet = fleet
        self._upstreams = upstreams
        self._clock = clock

    async def serve(
        self,
        step: Step,
        request: orchestrator_pb2.PullModelRequest
        | orchestrator_pb2.LoadModelRequest
        | orchestrator_pb2.UnloadModelRequest,
        context: Caller,
    ) -> None:
        """Serve one call, writing to `context`. Ends when the model server's stream does, with the caller's deadline or
        cancellation, or when the server is lost."""
        if not request.model:
            raise invalid([Violation("model", "is required")])
        server = self._choose(step, request.model, request.server_id)
        message = step.request(model=_name_on(server, request.model)).SerializeToString()
        upstream = self._upstreams.get(server.report.identity.endpoint)
        call = step.call(upstream)(message, timeout=context.time_remaining())
        lost = False

        def watch(server_id: ServerId, urgent: bool) -> None:
            nonlocal lost
            if server_id == server.id and server.lease.state is LeaseState.LOST:
                lost = True
                call.cancel()

        stop = self._fleet.listen(watch)
        state = 0
        try:
            while (answer := await call.read()) is not grpc.aio.EOF:
                progress = step.progress(answer).progress
                progress.detail = progress.detail[:_DETAIL_LENGTH]
                state = progress.state
                await context.write(step.response(server_id=server.id, progress=progress))
        except grpc.aio.AioRpcError as error:
            raise _told_by(server, from_rpc_error(error)) from error
        except DecodeError as error:
            raise Refusal(Reason.ENGINE_FAILED, f"{server.id} sent what is no progress") from error
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not lost or (task is not None and task.cancelling()):
                raise  # the caller went away
            raise servers_away(f"{server.id} was lost during the {step.verb}", _AWAY_RETRY) from None
        finally:
            stop()
            call.cancel()
        if state not in step.ends:
            name = fleet_pb2.ModelState.Name(state) if state in fleet_pb2.ModelState.values() else state
            raise Refusal(
                Reason.ENGINE_FAILED, f"{server.id} ended the {step.verb} with {name if state else 'no word'}"
            )

    def _choose(self, step: Step, model: str, server_id: str) -> Server:
        """The model server that is meant. Raises Refusal and DomainError."""
        if server_id:
            server = self._fleet.server(server_id)
            if not _is_live(server):
                raise servers_away(f"model server {server_id} is away: {server.lease.state.name}", _AWAY_RETRY)
            if not server.report.manages_models:
                raise Refusal(Reason.UNSUPPORTED, f"engine {server.report.engine} of {server_id} manages no models")
            return server
        managing = [server for server in self._fleet.servers() if server.report.manages_models]
        if not managing:
            raise self._unless_warming_up(no_capable_server("no model server manages models"))
        if step.holds:
            names = {card.name for server in managing for card in server.cards}
            managing = [server for server in managing if _holds(server, model)]
            if not managing:
                elsewhere = ", ".join(server.id for server in self._fleet.servers() if _holds(server, model))
                if elsewhere:
                    raise Refusal(Reason.UNSUPPORTED, f"{model} is on {elsewhere} only, where no models are managed")
                raise self._unless_warming_up(unknown_model(model, tuple(sorted(names))))
        live = [server for server in managing if _is_live(server)]
        if not live:
            away = ", ".join(f"{server.id} is {server.lease.state.name}" for server in managing)
            raise servers_away(f"every model server that could {step.verb} {model} is away: {away}", _AWAY_RETRY)
        if len(live) > 1:
            ids = ", ".join(server.id for server in live)
            raise invalid([Violation("server_id", f"is required, as several model servers can {step.verb} it: {ids}")])
        return live[0]

    def _unless_warming_up(self, error: DomainError) -> DomainError:
        left = self._fleet.warming_up(self._clock.monotonic())
        return fleet_warming_up(left) if left else error


def _is_live(server: Server) -> bool:
    return server.lease.state is LeaseState.LIVE


def _holds(server: Server, model: str) -> bool:
    return any(model in (card.name, card.id) for card in server.cards)


def _name_on(server: Server, model: str) -> str:
    """What the server calls the model: "provider/name" is ours. An exact name goes first, it may contain "/" itself."""
    if any(card.name == model for card in server.cards):
        return model
    return next((card.name for card in server.cards if card.id == model), model)


def _told_by(server: Server, refusal: Refusal) -> Refusal:
    """What the caller is told of a model server's refusal."""
    reason = refusal.reason
    if reason is Reason.DRAINING:  # it is the model server that stops, not this control plane
        reason = Reason.SERVERS_AWAY
    elif reason not in _PASSED_ON:
        reason = Reason.ENGINE_FAILED
    return Refusal(
        reason,
        f"{server.id}: {refusal.message}",
        refusal.violations,
        retry_after=refusal.retry_after,
        metadata={**refusal.metadata, "server_id": server.id},
    )
