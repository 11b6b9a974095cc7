"""Durable tasks, seen by a client of a control plane in this process."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from control_plane.tasks.dispatcher import Dispatcher
from modelyard.v1 import task_queue_pb2 as pb
from modelyard.v1 import task_queue_pb2_grpc
from tests.harness.front_door import PATIENCE, FrontDoor, ask, front_door
from tests.harness.programs import until

TERMINAL = frozenset({pb.TASK_STATE_SUCCEEDED, pb.TASK_STATE_FAILED, pb.TASK_STATE_CANCELLED, pb.TASK_STATE_EXPIRED})

# Pauses that a test can wait for.
QUICK = {"base": 0.02, "cap": 0.1}


class Desk:
    """Submits tasks and sees what becomes of them."""

    def __init__(self, door: FrontDoor, tenant: str = "default") -> None:
        self.door = door
        self.stub = task_queue_pb2_grpc.TaskQueueStub(door.channel)
        self._metadata = (("modelyard-tenant", tenant),)

    def of(self, tenant: str) -> Desk:
        return Desk(self.door, tenant)

    @property
    def dispatcher(self) -> Dispatcher:
        assert self.door.plane.dispatcher is not None
        return self.door.plane.dispatcher

    async def submit(
        self, text: str = "Hello", *, key: str = "", wait: float = 0.0, within: float = 0.0, **fields: Any
    ) -> str:
        """The id of a new task that may start after `wait` seconds and expires `within` seconds; other fields are those
        of the spec or, as in `ask`, of sampling and requirements."""
        own = {name: fields.pop(name) for name in ("max_attempts", "group", "preset") if name in fields}
        attempt_timeout = fields.pop("attempt_timeout", None)
        request = ask(text, **fields)
        spec = pb.TaskSpec(
            input=request.input,
            task_type=request.task_type,
            priority=request.priority,
            requirements=request.requirements if request.HasField("requirements") else None,
            **own,
        )
        if wait:
            spec.not_before.FromNanoseconds(time.time_ns() + round(wait * 1e9))
        if within:
            spec.deadline.FromNanoseconds(time.time_ns() + round(within * 1e9))
        if attempt_timeout:
            spec.attempt_timeout.FromNanoseconds(round(attempt_timeout * 1e9))
        submitted = await self.stub.SubmitTask(
            pb.SubmitTaskRequest(spec=spec, idempotency_key=key), metadata=self._metadata
        )
        return submitted.task.id

    async def get(self, task_id: str) -> pb.Task:
        return (await self.stub.GetTask(pb.GetTaskRequest(id=task_id), metadata=self._metadata)).task

    async def cancel(self, task_id: str) -> pb.Task:
        return (await self.stub.CancelTask(pb.CancelTaskRequest(id=task_id), metadata=self._metadata)).task

    async def until(self, task_id: str, *states: int) -> pb.Task:
        """The task once it is in one of these states; without any, once it is terminal."""

        async def reached() -> pb.Task | None:
            task = await self.get(task_id)
            return task if task.state in (states or TERMINAL) else None

        return await until(reached, PATIENCE)

    async def until_waiting(self, task_id: str, words: str) -> None:
        """Until this is among the reasons for which it waits."""

        async def told() -> bool:
            return words in (await self.get(task_id)).waiting_for

        await until(told, PATIENCE)

    async def all(self, task_ids: Iterable[str]) -> list[pb.Task]:
        """Tasks once each is terminal."""
        return [await self.until(task_id) for task_id in task_ids]


@asynccontextmanager
async def desk(folder: Path, **given: Any) -> AsyncIterator[Desk]:
    """A control plane in this process that keeps its tasks in a folder."""
    tasks = {"store": f"sqlite:///{folder / 'tasks.db'}", "retry": QUICK, **given.pop("tasks", {})}
    async with front_door(tasks=tasks, **given) as door:
        yield Desk(door)


def events(task: pb.Task) -> list[str]:
    return [pb.TaskEventType.Name(event.type).removeprefix("TASK_EVENT_TYPE_") for event in task.history]


def tried(task: pb.Task) -> list[tuple[str, str]]:
    """Server and reason of the failure of every attempt."""
    return [(attempt.server_id, attempt.failure_reason) for attempt in task.attempts]
