"""The bedrock engine before a stand-in for the vendor."""

from __future__ import annotations

import importlib.util
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from model_servers.engines import bedrock
from tests.conformance.target import Endpoint, Fault, Target
from tests.harness.model_servers import model_server
from tests.standins.bedrock import CHAT_MODELS, CONTEXT, EMBEDDING_CONTEXT, TITAN, BedrockStandIn

_standins: dict[str, BedrockStandIn] = {}
"""By address of the model server."""


@asynccontextmanager
async def _start() -> AsyncIterator[Endpoint]:
    if importlib.util.find_spec("boto3") is None:
        pytest.skip("the extra bedrock is not installed")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("AWS_ACCESS_KEY_ID", "AKIATEST")
        environment.setenv("AWS_SECRET_ACCESS_KEY", "aws-secret")
        environment.setenv("AWS_CONFIG_FILE", "/nonexistent")
        environment.delenv("AWS_PROFILE", raising=False)
        environment.delenv("AWS_BEARER_TOKEN_BEDROCK", raising=False)
        async with BedrockStandIn(pace=0.002) as standin:
            settings = bedrock.BedrockSettings.model_validate(
                {
                    "region": "us-east-1",
                    "endpoint_url": standin.url,
                    "models": [
                        {"name": "claude", "id": CHAT_MODELS[0], "context_length": CONTEXT, "prompt_cache": True},
                        {"name": "vectors", "id": TITAN, "context_length": EMBEDDING_CONTEXT},
                    ],
                    "first_token_seconds": 1.5,
                    "stall_seconds": 1.5,
                    "check_seconds": 0.1,
                }
            )
            async with model_server(bedrock.BedrockEngine(settings)) as server:
                _standins[server.address] = standin
                yield Endpoint(server.address, "claude", embedding_model="vectors")


def _set_fault(endpoint: Endpoint, fault: Fault | None) -> None:
    _standins[endpoint.address].fault = fault


TARGETS = [Target("bedrock (stand-in)", _start, _set_fault)]
