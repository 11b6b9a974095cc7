"""Callbacks from the end of a task to the receiver: a real database, real HTTP."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import pytest_asyncio

from control_plane.api.notices import Notices
from control_plane.config import CallbackRetrySettings, CallbackSettings
from control_plane.delivery import check, deliverer, rules
from control_plane.domain.errors import DomainError
from control_plane.tasks.callbacks import CallbackState, DeliveryRecord
from control_plane.tasks.deliverer import Deliverer
from control_plane.tasks.deliveries import Deliveries
from control_plane.tasks.model import TaskState, Tenant
from control_plane.tasks.store import SqlTaskStore
from modelyard.program.settings import SettingsError
from tests.harness.kept_tasks import HERE, PLACE, claimed, fresh, open_tasks, succeeded
from tests.harness.postgres import Postgres, postgres
from tests.harness.programs import until
from tests.harness.receivers import PATIENCE, Receiver, receiver, reset, silence, status, verified

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
OLD_SECRET = "whsec_b2xkLW9sZC1vbGQtb2xkLW9sZC1vbGQtb2xkLW9sZA=="


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    with postgres("fsync=off") as running:
        yield running


@pytest_asyncio.fixture(params=["sqlite", "postgresql"])
async def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/tasks.db"
    running: Postgres = request.getfixturevalue("server")
    return await fresh(running)


@pytest_asyncio.fixture
async def hook() -> AsyncIterator[Receiver]:
    async with receiver() as kept:
        yield kept


def settings(**given: object) -> CallbackSettings:
    values: dict[str, object] = {
        "private_hosts": ("127.0.0.1:*",),
        "insecure_loopback": True,
        "max_attempts": 3,
        "timeout": 2.0,
        "retry": CallbackRetrySettings(base=0.02, factor=1.0, cap=0.02),
        **given,
    }
    return CallbackSettings(**values)  # type: ignore[arg-type]


class Desk:
    """A store and what delivers its callbacks."""

    def __init__(self, store: SqlTaskStore, given: CallbackSettings) -> None:
        self.store = store
        self.deliveries = Deliveries(store.database, rules(given))
        self.outcomes: list[str] = []
        made = deliverer(
            given,
            {given.secret_env: f"{SECRET} {OLD_SECRET}"},
            self.deliveries,
            Notices(store).render,
            self.outcomes.append,
        )
        assert made
        self.deliverer: Deliverer = made

    async def all(self) -> list[DeliveryRecord]:
        return await self.deliveries.page(HERE, (), "", 1000)

    async def until_state(self, state: CallbackState, count: int = 1) -> list[DeliveryRecord]:
        async def reached() -> list[DeliveryRecord]:
            found = [record for record in await self.all() if record.state is state]
            return found if len(found) >= count else []

        return await until(reached, PATIENCE)


@asynccontextmanager
async def desk(store: SqlTaskStore, **given: object) -> AsyncIterator[Desk]:
    made = Desk(store, settings(**given))
    task = asyncio.create_task(made.deliverer.run())
    try:
        yield made
        assert not task.done(), task
    finally:
        made.deliverer.stop()
        async with asyncio.timeout(PATIENCE):
            await task


async def test_a_callback_tells_of_the_end(tmp_path: Path, hook: Receiver) -> None:
    async with open_tasks(f"sqlite:///{tmp_path}/tasks.db") as store, desk(store) as made:
        id = await succeeded(store, hook.url, text="blue \u00fc")
        (received,) = await hook.until(1)
        assert verified(received, SECRET) and verified(received, OLD_SECRET)
        notice = received.notice
        assert notice["type"] == "task.succeeded"
        assert notice["task"]["id"] == id
        assert notice["task"]["result"]["text"] == "blue \u00fc"
        assert "spec" not in notice["task"]
        (record,) = await made.until_state(CallbackState.DELIVERED)
        assert (record.id, record.attempts, record.failure) == (received.id, 1, "")
        assert record.finished_at is not None
        assert made.outcomes == ["delivered"]


@pytest.mark.parametrize("end", ["failed", "cancelled", "expired"])
async def test_every_end_is_told(tmp_path: Path, hook: Receiver, end: str) -> None:
    async with open_tasks(f"sqlite:///{tmp_path}/tasks.db") as store, desk(store):
        claim = await claimed(store, hook.url)
        if end == "failed":
            await store.attempt_failed(claim.id, claim.epoch, "ENGINE_FAILED", "it broke", None)
        elif end == "cancelled":
            await store.cancel(HERE, claim.id)
        else:
            await store.expired(claim.id, claim.epoch)
        (received,) = await hook.until(1)
        assert received.notice["type"] == f"task.{end}"
        assert received.notice["task"]["state"] == f"TASK_STATE_{end.upper()}"


async def test_failures_are_repeated_under_the_same_id(tmp_path: Path, hook: Receiver) -> None:
    hook.behaviours = [status(500), reset, silence, status(302, Location="http://127.0.0.1:1/")]
    async with open_tasks(f"sqlite:///{tmp_path}/tasks.db") as store, desk(store, max_attempts=5, timeout=0.3) as made:
        await succeeded(store, hook.url)
        received = await hook.until(5)
        await made.until_state(CallbackState.DELIVERED)
        assert len({one.id for one in received}) == 1
        assert all(verified(one, SECRET) for one in received)
        assert made.outcomes == ["failed"] * 4 + ["delivered"]
    assert len(hook.received) == 5


async def test_dead_letters_are_kept_counted_and_sent_again(url: str, hook: Receiver) -> None:
    hook.then = status(503)
    async with open_tasks(url) as store, desk(store) as made:
        id = await succeeded(store, hook.url)
        (dead,) = await made.until_state(CallbackState.DEAD)
        assert (dead.attempts, dead.failure, dead.task_state) == (3, "the receiver answered 503", TaskState.SUCCEEDED)
        assert await made.deliveries.counts(HERE) == (0, 1)
        assert await made.deliveries.page(HERE, [CallbackState.DEAD], id, 10) == [dead]
        assert len(hook.received) == 3

        hook.then = status(200)
        again = await made.deliveries.resend(HERE, dead.id)
        assert (again.state, again.attempts, again.failure) == (CallbackState.PENDING, 0, "")
        await made.until_state(CallbackState.DELIVERED)
        assert len({one.id for one in hook.received}) == 1
        assert await made.deliveries.counts(HERE) == (0, 0)


async def test_410_ends_it_at_once(tmp_path: Path, hook: Receiver) -> None:
    hook.then = status(410)
    async with open_tasks(f"sqlite:///{tmp_path}/tasks.db") as store, desk(store) as made:
        await succeeded(store, hook.url)
        (dead,) = await made.until_state(CallbackState.DEAD)
        assert dead.attempts == 1


async def test_what_is_pending_survives_a_restart(tmp_path: Path, hook: Receiver) -> None:
    hook.then = status(500)
    async with open_tasks(f"sqlite:///{tmp_path}/tasks.db") as store, desk(store, max_attempts=100):
        await succeeded(store, hook.url)
        await hook.until(2)
    async with open_tasks(f"sqlite:///{tmp_path}/tasks.db") as store:
        deliveries = Deliveries(store.database, rules(settings()))
        (pending,) = await deliveries.page(HERE, [CallbackState.PENDING], "", 10)
        assert pending.attempts >= 2
        hook.then = status(200)
        async with desk(store) as made:
            await made.until_state(CallbackState.DELIVERED)
    assert len({one.id for one in hook.received}) == 1


async def test_one_that_dies_with_it_in_hand_leaves_it_to_others(tmp_path: Path, hook: Receiver) -> None:
    async with open_tasks(f"sqlite:///{tmp_path}/tasks.db") as store:
        await succeeded(store, hook.url)
        made = Desk(store, settings())
        # As if killed between sending and writing down what came of it.
        (taken,) = await made.deliveries.claim(10, 4, {}, lease=0.3)
        assert await made.deliveries.claim(10, 4, {}, lease=0.3) == []
        async with desk(store) as other:
            (record,) = await other.until_state(CallbackState.DELIVERED)
        assert (record.id, record.attempts) == (taken.id, 2)
        # Its own word comes too late.
        assert not await made.deliveries.again(taken.id, taken.attempts, 0.0, "late")
        assert not await made.deliveries.ended(taken.id, taken.attempts, CallbackState.DEAD, "late")


async def test_several_control_planes_send_each_callback_once(server: Postgres, hook: Receiver) -> None:
    database = await fresh(server)
    count = 30
    async with open_tasks(database) as one, open_tasks(database) as two, open_tasks(database) as three:
        async with desk(one, concurrency_per_host=8) as made, desk(two, concurrency_per_host=8), desk(three):
            await asyncio.gather(*(succeeded(one if n % 2 else two, hook.url) for n in range(count)))
            await made.until_state(CallbackState.DELIVERED, count)
    ids = [received.id for received in hook.received]
    assert len(ids) == len(set(ids)) == count


async def test_one_slow_host_does_not_hold_up_others(tmp_path: Path, hook: Receiver) -> None:
    async with open_tasks(f"sqlite:///{tmp_path}/tasks.db") as store, receiver() as slow:
        slow.then = silence
        for _ in range(12):
            await succeeded(store, slow.url)
        for _ in range(6):
            await succeeded(store, hook.url)
        async with desk(store, concurrency=5, concurrency_per_host=2, timeout=30.0) as made:
            await made.until_state(CallbackState.DELIVERED, 6)
            assert slow.most_at_once == 2
            assert hook.most_at_once <= 2
            slow.then = status(200)
            made.deliverer.stop()
            slow.break_off()


async def test_a_task_that_runs_again_is_told_of_once(tmp_path: Path, hook: Receiver) -> None:
    async with open_tasks(f"sqlite:///{tmp_path}/tasks.db") as store:
        claim = await claimed(store, hook.url)
        await store.cancel(HERE, claim.id)
        await store.retry(HERE, claim.id)
        full = await store.get(HERE, claim.id)
        assert full.lane_id
        (claim,) = await store.claim(full.lane_id, [PLACE])
        await store.succeeded(claim.id, claim.epoch, b"", 0)
        gone = await succeeded(store, hook.url)
        await store.delete(HERE, gone)
        async with desk(store) as made:
            await made.until_state(CallbackState.DELIVERED)

            async def settled() -> bool:
                return [record.state for record in await made.all()] == [CallbackState.DELIVERED]

            await until(settled, PATIENCE)
    assert [received.notice["type"] for received in hook.received] == ["task.succeeded"]


async def test_addresses_are_checked_again_when_it_is_sent(tmp_path: Path, hook: Receiver) -> None:
    async with open_tasks(f"sqlite:///{tmp_path}/tasks.db") as store:
        await succeeded(store, hook.url)
        async with desk(store, private_hosts=("127.0.0.2:*",)) as made:
            (dead,) = await made.until_state(CallbackState.DEAD)
            assert "tasks.callbacks.hosts" in dead.failure
            assert dead.attempts == 1
    assert hook.received == []


async def test_tenants_do_not_see_each_other(tmp_path: Path, hook: Receiver) -> None:
    other = Tenant("other")
    async with open_tasks(f"sqlite:///{tmp_path}/tasks.db") as store, desk(store) as made:
        await succeeded(store, hook.url)
        (record,) = await made.until_state(CallbackState.DELIVERED)
        assert await made.deliveries.page(other, (), "", 10) == []
        assert await made.deliveries.page(other, (), record.task_id, 10) == []
        assert await made.deliveries.counts(other) == (0, 0)
        with pytest.raises(Exception, match="no callback"):
            await made.deliveries.resend(other, record.id)


async def test_pages(url: str) -> None:
    async with open_tasks(url) as store:
        ids = [await succeeded(store, "https://hooks.example.org/") for _ in range(7)]
        deliveries = Deliveries(store.database, rules(settings()))
        found: list[DeliveryRecord] = []
        while page := await deliveries.page(HERE, (), "", 3, found[-1].id if found else ""):
            found += page
        assert [record.task_id for record in found] == ids[::-1]


def test_without_a_secret_nothing_starts(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="MODELYARD_CALLBACK_SECRETS"):
        check(settings(), {})
    with pytest.raises(SettingsError, match="secret_file"):
        check(settings(secret_file=str(tmp_path / "none")), {})
    check(settings(), {"MODELYARD_CALLBACK_SECRETS": SECRET})
    check(CallbackSettings(), {})


async def test_secrets_are_taken_from_the_file_as_it_is_now(tmp_path: Path, hook: Receiver) -> None:
    file = tmp_path / "secrets"
    file.write_text(OLD_SECRET)
    async with open_tasks(f"sqlite:///{tmp_path}/tasks.db") as store, desk(store, secret_file=str(file)):
        await succeeded(store, hook.url)
        await hook.until(1)
        file.write_text(f"{SECRET}\n{OLD_SECRET}\n")
        await succeeded(store, hook.url)
        first, second = await hook.until(2)
    assert verified(first, OLD_SECRET) and not verified(first, SECRET)
    assert verified(second, OLD_SECRET) and verified(second, SECRET)


async def test_nothing_of_it_is_logged(tmp_path: Path, hook: Receiver, caplog: pytest.LogCaptureFixture) -> None:
    hook.then = status(500)
    with caplog.at_level("DEBUG"):
        async with open_tasks(f"sqlite:///{tmp_path}/tasks.db") as store, desk(store) as made:
            await succeeded(store, f"{hook.url}?token=CANARY-QUERY", text="CANARY-TEXT")
            await made.until_state(CallbackState.DEAD)
    assert json.loads(hook.received[0].body)["task"]["result"]["text"] == "CANARY-TEXT"
    assert "CANARY" not in caplog.text
    assert SECRET.removeprefix("whsec_") not in caplog.text


async def test_an_outage_of_the_store_is_told_once(
    tmp_path: Path, hook: Receiver, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = 0

    async def away(*_: object) -> list[DeliveryRecord]:
        nonlocal tries
        tries += 1
        raise DomainError("STORE_UNAVAILABLE", "not now")

    async with open_tasks(f"sqlite:///{tmp_path}/tasks.db") as store, desk(store) as made:
        with monkeypatch.context() as outage:
            outage.setattr(made.deliveries, "claim", away)
            await succeeded(store, hook.url)

            async def tried_again() -> bool:
                made.deliverer._wake.set()
                return tries >= 4

            await until(tried_again, PATIENCE)
        made.deliverer._wake.set()
        await hook.until(1)
    told = [record.message for record in caplog.records if record.name == "control_plane.tasks.deliverer"]
    assert told == ["callbacks wait until the task store is back: STORE_UNAVAILABLE", "callbacks are sent again"]
