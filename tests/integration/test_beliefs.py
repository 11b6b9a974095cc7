"""Beliefs from the SDK to the database and back, on SQLite and on PostgreSQL."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
import pytest_asyncio
from google.protobuf import struct_pb2

from control_plane.api.beliefs import BeliefsServicer
from control_plane.api.metrics import Metrics
from control_plane.tasks.beliefs import Beliefs
from control_plane.tasks.facts import BeliefRecord
from control_plane.tasks.model import Tenant
from control_plane.tasks.store import SqlTaskStore
from modelyard.client import AsyncClient, Belief, Client, Draining, InvalidRequest, UnknownBelief, Unsupported
from modelyard.rpc.channels import channel
from modelyard.rpc.server import bind, create_server, service_handler
from modelyard.v1 import belief_pb2, belief_pb2_grpc
from tests.harness.kept_tasks import HERE, fresh, open_tasks, succeeded
from tests.harness.postgres import Postgres, postgres

SERVICE = belief_pb2.DESCRIPTOR.services_by_name["Beliefs"]
PATIENCE = 20.0
OTHER = Tenant("other")


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    with postgres("fsync=off") as running:
        yield running


@pytest_asyncio.fixture(params=["sqlite", "postgresql"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[SqlTaskStore]:
    if request.param == "sqlite":
        url = f"sqlite:///{tmp_path}/tasks.db"
    else:
        url = await fresh(request.getfixturevalue("server"))
    async with open_tasks(url) as opened:
        yield opened


@dataclass
class Service:
    address: str
    servicer: BeliefsServicer
    beliefs: Beliefs | None


@asynccontextmanager
async def serving(beliefs: Beliefs | None, port: int = 0) -> AsyncIterator[Service]:
    servicer = BeliefsServicer(beliefs, Metrics())
    server = create_server()
    server.add_generic_rpc_handlers((service_handler(SERVICE, servicer),))
    bound = bind(server, "127.0.0.1", port)
    await server.start()
    try:
        yield Service(f"127.0.0.1:{bound}", servicer, beliefs)
    finally:
        servicer.stop_accepting()
        await server.stop(0.2)


@pytest_asyncio.fixture
async def client(store: SqlTaskStore) -> AsyncIterator[AsyncClient]:
    async with serving(Beliefs(store.database)) as service, AsyncClient(service.address) as made:
        yield made


@pytest_asyncio.fixture
async def small(tmp_path: Path) -> AsyncIterator[AsyncClient]:
    """On SQLite only: for what no database has a part in."""
    async with open_tasks(f"sqlite:///{tmp_path}/tasks.db") as opened:
        async with serving(Beliefs(opened.database)) as service, AsyncClient(service.address) as made:
            yield made


async def some(watch: AsyncGenerator[Belief, None], count: int) -> list[Belief]:
    async with asyncio.timeout(PATIENCE):
        return [await anext(watch) for _ in range(count)]


# ----------------------------------------------------------- put, get, list ---


async def test_what_was_put_is_there(client: AsyncClient) -> None:
    value = {"sky": "grey", "temperature": -3.5, "layers": [1, None, True, {"\u00fc": "\u0000\u2028"}], "empty": {}}
    put = await client.beliefs.put("weather/berlin", value, confidence=0.25, source="station-7")
    got = await client.beliefs.get("weather/berlin")
    assert got == put
    assert (got.value, got.confidence, got.source) == (value, 0.25, "station-7")
    assert got.version > 0 and got.updated_at is not None and not got.deleted

    again = await client.beliefs.put("weather/berlin", None)
    assert again.version > put.version
    assert ((await client.beliefs.get("weather/berlin")).value, again.confidence, again.source) == (None, 1.0, "")


async def test_deleted_and_unknown_are_the_same(client: AsyncClient) -> None:
    await client.beliefs.put("a", 1)
    await client.beliefs.delete("a")
    for key in ("a", "never"):
        with pytest.raises(UnknownBelief):
            await client.beliefs.get(key)
        with pytest.raises(UnknownBelief):
            await client.beliefs.delete(key)
    assert [belief async for belief in client.beliefs.list()] == []
    assert (await client.beliefs.put("a", 2)).value == 2


async def test_lists_are_ordered_by_character_and_paged(client: AsyncClient) -> None:
    keys = ["B", "a", "a/", "a/1", "a/10", "a/2", "a/Z", "a/\u00e9", "a0", "a_b", "a%", "\U0001f600"]
    await asyncio.gather(*(client.beliefs.put(key, key) for key in keys))
    await client.beliefs.delete("a/2")
    keys.remove("a/2")
    assert [belief.key async for belief in client.beliefs.list(page_size=2)] == sorted(keys)
    wanted = sorted(key for key in keys if key.startswith("a/"))
    assert [belief.key async for belief in client.beliefs.list("a/", page_size=2)] == wanted
    assert [belief.key async for belief in client.beliefs.list("a/", limit=3)] == wanted[:3]
    assert [belief.key async for belief in client.beliefs.list("a%")] == ["a%"]


async def test_versions_grow_for_all_who_write_at_once(client: AsyncClient) -> None:
    put = await asyncio.gather(*(client.beliefs.put(f"k-{n % 5}", n) for n in range(100)))
    assert len({belief.version for belief in put}) == 100
    latest = {belief.key: belief for belief in sorted(put, key=lambda belief: belief.version)}
    assert {belief.key: belief async for belief in client.beliefs.list()} == latest


async def test_tenants_are_apart(store: SqlTaskStore) -> None:
    async with serving(Beliefs(store.database)) as service:
        async with AsyncClient(service.address) as one, AsyncClient(service.address, tenant="other") as other:
            await one.beliefs.put("shared", "mine")
            with pytest.raises(UnknownBelief) as foreign:
                await other.beliefs.get("shared")
            with pytest.raises(UnknownBelief):
                await other.beliefs.delete("shared")
            assert [belief async for belief in other.beliefs.list()] == []
            await other.beliefs.put("shared", "theirs")
            assert (await one.beliefs.get("shared")).value == "mine"
            with pytest.raises(UnknownBelief) as absent:
                await other.beliefs.get("absent")
            assert str(foreign.value).replace("shared", "absent") == str(absent.value)
            async with aclosing(other.beliefs.watch(after=0)) as watch:
                assert [belief.value for belief in await some(watch, 1)] == ["theirs"]


async def test_the_end_of_a_task_is_a_belief(store: SqlTaskStore) -> None:
    async with serving(Beliefs(store.database)) as service, AsyncClient(service.address) as client:
        async with aclosing(client.beliefs.watch("tasks/", after=0)) as watch:
            id = await succeeded(store)
            (belief,) = await some(watch, 1)
            assert belief.key == f"tasks/{id}"
            assert belief.value["state"] == "succeeded"
            assert belief == await client.beliefs.get(f"tasks/{id}")
            await store.delete(HERE, id)
            (gone,) = await some(watch, 1)
            assert (gone.key, gone.deleted, gone.value) == (belief.key, True, None)


# ------------------------------------------------------------------- watch ---


async def test_a_watch_tells_what_is_there_and_what_comes(client: AsyncClient) -> None:
    await client.beliefs.put("a/1", 1)
    await client.beliefs.put("b/1", 1)
    async with aclosing(client.beliefs.watch("a/", after=0)) as watch:
        assert [belief.value for belief in await some(watch, 1)] == [1]
        for change in (("b/1", 2), ("a/2", 2), ("a/1", 3)):
            await client.beliefs.put(*change)
        await client.beliefs.delete("a/2")
        latest: dict[str, tuple[object, bool]] = {}
        versions = []
        while latest != {"a/1": (3, False), "a/2": (None, True)}:
            (belief,) = await some(watch, 1)
            latest[belief.key] = (belief.value, belief.deleted)
            versions.append(belief.version)
        assert versions == sorted(versions)


async def test_without_a_version_only_what_comes(store: SqlTaskStore) -> None:
    async with serving(Beliefs(store.database)) as service, AsyncClient(service.address) as client:
        await client.beliefs.put("old", 1)
        async with channel(service.address) as link:
            call = belief_pb2_grpc.BeliefsStub(link).WatchBeliefs(belief_pb2.WatchBeliefsRequest())
            first = await asyncio.wait_for(call.read(), PATIENCE)
            assert not first.HasField("belief")
            new = await client.beliefs.put("new", 2)
            assert new.version > first.version
            second = await asyncio.wait_for(call.read(), PATIENCE)
            assert (second.belief.key, second.version) == ("new", new.version)
            call.cancel()


async def test_watches_resume_where_they_broke(store: SqlTaskStore) -> None:
    seen: list[int] = []
    beliefs = Beliefs(store.database)
    async with serving(beliefs) as service:
        client = AsyncClient(service.address)
        port = int(service.address.rpartition(":")[2])
        watch = client.beliefs.watch(after=0)
        for n in range(3):
            await client.beliefs.put(f"k-{n}", n)
        seen += [belief.value for belief in await some(watch, 3)]
    # Written while there is nobody to tell of it.
    reading = asyncio.create_task(some(watch, 3))
    for n in range(3, 6):
        await beliefs.put(HERE, f"k-{n}", str(n), 1.0, "")
    async with serving(beliefs, port):
        seen += [belief.value for belief in await reading]
        await watch.aclose()
        await client.close()
    assert seen == [0, 1, 2, 3, 4, 5]


async def test_a_watch_tells_what_another_control_plane_writes(server: Postgres) -> None:
    url = await fresh(server)
    async with open_tasks(url) as one, open_tasks(url) as two:
        async with serving(Beliefs(one.database)) as service, AsyncClient(service.address) as client:
            async with aclosing(client.beliefs.watch("k", after=0)) as watch:
                for n in range(3):
                    await Beliefs(two.database).put(HERE, "k", str(n), 1.0, "")
                    (belief,) = await some(watch, 1)
                    assert belief.value == n


async def test_slow_readers_miss_values_between_never_the_latest(small: AsyncClient) -> None:
    """One that reads nothing while 400 large values are written to one key takes the latest soon after."""
    payload = "x" * 32_000
    async with channel(small.address, own_connection=True) as link:
        await small.beliefs.put("busy", {"n": -1, "payload": payload})
        call = belief_pb2_grpc.BeliefsStub(link).WatchBeliefs(belief_pb2.WatchBeliefsRequest(after_version=0))
        assert (await asyncio.wait_for(call.read(), PATIENCE)).belief.key == "busy"
        for n in range(400):
            await small.beliefs.put("busy", {"n": n, "payload": payload})
        read, last = 0, None
        while last != 399:
            message = await asyncio.wait_for(call.read(), PATIENCE)
            last = message.belief.value.struct_value.fields["n"].number_value
            read += 1
        call.cancel()
    assert read < 200, "each value was told"


async def test_drain_ends_watches_and_refuses_the_rest(store: SqlTaskStore) -> None:
    async with serving(Beliefs(store.database)) as service, AsyncClient(service.address) as client:
        watch = client.beliefs.watch(after=0, patience=0.0)
        await client.beliefs.put("a", 1)
        await some(watch, 1)
        reading = asyncio.create_task(some(watch, 1))
        service.servicer.stop_accepting()
        with pytest.raises(Draining):
            await asyncio.wait_for(reading, PATIENCE)
        with pytest.raises(Draining):
            await client.beliefs.put("a", 2)
        with pytest.raises(Draining):
            await client.beliefs.get("a")


async def test_without_a_store() -> None:
    async with serving(None) as service, AsyncClient(service.address) as client:
        with pytest.raises(Unsupported, match=r"tasks\.store"):
            await client.beliefs.get("a")
        with pytest.raises(Unsupported, match=r"tasks\.store"):
            await anext(client.beliefs.watch())


async def test_sync_client(small: AsyncClient) -> None:
    def work() -> list[object]:
        with Client(small.address) as client:
            client.beliefs.put("a/1", [1])
            client.beliefs.put("a/2", 2)
            first = next(client.beliefs.watch("a/", after=0))
            client.beliefs.delete("a/2")
            return [first.key, client.beliefs.get("a/1").value, [belief.key for belief in client.beliefs.list("a/")]]

    assert await asyncio.to_thread(work) == ["a/1", [1], ["a/1"]]


# --------------------------------------------------------------- bad input ---


@pytest.mark.parametrize(
    ("belief", "field"),
    [
        (belief_pb2.Belief(value=struct_pb2.Value(bool_value=True)), "belief.key"),
        (belief_pb2.Belief(key="k" * 501, value=struct_pb2.Value(bool_value=True)), "belief.key"),
        (belief_pb2.Belief(key="a\0b", value=struct_pb2.Value(bool_value=True)), "belief.key"),
        (belief_pb2.Belief(key="tasks/1", value=struct_pb2.Value(bool_value=True)), "belief.key"),
        (belief_pb2.Belief(key="k"), "belief.value"),
        (belief_pb2.Belief(key="k", value=struct_pb2.Value()), "belief.value"),
        (belief_pb2.Belief(key="k", value=struct_pb2.Value(number_value=math.nan)), "belief.value"),
        (belief_pb2.Belief(key="k", value=struct_pb2.Value(number_value=math.inf)), "belief.value"),
        (belief_pb2.Belief(key="k", value=struct_pb2.Value(string_value="x" * 65535)), "belief.value"),
        (belief_pb2.Belief(key="k", value=struct_pb2.Value(string_value="\u00fc" * 33000)), "belief.value"),
        (belief_pb2.Belief(key="k", value=struct_pb2.Value(bool_value=True), confidence=1.1), "belief.confidence"),
        (belief_pb2.Belief(key="k", value=struct_pb2.Value(bool_value=True), confidence=-0.1), "belief.confidence"),
        (belief_pb2.Belief(key="k", value=struct_pb2.Value(bool_value=True), confidence=math.nan), "belief.confidence"),
        (belief_pb2.Belief(key="k", value=struct_pb2.Value(bool_value=True), source="s" * 201), "belief.source"),
    ],
)
async def test_bad_beliefs_are_refused_by_field(small: AsyncClient, belief: belief_pb2.Belief, field: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        await small.beliefs._call("PutBelief", belief_pb2.PutBeliefRequest(belief=belief))
    assert [violation.field for violation in refused.value.violations] == [field]


async def test_the_largest_value_fits(small: AsyncClient) -> None:
    value = "x" * ((64 << 10) - 2)
    await small.beliefs.put("k", value)
    assert (await small.beliefs.get("k")).value == value


async def test_other_bad_requests(small: AsyncClient) -> None:
    for method, request in (
        ("GetBelief", belief_pb2.GetBeliefRequest()),
        ("DeleteBelief", belief_pb2.DeleteBeliefRequest(key="\x07")),
        ("ListBeliefs", belief_pb2.ListBeliefsRequest(page_size=1001)),
        ("ListBeliefs", belief_pb2.ListBeliefsRequest(page_size=-1)),
        ("ListBeliefs", belief_pb2.ListBeliefsRequest(prefix="p" * 501)),
        ("ListBeliefs", belief_pb2.ListBeliefsRequest(page_token="nonsense")),
        ("ListBeliefs", belief_pb2.ListBeliefsRequest(page_token="\u00fc")),
    ):
        with pytest.raises(InvalidRequest) as refused:
            await small.beliefs._call(method, request)
        assert refused.value.violations
    for n in range(3):
        await small.beliefs.put(f"a/{n}", n)
    page = await small.beliefs._call("ListBeliefs", belief_pb2.ListBeliefsRequest(prefix="a/", page_size=1))
    with pytest.raises(InvalidRequest, match="page_token"):
        stolen = belief_pb2.ListBeliefsRequest(prefix="b/", page_token=page.next_page_token)
        await small.beliefs._call("ListBeliefs", stolen)
    with pytest.raises(InvalidRequest, match="prefix"):
        await anext(small.beliefs.watch("\n"))


@pytest.mark.parametrize("value", [math.nan, math.inf, [math.nan], {"a": -math.inf}])
async def test_what_is_no_json_is_not_sent(value: object) -> None:
    async with AsyncClient("127.0.0.1:1") as client:
        with pytest.raises(ValueError, match="JSON"):
            await client.beliefs.put("k", value)  # type: ignore[arg-type]
        for wrong in ({1: 2}, {"a": {1}}, b"x", object()):
            with pytest.raises(TypeError):
                await client.beliefs.put("k", wrong)  # type: ignore[arg-type]


async def test_whole_numbers_come_back_as_they_were(small: AsyncClient) -> None:
    value = {"n": [5, -7, 2**53, -(2**53), 0, True], "f": 2.5, "large": 1e300}
    for belief in (await small.beliefs.put("k", value), await small.beliefs.get("k")):
        assert belief.value == value
        assert [type(n) for n in belief.value["n"]] == [int] * 5 + [bool] and type(belief.value["large"]) is float
    for large in (2**53 + 1, [-(2**53) - 1], {"a": 10**400}):
        with pytest.raises(ValueError, match="lose digits"):
            await small.beliefs.put("k", large)


async def test_too_large_versions_are_no_failure_of_ours(small: AsyncClient) -> None:
    async with channel(small.address) as link:
        call = belief_pb2_grpc.BeliefsStub(link).WatchBeliefs(belief_pb2.WatchBeliefsRequest(after_version=2**64 - 1))
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await asyncio.wait_for(call.read(), PATIENCE)
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


# ---------------------------------------------------------------- the store ---


async def test_since_counts_what_does_not_match_as_seen(store: SqlTaskStore) -> None:
    beliefs = Beliefs(store.database)
    for n in range(5):
        await beliefs.put(OTHER, f"k{n}", "1", 1.0, "")
    mine = await beliefs.put(HERE, "k", "1", 1.0, "")
    assert await beliefs.since(HERE, "", 0, 10) == ([mine], mine.version)
    assert await beliefs.since(HERE, "x", 0, 10) == ([], mine.version)
    found, position = await beliefs.since(OTHER, "", 0, 3)
    assert position == found[-1].version < mine.version
    assert [record.key for record in found] == ["k0", "k1", "k2"]
    assert await beliefs.last_version() == mine.version


async def test_writes_of_one_key_in_one_transaction(store: SqlTaskStore) -> None:
    beliefs = Beliefs(store.database)
    outcomes = await asyncio.gather(
        beliefs.put(HERE, "k", "1", 1.0, ""),
        beliefs.delete(HERE, "k"),
        beliefs.delete(HERE, "k"),
        beliefs.put(HERE, "k", "2", 1.0, ""),
        return_exceptions=True,
    )
    assert [type(one).__name__ for one in outcomes] == ["BeliefRecord", "NoneType", "DomainError", "BeliefRecord"]
    assert await beliefs.get(HERE, "k") == outcomes[3]
    assert isinstance(outcomes[0], BeliefRecord) and isinstance(outcomes[3], BeliefRecord)
    assert outcomes[0].version < outcomes[3].version
