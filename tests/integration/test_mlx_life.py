"""The life of a real MLX model: out of memory and back, a thread that dies or sticks."""

from __future__ import annotations

import asyncio
import importlib.util
import threading
from dataclasses import replace
from typing import Any

import grpc
import grpc.aio
import pytest

from model_servers.engine import (
    EngineFailed,
    Finished,
    GenerationRequest,
    Health,
    ManagesModels,
    Message,
    ModelState,
    Restarts,
    Role,
    Sampling,
    UnknownModel,
)
from model_servers.engines._mlx.loading import Model, load
from model_servers.engines.mlx import MlxEngine, MlxSettings
from modelyard.rpc.errors import from_rpc_error
from modelyard.rpc.reasons import Reason
from modelyard.v1 import fleet_pb2, model_server_pb2
from tests.harness.model_servers import eventually, model_server, request

pytestmark = pytest.mark.skipif(importlib.util.find_spec("mlx_lm") is None, reason="the extra mlx is not installed")


def ask(text: str = "What is modelyard?", tokens: int = 20) -> GenerationRequest:
    message = Message(Role.USER, (text,))
    return GenerationRequest("m", messages=(message,), sampling=Sampling(max_tokens=tokens, temperature=0.0))


async def answer(engine: MlxEngine, asked: GenerationRequest) -> str:
    text = ""
    async for item in engine.generate(asked):
        delta = item.last if isinstance(item, Finished) else item
        text += delta.text if delta is not None else ""
    return text


async def states(steps) -> list[ModelState]:
    return [progress.state async for progress in steps]


def held() -> int:
    import mlx.core as mx

    return int(mx.get_active_memory())


class Gated:
    """Loads a model whose network waits for a gate, or that does not load at all."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.stuck = threading.Event()
        """Set when something waits before the gate."""
        self.loads = 0
        self.error: Exception | None = None

    def __call__(self, settings: MlxSettings) -> Model:
        self.loads += 1
        if self.error is not None:
            raise self.error
        model = load(settings)
        return replace(model, network=_Network(model.network, self))


class _Network:
    def __init__(self, network: Any, gated: Gated) -> None:
        self._network = network
        self._gated = gated

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self._gated.gate.is_set():
            self._gated.stuck.set()
            self._gated.gate.wait(30)
        return self._network(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._network, name)


async def test_unloading_gives_the_memory_back_and_a_request_brings_the_model_back():
    engine = MlxEngine(MlxSettings(name="m"))
    assert isinstance(engine, ManagesModels) and isinstance(engine, Restarts)
    await engine.start()
    try:
        (model,) = engine.status().models
        assert model.state is ModelState.WARM and model.load_seconds and model.load_seconds > 0
        assert model.memory_bytes > 1_000_000
        before = await answer(engine, ask())
        prompt = await engine.count_tokens(ask())
        full = held()
        assert engine.status().memory_used_bytes >= model.memory_bytes
        assert await states(engine.unload("m")) == [ModelState.COLD]
        assert full - held() >= 0.9 * model.memory_bytes
        assert engine.status().models[0].state is ModelState.COLD
        assert engine.status().memory_used_bytes < 0.1 * model.memory_bytes
        assert await engine.count_tokens(ask()) == prompt  # the tokenizer stays
        assert await states(engine.unload("m")) == [ModelState.COLD]
        assert await answer(engine, ask()) == before
        assert engine.status().models[0].state is ModelState.WARM
        assert await states(engine.load("m")) == [ModelState.LOADING, ModelState.WARM]
        assert await states(engine.pull("m")) == [ModelState.WARM]
        with pytest.raises(UnknownModel):
            await states(engine.load("other"))
    finally:
        await engine.close()


async def test_a_model_with_running_requests_is_not_unloaded():
    loader = Gated()
    engine = MlxEngine(MlxSettings(name="m"), loader=loader)
    await engine.start()
    try:
        loader.gate.clear()
        asked = asyncio.create_task(answer(engine, ask()))
        await eventually(loader.stuck.is_set)
        leaving = asyncio.create_task(states(engine.unload("m")))
        await asyncio.sleep(0)  # the order is given while the first step is being computed
        loader.gate.set()
        with pytest.raises(EngineFailed, match="running requests"):
            await leaving
        assert await asked
    finally:
        loader.gate.set()
        await engine.close()


async def test_lazy_knows_the_model_without_reading_it():
    loader = Gated()
    engine = MlxEngine(MlxSettings(name="m", lazy=True), loader=loader)
    eager = MlxEngine(MlxSettings(name="m"))
    await eager.start()
    described = eager.status().models[0]
    await eager.close()
    await engine.start()
    try:
        (model,) = engine.status().models
        assert (engine.status().health, model.state, loader.loads) == (Health.READY, ModelState.COLD, 0)
        known = replace(model, state=described.state, memory_bytes=0, load_seconds=None)
        assert known == replace(described, memory_bytes=0, load_seconds=None)
        assert 0.8 < model.memory_bytes / described.memory_bytes < 1.2
        texts = await asyncio.gather(answer(engine, ask()), answer(engine, ask()), engine.embed("m", ["x"]))
        assert texts[0] == texts[1] and loader.loads == 1
        progress = engine.status().progress
        await answer(engine, ask(tokens=5))
        assert engine.status().progress >= progress + 5
    finally:
        await engine.close()


async def test_a_model_that_does_not_load_fails_its_requests_and_may_load_later():
    loader = Gated()
    loader.error = EngineFailed("the disk is gone")
    engine = MlxEngine(MlxSettings(name="m", lazy=True), loader=loader)
    await engine.start()
    try:
        for attempt in (answer(engine, ask()), states(engine.load("m")), engine.embed("m", ["x"])):
            with pytest.raises(EngineFailed, match="the disk is gone"):
                await attempt
        assert engine.status().health is Health.READY and engine.status().load.waiting == 0
        loader.error = None
        assert await answer(engine, ask())
    finally:
        await engine.close()


async def test_a_stuck_thread_cannot_be_restarted_until_it_ends():
    loader = Gated()
    engine = MlxEngine(MlxSettings(name="m"), loader=loader, thread_seconds=0.2)
    await engine.start()
    try:
        loader.gate.clear()
        asked = asyncio.create_task(answer(engine, ask()))
        await eventually(loader.stuck.is_set)
        with pytest.raises(EngineFailed, match="exit_when_stuck"):
            await engine.restart()
        loader.gate.set()
        with pytest.raises(EngineFailed):
            await asked
        thread = engine._worker.thread
        await eventually(lambda: not thread.is_alive())
        await engine.restart()
        assert await answer(engine, ask()) and loader.loads == 2
    finally:
        loader.gate.set()
        await engine.close()


async def test_over_grpc_unload_request_and_a_stall_of_the_thread():
    loader = Gated()
    engine = MlxEngine(MlxSettings(name="m"), loader=loader, thread_seconds=0.2)
    async with model_server(engine, stall_seconds=0.5, canary_seconds=0) as server:
        first = await server.generate(request("What is modelyard?", model="m", temperature=0.0, max_tokens=20))
        unload = server.stub.UnloadModel(model_server_pb2.ModelServerUnloadModelRequest(model="m"))
        assert [response.progress.state async for response in unload] == [fleet_pb2.MODEL_STATE_COLD]
        report = await server.report()
        assert report.models[0].state == fleet_pb2.MODEL_STATE_COLD
        assert report.hardware.memory_used_bytes < report.models[0].memory_bytes
        again = await server.generate(request("What is modelyard?", model="m", temperature=0.0, max_tokens=20))
        assert again.text == first.text
        report = await server.report()
        assert report.models[0].state == fleet_pb2.MODEL_STATE_WARM and report.models[0].HasField("load_time")

        loader.gate.clear()
        asked = asyncio.create_task(server.generate(request("What is a lease?", model="m")))

        async def sick() -> str:
            report = await server.report()
            return report.health_detail if report.health == fleet_pb2.SERVER_HEALTH_UNHEALTHY else ""

        assert "no token for" in await eventually(sick)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await asked
        assert from_rpc_error(caught.value).reason is Reason.ENGINE_FAILED
        loader.gate.set()

        async def well() -> bool:
            return (await server.report()).health == fleet_pb2.SERVER_HEALTH_READY

        await eventually(well)
        assert (await server.generate(request(model="m", max_tokens=5))).result is not None
