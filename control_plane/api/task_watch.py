"""New events of tasks, read from the store once however many watch, and handed to those whom they concern.

    async with feeds.watch(tenant, after, task_id=id) as watch:
        while True:
            for event in await watch.read():
                ...

The store is what counts. A watch begins with reading there, goes on with what its tenant's feed hands it, and goes
back to the store when it fell behind: so a slow reader holds no more than `_PENDING` events in memory and misses none.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator

from control_plane.domain.errors import DomainError
from control_plane.tasks.model import Changes, EventRecord, Filter, TaskId, Tenant
from control_plane.tasks.ports import TaskStore

PAGE = 500
"""Events that are read at once."""

_PENDING = 1000
"""Events that wait in memory for one watch."""

# Seconds between two looks where nobody told of a change: other processes may write, and their hints may get lost.
POLL = 1.0


class Feeds:
    """The feeds of all tenants that somebody watches."""

    def __init__(self, store: TaskStore) -> None:
        self._store = store
        self._feeds: dict[Tenant, _Feed] = {}

    @contextlib.asynccontextmanager
    async def watch(
        self, tenant: Tenant, after: int, *, task_id: TaskId | None = None, filter: Filter | None = None
    ) -> AsyncIterator[Watch]:
        """Events after a position. Raises STORE_UNAVAILABLE if there is none to begin with."""
        feed = self._feeds.get(tenant)
        if feed is None:
            feed = self._feeds[tenant] = _Feed(self._store, tenant)
        watch = Watch(feed, after, task_id, filter)
        feed.add(watch)
        try:
            await feed.started()
            yield watch
        finally:
            feed.remove(watch)
            if feed.deserted:
                feed.close()
                if self._feeds.get(tenant) is feed:
                    del self._feeds[tenant]

    @property
    def open(self) -> int:
        """Tenants that are watched."""
        return len(self._feeds)


class _Feed:
    """Reads the events of one tenant as they are committed."""

    def __init__(self, store: TaskStore, tenant: Tenant) -> None:
        self.store = store
        self.tenant = tenant
        self.position: int | None = None
        """Everything up to here was handed out."""
        self._by_task: dict[TaskId, set[Watch]] = {}
        self._general: set[Watch] = set()
        self._changed = asyncio.Event()
        self._stop = store.listen(self._told)
        self._start: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._reader = asyncio.create_task(self._read(), name=f"events of tenant {tenant}")
        self._reader.add_done_callback(self._ended)

    def _told(self, changes: Changes) -> None:
        if changes.events:
            self._changed.set()

    def add(self, watch: Watch) -> None:
        group = self._general if watch.task_id is None else self._by_task.setdefault(watch.task_id, set())
        group.add(watch)

    def remove(self, watch: Watch) -> None:
        if watch.task_id is None:
            self._general.discard(watch)
            return
        group = self._by_task[watch.task_id]
        group.discard(watch)
        if not group:
            del self._by_task[watch.task_id]

    @property
    def deserted(self) -> bool:
        return not self._general and not self._by_task

    def close(self) -> None:
        self._stop()
        self._reader.cancel()

    async def started(self) -> None:
        """Return when `position` is known, or raise why it is not."""
        await asyncio.shield(self._start)

    def check(self) -> None:
        """Raise what ended the reader."""
        if self._reader.done():
            self._reader.result()

    async def _read(self) -> None:
        self.position = await self.store.last_event_id()
        self._start.set_result(None)
        while True:
            try:
                async with asyncio.timeout(POLL):
                    await self._changed.wait()
            except TimeoutError:
                pass
            self._changed.clear()
            more = True
            while more:
                try:
                    typed = any(watch.typed for watch in self._general)
                    events, upto = await self.store.events(self.tenant, self.position, PAGE, typed=typed)
                except DomainError:  # the store is away; what was committed meanwhile is read when it is back
                    break
                more = upto > self.position
                self.position = upto
                self._hand_out(events)

    def _hand_out(self, events: list[EventRecord]) -> None:
        for event in events:
            for watch in self._by_task.get(event.task_id, ()):
                watch.take(event)
            for watch in self._general:
                watch.take(event)

    def _ended(self, reader: asyncio.Task[None]) -> None:
        failure = None if reader.cancelled() else reader.exception()
        if not self._start.done():
            if failure is None:
                self._start.cancel()
            else:
                self._start.set_exception(failure)
                self._start.exception()  # whoever waited has gone: nobody is to be blamed for not looking
        for watch in [*self._general, *(watch for group in self._by_task.values() for watch in group)]:
            watch.wake.set()


class Watch:
    """One reader of events."""

    def __init__(self, feed: _Feed, after: int, task_id: TaskId | None, filter: Filter | None) -> None:
        self.position = after
        """Everything up to here was returned by `read`, or does not concern this watch."""
        self.task_id = task_id
        self.wake = asyncio.Event()
        self._feed = feed
        self._filter = filter
        self._pending: deque[EventRecord] = deque()
        self._behind = True

    @property
    def typed(self) -> bool:
        """Wants to know the kind of work."""
        return self._filter is not None and bool(self._filter.task_types)

    def take(self, event: EventRecord) -> None:
        """An event of the feed."""
        if self._behind:
            return
        filter = self._filter
        if filter is not None:
            if filter.states and event.state not in filter.states:
                return
            if filter.group and event.group != filter.group:
                return
            if filter.task_types and event.task_type is not None and event.task_type not in filter.task_types:
                return
        # An event that was read before this watch was there may lack the kind of work: the store can tell.
        if (self.typed and event.task_type is None) or len(self._pending) >= _PENDING:
            self._pending.clear()
            self._behind = True
        else:
            self._pending.append(event)
        self.wake.set()

    async def read(self) -> list[EventRecord]:
        """The next events, oldest first; waits for them. Raises DomainError if the store does not answer."""
        while not (events := await self.read_now()):
            await self.wake.wait()
        return events

    async def read_now(self) -> list[EventRecord]:
        """The next events, none if there are none now. Raises DomainError if the store does not answer."""
        while self._behind:
            self._feed.check()
            events = await self._read_store()
            if events:
                return events
        self._feed.check()
        self.wake.clear()
        events = [event for event in self._pending if event.id > self.position]
        self._pending.clear()
        if events:
            self.position = events[-1].id
        return events

    async def _read_store(self) -> list[EventRecord]:
        """A page of the store, from where this watch stands."""
        target = self._feed.position
        assert target is not None
        # What the feed hands out from now on is later than its position; what of it is in this page too is dropped.
        self._pending.clear()
        self._behind = False
        try:
            events, upto = await self._feed.store.events(
                self._feed.tenant, self.position, PAGE, self.task_id, self._filter
            )
        except BaseException:
            self._behind = True
            raise
        moved = upto > self.position
        self.position = max(self.position, upto)
        if self.position < target and moved:
            self._behind = True
        return events
