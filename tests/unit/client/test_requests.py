from __future__ import annotations

import base64
import json

import pytest

from modelyard.client import FEATURES, PRIORITIES, TASK_TYPES, Image, Message, Tool, ToolCall
from modelyard.client._requests import embed_request, generate_request
from modelyard.rpc.validation import check_embed_request, check_generate_request
from modelyard.v1 import fleet_pb2, generation_pb2, task_pb2


def test_a_text_is_a_user_message() -> None:
    request = generate_request("hi", system="be brief", model="p/m", seed=0, temperature=0.0)
    assert [(m.role, m.content[0].text) for m in request.input.messages] == [(1, "be brief"), (2, "hi")]
    assert request.requirements.model == "p/m"
    assert request.input.sampling.HasField("seed")
    assert request.input.sampling.HasField("temperature")
    assert not request.input.sampling.HasField("top_p")
    assert not request.input.HasField("response_format")
    assert not request.input.HasField("tool_choice")
    assert check_generate_request(request) == []


def test_prices_and_models_that_are_not_wanted() -> None:
    wanted = generate_request("hi", excluded_models=["a", "p/b"], max_cost=0.0025).requirements
    assert (list(wanted.excluded_models), wanted.max_cost_nano_usd) == (["a", "p/b"], 2_500_000)
    assert embed_request("hi", max_cost=1.0).requirements.max_cost_nano_usd == 10**9
    assert not generate_request("hi").requirements.max_cost_nano_usd
    for wrong in (0.0, -1.0, 1e10, float("nan")):
        with pytest.raises(ValueError, match="max_cost"):
            generate_request("hi", max_cost=wrong)
    with pytest.raises(TypeError, match="excluded_models"):
        generate_request("hi", excluded_models="a")


def test_raw_prompt() -> None:
    request = generate_request("once", raw_prompt=True)
    assert request.input.prompt == "once"
    assert not request.input.messages
    with pytest.raises(TypeError, match="needs a text"):
        generate_request([{"role": "user", "content": "x"}], raw_prompt=True)
    with pytest.raises(ValueError, match="no system message"):
        generate_request("x", raw_prompt=True, system="y")


def test_conversations_of_messages_and_mappings() -> None:
    typed = [
        Message("user", ("what?", Image(b"png", "image/png"))),
        Message("assistant", tool_calls=(ToolCall("1", "f", '{"a": 1}'),)),
        Message("tool", "42", tool_call_id="1", name="f"),
    ]
    plain = [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "what?"},
                {"type": "image", "data": base64.b64encode(b"png").decode(), "media_type": "image/png"},
            ],
        },
        {"role": "assistant", "tool_calls": [{"id": "1", "name": "f", "arguments": {"a": 1}}]},
        {"role": "tool", "content": "42", "tool_call_id": "1", "name": "f"},
    ]
    assert generate_request(typed) == generate_request(plain)
    assert check_generate_request(generate_request(plain)) == []
    nested = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    assert generate_request([typed[0], {"role": "assistant", "content": None, "tool_calls": [nested]}, typed[2]]) == (
        generate_request(typed)
    )


def test_message_to_dict_is_understood_again() -> None:
    message = Message("assistant", "hi", (ToolCall("1", "f", "{}"),))
    assert generate_request([message.to_dict()]) == generate_request([message])


@pytest.mark.parametrize(
    ("messages", "what"),
    [
        ([{"content": "x"}], 'needs a "role"'),
        ([{"role": "human", "content": "x"}], "unknown role 'human'; allowed: system, user, assistant, tool"),
        ([{"role": "user", "text": "x"}], "unknown keys in a message: text"),
        ([{"role": "user", "content": [1]}], "a part of a message is"),
        ([{"role": "user", "content": [{"type": "video"}]}], "a part of a message is"),
    ],
)
def test_wrong_messages(messages, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        generate_request(messages)


def test_a_message_that_is_none() -> None:
    with pytest.raises(TypeError, match="not list"):
        generate_request([["user", "x"]])


def test_names_and_what_a_wrong_one_says() -> None:
    for name in TASK_TYPES:
        assert generate_request("x", task_type=name).task_type == task_pb2.TaskType.Value(f"TASK_TYPE_{name.upper()}")
    for name in PRIORITIES:
        number = task_pb2.TaskPriority.Value(f"TASK_PRIORITY_{name.upper()}")
        assert generate_request("x", priority=name).priority == number
    features = generate_request("x", features=FEATURES).requirements.features
    assert list(features) == [number for number in fleet_pb2.ModelFeature.values() if number]
    with pytest.raises(ValueError, match=r"unknown task type 'coding'; allowed: chat, reasoning, .*embedding"):
        generate_request("x", task_type="coding")
    with pytest.raises(ValueError, match="unknown priority 'urgent'; allowed: low, normal, high, critical"):
        generate_request("x", priority="urgent")
    with pytest.raises(ValueError, match="unknown feature 'sight'"):
        generate_request("x", features=["sight"])
    with pytest.raises(TypeError, match="lists of texts"):
        generate_request("x", features="vision")
    with pytest.raises(TypeError, match="temprature"):
        generate_request("x", temprature=1)


def test_response_formats() -> None:
    assert generate_request("x", response_format="json").input.response_format.HasField("json")
    schema = {"title": "city", "type": "object"}
    made = generate_request("x", response_format=schema).input.response_format.json_schema
    assert (json.loads(made.schema), made.name) == (schema, "city")
    with pytest.raises(ValueError, match="unknown response format 'xml'"):
        generate_request("x", response_format="xml")


def test_tools() -> None:
    parameters = {"type": "object"}
    tools = [
        Tool("f", "does f", parameters),
        {"name": "f", "description": "does f", "parameters": parameters},
        {"type": "function", "function": {"name": "f", "description": "does f", "parameters": parameters}},
    ]
    assert len({generate_request("x", tools=[tool]).SerializeToString() for tool in tools}) == 1
    choice = generate_request("x", tools=[Tool("f")], tool_choice="f").input.tool_choice
    assert (choice.mode, choice.name) == (generation_pb2.TOOL_CHOICE_MODE_REQUIRED, "f")
    assert generate_request("x", tool_choice="none").input.tool_choice.mode == generation_pb2.TOOL_CHOICE_MODE_NONE


def test_stop_and_logprobs() -> None:
    assert generate_request("x", stop="a").input.sampling.stop == ["a"]
    assert generate_request("x", stop=["a", "b"]).input.sampling.stop == ["a", "b"]
    sampling = generate_request("x", top_logprobs=3).input.sampling
    assert (sampling.logprobs, sampling.top_logprobs) == (True, 3)


def test_embed() -> None:
    request = embed_request("a", model="m", priority="low")
    assert (request.inputs, request.requirements.model, request.priority) == (["a"], "m", 1)
    assert check_embed_request(embed_request(["a", "b"])) == []
