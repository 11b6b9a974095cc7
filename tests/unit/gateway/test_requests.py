"""OpenAI's requests as requests of the contract."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest

from control_plane.gateway import chat, completions, embeddings, responses
from control_plane.gateway.answers import Asked
from control_plane.gateway.errors import failure
from modelyard.rpc.errors import Refusal, invalid
from modelyard.rpc.validation import check_embed_request, check_generate_request
from modelyard.v1 import generation_pb2
from modelyard.v1.generation_pb2 import GenerationInput

PIXEL = b"\x89PNG not really"
URL = "data:image/png;base64," + base64.b64encode(PIXEL).decode()
USER = {"role": "user", "content": "Hello"}


def says(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


def image(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


LOOK = {"type": "input_text", "text": "Look"}
WAIT = {"type": "output_text", "text": "Wait", "annotations": []}
TOOL = {"name": "weather", "description": "Tells it", "parameters": {"type": "object", "properties": {}}}


def ask(dialect: Any, **fields: Any) -> Asked:
    """Parse a request and hold it to the contract's own rules."""
    asked = dialect.parse(json.dumps({"model": "m", **fields}).encode())
    violations = check_generate_request(asked.request)
    if violations:
        raise Refusal(invalid(violations).reason, "", [*violations]) from None
    return asked


def chat_input(**fields: Any) -> GenerationInput:
    return ask(chat, **{"messages": [USER], **fields}).request.input


def refused(dialect: Any, **fields: Any) -> tuple[str, str]:
    """The field named and the message, as the client reads them."""
    rename = None
    try:
        asked = dialect.parse(json.dumps({"model": "m", **fields}).encode())
        rename = asked.rename
        raise invalid(check_generate_request(asked.request))
    except Refusal as refusal:
        told = failure(refusal, rename)
    assert told.status == 400
    return str(told.body.param), told.body.message


# --------------------------------------------------------------------- chat ---


def test_a_conversation_with_every_role() -> None:
    calls = [{"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"at": 1}'}}]
    messages = [
        {"role": "developer", "content": "Be brief"},
        says({"type": "text", "text": "Look"}, image(URL)),
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "c1", "content": "rain"},
        {"role": "user", "content": "And now?", "name": "ada"},
    ]  # fmt: skip
    system, user, assistant, tool, last = chat_input(messages=messages).messages
    assert (system.role, system.content[0].text) == (generation_pb2.ROLE_SYSTEM, "Be brief")
    assert user.content[0].text == "Look"
    assert (user.content[1].image.data, user.content[1].image.media_type) == (PIXEL, "image/png")
    assert not assistant.content
    (call,) = assistant.tool_calls
    assert (call.id, call.name, call.arguments_json) == ("c1", "weather", '{"at": 1}')
    assert (tool.role, tool.tool_call_id, tool.content[0].text) == (generation_pb2.ROLE_TOOL, "c1", "rain")
    assert last.name == "ada"


def test_sampling() -> None:
    sampling = chat_input(
        max_tokens=5, max_completion_tokens=7, temperature=0, top_p=0.5, top_k=-1, min_p=0.1, stop="x", seed=-1,
        frequency_penalty=1, presence_penalty=-1, repetition_penalty=1.5, logprobs=True, top_logprobs=2, n=1,
    ).sampling  # fmt: skip
    assert sampling.max_tokens == 7
    assert sampling.HasField("temperature") and sampling.temperature == 0
    assert (sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0, 0.1)
    assert list(sampling.stop) == ["x"]
    assert sampling.seed == 2**64 - 1
    assert (sampling.frequency_penalty, sampling.presence_penalty, sampling.repetition_penalty) == (1, -1, 1.5)
    assert (sampling.logprobs, sampling.top_logprobs) == (True, 2)
    assert not chat_input().sampling.HasField("max_tokens")
    assert list(chat_input(stop=["a", "b"]).sampling.stop) == ["a", "b"]


def test_tools_and_their_choice() -> None:
    tools = [{"type": "function", "function": TOOL}, {"type": "function", "function": {"name": "bare"}}]
    asked = chat_input(tools=tools, tool_choice={"type": "function", "function": {"name": "bare"}})
    assert [tool.name for tool in asked.tools] == ["weather", "bare"]
    assert json.loads(asked.tools[0].parameters_schema) == TOOL["parameters"]
    assert asked.tools[1].parameters_schema == ""
    assert asked.tool_choice.mode == generation_pb2.TOOL_CHOICE_MODE_REQUIRED
    assert asked.tool_choice.name == "bare"
    for word, mode in (("auto", "AUTO"), ("none", "NONE"), ("required", "REQUIRED")):
        choice = chat_input(tools=tools, tool_choice=word).tool_choice
        assert generation_pb2.ToolChoiceMode.Name(choice.mode) == f"TOOL_CHOICE_MODE_{mode}"
    assert not chat_input(tools=tools).HasField("tool_choice")


def test_formats() -> None:
    assert not chat_input(response_format={"type": "text"}).HasField("response_format")
    assert chat_input(response_format={"type": "json_object"}).response_format.WhichOneof("format") == "json"
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    form = {"type": "json_schema", "json_schema": {"name": "thing", "schema": schema, "strict": True}}
    found = chat_input(response_format=form).response_format.json_schema
    assert (json.loads(found.schema), found.name) == (schema, "thing")


def test_the_model_is_a_pin_unless_it_is_left_open() -> None:
    assert ask(chat, messages=[USER]).request.requirements.model == "m"
    for name in ("auto", "modelyard"):
        assert ask(chat, messages=[USER], model=name).request.requirements.model == ""


def test_what_is_not_named_is_ignored() -> None:
    assert chat_input(logit_bias={"1": 2}, service_tier="auto", store=True, future={"a": [1]}).messages[0].content


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "function", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": ""}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages[0].content[0].type"),
        (
            {"messages": [says(image("https://x/y.png"))]},
            "messages[0].content[0].image_url.url",
        ),
        (
            {"messages": [says(image("data:image/png;base64,@"))]},
            "messages[0].content[0].image_url.url",
        ),
        (
            {"messages": [says(image("data:text/html;base64,AAAA"))]},
            "messages[0].content[0].image_url.url",
        ),
        ({"messages": [USER, {"role": "tool", "content": "x"}]}, "messages[1].tool_call_id"),
        (
            {"messages": [USER, {"role": "assistant", "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "f", "arguments": "no"}}]}]},
            "messages[1].tool_calls[0].function.arguments",
        ),
        ({"temperature": 2.5}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 2**40}, "max_tokens"),
        ({"n": 2}, "n"),
        ({"n": 0}, "n"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"stop": [""]}, "stop[0]"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": "not a name"}}]}, "tools[0].function.name"),
        ({"tool_choice": "maybe"}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"model": ""}, "model"),
        ({"metadata": {"a": 1}}, "metadata[...]"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named_as_the_client_wrote_it(fields: dict[str, Any], param: str) -> None:
    found, message = refused(chat, **{"messages": [USER], **fields})
    assert found == param
    assert message.startswith(f"{param}: ")


@pytest.mark.parametrize(
    "body", [b"", b"{", b'{"model": "m", "messages": [}', b"\xff\xfe", b'{"model": "\\ud800"}', b"[" * 100_000]
)
def test_what_is_no_json_is_refused(body: bytes) -> None:
    with pytest.raises(Refusal, match="body"):
        chat.parse(body)


def test_a_schema_nested_too_deeply_is_refused() -> None:
    deep = b'{"a":' * 50_000 + b"1" + b"}" * 50_000
    body = b'{"model":"m","messages":[],"tools":[{"type":"function","function":{"name":"f","parameters":%b}}]}'
    with pytest.raises(Refusal, match="nested"):
        chat.parse(body % deep)


# -------------------------------------------------------------- completions ---


def test_a_prompt() -> None:
    asked = ask(completions, prompt=["Once"], max_tokens=3, logprobs=2, stop=["."], stream=True)
    assert (asked.request.input.prompt, asked.stream) == ("Once", True)
    assert asked.request.input.sampling.top_logprobs == 2
    assert ask(completions, prompt="Once").request.input.prompt == "Once"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"prompt": [1, 2]}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": "a", "echo": True}, "echo"),
        ({"prompt": "a", "logprobs": 40}, "logprobs"),
        ({"prompt": "a", "n": 3}, "n"),
    ],
)
def test_what_does_not_fit_into_a_completion(fields: dict[str, Any], param: str) -> None:
    assert refused(completions, **fields)[0] == param


# ---------------------------------------------------------------- responses ---


def test_a_conversation_of_items() -> None:
    items = [
        says(LOOK, {"type": "input_image", "image_url": URL}),
        {"type": "reasoning", "id": "rs_1", "summary": []},
        {"type": "message", "role": "assistant", "content": [WAIT]},
        {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": "{}"},
        {"type": "function_call", "call_id": "c2", "name": "weather", "arguments": ""},
        {"type": "function_call_output", "call_id": "c1", "output": "rain"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "sun"}]},
    ]  # fmt: skip
    tools = [{"type": "function", **TOOL, "strict": True}]
    asked = ask(responses, input=items, instructions="Be brief", tools=tools, max_output_tokens=9).request.input
    system, user, assistant, first, second = asked.messages
    assert (system.role, system.content[0].text) == (generation_pb2.ROLE_SYSTEM, "Be brief")
    assert user.content[1].image.data == PIXEL
    assert assistant.content[0].text == "Wait"
    assert [(call.id, call.arguments_json) for call in assistant.tool_calls] == [("c1", "{}"), ("c2", "{}")]
    assert [(m.tool_call_id, m.content[0].text) for m in (first, second)] == [("c1", "rain"), ("c2", "sun")]
    assert asked.tools[0].name == "weather"
    assert asked.sampling.max_tokens == 9


def test_formats_and_choices_of_responses() -> None:
    schema = {"type": "object"}
    text = {"format": {"type": "json_schema", "name": "thing", "schema": schema}}
    tools = [{"type": "function", "name": "f"}]
    asked = ask(
        responses, input="x", text=text, tools=tools, tool_choice={"type": "function", "name": "f"},
        include=["message.output_text.logprobs"], top_logprobs=3,
    ).request.input  # fmt: skip
    assert json.loads(asked.response_format.json_schema.schema) == schema
    assert asked.tool_choice.name == "f"
    assert (asked.sampling.logprobs, asked.sampling.top_logprobs) == (True, 3)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": [says({"type": "input_file"})]}, "input[0].content[0].type"),
        ({"input": [says({"type": "input_image", "file_id": "f"})]}, "input[0].content[0].image_url"),
        ({"input": [USER, {"role": "user", "content": ""}], "instructions": "b"}, "input[1]"),
        ({"input": "x", "previous_response_id": "resp_1"}, "previous_response_id"),
        ({"input": "x", "background": True}, "background"),
        ({"input": "x", "max_output_tokens": 0}, "max_output_tokens"),
        ({"input": "x", "tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"input": "x", "text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"input": "x", "temperature": 9}, "temperature"),
    ],
)  # fmt: skip
def test_what_does_not_fit_into_a_response(fields: dict[str, Any], param: str) -> None:
    assert refused(responses, **fields)[0] == param


# --------------------------------------------------------------- embeddings ---


def test_texts_to_embed() -> None:
    asked = embeddings.parse(b'{"model": "auto", "input": ["a", "b"], "encoding_format": "base64"}')
    assert (list(asked.request.inputs), asked.base64) == (["a", "b"], True)
    assert list(embeddings.parse(b'{"model": "auto", "input": "a"}').request.inputs) == ["a"]
    assert not check_embed_request(asked.request)


@pytest.mark.parametrize(
    ("extra", "param"),
    [('"input": [1, 2]', "input"), ('"input": "a", "dimensions": 3', "dimensions"),
     ('"input": "a", "encoding_format": "int8"', "encoding_format"), ('"input": 5', "input")],
)  # fmt: skip
def test_what_cannot_be_embedded(extra: str, param: str) -> None:
    with pytest.raises(Refusal) as caught:
        embeddings.parse(b'{"model": "m", %b}' % extra.encode())
    assert failure(caught.value).body.param == param
