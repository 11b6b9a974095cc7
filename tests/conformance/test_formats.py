"""What is more than text to text: tools, JSON, images, embeddings."""

from __future__ import annotations

import json
import math
import struct
import zlib
from typing import Any

import pytest

from modelyard.rpc.reasons import Reason
from modelyard.v1 import generation_pb2
from tests.conformance.subject import Answer, Subject, message, refused_with, says, schema_format, unsupported

pytestmark = pytest.mark.asyncio(loop_scope="module")

_AUTO, _NONE, _REQUIRED = (
    generation_pb2.TOOL_CHOICE_MODE_AUTO,
    generation_pb2.TOOL_CHOICE_MODE_NONE,
    generation_pb2.TOOL_CHOICE_MODE_REQUIRED,
)

# Only what every vendor's strict mode takes: all properties required, none beside them, no bounds on numbers.
_CHOICES: dict[str, Any] = {
    "type": "object",
    "properties": {"color": {"type": "string", "enum": ["red", "green", "blue"]}, "large": {"type": "boolean"}},
    "required": ["color", "large"],
    "additionalProperties": False,
}
_WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "enum": ["Zürich", "Łódź", "東京"]},
        "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
    },
    "required": ["city", "unit"],
    "additionalProperties": False,
}
_TOOLS = [
    generation_pb2.Tool(
        name="get_weather", description="Current weather of a city.", parameters_schema=json.dumps(_WEATHER)
    ),
    generation_pb2.Tool(name="get_time", description="The time of day."),
]
_SCHEMAS = {"get_weather": _WEATHER, "get_time": {"type": "object"}}
_ROOM = {"max_tokens": 120}


def fits(value: Any, schema: dict[str, Any]) -> bool:
    """Whether the value satisfies the schema, for the few keywords used here."""
    if "enum" in schema and value not in schema["enum"]:
        return False
    kind = {"object": dict, "array": list, "string": str, "boolean": bool}[schema["type"]]
    if not isinstance(value, kind):
        return False
    if isinstance(value, list):
        return len(value) >= schema.get("minItems", 0) and all(fits(item, schema["items"]) for item in value)
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        return (
            all(name in value for name in schema.get("required", ()))
            and all(fits(value[name], properties[name]) for name in value if name in properties)
            and (schema.get("additionalProperties", True) or value.keys() <= properties.keys())
        )
    return True


# ------------------------------------------------------------------- tools ---


def _with_tools(mode: int, name: str = "", text: str = "How is the weather in Zürich?") -> Any:
    choice = generation_pb2.ToolChoice(mode=mode, name=name)  # type: ignore[arg-type]
    return says(text, sampling=_ROOM, tools=_TOOLS, tool_choice=choice)


def _check_calls(answer: Answer) -> None:
    for call in answer.calls:
        assert call.name in _SCHEMAS, f"a tool that was not offered is called: {call.name!r}"
        assert isinstance(json.loads(call.arguments_json), dict)


@pytest.mark.parametrize("name", ["", "get_weather", "get_time"])
async def test_a_required_call_is_made_or_unsupported(subject: Subject, name: str) -> None:
    if not subject.has("FUNCTION_CALLING"):
        await unsupported(subject.generate(_with_tools(_REQUIRED, name)))
        await unsupported(subject.generate(_with_tools(_AUTO)))
        return
    answer = await subject.generate(_with_tools(_REQUIRED, name))
    assert answer.reason == "TOOL_CALLS"
    assert answer.calls
    _check_calls(answer)
    for call in answer.calls:
        assert name in ("", call.name)
        assert fits(json.loads(call.arguments_json), _SCHEMAS[call.name]), call.arguments_json


async def test_no_call_is_made_when_none_is_wanted(subject: Subject) -> None:
    # No feature is needed for that: a server without tools need not show them to the model.
    answer = await subject.generate(_with_tools(_NONE))
    assert not answer.calls
    assert answer.reason in ("STOP", "LENGTH")


async def test_calls_made_freely_are_of_tools_that_were_offered(subject: Subject) -> None:
    subject.needs("FUNCTION_CALLING")
    answer = await subject.generate(_with_tools(_AUTO))
    _check_calls(answer)
    if answer.reason == "STOP":
        assert not answer.calls
    # The model knows of a tool that this conversation does not offer.
    other = generation_pb2.Tool(name="lock_door", description="Locks the door.")
    history = (
        "How is the weather in Zürich?",
        message("", generation_pb2.ROLE_ASSISTANT, tool_calls=[_call("get_weather", '{"city": "Zürich"}')]),
        message("Sunny.", generation_pb2.ROLE_TOOL, tool_call_id="call_1"),
        "And how is the weather in Łódź?",
    )
    answer = await subject.generate(says(*history, sampling=_ROOM, tools=[other]))
    assert {call.name for call in answer.calls} <= {"lock_door"}


async def test_the_result_of_a_call_is_taken_up(subject: Subject) -> None:
    subject.needs("FUNCTION_CALLING")
    asked = _with_tools(_REQUIRED, "get_weather")
    called = await subject.generate(asked)
    follow_up = says(
        *asked.messages,
        message("", generation_pb2.ROLE_ASSISTANT, tool_calls=called.calls),
        *(message('{"degrees": 21}', generation_pb2.ROLE_TOOL, tool_call_id=call.id) for call in called.calls),
        sampling=_ROOM,
        tools=_TOOLS,
    )
    answer = await subject.generate(follow_up)
    _check_calls(answer)
    assert answer.text or answer.calls
    assert answer.usage.prompt_tokens > (await subject.generate(_with_tools(_AUTO))).usage.prompt_tokens


async def test_several_results_in_one_turn_are_taken_up(subject: Subject) -> None:
    subject.needs("FUNCTION_CALLING")
    calls = [_call("get_weather", '{"city": "Zürich", "unit": "celsius"}', 1), _call("get_time", "{}", 2)]
    turn = says(
        "What are weather and time?",
        message("Let me look.", generation_pb2.ROLE_ASSISTANT, tool_calls=calls),
        message("21 degrees", generation_pb2.ROLE_TOOL, tool_call_id="call_1"),
        message("noon", generation_pb2.ROLE_TOOL, tool_call_id="call_2"),
        "So is it warm?",
        tools=_TOOLS,
    )
    _check_calls(await subject.generate(turn))


def _call(name: str, arguments: str, number: int = 1) -> generation_pb2.ToolCall:
    return generation_pb2.ToolCall(id=f"call_{number}", name=name, arguments_json=arguments)


# -------------------------------------------------------------------- JSON ---


async def test_json_objects_are_objects_or_unsupported(subject: Subject) -> None:
    form = generation_pb2.ResponseFormat(json=generation_pb2.JsonFormat())
    tries = [
        says("Give me a name as a JSON object.", sampling={**_ROOM, **sampling}, response_format=form)
        for sampling in ({}, {"temperature": 0.7, "seed": 1}, {"temperature": 1.0, "seed": 2})
    ]
    if not subject.has("JSON"):
        await unsupported(subject.generate(tries[0]))
        return
    answers = [await subject.generate(asked) for asked in tries]
    # A weak model may go on until it is cut off; what it ended by itself is JSON.
    ended = [answer for answer in answers if answer.reason == "STOP"]
    assert ended, "no answer came to its end"
    for answer in ended:
        assert isinstance(json.loads(answer.text), dict)


async def test_json_satisfies_the_schema_or_is_unsupported(subject: Subject) -> None:
    asked = says("Describe a ball as JSON.", sampling=_ROOM, response_format=schema_format(_CHOICES))
    if not subject.has("JSON_SCHEMA"):
        await unsupported(subject.generate(asked))
        return
    for sampling in ({}, {"temperature": 1.0, "seed": 1}, {"temperature": 1.0, "seed": 2}):
        asked.sampling.MergeFrom(generation_pb2.SamplingParams(**sampling))
        answer = await subject.generate(asked)
        assert answer.reason == "STOP"
        assert fits(json.loads(answer.text), _CHOICES), answer.text


async def test_nested_json_and_any_script_satisfy_the_schema(subject: Subject) -> None:
    subject.needs("JSON_SCHEMA")
    word = "naïve · 日本 · 👩‍👧🦊"
    schema = {
        "type": "object",
        "properties": {
            "word": {"type": "string", "enum": [word]},
            "inner": {**_CHOICES},
        },
        "required": ["word", "inner"],
        "additionalProperties": False,
    }
    answer = await subject.generate(says("Some JSON, please.", sampling=_ROOM, response_format=schema_format(schema)))
    assert answer.reason == "STOP"
    value = json.loads(answer.text)
    assert fits(value, schema), answer.text
    assert value["word"] == word, "characters of several tokens came out broken"


async def test_free_text_may_be_asked_for_by_name(subject: Subject) -> None:
    form = generation_pb2.ResponseFormat(text=generation_pb2.TextFormat())
    assert (await subject.generate(says("Hello", response_format=form))).text


# ------------------------------------------------------------------ images ---


def _png(size: int = 32) -> bytes:
    """A red square."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = (b"\0" + b"\xff\0\0" * size) * size
    header = struct.pack(">IIBBBBB", size, size, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


async def test_images_are_seen_or_unsupported(subject: Subject) -> None:
    model = subject.vision_model
    look = message("Which colour is this?")
    look.content.add(image=generation_pb2.Image(data=_png(), media_type="image/png"))
    if not subject.has("VISION", model):
        await unsupported(subject.generate(says(look), model=model))
        return
    seen = await subject.generate(says(look), model=model)
    unseen = await subject.generate(says("Which colour is this?"), model=model)
    assert seen.text or seen.usage.completion_tokens
    assert seen.usage.prompt_tokens > unseen.usage.prompt_tokens, (
        "the image takes no tokens: was it shown to the model?"
    )


# -------------------------------------------------------------- embeddings ---


async def test_each_text_has_its_vector_or_unsupported(subject: Subject) -> None:
    if not subject.has("EMBEDDING", subject.embedding_model):
        await unsupported(subject.embed("Hello"))
        return
    texts = ["a yard of models", "text 日本語 🦊", "x", "a yard of models"]
    answer = await subject.embed(*texts)
    vectors = [list(embedding.values) for embedding in answer.embeddings]
    assert len(vectors) == len(texts)
    (length,) = {len(vector) for vector in vectors}
    assert length >= 2
    assert all(math.isfinite(value) for vector in vectors for value in vector)
    assert vectors[0] == pytest.approx(vectors[3], abs=1e-3), "the same text twice"
    assert vectors[0] != pytest.approx(vectors[1], abs=1e-3)
    assert answer.usage.prompt_tokens >= 1
    assert answer.usage.completion_tokens == 0
    backwards = await subject.embed(*reversed(texts))
    for vector, other in zip(reversed(vectors), backwards.embeddings, strict=True):
        assert vector == pytest.approx(list(other.values), abs=1e-3), "vectors come in the order of the texts"


async def test_many_texts_are_embedded_at_once(subject: Subject) -> None:
    subject.needs("EMBEDDING", subject.embedding_model)
    answer = await subject.embed(*(f"text number {number}" for number in range(120)))
    assert len(answer.embeddings) == 120
    alone = await subject.embed("text number 71")
    assert list(answer.embeddings[71].values) == pytest.approx(list(alone.embeddings[0].values), abs=1e-3)


async def test_a_text_too_long_to_embed_is_refused(subject: Subject) -> None:
    subject.needs("EMBEDDING", subject.embedding_model)
    context = subject.info(subject.embedding_model).context_length
    if context > 1_200_000:
        pytest.skip("no request can be as long as this context")
    await refused_with(Reason.CONTEXT_TOO_LONG, subject.embed("fine", "word " * (context + 16)))
