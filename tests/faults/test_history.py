"""The checker itself: it accepts a good log and names what is wrong with each kind of bad one."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from modelyard.v1 import task_queue_pb2 as pb
from tests.faults.history import History, violations

E = pb.TaskEventType
LIFE = (
    # type, state, epoch, attempt, server
    (E.TASK_EVENT_TYPE_SUBMITTED, pb.TASK_STATE_QUEUED, 0, 0, ""),
    (E.TASK_EVENT_TYPE_SCHEDULED, pb.TASK_STATE_SCHEDULED, 1, 1, "a"),
    (E.TASK_EVENT_TYPE_RUNNING, pb.TASK_STATE_RUNNING, 1, 1, "a"),
    (E.TASK_EVENT_TYPE_REQUEUED, pb.TASK_STATE_QUEUED, 2, 1, "a"),
    (E.TASK_EVENT_TYPE_SCHEDULED, pb.TASK_STATE_SCHEDULED, 3, 2, "b"),
    (E.TASK_EVENT_TYPE_ATTEMPT_FAILED, pb.TASK_STATE_QUEUED, 3, 2, "b"),
    (E.TASK_EVENT_TYPE_SCHEDULED, pb.TASK_STATE_SCHEDULED, 4, 3, "a"),
    (E.TASK_EVENT_TYPE_RUNNING, pb.TASK_STATE_RUNNING, 4, 3, "a"),
    (E.TASK_EVENT_TYPE_SUCCEEDED, pb.TASK_STATE_SUCCEEDED, 4, 3, "a"),
)


def good() -> History:
    history = History(acknowledged=[("k1", "t1"), ("k1", "t1"), ("k2", "t2")])
    for number, (kind, state, epoch, attempt, server) in enumerate(LIFE):
        for task_id in ("t1", "t2"):
            history.events.append(
                pb.TaskEvent(
                    id=2 * number + (task_id == "t2") + 1, task_id=task_id, type=kind, state=state, epoch=epoch,
                    attempt=attempt, server_id=server,
                )
            )  # fmt: skip
    for key, task_id in (("k1", "t1"), ("k2", "t2")):
        task = pb.Task(id=task_id, state=pb.TASK_STATE_SUCCEEDED, idempotency_key=key, epoch=4)
        for number, server in enumerate("aba", 1):
            task.attempts.add(number=number, server_id=server)
        task.result.text = "done"
        task.result.summary.server_id = "a"
        history.tasks[task_id] = task
    return history


def event(history: History, kind: int, last: bool = True) -> pb.TaskEvent:
    return [each for each in history.events if each.type == kind and each.task_id == "t1"][-1 if last else 0]


def lost(history: History) -> None:
    del history.tasks["t1"]


def two_of_a_key(history: History) -> None:
    history.acknowledged.append(("k2", "t1"))


def out_of_order(history: History) -> None:
    history.events[3], history.events[4] = history.events[4], history.events[3]


def second_result(history: History) -> None:
    again = pb.TaskEvent()
    again.CopyFrom(event(history, E.TASK_EVENT_TYPE_SUCCEEDED))
    again.id = 100
    history.events.append(again)


def double_claim(history: History) -> None:
    event(history, E.TASK_EVENT_TYPE_SCHEDULED).epoch = 3


def stale_result(history: History) -> None:
    event(history, E.TASK_EVENT_TYPE_SUCCEEDED).attempt = 1


def stale_start(history: History) -> None:
    event(history, E.TASK_EVENT_TYPE_RUNNING).epoch = 5


def skipped_attempt(history: History) -> None:
    event(history, E.TASK_EVENT_TYPE_SCHEDULED).attempt = 4


def unfinished(history: History) -> None:
    history.tasks["t1"].state = pb.TASK_STATE_RUNNING
    history.tasks["t1"].ClearField("result")


def no_result(history: History) -> None:
    history.tasks["t1"].ClearField("result")


def another_server(history: History) -> None:
    history.tasks["t1"].result.summary.server_id = "c"


def illegal_step(history: History) -> None:
    event(history, E.TASK_EVENT_TYPE_REQUEUED).type = E.TASK_EVENT_TYPE_SUBMITTED


def missing_end(history: History) -> None:
    history.events.remove(event(history, E.TASK_EVENT_TYPE_SUCCEEDED))


def test_a_good_log_has_no_violations():
    assert violations(good()) == []


@pytest.mark.parametrize(
    ("breaks", "told"),
    [
        (lost, "lost"),
        (two_of_a_key, "of one key"),
        (out_of_order, "came after"),
        (second_result, "2 results"),
        (double_claim, "claimed twice"),
        (stale_result, "stale write of attempt 1"),
        (stale_start, "stale write at epoch 5"),
        (skipped_attempt, "attempt 4 after attempt 2"),
        (unfinished, "not terminal"),
        (no_result, "without a result"),
        (another_server, "the result is from c"),
        (illegal_step, "SUBMITTED in state"),
        (missing_end, "its last event says"),
    ],
)
def test_what_is_wrong_is_named(breaks: Callable[[History], None], told: str):
    history = good()
    breaks(history)
    assert any(told in each for each in violations(history)), violations(history)
