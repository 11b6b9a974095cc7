"""Engines that fall silent, over real gRPC: who notices, what is said, how it ends."""

from __future__ import annotations

import time
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from model_servers.engine import CANARY_ID, EngineFailed, EngineStatus, GenerationRequest
from model_servers.engines.simulated import SimulatedEngine, SimulatedSettings
from modelyard.rpc.errors import Refusal, from_rpc_error
from modelyard.rpc.reasons import Reason
from modelyard.v1 import fleet_pb2
from tests.harness.model_servers import Running, eventually, model_server, report_hearer, request

READY, UNHEALTHY = fleet_pb2.SERVER_HEALTH_READY, fleet_pb2.SERVER_HEALTH_UNHEALTHY
STALL = {"kind": "stall", "tokens": 2, "seconds": 0, "at_request": 2}
"""The second request gets two tokens; from then on the engine produces nothing, and says nothing."""


class Observed(SimulatedEngine):
    """Counts canaries, restarts and questions for its status."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(SimulatedSettings(**{"instant": True, **settings}))
        self.canaries = 0
        self.restarts = 0
        self.asked = 0

    def status(self) -> EngineStatus:
        self.asked += 1
        return super().status()

    async def generate(self, request: GenerationRequest):
        self.canaries += request.request_id == CANARY_ID
        async for item in super().generate(request):
            yield item

    async def restart(self) -> None:
        self.restarts += 1
        await super().restart()


class Unrestartable(Observed):
    restart = None  # type: ignore[assignment]


async def refused(awaitable) -> Refusal:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await awaitable
    return from_rpc_error(caught.value)


async def until_health(server: Running, health: int) -> fleet_pb2.ServerReport:
    async def reached() -> fleet_pb2.ServerReport | None:
        report = await server.report()
        return report if report.health == health else None

    return await eventually(reached)


async def test_a_stall_is_found_reported_and_mended_by_a_restart():
    slow_start = {"instant": False, "start_seconds": 0.3}
    fast = dict.fromkeys(("decode_tokens_per_second", "aggregate_tokens_per_second"), 0)
    engine = Observed(faults=[STALL], **slow_start, **fast)
    async with (
        report_hearer() as (heard, address),
        model_server(engine, stall_seconds=0.4, canary_seconds=0, orchestrators=(address,)) as server,
    ):
        # The pace is known: prompts get no extra time.
        assert (await server.generate(request("x" * 400))).result is not None
        await heard.until(lambda report: report.health == READY and report.lease_epoch == 1)
        began = time.monotonic()
        refusal = await refused(server.generate(request(), timeout=30))
        assert time.monotonic() - began < 4
        assert refusal.reason is Reason.ENGINE_FAILED and "no token for 0." in refusal.message
        sick = await heard.until(lambda report: report.health == UNHEALTHY)
        assert sick.health_detail.startswith("no token for 0.") and "on model simulated" in sick.health_detail
        assert sick.models[0].state == fleet_pb2.MODEL_STATE_FAILED
        heard.reports.clear()
        await heard.until(lambda report: report.health == READY)
        assert (await server.generate(request())).result is not None
        assert engine.restarts == 1 and engine.canaries == 1


async def test_without_a_restart_canaries_tell_when_it_works_again():
    engine = Unrestartable(faults=[{**STALL, "seconds": 1.5}])
    async with model_server(engine, stall_seconds=0.3, canary_seconds=0) as server:
        health = health_pb2_grpc.HealthStub(server.channel)
        states = health.Watch(health_pb2.HealthCheckRequest(service="modelyard.v1.ModelServer"))
        assert (await states.read()).status == health_pb2.HealthCheckResponse.SERVING
        await server.generate(request("x" * 400))
        assert (await refused(server.generate(request()))).reason is Reason.ENGINE_FAILED
        assert (await states.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        refusal = await refused(server.generate(request()))
        assert refusal.reason is Reason.ENGINE_FAILED and "not healthy: no token" in refusal.message
        assert (await states.read()).status == health_pb2.HealthCheckResponse.SERVING
        assert (await server.generate(request())).result is not None
        assert engine.canaries >= 1
        states.cancel()


async def test_a_canary_finds_what_is_silent_while_idle_and_its_recovery():
    engine = Unrestartable(faults=[{**STALL, "seconds": 2.0}])
    async with model_server(engine, stall_seconds=0.3, canary_seconds=0.2) as server:
        await server.generate(request("x" * 400))
        stalled = server.stub.Generate(request())
        await stalled.read()
        stalled.cancel()  # from here on nobody waits for the engine
        report = await until_health(server, UNHEALTHY)
        assert "no token" in report.health_detail and report.load.running == 0
        await until_health(server, READY)
        assert engine.canaries >= 2


async def test_canaries_are_neither_load_nor_statistics():
    engine = Observed(instant=False, decode_tokens_per_second=0, prefill_tokens_per_second=20)
    async with model_server(engine, canary_seconds=0.1) as server:
        told = (await server.report()).models[0].performance  # what the engine expects, nothing measured

        # Each canary takes some tenths of a second: reports are made while one runs.
        async def seen() -> bool:
            report = await server.report()
            assert (report.load.running, report.load.waiting, report.load.foreign) == (0, 0, 0)
            assert report.models[0].performance == told
            return engine.canaries >= 2

        await eventually(seen)


@pytest.mark.parametrize("why", ["metered", "busy", "draining", "off"])
async def test_no_canaries_where_they_would_cost_or_disturb(why: str):
    engine = Observed(faults=[{"kind": "hang", "tokens": 1}])
    settings = {"canary_seconds": 0 if why == "off" else 0.01, "stall_seconds": 60}
    async with report_hearer() as (heard, address):
        if why == "draining":
            heard.desired = fleet_pb2.DESIRED_STATE_DRAIN
        async with model_server(engine, metered=why == "metered", orchestrators=(address,), **settings) as server:
            if why == "busy":
                running = server.stub.Generate(request())
                await running.read()
            if why == "draining":
                await heard.until(lambda report: report.state == fleet_pb2.DESIRED_STATE_DRAIN)
            before, asked = engine.canaries, engine.asked
            # The watchdog looks every quarter of a second, others often: time for several canaries.
            await eventually(lambda: engine.asked > asked + 40)
            assert engine.canaries == before
            assert why == "draining" or not before
            if why == "busy":
                running.cancel()


async def test_what_must_be_warm_is_loaded_after_a_restart():
    engine = Observed(models=[{"name": "a", "state": "cold"}], faults=[{**STALL, "at_request": 1}])
    async with model_server(engine, stall_seconds=0.2, canary_seconds=0, keep_warm=("a",)) as server:
        await eventually(lambda: engine.status().models[0].state == fleet_pb2.MODEL_STATE_WARM)
        refusal = await refused(server.generate(request("x", model="a")))
        assert refusal.reason is Reason.ENGINE_FAILED
        await until_health(server, READY)
        await eventually(lambda: engine.status().models[0].state == fleet_pb2.MODEL_STATE_WARM)
        assert engine.restarts == 1


class Stuck(Observed):
    async def restart(self) -> None:
        self.restarts += 1
        raise EngineFailed("its thread does not end")


@pytest.mark.parametrize("exits", [True, False])
async def test_an_engine_that_cannot_be_restarted_ends_the_process_if_told_so(exits: bool, caplog):
    engine = Stuck(faults=[STALL])
    async with model_server(
        engine, stall_seconds=0.2, canary_seconds=0, exit_when_stuck=exits, drain_grace=0.1
    ) as server:
        assert (await server.generate(request("x" * 400))).result is not None
        refusal = await refused(server.generate(request("x")))
        assert refusal.reason is Reason.ENGINE_FAILED
        if exits:
            assert await server.task == 1
            assert "the engine is stuck: its thread does not end" in caplog.text
        else:
            await eventually(lambda: engine.restarts >= 2)  # tried again, after a pause
            assert (await server.report()).health == UNHEALTHY


async def test_an_engine_that_says_itself_that_it_is_broken_is_restarted():
    engine = Observed(faults=[{"kind": "disconnect", "tokens": 0, "seconds": 600, "at_request": 1}])
    async with model_server(engine, stall_seconds=0.3, canary_seconds=0) as server:
        assert (await refused(server.generate(request()))).reason is Reason.ENGINE_FAILED
        assert "loss of the connection" in (await server.report()).health_detail
        await until_health(server, READY)
        assert engine.restarts == 1
