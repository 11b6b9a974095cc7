"""Malformed requests are refused with INVALID_REQUEST, and the fields to mend are named."""

from __future__ import annotations

import math
from typing import Any

import pytest

from modelyard.rpc.reasons import Reason
from modelyard.v1 import generation_pb2, model_server_pb2
from tests.conformance.subject import Subject, call, message, refused_with, says, schema_format

pytestmark = pytest.mark.asyncio(loop_scope="module")

_Input = generation_pb2.GenerationInput


def _sampling(**values: Any) -> _Input:
    return says("Hello", sampling=values)


def _tool(name: str, schema: str = "") -> generation_pb2.Tool:
    return generation_pb2.Tool(name=name, parameters_schema=schema)


def _image(data: bytes, media_type: str) -> generation_pb2.Message:
    picture = message("What is this?")
    picture.content.add(image=generation_pb2.Image(data=data, media_type=media_type))
    return picture


def _calls(role: int, **call_fields: str) -> generation_pb2.Message:
    fields = {"id": "call_1", "name": "f", "arguments_json": "{}", **call_fields}
    return message("Hm.", role, tool_calls=[generation_pb2.ToolCall(**fields)])


_USER, _ASSISTANT, _SYSTEM, _TOOL = (
    generation_pb2.ROLE_USER,
    generation_pb2.ROLE_ASSISTANT,
    generation_pb2.ROLE_SYSTEM,
    generation_pb2.ROLE_TOOL,
)
_REQUIRED = generation_pb2.TOOL_CHOICE_MODE_REQUIRED

MALFORMED: dict[str, tuple[_Input, str]] = {
    "nothing to answer": (_Input(sampling=generation_pb2.SamplingParams(max_tokens=4)), "input"),
    "messages and prompt": (_Input(prompt="Hello", messages=[message("Hello")]), "input"),
    "role missing": (says(message("Hello", 0)), "messages[0].role"),
    "role unknown": (says(message("Hello", 99)), "messages[0].role"),
    "no content": (says("Hello", message("")), "messages[1].content"),
    "empty part": (says(generation_pb2.Message(role=_USER, content=[generation_pb2.ContentPart()])), "content[0]"),
    "empty text": (says(generation_pb2.Message(role=_USER, content=[{"text": ""}])), "content[0].text"),
    "system last": (says("Hello", message("Be brief.", _SYSTEM)), "messages[1].role"),
    "result of no call": (says("Hello", message("21", _TOOL)), "messages[1].tool_call_id"),
    "call answered by a user": (says(message("21", _USER, tool_call_id="call_1")), "tool_call_id"),
    "calls of a user": (says(_calls(_USER)), "tool_calls"),
    "call without id": (says("Hello", _calls(_ASSISTANT, id=""), "So?"), "tool_calls[0].id"),
    "call without name": (says("Hello", _calls(_ASSISTANT, name=""), "So?"), "tool_calls[0].name"),
    "arguments not JSON": (says("Hello", _calls(_ASSISTANT, arguments_json="{x"), "So?"), "arguments_json"),
    "arguments not an object": (says("Hello", _calls(_ASSISTANT, arguments_json="[]"), "So?"), "arguments_json"),
    "call id twice": (says("Hello", _calls(_ASSISTANT), _calls(_ASSISTANT), "So?"), "tool_calls[0].id"),
    "image empty": (says(_image(b"", "image/png")), "image.data"),
    "image without type": (says(_image(b"x", "")), "image.media_type"),
    "image of no image type": (says(_image(b"x", "text/plain")), "image.media_type"),
    "max_tokens 0": (_sampling(max_tokens=0), "sampling.max_tokens"),
    "max_tokens negative": (_sampling(max_tokens=-1), "sampling.max_tokens"),
    "temperature 2.1": (_sampling(temperature=2.1), "sampling.temperature"),
    "temperature negative": (_sampling(temperature=-0.1), "sampling.temperature"),
    "temperature no number": (_sampling(temperature=math.nan), "sampling.temperature"),
    "top_p 0": (_sampling(top_p=0.0), "sampling.top_p"),
    "top_p 1.1": (_sampling(top_p=1.1), "sampling.top_p"),
    "top_k negative": (_sampling(top_k=-1), "sampling.top_k"),
    "min_p 1.1": (_sampling(min_p=1.1), "sampling.min_p"),
    "frequency_penalty 3": (_sampling(frequency_penalty=3.0), "sampling.frequency_penalty"),
    "presence_penalty -3": (_sampling(presence_penalty=-3.0), "sampling.presence_penalty"),
    "repetition_penalty 0": (_sampling(repetition_penalty=0.0), "sampling.repetition_penalty"),
    "17 stop strings": (_sampling(stop=[f"s{n}" for n in range(17)]), "sampling.stop"),
    "empty stop string": (_sampling(stop=[""]), "sampling.stop[0]"),
    "endless stop string": (_sampling(stop=["x" * 257]), "sampling.stop[0]"),
    "top_logprobs 21": (_sampling(logprobs=True, top_logprobs=21), "sampling.top_logprobs"),
    "two answers": (_sampling(n=2), "sampling.n"),
    "schema missing": (says("Hello", response_format=schema_format("")), "json_schema.schema"),
    "schema not JSON": (says("Hello", response_format=schema_format("{x")), "json_schema.schema"),
    "schema not an object": (says("Hello", response_format=schema_format("[]")), "json_schema.schema"),
    "schema of 65 KiB": (
        says("Hello", response_format=schema_format({"type": "object", "description": "x" * (65 << 10)})),
        "json_schema.schema",
    ),
    "tool without name": (says("Hello", tools=[_tool("")]), "tools[0].name"),
    "tool with a blank": (says("Hello", tools=[_tool("get time")]), "tools[0].name"),
    "tool twice": (says("Hello", tools=[_tool("f"), _tool("f")]), "tools[1].name"),
    "tool schema not JSON": (says("Hello", tools=[_tool("f", "{x")]), "parameters_schema"),
    "tool required, none offered": (
        says("Hello", tool_choice=generation_pb2.ToolChoice(mode=_REQUIRED)),
        "tool_choice.mode",
    ),
    "another tool required": (
        says("Hello", tools=[_tool("f")], tool_choice=generation_pb2.ToolChoice(mode=_REQUIRED, name="g")),
        "tool_choice.name",
    ),
}


@pytest.mark.parametrize("case", MALFORMED)
async def test_a_malformed_input_is_refused(subject: Subject, case: str) -> None:
    asked, field = MALFORMED[case]
    for attempt in (subject.generate(asked), subject.count(asked)):
        refusal = await refused_with(Reason.INVALID_REQUEST, attempt)
        fields = [violation.field for violation in refusal.violations]
        assert any(each.endswith(field) for each in fields), f"{fields} do not name {field}"
        assert all(violation.description for violation in refusal.violations)


async def test_a_missing_input_or_model_is_refused(subject: Subject) -> None:
    request = model_server_pb2.ModelServerGenerateRequest(model=subject.model)
    refusal = await refused_with(Reason.INVALID_REQUEST, call(subject.stub.Generate(request).read()))
    assert [violation.field for violation in refusal.violations] == ["input"]
    request = model_server_pb2.ModelServerGenerateRequest(input=says("Hello"))
    refusal = await refused_with(Reason.INVALID_REQUEST, call(subject.stub.Generate(request).read()))
    assert [violation.field for violation in refusal.violations] == ["model"]


async def test_every_malformed_field_is_named(subject: Subject) -> None:
    asked = says("Hello", sampling={"max_tokens": 0, "temperature": 5.0, "n": 3})
    refusal = await refused_with(Reason.INVALID_REQUEST, subject.generate(asked))
    fields = {violation.field.rpartition(".")[2] for violation in refusal.violations}
    assert fields == {"max_tokens", "temperature", "n"}


@pytest.mark.parametrize("count", [0, 2049])
async def test_one_to_2048_texts_are_embedded(subject: Subject, count: int) -> None:
    refusal = await refused_with(Reason.INVALID_REQUEST, subject.embed(*["x"] * count))
    assert "inputs" in {violation.field for violation in refusal.violations}


async def test_garbage_is_no_harm(subject: Subject) -> None:
    method = subject.channel.unary_stream(f"/{'modelyard.v1.ModelServer'}/Generate")
    with pytest.raises(Exception, match=r"(?i)status|rpc"):
        await method(b"\xff\xff\xff\xff not a message").read()
    assert (await subject.generate(says("Hello"))).usage.completion_tokens
