"""The only place where messages of the contract and domain values meet."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from control_plane.domain.decision import DecisionRecord, ScoredCandidate
from control_plane.domain.model import ModelCard, ModelName, ModelState, Price, Provider, ServerId
from control_plane.domain.prompt import Blocks
from control_plane.domain.request import RouteRequest
from control_plane.domain.server import Hardware, Health, Identity, Load, Pool, Report
from control_plane.domain.task import Feature, Priority, TaskType
from modelyard.rpc.routing import BYTES_PER_TOKEN, estimated_tokens, implied_features
from modelyard.v1 import fleet_pb2, orchestrator_pb2, selection_pb2

# The range of a Duration as protobuf documents it, about 10,000 years; its field holds more.
_MOST_SECONDS = 315_576_000_000.0

# Characters of a server's own words that are kept, shown and repeated in decisions.
_DETAIL_LENGTH = 300


def duration(seconds: float) -> Duration:
    message = Duration()
    set_duration(message, seconds)
    return message


def set_duration(field: Duration, seconds: float) -> None:
    """Write seconds (>= 0) into a field, in place: the hot path makes no message just to copy it."""
    field.seconds = whole = int(seconds)
    field.nanos = int((seconds - whole) * 1e9)


def seconds(message: Duration) -> float:
    return min(message.seconds + message.nanos * 1e-9, _MOST_SECONDS)


def timestamp(wall: float) -> Timestamp:
    whole = math.floor(wall)
    return Timestamp(seconds=whole, nanos=int((wall - whole) * 1e9))


# ---------------------------------------------------------------- requests ---


def feature_set(numbers: Iterable[int]) -> Feature:
    bits = 0  # of the type itself each step would cost as much as all of them so
    for number in numbers:
        if number:
            bits |= 1 << number
    return Feature(bits) if bits else Feature.NONE


def feature_numbers(features: Feature) -> list[int]:
    return [number for number in range(1, features.bit_length()) if features >> number & 1]


def route_request(
    message: orchestrator_pb2.GenerateRequest,
    request_id: str,
    tenant: str,
    model: tuple[ModelName, Provider | None] | None,
    more_tokens: int = 0,
    blocks: Blocks | None = None,
) -> RouteRequest:
    """What routing may know of a checked request, whose prompt has `more_tokens` beside what is in its input, and
    these `blocks`. `model` is the resolved pin."""
    task_type = TaskType(message.task_type or TaskType.CHAT)
    features = feature_set((*implied_features(message.input), *message.requirements.features))
    if task_type is TaskType.VISION:
        features |= Feature.VISION
    sampling = message.input.sampling
    return RouteRequest(
        request_id=request_id,
        task_type=task_type,
        priority=Priority(message.priority or Priority.NORMAL),
        prompt_tokens=estimated_tokens(message.input) + more_tokens,
        max_tokens=sampling.max_tokens if sampling.HasField("max_tokens") else None,
        features=features,
        preset=message.preset,
        blocks=blocks,
        tenant=tenant,
        **_pins(message, model),
    )


def embed_route_request(
    message: orchestrator_pb2.EmbedRequest,
    request_id: str,
    tenant: str,
    model: tuple[ModelName, Provider | None] | None,
) -> RouteRequest:
    tokens = [max(len(text.encode()) // BYTES_PER_TOKEN, 1) for text in message.inputs]
    longest = max(tokens, default=1)
    return RouteRequest(
        request_id=request_id,
        task_type=TaskType.EMBEDDING,
        priority=Priority(message.priority or Priority.NORMAL),
        prompt_tokens=longest,
        more_prompt_tokens=max(0, sum(tokens) - longest),
        tenant=tenant,
        features=Feature.EMBEDDING | feature_set(message.requirements.features),
        **_pins(message, model),
    )


def _pins(
    message: orchestrator_pb2.GenerateRequest | orchestrator_pb2.EmbedRequest,
    model: tuple[ModelName, Provider | None] | None,
) -> dict[str, Any]:
    if model is None and not message.HasField("requirements"):
        return {}  # most have none, and to read what is not there takes as long as all the rest
    requirements = message.requirements
    name, provider = model or (None, None)
    return {
        "model": name,
        "provider": Provider(requirements.provider) if requirements.provider else provider,
        "server_id": ServerId(requirements.server_id) if requirements.server_id else None,
        "excluded": frozenset(ServerId(server_id) for server_id in requirements.excluded_server_ids),
        "excluded_models": excluded_models(requirements.excluded_models),
        "max_cost_nano_usd": requirements.max_cost_nano_usd,
        "min_context_length": requirements.min_context_length,
        "labels": tuple(sorted(requirements.labels.items())),
    }


def excluded_models(texts: Iterable[str]) -> frozenset[tuple[ModelName, Provider | None]]:
    """Names, and "provider/name". A name may contain "/" itself, so such a text means both."""
    excluded: set[tuple[ModelName, Provider | None]] = set()
    for text in texts:
        excluded.add((ModelName(text), None))
        provider, _, name = text.partition("/")
        if name:
            excluded.add((ModelName(name), Provider(provider)))
    return frozenset(excluded)


# ----------------------------------------------------------------- reports ---


def report(message: fleet_pb2.ServerReport, before: tuple[fleet_pb2.ServerReport, Report] | None = None) -> Report:
    """A checked report as a value.

    `before` is the previous report of the stream, as message and value: its models are taken over
    where they are the same, for converting them is most of the work (0.4 s for 10,000).
    """
    identity, load = message.identity, message.load
    return Report(
        identity=Identity(
            server_id=ServerId(identity.server_id),
            instance_id=identity.instance_id,
            endpoint=identity.endpoint,
            labels=dict(identity.labels),
            version=identity.version,
        ),
        engine=message.engine.name,
        engine_version=message.engine.version,
        hardware=Hardware(
            device=message.hardware.device,
            memory_bytes=message.hardware.memory_bytes,
            cpu_cores=message.hardware.cpu_cores,
            platform=message.hardware.platform,
            memory_used_bytes=message.hardware.memory_used_bytes,
        ),
        models=before[1].models
        if before and before[0].models == message.models
        else tuple(model_card(model) for model in message.models),
        load=Load(
            slots=load.slots,
            running=load.running,
            waiting=load.waiting,
            foreign=load.foreign,
            kv_cache_utilization=load.kv_cache_utilization,
        ),
        health=Health(message.health or Health.UNHEALTHY),
        health_detail=message.health_detail,
        draining=message.state == fleet_pb2.DESIRED_STATE_DRAIN,
        manages_models=message.engine.manages_models,
        pool=_pool(message.pool) if message.HasField("pool") else None,
        lease_epoch=message.lease_epoch,
        takes_tickets=message.HasField("tickets"),
        needs_tickets=message.tickets.required,
    )


def _pool(message: fleet_pb2.ConnectionPool) -> Pool:
    return Pool(message.size, message.in_use, message.opened, message.reused)


def model_card(message: fleet_pb2.ModelInfo) -> ModelCard:
    performance = message.performance
    return ModelCard(
        name=ModelName(message.name),
        provider=Provider(message.provider),
        context_length=message.context_length,
        capabilities={TaskType(entry.task_type): entry.score for entry in message.capabilities if entry.task_type},
        features=feature_set(message.features),
        price=Price(
            message.price.prompt_usd_per_million_tokens,
            message.price.cached_prompt_usd_per_million_tokens,
            message.price.completion_usd_per_million_tokens,
        ),
        quantization=message.quantization,
        ttft=seconds(performance.ttft) if performance.HasField("ttft") else None,
        tpot=seconds(performance.tpot) if performance.HasField("tpot") else None,
        state=ModelState(message.state or ModelState.WARM),
        state_detail=message.state_detail[:_DETAIL_LENGTH],
        memory_bytes=message.memory_bytes,
        load_time=seconds(message.load_time) if message.HasField("load_time") else None,
        fingerprint=message.fingerprint,
    )


def model_info(card: ModelCard) -> fleet_pb2.ModelInfo:
    info = fleet_pb2.ModelInfo(
        name=card.name,
        provider=card.provider,
        capabilities=capabilities(card.capabilities),
        context_length=card.context_length,
        features=feature_numbers(card.features),  # type: ignore[arg-type]
        price=price(card.price),
        quantization=card.quantization,
        state=card.state.value,  # type: ignore[arg-type]
        state_detail=card.state_detail,
        memory_bytes=card.memory_bytes,
        fingerprint=card.fingerprint,
    )
    if card.load_time is not None:
        info.load_time.CopyFrom(duration(card.load_time))
    if card.ttft is not None:
        info.performance.ttft.CopyFrom(duration(card.ttft))
    if card.tpot is not None:
        info.performance.tpot.CopyFrom(duration(card.tpot))
    return info


def price(of: Price) -> fleet_pb2.Price:
    return fleet_pb2.Price(
        prompt_usd_per_million_tokens=of.prompt,
        cached_prompt_usd_per_million_tokens=of.cached_prompt,
        completion_usd_per_million_tokens=of.completion,
    )


def capabilities(scores: Mapping[TaskType, float]) -> list[fleet_pb2.Capability]:
    return [
        fleet_pb2.Capability(task_type=kind.value, score=score)  # type: ignore[arg-type]
        for kind, score in sorted(scores.items())
    ]


# --------------------------------------------------------------- decisions ---


def decision(record: DecisionRecord) -> selection_pb2.Decision:
    message = selection_pb2.Decision(
        verdict=record.verdict.value,  # type: ignore[arg-type]
        candidates=[_candidate(candidate) for candidate in record.candidates],
        summary=record.summary,
        formulas=[selection_pb2.Formula(name=name, text=text) for name, text in record.formulas],
        terms=record.terms,
        propensity=record.propensity,
        explored=record.explored,
    )
    if record.chosen:
        message.server_id = record.chosen.server_id
        message.model = record.chosen.model
        message.provider = record.chosen.provider
    return message


def _candidate(candidate: ScoredCandidate) -> selection_pb2.Candidate:
    return selection_pb2.Candidate(
        server_id=candidate.server_id,
        model=candidate.model,
        provider=candidate.provider,
        score=candidate.score,
        parts=[
            selection_pb2.ScorePart(scorer=part.scorer, value=part.value, weight=part.weight)
            for part in candidate.parts
        ],
        rejections=[
            selection_pb2.Rejection(
                reason=rejection.reason.value,  # type: ignore[arg-type]
                detail=rejection.detail,
                permanent=rejection.reason.permanent,
            )
            for rejection in candidate.rejections
        ],
        estimated_cost_nano_usd=candidate.estimated_cost_nano_usd,
        terms=candidate.terms,
    )
