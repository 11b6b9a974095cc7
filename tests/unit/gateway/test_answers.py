"""Answers of the contract in OpenAI's words."""

from __future__ import annotations

import base64
import json
import struct
from typing import Any

import pytest

from control_plane.gateway import chat, completions, embeddings, responses
from control_plane.gateway.answers import Answer, Head, Stream
from control_plane.gateway.errors import failure
from modelyard.rpc.errors import Refusal
from modelyard.rpc.reasons import Reason
from modelyard.v1 import generation_pb2
from modelyard.v1.generation_pb2 import GenerationDelta, ToolCallDelta, Usage
from modelyard.v1.orchestrator_pb2 import EmbedResponse, GenerationSummary

HEAD = Head("r-1", 1700000000, "tiny")
USAGE = Usage(prompt_tokens=7, cached_prompt_tokens=4, completion_tokens=3, reasoning_tokens=1)


def summary(reason: generation_pb2.FinishReason = generation_pb2.FINISH_REASON_STOP) -> GenerationSummary:
    return GenerationSummary(finish_reason=reason, usage=USAGE)


def logprob(token: str) -> generation_pb2.TokenLogprob:
    top = [generation_pb2.TopLogprob(token=token, logprob=-0.5), generation_pb2.TopLogprob(token="?", logprob=-2)]
    return generation_pb2.TokenLogprob(token=token, logprob=-0.5, top=top)


def call(index: int, arguments: str, id: str = "", name: str = "") -> GenerationDelta:
    return GenerationDelta(tool_calls=[ToolCallDelta(index=index, id=id, name=name, arguments_json=arguments)])


CALLS = [call(0, "", "c0", "weather"), call(0, '{"a"'), call(0, ": 1}"), call(1, "{}", "c1", "time")]


def whole(module: Any, *deltas: GenerationDelta, end: GenerationSummary | None = None, **fields: Any) -> Any:
    answer = Answer()
    for delta in deltas:
        answer.take(delta)
    answer.summary = end or summary()
    return json.loads(asked(module, **fields).render(HEAD, answer))


def asked(module: Any, **fields: Any) -> Any:
    content = {chat: {"messages": []}, completions: {"prompt": "x"}, responses: {"input": "x"}}[module]
    return module.parse(json.dumps({"model": "m", **content, **fields}).encode())


def opened(module: Any, **fields: Any) -> Stream:
    return asked(module, **fields).open(HEAD)


def events(raw: bytes) -> list[Any]:
    """The data of server-sent events; the name of an event must be the type of its data."""
    found = []
    for block in raw.decode().split("\n\n")[:-1]:
        *names, data = block.split("\n")
        assert data.startswith("data: ")
        value = data.removeprefix("data: ")
        found.append(value if value == "[DONE]" else json.loads(value))
        if names:
            assert names == [f"event: {found[-1]['type']}"]
    return found


# --------------------------------------------------------------------- chat ---


def test_a_whole_chat_answer_has_every_key() -> None:
    found = whole(chat, GenerationDelta(text="Hel", reasoning_text="hm"), GenerationDelta(text="lo"))
    assert found == {
        "id": "chatcmpl-r-1",
        "object": "chat.completion",
        "created": 1700000000,
        "model": "tiny",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hello", "refusal": None, "reasoning_content": "hm"},
                "finish_reason": "stop",
                "logprobs": None,
            }
        ],
        "usage": {
            "prompt_tokens": 7,
            "completion_tokens": 3,
            "total_tokens": 10,
            "prompt_tokens_details": {"cached_tokens": 4},
            "completion_tokens_details": {"reasoning_tokens": 1},
        },
    }


def test_whole_tool_calls() -> None:
    found = whole(chat, *CALLS, end=summary(generation_pb2.FINISH_REASON_TOOL_CALLS))
    (choice,) = found["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    assert choice["message"]["tool_calls"] == [
        {"id": "c0", "type": "function", "function": {"name": "weather", "arguments": '{"a": 1}'}},
        {"id": "c1", "type": "function", "function": {"name": "time", "arguments": "{}"}},
    ]


def test_logprobs_of_a_chat() -> None:
    found = whole(chat, GenerationDelta(text="é", logprobs=[logprob("é")]))
    (token,) = found["choices"][0]["logprobs"]["content"]
    assert token["bytes"] == [195, 169]
    assert [(top["token"], top["logprob"]) for top in token["top_logprobs"]] == [("é", -0.5), ("?", -2)]


def test_chunks_of_a_chat() -> None:
    stream = opened(chat, stream_options={"include_usage": True})
    found = events(
        stream.piece(GenerationDelta(text="Hel", tokens=1))
        + stream.piece(GenerationDelta(tokens=1))  # a token whose text is held back
        + stream.piece(GenerationDelta(text="lo", logprobs=[logprob("lo")]))
        + stream.end(summary(generation_pb2.FINISH_REASON_LENGTH))
    )
    first, second, last, usage, done = found
    assert first["choices"] == [
        {"index": 0, "delta": {"role": "assistant", "content": "Hel"}, "finish_reason": None, "logprobs": None}
    ]
    assert second["choices"][0]["delta"] == {"content": "lo"}
    assert second["choices"][0]["logprobs"]["content"][0]["token"] == "lo"
    assert last["choices"] == [{"index": 0, "delta": {}, "finish_reason": "length", "logprobs": None}]
    assert usage["choices"] == [] and usage["usage"]["total_tokens"] == 10
    assert done == "[DONE]"
    assert {chunk["id"] for chunk in found[:-1]} == {"chatcmpl-r-1"}
    assert {chunk["object"] for chunk in found[:-1]} == {"chat.completion.chunk"}


def test_usage_is_streamed_only_if_asked_for() -> None:
    assert all("usage" not in chunk for chunk in events(opened(chat).end(summary()))[:-1])


def test_chunks_of_tool_calls() -> None:
    stream = opened(chat)
    found = [events(stream.piece(delta))[0]["choices"][0]["delta"] for delta in CALLS]
    assert found[0] == {
        "role": "assistant",
        "tool_calls": [{"index": 0, "id": "c0", "type": "function", "function": {"name": "weather", "arguments": ""}}],
    }
    assert found[1] == {"tool_calls": [{"index": 0, "function": {"arguments": '{"a"'}}]}
    assert found[3]["tool_calls"][0]["index"] == 1


def test_reasoning_is_streamed_apart() -> None:
    (chunk,) = events(opened(chat).piece(GenerationDelta(reasoning_text="hm")))
    assert chunk["choices"][0]["delta"] == {"role": "assistant", "reasoning_content": "hm"}


# -------------------------------------------------------------- completions ---


def test_a_whole_completion() -> None:
    found = whole(completions, GenerationDelta(text="ab", logprobs=[logprob("a"), logprob("b")]))
    (choice,) = found["choices"]
    assert (found["object"], choice["text"], choice["finish_reason"]) == ("text_completion", "ab", "stop")
    assert choice["logprobs"]["tokens"] == ["a", "b"]
    assert choice["logprobs"]["text_offset"] == [0, 1]
    assert choice["logprobs"]["top_logprobs"][0] == {"a": -0.5, "?": -2}


def test_chunks_of_a_completion() -> None:
    stream = opened(completions, stream_options={"include_usage": True})
    first, second, last, usage, done = events(
        stream.piece(GenerationDelta(text="ab", logprobs=[logprob("ab")]))
        + stream.piece(GenerationDelta(text="c", logprobs=[logprob("c")]))
        + stream.end(summary())
    )
    assert first["choices"][0]["text"] == "ab" and first["choices"][0]["finish_reason"] is None
    assert second["choices"][0]["logprobs"]["text_offset"] == [2]
    assert (last["choices"][0]["text"], last["choices"][0]["finish_reason"]) == ("", "stop")
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == 3
    assert done == "[DONE]"


# ---------------------------------------------------------------- responses ---


def test_a_whole_response() -> None:
    found = whole(responses, GenerationDelta(text="Hi", reasoning_text="hm"), *CALLS, metadata={"a": "b"})
    reasoning, message, *calls = found["output"]
    assert (found["object"], found["status"], found["error"], found["store"]) == ("response", "completed", None, False)
    assert found["metadata"] == {"a": "b"}
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "hm"}]
    assert message["content"][0] == {"type": "output_text", "text": "Hi", "logprobs": [], "annotations": []}
    assert [(item["type"], item["call_id"], item["arguments"]) for item in calls] == [
        ("function_call", "c0", '{"a": 1}'),
        ("function_call", "c1", "{}"),
    ]
    assert found["usage"] == {
        "input_tokens": 7,
        "input_tokens_details": {"cached_tokens": 4},
        "output_tokens": 3,
        "output_tokens_details": {"reasoning_tokens": 1},
        "total_tokens": 10,
    }


def test_a_response_cut_short_is_incomplete() -> None:
    found = whole(responses, GenerationDelta(text="Hi"), end=summary(generation_pb2.FINISH_REASON_LENGTH))
    assert (found["status"], found["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert found["output"][0]["status"] == "incomplete"


def test_events_of_a_response() -> None:
    stream = opened(responses)
    found = events(
        stream.piece(GenerationDelta(reasoning_text="hm"))
        + stream.piece(GenerationDelta(text="Hel"))
        + stream.piece(GenerationDelta(text="lo"))
        + b"".join(stream.piece(delta) for delta in CALLS)
        + stream.end(summary(generation_pb2.FINISH_REASON_TOOL_CALLS))
    )
    assert [event["type"].removeprefix("response.") for event in found] == [
        "created", "in_progress",
        "output_item.added", "content_part.added", "reasoning_text.delta",
        "reasoning_text.done", "content_part.done", "output_item.done",
        "output_item.added", "content_part.added", "output_text.delta", "output_text.delta",
        "output_text.done", "content_part.done", "output_item.done",
        "output_item.added", "function_call_arguments.delta", "function_call_arguments.delta",
        "function_call_arguments.done", "output_item.done",
        "output_item.added", "function_call_arguments.delta",
        "function_call_arguments.done", "output_item.done",
        "completed",
    ]  # fmt: skip
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    done = [event["item"] for event in found if event["type"] == "response.output_item.done"]
    assert found[-1]["response"]["output"] == done
    assert done[1]["content"][0]["text"] == "Hello"
    assert done[2]["arguments"] == '{"a": 1}'
    assert found[-1]["response"]["usage"]["total_tokens"] == 10


def test_an_empty_response_still_has_a_message() -> None:
    found = events(opened(responses).end(summary()))
    assert found[-1]["response"]["output"][0]["content"][0]["text"] == ""


# ------------------------------------------------------------------ failures ---


def test_what_breaks_off_ends_with_the_error() -> None:
    body = failure(Refusal(Reason.STREAM_BROKEN, "one broke off the answer")).body
    for module in (chat, completions):
        stream = opened(module)
        stream.piece(GenerationDelta(text="Hel"))
        (found,) = events(stream.failure(body))
        assert found["error"]["code"] == "stream_broken"
    stream = opened(responses)
    stream.piece(GenerationDelta(text="Hel"))
    (found,) = events(stream.failure(body))
    assert found["type"] == "response.failed"
    assert found["response"]["error"] == {"code": "stream_broken", "message": "one broke off the answer"}
    assert found["response"]["output"][0]["status"] == "incomplete"
    assert found["response"]["output"][0]["content"][0]["text"] == "Hel"


@pytest.mark.parametrize("reason", list(Reason))
def test_every_reason_has_a_status(reason: Reason) -> None:
    told = failure(Refusal(reason, "told", retry_after=2.0))
    assert told.status in (400, 404, 408, 429, 500, 503, 504)
    assert told.body.code and told.body.type and told.body.message == "told"
    assert told.retry_after == 2.0


# --------------------------------------------------------------- embeddings ---


def test_vectors() -> None:
    response = EmbedResponse(model="tiny", usage=Usage(prompt_tokens=4))
    response.embeddings.add(values=[0.5, -1])
    response.embeddings.add(values=[2, 3])
    plain = json.loads(embeddings.render(response, as_base64=False))
    assert [item["embedding"] for item in plain["data"]] == [[0.5, -1], [2, 3]]
    assert [item["index"] for item in plain["data"]] == [0, 1]
    assert plain["usage"] == {"prompt_tokens": 4, "total_tokens": 4}
    packed = json.loads(embeddings.render(response, as_base64=True))
    assert struct.unpack("<2f", base64.b64decode(packed["data"][1]["embedding"])) == (2, 3)
