"""Presets in the control plane, as its clients see them."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from control_plane.app import running
from control_plane.config import ControlPlaneSettings, with_aliases
from modelyard.client import AsyncClient, InvalidRequest
from modelyard.testing import FakeModelServer
from modelyard.testing.model_server import model_info

PRESETS = """
presets:
  terse:
    description: Short answers.
    system: Be brief.
    sampling: {max_tokens: %d}
    weights: {provider: 1}
  here:
    requirements: {labels: {region: eu}}
"""


def settings(folder: Path) -> ControlPlaneSettings:
    return ControlPlaneSettings(
        port=0, metrics_port=-1, models_dir=folder, fleet={"warm_up": 0}, tasks={"store": ""}, gateway={"port": -1}
    )


async def test_a_request_names_a_preset_and_a_hot_reload_drops_no_stream(tmp_path: Path) -> None:
    (tmp_path / "presets.yaml").write_text(PRESETS % 7)
    async with running(settings(tmp_path)) as (_, address), FakeModelServer() as server, AsyncClient(address) as client:
        go_on = asyncio.Event()
        server.answer("one", go_on, "two")
        await server.attach(address)
        names = {preset.name: preset for preset in await client.presets()}
        assert names["terse"].sampling == {"max_tokens": 7} and "researcher" in names

        stream = client.stream("Hello", preset="terse")
        pieces = stream.deltas()
        assert (await anext(pieces)).text == "one"
        sent = server.calls_of("Generate")[-1].request
        assert sent.input.messages[0].content[0].text == "Be brief."
        assert sent.input.sampling.max_tokens == 7

        (tmp_path / "presets.yaml").write_text(PRESETS % 9)
        async with asyncio.timeout(10):
            while {preset.name: preset for preset in await client.presets()}["terse"].sampling["max_tokens"] != 9:
                await asyncio.sleep(0.05)
        (tmp_path / "presets.yaml").write_text("presets: {terse: {timeout: -1}}\n")
        go_on.set()
        assert [piece.text async for piece in pieces] == ["two"]
        await client.generate("Hello", preset="terse")
        assert server.calls_of("Complete")[-1].request.input.sampling.max_tokens == 9

        with pytest.raises(InvalidRequest) as refused:
            await client.generate("Hello", preset="ters")
        assert refused.value.violations[0].field == "preset" and "terse" in refused.value.message


async def test_a_preset_may_demand_labels(tmp_path: Path) -> None:
    (tmp_path / "presets.yaml").write_text(PRESETS % 7)
    async with running(settings(tmp_path)) as (_, address), FakeModelServer(models=[model_info()]) as server:
        async with AsyncClient(address) as client:
            await server.attach(address)
            decision = await client.explain("Hello", preset="here")
            assert decision.verdict == "impossible"
            assert decision.candidates[0].rejections[0].detail == "server fake-1 lacks the label region=eu"


def test_variables_without_prefix_are_understood() -> None:
    env = with_aliases({"MODELS_DIR": "m", "LLM_PROVIDER": "openai", "MODELYARD_CONTROL_PLANE_MODELS_DIR": "n"})
    assert env["MODELYARD_CONTROL_PLANE_MODELS_DIR"] == "n"
    assert env["MODELYARD_CONTROL_PLANE_DEFAULT_PROVIDER"] == "openai"
