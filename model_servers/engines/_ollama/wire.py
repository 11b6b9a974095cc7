"""Between the engine's types and Ollama's: bodies of requests, lines of answers. No I/O."""

from __future__ import annotations

import base64
import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from model_servers.engine import (
    ContextTooLong,
    Delta,
    EngineFailed,
    Finished,
    FinishReason,
    GenerationRequest,
    Image,
    Message,
    Role,
    Sampling,
    TokenLogprob,
    Tool,
    ToolCallDelta,
    ToolChoiceMode,
    Unsupported,
    Usage,
)

_ROLES = {Role.SYSTEM: "system", Role.USER: "user", Role.ASSISTANT: "assistant", Role.TOOL: "tool"}

_IMAGE_TOKENS = 768
"""What Ollama itself reckons with before the model has seen the image."""
_MESSAGE_TOKENS = 4
"""Marks of a turn in a chat template."""
_TYPICAL, _DENSE = 4, 2
"""Bytes of a token: of ordinary text, and of such as has short ones."""


# ---------------------------------------------------------------- requests ---


@dataclass(frozen=True, slots=True)
class Running:
    """How a model is run."""

    name: str
    num_ctx: int
    keep_alive: str | float
    refuses: bool
    """Ollama itself refuses what does not fit, if asked to; older versions cut it off silently."""
    stops: tuple[str, ...] = ()
    """Where the model's own definition ends an answer: a request's stop strings would replace them."""
    think: bool | str | None = None


@dataclass(frozen=True, slots=True)
class Call:
    """A request to Ollama."""

    path: str
    body: dict[str, Any]
    num_predict: int
    forced: bool
    """The answer's text is one tool call as JSON."""


def estimate_tokens(request: GenerationRequest, bytes_per_token: int = _TYPICAL) -> int:
    """About how many tokens the prompt has: Ollama has no tokenizer to ask."""
    if request.prompt is not None:
        return -(-len(request.prompt.encode()) // bytes_per_token)
    size = images = 0
    for message in request.messages:
        images += sum(isinstance(part, Image) for part in message.content)
        size += len(message.text.encode())
        size += sum(len(call.name) + len(call.arguments_json.encode()) for call in message.tool_calls)
    if offers_tools(request):
        size += sum(len(f"{tool.name}{tool.description}{tool.parameters_schema}".encode()) for tool in request.tools)
    return -(-size // bytes_per_token) + _MESSAGE_TOKENS * len(request.messages) + _IMAGE_TOKENS * images


def offers_tools(request: GenerationRequest) -> bool:
    return bool(request.tools) and request.tool_choice is not ToolChoiceMode.NONE


def make_call(request: GenerationRequest, running: Running) -> Call:
    """Raises ContextTooLong for what cannot fit, and Unsupported."""
    used = estimate_tokens(request, _TYPICAL if running.refuses else _DENSE)
    wanted = request.sampling.max_tokens
    if used + (wanted or 1) > running.num_ctx:
        answer = f" and {wanted} of answer" if wanted else ""
        older = "" if running.refuses else "; Ollama 0.12.6 and newer use the whole context"
        raise ContextTooLong(
            f"about {used} tokens of prompt{answer} do not fit the context of {running.num_ctx} tokens that "
            f"{running.name!r} runs with: shorten it, or raise num_ctx (memory grows with it){older}"
        )
    # Without a bound, older versions go on for ever by forgetting the beginning.
    num_predict = wanted or running.num_ctx - used
    forced = offers_tools(request) and request.tool_choice is ToolChoiceMode.REQUIRED
    body: dict[str, Any] = {
        "model": running.name,
        "stream": True,
        "keep_alive": running.keep_alive,
        "options": options(request.sampling, running, num_predict),
        **fixed_context(),
    }
    if request.prompt is not None:
        if offers_tools(request):
            raise Unsupported("tools need messages: a raw prompt has no place for them")
        body |= {"prompt": request.prompt, "raw": True}
    else:
        body["messages"] = _messages(request.messages)
        if offers_tools(request):
            body["tools"] = [_tool(tool) for tool in request.tools]
        if running.think is not None:
            body["think"] = running.think
    if forced:
        body["format"] = _one_call(request)
    elif request.json_schema is not None:
        body["format"] = _parsed(request.json_schema, "the JSON schema")
    elif request.json_object:
        body["format"] = "json"
    if request.sampling.logprobs:
        body |= {"logprobs": True, "top_logprobs": request.sampling.top_logprobs}
    return Call("/api/generate" if request.prompt is not None else "/api/chat", body, num_predict, forced)


def fixed_context() -> dict[str, Any]:
    """Refuse a prompt that is too long, and end an answer that is, instead of forgetting the beginning.

    Ollama loads a model anew when this changes, so that loading must ask for it too.
    """
    return {"truncate": False, "shift": False}


def load_body(running: Running, keep_alive: str | float | None = None) -> dict[str, Any]:
    """An empty prompt only loads; with keep_alive 0 it unloads."""
    return {
        "model": running.name,
        "prompt": "",
        "stream": False,
        "keep_alive": running.keep_alive if keep_alive is None else keep_alive,
        "options": {"num_ctx": running.num_ctx},
        **fixed_context(),
    }


def options(sampling: Sampling, running: Running, num_predict: int) -> dict[str, Any]:
    found: dict[str, Any] = {
        "num_ctx": running.num_ctx,
        "num_predict": num_predict,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        # Ollama's seeds are signed and pass through a float on their way.
        "seed": None if sampling.seed is None else sampling.seed % (1 << 31),
        "repeat_penalty": sampling.repetition_penalty,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "stop": list(dict.fromkeys((*sampling.stop, *running.stops))) if sampling.stop else None,
    }
    return {name: value for name, value in found.items() if value is not None}


def own_stops(parameters: str | None) -> tuple[str, ...]:
    """Stop strings in the `parameters` that Ollama shows of a model: lines such as `stop    "<|eot_id|>"`."""
    found = []
    for line in (parameters or "").splitlines():
        name, _, value = line.strip().partition(" ")
        if name != "stop":
            continue
        try:
            text = json.loads(value.strip())
        except ValueError:
            text = value.strip()
        if isinstance(text, str) and text:
            found.append(text)
    return tuple(found)


def _messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    names: dict[str, str] = {}
    found = []
    for message in messages:
        one: dict[str, Any] = {"role": _ROLES[message.role], "content": message.text}
        if images := [base64.b64encode(part.data).decode() for part in message.content if isinstance(part, Image)]:
            one["images"] = images
        if message.tool_calls:
            one["tool_calls"] = [
                {"id": call.id, "function": {"name": call.name, "arguments": _arguments(call.arguments_json)}}
                for call in message.tool_calls
            ]
            names |= {call.id: call.name for call in message.tool_calls}
        if message.tool_call_id:
            one |= {"tool_call_id": message.tool_call_id, "tool_name": names.get(message.tool_call_id, message.name)}
        found.append(one)
    return found


def _arguments(text: str) -> dict[str, Any]:
    parsed = _parsed(text or "{}", "the arguments of a tool call")
    if not isinstance(parsed, dict):
        raise Unsupported("the arguments of a tool call must be a JSON object")
    return parsed


def _tool(tool: Tool) -> dict[str, Any]:
    function = {"name": tool.name, "description": tool.description, "parameters": _parameters(tool)}
    return {"type": "function", "function": function}


def _parameters(tool: Tool) -> dict[str, Any]:
    schema = _parsed(tool.parameters_schema or "{}", f"the schema of tool {tool.name!r}")
    if not isinstance(schema, dict):
        raise Unsupported(f"the schema of tool {tool.name!r} must be an object")
    return {"type": "object", "properties": {}, **schema}


def _one_call(request: GenerationRequest) -> dict[str, Any]:
    """JSON Schema of a call. Ollama cannot be told to call a tool, but what it writes can be constrained."""
    shared: dict[str, Any] = {}
    calls = []
    for tool in request.tools:
        if request.tool_name and tool.name != request.tool_name:
            continue
        parameters = _parameters(tool)
        shared |= parameters.pop("$defs", {})  # references into it count from the root
        calls.append(
            {
                "type": "object",
                "properties": {"name": {"type": "string", "enum": [tool.name]}, "arguments": parameters},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    schema = calls[0] if len(calls) == 1 else {"anyOf": calls}
    return schema | ({"$defs": shared} if shared else {})


def _parsed(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        raise Unsupported(f"{what} is not valid JSON") from None


# ----------------------------------------------------------------- answers ---


class _Top(msgspec.Struct):
    token: str = ""
    logprob: float = 0.0


class _Logprob(_Top):
    top_logprobs: list[_Top] | None = None


class _Function(msgspec.Struct):
    name: str
    arguments: dict[str, Any] | None = None


class _ToolCall(msgspec.Struct):
    function: _Function
    id: str = ""


class _Message(msgspec.Struct):
    content: str | None = None
    thinking: str | None = None
    tool_calls: list[_ToolCall] | None = None


class Line(msgspec.Struct):
    """One line of an answer from /api/chat or /api/generate; durations are nanoseconds."""

    message: _Message | None = None
    response: str | None = None
    thinking: str | None = None
    tool_calls: list[_ToolCall] | None = None
    done: bool = False
    done_reason: str = ""
    total_duration: int = 0
    load_duration: int = 0
    prompt_eval_count: int = 0
    prompt_eval_duration: int = 0
    eval_count: int = 0
    eval_duration: int = 0
    logprobs: list[_Logprob] | None = None

    @property
    def worked(self) -> float:
        """Seconds of prefill and decoding; 0: not told."""
        return (self.prompt_eval_duration + self.eval_duration) / 1e9

    @property
    def waited(self) -> float:
        """Seconds inside Ollama in which nothing was done for this request."""
        rest = self.total_duration - self.load_duration - self.prompt_eval_duration - self.eval_duration
        return max(0.0, rest / 1e9)


def parse_line(part: Mapping[str, Any]) -> Line:
    """Raises ValueError for what is no line of an answer."""
    return msgspec.convert(part, Line)


class Reader:
    """Reads the lines of one answer."""

    def __init__(self, call: Call, running: Running) -> None:
        self._call = call
        self._running = running
        self._text = ""
        self._calls = 0
        self._tokens = 0
        self._thoughts = 0
        self.started = False
        """Something of the answer was handed out."""

    def delta(self, line: Line) -> Delta | None:
        """What a line adds, if anything."""
        message = line.message
        text = (message.content if message else line.response) or ""
        thinking = (message.thinking if message else line.thinking) or ""
        calls = (message.tool_calls if message else line.tool_calls) or ()
        logprobs = tuple(_logprob(entry) for entry in line.logprobs or ())
        if self._call.forced:
            # Some templates make Ollama recognise the constrained text as a call by itself.
            self._text += text
            text = ""
        if not (text or thinking or calls or logprobs):
            return None
        tokens = len(logprobs) or 1
        if line.done:
            tokens = max(0, min(tokens, line.eval_count - self._tokens))
        self._tokens += tokens
        self._thoughts += tokens if thinking else 0
        self.started = True
        return Delta(
            text=text,
            tokens=tokens,
            logprobs=logprobs if self._call.body.get("logprobs") else (),
            tool_calls=tuple(self._tool_call(call.function, call.id) for call in calls),
            reasoning_text=thinking,
        )

    def finish(self, line: Line, queued: float) -> Finished:
        """The end; `queued` is seconds. Raises ContextTooLong and EngineFailed."""
        # What was cut off to fit fills the context to the brim, or leaves room for the one token that ends it.
        if not self._running.refuses and line.prompt_eval_count >= self._running.num_ctx - 1:
            said = (
                f"Ollama has cut the prompt down to the context of {self._running.num_ctx} tokens: shorten it, raise "
                "num_ctx, or update Ollama to 0.12.6, which can refuse instead"
            )
            raise EngineFailed(said) if self.started else ContextTooLong(said)
        last = self.delta(line)
        reason = FinishReason.STOP
        if line.done_reason == "length" or (not line.done_reason and line.eval_count >= self._call.num_predict):
            reason = FinishReason.LENGTH
        if self._call.forced and not self._calls and reason is FinishReason.STOP:
            last = Delta(tokens=max(0, line.eval_count - self._tokens), tool_calls=(self._forced_call(),))
        if self._calls and reason is FinishReason.STOP:
            reason = FinishReason.TOOL_CALLS
        usage = Usage(
            prompt_tokens=line.prompt_eval_count,
            completion_tokens=line.eval_count,
            reasoning_tokens=min(self._thoughts, line.eval_count),
        )
        return Finished(reason, usage, queued=queued, last=last)

    def _forced_call(self) -> ToolCallDelta:
        try:
            call = msgspec.json.decode(self._text, type=_Function)
        except ValueError:
            raise EngineFailed("the model did not write the tool call that it was constrained to") from None
        return self._tool_call(call, "")

    def _tool_call(self, function: _Function, call_id: str) -> ToolCallDelta:
        index = self._calls
        self._calls += 1
        return ToolCallDelta(
            index=index,
            id=call_id or f"call_{uuid.uuid4().hex[:12]}",
            name=function.name,
            arguments_json=json.dumps(function.arguments or {}),
        )


def _logprob(entry: _Logprob) -> TokenLogprob:
    top = tuple((other.token, min(other.logprob, 0.0)) for other in entry.top_logprobs or ())
    return TokenLogprob(entry.token, min(entry.logprob, 0.0), top)
