"""What every task store promises, on SQLite and on PostgreSQL."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from sqlalchemy import func, select

from control_plane.domain.errors import DomainError
from control_plane.domain.learned import Learned
from control_plane.domain.model import ModelName, Provider, ServerId
from control_plane.domain.server import Failed
from control_plane.domain.task import Priority, TaskType
from control_plane.tasks import schema
from control_plane.tasks.model import (
    Changes,
    EventType,
    Filter,
    IdempotencyConflict,
    Lane,
    LaneId,
    NewTask,
    Retry,
    TaskId,
    TaskState,
    Tenant,
)
from control_plane.tasks.store import SqlTaskStore
from control_plane.tasks.transaction import Batch, Transaction
from tests.harness.postgres import Postgres
from tests.harness.task_store import LANE, PLACE, TENANT, claim, new_task, opened


@pytest.fixture(params=["sqlite", "postgresql"])
async def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/tasks.db"
    server: Postgres = request.getfixturevalue("postgres_server")
    return await server.tables()


@pytest.fixture
async def store(url: str) -> AsyncIterator[SqlTaskStore]:
    async with opened(url) as store:
        yield store


async def reason_of(call: object) -> str:
    with pytest.raises(DomainError) as caught:
        await call  # type: ignore[misc]
    return caught.value.reason


async def history(store: SqlTaskStore, id: TaskId, tenant: Tenant = TENANT) -> list[str]:
    return [event.type.name for event in (await store.get(tenant, id)).history]


# ------------------------------------------------------------------ life ---


async def test_a_task_from_submission_to_its_result(store: SqlTaskStore) -> None:
    submitted = (await store.submit(new_task("key", b"\0spec", group="g", task_type=TaskType.WRITING))).record
    assert (submitted.state, submitted.epoch, submitted.attempts) == (TaskState.QUEUED, 0, 0)
    (claimed,) = await claim(store, 2)
    assert (claimed.id, claimed.spec, claimed.lane, claimed.epoch) == (submitted.id, b"\0spec", LANE, 1)
    assert claimed.record.state is TaskState.SCHEDULED
    assert await store.started(claimed.id, 1)
    assert (await store.get(TENANT, claimed.id)).record.state is TaskState.RUNNING
    assert await store.succeeded(claimed.id, 1, b"result\xff", 42)
    full = await store.get(TENANT, claimed.id)
    assert (full.record.state, full.result, full.spec) == (TaskState.SUCCEEDED, b"result\xff", b"\0spec")
    assert full.record.finished_at is not None and full.record.finished_at >= full.record.created_at
    (attempt,) = full.attempts
    assert (attempt.number, attempt.epoch, attempt.server_id, attempt.model) == (1, 1, "server", "model")
    assert (attempt.cost_nano_usd, attempt.failure_reason) == (42, "") and attempt.ended_at is not None
    assert [(event.type.name, event.state.name) for event in full.history] == [
        ("SUBMITTED", "QUEUED"), ("SCHEDULED", "SCHEDULED"), ("RUNNING", "RUNNING"), ("SUCCEEDED", "SUCCEEDED"),
    ]  # fmt: skip
    assert full.history[-1].server_id == "server" and full.history[-1].group == "g"
    assert await store.waiting_lanes() == []


async def test_a_failed_attempt_is_queued_for_later_in_another_lane(store: SqlTaskStore) -> None:
    await store.submit(new_task())
    (first,) = await claim(store)
    other = Lane(TENANT, LANE.priority, LANE.route, failed=frozenset({Failed(ServerId("server"), "instance")}))
    ready_at = store.now() + 3600
    assert await store.attempt_failed(first.id, 1, "ENGINE_FAILED", "it broke", Retry(ready_at, other))
    record = (await store.get(TENANT, first.id)).record
    assert (record.state, record.failures, record.failure_reason) == (TaskState.QUEUED, 1, "ENGINE_FAILED")
    assert record.ready_at == pytest.approx(ready_at)
    assert await store.waiting_lanes() == []
    await store.cancel(TENANT, first.id)
    await store.retry(TENANT, first.id)
    (second,) = await claim(store)
    assert second.lane == LANE, "run again, it avoids nobody"
    assert await store.attempt_failed(second.id, second.epoch, "ENGINE_FAILED", "again", Retry(0.0, other))
    (third,) = await claim(store)
    assert third.lane == other and third.record.attempts == 3
    assert third.failed_models == (("server", "model", "ENGINE_FAILED"), ("server", "model", "ENGINE_FAILED"))
    assert await store.attempt_failed(third.id, third.epoch, "INVALID_REQUEST", "never", None)
    record = (await store.get(TENANT, first.id)).record
    assert (record.state, record.failure_reason, record.failure_message) == (
        TaskState.FAILED, "INVALID_REQUEST", "never",
    )  # fmt: skip


async def test_not_before_and_the_pause_before_a_retry_end_with_a_sweep(url: str) -> None:
    async with opened(url) as store:
        told: list[Changes] = []
        store.listen(told.append)
        await store.submit(new_task(not_before=store.now() + 0.05))
        later = await store.submit(new_task(not_before=store.now() + 3600))
        assert await store.waiting_lanes() == [], "no sweep, no change"
        while not await store.waiting_lanes():
            await asyncio.sleep(0.02)
            await store.sweep()
        assert any(changes.lanes for changes in told)
        assert len(await claim(store, 5)) == 1
        assert (await store.get(TENANT, later.record.id)).record.ready_at == pytest.approx(later.record.ready_at)


async def test_a_stale_epoch_never_writes(store: SqlTaskStore) -> None:
    id = (await store.submit(new_task())).record.id
    (old,) = await claim(store)
    assert await store.give_back(id, old.epoch, "DRAINING")
    (new,) = await claim(store)
    assert new.epoch > old.epoch
    before = await store.get(TENANT, id)
    for epoch in (old.epoch, old.epoch + 1, new.epoch + 1, 0):
        assert not await store.started(id, epoch)
        assert not await store.succeeded(id, epoch, b"stale", 1)
        assert not await store.attempt_failed(id, epoch, "ENGINE_FAILED", "", Retry(0.0, LANE))
        assert not await store.attempt_failed(id, epoch, "ENGINE_FAILED", "", None)
        assert not await store.expired(id, epoch)
        assert not await store.give_back(id, epoch, "")
    assert not await store.succeeded(TaskId("nothing"), 1, b"", 0)
    assert await store.get(TENANT, id) == before
    assert await store.succeeded(id, new.epoch, b"the one", 0)
    assert not await store.succeeded(id, new.epoch, b"second", 0)
    assert (await store.get(TENANT, id)).result == b"the one"


async def test_two_results_at_the_same_moment_are_one(store: SqlTaskStore) -> None:
    await store.submit(new_task())
    (claimed,) = await claim(store)
    answers = await asyncio.gather(*(store.succeeded(claimed.id, 1, b"%d" % i, 0) for i in range(20)))
    assert answers.count(True) == 1
    assert (await store.get(TENANT, claimed.id)).result == b"%d" % answers.index(True)


async def test_cancel_takes_a_running_task_away(store: SqlTaskStore) -> None:
    told: list[Changes] = []
    id = (await store.submit(new_task())).record.id
    (claimed,) = await claim(store)
    store.listen(told.append)
    assert (await store.cancel(TENANT, id)).state is TaskState.CANCELLED
    assert (id, claimed.epoch) in {pair for changes in told for pair in changes.ended}
    assert not await store.succeeded(id, claimed.epoch, b"", 0)
    again = await store.cancel(TENANT, id)
    assert again.state is TaskState.CANCELLED and again.epoch == claimed.epoch + 1
    assert await history(store, id) == ["SUBMITTED", "SCHEDULED", "CANCELLED"]
    assert (await store.get(TENANT, id)).attempts[0].ended_at is not None


async def test_states_that_do_not_allow_it_are_named(store: SqlTaskStore) -> None:
    id = (await store.submit(new_task())).record.id
    assert await reason_of(store.retry(TENANT, id)) == "WRONG_STATE"
    assert await reason_of(store.delete(TENANT, id)) == "WRONG_STATE"
    (claimed,) = await claim(store)
    await store.succeeded(id, claimed.epoch, b"", 0)
    assert await reason_of(store.cancel(TENANT, id)) == "WRONG_STATE"
    assert await reason_of(store.retry(TENANT, id)) == "WRONG_STATE"


async def test_another_tenants_task_is_like_none(store: SqlTaskStore) -> None:
    id = (await store.submit(new_task())).record.id
    other = Tenant("other")
    for tenant, task in ((other, id), (TENANT, TaskId("0" * 32))):
        for call in (store.get, store.cancel, store.retry, store.delete):
            assert await reason_of(call(tenant, task)) == "UNKNOWN_TASK"
        assert await reason_of(store.events(tenant, 0, 10, task)) == "UNKNOWN_TASK"
    assert await store.page(other, Filter(), 10) == []
    assert (await store.events(other, 0, 10))[0] == []
    assert sum((await store.counts(other)).values()) == 0


async def test_delete_forgets_everything(store: SqlTaskStore) -> None:
    id = (await store.submit(new_task("key", callback_url="https://example.org/x"))).record.id
    (claimed,) = await claim(store)
    await store.succeeded(id, claimed.epoch, b"result", 0)
    await store.delete(TENANT, id)
    assert await reason_of(store.get(TENANT, id)) == "UNKNOWN_TASK"
    assert await reason_of(store.delete(TENANT, id)) == "UNKNOWN_TASK"
    for table in (schema.tasks, schema.payloads, schema.results, schema.attempts, schema.events, schema.deliveries):
        assert await rows(store, table) == 0, table.name
    assert (await store.submit(new_task("key", b"another spec"))).created


async def rows(store: SqlTaskStore, table: object) -> int:
    query = select(func.count()).select_from(table)  # type: ignore[arg-type]
    return int(await store.database.read(lambda connection: connection.execute(query).scalar_one()))


async def test_the_end_leaves_a_belief_and_a_callback_to_deliver(store: SqlTaskStore) -> None:
    told: list[Changes] = []
    store.listen(told.append)
    id = (await store.submit(new_task(callback_url="https://example.org/hook"))).record.id
    (claimed,) = await claim(store)
    assert await rows(store, schema.deliveries) == await rows(store, schema.beliefs) == 0
    await store.succeeded(id, claimed.epoch, b"", 0)
    assert any(changes.deliveries and changes.beliefs and changes.events for changes in told)
    belief = await store.database.read(lambda connection: connection.execute(select(schema.beliefs)).one())
    assert (belief.tenant, belief.key, belief.source, belief.version) == (TENANT, f"tasks/{id}", "modelyard", 1)
    assert '"succeeded"' in belief.value and '"server"' in belief.value
    delivery = await store.database.read(lambda connection: connection.execute(select(schema.deliveries)).one())
    assert (delivery.task_id, delivery.url, delivery.task_state) == (id, "https://example.org/hook", 4)


# ------------------------------------------------------------ idempotency ---


async def test_the_same_key_a_hundred_times_at_once_is_one_task(store: SqlTaskStore) -> None:
    answers = await asyncio.gather(*(store.submit(new_task("key")) for _ in range(100)))
    assert sum(answer.created for answer in answers) == 1
    assert len({answer.record.id for answer in answers}) == 1
    with pytest.raises(IdempotencyConflict) as caught:
        await store.submit(new_task("key", b"other"))
    assert (caught.value.existing_id, caught.value.existing_spec) == (answers[0].record.id, b"spec")
    assert (await store.submit(new_task("key", tenant="other"))).created, "keys are the tenant's own"


async def test_one_conflict_among_many_submissions_harms_no_other(store: SqlTaskStore) -> None:
    await store.submit(new_task("key"))
    outcomes = await asyncio.gather(
        *(store.submit(new_task("key" if i == 5 else f"k{i}", b"other")) for i in range(10)), return_exceptions=True
    )
    assert [isinstance(outcome, IdempotencyConflict) for outcome in outcomes] == [i == 5 for i in range(10)]


# ------------------------------------------------------------------ order ---


async def test_a_lane_is_first_in_first_out(store: SqlTaskStore) -> None:
    ids = [(await store.submit(new_task())).record.id for _ in range(5)]
    ids += [answer.record.id for answer in await asyncio.gather(*(store.submit(new_task()) for _ in range(20)))]
    assert ids == sorted(ids)
    taken = []
    for count in (3, 7, 10, 10):
        taken += [claimed.id for claimed in await claim(store, count)]
    assert taken == ids


async def test_one_that_comes_back_keeps_its_place(store: SqlTaskStore) -> None:
    ids = [(await store.submit(new_task())).record.id for _ in range(3)]
    (first,) = await claim(store)
    await store.give_back(first.id, first.epoch, "DRAINING")
    assert [claimed.id for claimed in await claim(store, 3)] == ids


async def test_many_claims_of_one_lane_at_once_share_its_tasks(store: SqlTaskStore) -> None:
    ids = {(await store.submit(new_task())).record.id for _ in range(30)}
    (lane,) = await store.waiting_lanes()
    taken = await asyncio.gather(*(store.claim(lane.id, [PLACE] * 4) for _ in range(10)))
    flat = [claimed.id for claims in taken for claimed in claims]
    assert len(flat) == 30 and set(flat) == ids


async def test_a_claim_says_whether_its_lane_has_more(store: SqlTaskStore) -> None:
    for _ in range(4):
        await store.submit(new_task())
    (lane,) = await store.waiting_lanes()
    assert [claimed.more for claimed in await store.claim(lane.id, [PLACE])] == [True]
    together = await asyncio.gather(*(store.claim(lane.id, [PLACE]) for _ in range(2)))
    assert [claimed.more for claims in together for claimed in claims] == [True, True]
    (last,) = await store.claim(lane.id, [PLACE])
    assert not last.more
    assert await store.claim(lane.id, [PLACE]) == []


async def test_one_that_is_over_does_not_hide_those_behind_it(store: SqlTaskStore) -> None:
    over = [(await store.submit(new_task(deadline=store.now()))).record.id for _ in range(3)]
    ids = [(await store.submit(new_task())).record.id for _ in range(3)]
    (lane,) = await store.waiting_lanes()
    claims = await store.claim(lane.id, [PLACE] * 2)
    assert [claimed.id for claimed in claims] == ids[:2] and claims[-1].more
    assert {(await store.get(TENANT, id)).record.state for id in over} == {TaskState.EXPIRED}


async def test_lanes_are_told_with_their_oldest_task(store: SqlTaskStore) -> None:
    low = (await store.submit(new_task(priority=Priority.LOW))).record
    await store.submit(new_task(priority=Priority.LOW))
    high = (await store.submit(new_task(priority=Priority.HIGH, tenant="other"))).record
    lanes = {waiting.lane.priority: waiting for waiting in await store.waiting_lanes()}
    assert {priority: waiting.oldest for priority, waiting in lanes.items()} == {
        Priority.LOW: low.created_at, Priority.HIGH: high.created_at,
    }  # fmt: skip
    assert lanes[Priority.HIGH].lane.tenant == "other"
    chosen = lanes[Priority.LOW]
    assert await store.waiting_lanes([chosen.id, LaneId(999)]) == [chosen]
    assert (await store.waiting_count(chosen.id, 10), await store.waiting_count(chosen.id, 1)) == (2, 1)


# ------------------------------------------------------------------- time ---


async def test_deadlines_pass(store: SqlTaskStore) -> None:
    deadline = store.now() + 0.5
    taken, waits = [(await store.submit(new_task(deadline=deadline))).record.id for _ in range(2)]
    (claimed,) = await claim(store)
    assert claimed.id == taken
    await store.sweep()
    while store.now() <= deadline:
        await asyncio.sleep(0.01)
    await store.sweep()
    record = (await store.get(TENANT, waits)).record
    assert (record.state, record.failure_reason) == (TaskState.EXPIRED, "DEADLINE_EXCEEDED")
    assert (await store.get(TENANT, taken)).record.state is TaskState.SCHEDULED, "its dispatcher stops it"
    assert await store.expired(taken, claimed.epoch)
    again = await store.retry(TENANT, waits)
    assert (again.state, again.deadline) == (TaskState.QUEUED, None)


async def test_what_is_over_is_not_claimed(store: SqlTaskStore) -> None:
    id = (await store.submit(new_task(deadline=store.now()))).record.id
    (lane,) = await store.waiting_lanes()
    assert await store.claim(lane.id, [PLACE]) == []
    assert (await store.get(TENANT, id)).record.state is TaskState.EXPIRED


async def test_what_was_kept_long_enough_is_purged(url: str) -> None:
    async with opened(url, retention=0.05) as store:
        done = (await store.submit(new_task("done"))).record.id
        (claimed,) = await claim(store)
        await store.succeeded(done, claimed.epoch, b"", 0)
        waits = (await store.submit(new_task("waits"))).record.id
        await asyncio.sleep(0.1)
        await store.sweep()
        assert [record.id for record in await store.page(TENANT, Filter(), 10)] == [waits]
        for table in (schema.results, schema.attempts):
            assert await rows(store, table) == 0
        assert (await store.submit(new_task("done", b"other"))).created, "its key is free"


async def test_learned_statistics_are_kept(store: SqlTaskStore) -> None:
    one = Learned(ServerId("s"), ModelName("m"), Provider("p"), "f", 0.5, 12.0, ttft=0.25, requests=3)
    two = Learned(ServerId("s"), ModelName("n"), Provider("p"), "f", 1.0, 12.0)
    await store.keep_learned([one, two])
    newer = Learned(ServerId("s"), ModelName("m"), Provider("p"), "g", 0.75, 13.0)
    await store.keep_learned([newer])
    assert sorted(await store.learned(), key=lambda learned: learned.model) == [newer, two]


async def test_knowledge_is_kept_by_name(store: SqlTaskStore) -> None:
    await store.keep_knowledge({"a": "1", "b": "2"})
    await store.keep_knowledge({"b": "3"})
    await store.keep_knowledge({})
    assert await store.knowledge() == {"a": "1", "b": "3"}


# ---------------------------------------------------------------- reading ---


async def test_pages_and_filters(store: SqlTaskStore) -> None:
    types = (TaskType.CHAT, TaskType.WRITING)
    made = [
        (await store.submit(new_task(f"k{i}", group=f"g{i % 3}", task_type=types[i % 2]))).record for i in range(12)
    ]
    later = (await store.submit(new_task(not_before=store.now() + 3600))).record
    await store.cancel(TENANT, made[3].id)
    newest = [record.id for record in reversed([*made, later])]

    async def ids(filter: Filter, limit: int = 100, before: TaskId | None = None) -> list[TaskId]:
        return [record.id for record in await store.page(TENANT, filter, limit, before)]

    assert await ids(Filter()) == newest
    first = await ids(Filter(), 5)
    assert first + await ids(Filter(), 100, first[-1]) == newest
    assert await ids(Filter(states=(TaskState.CANCELLED,))) == [made[3].id]
    assert await ids(Filter(states=(TaskState.QUEUED,))) == [id for id in newest if id != made[3].id]
    assert await ids(Filter(group="g1"), 2) == [made[10].id, made[7].id]
    assert await ids(Filter(idempotency_key="k4")) == [made[4].id]
    assert await ids(Filter(task_types=(TaskType.WRITING,), group="g0")) == [made[9].id, made[3].id]
    cut = made[6].created_at
    assert await ids(Filter(created_after=cut)) == [record.id for record in reversed([*made, later])
                                                    if record.created_at >= cut]  # fmt: skip
    assert await ids(Filter(created_before=cut)) == [r.id for r in reversed(made) if r.created_at < cut]
    counts = await store.counts(TENANT)
    assert (counts[TaskState.QUEUED], counts[TaskState.CANCELLED], counts[TaskState.RUNNING]) == (12, 1, 0)


async def test_events_are_read_on_from_any_position(store: SqlTaskStore) -> None:
    a, b = [(await store.submit(new_task(group=group))).record.id for group in ("a", "b")]
    await store.submit(new_task(tenant="other"))
    lanes = await store.waiting_lanes()
    lane = next(waiting.id for waiting in lanes if waiting.lane.tenant == TENANT)
    claims = await store.claim(lane, [PLACE] * 2)
    await store.succeeded(a, claims[0].epoch, b"", 0)
    everything, end = await store.events(TENANT, 0, 100)
    assert end == await store.last_event_id() == 6
    assert [(event.task_id, event.type.name) for event in everything] == [
        (a, "SUBMITTED"), (b, "SUBMITTED"), (a, "SCHEDULED"), (b, "SCHEDULED"), (a, "SUCCEEDED"),
    ]  # fmt: skip
    seen, position = [], 0
    while position < end:
        some, position = await store.events(TENANT, position, 2)
        seen += some
    assert seen == everything
    assert [event.task_id for event in (await store.events(TENANT, 0, 100, b))[0]] == [b, b]
    done = Filter(states=(TaskState.SUCCEEDED,), task_types=(TaskType.CHAT,))
    assert [event.type for event in (await store.events(TENANT, 0, 100, filter=done))[0]] == [EventType.SUCCEEDED]
    assert [event.task_id for event in (await store.events(TENANT, 0, 9, filter=Filter(group="b")))[0]] == [b, b]
    assert await store.events(TENANT, end, 100) == ([], end)
    assert await store.events(TENANT, end + 50, 100) == ([], end + 50)


# ----------------------------------------------------------- group commit ---


async def test_many_writers_share_few_transactions(store: SqlTaskStore) -> None:
    took: list[float] = []
    store.database.committed = took.append

    async def client(number: int) -> None:
        for i in range(10):
            await store.submit(new_task(f"{number}-{i}"))

    await asyncio.gather(*(client(number) for number in range(64)))
    assert await rows(store, schema.tasks) == 640
    assert len(took) < 64, f"{len(took)} transactions for 640 tasks"


async def test_a_bad_command_harms_no_other(store: SqlTaskStore) -> None:
    # A lone surrogate is no text that a database takes.
    bad = NewTask(TENANT, b"spec", LANE, TaskType.CHAT, 3, group="\ud800")
    outcomes = await asyncio.gather(
        *(store.submit(bad if i == 3 else new_task(f"k{i}")) for i in range(8)), return_exceptions=True
    )
    assert [isinstance(outcome, Exception) for outcome in outcomes] == [i == 3 for i in range(8)]
    assert await rows(store, schema.tasks) == await rows(store, schema.payloads) == 7
    assert await store.last_event_id() == 7


async def test_an_operation_that_raises_is_undone_alone(store: SqlTaskStore) -> None:
    def good(transaction: Transaction) -> str:
        transaction.believe(TENANT, "good", "1")
        return "done"

    def bad(transaction: Transaction) -> str:
        transaction.believe(TENANT, "bad", "1")
        raise DomainError("UNKNOWN_BELIEF", "no such thing")

    outcomes = await asyncio.gather(
        store.database.write(good), store.database.write(bad), store.submit(new_task()), return_exceptions=True
    )
    assert outcomes[0] == "done" and isinstance(outcomes[1], DomainError) and not isinstance(outcomes[2], Exception)
    keys = await store.database.read(
        lambda connection: connection.execute(select(schema.beliefs.c.key)).scalars().all()
    )
    assert keys == ["good"]


async def test_a_cancelled_caller_leaves_no_task_in_hand(store: SqlTaskStore) -> None:
    await store.submit(new_task())
    (lane,) = await store.waiting_lanes()
    claiming = asyncio.create_task(store.claim(lane.id, [PLACE]))
    await asyncio.sleep(0)
    claiming.cancel()
    with pytest.raises(asyncio.CancelledError):
        await claiming
    assert (await store.counts(TENANT))[TaskState.QUEUED] == 1
    assert len(await claim(store)) == 1


async def test_after_closing_everything_is_refused(url: str) -> None:
    async with opened(url) as store:
        writes = [asyncio.create_task(store.submit(new_task())) for _ in range(5)]
        await asyncio.sleep(0)
        await store.close()
        assert all(write.result().created for write in writes), "what was accepted is written"
        assert await reason_of(store.submit(new_task())) == "STORE_UNAVAILABLE"
        assert await reason_of(store.counts(TENANT)) == "STORE_UNAVAILABLE"
        await store.close()
    async with opened(url) as store:
        assert (await store.counts(TENANT))[TaskState.QUEUED] == 5


async def test_commands_of_a_kind_are_applied_together(store: SqlTaskStore) -> None:
    sizes: list[int] = []

    def apply(transaction: Transaction, commands: object) -> list[int]:
        sizes.append(len(list(commands)))  # type: ignore[call-overload]
        return [command * 2 for command in commands]  # type: ignore[attr-defined]

    kind: Batch[int, int] = Batch("double", 50, apply)
    assert await asyncio.gather(*(store.database.apply(kind, i) for i in range(10))) == [2 * i for i in range(10)]
    assert sizes == [10]
