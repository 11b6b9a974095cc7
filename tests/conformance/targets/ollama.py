"""The Ollama engine: against the stand-in, and against a real Ollama where one answers."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from tests.conformance.target import Endpoint, Fault, Target
from tests.harness.model_servers import model_server
from tests.standins import ollama as standins

REAL = "http://127.0.0.1:11434"

_standins: dict[str, standins.OllamaStandIn] = {}
"""By address of the model server before it."""


@asynccontextmanager
async def _stand_in() -> AsyncIterator[Endpoint]:
    if importlib.util.find_spec("ollama") is None:
        pytest.skip("the extra ollama is not installed")
    from model_servers.engines.ollama import OllamaEngine, OllamaSettings

    async with standins.OllamaStandIn(parallel=4, answer_tokens=2000) as standin:
        # Slots are given, so that what the suite says of a server's load does not depend on timing.
        settings = OllamaSettings(url=standin.url, slots=4, first_token_seconds=4, stall_seconds=3, load_seconds=1)
        async with model_server(OllamaEngine(settings)) as server:
            _standins[server.address] = standin
            yield Endpoint(server.address, "tiny", embedding_model="embedder", vision_model="seer")


def _set_fault(endpoint: Endpoint, fault: Fault | None) -> None:
    _standins[endpoint.address].fault = fault and standins.Fault(
        fault.kind, status=fault.status, retry_after=fault.retry_after, pieces=fault.pieces
    )


def _ask(path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(REAL + path, data), timeout=2) as answer:
        found: dict[str, Any] = json.load(answer)
    return found


def find_models() -> dict[str, str]:
    """The smallest model of a real Ollama here for each ability; empty where there is none."""
    try:
        listed = sorted(_ask("/api/tags")["models"], key=lambda model: model["size"])
        abilities = {model["name"]: _ask("/api/show", {"model": model["name"]})["capabilities"] for model in listed}
    except (OSError, ValueError, KeyError):
        return {}
    found: dict[str, str] = {}
    for name, able in abilities.items():
        for ability in able:
            found.setdefault(ability, name.removesuffix(":latest"))
    return found


@asynccontextmanager
async def _real() -> AsyncIterator[Endpoint]:
    found = await asyncio.to_thread(find_models)
    if "completion" not in found:
        pytest.skip(f"no Ollama with a model answers at {REAL}")
    from model_servers.engines.ollama import OllamaEngine, OllamaSettings

    async with model_server(OllamaEngine(OllamaSettings(url=REAL, num_ctx=2048))) as server:
        yield Endpoint(
            server.address,
            found["completion"],
            embedding_model=found.get("embedding", ""),
            vision_model=found.get("vision", ""),
        )


TARGETS = [Target("ollama (stand-in)", _stand_in, _set_fault)]
if "completion" in find_models():
    TARGETS.append(Target("ollama (real)", _real))
