"""From the pieces of a streamed answer to deltas and the end. Pure."""

from __future__ import annotations

import dataclasses
from typing import TypeAlias

import msgspec

from model_servers.engine import Delta, EngineFailed, Finished, FinishReason, TokenLogprob, ToolCallDelta, Usage
from model_servers.engines._openai import errors
from model_servers.engines._openai.errors import Source
from model_servers.engines._openai.stops import Stops
from modelyard.openai import wire

DONE = b"[DONE]"

_REASONS = {
    "stop": FinishReason.STOP,
    "length": FinishReason.LENGTH,
    "tool_calls": FinishReason.TOOL_CALLS,
    "function_call": FinishReason.TOOL_CALLS,
    "content_filter": FinishReason.CONTENT_FILTER,
}
_BROKEN = ("error", "abort")
"""Finish reasons of answers that were given up."""
_CHARACTERS_PER_TOKEN = 4
"""Roughly, for prompts whose tokens the server did not tell."""

_Piece: TypeAlias = wire.ChatChunk | wire.CompletionResponse
_CHAT = msgspec.json.Decoder(wire.ChatChunk)
_COMPLETION = msgspec.json.Decoder(wire.CompletionResponse)
_PLAIN_ERROR = msgspec.json.Decoder(errors.Answer)


class Reader:
    """Reads one answer, piece by piece."""

    def __init__(self, source: Source, *, completion: bool, stops: tuple[str, ...], top: int | None) -> None:
        """`completion`: the pieces are those of /completions, else of /chat/completions. `stops`: see Stops.
        `top`: alternatives wanted with each log-probability, None: no log-probabilities."""
        self._source = source
        self._decoder: msgspec.json.Decoder[wire.ChatChunk] | msgspec.json.Decoder[wire.CompletionResponse]
        self._decoder = _COMPLETION if completion else _CHAT
        self._stops = Stops(stops)
        self._top = top
        self._reason: FinishReason | None = None
        self._usage: wire.Usage | None = None
        self._counted = 0
        """Tokens told in deltas so far."""
        self._reasoned = False
        self._refused = False
        self._calls: dict[int, str] = {}
        """Index to id of the calls that have begun."""
        self.begun = False
        """Something of the answer has come."""
        self.done = False
        """The server said that nothing more will come."""
        self.over = False
        """Nothing that may still come can change the answer."""

    @property
    def finished(self) -> bool:
        """The model has ended its answer; usage may be still to come."""
        return self._reason is not None

    def read(self, payload: bytes) -> Delta | None:
        """The next piece, None if there is nothing new in it. Raises what the server reports, and EngineFailed."""
        if payload == DONE:
            self.done = self.over = True
            return None
        try:
            piece: _Piece = self._decoder.decode(payload)
        except msgspec.MsgspecError:
            self._fail_if_told(payload)
            raise self._source.lost("sends what is no answer in OpenAI's format") from None
        if piece.error is not None:
            raise errors.of_stream(self._source, piece.error)
        if piece.usage is not None:
            self._usage = piece.usage
        delta = None
        for choice in piece.choices[:1]:
            delta = self._choice(choice) if isinstance(choice, wire.ChunkChoice) else self._text(choice)
        if delta is not None:
            self.begun = True
            self._counted += delta.tokens
        return delta

    def end(self, last: Delta | None = None) -> Finished:
        """The end of the answer. `last`: a delta that has not been passed on. Raises EngineFailed if it was cut off."""
        if self._reason is None:
            raise self._source.lost("broke off in the middle of the answer")
        reason = self._reason
        if self._calls and reason is FinishReason.STOP:
            reason = FinishReason.TOOL_CALLS  # vLLM says "stop" after a call that was asked for by name
        elif self._refused and reason is FinishReason.STOP:
            reason = FinishReason.CONTENT_FILTER
        elif reason is FinishReason.TOOL_CALLS and not self._calls:
            reason = FinishReason.STOP
        if rest := self._stops.flush():
            last = Delta(rest) if last is None else dataclasses.replace(last, text=last.text + rest)
        usage = self._told_usage()
        untold = self._visible(usage) - self._counted
        if untold > 0 and self._counted and self._top is None:
            # Servers put several tokens into one piece and say so only now; speeds are computed from this.
            last = Delta(tokens=untold) if last is None else dataclasses.replace(last, tokens=last.tokens + untold)
        return Finished(reason, usage, last=last)

    # -------------------------------------------------------------- pieces ---

    def _choice(self, choice: wire.ChunkChoice) -> Delta | None:
        self._ended(choice.finish_reason)
        said = choice.delta
        text = said.content or ""
        if not isinstance(text, str):
            text = "".join(part.text or "" for part in text)
        if said.refusal:
            self._refused = True
            text += said.refusal
        reasoning = said.reasoning_content or said.reasoning or ""
        self._reasoned = self._reasoned or bool(reasoning)
        calls = tuple(self._call(call) for call in said.tool_calls or ())
        logprobs: tuple[TokenLogprob, ...] = ()
        if self._top is not None and choice.logprobs is not None:
            logprobs = tuple(_logprob(entry, self._top) for entry in choice.logprobs.content or ())
        return self._delta(text, reasoning, calls, logprobs)

    def _text(self, choice: wire.CompletionChoice) -> Delta | None:
        self._ended(choice.finish_reason)
        logprobs: tuple[TokenLogprob, ...] = ()
        if self._top is not None and choice.logprobs is not None:
            logprobs = _completion_logprobs(choice.logprobs, self._top)
        return self._delta(choice.text, "", (), logprobs)

    def _delta(
        self, text: str, reasoning: str, calls: tuple[ToolCallDelta, ...], logprobs: tuple[TokenLogprob, ...]
    ) -> Delta | None:
        told = bool(text or reasoning or calls)
        if text:
            text, stopped = self._stops.push(text)
            if stopped:
                # The connection is closed then, so the server's usage will not come.
                self._reason, self.over = FinishReason.STOP, True
        if self._top is not None:
            tokens = len(logprobs)
        elif self._usage is not None and self._usage.completion_tokens is not None:
            tokens = max(0, self._visible(self._told_usage()) - self._counted)
        else:
            tokens = 1 if told else 0
        if not (text or reasoning or calls or logprobs or tokens):
            return None
        return Delta(text, tokens, logprobs, calls, reasoning)

    def _call(self, call: wire.ToolCall) -> ToolCallDelta:
        index = call.index
        if index is None:  # some servers send whole calls, without a number
            known = next((n for n, known in self._calls.items() if call.id in (None, known)), None)
            index = len(self._calls) if known is None else known
        function = call.function or wire.FunctionCall()
        if index in self._calls:
            return ToolCallDelta(index, arguments_json=function.arguments or "")
        if not function.name:
            raise self._source.lost("sends a tool call without a name")
        index = len(self._calls)  # from 0 and without gaps, whatever the server counts
        self._calls[index] = call.id or f"call_{index}"
        return ToolCallDelta(index, self._calls[index], function.name, function.arguments or "")

    def _ended(self, reason: str | None) -> None:
        if not reason:
            return
        if reason in _BROKEN:
            raise self._source.lost("gave the answer up")
        self._reason = _REASONS.get(reason, FinishReason.STOP)

    # --------------------------------------------------------------- usage ---

    def _told_usage(self) -> Usage:
        told = self._usage or wire.Usage()
        prompt = told.prompt_tokens or 0
        completion = self._counted if told.completion_tokens is None else told.completion_tokens
        details = told.completion_tokens_details
        reasoning = (details.reasoning_tokens if details else None) or 0
        if reasoning and told.total_tokens == prompt + completion + reasoning:
            completion += reasoning  # xAI counts them apart
        cached = (told.prompt_tokens_details.cached_tokens if told.prompt_tokens_details else None) or 0
        return Usage(prompt, min(cached, prompt), completion, min(reasoning, completion))

    def _visible(self, usage: Usage) -> int:
        """Tokens of the answer that deltas can tell: reasoning that is not shown is generated, but never sent."""
        return usage.completion_tokens - (0 if self._reasoned else usage.reasoning_tokens)

    def _fail_if_told(self, payload: bytes) -> None:
        """Raise the error that stands in a payload which is no piece of an answer, if there is one."""
        try:
            answer = _PLAIN_ERROR.decode(payload)
        except msgspec.MsgspecError:
            return
        if answer.error:
            raise errors.of_stream(self._source, errors.parse(payload))


def estimated(prompt_characters: int) -> int:
    """Prompt tokens, where the server did not come to tell them. At least 1."""
    return max(1, prompt_characters // _CHARACTERS_PER_TOKEN)


def vectors(source: Source, body: bytes, count: int) -> tuple[list[list[float]], int]:
    """(vectors in the order of the inputs, prompt tokens) of an answer to /embeddings. Raises EngineFailed."""
    try:
        answer = msgspec.json.decode(body, type=wire.EmbeddingResponse)
    except msgspec.MsgspecError:
        raise source.lost("sends what are no embeddings in OpenAI's format") from None
    found = {entry.index: entry.embedding for entry in answer.data}
    ordered = [found.get(index) for index in range(count)]
    if len(answer.data) != count or not all(isinstance(vector, list) and vector for vector in ordered):
        raise EngineFailed(f"{source.name} did not send one embedding for each text")
    return [vector for vector in ordered if isinstance(vector, list)], answer.usage.prompt_tokens or 0


def _logprob(entry: wire.TokenLogprob, count: int) -> TokenLogprob:
    return _entry(entry.token, entry.logprob, [(top.token, top.logprob) for top in entry.top_logprobs or ()], count)


def _completion_logprobs(told: wire.CompletionLogprobs, count: int) -> tuple[TokenLogprob, ...]:
    tops = told.top_logprobs or []
    pairs = zip(told.tokens or (), told.token_logprobs or (), strict=False)
    return tuple(
        _entry(token, logprob or 0.0, list(((tops[n] if n < len(tops) else None) or {}).items()), count)
        for n, (token, logprob) in enumerate(pairs)
    )


def _entry(token: str, logprob: float, top: list[tuple[str, float]], count: int) -> TokenLogprob:
    """Servers add the token itself to the likeliest ones, wherever it stands."""
    top.sort(key=lambda entry: entry[1], reverse=True)
    return TokenLogprob(token, min(logprob, 0.0), tuple((other, min(value, 0.0)) for other, value in top[:count]))
