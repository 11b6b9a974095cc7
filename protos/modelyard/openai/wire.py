"""OpenAI's HTTP API as types: chat completions, completions, embeddings, models, errors.

One set for both directions: the gateway decodes requests and encodes answers, the engines do the
reverse. Field names are OpenAI's. Decoding checks types and ignores fields that are not named
here, as clients and servers send ever new ones; encoding omits what is None, which is why nothing
that must be sent has a default (except where omit_defaults is False).

Source: OpenAI API reference, "Chat", "Completions", "Embeddings", "Models".
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec


class Wire(msgspec.Struct, omit_defaults=True, kw_only=True):
    """Base of all types: fields by keyword, defaults omitted."""


# ------------------------------------------------------------------- parts ---


class ImageUrl(Wire):
    url: str
    """An address, or data:<media type>;base64,<data>."""
    detail: str | None = None


class ContentPart(Wire):
    type: str
    """text, image_url, refusal; others exist."""
    text: str | None = None
    image_url: ImageUrl | None = None
    refusal: str | None = None


class FunctionCall(Wire):
    name: str | None = None
    arguments: str | None = None
    """JSON as a string; in a stream the next piece of it."""


class ToolCall(Wire):
    index: int | None = None
    """Only in streams."""
    id: str | None = None
    type: str | None = None
    function: FunctionCall | None = None


class ChatMessage(Wire):
    """A message of a request or an answer, or its next piece in a stream."""

    role: str | None = None
    content: str | list[ContentPart] | None = None
    name: str | None = None
    refusal: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    """vLLM (until 0.11), DeepSeek and others."""
    reasoning: str | None = None
    """vLLM (since 0.12), OpenRouter, Ollama."""


class Function(Wire):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Wire):
    type: str
    function: Function | None = None


class JsonSchema(Wire):
    name: str
    description: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None


class ResponseFormat(Wire):
    type: str
    """text, json_object, json_schema."""
    json_schema: JsonSchema | None = None


class NamedFunction(Wire):
    name: str


class NamedToolChoice(Wire):
    type: str
    function: NamedFunction


class StreamOptions(Wire):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    """Not OpenAI's: vLLM, the usage so far with every piece."""


class PromptTokensDetails(Wire):
    cached_tokens: int | None = None


class CompletionTokensDetails(Wire):
    reasoning_tokens: int | None = None


class Usage(Wire):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    total_tokens: int | None = None
    prompt_tokens_details: PromptTokensDetails | None = None
    completion_tokens_details: CompletionTokensDetails | None = None


class TopLogprob(Wire):
    token: str
    logprob: float
    bytes: list[int] | None = None


class TokenLogprob(Wire):
    token: str
    logprob: float
    bytes: list[int] | None = None
    top_logprobs: list[TopLogprob] | None = None


class ChoiceLogprobs(Wire):
    content: list[TokenLogprob] | None = None


# -------------------------------------------------------- chat completions ---


class ChatRequest(Wire):
    """POST /v1/chat/completions."""

    model: str
    messages: list[ChatMessage]
    max_tokens: int | None = None
    """Deprecated by OpenAI in favour of max_completion_tokens, and what most others know."""
    max_completion_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    """Not OpenAI's: vLLM and others."""
    min_p: float | None = None
    """Not OpenAI's: vLLM and others."""
    repetition_penalty: float | None = None
    """Not OpenAI's: vLLM and others."""
    n: int | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = None
    tool_choice: str | NamedToolChoice | None = None
    """none, auto, required, or a function by name."""
    parallel_tool_calls: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    reasoning_effort: str | None = None


class ChatChoice(Wire):
    index: int
    message: ChatMessage
    finish_reason: str | None = None
    """stop, length, tool_calls, content_filter."""
    logprobs: ChoiceLogprobs | None = None


class ChatResponse(Wire, omit_defaults=False):
    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    object: Literal["chat.completion"] = "chat.completion"
    usage: Usage | None = None


class ChunkChoice(Wire, omit_defaults=False):
    index: int = 0
    delta: ChatMessage = msgspec.field(default_factory=ChatMessage)
    finish_reason: str | None = None
    logprobs: ChoiceLogprobs | None = None


class ChatChunk(Wire):
    """One `data:` line of a stream; the last one with usage has no choices."""

    id: str = ""
    object: str = ""
    created: int = 0
    model: str = ""
    choices: list[ChunkChoice] = msgspec.field(default_factory=list)
    usage: Usage | None = None
    error: ErrorBody | None = None
    """Some servers report failures in mid-stream this way."""


# ------------------------------------------------------------- completions ---


class CompletionRequest(Wire):
    """POST /v1/completions."""

    model: str
    prompt: str | list[Any]
    """Text or texts; others take token numbers too."""
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    n: int | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logprobs: int | None = None
    echo: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    response_format: ResponseFormat | None = None
    """Not OpenAI's: vLLM."""
    metadata: dict[str, str] | None = None
    """Not OpenAI's: modelyard's own hints."""


class CompletionLogprobs(Wire):
    tokens: list[str] | None = None
    token_logprobs: list[float | None] | None = None
    top_logprobs: list[dict[str, float] | None] | None = None
    text_offset: list[int] | None = None


class CompletionChoice(Wire, omit_defaults=False):
    index: int = 0
    text: str = ""
    finish_reason: str | None = None
    logprobs: CompletionLogprobs | None = None


class CompletionResponse(Wire):
    """The whole answer, or one `data:` line of a stream."""

    id: str = ""
    object: str = ""
    created: int = 0
    model: str = ""
    choices: list[CompletionChoice] = msgspec.field(default_factory=list)
    usage: Usage | None = None
    error: ErrorBody | None = None


# -------------------------------------------------------------- embeddings ---


class EmbeddingRequest(Wire):
    """POST /v1/embeddings."""

    model: str
    input: str | list[Any]
    """Text or texts; others take token numbers too."""
    encoding_format: str | None = None
    """float or base64 (little-endian float32)."""
    dimensions: int | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    """Not OpenAI's: modelyard's own hints."""


class Embedding(Wire, omit_defaults=False):
    index: int
    embedding: list[float] | str
    object: Literal["embedding"] = "embedding"


class EmbeddingResponse(Wire, omit_defaults=False):
    data: list[Embedding]
    model: str
    usage: Usage
    object: Literal["list"] = "list"


# ------------------------------------------------------------------ models ---


class Model(Wire, omit_defaults=False):
    id: str
    created: int = 0
    owned_by: str = ""
    object: str = "model"
    max_model_len: int | None = None
    """vLLM's: the context length."""


class ModelList(Wire, omit_defaults=False):
    data: list[Model]
    object: Literal["list"] = "list"


# ------------------------------------------------------------------ errors ---


class ErrorBody(Wire, omit_defaults=False):
    message: str = ""
    type: str | None = None
    param: str | None = None
    code: str | int | None = None


class ErrorResponse(Wire):
    error: ErrorBody
