"""`client.tasks` against the published fake."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta

import pytest

from modelyard.client import (
    AsyncClient,
    Client,
    ConnectionFailed,
    DeadlineExceeded,
    IdempotencyConflict,
    InvalidRequest,
    NewTask,
    Submission,
    TaskFailed,
    UnknownTask,
    WrongState,
)
from modelyard.client._task_messages import submit_request
from modelyard.rpc.errors import Refusal
from modelyard.rpc.reasons import Reason
from modelyard.testing import FakeTaskQueue
from modelyard.v1 import task_queue_pb2


@pytest.fixture
async def fake() -> AsyncIterator[FakeTaskQueue]:
    async with FakeTaskQueue() as fake:
        yield fake


@pytest.fixture
async def client(fake: FakeTaskQueue) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(fake.address) as client:
        yield client


async def test_what_is_submitted(fake: FakeTaskQueue, client: AsyncClient) -> None:
    deadline = datetime(2100, 1, 2, tzinfo=UTC)
    task = await client.tasks.submit(
        "Why?",
        idempotency_key="k",
        group="g",
        task_labels={"a": "b"},
        deadline=deadline,
        max_attempts=7,
        attempt_timeout=1.5,
        callback="https://example.org/x",
        task_type="reasoning",
        priority="high",
        model="m",
        max_tokens=5,
    )
    assert (task.id, task.state, task.group, task.idempotency_key) == ("task-000001", "succeeded", "g", "k")
    assert (task.task_type, task.priority, task.max_attempts, task.done) == ("reasoning", "high", 7, True)
    spec = fake.tasks[task.id].spec
    assert spec.input.messages[0].content[0].text == "Why?" and spec.input.sampling.max_tokens == 5
    assert spec.deadline.ToDatetime(UTC) == deadline and not spec.HasField("not_before")
    assert spec.attempt_timeout.ToTimedelta() == timedelta(seconds=1.5)
    assert spec.callback.url == "https://example.org/x" and dict(spec.labels) == {"a": "b"}
    assert spec.requirements.model == "m"


def test_what_cannot_be_said() -> None:
    for wrong in (
        {"request_id": "x"},
        {"explain": True},
        {"max_attempts": 0},
        {"deadline": datetime(2100, 1, 1)},  # noqa: DTZ001
        {"deadline": 1e30},
        {"attempt_timeout": 1e30},
        {"task_type": "nonsense"},
        {"nonsense": 1},
    ):
        with pytest.raises((TypeError, ValueError)):
            submit_request("hi", **wrong)
    for option in ("not_before", "deadline", "attempt_timeout"):
        with pytest.raises(TypeError, match="seconds"):
            submit_request("hi", **{option: "x"})  # type: ignore[arg-type]
    soon = submit_request("hi", not_before=60).spec.not_before.ToDatetime(UTC)
    assert timedelta(seconds=50) < soon - datetime.now(UTC) <= timedelta(seconds=60)


async def test_everything_about_a_task(fake: FakeTaskQueue, client: AsyncClient) -> None:
    task = await client.tasks.submit("Why?")
    assert task.result is None and task.history == ()
    whole = await client.tasks.get(task.id)
    assert [event.type for event in whole.history] == ["submitted", "succeeded"]
    assert whole.result and whole.result.text == "Hello, world" and whole.result.server_id == "fake-1"
    assert whole.result.finish_reason == "stop"
    assert whole.spec and whole.spec["input"]["messages"][0]["content"] == [{"text": "Why?"}]
    json.dumps(whole.to_dict())
    assert (await client.tasks.result(task.id)).text == "Hello, world"


async def test_refusals_are_typed(fake: FakeTaskQueue, client: AsyncClient) -> None:
    await client.tasks.submit("Why?", idempotency_key="k")
    with pytest.raises(IdempotencyConflict):
        await client.tasks.submit("What?", idempotency_key="k")
    for call in (client.tasks.get("x"), client.tasks.cancel("x"), client.tasks.delete("x"), client.tasks.wait("x")):
        with pytest.raises(UnknownTask):
            await call
    with pytest.raises(WrongState):
        await client.tasks.retry("task-000001")


async def test_a_repeated_submit_is_one_task(fake: FakeTaskQueue) -> None:
    fake.inject_error("SubmitTask", Refusal(Reason.STORE_UNAVAILABLE, "away", retry_after=0.01), times=2)
    async with AsyncClient(fake.address, retries=2) as client:
        await client.tasks.submit("Why?")
    keys = {call.request.idempotency_key for call in fake.calls_of("SubmitTask")}
    assert len(keys) == 1 and keys != {""} and len(fake.calls) == 3


async def test_the_tenant_goes_with_every_call(fake: FakeTaskQueue) -> None:
    async with AsyncClient(fake.address, tenant="team-1") as client:
        task = await client.tasks.submit("Why?")
        await client.tasks.get(task.id)
        async for _ in client.tasks.watch(task.id):
            pass
        async for _ in client.tasks.list():
            pass
        async for _ in client.tasks.submit_many([NewTask("a")]):
            pass
        await client.tasks.stats()
    assert {call.metadata["modelyard-tenant"] for call in fake.calls} == {"team-1"}
    with pytest.raises(ValueError, match="tenant"):
        AsyncClient(fake.address, tenant="a b")


async def test_lists_are_read_in_pages(fake: FakeTaskQueue, client: AsyncClient) -> None:
    for n in range(7):
        await client.tasks.submit("Why?", group="even" if n % 2 == 0 else "odd")
    assert [task.id[-1] async for task in client.tasks.list(page_size=3)] == list("7654321")
    assert len(fake.calls_of("ListTasks")) == 3
    assert [task.id[-1] async for task in client.tasks.list(group="odd", states="succeeded")] == list("642")
    assert [task.id[-1] async for task in client.tasks.list(limit=2)] == list("76")
    assert fake.calls_of("ListTasks")[-1].request.page_size == 2


async def test_a_watch_survives_its_connection(fake: FakeTaskQueue, client: AsyncClient) -> None:
    fake.hold = True
    task = await client.tasks.submit("Why?")
    fake.cut("WatchTask", after=1)
    seen: list[str] = []

    async def watch() -> None:
        async for event in client.tasks.watch(task.id):
            seen.append(event.type)
            if event.task is not None:
                assert event.task.result and event.task.result.text == "Hello, world"

    watching = asyncio.create_task(watch())
    await fake.until(lambda: len(fake.calls_of("WatchTask")) == 1)
    fake.tell(fake.tasks[task.id], task_queue_pb2.TASK_EVENT_TYPE_RUNNING)
    await fake.until(lambda: len(fake.calls_of("WatchTask")) == 2)
    # The control plane dies and comes back at the same address.
    await fake.stop()
    await fake.start(fake.port)
    fake.finish(task.id)
    async with asyncio.timeout(20):
        await watching
    assert seen == ["submitted", "running", "succeeded"]
    assert fake.calls_of("WatchTask")[-1].request.after_event_id >= 1


async def test_watching_all(fake: FakeTaskQueue, client: AsyncClient) -> None:
    await client.tasks.submit("before")
    fake.cut("WatchTasks", after=2)
    seen = []
    async with contextlib.aclosing(client.tasks.watch_all(after=0)) as events:
        async for event in events:
            seen.append((event.id, event.type))
            if len(seen) == 2:
                await client.tasks.submit("after")
            if len(seen) == 4:
                break
    assert seen == [(1, "submitted"), (2, "succeeded"), (3, "submitted"), (4, "succeeded")]
    async with contextlib.aclosing(client.tasks.watch_all(states=["failed"])) as events:
        waiting = asyncio.ensure_future(anext(events))
        await fake.until(lambda: len(fake.calls_of("WatchTasks")) == 3)
        fake.hold = True
        task = await client.tasks.submit("later")
        fake.finish(task.id, task_queue_pb2.TASK_STATE_FAILED, "ENGINE_FAILED", "it broke")
        async with asyncio.timeout(10):
            event = await waiting
    assert (event.task_id, event.reason) == (task.id, "ENGINE_FAILED")


async def test_a_failed_task_is_an_exception_of_result_only(fake: FakeTaskQueue, client: AsyncClient) -> None:
    fake.hold = True
    task = await client.tasks.submit("Why?")
    with pytest.raises(DeadlineExceeded):
        await client.tasks.wait(task.id, timeout=0.05)
    fake.finish(task.id, task_queue_pb2.TASK_STATE_FAILED, "ENGINE_FAILED", "it broke")
    ended = await client.tasks.wait(task.id)
    assert (ended.state, ended.failure_reason) == ("failed", "ENGINE_FAILED")
    with pytest.raises(TaskFailed, match="it broke") as caught:
        await client.tasks.result(task.id)
    assert caught.value.reason == "ENGINE_FAILED" and caught.value.task == ended
    again = await client.tasks.retry(task.id)
    assert again.state == "queued"
    assert (await client.tasks.cancel(task.id)).state == "cancelled"
    await client.tasks.delete(task.id)
    assert task.id not in fake.tasks


async def test_nobody_there_is_told_at_once() -> None:
    async with FakeTaskQueue() as gone:
        address = gone.address
    async with AsyncClient(address) as client, asyncio.timeout(10):
        with pytest.raises(ConnectionFailed):
            async for _ in client.tasks.watch("x"):
                pass
        with pytest.raises(ConnectionFailed):
            async for _ in client.tasks.submit_many([NewTask("a")]):
                pass


async def test_patience_ends(fake: FakeTaskQueue, client: AsyncClient) -> None:
    fake.hold = True
    task = await client.tasks.submit("Why?")
    events = client.tasks.watch(task.id, patience=0.3)
    assert (await anext(events)).type == "submitted"
    await fake.stop()
    async with asyncio.timeout(10):
        with pytest.raises(ConnectionFailed):
            await anext(events)


# ---------------------------------------------------------------- submit_many ---


async def submitted(client: AsyncClient, tasks) -> list[Submission]:
    async with asyncio.timeout(30):
        return [each async for each in client.tasks.submit_many(tasks)]


async def test_many(fake: FakeTaskQueue, client: AsyncClient) -> None:
    found = await submitted(client, (NewTask(f"number {n}") for n in range(600)))
    assert [each.index for each in found] == list(range(600))
    assert all(each.created and each.task and each.error is None for each in found)
    texts = [task.spec.input.messages[0].content[0].text for task in fake.tasks.values()]
    assert texts == [f"number {n}" for n in range(600)]
    assert await submitted(client, []) == []
    json.dumps(found[0].to_dict())


@pytest.mark.parametrize("cut", [0, 1, 7, 19])
async def test_a_broken_batch_goes_on(fake: FakeTaskQueue, client: AsyncClient, cut: int) -> None:
    async def source() -> AsyncIterator[NewTask]:
        for n in range(20):
            yield NewTask(f"number {n}")

    found: list[Submission] = []
    # One that never began is not taken up again.
    first = client.tasks.submit_many([NewTask("first")])
    assert [each.index async for each in first] == [0]
    fake.cut("BatchSubmitTasks", after=max(cut, 1))
    fake.cut("BatchSubmitTasks", after=0)
    found = await submitted(client, source())
    assert [each.index for each in found] == list(range(20))
    texts = [task.spec.input.messages[0].content[0].text for task in fake.tasks.values()]
    assert texts == ["first", *(f"number {n}" for n in range(20))]


async def test_one_refused_does_not_stop_the_others(fake: FakeTaskQueue, client: AsyncClient) -> None:
    bad = NewTask("x")
    bad.request.spec.ClearField("input")
    found = await submitted(client, [NewTask("a"), bad, NewTask("b")])
    assert [each.task is not None for each in found] == [True, False, True]
    assert isinstance(found[1].error, InvalidRequest)


async def test_what_the_source_raises_comes_after_what_was_accepted(fake: FakeTaskQueue, client: AsyncClient) -> None:
    async def source() -> AsyncIterator[NewTask]:
        yield NewTask("a")
        raise OSError("the file is gone")

    found = []
    with pytest.raises(OSError, match="gone"):
        async for each in client.tasks.submit_many(source()):
            found.append(each.index)
    assert found == [0]


async def test_a_source_is_read_no_faster_than_it_is_accepted(fake: FakeTaskQueue, client: AsyncClient) -> None:
    read = 0

    async def source() -> AsyncIterator[NewTask]:
        nonlocal read
        for n in range(1000):
            read = n
            yield NewTask("a")

    fake.gate("BatchSubmitTasks")
    stream = client.tasks.submit_many(source())
    waiting = asyncio.ensure_future(anext(stream))
    await fake.until(lambda: bool(fake.calls))
    for _ in range(100):  # everything that can run without an answer has run
        await asyncio.sleep(0)
    assert 1 <= read <= 257
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)


# --------------------------------------------------------------------- without ---


async def test_without_asyncio(fake: FakeTaskQueue) -> None:
    def work() -> None:
        with Client(fake.address, tenant="t") as client:
            task = client.tasks.submit("Why?", idempotency_key="k")
            assert client.tasks.result(task.id, timeout=10).text == "Hello, world"
            assert [event.type for event in client.tasks.watch(task.id)] == ["submitted", "succeeded"]
            assert client.tasks.wait(task.id).done and client.tasks.get(task.id).state == "succeeded"
            # The source may use the client itself.
            many = client.tasks.submit_many(NewTask(client.tasks.get(task.id).state) for _ in range(3))
            assert [each.index for each in many] == [0, 1, 2]
            assert len(list(client.tasks.list(limit=3))) == 3
            assert next(client.tasks.watch_all(after=0)).id == 1
            assert client.tasks.stats().states == {"succeeded": 4}
            with pytest.raises(WrongState):
                client.tasks.cancel(task.id)
            with pytest.raises(WrongState):
                client.tasks.retry(task.id)
            client.tasks.delete(task.id)

    await asyncio.to_thread(work)
