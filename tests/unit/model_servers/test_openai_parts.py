"""The pure parts of the engines that speak OpenAI's API: requests, answers, errors, stop strings, keys, settings."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime

import msgspec
import pytest
from pydantic import ValidationError

from model_servers.engine import (
    Busy,
    ContentRefused,
    ContextTooLong,
    CredentialsRejected,
    EngineFailed,
    Feature,
    FinishReason,
    GenerationRequest,
    Image,
    Message,
    OutOfMemory,
    RateLimited,
    Role,
    Sampling,
    TaskType,
    Tool,
    ToolCall,
    ToolChoiceMode,
    UnknownModel,
    Unsupported,
    Usage,
)
from model_servers.engines._openai import answers, errors, requests
from model_servers.engines._openai.answers import Reader
from model_servers.engines._openai.dialect import Dialect
from model_servers.engines._openai.errors import Source
from model_servers.engines._openai.keys import Key
from model_servers.engines._openai.settings import NamedModel, describe
from model_servers.engines._openai.stops import Stops
from model_servers.engines.openai_compatible import PRESETS, OpenAICompatibleSettings

SOURCE = Source("api.example.org", "the environment variable EXAMPLE_KEY")
OPENAI = PRESETS["openai"].dialect
SECRET = "the prompt and sk-secret-key-123"
NOW = datetime(2026, 1, 1, 12, 0, tzinfo=UTC)


def asked(text: str = "Hello", **more) -> GenerationRequest:
    return GenerationRequest("m", **{"messages": (Message(Role.USER, (text,)),), **more})


def sent(request: GenerationRequest, dialect: Dialect | None = None) -> dict:
    dialect = dialect or Dialect()
    make = requests.completion if requests.as_completion(request, dialect) else requests.chat
    return json.loads(msgspec.json.encode(make(request, dialect)))


# ---------------------------------------------------------------- requests ---


def test_a_conversation_as_openai_wants_it():
    messages = (
        Message(Role.SYSTEM, ("Be", " brief.")),
        Message(Role.USER, ("Look: ", Image(b"\x89PNG", "image/png")), name="ada"),
        Message(Role.ASSISTANT, (), (ToolCall("call_1", "look", "{}"),)),
        Message(Role.TOOL, ("a cat",), tool_call_id="call_1"),
    )
    body = sent(asked(messages=messages))
    assert body["messages"] == [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "name": "ada",
            "content": [
                {"type": "text", "text": "Look: "},
                {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw=="}},
            ],
        },
        {
            "role": "assistant",
            "tool_calls": [{"id": "call_1", "type": "function", "function": {"name": "look", "arguments": "{}"}}],
        },
        {"role": "tool", "content": "a cat", "tool_call_id": "call_1"},
    ]
    assert body["stream"] is True and body["stream_options"] == {"include_usage": True}
    assert body.keys() == {"model", "messages", "stream", "stream_options"}, "what was not asked for is not sent"


def test_sampling_in_each_dialect():
    sampling = Sampling(
        max_tokens=9, temperature=0.5, top_k=0, min_p=0.1, seed=2**63 + 5, stop=("a", "b"), logprobs=True
    )
    body = sent(asked(sampling=sampling), Dialect(continuous_usage=True))
    assert (body["max_tokens"], body["top_k"], body["min_p"], body["seed"]) == (9, -1, 0.1, 5)
    assert body["stop"] == ["a", "b"] and body["logprobs"] is True and body["top_logprobs"] == 0
    assert body["stream_options"] == {"include_usage": True, "continuous_usage_stats": True}
    body = sent(asked(sampling=sampling), OPENAI)
    assert body["max_completion_tokens"] == 9
    assert not body.keys() & {"max_tokens", "top_k", "min_p", "repetition_penalty"}


def test_stop_strings_beyond_what_the_server_takes_are_the_engines_to_find():
    four, five = Sampling(stop=("a", "b", "c", "d")), Sampling(stop=("a", "b", "c", "d", "e"))
    assert sent(asked(sampling=four), OPENAI)["stop"] == ["a", "b", "c", "d"]
    assert requests.local_stops(four, OPENAI) == ()
    assert "stop" not in sent(asked(sampling=five), OPENAI)
    assert requests.local_stops(five, OPENAI) == five.stop


def test_tools_and_choices():
    tools = (Tool("look", "Looks.", '{"type": "object", "properties": {"at": {"type": "string"}}}'), Tool("wait"))
    body = sent(asked(tools=tools), Dialect(strict="always"))
    first, second = (tool["function"] for tool in body["tools"])
    assert first["parameters"]["properties"] == {"at": {"type": "string"}} and first["strict"] is True
    assert second["parameters"]["type"] == "object" and body["tool_choice"] == "auto"
    assert [tool["function"].get("strict") for tool in sent(asked(tools=tools), OPENAI)["tools"]] == [False, True]
    assert "strict" not in sent(asked(tools=tools))["tools"][0]["function"]
    required = asked(tools=tools, tool_choice=ToolChoiceMode.REQUIRED)
    assert sent(required)["tool_choice"] == "required"
    named = asked(tools=tools, tool_choice=ToolChoiceMode.REQUIRED, tool_name="wait")
    assert sent(named)["tool_choice"] == {"type": "function", "function": {"name": "wait"}}
    assert "tools" not in sent(asked(tools=tools, tool_choice=ToolChoiceMode.NONE))
    for schema in ("{", "true", "[]"):
        with pytest.raises(Unsupported, match="'bad'"):
            sent(asked(tools=(Tool("bad", "", schema),)))


def test_json_formats():
    assert sent(asked(json_object=True))["response_format"] == {"type": "json_object"}
    assert "JSON" in sent(asked(json_object=True), OPENAI)["messages"][0]["content"]
    assert len(sent(asked("Some json.", json_object=True), OPENAI)["messages"]) == 1
    form = sent(asked(json_schema='{"type": "object"}'), OPENAI)["response_format"]
    assert form == {
        "type": "json_schema",
        "json_schema": {"name": "answer", "schema": {"type": "object"}, "strict": False},
    }


@pytest.mark.parametrize(
    ("schema", "strict"),
    [
        ({"type": "object", "properties": {}, "additionalProperties": False}, True),
        ({"type": "object", "properties": {"a": {}}, "required": ["a"], "additionalProperties": False}, True),
        ({"type": "object", "properties": {"a": {}}, "additionalProperties": False}, False),
        ({"type": "object", "properties": {"a": {}}, "required": ["a"]}, False),
        ({"type": "array", "items": {"type": "object"}}, False),
        ({"enum": [{"type": "object"}]}, True),
        (
            {
                "type": "object",
                "properties": {"properties": {"$ref": "#/$defs/x"}},
                "required": ["properties"],
                "additionalProperties": False,
                "$defs": {"x": {"type": "object"}},
            },
            False,
        ),
    ],
)
def test_which_schemas_openai_takes_with_strict(schema, strict):
    assert requests.is_strict(schema) is strict


def test_raw_prompts_go_to_completions_or_into_a_message():
    request = asked(messages=(), prompt="Once", sampling=Sampling(logprobs=True, top_logprobs=3, max_tokens=5))
    assert sent(request)["prompt"] == "Once" and sent(request)["logprobs"] == 3
    assert sent(request, OPENAI)["messages"] == [{"role": "user", "content": "Once"}]
    with pytest.raises(Unsupported):
        sent(asked(messages=(), prompt="Once", tools=(Tool("look"),)))


# ----------------------------------------------------------------- answers ---


def reader(*, completion: bool = False, stops: tuple[str, ...] = (), top: int | None = None) -> Reader:
    return Reader(SOURCE, completion=completion, stops=stops, top=top)


def chunk(delta: dict | None = None, reason: str | None = None, **more) -> bytes:
    choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": reason, **more.pop("choice", {})}]
    return json.dumps({"id": "x", "object": "chat.completion.chunk", "choices": choices, **more}).encode()


def test_usage_comes_at_the_end_and_makes_up_for_pieces_of_several_tokens():
    read = reader()
    assert read.read(chunk({"role": "assistant", "content": ""})) is None and not read.begun
    assert read.read(chunk({"content": "Hello wor"})).tokens == 1 and read.begun
    assert read.read(chunk({}, "stop")) is None and read.finished
    usage = {
        "prompt_tokens": 7,
        "completion_tokens": 9,
        "prompt_tokens_details": {"cached_tokens": 4},
        "completion_tokens_details": {"reasoning_tokens": 5},
    }
    read.read(chunk(usage=usage))
    read.read(answers.DONE)
    finished = read.end()
    assert finished.finish_reason is FinishReason.STOP
    assert finished.usage == Usage(7, 4, 9, 5)
    assert finished.last.tokens == 3, "reasoning that is not shown is in no delta"


def test_continuous_usage_counts_exactly():
    read = reader()
    tokens = [read.read(chunk({"content": "x"}, usage={"completion_tokens": n})).tokens for n in (2, 3, 7)]
    assert tokens == [2, 1, 4]


def test_reasoning_under_both_names_and_shown_reasoning_counts():
    read = reader()
    assert read.read(chunk({"reasoning_content": "hm"})).reasoning_text == "hm"
    assert read.read(chunk({"reasoning": "so"})).reasoning_text == "so"
    read.read(chunk({"content": "yes"}, "stop"))
    details = {"completion_tokens_details": {"reasoning_tokens": 2}}
    read.read(chunk(usage={"prompt_tokens": 1, "completion_tokens": 3, **details}))
    assert read.end().last is None


def test_xai_counts_reasoning_beside_the_completion():
    read = reader()
    read.read(chunk({"content": "x"}, "stop"))
    details = {"completion_tokens_details": {"reasoning_tokens": 10}}
    read.read(chunk(usage={"prompt_tokens": 2, "completion_tokens": 1, "total_tokens": 13, **details}))
    assert read.end().usage.completion_tokens == 11


def test_fragments_of_calls_are_numbered_from_zero():
    read = reader()
    call = {"index": 1, "id": "a", "type": "function", "function": {"name": "look", "arguments": ""}}
    (first,) = read.read(chunk({"tool_calls": [call]})).tool_calls
    assert (first.index, first.id, first.name) == (0, "a", "look")


def test_calls_in_pieces_and_whole_calls():
    read = reader()
    begin = {"index": 0, "id": "a", "type": "function", "function": {"name": "look", "arguments": '{"x"'}}
    (first,) = read.read(chunk({"tool_calls": [begin]})).tool_calls
    (second,) = read.read(chunk({"tool_calls": [{"index": 0, "function": {"arguments": ": 1}"}}]})).tool_calls
    assert (first.id, first.name, first.arguments_json) == ("a", "look", '{"x"')
    assert (second.id, second.name, second.arguments_json) == ("", "", ": 1}")
    whole = {"id": "b", "function": {"name": "wait", "arguments": "{}"}}  # without an index
    (third,) = read.read(chunk({"tool_calls": [whole]}, "stop")).tool_calls
    assert (third.index, third.name) == (1, "wait")
    assert read.end().finish_reason is FinishReason.TOOL_CALLS


def test_logprobs_sorted_cut_and_counted():
    top = [{"token": t, "logprob": p} for t, p in (("low", -5.0), ("best", -0.1), ("next", -2.0))]
    entry = {"token": "low", "logprob": -5.0, "top_logprobs": top}
    delta = reader(top=2).read(chunk({"content": "low"}, choice={"logprobs": {"content": [entry]}}))
    assert delta.tokens == 1 and [token for token, _ in delta.logprobs[0].top] == ["best", "next"]
    text = {"choices": [{"index": 0, "text": "ab", "logprobs": {
        "tokens": ["a", "b"], "token_logprobs": [-1.0, -2.0], "top_logprobs": [{"a": -1.0}, {"c": -0.5, "b": -2.0}]
    }}]}  # fmt: skip
    delta = reader(completion=True, top=1).read(json.dumps(text).encode())
    assert [entry.top for entry in delta.logprobs] == [(("a", -1.0),), (("c", -0.5),)]
    assert all(not entry.top for entry in reader(completion=True, top=0).read(json.dumps(text).encode()).logprobs)


def test_refusals_and_filters():
    read = reader()
    assert read.read(chunk({"refusal": "I will not."}, "stop")).text == "I will not."
    assert read.end().finish_reason is FinishReason.CONTENT_FILTER
    read = reader()
    read.read(chunk({}, "content_filter"))
    assert read.end().finish_reason is FinishReason.CONTENT_FILTER


def test_stop_strings_found_here_end_the_answer():
    read = reader(stops=("lo w",))
    assert read.read(chunk({"content": "Hel"})).text == "He", "the rest may become a stop string"
    assert read.read(chunk({"content": "lo"})).text == "l"
    assert read.read(chunk({"content": " world"})).text == ""
    assert read.over and not read.done
    finished = read.end()
    assert (finished.finish_reason, finished.usage.completion_tokens, finished.last) == (FinishReason.STOP, 3, None)
    read = reader(stops=("never",))
    assert read.read(chunk({"content": "ne"}, "stop")).text == ""
    assert read.end().last.text == "ne", "what only began like one is part of the answer"


@pytest.mark.parametrize(
    ("payload", "error"),
    [
        (b"not json", EngineFailed),
        (b'{"choices": 3}', EngineFailed),
        (b'{"error": {"message": "SECRET", "code": 500}}', EngineFailed),
        (b'{"error": {"message": "slow down", "type": "rate_limit_error"}}', RateLimited),
        (b'{"error": {"message": "x", "code": "context_length_exceeded"}}', ContextTooLong),
        (b'{"error": "SECRET broke it"}', EngineFailed),
        (chunk({}, "abort"), EngineFailed),
        (chunk({"tool_calls": [{"index": 0, "id": "a"}]}), EngineFailed),
    ],
)
def test_what_breaks_an_answer(payload, error):
    with pytest.raises(error) as caught:
        reader().read(payload)
    assert type(caught.value) is error and "SECRET" not in str(caught.value)


def test_a_stream_that_ends_early_has_failed():
    read = reader()
    read.read(chunk({"content": "Hel"}))
    with pytest.raises(EngineFailed, match="broke off"):
        read.end()


def test_vectors_come_in_the_order_of_the_inputs():
    body = {"object": "list", "model": "m", "usage": {"prompt_tokens": 3}}
    data = [{"object": "embedding", "index": n, "embedding": [float(n), 1.0]} for n in (1, 0)]
    found = answers.vectors(SOURCE, json.dumps({**body, "data": data}).encode(), 2)
    assert found == ([[0.0, 1.0], [1.0, 1.0]], 3)
    for broken in (
        b"[]",
        json.dumps({**body, "data": data[:1]}).encode(),
        json.dumps({**body, "data": data[:1] * 2}).encode(),
    ):
        with pytest.raises(EngineFailed):
            answers.vectors(SOURCE, broken, 2)


@pytest.mark.parametrize("size", [1, 2, 3, 50])
@pytest.mark.parametrize(
    ("text", "stops", "passed"),
    [
        ("to be or not to be", ("not",), "to be or "),
        ("aaab", ("aab",), "a"),
        ("abcd", ("bcd", "bc"), "a"),
        ("abcx", ("abcd",), "abcx"),
        ("abab", ("abab", "b"), "a"),
    ],
)
def test_stops_wherever_pieces_end(text, stops, passed, size):
    matcher, out = Stops(stops), ""
    for at in range(0, len(text), size):
        piece, met = matcher.push(text[at : at + size])
        out += piece
        if met:
            break
    assert out + matcher.flush() == passed


# ------------------------------------------------------------------ errors ---

_LEAK = {"message": f"Bad: {SECRET}", "type": "invalid_request_error"}


@pytest.mark.parametrize(
    ("status", "error", "kind"),
    [
        (401, {"code": "invalid_api_key"}, CredentialsRejected),
        (403, {}, CredentialsRejected),
        (400, {"message": "Incorrect API key provided"}, CredentialsRejected),
        (403, {"message": "Your input was flagged"}, ContentRefused),
        (402, {}, RateLimited),
        (429, {}, RateLimited),
        (429, {"code": "insufficient_quota"}, RateLimited),
        (404, {"code": "model_not_found"}, UnknownModel),
        (404, {"message": "The model `x` does not exist.", "param": "model"}, UnknownModel),
        (400, {"message": "x is not a valid model ID"}, UnknownModel),
        (404, {}, EngineFailed),
        (400, {"code": "context_length_exceeded"}, ContextTooLong),
        (400, {"message": "This model's maximum context length is 2048 tokens. However,"}, ContextTooLong),
        (400, {"message": "max_tokens=3000 cannot be greater than max_model_len=2048."}, ContextTooLong),
        (400, {"message": "The prompt (length 9) is longer than the maximum model length of 8."}, ContextTooLong),
        (413, {}, ContextTooLong),
        (400, {"code": "content_filter"}, ContentRefused),
        (400, {"code": "content_policy_violation"}, ContentRefused),
        (400, {"param": "temperature"}, Unsupported),
        (422, {}, Unsupported),
        (500, {}, EngineFailed),
        (500, {"message": "CUDA out of memory"}, OutOfMemory),
        (502, {}, EngineFailed),
        (503, {}, Busy),
        (504, {}, EngineFailed),
        (529, {"type": "overloaded_error"}, Busy),
        (302, {}, EngineFailed),
    ],
)  # fmt: skip
def test_what_a_status_means(status, error, kind):
    body = {**_LEAK, **error}
    body["message"] = f"{error.get('message', '')} {SECRET}"
    found = errors.from_response(SOURCE, status, {}, json.dumps({"error": body}).encode(), NOW)
    assert type(found) is kind
    assert SECRET not in str(found) and "sk-" not in str(found), "the server's own words stay outside"
    assert "api.example.org" in str(found) and str(status) in str(found)


def test_rejected_keys_are_named_by_where_they_come_from():
    found = errors.from_response(SOURCE, 401, {}, b'{"error": "Unauthorized"}')
    assert "EXAMPLE_KEY" in str(found)
    assert "api_key_env" in str(errors.from_response(Source("x"), 401, {}, b""))


def test_an_answer_that_is_no_json_has_its_meaning_by_its_status():
    assert type(errors.from_response(SOURCE, 502, {}, b"<html>Bad gateway</html>")) is EngineFailed


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry-After": "7"}, 7.0),
        ({"Retry-After": "0.5"}, 0.5),
        ({"Retry-After": "Thu, 01 Jan 2026 12:00:30 GMT"}, 30.0),
        ({"Retry-After": "Thu, 01 Jan 2026 11:00:00 GMT"}, 0.0),
        ({"retry-after-ms": "250", "Retry-After": "1"}, 0.25),
        ({"Retry-After": "99999999"}, 3600.0),
        ({"Retry-After": "soon"}, None),
        ({"Retry-After": "nan"}, None),
        ({}, None),
    ],
)
def test_how_long_to_wait(headers, seconds):
    assert errors.retry_after(headers, NOW) == seconds
    limited = errors.from_response(SOURCE, 429, headers, b"", NOW)
    assert limited.retry_after == (1.0 if seconds is None else seconds)


def test_cures_for_what_vllm_was_started_without():
    message = '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set'
    found = errors.from_response(SOURCE, 400, {}, json.dumps({"error": {"message": message}}).encode())
    assert "--tool-call-parser" in str(found)


# -------------------------------------------------------- keys and settings ---


def test_keys_from_variables_and_files(tmp_path):
    key = Key("A_KEY", env={"A_KEY": " secret\n"})
    key.read()
    assert key.headers() == {"Authorization": "Bearer secret"}
    file = tmp_path / "key"
    file.write_text("first")
    key = Key("A_KEY", str(file), header="api-key", env={})
    key.read()
    assert key.headers() == {"api-key": "first"} and str(file) in key.origin
    file.write_text("second\n")
    key.read()
    assert key.headers() == {"api-key": "second"}, "a renewed file is read anew"
    file.write_text("no\nkey")
    with pytest.raises(EngineFailed) as caught:
        key.read()
    assert "no\nkey" not in str(caught.value)
    with pytest.raises(EngineFailed, match="A_KEY"):
        Key("A_KEY", env={}).read()
    with pytest.raises(EngineFailed, match="missing"):
        Key("", str(tmp_path / "missing")).read()
    none = Key(env={})
    none.read()
    assert none.headers() == {} and none.origin == ""


def test_presets_and_what_is_given_over_them():
    plain = OpenAICompatibleSettings()
    assert plain.address() == "https://api.openai.com/v1" and plain.provider_name() == "openai"
    groq = OpenAICompatibleSettings(provider="groq", max_tokens_field="max_tokens", models=["a"])
    assert "groq.com" in groq.address() and groq.dialect().max_tokens_field == "max_tokens"
    assert groq.models[0].name == "a"
    own = OpenAICompatibleSettings(base_url="http://127.0.0.1:8080/v1/")
    assert own.preset() is None and own.provider_name() == "127.0.0.1" and own.address().endswith("8080/v1")
    assert own.dialect() == Dialect()


@pytest.mark.parametrize(
    "given",
    [
        {"provider": "unheard-of"},
        {"discover": False},
        {"base_url": "ftp://x"},
        {"base_url": "https://user:pass@x/v1"},
        {"headers": {"Authorization": "Bearer x"}},
        {"headers": {"X-Api-Key": "x"}},
        {"models": [{"name": "a", "features": ["flying"]}]},
        {"capabilities": {"flying": 1}},
        {"api_key": "sk-1"},
        {"slots": 0},
    ],
)
def test_settings_that_cannot_be_used(given):
    with pytest.raises(ValidationError):
        OpenAICompatibleSettings(**given)


def test_only_work_that_the_features_allow_is_offered():
    text = describe(NamedModel(name="a"), "p", context_length=9, features=Feature.STREAMING, capabilities=None)
    assert TaskType.CHAT in text.capabilities
    assert not {TaskType.EMBEDDING, TaskType.TOOL_USE, TaskType.VISION} & text.capabilities.keys()
    only = describe(NamedModel(name="a"), "p", context_length=9, features=Feature.EMBEDDING, capabilities=None)
    assert set(only.capabilities) == {TaskType.EMBEDDING}


def test_without_aiohttp_the_modules_import_and_the_cure_is_named():
    script = (
        "import sys\n"
        "sys.modules['aiohttp'] = sys.modules['prometheus_client'] = None\n"
        "from model_servers import registry\n"
        "for name in ('openai_compatible', 'vllm'):\n"
        "    plugin = registry.find(name)\n"
        "    try:\n"
        "        registry.create(plugin, registry.validate(plugin, {}))\n"
        "    except registry.EngineUnavailable as error:\n"
        "        print(error)\n"
    )
    said = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    assert "modelyard[openai]" in said and "modelyard[vllm]" in said
