"""Tasks to store, and stores that are closed again."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from control_plane.domain.model import ModelName, Provider, ServerId
from control_plane.domain.request import RouteRequest
from control_plane.domain.task import Priority, TaskType
from control_plane.tasks.lanes import lane_of
from control_plane.tasks.location import located
from control_plane.tasks.model import Claim, LaneId, NewTask, Placement, Tenant
from control_plane.tasks.opening import open_store
from control_plane.tasks.store import SqlTaskStore, StorePolicy

TENANT = Tenant("acme")
PLACE = Placement(ServerId("server"), "instance", ModelName("model"), Provider("provider"))
LANE = lane_of(TENANT, RouteRequest("", prompt_tokens=100))


def new_task(
    key: str = "", spec: bytes = b"spec", tenant: str = TENANT, priority: Priority = Priority.NORMAL, **more: Any
) -> NewTask:
    """A task; its lane depends on tenant and priority."""
    given = {"task_type": TaskType.CHAT, "max_attempts": 3, **more}
    lane = lane_of(Tenant(tenant), RouteRequest("", priority=priority, prompt_tokens=100))
    return NewTask(Tenant(tenant), spec, lane, idempotency_key=key, **given)


@asynccontextmanager
async def opened(url: str, **policy: Any) -> AsyncIterator[SqlTaskStore]:
    store = await open_store(located(url, {}), StorePolicy(**policy))
    try:
        yield store
    finally:
        await store.close()


async def first_lane(store: SqlTaskStore) -> LaneId:
    """The one lane with tasks that can start."""
    (waiting,) = await store.waiting_lanes()
    return waiting.id


async def claim(store: SqlTaskStore, count: int = 1, place: Placement = PLACE) -> list[Claim]:
    """Tasks of the one lane that there is."""
    lanes = await store.waiting_lanes()
    if not lanes:
        return []
    (lane,) = lanes
    return await store.claim(lane.id, [place] * count)
