"""An OpenAI-compatible server that answers at once: what a gateway's own cost is measured against.

    python -m tests.benchmarks.upstream

Prints a ready line with its address. A chat request gets `max_tokens` pieces of text; a stream sends
each in a chunk of its own and lets the event loop turn in between, as a server that computes would.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httptools
import msgspec

from modelyard.openai import wire
from modelyard.program.process import announce_ready, run, told_to_stop

MODEL = "instant"
_decode = msgspec.json.Decoder(wire.ChatRequest).decode
_HEAD = {"id": "chatcmpl-1", "created": 1, "model": MODEL}


def _usage(tokens: int) -> dict[str, int]:
    return {"prompt_tokens": 5, "completion_tokens": tokens, "total_tokens": tokens + 5}


def _event(**fields: object) -> bytes:
    data = b"data: " + json.dumps({**_HEAD, "object": "chat.completion.chunk", **fields}).encode() + b"\n\n"
    return b"%x\r\n%b\r\n" % (len(data), data)


_PIECE = _event(choices=[{"index": 0, "delta": {"content": " word"}, "finish_reason": None}])
_END = _event(choices=[{"index": 0, "delta": {}, "finish_reason": "stop"}])


class Connection(asyncio.Protocol):
    def __init__(self) -> None:
        self._parser = httptools.HttpRequestParser(self)
        self._body = b""
        self._url = b""
        self._streaming: asyncio.Task[None] | None = None

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_message_begin(self) -> None:
        self._body = self._url = b""

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        if not self._url.endswith(b"/chat/completions"):
            self._answer({"object": "list", "data": [{"id": MODEL, "object": "model", "created": 0, "owned_by": "x"}]})
            return
        asked = _decode(self._body)
        tokens = asked.max_completion_tokens or asked.max_tokens or 1
        if asked.stream:
            self._streaming = asyncio.ensure_future(self._stream(tokens))
            return
        message = {"role": "assistant", "content": " word" * tokens}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        self._answer({**_HEAD, "object": "chat.completion", "choices": [choice], "usage": _usage(tokens)})

    def _answer(self, body: object) -> None:
        data = json.dumps(body).encode()
        head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
        self._transport.write(head % len(data) + data)

    async def _stream(self, tokens: int) -> None:
        write = self._transport.write
        write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        for _ in range(tokens):
            write(_PIECE)
            await asyncio.sleep(0)
        write(_END + _event(choices=[], usage=_usage(tokens)) + b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")

    def connection_lost(self, error: Exception | None) -> None:
        if self._streaming is not None:
            self._streaming.cancel()


async def main() -> int:
    server = await asyncio.get_running_loop().create_server(Connection, "127.0.0.1", 0)
    told = told_to_stop()
    announce_ready("upstream", address=f"127.0.0.1:{server.sockets[0].getsockname()[1]}")
    await told
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main()))
