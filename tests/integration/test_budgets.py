"""Budgets and usage through real servers: reserved, settled, shared, kept, and never exceeded."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from modelyard.client import AsyncClient, BudgetExhausted, UsageReport
from modelyard.program.settings import SettingsError
from modelyard.rpc.errors import Refusal, from_rpc_error
from modelyard.rpc.reasons import Reason
from modelyard.testing import FakeModelServer
from modelyard.testing.model_server import model_info
from modelyard.v1 import accounting_pb2, accounting_pb2_grpc, fleet_pb2, orchestrator_pb2, selection_pb2
from tests.harness.front_door import FrontDoor, Reply, ask, attached, front_door, succeeded
from tests.harness.gateway import CHAT, HELLO, http_door
from tests.harness.model_servers import model_server
from tests.harness.postgres import Postgres
from tests.harness.programs import until
from tests.harness.tickets import until_counted, until_direct
from tests.integration.test_cli import modelyard

PRICE = fleet_pb2.Price(prompt_usd_per_million_tokens=1, completion_usd_per_million_tokens=10)
COST = 31_000
"""Of one answer of three tokens to "Hello", 1e-9 US dollars."""
MOST = 20_000 + 30_000
"""Set aside for it: five estimated tokens of prompt, four times, and max_tokens=3."""
TEAM = (("modelyard-tenant", "team-a"),)


def paid(server_id: str = "paid", slots: int = 64, name: str = "paid") -> FakeModelServer:
    return FakeModelServer(server_id, [model_info(name, price=PRICE)], slots=slots)


def free(server_id: str = "free") -> FakeModelServer:
    capabilities = [fleet_pb2.Capability(task_type=1, score=0.01)]  # type: ignore[arg-type]
    return FakeModelServer(server_id, [model_info("free", capabilities=capabilities)], slots=64)


def hello(**more: Any) -> orchestrator_pb2.GenerateRequest:
    return ask(**{"max_tokens": 3, **more})


@pytest.fixture(params=["sqlite", "postgresql"])
async def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Of an empty store."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/tasks.db"
    return await shared(request)


async def shared(request: pytest.FixtureRequest) -> str:
    server: Postgres = request.getfixturevalue("postgres_server")
    return await server.tables()


@asynccontextmanager
async def door_with(url: str, *servers: FakeModelServer, **budgets: Any) -> AsyncIterator[FrontDoor]:
    async with front_door(tasks={"store": url}, budgets=budgets) as door, attached(door, *servers):
        yield door


async def usage(door: FrontDoor, tenant: str = "default", by: Any = ()) -> UsageReport:
    async with AsyncClient(door.address, tenant=tenant) as client:
        return await client.usage(by=by)


async def many(door: FrontDoor, count: int) -> list[Reply]:
    return await asyncio.gather(*(door.generate(hello()) for _ in range(count)))


# ---------------------------------------------------------------- exhaustion ---


async def test_a_thousand_at_once_never_exceed_the_budget(tmp_path: Path) -> None:
    affordable = 100
    limit = affordable * COST + MOST - COST  # the last one, too, is set aside in full before it is sent
    async with door_with(
        f"sqlite:///{tmp_path}/tasks.db", paid("a"), paid("b"), default={"usd_per_month": limit / 1e9}
    ) as door:
        replies = await many(door, 1000)
        good = succeeded(replies)
        spent = sum(reply.done.cost_nano_usd for reply in good)
        assert len(good) == affordable and spent == affordable * COST <= limit
        assert {reply.reason for reply in replies if reply.error} == {"BUDGET_EXHAUSTED"}
        report = await usage(door, by="server")
        (budget,) = report.budgets
        assert (budget.limit, budget.spent, report.total.cost_nano_usd) == (limit, spent, spent)
        assert (report.total.requests, report.total.failed) == (affordable, 0)
        assert {row.server_id for row in report.rows} == {"a", "b"}


async def test_the_refusal_says_what_is_left_and_when_it_renews(url: str) -> None:
    async with door_with(url, paid(), tenants={"team-a": {"usd_per_hour": 40e-6}}) as door:
        reply = await door.generate(hello(), metadata=TEAM)
        assert reply.refused.code.name == "RESOURCE_EXHAUSTED" and reply.reason == "BUDGET_EXHAUSTED"
        assert "0.000040 of 0.000040 US dollars left this hour" in reply.refused.message
        assert reply.refused.retry_after is None, "no window ever allows it"
        assert (await door.generate(hello())).done.cost_nano_usd == COST, "others have no budget"
        assert (await door.generate(hello(max_tokens=1), metadata=TEAM)).done  # 30,000
        again = await door.generate(hello(max_tokens=1), metadata=TEAM)
        assert again.reason == "BUDGET_EXHAUSTED"
        assert again.refused.retry_after is not None and 0 < again.refused.retry_after <= 3600
        async with AsyncClient(door.address, tenant="team-a") as client:
            with pytest.raises(BudgetExhausted) as caught:
                await client.generate("Hello", max_tokens=1)
        assert caught.value.retry_after


async def test_free_models_are_still_served_when_the_money_is_gone(tmp_path: Path) -> None:
    async with door_with(f"sqlite:///{tmp_path}/tasks.db", paid(), free(), default={"usd_total": MOST / 1e9}) as door:
        first = await door.generate(hello(explain=True))
        assert first.done.server_id == "paid", "the better one, while there is money"
        second = await door.generate(hello(explain=True))
        assert second.done.server_id == "free" and second.done.cost_nano_usd == 0
        explained = await door.explain(hello())
        for decision in (second.decisions[0], explained):
            (rejected,) = [one for one in decision.candidates if one.rejections]
            (rejection,) = rejected.rejections
            assert (rejected.server_id, rejection.reason) == ("paid", selection_pb2.REJECTION_REASON_BUDGET)
            assert not rejection.permanent and "0.000050 US dollars > 0.000019 left" in rejection.detail
        refused = await door.generate(hello(model="paid"))
        assert refused.reason == "BUDGET_EXHAUSTED" and refused.refused.retry_after is None


async def test_tokens_have_budgets_too_and_open_answers_are_bounded(tmp_path: Path) -> None:
    fake = free()
    async with door_with(
        f"sqlite:///{tmp_path}/tasks.db", fake, default={"tokens_per_day": 60}, max_output_tokens=30
    ) as door:
        assert (await door.generate(ask())).done
        assert fake.calls[-1].requests[0].input.sampling.max_tokens == 30, "what was set aside must be enough"
        assert fake.calls[-1].requests[0].input.messages[0].content[0].text == "Hello"
        assert (await door.generate(hello())).done
        assert fake.calls[-1].requests[0].input.sampling.max_tokens == 3
        (budget,) = (await usage(door)).budgets
        assert (budget.unit, budget.spent) == ("tokens", 8)
        assert (await door.generate(ask("x" * 200))).reason == "BUDGET_EXHAUSTED"


async def test_a_request_waits_for_what_others_may_give_back(tmp_path: Path) -> None:
    """Two cannot be set aside at the same time, but one costs less than was set aside for it."""
    fake, hold = paid(), asyncio.Event()
    fake.on_generate = lambda asked: (hold, "Hello", ", ", "world")
    async with door_with(f"sqlite:///{tmp_path}/tasks.db", fake, default={"usd_per_day": (MOST + COST) / 1e9}) as door:
        both = [asyncio.ensure_future(door.generate(hello())) for _ in range(2)]
        await fake.until(lambda: fake.calls)
        assert "costs more than is left" in (await door.explain(hello())).summary
        assert len(fake.calls) == 1
        hold.set()
        assert [reply.done.cost_nano_usd for reply in await asyncio.gather(*both)] == [COST, COST]


# ---------------------------------------------------------------- every way ---


async def test_every_way_of_a_request_is_counted_once(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/tasks.db"
    priced = {"answer_tokens": 5, "models": [{"name": "sim", "price": {"prompt": 1.0, "completion": 2.0}}]}
    async with http_door(tasks={"store": url}) as http:
        door = http.door
        async with model_server(
            server_id="sim", orchestrators=(door.address,), engine_settings=priced
        ), AsyncClient(door.address, tenant="team-a") as client:  # fmt: skip
            await until_direct(door, "sim")
            costs = []
            for direct in ("never", "always"):
                result = await client.generate("Hello", direct=direct, task_type="writing", max_tokens=5)  # type: ignore[arg-type]
                costs.append(round(result.cost_usd * 1e9))
            await until_counted(door, "ok", 1)
            done = await client.tasks.wait((await client.tasks.submit("Hello", max_tokens=5)).id)
            assert done.result is not None
            costs.append(round(done.result.cost_usd * 1e9))
            answer = await http.request("POST", CHAT, HELLO, x_modelyard_tenant="team-a")
            assert answer.status == 200
            await client.embed(["one", "two"])

            report = await client.usage(by=("task_type", "model", "server"))
            rows = {row.task_type: row for row in report.rows}
            assert {kind: (row.requests, row.failed) for kind, row in rows.items()} == {
                "writing": (2, 0), "chat": (2, 0), "embedding": (1, 0),
            }  # fmt: skip
            assert rows["writing"].cost_nano_usd == costs[0] + costs[1]
            assert {(row.model, row.server_id) for row in report.rows} == {("sim", "sim")}
            assert report.total.requests == 5 and report.total.estimated == 0
            assert not (await usage(door, "other")).total.requests, "nobody sees another's"
            hours = await client.usage(by="hour")
            assert sum(row.requests for row in hours.rows) == 5
            assert hours.rows[0].start is not None and hours.rows[0].start.minute == 0


async def test_what_came_of_a_failed_attempt_counts(tmp_path: Path) -> None:
    bad = paid("a")
    bad.answer("Hello", ", ", Refusal(Reason.ENGINE_FAILED, "a fault"))
    async with door_with(f"sqlite:///{tmp_path}/tasks.db", bad, default={"usd_per_day": 1}) as door:
        assert (await door.generate(hello())).reason == "STREAM_BROKEN"
        total = (await usage(door)).total
        assert (total.requests, total.failed, total.estimated) == (0, 1, 1)
        assert (total.prompt_tokens, total.completion_tokens) == (5, 2)
        assert total.cost_nano_usd == 25_000
        bad.answer(Refusal(Reason.SERVER_BUSY, "full"))
        assert (await door.generate(hello())).error
        report = await usage(door)
        assert report.total.completion_tokens == 2, "who refuses has done nothing"
        assert report.total.failed > 1
        assert report.budgets[0].spent == 25_000


async def test_an_answer_that_its_reader_leaves_in_direct_mode_counts(tmp_path: Path) -> None:
    slow = {"models": [{"name": "sim", "price": {"completion": 2.0}}], "instant": False, "answer_tokens": 10_000}
    async with front_door(
        tasks={"store": f"sqlite:///{tmp_path}/tasks.db"}, budgets={"default": {"usd_per_day": 1}}
    ) as door, model_server(
        server_id="sim", orchestrators=(door.address,), engine_settings=slow
    ), AsyncClient(door.address) as client:  # fmt: skip
        await until_direct(door, "sim")
        async with client.stream("Hello", direct="always", max_tokens=1000) as stream:
            async for _ in stream.deltas():
                break
        await until_counted(door, "cancelled", 1)
        report = await client.usage()
        assert (report.total.failed, report.total.estimated) == (1, 1)
        assert 0 < report.total.completion_tokens < 1000
        assert report.budgets[0].spent == report.total.cost_nano_usd > 0


async def test_tasks_wait_for_money(tmp_path: Path) -> None:
    async with (
        door_with(f"sqlite:///{tmp_path}/tasks.db", paid(), tenants={"default": {"usd_per_day": MOST / 1e9}}) as door,
        AsyncClient(door.address) as client,
    ):
        first = await client.tasks.submit("Hello", max_tokens=3)
        assert (await client.tasks.wait(first.id)).state == "succeeded"
        second = await client.tasks.submit("Hello", max_tokens=3)

        async def waits() -> bool:
            return "budget" in (await client.tasks.get(second.id)).waiting_for

        await until(waits)
        assert (await client.tasks.get(second.id)).state == "queued"
        rich = AsyncClient(door.address, tenant="rich")
        async with rich:
            third = await rich.tasks.submit("Hello", max_tokens=3)
            assert (await rich.tasks.wait(third.id)).state == "succeeded", "others do not wait for it"


async def test_the_gateway_says_it_in_openais_words(tmp_path: Path) -> None:
    async with (
        http_door(
            tasks={"store": f"sqlite:///{tmp_path}/tasks.db"}, budgets={"tenants": {"poor": {"usd_total": 0}}}
        ) as http,
        attached(http.door, paid()),
    ):
        assert (await http.request("POST", CHAT, HELLO)).status == 200
        refused = await http.request("POST", CHAT, HELLO, x_modelyard_tenant="poor")
        assert (refused.status, refused.error["code"]) == (429, "insufficient_quota")
        assert refused.headers["x-modelyard-reason"] == "BUDGET_EXHAUSTED"
        wrong = await http.request("POST", CHAT, HELLO, x_modelyard_tenant="not a name")
        assert wrong.status == 400


# ------------------------------------------------------------------- kept ---


async def test_a_restart_forgets_nothing(url: str) -> None:
    budget = {"default": {"usd_per_month": (2 * COST + MOST - 1) / 1e9}}
    async with door_with(url, paid(), **budget) as door:
        assert len(succeeded([await door.generate(hello()), await door.generate(hello())])) == 2
        before = await usage(door, by="model")
    async with door_with(url, paid(), **budget) as door:
        assert (await door.generate(hello())).reason == "BUDGET_EXHAUSTED"
        after = await usage(door, by="model")
        assert after.rows == before.rows and after.total.requests == 2
        assert [(b.spent, b.held_by_lost) for b in after.budgets] == [(2 * COST, 0)]


async def test_replicas_share_a_budget(request: pytest.FixtureRequest) -> None:
    url, affordable = await shared(request), 60
    limit = affordable * COST + MOST - COST
    budget = {"default": {"usd_per_day": limit / 1e9}}
    async with door_with(url, paid("a"), **budget) as one, door_with(url, paid("b"), **budget) as other:
        replies = await asyncio.gather(many(one, 150), many(other, 150))
        counts = Counter(reply.reason or "ok" for both in replies for reply in both)
        assert set(counts) == {"ok", "BUDGET_EXHAUSTED"}
        assert counts["ok"] * COST <= limit
        # All that fits is given out in the end, whoever held it in between.
        assert counts["ok"] == affordable
        assert all(succeeded(both) for both in replies)
        for door in (one, other):
            assert (await usage(door)).budgets[0].spent == counts["ok"] * COST


# --------------------------------------------------------- contract and CLI ---


async def test_what_may_be_asked_for(tmp_path: Path) -> None:
    async with door_with(f"sqlite:///{tmp_path}/tasks.db", free()) as door:
        stub = accounting_pb2_grpc.AccountingStub(door.channel)  # type: ignore[no-untyped-call]
        asked = accounting_pb2.GetUsageRequest

        async def refused(request: Any) -> list[str]:
            refusal = await door.refusal(stub.GetUsage(request))
            assert refusal.reason is Reason.INVALID_REQUEST
            return [violation.field for violation in refusal.violations]

        assert await refused(asked(group_by=[1, 99])) == ["group_by[1]"]
        assert await refused(asked(group_by=[1, 1])) == ["group_by"]
        assert await refused(asked(group_by=[5, 6])) == ["group_by"]
        assert await refused(asked(since={"seconds": 7200}, until={"seconds": 3600})) == ["until"]
        assert await refused(asked(since={"seconds": 1 << 60})) == ["since"]
        assert (await door.generate()).done
        day = await stub.GetUsage(asked(group_by=[6, 3]))
        assert [(row.start.seconds % 86400, row.server_id, row.requests) for row in day.rows] == [(0, "free", 1)]
        long_ago = await stub.GetUsage(asked(until={"seconds": 86400}))
        assert not long_ago.total.requests and not long_ago.rows and not long_ago.budgets


async def test_without_a_store_nothing_is_kept() -> None:
    async with front_door() as door:
        stub = accounting_pb2_grpc.AccountingStub(door.channel)  # type: ignore[no-untyped-call]
        with pytest.raises(Exception) as caught:
            await stub.GetUsage(accounting_pb2.GetUsageRequest())
        assert from_rpc_error(caught.value).reason is Reason.UNSUPPORTED  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match=r"tasks\.store"):
        async with front_door(budgets={"default": {"usd_per_day": 1}}):
            pass


async def test_the_command_line(tmp_path: Path) -> None:
    async with door_with(f"sqlite:///{tmp_path}/tasks.db", paid(), tenants={"team-a": {"usd_per_day": 1}}) as door:
        assert (await door.generate(hello(), metadata=TEAM)).done

        def run(*arguments: str) -> Any:
            return asyncio.to_thread(modelyard, "--address", door.address, "usage", *arguments)

        done = await run("--tenant", "team-a", "--since", "2d", "--by", "model,task-type")
        assert done.returncode == 0, done.stderr
        lines = [line.split() for line in done.stdout.splitlines()]
        assert ["paid", "chat", "1", "0", "1", "0", "3", "0.000031"] in lines
        assert any(line[:3] == ["US", "dollars", "a"] and line[3] == "day" for line in lines)
        told = json.loads((await run("--tenant", "team-a", "--by", "server", "--json")).stdout)
        assert told["rows"][0]["server_id"] == "paid" and told["budgets"][0]["spent"] == COST
        wrong = await run("--by", "colour")
        assert wrong.returncode == 2 and "'colour' is none of model" in wrong.stderr
