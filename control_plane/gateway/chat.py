"""POST /v1/chat/completions."""

from __future__ import annotations

import re

import msgspec

from control_plane.gateway import inputs
from control_plane.gateway.answers import (
    DONE,
    FINISH_REASONS,
    Answer,
    Asked,
    Dialect,
    Head,
    choice_logprobs,
    encode,
    event,
    usage,
    usage_event,
)
from control_plane.gateway.errors import refuse
from control_plane.gateway.hints import pin
from modelyard.openai import wire
from modelyard.openai.answers import AnswerChoice, AnswerMessage, ChatAnswer
from modelyard.v1.generation_pb2 import GenerationDelta, GenerationInput, Message
from modelyard.v1.orchestrator_pb2 import GenerateRequest, GenerationSummary

_decoder = msgspec.json.Decoder(wire.ChatRequest)


def parse(body: bytes) -> Asked:
    """The request in a body. Raises INVALID_REQUEST."""
    asked = inputs.decode(_decoder, body)
    request = GenerateRequest()
    pin(request.requirements, asked.model)
    input = request.input
    for i, message in enumerate(asked.messages):
        _add_message(input.messages.add(), message, f"messages[{i}]")
    _set_answer(input, asked)
    include_usage = bool(asked.stream_options and asked.stream_options.include_usage)
    return Asked(
        request,
        asked.metadata,
        bool(asked.stream),
        rename,
        lambda head: ChatStream(head, include_usage),
        render,
    )


DIALECT = Dialect("http_chat", parse)


def _add_message(target: Message, message: wire.ChatMessage, where: str) -> None:
    target.role = inputs.role(message.role, f"{where}.role")
    content = message.content
    if isinstance(content, str):
        if content or not message.tool_calls:
            inputs.add_text(target, content)
    elif content:
        for j, part in enumerate(content):
            _add_part(target, part, f"{where}.content[{j}]")
    if message.refusal:
        inputs.add_text(target, message.refusal)
    for j, call in enumerate(message.tool_calls or ()):
        if call.function is None:
            raise refuse(f"{where}.tool_calls[{j}].function", "is required")
        target.tool_calls.add(
            id=call.id or "", name=call.function.name or "", arguments_json=call.function.arguments or "{}"
        )
    if message.tool_call_id:
        target.tool_call_id = message.tool_call_id
    if message.name:
        target.name = message.name


def _add_part(target: Message, part: wire.ContentPart, where: str) -> None:
    match part.type:
        case "text" if part.text is not None:
            inputs.add_text(target, part.text)
        case "refusal" if part.refusal is not None:
            inputs.add_text(target, part.refusal)
        case "image_url" if part.image_url is not None:
            inputs.add_image(target, part.image_url.url, f"{where}.image_url.url")
        case "text" | "refusal" | "image_url":
            raise refuse(f"{where}.{part.type}", "is required")
        case _:
            raise refuse(f"{where}.type", "must be text or image_url")


def _set_answer(input: GenerationInput, asked: wire.ChatRequest) -> None:
    limit = asked.max_tokens if asked.max_completion_tokens is None else asked.max_completion_tokens
    inputs.set_sampling(input.sampling, asked)
    if limit is not None:
        inputs.set_max_tokens(input.sampling, limit, "max_tokens")
    if asked.logprobs:
        inputs.set_logprobs(input.sampling, asked.top_logprobs, "top_logprobs")
    elif asked.top_logprobs:
        raise refuse("top_logprobs", "needs logprobs")
    if asked.response_format is not None:
        inputs.set_format(input, asked.response_format)
    for i, tool in enumerate(asked.tools or ()):
        if tool.type != "function" or tool.function is None:
            raise refuse(f"tools[{i}].type", "only functions are supported")
        inputs.add_tool(input, tool.function.name, tool.function.description, tool.function.parameters)
    choice = asked.tool_choice
    if isinstance(choice, str):
        inputs.choose_tool(input, choice, "tool_choice")
    elif choice is not None:
        inputs.choose_named_tool(input, choice.type, choice.function.name, "tool_choice")


_RENAMED = (
    (re.compile(r"^input\.sampling\."), ""),
    (re.compile(r"^input\.tools\[(\d+)\]\.parameters_schema"), r"tools[\1].function.parameters"),
    (re.compile(r"^input\.tools\[(\d+)\]\."), r"tools[\1].function."),
    (re.compile(r"^input\.tool_choice.*"), "tool_choice"),
    (re.compile(r"^input\.messages\[(\d+)\]\.tool_calls\[(\d+)\]\.(name|arguments)(_json)?"),
     r"messages[\1].tool_calls[\2].function.\3"),
    (re.compile(r"\.content\[(\d+)\]\.image(\..*)?$"), r".content[\1].image_url.url"),
    (re.compile(r"^input\."), ""),
    (re.compile(r"^input$"), "messages"),
    (re.compile(r"^requirements\.model$"), "model"),
)  # fmt: skip


def rename(path: str) -> str:
    """The field of a chat request that a field of the contract was made from."""
    for pattern, replacement in _RENAMED:
        path = pattern.sub(replacement, path)
    return path


# ------------------------------------------------------------------ answers ---


def render(head: Head, answer: Answer) -> bytes:
    """The whole answer."""
    message = AnswerMessage(content=answer.text or (None if answer.calls else ""))
    if answer.reasoning:
        message.reasoning_content = answer.reasoning
    if answer.calls:
        message.tool_calls = [
            wire.ToolCall(
                id=call.id, type="function", function=wire.FunctionCall(name=call.name, arguments=call.arguments)
            )
            for _, call in sorted(answer.calls.items())
        ]
    summary = answer.end
    choice = AnswerChoice(
        message=message,
        finish_reason=FINISH_REASONS.get(summary.finish_reason, "stop"),
        logprobs=choice_logprobs(answer.logprobs) if answer.logprobs else None,
    )
    return encode(
        ChatAnswer(
            id=f"chatcmpl-{head.request_id}",
            created=head.created,
            model=head.model,
            choices=[choice],
            usage=usage(summary.usage),
        )
    )


class ChatStream:
    """The answer as chunks. Usage comes last, in a chunk of its own."""

    def __init__(self, head: Head, include_usage: bool) -> None:
        self._include_usage = include_usage
        self._choice = wire.ChunkChoice()
        # One chunk object is filled anew for every event: most of it never changes.
        self._chunk = wire.ChatChunk(
            id=f"chatcmpl-{head.request_id}",
            object="chat.completion.chunk",
            created=head.created,
            model=head.model,
            choices=[self._choice],
        )
        self._role: str | None = "assistant"

    def piece(self, delta: GenerationDelta) -> bytes:
        text, calls, logprobs, reasoning = delta.text, delta.tool_calls, delta.logprobs, delta.reasoning_text
        if not (text or calls or logprobs or reasoning):
            return b""
        choice = self._choice
        choice.delta = message = wire.ChatMessage(role=self._role)
        self._role = None
        if text or not (calls or reasoning):
            message.content = text
        if reasoning:
            message.reasoning_content = reasoning
        if calls:
            message.tool_calls = [
                wire.ToolCall(
                    index=call.index,
                    id=call.id or None,
                    type="function" if call.id else None,
                    function=wire.FunctionCall(name=call.name or None, arguments=call.arguments_json),
                )
                for call in calls
            ]
        choice.logprobs = choice_logprobs(logprobs) if logprobs else None
        return event(self._chunk)

    def end(self, summary: GenerationSummary) -> bytes:
        choice = self._choice
        choice.delta = wire.ChatMessage(role=self._role, content="" if self._role else None)
        choice.logprobs = None
        choice.finish_reason = FINISH_REASONS.get(summary.finish_reason, "stop")
        last = event(self._chunk)
        if self._include_usage:
            last += usage_event(self._chunk, summary)
        return last + DONE

    def failure(self, error: wire.ErrorBody) -> bytes:
        return event(wire.ErrorResponse(error=error))
