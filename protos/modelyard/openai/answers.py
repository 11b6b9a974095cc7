"""Chat completions as a server sends them: what `wire` leaves out where it is None stands here as null.

Plain readers index into `choices[0]["message"]["content"]`, so the keys that OpenAI always sends are there.

Source: OpenAI API reference, "The chat completion object".
"""

from __future__ import annotations

from typing import Literal

from msgspec import UNSET, UnsetType, field

from modelyard.openai.wire import ChoiceLogprobs, ChunkChoice, ToolCall, Usage, Wire


class AnswerMessage(Wire, omit_defaults=False):
    """The assistant's message."""

    role: Literal["assistant"] = "assistant"
    content: str | None = None
    refusal: str | None = None
    tool_calls: list[ToolCall] | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET


class AnswerChoice(Wire, omit_defaults=False):
    message: AnswerMessage
    finish_reason: str
    index: int = 0
    logprobs: ChoiceLogprobs | None = None


class ChatAnswer(Wire, omit_defaults=False):
    """The answer to POST /v1/chat/completions."""

    id: str
    created: int
    model: str
    choices: list[AnswerChoice]
    usage: Usage
    object: Literal["chat.completion"] = "chat.completion"


class UsageChunk(Wire, omit_defaults=False):
    """The last chunk of a stream, of chats and of completions, if usage is asked for."""

    id: str
    created: int
    model: str
    usage: Usage
    object: str
    choices: list[ChunkChoice] = field(default_factory=list)
    """None, which is what marks this chunk."""
