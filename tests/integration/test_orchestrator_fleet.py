"""The fleet as clients see it: lists, the watch, drains, and model servers that come and go."""

from __future__ import annotations

import asyncio
import time

import grpc
import pytest

from modelyard.rpc.errors import from_rpc_error
from modelyard.rpc.reasons import Reason
from modelyard.testing import FakeModelServer, model_info
from modelyard.v1 import fleet_pb2, orchestrator_pb2, task_pb2
from tests.harness.front_door import (
    DRAINING,
    LIVE,
    LOST,
    SUSPECT,
    ask,
    attached,
    front_door,
    watching,
)
from tests.harness.model_servers import model_server
from tests.harness.programs import until

SHORT = {"report_interval": 0.1, "lease_duration": 0.8}


async def list_models(door) -> dict[str, fleet_pb2.Model]:
    listed = (await door.stub.ListModels(orchestrator_pb2.ListModelsRequest())).models
    assert [model.name for model in listed] == sorted(model.name for model in listed)
    return {model.name: model for model in listed}


async def test_models_are_listed_over_the_fleet():
    chat = task_pb2.TASK_TYPE_CHAT
    small = {"features": [fleet_pb2.MODEL_FEATURE_STREAMING], "context_length": 4096}
    fakes = (
        FakeModelServer("b", [model_info("llama", "ollama", **small), model_info("aya", "ollama", **small)]),
        FakeModelServer(
            "a",
            [
                model_info(
                    "llama",
                    "mlx",
                    context_length=8192,
                    features=[fleet_pb2.MODEL_FEATURE_JSON],
                    capabilities=[fleet_pb2.Capability(task_type=chat, score=0.9)],
                    quantization="4bit",
                )
            ],
        ),
    )
    async with front_door() as door, attached(door, *fakes):
        models = await list_models(door)
        assert list(models) == ["aya", "llama"]
        llama = models["llama"]
        assert list(llama.providers) == ["mlx", "ollama"]
        assert [placement.server_id for placement in llama.placements] == ["a", "b"]
        assert [placement.info.quantization for placement in llama.placements] == ["4bit", ""]
        assert llama.context_length == 8192
        assert set(llama.features) == {fleet_pb2.MODEL_FEATURE_STREAMING, fleet_pb2.MODEL_FEATURE_JSON}
        assert {c.task_type: c.score for c in llama.capabilities}[chat] == 0.9
        for name in ("llama", "mlx/llama", "ollama/llama"):
            got = await door.stub.GetModel(orchestrator_pb2.GetModelRequest(name=name))
            assert got.model == llama
        await fakes[0].detach()
        await door.until_server("b", lambda status: status.lease_state == SUSPECT)
        states = {p.server_id: p.lease_state for p in (await list_models(door))["llama"].placements}
        assert states == {"a": LIVE, "b": SUSPECT}


async def test_servers_are_listed_as_they_reported():
    fake = FakeModelServer("mac-1", [model_info("m")], slots=3)
    async with front_door() as door, attached(door, fake):
        before = time.time()
        status = await door.server("mac-1")
        report = status.report
        assert report.identity.server_id == "mac-1"
        assert report.identity.instance_id == fake.instance_id
        assert report.identity.endpoint == fake.address
        assert report.engine.name == "fake"
        assert report.load.slots == 3
        assert report.health == fleet_pb2.SERVER_HEALTH_READY
        assert (status.lease_state, status.lease_epoch, status.in_flight) == (LIVE, 1, 0)
        assert abs(status.attached_at.seconds - before) < 60
        assert status.reported_at.ToNanoseconds() >= status.attached_at.ToNanoseconds()
        (runtime,) = status.models
        assert (runtime.model, runtime.requests, runtime.success_rate) == ("m", 0, 1.0)
        assert not runtime.HasField("ttft")
        await door.generate()
        (runtime,) = (await door.server("mac-1")).models
        assert (runtime.requests, runtime.failures) == (1, 0)
        assert 0 < runtime.ttft.ToNanoseconds() < 30e9


async def test_work_in_hand_is_shown():
    async with front_door() as door, attached(door, FakeModelServer("one", slots=2)) as (fake,):
        gate = fake.gate("Generate")
        streams = [door.stream(ask()) for _ in range(2)]
        await door.until_server("one", lambda status: status.in_flight == 2)
        gate.open()
        for stream in streams:
            assert (await stream.rest()).done
        await door.until_server("one", lambda status: status.in_flight == 0)


async def test_slots_taken_by_others_are_respected():
    async with front_door() as door, attached(door, FakeModelServer("one", slots=2)) as (fake,):
        fake.load.running = fake.load.foreign = 2
        fake.report_now()
        await door.until_server("one", lambda status: status.report.load.foreign == 2)
        stream = door.stream(ask())
        async with asyncio.timeout(10):
            while not sum(door.plane.scheduler.depth().values()):
                await asyncio.sleep(0.01)
        assert not fake.calls_of("Generate")
        fake.load.running = fake.load.foreign = 0
        fake.report_now()
        assert (await stream.rest()).done


async def test_the_watch_begins_with_everything_and_tells_every_change():
    async with front_door(fleet={**SHORT, "forget_after": 0.3}) as door, attached(door, FakeModelServer("a")):
        async with watching(door) as watch:
            first = watch.messages[0]
            assert first.snapshot and [s.report.identity.server_id for s in first.servers] == ["a"]
            async with FakeModelServer("b") as fake:
                await fake.attach(door.address)
                await watch.until(lambda: watch.states("b") == [LIVE])
                fake.status = fleet_pb2.SERVER_HEALTH_UNHEALTHY
                fake.report_now()
                await watch.until(
                    lambda: (
                        watch.messages[-1].servers
                        and watch.messages[-1].servers[-1].report.health == fleet_pb2.SERVER_HEALTH_UNHEALTHY
                    )
                )
                fake.models = [model_info("other")]
                fake.report_now()
                await watch.until(
                    lambda: any(
                        model.name == "other"
                        for message in watch.messages
                        for server in message.servers
                        for model in server.report.models
                    )
                )
            await watch.until(lambda: watch.removed == {"b"})
            assert watch.states("b") == [LIVE, SUSPECT, LOST]
            assert not any(message.snapshot for message in watch.messages[1:])
        assert list(await door.servers()) == ["a"]


async def test_changes_of_load_are_told_at_most_once_a_second():
    async with (
        front_door(fleet={"report_interval": 0.02}) as door,
        attached(door, FakeModelServer("a")) as (fake,),
        watching(door) as watch,
    ):
        loads = 0
        began = time.monotonic()
        while time.monotonic() - began < 1.5:
            fake.load.kv_cache_utilization = (loads % 100) / 100
            fake.report_now()
            loads += 1
            await asyncio.sleep(0.02)  # many reports are what is tested
        elapsed = time.monotonic() - began
        assert loads > 10
        assert 1 <= len(watch.messages) - 1 <= elapsed + 1


async def test_a_watcher_that_does_not_read_finds_the_latest():
    async with front_door() as door, attached(door, FakeModelServer("a")) as (fake,):
        fake.models = many = [model_info(f"m{n:0240}") for n in range(300)]
        fake.report_now()
        await door.until_server("a", lambda status: len(status.report.models) == 300)
        call = door.stub.WatchFleet(orchestrator_pb2.WatchFleetRequest())
        assert (await call.read()).snapshot
        for n in range(150):
            fake.models = [model_info(f"{n:03}"), *many]
            seen = len(fake.directives)
            fake.report_now()
            await fake.until(lambda seen=seen: len(fake.directives) > seen)
        messages = 0
        async with asyncio.timeout(30):
            while True:
                message = await call.read()
                messages += 1
                if message.servers and message.servers[0].report.models[0].name == "149":
                    break
        assert messages < 150  # missed some, never the latest
        call.cancel()


async def test_a_drained_server_finishes_and_takes_nothing_new():
    async with (
        front_door() as door,
        attached(door, FakeModelServer("a-first"), FakeModelServer("b-second")) as (first, second),
    ):
        rest = asyncio.Event()
        first.answer("one", rest, "two")
        running = await door.stream(ask()).first_delta()
        status = await door.drain("a-first")
        assert (status.lease_state, status.in_flight) == (DRAINING, 1)
        await first.until(lambda: first.directives[-1].desired_state == fleet_pb2.DESIRED_STATE_DRAIN)
        for _ in range(3):
            assert (await door.generate()).done.server_id == "b-second"
        # The order outlives a report stream that breaks.
        await first.detach()
        await first.attach(door.address)
        assert first.directives[-1].desired_state == fleet_pb2.DESIRED_STATE_DRAIN
        assert (await door.generate()).done.server_id == "b-second"
        rest.set()
        assert (await running.rest()).text == "onetwo"
        assert (await door.drain("a-first", undo=True)).lease_state == LIVE
        await first.until(lambda: first.directives[-1].desired_state == fleet_pb2.DESIRED_STATE_SERVE)
        assert (await door.generate(ask(server_id="a-first"))).text == "onetwo"
        assert len(second.calls_of("Generate")) == 4


async def test_a_drain_order_ends_with_the_process_it_was_for():
    async with front_door() as door, attached(door, FakeModelServer("one")) as (fake,):
        await door.drain("one")
        await fake.detach()
        fake.instance_id = "another process"
        await fake.attach(door.address)
        assert (await door.server("one")).lease_state == LIVE


async def test_a_real_model_server_obeys_a_drain():
    engine = {"instant": False, "decode_tokens_per_second": 40, "answer_tokens": 40}
    async with front_door() as door, model_server(orchestrators=(door.address,), engine_settings=engine):
        await door.until_ready("tested")
        running = await door.stream(ask()).first_delta()
        await door.drain("tested")
        await door.until_server("tested", lambda status: status.report.state == fleet_pb2.DESIRED_STATE_DRAIN)
        assert sum(delta.tokens for delta in (await running.rest()).deltas) == 40
        await door.drain("tested", undo=True)
        await door.until_ready("tested")
        assert (await door.generate()).done


async def test_a_newer_instance_takes_over():
    async with front_door() as door, attached(door, FakeModelServer("one")) as (old,):
        rest = asyncio.Event()
        old.answer("half", rest)
        running = await door.stream(ask()).first_delta()
        async with FakeModelServer("one") as new:
            await new.attach(door.address)
            status = await door.server("one")
            assert status.report.identity.endpoint == new.address
            assert status.lease_epoch == 2
            # The old stream ends with SUPERSEDED, and what the old process had in hand is given up.
            attaching = old._attaching
            assert attaching is not None
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await asyncio.wait_for(attaching, 10)
            refusal = from_rpc_error(caught.value)
            assert refusal.reason is Reason.SUPERSEDED and not refusal.transport
            assert (await running.rest()).reason == "STREAM_BROKEN"
            assert (await door.generate()).text == "Hello, world"
            assert len(new.calls_of("Generate")) == 1
            assert (await door.server("one")).lease_state == LIVE
            old._attaching = None


async def test_a_malformed_report_ends_the_stream_and_names_the_field():
    async with front_door() as door, attached(door, FakeModelServer("one")) as (fake,):
        fake.load.slots = 0
        fake.report_now()
        attaching = fake._attaching
        assert attaching is not None
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await asyncio.wait_for(attaching, 10)
        refusal = from_rpc_error(caught.value)
        assert refusal.reason is Reason.INVALID_REQUEST
        assert [violation.field for violation in refusal.violations] == ["load.slots"]
        await door.until_server("one", lambda status: status.lease_state == SUSPECT)
        fake._attaching = None


async def test_a_server_that_comes_up_gets_the_waiting_requests():
    async with front_door() as door, FakeModelServer("one") as fake:
        fake.status = fleet_pb2.SERVER_HEALTH_STARTING
        await fake.attach(door.address)
        streams = [door.stream(ask(f"{n}")) for n in range(6)]

        async def all_wait() -> bool:
            return sum(door.plane.scheduler.depth().values()) == 6

        await until(all_wait)
        assert not fake.calls_of("Generate")
        fake.status = fleet_pb2.SERVER_HEALTH_READY
        fake.report_now()
        for stream in streams:
            assert (await stream.rest()).done


async def test_urgent_requests_overtake_and_equals_keep_their_order():
    async with front_door() as door, attached(door, FakeModelServer("one", slots=1)) as (fake,):
        gate = fake.gate("Generate")
        running = door.stream(ask(request_id="running"))
        await gate.arrived.wait()
        streams = []
        order = [("low", 1), ("normal-1", 2), ("normal-2", 2), ("high", 3), ("critical", 4)]
        for depth, (name, priority) in enumerate(order, 1):
            streams.append(door.stream(ask(request_id=name, priority=priority)))

            async def queued(depth: int = depth) -> bool:
                return sum(door.plane.scheduler.depth().values()) == depth

            await until(queued)
        gate.open()
        for stream in (running, *streams):
            assert (await stream.rest()).done
        served = [call.request.request_id for call in fake.calls_of("Generate")]
        assert served == ["running", "critical", "high", "normal-1", "normal-2", "low"]
