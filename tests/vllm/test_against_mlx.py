"""The same model on real vLLM and on real MLX, both through a model server, both in float32."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from model_servers import bundled
from model_servers.engines.mlx import MlxEngine, MlxSettings
from modelyard.rpc.channels import channel
from modelyard.v1 import generation_pb2, model_server_pb2
from tests.harness.model_servers import Answer, Running, model_server, request

QUESTIONS = (
    "What is modelyard?",
    "What is a lease?",
    "Translate 'water' into French.",
    "Write a haiku about the sea.",
    "Summarize: the control plane picks a model and a machine for each request.",
    "How many legs has a spider?",
    "Tell me a story.",
)


@pytest.fixture
async def mlx() -> AsyncIterator[Running]:
    async with model_server(MlxEngine(MlxSettings(dtype="float32", slots=2))) as server:
        yield server


@pytest.fixture
async def vllm(pytestconfig: pytest.Config) -> AsyncIterator[Running]:
    address = pytestconfig.getoption("endpoint")
    async with channel(address, own_connection=True) as connection:
        yield Running({"address": address}, connection, None)  # type: ignore[arg-type]


def _end(answer: Answer) -> tuple[int, int, int]:
    usage = answer.result.usage
    return answer.result.finish_reason, usage.prompt_tokens, usage.completion_tokens


@pytest.mark.parametrize("question", QUESTIONS)
async def test_greedy_text_is_the_same(mlx: Running, vllm: Running, question: str) -> None:
    asked = request(question, model=bundled.MODEL_NAME, temperature=0.0, max_tokens=96)
    ours, theirs = await mlx.generate(asked), await vllm.generate(asked)
    assert theirs.text == ours.text and ours.text
    assert _end(theirs) == _end(ours)


async def test_a_raw_prompt_is_continued_in_the_same_way(mlx: Running, vllm: Running) -> None:
    asked = model_server_pb2.ModelServerGenerateRequest(
        model=bundled.MODEL_NAME,
        input=generation_pb2.GenerationInput(
            prompt="The control plane", sampling=generation_pb2.SamplingParams(temperature=0.0, max_tokens=40)
        ),
    )
    ours, theirs = await mlx.generate(asked), await vllm.generate(asked)
    assert theirs.text == ours.text and _end(theirs) == _end(ours)


async def test_log_probabilities_agree(mlx: Running, vllm: Running) -> None:
    asked = request(QUESTIONS[0], model=bundled.MODEL_NAME, temperature=0.0, max_tokens=24, logprobs=True)
    ours, theirs = await mlx.generate(asked), await vllm.generate(asked)
    entries = [[entry for delta in answer.deltas for entry in delta.logprobs] for answer in (ours, theirs)]
    assert [entry.token for entry in entries[0]] == [entry.token for entry in entries[1]]
    assert [entry.logprob for entry in entries[1]] == pytest.approx([e.logprob for e in entries[0]], abs=1e-3)


async def test_both_count_tokens_alike(mlx: Running, vllm: Running) -> None:
    assert ((await vllm.report()).engine.name, (await mlx.report()).engine.name) == ("vllm", "mlx")
    for question in QUESTIONS:
        asked = request(question, model=bundled.MODEL_NAME)
        counted = [
            await server.stub.CountTokens(model_server_pb2.CountTokensRequest(model=asked.model, input=asked.input))
            for server in (mlx, vllm)
        ]
        assert counted[0].prompt_tokens == counted[1].prompt_tokens > 0
