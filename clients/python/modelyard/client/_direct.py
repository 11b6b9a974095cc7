"""Direct mode: the control plane chooses a model server, and the answer comes from there without a detour."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncGenerator
from typing import Any, Literal

import grpc
import grpc.aio
from google.protobuf.duration_pb2 import Duration

from modelyard.client._ahead import TicketsAhead
from modelyard.client._errors import ServersAway, StreamBroken, from_call
from modelyard.rpc.channels import channel
from modelyard.rpc.errors import Refusal, from_rpc_error
from modelyard.rpc.reasons import Reason
from modelyard.rpc.routing import estimated_tokens, implied_features
from modelyard.v1 import generation_pb2, model_server_pb2, model_server_pb2_grpc, orchestrator_pb2

Direct = Literal["auto", "always", "never"]
MODES: tuple[Direct, ...] = ("auto", "always", "never")

_CONNECT_SECONDS, _MUST_CONNECT_SECONDS = 0.25, 5.0
"""How long a request waits for a host to be reached: where the relay takes it then, and where there is no relay."""
_FIRST_PAUSE, _LONGEST_PAUSE = 30.0, 600.0
"""Seconds for which a host that was not reached is left alone; doubled each time."""
_MOST_HOSTS = 256
"""To which connections are kept."""

_FINAL = frozenset({Reason.INVALID_REQUEST, Reason.DEADLINE_EXCEEDED, Reason.SLOW_READER})
"""The relay would end the same way."""


class Host:
    """A model server as it is seen from here."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.channel = channel(endpoint)
        stub = model_server_pb2_grpc.ModelServerStub(self.channel)  # type: ignore[no-untyped-call]
        self.generate: grpc.aio.UnaryStreamMultiCallable = stub.Generate
        self.calls = 0
        """Under way."""
        self._pause = _FIRST_PAUSE
        self._alone_until = -math.inf

    @property
    def left_alone(self) -> bool:
        """Whether it is not worth a try for now."""
        return time.monotonic() < self._alone_until

    def failed(self) -> None:
        """It was not reached, or is not the server that it is said to be."""
        self._alone_until = time.monotonic() + self._pause
        self._pause = min(2 * self._pause, _LONGEST_PAUSE)

    async def reached(self, within: float) -> bool:
        """Whether there is a connection, or one comes about within so many seconds."""
        before = state = self.channel.get_state(try_to_connect=True)
        if state is not grpc.ChannelConnectivity.READY:
            try:
                async with asyncio.timeout(within):
                    while state is not grpc.ChannelConnectivity.READY:
                        if state is grpc.ChannelConnectivity.TRANSIENT_FAILURE and state is not before:
                            return False
                        await self.channel.wait_for_state_change(state)
                        state = self.channel.get_state(try_to_connect=True)
            except TimeoutError:
                return False
        self._pause = _FIRST_PAUSE
        return True


class Hosts:
    """What one client knows of the ways to model servers."""

    def __init__(self, address: str) -> None:
        self._local = _is_loopback(address)
        self._hosts: dict[str, Host] = {}
        self._relay_until = -math.inf
        self._closing: set[asyncio.Task[None]] = set()

    @property
    def assigned(self) -> bool:
        """Whether it is worth asking the control plane for a server."""
        return time.monotonic() >= self._relay_until

    def not_assigned(self) -> None:
        """The control plane, or its fleet, knows nothing of direct mode."""
        self._relay_until = time.monotonic() + _FIRST_PAUSE

    async def way_to(self, endpoint: str, *, must: bool = False) -> Host | None:
        """The host at an endpoint, if it can be reached from here. "127.0.0.1" is the control plane's own machine:
        from another one somebody else would answer there."""
        if _is_loopback(endpoint) and not self._local:
            return None
        host = self._hosts.get(endpoint)
        if host is None:
            self._make_room()
            host = self._hosts[endpoint] = Host(endpoint)
        if host.left_alone and not must:
            return None
        if await host.reached(_MUST_CONNECT_SECONDS if must else _CONNECT_SECONDS):
            return host
        host.failed()
        return None

    def _make_room(self) -> None:
        idle = (endpoint for endpoint, host in self._hosts.items() if not host.calls)
        if len(self._hosts) >= _MOST_HOSTS and (oldest := next(idle, None)):
            closing = asyncio.ensure_future(self._hosts.pop(oldest).channel.close())
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)

    async def close(self) -> None:
        """Cancel what runs and close the connections."""
        hosts, self._hosts = self._hosts, {}
        await asyncio.gather(*(host.channel.close(None) for host in hosts.values()), *self._closing)


def _is_loopback(address: str) -> bool:
    host = address.rsplit(":", 1)[0].strip("[]")
    return host in ("localhost", "::1") or host.startswith("127.")


class DirectCall:
    """A Generate call that is answered by the model server itself where it can be, by the relay where not. Read and
    cancelled like the relayed call; besides AioRpcError, reading raises ModelyardError."""

    def __init__(
        self,
        stub: Any,
        hosts: Hosts,
        request: orchestrator_pb2.GenerateRequest,
        timeout: float | None,
        *,
        must: bool,
        whole: bool = False,
        ahead: TicketsAhead | None = None,
    ) -> None:
        """`must`: there is no relay to fall back to. `whole`: pieces of the answer are of no use, so none are given
        before its end, and what fails in the middle is done again by the relay. `ahead`: where tickets for further
        calls are kept; None: they are taken one by one."""
        self._stub = stub
        self._hosts = hosts
        self._request = request
        self._must = must
        self._whole = whole and not must
        self._asked = assignment(request)
        self._shape = ahead.shape(self._asked) if ahead is not None else None
        self._followed = self._shape is not None and self._shape.begins()
        self._began = time.monotonic()
        self._end = math.inf if timeout is None else self._began + timeout
        self._call: Any = None
        self._cancelled = False
        self._used = False
        """The model server has taken the ticket, and tells the control plane what came of it."""
        self._early = False
        """The ticket was taken ahead of need."""
        self._failed: list[orchestrator_pb2.Attempt] = []
        self._messages = self._answer()

    async def read(self) -> Any:
        """The next GenerateResponse, EOF at the end."""
        return await anext(self._messages, grpc.aio.EOF)

    def cancel(self) -> None:
        self._cancelled = True
        if self._call is not None:
            self._call.cancel()

    def _left(self) -> float | None:
        return None if math.isinf(self._end) else max(0.0, self._end - time.monotonic())

    def _go_on(self, call: Any) -> Any:
        """What is to be cancelled from now on."""
        self._call = call
        if self._cancelled:
            call.cancel()
        return call

    async def _answer(self) -> AsyncGenerator[orchestrator_pb2.GenerateResponse, None]:
        request = self._request
        assigned = await self._shape.take(self._asked.prompt_tokens) if self._shape is not None else None
        self._early = assigned is not None
        if assigned is None:
            assigned = await self._assign()
        while assigned is not None:
            if assigned.HasField("decision"):
                yield orchestrator_pb2.GenerateResponse(decision=assigned.decision)
            attempt = orchestrator_pb2.Attempt(
                server_id=assigned.server_id, model=assigned.model, provider=assigned.provider
            )
            attempt.started_at.GetCurrentTime()
            host = await self._hosts.way_to(assigned.endpoint, must=self._must)
            if host is not None:
                async for response in self._from(host, assigned, attempt):
                    yield response
                if not attempt.failure_reason:
                    return
                if self._early and attempt.failure_reason == Reason.TICKET_REFUSED:
                    # It has come too late: as if there had been none.
                    self._early, assigned = False, await self._assign()
                    continue
            else:
                attempt.failure_reason = Reason.SERVERS_AWAY
                attempt.failure_message = f"{assigned.endpoint} cannot be reached from here"
                if self._must:
                    raise ServersAway(
                        f"{assigned.server_id}: {attempt.failure_message}", request_id=assigned.request_id
                    )
            self._failed.append(attempt)
            request = orchestrator_pb2.GenerateRequest()
            request.CopyFrom(self._request)
            request.request_id = assigned.request_id
            request.failed_server_ids.append(assigned.server_id)
            if not self._used:
                request.unused_ticket = assigned.ticket
            break
        call = self._go_on(self._stub.Generate(request, timeout=self._left()))
        while (message := await call.read()) is not grpc.aio.EOF:
            if message is not None and message.HasField("summary"):
                message.summary.attempts.MergeFrom(self._failed)
                message.summary.attempts.sort(key=lambda each: each.started_at.ToNanoseconds())
            yield message

    async def _assign(self) -> orchestrator_pb2.AssignResponse | None:
        """A server and a ticket; None: the relay may do, or tells better why nothing does."""
        try:
            assigned: orchestrator_pb2.AssignResponse = await self._go_on(
                self._stub.Assign(self._asked, timeout=self._left())
            )
            return assigned
        except grpc.aio.AioRpcError as error:
            reason = from_rpc_error(error).reason
            if self._must or reason not in (Reason.UNSUPPORTED, Reason.INVALID_REQUEST):
                raise
            if reason is Reason.UNSUPPORTED:
                self._hosts.not_assigned()
            # What is malformed is refused once more, in terms of the request that was made.
            return None

    async def _from(
        self, host: Host, assigned: orchestrator_pb2.AssignResponse, attempt: orchestrator_pb2.Attempt
    ) -> AsyncGenerator[orchestrator_pb2.GenerateResponse, None]:
        """The answer of the model server. One that failed before its first token ends with the reason in `attempt`."""
        limit = _seconds(assigned.time_limit)
        left = self._left()
        call = self._go_on(
            host.generate(direct_request(self._request, assigned), timeout=limit if left is None else min(left, limit))
        )
        began, first, last, whole = time.monotonic(), 0.0, 0.0, self._whole or assigned.hold_back
        if self._followed and self._shape is not None:
            self._shape.begun(self._stub, self._asked)
        kept: list[orchestrator_pb2.GenerateResponse] = []
        host.calls += 1
        try:
            while True:
                message = await call.read()
                if message is grpc.aio.EOF or message is None:
                    raise Refusal(Reason.ENGINE_FAILED, "the stream ended without a result")
                response = orchestrator_pb2.GenerateResponse()
                if message.HasField("delta"):
                    last = time.monotonic()
                    first = first or last
                    response.delta.CopyFrom(message.delta)
                if message.HasField("result"):
                    if self._shape is not None:
                        took = time.monotonic() - began
                        self._shape.ended(self._stub, self._asked, took, followed=self._followed)
                    for piece in kept:
                        yield piece
                    self._sum_up(response.summary, message.result, assigned, attempt, first, last)
                    yield response
                    with contextlib.suppress(grpc.aio.AioRpcError):  # the answer is whole, whatever becomes of it
                        await call.read()
                    return
                if whole:
                    kept.append(response)
                else:
                    yield response
        except (grpc.aio.AioRpcError, Refusal) as error:
            refusal = error if isinstance(error, Refusal) else from_rpc_error(error)
            if refusal.reason in _FINAL:
                raise
            if first and not whole:
                raise StreamBroken(
                    f"{assigned.server_id} broke off the answer: {refusal.message}",
                    request_id=assigned.request_id,
                    metadata={"server_id": assigned.server_id, "cause": refusal.reason},
                ) from error
            self._used = bool(first) or (not refusal.transport and refusal.reason is not Reason.TICKET_REFUSED)
            late = self._early and refusal.reason is Reason.TICKET_REFUSED
            if refusal.transport or not (self._used or late):
                host.failed()
            if self._must and not late:
                if isinstance(error, Refusal) or refusal.transport:
                    raise ServersAway(
                        f"{assigned.server_id} at {host.endpoint}: {refusal.message}", request_id=assigned.request_id
                    ) from error
                raise from_call(error, address=host.endpoint, request_id=assigned.request_id) from error
            attempt.failure_reason, attempt.failure_message = refusal.reason, refusal.message
        finally:
            host.calls -= 1
            call.cancel()

    def _sum_up(
        self,
        summary: orchestrator_pb2.GenerationSummary,
        result: generation_pb2.GenerationResult,
        assigned: orchestrator_pb2.AssignResponse,
        attempt: orchestrator_pb2.Attempt,
        first: float,
        last: float,
    ) -> None:
        """What the control plane says of an answer that it relays, as it is seen from here."""
        usage, timings, price = result.usage, summary.timings, assigned.price
        summary.request_id, summary.finish_reason = assigned.request_id, result.finish_reason
        summary.server_id, summary.model, summary.provider = assigned.server_id, assigned.model, assigned.provider
        summary.usage.CopyFrom(usage)
        summary.attempts.append(attempt)
        timings.queued.CopyFrom(assigned.queued)
        timings.total.FromNanoseconds(round((time.monotonic() - self._began) * 1e9))
        if first:
            timings.ttft.FromNanoseconds(round((first - self._began) * 1e9))
            if usage.completion_tokens > 1:
                timings.tpot.FromNanoseconds(round((last - first) / (usage.completion_tokens - 1) * 1e9))
        cached = min(usage.cached_prompt_tokens, usage.prompt_tokens)
        nano_usd = 1e3 * (
            (usage.prompt_tokens - cached) * price.prompt_usd_per_million_tokens
            + cached * price.cached_prompt_usd_per_million_tokens
            + usage.completion_tokens * price.completion_usd_per_million_tokens
        )
        summary.cost_nano_usd = round(min(nano_usd, 2**63 - 1024))


def assignment(request: orchestrator_pb2.GenerateRequest) -> orchestrator_pb2.AssignRequest:
    """What the control plane must know of a request: all but what is asked."""
    outline = orchestrator_pb2.GenerateRequest(
        task_type=request.task_type,
        priority=request.priority,
        requirements=request.requirements,
        explain=request.explain,
        request_id=request.request_id,
        preset=request.preset,
    )
    outline.requirements.features.extend(implied_features(request.input))
    if request.input.HasField("sampling"):
        outline.input.sampling.CopyFrom(request.input.sampling)
    return orchestrator_pb2.AssignRequest(request=outline, prompt_tokens=estimated_tokens(request.input))


def direct_request(
    request: orchestrator_pb2.GenerateRequest, assigned: orchestrator_pb2.AssignResponse
) -> model_server_pb2.ModelServerGenerateRequest:
    """What the model server gets: the input with what the preset adds to it."""
    direct = model_server_pb2.ModelServerGenerateRequest(
        model=assigned.model, request_id=assigned.request_id, ticket=assigned.ticket
    )
    messages = request.input.messages
    if messages and all(message.role != generation_pb2.ROLE_SYSTEM for message in messages):
        direct.input.messages.extend(assigned.preset_messages)
    direct.input.MergeFrom(request.input)
    if assigned.HasField("sampling"):
        direct.input.sampling.CopyFrom(assigned.sampling)
    return direct


def _seconds(duration: Duration) -> float:
    return duration.seconds + duration.nanos / 1e9
