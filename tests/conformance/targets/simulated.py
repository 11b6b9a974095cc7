"""The simulated engine: once with every feature, once with none, so that both answers to each question are heard."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from model_servers.engines import simulated
from model_servers.engines.simulated import SimulatedEngine
from tests.conformance.target import Endpoint, Fault, Target
from tests.harness.model_servers import model_server

_ALL = ["streaming", "function_calling", "vision", "json", "json_schema", "logprobs", "embedding", "prefix_cache"]
_engines: dict[str, SimulatedEngine] = {}
"""By address."""


def _target(name: str, features: list[str]) -> Target:
    @asynccontextmanager
    async def start() -> AsyncIterator[Endpoint]:
        engine = SimulatedEngine(
            simulated.plugin.settings.model_validate(
                {
                    "models": [{"name": "sim", "features": features}],
                    "answer_tokens": 2000,
                    "context_length": 4096,
                    "prefill_tokens_per_second": 0,
                    "decode_tokens_per_second": 2000,
                    "aggregate_tokens_per_second": 6000,
                }
            )
        )
        async with model_server(engine) as server:
            _engines[server.address] = engine
            yield Endpoint(server.address, "sim")

    return Target(name, start, faults=_set_fault)


def _set_fault(endpoint: Endpoint, fault: Fault | None) -> None:
    scripted: list[simulated.Fault] = []
    if fault is not None:
        if fault.kind == "status" and fault.status == 500:
            scripted = [simulated.Fault(kind="error")]
        elif fault.kind == "reset":
            scripted = [simulated.Fault(kind="disconnect", tokens=fault.pieces, seconds=0.1)]
        else:
            raise NotImplementedError  # there is no vendor whose key or rate could be refused
    _engines[endpoint.address].set_faults(scripted)


TARGETS = [_target("simulated", _ALL), _target("simulated (text only)", [])]
