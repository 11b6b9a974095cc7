"""The decisions of the engines in front of hosted APIs."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from model_servers.engine import (
    Busy,
    ContentRefused,
    ContextTooLong,
    CredentialsRejected,
    Delta,
    EngineFailed,
    Feature,
    FinishReason,
    GenerationRequest,
    Image,
    Message,
    RateLimited,
    Role,
    TaskType,
    Tool,
    ToolCall,
    ToolChoiceMode,
    UnknownModel,
    Unsupported,
    Usage,
)
from model_servers.engines import anthropic, bedrock
from model_servers.engines._hosted.answer import (
    Answer,
    CallArguments,
    CallBegins,
    CallEnds,
    Counted,
    Event,
    StopMatcher,
    Stopped,
    Text,
    Thinking,
    Unwrapper,
)
from model_servers.engines._hosted.conversation import (
    Plan,
    ToolResult,
    close_objects,
    make_plan,
    most_prompt_tokens,
    parameters,
    turns,
)
from model_servers.engines._hosted.engine import retry_seconds
from model_servers.engines._hosted.settings import HostedModel, HostedSettings

OBJECT = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


def ask(*messages: Message, **more: Any) -> GenerationRequest:
    return GenerationRequest("m", messages or (Message(Role.USER, ("Hello",)),), **more)


def say(answer: Answer, *events: Event) -> list[Delta]:
    return [delta for event in events if (delta := answer.push(event)) is not None]


# -------------------------------------------------------------- text edges ---


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.data())
def test_stop_strings_are_found_wherever_the_text_is_cut(text: str, stops: list[str], data: st.DataObject):
    matcher = StopMatcher(stops)
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    passed, rest, stopped = "", text, False
    while rest and not stopped:
        size = data.draw(st.integers(1, len(rest)))
        piece, stopped = matcher.push(rest[:size])
        passed, rest = passed + piece, rest[size:]
    assert stopped == bool(places)
    if not stopped:
        assert passed + matcher.flush() == text
    else:
        # Of two stop strings that overlap, the one that is complete first ends the text.
        assert text.startswith(passed) and not any(stop in passed for stop in stops)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("}a", max_size=3), inner, max_size=2),
        max_leaves=4,
    ),
    st.sampled_from([None, 2]),
    st.data(),
)
def test_the_wrapped_value_comes_out_wherever_the_text_is_cut(value: Any, indent: int | None, data: st.DataObject):
    rest, out = json.dumps({"answer": value}, indent=indent), ""
    unwrapper = Unwrapper()
    size = data.draw(st.integers(1, 12))
    while rest:
        out, rest = out + unwrapper.push(rest[:size]), rest[size:]
    assert json.loads(out) == value


# ------------------------------------------------------------------ answer ---


def test_text_thoughts_and_calls_become_deltas():
    answer = Answer(Plan())
    deltas = say(
        answer,
        Counted(prompt=10, cached=4, completion=1),
        Thinking("hm"),
        Text("I look."),
        CallBegins("c1", "look"),
        CallArguments('{"at":'),
        CallArguments(' "it"}'),
        CallEnds(),
        CallBegins("c2", "wait"),
        CallEnds(),
        Counted(completion=30, reasoning=5),
        Stopped("tool_use"),
    )
    assert [delta.text for delta in deltas if delta.text] == ["I look."]
    assert [delta.reasoning_text for delta in deltas if delta.reasoning_text] == ["hm"]
    calls = [call for delta in deltas for call in delta.tool_calls]
    assert [(call.index, call.id, call.name) for call in calls if call.id] == [(0, "c1", "look"), (1, "c2", "wait")]
    assert "".join(call.arguments_json for call in calls if call.index == 0) == '{"at": "it"}'
    assert "".join(call.arguments_json for call in calls if call.index == 1) == "{}"
    finished = answer.finish()
    assert finished.finish_reason is FinishReason.TOOL_CALLS
    assert finished.usage == Usage(10, 4, 30, 5)
    assert finished.last is not None and sum(delta.tokens for delta in deltas) + finished.last.tokens == 30


def test_thoughts_that_are_not_shown_do_not_count_as_tokens_of_deltas():
    answer = Answer(Plan())
    deltas = say(answer, Thinking(), Text("Yes"), Text("."), Counted(5, 0, 100, 90), Stopped("end_turn"))
    finished = answer.finish()
    assert finished.usage.completion_tokens == 100
    assert sum(delta.tokens for delta in [*deltas, finished.last]) == 10


def test_only_what_the_answer_tool_gets_is_the_answer():
    answer = Answer(Plan(answer_tool="json_answer"), ["}"])
    deltas = say(
        answer,
        Text("Here:"),
        CallBegins("c", "json_answer"),
        CallArguments('{"a": {}}'),
        CallEnds(),
        Stopped("tool_use"),
    )
    assert "".join(delta.text for delta in deltas) == '{"a": {}}', "no stop string cuts JSON"
    assert not any(delta.tool_calls for delta in deltas)
    assert answer.finish().finish_reason is FinishReason.STOP


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        ("end_turn", FinishReason.STOP),
        ("stop_sequence", FinishReason.STOP),
        ("max_tokens", FinishReason.LENGTH),
        ("model_context_window_exceeded", FinishReason.LENGTH),
        ("refusal", FinishReason.CONTENT_FILTER),
        ("guardrail_intervened", FinishReason.CONTENT_FILTER),
        ("content_filtered", FinishReason.CONTENT_FILTER),
        ("what comes next year", FinishReason.STOP),
    ],
)
def test_reasons(reason: str, expected: FinishReason):
    answer = Answer(Plan())
    say(answer, Text("Yes"), Stopped(reason))
    assert answer.finish().finish_reason is expected


@pytest.mark.parametrize("reason", ["", "malformed_tool_use", "malformed_model_output"])
def test_what_is_no_end_is_a_failure(reason: str):
    answer = Answer(Plan())
    say(answer, Text("Yes"), *([Stopped(reason)] if reason else []))
    with pytest.raises(EngineFailed):
        answer.finish()


def test_a_refusal_is_an_error_only_before_the_first_word():
    answer = Answer(Plan())
    say(answer, Thinking(), Stopped("refusal"))
    with pytest.raises(ContentRefused):
        answer.finish()


def test_an_answer_that_was_left_is_estimated():
    answer = Answer(Plan(), ["\n"], estimated_prompt=42)
    assert "".join(delta.text for delta in say(answer, Text("twelve chars"), Text("\nmore"))) == "twelve chars"
    assert answer.stopped
    finished = answer.finish()
    assert finished.finish_reason is FinishReason.STOP
    assert finished.usage == Usage(42, 0, 3, 0)


# ------------------------------------------------------------ conversation ---


def test_sides_alternate_and_results_belong_to_the_user():
    image = Image(b"x", "image/png")
    found = turns(
        ask(
            Message(Role.SYSTEM, ("Be brief.",)),
            Message(Role.USER, ("a", "b", image)),
            Message(Role.USER, ("c", " ")),
            Message(Role.ASSISTANT, (), (ToolCall("1", "f", "{}"),)),
            Message(Role.TOOL, ("r",), tool_call_id="1"),
            Message(Role.USER, ("d",)),
        )
    )
    assert [(turn.role, turn.parts) for turn in found] == [
        ("user", ("ab", image, "c ")),
        ("assistant", (ToolCall("1", "f", "{}"),)),
        ("user", (ToolResult("1", ("r",)), "d")),
    ]


def test_a_bound_of_the_prompt_counts_everything():
    plain = most_prompt_tokens(ask())
    for more in (
        ask(Message(Role.USER, ("Hello" + "é" * 10,))),
        ask(Message(Role.USER, ("Hello", Image(b"x", "image/png")))),
        ask(tools=(Tool("f", "does", "{}"),)),
        ask(json_schema="{}"),
        ask(Message(Role.ASSISTANT, ("Hello",), (ToolCall("1", "f", '{"a": 1}'),))),
    ):
        assert most_prompt_tokens(more) > plain
    assert most_prompt_tokens(ask(Message(Role.USER, ("é" * 1000,)))) > 2000


def test_a_tool_without_schema_takes_no_arguments():
    assert parameters(Tool("f")) == {"type": "object", "properties": {}}
    assert parameters(Tool("f", "", json.dumps(OBJECT))) == OBJECT


@pytest.mark.parametrize(
    ("more", "choice", "names"),
    [
        ({}, "none", []),
        ({"tools": (Tool("f"),)}, "auto", ["f"]),
        ({"tools": (Tool("f"),), "tool_choice": ToolChoiceMode.NONE}, "none", ["f"]),
        ({"tools": (Tool("f"),), "tool_choice": ToolChoiceMode.REQUIRED}, "any", ["f"]),
        (
            {"tools": (Tool("f"), Tool("g")), "tool_choice": ToolChoiceMode.REQUIRED, "tool_name": "g"},
            "tool",
            ["f", "g"],
        ),
        ({"json_object": True}, "tool", ["json_answer"]),
        ({"json_object": True, "tools": (Tool("json_answer"),)}, "any", ["json_answer", "json_answer_"]),
        ({"json_schema": json.dumps(OBJECT), "tools": (Tool("f"),)}, "any", ["f", "json_answer"]),
    ],
)
def test_tools_and_formats_by_required_calls(more: dict[str, Any], choice: str, names: list[str]):
    plan = make_plan(ask(**more), structured=False, forced=True)
    assert (plan.choice, [tool.name for tool in plan.tools]) == (choice, names)
    assert plan.forced == (choice in ("any", "tool"))
    assert bool(plan.answer_tool) == ("json_object" in more or "json_schema" in more)


def test_tools_of_the_history_are_declared():
    talk = ask(Message(Role.USER, ("Hi",)), Message(Role.ASSISTANT, (), (ToolCall("1", "f", "{}"),)))
    plan = make_plan(talk, structured=False, forced=True)
    assert [tool.name for tool in plan.tools] == ["f"] and plan.choice == "none"


@pytest.mark.parametrize(
    ("schema", "enforced"),
    [
        (OBJECT, True),
        ({**OBJECT, "properties": {"a": {"anyOf": [{"type": "null"}, OBJECT]}}}, True),
        ({"type": "object"}, False),
        ({"type": "object", "additionalProperties": {"type": "integer"}}, False),
        ({**OBJECT, "properties": {"a": {"type": "array", "items": {"type": "object"}}}}, False),
        ({**OBJECT, "properties": {"a": {}}}, False),
        ({"type": "array", "items": OBJECT}, False),
    ],
)
def test_schemas_are_left_to_the_vendor_only_if_closing_changes_nothing(schema: dict[str, Any], enforced: bool):
    asked = ask(json_schema=json.dumps(schema))
    plan = make_plan(asked, structured=True, forced=True)
    assert (plan.schema == schema, bool(plan.answer_tool)) == (enforced, not enforced)
    assert make_plan(asked, structured=True, forced=False).schema == schema, "there is no other way"
    assert make_plan(asked, structured=False, forced=True).answer_tool


def test_references_still_lead_somewhere_when_wrapped():
    schema = {"$ref": "#/$defs/n", "$defs": {"n": {"type": "integer"}}}
    plan = make_plan(ask(json_schema=json.dumps(schema)), structured=False, forced=True)
    assert plan.wrapped
    wrapped = parameters(plan.tools[0])
    assert wrapped["$defs"] == schema["$defs"] and wrapped["properties"]["answer"] == {"$ref": "#/$defs/n"}


def test_objects_are_closed_everywhere_but_in_values():
    schema = {"type": "object", "properties": {"a": {"type": "array", "items": OBJECT}}, "const": {"type": "object"}}
    closed = close_objects(schema)
    assert closed["additionalProperties"] is False
    assert closed["properties"]["a"]["items"]["additionalProperties"] is False
    assert closed["const"] == {"type": "object"}


@pytest.mark.parametrize(
    "more", [{"json_object": True}, {"tools": (Tool("f"),), "tool_choice": ToolChoiceMode.REQUIRED}]
)
def test_what_cannot_be_forced_is_unsupported(more: dict[str, Any]):
    with pytest.raises(Unsupported):
        make_plan(ask(**more), structured=True, forced=False)


# ---------------------------------------------------------------- settings ---


def test_models_are_names_or_mappings():
    settings = HostedSettings.model_validate({"models": ["a", {"id": "vendor.b", "name": "b"}]})
    assert [(model.public_name, model.provider_id) for model in settings.models] == [("a", "a"), ("b", "vendor.b")]
    described = settings.models[0].describe("vendor", 100, Feature.STREAMING | Feature.VISION)
    assert described.capabilities[TaskType.VISION] and TaskType.TOOL_USE not in described.capabilities


@pytest.mark.parametrize(
    "models",
    [
        ["a", "a"],
        [{}],
        [{"name": "a", "capabilities": {"chatting": 1}}],
        [{"name": "a", "capabilities": {"chat": 2}}],
        [{"name": "a", "features": ["flying"]}],
        [{"name": "a", "api_key": "never"}],
    ],
)
def test_models_that_cannot_be_used(models: list[Any]):
    with pytest.raises(ValidationError):
        HostedSettings.model_validate({"models": models})


def test_settings_win_over_what_was_learned():
    model = HostedModel.model_validate(
        {
            "name": "m",
            "context_length": 7,
            "max_output_tokens": 3,
            "features": ["streaming"],
            "capabilities": {"chat": 0.1},
            "price": {"prompt": 3, "cached_prompt": 0.3, "completion": 15},
        }
    )
    known = anthropic._offer(model, {"max_input_tokens": 100, "max_tokens": 50, "capabilities": {}})
    assert (known.described.context_length, known.max_output) == (7, 3)
    assert known.described.features is Feature.STREAMING
    assert known.described.capabilities == {TaskType.CHAT: 0.1}
    assert known.described.price == (3, 0.3, 15)


# ------------------------------------------------------------------ errors ---


@pytest.mark.parametrize(
    ("status", "kind", "message", "expected"),
    [
        (401, "authentication_error", "", CredentialsRejected),
        (401, "", "", CredentialsRejected),
        (403, "permission_error", "", CredentialsRejected),
        (404, "not_found_error", "model: x", UnknownModel),
        (404, "", "", EngineFailed),
        (429, "rate_limit_error", "", RateLimited),
        (200, "overloaded_error", "", Busy),
        (529, "overloaded_error", "", Busy),
        (503, "", "", Busy),
        (402, "billing_error", "", EngineFailed),
        (400, "invalid_request_error", "Your credit balance is too low", EngineFailed),
        (400, "invalid_request_error", "prompt is too long: 5 tokens > 4 maximum", ContextTooLong),
        (400, "invalid_request_error", "input length and `max_tokens` exceed context limit: 5 + 6 > 7", ContextTooLong),
        (413, "request_too_large", "", ContextTooLong),
        (400, "invalid_request_error", "tools.0: no", Unsupported),
        (500, "api_error", "too long a story", EngineFailed),
        (504, "timeout_error", "", EngineFailed),
    ],
)
def test_errors_of_anthropic(status: int, kind: str, message: str, expected: type):
    error = anthropic.status_failure(status, kind, message, None, model="m", key_source="the variable KEY")
    assert type(error) is expected and str(error)
    if expected is CredentialsRejected:
        assert "the variable KEY" in str(error)


@pytest.mark.parametrize(
    ("code", "status", "message", "expected"),
    [
        ("UnrecognizedClientException", 403, "", CredentialsRejected),
        ("AccessDeniedException", 403, "You don't have access to the model", CredentialsRejected),
        ("ExpiredTokenException", 403, "", CredentialsRejected),
        ("", 401, "", CredentialsRejected),
        ("ThrottlingException", 429, "", RateLimited),
        ("throttlingException", 400, "", RateLimited),
        ("ServiceQuotaExceededException", 400, "", RateLimited),
        ("ModelNotReadyException", 429, "", Busy),
        ("serviceUnavailableException", 503, "", Busy),
        ("ResourceNotFoundException", 404, "", UnknownModel),
        ("ValidationException", 400, "The provided model identifier is invalid.", UnknownModel),
        ("ValidationException", 400, "Input is too long for requested model.", ContextTooLong),
        ("ValidationException", 400, "prompt is too long: 5 tokens > 4 maximum", ContextTooLong),
        ("validationException", 400, "Too many input tokens. Max input tokens: 8192", ContextTooLong),
        ("ValidationException", 400, "on-demand throughput isn't supported", Unsupported),
        ("modelStreamErrorException", 424, "", EngineFailed),
        ("ModelErrorException", 424, "", EngineFailed),
        ("ModelTimeoutException", 408, "", EngineFailed),
        ("InternalServerException", 500, "", EngineFailed),
    ],
)
def test_errors_of_bedrock(code: str, status: int, message: str, expected: type):
    error = bedrock.code_failure(code, message, status, None, model="m", credentials="the AWS profile work")
    assert type(error) is expected and str(error)
    if expected is CredentialsRejected:
        assert "the AWS profile work" in str(error)


@pytest.mark.parametrize(
    ("header", "seconds"), [(None, 1.0), ("2", 2.0), ("0.5", 0.5), ("-3", 0.0), ("1e9", 3600.0), ("tomorrow", 1.0)]
)
def test_retry_after(header: str | None, seconds: float):
    assert retry_seconds(header) == seconds
