"""A stand-in for Anthropic's Messages API: its wire format over real HTTP, its refusals, its faults."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from aiohttp import web

from tests.conformance.target import Fault
from tests.standins.hosted import Asked, HostedStandIn, answer

CONTEXT = 4096
MAX_TOKENS = 2000
VERSIONS = ("2023-06-01", "2026-10-21")
MODELS = {
    # Thinks when asked to, takes forced tools.
    "claude-tiny": {"thinking_off": True, "structured": True},
    # Always thinks: cannot be forced to call a tool.
    "claude-thinker": {"thinking_off": False, "structured": True},
    "claude-old": {"thinking_off": True, "structured": False},
}
_ERRORS = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    529: "overloaded_error",
}


class _Refused(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class AnthropicStandIn(HostedStandIn):
    """Knows one key, three models, and what the API refuses."""

    def __init__(self, pace: float = 0.0, port: int = 0) -> None:
        super().__init__(pace, port)
        self.lists_models = True
        """Gateways need not."""
        self._cached: set[str] = set()

    def routes(self) -> list[web.RouteDef]:
        return [
            web.post("/v1/messages", self._messages),
            web.post("/v1/messages/count_tokens", self._count),
            web.get("/v1/models", self._models),
        ]

    def generates(self, request: web.Request) -> bool:
        return request.path == "/v1/messages"

    def error(self, status: int, fault: Fault) -> web.Response:
        headers = {} if fault.retry_after is None else {"retry-after": f"{fault.retry_after:g}"}
        return _error(status, "the fault says so", headers)

    # ------------------------------------------------------------ endpoints ---

    async def _models(self, request: web.Request) -> web.Response:
        if not self.lists_models:
            raise web.HTTPNotFound
        if refusal := self._unauthorized(request):
            return refusal
        data = [
            {
                "type": "model",
                "id": name,
                "display_name": name,
                "created_at": "2026-01-01T00:00:00Z",
                "lifecycle": "active",
                "max_input_tokens": CONTEXT,
                "max_tokens": MAX_TOKENS,
                "capabilities": {
                    "image_input": {"supported": True},
                    "structured_outputs": {"supported": able["structured"]},
                    "thinking": {
                        "supported": True,
                        "types": {
                            "adaptive": {"supported": True},
                            "enabled": {"supported": able["thinking_off"]},
                            "disabled": {"supported": able["thinking_off"]},
                        },
                    },
                },
            }
            for name, able in MODELS.items()
        ]
        return web.json_response(
            {"data": data, "has_more": False, "first_id": data[0]["id"], "last_id": data[-1]["id"]}
        )

    async def _count(self, request: web.Request) -> web.Response:
        if refusal := self._unauthorized(request):
            return refusal
        try:
            asked = _asked(request, await request.json(), counting=True)
        except _Refused as refused:
            return _error(refused.status, str(refused))
        return web.json_response({"input_tokens": asked.prompt_tokens})

    async def _messages(self, request: web.Request) -> web.StreamResponse:
        if refusal := self._unauthorized(request):
            return refusal
        body = await request.json()
        self.bodies.append(body)
        try:
            asked = _asked(request, body, counting=False)
        except _Refused as refused:
            return _error(refused.status, str(refused))
        said = answer(asked)
        response = web.StreamResponse(headers={"content-type": "text/event-stream", "request-id": "req_1"})
        await response.prepare(request)

        async def send(kind: str, **more: Any) -> None:
            event = json.dumps({"type": kind, **more}, ensure_ascii=False)
            await response.write(f"event: {kind}\ndata: {event}\n\n".encode())

        usage = self._usage(body, asked)
        message = {
            "id": "msg_1",
            "type": "message",
            "role": "assistant",
            "model": body["model"],
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": {**usage, "output_tokens": 1},
        }
        await send("message_start", message=message)
        await send("ping")
        sent = 0
        blocks: list[tuple[dict[str, Any], str, str, list[str]]] = []
        if said.thoughts:
            blocks.append(
                ({"type": "thinking", "thinking": "", "signature": ""}, "thinking_delta", "thinking", said.thoughts)
            )
        if said.text:
            blocks.append(({"type": "text", "text": ""}, "text_delta", "text", said.text))
        if said.tool:
            use = {"type": "tool_use", "id": f"toolu_{len(self.bodies)}", "name": said.tool, "input": {}}
            # As the API does: nothing at all for a call without arguments.
            pieces = [] if said.arguments == ["{}"] else ["", *said.arguments]
            blocks.append((use, "input_json_delta", "partial_json", pieces))
        for index, (block, kind, key, pieces) in enumerate(blocks):
            await send("content_block_start", index=index, content_block=block)
            for piece in pieces:
                await self.between(request, sent)
                if self.error_in_stream and sent == 2:
                    error = {"type": self.error_in_stream, "message": "the test says so"}
                    await send("error", error=error)
                    return response
                await send("content_block_delta", index=index, delta={"type": kind, key: piece})
                sent += 1
            if kind == "thinking_delta":
                signature = {"type": "signature_delta", "signature": "c2lnbmVk"}
                await send("content_block_delta", index=index, delta=signature)
            await send("content_block_stop", index=index)
        details = {"output_tokens_details": {"thinking_tokens": len(said.thoughts)}} if said.thoughts else {}
        await send(
            "message_delta",
            delta={"stop_reason": said.reason, "stop_sequence": said.stop},
            usage={**usage, "output_tokens": said.tokens, **details},
        )
        await send("message_stop")
        return response

    def _usage(self, body: dict[str, Any], asked: Asked) -> dict[str, int]:
        """The prompt in three parts, as the API tells it."""
        prompt = asked.prompt_tokens
        if not body.get("cache_control"):
            return {"input_tokens": prompt, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0}
        known = hashlib.sha256(asked.text.encode()).hexdigest()
        read = prompt - 3 if known in self._cached else 0
        self._cached.add(known)
        return {
            "input_tokens": 3,
            "cache_creation_input_tokens": prompt - 3 - read,
            "cache_read_input_tokens": read,
        }

    def _unauthorized(self, request: web.Request) -> web.Response | None:
        key = request.headers.get("x-api-key") or request.headers.get("authorization", "").removeprefix("Bearer ")
        if key != self.key:
            return _error(401, "invalid x-api-key")
        if request.headers.get("anthropic-version") not in VERSIONS:
            return _error(400, "anthropic-version: header is required")
        return None


def _error(status: int, message: str, headers: dict[str, str] | None = None) -> web.Response:
    kind = _ERRORS.get(status, "api_error")
    body = {"type": "error", "error": {"type": kind, "message": message}, "request_id": "req_1"}
    return web.json_response(body, status=status, headers=headers)


def _refuse_if(wrong: Any, message: str) -> None:
    if wrong:
        raise _Refused(400, message)


def _asked(request: web.Request, body: dict[str, Any], *, counting: bool) -> Asked:
    """Raises _Refused for what the API refuses."""
    model = MODELS.get(body["model"])
    if model is None:
        raise _Refused(404, f"model: {body['model']}")
    new = request.headers["anthropic-version"] == VERSIONS[-1]
    known = {"model", "messages", "system", "tools", "tool_choice", "thinking", "output_config"}
    if not counting:
        known |= {"max_tokens", "stop_sequences", "stream", "cache_control", "metadata"}
        known |= set() if new else {"temperature", "top_p", "top_k"}
    for key in body.keys() - known:
        _refuse_if(True, f"{key}: Extra inputs are not permitted")
    _refuse_if("temperature" in body and not 0 <= body["temperature"] <= 1, "temperature: range: 0..1")
    _refuse_if("temperature" in body and "top_p" in body, "temperature and top_p cannot both be specified")
    said: list[str] = [body["system"]] if body.get("system") else []
    last, images, results = "", 0, []
    called: set[str] = set()
    for number, message in enumerate(body["messages"]):
        role = message["role"]
        _refuse_if(role not in ("user", "assistant"), f"messages.{number}.role: unexpected")
        _refuse_if(number == 0 and role != "user", "messages: first message must use the user role")
        for block in message["content"]:
            kind = block["type"]
            if kind == "text":
                _refuse_if(not block["text"].strip(), "messages: text content blocks must contain non-whitespace text")
                said.append(block["text"])
                if role == "user":
                    last, results = block["text"], []
            elif kind == "image":
                _refuse_if(not block["source"]["media_type"].startswith("image/"), "image: media_type")
                images += 1
                said.append(hashlib.sha256(block["source"]["data"].encode()).hexdigest()[:8])
            elif kind == "tool_use":
                called.add(block["id"])
                said.append(block["name"] + json.dumps(block["input"]))
            elif kind == "tool_result":
                _refuse_if(block["tool_use_id"] not in called, "messages: tool_result without its tool_use")
                text = "".join(part.get("text", "") for part in block["content"])
                said.append(text)
                results.append(text)
            else:
                _refuse_if(True, f"messages.{number}: unknown block {kind}")
    _refuse_if(not body["messages"], "messages: at least one message is required")
    _refuse_if(body["messages"][-1]["role"] == "assistant", "messages: prefill is not supported by this model")
    tools = {tool["name"]: tool["input_schema"] for tool in body.get("tools", ())}
    _refuse_if(called and not tools, "tools: required with tool_use blocks")
    _refuse_if(any(schema.get("type") != "object" for schema in tools.values()), "tools.0.input_schema.type: object")
    choice = body.get("tool_choice", {"type": "auto"})
    forced = choice["type"] in ("any", "tool")
    thinking = body.get("thinking", {}).get("type", "")
    _refuse_if(forced and not model["thinking_off"], "tool_choice: forced tool use is not supported by this model")
    _refuse_if(thinking == "disabled" and not model["thinking_off"], "thinking: cannot be disabled on this model")
    _refuse_if(forced and thinking in ("enabled", "adaptive"), "Thinking may not be enabled when tool_choice forces")
    schema = body.get("output_config", {}).get("format", {}).get("schema")
    _refuse_if(schema is not None and not model["structured"], "output_config: not supported by this model")
    _refuse_if(schema is not None and not _strict(schema), "output_config.format.schema: additionalProperties: false")
    asked = Asked(
        text="\n".join(said),
        last=last,
        images=images,
        results=results,
        tools=tools,
        choice=choice["type"],
        tool_name=choice.get("name", ""),
        schema=schema,
        thinks=thinking in ("enabled", "adaptive"),
    )
    if counting:
        return asked
    _refuse_if("max_tokens" not in body, "max_tokens: Field required")
    _refuse_if(body["max_tokens"] > MAX_TOKENS, f"max_tokens: {body['max_tokens']} > {MAX_TOKENS}")
    stops = body.get("stop_sequences", [])
    _refuse_if(any(not stop.strip() for stop in stops), "stop_sequences: each must contain non-whitespace")
    _refuse_if(asked.prompt_tokens > CONTEXT, f"prompt is too long: {asked.prompt_tokens} tokens > {CONTEXT} maximum")
    asked.max_tokens, asked.stops = body["max_tokens"], stops
    return asked


def _strict(schema: Any) -> bool:
    if isinstance(schema, list):
        return all(_strict(one) for one in schema)
    if not isinstance(schema, dict):
        return True
    closed = schema.get("type") != "object" or schema.get("additionalProperties") is False
    return closed and all(_strict(value) for value in schema.values())
