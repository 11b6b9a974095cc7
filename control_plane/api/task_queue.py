"""The TaskQueue service: parse -> call -> render."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, ParamSpec, Protocol, TypeVar

import grpc

from control_plane.api import convert, task_convert
from control_plane.api.callbacks import CallbackMethods
from control_plane.api.metrics import Metrics
from control_plane.api.orchestrator import served
from control_plane.api.predicting import Predicted
from control_plane.api.task_watch import POLL, Feeds, Watch
from control_plane.api.tenant import tenant_of
from control_plane.domain.errors import DomainError, draining
from control_plane.domain.model import ModelName, Provider
from control_plane.presets import Presets
from control_plane.tasks.model import (
    EventRecord,
    Filter,
    FullTask,
    IdempotencyConflict,
    LaneId,
    Submitted,
    TaskId,
    TaskState,
    Tenant,
    WaitingLane,
)
from control_plane.tasks.ports import Dispatching, TaskStore
from modelyard.rpc.errors import Refusal, Violation, invalid
from modelyard.rpc.reasons import Reason
from modelyard.rpc.server import InFlight
from modelyard.rpc.task_validation import (
    check_list,
    check_submit,
    check_task_id,
    check_times,
    check_watch_task,
    check_watch_tasks,
)
from modelyard.v1 import task_queue_pb2
from modelyard.v1.selection_pb2 import Requirements

if TYPE_CHECKING:
    from control_plane.tasks.deliveries import Deliveries


P = ParamSpec("P")
T = TypeVar("T")

_PAGE_SIZE = 100

# Of one BatchSubmitTasks stream: tasks that were read and not yet answered. As many as one transaction of the store
# may well take; more would only wait in memory.
_BATCH_AT_ONCE = 256
_BATCH_BYTES = 16 << 20

# What GetQueueStats tells at most.
_LANES = 100
_COUNTED = 10_000


class Routes(Protocol):
    """What is known of presets and models: `control_plane.api.generate.Generation`."""

    presets: Presets

    def pinned(self, requirements: Requirements) -> tuple[ModelName, Provider | None] | None:
        """The model that is named. Raises UNKNOWN_MODEL or FLEET_WARMING_UP."""
        ...


class TaskQueueServicer(CallbackMethods):
    """All methods of the service. Once `stop_accepting` was called, new tasks are refused with DRAINING and watches
    end; what is being written is answered."""

    def __init__(
        self,
        store: TaskStore | None,
        routes: Routes,
        metrics: Metrics,
        in_flight: InFlight,
        *,
        max_attempts: int,
        write_timeout: float,
        dispatcher: Dispatching | None = None,
        deliveries: Deliveries | None = None,
        predicted: Predicted = lambda task_id, number: None,
    ) -> None:
        """
        store          None: there are no tasks, every method answers UNSUPPORTED
        in_flight      of the process: a drain waits for it
        max_attempts   of tasks that name none
        write_timeout  seconds that a client may leave its stream unread
        """
        self.metrics = metrics
        self.deliveries = deliveries
        self._in_flight = in_flight
        self._kept = store
        self._feeds = Feeds(store) if store else None
        self._routes = routes
        self._max_attempts = max_attempts
        self._write_timeout = write_timeout
        self._dispatcher = dispatcher
        self._predicted = predicted
        self._stopping = asyncio.Event()

    def stop_accepting(self) -> None:
        """Refuse new tasks and end watches from now on."""
        self._stopping.set()

    def _store(self) -> TaskStore:
        if self._kept is None:
            raise Refusal(Reason.UNSUPPORTED, "this control plane keeps no tasks (setting tasks.store)")
        return self._kept

    def _admit(self) -> InFlight:
        if self._stopping.is_set():
            raise draining()
        return self._in_flight

    # -------------------------------------------------------------- submit ---

    @served
    async def SubmitTask(
        self, request: task_queue_pb2.SubmitTaskRequest, context: grpc.aio.ServicerContext
    ) -> task_queue_pb2.SubmitTaskResponse:
        tenant = tenant_of(context)
        with self._admit():
            done = await self._submit(tenant, request)
        return task_queue_pb2.SubmitTaskResponse(task=task_convert.task(done.record), created=done.created)

    async def _submit(
        self, tenant: Tenant, request: task_queue_pb2.SubmitTaskRequest | task_queue_pb2.BatchSubmitTasksRequest
    ) -> Submitted:
        store = self._store()
        spec = request.spec
        presets = self._routes.presets
        # Only a preset makes a copy necessary.
        named = presets.default or spec.preset
        try:
            work = presets.fill(task_convert.work(spec))[0] if named else None
        except Refusal as refusal:
            raise invalid([Violation(f"spec.{v.field}", v.description) for v in refusal.violations]) from None
        if violations := check_submit(request, work):
            raise invalid(violations)
        raw = task_convert.spec_bytes(spec)
        try:
            if violations := check_times(spec, store.now()):
                raise invalid(violations)
            if self.deliveries and spec.HasField("callback") and (why := self.deliveries.problem(spec.callback.url)):
                raise invalid([Violation("spec.callback.url", why)])
            wanted = (work or spec).requirements
            model = self._routes.pinned(wanted) if wanted.model else None
        except (Refusal, DomainError):
            # What is there already is there, whatever has become of its deadline or its model.
            if request.idempotency_key and (known := await self._existing(store, tenant, request.idempotency_key, raw)):
                return known
            raise
        task = task_convert.new_task(request, work or spec, raw, tenant, model, self._max_attempts)
        try:
            return await store.submit(task)
        except IdempotencyConflict as conflict:
            raise _conflict(conflict.existing_id, conflict.existing_spec, raw) from None

    async def _existing(self, store: TaskStore, tenant: Tenant, key: str, raw: bytes) -> Submitted | None:
        """The task that has this key, if it is the same one. Raises IDEMPOTENCY_CONFLICT if it is another."""
        found = await store.page(tenant, Filter(idempotency_key=key), 1)
        if not found:
            return None
        try:
            full = await store.get(tenant, found[0].id)
        except DomainError as error:
            if error.reason == Reason.UNKNOWN_TASK:  # deleted in between
                return None
            raise
        if full.spec != raw:
            raise _conflict(full.record.id, full.spec, raw)
        return Submitted(full.record, created=False)

    @served
    async def BatchSubmitTasks(
        self, requests: AsyncIterator[task_queue_pb2.BatchSubmitTasksRequest], context: grpc.aio.ServicerContext
    ) -> None:
        tenant = tenant_of(context)
        self._store()
        with self._admit():
            batch = Batch(lambda request: self._submit(tenant, request))
            reader = asyncio.create_task(batch.read(requests), name="batch-reader")
            stopper = asyncio.create_task(self._stopping.wait(), name="batch-stopper")
            stopper.add_done_callback(lambda _: reader.cancel())
            try:
                while (answer := await batch.answer()) is not None:
                    await self._write(context, answer)
                # What was read is answered; what was not may be sent again.
                if self._stopping.is_set() and reader.cancelled():
                    raise draining()
                reader.result()
            finally:
                stopper.cancel()
                reader.cancel()
                await batch.close(reader)

    # --------------------------------------------------------------- reading ---

    @served
    async def GetTask(
        self, request: task_queue_pb2.GetTaskRequest, context: grpc.aio.ServicerContext
    ) -> task_queue_pb2.GetTaskResponse:
        tenant, store, id = self._about_one(request.id, context)
        full = await store.get(tenant, id)
        waiting_for = self._waiting_for(full, store.now())
        return task_queue_pb2.GetTaskResponse(task=task_convert.whole_task(full, waiting_for, self._predicted))

    def _waiting_for(self, full: FullTask, now: float) -> str:
        """One sentence about why a task is still queued; empty for one that is not."""
        record = full.record
        if record.state is not TaskState.QUEUED:
            return ""
        if record.ready_at is not None and record.ready_at > now:
            what = "its next attempt" if record.attempts else "its time"
            return f"it waits for {what}, in {_words(record.ready_at - now)}"
        if full.lane_id is None:
            return ""
        return self._lane_waits_for(full.lane_id)

    def _lane_waits_for(self, lane: LaneId) -> str:
        return self._dispatcher.waiting_for(lane) if self._dispatcher else ""

    @served
    async def ListTasks(
        self, request: task_queue_pb2.ListTasksRequest, context: grpc.aio.ServicerContext
    ) -> task_queue_pb2.ListTasksResponse:
        tenant, store = tenant_of(context), self._store()
        if violations := check_list(request):
            raise invalid(violations)
        filter = task_convert.filter_of(request.filter)
        before = task_convert.page_start(tenant, filter, request.page_token)
        size = request.page_size or _PAGE_SIZE
        # One more than is shown tells whether there is another page.
        found = await store.page(tenant, filter, size + 1, before)
        shown = found[:size]
        return task_queue_pb2.ListTasksResponse(
            tasks=map(task_convert.task, shown),
            next_page_token=task_convert.page_token(tenant, filter, shown[-1].id) if len(found) > size else "",
        )

    @served
    async def GetQueueStats(
        self, request: task_queue_pb2.GetQueueStatsRequest, context: grpc.aio.ServicerContext
    ) -> task_queue_pb2.GetQueueStatsResponse:
        tenant, store = tenant_of(context), self._store()
        counts = await store.counts(tenant)
        waiting = [lane for lane in await store.waiting_lanes() if lane.lane.tenant == tenant]
        waiting.sort(key=lambda lane: lane.oldest)
        lanes = [await self._lane(store, lane) for lane in waiting[:_LANES]]
        pending, dead = await self.deliveries.counts(tenant) if self.deliveries else (0, 0)
        return task_queue_pb2.GetQueueStatsResponse(
            states=[
                task_queue_pb2.StateCount(state=state.value, count=counts[state])  # type: ignore[arg-type]
                for state in sorted(counts)
                if counts[state]
            ],
            lanes=lanes,
            running_here=self._dispatcher.running_here if self._dispatcher else 0,
            workers=self._dispatcher.workers if self._dispatcher else 0,
            callbacks_pending=pending,
            callbacks_dead=dead,
            last_event_id=await store.last_event_id(),
        )

    async def _lane(self, store: TaskStore, waiting: WaitingLane) -> task_queue_pb2.Lane:
        route = waiting.lane.route
        return task_queue_pb2.Lane(
            task_type=route.task_type.value,  # type: ignore[arg-type]
            priority=waiting.lane.priority.value,  # type: ignore[arg-type]
            model=route.model or "",
            provider=route.provider or "",
            oldest_created_at=convert.timestamp(waiting.oldest),
            waiting_for=self._lane_waits_for(waiting.id),
            count=await store.waiting_count(waiting.id, _COUNTED),
        )

    # ---------------------------------------------------------------- orders ---

    @served
    async def CancelTask(
        self, request: task_queue_pb2.CancelTaskRequest, context: grpc.aio.ServicerContext
    ) -> task_queue_pb2.CancelTaskResponse:
        tenant, store, id = self._about_one(request.id, context)
        with self._admit():
            return task_queue_pb2.CancelTaskResponse(task=task_convert.task(await store.cancel(tenant, id)))

    @served
    async def RetryTask(
        self, request: task_queue_pb2.RetryTaskRequest, context: grpc.aio.ServicerContext
    ) -> task_queue_pb2.RetryTaskResponse:
        tenant, store, id = self._about_one(request.id, context)
        with self._admit():
            return task_queue_pb2.RetryTaskResponse(task=task_convert.task(await store.retry(tenant, id)))

    @served
    async def DeleteTask(
        self, request: task_queue_pb2.DeleteTaskRequest, context: grpc.aio.ServicerContext
    ) -> task_queue_pb2.DeleteTaskResponse:
        tenant, store, id = self._about_one(request.id, context)
        with self._admit():
            await store.delete(tenant, id)
        return task_queue_pb2.DeleteTaskResponse()

    def _about_one(self, id: str, context: grpc.aio.ServicerContext) -> tuple[Tenant, TaskStore, TaskId]:
        tenant, store = tenant_of(context), self._store()
        if violations := check_task_id(id):
            raise invalid(violations)
        return tenant, store, TaskId(id)

    # -------------------------------------------------------------- watching ---

    @served
    async def WatchTask(self, request: task_queue_pb2.WatchTaskRequest, context: grpc.aio.ServicerContext) -> None:
        tenant, store = tenant_of(context), self._store()
        if violations := check_watch_task(request):
            raise invalid(violations)
        self._admit()
        id = TaskId(request.id)
        full = await store.get(tenant, id)
        assert self._feeds
        async with self._feeds.watch(tenant, request.after_event_id, task_id=id) as watch:
            events = await watch.read_now()
            # The client may not hear of anything for long, but it may know that it is heard.
            await context.send_initial_metadata(())
            if not events and full.record.state.terminal:
                return  # it has been told of the end before
            while True:
                for event in events:
                    message = task_queue_pb2.WatchTaskResponse(event=task_convert.event(event))
                    ended = await self._ended_with(event, tenant) if event is events[-1] else None
                    if ended is not None:
                        message.task.CopyFrom(task_convert.finished_task(ended))
                    await self._write(context, message)
                    if ended is not None:
                        return
                events = await self._next(watch, tenant)

    async def _ended_with(self, event: EventRecord, tenant: Tenant) -> FullTask | None:
        """The task, if this event made it terminal and it has stayed so."""
        if not event.state.terminal:
            return None
        full = await self._patiently(self._store().get, tenant, event.task_id)
        record = full.record
        return full if record.state.terminal and record.epoch == event.epoch else None

    @served
    async def WatchTasks(self, request: task_queue_pb2.WatchTasksRequest, context: grpc.aio.ServicerContext) -> None:
        tenant, store = tenant_of(context), self._store()
        if violations := check_watch_tasks(request):
            raise invalid(violations)
        self._admit()
        after = request.after_event_id if request.HasField("after_event_id") else await store.last_event_id()
        assert self._feeds
        async with self._feeds.watch(tenant, after, filter=task_convert.filter_of(request.filter)) as watch:
            events = await watch.read_now()
            if not events:
                await self._write(context, task_queue_pb2.WatchTasksResponse(position=after))
            while True:
                for event in events:
                    message = task_queue_pb2.WatchTasksResponse(event=task_convert.event(event), position=event.id)
                    await self._write(context, message)
                events = await self._next(watch)

    async def _next(self, watch: Watch, tenant: Tenant | None = None) -> list[EventRecord]:
        """The next events of a watch. Raises DRAINING when the process stops; a store that is away is waited for.

        With a tenant also UNKNOWN_TASK when the one task that is watched was deleted, which is no event."""
        while True:
            reading = asyncio.ensure_future(self._patiently(watch.read))
            stopping = asyncio.ensure_future(self._stopping.wait())
            try:
                await asyncio.wait((reading, stopping), timeout=_LOOK, return_when=asyncio.FIRST_COMPLETED)
                if stopping.done():
                    raise draining()
                if reading.done():
                    return reading.result()
            finally:
                stopping.cancel()
                reading.cancel()
            if tenant is not None and watch.task_id is not None:
                await self._patiently(self._store().get, tenant, watch.task_id)

    async def _patiently(self, read: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs) -> T:
        """What `read` returns. A stream that runs goes on when the store is away."""
        while True:
            try:
                return await read(*args, **kwargs)
            except DomainError as error:
                if error.reason != Reason.STORE_UNAVAILABLE:
                    raise
            if self._stopping.is_set():
                raise draining()
            await asyncio.sleep(POLL)

    async def _write(self, context: grpc.aio.ServicerContext, message: object) -> None:
        try:
            async with asyncio.timeout(self._write_timeout):
                await context.write(message)
        except TimeoutError:
            told = f"the stream was not read for {self._write_timeout:.0f} s"
            raise Refusal(Reason.SLOW_READER, told) from None


# Seconds between two looks whether a task that nothing happens to is still there.
_LOOK = 10.0


class Batch:
    """Tasks of one stream between their arrival and their answer, in order."""

    def __init__(self, submit: Callable[[task_queue_pb2.BatchSubmitTasksRequest], Awaitable[Submitted]]) -> None:
        self._submit = submit
        self._under_way: asyncio.Queue[tuple[asyncio.Task[Submitted], int] | None] = asyncio.Queue()
        self._bytes = 0
        self._room = asyncio.Event()
        self._index = -1

    async def read(self, requests: AsyncIterator[task_queue_pb2.BatchSubmitTasksRequest]) -> None:
        """Start tasks as they come, no more at once than may wait."""
        try:
            while True:
                while self._under_way.qsize() >= _BATCH_AT_ONCE or self._bytes >= _BATCH_BYTES:
                    self._room.clear()
                    await self._room.wait()
                size = 0
                work: Awaitable[Submitted]
                try:
                    request = await anext(requests)
                    size = request.ByteSize()
                    work = self._submit(request)
                except StopAsyncIteration:
                    return
                except Refusal as refusal:  # of one message: too large, or no message at all
                    work = _refused(refusal)
                self._bytes += size
                self._under_way.put_nowait((asyncio.ensure_future(work), size))
        finally:
            self._under_way.put_nowait(None)

    async def answer(self) -> task_queue_pb2.BatchSubmitTasksResponse | None:
        """The answer to the next task; None after the last."""
        entry = await self._under_way.get()
        if entry is None:
            return None
        work, size = entry
        self._index += 1
        response = task_queue_pb2.BatchSubmitTasksResponse(index=self._index)
        try:
            done = await work
        except DomainError as error:
            response.refusal.reason, response.refusal.message = error.reason, error.message
        except Refusal as refusal:
            response.refusal.reason, response.refusal.message = refusal.reason, refusal.message
            for violation in refusal.violations:
                response.refusal.violations[violation.field] = violation.description
        else:
            response.task.CopyFrom(task_convert.task(done.record))
            response.created = done.created
        finally:
            self._bytes -= size
            self._room.set()
        return response

    async def close(self, reader: asyncio.Task[None]) -> None:
        """End what is left."""
        left: list[asyncio.Task[Submitted]] = []
        while not self._under_way.empty():
            if entry := self._under_way.get_nowait():
                left.append(entry[0])
        for work in left:
            work.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(reader, *left, return_exceptions=True)


async def _refused(refusal: Refusal) -> Submitted:
    raise refusal


def _conflict(id: TaskId, existing: bytes, raw: bytes) -> Refusal:
    differing = ", ".join(task_convert.differences(existing, raw))
    return Refusal(
        Reason.IDEMPOTENCY_CONFLICT,
        f"task {id} has this idempotency key and differs in {differing}",
        metadata={"task_id": id, "differing": differing},
    )


def _words(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 10 else f"{math.ceil(seconds)} s"
