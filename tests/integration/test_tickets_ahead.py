"""Tickets of direct mode that are asked for ahead of need: at the control plane, and in the SDK."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest

from modelyard.client import AsyncClient, Client
from modelyard.client._ahead import room
from modelyard.rpc.errors import Refusal
from modelyard.v1 import orchestrator_pb2
from tests.harness.front_door import PATIENCE, FrontDoor, ask, front_door
from tests.harness.model_servers import model_server
from tests.harness.programs import until
from tests.harness.tickets import assign, counted, until_counted, until_direct, use

QUICK = {"report_interval": 0.05}
LONG: dict[str, Any] = {
    "fleet": QUICK, "limits": {"ticket_lifetime": 60, "ticket_ahead_lifetime": 60}, "drain_grace": 0,
}  # fmt: skip
"""Nothing expires while a test runs, nor is that waited for in the end."""
PRICE = {"prompt": 1.0, "completion": 10.0}


def serving(door: FrontDoor, server_id: str = "a", **engine: Any) -> Any:
    """A server with slots to spare that is known to be quick with prompts."""
    settings = {"slots": 16, "prefill_tokens_per_second": 1e7, **engine}
    return model_server(server_id=server_id, orchestrators=(door.address,), engine_settings=settings)


def total(door: FrontDoor, name: str, **labels: str) -> int:
    return int(door.plane.metrics.registry.get_sample_value(name, labels) or 0)


def asked(door: FrontDoor) -> int:
    """Assign calls that were answered."""
    return total(door, "modelyard_requests_total", method="Assign", outcome="ok")


def waited_for(door: FrontDoor) -> int:
    """Of those, the ones that were not ahead."""
    return total(door, "modelyard_queue_seconds_count", priority="normal")


async def until_ahead(door: FrontDoor) -> orchestrator_pb2.AssignResponse:
    """A ticket ahead of need, as soon as there is one to be had."""

    async def granted() -> orchestrator_pb2.AssignResponse | None:
        ticket = await assign(door, ahead=True)
        return ticket if ticket.ticket else None

    found: orchestrator_pb2.AssignResponse = await until(granted, PATIENCE)
    return found


# --------------------------------------------------------- control plane ---


async def test_it_is_used_once_and_counted_like_any_other() -> None:
    async with front_door() as door, serving(door) as server:
        await until_direct(door, "a")
        ticket = await assign(door, ahead=True, max_tokens=3, explain=True, timeout=PATIENCE)
        assert ticket.server_id == "a" and ticket.endpoint == server.address and ticket.sampling.max_tokens == 3
        assert ticket.valid_for.ToNanoseconds() == 1e9 and not ticket.HasField("decision")
        assert ticket.time_limit.seconds > 500, "the deadline of this call is not that of the next"
        status = await door.server("a")
        assert (status.in_flight, status.assigned) == (1, 1)
        assert not isinstance(await use(ticket, server.stub), Refusal)
        replayed = await use(ticket, server.stub)
        assert isinstance(replayed, Refusal) and "used before" in str(replayed)
        await door.until_idle()
        status = await door.server("a")
        assert (status.models[0].requests, counted(door, "ok"), waited_for(door)) == (1, 1, 0)
        assert status.models[0].HasField("ttft")


async def test_one_that_is_not_used_ends_before_others_do() -> None:
    limits = {"ticket_lifetime": 60, "ticket_ahead_lifetime": 0.2}
    async with front_door(fleet=QUICK, limits=limits) as door, serving(door) as server:
        await until_direct(door, "a")
        kept = await assign(door)
        ticket = await until_ahead(door)  # the prompt of the other is in the way at first
        await until_counted(door, "unused", 1)
        late = await use(ticket, server.stub)
        assert isinstance(late, Refusal) and "expired" in str(late)
        assert (await door.server("a")).assigned == 1
        assert not isinstance(await use(kept, server.stub), Refusal)
        await door.until_idle()


async def test_it_lives_no_longer_than_others() -> None:
    async with front_door(limits={"ticket_lifetime": 0.5}, drain_grace=0) as door, serving(door):
        await until_direct(door, "a")
        assert (await assign(door, ahead=True)).valid_for.ToNanoseconds() == 5e8


async def test_a_quarter_of_the_slots_at_most_until_they_are_in_use() -> None:
    hang: dict[str, Any] = {"slots": 8, "faults": [{"kind": "hang", "tokens": 1}]}
    async with front_door(**LONG) as door, serving(door, **hang) as server:
        await until_direct(door, "a")
        first, second, third = [await assign(door, ahead=True, request_id=name) for name in "xyz"]
        assert first.ticket and second.ticket
        assert third == orchestrator_pb2.AssignResponse(request_id="z"), "no error, and nothing else in it"
        using = asyncio.create_task(use(first, server.stub))
        assert await until_ahead(door), "a report has named it"
        using.cancel()
        await until_counted(door, "cancelled", 1)


async def test_several_at_a_time_are_each_good_for_one_call() -> None:
    async with front_door(**LONG) as door, serving(door, slots=32) as server:
        await until_direct(door, "a")
        first = await assign(door, ahead=True, ahead_requests=16, request_id="mine")
        tickets = [first, *first.more]
        assert len(tickets) == 4 and first.request_id == "mine", "an eighth of the slots"
        assert len({each.request_id for each in tickets}) == len({each.ticket for each in tickets}) == 4
        assert (await door.server("a")).assigned == 4
        for each in tickets:
            assert each.server_id == "a" and (each is first or not each.more)
            assert not isinstance(await use(each, server.stub), Refusal)
            assert isinstance(await use(each, server.stub), Refusal), "once"
        await until_counted(door, "ok", 4)
        alone = await assign(door, ahead_requests=16)
        assert alone.ticket and not alone.more, "only of use with `ahead`"
        assert not isinstance(await use(alone, server.stub), Refusal)
        await door.until_idle()


async def test_none_where_slots_are_short_or_somebody_waits() -> None:
    async with front_door(**LONG) as door, serving(door, slots=4), serving(door, "b", slots=1):
        await until_direct(door, "a", "b")
        for _ in range(2):
            await assign(door, server_id="a")
        assert not (await assign(door, ahead=True, server_id="a")).ticket, "one of four would be free"
        assert not (await assign(door, ahead=True, server_id="b")).ticket, "the only one"
    async with front_door(**LONG) as door, serving(door), serving(door, "b", slots=1):
        await until_direct(door, "a", "b")
        assert (await assign(door, ahead=True, server_id="a")).ticket
        await assign(door, server_id="b")
        waiting = asyncio.create_task(assign(door, server_id="b"))

        async def queued() -> bool:
            return sum(door.plane.scheduler.depth().values()) == 1

        await until(queued)
        assert not (await assign(door, ahead=True, server_id="a")).ticket
        waiting.cancel()


async def test_it_does_not_hold_up_the_prompts_of_others() -> None:
    slow: dict[str, Any] = {
        "instant": False,
        "prefill_tokens_per_second": 1000,
        "decode_tokens_per_second": 1000,
        "answer_tokens": 2,
    }
    async with front_door(**LONG) as door, serving(door, **slow) as server:
        await until_direct(door, "a")
        for _ in range(3):  # it is known how slow it is
            await door.generate(ask("word " * 100))
        await door.until_idle()
        ticket = await assign(door, ahead=True, prompt_tokens=3000)
        assert ticket.ticket
        assert door.plane.fleet.table.lane_until[0] <= door.plane.fleet.server("a").flights.copy().pop().began
        reply = await door.generate(ask("Hello", explain=True))
        assert reply.done.timings.queued.ToNanoseconds() < 1e9 and reply.decisions[0].server_id == "a"
        # One that waits for its first token does: that is what the other is spared.
        await assign(door, prompt_tokens=3000)
        assert not (await assign(door, ahead=True)).ticket
        assert not isinstance(await use(ticket, server.stub), Refusal)


async def test_the_budget_covers_what_comes(tmp_path: Path) -> None:
    async with front_door(
        **LONG, tasks={"store": f"sqlite:///{tmp_path}/tasks.db"}, budgets={"default": {"usd_per_month": 10e-3}}
    ) as door, serving(door, models=[{"name": "paid", "price": PRICE}]) as server:  # fmt: skip
        await until_direct(door, "a")
        most = 51 * 4 * 1000 + 3 * 10_000
        calls = 0

        async def granted() -> orchestrator_pb2.AssignResponse | None:
            nonlocal calls
            ticket = await assign(door, ahead=True, prompt_tokens=50, max_tokens=3)
            if ticket.ticket:
                return ticket
            calls += 1
            assert (await door.generate(ask(max_tokens=3))).done
            return None

        # At first there is not so much at hand; while there are requests, what is kept there follows their size.
        assert await granted() is None
        ticket = await until(granted, PATIENCE, every=0.1)
        (charge,) = [each.charge for each in door.plane.fleet.server("a").flights if each.assigned]
        assert charge.reservation is not None and charge.reservation.amounts.nano_usd == most
        assert not (await assign(door, ahead=True, prompt_tokens=2000, max_tokens=3)).ticket
        assert not isinstance(await use(ticket, server.stub), Refusal)
        async with AsyncClient(door.address) as client:

            async def settled() -> bool:
                report = await client.usage()
                (budget,) = report.budgets
                return report.total.requests == calls + 1 and budget.spent == report.total.cost_nano_usd

            await until(settled, PATIENCE)
        assert charge.used is not None and charge.used.prompt * 1000 + charge.used.completion * 10_000 <= most


# -------------------------------------------------------------------- SDK ---


async def held(client: AsyncClient) -> orchestrator_pb2.AssignResponse | None:
    """The ticket that a client has in hand, once it is there."""
    assert client._ahead is not None
    for shape in client._ahead._shapes.values():
        if shape._asking is not None:
            await shape._asking.task
        shape._forget_old()
        if shape._held:
            return shape._held[0].assigned
    return None


async def practised(client: AsyncClient) -> orchestrator_pb2.AssignResponse:
    """Call until there is a ticket: a machine that is very busy may take more than a second for a call."""
    async with asyncio.timeout(PATIENCE):
        while True:
            await client.generate("Hello", max_tokens=3, direct="always")
            if ticket := await held(client):
                return ticket


async def test_calls_in_a_row_get_their_tickets_in_the_background() -> None:
    async with front_door(**LONG) as door, serving(door), AsyncClient(door.address) as client:
        await until_direct(door, "a")
        for number in range(5):
            await practised(client)
            fresh = waited_for(door)
            assert fresh >= 2, "the first, and the one that showed that there are more"
            result = await client.generate(f"Hello {number}", max_tokens=3, direct="always")
            assert result.usage.completion_tokens == 3 and [each.failure_reason for each in result.attempts] == [""]
            assert waited_for(door) == fresh
        assert counted(door, "TICKET_REFUSED") == 0


async def test_what_is_held_when_a_client_goes_expires() -> None:
    limits = {"ticket_ahead_lifetime": 0.3}
    async with front_door(fleet=QUICK, limits=limits) as door, serving(door):
        await until_direct(door, "a")
        async with AsyncClient(door.address) as client:
            await practised(client)
        assert (await door.server("a")).assigned >= 1
        await door.until_idle()
        assert counted(door, "unused") >= 1


async def test_one_that_is_too_old_is_not_used() -> None:
    limits = {"ticket_ahead_lifetime": 0.2}
    async with front_door(fleet=QUICK, limits=limits) as door, serving(door), AsyncClient(door.address) as client:
        await until_direct(door, "a")
        await practised(client)
        fresh = waited_for(door)
        await door.until_idle()
        assert counted(door, "unused") >= 1
        result = await client.generate("Hello", max_tokens=3, direct="always")
        assert [each.failure_reason for each in result.attempts] == [""]
        assert waited_for(door) == fresh + 1


async def test_a_longer_prompt_or_another_shape_takes_a_fresh_one() -> None:
    async with front_door(**LONG) as door, serving(door), AsyncClient(door.address) as client:
        await until_direct(door, "a")
        await practised(client)
        fresh, longer = waited_for(door), "word " * room(2)
        for options in ({}, {"max_tokens": 4}, {"task_type": "writing"}, {"temperature": 0.5}, {"explain": True}):
            prompt = "Hello" if options else longer
            await client.generate(prompt, direct="always", **{"max_tokens": 3, **options})  # type: ignore[arg-type]
        assert waited_for(door) == fresh + 5
        result = await client.generate("Hello", max_tokens=3, direct="always", request_id="mine")
        assert result.request_id == "mine" and waited_for(door) == fresh + 6
        await client.generate("Hello", max_tokens=3, direct="always")
        assert waited_for(door) == fresh + 6, "and the ticket is still there for what it is for"


async def test_one_that_is_refused_is_replaced_by_a_fresh_one() -> None:
    async with front_door(**LONG) as door, serving(door) as server, AsyncClient(door.address) as client:
        await until_direct(door, "a")
        ticket = await practised(client)
        fresh = waited_for(door)
        assert not isinstance(await use(ticket, server.stub), Refusal)
        result = await client.generate("Hello", max_tokens=3, direct="always")
        assert [each.failure_reason for each in result.attempts] == [""], "it was the ticket's fault"
        assert waited_for(door) == fresh + 1
        assert not client._hosts._hosts[server.address].left_alone


async def test_calls_at_the_same_time_never_share_one() -> None:
    async with front_door(**LONG) as door, serving(door, slots=64), AsyncClient(door.address) as client:
        await until_direct(door, "a")
        await practised(client)
        fresh = waited_for(door)
        for _ in range(3):
            results = await asyncio.gather(
                *(client.generate("Hello", max_tokens=3, direct="always") for _ in range(8))
            )  # fmt: skip
            assert all([each.failure_reason for each in result.attempts] == [""] for result in results)
        await until_counted(door, "ok", fresh + 24)
        assert counted(door, "TICKET_REFUSED") == 0
        assert waited_for(door) < fresh + 24


async def test_a_server_without_slots_to_spare_is_not_pestered() -> None:
    async with front_door(**LONG) as door, serving(door, slots=2), AsyncClient(door.address) as client:
        await until_direct(door, "a")
        began = time.monotonic()
        for _ in range(12):
            await client.generate("Hello", max_tokens=3, direct="always")
        assert waited_for(door) == 12
        pauses = 1 + int(time.monotonic() - began)
        assert asked(door) <= 12 + 2 * pauses, "one in a second, of each kind"


async def test_calls_that_follow_at_once_share_the_way_to_the_control_plane() -> None:
    async with front_door(**LONG) as door, serving(door, slots=256), AsyncClient(door.address) as client:
        await until_direct(door, "a")
        await practised(client)
        fresh, calls, ok = waited_for(door), asked(door), counted(door, "ok")
        for _ in range(40):
            await client.generate("Hello", max_tokens=3, direct="always")
        # Those that were waited for are as many on a machine that is too busy for calls to follow at once.
        in_advance = asked(door) - calls - (waited_for(door) - fresh)
        assert in_advance <= 30, "several at a time"

        async def all_told() -> bool:
            return counted(door, "ok") >= ok + 40

        await until(all_told, PATIENCE)
        assert counted(door, "TICKET_REFUSED") == 0


async def test_turned_off() -> None:
    async with front_door(**LONG) as door, serving(door), AsyncClient(door.address, tickets_ahead=False) as client:
        await until_direct(door, "a")
        for _ in range(3):
            await client.generate("Hello", max_tokens=3, direct="always")
        assert waited_for(door) == 3

        async def all_told() -> bool:
            return asked(door) == 3

        await until(all_told)


async def test_the_blocking_client_and_streams_too() -> None:
    async with front_door(**LONG) as door, serving(door):
        await until_direct(door, "a")

        def work() -> None:
            calls, end = 0, time.monotonic() + PATIENCE
            with Client(door.address, direct="always") as client:
                while waited_for(door) == calls:  # so far each has waited for its own
                    assert time.monotonic() < end
                    assert [delta.text for delta in client.stream("Hello", max_tokens=3).deltas()]
                    calls += 1

        await asyncio.to_thread(work)
        before = waited_for(door)

        def work_without() -> None:
            with Client(door.address, direct="always", tickets_ahead=False) as client:
                for _ in range(4):
                    client.generate("Hello", max_tokens=3)

        await asyncio.to_thread(work_without)
        assert waited_for(door) == before + 4


async def test_a_cancelled_call_leaves_its_ticket_to_expire() -> None:
    hang: dict[str, Any] = {"faults": [{"kind": "hang", "tokens": 1, "after_requests": 20}]}
    limits = {"ticket_ahead_lifetime": 0.5}
    async with front_door(fleet=QUICK, limits=limits) as door, serving(door, **hang) as server, AsyncClient(
        door.address
    ) as client:  # fmt: skip
        await until_direct(door, "a")
        for _ in range(20):
            await client.generate("Hello", max_tokens=3, direct="always")
            await held(client)
        calling = asyncio.create_task(client.generate("Hello", max_tokens=3, direct="always"))
        await server.until_load(1)
        calling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await calling
        await until_counted(door, "cancelled", 1)
        await door.until_idle()
