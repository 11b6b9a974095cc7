"""What both fakes share: a server on a free port, a call log, gates and injected errors."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import grpc.aio
from google.protobuf.descriptor import ServiceDescriptor

from modelyard.rpc.calls_server import add_services
from modelyard.rpc.errors import Refusal
from modelyard.rpc.server import HealthHandle, bind, create_server, enable_standard_services, service_handler
from modelyard.v1 import generation_pb2

ScriptItem = str | generation_pb2.GenerationDelta | asyncio.Event | Refusal
"""One step of a scripted answer: text or a delta is sent, an event is waited for, a refusal raised."""


@dataclass(slots=True)
class Call:
    """One received call, in the order of arrival."""

    method: str
    requests: list[Any] = field(default_factory=list)
    """The request; for client streams, every message so far."""
    metadata: dict[str, str | bytes] = field(default_factory=dict)
    time_remaining: float | None = None
    """Seconds to the caller's deadline when the call arrived."""
    outcome: str = "running"
    """"running", "ok", "cancelled" or the reason of the refusal."""

    @property
    def request(self) -> Any:
        """The (first) request."""
        return self.requests[0]


class Gate:
    """Holds calls of one method until it is opened."""

    def __init__(self) -> None:
        self.arrived = asyncio.Event()
        """Set when the first call stands before the gate."""
        self._open = asyncio.Event()

    def open(self) -> None:
        self._open.set()

    async def pass_through(self) -> None:
        self.arrived.set()
        await self._open.wait()


class FakeServer:
    """Base of the fakes; an async context manager that serves on 127.0.0.1 and a free port."""

    service: ServiceDescriptor
    shares_streams = False
    """Whether `modelyard.v1.Calls` is served too: nobody need have it."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        """Every call of the service so far."""
        self.port = 0
        self.health: HealthHandle
        self._errors: dict[str, list[Refusal]] = {}
        self._gates: dict[str, Gate] = {}
        self._changed = asyncio.Event()
        self._server: grpc.aio.Server | None = None

    @property
    def address(self) -> str:
        """host:port"""
        return f"127.0.0.1:{self.port}"

    async def start(self, port: int = 0) -> None:
        """Serve; give an earlier port to come back at the same address."""
        self._server = create_server()
        handler = service_handler(self.service, self)
        if self.shares_streams:
            add_services(self._server, handler)
        else:
            self._server.add_generic_rpc_handlers((handler,))
        self.health = enable_standard_services(self._server, [self.service.full_name])
        self.port = bind(self._server, "127.0.0.1", port)
        await self._server.start()
        await self.health.set_serving(self.service.full_name, True)

    async def stop(self) -> None:
        """Die: the port is closed and calls are cut off."""
        if self._server is not None:
            server, self._server = self._server, None
            await server.stop(None)
            # stop() does not wait for the handlers that it cancels.
            with contextlib.suppress(TimeoutError):
                await self.until(lambda: all(call.outcome != "running" for call in self.calls), 2.0)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    def inject_error(self, method: str, refusal: Refusal, times: int = 1) -> None:
        """Refuse the next `times` calls of a method."""
        self._errors.setdefault(method, []).extend([refusal] * times)

    def gate(self, method: str) -> Gate:
        """Hold all calls of a method from now on, until the gate is opened."""
        self._gates[method] = gate = Gate()
        return gate

    def calls_of(self, method: str) -> list[Call]:
        return [call for call in self.calls if call.method == method]

    async def until(self, condition: Callable[[], bool], timeout: float = 10.0) -> None:
        """Wait until `condition` holds; it is looked at whenever the fake sees something new."""
        async with asyncio.timeout(timeout):
            while not condition():
                await self._changed.wait()

    def _tell(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    @contextlib.asynccontextmanager
    async def _received(
        self, method: str, context: grpc.aio.ServicerContext, request: Any = None
    ) -> AsyncIterator[Call]:
        """Log a call, then hold or refuse it as told."""
        call = Call(method, [] if request is None else [request])
        call.metadata = dict(context.invocation_metadata() or ())
        call.time_remaining = context.time_remaining()
        self.calls.append(call)
        with self._logged(call):
            if errors := self._errors.get(method):
                raise errors.pop(0)
            if gate := self._gates.get(method):
                await gate.pass_through()
            yield call

    @contextlib.contextmanager
    def _logged(self, call: Call) -> Iterator[None]:
        self._tell()
        try:
            yield
            call.outcome = "ok"
        except Refusal as refusal:
            call.outcome = refusal.reason.value
            raise
        except (asyncio.CancelledError, GeneratorExit):
            call.outcome = "cancelled"
            raise
        except grpc.aio.BaseError:
            # The caller has gone while something was being written.
            call.outcome = "cancelled"
            raise
        finally:
            self._tell()


def append(answer: generation_pb2.GenerationDelta, delta: generation_pb2.GenerationDelta) -> None:
    """Add the next piece to an answer that is told whole."""
    text, reasoning = answer.text + delta.text, answer.reasoning_text + delta.reasoning_text
    tokens = answer.tokens + delta.tokens
    answer.MergeFrom(delta)
    answer.text, answer.reasoning_text, answer.tokens = text, reasoning, tokens


async def play(items: tuple[ScriptItem, ...]) -> AsyncIterator[generation_pb2.GenerationDelta]:
    """The deltas of a script, one token each."""
    for item in items:
        if isinstance(item, Refusal):
            raise item
        if isinstance(item, asyncio.Event):
            await item.wait()
        elif isinstance(item, str):
            yield generation_pb2.GenerationDelta(text=item, tokens=1)
        else:
            yield item
