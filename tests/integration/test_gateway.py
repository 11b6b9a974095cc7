"""OpenAI's Python SDK against the gateway, with a simulated model server or a fake behind it."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from modelyard.rpc.errors import Refusal
from modelyard.rpc.reasons import Reason
from modelyard.testing import FakeModelServer
from modelyard.v1 import generation_pb2, task_pb2
from tests.harness.front_door import attached
from tests.harness.gateway import HttpDoor, http_door
from tests.harness.model_servers import model_server

ASK: Any = [{"role": "user", "content": "Hello"}]
TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}},
                "required": ["city"],
                "additionalProperties": False,
            },
            "strict": True,
        },
    }
]
PIXEL = "data:image/png;base64," + base64.b64encode(b"\x89PNG").decode()


class Person(BaseModel):
    name: str
    age: int


@asynccontextmanager
async def simulated(**engine: Any) -> AsyncIterator[HttpDoor]:
    engine = {"answer_tokens": 8, **engine}
    async with http_door() as http, model_server(orchestrators=(http.door.address,), engine_settings=engine):
        await http.door.until_ready("tested")
        yield http


@asynccontextmanager
async def faked(*servers: FakeModelServer, **given: Any) -> AsyncIterator[tuple[HttpDoor, FakeModelServer]]:
    servers = servers or (FakeModelServer("one"),)
    async with http_door(**given) as http, attached(http.door, *servers) as fakes:
        yield http, fakes[0]


# --------------------------------------------------------------------- chat ---


async def test_a_chat() -> None:
    async with simulated() as http:
        raw = await http.sdk.chat.completions.with_raw_response.create(
            model="simulated", messages=ASK, extra_headers={"X-Request-Id": "mine-1", "X-Modelyard-Explain": "true"}
        )
        answer = raw.parse()
        (choice,) = answer.choices
        assert choice.message.role == "assistant" and choice.message.content
        assert choice.finish_reason == "stop"
        assert answer.model == "simulated"
        assert answer.usage and answer.usage.completion_tokens == 8
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + 8
        headers = raw.headers
        assert headers["x-request-id"] == "mine-1"
        assert (headers["x-modelyard-server"], headers["x-modelyard-model"]) == ("tested", "simulated")
        assert (headers["x-modelyard-provider"], headers["x-modelyard-attempts"]) == ("simulated", "1")
        assert "tested/simulated/simulated scores" in headers["x-modelyard-decision"]
        assert http.counted("http_chat", "ok") == 1


async def test_a_streamed_chat_is_the_whole_one_in_pieces() -> None:
    async with simulated() as http:
        ask: Any = {"model": "auto", "messages": ASK, "seed": 4, "max_tokens": 6}
        whole = await http.sdk.chat.completions.create(**ask)
        stream = await http.sdk.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True})
        chunks = [chunk async for chunk in stream]
        *pieces, usage = chunks
        assert "".join(chunk.choices[0].delta.content or "" for chunk in pieces) == whole.choices[0].message.content
        assert len(pieces) > 3
        assert [chunk.choices[0].finish_reason for chunk in pieces][-2:] == [None, "length"]
        assert not usage.choices and usage.usage and usage.usage.completion_tokens == 6
        assert {chunk.model for chunk in chunks} == {"simulated"}


async def test_stop_and_logprobs() -> None:
    async with simulated() as http:
        whole = await http.sdk.chat.completions.create(
            model="auto", messages=ASK, seed=1, logprobs=True, top_logprobs=2
        )
        text = whole.choices[0].message.content or ""
        logprobs = whole.choices[0].logprobs
        assert logprobs and logprobs.content
        assert "".join(entry.token for entry in logprobs.content) == text
        assert all(len(entry.top_logprobs) == 2 for entry in logprobs.content)
        cut = await http.sdk.chat.completions.create(model="auto", messages=ASK, seed=1, stop=[text[10:14]])
        assert cut.choices[0].message.content == text[: text.index(text[10:14])]


async def test_tools_whole_and_streamed() -> None:
    async with simulated() as http:
        ask: Any = {"model": "auto", "messages": ASK, "tools": TOOLS, "tool_choice": "required", "seed": 1}
        answer = await http.sdk.chat.completions.create(**ask)
        (choice,) = answer.choices
        assert choice.finish_reason == "tool_calls" and choice.message.content is None
        assert choice.message.tool_calls
        call: Any = choice.message.tool_calls[0]
        assert call.function.name == "weather" and "city" in json.loads(call.function.arguments)
        async with http.sdk.chat.completions.stream(**ask) as stream:  # puts the pieces together
            streamed = await stream.get_final_completion()
        again: Any = (streamed.choices[0].message.tool_calls or [])[0]
        assert again.function.arguments == call.function.arguments
        assert again.function.parsed_arguments == json.loads(call.function.arguments)
        result: Any = {"role": "tool", "tool_call_id": call.id, "content": "rain"}
        message: Any = choice.message.model_dump(exclude_none=True)
        last = await http.sdk.chat.completions.create(model="auto", messages=[*ASK, message, result], tools=TOOLS)
        assert last.choices[0].message.content


async def test_json_object_and_schema() -> None:
    async with simulated() as http:
        plain = await http.sdk.chat.completions.create(
            model="auto", messages=ASK, response_format={"type": "json_object"}
        )
        assert isinstance(json.loads(plain.choices[0].message.content or ""), dict)
        parsed = await http.sdk.chat.completions.parse(model="auto", messages=ASK, response_format=Person)
        assert isinstance(parsed.choices[0].message.parsed, Person)


async def test_what_is_asked_arrives_at_the_model_server() -> None:
    async with faked() as (http, fake):
        await http.sdk.chat.completions.create(
            model="fake/fake",
            messages=[
                {"role": "developer", "content": "Be brief"},
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": PIXEL}}]},
            ],
            temperature=0.5,
            extra_body={"top_k": 3, "never_heard_of": {"a": 1}},
        )
        (call,) = fake.calls_of("Complete")
        system, user = call.request.input.messages
        assert system.role == generation_pb2.ROLE_SYSTEM
        assert user.content[0].image.data == b"\x89PNG"
        assert (call.request.input.sampling.temperature, call.request.input.sampling.top_k) == (0.5, 3)


# ------------------------------------------------------- other ways to ask ---


async def test_completions() -> None:
    async with simulated() as http:
        ask: Any = {"model": "auto", "prompt": "Once", "max_tokens": 5, "seed": 2}
        whole = await http.sdk.completions.create(**ask, logprobs=1)
        assert (whole.choices[0].finish_reason, whole.object) == ("length", "text_completion")
        assert whole.choices[0].logprobs and whole.choices[0].logprobs.tokens
        stream = await http.sdk.completions.create(**ask, stream=True)
        assert "".join([chunk.choices[0].text async for chunk in stream]) == whole.choices[0].text


async def test_responses() -> None:
    async with simulated() as http:
        whole = await http.sdk.responses.create(model="auto", input="Hello", instructions="Be brief")
        assert whole.status == "completed" and whole.output_text
        assert whole.usage and whole.usage.output_tokens == 8
        short = await http.sdk.responses.create(model="auto", input="Hello", max_output_tokens=3)
        assert (short.status, short.incomplete_details and short.incomplete_details.reason) == (
            "incomplete",
            "max_output_tokens",
        )
        parsed = await http.sdk.responses.parse(model="auto", input="Who?", text_format=Person)
        assert isinstance(parsed.output_parsed, Person)


async def test_streamed_responses_with_tools() -> None:
    async with simulated() as http:
        tools: Any = [{"type": "function", **TOOLS[0]["function"]}]
        ask: Any = {"model": "auto", "input": [{"role": "user", "content": "Hello"}], "tools": tools}
        async with http.sdk.responses.stream(**ask) as stream:  # checks the order of events
            kinds = [event.type async for event in stream]
            final = await stream.get_final_response()
        assert kinds[0] == "response.created" and kinds[-1] == "response.completed"
        assert kinds.count("response.output_text.delta") > 3
        assert final.output_text
        async with http.sdk.responses.stream(**ask, tool_choice="required") as stream:
            kinds = [event.type async for event in stream]
            final = await stream.get_final_response()
        assert "response.function_call_arguments.delta" in kinds
        call: Any = final.output[0]
        assert (call.type, call.name) == ("function_call", "weather")
        result = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
        given = {"type": "function_call", "call_id": call.call_id, "name": call.name, "arguments": call.arguments}
        last = await http.sdk.responses.create(**{**ask, "input": [*ask["input"], given, result]})
        assert last.output_text


async def test_embeddings() -> None:
    async with simulated(embedding_dimension=16) as http:
        packed = await http.sdk.embeddings.create(model="auto", input=["one", "two"])  # asks for base64
        plain = await http.sdk.embeddings.create(model="auto", input=["one", "two"], encoding_format="float")
        assert [len(item.embedding) for item in packed.data] == [16, 16]
        assert [item.embedding for item in packed.data] == [item.embedding for item in plain.data]
        assert [item.index for item in plain.data] == [0, 1]
        assert packed.usage.prompt_tokens > 0
        raw = await http.sdk.embeddings.with_raw_response.create(model="auto", input="x")
        assert (raw.headers["x-modelyard-server"], raw.headers["x-modelyard-attempts"]) == ("tested", "1")


async def test_models() -> None:
    async with simulated() as http:
        (listed,) = (await http.sdk.models.list()).data
        assert (listed.id, listed.owned_by, listed.object) == ("simulated", "simulated", "model")
        assert (await http.sdk.models.retrieve("simulated")).id == "simulated"
        assert (await http.sdk.models.retrieve("simulated/simulated")).id == "simulated"
        with pytest.raises(openai.NotFoundError, match="known: simulated"):
            await http.sdk.models.retrieve("gpt-9")


# -------------------------------------------------------------------- hints ---


async def test_hints_reach_the_request() -> None:
    async with faked(FakeModelServer("one"), FakeModelServer("two")) as (http, _):
        for server in ("one", "two", "one"):
            raw = await http.sdk.chat.completions.with_raw_response.create(
                model="auto", messages=ASK, extra_headers={"X-Modelyard-Server": server}
            )
            assert raw.headers["x-modelyard-server"] == server
        with pytest.raises(openai.BadRequestError) as caught:
            await http.sdk.chat.completions.create(
                model="auto", messages=ASK, metadata={"modelyard_provider": "nobody", "other": "x"}
            )
        assert caught.value.code == "no_capable_server"


async def test_a_preset_is_passed_on() -> None:
    seen: list[Any] = []
    async with faked() as (http, _):
        servicer = http.door.plane.servicer
        generate = servicer.Generate

        async def spy(request: Any, context: Any, **options: Any) -> None:
            seen.append((request.preset, request.task_type, request.priority))
            request.ClearField("preset")
            await generate(request, context, **options)

        servicer.Generate = spy  # type: ignore[method-assign]
        await http.sdk.chat.completions.create(
            model="auto",
            messages=ASK,
            metadata={"modelyard_preset": "critic", "modelyard_priority": "high"},
            extra_headers={"X-Modelyard-Task-Type": "code_review"},
        )
    assert seen == [("critic", task_pb2.TASK_TYPE_CODE_REVIEW, task_pb2.TASK_PRIORITY_HIGH)]


async def test_a_deadline_from_a_header() -> None:
    async with faked() as (http, fake):
        fake.answer("Hel", asyncio.Event())
        with pytest.raises(openai.InternalServerError) as caught:
            await http.sdk.chat.completions.create(
                model="auto", messages=ASK, extra_headers={"X-Modelyard-Timeout": "0.2"}
            )
        assert (caught.value.status_code, caught.value.code) == (504, "deadline_exceeded")
        await fake.until(lambda: fake.calls_of("Complete")[0].outcome != "running")


# ------------------------------------------------------------------- errors ---


@pytest.mark.parametrize(
    ("refusal", "kind", "status", "code"),
    [
        (Refusal(Reason.CONTEXT_TOO_LONG, "8192 at most"), openai.BadRequestError, 400, "context_length_exceeded"),
        (Refusal(Reason.CONTENT_REFUSED, "no"), openai.BadRequestError, 400, "content_policy_violation"),
    ],
)  # fmt: skip
async def test_what_an_engine_refuses(
    refusal: Refusal, kind: type[openai.APIStatusError], status: int, code: str
) -> None:
    async with faked() as (http, fake):
        fake.inject_error("Complete", refusal)
        with pytest.raises(kind) as caught:
            await http.sdk.chat.completions.create(model="auto", messages=ASK)
        assert (caught.value.status_code, caught.value.code) == (status, code)
        assert refusal.message in caught.value.message
        assert caught.value.request_id
        assert caught.value.response.headers["x-modelyard-reason"] == refusal.reason


async def test_unknown_models_and_retries_are_told() -> None:
    async with faked() as (http, fake):
        with pytest.raises(openai.NotFoundError) as unknown:
            await http.sdk.chat.completions.create(model="gpt-9", messages=ASK)
        assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
        fake.inject_error("Complete", Refusal(Reason.ENGINE_FAILED, "it broke"), times=9)
        with pytest.raises(openai.InternalServerError) as exhausted:
            await http.sdk.chat.completions.create(model="auto", messages=ASK)
        assert (exhausted.value.status_code, exhausted.value.code) == (503, "attempts_exhausted")
        assert http.counted("http_chat", "UNKNOWN_MODEL") == http.counted("http_chat", "ATTEMPTS_EXHAUSTED") == 1


async def test_a_retry_is_seen_in_the_headers() -> None:
    async with faked(FakeModelServer("a"), FakeModelServer("b")) as (http, fake):
        fake.inject_error("Complete", Refusal(Reason.ENGINE_FAILED, "it broke"), times=99)
        attempts = set()
        for _ in range(4):
            raw = await http.sdk.chat.completions.with_raw_response.create(model="auto", messages=ASK)
            assert raw.headers["x-modelyard-server"] == "b"
            attempts.add(raw.headers["x-modelyard-attempts"])
        assert "2" in attempts


async def test_a_full_queue_says_when_to_come_back() -> None:
    async with faked(FakeModelServer("one", slots=1), queue={"bound": {"normal": 0}}) as (http, fake):
        gate = fake.gate("Complete")
        running = asyncio.create_task(http.sdk.chat.completions.create(model="auto", messages=ASK))
        await gate.arrived.wait()
        with pytest.raises(openai.RateLimitError) as caught:
            await http.sdk.chat.completions.create(model="auto", messages=ASK)
        assert caught.value.code == "queue_full"
        assert int(caught.value.response.headers["retry-after"]) >= 1
        assert int(caught.value.response.headers["retry-after-ms"]) > 0
        gate.open()
        assert (await running).choices


async def test_what_breaks_off_raises_in_mid_stream() -> None:
    async with faked() as (http, fake):
        fake.answer("Hel", "lo", Refusal(Reason.ENGINE_FAILED, "it broke"))
        text = ""
        with pytest.raises(openai.APIError, match="it broke") as caught:
            async for chunk in await http.sdk.chat.completions.create(model="auto", messages=ASK, stream=True):
                text += chunk.choices[0].delta.content or ""
        assert text == "Hello"
        assert caught.value.code == "stream_broken"
        fake.answer("Hello")  # it is trusted again, so that this breaks off in the middle as well
        assert (await http.sdk.chat.completions.create(model="auto", messages=ASK)).choices
        fake.answer("Hel", "lo", Refusal(Reason.ENGINE_FAILED, "it broke"))
        kinds = [event.type async for event in await http.sdk.responses.create(model="auto", input="x", stream=True)]
        assert kinds[0] == "response.created" and kinds[-1] == "response.failed"
        assert http.counted("http_chat", "STREAM_BROKEN") == 1


async def test_a_failure_before_the_first_token_has_its_status_in_streams_too() -> None:
    async with faked() as (http, fake):
        fake.inject_error("Generate", Refusal(Reason.CONTEXT_TOO_LONG, "too long"))
        with pytest.raises(openai.BadRequestError):
            await http.sdk.chat.completions.create(model="auto", messages=ASK, stream=True)
