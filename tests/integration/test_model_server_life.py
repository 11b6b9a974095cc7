"""Models that are pulled, loaded and unloaded, over real gRPC."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import grpc.aio
import pytest

from model_servers.engines.simulated import SimulatedEngine, SimulatedSettings
from modelyard.rpc.errors import Refusal, from_rpc_error
from modelyard.rpc.reasons import Reason
from modelyard.v1 import fleet_pb2, model_server_pb2
from tests.harness.model_servers import Running, eventually, model_server, report_hearer, request

ABSENT, PULLING, COLD, LOADING, WARM, FAILED = (
    fleet_pb2.MODEL_STATE_ABSENT,
    fleet_pb2.MODEL_STATE_PULLING,
    fleet_pb2.MODEL_STATE_COLD,
    fleet_pb2.MODEL_STATE_LOADING,
    fleet_pb2.MODEL_STATE_WARM,
    fleet_pb2.MODEL_STATE_FAILED,
)
ENDLESS = {"kind": "hang", "tokens": 1}


def models(*descriptions: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """Settings of a simulated engine that computes in no time, but pulls and loads as long as it is told."""
    speeds = ("prefill_tokens_per_second", "decode_tokens_per_second", "aggregate_tokens_per_second")
    return {"instant": False, **dict.fromkeys(speeds, 0), "models": descriptions, **settings}


def pull(server: Running, model: str):
    return server.stub.PullModel(model_server_pb2.ModelServerPullModelRequest(model=model))


def load(server: Running, model: str):
    return server.stub.LoadModel(model_server_pb2.ModelServerLoadModelRequest(model=model))


def unload(server: Running, model: str):
    return server.stub.UnloadModel(model_server_pb2.ModelServerUnloadModelRequest(model=model))


async def states_of(call) -> list[int]:
    """The states in order, repetitions left out."""
    states: list[int] = []
    async for response in call:
        if states[-1:] != [response.progress.state]:
            states.append(response.progress.state)
    return states


async def info(server: Running, model: str) -> fleet_pb2.ModelInfo:
    return next(info for info in (await server.report()).models if info.name == model)


async def until_state(server: Running, model: str, state: int) -> fleet_pb2.ModelInfo:
    async def reached() -> fleet_pb2.ModelInfo | None:
        found = await info(server, model)
        return found if found.state == state else None

    return await eventually(reached)


async def refused(awaitable) -> Refusal:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await awaitable
    return from_rpc_error(caught.value)


async def test_a_model_from_afar_to_memory_and_back():
    described = {"name": "a", "state": "absent", "pull_seconds": 0.1, "load_seconds": 0.1, "memory_bytes": 1000}
    async with model_server(engine_settings=models(described, memory_bytes=5000)) as server:
        report = await server.report()
        assert report.engine.manages_models and report.hardware.memory_used_bytes == 0
        assert report.models[0].state == ABSENT and report.models[0].memory_bytes == 1000
        progress = [response.progress async for response in pull(server, "a")]
        assert [step.state for step in (progress[0], progress[-1])] == [PULLING, COLD]
        assert progress[-1].completed_bytes == progress[-1].total_bytes == 1000
        assert sorted(step.completed_bytes for step in progress) == [step.completed_bytes for step in progress]
        assert await states_of(pull(server, "a")) == [COLD]  # here already
        assert await states_of(load(server, "a")) == [LOADING, WARM]
        assert await states_of(load(server, "a")) == [WARM]
        found = await info(server, "a")
        assert found.state == WARM and 90 <= found.load_time.ToMilliseconds() < 5000 and len(found.fingerprint) == 16
        assert (await server.report()).hardware.memory_used_bytes == 1000
        assert await states_of(unload(server, "a")) == [COLD]
        assert await states_of(unload(server, "a")) == [COLD]
        assert (await info(server, "a")).fingerprint == found.fingerprint


async def test_states_on_the_way_are_reported_at_once():
    described = {"name": "a", "state": "cold", "load_seconds": 0.4}
    async with (
        report_hearer(interval=30.0) as (heard, address),
        model_server(engine_settings=models(described), orchestrators=(address,)) as server,
    ):
        await heard.until(lambda report: report.lease_epoch == 1)
        await server.generate(request(model="a"))
        await heard.until(lambda report: report.models[0].state == WARM)
        seen = [report.models[0].state for report in heard.reports if report.models]
        assert [state for n, state in enumerate(seen) if state != seen[n - 1] or not n] == [COLD, LOADING, WARM]


async def test_refusals_name_the_reason():
    async with model_server(engine_settings=models({"name": "a", "state": "absent"})) as server:
        assert (await refused(states_of(pull(server, "")))).reason is Reason.INVALID_REQUEST
        for call in (pull, load, unload):
            assert (await refused(states_of(call(server, "nobody")))).reason is Reason.UNKNOWN_MODEL
        assert (await refused(states_of(load(server, "a")))).reason is Reason.UNKNOWN_MODEL
        assert (await refused(server.generate(request(model="a")))).reason is Reason.UNKNOWN_MODEL


async def test_an_engine_that_manages_no_models_says_so():
    class Plain(SimulatedEngine):
        load = None

    async with model_server(Plain(SimulatedSettings(instant=True))) as server:
        assert not (await server.report()).engine.manages_models
        for call in (pull, load, unload):
            assert (await refused(states_of(call(server, "simulated")))).reason is Reason.UNSUPPORTED
        assert (await server.generate(request())).result is not None


async def test_nothing_is_begun_while_draining():
    async with (
        report_hearer() as (heard, address),
        model_server(engine_settings=models({"name": "a", "state": "cold"}), orchestrators=(address,)) as server,
    ):
        heard.desired = fleet_pb2.DESIRED_STATE_DRAIN
        await heard.until(lambda report: report.state == fleet_pb2.DESIRED_STATE_DRAIN)
        assert (await refused(states_of(load(server, "a")))).reason is Reason.DRAINING


async def test_stopping_ends_a_step_and_says_why():
    described = {"name": "a", "state": "cold", "load_seconds": 60}
    async with model_server(engine_settings=models(described)) as server:
        call = load(server, "a")
        assert (await call.read()).progress.state == LOADING
        server.stopping.set()

        async def to_its_end() -> None:
            while await call.read() is not grpc.aio.EOF:
                pass

        assert (await refused(to_its_end())).reason is Reason.DRAINING
        assert await server.task == 0


async def test_calls_are_joined_and_the_last_cancel_stops_the_work():
    described = {"name": "a", "state": "cold", "load_seconds": 60}
    async with model_server(engine_settings=models(described)) as server:
        first, second = load(server, "a"), load(server, "a")
        assert (await first.read()).progress.state == (await second.read()).progress.state == LOADING
        asked = server.stub.Generate(request(model="a"))
        await server.until_load(running=1)
        first.cancel()
        second.cancel()
        assert (await info(server, "a")).state == LOADING  # the request still waits
        asked.cancel()
        await until_state(server, "a", COLD)


async def test_a_deadline_ends_the_wait_for_a_model():
    described = {"name": "a", "state": "cold", "load_seconds": 60}
    async with model_server(engine_settings=models(described), max_generation_seconds=0.2) as server:
        assert (await refused(server.generate(request(model="a")))).reason is Reason.DEADLINE_EXCEEDED
        asked = model_server_pb2.ModelServerEmbedRequest(model="a", inputs=["x"])
        assert (await refused(server.stub.Embed(asked))).reason is Reason.DEADLINE_EXCEEDED
        await until_state(server, "a", COLD)


async def test_a_request_loads_what_is_cold_and_statistics_do_not_suffer():
    described = {"name": "a", "state": "cold", "load_seconds": 0.5}
    async with model_server(engine_settings=models(described)) as server:
        answers = await asyncio.gather(*(server.generate(request(model="a")) for _ in range(3)))
        assert all(answer.result.timings.queued.ToMilliseconds() >= 400 for answer in answers)
        found = await info(server, "a")
        assert found.load_time.ToMilliseconds() >= 400 and found.performance.ttft.ToMilliseconds() < 400
        asked = model_server_pb2.ModelServerEmbedRequest(model="a", inputs=["x"])
        await states_of(unload(server, "a"))
        assert len((await server.stub.Embed(asked)).embeddings) == 1
        assert (await info(server, "a")).state == WARM


async def test_an_unload_lets_running_requests_end():
    async with model_server(engine_settings=models({"name": "a"}, faults=[{**ENDLESS, "at_request": 1}])) as server:
        running = server.stub.Generate(request(model="a"))
        await running.read()
        leaving = asyncio.create_task(states_of(unload(server, "a")))
        found = await until_state(server, "a", COLD)
        assert "requests" in found.state_detail
        assert not leaving.done()
        later = asyncio.create_task(server.generate(request(model="a")))
        running.cancel()
        assert await leaving == [COLD]
        assert (await later).result is not None


async def test_what_nobody_uses_is_unloaded_and_what_must_be_warm_is_loaded():
    described = ({"name": "kept", "state": "cold"}, {"name": "other"})
    async with model_server(engine_settings=models(*described), keep_warm=("kept",), idle_unload_seconds=0.2) as server:
        await until_state(server, "kept", WARM)
        await until_state(server, "other", COLD)
        assert (await server.generate(request(model="other"))).result is not None
        assert (await info(server, "kept")).state == WARM


async def test_idle_models_make_room_and_busy_ones_do_not():
    described = [{"name": name, "state": "cold", "memory_bytes": 100 << 20} for name in "abc"]
    async with model_server(
        engine_settings=models(*described, faults=[{**ENDLESS, "after_requests": 3}]), memory_limit_bytes=250 << 20
    ) as server:
        for name in "aba":
            await server.generate(request(model=name))
        running = server.stub.Generate(request(model="c"))
        await running.read()
        assert [model.state for model in (await server.report()).models] == [WARM, COLD, WARM]
        other = server.stub.Generate(request(model="a"))
        await other.read()
        refusal = await refused(server.generate(request(model="b")))
        assert refusal.reason is Reason.OUT_OF_MEMORY
        assert "a holds 100.0 MiB (1 requests)" in refusal.message and "c holds" in refusal.message
        running.cancel()
        other.cancel()


async def test_the_engines_own_memory_is_a_limit_too():
    described = [{"name": "a", "memory_bytes": 60}, {"name": "b", "state": "cold", "memory_bytes": 60}]
    async with model_server(engine_settings=models(*described, memory_bytes=100)) as server:
        assert (await refused(states_of(load(server, "b")))).reason is Reason.OUT_OF_MEMORY
        assert (await info(server, "b")).state == COLD


async def test_a_model_that_does_not_load_is_failed_until_it_does():
    described = {"name": "a", "state": "cold"}
    settings = models(described, faults=[{"kind": "refuse_load", "times": 1}])
    async with model_server(engine_settings=settings) as server:
        assert (await refused(server.generate(request(model="a")))).reason is Reason.ENGINE_FAILED
        found = await info(server, "a")
        assert found.state == FAILED and "does not load" in found.state_detail
        assert (await states_of(load(server, "a")))[-1] == WARM
        assert (await info(server, "a")).state == WARM
