"""Between the contract's messages and the engine's types: the only place that knows both."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from model_servers.engine import (
    Busy,
    ContentRefused,
    ContextTooLong,
    CredentialsRejected,
    Delta,
    Embeddings,
    EngineError,
    EngineModel,
    EngineStatus,
    Feature,
    Finished,
    GenerationRequest,
    Image,
    InvalidRequest,
    Message,
    OutOfMemory,
    Progress,
    RateLimited,
    Role,
    Sampling,
    Tool,
    ToolCall,
    ToolCallDelta,
    ToolChoiceMode,
    UnknownModel,
    Unsupported,
)
from model_servers.fingerprint import fingerprint
from model_servers.performance import Means, Timing
from modelyard.rpc.errors import Refusal, Violation
from modelyard.rpc.reasons import Reason
from modelyard.rpc.validation import MAX_DETAIL, MAX_TEXT
from modelyard.v1 import fleet_pb2, generation_pb2, model_server_pb2

# ---------------------------------------------------------------- requests ---

_OPTIONAL_SAMPLING = (
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
)


def generation_request(model: str, content: generation_pb2.GenerationInput, request_id: str = "") -> GenerationRequest:
    """The engine's view of a valid input."""
    schema = None
    json_object = False
    tools: tuple[Tool, ...] = ()
    choice, tool_name = ToolChoiceMode.AUTO, ""
    if content.HasField("response_format"):
        form = content.response_format.WhichOneof("format")
        json_object = form == "json"
        if form == "json_schema":
            schema = content.response_format.json_schema.schema
    if content.tools:
        tools = tuple(Tool(tool.name, tool.description, tool.parameters_schema) for tool in content.tools)
        if content.tool_choice.mode:
            choice, tool_name = ToolChoiceMode(content.tool_choice.mode), content.tool_choice.name
    return GenerationRequest(
        model=model,
        messages=tuple(_message(message) for message in content.messages),
        prompt=content.prompt if not content.messages else None,
        sampling=_sampling(content.sampling) if content.HasField("sampling") else Sampling(),
        json_schema=schema,
        json_object=json_object,
        tools=tools,
        tool_choice=choice,
        tool_name=tool_name,
        request_id=request_id,
    )


def _message(message: generation_pb2.Message) -> Message:
    return Message(
        role=Role(message.role),
        content=tuple(
            Image(part.image.data, part.image.media_type) if part.HasField("image") else part.text
            for part in message.content
        ),
        tool_calls=tuple(ToolCall(call.id, call.name, call.arguments_json) for call in message.tool_calls),
        tool_call_id=message.tool_call_id,
        name=message.name,
    )


def _sampling(sampling: generation_pb2.SamplingParams) -> Sampling:
    given = {name: getattr(sampling, name) for name in _OPTIONAL_SAMPLING if sampling.HasField(name)}
    return Sampling(stop=tuple(sampling.stop), logprobs=sampling.logprobs, top_logprobs=sampling.top_logprobs, **given)


def needed_features(request: GenerationRequest) -> Feature:
    """What the model must be able to do for this request."""
    needed = Feature.NONE
    if request.tools and request.tool_choice is not ToolChoiceMode.NONE:
        needed |= Feature.FUNCTION_CALLING
    if request.json_object:
        needed |= Feature.JSON
    if request.json_schema is not None:
        needed |= Feature.JSON_SCHEMA
    if request.sampling.logprobs:
        needed |= Feature.LOGPROBS
    if any(isinstance(part, Image) for message in request.messages for part in message.content):
        needed |= Feature.VISION
    return needed


# ----------------------------------------------------------------- answers ---

_Response = model_server_pb2.ModelServerGenerateResponse


def delta_bytes(delta: Delta) -> bytes:
    """A serialised ModelServerGenerateResponse: made once per token, so plain text takes the short way."""
    response = _Response()
    _fill_delta(response.delta, delta)
    return response.SerializeToString()


def _fill_delta(message: generation_pb2.GenerationDelta, delta: Delta) -> None:
    message.text = delta.text
    message.tokens = delta.tokens
    if delta.logprobs or delta.tool_calls or delta.reasoning_text:
        message.reasoning_text = delta.reasoning_text
        for entry in delta.logprobs:
            logprob = message.logprobs.add(token=entry.token, logprob=entry.logprob)
            for token, value in entry.top:
                logprob.top.add(token=token, logprob=value)
        for call in delta.tool_calls:
            message.tool_calls.add(index=call.index, id=call.id, name=call.name, arguments_json=call.arguments_json)


def result_bytes(finished: Finished, timing: Timing, last: Delta | None) -> bytes:
    """The serialised last message of a stream; with the whole answer as `last`, a ModelServerCompleteResponse."""
    response = _Response()
    if last is not None:
        _fill_delta(response.delta, last)
    result = response.result
    result.finish_reason = int(finished.finish_reason)  # type: ignore[assignment]
    usage = finished.usage
    result.usage.prompt_tokens = usage.prompt_tokens
    result.usage.cached_prompt_tokens = usage.cached_prompt_tokens
    result.usage.completion_tokens = usage.completion_tokens
    result.usage.reasoning_tokens = usage.reasoning_tokens
    timings = result.timings
    timings.queued.FromNanoseconds(_nanoseconds(timing.queued))
    timings.total.FromNanoseconds(_nanoseconds(timing.total))
    if timing.ttft is not None:
        timings.ttft.FromNanoseconds(_nanoseconds(timing.ttft))
    if timing.tpot is not None:
        timings.tpot.FromNanoseconds(_nanoseconds(timing.tpot))
    return response.SerializeToString()


def merged(deltas: Sequence[Delta]) -> Delta | None:
    """An answer as one piece; the fragments of each tool call become one. None: nothing was said."""
    if len(deltas) < 2 and not any(delta.tool_calls for delta in deltas):
        return deltas[0] if deltas else None
    calls: defaultdict[int, list[ToolCallDelta]] = defaultdict(list)
    for delta in deltas:
        for part in delta.tool_calls:
            calls[part.index].append(part)
    return Delta(
        text="".join([delta.text for delta in deltas]),
        tokens=sum(delta.tokens for delta in deltas),
        logprobs=tuple(entry for delta in deltas for entry in delta.logprobs),
        tool_calls=tuple(
            replace(parts[0], arguments_json="".join([part.arguments_json for part in parts]))
            for _, parts in sorted(calls.items())
        ),
        reasoning_text="".join([delta.reasoning_text for delta in deltas]),
    )


def embed_response(embeddings: Embeddings) -> model_server_pb2.ModelServerEmbedResponse:
    response = model_server_pb2.ModelServerEmbedResponse()
    for vector in embeddings.vectors:
        response.embeddings.add().values.extend(vector)
    response.usage.prompt_tokens = embeddings.prompt_tokens
    return response


def model_progress(progress: Progress) -> fleet_pb2.ModelProgress:
    return fleet_pb2.ModelProgress(
        state=int(progress.state),  # type: ignore[arg-type]
        detail=progress.detail,
        completed_bytes=progress.completed_bytes,
        total_bytes=progress.total_bytes,
    )


def _nanoseconds(seconds: float) -> int:
    return max(0, round(seconds * 1e9))


# ------------------------------------------------------------------ errors ---


def refusal(error: EngineError, field_name: str) -> Refusal:
    """How the contract tells what an engine raised; `field_name` is what a prompt that is too long stands in."""
    message = str(error) or "the engine gave no reason"
    if isinstance(error, UnknownModel):
        return Refusal(Reason.UNKNOWN_MODEL, message)
    if isinstance(error, ContextTooLong):
        return Refusal(Reason.CONTEXT_TOO_LONG, message, (Violation(field_name, message),))
    if isinstance(error, InvalidRequest):
        path = f"{field_name}.{error.field}" if error.field else field_name
        return Refusal(Reason.INVALID_REQUEST, message, (Violation(path, message),))
    if isinstance(error, Unsupported):
        return Refusal(Reason.UNSUPPORTED, message)
    if isinstance(error, Busy):
        return Refusal(Reason.SERVER_BUSY, message, retry_after=error.retry_after)
    if isinstance(error, RateLimited):
        return Refusal(Reason.RATE_LIMITED, message, retry_after=error.retry_after)
    if isinstance(error, OutOfMemory):
        return Refusal(Reason.OUT_OF_MEMORY, message)
    if isinstance(error, CredentialsRejected):
        return Refusal(Reason.CREDENTIALS_REJECTED, message)
    if isinstance(error, ContentRefused):
        return Refusal(Reason.CONTENT_REFUSED, message)
    return Refusal(Reason.ENGINE_FAILED, message)


# ------------------------------------------------------------------ report ---


@dataclass(frozen=True, slots=True)
class Identity:
    """Who this server is."""

    server_id: str
    instance_id: str
    endpoint: str
    labels: Mapping[str, str] = field(default_factory=dict)
    version: str = ""


@dataclass(frozen=True, slots=True)
class Host:
    """The machine, as far as Python can tell."""

    cpu_cores: int
    platform: str


@dataclass(frozen=True, slots=True)
class Load:
    """Work in hand, as one control plane must see it."""

    slots: int
    running: int
    waiting: int
    foreign: int


def server_report(
    identity: Identity,
    host: Host,
    status: EngineStatus,
    load: Load,
    means: Mapping[str, Means],
    *,
    manages_models: bool,
    draining: bool,
    lease_epoch: int,
) -> fleet_pb2.ServerReport:
    report = fleet_pb2.ServerReport(
        identity=fleet_pb2.ServerIdentity(
            server_id=identity.server_id,
            instance_id=identity.instance_id,
            endpoint=identity.endpoint,
            labels=identity.labels,
            version=identity.version,
        ),
        engine=fleet_pb2.EngineInfo(
            name=status.engine, version=status.version[:MAX_TEXT], manages_models=manages_models
        ),
        hardware=fleet_pb2.HardwareInfo(
            device=status.device[:MAX_TEXT],
            memory_bytes=status.memory_bytes,
            cpu_cores=host.cpu_cores,
            platform=host.platform,
            memory_used_bytes=status.memory_used_bytes,
        ),
        load=fleet_pb2.ServerLoad(
            slots=load.slots,
            running=load.running,
            waiting=load.waiting,
            foreign=load.foreign,
            kv_cache_utilization=min(max(status.load.kv_cache_utilization, 0.0), 1.0),
        ),
        health=int(status.health),  # type: ignore[arg-type]
        health_detail=status.health_detail[:MAX_DETAIL],
        lease_epoch=lease_epoch,
        state=fleet_pb2.DESIRED_STATE_DRAIN if draining else fleet_pb2.DESIRED_STATE_SERVE,
    )
    if status.pool is not None:
        pool = status.pool
        report.pool.size, report.pool.in_use = pool.size, pool.in_use
        report.pool.opened, report.pool.reused = pool.opened, pool.reused
    report.models.extend(
        _model_info(model, means.get(model.name), fingerprint(status, model)) for model in status.models
    )
    return report


def _model_info(model: EngineModel, means: Means | None, fingerprint: str) -> fleet_pb2.ModelInfo:
    info = fleet_pb2.ModelInfo(
        name=model.name,
        provider=model.provider,
        context_length=model.context_length,
        features=_feature_numbers(model.features),  # type: ignore[arg-type]
        quantization=model.quantization,
        state=int(model.state),  # type: ignore[arg-type]
        state_detail=model.state_detail,
        memory_bytes=model.memory_bytes,
        fingerprint=fingerprint,
    )
    if model.load_seconds is not None:
        info.load_time.FromNanoseconds(_nanoseconds(model.load_seconds))
    for kind, score in model.capabilities.items():
        info.capabilities.add(task_type=kind, score=score)
    if any(model.price):
        prompt, cached, completion = model.price
        info.price.prompt_usd_per_million_tokens = prompt
        info.price.cached_prompt_usd_per_million_tokens = cached
        info.price.completion_usd_per_million_tokens = completion
    means = means or Means(ttft=model.expected_ttft, tpot=model.expected_tpot)
    if means != Means():
        performance = info.performance
        if means.ttft is not None:
            performance.ttft.FromNanoseconds(_nanoseconds(means.ttft))
        if means.tpot is not None:
            performance.tpot.FromNanoseconds(_nanoseconds(means.tpot))
        performance.prefill_tokens_per_second = means.prefill_tokens_per_second
        performance.decode_tokens_per_second = means.decode_tokens_per_second
    return info


def _feature_numbers(features: Feature) -> Sequence[int]:
    return [feature.value.bit_length() - 1 for feature in Feature if feature in features and feature]
