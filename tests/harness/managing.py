"""A model server that manages models, by script."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from modelyard.rpc.errors import Refusal
from modelyard.testing import FakeModelServer
from modelyard.v1 import fleet_pb2, model_server_pb2

Item = fleet_pb2.ModelProgress | asyncio.Event | Refusal | bytes
"""A step is sent, an event waited for, a refusal raised; bytes are sent as they are."""

ABSENT, PULLING = fleet_pb2.MODEL_STATE_ABSENT, fleet_pb2.MODEL_STATE_PULLING
COLD, LOADING = fleet_pb2.MODEL_STATE_COLD, fleet_pb2.MODEL_STATE_LOADING
WARM, FAILED = fleet_pb2.MODEL_STATE_WARM, fleet_pb2.MODEL_STATE_FAILED


def step(state: fleet_pb2.ModelState, done: int = 0, total: int = 0, detail: str = "") -> fleet_pb2.ModelProgress:
    return fleet_pb2.ModelProgress(state=state, detail=detail, completed_bytes=done, total_bytes=total)


class ManagingServer(FakeModelServer):
    """Set `steps[method]` to say what PullModel, LoadModel and UnloadModel tell, `told` for more of the report."""

    def __init__(self, server_id: str = "fake-1", *, manages: bool = True, **fields: Any) -> None:
        super().__init__(server_id, **fields)
        self.manages = manages
        self.told: dict[str, Any] = {}
        self.steps: dict[str, tuple[Item, ...]] = {
            "PullModel": (step(PULLING, 50, 100), step(COLD, 100, 100)),
            "LoadModel": (step(LOADING), step(WARM)),
            "UnloadModel": (step(COLD),),
        }

    def report(self) -> fleet_pb2.ServerReport:
        report = super().report()
        report.engine.manages_models = self.manages
        report.MergeFrom(fleet_pb2.ServerReport(**self.told))
        return report

    def become(self, state: fleet_pb2.ModelState, **fields: Any) -> None:
        """Report all models in this state."""
        for model in self.models:
            model.MergeFrom(fleet_pb2.ModelInfo(state=state, **fields))
        self.report_now()

    async def PullModel(self, request: Any, context: Any) -> AsyncIterator[Any]:
        async for answer in self._play("PullModel", request, context, model_server_pb2.ModelServerPullModelResponse):
            yield answer

    async def LoadModel(self, request: Any, context: Any) -> AsyncIterator[Any]:
        async for answer in self._play("LoadModel", request, context, model_server_pb2.ModelServerLoadModelResponse):
            yield answer

    async def UnloadModel(self, request: Any, context: Any) -> AsyncIterator[Any]:
        answers = self._play("UnloadModel", request, context, model_server_pb2.ModelServerUnloadModelResponse)
        async for answer in answers:
            yield answer

    async def _play(self, method: str, request: Any, context: Any, response: Any) -> AsyncIterator[Any]:
        async with self._received(method, context, request):
            for item in self.steps[method]:
                if isinstance(item, Refusal):
                    raise item
                if isinstance(item, asyncio.Event):
                    await item.wait()
                elif isinstance(item, bytes):
                    yield item
                else:
                    yield response(progress=item)
