"""The only place where messages of modelyard/v1/task_queue.proto and values of `tasks.model` meet."""

from __future__ import annotations

import base64
import binascii
import functools
import hashlib
from collections.abc import Iterator
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.timestamp_pb2 import Timestamp

from control_plane.api import convert
from control_plane.api.predicting import Predicted, Shown
from control_plane.domain.model import ModelName, Provider
from control_plane.domain.task import TaskType
from control_plane.tasks.lanes import lane_of
from control_plane.tasks.model import (
    AttemptRecord,
    EventRecord,
    Filter,
    FullTask,
    NewTask,
    TaskId,
    TaskRecord,
    TaskState,
    Tenant,
)
from modelyard.rpc.errors import Violation, invalid
from modelyard.v1.orchestrator_pb2 import GenerateRequest
from modelyard.v1.task_queue_pb2 import (
    AttemptPrediction,
    BatchSubmitTasksRequest,
    SubmitTaskRequest,
    Task,
    TaskAttempt,
    TaskEvent,
    TaskFilter,
    TaskResult,
    TaskSpec,
)

# Tasks come in kinds: a lane that was made before need not be made again.
_lane_of = functools.lru_cache(maxsize=4096)(lane_of)

_DIGEST_BYTES = 8

_MOST_DIFFERENCES = 10

# ------------------------------------------------------------------- submit ---


def work(spec: TaskSpec) -> GenerateRequest:
    """What is to be generated, as a request of its own."""
    return GenerateRequest(
        input=spec.input,
        task_type=spec.task_type,
        priority=spec.priority,
        requirements=spec.requirements if spec.HasField("requirements") else None,
        preset=spec.preset,
    )


def spec_bytes(spec: TaskSpec) -> bytes:
    """Equal specs have equal bytes."""
    return spec.SerializeToString(deterministic=True)


def new_task(
    request: SubmitTaskRequest | BatchSubmitTasksRequest,
    work: GenerateRequest | TaskSpec,
    raw: bytes,
    tenant: Tenant,
    model: tuple[ModelName, Provider | None] | None,
    max_attempts: int,
) -> NewTask:
    """A checked task. `work` is what its preset makes of the spec, `raw` the bytes of the spec, `model` its resolved
    pin, `max_attempts` holds where it names none."""
    spec = request.spec
    # A TaskSpec has every field of a GenerateRequest that routing looks at.
    route = convert.route_request(work, "", tenant, model)  # type: ignore[arg-type]
    return NewTask(
        tenant=tenant,
        spec=raw,
        lane=_lane_of(tenant, route),
        task_type=route.task_type,
        max_attempts=spec.max_attempts or max_attempts,
        idempotency_key=request.idempotency_key,
        group=spec.group,
        not_before=_wall(spec.not_before) if spec.HasField("not_before") else None,
        deadline=_wall(spec.deadline) if spec.HasField("deadline") else None,
        callback_url=spec.callback.url if spec.HasField("callback") else "",
    )


def differences(existing: bytes, raw: bytes) -> list[str]:
    """Paths of the fields in which two specs differ, a few of them. Names only: what is in them concerns nobody."""
    found = []
    for path in _differing(TaskSpec.FromString(existing), TaskSpec.FromString(raw), "spec"):
        found.append(path)
        if len(found) == _MOST_DIFFERENCES:
            break
    return found


def _differing(one: Any, other: Any, path: str) -> Iterator[str]:
    if one == other:
        return
    fields = {field.number: field for message in (one, other) for field, _ in message.ListFields()}
    differing = [fields[n] for n in sorted(fields) if getattr(one, fields[n].name) != getattr(other, fields[n].name)]
    for field in differing:
        name = f"{path}.{field.name}"
        left, right = getattr(one, field.name), getattr(other, field.name)
        if isinstance(left, Message):
            yield from _below(left, right, name)
        elif field.message_type is not None and not _is_map(field):
            for i in range(max(len(left), len(right))):
                if i >= len(left) or i >= len(right):
                    yield f"{name}[{i}]"
                elif left[i] != right[i]:
                    yield from _below(left[i], right[i], f"{name}[{i}]")
        else:
            yield name
    if not differing:  # fields that this version does not know, or a field that is there but empty
        yield path


def _below(left: Message, right: Message, path: str) -> Iterator[str]:
    if left.DESCRIPTOR.full_name.startswith("google."):  # a time is one thing
        yield path
    else:
        yield from _differing(left, right, path)


def _is_map(field: FieldDescriptor) -> bool:
    return field.message_type is not None and field.message_type.GetOptions().map_entry


def _wall(time: Timestamp) -> float:
    return time.seconds + time.nanos * 1e-9


# ------------------------------------------------------------------- filters ---


def filter_of(message: TaskFilter) -> Filter:
    """A checked filter; an unspecified state or kind of work means any."""
    states, kinds = message.states, message.task_types
    return Filter(
        states=() if 0 in states else tuple(sorted({TaskState(number) for number in states})),
        task_types=() if 0 in kinds else tuple(sorted({TaskType(number) for number in kinds})),
        group=message.group,
        idempotency_key=message.idempotency_key,
        created_after=_wall(message.created_after) if message.HasField("created_after") else None,
        created_before=_wall(message.created_before) if message.HasField("created_before") else None,
    )


def page_token(tenant: Tenant, filter: Filter, last: TaskId) -> str:
    """What asks for the page after `last`."""
    return base64.urlsafe_b64encode(_digest(tenant, filter, last) + last.encode()).decode()


def page_start(tenant: Tenant, filter: Filter, token: str) -> TaskId | None:
    """Where the page of a token begins; None for the first one. Raises INVALID_REQUEST for a token that was not made
    for this filter."""
    if not token:
        return None
    try:
        raw = base64.b64decode(token.encode("ascii"), altchars=b"-_", validate=True)
        last = TaskId(raw[_DIGEST_BYTES:].decode("ascii"))
    except (binascii.Error, UnicodeError):
        raise invalid([Violation("page_token", "is unknown")]) from None
    if not last or raw[:_DIGEST_BYTES] != _digest(tenant, filter, last):
        raise invalid([Violation("page_token", "is unknown, or belongs to another filter")])
    return last


def _digest(tenant: Tenant, filter: Filter, last: TaskId) -> bytes:
    # No secret: a token says nothing that an id does not say, and the store looks at the tenant.
    return hashlib.blake2b(repr((tenant, filter, last)).encode(), digest_size=_DIGEST_BYTES).digest()


# ----------------------------------------------------------------- rendering ---


def task(record: TaskRecord) -> Task:
    """A task as lists and answers to orders show it: without spec, attempts, history and result."""
    message = Task(
        id=record.id,
        state=record.state.value,  # type: ignore[arg-type]
        epoch=record.epoch,
        attempt_count=record.attempts,
        failure_count=record.failures,
        max_attempts=record.max_attempts,
        idempotency_key=record.idempotency_key,
        task_type=record.task_type.value,  # type: ignore[arg-type]
        priority=record.priority.value,  # type: ignore[arg-type]
        group=record.group,
    )
    set_timestamp(message.created_at, record.created_at)
    set_timestamp(message.updated_at, record.updated_at)
    if record.finished_at is not None:
        set_timestamp(message.finished_at, record.finished_at)
    if record.ready_at is not None and record.state is TaskState.QUEUED:
        set_timestamp(message.ready_at, record.ready_at)
    if record.failure_reason:
        message.failure_reason = record.failure_reason
        message.failure_message = record.failure_message
    return message


def completion_tokens(result: bytes) -> int:
    """Tokens of the answer in a serialised TaskResult. Raises ValueError."""
    try:
        return TaskResult.FromString(result).summary.usage.completion_tokens
    except DecodeError as error:
        raise ValueError("no TaskResult") from error


def finished_task(full: FullTask) -> Task:
    """A terminal task with its attempts and its result, without spec and history."""
    message = task(full.record)
    message.attempts.extend(map(_attempt, full.attempts))
    if full.result is not None and full.record.state is TaskState.SUCCEEDED:
        message.result.CopyFrom(TaskResult.FromString(full.result))
    return message


def whole_task(full: FullTask, waiting_for: str = "", predicted: Predicted = lambda task_id, number: None) -> Task:
    """Everything about a task."""
    message = finished_task(full)
    for attempt in message.attempts:
        shown = predicted(message.id, attempt.number)
        if shown is not None:
            _predict(attempt.predicted, shown)
    message.spec.ParseFromString(full.spec)
    message.history.extend(map(event, full.history))
    message.waiting_for = waiting_for
    return message


def _attempt(record: AttemptRecord) -> TaskAttempt:
    message = TaskAttempt(
        number=record.number,
        epoch=record.epoch,
        server_id=record.server_id,
        model=record.model,
        provider=record.provider,
        failure_reason=record.failure_reason,
        failure_message=record.failure_message,
        cost_nano_usd=record.cost_nano_usd,
    )
    set_timestamp(message.started_at, record.started_at)
    if record.ended_at is not None:
        set_timestamp(message.ended_at, record.ended_at)
    return message


def _predict(message: AttemptPrediction, shown: Shown) -> None:
    told = shown.prediction
    message.version, message.success, message.cost_nano_usd = shown.version, told.success, shown.cost_nano_usd
    convert.set_duration(message.p50, told.seconds_p50)
    convert.set_duration(message.p90, told.seconds_p90)
    message.completion_tokens = min(round(told.completion_tokens), 2**32 - 1)


def event(record: EventRecord) -> TaskEvent:
    message = TaskEvent(
        id=record.id,
        task_id=record.task_id,
        type=record.type.value,  # type: ignore[arg-type]
        state=record.state.value,  # type: ignore[arg-type]
        epoch=record.epoch,
        attempt=record.attempt,
        server_id=record.server_id,
        model=record.model,
        provider=record.provider,
        reason=record.reason,
        message=record.message,
        group=record.group,
    )
    set_timestamp(message.at, record.at)
    return message


def set_timestamp(field: Timestamp, wall: float) -> None:
    """Write seconds since the epoch (>= 0) into a field, in place."""
    field.seconds = whole = int(wall)
    field.nanos = int((wall - whole) * 1e9)
