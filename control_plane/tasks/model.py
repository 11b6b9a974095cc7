"""What the parts of this room say to each other about tasks. Values only: no I/O, no clock.

Times are seconds since the epoch by the clock of the store (`TaskStore.now`), never by another.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import NewType

import msgspec

from control_plane.domain.model import ModelName, Provider, ServerId
from control_plane.domain.request import RouteRequest
from control_plane.domain.server import Failed
from control_plane.domain.task import Priority, TaskType

TaskId = NewType("TaskId", str)
Tenant = NewType("Tenant", str)
LaneId = NewType("LaneId", int)

COUNTER_BITS = 32
"""An id begins with milliseconds since the epoch and a counter of so many bits, in 20 hexadecimal digits."""


class TaskState(IntEnum):
    """Numbers equal those of the contract."""

    QUEUED = 1
    SCHEDULED = 2
    RUNNING = 3
    SUCCEEDED = 4
    FAILED = 5
    CANCELLED = 6
    EXPIRED = 7

    @property
    def terminal(self) -> bool:
        """Nothing changes it any more but RetryTask and DeleteTask."""
        return self >= TaskState.SUCCEEDED

    @property
    def held(self) -> bool:
        """A dispatcher has it in hand."""
        return self in (TaskState.SCHEDULED, TaskState.RUNNING)


class EventType(IntEnum):
    """Numbers equal those of the contract."""

    SUBMITTED = 1
    SCHEDULED = 2
    RUNNING = 3
    ATTEMPT_FAILED = 4
    REQUEUED = 5
    SUCCEEDED = 6
    FAILED = 7
    CANCELLED = 8
    EXPIRED = 9
    RETRIED = 10


class Lane(msgspec.Struct, frozen=True):
    """What tasks must share for one to be startable wherever the other is, and to start in the order of their
    submission: tenant, class, needs, and whom they avoid after failures."""

    tenant: Tenant
    priority: Priority
    route: RouteRequest
    """Needs. `request_id` is empty, `tenant` and `priority` those of the lane, `prompt_tokens` rounded up
    (`lanes.rounded`)."""
    unfit: frozenset[Failed] = frozenset()
    """Servers that said what they would say again."""
    failed: frozenset[Failed] = frozenset()
    """Servers that failed and may do another time: avoided while there are others."""
    avoided_models: frozenset[tuple[ModelName, Provider | None]] = frozenset()
    """Models that failed on two servers or do not suit the task: avoided while there are others. None: of any
    provider."""


@dataclass(frozen=True, slots=True)
class NewTask:
    """A checked task on its way in."""

    tenant: Tenant
    spec: bytes
    """A serialised TaskSpec. Deterministic, so that equal tasks have equal bytes."""
    lane: Lane
    task_type: TaskType
    max_attempts: int
    idempotency_key: str = ""
    group: str = ""
    not_before: float | None = None
    deadline: float | None = None
    callback_url: str = ""


@dataclass(frozen=True, slots=True)
class TaskRecord:
    """A task as the store keeps it, without spec, attempts, result."""

    id: TaskId
    tenant: Tenant
    state: TaskState
    priority: Priority
    task_type: TaskType
    group: str
    idempotency_key: str
    epoch: int
    attempts: int
    """So far."""
    failures: int
    """Attempts that count against `max_attempts`."""
    max_attempts: int
    created_at: float
    updated_at: float
    finished_at: float | None = None
    ready_at: float | None = None
    """Earliest start, while it is queued for later."""
    deadline: float | None = None
    failure_reason: str = ""
    failure_message: str = ""


@dataclass(frozen=True, slots=True)
class AttemptRecord:
    number: int
    epoch: int
    server_id: ServerId
    instance_id: str
    model: ModelName
    provider: Provider
    started_at: float
    ended_at: float | None = None
    failure_reason: str = ""
    failure_message: str = ""
    cost_nano_usd: int = 0


@dataclass(frozen=True, slots=True)
class EventRecord:
    id: int
    task_id: TaskId
    at: float
    type: EventType
    state: TaskState
    epoch: int
    attempt: int = 0
    server_id: str = ""
    model: str = ""
    provider: str = ""
    reason: str = ""
    message: str = ""
    group: str = ""
    task_type: TaskType | None = None
    """Where it was asked for."""


@dataclass(frozen=True, slots=True)
class FullTask:
    """Everything about a task."""

    record: TaskRecord
    spec: bytes
    attempts: tuple[AttemptRecord, ...]
    history: tuple[EventRecord, ...]
    result: bytes | None
    """A serialised TaskResult."""
    lane_id: LaneId | None = None


@dataclass(frozen=True, slots=True)
class Submitted:
    record: TaskRecord
    created: bool
    """False: a task with the same key and the same spec was there."""


class IdempotencyConflict(Exception):
    """The key belongs to a task with another spec."""

    def __init__(self, existing_id: TaskId, existing_spec: bytes) -> None:
        super().__init__(existing_id)
        self.existing_id = existing_id
        self.existing_spec = existing_spec


@dataclass(frozen=True, slots=True)
class Placement:
    """A free slot that a task may take."""

    server_id: ServerId
    instance_id: str
    model: ModelName
    provider: Provider


@dataclass(frozen=True, slots=True)
class Claim:
    """A task in hand: SCHEDULED, its attempt recorded. Writes name `epoch`."""

    record: TaskRecord
    spec: bytes
    lane: Lane
    failed_models: tuple[tuple[ServerId, ModelName, str], ...] = field(default=())
    """Server, model and reason of every attempt that failed so far."""
    more: bool = False
    """Further tasks of its lane could start when it was taken."""

    @property
    def id(self) -> TaskId:
        return self.record.id

    @property
    def epoch(self) -> int:
        return self.record.epoch


@dataclass(frozen=True, slots=True)
class Retry:
    """Another attempt after a failure."""

    ready_at: float
    lane: Lane


@dataclass(frozen=True, slots=True)
class WaitingLane:
    """A lane with tasks that could start now if a server were free."""

    id: LaneId
    lane: Lane
    oldest: float
    """When the first of them was submitted."""


@dataclass(frozen=True, slots=True)
class Filter:
    """Empty conditions hold for all."""

    states: tuple[TaskState, ...] = ()
    task_types: tuple[TaskType, ...] = ()
    group: str = ""
    idempotency_key: str = ""
    created_after: float | None = None
    created_before: float | None = None


@dataclass(frozen=True, slots=True)
class Changes:
    """What a committed transaction of this process, or a hint of another's, has changed."""

    lanes: frozenset[LaneId] = frozenset()
    """With tasks that can start now."""
    returned: frozenset[LaneId] = frozenset()
    """Those of them with tasks that are not new, and may come before others."""
    ended: frozenset[tuple[TaskId, int]] = frozenset()
    """Tasks that were in hand and were taken away, with the epoch that is no longer valid."""
    events: bool = False
    deliveries: bool = False
    beliefs: bool = False
