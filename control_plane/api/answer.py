"""Puts an answer together from its pieces, for whoever wants it whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from modelyard.v1 import generation_pb2
from modelyard.v1.generation_pb2 import GenerationDelta, GenerationResult


@dataclass(slots=True)
class Call:
    """A tool call, put together from its fragments."""

    id: str = ""
    name: str = ""
    arguments: str = ""

    def take(self, fragment: generation_pb2.ToolCallDelta) -> None:
        self.id = self.id or fragment.id
        self.name = self.name or fragment.name
        self.arguments += fragment.arguments_json


@dataclass(slots=True)
class Answer:
    """Everything that was generated so far."""

    logprobs: list[generation_pb2.TokenLogprob] = field(default_factory=list)
    calls: dict[int, Call] = field(default_factory=dict)
    """By their index."""
    _texts: list[str] = field(default_factory=list)
    _reasoning: list[str] = field(default_factory=list)

    def take(self, delta: GenerationDelta) -> None:
        if delta.text:
            self._texts.append(delta.text)
        if delta.reasoning_text:
            self._reasoning.append(delta.reasoning_text)
        if delta.logprobs:
            self.logprobs.extend(delta.logprobs)
        for fragment in delta.tool_calls:
            self.calls.setdefault(fragment.index, Call()).take(fragment)

    @property
    def text(self) -> str:
        return "".join(self._texts)

    @property
    def reasoning(self) -> str:
        return "".join(self._reasoning)


def in_one_piece(deltas: Sequence[GenerationDelta]) -> GenerationDelta | None:
    """The whole answer as one piece, each tool call as one fragment; None if it is empty."""
    if len(deltas) <= 1:
        return deltas[0] if deltas else None
    answer = Answer()
    for delta in deltas:
        answer.take(delta)
    return GenerationDelta(
        text=answer.text,
        tokens=sum(delta.tokens for delta in deltas),
        reasoning_text=answer.reasoning,
        tool_calls=[
            generation_pb2.ToolCallDelta(index=index, id=call.id, name=call.name, arguments_json=call.arguments)
            for index, call in sorted(answer.calls.items())
        ],
        logprobs=answer.logprobs,
    )


def mean_tpot(result: GenerationResult, first: float, last: float) -> float | None:
    """Mean seconds per token after the first. Not known of an answer that came in one piece."""
    tokens = result.usage.completion_tokens
    return (last - first) / (tokens - 1) if tokens > 1 and last > first else None
