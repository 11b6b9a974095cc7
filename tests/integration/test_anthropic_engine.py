"""What is Anthropic's own: keys, the list of models, API versions. The rest: test_hosted_engines.py."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from model_servers.engine import (
    Busy,
    EngineFailed,
    Feature,
    Finished,
    GenerationRequest,
    Health,
    Message,
    Role,
    Sampling,
    Tool,
    ToolChoiceMode,
    Unsupported,
)
from model_servers.engines.anthropic import AnthropicEngine, AnthropicSettings
from tests.conformance.target import Fault
from tests.harness.model_servers import eventually, model_server, request
from tests.standins.anthropic import CONTEXT, MAX_TOKENS, AnthropicStandIn

pytest.importorskip("anthropic")


@pytest_asyncio.fixture
async def standin(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[AnthropicStandIn]:
    monkeypatch.setenv("ANTHROPIC_API_KEY", "test-key")
    async with AnthropicStandIn() as running:
        yield running


async def started(standin: AnthropicStandIn, **settings: Any) -> AnthropicEngine:
    given = {"base_url": standin.url, "check_seconds": 0.05, **settings}
    engine = AnthropicEngine(AnthropicSettings.model_validate(given))
    await engine.start()
    return engine


def ask(model: str, **more: Any) -> GenerationRequest:
    return GenerationRequest(model, (Message(Role.USER, ("Hello",)),), **more)


async def finish(engine: AnthropicEngine, asked: GenerationRequest) -> Finished:
    *_, finished = [item async for item in engine.generate(asked)]
    assert isinstance(finished, Finished)
    return finished


async def test_without_settings_all_models_of_the_account_are_offered_as_they_are(standin: AnthropicStandIn):
    engine = await started(standin)
    models = {model.name: model for model in engine.status().models}
    assert models.keys() == {"claude-tiny", "claude-thinker", "claude-old"}
    assert {model.context_length for model in models.values()} == {CONTEXT}
    assert Feature.VISION in models["claude-tiny"].features
    assert Feature.JSON in models["claude-tiny"].features
    assert Feature.JSON not in models["claude-thinker"].features
    assert Feature.JSON_SCHEMA in models["claude-thinker"].features
    assert not any(model.features & (Feature.LOGPROBS | Feature.EMBEDDING) for model in models.values())
    await engine.close()


async def test_through_a_model_server(standin: AnthropicStandIn):
    engine = AnthropicEngine(AnthropicSettings.model_validate({"base_url": standin.url}))
    async with model_server(engine) as server:
        answer = await server.generate(request("Hello", model="claude-tiny", max_tokens=5))
        assert answer.text and answer.result.usage.completion_tokens == 5
        report = await server.report()
        assert report.engine.name == "anthropic" and report.engine.version


async def test_without_a_limit_the_answer_gets_what_the_model_allows(standin: AnthropicStandIn):
    engine = await started(standin)
    await finish(engine, ask("claude-tiny"))
    assert standin.bodies[-1]["max_tokens"] == MAX_TOKENS
    await finish(engine, ask("claude-tiny", sampling=Sampling(max_tokens=MAX_TOKENS + 1)))
    assert standin.bodies[-1]["max_tokens"] == MAX_TOKENS
    await engine.close()


async def test_sampling_parameters_go_only_to_models_that_take_them(standin: AnthropicStandIn):
    models = [{"name": "old", "id": "claude-tiny", "sampling": True}, {"name": "new", "id": "claude-tiny"}]
    engine = await started(standin, models=models)
    sampling = Sampling(temperature=1.5, top_p=0.5, top_k=3, seed=1, min_p=0.1)
    await finish(engine, ask("old", sampling=sampling))
    body = standin.bodies[-1]
    assert (body["temperature"], body["top_k"], "top_p" in body) == (1.0, 3, False)
    assert standin.requests[-1].headers["anthropic-version"] == "2023-06-01"
    await finish(engine, ask("new", sampling=sampling))
    assert not {"temperature", "top_p", "top_k"} & standin.bodies[-1].keys()
    assert standin.requests[-1].headers["anthropic-version"] == "2026-10-21"
    await engine.close()


async def test_a_thinking_model_gives_schemas_and_refuses_to_be_forced(standin: AnthropicStandIn):
    engine = await started(standin)
    schema = '{"type": "object", "properties": {"n": {"type": "integer", "minimum": 0}}, "required": ["n"]}'
    items = [item async for item in engine.generate(ask("claude-thinker", json_schema=schema))]
    assert "".join(item.text for item in items[:-1]) == '{"n": 0}'
    with pytest.raises(Unsupported):
        await finish(
            engine, ask("claude-thinker", tools=(Tool("f"),), tool_choice=ToolChoiceMode.REQUIRED, tool_name="f")
        )
    # It can be asked freely, beside an effort that the settings want.
    await engine.close()
    model = {"id": "claude-thinker", "extra": {"output_config": {"effort": "low"}}}
    engine = await started(standin, models=[model])
    await finish(engine, ask("claude-thinker", json_schema=schema))
    assert standin.bodies[-1]["output_config"].keys() == {"effort", "format"}
    await engine.close()


@pytest.mark.parametrize("status", [503, 529])
async def test_overload_is_busy(standin: AnthropicStandIn, status: int):
    engine = await started(standin)
    standin.fault = Fault("status", status, retry_after=3.0)
    with pytest.raises(Busy) as caught:
        await finish(engine, ask("claude-tiny"))
    assert caught.value.retry_after == 3.0
    assert engine.status().health is Health.READY
    await engine.close()


async def test_a_gateway_need_not_list_models(standin: AnthropicStandIn):
    standin.lists_models = False
    engine = await started(standin, models=[{"id": "claude-tiny", "max_output_tokens": 100}])
    assert engine.status().health is Health.READY
    assert (await finish(engine, ask("claude-tiny"))).usage.completion_tokens
    await engine.close()


# -------------------------------------------------------------------- keys ---


async def test_a_missing_key_stops_the_start_and_names_its_place(
    standin: AnthropicStandIn, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.delenv("ANTHROPIC_API_KEY")
    with pytest.raises(EngineFailed, match="OTHER_KEY"):
        await started(standin, api_key_env="OTHER_KEY")
    with pytest.raises(EngineFailed, match=r"no\.key"):
        await started(standin, api_key_file=str(tmp_path / "no.key"))
    (tmp_path / "bad.key").write_text("two\nlines")
    with pytest.raises(EngineFailed, match=r"bad\.key"):
        await started(standin, api_key_file=str(tmp_path / "bad.key"))


async def test_a_key_file_that_is_mended_is_read_again(standin: AnthropicStandIn, tmp_path: Path):
    file = tmp_path / "key"
    file.write_text("expired\n")
    engine = await started(standin, api_key_file=str(file))
    assert engine.status().health is Health.UNHEALTHY
    assert str(file) in engine.status().health_detail and "expired" not in engine.status().health_detail
    file.write_text("test-key\n")
    await eventually(lambda: engine.status().health is Health.READY)
    assert engine.status().models, "they were learned with the first good look"
    await finish(engine, ask("claude-tiny"))
    await engine.close()
