"""Lanes: which tasks wait together, how urgent they are, whom they avoid, and what becomes of a failed attempt.

Pure: no I/O, no clock, no randomness.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from msgspec.structs import replace

from control_plane.domain.model import ModelName, Provider, ServerId
from control_plane.domain.request import RouteRequest
from control_plane.domain.server import Failed
from control_plane.domain.task import Feature, Priority, TaskType
from control_plane.scheduling.retry import REQUEST_REASONS, RetryPolicy, repeatable, retryable
from control_plane.tasks.model import Claim, Lane, Placement, Retry, Tenant

_SERVERS_PER_MODEL = 2
"""On so many servers a model fails before others are preferred."""

_ATTEMPT_TIMED_OUT = "DEADLINE_EXCEEDED"
"""Of an attempt, while the task's own deadline has not passed: another server may be faster."""

# ------------------------------------------------------------------- needs ---


def lane_of(tenant: Tenant, route: RouteRequest) -> Lane:
    """The lane of a new task with these needs; `route.priority` is that of the task."""
    return Lane(tenant, route.priority, replace(rounded(route), request_id="", tenant=tenant))


def rounded(route: RouteRequest) -> RouteRequest:
    """The same needs with the context rounded up to a quarter of an octave, so that few lanes hold many tasks.

    Never beyond the next power of two, which is what context lengths mostly are, nor beyond a `min_context_length`
    that covers it anyway. Not rounded where the price is limited: it depends on each token.
    """
    if route.max_cost_nano_usd:
        return route
    answer = route.max_tokens or 1
    needed = route.prompt_tokens + answer
    least_length = route.min_context_length
    target = least_length if needed <= least_length < quarter_octave(needed) else quarter_octave(needed)
    return replace(route, prompt_tokens=target - answer)


def least(route: RouteRequest) -> RouteRequest:
    """The least that a task with these rounded needs may need."""
    if route.max_cost_nano_usd:
        return route
    answer = route.max_tokens or 1
    needed = route.prompt_tokens + answer
    return replace(route, prompt_tokens=max(0, needed - _step(needed) + 1 - answer))


def quarter_octave(tokens: int) -> int:
    """Rounded up to one of four steps between two powers of two: ..., 1024, 1280, 1536, 1792, 2048, ..."""
    step = _step(tokens)
    return -(-tokens // step) * step


def _step(tokens: int) -> int:
    """Distance of the steps around so many tokens."""
    return int(1 << max(0, (max(tokens, 1) - 1).bit_length() - 3))


# -------------------------------------------------------------------- JSON ---


def to_json(lane: Lane) -> str:
    """The one text for a lane: equal lanes have equal texts. What is as it is by default is left out."""
    route = lane.route
    facts: dict[str, Any] = {
        "tenant": lane.tenant,
        "priority": int(lane.priority),
        "task_type": int(route.task_type),
        "prompt_tokens": route.prompt_tokens,
        "max_tokens": route.max_tokens,
        "model": route.model,
        "provider": route.provider,
        "server_id": route.server_id,
        "excluded": sorted(route.excluded),
        "excluded_models": _models(route.excluded_models),
        "max_cost_nano_usd": route.max_cost_nano_usd,
        "min_context_length": route.min_context_length,
        "features": int(route.features),
        "labels": [list(label) for label in route.labels],
        "preset": route.preset,
        "unfit": _servers(lane.unfit),
        "failed": _servers(lane.failed),
        "avoided_models": _models(lane.avoided_models),
    }
    given = {key: value for key, value in facts.items() if value not in (None, 0, "", [])}
    return json.dumps(given, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def from_json(text: str) -> Lane:
    """What `to_json` was given. Raises ValueError for anything else."""
    facts = json.loads(text)
    if not isinstance(facts, dict):
        raise ValueError("a lane is a JSON object")
    try:
        priority = Priority(facts.pop("priority"))
        tenant = Tenant(facts.pop("tenant"))
        unfit, failed = (
            frozenset(Failed(ServerId(server), instance) for server, instance in facts.pop(key, ()))
            for key in ("unfit", "failed")
        )
        avoided = _known_models(facts.pop("avoided_models", ()))
        route = RouteRequest(
            "",
            task_type=TaskType(facts.pop("task_type")),
            priority=priority,
            prompt_tokens=facts.pop("prompt_tokens", 0),
            max_tokens=facts.pop("max_tokens", None),
            model=facts.pop("model", None),
            provider=facts.pop("provider", None),
            server_id=facts.pop("server_id", None),
            excluded=frozenset(facts.pop("excluded", ())),
            excluded_models=_known_models(facts.pop("excluded_models", ())),
            max_cost_nano_usd=facts.pop("max_cost_nano_usd", 0),
            min_context_length=facts.pop("min_context_length", 0),
            features=Feature(facts.pop("features", 0)),
            labels=tuple((key, value) for key, value in facts.pop("labels", ())),
            preset=facts.pop("preset", ""),
            tenant=tenant,
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"not a lane: {error!r}") from None
    if facts:
        raise ValueError(f"not a lane: unknown {', '.join(sorted(facts))}")
    return Lane(tenant, priority, route, unfit, failed, avoided)


def _servers(servers: Iterable[Failed]) -> list[list[str]]:
    return sorted([failed.server_id, failed.instance_id] for failed in servers)


def _models(models: Iterable[tuple[ModelName, Provider | None]]) -> list[list[str]]:
    """[name] of any provider, [name, provider] of one."""
    return sorted([name] if provider is None else [name, provider] for name, provider in models)


def _known_models(lists: Iterable[list[str]]) -> frozenset[tuple[ModelName, Provider | None]]:
    return frozenset((ModelName(name), Provider(provider[0]) if provider else None) for name, *provider in lists)


# ----------------------------------------------------------------- urgency ---


def effective_class(priority: Priority, oldest: float, now: float, ageing: float) -> Priority:
    """The class of a lane whose first task has waited since `oldest`: one more for every `ageing` seconds."""
    gained = int(max(0.0, now - oldest) / ageing)
    return Priority(min(Priority.CRITICAL, priority + gained))


def next_class_at(priority: Priority, oldest: float, now: float, ageing: float) -> float | None:
    """When the class of such a lane rises next; None: it is the highest."""
    current = effective_class(priority, oldest, now, ageing)
    return None if current is Priority.CRITICAL else oldest + (current - priority + 1) * ageing


# ---------------------------------------------------------------- failures ---


def avoidances(lane: Lane) -> Iterator[tuple[RouteRequest, frozenset[Failed]]]:
    """Needs and servers to avoid, the strictest first: a later one is for when nobody can do what is before it."""
    everyone = lane.unfit | lane.failed
    if not lane.avoided_models <= lane.route.excluded_models:
        excluded = lane.route.excluded_models | lane.avoided_models
        yield replace(lane.route, excluded_models=excluded), everyone
    yield lane.route, everyone
    if not lane.failed <= lane.unfit:
        yield lane.route, lane.unfit
    # Between the steps of the rounding there may be a server's context length.
    smaller = least(lane.route)
    if smaller.context_needed < lane.route.context_needed:
        yield smaller, lane.unfit


def after_failure(claim: Claim, placement: Placement, reason: str) -> Lane:
    """The lane of a task whose attempt on a server failed."""
    lane = claim.lane
    server = Failed(placement.server_id, placement.instance_id)
    if repeatable(reason) or reason == _ATTEMPT_TIMED_OUT:
        lane = replace(lane, failed=lane.failed | {server})
    else:
        lane = replace(lane, unfit=lane.unfit | {server}, failed=lane.failed - {server})
    if reason in REQUEST_REASONS:
        return replace(lane, avoided_models=lane.avoided_models | {(placement.model, placement.provider)})
    where = {server_id for server_id, model, _ in claim.failed_models if model == placement.model}
    if len(where | {placement.server_id}) >= _SERVERS_PER_MODEL:
        return replace(lane, avoided_models=lane.avoided_models | {(placement.model, None)})
    return lane


@dataclass(frozen=True, slots=True)
class Failure:
    """A failed attempt."""

    reason: str
    message: str
    retry_after: float | None = None
    """Seconds after which the server says that it can be asked again."""


def retry_of(
    claim: Claim,
    placement: Placement,
    failure: Failure,
    others: bool,
    policy: RetryPolicy,
    now: float,
    jitter01: float,
) -> Retry | None:
    """The next attempt; None: there is none, the task has failed.

    `others`: somebody that may suit it is there, now or later. `policy.max_attempts` is not looked at: the task knows
    its own. Half of the pause is random.
    """
    record = claim.record
    if record.failures + 1 >= record.max_attempts:
        return None
    if not retryable(failure.reason) and failure.reason != _ATTEMPT_TIMED_OUT:
        return None
    if failure.reason in REQUEST_REASONS and not others:
        return None
    pause = policy.delay(record.failures + 1, 0.5 + 0.5 * jitter01)
    ready_at = now + max(pause, min(failure.retry_after or 0.0, policy.cap))
    if record.deadline is not None and ready_at >= record.deadline:
        return None
    return Retry(ready_at, after_failure(claim, placement, failure.reason))
