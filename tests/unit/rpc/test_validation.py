from __future__ import annotations

import math
from typing import Any

import pytest
from google.protobuf.message import Message as ProtoMessage
from hypothesis import given, settings
from hypothesis import strategies as st

from modelyard.rpc import validation
from modelyard.testing import FakeModelServer, model_info
from modelyard.v1 import fleet_pb2, generation_pb2, model_server_pb2, orchestrator_pb2, selection_pb2, ticket_pb2

USER, SYSTEM, ASSISTANT, TOOL = (
    generation_pb2.ROLE_USER,
    generation_pb2.ROLE_SYSTEM,
    generation_pb2.ROLE_ASSISTANT,
    generation_pb2.ROLE_TOOL,
)


def said(text: str = "hi", role: int = USER, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": [{"text": text}], **more}


def given_input(**fields: Any) -> generation_pb2.GenerationInput:
    if "messages" not in fields and "prompt" not in fields:
        fields["messages"] = [said()]
    return generation_pb2.GenerationInput(**fields)


def fields_of(violations: list) -> list[str]:
    return [violation.field for violation in violations]


CALL = {"id": "1", "name": "f", "arguments_json": "{}"}
IMAGE = {"data": b"x", "media_type": "image/png"}

GOOD = {
    "text": {},
    "prompt": {"prompt": "once"},
    "system first": {"messages": [said(role=SYSTEM), said()]},
    "prefilled answer": {"messages": [said(), said(role=ASSISTANT)]},
    "empty answer": {"messages": [said(), said("", role=ASSISTANT)]},
    "image": {"messages": [{"role": USER, "content": [{"text": "what?"}, {"image": IMAGE}]}]},
    "tool conversation": {
        "messages": [said(), {"role": ASSISTANT, "tool_calls": [CALL]}, said(role=TOOL, tool_call_id="1")]
    },
    "sampling at its ends": {
        "sampling": {
            "max_tokens": 1,
            "temperature": 2,
            "top_p": 1,
            "top_k": 0,
            "min_p": 0,
            "stop": ["x" * 256] * 16,
            "seed": 2**64 - 1,
            "frequency_penalty": -2,
            "presence_penalty": 2,
            "repetition_penalty": 10,
            "logprobs": True,
            "top_logprobs": 20,
            "n": 1,
        }
    },
    "greedy": {"sampling": {"temperature": 0}},
    "json": {"response_format": {"json": {}}},
    "schema": {"response_format": {"json_schema": {"schema": '{"type": "object"}'}}},
    "tools": {"tools": [{"name": "f"}, {"name": "g-1", "parameters_schema": "{}"}], "tool_choice": {"mode": 1}},
    "one tool": {"tools": [{"name": "f"}], "tool_choice": {"mode": 3, "name": "f"}},
    "no tools to choose": {"tool_choice": {"mode": 2}},
}

SAMPLING_BAD = {
    "max_tokens": [0, -1],
    "temperature": [-0.1, 2.1, math.nan, math.inf],
    "top_p": [0, 1.1, math.nan],
    "top_k": [-1],
    "min_p": [-0.1, 1.1, math.nan],
    "frequency_penalty": [-2.1, 2.1, -math.inf],
    "presence_penalty": [-2.1, 2.1, math.nan],
    "repetition_penalty": [0, 10.1, math.nan],
    "n": [2, -1],
}

BAD: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "input"),
    ({"messages": [said()], "prompt": "x"}, "input"),
    ({"messages": [said(role=0)]}, "input.messages[0].role"),
    ({"messages": [said(role=9)]}, "input.messages[0].role"),
    ({"messages": [said(), said(role=SYSTEM)]}, "input.messages[1].role"),
    ({"messages": [{"role": USER}]}, "input.messages[0].content"),
    ({"messages": [{"role": ASSISTANT}]}, "input.messages[0].content"),
    ({"messages": [{"role": USER, "content": [{}]}]}, "input.messages[0].content[0]"),
    (
        {"messages": [said(), {"role": USER, "content": [{"text": "a"}, {"image": {**IMAGE, "data": b""}}]}]},
        "input.messages[1].content[1].image.data",
    ),
    (
        {"messages": [{"role": USER, "content": [{"image": {**IMAGE, "media_type": "text/html"}}]}]},
        "input.messages[0].content[0].image.media_type",
    ),
    ({"messages": [said(tool_calls=[CALL])]}, "input.messages[0].tool_calls"),
    ({"messages": [said(role=TOOL)]}, "input.messages[0].tool_call_id"),
    ({"messages": [said(tool_call_id="1")]}, "input.messages[0].tool_call_id"),
    *(
        ({"messages": [{"role": ASSISTANT, "tool_calls": [{**CALL, field: value}]}]}, f"{where}.{field}")
        for where in ["input.messages[0].tool_calls[0]"]
        for field, value in [
            ("id", ""),
            ("name", ""),
            ("arguments_json", ""),
            ("arguments_json", "[]"),
            ("arguments_json", "{"),
            ("arguments_json", '{"a": NaN}'),
            ("arguments_json", "[" * 100_000),
            ("arguments_json", '{"a":' * 100_000),
        ]
    ),
    ({"messages": [{"role": ASSISTANT, "tool_calls": [CALL, CALL]}]}, "input.messages[0].tool_calls[1].id"),
    *(
        ({"sampling": {field: value}}, f"input.sampling.{field}")
        for field, values in SAMPLING_BAD.items()
        for value in values
    ),
    ({"sampling": {"logprobs": True, "top_logprobs": 21}}, "input.sampling.top_logprobs"),
    ({"sampling": {"logprobs": True, "top_logprobs": -1}}, "input.sampling.top_logprobs"),
    ({"sampling": {"top_logprobs": 1}}, "input.sampling.top_logprobs"),
    ({"sampling": {"stop": ["x"] * 17}}, "input.sampling.stop"),
    ({"sampling": {"stop": ["x", ""]}}, "input.sampling.stop[1]"),
    ({"sampling": {"stop": ["x" * 257]}}, "input.sampling.stop[0]"),
    *(
        ({"response_format": {"json_schema": {"schema": schema}}}, "input.response_format.json_schema.schema")
        for schema in ("", "[]", "{", "true", "{" + " " * (64 << 10) + "}", '{"a":"' + "é" * (33 << 10) + '"}')
    ),
    ({"tools": [{"name": ""}]}, "input.tools[0].name"),
    ({"tools": [{"name": "a b"}]}, "input.tools[0].name"),
    ({"tools": [{"name": "x" * 65}]}, "input.tools[0].name"),
    ({"tools": [{"name": "f\n"}]}, "input.tools[0].name"),
    ({"tools": [{"name": "f"}, {"name": "f"}]}, "input.tools[1].name"),
    ({"tools": [{"name": "f", "parameters_schema": "1"}]}, "input.tools[0].parameters_schema"),
    ({"tool_choice": {"mode": 9}}, "input.tool_choice.mode"),
    ({"tool_choice": {"mode": 3}}, "input.tool_choice.mode"),
    ({"tools": [{"name": "f"}], "tool_choice": {"mode": 3, "name": "g"}}, "input.tool_choice.name"),
    ({"tools": [{"name": "f"}], "tool_choice": {"mode": 1, "name": "f"}}, "input.tool_choice.name"),
]


@pytest.mark.parametrize("fields", GOOD.values(), ids=GOOD.keys())
def test_well_formed_input(fields: dict[str, Any]) -> None:
    assert validation.check_generation_input(given_input(**fields)) == []


@pytest.mark.parametrize(("fields", "path"), BAD, ids=lambda value: value if isinstance(value, str) else "")
def test_malformed_input(fields: dict[str, Any], path: str) -> None:
    assert fields_of(validation.check_generation_input(given_input(**fields))) == [path]


def test_every_range_of_sampling_is_checked() -> None:
    known = {field.name for field in generation_pb2.SamplingParams.DESCRIPTOR.fields}
    assert set(SAMPLING_BAD) | {"stop", "seed", "logprobs", "top_logprobs"} == known


def generate_request(**fields: Any) -> orchestrator_pb2.GenerateRequest:
    return orchestrator_pb2.GenerateRequest(**{"input": given_input(), **fields})


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"task_type": 99}, "task_type"),
        ({"priority": 99}, "priority"),
        ({"request_id": "x" * 65}, "request_id"),
        ({"request_id": "a\nb"}, "request_id"),
        ({"request_id": "ä"}, "request_id"),
        ({"requirements": {"min_context_length": -1}}, "requirements.min_context_length"),
        ({"requirements": {"max_cost_nano_usd": -1}}, "requirements.max_cost_nano_usd"),
        ({"requirements": {"excluded_models": ["m", ""]}}, "requirements.excluded_models[1]"),
        ({"requirements": {"excluded_models": ["m" * 257]}}, "requirements.excluded_models[0]"),
        ({"requirements": {"excluded_models": ["m"] * 101}}, "requirements.excluded_models"),
        ({"requirements": {"features": [1, 99]}}, "requirements.features[1]"),
    ],
)
def test_malformed_routing(fields: dict[str, Any], path: str) -> None:
    assert fields_of(validation.check_generate_request(generate_request(**fields))) == [path]
    if "task_type" not in fields:
        embed = orchestrator_pb2.EmbedRequest(inputs=["x"], **fields)
        assert fields_of(validation.check_embed_request(embed)) == [path]


def test_well_formed_requests() -> None:
    assert validation.check_generate_request(generate_request(request_id="a b~", priority=4, task_type=15)) == []
    assert validation.check_embed_request(orchestrator_pb2.EmbedRequest(inputs=["x"] * 2048)) == []


def test_missing_input_and_path_of_a_nested_request() -> None:
    assert fields_of(validation.check_generate_request(orchestrator_pb2.GenerateRequest())) == ["input"]
    nested = generate_request(priority=9, input=given_input(messages=[said(role=0)]))
    found = fields_of(validation.check_generate_request(nested, "request."))
    assert found == ["request.input.messages[0].role", "request.priority"]


@pytest.mark.parametrize("count", [0, 2049])
def test_number_of_embed_inputs(count: int) -> None:
    assert fields_of(validation.check_embed_request(orchestrator_pb2.EmbedRequest(inputs=["x"] * count))) == ["inputs"]


def test_model_server_requests() -> None:
    check = validation.check_model_server_generate_request
    good = model_server_pb2.ModelServerGenerateRequest(model="m", input=given_input())
    assert check(good) == []
    assert fields_of(check(model_server_pb2.ModelServerGenerateRequest())) == ["input", "model"]
    assert fields_of(check(model_server_pb2.CountTokensRequest(model="m"))) == ["input"]
    embed = validation.check_model_server_embed_request
    assert embed(model_server_pb2.ModelServerEmbedRequest(model="m", inputs=["x"])) == []
    assert fields_of(embed(model_server_pb2.ModelServerEmbedRequest())) == ["model", "inputs"]


def test_hostile_requests_get_few_violations() -> None:
    many = 50_000
    cases = [
        given_input(messages=[{}] * many),
        given_input(messages=[{"role": USER, "content": [{}] * many}]),
        given_input(messages=[{"role": ASSISTANT, "tool_calls": [{}] * many}]),
        given_input(tools=[{}] * many),
        given_input(sampling={"stop": [""] * many}),
    ]
    for case in cases:
        assert 0 < len(validation.check_generation_input(case)) <= validation.MAX_VIOLATIONS


# ------------------------------------------------------------------- report ---


def report(**changes: Any) -> fleet_pb2.ServerReport:
    server = FakeModelServer("gpu-1.rack_2")
    server.port = 7461
    made = server.report()
    for path, value in changes.items():
        target: Any = made
        *parents, field = path.split("__")
        for parent in parents:
            target = getattr(target, parent)
        if isinstance(value, (list, dict)):
            target.ClearField(field)
            getattr(target, field).extend(value) if isinstance(value, list) else getattr(target, field).update(value)
        else:
            setattr(target, field, value)
    return made


@pytest.mark.parametrize("endpoint", ["127.0.0.1:1", "host.example:65535", "[::1]:7461", "mac-mini.local:80"])
def test_well_formed_report(endpoint: str) -> None:
    assert validation.check_report(report(identity__endpoint=endpoint)) == []
    assert validation.check_report(report(models=[], health=1, state=2)) == []
    life = {
        "state": 3,
        "state_detail": "x" * 9999,
        "load_time": {"seconds": 315_575_999_999},
        "fingerprint": "x" * 1024,
    }
    assert validation.check_report(report(models=[model_info(f"m{n}", **life) for n in range(4096)])) == []


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        *(({"identity__server_id": bad}, "identity.server_id") for bad in ("", "A", "a b", "x" * 64, "a\n")),
        ({"identity__instance_id": ""}, "identity.instance_id"),
        *(
            ({"identity__endpoint": bad}, "identity.endpoint")
            for bad in ("", "host", "host:0", "host:65536", ":80", "::1:80", "http://h:80", "h:80/", "h :80", "h:٣")
        ),
        ({"identity__labels": {str(n): "" for n in range(33)}}, "identity.labels"),
        ({"engine__name": ""}, "engine.name"),
        ({"load__slots": 0}, "load.slots"),
        *(({"load__kv_cache_utilization": bad}, "load.kv_cache_utilization") for bad in (-0.1, 1.1, math.nan)),
        ({"health": 9}, "health"),
        ({"state": 9}, "state"),
        ({"models": [model_info("")]}, "models[0].name"),
        ({"models": [model_info(provider="")]}, "models[0].provider"),
        ({"models": [model_info(), model_info()]}, "models[1]"),
        ({"models": [model_info(context_length=0)]}, "models[0].context_length"),
        *(
            (
                {"models": [model_info(capabilities=[fleet_pb2.Capability(task_type=1, score=bad)])]},
                "models[0].capabilities[0].score",
            )
            for bad in (-0.1, 1.1, math.nan, math.inf)
        ),
        *(
            ({"models": [model_info(capabilities=[{"task_type": bad}])]}, "models[0].capabilities[0].task_type")
            for bad in (0, 99)
        ),
        ({"models": [model_info(features=[99])]}, "models[0].features[0]"),
        *(
            (
                {"models": [model_info(price=fleet_pb2.Price(prompt_usd_per_million_tokens=bad))]},
                "models[0].price.prompt_usd_per_million_tokens",
            )
            for bad in (-1, 1.1e9, math.nan, math.inf)
        ),
        ({"models": [model_info(state=7)]}, "models[0].state"),
        ({"models": [model_info(state=-1)]}, "models[0].state"),
        ({"models": [model_info(load_time={"seconds": -1})]}, "models[0].load_time"),
        ({"models": [model_info(load_time={"nanos": -1})]}, "models[0].load_time"),
        ({"models": [model_info(load_time={"nanos": 10**9})]}, "models[0].load_time"),
        ({"models": [model_info(fingerprint="x" * 1025)]}, "models[0].fingerprint"),
        ({"models": [model_info(f"m{n}") for n in range(4097)]}, "models"),
        *(
            ({"models": [model_info(performance={name: bad})]}, f"models[0].performance.{name}")
            for name in ("ttft", "tpot")
            for bad in ({"seconds": -1}, {"nanos": 10**9}, {"seconds": 315_576_000_000}, {"seconds": 2**63 - 1})
        ),
        ({"models": [model_info("m" * 257)]}, "models[0].name"),
        ({"models": [model_info(provider="p" * 257)]}, "models[0].provider"),
        ({"models": [model_info(quantization="q" * 257)]}, "models[0].quantization"),
        ({"health_detail": "x" * 4097}, "health_detail"),
        *(
            ({path: "x" * 257}, path.replace("__", "."))
            for path in ("engine__name", "engine__version", "hardware__device", "hardware__platform")
        ),
        *(({f"identity__{name}": "x" * 257}, f"identity.{name}") for name in ("instance_id", "version")),
        *(({"identity__labels": bad}, "identity.labels") for bad in ({"k" * 257: ""}, {"k": "v" * 257})),
        (
            {"models": [model_info(performance={"decode_tokens_per_second": math.nan})]},
            "models[0].performance.decode_tokens_per_second",
        ),
    ],
)
def test_malformed_report(changes: dict[str, Any], path: str) -> None:
    assert fields_of(validation.check_report(report(**changes))) == [path]


# ------------------------------------------------------------------- fuzzing ---


def of(message: type[ProtoMessage], depth: int = 4) -> st.SearchStrategy[ProtoMessage]:
    """Any message of a type: scalars at their extremes, enums with unknown numbers, fields left out."""
    scalars = {
        "double": st.floats(),
        "string": st.sampled_from(["", "{}", "[", "a", "image/png", "h:1", "x" * 300, '{"type": "object"}', "é"]),
        "bool": st.booleans(),
        "int32": st.sampled_from([0, 1, -1, 2**31 - 1]) | st.integers(-(2**31), 2**31 - 1),
        "int64": st.integers(-(2**63), 2**63 - 1),
        "uint32": st.integers(0, 2**32 - 1),
        "uint64": st.integers(0, 2**64 - 1),
        "bytes": st.binary(max_size=4),
        "enum": st.integers(-1, 20),
        "float": st.floats(width=32),
    }
    numbers = {1: "double", 2: "float", 3: "int64", 4: "uint64", 5: "int32", 8: "bool", 9: "string", 12: "bytes"}
    numbers |= {13: "uint32", 14: "enum"}

    def value(field: Any) -> st.SearchStrategy[Any]:
        if field.message_type is not None:
            return of(field.message_type._concrete_class, depth - 1)
        return scalars[numbers[field.type]]

    optional = {}
    for field in message.DESCRIPTOR.fields:
        if field.message_type is not None and (depth <= 0 or field.message_type.GetOptions().map_entry):
            continue
        optional[field.name] = st.lists(value(field), max_size=3) if field.is_repeated else value(field)
    return st.fixed_dictionaries({}, optional=optional).map(lambda fields: message(**fields))


@settings(max_examples=150, deadline=None)
@given(of(orchestrator_pb2.GenerateRequest))
def test_any_generate_request_is_judged(request_: orchestrator_pb2.GenerateRequest) -> None:
    again = orchestrator_pb2.GenerateRequest.FromString(request_.SerializeToString())
    assert validation.check_generate_request(request_) == validation.check_generate_request(again)


@settings(max_examples=100, deadline=None)
@given(of(fleet_pb2.ServerReport))
def test_any_report_is_judged(report_: fleet_pb2.ServerReport) -> None:
    assert isinstance(validation.check_report(report_), list)


@settings(max_examples=50, deadline=None)
@given(of(selection_pb2.Requirements), of(orchestrator_pb2.EmbedRequest))
def test_any_embed_request_is_judged(requirements: Any, request_: orchestrator_pb2.EmbedRequest) -> None:
    request_.requirements.CopyFrom(requirements)
    assert isinstance(validation.check_embed_request(request_), list)


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
names = st.from_regex(r"[A-Za-z0-9_-]{1,64}", fullmatch=True)


@settings(max_examples=100, deadline=None)
@given(
    texts=st.lists(texts, min_size=1, max_size=5),
    temperature=st.none() | st.floats(0, 2),
    top_p=st.none() | st.floats(0, 1, exclude_min=True),
    max_tokens=st.none() | st.integers(1, 2**31 - 1),
    stop=st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=256), max_size=16),
    tools=st.lists(names, unique=True, max_size=5),
)
def test_valid_requests_have_no_violations(texts, temperature, top_p, max_tokens, stop, tools) -> None:
    made = given_input(
        messages=[said(text) for text in texts],
        sampling=generation_pb2.SamplingParams(temperature=temperature, top_p=top_p, max_tokens=max_tokens, stop=stop),
        tools=[{"name": name} for name in tools],
    )
    assert validation.check_generation_input(made) == []


def test_a_question_must_not_be_empty():
    asked = generation_pb2.GenerationInput(messages=[generation_pb2.Message(**said(""))])
    assert [violation.field for violation in validation.check_generation_input(asked)] == [
        "input.messages[0].content[0].text"
    ]


def test_of_tickets_a_report_says_what_can_be() -> None:
    report = ticket_pb2.TicketReport(outcomes=[ticket_pb2.TicketOutcome(failure_reason="x" * 300)] * 2)
    report.as_of.seconds = -1
    report.outcomes[1].result.timings.ttft.nanos = -1
    assert [each.field for each in validation.check_ticket_report(report)] == [
        "tickets.as_of",
        "tickets.outcomes[0].failure_reason",
        "tickets.outcomes[1].failure_reason",
        "tickets.outcomes[1].result.timings.ttft",
    ]
    many = ticket_pb2.TicketReport(outcomes=[ticket_pb2.TicketOutcome()] * 1001)
    assert [each.field for each in validation.check_ticket_report(many)] == ["tickets.outcomes"]
    assert not validation.check_ticket_report(ticket_pb2.TicketReport())


def test_an_assignment_has_sampling_and_routing_alone() -> None:
    request = orchestrator_pb2.AssignRequest(prompt_tokens=2**32 - 1, ahead_requests=17)
    request.request.input.prompt = "x"
    request.request.input.sampling.top_p = 2
    request.request.priority = 99
    assert {each.field for each in validation.check_assign_request(request)} == {
        "prompt_tokens",
        "ahead_requests",
        "request.input.prompt",
        "request.input.sampling.top_p",
        "request.priority",
    }
