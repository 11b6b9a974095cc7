"""The published fake plays the steps of a model's life."""

from __future__ import annotations

import asyncio

import grpc
import grpc.aio
import pytest

from modelyard.rpc.channels import channel
from modelyard.rpc.errors import Refusal, from_rpc_error
from modelyard.rpc.reasons import Reason
from modelyard.testing import FakeModelServer, model_info, model_progress
from modelyard.v1 import fleet_pb2, model_server_pb2, model_server_pb2_grpc

ABSENT, PULLING, COLD, LOADING, WARM = (
    fleet_pb2.MODEL_STATE_ABSENT,
    fleet_pb2.MODEL_STATE_PULLING,
    fleet_pb2.MODEL_STATE_COLD,
    fleet_pb2.MODEL_STATE_LOADING,
    fleet_pb2.MODEL_STATE_WARM,
)


async def test_steps_play_their_script_and_move_the_model():
    async with FakeModelServer(models=[model_info("a", state=ABSENT)]) as fake, channel(fake.address) as link:
        stub = model_server_pb2_grpc.ModelServerStub(link)
        pull = stub.PullModel(model_server_pb2.ModelServerPullModelRequest(model="a"))
        assert [(step.progress.state, step.progress.completed_bytes) async for step in pull] == [
            (PULLING, 0),
            (PULLING, 50),
            (COLD, 100),
        ]
        gate = asyncio.Event()
        fake.steps("LoadModel", model_progress(LOADING), gate, model_progress(WARM))
        load = stub.LoadModel(model_server_pb2.ModelServerLoadModelRequest(model="a"))
        assert (await load.read()).progress.state == LOADING
        assert fake.report().models[0].state == LOADING
        gate.set()
        assert (await load.read()).progress.state == WARM
        fake.steps("UnloadModel", Refusal(Reason.OUT_OF_MEMORY, "full"))
        for model, reason in (("a", Reason.OUT_OF_MEMORY), ("b", Reason.UNKNOWN_MODEL)):
            unload = stub.UnloadModel(model_server_pb2.ModelServerUnloadModelRequest(model=model))
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await unload.read()
            assert from_rpc_error(caught.value).reason is reason
        assert [call.method for call in fake.calls] == ["PullModel", "LoadModel", "UnloadModel", "UnloadModel"]
