"""Direct mode between real programs' parts: Assign, tickets at the model server, outcomes in reports."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc.aio
import pytest

from modelyard.rpc.errors import Refusal, from_rpc_error
from modelyard.rpc.reasons import Reason
from modelyard.rpc.tickets import read
from modelyard.v1 import fleet_pb2, model_server_pb2, orchestrator_pb2
from tests.harness.front_door import PATIENCE, ask, attached, attempts_of, client, front_door, settings
from tests.harness.model_servers import ReportHearer, model_server, report_hearer, request
from tests.harness.programs import until
from tests.harness.tickets import assign, counted, outcome, scripted, until_counted, until_direct, use

QUICK = {"report_interval": 0.05}
BRIEF: dict[str, Any] = {"fleet": QUICK, "limits": {"ticket_lifetime": 0.2}}


def serving(door: Any, server_id: str = "a", **given: Any) -> Any:
    return model_server(server_id=server_id, orchestrators=(door.address,), **given)


def reason(ended: object) -> str:
    assert isinstance(ended, Refusal), ended
    return ended.reason


async def refused(call: Any) -> Refusal:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call
    return from_rpc_error(error.value)


# ------------------------------------------------------------------- Assign ---


async def test_a_ticket_is_answered_and_counted_like_a_relayed_request():
    async with front_door() as door, serving(door) as server:
        await until_direct(door, "a")
        assigned = await assign(door, request_id="mine", max_tokens=3, explain=True)
        assert (assigned.request_id, assigned.server_id, assigned.model) == ("mine", "a", "simulated")
        assert assigned.endpoint == server.address and assigned.decision.server_id == "a"
        assert 0 < assigned.valid_for.seconds <= 5 and assigned.time_limit.seconds > 500
        status = await door.server("a")
        assert (status.in_flight, status.assigned) == (1, 1)
        result = await use(assigned, server.stub)
        await door.until_idle()
        status = await door.server("a")
        assert (status.assigned, status.models[0].requests, status.models[0].failures) == (0, 1, 0)
        assert status.models[0].HasField("ttft")
        sample = door.plane.metrics.registry.get_sample_value
        labels = {"model": "simulated", "kind": "completion"}
        assert sample("modelyard_tokens_total", labels) == result.usage.completion_tokens == 3
        assert sample("modelyard_ttft_seconds_count", {"model": "simulated"}) == 1
        assert counted(door, "ok") == 1


async def test_of_the_prompt_nothing_may_come():
    async with front_door() as door:
        refusal = await refused(door.stub.Assign(orchestrator_pb2.AssignRequest(request=ask("secret"))))
        assert refusal.reason is Reason.INVALID_REQUEST
        assert [each.field for each in refusal.violations] == ["request.input.messages"]
        refusal = await refused(door.stub.Assign(orchestrator_pb2.AssignRequest()))
        assert [each.field for each in refusal.violations] == ["request"]


async def test_a_prompt_goes_to_where_its_beginning_is():
    hashes = tuple(range(1, 33))
    async with front_door() as door, scripted(door, "a", slots=64) as first, scripted(door, "b"):
        await until_direct(door, "a", "b")

        # Each of these leaves its own beginning on the server that it is assigned to: always the same.
        async def cached(**asked: Any) -> dict[str, float]:
            assigned = await assign(
                door, **{"prompt_tokens": 2048, "prompt_hashes": hashes, **asked}, server_id="a", explain=True
            )
            return {each.server_id: each.terms["cached_tokens"] for each in assigned.decision.candidates}

        assigned = await assign(door, server_id="a", prompt_tokens=2048, prompt_hashes=hashes)
        await first.report(outcome(1, read(assigned.ticket).id, ttft=0.1, total=0.2))
        await until_counted(door, "ok", 1)
        assert await cached() == {"a": 2048, "b": 0}
        assert await cached(prompt_hashes=(*hashes[:16], *range(100, 116))) == {"a": 1024, "b": 0}
        assert await cached(prompt_tokens=700) == {"a": 640, "b": 0}, "no more than the prompt is long"
        for other in ({"prompt_hashes": ()}, {"tenant": "other"}, {"preset": "critic"}):
            assert await cached(**other) == {"a": 0, "b": 0}, other


async def test_a_prompt_has_no_more_than_so_many_hashes():
    async with front_door() as door:
        refusal = await refused(assign(door, prompt_hashes=range(513)))
        assert [each.field for each in refusal.violations] == ["prompt_hashes"]


async def test_a_preset_reaches_the_direct_call():
    async with front_door(**BRIEF) as door, serving(door):
        await until_direct(door, "a")
        presets = {preset.name: preset for preset in (await door.stub.ListPresets(ListPresets())).presets}
        wanted = presets["critic"].defaults
        assigned = await assign(door, preset="critic", top_k=7)
        assert assigned.sampling.temperature == wanted.input.sampling.temperature > 0
        assert assigned.sampling.top_k == 7
        assert list(assigned.preset_messages) == list(wanted.input.messages) != []


ListPresets = orchestrator_pb2.ListPresetsRequest


async def test_only_servers_that_take_tickets_are_assigned():
    from modelyard.testing import FakeModelServer

    async with front_door(**BRIEF) as door, attached(door, FakeModelServer("a-old")):
        refusal = await refused(assign(door))
        assert refusal.reason is Reason.UNSUPPORTED and "tickets" in refusal.message
        async with serving(door, "b-new"):
            await until_direct(door, "b-new")
            assert (await assign(door)).server_id == "b-new"


async def test_who_waits_gets_the_slot_that_an_outcome_gives_back():
    async with front_door() as door, serving(door, engine_settings={"slots": 1}) as server:
        await until_direct(door, "a")
        first = await assign(door)
        waiting = asyncio.create_task(assign(door))
        await until(lambda: queued(door, 1))
        assert not isinstance(await use(first, server.stub), Refusal)
        async with asyncio.timeout(PATIENCE):
            second = await waiting
        assert second.queued.ToNanoseconds() > 0
        assert not isinstance(await use(second, server.stub), Refusal)


async def queued(door: Any, count: int) -> bool:
    return sum(door.plane.scheduler.depth().values()) == count


# ------------------------------------------------------- at the model server ---


async def test_forged_replayed_misused_and_expired_tickets_are_refused():
    async with front_door(fleet=QUICK, limits={"ticket_lifetime": 0.3}) as door:
        two = [{"name": "m1"}, {"name": "m2"}]
        async with serving(door, engine_settings={"models": two}) as server, serving(door, "b") as other:
            await until_direct(door, "a", "b")
            assigned = await assign(door, model="m1", server_id="a")
            forged = bytearray(assigned.ticket)
            forged[40] ^= 4
            for changes in ({"ticket": bytes(forged)}, {"model": "m2"}, {"ticket": b"x"}, {"ticket": b"\0" * 64}):
                assert reason(await use(assigned, server.stub, **changes)) == "TICKET_REFUSED"
            assert reason(await use(assigned, other.stub)) == "TICKET_REFUSED"
            assert not isinstance(await use(assigned, server.stub), Refusal)  # none of that has used it up
            replayed = await use(assigned, server.stub)
            assert reason(replayed) == "TICKET_REFUSED" and "used before" in str(replayed)
            late = await assign(door, model="m1")
            await until_counted(door, "unused", 1)
            expired = await use(late, server.stub)
            assert reason(expired) == "TICKET_REFUSED" and "expired" in str(expired)
            embed = model_server_pb2.ModelServerEmbedRequest(model="m1", inputs=["x"], ticket=late.ticket)
            assert (await refused(server.stub.Embed(embed))).reason is Reason.TICKET_REFUSED


async def test_an_unused_reservation_ends_and_another_request_gets_its_slot():
    async with front_door(**BRIEF) as door:
        async with serving(door, engine_settings={"slots": 1}):
            await until_direct(door, "a")
            await assign(door)
            reply = await door.generate()
            assert reply.done.timings.queued.ToNanoseconds() > 0
            assert counted(door, "unused") == 1


async def test_a_ticket_in_use_outlives_its_expiry():
    hang = {"faults": [{"kind": "hang", "tokens": 1}]}
    async with (
        front_door(**BRIEF) as door,
        serving(door, engine_settings=hang) as server,
    ):
        await until_direct(door, "a")
        held, unused = await assign(door), await assign(door)
        asked = model_server_pb2.ModelServerGenerateRequest(model=held.model, ticket=held.ticket, input=request().input)
        call = server.stub.Generate(asked)
        await call.read()
        await until_counted(door, "unused", 1)  # the other one has gone, though it was made later
        assert read(unused.ticket).id > read(held.ticket).id
        assert (await door.server("a")).assigned == 1
        call.cancel()
        await until_counted(door, "cancelled", 1)
        assert (await door.server("a")).models[0].success_rate == 1


async def test_a_server_that_requires_tickets_serves_its_control_planes_and_ticket_holders_only():
    async with front_door() as door, serving(door, require_ticket=True) as server:
        await until_direct(door, "a")
        for claimed in ("", door.plane.servicer._orchestrator_id):
            asked = request(orchestrator_id=claimed)
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await server.generate(asked)
            assert from_rpc_error(error.value).reason is Reason.TICKET_REFUSED
        embed = model_server_pb2.ModelServerEmbedRequest(model="simulated", inputs=["x"])
        assert (await refused(server.stub.Embed(embed))).reason is Reason.TICKET_REFUSED
        assert attempts_of((await door.generate()).done) == [("a", "")]
        answer = await door.stub.Embed(orchestrator_pb2.EmbedRequest(inputs=["x"]))
        assert answer.server_id == "a"
        assert not isinstance(await use(await assign(door), server.stub), Refusal)
        await until_counted(door, "ok", 1)
        await door.until_idle()


# ------------------------------------------------------------------- outcomes ---


async def test_an_outcome_that_comes_twice_is_applied_once():
    async with front_door() as door, scripted(door) as server:
        first, second = await assign(door), await assign(door)
        ids = [read(each.ticket).id for each in (first, second)]
        told = outcome(1, ids[0], ttft=1e6, tpot=1e-9, total=1e6)
        await server.report_alone(told)
        assert server.directive.tickets.acknowledged == 1
        await server.open()  # the acknowledgement was lost with the stream
        await server.report(told, outcome(2, ids[1], "ENGINE_FAILED"))
        assert server.directive.tickets.acknowledged == 2
        status = await door.server("scripted")
        assert (status.in_flight, status.models[0].requests, status.models[0].failures) == (0, 2, 1)
        # What cannot be true is not believed: no first token comes later than the outcome.
        assert status.models[0].ttft.seconds < PATIENCE
        assert (counted(door, "ok"), counted(door, "ENGINE_FAILED")) == (1, 1)
        labels = {"model": "fake", "kind": "prompt"}
        assert door.plane.metrics.registry.get_sample_value("modelyard_tokens_total", labels) == 5


async def test_a_server_settles_its_own_tickets_only():
    async with front_door() as door, scripted(door, "one") as one, scripted(door, "two") as two:
        assigned = await assign(door, server_id="one")
        await two.report(outcome(1, read(assigned.ticket).id), ahead=60)
        assert (await door.server("one")).assigned == 1
        await one.report(in_use=(read(assigned.ticket).id,), ahead=60)
        assert (await door.server("one")).assigned == 1
        await one.report(ahead=60)
        assert (await door.server("one")).assigned == 0


async def test_a_lost_lease_ends_reservations_and_voids_their_tickets():
    async with front_door(fleet={"report_interval": 0.1, "lease_duration": 0.3}) as door, scripted(door) as server:
        assigned = await assign(door)
        epoch = read(assigned.ticket).lease_epoch
        server.close()
        await until_counted(door, "lost", 1)
        await server.open()
        assert server.directive.tickets.since_epoch == server.directive.lease_epoch > epoch
        await server.report(outcome(1, read(assigned.ticket).id))
        assert (await door.server("scripted")).models[0].requests == 0


async def test_another_instance_inherits_no_reservation():
    async with front_door() as door, scripted(door) as old:
        await assign(door)
        async with scripted(door, instance_id="2"):
            await until_counted(door, "lost", 1)
            assert (await door.server("scripted")).in_flight == 0
        old.close()


async def test_a_model_server_tells_an_outcome_until_it_is_acknowledged():
    hearer = TicketHearer()
    address = f"127.0.0.1:{await hearer.start()}"
    try:
        async with model_server(orchestrators=(address,)) as server:
            await hearer.until(lambda report: report.lease_epoch == 1)
            for _ in range(2):
                assert not isinstance(await use(hearer.assigned(server), server.stub), Refusal)
            await hearer.until(lambda report: len(report.tickets.outcomes) == 2)
            hearer.refusal = Refusal(Reason.DRAINING, "the stream is cut")
            await until(lambda: at(hearer, lambda: hearer.streams > 1))
            hearer.refusal = None
            again = await hearer.until(lambda report: report.lease_epoch > 1 and len(report.tickets.outcomes) == 2)
            assert [each.sequence for each in again.tickets.outcomes] == [1, 2]
            hearer.acknowledged = 1
            await until(lambda: at(hearer, lambda: len(hearer.reports[-1].tickets.outcomes) == 1))
            hearer.acknowledged = 2
            await until(lambda: at(hearer, lambda: not hearer.reports[-1].tickets.outcomes))
    finally:
        await hearer.stop()


async def at(_: object, condition: Any) -> bool:
    return bool(condition())


class TicketHearer(ReportHearer):
    """A control plane that signs tickets and acknowledges outcomes when the test says so."""

    key = b"k" * 32
    acknowledged = 0
    made = 0

    def _directive(self, epoch: int) -> fleet_pb2.ServerDirective:
        directive = super()._directive(epoch)
        directive.lease_duration.seconds = 60
        directive.tickets.key, directive.tickets.acknowledged = self.key, self.acknowledged
        return directive

    def assigned(self, server: Any) -> orchestrator_pb2.AssignResponse:
        from modelyard.rpc.tickets import sign
        from modelyard.v1.ticket_pb2 import Ticket

        self.made += 1
        whole = next(report for report in self.reports if report.HasField("identity"))
        ticket = Ticket(
            id=self.made, orchestrator_id=self.orchestrator_id, server_id="tested",
            instance_id=whole.identity.instance_id, lease_epoch=self.streams, model="simulated",
        )  # fmt: skip
        ticket.expires_at.seconds = 3600
        return orchestrator_pb2.AssignResponse(model="simulated", ticket=sign(self.key, ticket))


async def test_a_control_plane_without_tickets_gets_plain_reports():
    async with report_hearer() as (heard, address), model_server(orchestrators=(address,)):
        await heard.until(lambda report: report.lease_epoch == 1)
        assert all(report.HasField("identity") for report in heard.reports)
        assert not any(report.tickets.outcomes for report in heard.reports)


# -------------------------------------------------------------- giving back ---


async def test_a_ticket_that_came_to_nothing_is_given_back_with_the_relayed_request():
    async with front_door(limits={"ticket_lifetime": 60}) as door, serving(door, engine_settings={"slots": 1}):
        await until_direct(door, "a")
        assigned = await assign(door)
        forged = assigned.ticket[:-1] + bytes([assigned.ticket[-1] ^ 1])
        waiting = door.stream(ask(unused_ticket=forged))
        reading = asyncio.create_task(waiting.rest())
        await until(lambda: queued(door, 1))  # a false one gives nothing back
        async with asyncio.timeout(PATIENCE):
            assert (await door.generate(ask(unused_ticket=assigned.ticket))).done
            assert (await reading).done
        assert counted(door, "unused") == 1


# ------------------------------------------------------------ drain, restart ---


async def test_a_drained_server_finishes_its_direct_requests():
    slow = {"instant": False, "decode_tokens_per_second": 100, "answer_tokens": 30}
    async with front_door() as door, serving(door, engine_settings=slow) as server:
        await until_direct(door, "a")
        running, late = await assign(door), await assign(door)
        asked = model_server_pb2.ModelServerGenerateRequest(
            model=running.model, ticket=running.ticket, input=request().input
        )
        call = server.stub.Generate(asked)
        await call.read()
        await door.drain("a")
        await until(lambda: told_to_drain(server))
        assert reason(await use(late, server.stub)) == "DRAINING"
        assert (await refused(assign(door))).reason is Reason.SERVERS_AWAY
        last = None
        while (message := await call.read()) is not grpc.aio.EOF:
            last = message
        assert last is not None and last.HasField("result")
        await until_counted(door, "ok", 1)
        await until_counted(door, "DRAINING", 1)


async def told_to_drain(server: Any) -> bool:
    return (await server.report()).state == fleet_pb2.DESIRED_STATE_DRAIN


async def test_a_model_server_that_stops_tells_its_last_outcome():
    slow = {"instant": False, "decode_tokens_per_second": 100, "answer_tokens": 20}
    async with front_door(fleet={"report_interval": 5, "lease_duration": 60}) as door:
        async with serving(door, engine_settings=slow) as server:
            await until_direct(door, "a")
            assigned = await assign(door)
            ending = asyncio.create_task(use(assigned, server.stub, input=request().input))
            await until(lambda: busy(server))
            server.stopping.set()
            assert not isinstance(await ending, Refusal)
        assert counted(door, "ok") == 1


async def busy(server: Any) -> bool:
    return bool((await server.report()).load.running)


async def test_a_control_plane_that_stops_waits_for_the_outcome():
    slow = {"instant": False, "decode_tokens_per_second": 100, "answer_tokens": 20}
    async with model_server_beside(slow) as (door, server, stopped):
        assigned = await assign(door)
        ending = asyncio.create_task(use(assigned, server.stub, input=request().input))
        await until(lambda: busy(server))
        stopped.set()
        assert not isinstance(await ending, Refusal)
        await until_counted(door, "ok", 1)


class model_server_beside:
    """A control plane that can be told to stop while a client of it goes on, and a model server."""

    def __init__(self, engine_settings: dict[str, Any]) -> None:
        self._settings = engine_settings
        self._ready: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._stop = asyncio.Event()

    async def _plane(self) -> None:
        async with front_door(drain_grace=20) as door:
            self._ready.set_result(door)
            await self._stop.wait()

    async def __aenter__(self) -> Any:
        self._task = asyncio.create_task(self._plane())
        door = await self._ready
        self._serving = serving(door, engine_settings=self._settings)
        server = await self._serving.__aenter__()
        await until_direct(door, "a")
        return door, server, self._stop

    async def __aexit__(self, *error: Any) -> None:
        self._stop.set()
        async with asyncio.timeout(PATIENCE):
            await self._task
        await self._serving.__aexit__(*error)


async def test_tickets_of_a_control_plane_end_with_it():
    async with front_door(drain_grace=0) as door:
        port = int(door.address.rsplit(":", 1)[1])
        starting = serving(door)
        server = await starting.__aenter__()
        await until_direct(door, "a")
        kept = await assign(door)
    try:
        # While no other process answers there its tickets are good, for as long as its lease.
        assert not isinstance(await use(kept, server.stub), Refusal)
        from control_plane.app import running

        async with running(settings(port=port)) as (plane, address), client(address, plane) as again:
            await until_direct(again, "a")
            assert reason(await use(kept, server.stub)) == "TICKET_REFUSED"
            assert not isinstance(await use(await assign(again), server.stub), Refusal)
            await until_counted(again, "ok", 1)
    finally:
        await starting.__aexit__(None, None, None)
