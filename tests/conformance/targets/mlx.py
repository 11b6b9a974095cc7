"""Real MLX with the bundled model, on this machine's CPU (or GPU, on a Mac)."""

from __future__ import annotations

import importlib.util
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from tests.conformance.target import Endpoint, Target
from tests.harness.model_servers import model_server


@asynccontextmanager
async def _start() -> AsyncIterator[Endpoint]:
    # Looked for, not imported: the engine sets things up before MLX is first imported.
    if importlib.util.find_spec("mlx_lm") is None:
        pytest.skip("the extra mlx is not installed")
    from model_servers.engines.mlx import MlxEngine, MlxSettings

    async with model_server(MlxEngine(MlxSettings(slots=4))) as server:
        yield Endpoint(server.address, "yardling")


TARGETS = [Target("mlx", _start)]
