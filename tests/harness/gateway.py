"""A control plane with its gateway, and two ways to call it: OpenAI's SDK, and bytes on a socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import openai

from tests.harness.front_door import PATIENCE, FrontDoor, front_door

CHAT = "/v1/chat/completions"
HELLO = {"model": "auto", "messages": [{"role": "user", "content": "Hello"}]}


@dataclass
class Answer:
    """What came back for one raw HTTP request."""

    status: int
    headers: dict[str, str]
    body: bytes = b""
    chunks: list[bytes] = field(default_factory=list)

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error; it has OpenAI's shape."""
        error = self.json["error"]
        assert set(error) == {"message", "type", "param", "code"}, error
        assert self.headers["x-request-id"]
        return error

    @property
    def events(self) -> list[Any]:
        return [json.loads(line[6:]) for line in self.body.decode().splitlines() if line.startswith("data: {")]


class Wire:
    """One connection, for what no well-behaved client sends."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, method: str, path: str, body: bytes = b"", **headers: str) -> None:
        given = {"host": "x", "content-type": "application/json", "content-length": str(len(body))}
        given |= {name.replace("_", "-"): value for name, value in headers.items()}
        head = "".join(f"{name}: {value}\r\n" for name, value in given.items() if value)
        self.writer.write(f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode() + body)
        await self.writer.drain()

    async def head(self) -> Answer:
        """Status and headers."""
        async with asyncio.timeout(PATIENCE):
            lines = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines[1:-2])
        return Answer(int(lines[0].split()[1]), headers)

    async def chunk(self) -> bytes:
        """The next chunk of a chunked body; empty at its end."""
        async with asyncio.timeout(PATIENCE):
            size = int(await self.reader.readline(), 16)
            return (await self.reader.readexactly(size + 2))[:-2]

    async def answer(self) -> Answer:
        """The whole answer."""
        answer = await self.head()
        if "content-length" in answer.headers:
            async with asyncio.timeout(PATIENCE):
                answer.body = await self.reader.readexactly(int(answer.headers["content-length"]))
        else:
            while chunk := await self.chunk():
                answer.chunks.append(chunk)
            answer.body = b"".join(answer.chunks)
        return answer

    async def closed(self) -> bool:
        """Wait for the other side to close; whether it was with nothing more to say."""
        async with asyncio.timeout(PATIENCE):
            try:
                return await self.reader.read() == b""
            except ConnectionError:
                return True


class HttpDoor:
    """A client of a gateway."""

    def __init__(self, url: str, sdk: openai.AsyncOpenAI, door: FrontDoor) -> None:
        self.url = url
        self.sdk = sdk
        self.door = door

    @asynccontextmanager
    async def wire(self) -> AsyncIterator[Wire]:
        host, port = self.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        try:
            yield Wire(reader, writer)
        finally:
            writer.close()

    async def request(self, method: str, path: str, content: Any = None, **headers: str) -> Answer:
        """One request on a connection of its own; `content` is bytes, or sent as JSON."""
        body = b"" if content is None else content if isinstance(content, bytes) else json.dumps(content).encode()
        async with self.wire() as wire:
            await wire.send(method, path, body, **headers)
            return await wire.answer()

    def counted(self, method: str, outcome: str) -> float:
        """Finished requests with this outcome."""
        registry = self.door.plane.metrics.registry
        return registry.get_sample_value("modelyard_requests_total", {"method": method, "outcome": outcome}) or 0.0


@asynccontextmanager
async def http_door(**given: Any) -> AsyncIterator[HttpDoor]:
    """A control plane in this process with a gateway, and clients of both."""
    given["gateway"] = {"port": 0, **given.get("gateway", {})}
    async with front_door(**given) as door:
        gateway = door.plane.gateway
        assert gateway is not None
        async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="unused", max_retries=0) as sdk:
            yield HttpDoor(gateway.url, sdk, door)
