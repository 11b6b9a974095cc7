"""What stands behind the stand-ins of hosted APIs: a model of a few rules, and its faults.

The same question has the same answer. A token is up to four characters of a word.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import re
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from model_servers.engines.simulated.schema import minimal_json
from tests.conformance.target import Fault

_WORDS = ("yard", "crane", "model", "server", "queue", "lease", "relay", "harbour", "plank", "copper", "quiet", "ready")
FRAMING = 7
IMAGE_TOKENS = 85
DEFAULT_LENGTH = 60


def tokens_of(text: str) -> list[str]:
    return re.findall(r"\s*\S{1,4}|\s+$", text)


@dataclass
class Asked:
    """A request as the model sees it."""

    text: str
    """Everything that was said, in order: what decides the answer."""
    last: str
    """What the user said last."""
    images: int = 0
    results: list[str] = field(default_factory=list)
    """Results of tools since the user last spoke."""
    max_tokens: int | None = None
    stops: list[str] = field(default_factory=list)
    tools: dict[str, Any] = field(default_factory=dict)
    """Name to schema of the arguments."""
    choice: str = "auto"
    tool_name: str = ""
    schema: Any = None
    thinks: bool = False

    @property
    def prompt_tokens(self) -> int:
        tools = json.dumps(self.tools) if self.tools else ""
        return FRAMING + len(tokens_of(self.text)) + len(tokens_of(tools)) + IMAGE_TOKENS * self.images


@dataclass
class Said:
    """A whole answer, in the pieces in which it is sent."""

    thoughts: list[str]
    text: list[str]
    tool: str = ""
    arguments: list[str] = field(default_factory=list)
    reason: str = "end_turn"
    stop: str | None = None

    @property
    def tokens(self) -> int:
        call = 3 + len(self.arguments) if self.tool else 0
        return max(len(self.thoughts) + len(self.text) + call, 1)


def answer(asked: Asked) -> Said:
    thoughts = tokens_of("First the question, then the answer.") if asked.thinks else []
    if "please be refused" in asked.last:
        return Said(thoughts, [], reason="refusal")
    room = (asked.max_tokens if asked.max_tokens is not None else 10**9) - len(thoughts)
    tool = _tool(asked)
    if tool:
        arguments = tokens_of(minimal_json(json.dumps(asked.tools[tool])))
        if len(arguments) + 3 > room:
            return Said(thoughts, [], tool, arguments[: max(room - 3, 0)], "max_tokens")
        return Said(thoughts, [], tool, arguments, "tool_use")
    text = _free_text(asked) if asked.schema is None else minimal_json(json.dumps(asked.schema))
    reason, stop = "end_turn", None
    places = {text.find(one): one for one in asked.stops if one in text}
    if places:
        text, reason, stop = text[: min(places)], "stop_sequence", places[min(places)]
    pieces = tokens_of(text)
    if len(pieces) > room:
        pieces, reason, stop = pieces[:room], "max_tokens", None
    if "be refused in the middle" in asked.last:
        pieces, reason = pieces[:3], "refusal"
    return Said(thoughts, pieces, reason=reason, stop=stop)


def _tool(asked: Asked) -> str:
    if not asked.tools or asked.choice == "none":
        return ""
    if asked.choice == "tool":
        return asked.tool_name
    if asked.choice == "any":
        return next(iter(asked.tools))
    # Freely, it calls a tool of which a word is in the question, once.
    words = set(re.findall(r"\w+", asked.last.lower()))
    free = (name for name in asked.tools if words & set(name.lower().split("_")))
    return "" if asked.results else next(free, "")


def _free_text(asked: Asked) -> str:
    if "Count from 1" in asked.last:
        return " ".join(str(number) for number in range(1, 1001))
    if asked.results:
        return f"The tool says: {' and '.join(asked.results)}."
    drawn = random.Random(hashlib.sha256(asked.text.encode()).digest())
    return " ".join(drawn.choice(_WORDS) for _ in range(DEFAULT_LENGTH)).capitalize() + "."


class HostedStandIn:
    """An HTTP server on a free port of this machine. `fault` may be changed while it runs."""

    def __init__(self, pace: float = 0.0, port: int = 0) -> None:
        """`pace`: seconds between two pieces of an answer. `port` 0: a free one."""
        self.pace = pace
        self.port = port
        self.fault: Fault | None = None
        self.error_in_stream = ""
        """The vendor's error of this type comes after the second piece."""
        self.requests: list[web.Request] = []
        self.bodies: list[dict[str, Any]] = []
        """Of the requests that generate."""
        self.generated = 0
        """Tokens sent so far."""
        self.cancelled = 0
        """Requests whose client left before the end."""
        self.connections = 0
        """Requests being answered."""
        self.key = "test-key"
        self._runner: web.AppRunner | None = None
        self.url = ""

    def routes(self) -> list[web.RouteDef]:
        raise NotImplementedError

    def error(self, status: int, fault: Fault) -> web.Response:
        """The vendor's way to say it."""
        raise NotImplementedError

    async def __aenter__(self) -> Any:
        app = web.Application(middlewares=[self._watched], client_max_size=32 << 20)
        app.add_routes(self.routes())
        self._runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port)
        await site.start()
        self.port = self._runner.addresses[0][1]
        self.url = f"http://127.0.0.1:{self.port}"
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._runner is not None
        await self._runner.cleanup()

    @web.middleware
    async def _watched(self, request: web.Request, handler: Any) -> web.StreamResponse:
        self.requests.append(request)
        self.connections += 1
        try:
            if self.generates(request) and self.fault is not None:
                if self.fault.kind == "hang":
                    await asyncio.Event().wait()
                if self.fault.kind == "status":
                    return self.error(self.fault.status, self.fault)
                if self.fault.kind == "garbage":
                    return web.Response(body=b"\x00\xff<html>neither one nor the other", content_type="text/html")
            response: web.StreamResponse = await handler(request)
            return response
        except (asyncio.CancelledError, ConnectionError):
            self.cancelled += 1
            raise
        finally:
            self.connections -= 1

    def generates(self, request: web.Request) -> bool:
        """Whether faults apply."""
        raise NotImplementedError

    async def between(self, request: web.Request, sent: int) -> None:
        """Called before each piece."""
        fault = self.fault
        if fault is not None and fault.kind in ("stall", "reset") and sent >= fault.pieces:
            if fault.kind == "stall":
                await asyncio.Event().wait()
            assert request.transport is not None
            request.transport.abort()
            raise ConnectionResetError("the fault says so")
        self.generated += 1
        await asyncio.sleep(self.pace)
