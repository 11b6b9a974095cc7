"""Does the event log of the tasks keep the promises of the contract? Pure: a log in, violations out.

Judged from outside, by what clients were told: acknowledgements, events, final tasks. What the store believes of
itself plays no part.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from modelyard.v1 import task_queue_pb2 as pb

TERMINAL = frozenset({pb.TASK_STATE_SUCCEEDED, pb.TASK_STATE_FAILED, pb.TASK_STATE_CANCELLED, pb.TASK_STATE_EXPIRED})
HELD = frozenset({pb.TASK_STATE_SCHEDULED, pb.TASK_STATE_RUNNING})

# Event -> (states from which it may happen, state that it leads to).
LEGAL: Mapping[int, tuple[frozenset[int], int]] = {
    pb.TASK_EVENT_TYPE_SUBMITTED: (frozenset({pb.TASK_STATE_UNSPECIFIED}), pb.TASK_STATE_QUEUED),
    pb.TASK_EVENT_TYPE_SCHEDULED: (frozenset({pb.TASK_STATE_QUEUED}), pb.TASK_STATE_SCHEDULED),
    pb.TASK_EVENT_TYPE_RUNNING: (frozenset({pb.TASK_STATE_SCHEDULED}), pb.TASK_STATE_RUNNING),
    pb.TASK_EVENT_TYPE_ATTEMPT_FAILED: (HELD, pb.TASK_STATE_QUEUED),
    pb.TASK_EVENT_TYPE_REQUEUED: (HELD, pb.TASK_STATE_QUEUED),
    pb.TASK_EVENT_TYPE_SUCCEEDED: (HELD, pb.TASK_STATE_SUCCEEDED),
    pb.TASK_EVENT_TYPE_FAILED: (HELD | {pb.TASK_STATE_QUEUED}, pb.TASK_STATE_FAILED),
    pb.TASK_EVENT_TYPE_CANCELLED: (HELD | {pb.TASK_STATE_QUEUED}, pb.TASK_STATE_CANCELLED),
    pb.TASK_EVENT_TYPE_EXPIRED: (HELD | {pb.TASK_STATE_QUEUED}, pb.TASK_STATE_EXPIRED),
    pb.TASK_EVENT_TYPE_RETRIED: (TERMINAL - {pb.TASK_STATE_SUCCEEDED}, pb.TASK_STATE_QUEUED),
}

# Events that an attempt writes: they belong to the epoch that took the task for it.
WRITTEN_BY_ATTEMPTS = frozenset(
    {
        pb.TASK_EVENT_TYPE_RUNNING,
        pb.TASK_EVENT_TYPE_SUCCEEDED,
        pb.TASK_EVENT_TYPE_ATTEMPT_FAILED,
    }
)


@dataclass
class History:
    """What clients saw."""

    acknowledged: list[tuple[str, str]] = field(default_factory=list)
    """Idempotency key and task id of every submission that was answered, repeated ones included."""
    events: list[pb.TaskEvent] = field(default_factory=list)
    """In the order in which they were seen."""
    tasks: dict[str, pb.Task] = field(default_factory=dict)
    """As GetTask told them in the end."""


def violations(history: History, *, all_terminal: bool = True) -> list[str]:
    """Everything that breaks a promise; empty if nothing does."""
    return [
        *_lost(history),
        *_keys(history),
        *_order(history.events),
        *_lives(history, all_terminal=all_terminal),
        *_results(history),
    ]


def _lost(history: History) -> Iterable[str]:
    for key, task_id in history.acknowledged:
        if task_id not in history.tasks:
            yield f"{key}: acknowledged as {task_id}, and lost"


def _keys(history: History) -> Iterable[str]:
    ids = defaultdict(set)
    for key, task_id in history.acknowledged:
        ids[key].add(task_id)
    for task in history.tasks.values():
        if task.idempotency_key:
            ids[task.idempotency_key].add(task.id)
    for key, several in ids.items():
        if len(several) > 1:
            yield f"{key}: {len(several)} tasks of one key: {sorted(several)}"


def _order(events: list[pb.TaskEvent]) -> Iterable[str]:
    for before, event in itertools.pairwise(events):
        if event.id <= before.id:
            yield f"event {event.id} came after event {before.id}"


def _lives(history: History, *, all_terminal: bool) -> Iterable[str]:
    lives: dict[str, list[pb.TaskEvent]] = defaultdict(list)
    for event in history.events:
        lives[event.task_id].append(event)
    for task_id in {*lives, *history.tasks}:
        life = lives.get(task_id, [])
        yield from (f"{task_id}: {wrong}" for wrong in _life(life))
        task = history.tasks.get(task_id)
        if task is None:
            continue
        if all_terminal and task.state not in TERMINAL:
            yield f"{task_id}: not terminal, {pb.TaskState.Name(task.state)}"
        if life and life[-1].state != task.state:
            yield f"{task_id}: its last event says {_name(life[-1])}, it is {pb.TaskState.Name(task.state)}"
        if not life:
            yield f"{task_id}: has no events"


def _life(life: list[pb.TaskEvent]) -> Iterable[str]:
    """What is wrong with the events of one task."""
    state, epoch, attempt, holder = pb.TASK_STATE_UNSPECIFIED, 0, 0, 0
    for event in life:
        sources, leads_to = LEGAL.get(event.type, (frozenset(), pb.TASK_STATE_UNSPECIFIED))
        told = f"event {event.id} {_name(event)}"
        if state not in sources:
            yield f"{told} in state {pb.TaskState.Name(state)}"
        if event.state != leads_to:
            yield f"{told} leads to {pb.TaskState.Name(event.state)}"
        if event.epoch < epoch:
            yield f"{told} goes back from epoch {epoch} to {event.epoch}"
        if event.type == pb.TASK_EVENT_TYPE_SCHEDULED:
            if event.epoch <= epoch:
                yield f"{told}: claimed twice at epoch {event.epoch}"
            if event.attempt != attempt + 1:
                yield f"{told}: attempt {event.attempt} after attempt {attempt}"
            attempt, holder = event.attempt, event.epoch
        elif event.type in WRITTEN_BY_ATTEMPTS and event.attempt != attempt:
            yield f"{told}: a stale write of attempt {event.attempt}, the task is at {attempt}"
        elif event.type == pb.TASK_EVENT_TYPE_RUNNING and event.epoch != holder:
            yield f"{told}: a stale write at epoch {event.epoch}, the task is at {holder}"
        state, epoch = event.state, max(epoch, event.epoch)


def _results(history: History) -> Iterable[str]:
    succeeded = Counter(event.task_id for event in history.events if event.type == pb.TASK_EVENT_TYPE_SUCCEEDED)
    winners = {event.task_id: event for event in history.events if event.type == pb.TASK_EVENT_TYPE_SUCCEEDED}
    for task_id, times in succeeded.items():
        if times > 1:
            yield f"{task_id}: {times} results were recorded"
    for task in history.tasks.values():
        if (task.state == pb.TASK_STATE_SUCCEEDED) != task.HasField("result"):
            yield f"{task.id}: {pb.TaskState.Name(task.state)} with{'' if task.HasField('result') else 'out'} a result"
        numbers = [attempt.number for attempt in task.attempts]
        if numbers != list(range(1, len(numbers) + 1)):
            yield f"{task.id}: attempts {numbers}"
        winner = winners.get(task.id)
        if winner and task.attempts:
            if winner.attempt != task.attempts[-1].number:
                yield f"{task.id}: attempt {winner.attempt} gave the result, {task.attempts[-1].number} was the last"
            elif task.HasField("result") and task.result.summary.server_id != winner.server_id:
                yield f"{task.id}: the result is from {task.result.summary.server_id}, not {winner.server_id}"


def _name(event: pb.TaskEvent) -> str:
    return pb.TaskEventType.Name(event.type).removeprefix("TASK_EVENT_TYPE_")
