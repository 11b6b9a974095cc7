"""From the provider's events to deltas. No I/O."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from model_servers.engine import (
    ContentRefused,
    Delta,
    EngineFailed,
    Finished,
    FinishReason,
    ToolCallDelta,
    Usage,
)
from model_servers.engines._hosted.conversation import Plan

_BYTES_PER_TOKEN = 4
_REASONS = {
    "end_turn": FinishReason.STOP,
    "stop_sequence": FinishReason.STOP,
    "max_tokens": FinishReason.LENGTH,
    "model_context_window_exceeded": FinishReason.LENGTH,
    "tool_use": FinishReason.TOOL_CALLS,
    "refusal": FinishReason.CONTENT_FILTER,
    "guardrail_intervened": FinishReason.CONTENT_FILTER,
    "content_filtered": FinishReason.CONTENT_FILTER,
}
_BROKEN = ("malformed_model_output", "malformed_tool_use")

# ----------------------------------------------------------------- events ---


@dataclass(frozen=True, slots=True)
class Text:
    text: str


@dataclass(frozen=True, slots=True)
class Thinking:
    """Empty: the model thinks and does not show it."""

    text: str = ""


@dataclass(frozen=True, slots=True)
class CallBegins:
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    json_text: str


@dataclass(frozen=True, slots=True)
class CallEnds:
    pass


@dataclass(frozen=True, slots=True)
class Counted:
    """Tokens so far, as the provider counts them; None: not said now. `prompt` includes cached ones."""

    prompt: int | None = None
    cached: int | None = None
    completion: int | None = None
    reasoning: int | None = None


@dataclass(frozen=True, slots=True)
class Stopped:
    reason: str


Event = Text | Thinking | CallBegins | CallArguments | CallEnds | Counted | Stopped

# ----------------------------------------------------------------- answer ---


class StopMatcher:
    """Finds the first stop string in text that arrives in pieces."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Returns (what can be passed on, whether a stop string was met)."""
        text = self._held + text
        self._held = ""
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            return text[: min(places)], True
        held = max((n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        if held:
            text, self._held = text[:-held], text[-held:]
        return text, False

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held


class Unwrapper:
    """Takes the value out of `{"answer": value}`, as it arrives."""

    _BEGINNING = re.compile(r'\s*\{\s*"answer"\s*:\s*')
    _END = re.compile(r"\s*\}?\s*$")

    def __init__(self) -> None:
        self._held = ""
        self._inside = False

    def push(self, text: str) -> str:
        """What of the value is sure by now; what is held at the very end is the closing brace."""
        text = self._held + text
        if not self._inside:
            beginning = self._BEGINNING.match(text)
            if beginning is None:
                self._held = text
                return ""
            self._inside = True
            text = text[beginning.end() :]
        end = self._END.search(text)
        cut = end.start() if end else len(text)
        self._held = text[cut:]
        return text[:cut]


class Answer:
    """The state of one answer.

    Vendors count tokens at the end and send several at a time: each delta counts as one, and the rest
    travels with the end.
    """

    def __init__(self, plan: Plan, stops: Sequence[str] = (), estimated_prompt: int = 0) -> None:
        """`estimated_prompt`: tokens of the prompt, for the case that the provider has no time to say."""
        self._estimated_prompt = estimated_prompt
        self._plan = plan
        self._stops = StopMatcher(stops)
        self._counted = Counted()
        self._reason = ""
        self._calls = 0
        self._in_answer = False
        self._arguments = False
        self._unwrapper = Unwrapper() if plan.wrapped else None
        self._deltas = 0
        self._bytes = 0
        self._reasoned = 0
        self.stopped = False
        """A stop string was met: whatever else comes was never said."""

    @property
    def begun(self) -> bool:
        return self._deltas > 0

    def push(self, event: Event) -> Delta | None:
        """What can be passed on, if anything."""
        if isinstance(event, Text):
            if self._plan.answer_tool:
                return None  # only what the answer tool gets is JSON
            text, self.stopped = self._stops.push(event.text)
            return self._delta(text=text)
        if isinstance(event, Thinking):
            self._reasoned += len(event.text.encode())
            return self._delta(reasoning_text=event.text)
        if isinstance(event, CallBegins):
            self._arguments = False
            self._in_answer = event.name == self._plan.answer_tool
            if self._in_answer:
                return None
            text = self._stops.flush()
            self._calls += 1
            return self._delta(text=text, call=ToolCallDelta(self._calls - 1, event.id, event.name))
        if isinstance(event, CallArguments):
            return self._argument(event.json_text)
        if isinstance(event, CallEnds):
            return None if self._arguments else self._argument("{}")
        if isinstance(event, Counted):
            self._count(event)
        else:
            self._reason = event.reason
        return None

    def finish(self) -> Finished:
        """Raises ContentRefused when the provider gave nothing, EngineFailed for what is no answer."""
        last = None if self.stopped else self._delta(text=self._stops.flush())
        reason = FinishReason.STOP if self.stopped else self._finish_reason()
        if reason is FinishReason.CONTENT_FILTER and not self.begun:
            raise ContentRefused("the provider will not answer this input")
        usage = self._usage()
        rest = usage.completion_tokens - self._deltas - (0 if self._reasoned else usage.reasoning_tokens)
        if rest > 0 and self.begun:
            last = last or Delta()
            last = Delta(last.text, last.tokens + rest, reasoning_text=last.reasoning_text)
        return Finished(reason, usage, last=last)

    def _argument(self, text: str) -> Delta | None:
        self._arguments = True
        if not self._in_answer:
            return self._delta(call=ToolCallDelta(self._calls - 1, arguments_json=text))
        return self._delta(text=text if self._unwrapper is None else self._unwrapper.push(text))

    def _finish_reason(self) -> FinishReason:
        if not self._reason:
            raise EngineFailed("the provider ended its answer without saying why")
        if self._reason in _BROKEN:
            raise EngineFailed(f"the model failed: {self._reason}")
        reason = _REASONS.get(self._reason, FinishReason.STOP)
        if reason is FinishReason.TOOL_CALLS and not self._calls:
            return FinishReason.STOP  # it was the answer tool
        return reason

    def _count(self, event: Counted) -> None:
        old = self._counted
        self._counted = Counted(
            old.prompt if event.prompt is None else event.prompt,
            old.cached if event.cached is None else event.cached,
            old.completion if event.completion is None else event.completion,
            old.reasoning if event.reasoning is None else event.reasoning,
        )

    def _usage(self) -> Usage:
        counted = self._counted
        prompt = self._estimated_prompt if counted.prompt is None else counted.prompt
        completion = counted.completion or 0
        if self.stopped or counted.completion is None:
            # Not counted by the provider: the answer was left before its end.
            completion = max(completion, self._deltas, -(-self._bytes // _BYTES_PER_TOKEN))
        completion = max(completion, self._deltas)
        reasoning = counted.reasoning
        if reasoning is None:
            reasoning = -(-self._reasoned // _BYTES_PER_TOKEN)
        return Usage(
            prompt_tokens=prompt,
            cached_prompt_tokens=min(counted.cached or 0, prompt),
            completion_tokens=completion,
            reasoning_tokens=min(reasoning, completion),
        )

    def _delta(self, text: str = "", reasoning_text: str = "", call: ToolCallDelta | None = None) -> Delta | None:
        if not (text or reasoning_text or call):
            return None
        self._deltas += 1
        self._bytes += len(text.encode()) + len(reasoning_text.encode())
        if call is not None:
            self._bytes += len(call.name) + len(call.arguments_json.encode())
        return Delta(text, 1, tool_calls=(call,) if call else (), reasoning_text=reasoning_text)
