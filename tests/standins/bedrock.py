"""A stand-in for Amazon Bedrock's runtime API: its binary event stream over real HTTP, its refusals, its faults."""

from __future__ import annotations

import base64
import hashlib
import json
import random
import struct
import zlib
from typing import Any
from urllib.parse import unquote

from aiohttp import web

from tests.conformance.target import Fault
from tests.standins.hosted import Asked, HostedStandIn, Said, answer, tokens_of

CONTEXT = 4096
EMBEDDING_CONTEXT = 512
CHAT_MODELS = ("anthropic.claude-tiny-v1:0", "amazon.nova-tiny-v1:0")
COUNTING_MODELS = CHAT_MODELS[:1]
TITAN = "amazon.titan-embed-text-v2:0"
COHERE = "cohere.embed-multilingual-v3"
_CODES = {
    400: "ValidationException",
    401: "UnrecognizedClientException",
    403: "AccessDeniedException",
    404: "ResourceNotFoundException",
    408: "ModelTimeoutException",
    424: "ModelErrorException",
    429: "ThrottlingException",
    500: "InternalServerException",
    503: "ServiceUnavailableException",
}
_REASONS = {"refusal": "guardrail_intervened"}


class _Refused(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class BedrockStandIn(HostedStandIn):
    """Knows one access key, two chat models, two that embed, and what the API refuses."""

    def __init__(self, pace: float = 0.0, port: int = 0) -> None:
        super().__init__(pace, port)
        self.key = "AKIATEST"
        self.permitted = True
        """Whether the account may list asynchronous invocations."""
        self._cached: set[str] = set()

    def routes(self) -> list[web.RouteDef]:
        return [
            web.post("/model/{model}/converse-stream", self._converse_stream),
            web.post("/model/{model}/converse", self._converse),
            web.post("/model/{model}/count-tokens", self._count),
            web.post("/model/{model}/invoke", self._invoke),
            web.get("/async-invoke", self._list),
        ]

    def generates(self, request: web.Request) -> bool:
        return request.path.endswith(("/converse", "/converse-stream", "/invoke"))

    def error(self, status: int, fault: Fault) -> web.Response:
        headers = {} if fault.retry_after is None else {"retry-after": f"{fault.retry_after:g}"}
        return _error(status, "the fault says so", headers)

    # ------------------------------------------------------------ endpoints ---

    async def _list(self, request: web.Request) -> web.Response:
        if refusal := self._unauthorized(request):
            return refusal
        if not self.permitted:
            return _error(403, "User: arn:aws:iam::1:user/u is not authorized to perform: bedrock:ListAsyncInvokes")
        return web.json_response({"asyncInvokeSummaries": []})

    async def _count(self, request: web.Request) -> web.Response:
        if refusal := self._unauthorized(request):
            return refusal
        model = unquote(request.match_info["model"])
        if model not in COUNTING_MODELS:
            return _error(400, "The provided model doesn't support counting tokens.")
        try:
            asked = _asked(model, (await request.json())["input"]["converse"])
        except _Refused as refused:
            return _error(refused.status, str(refused))
        return web.json_response({"inputTokens": asked.prompt_tokens})

    async def _invoke(self, request: web.Request) -> web.Response:
        if refusal := self._unauthorized(request):
            return refusal
        model = unquote(request.match_info["model"])
        body = await request.json()
        if model == TITAN:
            texts = [body["inputText"]]
        elif model == COHERE:
            texts = body["texts"]
            if not 1 <= len(texts) <= 96 or body["input_type"] != "search_document":
                return _error(400, "Malformed input request")
        else:
            return _error(400, "The provided model identifier is invalid.")
        counted = [len(tokens_of(text)) for text in texts]
        if max(counted) > EMBEDDING_CONTEXT:
            return _error(
                400,
                f"Too many input tokens. Max input tokens: {EMBEDDING_CONTEXT}, request input tokens: {max(counted)}",
            )
        vectors = [_vector(text) for text in texts]
        headers = {"x-amzn-bedrock-input-token-count": str(sum(counted))}
        if model == TITAN:
            return web.json_response({"embedding": vectors[0], "inputTextTokenCount": counted[0]}, headers=headers)
        return web.json_response({"embeddings": {"float": vectors}, "id": "1", "texts": texts}, headers=headers)

    async def _ask(self, request: web.Request) -> tuple[dict[str, Any], Asked, Said]:
        model = unquote(request.match_info["model"])
        body = await request.json()
        self.bodies.append(body)
        asked = _asked(model, body)
        if asked.prompt_tokens > CONTEXT:
            raise _Refused(400, f"prompt is too long: {asked.prompt_tokens} tokens > {CONTEXT} maximum")
        return body, asked, answer(asked)

    async def _converse(self, request: web.Request) -> web.Response:
        if refusal := self._unauthorized(request):
            return refusal
        try:
            body, asked, said = await self._ask(request)
        except _Refused as refused:
            return _error(refused.status, str(refused))
        content: list[dict[str, Any]] = []
        if said.text:
            content.append({"text": "".join(said.text)})
        if said.tool:
            use = {"toolUseId": "tooluse_1", "name": said.tool, "input": json.loads("".join(said.arguments))}
            content.append({"toolUse": use})
        return web.json_response(
            {
                "output": {"message": {"role": "assistant", "content": content}},
                "stopReason": _REASONS.get(said.reason, said.reason),
                "usage": self._usage(body, asked, said),
                "metrics": {"latencyMs": 1},
            }
        )

    async def _converse_stream(self, request: web.Request) -> web.StreamResponse:
        if refusal := self._unauthorized(request):
            return refusal
        try:
            body, asked, said = await self._ask(request)
        except _Refused as refused:
            return _error(refused.status, str(refused))
        response = web.StreamResponse(headers={"content-type": "application/vnd.amazon.eventstream"})
        await response.prepare(request)

        async def send(kind: str, **more: Any) -> None:
            await response.write(frame({":message-type": "event", ":event-type": kind}, {**more, "p": "abcdefgh"}))

        await send("messageStart", role="assistant")
        blocks: list[tuple[list[dict[str, Any]], dict[str, Any] | None]] = []
        if said.thoughts:
            thoughts = [{"reasoningContent": {"text": piece}} for piece in said.thoughts]
            blocks.append(([*thoughts, {"reasoningContent": {"signature": "c2lnbmVk"}}], None))
        if said.text:
            blocks.append(([{"text": piece} for piece in said.text], None))
        if said.tool:
            pieces = [] if said.arguments == ["{}"] else ["", *said.arguments]
            use = {"toolUse": {"toolUseId": f"tooluse_{len(self.bodies)}", "name": said.tool}}
            blocks.append(([{"toolUse": {"input": piece}} for piece in pieces], use))
        sent = 0
        for index, (deltas, start) in enumerate(blocks):
            if start is not None:
                await send("contentBlockStart", start=start, contentBlockIndex=index)
            for delta in deltas:
                await self.between(request, sent)
                if self.error_in_stream and sent == 2:
                    kind = self.error_in_stream
                    headers = {":message-type": "exception", ":exception-type": kind}
                    await response.write(frame(headers, {"message": "the test says so"}))
                    return response
                await send("contentBlockDelta", delta=delta, contentBlockIndex=index)
                sent += 1
            await send("contentBlockStop", contentBlockIndex=index)
        await send("messageStop", stopReason=_REASONS.get(said.reason, said.reason))
        await send("metadata", usage=self._usage(body, asked, said), metrics={"latencyMs": 1})
        return response

    def _usage(self, body: dict[str, Any], asked: Asked, said: Said) -> dict[str, int]:
        """Prompt tokens without those that were cached or are being written to the cache."""
        prompt, read, written = asked.prompt_tokens, 0, 0
        if any("cachePoint" in block for message in body["messages"] for block in message["content"]):
            known = hashlib.sha256(asked.text.encode()).hexdigest()
            read, written = (prompt - 3, 0) if known in self._cached else (0, prompt - 3)
            self._cached.add(known)
        return {
            "inputTokens": prompt - read - written,
            "outputTokens": said.tokens,
            "totalTokens": prompt + said.tokens,
            "cacheReadInputTokens": read,
            "cacheWriteInputTokens": written,
        }

    def _unauthorized(self, request: web.Request) -> web.Response | None:
        given = request.headers.get("authorization", "")
        if not given.startswith("AWS4-HMAC-SHA256 "):
            return _error(403, "Missing Authentication Token", code="MissingAuthenticationTokenException")
        if f"Credential={self.key}/" not in given or "Signature=" not in given or "/bedrock/aws4_request" not in given:
            message = "The security token included in the request is invalid."
            return _error(403, message, code="UnrecognizedClientException")
        return None


def frame(headers: dict[str, str], payload: dict[str, Any]) -> bytes:
    """A message of the encoding application/vnd.amazon.eventstream: lengths, checksum, headers, payload, checksum."""
    encoded = b""
    for name, value in {**headers, ":content-type": "application/json"}.items():
        raw = value.encode()
        encoded += struct.pack("!B", len(name)) + name.encode() + struct.pack("!BH", 7, len(raw)) + raw
    body = json.dumps(payload, ensure_ascii=False).encode()
    prelude = struct.pack("!II", 12 + len(encoded) + len(body) + 4, len(encoded))
    message = prelude + struct.pack("!I", zlib.crc32(prelude)) + encoded + body
    return message + struct.pack("!I", zlib.crc32(message))


def _error(status: int, message: str, headers: dict[str, str] | None = None, code: str = "") -> web.Response:
    code = code or _CODES.get(status, "InternalServerException")
    return web.json_response(
        {"message": message}, status=status, headers={"x-amzn-errortype": f"{code}:http://x/", **(headers or {})}
    )


def _vector(text: str) -> list[float]:
    drawn = random.Random(hashlib.sha256(text.encode()).digest())
    return [drawn.uniform(-1, 1) for _ in range(16)]


def _refuse_if(wrong: Any, message: str) -> None:
    if wrong:
        raise _Refused(400, message)


def _asked(model: str, body: dict[str, Any]) -> Asked:
    """Raises _Refused for what the API refuses."""
    _refuse_if(model not in CHAT_MODELS, "The provided model identifier is invalid.")
    said = [block["text"] for block in body.get("system", ())]
    last, images, results = "", 0, []
    called: set[str] = set()
    before = ""
    for number, message in enumerate(body["messages"]):
        role = message["role"]
        _refuse_if(number == 0 and role != "user", "A conversation must start with a user message.")
        _refuse_if(role == before, "A conversation must alternate between user and assistant roles.")
        before = role
        for block in message["content"]:
            if "text" in block:
                _refuse_if(not block["text"].strip(), f"The text field in messages.{number} is blank.")
                said.append(block["text"])
                if role == "user":
                    last, results = block["text"], []
            elif "image" in block:
                _refuse_if(block["image"]["format"] not in ("png", "jpeg", "gif", "webp"), "image format")
                _refuse_if(not base64.b64decode(block["image"]["source"]["bytes"]), "image bytes")
                images += 1
                said.append(hashlib.sha256(block["image"]["source"]["bytes"].encode()).hexdigest()[:8])
            elif "toolUse" in block:
                called.add(block["toolUse"]["toolUseId"])
                said.append(block["toolUse"]["name"] + json.dumps(block["toolUse"]["input"]))
            elif "toolResult" in block:
                result = block["toolResult"]
                _refuse_if(result["toolUseId"] not in called, "toolResult without its toolUse")
                text = "".join(part.get("text", "") for part in result["content"])
                _refuse_if(not text.strip(), "The text field of a toolResult is blank.")
                said.append(text)
                results.append(text)
            else:
                _refuse_if("cachePoint" not in block, f"messages.{number}: unknown block")
    _refuse_if(before != "user", "The model returned the following errors: prefill is not supported.")
    config = body.get("toolConfig", {})
    specs = [tool["toolSpec"] for tool in config.get("tools", ())]
    tools = {spec["name"]: spec["inputSchema"]["json"] for spec in specs}
    _refuse_if(called and not tools, "The toolConfig field must be defined when using toolUse and toolResult blocks.")
    _refuse_if(any(spec.get("description") == "" for spec in specs), "toolSpec.description: min length: 1")
    _refuse_if(any(schema.get("type") != "object" for schema in tools.values()), "inputSchema.json.type: object")
    (choice,) = config.get("toolChoice", {"auto": {}})
    inference = body.get("inferenceConfig", {})
    fields = body.get("additionalModelRequestFields", {})
    own = {"top_k", "thinking"} if model.startswith("anthropic.") else {"inferenceConfig"}
    _refuse_if(fields.keys() - own, f"extraneous key {sorted(fields.keys() - own)} is not permitted")
    _refuse_if(not 0 <= inference.get("temperature", 0) <= 1, "temperature: range: 0..1")
    stops = inference.get("stopSequences", [])
    _refuse_if(any(not stop.strip() for stop in stops), "stopSequences: each must contain non-whitespace")
    thinking = fields.get("thinking", {}).get("type", "")
    _refuse_if(thinking and choice != "auto", "Thinking may not be enabled when tool_choice forces tool use.")
    schema = None
    if "outputConfig" in body:
        schema = json.loads(body["outputConfig"]["textFormat"]["structure"]["jsonSchema"]["schema"])
        _refuse_if(schema.get("additionalProperties") is not False, "additionalProperties must be false")
    return Asked(
        text="\n".join(said),
        last=last,
        images=images,
        results=results,
        tools=tools,
        choice=choice,
        tool_name=config.get("toolChoice", {}).get("tool", {}).get("name", ""),
        max_tokens=inference.get("maxTokens"),
        stops=stops,
        schema=schema,
        thinks=bool(thinking),
    )
