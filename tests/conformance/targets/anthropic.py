"""The anthropic engine before a stand-in for the vendor."""

from __future__ import annotations

import importlib.util
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from model_servers.engines import anthropic
from tests.conformance.target import Endpoint, Fault, Target
from tests.harness.model_servers import model_server
from tests.standins.anthropic import AnthropicStandIn

_standins: dict[str, AnthropicStandIn] = {}
"""By address of the model server."""


@asynccontextmanager
async def _start() -> AsyncIterator[Endpoint]:
    if importlib.util.find_spec("anthropic") is None:
        pytest.skip("the extra anthropic is not installed")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("ANTHROPIC_API_KEY", "test-key")
        async with AnthropicStandIn(pace=0.002) as standin:
            settings = anthropic.AnthropicSettings.model_validate(
                {
                    "base_url": standin.url,
                    "models": [{"name": "claude", "id": "claude-tiny", "prompt_cache": True, "sampling": True}],
                    "first_token_seconds": 1.5,
                    "stall_seconds": 1.5,
                    "check_seconds": 0.1,
                }
            )
            async with model_server(anthropic.AnthropicEngine(settings)) as server:
                _standins[server.address] = standin
                yield Endpoint(server.address, "claude")


def _set_fault(endpoint: Endpoint, fault: Fault | None) -> None:
    _standins[endpoint.address].fault = fault


TARGETS = [Target("anthropic (stand-in)", _start, _set_fault)]
