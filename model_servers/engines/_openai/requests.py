"""From a request to OpenAI's wire types. Pure."""

from __future__ import annotations

import base64
import json
from typing import Any

from model_servers.engine import (
    GenerationRequest,
    Image,
    Message,
    Role,
    Sampling,
    Tool,
    ToolChoiceMode,
    Unsupported,
)
from model_servers.engines._openai.dialect import Dialect
from modelyard.openai import wire

_ROLES = {Role.SYSTEM: "system", Role.USER: "user", Role.ASSISTANT: "assistant", Role.TOOL: "tool"}
_LARGEST_SEED = 2**63 - 1
_NO_ARGUMENTS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False, "required": []}


def as_completion(request: GenerationRequest, dialect: Dialect) -> bool:
    """Whether the request goes to /completions."""
    return request.prompt is not None and dialect.completions


def chat(request: GenerationRequest, dialect: Dialect) -> wire.ChatRequest:
    """The body for /chat/completions. Raises Unsupported for schemas that are not JSON."""
    messages = (
        [wire.ChatMessage(role="user", content=request.prompt)]
        if request.prompt is not None
        else [_message(message) for message in request.messages]
    )
    if request.json_object and dialect.says_json and not _mentions_json(request):
        messages.insert(0, wire.ChatMessage(role="system", content="Answer with a JSON object."))
    sampling = request.sampling
    body = wire.ChatRequest(
        model=request.model,
        messages=messages,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        stop=_stop(sampling, dialect),
        seed=_seed(sampling),
        frequency_penalty=sampling.frequency_penalty,
        presence_penalty=sampling.presence_penalty,
        logprobs=True if sampling.logprobs else None,
        top_logprobs=sampling.top_logprobs if sampling.logprobs else None,
        response_format=_response_format(request, dialect),
        stream=True,
        stream_options=_stream_options(dialect),
    )
    setattr(body, dialect.max_tokens_field, sampling.max_tokens)
    _extras(body, sampling, dialect)
    if offers_tools(request):
        body.tools = tools(request, dialect)
        body.tool_choice = _tool_choice(request)
    return body


def completion(request: GenerationRequest, dialect: Dialect) -> wire.CompletionRequest:
    """The body for /completions. Raises Unsupported for what only conversations have."""
    if offers_tools(request):
        raise Unsupported("tools need messages: a raw prompt has no place for them")
    sampling = request.sampling
    body = wire.CompletionRequest(
        model=request.model,
        prompt=request.prompt or "",
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        stop=_stop(sampling, dialect),
        seed=_seed(sampling),
        frequency_penalty=sampling.frequency_penalty,
        presence_penalty=sampling.presence_penalty,
        logprobs=sampling.top_logprobs if sampling.logprobs else None,
        response_format=_response_format(request, dialect),
        stream=True,
        stream_options=_stream_options(dialect),
    )
    _extras(body, sampling, dialect)
    return body


def local_stops(sampling: Sampling, dialect: Dialect) -> tuple[str, ...]:
    """Stop strings that are not sent, so that the engine must look for them in the answer."""
    return sampling.stop if len(sampling.stop) > dialect.max_stops else ()


def offers_tools(request: GenerationRequest) -> bool:
    return bool(request.tools) and request.tool_choice is not ToolChoiceMode.NONE


def tools(request: GenerationRequest, dialect: Dialect) -> list[wire.Tool]:
    return [wire.Tool(type="function", function=_function(tool, dialect)) for tool in request.tools]


def messages(request: GenerationRequest) -> list[wire.ChatMessage]:
    return [_message(message) for message in request.messages]


def _message(message: Message) -> wire.ChatMessage:
    calls = [
        wire.ToolCall(
            id=call.id,
            type="function",
            function=wire.FunctionCall(name=call.name, arguments=call.arguments_json or "{}"),
        )
        for call in message.tool_calls
    ]
    return wire.ChatMessage(
        role=_ROLES[message.role],
        content=_content(message),
        name=message.name or None,
        tool_calls=calls or None,
        tool_call_id=message.tool_call_id or None,
    )


def _content(message: Message) -> str | list[wire.ContentPart] | None:
    if any(isinstance(part, Image) for part in message.content):
        return [_image(part) if isinstance(part, Image) else _text(part) for part in message.content]
    # One text: servers disagree on what stands between parts.
    return message.text or (None if message.tool_calls else "")


def _text(text: str) -> wire.ContentPart:
    return wire.ContentPart(type="text", text=text)


def _image(image: Image) -> wire.ContentPart:
    data = base64.b64encode(image.data).decode()
    return wire.ContentPart(type="image_url", image_url=wire.ImageUrl(url=f"data:{image.media_type};base64,{data}"))


def _mentions_json(request: GenerationRequest) -> bool:
    texts = [message.text for message in request.messages] if request.prompt is None else [request.prompt]
    return any("json" in text.lower() for text in texts)


def _stop(sampling: Sampling, dialect: Dialect) -> list[str] | None:
    return list(sampling.stop) if 0 < len(sampling.stop) <= dialect.max_stops else None


def _seed(sampling: Sampling) -> int | None:
    """The contract's seeds have 64 bits; OpenAI's and vLLM's have a sign."""
    return None if sampling.seed is None else sampling.seed & _LARGEST_SEED


def _extras(body: wire.ChatRequest | wire.CompletionRequest, sampling: Sampling, dialect: Dialect) -> None:
    if not dialect.extra_sampling:
        return
    # 0 means all tokens here; servers write -1 for it.
    body.top_k = -1 if sampling.top_k == 0 else sampling.top_k
    body.min_p = sampling.min_p
    body.repetition_penalty = sampling.repetition_penalty


def _stream_options(dialect: Dialect) -> wire.StreamOptions:
    return wire.StreamOptions(include_usage=True, continuous_usage_stats=True if dialect.continuous_usage else None)


def _response_format(request: GenerationRequest, dialect: Dialect) -> wire.ResponseFormat | None:
    if request.json_schema is not None:
        schema = _schema(request.json_schema, "the JSON schema of the answer")
        return wire.ResponseFormat(
            type="json_schema",
            json_schema=wire.JsonSchema(name="answer", schema=schema, strict=_strict(schema, dialect)),
        )
    return wire.ResponseFormat(type="json_object") if request.json_object else None


def _tool_choice(request: GenerationRequest) -> str | wire.NamedToolChoice:
    if request.tool_choice is not ToolChoiceMode.REQUIRED:
        return "auto"
    if not request.tool_name:
        return "required"
    return wire.NamedToolChoice(type="function", function=wire.NamedFunction(name=request.tool_name))


def _function(tool: Tool, dialect: Dialect) -> wire.Function:
    schema = _schema(tool.parameters_schema, f"parameters_schema of tool {tool.name!r}")
    return wire.Function(
        name=tool.name,
        description=tool.description or None,
        parameters=schema or _NO_ARGUMENTS,
        strict=_strict(schema or _NO_ARGUMENTS, dialect),
    )


def _schema(text: str, what: str) -> dict[str, Any]:
    if not text.strip():
        return {}
    try:
        schema = json.loads(text)
    except ValueError as error:
        raise Unsupported(f"{what} is not JSON: {type(error).__name__}") from None
    if not isinstance(schema, dict):
        raise Unsupported(f"{what} must be a JSON object: this engine sends no other schemas")
    return schema


def _strict(schema: dict[str, Any], dialect: Dialect) -> bool | None:
    if dialect.strict == "never":
        return None
    return True if dialect.strict == "always" else is_strict(schema)


def is_strict(schema: Any) -> bool:
    """Whether OpenAI takes the schema with strict: each object is closed, and needs all of its properties.

    Source: OpenAI, "Structured model outputs", supported schemas.
    """
    if isinstance(schema, list):
        return all(map(is_strict, schema))
    if not isinstance(schema, dict):
        return True
    if schema.get("type") == "object" or "properties" in schema:
        names = schema.get("properties") or {}
        if schema.get("additionalProperties") is not False or set(schema.get("required") or ()) != set(names):
            return False
        if not all(map(is_strict, names.values())):
            return False
    return all(
        is_strict(value) for key, value in schema.items() if key not in ("properties", "enum", "const", "default")
    )
