"""A queue of durable tasks without a fleet and without a disk."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

from google.protobuf.timestamp_pb2 import Timestamp
from grpc.aio import ServicerContext

from modelyard.rpc.errors import Refusal
from modelyard.rpc.reasons import Reason
from modelyard.testing.server import Call, FakeServer
from modelyard.v1 import generation_pb2, orchestrator_pb2, task_queue_pb2
from modelyard.v1.task_queue_pb2 import Task, TaskEvent, TaskSpec

TENANT_KEY = "modelyard-tenant"

_TERMINAL = {
    task_queue_pb2.TASK_STATE_SUCCEEDED: task_queue_pb2.TASK_EVENT_TYPE_SUCCEEDED,
    task_queue_pb2.TASK_STATE_FAILED: task_queue_pb2.TASK_EVENT_TYPE_FAILED,
    task_queue_pb2.TASK_STATE_CANCELLED: task_queue_pb2.TASK_EVENT_TYPE_CANCELLED,
    task_queue_pb2.TASK_STATE_EXPIRED: task_queue_pb2.TASK_EVENT_TYPE_EXPIRED,
}


class FakeTaskQueue(FakeServer):
    """Keeps tasks in memory, of one tenant. Each succeeds at once with `text`, unless `hold` is set: then they wait for
    `finish`. Stopped and started again, it still knows them."""

    service = task_queue_pb2.DESCRIPTOR.services_by_name["TaskQueue"]

    def __init__(self) -> None:
        super().__init__()
        self.tasks: dict[str, Task] = {}
        """Every task, by id, in the order of arrival."""
        self.events: list[TaskEvent] = []
        """Every event; ids count from 1."""
        self.text = "Hello, world"
        """Result of every task."""
        self.hold = False
        """Leave new tasks queued."""
        self.stats = task_queue_pb2.GetQueueStatsResponse()
        """Answer of GetQueueStats; the states are filled in."""
        self.callbacks: dict[str, task_queue_pb2.CallbackDelivery] = {}
        """Callbacks by id; nothing is ever sent."""
        self._cuts: dict[str, list[int]] = {}
        self._keys: dict[str, str] = {}

    def cut(self, method: str, after: int) -> None:
        """End the next stream of a method with DRAINING after so many messages."""
        self._cuts.setdefault(method, []).append(after)

    def finish(
        self,
        id: str,
        state: task_queue_pb2.TaskState = task_queue_pb2.TASK_STATE_SUCCEEDED,
        reason: str = "",
        message: str = "",
    ) -> None:
        """End a task."""
        task = self.tasks[id]
        task.state, task.failure_reason, task.failure_message = state, reason, message
        _stamp(task.finished_at)
        if state == task_queue_pb2.TASK_STATE_SUCCEEDED:
            task.result.text = self.text
            task.result.summary.CopyFrom(
                orchestrator_pb2.GenerationSummary(
                    finish_reason=generation_pb2.FINISH_REASON_STOP, server_id="fake-1", model="fake", provider="fake"
                )
            )
        self.tell(task, _TERMINAL[state], reason, message)

    def tell(self, task: Task, type: task_queue_pb2.TaskEventType, reason: str = "", message: str = "") -> None:
        """Add an event of a task."""
        event = TaskEvent(
            id=len(self.events) + 1,
            task_id=task.id,
            type=type,
            state=task.state,
            epoch=task.epoch,
            group=task.group,
            reason=reason,
            message=message,
        )
        _stamp(event.at)
        _stamp(task.updated_at)
        self.events.append(event)
        self._tell()

    # -------------------------------------------------------------- service ---

    async def SubmitTask(
        self, request: task_queue_pb2.SubmitTaskRequest, context: ServicerContext
    ) -> task_queue_pb2.SubmitTaskResponse:
        async with self._received("SubmitTask", context, request):
            task, created = self._submit(request.spec, request.idempotency_key)
            return task_queue_pb2.SubmitTaskResponse(task=_brief(task), created=created)

    async def BatchSubmitTasks(
        self, requests: AsyncIterator[task_queue_pb2.BatchSubmitTasksRequest], context: ServicerContext
    ) -> AsyncIterator[task_queue_pb2.BatchSubmitTasksResponse]:
        async with self._received("BatchSubmitTasks", context) as call:
            cut = self._next_cut("BatchSubmitTasks")
            async for request in requests:
                index = len(call.requests)
                if index == cut:
                    raise _draining()
                call.requests.append(request)
                response = task_queue_pb2.BatchSubmitTasksResponse(index=index)
                try:
                    task, response.created = self._submit(request.spec, request.idempotency_key)
                    response.task.CopyFrom(_brief(task))
                except Refusal as refusal:
                    response.refusal.reason, response.refusal.message = refusal.reason, refusal.message
                yield response

    def _submit(self, spec: TaskSpec, key: str) -> tuple[Task, bool]:
        if not spec.HasField("input"):
            raise Refusal(Reason.INVALID_REQUEST, "spec.input: is required")
        known = self.tasks.get(self._keys.get(key, ""))
        if known is not None:
            if known.spec != spec:
                raise Refusal(Reason.IDEMPOTENCY_CONFLICT, f"task {known.id} has this idempotency key")
            return known, False
        task = Task(
            id=f"task-{len(self.tasks) + 1:06}",
            state=task_queue_pb2.TASK_STATE_QUEUED,
            spec=spec,
            max_attempts=spec.max_attempts or 5,
            idempotency_key=key,
            task_type=spec.task_type or 1,  # type: ignore[arg-type]
            priority=spec.priority or 2,  # type: ignore[arg-type]
            group=spec.group,
        )
        _stamp(task.created_at)
        self.tasks[task.id] = task
        if key:
            self._keys[key] = task.id
        self.tell(task, task_queue_pb2.TASK_EVENT_TYPE_SUBMITTED)
        if not self.hold:
            self.finish(task.id)
        return task, True

    async def GetTask(
        self, request: task_queue_pb2.GetTaskRequest, context: ServicerContext
    ) -> task_queue_pb2.GetTaskResponse:
        async with self._received("GetTask", context, request):
            task = Task()
            task.CopyFrom(self._known(request.id))
            task.history.extend(event for event in self.events if event.task_id == request.id)
            return task_queue_pb2.GetTaskResponse(task=task)

    async def ListTasks(
        self, request: task_queue_pb2.ListTasksRequest, context: ServicerContext
    ) -> task_queue_pb2.ListTasksResponse:
        async with self._received("ListTasks", context, request):
            wanted = request.filter
            found = [
                _brief(task)
                for task in reversed(self.tasks.values())
                if (not wanted.states or task.state in wanted.states)
                and (not wanted.group or task.group == wanted.group)
                and (not wanted.idempotency_key or task.idempotency_key == wanted.idempotency_key)
                and (not request.page_token or task.id < request.page_token)
            ]
            page = found[: request.page_size or 100]
            more = len(found) > len(page)
            return task_queue_pb2.ListTasksResponse(tasks=page, next_page_token=page[-1].id if more else "")

    async def WatchTask(
        self, request: task_queue_pb2.WatchTaskRequest, context: ServicerContext
    ) -> AsyncIterator[task_queue_pb2.WatchTaskResponse]:
        async with self._received("WatchTask", context, request) as call:
            task = self._known(request.id)
            async for event in self._follow(call, request.after_event_id, request.id):
                ended = event.type in _TERMINAL.values()
                yield task_queue_pb2.WatchTaskResponse(event=event, task=_brief(task, result=True) if ended else None)
                if ended:
                    return

    async def WatchTasks(
        self, request: task_queue_pb2.WatchTasksRequest, context: ServicerContext
    ) -> AsyncIterator[task_queue_pb2.WatchTasksResponse]:
        async with self._received("WatchTasks", context, request) as call:
            after = request.after_event_id if request.HasField("after_event_id") else len(self.events)
            if after >= len(self.events):
                yield task_queue_pb2.WatchTasksResponse(position=after)
            async for event in self._follow(call, after):
                if (not request.filter.states or event.state in request.filter.states) and (
                    not request.filter.group or event.group == request.filter.group
                ):
                    yield task_queue_pb2.WatchTasksResponse(event=event, position=event.id)

    async def _follow(self, call: Call, after: int, task_id: str = "") -> AsyncIterator[TaskEvent]:
        cut, sent = self._next_cut(call.method), 0
        while True:
            while after < len(self.events):
                event = self.events[after]
                after += 1
                if task_id in ("", event.task_id):
                    if sent == cut:
                        raise _draining()
                    sent += 1
                    yield event
            changed: asyncio.Event = self._changed
            await changed.wait()

    async def CancelTask(
        self, request: task_queue_pb2.CancelTaskRequest, context: ServicerContext
    ) -> task_queue_pb2.CancelTaskResponse:
        async with self._received("CancelTask", context, request):
            task = self._known(request.id)
            if task.state != task_queue_pb2.TASK_STATE_CANCELLED:
                if task.state in _TERMINAL:
                    raise Refusal(Reason.WRONG_STATE, f"task {task.id} has ended")
                self.finish(task.id, task_queue_pb2.TASK_STATE_CANCELLED)
            return task_queue_pb2.CancelTaskResponse(task=_brief(task))

    async def RetryTask(
        self, request: task_queue_pb2.RetryTaskRequest, context: ServicerContext
    ) -> task_queue_pb2.RetryTaskResponse:
        async with self._received("RetryTask", context, request):
            task = self._known(request.id)
            if task.state not in _TERMINAL or task.state == task_queue_pb2.TASK_STATE_SUCCEEDED:
                raise Refusal(Reason.WRONG_STATE, f"task {task.id} has not failed")
            task.state, task.failure_reason, task.failure_message = task_queue_pb2.TASK_STATE_QUEUED, "", ""
            task.epoch += 1
            task.ClearField("finished_at")
            self.tell(task, task_queue_pb2.TASK_EVENT_TYPE_RETRIED)
            return task_queue_pb2.RetryTaskResponse(task=_brief(task))

    async def DeleteTask(
        self, request: task_queue_pb2.DeleteTaskRequest, context: ServicerContext
    ) -> task_queue_pb2.DeleteTaskResponse:
        async with self._received("DeleteTask", context, request):
            task = self._known(request.id)
            if task.state not in _TERMINAL:
                raise Refusal(Reason.WRONG_STATE, f"task {task.id} has not ended")
            del self.tasks[task.id]
            return task_queue_pb2.DeleteTaskResponse()

    async def GetQueueStats(
        self, request: task_queue_pb2.GetQueueStatsRequest, context: ServicerContext
    ) -> task_queue_pb2.GetQueueStatsResponse:
        async with self._received("GetQueueStats", context, request):
            response = task_queue_pb2.GetQueueStatsResponse()
            response.CopyFrom(self.stats)
            states = [task.state for task in self.tasks.values()]
            response.states.extend(
                task_queue_pb2.StateCount(state=state, count=states.count(state)) for state in sorted(set(states))
            )
            response.last_event_id = len(self.events)
            return response

    async def ListCallbacks(
        self, request: task_queue_pb2.ListCallbacksRequest, context: ServicerContext
    ) -> task_queue_pb2.ListCallbacksResponse:
        async with self._received("ListCallbacks", context, request):
            return task_queue_pb2.ListCallbacksResponse(
                callbacks=[
                    callback
                    for callback in self.callbacks.values()
                    if (not request.states or callback.state in request.states)
                    and request.task_id in ("", callback.task_id)
                ]
            )

    async def ResendCallback(
        self, request: task_queue_pb2.ResendCallbackRequest, context: ServicerContext
    ) -> task_queue_pb2.ResendCallbackResponse:
        async with self._received("ResendCallback", context, request):
            callback = self.callbacks.get(request.id)
            if callback is None:
                raise Refusal(Reason.UNKNOWN_TASK, f"no callback {request.id!r}")
            callback.state, callback.attempt_count = task_queue_pb2.CALLBACK_STATE_PENDING, 0
            return task_queue_pb2.ResendCallbackResponse(callback=callback)

    def _known(self, id: str) -> Task:
        if id not in self.tasks:
            raise Refusal(Reason.UNKNOWN_TASK, f"no task {id!r}")
        return self.tasks[id]

    def _next_cut(self, method: str) -> int:
        cuts = self._cuts.get(method)
        return cuts.pop(0) if cuts else -1


def _draining() -> Refusal:
    return Refusal(Reason.DRAINING, "shutting down", retry_after=0.01)


def _brief(task: Task, *, result: bool = False) -> Task:
    brief = Task()
    brief.CopyFrom(task)
    brief.ClearField("spec")
    if not result:
        brief.ClearField("result")
    return brief


def _stamp(field: Timestamp) -> None:
    field.FromNanoseconds(time.time_ns())
