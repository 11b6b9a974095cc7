"""RequestQueue on a real control plane with model servers: what is submitted ends once and is told of once."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from control_plane.app import running
from modelyard.client import AsyncClient, DeadlineExceeded, InvalidRequest, RequestQueue, Task, TaskFailed
from modelyard.rpc.errors import Refusal
from modelyard.rpc.reasons import Reason
from modelyard.testing import FakeModelServer
from tests.harness.front_door import attached, settings
from tests.harness.model_servers import eventually, model_server
from tests.harness.tasks import Desk, desk


class Told:
    """An `on_done` that keeps what it was told."""

    def __init__(self) -> None:
        self.tasks: list[Task] = []

    async def __call__(self, task: Task) -> None:
        self.tasks.append(task)


@asynccontextmanager
async def plane(
    folder: Path, *, slots: int = 4, **given: Any
) -> AsyncIterator[tuple[Desk, FakeModelServer, AsyncClient]]:
    async with desk(folder, **given) as tasks, attached(tasks.door, FakeModelServer("one", slots=slots)) as (fake,):
        await tasks.door.until_ready("one")
        async with AsyncClient(tasks.door.address) as client:
            yield tasks, fake, client


async def test_requests_are_answered_and_told_of(tmp_path: Path) -> None:
    told = Told()
    async with plane(tmp_path) as (_, fake, client):
        fake.answer("blue")
        async with RequestQueue(client, concurrency=3) as queue:
            ids = [await queue.submit(f"question {n}", priority="high", on_done=told) for n in range(10)]
            assert (await queue.result(ids[0])).text == "blue"
            # Known to the service, not to this queue.
            other = await client.tasks.submit("another")
            assert (await queue.result(other.id)).text == "blue"
        statistics = queue.statistics()
        assert (statistics.submitted, statistics.succeeded, statistics.in_service) == (10, 10, 0)
        assert statistics.mean_seconds is not None and statistics.mean_seconds > 0
        # What has ended is still there when the queue is not.
        assert (await queue.result(ids[-1])).text == "blue"
    assert sorted(task.id for task in told.tasks) == sorted(ids)
    assert {task.state for task in told.tasks} == {"succeeded"}
    assert {task.result.text for task in told.tasks if task.result} == {"blue"}


async def test_the_service_never_has_more_than_the_concurrency(tmp_path: Path) -> None:
    async with plane(tmp_path, slots=16) as (tasks, fake, client):
        gate = fake.gate("Complete")
        async with RequestQueue(client, concurrency=2) as queue:
            submitting = [asyncio.create_task(queue.submit(f"{n}", priority="low")) for n in range(5)]
            await fake.until(lambda: len(fake.calls_of("Complete")) == 2)
            urgent = asyncio.create_task(queue.submit("urgent", priority="critical"))
            await eventually(lambda: queue.statistics().waiting == 4)
            stats = await client.tasks.stats()
            assert sum(stats.states.values()) == 2
            assert queue.statistics().in_service == 2
            gate.open()
            await asyncio.gather(urgent, *submitting)
        order = [call.request.input.messages[-1].content[0].text for call in fake.calls_of("Complete")]
        # Of those that waited the most urgent was among the two that came next.
        assert order.index("urgent") in (2, 3)
        assert sorted(order) == ["0", "1", "2", "3", "4", "urgent"]
        assert tasks


async def test_failures_are_results_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    told = Told()

    async def broken(task: Task) -> None:
        raise RuntimeError("a bug of the caller")

    async with plane(tmp_path) as (_, fake, client):
        fake.inject_error("Complete", Refusal(Reason.ENGINE_FAILED, "it broke"), times=2)
        with caplog.at_level(logging.ERROR, "modelyard.client"):
            async with RequestQueue(client, concurrency=1, max_attempts=2) as queue:
                failed = await queue.submit("one", on_done=told)
                with pytest.raises(TaskFailed) as why:
                    await queue.result(failed)
                assert why.value.reason == "ENGINE_FAILED"
                await queue.submit("two", on_done=broken)
                await queue.submit("three", on_done=told)
    assert [task.state for task in told.tasks] == ["failed", "succeeded"]
    assert told.tasks[0].failure_count == 2
    statistics = queue.statistics()
    assert (statistics.succeeded, statistics.failed, statistics.callbacks_failed) == (2, 1, 1)
    assert "a bug of the caller" in caplog.text


async def test_bad_requests_free_their_place(tmp_path: Path) -> None:
    async with plane(tmp_path) as (_, _, client):
        async with RequestQueue(client, concurrency=1) as queue:
            for _ in range(3):
                with pytest.raises(InvalidRequest):
                    await queue.submit("")
                with pytest.raises(ValueError, match="priority"):
                    await queue.submit("hi", priority="urgent")
                with pytest.raises(TypeError):
                    await queue.submit("hi", group="mine")  # type: ignore[call-arg]
            await queue.submit("hi")
        assert queue.statistics().submitted == 1
        with pytest.raises(RuntimeError, match="closed"):
            await queue.submit("hi")
    for bad in ({"concurrency": 0}, {"timeout": 0}, {"timeout": float("nan")}):
        with pytest.raises(ValueError, match="must be"):
            RequestQueue(client, **bad)  # type: ignore[arg-type]


async def test_requests_expire(tmp_path: Path) -> None:
    told = Told()
    async with plane(tmp_path) as (_, fake, client):
        gate = fake.gate("Complete")
        async with RequestQueue(client, timeout=0.5) as queue:
            id = await queue.submit("slow", on_done=told)
            with pytest.raises(DeadlineExceeded):
                await queue.result(id, timeout=0.05)
            with pytest.raises(TaskFailed):
                await queue.result(id)
        gate.open()
    assert [task.state for task in told.tasks] == ["expired"]
    assert queue.statistics().expired == 1


async def test_an_exception_cancels_what_is_under_way(tmp_path: Path) -> None:
    told = Told()
    async with plane(tmp_path) as (tasks, fake, client):
        gate = fake.gate("Complete")
        with pytest.raises(KeyError):
            async with RequestQueue(client, concurrency=2) as queue:
                ids = [await queue.submit(f"{n}", on_done=told) for n in range(2)]
                waiting = asyncio.create_task(queue.submit("never"))
                await fake.until(lambda: len(fake.calls_of("Complete")) == 2)
                raise KeyError
        with pytest.raises(RuntimeError, match="closed"):
            await waiting
        assert {(await client.tasks.get(id)).state for id in ids} == {"cancelled"}
        gate.open()
        assert tasks
    assert queue.statistics().cancelled == 2
    assert [task.state for task in told.tasks] == ["cancelled"] * 2


async def test_it_survives_a_restarted_control_plane(tmp_path: Path) -> None:
    """The control plane goes away with requests in its hands, queued and not yet submitted, and comes back elsewhere
    in time on the same port: all of them are answered, each is told of once."""
    store = {"store": f"sqlite:///{tmp_path}/tasks.db"}
    told = Told()
    slow = {"instant": False, "decode_tokens_per_second": 200, "answer_tokens": 30}
    async with AsyncClient("127.0.0.1:1") as client:
        async with running(settings(tasks=store, drain_grace=0.0)) as (_, address):
            client.address = address
            queue = RequestQueue(client, concurrency=6)
            async with model_server(orchestrators=(address,), server_id="one", engine_settings=slow):
                submitting = [asyncio.create_task(queue.submit(f"question {n}", on_done=told)) for n in range(15)]
                await eventually(lambda: len(told.tasks) >= 2)
        before = queue.statistics()
        assert before.succeeded < 15
        port = int(address.rpartition(":")[2])
        async with running(settings(tasks=store, port=port)) as (_, address):
            async with model_server(orchestrators=(address,), server_id="one"):
                async with asyncio.timeout(60):
                    ids = await asyncio.gather(*submitting)
                    await queue.close()
                texts = [(await queue.result(id)).text for id in ids]
    assert len(set(ids)) == 15
    assert all(texts)
    assert sorted(task.id for task in told.tasks) == sorted(ids)
    assert queue.statistics().succeeded == 15
