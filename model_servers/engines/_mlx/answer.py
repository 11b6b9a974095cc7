"""From tokens to deltas: one `Answer` a request, driven by the engine thread."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

from model_servers.engine import Delta, FinishReason, TokenLogprob, ToolCallDelta
from model_servers.engines._mlx.markup import (
    CallArguments,
    CallBegins,
    Event,
    MarkupReader,
    Reasoning,
    StopMatcher,
    Text,
)


class Detokenizer:
    """Token ids to text, one at a time, holding back characters that are not complete.

    Uses the stream decoder of `tokenizers`: unlike mlx_lm's byte-level detokenizer it keeps the space at the very
    beginning, which a raw prompt needs. Tokenizers that are not of that library go through mlx_lm's.
    """

    def __init__(self, tokenizer: Any, skipped: frozenset[int]) -> None:
        """`tokenizer`: mlx_lm's TokenizerWrapper. `skipped`: control tokens, which have no text."""
        self._skipped = skipped
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        if self._backend is None:
            self._fallback = tokenizer.detokenizer
        else:
            self._stream = self._new_stream()

    @staticmethod
    def _new_stream() -> Any:
        from tokenizers.decoders import DecodeStream

        return DecodeStream(skip_special_tokens=False)

    def push(self, token: int) -> str:
        """The text that `token` completes; empty if none."""
        if token in self._skipped:
            return ""
        if self._backend is None:
            self._fallback.add_token(token)
            return str(self._fallback.last_segment)
        try:
            return self._stream.step(self._backend, token) or ""
        except Exception:  # a byte sequence that re-decodes differently ("invalid prefix"): begin anew
            self._stream = self._new_stream()
            return self._stream.step(self._backend, token) or ""


class Answer:
    """The state of one answer. Bytes that never became a character are dropped at its end."""

    def __init__(
        self,
        detokenizer: Detokenizer,
        stops: Sequence[str] = (),
        markup: MarkupReader | None = None,
    ) -> None:
        """`markup` is None when the text is to be passed on as it is."""
        self._detokenizer = detokenizer
        self._stops = StopMatcher(stops)
        self._markup = markup
        self._tokens = 0
        self._logprobs: list[TokenLogprob] = []
        self._calls_begun = 0
        self._stopped = False
        self.reasoning_tokens = 0
        """Tokens whose text went to the reasoning."""

    def push(self, token: int, logprob: TokenLogprob | None = None) -> tuple[Delta | None, bool]:
        """Takes the next token. Returns (what can be passed on, whether a stop string was met)."""
        self._tokens += 1
        if logprob is not None:
            self._logprobs.append(logprob)
        text = self._detokenizer.push(token)
        if not text:
            return None, False
        events: list[Event] = [Text(text)] if self._markup is None else self._markup.push(text)
        delta, self._stopped = self._delta(events, flush=False)
        return delta, self._stopped

    def finish(self, reason: FinishReason) -> tuple[Delta | None, FinishReason]:
        """Ends the answer. Returns (what was held back, the reason to report)."""
        delta = None
        if not self._stopped:  # what follows a stop string was never said
            events = [] if self._markup is None else self._markup.flush(complete=reason is FinishReason.STOP)
            delta, _ = self._delta(events, flush=True)
        if reason is FinishReason.STOP and self._markup is not None and self._markup.calls:
            reason = FinishReason.TOOL_CALLS
        return delta, reason

    def _delta(self, events: list[Event], *, flush: bool) -> tuple[Delta | None, bool]:
        """Collects events into one delta. A stop string ends the visible text only: it never cuts arguments."""
        text: list[str] = []
        reasoning: list[str] = []
        calls: list[ToolCallDelta] = []
        stopped = False
        for event in events:
            if isinstance(event, Text):
                passed, stopped = self._stops.push(event.text)
                text.append(passed)
                if stopped:
                    break
            elif isinstance(event, Reasoning):
                reasoning.append(event.text)
            elif isinstance(event, CallBegins):
                text.append(self._stops.flush())
                self._calls_begun += 1
                calls.append(
                    ToolCallDelta(index=self._calls_begun - 1, id=f"call_{secrets.token_hex(12)}", name=event.name)
                )
            elif isinstance(event, CallArguments):
                calls.append(ToolCallDelta(index=self._calls_begun - 1, arguments_json=event.json_text))
        if flush and not stopped:
            text.append(self._stops.flush())
        joined, thought = "".join(text), "".join(reasoning)
        if thought:
            self.reasoning_tokens += self._tokens
        if not (joined or thought or calls or ((flush or stopped) and self._tokens)):
            return None, stopped
        delta = Delta(
            text=joined,
            tokens=self._tokens,
            logprobs=tuple(self._logprobs),
            tool_calls=tuple(calls),
            reasoning_text=thought,
        )
        self._tokens, self._logprobs = 0, []
        return delta, stopped
