"""Durable tasks as the client shows them: plain immutable values, no protobuf."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from types import MappingProxyType
from typing import Any

from modelyard.client._errors import ModelyardError
from modelyard.client._types import GenerationResult, Value


@dataclass(frozen=True, slots=True)
class AttemptPrediction(Value):
    """What was expected of an attempt when it got its server."""

    version: str
    """Of the predictor, or "rules"."""
    p50: float
    """Seconds: the median."""
    p90: float
    """Seconds that nine of ten do not exceed."""
    success: float
    """Probability, 0 to 1."""
    completion_tokens: int
    """The median."""
    cost_usd: float


@dataclass(frozen=True, slots=True)
class TaskAttempt(Value):
    """One try of a task on one server."""

    number: int
    """From 1."""
    epoch: int
    server_id: str
    model: str
    provider: str
    started_at: datetime | None = None
    ended_at: datetime | None = None
    """None: it runs."""
    failure_reason: str = ""
    """Empty: it succeeded or runs."""
    failure_message: str = ""
    cost_usd: float = 0.0
    predicted: AttemptPrediction | None = None
    """None: not in lists, and not of attempts of long ago or of another control plane."""


@dataclass(frozen=True, slots=True)
class Task(Value):
    """A durable task and what has become of it."""

    id: str
    """Later tasks have greater ids."""
    state: str
    """"queued", "scheduled", "running", "succeeded", "failed", "cancelled" or "expired"."""
    task_type: str = ""
    priority: str = ""
    group: str = ""
    idempotency_key: str = ""
    created_at: datetime | None = None
    updated_at: datetime | None = None
    finished_at: datetime | None = None
    """None: it is not terminal."""
    ready_at: datetime | None = None
    """Earliest start, while it is queued for later."""
    epoch: int = 0
    attempt_count: int = 0
    failure_count: int = 0
    """Attempts that failed, of `max_attempts`."""
    max_attempts: int = 0
    failure_reason: str = ""
    """Why it failed, expired or waits for its next attempt."""
    failure_message: str = ""
    attempts: tuple[TaskAttempt, ...] = ()
    """Not in lists."""
    result: GenerationResult | None = None
    """Only if it succeeded; not in lists."""
    spec: Mapping[str, Any] | None = None
    """What is to be done, in the JSON form of the contract's TaskSpec. Only from `get`, as the rest."""
    history: tuple[TaskEvent, ...] = ()
    waiting_for: str = ""
    """Why it has not started, while it is queued."""

    @property
    def done(self) -> bool:
        """It is terminal: nothing changes it any more but `retry` and `delete`."""
        return self.state in ("succeeded", "failed", "cancelled", "expired")


@dataclass(frozen=True, slots=True)
class TaskEvent(Value):
    """One thing that happened to a task."""

    id: int
    """Unique and growing over all tasks: go on after the last one seen."""
    task_id: str
    type: str
    """"submitted", "scheduled", "running", "attempt_failed", "requeued", "succeeded", "failed", "cancelled", "expired"
    or "retried"."""
    state: str
    """Of the task from then on."""
    at: datetime | None = None
    epoch: int = 0
    attempt: int = 0
    """From 1; 0: it belongs to none."""
    server_id: str = ""
    model: str = ""
    provider: str = ""
    reason: str = ""
    message: str = ""
    group: str = ""
    task: Task | None = None
    """The task with its result: only from `watch`, with the event that makes it terminal."""


@dataclass(frozen=True, slots=True)
class Submission(Value):
    """What became of one of many submitted tasks."""

    index: int
    """Which one, from 0."""
    task: Task | None
    """None: it was refused."""
    created: bool
    """False: a task with this key was there already."""
    error: ModelyardError | None = None
    """Why it was refused."""

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON knows them."""
        return {
            "index": self.index,
            "task": self.task and self.task.to_dict(),
            "created": self.created,
            "error": self.error and self.error.to_dict(),
        }


@dataclass(frozen=True, slots=True)
class TaskLane(Value):
    """Waiting tasks with the same needs."""

    task_type: str
    priority: str
    model: str
    """Empty: any; likewise provider."""
    provider: str
    count: int
    """Counted up to 10,000."""
    oldest_created_at: datetime | None
    waiting_for: str
    """Why the first of them has not started."""


@dataclass(frozen=True, slots=True)
class QueueStats(Value):
    """How many tasks there are in which state, and why the waiting ones wait."""

    states: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    """Only states that occur."""
    lanes: tuple[TaskLane, ...] = ()
    """The longest waiting first."""
    running_here: int = 0
    """Tasks that this control plane has in hand, of at most `workers`."""
    workers: int = 0
    callbacks_pending: int = 0
    callbacks_dead: int = 0
    """Given up."""
    last_event_id: int = 0
