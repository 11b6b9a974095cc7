"""The engine openai_compatible before a stand-in for OpenAI's API."""

from __future__ import annotations

import importlib.util
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from tests.conformance.target import Endpoint, Fault, Target
from tests.harness.model_servers import model_server

_standins: dict[str, object] = {}
"""Address of the model server to what stands behind it."""


@asynccontextmanager
async def _start() -> AsyncIterator[Endpoint]:
    if importlib.util.find_spec("aiohttp") is None:
        pytest.skip("the extra openai is not installed")
    from model_servers.engines.openai_compatible import OpenAICompatibleEngine, OpenAICompatibleSettings
    from tests.standins.openai import OpenAIStandIn

    async with OpenAIStandIn(token_seconds=0.001) as standin:
        settings = OpenAICompatibleSettings(
            provider="openai",
            base_url=f"{standin.url}/v1",
            api_key_env="STAND_IN_KEY",
            context_length=standin.context_length,
            slots=8,
            first_token_seconds=1.5,
            stall_seconds=1.0,
            probe_seconds=0.5,
        )
        engine = OpenAICompatibleEngine(settings, env={"STAND_IN_KEY": standin.key})
        async with model_server(engine) as server:
            _standins[server.address] = standin
            yield Endpoint(server.address, standin.model, embedding_model=standin.embedding_model)


def _faults(endpoint: Endpoint, fault: Fault | None) -> None:
    _standins[endpoint.address].fault = fault  # type: ignore[attr-defined]


TARGETS = [Target("openai_compatible (stand-in)", _start, _faults)]
