"""A queue of requests for code that has its own: a thin face over durable tasks."""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
import logging
import uuid
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from types import TracebackType
from typing import Any, Self, Unpack

from modelyard.client import _values as values
from modelyard.client._async import AsyncClient
from modelyard.client._errors import DeadlineExceeded, ModelyardError, StreamBroken, TryAgain, WrongState
from modelyard.client._names import PRIORITY
from modelyard.client._requests import GenerateOptions, Input
from modelyard.client._task_messages import submit_request
from modelyard.client._task_types import Task
from modelyard.client._types import GenerationResult, Value

_log = logging.getLogger(__name__)

OnDone = Callable[[Task], Awaitable[None]]
"""Called with the terminal task, its result in it."""

_TERMINAL = ("succeeded", "failed", "cancelled", "expired")
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 2.0
_CANCEL_PATIENCE = 10.0


@dataclass(frozen=True, slots=True)
class RequestQueueStatistics(Value):
    """Requests of one RequestQueue since it was made."""

    submitted: int
    """That the service has accepted."""
    waiting: int
    """That wait here for others to end."""
    in_service: int
    """That the service has and that have not ended; at most the concurrency."""
    succeeded: int
    failed: int
    cancelled: int
    expired: int
    callbacks_failed: int
    """Callbacks (`on_done`) that raised."""
    mean_seconds: float | None
    """From being accepted to the end. None: none has ended."""


class _Slots:
    """So many at the same time; of those that wait the most urgent goes first, of equals the oldest."""

    def __init__(self, count: int) -> None:
        self._free = count
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []
        self._order = itertools.count()

    @property
    def waiting(self) -> int:
        return sum(not future.done() for _, _, future in self._waiting)

    async def take(self, urgency: int) -> None:
        if self._free > 0:
            self._free -= 1
            return
        future = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (-urgency, next(self._order), future))
        try:
            await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():
                self.give()  # it was given in the same moment
            raise

    def give(self) -> None:
        while self._waiting:
            _, _, future = heapq.heappop(self._waiting)
            if not future.done():
                future.set_result(None)
                return
        self._free += 1


class RequestOptions(GenerateOptions, total=False):
    """What may be said about one request of a queue."""

    task_labels: Mapping[str, str]
    """Notes, returned as they are."""
    not_before: datetime | float | None
    """Do not start earlier; a time with its zone, or seconds from now."""
    attempt_timeout: float | None
    """Most seconds that one attempt may take."""
    callback: str | None
    """An https address that is told when the request has ended."""


@dataclass(slots=True)
class _Request:
    """One that the service has and that has not ended."""

    id: str
    on_done: OnDone | None
    since: float
    ended: asyncio.Future[None]


class RequestQueue:
    """Requests that are kept by the service until they are done, a bounded number of them at a time.

        async with RequestQueue(client, concurrency=8, timeout=600, max_attempts=3) as queue:
            id = await queue.submit("Why is the sky blue?", priority="high", on_done=tell)
            print((await queue.result(id)).text)

    concurrency   requests of this queue that the service has at the same time; `submit` waits for its turn, the most
                  urgent first
    timeout       seconds after which a request expires, from when the service gets it. None: never
    max_attempts  attempts of a request that may fail. None: as the service has it set

    Every request is a durable task: one whose id `submit` has returned survives this process, the control plane and
    the model server, and `client.tasks` finds it. Broken connections and restarts are waited out. Leaving the block
    waits for what is under way, or cancels it when an exception is the reason.
    """

    def __init__(
        self,
        client: AsyncClient,
        *,
        concurrency: int = 8,
        timeout: float | None = None,
        max_attempts: int | None = None,
    ) -> None:
        if concurrency < 1:
            raise ValueError(f"concurrency must be 1 or more, not {concurrency}")
        if timeout is not None and not timeout > 0:
            raise ValueError(f"timeout must be above 0, not {timeout}")
        timeout = values.timeout(timeout)
        self.group = f"queue-{uuid.uuid4().hex}"
        """Of all tasks of this queue."""
        self._client = client
        self._timeout = timeout
        self._max_attempts = max_attempts
        self._slots = _Slots(concurrency)
        self._requests: dict[str, _Request] = {}
        self._submitting = 0
        self._early: dict[str, str] = {}
        """Tasks that ended before their `submit` was answered, with their states."""
        self._told: set[asyncio.Task[None]] = set()
        self._watcher: asyncio.Task[None] | None = None
        self._started: asyncio.Future[None] | None = None
        self._changed = asyncio.Event()
        self._closed = False
        self._submitted = 0
        self._ended = dict.fromkeys(_TERMINAL, 0)
        self._callbacks_failed = 0
        self._seconds = 0.0

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close(cancel=error is not None)

    async def submit(
        self,
        input: Input,
        *,
        on_done: OnDone | None = None,
        **options: Unpack[RequestOptions],
    ) -> str:
        """Hand a request to the service when it is its turn; its id. It is on disk then.

        `on_done` is called once with the task when it has ended, however that was, as long as this queue is open; what
        it raises is logged and stops nothing. A control plane that does not answer is waited for.
        """
        request = submit_request(
            input,
            group=self.group,
            max_attempts=self._max_attempts,
            idempotency_key=uuid.uuid4().hex,  # so that asking again when an answer was lost submits nothing twice
            **options,
        )
        self._check_open()
        await self._slots.take(PRIORITY.number(options.get("priority") or "normal"))
        self._submitting += 1
        try:
            self._check_open()
            await self._watching()
            if self._timeout is not None:
                request.spec.deadline.FromDatetime(datetime.now(UTC) + timedelta(seconds=self._timeout))
            answer = await self._patiently(lambda: self._client.tasks._call("SubmitTask", request, retries=0))
        except BaseException:
            self._slots.give()
            raise
        else:
            self._add(answer.task.id, on_done)
        finally:
            self._submitting -= 1
            if not self._submitting:
                self._early.clear()
            self._changed.set()
        id: str = answer.task.id
        return id

    async def result(self, id: str, *, timeout: float | None = None) -> GenerationResult:
        """What a request has produced; waits for it. Raises TaskFailed if it did not succeed, DeadlineExceeded after
        `timeout` seconds. Ids of other queues and of `client.tasks` will do too."""
        try:
            async with asyncio.timeout(values.timeout(timeout)):
                if (request := self._requests.get(id)) is not None:
                    await asyncio.shield(request.ended)
                while True:
                    try:
                        return await self._client.tasks.result(id)
                    except (TryAgain, StreamBroken):
                        await asyncio.sleep(_LONGEST_PAUSE)
        except TimeoutError:
            raise DeadlineExceeded(f"request {id} was not finished within {timeout:g} s") from None

    def statistics(self) -> RequestQueueStatistics:
        """What has become of the requests so far."""
        ended = sum(self._ended.values())
        return RequestQueueStatistics(
            submitted=self._submitted,
            waiting=self._slots.waiting,
            in_service=len(self._requests),
            succeeded=self._ended["succeeded"],
            failed=self._ended["failed"],
            cancelled=self._ended["cancelled"],
            expired=self._ended["expired"],
            callbacks_failed=self._callbacks_failed,
            mean_seconds=self._seconds / ended if ended else None,
        )

    async def close(self, *, cancel: bool = False) -> None:
        """Take nothing more, wait for what the service has and for callbacks, then end. With `cancel` the requests are
        cancelled instead. Idempotent."""
        self._closed = True
        asked: set[str] = set()
        try:
            while True:
                self._changed.clear()
                new = [id for id in self._requests if cancel and id not in asked]
                asked.update(new)
                await asyncio.gather(*map(self._cancel, new))
                if not (self._requests or self._told or self._submitting):
                    return
                if not new:
                    await self._changed.wait()
        finally:
            for task in (self._watcher, *self._told):
                if task is not None:
                    task.cancel()
                    await asyncio.gather(task, return_exceptions=True)

    async def _cancel(self, id: str) -> None:
        """Cancel one in the service; if that does not answer, it is left to itself."""
        try:
            async with asyncio.timeout(_CANCEL_PATIENCE):
                await self._patiently(lambda: self._client.tasks.cancel(id))
        except WrongState:  # it has ended, as the watch will tell
            pass
        except (ModelyardError, TimeoutError):
            _log.warning("request %s could not be cancelled", id)
            if request := self._requests.pop(id, None):
                request.ended.set_result(None)

    # ------------------------------------------------------------- following ---

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("the queue is closed")

    async def _patiently(self, call: Callable[[], Awaitable[Any]]) -> Any:
        """The answer of a call that may be made again, as long as the queue is open."""
        pause = _FIRST_PAUSE
        while True:
            try:
                return await call()
            except (TryAgain, StreamBroken) as failure:
                if self._closed:
                    raise
                await asyncio.sleep(pause if failure.retry_after is None else failure.retry_after)
                pause = min(2 * pause, _LONGEST_PAUSE)

    async def _watching(self) -> None:
        """Follow the ends of our tasks, from before the first of them was submitted."""
        if self._started is None:
            # Before anything is waited for: two that submit at once need one watch.
            self._started = asyncio.get_running_loop().create_future()
            self._watcher = asyncio.create_task(self._watch(self._started), name="request-queue")
        await asyncio.shield(self._started)

    async def _watch(self, started: asyncio.Future[None]) -> None:
        """One stream for all of them, which goes on after the last event that it told of."""
        try:
            after = (await self._patiently(self._client.tasks.stats)).last_event_id
        except BaseException as failure:
            self._started = None
            started.set_exception(
                failure if isinstance(failure, ModelyardError) else RuntimeError("the queue is closed")
            )
            started.exception()  # there may be nobody any more who waits for it
            if isinstance(failure, ModelyardError):
                return
            raise
        started.set_result(None)
        while True:
            try:
                events = self._client.tasks.watch_all(group=self.group, states=_TERMINAL, after=after)
                async with contextlib.aclosing(events):
                    async for event in events:
                        after = event.id
                        self._end(event.task_id, event.state)
            except ModelyardError as failure:
                _log.info("the events of the request queue are asked for again: %s", failure.reason)
            await asyncio.sleep(_FIRST_PAUSE)

    def _add(self, id: str, on_done: OnDone | None) -> None:
        """The service has it."""
        loop = asyncio.get_running_loop()
        self._submitted += 1
        self._requests[id] = _Request(id, on_done, loop.time(), loop.create_future())
        if state := self._early.pop(id, ""):
            self._end(id, state)

    def _end(self, id: str, state: str) -> None:
        """A task has ended."""
        request = self._requests.pop(id, None)
        if request is None:
            if self._submitting:  # perhaps one of those
                self._early[id] = state
            return
        self._ended[state] += 1
        self._seconds += asyncio.get_running_loop().time() - request.since
        if request.on_done:
            telling = asyncio.create_task(self._tell(request.on_done, id), name=f"on_done {id}")
            self._told.add(telling)
            telling.add_done_callback(self._was_told)
        request.ended.set_result(None)
        self._slots.give()
        self._changed.set()

    def _was_told(self, telling: asyncio.Task[None]) -> None:
        self._told.discard(telling)
        self._changed.set()

    async def _tell(self, on_done: OnDone, id: str) -> None:
        try:
            await on_done(await self._get(id))
        except Exception:
            self._callbacks_failed += 1
            _log.exception("on_done of request %s failed", id)

    async def _get(self, id: str) -> Task:
        while True:  # also while the queue is being closed: that waits for callbacks
            try:
                return await self._client.tasks.get(id)
            except (TryAgain, StreamBroken):
                await asyncio.sleep(_LONGEST_PAUSE)
