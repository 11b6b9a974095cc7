"""Durable tasks, for code without asyncio: `Client.tasks`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Unpack

from modelyard.client._requests import Input
from modelyard.client._service import PATIENCE
from modelyard.client._task_messages import NewTask, TaskOptions
from modelyard.client._task_types import QueueStats, Submission, Task, TaskEvent
from modelyard.client._tasks import AsyncTasks
from modelyard.client._types import GenerationResult

if TYPE_CHECKING:
    from modelyard.client._sync import Client


class Tasks:
    """Durable tasks. Arguments and methods as AsyncTasks, without await.

    task = client.tasks.submit("Why is the sky blue?", idempotency_key="sky-1")
    print(client.tasks.result(task.id).text)
    """

    def __init__(self, client: Client, tasks: AsyncTasks) -> None:
        self._client = client
        self._tasks = tasks

    def submit(
        self,
        input: Input,
        *,
        timeout: float | None = None,
        retries: int | None = None,
        **options: Unpack[TaskOptions],
    ) -> Task:
        """Submit a task; see TaskOptions for what may be said. It is on disk when this returns."""
        return self._client._run(self._tasks.submit(input, timeout=timeout, retries=retries, **options))

    def submit_many(self, tasks: Iterable[NewTask], *, patience: float = PATIENCE) -> Iterator[Submission]:
        """Submit many tasks over one stream, and tell of each in its order what became of it."""
        return self._client._each(self._tasks.submit_many(_on_threads(tasks), patience=patience))

    def get(self, id: str, *, timeout: float | None = None) -> Task:
        """One task with its attempts, its history and its result; raises UnknownTask."""
        return self._client._run(self._tasks.get(id, timeout=timeout))

    def list(
        self,
        *,
        states: str | Sequence[str] = (),
        task_types: str | Sequence[str] = (),
        group: str | None = None,
        idempotency_key: str | None = None,
        created_after: datetime | float | None = None,
        created_before: datetime | float | None = None,
        limit: int | None = None,
        page_size: int = 100,
        timeout: float | None = None,
    ) -> Iterator[Task]:
        """Tasks that match, newest first, at most `limit`; read in pages."""
        return self._client._each(
            self._tasks.list(
                states=states,
                task_types=task_types,
                group=group,
                idempotency_key=idempotency_key,
                created_after=created_after,
                created_before=created_before,
                limit=limit,
                page_size=page_size,
                timeout=timeout,
            )
        )

    def watch(self, id: str, *, after: int = 0, patience: float = PATIENCE) -> Iterator[TaskEvent]:
        """The events of a task as they happen, until it is terminal; the last one's `task` has the result."""
        return self._client._each(self._tasks.watch(id, after=after, patience=patience))

    def watch_all(
        self,
        *,
        states: str | Sequence[str] = (),
        task_types: str | Sequence[str] = (),
        group: str | None = None,
        after: int | None = None,
        patience: float = PATIENCE,
    ) -> Iterator[TaskEvent]:
        """The events of all tasks that match, without end."""
        return self._client._each(
            self._tasks.watch_all(states=states, task_types=task_types, group=group, after=after, patience=patience)
        )

    def wait(self, id: str, *, timeout: float | None = None, patience: float = PATIENCE) -> Task:
        """The task when it is terminal, with its result. Raises DeadlineExceeded after `timeout` seconds."""
        return self._client._run(self._tasks.wait(id, timeout=timeout, patience=patience))

    def result(self, id: str, *, timeout: float | None = None, patience: float = PATIENCE) -> GenerationResult:
        """What the task has produced; waits for it as `wait`. Raises TaskFailed if it did not succeed."""
        return self._client._run(self._tasks.result(id, timeout=timeout, patience=patience))

    def cancel(self, id: str, *, timeout: float | None = None) -> Task:
        """End a task that is not terminal. Raises WrongState if it has ended in another way."""
        return self._client._run(self._tasks.cancel(id, timeout=timeout))

    def retry(self, id: str, *, timeout: float | None = None) -> Task:
        """Queue a task again that failed, expired or was cancelled. Raises WrongState otherwise."""
        return self._client._run(self._tasks.retry(id, timeout=timeout))

    def delete(self, id: str, *, timeout: float | None = None) -> None:
        """Forget a terminal task, its idempotency key included. Raises WrongState for one that is not."""
        self._client._run(self._tasks.delete(id, timeout=timeout))

    def stats(self, *, timeout: float | None = None) -> QueueStats:
        """How many tasks there are in which state, and why the waiting ones wait."""
        return self._client._run(self._tasks.stats(timeout=timeout))


async def _on_threads(tasks: Iterable[NewTask]) -> AsyncGenerator[NewTask, None]:
    """The caller's iterable may block, or use this very client: not on the client's own thread."""
    source = iter(tasks)
    while (task := await asyncio.to_thread(next, source, None)) is not None:
        yield task
