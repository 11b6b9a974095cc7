"""What direct mode tells whom."""

from __future__ import annotations

import pytest

from modelyard.client import AsyncClient
from modelyard.client._direct import Hosts, _is_loopback, assignment, fill, shape_key
from modelyard.client._requests import generate_request
from modelyard.rpc.routing import estimated_tokens, implied_features
from modelyard.rpc.validation import check_assign_request, check_model_server_generate_request
from modelyard.v1 import fleet_pb2, generation_pb2, model_server_pb2, orchestrator_pb2

SECRET = "nobody's business"


def told_of(request: orchestrator_pb2.GenerateRequest) -> orchestrator_pb2.AssignRequest:
    return assignment(request, implied_features(request.input), estimated_tokens(request.input))


def direct_request(
    request: orchestrator_pb2.GenerateRequest, assigned: orchestrator_pb2.AssignResponse
) -> model_server_pb2.ModelServerGenerateRequest:
    direct = model_server_pb2.ModelServerGenerateRequest()
    fill(direct, request, assigned)
    return direct


@pytest.mark.parametrize(
    ("address", "loopback"),
    [
        ("127.0.0.1:1", True),
        ("127.8.0.1:1", True),
        ("localhost:1", True),
        ("[::1]:1", True),
        ("10.0.0.1:1", False),
        ("gpu-1:1", False),
        ("[fe80::1]:1", False),
    ],
)
def test_loopback(address: str, loopback: bool) -> None:
    assert _is_loopback(address) is loopback


async def test_loopback_endpoints_are_not_dialled_from_another_machine() -> None:
    hosts = Hosts("far-away:7460")
    assert await hosts.way_to("127.0.0.1:1") is None
    assert not hosts._hosts


async def test_a_host_that_was_not_reached_is_left_alone_for_a_while() -> None:
    hosts = Hosts("127.0.0.1:7460")
    assert await hosts.way_to("127.0.0.1:1") is None
    assert hosts._hosts["127.0.0.1:1"].left_alone
    await hosts.close()


def test_the_control_plane_hears_nothing_of_the_prompt() -> None:
    tool = {"name": "t", "description": SECRET, "parameters": {"title": SECRET}}
    request = generate_request(
        SECRET, system=SECRET, tools=[tool], response_format={"title": SECRET}, logprobs=True, temperature=0.5,
        max_tokens=9, preset="p", task_type="writing", priority="high", model="m", features=["vision"],
        excluded_server_ids=["x"], explain=True, request_id="id",
    )  # fmt: skip
    told = told_of(request)
    assert SECRET.encode() not in told.SerializeToString()
    assert not check_assign_request(told)
    assert told.prompt_tokens == estimated_tokens(request.input)
    outline = told.request
    assert set(outline.requirements.features) == {
        fleet_pb2.MODEL_FEATURE_VISION,
        fleet_pb2.MODEL_FEATURE_FUNCTION_CALLING,
        fleet_pb2.MODEL_FEATURE_JSON_SCHEMA,
        fleet_pb2.MODEL_FEATURE_LOGPROBS,
    }
    # All else is said: a field that is added to requests is not forgotten here.
    said = {field.name for field, _ in outline.ListFields()}
    unsaid = {"unused_ticket", "failed_server_ids"}
    assert said == {field.name for field in orchestrator_pb2.GenerateRequest.DESCRIPTOR.fields} - unsaid
    assert outline.input.sampling == request.input.sampling


def test_what_routing_can_tell_apart_has_keys_of_its_own() -> None:
    """A ticket must never go to a request that routing was not asked about."""
    options = [
        {}, {"max_tokens": 9}, {"temperature": 0.5}, {"seed": 1}, {"stop": "x"}, {"task_type": "writing"},
        {"priority": "high"}, {"preset": "p"}, {"model": "m"}, {"provider": "m"}, {"server_id": "m"},
        {"excluded_server_ids": ["m"]}, {"excluded_models": ["m"]}, {"max_cost": 1.0}, {"min_context_length": 5},
        {"features": ["vision"]}, {"logprobs": True}, {"response_format": "json"}, {"tools": [{"name": "t"}]},
    ]  # fmt: skip
    keys, told = set(), set()
    for each in options:
        for prompt in ("short", "another one"):
            request = generate_request(prompt, **each)
            keys.add(shape_key(request, implied_features(request.input)))
            asked = told_of(request)
            asked.ClearField("prompt_tokens")
            told.add(asked.SerializeToString(deterministic=True))
    assert len(keys) == len(told) == len(options)
    # All that is told is in the key but what a ticket ahead cannot be asked for.
    fields = {field.name for field in orchestrator_pb2.GenerateRequest.DESCRIPTOR.fields}
    assert fields - {"explain", "request_id", "unused_ticket", "failed_server_ids"} == {
        "input", "task_type", "priority", "preset", "requirements",
    }  # fmt: skip


def test_the_preset_speaks_first_unless_the_request_has_a_system_message() -> None:
    assigned = orchestrator_pb2.AssignResponse(
        model="m",
        ticket=b"t",
        request_id="id",
        sampling=generation_pb2.SamplingParams(temperature=0.3, max_tokens=9),
        preset_messages=[
            generation_pb2.Message(
                role=generation_pb2.ROLE_SYSTEM, content=[generation_pb2.ContentPart(text="be brief")]
            )
        ],
    )
    direct = direct_request(generate_request("hello", max_tokens=9), assigned)
    assert [message.content[0].text for message in direct.input.messages] == ["be brief", "hello"]
    assert direct.input.sampling == assigned.sampling
    assert not check_model_server_generate_request(direct)
    own = direct_request(generate_request("hello", system="be long"), assigned)
    assert [message.content[0].text for message in own.input.messages] == ["be long", "hello"]
    raw = direct_request(generate_request("hello", raw_prompt=True), assigned)
    assert raw.input.prompt == "hello" and not raw.input.messages


def test_modes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MODELYARD_DIRECT", raising=False)
    assert AsyncClient()._direct == "auto"
    monkeypatch.setenv("MODELYARD_DIRECT", "never")
    assert AsyncClient()._direct == "never"
    assert AsyncClient(direct="always")._direct == "always"
    with pytest.raises(ValueError, match="sometimes"):
        AsyncClient(direct="sometimes")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="auto, always, never"):
        AsyncClient().stream("x", direct="")  # type: ignore[arg-type]
