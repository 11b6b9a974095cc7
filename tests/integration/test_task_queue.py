"""The TaskQueue service over real gRPC, on a real SQLite store. Tests play the dispatcher."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from control_plane.api.task_queue import Batch
from control_plane.domain.errors import draining
from control_plane.tasks.model import Filter
from modelyard.rpc.channels import channel
from modelyard.rpc.errors import Refusal, from_rpc_error
from modelyard.v1 import task_queue_pb2 as pb
from modelyard.v1.task_queue_pb2 import (
    TASK_EVENT_TYPE_RETRIED,
    TASK_EVENT_TYPE_SUBMITTED,
    TASK_EVENT_TYPE_SUCCEEDED,
    TASK_STATE_CANCELLED,
    TASK_STATE_FAILED,
    TASK_STATE_QUEUED,
    TASK_STATE_RUNNING,
    TASK_STATE_SUCCEEDED,
)
from tests.harness.programs import until
from tests.harness.task_queue import MAX_REQUEST_BYTES, Queue, queue, spec

OTHER = (("modelyard-tenant", "other"),)


@pytest.fixture
async def door(tmp_path: Path) -> AsyncIterator[Queue]:
    async with queue(tmp_path) as door:
        yield door


def fields(refusal: Refusal) -> list[str]:
    return [violation.field for violation in refusal.violations]


# ------------------------------------------------------------------- submit ---


async def test_a_task_is_submitted_and_shown(door: Queue) -> None:
    task = await door.submit("Why?", "k-1", group="g", labels={"a": "b"}, priority=3, task_type=2, max_attempts=7)
    assert (task.state, task.group, task.idempotency_key) == (TASK_STATE_QUEUED, "g", "k-1")
    assert (task.priority, task.task_type, task.max_attempts, task.epoch) == (3, 2, 7, 0)
    assert not task.HasField("spec") and not task.HasField("finished_at") and not task.HasField("ready_at")
    assert abs(task.created_at.ToDatetime(UTC) - datetime.now(UTC)) < timedelta(seconds=60)
    whole = (await door.stub.GetTask(pb.GetTaskRequest(id=task.id))).task
    assert whole.spec == spec("Why?", group="g", labels={"a": "b"}, priority=3, task_type=2, max_attempts=7)
    assert [event.type for event in whole.history] == [TASK_EVENT_TYPE_SUBMITTED]
    assert whole.waiting_for.endswith("waits for a free slot")
    plain = await door.submit()
    assert (plain.priority, plain.task_type, plain.max_attempts) == (2, 1, 5)
    assert plain.id > task.id


async def test_what_a_finished_task_shows(door: Queue) -> None:
    task = await door.submit()
    (claim,) = await door.claim()
    await door.succeed(claim, "Because.")
    whole = (await door.stub.GetTask(pb.GetTaskRequest(id=task.id))).task
    assert whole.state == TASK_STATE_SUCCEEDED and whole.result.text == "Because."
    assert whole.HasField("finished_at") and whole.waiting_for == ""
    (attempt,) = whole.attempts
    assert (attempt.number, attempt.server_id, attempt.model, attempt.cost_nano_usd) == (1, "one", "swift", 1500)
    assert attempt.HasField("ended_at") and attempt.failure_reason == "" and attempt.epoch == whole.epoch == 1
    (listed,) = (await door.stub.ListTasks(pb.ListTasksRequest())).tasks
    assert not listed.HasField("result") and not listed.attempts and listed.attempt_count == 1


async def test_what_waits_for_its_time_says_so(door: Queue) -> None:
    later = datetime.now(UTC) + timedelta(hours=1)
    task = await door.submit(not_before=later)
    assert task.state == TASK_STATE_QUEUED
    assert abs(task.ready_at.ToDatetime(UTC) - later) < timedelta(milliseconds=1)
    whole = (await door.stub.GetTask(pb.GetTaskRequest(id=task.id))).task
    assert whole.waiting_for.startswith("it waits for its time, in 3")


async def test_the_same_key_is_the_same_task(door: Queue) -> None:
    calls = [door.stub.SubmitTask(pb.SubmitTaskRequest(spec=spec("a"), idempotency_key="k")) for _ in range(100)]
    answers = await asyncio.gather(*calls)
    assert len({answer.task.id for answer in answers}) == 1
    assert sum(answer.created for answer in answers) == 1
    other = spec("b", priority=3, max_attempts=2)
    refusal = await door.refusal(door.stub.SubmitTask(pb.SubmitTaskRequest(spec=other, idempotency_key="k")))
    assert refusal.reason == "IDEMPOTENCY_CONFLICT" and refusal.code is grpc.StatusCode.ALREADY_EXISTS
    assert refusal.metadata["task_id"] == answers[0].task.id
    assert refusal.metadata["differing"] == "spec.input.messages[0].content[0].text, spec.priority, spec.max_attempts"
    # Another tenant's keys are its own.
    theirs = await door.stub.SubmitTask(pb.SubmitTaskRequest(spec=other, idempotency_key="k"), metadata=OTHER)
    assert theirs.created


async def test_what_is_there_is_there_whatever_has_passed(door: Queue) -> None:
    deadline = datetime.now(UTC) + timedelta(seconds=0.3)
    task = await door.submit("a", "k", deadline=deadline, requirements={"model": "swift"})

    async def over() -> bool:
        return datetime.now(UTC) > deadline

    await until(over)
    door.known.models.clear()
    again = await door.stub.SubmitTask(
        pb.SubmitTaskRequest(spec=spec("a", deadline=deadline, requirements={"model": "swift"}), idempotency_key="k")
    )
    assert again.task.id == task.id and not again.created
    refusal = await door.refusal(door.submit("b", "k", deadline=deadline))
    assert refusal.reason == "IDEMPOTENCY_CONFLICT"
    assert fields(await door.refusal(door.submit("a", "new", deadline=deadline))) == ["spec.deadline"]


async def test_refused_tasks(door: Queue) -> None:
    assert (await door.refusal(door.submit(requirements={"model": "nobody"}))).reason == "UNKNOWN_MODEL"
    assert fields(await door.refusal(door.submit(preset="nonsense"))) == ["spec.preset"]
    assert fields(await door.refusal(door.submit(max_attempts=-1, priority=99, group="x" * 201))) == [
        "spec.priority",
        "spec.max_attempts",
        "spec.group",
    ]
    past = datetime.now(UTC) - timedelta(hours=1)
    assert fields(await door.refusal(door.submit(deadline=past))) == ["spec.deadline"]
    assert fields(await door.refusal(door.submit(key="k" * 201))) == ["idempotency_key"]
    large = await door.refusal(door.submit("x" * MAX_REQUEST_BYTES))
    assert large.reason == "INVALID_REQUEST" and "bytes" in large.message
    tenants = ["", "a b", "x" * 65, "ä"]
    for tenant in tenants[:3]:
        call = door.stub.GetQueueStats(pb.GetQueueStatsRequest(), metadata=(("modelyard-tenant", tenant),))
        assert fields(await door.refusal(call)) == ["modelyard-tenant"]
    twice = (("modelyard-tenant", "a"), ("modelyard-tenant", "b"))
    call = door.stub.GetQueueStats(pb.GetQueueStatsRequest(), metadata=twice)
    assert fields(await door.refusal(call)) == ["modelyard-tenant"]
    assert (await door.store.page("default", Filter(), 10)) == []  # nothing was written


async def test_a_preset_counts_for_routing_and_is_not_kept(door: Queue) -> None:
    task = await door.submit("hi", preset="fast_completion")
    whole = (await door.stub.GetTask(pb.GetTaskRequest(id=task.id))).task
    assert whole.spec == spec("hi", preset="fast_completion")
    (lane,) = await door.store.waiting_lanes()
    assert lane.lane.route.preset == "fast_completion"


# -------------------------------------------------------------------- batch ---


def batch(door: Queue, *requests: pb.BatchSubmitTasksRequest, **options: Any) -> Any:
    return door.stub.BatchSubmitTasks(iter(requests), **options)


async def test_a_batch_is_answered_in_order(door: Queue) -> None:
    requests = [pb.BatchSubmitTasksRequest(spec=spec(f"number {n}"), idempotency_key=f"k{n}") for n in range(1000)]
    requests[3].spec.max_attempts = 101
    requests[4].ClearField("spec")
    requests[5].idempotency_key = "k0"
    requests[6].CopyFrom(requests[0])
    answers = [answer async for answer in batch(door, *requests)]
    assert [answer.index for answer in answers] == list(range(1000))
    refused = {answer.index: answer.refusal for answer in answers if answer.HasField("refusal")}
    assert {index: refusal.reason for index, refusal in refused.items()} == {
        3: "INVALID_REQUEST",
        4: "INVALID_REQUEST",
        5: "IDEMPOTENCY_CONFLICT",
    }
    assert dict(refused[3].violations) == {"spec.max_attempts": "must be 1 to 100, not 101"}
    assert not answers[6].created and answers[6].task.id == answers[0].task.id
    ids = [answer.task.id for answer in answers if answer.created]
    assert ids == sorted(ids) and len(ids) == 996
    await door.in_flight.idle()


async def test_a_message_that_is_none_does_not_end_a_batch(door: Queue) -> None:
    good = pb.BatchSubmitTasksRequest(spec=spec()).SerializeToString()
    large = pb.BatchSubmitTasksRequest(spec=spec("x" * MAX_REQUEST_BYTES)).SerializeToString()
    requests = iter([good, b"\xff\xff", large, good])
    call = door.channel.stream_stream("/modelyard.v1.TaskQueue/BatchSubmitTasks")(requests)
    answers = [pb.BatchSubmitTasksResponse.FromString(raw) async for raw in call]
    assert [answer.refusal.reason for answer in answers] == ["", "INVALID_REQUEST", "INVALID_REQUEST", ""]


@pytest.mark.parametrize(("size", "most"), [(10, 256), (1 << 20, 17)])
async def test_a_batch_is_read_no_faster_than_it_is_written(size: int, most: int) -> None:
    read = 0
    written = asyncio.Event()

    async def endless() -> AsyncIterator[pb.BatchSubmitTasksRequest]:
        nonlocal read
        while True:
            read += 1
            yield pb.BatchSubmitTasksRequest(spec=spec("x" * size))

    async def submit(request: pb.BatchSubmitTasksRequest) -> Any:
        await written.wait()
        raise draining()

    batch = Batch(submit)
    reader = asyncio.create_task(batch.read(endless()))

    async def stands_still() -> bool:
        before = read
        for _ in range(50):
            await asyncio.sleep(0)
        return 0 < read == before

    await until(stands_still)
    assert read in (most - 1, most)
    written.set()
    for index in range(3 * most):
        answer = await batch.answer()
        assert answer is not None and (answer.index, answer.refusal.reason) == (index, "DRAINING")
    reader.cancel()
    await batch.close(reader)


async def test_draining_answers_what_was_read(door: Queue) -> None:
    read = asyncio.Event()

    async def some() -> AsyncIterator[pb.BatchSubmitTasksRequest]:
        for n in range(5):
            yield pb.BatchSubmitTasksRequest(spec=spec(f"number {n}"))
        await asyncio.Event().wait()

    call = door.stub.BatchSubmitTasks(some())
    answers = []
    try:
        async for answer in call:
            answers.append(answer.index)
            if len(answers) == 5:
                read.set()
                door.servicer.stop_accepting()
    except grpc.aio.AioRpcError as error:
        assert from_rpc_error(error).reason == "DRAINING"
    assert answers == [0, 1, 2, 3, 4]
    assert (await door.refusal(door.submit())).reason == "DRAINING"
    assert (await door.stub.ListTasks(pb.ListTasksRequest())).tasks  # reading goes on


# -------------------------------------------------------------------- lists ---


async def listed(door: Queue, size: int, **wanted: Any) -> list[list[str]]:
    pages, token = [], ""
    while True:
        page = await door.stub.ListTasks(
            pb.ListTasksRequest(filter=pb.TaskFilter(**wanted), page_size=size, page_token=token)
        )
        pages.append([task.id for task in page.tasks])
        token = page.next_page_token
        if not token:
            return pages


async def test_lists_in_pages(door: Queue) -> None:
    ids = [(await door.submit(f"{n}", group="even" if n % 2 == 0 else "odd", task_type=1 + n % 3)).id for n in range(9)]
    newest = list(reversed(ids))
    assert await listed(door, 4) == [newest[:4], newest[4:8], newest[8:]]
    assert await listed(door, 9) == [newest]
    assert await listed(door, 3, group="odd") == [[ids[7], ids[5], ids[3]], [ids[1]]]
    assert await listed(door, 100, task_types=[1]) == [[ids[6], ids[3], ids[0]]]
    assert await listed(door, 100, task_types=[0]) == [newest]
    assert await listed(door, 100, states=[TASK_STATE_RUNNING]) == [[]]
    await door.stub.CancelTask(pb.CancelTaskRequest(id=ids[4]))
    assert await listed(door, 100, states=[TASK_STATE_CANCELLED, TASK_STATE_RUNNING]) == [[ids[4]]]
    assert await listed(door, 100, states=[0, TASK_STATE_RUNNING]) == [newest]
    middle = (await door.stub.GetTask(pb.GetTaskRequest(id=ids[4]))).task.created_at
    assert await listed(door, 100, created_after=middle) == [newest[:5]]
    assert await listed(door, 100, created_before=middle) == [newest[5:]]


async def test_page_tokens_are_checked(door: Queue) -> None:
    for n in range(3):
        await door.submit(f"{n}", group="g")
    page = await door.stub.ListTasks(pb.ListTasksRequest(page_size=1))
    good = page.next_page_token
    assert len((await door.stub.ListTasks(pb.ListTasksRequest(page_size=2, page_token=good))).tasks) == 2
    for token, wanted in (
        ("nonsense", {}),
        ("ä", {}),
        (good[:-1], {}),
        (good, {"group": "g"}),
        (good[:8] + ("A" if good[8] != "A" else "B") + good[9:], {}),
        ("x" * 100_000, {}),
    ):
        request = pb.ListTasksRequest(filter=pb.TaskFilter(**wanted), page_token=token)
        assert fields(await door.refusal(door.stub.ListTasks(request))) == ["page_token"], token[:20]
    call = door.stub.ListTasks(pb.ListTasksRequest(page_token=good), metadata=OTHER)
    assert fields(await door.refusal(call)) == ["page_token"]
    request = pb.ListTasksRequest(page_size=1001, filter=pb.TaskFilter(states=[99], group="x" * 300))
    found = fields(await door.refusal(door.stub.ListTasks(request)))
    assert found == ["filter.states[0]", "filter.group", "page_size"]


async def test_stats(door: Queue) -> None:
    for n in range(3):
        await door.submit(f"{n}")
    await door.submit("x", priority=4, requirements={"model": "swift", "provider": "fake"})
    await door.stub.SubmitTask(pb.SubmitTaskRequest(spec=spec()), metadata=OTHER)
    stats = await door.stub.GetQueueStats(pb.GetQueueStatsRequest())
    assert [(each.state, each.count) for each in stats.states] == [(TASK_STATE_QUEUED, 4)]
    lanes = [(lane.priority, lane.model, lane.provider, lane.count) for lane in stats.lanes]
    assert lanes == [(2, "", "", 3), (4, "swift", "fake", 1)]
    assert all(lane.waiting_for.endswith("waits for a free slot") and lane.oldest_created_at for lane in stats.lanes)
    assert (stats.running_here, stats.workers, stats.last_event_id) == (3, 7, 5)


# ------------------------------------------------------------------- orders ---


async def test_cancel_retry_delete(door: Queue) -> None:
    task = await door.submit("a", "k")
    assert (await door.refusal(door.stub.RetryTask(pb.RetryTaskRequest(id=task.id)))).reason == "WRONG_STATE"
    assert (await door.refusal(door.stub.DeleteTask(pb.DeleteTaskRequest(id=task.id)))).reason == "WRONG_STATE"
    for _ in range(2):
        cancelled = (await door.stub.CancelTask(pb.CancelTaskRequest(id=task.id))).task
        assert cancelled.state == TASK_STATE_CANCELLED and cancelled.HasField("finished_at")
    again = (await door.stub.RetryTask(pb.RetryTaskRequest(id=task.id))).task
    assert again.state == TASK_STATE_QUEUED and not again.HasField("finished_at")
    (claim,) = await door.claim()
    await door.succeed(claim)
    assert (await door.refusal(door.stub.CancelTask(pb.CancelTaskRequest(id=task.id)))).reason == "WRONG_STATE"
    await door.stub.DeleteTask(pb.DeleteTaskRequest(id=task.id))
    refusal = await door.refusal(door.stub.DeleteTask(pb.DeleteTaskRequest(id=task.id)))
    assert refusal.reason == "UNKNOWN_TASK"
    assert (await door.submit("b", "k")).id != task.id  # the key is free again


async def test_another_tenants_task_is_like_none(door: Queue) -> None:
    task = await door.submit("a", "k")
    stub = door.stub
    for method, make in (
        (stub.GetTask, pb.GetTaskRequest),
        (stub.CancelTask, pb.CancelTaskRequest),
        (stub.RetryTask, pb.RetryTaskRequest),
        (stub.DeleteTask, pb.DeleteTaskRequest),
    ):
        theirs = await door.refusal(method(make(id=task.id), metadata=OTHER))
        absent = await door.refusal(method(make(id="0" * len(task.id)), metadata=OTHER))
        assert theirs.reason == absent.reason == "UNKNOWN_TASK"
        assert theirs.message.replace(task.id, "X") == absent.message.replace("0" * len(task.id), "X")
        assert fields(await door.refusal(method(make()))) == ["id"]
    for id in (task.id, "nobody"):
        watch = await failure(stub.WatchTask(pb.WatchTaskRequest(id=id), metadata=OTHER))
        assert watch.reason == "UNKNOWN_TASK"
    assert not (await stub.ListTasks(pb.ListTasksRequest(), metadata=OTHER)).tasks
    first = await stub.WatchTasks(pb.WatchTasksRequest(after_event_id=0), metadata=OTHER).read()
    assert not first.HasField("event")


async def failure(call: Any) -> Refusal:
    """Why a stream ends."""
    try:
        async with asyncio.timeout(10):
            while await call.read() is not grpc.aio.EOF:
                pass
    except grpc.aio.AioRpcError as error:
        return from_rpc_error(error)
    raise AssertionError("it ended well")


async def test_without_a_store_everything_is_unsupported(tmp_path: Path) -> None:
    async with queue(tmp_path, keeps=False) as door:
        for method in pb.DESCRIPTOR.services_by_name["TaskQueue"].methods:
            make = getattr(pb, method.input_type.name)
            if "id" in method.input_type.fields_by_name:
                make = partial(make, id="x")
            call = getattr(door.stub, method.name)
            if method.client_streaming:
                refusal = await failure(call(iter([make()])))
            elif method.server_streaming:
                refusal = await failure(call(make()))
            else:
                refusal = await door.refusal(call(make()))
            assert refusal.reason == "UNSUPPORTED", method.name


# ----------------------------------------------------------------- watching ---


class Watching:
    def __init__(self, call: Any) -> None:
        self.call = call

    async def next(self) -> Any:
        async with asyncio.timeout(10):
            message = await self.call.read()
        assert message is not grpc.aio.EOF
        return message

    async def types(self, count: int) -> list[int]:
        return [(await self.next()).event.type for _ in range(count)]


async def test_a_task_is_watched_to_its_end(door: Queue) -> None:
    task = await door.submit()
    watch = Watching(door.stub.WatchTask(pb.WatchTaskRequest(id=task.id)))
    assert await watch.types(1) == [TASK_EVENT_TYPE_SUBMITTED]
    (claim,) = await door.claim()
    await door.succeed(claim, "Because.")
    assert await watch.types(2) == [pb.TASK_EVENT_TYPE_SCHEDULED, pb.TASK_EVENT_TYPE_RUNNING]
    last = await watch.next()
    assert last.event.type == TASK_EVENT_TYPE_SUCCEEDED and last.task.result.text == "Because."
    assert last.task.attempts and not last.task.HasField("spec")
    assert await watch.call.read() is grpc.aio.EOF and await watch.call.code() is grpc.StatusCode.OK
    # Whoever comes later gets the same; whoever has seen it all gets nothing.
    later = [m async for m in door.stub.WatchTask(pb.WatchTaskRequest(id=task.id))]
    assert [m.event.type for m in later][-1] == TASK_EVENT_TYPE_SUCCEEDED and later[-1].task.result.text == "Because."
    assert [m.HasField("task") for m in later] == [False, False, False, True]
    resumed = [m async for m in door.stub.WatchTask(pb.WatchTaskRequest(id=task.id, after_event_id=later[1].event.id))]
    assert [m.event.id for m in resumed] == [m.event.id for m in later[2:]]
    position = later[-1].event.id
    assert [m async for m in door.stub.WatchTask(pb.WatchTaskRequest(id=task.id, after_event_id=position))] == []


async def test_an_end_that_was_none_does_not_end_a_watch(door: Queue) -> None:
    task = await door.submit()
    await door.stub.CancelTask(pb.CancelTaskRequest(id=task.id))
    await door.stub.RetryTask(pb.RetryTaskRequest(id=task.id))
    watch = Watching(door.stub.WatchTask(pb.WatchTaskRequest(id=task.id)))
    types = await watch.types(3)
    assert types == [TASK_EVENT_TYPE_SUBMITTED, pb.TASK_EVENT_TYPE_CANCELLED, TASK_EVENT_TYPE_RETRIED]
    await door.stub.CancelTask(pb.CancelTaskRequest(id=task.id))
    last = await watch.next()
    assert last.HasField("task") and last.task.state == TASK_STATE_CANCELLED
    assert await watch.call.read() is grpc.aio.EOF


async def test_all_tasks_are_watched(door: Queue) -> None:
    await door.submit("before", group="g")
    now = Watching(door.stub.WatchTasks(pb.WatchTasksRequest()))
    first = await now.next()
    assert not first.HasField("event") and first.position == 1
    all_of_it = Watching(door.stub.WatchTasks(pb.WatchTasksRequest(after_event_id=0)))
    of_group = Watching(door.stub.WatchTasks(pb.WatchTasksRequest(after_event_id=0, filter=pb.TaskFilter(group="g"))))
    code = Watching(door.stub.WatchTasks(pb.WatchTasksRequest(filter=pb.TaskFilter(task_types=[3]))))
    ended = pb.TaskFilter(states=[TASK_STATE_SUCCEEDED, TASK_STATE_FAILED])
    ends = Watching(door.stub.WatchTasks(pb.WatchTasksRequest(filter=ended, after_event_id=0)))
    assert not (await ends.next()).HasField("event") and not (await code.next()).HasField("event")
    await door.submit("other")
    programmed = await door.submit("code", task_type=3)
    claims = await door.claim(3)
    for claim in claims:
        await door.succeed(claim)
    seen = [await all_of_it.next() for _ in range(12)]
    assert [m.event.id for m in seen] == list(range(1, 13)) == [m.position for m in seen]
    assert [(await now.next()).event.id for _ in range(11)] == list(range(2, 13))
    assert {(await of_group.next()).event.group for _ in range(4)} == {"g"}
    assert {(await ends.next()).event.type for _ in range(3)} == {TASK_EVENT_TYPE_SUCCEEDED}
    assert {(await code.next()).event.task_id for _ in range(4)} == {programmed.id}
    for field in ("idempotency_key", "created_after", "created_before"):
        wanted = pb.TaskFilter(idempotency_key="k") if field == "idempotency_key" else pb.TaskFilter(**{field: {}})
        refusal = await failure(door.stub.WatchTasks(pb.WatchTasksRequest(filter=wanted)))
        assert fields(refusal) == [f"filter.{field}"]


async def test_many_watch_and_each_event_is_told_once(door: Queue) -> None:
    tasks = [await door.submit(f"{n}") for n in range(30)]
    watches = [Watching(door.stub.WatchTask(pb.WatchTaskRequest(id=task.id))) for task in tasks]
    everything = [Watching(door.stub.WatchTasks(pb.WatchTasksRequest(after_event_id=0))) for _ in range(10)]
    for watch in watches:
        assert await watch.types(1) == [TASK_EVENT_TYPE_SUBMITTED]
    for claim in await door.claim(30):
        await door.succeed(claim)
    for watch in watches:
        messages = [await watch.next() for _ in range(3)]
        assert messages[-1].HasField("task")
    for watch in everything:
        ids = [(await watch.next()).position for _ in range(120)]
        assert ids == list(range(1, 121))
        watch.call.cancel()
    feeds = door.servicer._feeds
    assert feeds is not None

    async def forgotten() -> bool:
        return not feeds.open

    await until(forgotten)


async def test_watches_end_with_the_process(door: Queue) -> None:
    task = await door.submit()
    one = Watching(door.stub.WatchTask(pb.WatchTaskRequest(id=task.id)))
    many = Watching(door.stub.WatchTasks(pb.WatchTasksRequest(after_event_id=0)))
    await one.next(), await many.next()
    door.servicer.stop_accepting()
    for watch in (one, many):
        assert (await failure(watch.call)).reason == "DRAINING"


async def test_a_watch_that_nobody_reads_is_cut_off(tmp_path: Path) -> None:
    async with queue(tmp_path, write_timeout=0.3) as door:
        # A window that is full after a few events.
        options = [("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0)]
        async with channel(door.address, options=options, own_connection=True) as link:
            method = link.unary_stream(
                "/modelyard.v1.TaskQueue/WatchTasks",
                request_serializer=pb.WatchTasksRequest.SerializeToString,
                response_deserializer=pb.WatchTasksResponse.FromString,
            )
            unread = method(pb.WatchTasksRequest(after_event_id=0))
            await unread.read()
            reader = Watching(door.stub.WatchTasks(pb.WatchTasksRequest(after_event_id=0)))
            requests = [pb.BatchSubmitTasksRequest(spec=spec(group="g" * 200)) for _ in range(3000)]
            answered = [answer async for answer in batch(door, *requests)]
            assert len(answered) == 3000
            ids = [(await reader.next()).position for _ in range(3001)]  # the other one does not suffer
            assert ids == [0, *range(1, 3001)]

            async def cut_off() -> bool:
                metrics = door.servicer.metrics.registry
                return bool(
                    metrics.get_sample_value(
                        "modelyard_requests_total", {"method": "WatchTasks", "outcome": "SLOW_READER"}
                    )
                )

            await until(cut_off)
            assert (await failure(unread)).reason == "SLOW_READER"
