"""What is Bedrock's own: regions, credentials, embeddings, fields of families. The rest: test_hosted_engines.py."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from model_servers.engine import (
    ContextTooLong,
    EngineFailed,
    Feature,
    Finished,
    GenerationRequest,
    Health,
    Message,
    Role,
    Sampling,
    TaskType,
    Unsupported,
)
from model_servers.engines.bedrock import BedrockEngine, BedrockSettings
from tests.harness.model_servers import eventually, model_server, request
from tests.standins.bedrock import CHAT_MODELS, COHERE, TITAN, BedrockStandIn

pytest.importorskip("boto3")


@pytest_asyncio.fixture
async def standin(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[BedrockStandIn]:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIATEST")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "aws-secret")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_PROFILE", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_BEARER_TOKEN_BEDROCK"):
        monkeypatch.delenv(name, raising=False)
    async with BedrockStandIn() as running:
        yield running


async def started(standin: BedrockStandIn, *models: Any, **settings: Any) -> BedrockEngine:
    given = {
        "endpoint_url": standin.url,
        "region": "us-east-1",
        "models": models or CHAT_MODELS[:1],
        "check_seconds": 0.05,
        **settings,
    }
    engine = BedrockEngine(BedrockSettings.model_validate(given))
    await engine.start()
    return engine


def ask(model: str = CHAT_MODELS[0], text: str = "Hello", **more: Any) -> GenerationRequest:
    return GenerationRequest(model, (Message(Role.USER, (text,)),), **more)


async def finish(engine: BedrockEngine, asked: GenerationRequest) -> Finished:
    *_, finished = [item async for item in engine.generate(asked)]
    assert isinstance(finished, Finished)
    return finished


async def test_through_a_model_server(standin: BedrockStandIn):
    settings = {"endpoint_url": standin.url, "region": "us-east-1", "models": [{"name": "m", "id": CHAT_MODELS[0]}]}
    async with model_server(BedrockEngine(BedrockSettings.model_validate(settings))) as server:
        answer = await server.generate(request("Hello", model="m", max_tokens=5))
        assert answer.text and answer.result.usage.completion_tokens == 5
        assert (await server.report()).engine.name == "bedrock"


# ----------------------------------------------------- region, credentials ---


async def test_a_region_is_needed(standin: BedrockStandIn, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(EngineFailed, match=r"engine_settings\.region"):
        await started(standin, region="")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-1")
    engine = await started(standin, region="")
    await finish(engine, ask())
    assert "/eu-west-1/bedrock/" in standin.requests[-1].headers["authorization"]
    await engine.close()


async def test_models_are_needed():
    with pytest.raises(EngineFailed, match=r"engine_settings\.models"):
        await BedrockEngine(BedrockSettings(region="us-east-1")).start()


async def test_an_unknown_profile_stops_the_start(standin: BedrockStandIn):
    with pytest.raises(EngineFailed, match="elsewhere"):
        await started(standin, profile="elsewhere")


async def test_credentials_of_a_profile_are_used_and_named(
    standin: BedrockStandIn, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    file = tmp_path / "credentials"
    file.write_text("[work]\naws_access_key_id = AKIAOTHER\naws_secret_access_key = profile-secret\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    engine = await started(standin, profile="work")
    detail = engine.status().health_detail
    assert "profile work" in detail and "AKIAOTHER" not in detail and "profile-secret" not in detail
    standin.key = "AKIAOTHER"
    await eventually(lambda: engine.status().health is Health.READY)
    await engine.close()


async def test_without_credentials_it_says_how_to_get_some(standin: BedrockStandIn, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    engine = await started(standin)
    status = engine.status()
    assert status.health is Health.UNHEALTHY and "aws sso login" in status.health_detail
    await engine.close()


async def test_credentials_that_may_not_list_are_good_enough(standin: BedrockStandIn):
    standin.permitted = False
    engine = await started(standin)
    assert engine.status().health is Health.READY
    await engine.close()


# ---------------------------------------------------------------- requests ---


async def test_sampling_parameters_by_family(standin: BedrockStandIn):
    claude, nova = CHAT_MODELS
    quiet = {"name": "quiet", "id": claude, "sampling": False}
    engine = await started(standin, claude, nova, quiet)
    sampling = Sampling(temperature=1.5, top_p=0.5, top_k=3, seed=1, stop=("x", "\n"))
    await finish(engine, ask(claude, sampling=sampling))
    body = standin.bodies[-1]
    assert body["inferenceConfig"] == {"temperature": 1.0, "stopSequences": ["x"]}, "no maxTokens unless asked for"
    assert body["additionalModelRequestFields"] == {"top_k": 3}
    await finish(engine, ask(nova, sampling=sampling))
    assert standin.bodies[-1]["additionalModelRequestFields"] == {"inferenceConfig": {"topK": 3}}
    await finish(engine, ask("quiet", sampling=sampling))
    assert standin.bodies[-1]["inferenceConfig"] == {"stopSequences": ["x"]}
    assert "additionalModelRequestFields" not in standin.bodies[-1]
    await engine.close()


async def test_tokens_are_estimated_where_the_vendor_does_not_count(standin: BedrockStandIn):
    claude, nova = CHAT_MODELS
    engine = await started(standin, claude, nova)
    assert await engine.count_tokens(ask(claude)) == (await finish(engine, ask(claude))).usage.prompt_tokens
    assert await engine.count_tokens(ask(nova, "four" * 100)) == 104
    await engine.close()


# -------------------------------------------------------------- embeddings ---


async def test_embeddings_of_both_families_come_in_order(standin: BedrockStandIn):
    engine = await started(standin, {"name": "titan", "id": TITAN}, {"name": "cohere", "id": COHERE}, CHAT_MODELS[0])
    titan, cohere, chat = engine.status().models
    assert titan.features == cohere.features == Feature.EMBEDDING
    assert titan.capabilities.keys() == {TaskType.EMBEDDING} and TaskType.EMBEDDING not in chat.capabilities
    texts = [f"text {number}" for number in range(100)]
    one = await engine.embed("titan", texts)
    other = await engine.embed("cohere", texts)
    assert [list(vector) for vector in one.vectors] == [list(vector) for vector in other.vectors]
    assert len(one.vectors) == 100 and one.vectors[0] != one.vectors[1]
    assert one.prompt_tokens == other.prompt_tokens > 100
    for model in ("titan", "cohere"):
        with pytest.raises(ContextTooLong):
            await engine.embed(model, ["fine", "word " * 1000])
    await engine.close()


async def test_a_family_that_is_not_known_does_not_embed(standin: BedrockStandIn):
    engine = await started(standin, {"name": "m", "id": "other.embed-v1", "features": ["embedding"]})
    with pytest.raises(Unsupported, match="Titan and Cohere"):
        await engine.embed("m", ["Hello"])
    await engine.close()
