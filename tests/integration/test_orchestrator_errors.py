"""Every refusal of the error table that the control plane makes: code, reason, details and a message that helps."""

from __future__ import annotations

import asyncio
import re

import grpc
import pytest

from control_plane.app import ControlPlane, SystemClock
from modelyard.client import AsyncClient, ModelyardError
from modelyard.rpc.errors import Refusal, from_rpc_error
from modelyard.rpc.reasons import CODES, Reason
from modelyard.testing import FakeModelServer, model_info
from modelyard.v1 import fleet_pb2, generation_pb2, model_server_pb2, orchestrator_pb2, task_pb2
from tests.harness.front_door import DRAINING, ask, attached, client, front_door, settings
from tests.harness.model_servers import model_server
from tests.harness.programs import until

PREFIX = "/modelyard.v1.Orchestrator/"


def check(refusal: Refusal, reason: Reason) -> Refusal:
    """The refusal was made by modelyard, for that reason, with the code of the table."""
    assert refusal.reason is reason, repr(refusal)
    assert not refusal.transport, f"no details: {refusal!r}"
    assert refusal.code is CODES[reason]
    assert refusal.message
    return refusal


def without_messages() -> orchestrator_pb2.GenerateRequest:
    request = ask()
    request.input.ClearField("messages")
    return request


def both_inputs() -> orchestrator_pb2.GenerateRequest:
    request = ask()
    request.input.prompt = "and this"
    return request


MALFORMED = [
    ("input", orchestrator_pb2.GenerateRequest()),
    ("input", without_messages()),
    ("input", both_inputs()),
    ("input.sampling.temperature", ask(temperature=2.5)),
    ("input.sampling.temperature", ask(temperature=float("nan"))),
    ("input.sampling.top_p", ask(top_p=0.0)),
    ("input.sampling.max_tokens", ask(max_tokens=-1)),
    ("input.sampling.max_tokens", ask(max_tokens=0)),
    ("input.sampling.n", ask(n=2)),
    ("input.sampling.stop", ask(stop=["x"] * 17)),
    ("task_type", ask(task_type=99)),
    ("priority", ask(priority=-5)),
    ("request_id", ask(request_id="x" * 65)),
    ("requirements.features[0]", ask(features=[77])),
]


async def test_malformed_requests_name_the_field():
    async with front_door() as door, attached(door, FakeModelServer("one")) as (fake,):
        for field, request in MALFORMED:
            refusal = check((await door.generate(request)).refused, Reason.INVALID_REQUEST)
            assert [violation.field for violation in refusal.violations] == [field], request
            assert refusal.violations[0].description
            wrapped = orchestrator_pb2.ExplainSelectionRequest(request=request)
            refusal = check(await door.refusal(door.stub.ExplainSelection(wrapped)), Reason.INVALID_REQUEST)
            assert [violation.field for violation in refusal.violations] == [f"request.{field}"]
        assert not fake.calls_of("Generate")


async def test_a_refusal_carries_the_request_id_unless_that_is_malformed_itself():
    async with front_door() as door:
        refused = await door.generate(ask(request_id="mine", temperature=9.0))
        assert refused.trailing["modelyard-request-id"] == "mine"
        for unfit in ("x" * 65, "tab\t", "é"):
            reply = await door.generate(ask(request_id=unfit))
            check(reply.refused, Reason.INVALID_REQUEST)
            assert "modelyard-request-id" not in reply.trailing


async def test_the_sdk_tells_the_id_that_the_control_plane_gave_to_what_it_refused():
    async with front_door() as door, AsyncClient(door.address) as sdk:
        for call in (sdk.generate("hi", model="nope"), sdk.embed("hi", model="nope")):
            with pytest.raises(ModelyardError) as caught:
                await call
            assert re.fullmatch(r"[0-9a-f]{32}", caught.value.request_id)


async def test_malformed_unary_requests_name_the_field():
    async with front_door() as door:
        stub = door.stub
        for field, call in [
            ("inputs", stub.Embed(orchestrator_pb2.EmbedRequest())),
            ("inputs", stub.Embed(orchestrator_pb2.EmbedRequest(inputs=["x"] * 2049))),
            ("name", stub.GetModel(orchestrator_pb2.GetModelRequest())),
            ("server_id", stub.DrainModelServer(orchestrator_pb2.DrainModelServerRequest())),
            ("request", stub.ExplainSelection(orchestrator_pb2.ExplainSelectionRequest())),
        ]:
            refusal = check(await door.refusal(call), Reason.INVALID_REQUEST)
            assert [violation.field for violation in refusal.violations] == [field]


@pytest.mark.parametrize("size", [8 * 1024 * 1024 + 1, 9 * 1024 * 1024 - 1000])
async def test_a_giant_prompt_is_the_clients_fault(size):
    async with front_door() as door, attached(door, FakeModelServer("one")):
        refusal = check((await door.generate(ask("x" * size))).refused, Reason.INVALID_REQUEST)
        assert str(8 * 1024 * 1024) in refusal.message
        assert (await door.generate()).done  # and the connection lives


async def test_a_prompt_just_below_the_limit_passes():
    big = model_info(context_length=10_000_000)
    async with front_door() as door, attached(door, FakeModelServer("one", [big])) as (fake,):
        assert (await door.generate(ask("x" * (8 * 1024 * 1024 - 1000)))).done
        assert fake.calls_of("Generate")


async def test_bytes_that_are_no_message_are_refused():
    garbage = b"\x0a\xff\xff\xff\xff\x0fnot a message"
    async with front_door() as door:
        for name in ("Embed", "ListModels", "GetModel", "ListModelServers", "ExplainSelection", "DrainModelServer"):
            refusal = await door.refusal(door.channel.unary_unary(PREFIX + name)(garbage))
            check(refusal, Reason.INVALID_REQUEST)
        for name in ("Generate", "WatchFleet"):
            call = door.channel.unary_stream(PREFIX + name)(garbage)
            check(await door.refusal(call.read()), Reason.INVALID_REQUEST)
        call = door.channel.stream_stream(PREFIX + "Attach")(iter([garbage]))
        check(await door.refusal(call.read()), Reason.INVALID_REQUEST)


async def test_an_unknown_model_names_the_known_ones():
    fakes = (FakeModelServer("a", [model_info("llama")]), FakeModelServer("b", [model_info("qwen"), model_info("phi")]))
    async with front_door() as door, attached(door, *fakes):
        requirements = ask(model="gpt-9").requirements
        for refusal in (
            (await door.generate(ask(model="gpt-9"))).refused,
            await door.refusal(
                door.stub.ExplainSelection(orchestrator_pb2.ExplainSelectionRequest(request=ask(model="gpt-9")))
            ),
            await door.refusal(door.stub.GetModel(orchestrator_pb2.GetModelRequest(name="gpt-9"))),
            await door.refusal(door.stub.Embed(orchestrator_pb2.EmbedRequest(inputs=["x"], requirements=requirements))),
        ):
            check(refusal, Reason.UNKNOWN_MODEL)
            assert "gpt-9" in refusal.message
            assert all(name in refusal.message for name in ("llama", "phi", "qwen"))
        # A known name of another provider is no known model.
        check((await door.generate(ask(model="acme/llama"))).refused, Reason.UNKNOWN_MODEL)


async def test_an_unknown_server_names_the_known_ones():
    async with front_door() as door, attached(door, FakeModelServer("mac"), FakeModelServer("gpu")):
        call = door.stub.DrainModelServer(orchestrator_pb2.DrainModelServerRequest(server_id="nas"))
        refusal = check(await door.refusal(call), Reason.UNKNOWN_SERVER)
        assert "nas" in refusal.message and "mac" in refusal.message and "gpu" in refusal.message


async def test_what_nobody_can_serve_names_the_nearest_miss():
    near = FakeModelServer("near", [model_info("a", context_length=8000)])
    far = FakeModelServer("far", [model_info("b", context_length=2000, features=[])])
    async with front_door() as door, attached(door, near, far):
        request = ask(min_context_length=9000, features=[fleet_pb2.MODEL_FEATURE_VISION])
        refusal = check((await door.generate(request)).refused, Reason.NO_CAPABLE_SERVER)
        assert "near" in refusal.message and "far" not in refusal.message
        assert "8000" in refusal.message and "9000" in refusal.message
        refusal = check((await door.generate(ask(server_id="nas"))).refused, Reason.NO_CAPABLE_SERVER)
        assert "nas" in refusal.message


async def test_an_empty_fleet_is_warming_up_then_final():
    async with front_door(fleet={"warm_up": 1.5}) as door:
        early = await door.generate()
        named = await door.generate(ask(model="any"))
        for reply in (early, named):
            refusal = check(reply.refused, Reason.FLEET_WARMING_UP)
            assert refusal.retry_after is not None and 0 < refusal.retry_after <= 1.5

        async def final() -> bool:
            return (await door.generate()).reason == "NO_CAPABLE_SERVER"

        await until(final)
        check((await door.generate(ask(model="any"))).refused, Reason.UNKNOWN_MODEL)


async def test_servers_that_are_away_may_come_back():
    async with front_door(fleet={"lease_duration": 0.6, "report_interval": 0.1}) as door:
        async with attached(door, FakeModelServer("one")):
            assert (await door.generate()).done
        await door.until_server("one", lambda status: status.lease_state == fleet_pb2.LEASE_STATE_LOST)
        refusal = check((await door.generate()).refused, Reason.SERVERS_AWAY)
        assert refusal.retry_after and "one" in refusal.message


async def test_a_full_queue_turns_away_with_a_time():
    async with (
        front_door(queue={"bound": {"normal": 2}}) as door,
        attached(door, FakeModelServer("one", slots=1)) as (fake,),
    ):
        gate = fake.gate("Generate")
        running = door.stream(ask())
        await gate.arrived.wait()
        waiting = [door.stream(ask()) for _ in range(2)]
        await until_waiting(door, 2)
        refusal = check((await door.generate()).refused, Reason.QUEUE_FULL)
        assert refusal.retry_after and 0 < refusal.retry_after <= 30
        # Another class has a bound of its own.
        urgent = door.stream(ask(priority=task_pb2.TASK_PRIORITY_HIGH))
        await until_waiting(door, 3)
        gate.open()
        for call in (running, urgent, *waiting):
            assert (await call.rest()).done


async def test_a_queue_full_of_bytes_turns_away_with_a_time():
    async with (
        front_door(queue={"max_bytes": 1_000_000}) as door,
        attached(door, FakeModelServer("one", [model_info(context_length=2**31)], slots=1)) as (fake,),
    ):
        gate = fake.gate("Generate")
        running = door.stream(ask("x" * 2_000_000))  # does not wait
        await gate.arrived.wait()
        waiting = door.stream(ask("x" * 900_000))
        await until_waiting(door, 1)
        refusal = check((await door.generate(ask("x" * 200_000))).refused, Reason.QUEUE_FULL)
        assert "queue.max_bytes" in refusal.message
        assert refusal.retry_after and 0 < refusal.retry_after <= 30
        small = door.stream(ask())
        await until_waiting(door, 2)
        gate.open()
        for call in (running, waiting, small):
            assert (await call.rest()).done


async def until_waiting(door, count: int) -> None:
    async def reached() -> bool:
        return sum(door.plane.scheduler.depth().values()) == count

    await until(reached)


async def test_the_timeout_of_the_class_ends_the_wait():
    async with (
        front_door(queue={"timeout": {"normal": 0.3}}) as door,
        attached(door, FakeModelServer("one", slots=1)) as (fake,),
    ):
        gate = fake.gate("Generate")
        running = door.stream(ask())
        await gate.arrived.wait()
        refusal = check((await door.generate()).refused, Reason.QUEUE_TIMEOUT)
        assert "one has no free slot" in refusal.message
        await until_waiting(door, 0)
        gate.open()
        assert (await running.rest()).done


async def test_the_deadline_of_the_client_ends_the_wait():
    async with front_door() as door, attached(door, FakeModelServer("one", slots=1)) as (fake,):
        gate = fake.gate("Generate")
        running = door.stream(ask())
        await gate.arrived.wait()
        reply = await door.generate(timeout=0.3)
        assert reply.refused.code is grpc.StatusCode.DEADLINE_EXCEEDED
        await until_waiting(door, 0)
        gate.open()
        assert (await running.rest()).done
        assert len(fake.calls_of("Generate")) == 1


async def test_the_deadline_of_the_client_ends_the_generation():
    async with front_door() as door, attached(door, FakeModelServer("one")) as (fake,):
        fake.answer("to", "ken", asyncio.Event())
        reply = await door.generate(timeout=0.5)
        assert reply.refused.code is grpc.StatusCode.DEADLINE_EXCEEDED
        assert reply.text == "token"
        await fake.until(lambda: fake.calls[-1].outcome == "cancelled")
        await door.until_idle()


@pytest.mark.parametrize("script", [(), ("to", "ken")])
async def test_without_a_deadline_the_own_limit_holds(script):
    async with (
        front_door(limits={"max_generation": 0.4}) as door,
        attached(door, FakeModelServer("one"), FakeModelServer("two")) as fakes,
    ):
        for fake in fakes:
            fake.answer(*script, asyncio.Event())
        for _ in range(3):  # whichever notices first, relay or upstream, it is the same error
            check((await door.generate()).refused, Reason.DEADLINE_EXCEEDED)
        await door.until_idle()
        assert sum(len(fake.calls_of("Generate")) for fake in fakes) == 3
        server = await door.server("one")
        assert [(model.failures, model.breaker) for model in server.models] == [(0, fleet_pb2.BREAKER_STATE_CLOSED)]


@pytest.mark.parametrize(("limit", "words"), [(0.001, "0.001 s"), (0.0123456, "0.0123 s")])
async def test_a_short_limit_is_told_as_it_is(limit, words):
    async with (
        front_door(limits={"max_generation": limit}) as door,
        attached(door, FakeModelServer("one")) as (fake,),
    ):
        fake.answer(asyncio.Event())
        refusal = check((await door.generate()).refused, Reason.DEADLINE_EXCEEDED)
        # The server's own clock may be the first to ring.
        assert refusal.message.endswith(words) or "Deadline" in refusal.message


async def test_methods_that_do_not_exist_are_unimplemented():
    async with front_door() as door, model_server() as server:
        for link, name in (
            (door.channel, "/modelyard.v1.Orchestrator/Destroy"),
            (door.channel, "/modelyard.v1.ModelServer/Generate"),
            (server.channel, "/modelyard.v1.Orchestrator/Generate"),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await link.unary_unary(name)(b"")
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_a_feature_that_the_engine_lacks_is_unsupported():
    # Straight at the model server: the control plane would not have chosen it.
    models = [{"name": "plain", "features": ["streaming"]}]
    async with model_server(engine_settings={"models": models}) as server:
        request = model_server_pb2.ModelServerGenerateRequest(model="plain", input=ask(logprobs=True).input)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await server.stub.Generate(request).read()
        check(from_rpc_error(caught.value), Reason.UNSUPPORTED)


async def test_only_draining_servers_are_waited_for():
    async with front_door(queue={"timeout": {"normal": 0.4}}) as door, attached(door, FakeModelServer("one")):
        assert (await door.drain("one")).lease_state == DRAINING
        reply = await door.generate()
        assert reply.reason in ("SERVERS_AWAY", "QUEUE_TIMEOUT")
        assert "one is draining" in reply.refused.message


async def test_a_draining_control_plane_finishes_what_runs_and_refuses_the_rest():
    plane = ControlPlane(settings(drain_grace=20.0), SystemClock())
    address = await plane.start()
    async with client(address, plane) as door, attached(door, FakeModelServer("one")) as (fake,):
        rest = asyncio.Event()
        fake.answer("first", rest, "second")
        streaming = await door.stream(ask()).first_delta()
        stopping = asyncio.create_task(plane.stop())

        async def refuses() -> bool:
            return (await door.generate()).reason == "DRAINING"

        await until(refuses)
        check((await door.generate()).refused, Reason.DRAINING)
        check(
            await door.refusal(door.stub.Embed(orchestrator_pb2.EmbedRequest(inputs=["x"]))),
            Reason.DRAINING,
        )
        assert not stopping.done()
        rest.set()
        assert (await streaming.rest()).text == "firstsecond"
        assert streaming.reply.done.finish_reason == generation_pb2.FINISH_REASON_STOP
        await stopping


async def test_refusals_are_counted_by_reason():
    async with front_door() as door:
        await door.generate()
        await door.generate(ask(n=2))
        counted = door.plane.metrics.registry.get_sample_value
        for reason in ("NO_CAPABLE_SERVER", "INVALID_REQUEST"):
            assert counted("modelyard_requests_total", {"method": "Generate", "outcome": reason}) == 1
