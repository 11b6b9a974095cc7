"""Runs one attempt of a durable task: the bytes of its spec and a slot in, the bytes of its result out."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import grpc
from google.protobuf.message import DecodeError
from msgspec.structs import replace

from control_plane.api import convert, task_convert
from control_plane.api.answer import Answer, mean_tpot
from control_plane.api.attempts import NEUTRAL, AttemptFailed, Progress, charged, is_foreign, judged, outcome_of
from control_plane.api.generate import Generation, take_down
from control_plane.api.metrics import Metrics
from control_plane.api.upstream import Upstream, Upstreams
from control_plane.api.whole import complete
from control_plane.config import LimitSettings
from control_plane.domain.errors import DomainError
from control_plane.domain.ports import Clock
from control_plane.fleet.grants import Grant
from control_plane.fleet.server import Flight, Outcome, OutcomeKind
from control_plane.tasks.model import Claim
from modelyard.rpc.errors import Refusal
from modelyard.rpc.reasons import Reason
from modelyard.v1.generation_pb2 import GenerationDelta, GenerationResult
from modelyard.v1.model_server_pb2 import ModelServerGenerateRequest, ModelServerGenerateResponse
from modelyard.v1.orchestrator_pb2 import Attempt
from modelyard.v1.task_queue_pb2 import TaskResult, TaskSpec

MAX_RESULT_BYTES = 16 << 20
"""Of what a task may produce: it is kept in memory until it is written, and written whole."""


@dataclass(slots=True)
class _Answer:
    """What a server says, as it comes."""

    result: GenerationResult | None = None
    first: float = 0.0
    """Monotonic seconds of the first token; 0: none came."""
    last: float = 0.0
    size: int = 0
    whole: Answer = field(default_factory=Answer)

    def take(self, delta: GenerationDelta, size: int, now: float) -> None:
        self.first, self.last = self.first or now, now
        self.size += size
        if self.size > MAX_RESULT_BYTES:
            problem = f"the answer has more than {MAX_RESULT_BYTES} bytes, which is the most that a task may produce"
            raise AttemptFailed(Refusal(Reason.UNSUPPORTED, problem))
        self.whole.take(delta)

    def tpot(self) -> float | None:
        return mean_tpot(self.result, self.first, self.last) if self.result else None


class TaskExecutor:
    """Sends tasks to model servers."""

    def __init__(
        self,
        orchestrator_id: str,
        generation: Generation,
        upstreams: Upstreams,
        limits: LimitSettings,
        clock: Clock,
        metrics: Metrics,
        release: Callable[[Flight, Outcome], None],
    ) -> None:
        self._orchestrator_id = orchestrator_id
        self._generation = generation
        self._upstreams = upstreams
        self._limits = limits
        self._clock = clock
        self._metrics = metrics
        self._release = release

    async def run(self, claim: Claim, grant: Grant, timeout: float) -> tuple[bytes, int]:
        """See `control_plane.tasks.ports.Executor`."""
        flight = grant.flight
        instance_id = flight.server.report.identity.instance_id
        progress = Progress()
        flight.on_lost = progress.lose
        started = self._clock.monotonic()
        limit = math.inf
        try:
            request, unary, limit = self._request(claim, flight)
            limit = min(limit, timeout)
            upstream = self._upstreams.get(flight.endpoint)
            async with asyncio.timeout(limit):
                asked = self._ask(upstream, instance_id if unary else None, request, limit, progress)
                answer = await judged(self._charged(asked, flight, progress), progress)
        except AttemptFailed as failure:
            refusal = failure.refusal
            self._release(flight, outcome_of(refusal, flight, instance_id, begun=bool(progress.tokens)))
            if is_foreign(refusal):
                raise DomainError(Reason.ENGINE_FAILED, "what answers there is no model server") from failure
            raise DomainError(refusal.reason, refusal.message, refusal.retry_after) from failure
        except TimeoutError:
            self._release(flight, NEUTRAL)
            raise DomainError(Reason.DEADLINE_EXCEEDED, f"the attempt was not finished within {limit:.3g} s") from None
        except Refusal as refusal:
            self._release(flight, NEUTRAL)
            raise DomainError(refusal.reason, refusal.message) from refusal
        except BaseException:
            self._release(flight, NEUTRAL)
            raise
        assert answer.result is not None
        take_down(flight.charge, answer.result.usage)
        if flight.request is not None:  # it was made for a lane of tasks; now it is this one's
            flight.request = replace(flight.request, request_id=_request_id(claim))
        ttft = answer.first - started if answer.first else None
        self._release(flight, Outcome(OutcomeKind.SUCCESS, ttft=ttft, tpot=answer.tpot()))
        return self._result(claim, flight, answer, started)

    def _request(self, claim: Claim, flight: Flight) -> tuple[bytes, bool, float]:
        """What is sent, with the presets of now, whether one message can hold the answer, and the seconds that it may
        take. Raises Refusal."""
        try:
            spec = TaskSpec.FromString(claim.spec)
        except DecodeError as error:
            raise Refusal(Reason.INTERNAL, "the task cannot be read any more") from error
        filled, preset = self._generation.presets.fill(task_convert.work(spec))
        limit = self._limits.max_generation
        if spec.HasField("attempt_timeout"):
            limit = min(limit, convert.seconds(spec.attempt_timeout))
        if preset is not None and preset.timeout is not None:
            limit = min(limit, preset.timeout)
        request = ModelServerGenerateRequest(
            model=flight.model,
            input=filled.input,
            orchestrator_id=self._orchestrator_id,
            request_id=_request_id(claim),
            ticket=self._generation.ticket_for(flight, _request_id(claim)),
        )
        if flight.charge.output_limit is not None:
            request.input.sampling.max_tokens = flight.charge.output_limit
        # Log-probabilities can make an answer larger than one message may be.
        return request.SerializeToString(), not filled.input.sampling.logprobs, limit

    async def _charged(self, asked: Awaitable[_Answer], flight: Flight, progress: Progress) -> _Answer:
        with charged(flight.charge, progress):
            return await asked

    async def _ask(
        self, upstream: Upstream, instance_id: str | None, request: bytes, limit: float, progress: Progress
    ) -> _Answer:
        """One call to a model server: for the whole answer, or without `instance_id` for a stream."""
        answer, clock = _Answer(), self._clock.monotonic
        if instance_id is not None:
            whole = await complete(upstream, instance_id, request, timeout=limit, progress=progress, clock=clock)
            if whole is not None:
                if whole.answer.HasField("delta"):
                    answer.take(whole.answer.delta, whole.size, whole.last)
                answer.result, answer.first = whole.answer.result, whole.first
                return answer
        call = upstream.generate(request, timeout=limit)
        progress.call = call
        try:
            while answer.result is None:
                chunk = await call.read()
                if chunk is grpc.aio.EOF:
                    raise AttemptFailed(Refusal(Reason.ENGINE_FAILED, "the stream ended without a result"))
                message = ModelServerGenerateResponse.FromString(chunk)
                if message.HasField("delta"):
                    progress.tokens += message.delta.tokens or 1
                    answer.take(message.delta, len(chunk), clock())
                if message.HasField("result"):
                    answer.result = message.result
        except BaseException:
            call.cancel()
            raise
        self._generation.let_end(call)
        return answer

    def _result(self, claim: Claim, flight: Flight, answer: _Answer, started: float) -> tuple[bytes, int]:
        """The serialised TaskResult and its cost."""
        told = answer.result
        assert told is not None
        whole, usage = answer.whole, told.usage
        result = TaskResult(text=whole.text, reasoning_text=whole.reasoning, logprobs=whole.logprobs)
        for _, call in sorted(whole.calls.items()):
            result.tool_calls.add(id=call.id, name=call.name, arguments_json=call.arguments)
        summary = result.summary
        summary.request_id = _request_id(claim)
        summary.finish_reason = told.finish_reason
        summary.usage.CopyFrom(usage)
        summary.server_id, summary.model, summary.provider = flight.server_id, flight.model, flight.provider
        for server_id, model, reason in claim.failed_models:
            summary.attempts.add(server_id=server_id, model=model, failure_reason=reason)
        entry = Attempt(server_id=flight.server_id, model=flight.model, provider=flight.provider)
        ended = self._clock.monotonic()
        entry.started_at.CopyFrom(convert.timestamp(self._clock.wall() - (ended - started)))
        summary.attempts.append(entry)
        summary.cost_nano_usd = flight.price.nano_usd(
            usage.prompt_tokens, usage.cached_prompt_tokens, usage.completion_tokens
        )
        # The claim was written at the end of the waiting, both by the store's clock.
        queued = max(0.0, claim.record.updated_at - claim.record.created_at)
        timings = summary.timings
        convert.set_duration(timings.queued, queued)
        convert.set_duration(timings.total, queued + ended - started)
        if answer.first:
            convert.set_duration(timings.ttft, queued + answer.first - started)
        tpot = answer.tpot()
        if tpot is not None:
            convert.set_duration(timings.tpot, tpot)
            self._metrics.pace(flight.model, tpot)
        self._metrics.used(flight.model, usage)
        return result.SerializeToString(), summary.cost_nano_usd


def _request_id(claim: Claim) -> str:
    """To find an attempt in the logs of model servers."""
    return f"{claim.id[:48]}-{claim.record.attempts}"
