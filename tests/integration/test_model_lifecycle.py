"""The life of models as the control plane sees it: states in reports and decisions, orders and their progress."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc.aio
import pytest

from modelyard.rpc.errors import Refusal, Violation, from_rpc_error
from modelyard.rpc.reasons import Reason
from modelyard.testing import FakeModelServer, model_info
from modelyard.v1 import fleet_pb2, orchestrator_pb2, selection_pb2
from tests.harness.front_door import LOST, SUSPECT, FrontDoor, ask, attached, front_door
from tests.harness.managing import ABSENT, COLD, FAILED, LOADING, PULLING, WARM, ManagingServer, step

METHODS = ("PullModel", "LoadModel", "UnloadModel")


class Order:
    """One PullModel, LoadModel or UnloadModel call."""

    def __init__(self, door: FrontDoor, method: str, model: str = "fake", server_id: str = "", **options: Any) -> None:
        request = getattr(orchestrator_pb2, f"{method}Request")(model=model, server_id=server_id)
        self.call = getattr(door.stub, method)(request, **options)
        self.steps: list[Any] = []

    async def read(self) -> bool:
        message = await self.call.read()
        if message is grpc.aio.EOF:
            return False
        self.steps.append(message)
        return True

    async def whole(self) -> list[Any]:
        async with asyncio.timeout(20):
            while await self.read():
                pass
        return self.steps

    async def refused(self) -> Refusal:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await self.whole()
        return from_rpc_error(caught.value)


# ------------------------------------------------------------------- reports ---


async def test_what_a_server_tells_of_its_models_is_shown():
    life = {
        "state": LOADING,
        "state_detail": "layer 3 of 32",
        "memory_bytes": 4_100_000_000,
        "load_time": {"seconds": 12, "nanos": 500_000_000},
        "fingerprint": "vllm 0.9, bf16",
    }
    fake = ManagingServer("gpu-1", models=[model_info("m", **life), model_info("n")])
    fake.told = {
        "hardware": {"memory_bytes": 80 << 30, "memory_used_bytes": 41 << 30},
        "pool": {"size": 8, "in_use": 2, "opened": 3, "reused": 9},
    }
    async with front_door() as door, attached(door, fake):
        report = (await door.server("gpu-1")).report
        told, plain = report.models
        sent = fake.report().models[0]
        for field in ("state", "state_detail", "memory_bytes", "load_time", "fingerprint"):
            assert getattr(told, field) == getattr(sent, field), field
        assert plain.state == WARM and not plain.HasField("load_time")
        assert report.engine.manages_models
        assert report.hardware == fake.report().hardware
        assert report.pool == fake.report().pool
        models = (await door.stub.ListModels(orchestrator_pb2.ListModelsRequest())).models
        assert models[0].placements[0].info.state == LOADING
    async with front_door() as door, attached(door, FakeModelServer("mac-1")):
        report = (await door.server("mac-1")).report
        assert not report.HasField("pool")


async def test_a_new_fingerprint_forgets_what_was_learned():
    async with front_door() as door, attached(door, ManagingServer()) as (fake,):
        fake.become(WARM, fingerprint="x")
        await door.until_server("fake-1", lambda status: status.report.models[0].fingerprint == "x")
        fake.inject_error("Generate", Refusal(Reason.ENGINE_FAILED, "no"))
        assert (await door.generate()).done  # at the second attempt
        runtime = (await door.server("fake-1")).models[0]
        assert (runtime.requests, runtime.failures) == (2, 1) and runtime.success_rate < 1
        await fake.detach()
        await fake.attach(door.address)
        assert (await door.server("fake-1")).models[0].requests == 2
        fake.become(WARM, fingerprint="y")
        await door.until_server("fake-1", lambda status: status.report.models[0].fingerprint == "y")
        runtime = (await door.server("fake-1")).models[0]
        assert (runtime.requests, runtime.failures, runtime.success_rate) == (0, 0, 1.0)
        assert not runtime.HasField("ttft")


# ------------------------------------------------------------------ choosing ---


def rejections(decision: selection_pb2.Decision, server_id: str) -> list[str]:
    (found,) = [candidate for candidate in decision.candidates if candidate.server_id == server_id]
    return [f"{selection_pb2.RejectionReason.Name(each.reason)[17:]} {each.detail}" for each in found.rejections]


async def test_a_warm_model_is_preferred_and_the_decision_says_why():
    cold = FakeModelServer("a-cold", [model_info("m", state=COLD, load_time={"seconds": 12})])
    warm = FakeModelServer("b-warm", [model_info("m")])
    async with front_door() as door, attached(door, cold, warm):
        reply = await door.generate(ask(explain=True))
        assert reply.done.server_id == "b-warm"
        told = "LOADING_TAKES_LONGER loading takes about 12.0 s; b-warm/m can start it now"
        assert rejections(reply.decisions[0], "a-cold") == [told]
        assert (await door.generate(ask(server_id="a-cold"))).done.server_id == "a-cold", "it loads when it must"


async def test_the_request_waits_for_the_warm_one_or_has_the_cold_one_loaded():
    cold = FakeModelServer("a-cold", [model_info("m", state=COLD, load_time={"seconds": 12})])
    warm = FakeModelServer("b-warm", [model_info("m")], slots=1)
    async with front_door() as door, attached(door, cold, warm):
        assert (await door.generate()).done  # measures how long a request takes: milliseconds
        gate = warm.gate("Generate")
        held = door.stream(ask())
        await gate.arrived.wait()
        decision = await door.explain(ask())
        assert decision.verdict == selection_pb2.VERDICT_WAIT
        (told,) = rejections(decision, "a-cold")
        assert told.startswith(
            "LOADING_TAKES_LONGER loading takes about 12.0 s; b-warm/m is expected to start it in 0."
        )
        waiting = door.stream(ask())
        cold.models[0].load_time.FromMicroseconds(1)  # it would be loaded at once
        cold.report_now()
        assert (await waiting.rest()).done.server_id == "a-cold"
        gate.open()
        assert (await held.rest()).done.server_id == "b-warm"


async def test_states_over_time():
    async with front_door() as door, attached(door, ManagingServer()) as (fake,):

        async def decided(state: fleet_pb2.ModelState, detail: str = "") -> selection_pb2.Decision:
            fake.become(state, state_detail=detail)
            await door.until_server("fake-1", lambda status: status.report.models[0].state == state)
            return await door.explain(ask())

        assert rejections(await decided(ABSENT), "fake-1") == ["MODEL_NOT_HERE the model is absent"]
        assert (await door.generate()).reason == "SERVERS_AWAY"
        decision = await decided(PULLING, "40 %")
        assert rejections(decision, "fake-1") == ["MODEL_NOT_HERE the model is still pulling: 40 %"]
        waiting = door.stream(ask())
        for state in (COLD, LOADING, WARM):
            assert (await decided(state, " ")).verdict == selection_pb2.VERDICT_CHOSEN
        assert (await waiting.rest()).done.server_id == "fake-1", "what was asked during the pull is answered"
        decision = await decided(FAILED, "no token for 30 s")
        assert rejections(decision, "fake-1") == ["MODEL_NOT_HERE the model has failed: no token for 30 s"]
        refused = await door.generate()
        assert refused.reason == "SERVERS_AWAY"
        assert "the model has failed: no token for 30 s" in refused.refused.message


async def test_the_estimated_price_is_told():
    priced = model_info("m", price={"prompt_usd_per_million_tokens": 2.0, "completion_usd_per_million_tokens": 10.0})
    async with front_door() as door, attached(door, FakeModelServer("one", [priced])):
        asked = orchestrator_pb2.ExplainSelectionRequest(request=ask("Hello", max_tokens=30))
        answer = await door.stub.ExplainSelection(asked)
        prompt = answer.estimated_prompt_tokens
        assert prompt > 0
        assert answer.decision.candidates[0].estimated_cost_nano_usd == prompt * 2_000 + 30 * 10_000


# -------------------------------------------------------------------- orders ---


@pytest.mark.parametrize("method", METHODS)
async def test_progress_is_relayed(method: str):
    async with front_door() as door, attached(door, ManagingServer()) as (fake,):
        steps = await Order(door, method).whole()
        assert [message.progress for message in steps] == list(fake.steps[method])
        assert {message.server_id for message in steps} == {"fake-1"}
        assert fake.calls_of(method)[0].request.model == "fake"


async def test_steps_arrive_as_they_happen():
    async with front_door() as door, attached(door, ManagingServer()) as (fake,):
        go_on = asyncio.Event()
        fake.steps["PullModel"] = (step(PULLING, 1, 2, "layer 1"), go_on, step(COLD, 2, 2))
        order = Order(door, "PullModel")
        assert await order.read()
        assert (order.steps[0].progress.completed_bytes, order.steps[0].progress.detail) == (1, "layer 1")
        go_on.set()
        assert len(await order.whole()) == 2


async def test_the_server_that_is_meant_is_found():
    fakes = (
        ManagingServer("a", models=[model_info("m", "ollama")]),
        ManagingServer("b", models=[model_info("n", "ollama")]),
        FakeModelServer("c", [model_info("m"), model_info("o")]),
    )
    async with front_door() as door, attached(door, *fakes) as (a, b, _):
        for model in ("m", "ollama/m"):
            assert (await Order(door, "LoadModel", model).whole())[0].server_id == "a"
        assert [call.request.model for call in a.calls_of("LoadModel")] == ["m", "m"], "ollama/m is our name for it"
        assert (await Order(door, "UnloadModel", "n").whole())[0].server_id == "b"
        refusal = await Order(door, "PullModel", "new:7b").refused()
        assert refusal.reason is Reason.INVALID_REQUEST
        assert [violation.field for violation in refusal.violations] == ["server_id"]
        assert "can pull it: a, b" in refusal.message
        assert (await Order(door, "PullModel", "new:7b", "b").whole())[0].server_id == "b"
        assert b.calls_of("PullModel")[0].request.model == "new:7b"
        # What only a server knows is left to it.
        assert (await Order(door, "LoadModel", "unlisted", "a").whole())[0].server_id == "a"


async def test_orders_that_nobody_can_carry_out():
    fakes = (ManagingServer("a", models=[model_info("m")]), FakeModelServer("c", [model_info("m"), model_info("o")]))
    async with front_door() as door:
        refusal = await Order(door, "PullModel", "m").refused()
        assert (refusal.reason, refusal.message) == (Reason.NO_CAPABLE_SERVER, "no model server manages models")
        async with attached(door, *fakes):
            for method in METHODS:
                refusal = await Order(door, method, "").refused()
                assert refusal.reason is Reason.INVALID_REQUEST and refusal.violations[0].field == "model"
                assert (await Order(door, method, "m", "z").refused()).reason is Reason.UNKNOWN_SERVER
                refusal = await Order(door, method, "m", "c").refused()
                assert refusal.reason is Reason.UNSUPPORTED
                assert refusal.message == "engine fake of c manages no models"
            refusal = await Order(door, "LoadModel", "nope").refused()
            assert refusal.reason is Reason.UNKNOWN_MODEL and "known: m" in refusal.message
            refusal = await Order(door, "LoadModel", "o").refused()
            assert refusal.reason is Reason.UNSUPPORTED and "o is on c only" in refusal.message
    async with front_door(fleet={"warm_up": 30.0}) as door:
        assert (await Order(door, "PullModel", "m").refused()).reason is Reason.FLEET_WARMING_UP


async def test_orders_are_refused_while_the_server_is_away():
    async with front_door() as door, attached(door, ManagingServer()) as (fake,):
        await fake.detach()
        await door.until_server("fake-1", lambda status: status.lease_state == SUSPECT)
        for server_id in ("", "fake-1"):
            refusal = await Order(door, "LoadModel", "fake", server_id).refused()
            assert refusal.reason is Reason.SERVERS_AWAY and refusal.retry_after == 1.0
            assert "SUSPECT" in refusal.message
        assert not fake.calls_of("LoadModel")


async def test_a_draining_server_still_obeys():
    async with front_door() as door, attached(door, ManagingServer()):
        await door.drain("fake-1")
        assert (await Order(door, "UnloadModel").whole())[-1].progress.state == COLD


@pytest.mark.parametrize(
    ("told", "heard"),
    [
        (Reason.UNKNOWN_MODEL, Reason.UNKNOWN_MODEL),
        (Reason.UNSUPPORTED, Reason.UNSUPPORTED),
        (Reason.OUT_OF_MEMORY, Reason.OUT_OF_MEMORY),
        (Reason.CREDENTIALS_REJECTED, Reason.CREDENTIALS_REJECTED),
        (Reason.RATE_LIMITED, Reason.RATE_LIMITED),
        (Reason.ENGINE_FAILED, Reason.ENGINE_FAILED),
        (Reason.DRAINING, Reason.SERVERS_AWAY),
        (Reason.INTERNAL, Reason.ENGINE_FAILED),
        (Reason.SUPERSEDED, Reason.ENGINE_FAILED),
        (Reason.QUEUE_FULL, Reason.ENGINE_FAILED),
    ],
)
async def test_refusals_of_the_server_are_passed_on(told: Reason, heard: Reason):
    async with front_door() as door, attached(door, ManagingServer()) as (fake,):
        refusal = Refusal(told, "why", [Violation("f", "d")], retry_after=2.0, metadata={"k": "v"})
        fake.steps["PullModel"] = (step(PULLING, 1, 2), refusal)
        order = Order(door, "PullModel")
        got = await order.refused()
        assert (got.reason, got.message, got.retry_after) == (heard, "fake-1: why", 2.0)
        assert got.metadata == {"k": "v", "server_id": "fake-1"}
        assert len(order.steps) == 1


async def test_cancelling_and_deadlines_reach_the_server():
    async with front_door() as door, attached(door, ManagingServer()) as (fake,):
        fake.steps["PullModel"] = (step(PULLING, 1, 2), asyncio.Event())
        order = Order(door, "PullModel")
        assert await order.read()
        order.call.cancel()
        await fake.until(lambda: fake.calls_of("PullModel")[0].outcome == "cancelled")
        assert fake.calls_of("PullModel")[0].time_remaining is None, "it may take as long as it does"

        refusal = await Order(door, "PullModel", timeout=0.5).refused()
        assert refusal.reason is Reason.DEADLINE_EXCEEDED
        await fake.until(lambda: fake.calls_of("PullModel")[1].outcome == "cancelled")
        assert 0 < (fake.calls_of("PullModel")[1].time_remaining or 0) <= 1


async def test_an_order_ends_with_its_server():
    short = {"report_interval": 0.1, "lease_duration": 0.4}
    async with front_door(fleet=short) as door, attached(door, ManagingServer()) as (fake,):
        fake.steps["LoadModel"] = (step(LOADING), asyncio.Event())
        order = Order(door, "LoadModel")
        assert await order.read()
        await fake.detach()  # the connection of the order itself stays up
        await door.until_server("fake-1", lambda status: status.lease_state == LOST)
        refusal = await order.refused()
        assert refusal.reason is Reason.SERVERS_AWAY and refusal.message == "fake-1 was lost during the load"
        await fake.until(lambda: fake.calls_of("LoadModel")[0].outcome == "cancelled")

        await fake.attach(door.address)
        order = Order(door, "LoadModel")
        assert await order.read()
        await fake.stop()
        assert (await order.refused()).reason in (Reason.SERVERS_AWAY, Reason.ENGINE_FAILED)


@pytest.mark.parametrize(
    ("pieces", "words"),
    [
        ((), "ended the load with no word"),
        ((b"",), "ended the load with no word"),
        ((b"\xff\xfe garbage",), "sent what is no progress"),
        ((step(LOADING), b"\x0a\x7f\x08"), "sent what is no progress"),
        ((step(LOADING),), "ended the load with MODEL_STATE_LOADING"),
        ((step(FAILED, detail="it crashed"),), "ended the load with MODEL_STATE_FAILED"),
        ((step(99),), "ended the load with 99"),  # type: ignore[arg-type]
    ],
)
async def test_a_server_that_does_not_keep_to_the_contract(pieces: tuple[Any, ...], words: str):
    async with front_door() as door, attached(door, ManagingServer()) as (fake,):
        fake.steps["LoadModel"] = pieces
        refusal = await Order(door, "LoadModel").refused()
        assert refusal.reason is Reason.ENGINE_FAILED and words in refusal.message
        assert (await door.generate()).done


async def test_a_server_that_knows_no_orders():
    class Old(ManagingServer):
        """Says that it manages models and does not."""

        PullModel = LoadModel = UnloadModel = None  # type: ignore[assignment]

    async with front_door() as door, attached(door, Old()):
        for method in METHODS:
            assert (await Order(door, method).refused()).reason is Reason.UNSUPPORTED


async def test_endless_details_are_cut():
    async with front_door() as door, attached(door, ManagingServer()) as (fake,):
        fake.steps["LoadModel"] = (step(WARM, detail="x" * 100_000),)
        assert len((await Order(door, "LoadModel").whole())[0].progress.detail) == 300


async def test_a_stopping_control_plane_takes_no_orders_and_ends_those_it_has():
    async with front_door(drain_grace=0.2) as door, attached(door, ManagingServer()) as (fake,):
        fake.steps["PullModel"] = (step(PULLING), asyncio.Event())
        order = Order(door, "PullModel")
        assert await order.read()
        door.plane.servicer.stop_accepting()
        assert (await Order(door, "PullModel").refused()).reason is Reason.DRAINING
    await fake.until(lambda: fake.calls_of("PullModel")[0].outcome == "cancelled")
