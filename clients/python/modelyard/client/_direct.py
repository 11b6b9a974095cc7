"""Direct mode: the control plane chooses a model server, and the answer comes from there without a detour."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Hashable, Sequence
from typing import Any, Literal

import grpc
import grpc.aio
from google.protobuf.duration_pb2 import Duration

from modelyard.client import _answers as answers
from modelyard.client import _names as names
from modelyard.client._ahead import Shape, TicketsAhead
from modelyard.client._errors import ServersAway, StreamBroken, from_call
from modelyard.client._types import Attempt, Timings, Usage
from modelyard.rpc.calls import SharedChannel, UnaryMethod
from modelyard.rpc.channels import channel
from modelyard.rpc.errors import Refusal, from_rpc_error
from modelyard.rpc.prompts import digests, prompt_bytes
from modelyard.rpc.reasons import Reason
from modelyard.rpc.routing import estimated_tokens, implied_features
from modelyard.v1 import fleet_pb2, generation_pb2, model_server_pb2, model_server_pb2_grpc, orchestrator_pb2

Direct = Literal["auto", "always", "never"]
MODES: tuple[Direct, ...] = ("auto", "always", "never")

_CONNECT_SECONDS, _MUST_CONNECT_SECONDS = 0.25, 5.0
"""How long a request waits for a host to be reached: where the relay takes it then, and where there is no relay."""
_FIRST_PAUSE, _LONGEST_PAUSE = 30.0, 600.0
"""Seconds for which a host that was not reached is left alone; doubled each time."""
_LONGEST_AHEAD = 512
"""Tokens of a prompt up to which a ticket may be taken ahead: of a longer one it matters more where its beginning is
cached, of which such a ticket knows nothing."""
_MOST_HOSTS = 256
"""To which connections are kept."""

_FINAL = frozenset({Reason.INVALID_REQUEST, Reason.DEADLINE_EXCEEDED, Reason.SLOW_READER})
"""The relay would end the same way."""


class Host:
    """A model server as it is seen from here."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.channel = SharedChannel(channel(endpoint))
        stub = model_server_pb2_grpc.ModelServerStub(self.channel)  # type: ignore[no-untyped-call]
        self.generate: grpc.aio.UnaryStreamMultiCallable = stub.Generate
        self.complete: UnaryMethod = stub.Complete
        self.only_streams = False
        """It is too old for Complete."""
        self.calls = 0
        """Under way."""
        self._ending: set[grpc.aio.UnaryStreamCall] = set()
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

    def leave(self, call: grpc.aio.UnaryStreamCall) -> None:
        """Let a call whose answer is whole end by itself: nobody need wait for its status."""
        self._ending.add(call)
        call.add_done_callback(self._ending.discard)

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
    cancelled like the relayed call; besides AioRpcError, reading raises ModelyardError, and instead of a summary the
    model server's answer ends with an Ending."""

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
        """`must`: there is no relay to fall back to. `whole`: pieces of the answer are of no use, so it comes as one
        message, and what fails in the middle is done again by the relay. `ahead`: where tickets for further calls are
        kept; None: they are taken one by one."""
        self._stub = stub
        self._hosts = hosts
        self._request = request
        self._must = must
        self._whole = whole and not must
        # Log-probabilities can make an answer larger than one message may be.
        self._as_one = whole and not request.input.sampling.logprobs
        self._features = implied_features(request.input)
        self._prompt_tokens = estimated_tokens(request.input)
        self._shape: Shape | None = None
        # A decision is made for the one request that asks for it, and an id is in the ticket.
        short = self._prompt_tokens <= _LONGEST_AHEAD
        if ahead is not None and short and not (request.explain or request.request_id):
            self._shape = ahead.shape(shape_key(request, self._features))
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
        self._started_at = 0
        """Nanoseconds of the clock: when the present attempt began."""
        self._failure: Refusal | None = None
        """Of the present attempt."""
        self._messages = self._answer()

    async def read(self) -> Any:
        """The next GenerateResponse, an Ending, EOF at the end."""
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

    def _asked(self, prompt_tokens: int) -> orchestrator_pb2.AssignRequest:
        return assignment(self._request, self._features, prompt_tokens)

    async def _answer(self) -> AsyncGenerator[orchestrator_pb2.GenerateResponse | answers.Ending, None]:
        request = self._request
        assigned = await self._shape.take(self._prompt_tokens) if self._shape is not None else None
        self._early = assigned is not None
        if assigned is None:
            assigned = await self._assign()
        while assigned is not None:
            if assigned.HasField("decision"):
                yield orchestrator_pb2.GenerateResponse(decision=assigned.decision)
            self._started_at, self._failure = time.time_ns(), None
            host = await self._hosts.way_to(assigned.endpoint, must=self._must)
            if host is not None:
                if self._as_one and not host.only_streams:
                    ending = await self._in_one(host, assigned)
                    if ending is not None:
                        yield ending
                        return
                if not self._as_one or host.only_streams:
                    async for response in self._from(host, assigned):
                        yield response
                    if self._failure is None:
                        return
                if self._early and self._failure is not None and self._failure.reason is Reason.TICKET_REFUSED:
                    # It has come too late: as if there had been none.
                    if self._shape is not None:
                        self._shape.refused()
                    self._early, assigned = False, await self._assign()
                    continue
            else:
                self._failure = Refusal(Reason.SERVERS_AWAY, f"{assigned.endpoint} cannot be reached from here")
                if self._must:
                    raise ServersAway(f"{assigned.server_id}: {self._failure.message}", request_id=assigned.request_id)
            attempt = orchestrator_pb2.Attempt(
                server_id=assigned.server_id, model=assigned.model, provider=assigned.provider
            )
            attempt.started_at.FromNanoseconds(self._started_at)
            if self._failure is not None:
                attempt.failure_reason, attempt.failure_message = self._failure.reason, self._failure.message
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
        asked = self._asked(self._prompt_tokens)
        asked.prompt_hashes.extend(digests(prompt_bytes(self._request.input)))
        try:
            assigned: orchestrator_pb2.AssignResponse = await self._go_on(
                self._stub.Assign(asked, timeout=self._left())
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

    def _limit(self, assigned: orchestrator_pb2.AssignResponse) -> float:
        """Seconds that the model server has."""
        limit, left = _seconds(assigned.time_limit), self._left()
        return limit if left is None else min(left, limit)

    def _sent(self) -> float:
        """The model server has the request. Monotonic seconds."""
        if self._followed and self._shape is not None:
            self._shape.begun(self._stub, self._asked)
        return time.monotonic()

    def _answered(self, sent: float) -> None:
        """The answer is whole."""
        self._call = None
        if self._shape is not None:
            self._shape.ended(self._stub, self._asked, time.monotonic() - sent, followed=self._followed)

    async def _in_one(self, host: Host, assigned: orchestrator_pb2.AssignResponse) -> answers.Ending | None:
        """The answer of the model server as one message. None: it has failed, or the host turns out to know streams
        only."""
        request = model_server_pb2.ModelServerCompleteRequest()
        fill(request, self._request, assigned)
        call = self._go_on(host.complete(request, timeout=self._limit(assigned)))
        sent = self._sent()
        host.calls += 1
        try:
            answer: model_server_pb2.ModelServerCompleteResponse | None = await call
            if answer is None or not answer.HasField("result"):
                raise Refusal(Reason.ENGINE_FAILED, "the server sent an answer without a result")
        except (grpc.aio.AioRpcError, Refusal) as error:
            if isinstance(error, grpc.aio.AioRpcError) and error.code() is grpc.StatusCode.UNIMPLEMENTED:
                host.only_streams = from_rpc_error(error).transport
                if host.only_streams:
                    return None
            self._failure = self._failed_at(error, host, assigned, begun=False, seen=False)
            # Whether it has come, and what it has cost there, the model server tells the control plane.
            self._used = self._used or self._failure.reason is not Reason.TICKET_REFUSED
            return None
        finally:
            host.calls -= 1
            call.cancel()
        self._answered(sent)
        if not answer.HasField("delta"):
            return self._ending(answer.result, assigned, 0.0, 0.0, None)
        # How long it took is what was measured here; how that divides, only the server has seen.
        last, result = time.monotonic(), answer.result
        decoding = _seconds(result.timings.tpot) * max(0, result.usage.completion_tokens - 1)
        return self._ending(result, assigned, max(sent, last - decoding), last, answer.delta)

    async def _from(
        self, host: Host, assigned: orchestrator_pb2.AssignResponse
    ) -> AsyncGenerator[orchestrator_pb2.GenerateResponse | answers.Ending, None]:
        """The answer of the model server. One that failed before its first token just ends."""
        request = model_server_pb2.ModelServerGenerateRequest()
        fill(request, self._request, assigned)
        call: Any = self._go_on(host.generate(request, timeout=self._limit(assigned)))
        sent, first, last = self._sent(), 0.0, 0.0
        hold = self._whole or (assigned.hold_back and not self._must)
        kept: list[orchestrator_pb2.GenerateResponse] = []
        host.calls += 1
        try:
            while True:
                message = await call.read()
                if message is grpc.aio.EOF or message is None:
                    raise Refusal(Reason.ENGINE_FAILED, "the stream ended without a result")
                delta = message.delta if message.HasField("delta") else None
                if delta is not None:
                    last = time.monotonic()
                    first = first or last
                if message.HasField("result"):
                    host.leave(call)
                    call = None
                    self._answered(sent)
                    for piece in kept:
                        yield piece
                    yield self._ending(message.result, assigned, first, last, delta)
                    return
                response = orchestrator_pb2.GenerateResponse(delta=delta)
                if hold:
                    kept.append(response)
                else:
                    yield response
        except (grpc.aio.AioRpcError, Refusal) as error:
            self._failure = self._failed_at(error, host, assigned, begun=bool(first), seen=bool(first) and not hold)
        finally:
            host.calls -= 1
            if call is not None:
                call.cancel()

    def _failed_at(
        self,
        error: grpc.aio.AioRpcError | Refusal,
        host: Host,
        assigned: orchestrator_pb2.AssignResponse,
        *,
        begun: bool,
        seen: bool,
    ) -> Refusal:
        """Why an attempt has failed; raises where the relay is of no use. `begun`: pieces have come; `seen`: and have
        been passed on."""
        refusal = error if isinstance(error, Refusal) else from_rpc_error(error)
        if refusal.reason in _FINAL:
            raise error
        if seen:
            raise StreamBroken(
                f"{assigned.server_id} broke off the answer: {refusal.message}",
                request_id=assigned.request_id,
                metadata={"server_id": assigned.server_id, "cause": refusal.reason},
            ) from error
        self._used = begun or (not refusal.transport and refusal.reason is not Reason.TICKET_REFUSED)
        late = self._early and refusal.reason is Reason.TICKET_REFUSED
        if refusal.transport or not (self._used or late):
            host.failed()
        if self._must and not late:
            if isinstance(error, Refusal) or refusal.transport:
                raise ServersAway(
                    f"{assigned.server_id} at {host.endpoint}: {refusal.message}", request_id=assigned.request_id
                ) from error
            raise from_call(error, address=host.endpoint, request_id=assigned.request_id) from error
        return refusal

    def _ending(
        self,
        result: generation_pb2.GenerationResult,
        assigned: orchestrator_pb2.AssignResponse,
        first: float,
        last: float,
        delta: generation_pb2.GenerationDelta | None,
    ) -> answers.Ending:
        """What the control plane says of an answer that it relays, as it is seen from here."""
        usage, began = answers.usage(result.usage), self._began
        server_id, model, provider = assigned.server_id, assigned.model, assigned.provider
        return answers.Ending(
            finish_reason=names.FINISH_REASON.name(result.finish_reason),
            usage=usage,
            timings=Timings(
                queued=_seconds(assigned.queued),
                ttft=first - began if first else None,
                tpot=(last - first) / (usage.completion_tokens - 1) if first and usage.completion_tokens > 1 else None,
                total=time.monotonic() - began,
            ),
            server_id=server_id,
            model=model,
            provider=provider,
            attempts=(Attempt(server_id, model, provider, answers.moment(self._started_at)),),
            cost_usd=_cost(usage, assigned.price) if assigned.HasField("price") else 0.0,
            request_id=assigned.request_id,
            delta=delta,
        )


def _cost(usage: Usage, price: fleet_pb2.Price) -> float:
    """US dollars, whole nano-dollars."""
    cached = min(usage.cached_prompt_tokens, usage.prompt_tokens)
    nano_usd = 1e3 * (
        (usage.prompt_tokens - cached) * price.prompt_usd_per_million_tokens
        + cached * price.cached_prompt_usd_per_million_tokens
        + usage.completion_tokens * price.completion_usd_per_million_tokens
    )
    return round(nano_usd) / 1e9


def shape_key(request: orchestrator_pb2.GenerateRequest, features: Sequence[int]) -> Hashable:
    """What routing can tell requests by that have neither an id nor ask for the decision: what `assignment` tells it,
    but for their length."""
    return (
        request.task_type,
        request.priority,
        request.preset,
        request.requirements.SerializeToString(deterministic=True),
        request.input.sampling.SerializeToString(deterministic=True),
        *features,
    )


def assignment(
    request: orchestrator_pb2.GenerateRequest,
    features: Sequence[fleet_pb2.ModelFeature],
    prompt_tokens: int,
) -> orchestrator_pb2.AssignRequest:
    """What the control plane must know of a request: all but what is asked. `features`: that the input implies."""
    outline = orchestrator_pb2.GenerateRequest(
        task_type=request.task_type,
        priority=request.priority,
        requirements=request.requirements,
        explain=request.explain,
        request_id=request.request_id,
        preset=request.preset,
    )
    outline.requirements.features.extend(features)
    if request.input.HasField("sampling"):
        outline.input.sampling.CopyFrom(request.input.sampling)
    return orchestrator_pb2.AssignRequest(request=outline, prompt_tokens=prompt_tokens)


def fill(
    direct: model_server_pb2.ModelServerGenerateRequest | model_server_pb2.ModelServerCompleteRequest,
    request: orchestrator_pb2.GenerateRequest,
    assigned: orchestrator_pb2.AssignResponse,
) -> None:
    """What the model server gets: the input with what the preset adds to it."""
    direct.model, direct.request_id, direct.ticket = assigned.model, assigned.request_id, assigned.ticket
    if assigned.preset_messages:
        messages = request.input.messages
        if messages and all(message.role != generation_pb2.ROLE_SYSTEM for message in messages):
            direct.input.messages.extend(assigned.preset_messages)
    direct.input.MergeFrom(request.input)
    if assigned.HasField("sampling"):
        direct.input.sampling.CopyFrom(assigned.sampling)


def _seconds(duration: Duration) -> float:
    return duration.seconds + duration.nanos / 1e9
