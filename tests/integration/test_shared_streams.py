"""The SDK over streams that its calls share: nobody can tell, but by the clock."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from modelyard.client import AsyncClient, Client, IdempotencyConflict, InvalidRequest, ModelyardError, UnknownTask
from modelyard.testing import FakeOrchestrator
from tests.harness.front_door import PATIENCE, FrontDoor, front_door
from tests.harness.model_servers import model_server
from tests.harness.programs import control_plane, until
from tests.harness.tickets import until_counted, until_direct


@asynccontextmanager
async def keeping_tasks(folder: Path) -> AsyncIterator[FrontDoor]:
    async with front_door(tasks={"store": f"sqlite:///{folder / 'tasks.db'}"}) as door:
        yield door


async def joined(client: AsyncClient) -> None:
    """The client's next call shares a stream."""
    async with asyncio.timeout(PATIENCE):
        while client._channel is None or not client._channel.shared:
            await client.presets()


async def test_tasks(tmp_path: Path) -> None:
    async with keeping_tasks(tmp_path) as door, AsyncClient(door.address) as client:
        await joined(client)
        tasks = await asyncio.gather(*(client.tasks.submit("Why?", idempotency_key=f"k-{n}") for n in range(64)))
        assert len({task.id for task in tasks}) == 64
        again = await client.tasks.submit("Why?", idempotency_key="k-7")
        assert again.id == tasks[7].id
        async with AsyncClient(door.address, tenant="other") as other:
            await joined(other)
            with pytest.raises(UnknownTask):
                await other.tasks.get(again.id)
            assert not [task async for task in other.tasks.list()]
        assert client._channel is not None and client._channel.shared


async def test_refusals_are_those_of_plain_calls(tmp_path: Path) -> None:
    async def failures(client: AsyncClient) -> list[dict[str, object]]:
        told = []
        for kind, call in (
            (InvalidRequest, client.tasks.submit("", max_attempts=1000)),
            (IdempotencyConflict, client.tasks.submit("Why not?", idempotency_key="k")),
            (UnknownTask, client.tasks.get("nobody")),
            (ModelyardError, client.embed(["x"], model="none", request_id="r-1")),
            (ModelyardError, client.model("none")),
        ):
            with pytest.raises(kind) as caught:
                await call
            told.append(caught.value.to_dict())
        return told

    async with keeping_tasks(tmp_path) as door, AsyncClient(door.address) as client:
        await client.tasks.submit("Why?", idempotency_key="k")
        async with AsyncClient(door.address) as new:
            new._connected()
            assert new._channel is not None
            new._channel._rest_until = float("inf")  # it makes plain calls
            plain = await failures(new)
            assert not new._channel.shared
        await joined(client)
        assert await failures(client) == plain


async def test_direct_mode_and_the_blocking_client() -> None:
    async with front_door() as door, model_server(server_id="a", orchestrators=(door.address,)):
        await until_direct(door, "a")
        async with AsyncClient(door.address) as client:
            await joined(client)
            await asyncio.gather(*(client.generate("Hello", direct="always", max_tokens=2) for _ in range(8)))
        await until_counted(door, "ok", 8)

        def blocking() -> int:
            with Client(door.address, direct="always") as client:
                return sum(bool(client.generate("Hello", max_tokens=2).text) for _ in range(5))

        assert await asyncio.to_thread(blocking) == 5


async def test_an_older_control_plane() -> None:
    async with FakeOrchestrator() as fake, AsyncClient(fake.address) as client:
        for _ in range(10):
            assert await client.servers() == ()
        assert client._channel is not None and not client._channel.shared


async def test_a_control_plane_that_is_restarted(tmp_path: Path) -> None:
    """Those that submit with retries do not notice; each task is there once."""
    store = ("--tasks.store", f"sqlite:///{tmp_path / 'tasks.db'}")
    async with control_plane("--log-level", "warning", *store) as plane:
        port = plane.address.rsplit(":", 1)[1]
        client = AsyncClient(plane.address, retries=100, timeout=30)
        await joined(client)
        submitted: set[str] = set()
        ended = asyncio.Event()

        async def caller(name: int) -> int:
            made = 0
            while not ended.is_set():
                task = await client.tasks.submit("Why?", idempotency_key=f"{name}-{made}")
                submitted.add(task.id)
                made += 1
            return made

        callers = [asyncio.create_task(caller(name)) for name in range(16)]

        async def more(than: int) -> bool:
            return len(submitted) > than

        await until(lambda: more(100))
    before = len(submitted)  # the first one has drained and ended
    async with control_plane("--log-level", "warning", "--port", port, *store):
        await until(lambda: more(before + 100), PATIENCE)
        ended.set()
        assert sum(await asyncio.gather(*callers)) == len(submitted)
        there = {task.id async for task in client.tasks.list(page_size=1000)}
        assert there == submitted
        await client.close()
