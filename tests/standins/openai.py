"""A stand-in for OpenAI's API. Source: OpenAI API reference: chat, completions, embeddings, models, errors."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable
from typing import Any, ClassVar

import msgspec
from aiohttp import web

from model_servers.engine import (
    Delta,
    FinishReason,
    GenerationRequest,
    Image,
    Message,
    Role,
    Sampling,
    Tool,
    ToolCall,
    ToolChoiceMode,
    Unsupported,
)
from model_servers.engines.simulated.answer import Answer, compose
from model_servers.engines.simulated.cache import PrefixCache, block_keys
from model_servers.engines.simulated.text import count_tokens, embed, fingerprint, render_prompt
from modelyard.openai import wire
from tests.standins.common import Generation, Slots, StandIn

_ROLES = {
    "system": Role.SYSTEM,
    "developer": Role.SYSTEM,
    "user": Role.USER,
    "assistant": Role.ASSISTANT,
    "tool": Role.TOOL,
}
_REASONS = {
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.TOOL_CALLS: "tool_calls",
    FinishReason.CONTENT_FILTER: "content_filter",
}
_KINDS = {
    400: ("invalid_request_error", None),
    401: ("invalid_request_error", "invalid_api_key"),
    403: ("invalid_request_error", "unsupported_country_region_territory"),
    404: ("invalid_request_error", "model_not_found"),
    429: ("requests", "rate_limit_exceeded"),
    500: ("server_error", None),
    503: ("server_error", None),
}
LONG_ANSWER = 600
"""Tokens, for whoever asks to count to 1000."""


class Refused(Exception):
    """An answer with an error instead of what was asked for."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code


class OpenAIStandIn(StandIn):
    """One chat model, one for embeddings."""

    model = "gpt-stand-in"
    embedding_model = "text-embedding-stand-in"
    key = "sk-stand-in-0123456789"
    owner = "openai"
    path = "/v1"
    least_cached: ClassVar[int] = 1024
    cache_block: ClassVar[int] = 128
    most_stops: ClassVar[int] = 4
    unknown_arguments: ClassVar[tuple[str, ...]] = ("top_k", "min_p", "repetition_penalty", "guided_json")
    answers_raw_prompts: ClassVar[bool] = False

    def __init__(self, *, context_length: int = 4096, token_seconds: float = 0.0, slots: int = 64) -> None:
        super().__init__(token_seconds=token_seconds)
        self.context_length = context_length
        self.refuses: str | None = None
        """A word: whoever writes it is refused for its content."""
        self.breaks_after: int | None = None
        """Pieces after which an error object comes in the stream."""
        self.slots = Slots(slots)
        self.cache = PrefixCache(4096)
        self._count = 0

    # -------------------------------------------------------------- routes ---

    def add_routes(self, router: web.UrlDispatcher) -> None:
        router.add_get(f"{self.path}/models", self._told(self.models))
        router.add_post(f"{self.path}/chat/completions", self._told(self.chat))
        router.add_post(f"{self.path}/completions", self._told(self.completions))
        router.add_post(f"{self.path}/embeddings", self._told(self.embeddings))

    def _told(self, handler: Callable[[web.Request], Any]) -> Callable[[web.Request], Any]:
        async def answer(request: web.Request) -> web.StreamResponse:
            try:
                self.check_key(request)
                return await handler(request)
            except Refused as refused:
                return self.error(refused.status, refused.message, refused.param, refused.code)

        return answer

    def check_key(self, request: web.Request) -> None:
        sent = request.headers.get("Authorization", "")
        if sent != f"Bearer {self.key}":
            shown = sent.removeprefix("Bearer ")
            # OpenAI really repeats a part of the key.
            raise Refused(401, f"Incorrect API key provided: {shown[:8]}***{shown[-4:]}.", code="invalid_api_key")

    def error(self, status: int, message: str, param: str | None = None, code: str | None = None) -> web.Response:
        kind, usual = _KINDS.get(status, ("server_error" if status >= 500 else "invalid_request_error", None))
        error = {"message": message, "type": kind, "param": param, "code": code or usual}
        return web.json_response({"error": error}, status=status)

    def error_answer(self, status: int) -> web.Response:
        return self.error(status, "The stand-in was told to fail.")

    def listed(self) -> list[dict[str, Any]]:
        return [
            {"id": name, "object": "model", "created": 1, "owned_by": self.owner}
            for name in (self.model, self.embedding_model, "whisper-1")
        ]

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": self.listed()})

    # ---------------------------------------------------------- generating ---

    async def chat(self, request: web.Request) -> web.StreamResponse:
        body = await self.body(request, wire.ChatRequest)
        self.check_model(body.model)
        self.check_chat(body)
        asked = _request_of_chat(body)
        return await self.generate(request, body, asked, _ChatShape(body, self))

    async def completions(self, request: web.Request) -> web.StreamResponse:
        body = await self.body(request, wire.CompletionRequest)
        self.check_model(body.model)
        if not self.answers_raw_prompts:
            raise Refused(404, "This is a chat model and not supported in the v1/completions endpoint.", param="model")
        asked = GenerationRequest(
            body.model,
            prompt=str(body.prompt),
            sampling=_sampling(body, body.max_tokens, body.logprobs is not None, body.logprobs or 0),
            **_format(body.response_format),
        )
        return await self.generate(request, body, asked, _CompletionShape(body, self))

    async def generate(
        self, request: web.Request, body: Any, asked: GenerationRequest, shape: _ChatShape | _CompletionShape
    ) -> web.StreamResponse:
        prompt = render_prompt(asked)
        tokens = count_tokens(prompt)
        self.check_room(tokens, asked.sampling.max_tokens)
        if self.refuses and self.refuses in prompt:
            raise Refused(400, "Your request was rejected by the safety system.", code="content_policy_violation")
        hot = asked.sampling.temperature is None or asked.sampling.temperature > 0
        number = fingerprint(prompt, 0, asked.sampling.seed if hot else None)
        try:
            answer = compose(
                asked,
                number,
                0,
                LONG_ANSWER if "1000" in prompt else 0,
                asked.sampling.max_tokens or self.context_length - tokens,
            )
        except Unsupported as error:
            raise Refused(400, f"Invalid schema for response_format: {error}", param="response_format") from None
        keys = block_keys(body.model, prompt, self.cache_block)
        cached = min(self.cache.match(keys) * self.cache_block, (tokens - 1) // self.cache_block * self.cache_block)
        self.cache.insert(keys)
        shape.usage = self.usage(tokens, cached if tokens >= self.least_cached else 0, answer)
        async with self.generating(body, answer) as generation, self.slots.hold():
            if body.stream:
                return await self._stream(request, answer, generation, shape)
            while generation.generated < answer.tokens:
                await self.pace()
                generation.generated += 1
            return web.json_response(shape.whole(answer))

    async def _stream(
        self, request: web.Request, answer: Answer, generation: Generation, shape: _ChatShape | _CompletionShape
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        for chunk in shape.opening():
            await _event(response, chunk)
        while generation.generated < answer.tokens:
            await self.check_piece(request, generation.generated)
            if self.breaks_after is not None and generation.generated >= self.breaks_after:
                error = {"message": "The server had an error.", "type": "server_error", "param": None, "code": None}
                await _event(response, {"error": error})
                await response.write_eof()
                return response
            await self.pace()
            piece = answer.piece(generation.generated, 1)
            generation.generated += 1
            await _event(response, shape.piece(piece, generation.generated))
        for chunk in shape.closing(answer):
            await _event(response, chunk)
        await response.write(b"data: [DONE]\n\n")
        await response.write_eof()
        return response

    def usage(self, prompt_tokens: int, cached: int, answer: Answer) -> dict[str, Any]:
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": answer.tokens,
            "total_tokens": prompt_tokens + answer.tokens,
            "prompt_tokens_details": {"cached_tokens": cached, "audio_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": 0, "audio_tokens": 0},
        }

    def new_id(self, kind: str) -> str:
        self._count += 1
        return f"{kind}-{self._count:08d}"

    # -------------------------------------------------------------- checks ---

    async def body(self, request: web.Request, kind: type[Any]) -> Any:
        raw = await request.read()
        try:
            found = msgspec.json.decode(raw, type=kind)
            names = set(json.loads(raw))
        except (msgspec.MsgspecError, ValueError) as error:
            raise Refused(400, f"We could not parse the JSON body of your request: {error}") from None
        for name in self.unknown_arguments:
            if name in names:
                raise Refused(400, f"Unrecognized request argument supplied: {name}")
        if len(getattr(found, "stop", None) or ()) > self.most_stops:
            raise Refused(400, "Invalid 'stop': array too long.", param="stop", code="array_above_max_length")
        return found

    def check_model(self, name: str, *, embeds: bool = False) -> None:
        if name != (self.embedding_model if embeds else self.model):
            message = f"The model `{name}` does not exist or you do not have access to it."
            raise Refused(404, message, code="model_not_found")

    def check_chat(self, body: wire.ChatRequest) -> None:
        if body.response_format is not None:
            if body.response_format.type == "json_object" and not any(
                "json" in _text_of(message).lower() for message in body.messages
            ):
                message = "'messages' must contain the word 'json' in some form, to use 'response_format'"
                raise Refused(400, f"{message} of type 'json_object'.", param="messages")
            given = body.response_format.json_schema
            if given is not None and (given.schema or {}).get("type") != "object":
                message = f"Invalid schema for response_format '{given.name}': schema must be of type 'object'."
                raise Refused(400, message, param="response_format", code="invalid_json_schema")
            if given is not None and given.strict:
                _check_strict(given.schema, f"response_format '{given.name}'")
        for tool in body.tools or ():
            if tool.function is not None and tool.function.strict:
                _check_strict(tool.function.parameters, f"function '{tool.function.name}'")
        if body.tool_choice is not None and not body.tools:
            raise Refused(400, "'tool_choice' is only allowed when 'tools' are specified.", param="tool_choice")

    def check_room(self, tokens: int, max_tokens: int | None) -> None:
        if tokens + (max_tokens or 1) > self.context_length:
            raise Refused(
                400,
                f"This model's maximum context length is {self.context_length} tokens. However, you requested "
                f"{tokens + (max_tokens or 0)} tokens. Please reduce the length of the messages or completion.",
                param="messages",
                code="context_length_exceeded",
            )

    # ---------------------------------------------------------- embeddings ---

    async def embeddings(self, request: web.Request) -> web.Response:
        body = await self.body(request, wire.EmbeddingRequest)
        self.check_model(body.model, embeds=True)
        inputs = [body.input] if isinstance(body.input, str) else body.input
        if not 1 <= len(inputs) <= 2048:
            raise Refused(400, "'$.input' is invalid.", param="input")
        tokens = [count_tokens(str(text)) for text in inputs]
        if max(tokens) > self.context_length:
            self.check_room(max(tokens), 0)
        vectors = [embed(str(text), body.dimensions or 32, body.model) for text in inputs]
        data = [
            {"object": "embedding", "index": n, "embedding": _encoded(vector, body.encoding_format)}
            for n, vector in enumerate(vectors)
        ]
        usage = {"prompt_tokens": sum(tokens), "total_tokens": sum(tokens)}
        # OpenAI numbers the entries; in which order they come is not promised.
        return web.json_response({"object": "list", "data": data[::-1], "model": body.model, "usage": usage})


class _ChatShape:
    """What an answer of /chat/completions looks like."""

    object, kind = "chat.completion", "chatcmpl"

    def __init__(self, body: wire.ChatRequest, standin: OpenAIStandIn) -> None:
        self.body, self.standin = body, standin
        self.id = standin.new_id(self.kind)
        self.usage: dict[str, Any] = {}

    def opening(self) -> list[dict[str, Any]]:
        return [self.chunk({"role": "assistant", "content": "", "refusal": None}, 0)]

    def piece(self, delta: Delta, generated: int) -> dict[str, Any]:
        said: dict[str, Any] = {"content": delta.text}
        if delta.tool_calls:
            said = {"tool_calls": [self.call(call) for call in delta.tool_calls]}
        return self.chunk(said, generated, logprobs=self.logprobs(delta))

    def call(self, call: Any) -> dict[str, Any]:
        if call.name:
            function = {"name": call.name, "arguments": call.arguments_json}
            return {"index": call.index, "id": call.id, "type": "function", "function": function}
        return {"index": call.index, "function": {"arguments": call.arguments_json}}

    def closing(self, answer: Answer) -> list[dict[str, Any]]:
        chunks = [self.chunk({}, answer.tokens, reason=self.reason(answer))]
        if self.includes_usage:
            chunks.append({**self.frame(), "choices": [], "usage": self.usage})
        return chunks

    def reason(self, answer: Answer) -> str:
        named = isinstance(self.body.tool_choice, wire.NamedToolChoice)
        # OpenAI and vLLM alike say "stop" after a call that was asked for by name.
        return "stop" if answer.tool and named else _REASONS[answer.finish_reason]

    @property
    def includes_usage(self) -> bool:
        options = self.body.stream_options
        return options is not None and bool(options.include_usage)

    def frame(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": f"{self.object}.chunk",
            "created": int(time.time()),
            "model": self.body.model,
            "system_fingerprint": "fp_stand_in",
        }

    def chunk(
        self, delta: dict[str, Any], generated: int, *, reason: str | None = None, logprobs: Any = None
    ) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return {**self.frame(), "choices": [choice], **self.so_far(generated)}

    def so_far(self, generated: int) -> dict[str, Any]:
        if not self.includes_usage:
            return {}
        if self.body.stream_options.continuous_usage_stats and self.standin.owner == "vllm":
            prompt = self.usage["prompt_tokens"]
            total = prompt + generated
            return {"usage": {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": total}}
        return {"usage": None}

    def logprobs(self, delta: Delta) -> dict[str, Any] | None:
        if not self.body.logprobs:
            return None
        return {
            "content": [
                {
                    "token": entry.token,
                    "logprob": entry.logprob,
                    "bytes": list(entry.token.encode()),
                    "top_logprobs": [
                        {"token": token, "logprob": value, "bytes": list(token.encode())} for token, value in entry.top
                    ],
                }
                for entry in delta.logprobs
            ],
            "refusal": None,
        }

    def whole(self, answer: Answer) -> dict[str, Any]:
        piece = answer.piece(0, answer.tokens)
        calls = [{key: value for key, value in self.call(c).items() if key != "index"} for c in piece.tool_calls]
        message = {"role": "assistant", "content": None if calls else piece.text, "refusal": None}
        choice = {
            "index": 0,
            "message": {**message, "tool_calls": calls} if calls else message,
            "logprobs": self.logprobs(piece),
            "finish_reason": self.reason(answer),
        }
        return {**self.frame(), "object": self.object, "choices": [choice], "usage": self.usage}


class _CompletionShape(_ChatShape):
    """What an answer of /completions looks like."""

    object, kind = "text_completion", "cmpl"
    body: Any

    def opening(self) -> list[dict[str, Any]]:
        return []

    def frame(self) -> dict[str, Any]:
        return {**super().frame(), "object": self.object}

    def piece(self, delta: Delta, generated: int) -> dict[str, Any]:
        return self.text(delta.text, None, self.logprobs(delta), generated)

    def closing(self, answer: Answer) -> list[dict[str, Any]]:
        chunks = [self.text("", _REASONS[answer.finish_reason], None, answer.tokens)]
        if self.includes_usage:
            chunks.append({**self.frame(), "choices": [], "usage": self.usage})
        return chunks

    def text(self, text: str, reason: str | None, logprobs: Any, generated: int) -> dict[str, Any]:
        choice = {"index": 0, "text": text, "logprobs": logprobs, "finish_reason": reason}
        return {**self.frame(), "choices": [choice], **self.so_far(generated)}

    def logprobs(self, delta: Delta) -> dict[str, Any] | None:
        if self.body.logprobs is None:
            return None
        return {
            "tokens": [entry.token for entry in delta.logprobs],
            "token_logprobs": [entry.logprob for entry in delta.logprobs],
            # The token itself is always among them.
            "top_logprobs": [{**dict(entry.top), entry.token: entry.logprob} for entry in delta.logprobs],
            "text_offset": [0 for _ in delta.logprobs],
        }

    def whole(self, answer: Answer) -> dict[str, Any]:
        piece = answer.piece(0, answer.tokens)
        chunk = self.text(piece.text, _REASONS[answer.finish_reason], self.logprobs(piece), answer.tokens)
        return {**chunk, "usage": self.usage}


async def _event(response: web.StreamResponse, chunk: dict[str, Any]) -> None:
    await response.write(b"data: " + json.dumps(chunk, ensure_ascii=False).encode() + b"\n\n")


def _encoded(vector: list[float], form: str | None) -> Any:
    if form != "base64":
        return vector
    import numpy

    return base64.b64encode(numpy.asarray(vector, dtype="<f4").tobytes()).decode()


def _text_of(message: wire.ChatMessage) -> str:
    if isinstance(message.content, list):
        return "".join(part.text or "" for part in message.content)
    return message.content or ""


def _request_of_chat(body: wire.ChatRequest) -> GenerationRequest:
    choice, name = ToolChoiceMode.AUTO, ""
    if isinstance(body.tool_choice, wire.NamedToolChoice):
        choice, name = ToolChoiceMode.REQUIRED, body.tool_choice.function.name
    elif body.tool_choice == "required":
        choice = ToolChoiceMode.REQUIRED
    elif body.tool_choice == "none":
        choice = ToolChoiceMode.NONE
    functions = [tool.function for tool in body.tools or () if tool.function is not None]
    limit = body.max_completion_tokens or body.max_tokens
    return GenerationRequest(
        body.model,
        messages=tuple(map(_message, body.messages)),
        sampling=_sampling(body, limit, bool(body.logprobs), body.top_logprobs or 0),
        tools=tuple(
            Tool(each.name, each.description or "", json.dumps(each.parameters or {"type": "object"}))
            for each in functions
        ),
        tool_choice=choice,
        tool_name=name,
        **_format(body.response_format),
    )


def _sampling(body: Any, limit: int | None, logprobs: bool, top: int) -> Sampling:
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    return Sampling(
        max_tokens=limit,
        temperature=body.temperature,
        stop=tuple(stop),
        seed=body.seed,
        logprobs=logprobs,
        top_logprobs=top,
    )


def _format(given: wire.ResponseFormat | None) -> dict[str, Any]:
    if given is None or given.type == "text":
        return {}
    if given.json_schema is not None:
        return {"json_schema": json.dumps(given.json_schema.schema)}
    return {"json_object": True}


def _message(message: wire.ChatMessage) -> Message:
    if (message.role or "") not in _ROLES:
        raise Refused(400, f"Invalid value: '{message.role}'.", param="messages[0].role")
    parts: list[str | Image] = []
    for part in message.content if isinstance(message.content, list) else []:
        if part.image_url is not None:
            head, _, data = part.image_url.url.partition(";base64,")
            if not head.startswith("data:image/"):
                raise Refused(400, "Invalid image data.", param="messages", code="invalid_image_format")
            parts.append(Image(base64.b64decode(data, validate=True), head.removeprefix("data:")))
        else:
            parts.append(part.text or "")
    if isinstance(message.content, str):
        parts = [message.content]
    calls = tuple(
        ToolCall(call.id or "", call.function.name or "", call.function.arguments or "")
        for call in message.tool_calls or ()
        if call.function is not None
    )
    return Message(_ROLES[message.role or ""], tuple(parts), calls, message.tool_call_id or "", message.name or "")


def _check_strict(schema: Any, where: str) -> None:
    """What OpenAI asks of schemas with strict: every object closed, every property required."""
    if isinstance(schema, list):
        for each in schema:
            _check_strict(each, where)
    if not isinstance(schema, dict):
        return
    if schema.get("type") == "object":
        if schema.get("additionalProperties") is not False:
            message = f"Invalid schema for {where}: 'additionalProperties' is required to be supplied and to be false."
            raise Refused(400, message, code="invalid_json_schema")
        if set(schema.get("required", ())) != set(schema.get("properties", {})):
            message = f"Invalid schema for {where}: 'required' must include every key in properties."
            raise Refused(400, message, code="invalid_json_schema")
    for key, value in schema.items():
        if key not in ("enum", "const"):
            _check_strict(value, where)
