"""The engine vllm before a stand-in for `vllm serve`. Real vLLM: tests/vllm."""

from __future__ import annotations

import importlib.util
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import pytest

from tests.conformance.target import Endpoint, Fault, Target
from tests.harness.model_servers import model_server

_standins: dict[str, object] = {}
"""Address of the model server to what stands behind it."""


def _start(**flags: Any) -> Callable[[], AbstractAsyncContextManager[Endpoint]]:
    @asynccontextmanager
    async def start() -> AsyncIterator[Endpoint]:
        if importlib.util.find_spec("aiohttp") is None:
            pytest.skip("the extra vllm is not installed")
        from model_servers.engines.vllm import VllmEngine, VllmSettings
        from tests.standins.vllm import VllmStandIn

        async with VllmStandIn(token_seconds=0.001, **flags) as standin:
            settings = VllmSettings(
                base_url=standin.url, slots=4, first_token_seconds=1.5, stall_seconds=1.0, poll_seconds=0.25
            )
            async with model_server(VllmEngine(settings)) as server:
                _standins[server.address] = standin
                yield Endpoint(server.address, standin.model)

    return start


def _faults(endpoint: Endpoint, fault: Fault | None) -> None:
    _standins[endpoint.address].fault = fault  # type: ignore[attr-defined]


TARGETS = [
    Target("vllm (stand-in)", _start(vision=True), _faults),
    Target("vllm without options (stand-in)", _start(tools=False, prompt_tokens_details=False)),
]
