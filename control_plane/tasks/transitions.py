"""What may happen to a task, one small command each. Decisions only: rows come locked and are written by others.

A command of an attempt names the epoch under which it was claimed. If the task is not in hand under it any more, the
command answers False and changes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from control_plane.domain.errors import DomainError
from control_plane.tasks.model import EventType, Lane, LaneId, TaskId, TaskRecord, TaskState, Tenant
from control_plane.tasks.rows import TaskRow, Work
from control_plane.tasks.schema import DELIVERY_PENDING, LATER

SOURCE = "modelyard"
"""Of beliefs about tasks."""

_MOST_MESSAGE = 2000
"""Characters of a failure's message that are kept."""

LaneIds = Mapping[Lane, int]
Outcome = bool | TaskRecord | None | Exception


def unknown_task(id: TaskId) -> DomainError:
    return DomainError("UNKNOWN_TASK", f"no task {id!r}")


def belief_key(id: TaskId) -> str:
    return f"tasks/{id}"


@dataclass(frozen=True, slots=True)
class Change:
    """Something that happens to one task."""

    id: TaskId

    def lanes(self) -> tuple[Lane, ...]:
        """Lanes whose ids it needs."""
        return ()

    def apply(self, row: TaskRow | None, work: Work, lanes: LaneIds) -> Outcome:
        """Change the row and note what else is to be written. `row` is None if there is no such task."""
        raise NotImplementedError


# ------------------------------------------------------------- attempts ---


@dataclass(frozen=True, slots=True)
class OfAttempt(Change):
    epoch: int

    def apply(self, row: TaskRow | None, work: Work, lanes: LaneIds) -> Outcome:
        if row is None or row.epoch != self.epoch or row.state not in (TaskState.SCHEDULED, TaskState.RUNNING):
            return False
        self.change(row, work, lanes)
        return True

    def change(self, row: TaskRow, work: Work, lanes: LaneIds) -> None:
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Start(OfAttempt):
    def change(self, row: TaskRow, work: Work, lanes: LaneIds) -> None:
        if row.state == TaskState.SCHEDULED:
            _to(row, TaskState.RUNNING, work)
            work.event(row, EventType.RUNNING)


@dataclass(frozen=True, slots=True)
class Succeed(OfAttempt):
    result: bytes
    cost_nano_usd: int

    def change(self, row: TaskRow, work: Work, lanes: LaneIds) -> None:
        _end_attempt(row, work, cost_nano_usd=self.cost_nano_usd)
        work.results.append((row.id, self.result))
        _terminate(row, TaskState.SUCCEEDED, EventType.SUCCEEDED, work)


@dataclass(frozen=True, slots=True)
class Fail(OfAttempt):
    reason: str
    message: str
    ready_at: float | None = None
    """Of the next attempt; None: there is none."""
    lane: Lane | None = None
    """Of the next attempt."""

    def lanes(self) -> tuple[Lane, ...]:
        return (self.lane,) if self.lane else ()

    def change(self, row: TaskRow, work: Work, lanes: LaneIds) -> None:
        message = self.message[:_MOST_MESSAGE]
        _end_attempt(row, work, self.reason, message, failed=True)
        row.failures += 1
        if self.ready_at is None or self.lane is None:
            _terminate(row, TaskState.FAILED, EventType.FAILED, work, self.reason, message)
            return
        row.lane_id = lanes[self.lane]
        row.failure_reason, row.failure_message = self.reason, message
        _queue(row, work, self.ready_at)
        work.event(row, EventType.ATTEMPT_FAILED, self.reason, message)


@dataclass(frozen=True, slots=True)
class Expire(OfAttempt):
    def change(self, row: TaskRow, work: Work, lanes: LaneIds) -> None:
        _end_attempt(row, work, "DEADLINE_EXCEEDED", "the task's deadline passed")
        expire(row, work)


@dataclass(frozen=True, slots=True)
class GiveBack(OfAttempt):
    reason: str

    def change(self, row: TaskRow, work: Work, lanes: LaneIds) -> None:
        _end_attempt(row, work, self.reason)
        row.epoch += 1
        _queue(row, work)
        work.event(row, EventType.REQUEUED, self.reason)


# -------------------------------------------------------------- clients ---


@dataclass(frozen=True, slots=True)
class OfClient(Change):
    tenant: Tenant

    def apply(self, row: TaskRow | None, work: Work, lanes: LaneIds) -> Outcome:
        if row is None or row.tenant != self.tenant:
            return unknown_task(self.id)
        return self.change(row, work)

    def change(self, row: TaskRow, work: Work) -> Outcome:
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Cancel(OfClient):
    def change(self, row: TaskRow, work: Work) -> Outcome:
        if row.state == TaskState.CANCELLED:
            return row.record
        if row.state >= TaskState.SUCCEEDED:
            return _wrong_state(row, "cannot be cancelled any more")
        _take_away(row, work, "", "cancelled")
        row.epoch += 1
        _terminate(row, TaskState.CANCELLED, EventType.CANCELLED, work)
        return row.record


@dataclass(frozen=True, slots=True)
class RunAgain(OfClient):
    """RetryTask."""

    def change(self, row: TaskRow, work: Work) -> Outcome:
        if row.state not in (TaskState.FAILED, TaskState.CANCELLED, TaskState.EXPIRED):
            return _wrong_state(row, "only what failed, expired or was cancelled can be run again")
        row.epoch += 1
        row.failures = row.lost = 0
        row.failure_reason = row.failure_message = ""
        row.finished_at = None
        row.lane_id = row.home_lane_id
        if row.deadline is not None and row.deadline <= work.now:
            row.deadline = None
        _queue(row, work)
        work.event(row, EventType.RETRIED, attempt=False)
        return row.record


@dataclass(frozen=True, slots=True)
class Delete(OfClient):
    def change(self, row: TaskRow, work: Work) -> Outcome:
        if row.state < TaskState.SUCCEEDED:
            return _wrong_state(row, "cancel it before deleting it")
        work.deleted.append(row.id)
        work.changed.pop(row.id, None)
        del work.rows[row.id]
        work.transaction.forget(row.id)
        work.transaction.believe(row.tenant, belief_key(row.id), "null", source=SOURCE, deleted=True)
        return None


def _wrong_state(row: TaskRow, told: str) -> DomainError:
    return DomainError("WRONG_STATE", f"task {row.id} is {row.shown_state.name.lower()}: {told}")


# ----------------------------------------------------------------- time ---


def lose(row: TaskRow, work: Work, message: str) -> None:
    """The process that had it in hand is gone: queue it again, or fail it if that happened too often."""
    _take_away(row, work, "LEASE_LOST", message)
    row.epoch += 1
    row.lost += 1
    if row.lost > work.max_lost:
        told = f"{row.lost} control planes that ran it were gone before it ended"
        _terminate(row, TaskState.FAILED, EventType.FAILED, work, "LEASE_LOST", told)
        return
    _queue(row, work)
    work.event(row, EventType.REQUEUED, "LEASE_LOST", message)


def expire(row: TaskRow, work: Work) -> None:
    """Its deadline has passed."""
    _terminate(
        row, TaskState.EXPIRED, EventType.EXPIRED, work, "DEADLINE_EXCEEDED", "the deadline passed before it was done"
    )


def ripen(row: TaskRow, work: Work) -> None:
    """The time that it waited for has come."""
    row.state, row.ready_at = TaskState.QUEUED, None
    work.changed[row.id] = row
    work.transaction.comes_back(_lane(row))


# ---------------------------------------------------------------- parts ---


def _lane(row: TaskRow) -> LaneId:
    return LaneId(row.lane_id)


def _to(row: TaskRow, state: TaskState, work: Work) -> None:
    row.state, row.updated_at = state, work.now
    work.changed[row.id] = row


def _queue(row: TaskRow, work: Work, ready_at: float | None = None) -> None:
    _to(row, TaskState.QUEUED, work)
    row.owner, row.ready_at = None, None
    if ready_at is not None and ready_at > work.now:
        row.state, row.ready_at = LATER, ready_at
    else:
        work.transaction.comes_back(_lane(row))


def _end_attempt(
    row: TaskRow, work: Work, reason: str = "", message: str = "", cost_nano_usd: int = 0, failed: bool = False
) -> None:
    work.ended[row.id, row.attempts] = (work.now, failed, reason, message, cost_nano_usd)


def _take_away(row: TaskRow, work: Work, reason: str, message: str) -> None:
    """End the attempt that holds it, if one does, and have its owner told."""
    if row.state in (TaskState.SCHEDULED, TaskState.RUNNING):
        _end_attempt(row, work, reason, message)
        work.transaction.changes.ended.add((row.id, row.epoch))


def _terminate(
    row: TaskRow, state: TaskState, type: EventType, work: Work, reason: str = "", message: str = ""
) -> None:
    """The end, with everything that is to be told of it: event, belief, callback."""
    held = row.owner is not None
    _to(row, state, work)
    row.owner, row.ready_at, row.finished_at = None, None, work.now
    row.failure_reason, row.failure_message = reason, message
    work.event(row, type, reason, message, attempt=held)
    fact: dict[str, str | int] = {"state": state.name.lower(), "attempts": row.attempts}
    if row.server_id and state in (TaskState.SUCCEEDED, TaskState.FAILED):
        fact |= {"server_id": row.server_id, "model": row.model}
    if reason:
        fact["reason"] = reason
    work.transaction.believe(row.tenant, belief_key(row.id), json.dumps(fact), source=SOURCE)
    if row.callback_url:
        work.transaction.deliveries.append(
            (
                f"{row.id}-{row.epoch}", row.id, row.tenant, row.epoch, int(state), row.callback_url,
                DELIVERY_PENDING, 0, work.now, work.now, None, "",
            )
        )  # fmt: skip
