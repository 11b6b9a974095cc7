"""Tasks in a store, brought to their ends by hand."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from control_plane.domain.model import ModelName, Provider, ServerId
from control_plane.domain.request import RouteRequest
from control_plane.domain.task import TaskType
from control_plane.tasks.lanes import lane_of
from control_plane.tasks.location import located
from control_plane.tasks.model import Claim, NewTask, Placement, TaskId, Tenant
from control_plane.tasks.opening import open_database
from control_plane.tasks.store import SqlTaskStore
from modelyard.v1.task_queue_pb2 import TaskResult
from tests.harness.postgres import Postgres, migrated

HERE = Tenant("default")
PLACE = Placement(ServerId("gpu-1"), "i-1", ModelName("llama"), Provider("vllm"))
_numbers = itertools.count()


async def fresh(server: Postgres) -> str:
    """The URL of a new database with modelyard's tables."""
    name = await server.new_database()
    await server.execute(f'DROP DATABASE "{name}"')
    return server.url(await migrated(server, name))


@asynccontextmanager
async def open_tasks(url: str) -> AsyncIterator[SqlTaskStore]:
    store = await SqlTaskStore.open(await open_database(located(url, {})))
    try:
        yield store
    finally:
        await store.close()


def new_task(callback_url: str = "", tenant: Tenant = HERE) -> NewTask:
    """One that shares its lane with no other."""
    needs = RouteRequest("", model=ModelName(f"m-{next(_numbers)}"))
    return NewTask(tenant, b"", lane_of(tenant, needs), TaskType.CHAT, 3, callback_url=callback_url)


async def claimed(store: SqlTaskStore, callback_url: str = "", tenant: Tenant = HERE) -> Claim:
    """A new task, in hand."""
    submitted = await store.submit(new_task(callback_url, tenant))
    full = await store.get(tenant, submitted.record.id)
    assert full.lane_id is not None
    (claim,) = await store.claim(full.lane_id, [PLACE])
    return claim


async def succeeded(store: SqlTaskStore, callback_url: str = "", tenant: Tenant = HERE, text: str = "done") -> TaskId:
    """A new task that has succeeded."""
    claim = await claimed(store, callback_url, tenant)
    assert await store.succeeded(claim.id, claim.epoch, TaskResult(text=text).SerializeToString(), 7)
    return claim.id
