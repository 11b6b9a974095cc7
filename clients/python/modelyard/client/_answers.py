"""Answers of the contract -> values of the client."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

from modelyard.client import _names as names
from modelyard.client import _types as types
from modelyard.v1 import fleet_pb2, generation_pb2, orchestrator_pb2, selection_pb2

# ---------------------------------------------------------------- generation ---


def delta(message: generation_pb2.GenerationDelta) -> types.Delta:
    calls, logprobs = message.tool_calls, message.logprobs
    return types.Delta(
        message.text,
        message.tokens,
        message.reasoning_text,
        tuple(types.ToolCallDelta(call.index, call.id, call.name, call.arguments_json) for call in calls)
        if calls
        else (),
        tuple(logprob(each) for each in logprobs) if logprobs else (),
    )


def logprob(message: generation_pb2.TokenLogprob) -> types.TokenLogprob:
    top = tuple(types.TopLogprob(each.token, each.logprob) for each in message.top)
    return types.TokenLogprob(message.token, message.logprob, top)


class Ending(NamedTuple):
    """What is known of an answer when it has ended, but for the answer itself."""

    finish_reason: str
    usage: types.Usage
    timings: types.Timings
    server_id: str
    model: str
    provider: str
    attempts: tuple[types.Attempt, ...]
    cost_usd: float
    request_id: str
    delta: generation_pb2.GenerationDelta | None = None
    """The last piece, or all of it."""


class Answer:
    """Collects the events of one answer."""

    def __init__(self) -> None:
        self._texts: list[str] = []
        self._reasoning: list[str] = []
        self._logprobs: list[types.TokenLogprob] = []
        self._calls: dict[int, list[types.ToolCallDelta]] = {}
        self._decisions: list[types.Decision] = []
        self.started = False
        """Some of the answer itself has come."""

    def add(self, event: types.Delta | types.Decision) -> None:
        if isinstance(event, types.Decision):
            self._decisions.append(event)
            return
        self.started = True
        self._texts.append(event.text)
        self._reasoning.append(event.reasoning_text)
        self._logprobs.extend(event.logprobs)
        for call in event.tool_calls:
            self._calls.setdefault(call.index, []).append(call)

    def partial(self, request_id: str) -> types.GenerationResult | None:
        """What has come so far; None if nothing has."""
        return self.result(orchestrator_pb2.GenerationSummary(request_id=request_id)) if self.started else None

    def result(self, summary: orchestrator_pb2.GenerationSummary) -> types.GenerationResult:
        return self.ended(
            Ending(
                finish_reason=names.FINISH_REASON.name(summary.finish_reason),
                usage=usage(summary.usage),
                timings=_timings(summary.timings),
                server_id=summary.server_id,
                model=summary.model,
                provider=summary.provider,
                attempts=tuple([_attempt(attempt) for attempt in summary.attempts]),
                cost_usd=summary.cost_nano_usd / 1e9,
                request_id=summary.request_id,
            )
        )

    def ended(self, ending: Ending) -> types.GenerationResult:
        return types.GenerationResult(
            "".join(self._texts),
            ending.finish_reason,
            tuple([_tool_call(self._calls[index]) for index in sorted(self._calls)]) if self._calls else (),
            "".join(self._reasoning),
            tuple(self._logprobs),
            ending.usage,
            ending.timings,
            ending.server_id,
            ending.model,
            ending.provider,
            ending.attempts,
            tuple(self._decisions),
            ending.cost_usd,
            ending.request_id,
        )


def _tool_call(fragments: list[types.ToolCallDelta]) -> types.ToolCall:
    return types.ToolCall(
        id="".join(fragment.id for fragment in fragments),
        name="".join(fragment.name for fragment in fragments),
        arguments_json="".join(fragment.arguments_json for fragment in fragments),
    )


def usage(message: generation_pb2.Usage) -> types.Usage:
    return types.Usage(
        message.prompt_tokens, message.cached_prompt_tokens, message.completion_tokens, message.reasoning_tokens
    )


def _timings(message: generation_pb2.Timings) -> types.Timings:
    queued, total = message.queued, message.total
    return types.Timings(
        queued.seconds + queued.nanos / 1e9,
        _seconds(message, "ttft"),
        _seconds(message, "tpot"),
        total.seconds + total.nanos / 1e9,
    )


def _attempt(message: orchestrator_pb2.Attempt) -> types.Attempt:
    return types.Attempt(
        message.server_id,
        message.model,
        message.provider,
        time(message, "started_at"),
        message.failure_reason,
        message.failure_message,
        message.overtaken,
    )


def embed_result(message: orchestrator_pb2.EmbedResponse) -> types.EmbedResult:
    return types.EmbedResult(
        vectors=tuple(tuple(embedding.values) for embedding in message.embeddings),
        usage=usage(message.usage),
        server_id=message.server_id,
        model=message.model,
        provider=message.provider,
        request_id=message.request_id,
        cost_usd=message.cost_nano_usd / 1e9,
    )


# ----------------------------------------------------------------- decisions ---


def decision(message: selection_pb2.Decision, estimated_prompt_tokens: int | None = None) -> types.Decision:
    return types.Decision(
        verdict=names.VERDICT.name(message.verdict),
        server_id=message.server_id,
        model=message.model,
        provider=message.provider,
        candidates=tuple(_candidate(candidate) for candidate in message.candidates),
        summary=message.summary,
        estimated_prompt_tokens=estimated_prompt_tokens,
        formulas={formula.name: formula.text for formula in message.formulas},
        terms=dict(message.terms),
        propensity=message.propensity or 1.0,  # an older control plane does not tell
        explored=message.explored,
    )


def _candidate(message: selection_pb2.Candidate) -> types.Candidate:
    return types.Candidate(
        server_id=message.server_id,
        model=message.model,
        provider=message.provider,
        score=message.score,
        parts=tuple(types.ScorePart(part.scorer, part.value, part.weight) for part in message.parts),
        rejections=tuple(
            types.Rejection(names.REJECTION_REASON.name(each.reason), each.detail, each.permanent)
            for each in message.rejections
        ),
        estimated_cost_usd=message.estimated_cost_nano_usd / 1e9,
        terms=dict(message.terms),
    )


# --------------------------------------------------------------------- fleet ---


def preset(message: orchestrator_pb2.Preset) -> types.Preset:
    defaults, wanted = message.defaults, message.defaults.requirements
    return types.Preset(
        name=message.name,
        description=message.description,
        task_type=names.TASK_TYPE.name(defaults.task_type),
        priority=names.PRIORITY.name(defaults.priority),
        system="".join(part.text for each in defaults.input.messages for part in each.content),
        sampling={
            field.name: list(value) if field.name == "stop" else value
            for field, value in defaults.input.sampling.ListFields()
        },
        model=wanted.model,
        provider=wanted.provider,
        min_context_length=wanted.min_context_length,
        features=names.FEATURE.each(wanted.features),
        labels=dict(wanted.labels),
    )


def model(message: fleet_pb2.Model) -> types.Model:
    return types.Model(
        name=message.name,
        providers=tuple(message.providers),
        placements=tuple(
            types.Placement(
                placement.server_id, names.LEASE_STATE.name(placement.lease_state), _served_model(placement.info)
            )
            for placement in message.placements
        ),
        context_length=message.context_length,
        features=names.FEATURE.each(message.features),
        capabilities=_capabilities(message.capabilities),
    )


def server(message: fleet_pb2.ModelServerStatus) -> types.ServerStatus:
    report = message.report
    identity, hardware, load = report.identity, report.hardware, report.load
    runtimes = {runtime.model: _runtime(runtime) for runtime in message.models}
    return types.ServerStatus(
        server_id=identity.server_id,
        lease_state=names.LEASE_STATE.name(message.lease_state),
        health=names.HEALTH.name(report.health) or "unhealthy",
        health_detail=report.health_detail,
        engine=report.engine.name,
        engine_version=report.engine.version,
        endpoint=identity.endpoint,
        instance_id=identity.instance_id,
        version=identity.version,
        labels=dict(identity.labels),
        device=hardware.device,
        platform=hardware.platform,
        memory_bytes=hardware.memory_bytes,
        cpu_cores=hardware.cpu_cores,
        slots=load.slots,
        running=load.running,
        waiting=load.waiting,
        foreign=load.foreign,
        kv_cache_utilization=load.kv_cache_utilization,
        in_flight=message.in_flight,
        models=tuple(_served_model(info, runtimes.get(info.name)) for info in report.models),
        lease_epoch=message.lease_epoch,
        attached_at=time(message, "attached_at"),
        reported_at=time(message, "reported_at"),
        assigned=message.assigned,
        memory_used_bytes=hardware.memory_used_bytes,
        manages_models=report.engine.manages_models,
        pool=_pool(report.pool) if report.HasField("pool") else None,
    )


def _pool(message: fleet_pb2.ConnectionPool) -> types.ConnectionPool:
    requests = message.opened + message.reused
    hit_rate = message.reused / requests if requests else None
    return types.ConnectionPool(message.size, message.in_use, message.opened, message.reused, hit_rate)


def model_progress(message: Any) -> types.ModelProgress:
    """Of a PullModelResponse, LoadModelResponse or UnloadModelResponse."""
    step = message.progress
    return types.ModelProgress(
        message.server_id,
        names.MODEL_STATE.name(step.state) or "warm",
        step.detail,
        step.completed_bytes,
        step.total_bytes,
    )


def fleet_change(message: orchestrator_pb2.WatchFleetResponse) -> types.FleetChange:
    return types.FleetChange(
        snapshot=message.snapshot,
        servers=tuple(server(each) for each in message.servers),
        removed_server_ids=tuple(message.removed_server_ids),
    )


def _served_model(message: fleet_pb2.ModelInfo, runtime: types.ModelRuntime | None = None) -> types.ServedModel:
    price, performance = message.price, message.performance
    return types.ServedModel(
        name=message.name,
        provider=message.provider,
        context_length=message.context_length,
        features=names.FEATURE.each(message.features),
        capabilities=_capabilities(message.capabilities),
        price=types.Price(
            price.prompt_usd_per_million_tokens,
            price.cached_prompt_usd_per_million_tokens,
            price.completion_usd_per_million_tokens,
        ),
        quantization=message.quantization,
        ttft=_seconds(performance, "ttft"),
        tpot=_seconds(performance, "tpot"),
        prefill_tokens_per_second=performance.prefill_tokens_per_second,
        decode_tokens_per_second=performance.decode_tokens_per_second,
        state=names.MODEL_STATE.name(message.state) or "warm",
        state_detail=message.state_detail,
        memory_bytes=message.memory_bytes,
        load_time=_seconds(message, "load_time"),
        fingerprint=message.fingerprint,
        runtime=runtime,
    )


def _runtime(message: fleet_pb2.ModelRuntime) -> types.ModelRuntime:
    return types.ModelRuntime(
        success_rate=message.success_rate,
        ttft=_seconds(message, "ttft"),
        tpot=_seconds(message, "tpot"),
        requests=message.requests,
        failures=message.failures,
        breaker=names.BREAKER_STATE.name(message.breaker),
    )


def _capabilities(capabilities: Iterable[fleet_pb2.Capability]) -> dict[str, float]:
    return {names.TASK_TYPE.name(each.task_type): each.score for each in capabilities}


def _seconds(message: Any, field: str) -> float | None:
    if not message.HasField(field):
        return None
    duration = getattr(message, field)
    return float(duration.seconds + duration.nanos / 1e9)


_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def moment(nanoseconds: int) -> datetime:
    """A time of the clock."""
    return _EPOCH + timedelta(microseconds=nanoseconds // 1000)


def time(message: Any, field: str) -> datetime | None:
    if not message.HasField(field):
        return None
    return getattr(message, field).ToDatetime(UTC)  # type: ignore[no-any-return]
