"""Two hosted providers of one model: the second answers when the first does not."""

from __future__ import annotations

import pytest

from control_plane.app import running
from control_plane.config import ControlPlaneSettings
from model_servers.engines.openai_compatible import OpenAICompatibleEngine, OpenAICompatibleSettings
from modelyard.client import AsyncClient
from tests.conformance.target import Fault
from tests.harness.model_servers import model_server
from tests.harness.programs import until
from tests.standins.openai import OpenAIStandIn

FAULTS = [
    (Fault("status", status=401), "CREDENTIALS_REJECTED"),
    (Fault("status", status=429, retry_after=30), "RATE_LIMITED"),
    (Fault("status", status=500), "ENGINE_FAILED"),
    (Fault("hang"), "ENGINE_FAILED"),
    (Fault("reset", pieces=0), "ENGINE_FAILED"),
]


@pytest.mark.parametrize(("fault", "reason"), FAULTS, ids=[f"{f.kind}{f.status or ''}" for f, _ in FAULTS])
async def test_the_backup_answers_and_the_decision_names_both(
    fault: Fault, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN_KEY", OpenAIStandIn.key)

    def engine(standin: OpenAIStandIn, provider: str) -> OpenAICompatibleEngine:
        return OpenAICompatibleEngine(
            OpenAICompatibleSettings(
                provider=provider,
                base_url=f"{standin.url}/v1",
                api_key_env="STAND_IN_KEY",
                models=[{"name": standin.model}],
                first_token_seconds=1.0,
            )
        )

    settings = ControlPlaneSettings(
        port=0,
        metrics_port=-1,
        gateway={"port": -1},
        fleet={"warm_up": 0},
        tasks={"store": ""},
        # The first one is liked better, so that it is the primary.
        selection={"provider_preference": {"first": 1.0, "second": 0.1}, "weights": {"provider": 20}},
    )
    async with (
        OpenAIStandIn() as first,
        OpenAIStandIn() as second,
        running(settings) as (_, address),
        model_server(engine(first, "first"), server_id="first-1", orchestrators=[address]),
        model_server(engine(second, "second"), server_id="second-1", orchestrators=[address]),
        AsyncClient(address) as client,
    ):

        async def both() -> bool:
            return sum(server.health == "ready" for server in await client.servers()) == 2

        await until(both)
        first.fault = fault
        stream = client.stream("Hello", max_tokens=8, explain=True)
        text = "".join([delta.text async for delta in stream.deltas()])
        result = stream.result
        assert text and result.server_id == "second-1" and result.provider == "second"
        assert [(a.server_id, a.provider, a.failure_reason) for a in result.attempts] == [
            ("first-1", "first", reason),
            ("second-1", "second", ""),
        ]
        assert [decision.server_id for decision in result.decisions] == ["first-1", "second-1"]
        (avoided,) = [c for c in result.decisions[1].candidates if c.server_id == "first-1"]
        assert any(rejection.reason == "excluded" for rejection in avoided.rejections)
        assert "sk-stand-in" not in repr(result)
