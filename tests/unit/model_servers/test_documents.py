"""The documents say what the code does."""

from __future__ import annotations

import re
import types
from pathlib import Path

import pytest

from model_servers import reference, registry
from model_servers.engine import EnginePlugin
from model_servers.engines.simulated import SimulatedSettings
from modelyard.program.documents import renewed
from modelyard.v1 import model_server_pb2
from tests.harness.model_servers import model_server, request

ENGINES = Path(reference.__file__).parent / "engines" / "README.md"


@pytest.mark.parametrize("path", reference.tables(), ids=lambda path: path.parent.name)
def test_tables_of_settings_are_up_to_date(path: Path):
    text = path.read_text(encoding="utf-8")
    assert renewed(text, reference.tables()[path]) == text, "run: python -m model_servers.reference"


@pytest.fixture
def echo() -> EnginePlugin:
    """The engine of the walk-through, as its code stands there."""
    (code,) = re.findall(r"```python\n(.*?)```", ENGINES.read_text(encoding="utf-8"), re.DOTALL)
    module = types.ModuleType("echo")
    exec(compile(code, str(ENGINES), "exec"), module.__dict__)
    return module.plugin


async def test_the_engine_of_the_walk_through_works(echo: EnginePlugin):
    engine = registry.create(echo, registry.validate(echo, {"context_length": 50}))
    async with model_server(engine) as server:
        answer = await server.generate(request("to be or not", model="echo", max_tokens=3))
        assert answer.text == "to be or " and answer.result.usage.completion_tokens == 3
        counted = await server.stub.CountTokens(
            model_server_pb2.CountTokensRequest(model="echo", input=request("to be").input)
        )
        assert counted.prompt_tokens == 2


def test_every_setting_has_a_description():
    for model in (
        reference.ModelServerSettings,
        SimulatedSettings,
        reference.SimulatedModel,
        reference.Fault,
        reference.AnthropicSettings,
        reference.BedrockSettings,
        reference.HostedModel,
        reference.OpenAICompatibleSettings,
        reference.NamedModel,
        reference.VllmSettings,
    ):
        assert not [name for name, field in model.model_fields.items() if not field.description]
