"""POST /v1/completions: a raw prompt, continued."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from control_plane.gateway import inputs
from control_plane.gateway.answers import (
    DONE,
    FINISH_REASONS,
    Answer,
    Asked,
    Dialect,
    Head,
    encode,
    event,
    usage,
    usage_event,
)
from control_plane.gateway.errors import refuse
from control_plane.gateway.hints import pin
from modelyard.openai import wire
from modelyard.v1.generation_pb2 import GenerationDelta, TokenLogprob
from modelyard.v1.orchestrator_pb2 import GenerateRequest, GenerationSummary

_decoder = msgspec.json.Decoder(wire.CompletionRequest)
_OBJECT = "text_completion"


def parse(body: bytes) -> Asked:
    """The request in a body. Raises INVALID_REQUEST."""
    asked = inputs.decode(_decoder, body)
    request = GenerateRequest()
    pin(request.requirements, asked.model)
    input = request.input
    input.prompt = _only_prompt(asked.prompt)
    inputs.set_sampling(input.sampling, asked)
    if asked.max_tokens is not None:
        inputs.set_max_tokens(input.sampling, asked.max_tokens, "max_tokens")
    if asked.logprobs is not None:
        inputs.set_logprobs(input.sampling, asked.logprobs, "logprobs")
    if asked.echo:
        raise refuse("echo", "is not supported")
    if asked.response_format is not None:
        inputs.set_format(input, asked.response_format)
    include_usage = bool(asked.stream_options and asked.stream_options.include_usage)
    return Asked(
        request,
        asked.metadata,
        bool(asked.stream),
        rename,
        lambda head: CompletionStream(head, include_usage),
        render,
    )


DIALECT = Dialect("http_completions", parse)


def _only_prompt(prompt: str | list[Any]) -> str:
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str):
        return prompt[0]
    if isinstance(prompt, str):
        return prompt
    if not prompt or isinstance(prompt[0], str):
        raise refuse("prompt", "must be one text: send several requests")
    raise refuse("prompt", "must be text: token numbers are not supported, as models of a fleet differ in them")


def rename(path: str) -> str:
    """The field of a completion request that a field of the contract was made from."""
    if path == "input":
        return "prompt"
    if path == "requirements.model":
        return "model"
    path = path.removeprefix("input.").removeprefix("sampling.")
    return "logprobs" if path == "top_logprobs" else path


# ------------------------------------------------------------------ answers ---


def render(head: Head, answer: Answer) -> bytes:
    """The whole answer."""
    summary = answer.end
    choice = wire.CompletionChoice(
        text=answer.text,
        finish_reason=FINISH_REASONS.get(summary.finish_reason, "stop"),
        logprobs=_logprobs(answer.logprobs, 0),
    )
    body = wire.CompletionResponse(
        id=f"cmpl-{head.request_id}",
        object=_OBJECT,
        created=head.created,
        model=head.model,
        choices=[choice],
        usage=usage(summary.usage),
    )
    return encode(body)


def _logprobs(entries: Iterable[TokenLogprob], offset: int) -> wire.CompletionLogprobs | None:
    """`offset` is the number of characters before the first of these tokens."""
    found = wire.CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
    for entry in entries:
        found.tokens.append(entry.token)  # type: ignore[union-attr]
        found.token_logprobs.append(entry.logprob)  # type: ignore[union-attr]
        found.top_logprobs.append({top.token: top.logprob for top in entry.top})  # type: ignore[union-attr]
        found.text_offset.append(offset)  # type: ignore[union-attr]
        offset += len(entry.token)
    return found if found.tokens else None


class CompletionStream:
    """The answer as chunks. Usage comes last, in a chunk of its own."""

    def __init__(self, head: Head, include_usage: bool) -> None:
        self._include_usage = include_usage
        self._choice = wire.CompletionChoice()
        self._chunk = wire.CompletionResponse(
            id=f"cmpl-{head.request_id}",
            object=_OBJECT,
            created=head.created,
            model=head.model,
            choices=[self._choice],
        )
        self._characters = 0

    def piece(self, delta: GenerationDelta) -> bytes:
        text, logprobs = delta.text, delta.logprobs
        if not (text or logprobs):
            return b""
        choice = self._choice
        choice.text = text
        choice.logprobs = _logprobs(logprobs, self._characters) if logprobs else None
        self._characters += len(text)
        return event(self._chunk)

    def end(self, summary: GenerationSummary) -> bytes:
        choice, chunk = self._choice, self._chunk
        choice.text, choice.logprobs = "", None
        choice.finish_reason = FINISH_REASONS.get(summary.finish_reason, "stop")
        last = event(chunk)
        if self._include_usage:
            last += usage_event(chunk, summary)
        return last + DONE

    def failure(self, error: wire.ErrorBody) -> bytes:
        return event(wire.ErrorResponse(error=error))
