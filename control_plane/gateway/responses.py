"""POST /v1/responses: text and functions. Nothing is kept, so every request carries its whole conversation."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from control_plane.gateway import chat, inputs
from control_plane.gateway.answers import Answer, Asked, Dialect, Head, encode, token_logprobs
from control_plane.gateway.errors import refuse
from control_plane.gateway.hints import pin
from modelyard.openai import responses as wire
from modelyard.openai.wire import ErrorBody
from modelyard.v1 import generation_pb2
from modelyard.v1.generation_pb2 import GenerationDelta, GenerationInput, Message
from modelyard.v1.orchestrator_pb2 import GenerateRequest, GenerationSummary

_decoder = msgspec.json.Decoder(wire.ResponsesRequest)
_KEPT = ("previous_response_id", "conversation", "prompt")
_LOGPROBS = "message.output_text.logprobs"


def parse(body: bytes) -> Asked:
    """The request in a body. Raises INVALID_REQUEST."""
    asked = inputs.decode(_decoder, body)
    for name in _KEPT:
        if getattr(asked, name) is not None:
            raise refuse(name, "is not supported: nothing is kept here, send the whole conversation as input")
    if asked.background:
        raise refuse("background", "is not supported")
    request = GenerateRequest()
    pin(request.requirements, asked.model)
    origins = _add_messages(request.input, asked)
    _set_answer(request.input, asked)

    def rename(path: str) -> str:
        message = re.match(r"input\.messages\[(\d+)\]", path)
        return origins[int(message[1])] if message else _RENAMED.get(path, chat.rename(path))

    return Asked(
        request,
        asked.metadata,
        bool(asked.stream),
        rename,
        lambda head: ResponseStream(head, asked),
        lambda head, answer: encode(_finished(head, asked, answer, list(_items(head, answer)))),
    )


DIALECT = Dialect("http_responses", parse)

_RENAMED = {
    "input": "input",
    "input.sampling.max_tokens": "max_output_tokens",
    "input.response_format.json_schema.schema": "text.format.schema",
}


# ----------------------------------------------------------------- messages ---


def _add_messages(input: GenerationInput, asked: wire.ResponsesRequest) -> list[str]:
    """Fill the conversation; where in the request each message comes from."""
    origins: list[str] = []
    if asked.instructions:
        inputs.add_text(input.messages.add(role=generation_pb2.ROLE_SYSTEM), asked.instructions)
        origins.append("instructions")
    if isinstance(asked.input, str):
        inputs.add_text(input.messages.add(role=generation_pb2.ROLE_USER), asked.input)
        origins.append("input")
        return origins
    for i, item in enumerate(asked.input):
        where = f"input[{i}]"
        match item.type or "message":
            case "message":
                message = input.messages.add(role=inputs.role(item.role, f"{where}.role"))
                _add_content(message, item.content, f"{where}.content")
            case "function_call":
                # One turn of the assistant is one message, its calls are items of their own.
                if not input.messages or input.messages[-1].role != generation_pb2.ROLE_ASSISTANT:
                    input.messages.add(role=generation_pb2.ROLE_ASSISTANT)
                    origins.append(where)
                input.messages[-1].tool_calls.add(
                    id=item.call_id or "", name=item.name or "", arguments_json=item.arguments or "{}"
                )
                continue
            case "function_call_output":
                message = input.messages.add(role=generation_pb2.ROLE_TOOL, tool_call_id=item.call_id or "")
                _add_content(message, item.output, f"{where}.output")
            case "reasoning":
                continue  # models of other families cannot use it
            case _:
                raise refuse(f"{where}.type", "must be message, function_call, function_call_output or reasoning")
        origins.append(where)
    return origins


def _add_content(message: Message, content: str | list[wire.InputPart] | None, where: str) -> None:
    if isinstance(content, str):
        inputs.add_text(message, content)
        return
    for j, part in enumerate(content or ()):
        match part.type:
            case "input_text" | "output_text" | "text" if part.text is not None:
                inputs.add_text(message, part.text)
            case "refusal" if part.refusal is not None:
                inputs.add_text(message, part.refusal)
            case "input_image" if part.image_url is not None:
                inputs.add_image(message, part.image_url, f"{where}[{j}].image_url")
            case "input_text" | "output_text" | "text" | "refusal":
                raise refuse(f"{where}[{j}].text", "is required")
            case "input_image":
                raise refuse(f"{where}[{j}].image_url", "is required: no files are kept here")
            case _:
                raise refuse(f"{where}[{j}].type", "must be input_text, input_image or output_text")


def _set_answer(input: GenerationInput, asked: wire.ResponsesRequest) -> None:
    sampling = input.sampling
    if asked.max_output_tokens is not None:
        inputs.set_max_tokens(sampling, asked.max_output_tokens, "max_output_tokens")
    if asked.temperature is not None:
        sampling.temperature = asked.temperature
    if asked.top_p is not None:
        sampling.top_p = asked.top_p
    if asked.top_logprobs or _LOGPROBS in (asked.include or ()):
        inputs.set_logprobs(sampling, asked.top_logprobs, "top_logprobs")
    for i, tool in enumerate(asked.tools or ()):
        if tool.type != "function":
            raise refuse(f"tools[{i}].type", "only functions are supported")
        inputs.add_tool(input, tool.name or "", tool.description, tool.parameters)
    choice = asked.tool_choice
    if isinstance(choice, str):
        inputs.choose_tool(input, choice, "tool_choice")
    elif choice is not None:
        inputs.choose_named_tool(input, choice.type, choice.name, "tool_choice")
    form = asked.text.format if asked.text else None
    match form.type if form else "text":
        case "text":
            pass
        case "json_object":
            input.response_format.json.SetInParent()
        case "json_schema" if form:
            inputs.set_schema(input, form.schema, form.name, "text.format.schema")
        case _:
            raise refuse("text.format.type", "must be text, json_object or json_schema")


# ------------------------------------------------------------------ answers ---


def _response(
    head: Head, asked: wire.ResponsesRequest, status: str, output: Sequence[wire.OutputItem] = ()
) -> wire.Response:
    return wire.Response(
        id=f"resp_{head.request_id}",
        created_at=head.created,
        model=head.model,
        status=status,
        output=list(output),
        instructions=asked.instructions,
        max_output_tokens=asked.max_output_tokens,
        temperature=asked.temperature,
        top_p=asked.top_p,
        tools=asked.tools or [],
        tool_choice="auto" if asked.tool_choice is None else asked.tool_choice,
        text=asked.text or wire.TextOptions(format=wire.TextFormat(type="text")),
        metadata=asked.metadata or {},
        parallel_tool_calls=asked.parallel_tool_calls is not False,
    )


_INCOMPLETE = {
    generation_pb2.FINISH_REASON_LENGTH: "max_output_tokens",
    generation_pb2.FINISH_REASON_CONTENT_FILTER: "content_filter",
}


def _finished(
    head: Head, asked: wire.ResponsesRequest, answer: Answer, output: Sequence[wire.OutputItem]
) -> wire.Response:
    summary = answer.end
    response = _response(head, asked, "completed", output)
    short = _INCOMPLETE.get(summary.finish_reason)
    if short:
        response.status = "incomplete"
        response.incomplete_details = wire.IncompleteDetails(reason=short)
    counted = summary.usage
    response.usage = wire.ResponseUsage(
        input_tokens=counted.prompt_tokens,
        input_tokens_details=wire.InputTokensDetails(cached_tokens=counted.cached_prompt_tokens),
        output_tokens=counted.completion_tokens,
        output_tokens_details=wire.OutputTokensDetails(reasoning_tokens=counted.reasoning_tokens),
        total_tokens=counted.prompt_tokens + counted.completion_tokens,
    )
    return response


def _item_status(summary: GenerationSummary) -> str:
    return "incomplete" if summary.finish_reason in _INCOMPLETE else "completed"


def _items(head: Head, answer: Answer) -> Iterator[wire.OutputItem]:
    """The answer as items: reasoning, message, calls."""
    if answer.reasoning:
        yield wire.OutputReasoning(
            id=f"rs_{head.request_id}", status="completed", content=[wire.ReasoningText(text=answer.reasoning)]
        )
    if answer.text or not answer.calls:
        text = wire.OutputText(text=answer.text, logprobs=token_logprobs(answer.logprobs))
        status = _item_status(answer.end)
        yield wire.OutputMessage(id=f"msg_{head.request_id}", status=status, content=[text])
    for index, call in sorted(answer.calls.items()):
        yield wire.OutputFunctionCall(
            id=f"fc_{head.request_id}_{index}",
            call_id=call.id,
            name=call.name,
            arguments=call.arguments,
            status="completed",
        )


class ResponseStream:
    """The answer as named events.

    Items open one after another, at their first piece, and the next one closes the last. The
    answer as a whole is collected on the side, for the events that repeat it.
    """

    def __init__(self, head: Head, asked: wire.ResponsesRequest) -> None:
        self._head = head
        self._asked = asked
        self._answer = Answer()
        self._number = 0
        self._begun = False
        self._items: list[wire.OutputItem] = []
        self._places: dict[object, int] = {}
        """Kind of item, or index of a call -> place in the output."""
        self._open: object = None

    def _event(self, kind: str, **fields: Any) -> bytes:
        data = encode({"type": kind, "sequence_number": self._number, **fields})
        self._number += 1
        return b"event: %b\ndata: %b\n\n" % (kind.encode(), data)

    def _begin(self) -> bytes:
        if self._begun:
            return b""
        self._begun = True
        response = _response(self._head, self._asked, "in_progress")
        return self._event("response.created", response=response) + self._event(
            "response.in_progress", response=response
        )

    def piece(self, delta: GenerationDelta) -> bytes:
        self._answer.take(delta)
        out = b""
        if delta.reasoning_text:
            thoughts = wire.OutputReasoning(id=f"rs_{self._head.request_id}", status="in_progress", content=[])
            out += self._reach("reasoning", thoughts)
            out += self._event(
                "response.reasoning_text.delta",
                **self._place("reasoning"),
                content_index=0,
                delta=delta.reasoning_text,
            )
        if delta.text or delta.logprobs:
            out += self._reach("message", self._message())
            out += self._event(
                "response.output_text.delta",
                **self._place("message"),
                content_index=0,
                delta=delta.text,
                logprobs=token_logprobs(delta.logprobs),
            )
        for fragment in delta.tool_calls:
            index = fragment.index
            call = wire.OutputFunctionCall(
                id=f"fc_{self._head.request_id}_{index}",
                call_id=fragment.id,
                name=fragment.name,
                arguments="",
                status="in_progress",
            )
            out += self._reach(index, call)
            if fragment.arguments_json:
                out += self._event(
                    "response.function_call_arguments.delta", **self._place(index), delta=fragment.arguments_json
                )
        return out

    def _message(self) -> wire.OutputMessage:
        return wire.OutputMessage(id=f"msg_{self._head.request_id}", status="in_progress", content=[])

    def _place(self, key: object) -> dict[str, Any]:
        place = self._places[key]
        return {"item_id": self._items[place].id, "output_index": place}

    def _reach(self, key: object, item: wire.OutputItem) -> bytes:
        """Make sure that the item is there; it is opened by its first piece."""
        if key in self._places:
            return b""
        out = self._begin() + self._close()
        self._places[key] = len(self._items)
        self._items.append(item)
        self._open = key
        out += self._event("response.output_item.added", output_index=self._places[key], item=item)
        if isinstance(item, wire.OutputMessage):
            text = wire.OutputText(text="")
            out += self._event("response.content_part.added", **self._place(key), content_index=0, part=text)
        elif isinstance(item, wire.OutputReasoning):
            thought = wire.ReasoningText(text="")
            out += self._event("response.content_part.added", **self._place(key), content_index=0, part=thought)
        return out

    def _fill(self, key: object, status: str) -> wire.OutputItem:
        """The item as a whole, as far as it has come."""
        answer, item = self._answer, self._items[self._places[key]]
        item.status = status
        if isinstance(item, wire.OutputMessage):
            item.content = [wire.OutputText(text=answer.text, logprobs=token_logprobs(answer.logprobs))]
        elif isinstance(item, wire.OutputReasoning):
            item.content = [wire.ReasoningText(text=answer.reasoning)]
        else:
            item.arguments = answer.calls[key].arguments  # type: ignore[index]
        return item

    def _close(self, status: str = "completed") -> bytes:
        """Tell the open item as a whole."""
        key, self._open = self._open, None
        if key is None:
            return b""
        item, where = self._fill(key, status), self._place(key)
        if isinstance(item, wire.OutputFunctionCall):
            out = self._event(
                "response.function_call_arguments.done", **where, name=item.name, arguments=item.arguments
            )
        elif isinstance(item, wire.OutputMessage):
            text = item.content[0]
            out = self._event(
                "response.output_text.done", **where, content_index=0, text=text.text, logprobs=text.logprobs
            )
            out += self._event("response.content_part.done", **where, content_index=0, part=text)
        else:
            thought = item.content[0]
            out = self._event("response.reasoning_text.done", **where, content_index=0, text=thought.text)
            out += self._event("response.content_part.done", **where, content_index=0, part=thought)
        return out + self._event("response.output_item.done", output_index=where["output_index"], item=item)

    def end(self, summary: GenerationSummary) -> bytes:
        self._answer.summary = summary
        out = self._begin()
        if not self._items:
            out += self._reach("message", self._message())
        out += self._close(_item_status(summary))
        for key in self._places:  # pieces may have come after their item was closed
            self._fill(key, self._items[self._places[key]].status)
        response = _finished(self._head, self._asked, self._answer, self._items)
        return out + self._event(f"response.{response.status}", response=response)

    def failure(self, error: ErrorBody) -> bytes:
        out = self._begin()
        for key in self._places:
            self._fill(key, "incomplete" if key == self._open else "completed")
        response = _response(self._head, self._asked, "failed", self._items)
        response.error = wire.ResponseError(code=str(error.code), message=error.message)
        return out + self._event("response.failed", response=response)
