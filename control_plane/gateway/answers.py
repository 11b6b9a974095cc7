"""What the answer formats share: an answer as it grows, and the parts that all of them render."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import msgspec

from control_plane.api import answer as api
from modelyard.openai import wire
from modelyard.openai.answers import UsageChunk
from modelyard.v1 import generation_pb2
from modelyard.v1.generation_pb2 import GenerationDelta
from modelyard.v1.orchestrator_pb2 import GenerateRequest, GenerationSummary

encode = msgspec.json.Encoder().encode

FINISH_REASONS = {
    generation_pb2.FINISH_REASON_STOP: "stop",
    generation_pb2.FINISH_REASON_LENGTH: "length",
    generation_pb2.FINISH_REASON_TOOL_CALLS: "tool_calls",
    generation_pb2.FINISH_REASON_CONTENT_FILTER: "content_filter",
}
DONE = b"data: [DONE]\n\n"


class Head(NamedTuple):
    """What every answer says of itself."""

    request_id: str
    created: int
    """Seconds since 1970."""
    model: str


@dataclass(slots=True)
class Answer(api.Answer):
    """A whole answer and its summary."""

    summary: GenerationSummary | None = None

    @property
    def end(self) -> GenerationSummary:
        """The summary of an answer that is complete."""
        if self.summary is None:
            raise RuntimeError("an answer ended without a summary")
        return self.summary


class Stream(Protocol):
    """One answer as server-sent events."""

    def piece(self, delta: GenerationDelta) -> bytes:
        """The events of the next piece; may be empty."""
        ...

    def end(self, summary: GenerationSummary) -> bytes:
        """The last events."""
        ...

    def failure(self, error: wire.ErrorBody) -> bytes:
        """The last events of an answer that broke off."""
        ...


@dataclass(frozen=True, slots=True)
class Asked:
    """A request of one of the formats, and how its answer is to look."""

    request: GenerateRequest
    metadata: Mapping[str, str] | None
    stream: bool
    rename: Callable[[str], str]
    """From a path of the contract to one of the request as it was sent."""
    open: Callable[[Head], Stream]
    render: Callable[[Head, Answer], bytes]
    """The body of a whole answer."""


class Dialect(NamedTuple):
    """One of OpenAI's ways to ask for text."""

    label: str
    """Of the metrics."""
    parse: Callable[[bytes], Asked]


def event(data: object) -> bytes:
    """A server-sent event without a name."""
    return b"data: " + encode(data) + b"\n\n"


def usage(counted: generation_pb2.Usage) -> wire.Usage:
    return wire.Usage(
        prompt_tokens=counted.prompt_tokens,
        completion_tokens=counted.completion_tokens,
        total_tokens=counted.prompt_tokens + counted.completion_tokens,
        prompt_tokens_details=wire.PromptTokensDetails(cached_tokens=counted.cached_prompt_tokens),
        completion_tokens_details=wire.CompletionTokensDetails(reasoning_tokens=counted.reasoning_tokens),
    )


def usage_event(chunk: wire.ChatChunk | wire.CompletionResponse, summary: GenerationSummary) -> bytes:
    """The event that follows the last chunk if usage is asked for."""
    return event(
        UsageChunk(
            id=chunk.id, created=chunk.created, model=chunk.model, object=chunk.object, usage=usage(summary.usage)
        )
    )


def token_logprobs(entries: Iterable[generation_pb2.TokenLogprob]) -> list[wire.TokenLogprob]:
    return [
        wire.TokenLogprob(
            token=entry.token,
            logprob=entry.logprob,
            bytes=list(entry.token.encode()),
            top_logprobs=[
                wire.TopLogprob(token=top.token, logprob=top.logprob, bytes=list(top.token.encode()))
                for top in entry.top
            ],
        )
        for entry in entries
    ]


def choice_logprobs(entries: Iterable[generation_pb2.TokenLogprob]) -> wire.ChoiceLogprobs | None:
    found = token_logprobs(entries)
    return wire.ChoiceLogprobs(content=found) if found else None
