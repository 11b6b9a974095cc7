"""Generate and Embed: check, route, relay."""

from __future__ import annotations

import asyncio
import random
import secrets
from collections.abc import Callable, Sequence
from typing import Any, Generic, Protocol, TypeVar

import grpc

from control_plane.api import convert
from control_plane.api.answer import in_one_piece, mean_tpot
from control_plane.api.attempts import AttemptFailed, Attempts, Progress, charged
from control_plane.api.metrics import Metrics
from control_plane.api.prompt_blocks import digest_blocks, prompt_blocks
from control_plane.api.tenant import tenant_of
from control_plane.api.upstream import Upstream, Upstreams
from control_plane.api.whole import complete
from control_plane.config import LimitSettings
from control_plane.domain.errors import fleet_warming_up, unknown_model
from control_plane.domain.model import ModelName, Provider, ServerId
from control_plane.domain.ports import Clock
from control_plane.domain.prompt import Blocks
from control_plane.domain.request import RouteRequest
from control_plane.domain.server import Failed
from control_plane.fleet.accounts import Accounts
from control_plane.fleet.charge import Charge
from control_plane.fleet.grants import Grant
from control_plane.fleet.registry import Fleet
from control_plane.fleet.server import Flight, Outcome, OutcomeKind
from control_plane.presets import Presets
from modelyard.rpc.errors import Refusal, invalid
from modelyard.rpc.reasons import Reason
from modelyard.rpc.server import Unread
from modelyard.rpc.validation import check_embed_request, check_generate_request
from modelyard.v1.generation_pb2 import GenerationDelta, GenerationInput, GenerationResult, SamplingParams, Usage
from modelyard.v1.model_server_pb2 import (
    ModelServerCompleteResponse,
    ModelServerEmbedRequest,
    ModelServerEmbedResponse,
    ModelServerGenerateRequest,
    ModelServerGenerateResponse,
)
from modelyard.v1.orchestrator_pb2 import (
    Attempt,
    CompleteResponse,
    EmbedRequest,
    EmbedResponse,
    GenerateRequest,
    GenerateResponse,
    GenerationSummary,
)
from modelyard.v1.selection_pb2 import Requirements

M = TypeVar("M", GenerateRequest, EmbedRequest)

# An answer's last message, its deltas if they were kept, and when the first and the last of them came (0: none came).
_Told = tuple[ModelServerGenerateResponse | ModelServerCompleteResponse, Sequence[GenerationDelta], float, float]

# The first byte of a ModelServerGenerateResponse whose `delta` is set: field 2, length-delimited.
# Such a message is a GenerateResponse too (the contract promises it) and passes unread.
_DELTA_TAG = 0x12

# Bytes of a request up to which its body is kept for the next attempt.
_SMALL = 64 << 10

# Seconds that a server may take from its result to its status.
_STATUS_WITHIN = 1.0

REQUEST_ID_KEY = "modelyard-request-id"


class Call(Protocol):
    """What is asked of a gRPC context besides writing."""

    def time_remaining(self) -> float | None:
        """Seconds until the caller's deadline; None without one."""
        ...

    def invocation_metadata(self) -> Any:
        """Pairs of key and value that came with the request, or None."""
        ...

    def set_trailing_metadata(self, trailing_metadata: tuple[tuple[str, str], ...], /) -> None:
        """What goes with the status."""
        ...


class Sink(Call, Protocol):
    """Where an answer goes: a gRPC context, or the gateway's own.

    One that also has `chosen(flight, attempts)` hears of each attempt as it begins. One that also has
    `whole(deltas, summary)` wants the answer when it is complete: it is called once, and `write` only for decisions.
    Until then nothing has been sent to anybody, so an attempt that fails in the middle is made again elsewhere.
    """

    async def write(self, message: bytes, /) -> None:
        """Send a serialised GenerateResponse."""
        ...


class _Whole:
    """A sink that becomes one response."""

    def __init__(self, context: Call) -> None:
        self.response = CompleteResponse()
        self.time_remaining = context.time_remaining
        self.set_trailing_metadata = context.set_trailing_metadata
        self.invocation_metadata = context.invocation_metadata

    async def write(self, message: bytes) -> None:
        self.response.decisions.append(GenerateResponse.FromString(message).decision)

    def whole(self, deltas: Sequence[GenerationDelta], summary: GenerationSummary) -> None:
        if delta := in_one_piece(deltas):
            self.response.delta.CopyFrom(delta)
        self.response.summary.CopyFrom(summary)


TakeWhole = Callable[[Sequence[GenerationDelta], GenerationSummary], None]


class Generation:
    """The two ways to have work done by the fleet."""

    def __init__(
        self,
        orchestrator_id: str,
        fleet: Fleet,
        attempts: Attempts,
        upstreams: Upstreams,
        limits: LimitSettings,
        clock: Clock,
        metrics: Metrics,
        release: Callable[..., None],
        accounts: Accounts,
    ) -> None:
        self._accounts = accounts
        self._orchestrator_id = orchestrator_id
        self._secret = secrets.token_bytes(32)
        self._fleet = fleet
        self._attempts = attempts
        self._upstreams = upstreams
        self._limits = limits
        self._clock = clock
        self._metrics = metrics
        self._release = release
        self.presets = Presets()
        self.give_back: Callable[[bytes], None] = lambda ticket: None
        """Ends the reservation of a ticket that could not be used."""
        self.ticket_for: Callable[[Flight, str], bytes] = lambda flight, request_id: b""
        """The ticket of a relayed request, where its server wants one."""
        # Calls that gave their result but not yet their status; dropping one would cancel it.
        self._ending: set[grpc.aio.Call] = set()

    def pinned(self, requirements: Requirements) -> tuple[ModelName, Provider | None] | None:
        """The model that the request names. Raises UNKNOWN_MODEL or FLEET_WARMING_UP."""
        if not requirements.model:
            return None
        found = self._fleet.resolve(requirements.model)
        if found is None:
            left = self._fleet.warming_up(self._clock.monotonic())
            if left:
                raise fleet_warming_up(left)
            raise unknown_model(requirements.model, self._fleet.model_names())
        return found

    # ------------------------------------------------------------ Generate ---

    async def generate(self, source: Unread[GenerateRequest] | GenerateRequest, context: Sink) -> None:
        """Serve one Generate call, writing to `context`."""
        arrived = self._clock.monotonic()
        raw = _read(source)
        request_id = identify(raw.request_id, context)
        if raw.unused_ticket:
            self.give_back(raw.unused_ticket)
        presets = self.presets  # those of now: they may change while the request waits
        request, preset = presets.fill(raw)
        violations = check_generate_request(request)
        if violations:
            raise invalid(violations)
        tenant = tenant_of(context)
        route = convert.route_request(
            request, request_id, tenant, self.pinned(request.requirements), blocks=self._blocks(request.input, tenant)
        )
        limit = self.time_limit(context)
        if preset is not None and preset.timeout is not None:
            limit = min(limit, preset.timeout)

        def render(raw: GenerateRequest) -> bytes:
            return ModelServerGenerateRequest(
                input=(raw if preset is None else presets.fill(raw)[0]).input,
                orchestrator_id=self._orchestrator_id,
                request_id=request_id,
            ).SerializeToString()

        body = _Body(source, raw, render)
        avoid = [
            Failed(ServerId(failed), instance)
            for failed in raw.failed_server_ids
            if (instance := self._fleet.instance(ServerId(failed)))
        ]
        del raw
        history: list[Attempt] = []
        # Log-probabilities can make an answer larger than one message may be.
        unary = not request.input.sampling.logprobs
        relay = _Relay(self, context, body, arrived, arrived + limit, request_id, history, unary)
        on_grant = relay.announce if request.explain else None
        del request  # it may wait for minutes now
        try:
            async with asyncio.timeout(limit):
                await self.funded(route)
                await self._attempts.run(
                    route, relay.attempt, history, on_grant, body.size, avoid,
                    hedge=relay.streams, leaves=arrived + limit,
                )  # fmt: skip
        except TimeoutError:
            raise out_of_time(limit) from None
        finally:
            relay.close()

    async def complete(self, source: Unread[GenerateRequest] | GenerateRequest, context: Call) -> CompleteResponse:
        """Serve one Complete call, whose request has the fields of a GenerateRequest."""
        whole = _Whole(context)
        await self.generate(source, whole)
        return whole.response

    # --------------------------------------------------------------- Embed ---

    async def embed(self, source: Unread[EmbedRequest] | EmbedRequest, context: Sink) -> EmbedResponse:
        """Serve one Embed call."""
        arrived = self._clock.monotonic()
        request = _read(source)
        request_id = identify(request.request_id, context)
        violations = check_embed_request(request)
        if violations:
            raise invalid(violations)
        route = convert.embed_route_request(request, request_id, tenant_of(context), self.pinned(request.requirements))
        limit = self.time_limit(context)

        def render(request: EmbedRequest) -> bytes:
            return ModelServerEmbedRequest(
                inputs=request.inputs, orchestrator_id=self._orchestrator_id, request_id=request_id
            ).SerializeToString()

        body, count = _Body(source, request, render), len(request.inputs)
        del request
        history: list[Attempt] = []
        chosen: Callable[[Flight, int], None] | None = getattr(context, "chosen", None)

        async def attempt(grant: Grant, progress: Progress) -> tuple[EmbedResponse, Outcome]:
            flight = grant.flight
            started = self._clock.monotonic()
            if chosen is not None:
                chosen(flight, len(history))
            call = self._upstreams.get(flight.endpoint).embed(
                body.read()
                + ModelServerEmbedRequest(
                    model=flight.model, ticket=self.ticket_for(flight, request_id)
                ).SerializeToString(),
                timeout=max(0.0, arrived + limit - started),
            )
            progress.call = call
            with charged(flight.charge, progress):
                answer = ModelServerEmbedResponse.FromString(await call)
            take_down(flight.charge, answer.usage)
            if len(answer.embeddings) != count:
                told = f"{len(answer.embeddings)} vectors for {count} texts"
                raise AttemptFailed(Refusal(Reason.ENGINE_FAILED, told))
            usage = answer.usage
            self._metrics.used(flight.model, usage)
            response = EmbedResponse(
                embeddings=answer.embeddings,
                usage=usage,
                server_id=flight.server_id,
                model=flight.model,
                provider=flight.provider,
                request_id=request_id,
                cost_nano_usd=flight.price.nano_usd(usage.prompt_tokens, usage.cached_prompt_tokens, 0),
            )
            return response, Outcome(OutcomeKind.SUCCESS, ttft=self._clock.monotonic() - started)

        try:
            async with asyncio.timeout(limit):
                await self.funded(route)
                return await self._attempts.run(route, attempt, history, size=body.size, leaves=arrived + limit)
        except TimeoutError:
            raise out_of_time(limit) from None

    async def funded(self, route: RouteRequest) -> None:
        """Return when the tenant's money is here, as far as there is any."""
        await self._accounts.ready(route, self._fleet.table)

    def _blocks(self, source: GenerationInput, tenant: str) -> Blocks | None:
        """The beginnings of a prompt, to be looked for in the caches of servers."""
        return prompt_blocks(source, self._secret, tenant) if self._fleet.caches_prefixes else None

    def blocks_of(
        self, hashes: Sequence[int], tokens: int, tenant: str, before: GenerationInput | None = None
    ) -> Blocks | None:
        """The same from the hashes of a prompt of so many tokens, which comes after the messages in `before`."""
        if not hashes or not self._fleet.caches_prefixes:
            return None
        return digest_blocks(hashes, tokens, self._secret, tenant, before)

    def let_end(self, call: grpc.aio.Call) -> None:
        """Give a call that has told its result a moment for its status; dropping it would cancel it."""
        timer = asyncio.get_running_loop().call_later(_STATUS_WITHIN, call.cancel)
        self._ending.add(call)

        def ended(call: grpc.aio.Call) -> None:
            timer.cancel()
            self._ending.discard(call)

        call.add_done_callback(ended)

    @property
    def max_generation(self) -> float:
        """Most seconds that a request may take."""
        return self._limits.max_generation

    def time_limit(self, context: Sink) -> float:
        """Seconds that a request may take."""
        remaining = context.time_remaining()
        return self.max_generation if remaining is None else min(remaining, self.max_generation)


class _Body(Generic[M]):
    """What is sent to a model server, but for the model.

    Fields of one message may come in any order and from several pieces: the rest is serialised once, the model is
    appended for each attempt. Of a large request only what gRPC keeps anyway lives while it waits: its body is made
    anew for each attempt.
    """

    __slots__ = ("_body", "_render", "_source", "size")

    def __init__(self, source: Unread[M] | M, request: M, render: Callable[[M], bytes]) -> None:
        self._source: Unread[M] | M = source
        self._render: Callable[[M], bytes] = render
        self._body: bytes | None = None
        self.size = source.size if isinstance(source, Unread) else request.ByteSize()
        """Of the request, in bytes."""
        if self.size <= _SMALL:
            self._body = render(request)

    def read(self) -> bytes:
        return self._render(_read(self._source)) if self._body is None else self._body


class _Relay:
    """One Generate call on its way through: passes deltas on unread, completes the summary."""

    def __init__(
        self,
        owner: Generation,
        context: Sink,
        body: _Body[GenerateRequest],
        arrived: float,
        deadline: float,
        request_id: str,
        history: list[Attempt],
        unary: bool,
    ) -> None:
        """`unary`: an answer that is wanted whole may be asked for as one message."""
        self._owner = owner
        self._context = context
        self._body = body
        self._arrived = arrived
        self._deadline = deadline
        self._request_id = request_id
        self._history = history
        self._chosen: Callable[[Flight, int], None] | None = getattr(context, "chosen", None)
        self._whole: TakeWhole | None = getattr(context, "whole", None)
        self.streams = self._whole is None
        """Whether its client sees the first token when it comes."""
        self._unary = unary and self._whole is not None
        self._queued = 0.0
        self._slow = False
        self._blocked_since: float | None = None
        self._task = asyncio.current_task()
        self._watch = self._watch_writes() if self._whole is None else None

    # A client that does not read must not hold a slot for ever. One timer per request looks at
    # a time stamp; a timeout object per chunk would cost more than the relaying itself.
    def _watch_writes(self) -> asyncio.TimerHandle:
        limit = self._owner._limits.write_timeout
        since = self._blocked_since
        if since is not None and self._owner._clock.monotonic() - since > limit and self._task:
            self._slow = True
            self._task.cancel()
        return asyncio.get_running_loop().call_later(limit / 4, self._rewatch)

    def _rewatch(self) -> None:
        self._watch = self._watch_writes()

    def close(self) -> None:
        if self._watch is not None:
            self._watch.cancel()

    async def _write(self, message: bytes) -> None:
        self._blocked_since = self._owner._clock.monotonic()
        try:
            await self._context.write(message)
        except asyncio.CancelledError:
            if not self._slow or self._task is None or self._task.uncancel() > 0:
                raise
            raise Refusal(
                Reason.SLOW_READER,
                f"the stream was not read for {self._owner._limits.write_timeout:.0f} s",
            ) from None
        self._blocked_since = None

    async def announce(self, grant: Grant) -> None:
        """Send the decision record of an attempt."""
        if grant.record:
            await self._write(GenerateResponse(decision=convert.decision(grant.record)).SerializeToString())

    async def attempt(self, grant: Grant, progress: Progress) -> tuple[None, Outcome]:
        """Ask one server and pass on what it says."""
        owner, flight = self._owner, grant.flight
        clock = owner._clock.monotonic
        self._queued += grant.queued
        started = clock()
        if self._chosen is not None:
            self._chosen(flight, len(self._history))
        upstream = owner._upstreams.get(flight.endpoint)
        rest = ModelServerGenerateRequest(model=flight.model, ticket=owner.ticket_for(flight, self._request_id))
        if flight.charge.output_limit is not None:
            # What comes later in the bytes is merged into what is there.
            limit = SamplingParams(max_tokens=flight.charge.output_limit)
            rest.input.CopyFrom(GenerationInput(sampling=limit))
        request = self._body.read() + rest.SerializeToString()
        told: _Told | None = None
        with charged(flight.charge, progress):
            if self._unary:
                left, instance = max(0.0, self._deadline - started), flight.server.report.identity.instance_id
                whole = await complete(upstream, instance, request, timeout=left, progress=progress, clock=clock)
                if whole is not None:
                    pieces = (whole.answer.delta,) if whole.answer.HasField("delta") else ()
                    told = whole.answer, pieces, whole.first, whole.last
            if told is None:
                told = await self._relay(upstream, request, progress, flight)
        answer, deltas, first, last = told
        take_down(flight.charge, answer.result.usage)
        outcome = self._outcome(answer.result, started, first, last)
        # The slot is free now; that this client may be slow to read its summary is no concern
        # of the next request.
        owner._release(flight, outcome)
        if progress.held:
            progress.tokens_sent = True
            first = last  # that is when its client sees it
            for chunk in progress.held:
                await self._write(chunk)
        if self._whole is not None:
            self._whole(deltas, self._summary(GenerationSummary(), answer.result, grant, first, last))
        else:
            response = GenerateResponse()
            if answer.HasField("delta"):  # the last piece came together with the end
                response.delta.CopyFrom(answer.delta)
            self._summary(response.summary, answer.result, grant, first, last)
            await self._write(response.SerializeToString())
        return None, outcome

    def _begin(self, progress: Progress, flight: Flight) -> None:
        """There is something to pass on. Raises CancelledError where another server was sooner."""
        progress.begin()
        if progress.on_begin is not None:
            self._task = asyncio.current_task()
            if self._chosen is not None:
                self._chosen(flight, len(self._history))

    async def _relay(self, upstream: Upstream, request: bytes, progress: Progress, flight: Flight) -> _Told:
        """Ask for a stream and pass on what comes, or keep it: for who wants it whole, and where it may break off."""
        clock, keep = self._owner._clock.monotonic, self._whole is not None
        call = upstream.generate(request, timeout=max(0.0, self._deadline - clock()))
        progress.call = call
        flight.on_overdue = progress.leave
        kept: list[GenerationDelta] = []
        first = last = 0.0
        try:
            while True:
                chunk = await call.read()
                if chunk is grpc.aio.EOF:
                    # A status that is not OK is raised by read itself.
                    raise AttemptFailed(Refusal(Reason.ENGINE_FAILED, "the stream ended without a result"))
                if chunk and chunk[0] == _DELTA_TAG and _is_one_field(chunk):
                    last = clock()
                    if not first:
                        first = last
                        self._owner._fleet.first_token(flight, first)
                        if not flight.held:
                            self._begin(progress, flight)
                    progress.tokens += 1
                    if keep:
                        kept.append(ModelServerGenerateResponse.FromString(chunk).delta)
                    elif flight.held:
                        progress.held.append(chunk)
                    else:
                        progress.tokens_sent = True
                        await self._write(chunk)
                    continue
                message = ModelServerGenerateResponse.FromString(chunk)
                if message.HasField("result"):
                    break
                if chunk and chunk[0] == _DELTA_TAG:
                    raise AttemptFailed(Refusal(Reason.ENGINE_FAILED, "the server sent more than a delta at once"))
        except BaseException:
            call.cancel()
            raise
        if flight.held or not progress.tokens:
            self._begin(progress, flight)
        if message.HasField("delta"):
            last = clock()
            first = first or last
            kept.append(message.delta)
        self._owner.let_end(call)
        return message, kept, first, last

    def _outcome(self, result: GenerationResult, started: float, first: float, last: float) -> Outcome:
        return Outcome(
            OutcomeKind.SUCCESS,
            ttft=first - started if first else None,
            tpot=mean_tpot(result, first, last),
        )

    def _summary(
        self, summary: GenerationSummary, result: GenerationResult, grant: Grant, first: float, last: float
    ) -> GenerationSummary:
        """Complete the last message of an answer."""
        owner, flight, usage = self._owner, grant.flight, result.usage
        summary.request_id = self._request_id
        summary.finish_reason = result.finish_reason
        summary.usage.CopyFrom(usage)
        summary.server_id, summary.model, summary.provider = flight.server_id, flight.model, flight.provider
        summary.attempts.extend(self._history)
        summary.cost_nano_usd = flight.price.nano_usd(
            usage.prompt_tokens, usage.cached_prompt_tokens, usage.completion_tokens
        )
        timings = summary.timings
        convert.set_duration(timings.queued, self._queued)
        convert.set_duration(timings.total, owner._clock.monotonic() - self._arrived)
        if first:
            ttft = first - self._arrived
            convert.set_duration(timings.ttft, ttft)
            owner._metrics.first_token(flight.model, ttft)
            tpot = mean_tpot(result, first, last)
            if tpot is not None:
                convert.set_duration(timings.tpot, tpot)
                owner._metrics.pace(flight.model, tpot)
        owner._metrics.used(flight.model, usage)
        return summary


def take_down(charge: Charge, usage: Usage) -> None:
    """A server has told what its answer took."""
    charge.count(usage.prompt_tokens, usage.cached_prompt_tokens, usage.completion_tokens)


def _read(source: Unread[M] | M) -> M:
    return source.read() if isinstance(source, Unread) else source


def new_request_id() -> str:
    """Nobody need be unable to guess it, so it does without the system's randomness."""
    return f"{random.getrandbits(128):032x}"


def identify(given: str, context: Sink) -> str:
    """The request's id, sent back in the trailing metadata: with the status, refusals included,
    where initial metadata would cost a write of its own. An id that is no header value is a
    violation, so it is not sent."""
    request_id = given or new_request_id()
    if request_id.isascii() and request_id.isprintable() and len(request_id) <= 64:
        context.set_trailing_metadata(((REQUEST_ID_KEY, request_id),))
    return request_id


def _is_one_field(chunk: bytes) -> bool:
    """Whether a message that begins with a one-byte tag of a length-delimited field is that field
    and nothing else: a tail could be a summary of the server's own making."""
    length = shift = 0
    for position in range(1, min(len(chunk), 6)):
        byte = chunk[position]
        length |= (byte & 0x7F) << shift
        if byte < 0x80:
            return len(chunk) == position + 1 + length
        shift += 7
    return False


def out_of_time(limit: float) -> Refusal:
    """The refusal of a request that took longer."""
    # Three digits, however small it is: a limit of 0.001 s is not one of 0.0 s.
    return Refusal(Reason.DEADLINE_EXCEEDED, f"not finished within {float(f'{limit:.3g}'):g} s")
