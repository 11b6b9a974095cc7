"""Watches of tasks: who is interested in what, and when the store is asked."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from control_plane.api.task_watch import Feeds
from control_plane.domain.task import TaskType
from control_plane.tasks.model import Changes, EventRecord, EventType, Filter, TaskId, TaskState, Tenant

TENANT = Tenant("acme")


class Events:
    """The part of a store that feeds use."""

    def __init__(self) -> None:
        self.kept: list[EventRecord] = []
        self.types: list[TaskType] = []
        self.filtered = 0
        """Reads for one watch alone."""
        self._told: list[Callable[[Changes], None]] = []

    def happen(self, type: TaskType) -> None:
        id = len(self.kept) + 1
        self.kept.append(EventRecord(id, TaskId(f"t{id}"), 0.0, EventType.SUBMITTED, TaskState.QUEUED, 0))
        self.types.append(type)
        for told in self._told:
            told(Changes(events=True))

    def listen(self, told: Callable[[Changes], None]) -> Callable[[], None]:
        self._told.append(told)
        return lambda: self._told.remove(told)

    async def last_event_id(self) -> int:
        return len(self.kept)

    async def events(
        self, tenant: Tenant, after: int, limit: int, task_id: Any = None, filter: Filter | None = None, *,
        typed: bool = False,
    ) -> tuple[list[EventRecord], int]:  # fmt: skip
        self.filtered += filter is not None
        found = []
        for event, type in list(zip(self.kept, self.types, strict=True))[after:]:
            if filter is None or not filter.task_types or type in filter.task_types:
                values = {name: getattr(event, name) for name in EventRecord.__slots__}
                found.append(EventRecord(**{**values, "task_type": type if typed else None}))
        return found, len(self.kept)


async def test_a_filter_by_kind_of_work_does_not_ask_the_store_for_every_event() -> None:
    store = Events()
    feeds = Feeds(store)  # type: ignore[arg-type]
    wanted = Filter(task_types=(TaskType.CODE_REVIEW,))
    async with feeds.watch(TENANT, 0, filter=wanted) as watch, feeds.watch(TENANT, 0) as everything:
        assert await watch.read_now() == [] and await everything.read_now() == []
        begun = store.filtered
        seen: list[int] = []
        for step in range(1, 31):
            store.happen(TaskType.CODE_REVIEW if step % 3 == 0 else TaskType.CHAT)
            async with asyncio.timeout(5):
                assert [event.id for event in await everything.read()] == [step]
            seen += [event.id for event in await watch.read_now()]
        assert seen == list(range(3, 31, 3))
        assert store.filtered == begun


async def test_events_that_came_without_it_are_asked_for_once() -> None:
    store = Events()
    feeds = Feeds(store)  # type: ignore[arg-type]
    async with feeds.watch(TENANT, 0) as everything:
        assert await everything.read_now() == []
        async with feeds.watch(TENANT, 0, filter=Filter(task_types=(TaskType.CHAT,))) as watch:
            assert await watch.read_now() == []
            untyped = EventRecord(1, TaskId("t1"), 0.0, EventType.SUBMITTED, TaskState.QUEUED, 0)
            store.kept.append(untyped)
            store.types.append(TaskType.CHAT)
            watch.take(untyped)  # of a read that began before the watch
            assert [event.id for event in await watch.read_now()] == [1]
