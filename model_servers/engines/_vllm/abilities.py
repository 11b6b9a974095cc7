"""What a model behind vLLM can do: found out by asking once, as vLLM does not tell."""

from __future__ import annotations

import base64
import struct
import zlib
from dataclasses import dataclass
from typing import Any

import msgspec

from model_servers.engine import Feature
from model_servers.engines._openai.transport import Reply, Transport
from modelyard.openai import wire

_TEXT = Feature.STREAMING | Feature.JSON | Feature.JSON_SCHEMA | Feature.LOGPROBS
_HELLO = [{"role": "user", "content": "Hello"}]
_TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
_SIDE = 64


@dataclass(frozen=True, slots=True)
class Server:
    """What holds for all models of one server."""

    generates: bool
    embeds: bool


class _Paths(msgspec.Struct):
    paths: dict[str, Any] = {}


class _Usage(msgspec.Struct):
    usage: wire.Usage | None = None


async def of_server(transport: Transport, root: str, seconds: float) -> Server:
    """A server registers the addresses of its tasks only. Raises EngineFailed."""
    reply = await transport.get(f"{root}/openapi.json", seconds)
    try:
        paths = msgspec.json.decode(reply.body, type=_Paths).paths if reply.status == 200 else {}
    except msgspec.MsgspecError:
        paths = {}
    if not paths:  # started with --disable-fastapi-docs
        return Server(generates=True, embeds=False)
    return Server("/v1/completions" in paths, "/v1/embeddings" in paths)


async def of_model(transport: Transport, root: str, server: Server, model: str, *, prefix_caching: bool) -> Feature:
    """Generates one token, with a tool and then perhaps without, and shows an image to the tokenizer.

    Raises EngineFailed.
    """
    found = Feature.EMBEDDING if server.embeds else Feature.NONE
    if not server.generates:
        return found
    found |= _TEXT
    body = {"model": model, "messages": _HELLO, "max_tokens": 1, "temperature": 0}
    reply = await _post(transport, "/chat/completions", {**body, "tools": [_TOOL], "tool_choice": "auto"})
    if reply.status == 200:
        found |= Feature.FUNCTION_CALLING
    else:
        reply = await _post(transport, "/chat/completions", body)
    if prefix_caching and _tells_cached_tokens(reply):
        found |= Feature.PREFIX_CACHE
    look = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": _image()}}]}]
    reply = await _post(transport, f"{root}/tokenize", {"model": model, "messages": look})
    return found | (Feature.VISION if reply.status == 200 else Feature.NONE)


async def _post(transport: Transport, path: str, body: dict[str, Any]) -> Reply:
    return await transport.post(path, msgspec.json.encode(body))


def _tells_cached_tokens(reply: Reply) -> bool:
    try:
        usage = msgspec.json.decode(reply.body, type=_Usage).usage
    except msgspec.MsgspecError:
        return False
    return usage is not None and usage.prompt_tokens_details is not None


def _image() -> str:
    """A black square, as a data URL; larger than the smallest image that models take."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", _SIDE, _SIDE, 8, 2, 0, 0, 0)
    pixels = zlib.compress((b"\0" * (1 + 3 * _SIDE)) * _SIDE)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
