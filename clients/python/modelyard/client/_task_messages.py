"""Durable tasks: arguments -> messages of the contract -> values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Unpack

from google.protobuf.json_format import MessageToDict

from modelyard.client import _answers as answers
from modelyard.client import _names as names
from modelyard.client import _values as values
from modelyard.client._errors import BY_REASON, FieldViolation, InternalError, ModelyardError
from modelyard.client._requests import GenerateOptions, Input, generate_request
from modelyard.client._task_types import (
    AttemptPrediction,
    QueueStats,
    Submission,
    Task,
    TaskAttempt,
    TaskEvent,
    TaskLane,
)
from modelyard.client._types import Delta, GenerationResult, ToolCallDelta
from modelyard.client._values import filled
from modelyard.rpc.reasons import Reason
from modelyard.v1 import task_queue_pb2


class TaskOptions(GenerateOptions, total=False):
    """Everything that may be said about one durable task; `request_id` and `explain` may not."""

    idempotency_key: str | None
    """Unique among the tenant's tasks: the same task submitted again under its key is the same task."""
    group: str | None
    """A name that tasks share, to list and watch them together."""
    task_labels: Mapping[str, str]
    """Notes, returned as they are."""
    not_before: datetime | float | None
    """Do not start earlier; a time with its zone, or seconds from now. Likewise deadline."""
    deadline: datetime | float | None
    """Not finished by then, the task expires."""
    max_attempts: int | None
    """Attempts that may fail before the task does, 1 to 100."""
    attempt_timeout: float | None
    """Most seconds that one attempt may take."""
    callback: str | None
    """An https address that is told when the task is terminal."""


class NewTask:
    """A task for `submit_many`: what `submit` takes. Raises ValueError or TypeError for what cannot be said."""

    __slots__ = ("request",)

    def __init__(self, input: Input, **options: Unpack[TaskOptions]) -> None:
        self.request = submit_request(input, **options)
        """The message that is sent."""


def submit_request(
    input: Input,
    *,
    idempotency_key: str | None = None,
    group: str | None = None,
    task_labels: Mapping[str, str] | None = None,
    not_before: datetime | float | None = None,
    deadline: datetime | float | None = None,
    max_attempts: int | None = None,
    attempt_timeout: float | None = None,
    callback: str | None = None,
    **options: Unpack[GenerateOptions],
) -> task_queue_pb2.SubmitTaskRequest:
    """Build a request. Raises ValueError or TypeError for what cannot be said in one."""
    for name in ("request_id", "explain"):
        if options.get(name):
            raise TypeError(f"a task has no {name}")
    work = generate_request(input, **options)
    spec = filled(
        task_queue_pb2.TaskSpec,
        input=work.input,
        task_type=work.task_type,
        priority=work.priority,
        requirements=work.requirements if work.requirements.ByteSize() else None,
        preset=work.preset,
        not_before=values.timestamp("not_before", not_before),
        deadline=values.timestamp("deadline", deadline),
        max_attempts=max_attempts or 0,
        callback=task_queue_pb2.Callback(url=callback) if callback is not None else None,
        group=group or "",
        labels=task_labels,
        attempt_timeout=values.duration("attempt_timeout", attempt_timeout),
    )
    if max_attempts == 0:
        raise ValueError("max_attempts must be 1 to 100, not 0")
    return task_queue_pb2.SubmitTaskRequest(spec=spec, idempotency_key=idempotency_key or "")


def task_filter(
    *,
    states: str | Sequence[str] = (),
    task_types: str | Sequence[str] = (),
    group: str | None = None,
    idempotency_key: str | None = None,
    created_after: datetime | float | None = None,
    created_before: datetime | float | None = None,
) -> task_queue_pb2.TaskFilter:
    """Build a filter. Raises ValueError for unknown names."""
    states = [states] if isinstance(states, str) else states
    task_types = [task_types] if isinstance(task_types, str) else task_types
    return task_queue_pb2.TaskFilter(
        states=[names.TASK_STATE.number(state) for state in states],  # type: ignore[misc]
        task_types=[names.TASK_TYPE.number(kind) for kind in task_types],  # type: ignore[misc]
        group=group or "",
        idempotency_key=idempotency_key or "",
        created_after=values.timestamp("created_after", created_after),
        created_before=values.timestamp("created_before", created_before),
    )


# ------------------------------------------------------------------- answers ---


def task(message: task_queue_pb2.Task) -> Task:
    return Task(
        id=message.id,
        state=names.TASK_STATE.name(message.state),
        task_type=names.TASK_TYPE.name(message.task_type),
        priority=names.PRIORITY.name(message.priority),
        group=message.group,
        idempotency_key=message.idempotency_key,
        created_at=answers.time(message, "created_at"),
        updated_at=answers.time(message, "updated_at"),
        finished_at=answers.time(message, "finished_at"),
        ready_at=answers.time(message, "ready_at"),
        epoch=message.epoch,
        attempt_count=message.attempt_count,
        failure_count=message.failure_count,
        max_attempts=message.max_attempts,
        failure_reason=message.failure_reason,
        failure_message=message.failure_message,
        attempts=tuple(_attempt(attempt) for attempt in message.attempts),
        result=_result(message.result) if message.HasField("result") else None,
        spec=MessageToDict(message.spec, preserving_proto_field_name=True) if message.HasField("spec") else None,
        history=tuple(event(each) for each in message.history),
        waiting_for=message.waiting_for,
    )


def _attempt(message: task_queue_pb2.TaskAttempt) -> TaskAttempt:
    return TaskAttempt(
        number=message.number,
        epoch=message.epoch,
        server_id=message.server_id,
        model=message.model,
        provider=message.provider,
        started_at=answers.time(message, "started_at"),
        ended_at=answers.time(message, "ended_at"),
        failure_reason=message.failure_reason,
        failure_message=message.failure_message,
        cost_usd=message.cost_nano_usd / 1e9,
        predicted=_predicted(message.predicted) if message.HasField("predicted") else None,
    )


def _predicted(message: task_queue_pb2.AttemptPrediction) -> AttemptPrediction:
    return AttemptPrediction(
        version=message.version,
        p50=message.p50.ToNanoseconds() / 1e9,
        p90=message.p90.ToNanoseconds() / 1e9,
        success=message.success,
        completion_tokens=message.completion_tokens,
        cost_usd=message.cost_nano_usd / 1e9,
    )


def _result(message: task_queue_pb2.TaskResult) -> GenerationResult:
    answer = answers.Answer()
    answer.add(
        Delta(
            text=message.text,
            reasoning_text=message.reasoning_text,
            tool_calls=tuple(
                ToolCallDelta(index, call.id, call.name, call.arguments_json)
                for index, call in enumerate(message.tool_calls)
            ),
            logprobs=tuple(answers.logprob(each) for each in message.logprobs),
        )
    )
    return answer.result(message.summary)


def event(message: task_queue_pb2.TaskEvent, ended: task_queue_pb2.Task | None = None) -> TaskEvent:
    """An event; `ended` is the task that it has made terminal."""
    return TaskEvent(
        id=message.id,
        task_id=message.task_id,
        type=names.TASK_EVENT_TYPE.name(message.type),
        state=names.TASK_STATE.name(message.state),
        at=answers.time(message, "at"),
        epoch=message.epoch,
        attempt=message.attempt,
        server_id=message.server_id,
        model=message.model,
        provider=message.provider,
        reason=message.reason,
        message=message.message,
        group=message.group,
        task=None if ended is None else task(ended),
    )


def submission(message: task_queue_pb2.BatchSubmitTasksResponse, index: int) -> Submission:
    """What became of the task that was the `index`-th for the caller."""
    if message.HasField("refusal"):
        return Submission(index, None, False, _refusal(message.refusal))
    return Submission(index, task(message.task), message.created)


def _refusal(message: task_queue_pb2.TaskRefusal) -> ModelyardError:
    known = message.reason in Reason.__members__
    kind = BY_REASON[Reason(message.reason)] if known else InternalError
    violations = tuple(FieldViolation(field, text) for field, text in sorted(message.violations.items()))
    return kind(message.message, reason=message.reason or None, violations=violations)


def stats(message: task_queue_pb2.GetQueueStatsResponse) -> QueueStats:
    return QueueStats(
        states={names.TASK_STATE.name(each.state): each.count for each in message.states},
        lanes=tuple(
            TaskLane(
                task_type=names.TASK_TYPE.name(lane.task_type),
                priority=names.PRIORITY.name(lane.priority),
                model=lane.model,
                provider=lane.provider,
                count=lane.count,
                oldest_created_at=answers.time(lane, "oldest_created_at"),
                waiting_for=lane.waiting_for,
            )
            for lane in message.lanes
        ),
        running_here=message.running_here,
        workers=message.workers,
        callbacks_pending=message.callbacks_pending,
        callbacks_dead=message.callbacks_dead,
        last_event_id=message.last_event_id,
    )
