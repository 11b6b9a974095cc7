"""Arguments of the client's methods -> requests of the contract."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from modelyard.client import _names as names
from modelyard.client._types import Image, Message, Tool, ToolCall
from modelyard.client._values import filled
from modelyard.v1 import generation_pb2, orchestrator_pb2, selection_pb2

Input = str | Sequence[Message | Mapping[str, Any]]
"""What a model is asked: a text, or a conversation of messages.

Messages may be mappings: {"role": "user", "content": "..."}, where content is a text or a list of
texts, `Image`s, {"type": "text", "text": ...} and {"type": "image", "data": bytes or base64,
"media_type": ...}; assistant messages may carry "tool_calls", tool messages "tool_call_id".
"""

# US dollars that the contract can say: whole nano-dollars above 0 (which means any price), in 63 bits.
_LEAST_COST, _MOST_COST = 1e-9, 9e9


class Requirements(TypedDict, total=False):
    """Hard conditions and urgency, common to generating and embedding."""

    model: str | None
    """Only this model: "name" or "provider/name"."""
    provider: str | None
    """Only models of this provider."""
    server_id: str | None
    """Only this server."""
    excluded_server_ids: Sequence[str]
    """Never these servers."""
    excluded_models: Sequence[str]
    """Never these models: names or "provider/name"."""
    max_cost: float | None
    """Most US dollars that prompt and answer may be expected to cost."""
    min_context_length: int
    """Least context length in tokens."""
    features: Sequence[str]
    """Features that the model must have: see `FEATURES`."""
    priority: str | None
    """See `PRIORITIES`; default "normal"."""
    request_id: str | None
    """To find the request in logs; made up by the control plane if not given."""


class GenerateOptions(Requirements, total=False):
    """Everything that may be said about one generation. None or left out: the model's default."""

    raw_prompt: bool
    """Continue the text as it stands, without a chat template."""
    system: str | None
    """Instructions, put before the messages."""
    preset: str | None
    """Fills what is left out here: see `Client.presets`."""
    task_type: str | None
    """The kind of work: see `TASK_TYPES`; default "chat"."""
    max_tokens: int | None
    temperature: float | None
    """0 (greedy) to 2."""
    top_p: float | None
    """(0, 1]"""
    top_k: int | None
    """0 means all."""
    min_p: float | None
    """[0, 1]"""
    stop: str | Sequence[str]
    """Generation ends before the first of these texts."""
    seed: int | None
    """Same seed, same input, same server: same output."""
    frequency_penalty: float | None
    """[-2, 2]"""
    presence_penalty: float | None
    """[-2, 2]"""
    repetition_penalty: float | None
    """(0, 10]; 1 means none."""
    logprobs: bool
    """Return the log-probability of each token."""
    top_logprobs: int
    """Also that many likeliest alternatives, up to 20; implies `logprobs`."""
    response_format: str | Mapping[str, Any] | None
    """"json" for any JSON object, or a JSON Schema that the answer must satisfy."""
    tools: Sequence[Tool | Mapping[str, Any]]
    """Tools that the model may call."""
    tool_choice: str | None
    """"auto", "none", "required", or the name of the one tool that must be called."""
    explain: bool
    """Return the record of each choice of a server."""


def generate_request(
    input: Input,
    *,
    raw_prompt: bool = False,
    system: str | None = None,
    task_type: str | None = None,
    priority: str | None = None,
    preset: str | None = None,
    request_id: str | None = None,
    explain: bool = False,
    model: str | None = None,
    provider: str | None = None,
    server_id: str | None = None,
    excluded_server_ids: Sequence[str] = (),
    excluded_models: Sequence[str] = (),
    max_cost: float | None = None,
    min_context_length: int = 0,
    features: Sequence[str] = (),
    stop: str | Sequence[str] = (),
    logprobs: bool = False,
    top_logprobs: int = 0,
    response_format: str | Mapping[str, Any] | None = None,
    tools: Sequence[Tool | Mapping[str, Any]] = (),
    tool_choice: str | None = None,
    max_tokens: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    min_p: float | None = None,
    seed: int | None = None,
    frequency_penalty: float | None = None,
    presence_penalty: float | None = None,
    repetition_penalty: float | None = None,
) -> orchestrator_pb2.GenerateRequest:
    """Build a request. Raises ValueError or TypeError for what cannot be said in one."""
    sampling = filled(
        generation_pb2.SamplingParams,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        stop=[stop] if isinstance(stop, str) else stop,
        seed=seed,
        frequency_penalty=frequency_penalty,
        presence_penalty=presence_penalty,
        repetition_penalty=repetition_penalty,
        logprobs=logprobs or top_logprobs > 0,
        top_logprobs=top_logprobs,
    )
    # What is given as a mapping is made in its place; a message would be copied to it.
    return orchestrator_pb2.GenerateRequest(
        input={
            **_conversation(input, system, raw_prompt),
            "sampling": sampling,
            "response_format": _response_format(response_format),
            "tools": [_tool(tool) for tool in tools] if tools else (),
            "tool_choice": _tool_choice(tool_choice),
        },
        task_type=names.TASK_TYPE.number(task_type) if task_type else 0,  # type: ignore[arg-type]
        priority=names.PRIORITY.number(priority) if priority else 0,  # type: ignore[arg-type]
        requirements=_requirements(
            model, provider, server_id, excluded_server_ids, excluded_models, max_cost, min_context_length, features
        ),
        explain=explain,
        request_id=request_id or "",
        preset=preset or "",
    )


def embed_request(
    inputs: str | Sequence[str],
    *,
    priority: str | None = None,
    request_id: str | None = None,
    model: str | None = None,
    provider: str | None = None,
    server_id: str | None = None,
    excluded_server_ids: Sequence[str] = (),
    excluded_models: Sequence[str] = (),
    max_cost: float | None = None,
    min_context_length: int = 0,
    features: Sequence[str] = (),
) -> orchestrator_pb2.EmbedRequest:
    """Build a request. Raises ValueError or TypeError for what cannot be said in one."""
    return orchestrator_pb2.EmbedRequest(
        inputs=[inputs] if isinstance(inputs, str) else inputs,
        requirements=_requirements(
            model, provider, server_id, excluded_server_ids, excluded_models, max_cost, min_context_length, features
        ),
        priority=names.PRIORITY.number(priority) if priority else 0,  # type: ignore[arg-type]
        request_id=request_id or "",
    )


def _requirements(
    model: str | None,
    provider: str | None,
    server_id: str | None,
    excluded_server_ids: Sequence[str],
    excluded_models: Sequence[str],
    max_cost: float | None,
    min_context_length: int,
    features: Sequence[str],
) -> selection_pb2.Requirements:
    if any(isinstance(texts, str) for texts in (excluded_server_ids, excluded_models, features)):
        raise TypeError("excluded_server_ids, excluded_models and features are lists of texts, not one text")
    if max_cost is not None and not _LEAST_COST <= max_cost <= _MOST_COST:
        raise ValueError(f"max_cost must be {_LEAST_COST:g} to {_MOST_COST:g} US dollars")
    return filled(
        selection_pb2.Requirements,
        model=model or "",
        provider=provider or "",
        server_id=server_id or "",
        excluded_server_ids=excluded_server_ids,
        excluded_models=excluded_models,
        max_cost_nano_usd=0 if max_cost is None else round(max_cost * 1e9),
        min_context_length=min_context_length,
        features=[names.FEATURE.number(feature) for feature in features],
    )


# ------------------------------------------------------------- conversation ---


def _conversation(input: Input, system: str | None, raw_prompt: bool) -> dict[str, Any]:
    if raw_prompt:
        if not isinstance(input, str):
            raise TypeError("raw_prompt needs a text, not messages")
        if system is not None:
            raise ValueError("a raw prompt has no system message: put the instructions into the prompt")
        return {"prompt": input}
    messages = [Message("user", input)] if isinstance(input, str) else [_as_message(message) for message in input]
    if system is not None:
        messages.insert(0, Message("system", system))
    return {"messages": [_message(message) for message in messages]}


def _as_message(given: Message | Mapping[str, Any]) -> Message:
    if isinstance(given, Message):
        return given
    if not isinstance(given, Mapping):
        raise TypeError(f"a message is a Message or a mapping, not {type(given).__name__}")
    if unknown := given.keys() - {"role", "content", "tool_calls", "tool_call_id", "name"}:
        raise ValueError(f"unknown keys in a message: {', '.join(sorted(map(str, unknown)))}")
    if "role" not in given:
        raise ValueError('a message needs a "role"')
    content = given.get("content") or ""
    return Message(
        role=given["role"],
        content=content if isinstance(content, str) else tuple(_as_part(part) for part in content),
        tool_calls=tuple(_as_tool_call(call) for call in given.get("tool_calls") or ()),
        tool_call_id=given.get("tool_call_id") or "",
        name=given.get("name") or "",
    )


def _as_part(part: Any) -> str | Image:
    if isinstance(part, (str, Image)):
        return part
    if isinstance(part, Mapping):
        if part.get("type") == "text":
            return str(part["text"])
        if part.get("type") == "image":
            data = part["data"]
            return Image(base64.b64decode(data, validate=True) if isinstance(data, str) else data, part["media_type"])
    raise ValueError('a part of a message is a text, an Image or a mapping of "type" "text" or "image"')


def _as_tool_call(call: Any) -> ToolCall:
    if isinstance(call, ToolCall):
        return call
    function = call.get("function", call)  # {"id", "function": {"name", "arguments"}} is common
    arguments = function.get("arguments", function.get("arguments_json", "{}"))
    return ToolCall(
        id=call["id"],
        name=function["name"],
        arguments_json=arguments if isinstance(arguments, str) else json.dumps(arguments),
    )


def _message(message: Message) -> dict[str, Any]:
    content = message.content
    parts: tuple[str | Image, ...] = content if isinstance(content, tuple) else (content,)
    if parts == ("",) and message.tool_calls:
        parts = ()
    return {
        "role": names.ROLE.number(message.role),
        "content": [_part(part) for part in parts],
        "tool_calls": [
            {"id": call.id, "name": call.name, "arguments_json": call.arguments_json} for call in message.tool_calls
        ],
        "tool_call_id": message.tool_call_id,
        "name": message.name,
    }


def _part(part: str | Image) -> dict[str, Any]:
    if isinstance(part, str):
        return {"text": part}
    return {"image": {"data": part.data, "media_type": part.media_type}}


# ----------------------------------------------------------- format and tools ---


def _response_format(given: str | Mapping[str, Any] | None) -> generation_pb2.ResponseFormat | None:
    if given is None or given == "text":
        return None
    if given == "json":
        return generation_pb2.ResponseFormat(json=generation_pb2.JsonFormat())
    if isinstance(given, Mapping):
        schema = generation_pb2.JsonSchemaFormat(schema=json.dumps(given), name=str(given.get("title", "")))
        return generation_pb2.ResponseFormat(json_schema=schema)
    raise ValueError(f'unknown response format {given!r}; allowed: "text", "json" or a JSON Schema as a mapping')


def _tool(given: Tool | Mapping[str, Any]) -> generation_pb2.Tool:
    if not isinstance(given, Tool):
        function = given.get("function", given)  # {"type": "function", "function": {...}} is common
        given = Tool(function["name"], function.get("description") or "", function.get("parameters"))
    return generation_pb2.Tool(
        name=given.name,
        description=given.description,
        parameters_schema="" if given.parameters is None else json.dumps(given.parameters),
    )


def _tool_choice(given: str | None) -> generation_pb2.ToolChoice | None:
    if given is None:
        return None
    if mode := names.TOOL_CHOICE_MODE.numbers.get(given):
        return generation_pb2.ToolChoice(mode=mode)  # type: ignore[arg-type]
    return generation_pb2.ToolChoice(mode=generation_pb2.TOOL_CHOICE_MODE_REQUIRED, name=given)
