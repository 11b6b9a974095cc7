"""What to ask of the provider, in a form that the vendors' formats are made from. No I/O."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from model_servers.engine import GenerationRequest, Image, Role, Tool, ToolCall, ToolChoiceMode, Unsupported

_BYTES_PER_TOKEN = 4
_IMAGE_TOKENS = 1_500
_MOST_IMAGE_TOKENS = 6_000
_FRAMING_TOKENS = 4
_MOST_FRAMING_TOKENS = 50


@dataclass(frozen=True, slots=True)
class ToolResult:
    call_id: str
    content: tuple[str | Image, ...]


@dataclass(frozen=True, slots=True)
class Turn:
    """Everything that one side says before the other one does: both vendors want the sides to alternate."""

    role: Literal["user", "assistant"]
    parts: tuple[str | Image | ToolCall | ToolResult, ...]


def system_text(request: GenerationRequest) -> str:
    """System messages, wherever they stand: there is one place for them, at the beginning."""
    texts = (message.text for message in request.messages if message.role is Role.SYSTEM)
    return "\n\n".join(text for text in texts if text.strip())


def turns(request: GenerationRequest) -> tuple[Turn, ...]:
    """Raises Unsupported for what a chat model of these APIs cannot be asked."""
    if request.prompt is not None:
        raise Unsupported("hosted chat models do not continue a raw prompt; send messages instead")
    found: list[tuple[Literal["user", "assistant"], list[str | Image | ToolCall | ToolResult]]] = []
    for message in request.messages:
        if message.role is Role.SYSTEM:
            continue
        parts: list[str | Image | ToolCall | ToolResult] = []
        if message.role is Role.TOOL:
            parts.append(ToolResult(message.tool_call_id, _content(message.content)))
        else:
            parts.extend(_content(message.content))
            parts.extend(message.tool_calls)
        role: Literal["user", "assistant"] = "assistant" if message.role is Role.ASSISTANT else "user"
        if found and found[-1][0] == role:
            found[-1][1].extend(parts)
        elif parts:
            found.append((role, parts))
    if not found:
        raise Unsupported("there is nothing to answer: no message but system messages has content")
    return tuple(Turn(role, tuple(parts)) for role, parts in found)


def _content(content: Sequence[str | Image]) -> tuple[str | Image, ...]:
    """Neighbouring texts joined; blank ones left out, which both vendors refuse."""
    joined: list[str | Image] = []
    for part in content:
        if isinstance(part, str) and joined and isinstance(joined[-1], str):
            joined[-1] += part
        else:
            joined.append(part)
    return tuple(part for part in joined if isinstance(part, Image) or part.strip())


def arguments(call: ToolCall) -> dict[str, Any]:
    """The arguments of a call in the history. Raises Unsupported."""
    try:
        value = json.loads(call.arguments_json or "{}")
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise Unsupported("arguments_json of a tool call in the conversation is not a JSON object")
    return value


def parameters(tool: Tool) -> dict[str, Any]:
    """The JSON Schema of a tool's arguments."""
    schema = json.loads(tool.parameters_schema) if tool.parameters_schema else {}
    return schema if isinstance(schema, dict) and schema else {"type": "object", "properties": {}}


def most_prompt_tokens(request: GenerationRequest) -> int:
    """More than the prompt can have: a token is at least one byte. Images and framing are generous guesses."""
    text, images = _size(request)
    return text + _MOST_FRAMING_TOKENS * (len(request.messages) + 20) + _MOST_IMAGE_TOKENS * images


def estimated_prompt_tokens(request: GenerationRequest) -> int:
    """About what the prompt has, at the usual four bytes a token."""
    text, images = _size(request)
    return -(-text // _BYTES_PER_TOKEN) + _FRAMING_TOKENS * len(request.messages) + _IMAGE_TOKENS * images


def _size(request: GenerationRequest) -> tuple[int, int]:
    """Bytes of text, and images."""
    text = len((request.json_schema or "").encode())
    images = 0
    for message in request.messages:
        text += len(message.text.encode())
        images += sum(isinstance(part, Image) for part in message.content)
        text += sum(len(call.name) + len(call.arguments_json.encode()) for call in message.tool_calls)
    for tool in request.tools:
        text += len(f"{tool.name}{tool.description}{tool.parameters_schema}".encode())
    return text, images


# ------------------------------------------------------- tools and JSON ---


@dataclass(frozen=True, slots=True)
class Plan:
    """How tools and a wanted answer format are put to the provider."""

    tools: tuple[Tool, ...] = ()
    choice: Literal["auto", "none", "any", "tool"] = "auto"
    tool_name: str = ""
    """With choice "tool"."""
    answer_tool: str = ""
    """The tool whose arguments are the JSON that was asked for; empty: no such tool."""
    wrapped: bool = False
    """The JSON is not an object and stands under the key "answer" of the arguments."""
    schema: dict[str, Any] | None = None
    """To be enforced by the provider itself."""

    @property
    def forced(self) -> bool:
        return self.choice in ("any", "tool")


def make_plan(request: GenerationRequest, *, structured: bool, forced: bool) -> Plan:
    """What the model can do decides: `structured`, the provider enforces JSON schemas for it; `forced`, a
    tool call can be required of it. Raises Unsupported."""
    offered = request.tools if request.tool_choice is not ToolChoiceMode.NONE else ()
    tools = request.tools or _tools_of_history(request)
    if offered and request.tool_choice is ToolChoiceMode.REQUIRED:
        if not forced:
            raise Unsupported(f"a tool call cannot be required of {request.model}; use the tool choice AUTO")
        return Plan(tools, "tool" if request.tool_name else "any", request.tool_name)
    choice: Literal["auto", "none"] = "auto" if offered else "none"
    if request.json_schema is None and not request.json_object:
        return Plan(tools, choice)
    schema = json.loads(request.json_schema) if request.json_schema is not None else {"type": "object"}
    if not isinstance(schema, dict):
        schema = {}  # `true`: anything
    is_object = schema.get("type") == "object"
    if structured and ((is_object and _closed(schema)) or (not forced and request.json_schema is not None)):
        return Plan(tools, choice, schema=schema)
    if not forced:
        raise Unsupported(f"{request.model} takes a JSON schema, but cannot be held to any JSON object")
    name = "json_answer"
    while any(tool.name == name for tool in tools):
        name += "_"
    if not is_object:
        schema = _wrap(schema)
    answer = Tool(name, "Gives the answer to the user, as JSON. Call it exactly once.", json.dumps(schema))
    if offered:
        return Plan((*tools, answer), "any", answer_tool=name, wrapped=not is_object)
    return Plan((*tools, answer), "tool", name, answer_tool=name, wrapped=not is_object)


def _wrap(schema: dict[str, Any]) -> dict[str, Any]:
    inner = dict(schema)
    # References start at the root of the document.
    definitions: dict[str, Any] = {key: inner.pop(key) for key in ("$defs", "definitions") if key in inner}
    return {"type": "object", "properties": {"answer": inner}, "required": ["answer"], **definitions}


def _tools_of_history(request: GenerationRequest) -> tuple[Tool, ...]:
    """Both vendors refuse tool calls in a conversation without tools: those that were called, as far as known."""
    names = dict.fromkeys(call.name for message in request.messages for call in message.tool_calls)
    return tuple(Tool(name, "No longer available.", '{"type": "object"}') for name in names)


def close_objects(schema: Any) -> Any:
    """The schema with every object closed, as enforced schemas must be."""
    if isinstance(schema, list):
        return [close_objects(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: value if key in ("enum", "const") else close_objects(value) for key, value in schema.items()}
    if schema.get("type") == "object":
        closed["additionalProperties"] = False
    return closed


def _closed(schema: Any) -> bool:
    """Whether a schema still says the same once all objects are closed, which enforced schemas must be."""
    if isinstance(schema, list):
        return all(_closed(one) for one in schema)
    if not isinstance(schema, dict):
        return True
    if not schema.keys() & {"type", "anyOf", "oneOf", "allOf", "enum", "const", "$ref"}:
        return False
    is_object = schema.get("type") == "object"
    if is_object and (not schema.get("properties") or schema.get("additionalProperties")):
        return False
    children = [schema[key] for key in ("anyOf", "oneOf", "allOf", "items") if key in schema]
    for key in ("properties", "$defs", "definitions"):
        children.extend(schema.get(key, {}).values())
    return all(_closed(child) for child in children)
