"""OpenAI's Responses API as types: requests with text, images and functions, and their answers.

As in `wire`, decoding ignores fields that are not named here. Answers carry every key that the
reference calls required, null where there is nothing to say.

Source: OpenAI API reference, "Responses", "Streaming events".
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from modelyard.openai.wire import TokenLogprob, Wire

# ----------------------------------------------------------------- requests ---


class InputPart(Wire):
    """A piece of a message or of a function's output."""

    type: str
    """input_text, input_image, output_text, refusal, reasoning_text; others exist."""
    text: str | None = None
    image_url: str | None = None
    file_id: str | None = None
    refusal: str | None = None


class InputItem(Wire):
    """A step of the conversation; which fields hold depends on `type`."""

    type: str | None = None
    """message (also if absent), function_call, function_call_output, reasoning; others exist."""
    role: str | None = None
    content: str | list[InputPart] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[InputPart] | None = None


class FunctionTool(Wire):
    type: str
    name: str | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedTool(Wire):
    type: str
    name: str | None = None


class TextFormat(Wire):
    type: str
    """text, json_object, json_schema."""
    name: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None
    description: str | None = None


class TextOptions(Wire):
    format: TextFormat | None = None


class ResponsesRequest(Wire):
    """POST /v1/responses."""

    model: str
    input: str | list[InputItem]
    instructions: str | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: int | None = None
    include: list[str] | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: str | NamedTool | None = None
    """none, auto, required, or a function by name."""
    text: TextOptions | None = None
    stream: bool | None = None
    metadata: dict[str, str] | None = None
    background: bool | None = None
    previous_response_id: str | None = None
    conversation: Any = None
    prompt: Any = None
    parallel_tool_calls: bool | None = None


# ------------------------------------------------------------------ answers ---


class Answer(Wire, omit_defaults=False):
    """Base of what is sent: nothing is left out."""


class OutputText(Answer, tag_field="type", tag="output_text"):
    text: str
    logprobs: list[TokenLogprob] = msgspec.field(default_factory=list)
    annotations: list[Any] = msgspec.field(default_factory=list)


class OutputMessage(Answer, tag_field="type", tag="message"):
    id: str
    status: str
    content: list[OutputText]
    role: Literal["assistant"] = "assistant"


class OutputFunctionCall(Answer, tag_field="type", tag="function_call"):
    id: str
    call_id: str
    name: str
    arguments: str
    status: str


class ReasoningText(Answer, tag_field="type", tag="reasoning_text"):
    text: str


class OutputReasoning(Answer, tag_field="type", tag="reasoning"):
    id: str
    status: str
    content: list[ReasoningText]
    summary: list[Any] = msgspec.field(default_factory=list)


OutputItem = OutputMessage | OutputFunctionCall | OutputReasoning


class InputTokensDetails(Answer):
    cached_tokens: int


class OutputTokensDetails(Answer):
    reasoning_tokens: int


class ResponseUsage(Answer):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponseError(Answer):
    code: str
    message: str


class IncompleteDetails(Answer):
    reason: str
    """max_output_tokens or content_filter."""


class Response(Answer):
    """The answer to POST /v1/responses, and the state of it that events of a stream carry."""

    id: str
    created_at: int
    model: str
    status: str
    """in_progress, completed, incomplete, failed."""
    output: list[OutputItem]
    instructions: str | None
    max_output_tokens: int | None
    temperature: float | None
    top_p: float | None
    tools: list[FunctionTool]
    tool_choice: str | NamedTool
    text: TextOptions
    metadata: dict[str, str]
    usage: ResponseUsage | None = None
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    parallel_tool_calls: bool = True
    previous_response_id: str | None = None
    background: bool = False
    store: bool = False
    """Nothing is kept here."""
    truncation: Literal["disabled"] = "disabled"
    object: Literal["response"] = "response"
