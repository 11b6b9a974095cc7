"""The store against a model of it in memory: whatever is done in whatever order, both agree."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from control_plane.domain.errors import DomainError
from control_plane.tasks.location import SqliteFile
from control_plane.tasks.model import Filter, IdempotencyConflict, Retry, TaskId, TaskState
from control_plane.tasks.sqlite import open_sqlite
from control_plane.tasks.store import SqlTaskStore, StorePolicy
from tests.harness.task_store import LANE, PLACE, TENANT, new_task

T = TypeVar("T")

MAX_LOST = 2
TERMINAL = {TaskState.SUCCEEDED, TaskState.FAILED, TaskState.CANCELLED, TaskState.EXPIRED}


@dataclass
class Clock:
    elapsed: float = 0.0

    def wall(self) -> float:
        return 1.8e9 + self.elapsed

    def monotonic(self) -> float:
        return self.elapsed


@dataclass
class Known:
    """A task as it must be."""

    key: str
    spec: bytes
    state: TaskState = TaskState.QUEUED
    epoch: int = 0
    attempts: int = 0
    failures: int = 0
    lost: int = 0
    ready_at: float | None = None
    deadline: float | None = None
    result: bytes | None = None
    results: int = 0
    epochs: list[int] = field(default_factory=list)
    """Of claims."""

    @property
    def held(self) -> bool:
        return self.state in (TaskState.SCHEDULED, TaskState.RUNNING)


class StoreMachine(RuleBasedStateMachine):
    """On SQLite, with a clock of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.clock = Clock()
        self.folder = tempfile.TemporaryDirectory()
        self.known: dict[TaskId, Known] = {}
        self.deleted: set[TaskId] = set()
        self.store = self.run(self.open())

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(asyncio.wait_for(work, 20))

    async def open(self) -> SqlTaskStore:
        place = SqliteFile(Path(self.folder.name) / "tasks.db")
        return await SqlTaskStore.open(await open_sqlite(place, "owner", self.clock), StorePolicy(max_lost=MAX_LOST))

    def teardown(self) -> None:
        self.run(self.store.close())
        self.loop.close()
        self.folder.cleanup()

    # --------------------------------------------------------------- rules ---

    @rule(key=st.sampled_from(["", "", "a", "b"]), spec=st.sampled_from([b"x", b"y"]), later=st.booleans(),
          due=st.sampled_from([None, None, 5.0]))  # fmt: skip
    def submit(self, key: str, spec: bytes, later: bool, due: float | None) -> None:
        now = self.store.now()
        ready_at = now + 3 if later else None
        deadline = None if due is None else now + due
        existing = next((id for id, known in self.known.items() if key and known.key == key), None)
        task = new_task(key, spec, not_before=ready_at, deadline=deadline)
        try:
            submitted = self.run(self.store.submit(task))
        except IdempotencyConflict as conflict:
            assert existing == conflict.existing_id and self.known[existing].spec != spec
            return
        if existing:
            assert not submitted.created and submitted.record.id == existing and self.known[existing].spec == spec
            return
        assert submitted.created and submitted.record.id not in self.known | dict.fromkeys(self.deleted)
        self.known[submitted.record.id] = Known(key, spec, ready_at=ready_at, deadline=deadline)

    @rule(count=st.integers(1, 4))
    def claim(self, count: int) -> None:
        now = self.store.now()
        startable = [id for id, known in sorted(self.known.items())
                     if known.state is TaskState.QUEUED and known.ready_at is None]  # fmt: skip
        lanes = self.run(self.store.waiting_lanes())
        assert bool(lanes) == bool(startable)
        if not lanes:
            return
        claims = self.run(self.store.claim(lanes[0].id, [PLACE] * count))
        first = startable[:count]
        for id in [id for id in first if self.over(id)]:
            first.remove(id)
            self.known[id].state = TaskState.EXPIRED
        assert [claim.id for claim in claims] == first, "first in, first out"
        for claim in claims:
            known = self.known[claim.id]
            known.state, known.epoch, known.attempts = TaskState.SCHEDULED, known.epoch + 1, known.attempts + 1
            assert claim.epoch == known.epoch and claim.epoch not in known.epochs, "one claim for each epoch"
            assert claim.spec == known.spec and claim.record.deadline == known.deadline
            known.epochs.append(claim.epoch)
        assert now == self.store.now()

    def over(self, id: TaskId) -> bool:
        deadline = self.known[id].deadline
        return deadline is not None and deadline <= self.store.now()

    @precondition(lambda self: self.known)
    @rule(data=st.data(), stale=st.integers(-2, 1), what=st.sampled_from(
        ["started", "succeeded", "again", "later", "failed", "expired", "give_back"]))  # fmt: skip
    def attempt_says(self, data: st.DataObject, stale: int, what: str) -> None:
        id = data.draw(st.sampled_from(sorted(self.known)))
        known = self.known[id]
        epoch = known.epoch + min(stale, 0) if stale != 1 else known.epoch
        valid = known.held and epoch == known.epoch
        now = self.store.now()
        store = self.store
        calls = {
            "started": lambda: store.started(id, epoch),
            "succeeded": lambda: store.succeeded(id, epoch, b"r%d" % epoch, 1),
            "again": lambda: store.attempt_failed(id, epoch, "ENGINE_FAILED", "m", Retry(now, LANE)),
            "later": lambda: store.attempt_failed(id, epoch, "ENGINE_FAILED", "m", Retry(now + 2, LANE)),
            "failed": lambda: store.attempt_failed(id, epoch, "ENGINE_FAILED", "m", None),
            "expired": lambda: store.expired(id, epoch),
            "give_back": lambda: store.give_back(id, epoch, "DRAINING"),
        }
        assert self.run(calls[what]()) is valid, "written if, and only if, the epoch is valid"
        if not valid:
            return
        if what == "started":
            known.state = TaskState.RUNNING
        elif what == "succeeded":
            known.state, known.result, known.results = TaskState.SUCCEEDED, b"r%d" % epoch, known.results + 1
        elif what in ("again", "later", "failed"):
            known.failures += 1
            known.state = TaskState.FAILED if what == "failed" else TaskState.QUEUED
            known.ready_at = now + 2 if what == "later" else None
        elif what == "expired":
            known.state = TaskState.EXPIRED
        else:
            known.state, known.epoch = TaskState.QUEUED, known.epoch + 1

    @precondition(lambda self: self.known)
    @rule(data=st.data(), what=st.sampled_from(["cancel", "retry", "delete"]))
    def client_says(self, data: st.DataObject, what: str) -> None:
        id = data.draw(st.sampled_from(sorted(self.known)))
        known = self.known[id]
        allowed = {
            "cancel": known.state not in TERMINAL or known.state is TaskState.CANCELLED,
            "retry": known.state in TERMINAL - {TaskState.SUCCEEDED},
            "delete": known.state in TERMINAL,
        }[what]
        call = {"cancel": self.store.cancel, "retry": self.store.retry, "delete": self.store.delete}[what]
        try:
            self.run(call(TENANT, id))
        except DomainError as error:
            assert error.reason == "WRONG_STATE" and not allowed
            return
        assert allowed
        if what == "cancel" and known.state is not TaskState.CANCELLED:
            known.state, known.epoch, known.ready_at = TaskState.CANCELLED, known.epoch + 1, None
        elif what == "retry":
            known.state, known.epoch, known.failures, known.lost = TaskState.QUEUED, known.epoch + 1, 0, 0
            known.ready_at = None
            if self.over(id):
                known.deadline = None
        elif what == "delete":
            del self.known[id]
            self.deleted.add(id)

    @rule(seconds=st.sampled_from([0.5, 2.0, 4.0]))
    def time_passes(self, seconds: float) -> None:
        self.clock.elapsed += seconds
        self.run(self.store.sweep())
        for id, known in self.known.items():
            if known.state is not TaskState.QUEUED:
                continue
            if self.over(id):
                known.state, known.ready_at = TaskState.EXPIRED, None
            elif known.ready_at is not None and known.ready_at <= self.store.now():
                known.ready_at = None

    @rule()
    def restart(self) -> None:
        self.run(self.store.close())
        self.store = self.run(self.open())
        for known in self.known.values():
            if known.held:
                known.epoch += 1
                known.lost += 1
                known.state = TaskState.FAILED if known.lost > MAX_LOST else TaskState.QUEUED

    # ----------------------------------------------------------- invariants ---

    @invariant()
    def both_agree(self) -> None:
        records = {record.id: record for record in self.run(self.store.page(TENANT, Filter(), 1000))}
        assert records.keys() == self.known.keys()
        for id, known in self.known.items():
            record = records[id]
            assert (record.state, record.epoch, record.attempts, record.failures) == (
                known.state, known.epoch, known.attempts, known.failures,
            ), (record, known)  # fmt: skip
            if known.state is TaskState.QUEUED:
                assert record.ready_at == known.ready_at
            assert known.results <= 1

    @invariant()
    def every_task_tells_its_story(self) -> None:
        for id in list(self.known)[-2:]:
            full = self.run(self.store.get(TENANT, id))
            assert full.result == self.known[id].result
            assert [attempt.number for attempt in full.attempts] == list(range(1, self.known[id].attempts + 1))
            assert [attempt.epoch for attempt in full.attempts] == self.known[id].epochs
            assert full.history[-1].state == full.record.state
            assert all(a.id < b.id and a.at <= b.at for a, b in zip(full.history, full.history[1:], strict=False))


def test_the_store_is_as_its_model() -> None:
    run_state_machine_as_test(
        StoreMachine,
        settings=settings(
            max_examples=8,
            stateful_step_count=15,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
