"""Durable tasks, for asyncio: `AsyncClient.tasks`."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import uuid
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Iterable, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, Unpack

import grpc.aio

from modelyard.client import _task_messages as messages
from modelyard.client import _values as values
from modelyard.client._errors import DeadlineExceeded, ModelyardError, StreamBroken, TaskFailed
from modelyard.client._requests import Input
from modelyard.client._service import PATIENCE, Resume, Service
from modelyard.client._task_messages import NewTask, TaskOptions
from modelyard.client._task_types import QueueStats, Submission, Task, TaskEvent
from modelyard.client._types import GenerationResult
from modelyard.client._values import filled
from modelyard.v1 import task_queue_pb2, task_queue_pb2_grpc

if TYPE_CHECKING:
    from modelyard.client._async import AsyncClient

# Of `submit_many`: tasks that were sent and not yet answered.
_AT_ONCE = 256
_BYTES_AT_ONCE = 16 << 20

_LAST_LOOK = 2.0
"""Seconds in which a task that was waited for in vain must say what it waits for."""


class AsyncTasks(Service):
    """Durable tasks: they outlive this client, the control plane and the model server that runs them.

        task = await client.tasks.submit("Why is the sky blue?", idempotency_key="sky-1")
        result = await client.tasks.result(task.id)
        print(result.text)

    Accepted tasks are on disk. They run at least once, and exactly one result is recorded.
    """

    def __init__(self, client: AsyncClient) -> None:
        super().__init__(client, task_queue_pb2_grpc.TaskQueueStub)

    async def submit(
        self,
        input: Input,
        *,
        timeout: float | None = None,
        retries: int | None = None,
        **options: Unpack[TaskOptions],
    ) -> Task:
        """Submit a task; see TaskOptions for what may be said. It is on disk when this returns.

        With `retries` a task without an idempotency key is given one, so that it is not submitted twice. Raises
        IdempotencyConflict if its key names another task.
        """
        request = messages.submit_request(input, **options)
        if not request.idempotency_key and (self._client._retries if retries is None else retries):
            request.idempotency_key = uuid.uuid4().hex
        return messages.task((await self._call("SubmitTask", request, timeout, retries)).task)

    async def submit_many(
        self, tasks: Iterable[NewTask] | AsyncIterable[NewTask], *, patience: float = PATIENCE
    ) -> AsyncGenerator[Submission, None]:
        """Submit many tasks over one stream, and tell of each in its order what became of it.

        One that is refused does not stop the others: see `Submission.error`. `tasks` is read no faster than they are
        accepted. When the stream breaks, what was not answered is sent again, for at most `patience` seconds without
        an answer; nothing is submitted twice, for those without an idempotency key get one.
        """
        window = _Window()
        feeder = asyncio.create_task(window.feed(_each(tasks)), name="submit-many")
        resume = Resume(patience)
        try:
            while True:
                resume.opened()
                call = self._open("BatchSubmitTasks")
                writer = asyncio.create_task(window.write(call), name="submit-many-writer")
                try:
                    async with contextlib.aclosing(self._client._messages(call)) as answers:
                        async for answer in answers:
                            resume.came()
                            yield messages.submission(answer, window.answered())
                    if window.done:
                        await feeder  # which may have failed
                        return
                    raise StreamBroken("the control plane ended the stream before it had answered")
                except ModelyardError as failure:
                    await resume.wait_or_raise(failure)
                finally:
                    writer.cancel()
                    await asyncio.gather(writer, return_exceptions=True)
        finally:
            feeder.cancel()
            await asyncio.gather(feeder, return_exceptions=True)

    async def get(self, id: str, *, timeout: float | None = None) -> Task:
        """One task with its attempts, its history and its result; raises UnknownTask."""
        return messages.task((await self._call("GetTask", task_queue_pb2.GetTaskRequest(id=id), timeout)).task)

    async def list(
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
    ) -> AsyncGenerator[Task, None]:
        """Tasks that match, newest first, at most `limit`; read in pages. Times have their zone, or are seconds from
        now (so -3600 is an hour ago)."""
        request = filled(
            task_queue_pb2.ListTasksRequest,
            filter=messages.task_filter(
                states=states,
                task_types=task_types,
                group=group,
                idempotency_key=idempotency_key,
                created_after=created_after,
                created_before=created_before,
            ),
            page_size=page_size if limit is None else max(1, min(page_size, limit)),
        )
        left = itertools.count() if limit is None else iter(range(limit))
        while True:
            page = await self._call("ListTasks", request, timeout)
            for message in page.tasks:
                if next(left, None) is None:
                    return
                yield messages.task(message)
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    async def watch(self, id: str, *, after: int = 0, patience: float = PATIENCE) -> AsyncGenerator[TaskEvent, None]:
        """The events of a task: those after the one with the id `after`, then new ones as they happen. Ends after the
        event that makes the task terminal, whose `task` has the result.

        Goes on by itself when the connection breaks, for at most `patience` seconds without an answer.
        """

        def open() -> Any:
            return self._open("WatchTask", filled(task_queue_pb2.WatchTaskRequest, id=id, after_event_id=after))

        async with contextlib.aclosing(self._resumed(open, patience)) as answers:
            async for answer in answers:
                after = answer.event.id
                yield messages.event(answer.event, answer.task if answer.HasField("task") else None)

    async def watch_all(
        self,
        *,
        states: str | Sequence[str] = (),
        task_types: str | Sequence[str] = (),
        group: str | None = None,
        after: int | None = None,
        patience: float = PATIENCE,
    ) -> AsyncGenerator[TaskEvent, None]:
        """The events of all tasks that match, without end: those after the one with the id `after`, then new ones.

        Without `after` only those from now on; 0: from the beginning of what is kept. `states` are those that an event
        leads to. Goes on by itself when the connection breaks, as `watch`.
        """
        filter = messages.task_filter(states=states, task_types=task_types, group=group)

        def open() -> Any:
            return self._open(
                "WatchTasks", filled(task_queue_pb2.WatchTasksRequest, filter=filter, after_event_id=after)
            )

        async with contextlib.aclosing(self._resumed(open, patience)) as answers:
            async for answer in answers:
                after = answer.position
                if answer.HasField("event"):
                    yield messages.event(answer.event)

    async def wait(self, id: str, *, timeout: float | None = None, patience: float = PATIENCE) -> Task:
        """The task when it is terminal, with its result. Raises DeadlineExceeded after `timeout` seconds; the client's
        own timeout does not hold here."""
        try:
            async with asyncio.timeout(values.timeout(timeout)):
                async with contextlib.aclosing(self.watch(id, patience=patience)) as events:
                    async for event in events:
                        if event.task is not None:
                            return event.task
                return await self.get(id)
        except TimeoutError:
            why = ""
            with contextlib.suppress(ModelyardError):
                if waiting_for := (await self.get(id, timeout=_LAST_LOOK)).waiting_for:
                    why = f"; it is queued: {waiting_for}"
            raise DeadlineExceeded(f"task {id} was not finished within {timeout:g} s{why}") from None

    async def result(self, id: str, *, timeout: float | None = None, patience: float = PATIENCE) -> GenerationResult:
        """What the task has produced; waits for it as `wait`. Raises TaskFailed if it did not succeed."""
        task = await self.wait(id, timeout=timeout, patience=patience)
        if task.result is None:
            raise failed(task)
        return task.result

    async def cancel(self, id: str, *, timeout: float | None = None) -> Task:
        """End a task that is not terminal; one that runs is stopped. Idempotent. Raises WrongState if it has ended in
        another way."""
        return messages.task((await self._call("CancelTask", task_queue_pb2.CancelTaskRequest(id=id), timeout)).task)

    async def retry(self, id: str, *, timeout: float | None = None) -> Task:
        """Queue a task again that failed, expired or was cancelled. Raises WrongState otherwise."""
        request = task_queue_pb2.RetryTaskRequest(id=id)
        return messages.task((await self._call("RetryTask", request, timeout, retries=0)).task)

    async def delete(self, id: str, *, timeout: float | None = None) -> None:
        """Forget a terminal task, its idempotency key included. Raises WrongState for one that is not."""
        await self._call("DeleteTask", task_queue_pb2.DeleteTaskRequest(id=id), timeout, retries=0)

    async def stats(self, *, timeout: float | None = None) -> QueueStats:
        """How many tasks there are in which state, and why the waiting ones wait."""
        return messages.stats(await self._call("GetQueueStats", task_queue_pb2.GetQueueStatsRequest(), timeout))


def failed(task: Task) -> TaskFailed:
    """The exception for a terminal task without a result."""
    why = f": {task.failure_message or task.failure_reason}" if task.failure_reason else ""
    return TaskFailed(f"task {task.id} is {task.state}{why}", task=task, reason=task.failure_reason or None)


async def _each(tasks: Iterable[NewTask] | AsyncIterable[NewTask]) -> AsyncIterator[NewTask]:
    if isinstance(tasks, AsyncIterable):
        async for task in tasks:
            yield task
        return
    for task in tasks:
        yield task


class _Window:
    """Tasks that were read and not yet answered: what is sent again when a stream breaks."""

    def __init__(self) -> None:
        self._waiting: deque[task_queue_pb2.BatchSubmitTasksRequest] = deque()
        self._bytes = 0
        self._answered = 0
        self._ended = False
        self._changed = asyncio.Event()

    @property
    def done(self) -> bool:
        """There is nothing more to send, and nothing to be answered."""
        return self._ended and not self._waiting

    def _tell(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def feed(self, tasks: AsyncIterator[NewTask]) -> None:
        """Read the tasks, no faster than they are answered."""
        try:
            async for task in tasks:
                given = task.request
                request = task_queue_pb2.BatchSubmitTasksRequest(
                    spec=given.spec, idempotency_key=given.idempotency_key or uuid.uuid4().hex
                )
                while len(self._waiting) >= _AT_ONCE or self._bytes >= _BYTES_AT_ONCE:
                    await self._changed.wait()
                self._waiting.append(request)
                self._bytes += request.ByteSize()
                self._tell()
        finally:
            self._ended = True
            self._tell()

    async def write(self, call: Any) -> None:
        """Send what waits and what comes."""
        position = self._answered
        try:
            while True:
                if position - self._answered < len(self._waiting):
                    await call.write(self._waiting[position - self._answered])
                    position += 1
                elif self._ended:
                    await call.done_writing()
                    return
                else:
                    await self._changed.wait()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            pass  # the stream has ended; whoever reads it hears why

    def answered(self) -> int:
        """The oldest one was answered; its index."""
        if not self._waiting:
            raise StreamBroken("the control plane answered what it was not asked")
        self._bytes -= self._waiting.popleft().ByteSize()
        self._answered += 1
        self._tell()
        return self._answered - 1
