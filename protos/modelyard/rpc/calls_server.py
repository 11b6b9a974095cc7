"""The server's side of `Calls`: unary calls that come over a stream, answered by the handlers that plain ones get.

calls = add_services(server, service_handler(ORCHESTRATOR, servicer), ...)
...
calls.stop()
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Sequence
from typing import Any, NamedTuple, NoReturn

import grpc
import grpc.aio

from modelyard.program import privacy
from modelyard.rpc.calls import MOST_CALLS, Pairs, metadata_messages, metadata_pairs, next_batch
from modelyard.rpc.errors import Refusal, Status, Violation, invalid, to_status
from modelyard.rpc.handlers import service_handler
from modelyard.rpc.reasons import Reason
from modelyard.v1 import calls_pb2

CALLS = calls_pb2.DESCRIPTOR.services_by_name["Calls"]

PIECE_BYTES = 256 << 10
"""Most of an answer that holds up others."""

_log = logging.getLogger(__name__)

_UNKNOWN_METHOD = Status(grpc.StatusCode.UNIMPLEMENTED, "Method not found!", ())
_TOO_MANY = to_status(Refusal(Reason.SERVER_BUSY, f"more than {MOST_CALLS} calls at a time on one stream"))
_TOO_LATE = Status(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded", ())
_CANCELLED = Status(grpc.StatusCode.CANCELLED, "", ())
_FAILED = Status(grpc.StatusCode.UNKNOWN, "", ())


def add_services(server: grpc.aio.Server, *handlers: grpc.GenericRpcHandler) -> CallsServicer:
    """Serve handlers that `service_handler` made, and their unary methods over streams too."""
    calls = CallsServicer(handlers)
    server.add_generic_rpc_handlers((*handlers, service_handler(CALLS, calls)))
    return calls


class _Unary(NamedTuple):
    """A handler."""

    serve: Callable[[bytes, Any], Awaitable[Any]]
    serialise: Callable[[Any], bytes]


class _Details(NamedTuple):
    """What a handler is chosen by."""

    method: str
    invocation_metadata: Pairs


class CallsServicer:
    """Serves `Calls`."""

    def __init__(self, handlers: Iterable[grpc.GenericRpcHandler]) -> None:
        self._handlers = tuple(handlers)
        self._streams: set[_Stream] = set()
        self._stopping = False

    def stop(self) -> None:
        """Have clients make further calls elsewhere, and end streams when everything is answered."""
        self._stopping = True
        for stream in self._streams:
            stream.stop()

    async def Multiplex(
        self, requests: AsyncIterator[calls_pb2.MultiplexRequest], context: grpc.aio.ServicerContext
    ) -> None:
        stream = _Stream(self._handlers, context)
        self._streams.add(stream)
        try:
            await stream.send(calls_pb2.MultiplexResponse(stopping=self._stopping))
            await stream.read(requests)
            await stream.answered()
        finally:
            self._streams.discard(stream)
            stream.close()


class _Stream:
    def __init__(self, handlers: Sequence[grpc.GenericRpcHandler], context: grpc.aio.ServicerContext) -> None:
        self._handlers = handlers
        self._context = context
        self._loop = asyncio.get_running_loop()  # to ask for it is a system call
        self._metadata: Pairs = tuple(context.invocation_metadata() or ())
        self._calls: dict[int, _Call] = {}
        """Those whose answers are not on their way yet."""
        self._known: dict[str, _Unary] = {}
        """Handlers that were found, by method."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._outbox: deque[bytes] = deque()
        self._behind: deque[_Call | asyncio.Future[None]] = deque()
        """For each message in the outbox: the call that it ends, or who waits for it to be sent."""
        self._sending = False
        """Somebody is sending whatever comes into the outbox."""

    async def read(self, requests: AsyncIterator[calls_pb2.MultiplexRequest]) -> None:
        """Begin and cancel what is asked for, until the client half-closes."""
        async for message in requests:
            for start in message.starts:
                if start.id in self._calls:
                    raise invalid([Violation("starts.id", f"{start.id} is the id of a call that is not answered yet")])
                if len(self._calls) >= MOST_CALLS:
                    # Whoever does not read what it is told is not read either.
                    await self.send(calls_pb2.MultiplexResponse(ends=(_end(start.id, _TOO_MANY),)))
                    continue
                call = self._calls[start.id] = _Call(self._metadata, start, self._loop)
                call.task = self._begin(self._serve(call))
            for number in message.cancels:
                cancelled = self._calls.pop(number, None)
                if cancelled is not None:
                    cancelled.cancel()

    def stop(self) -> None:
        """Tell the client that it had better go."""
        self._begin(self.send(calls_pb2.MultiplexResponse(stopping=True)))

    def _begin(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def answered(self) -> None:
        """Wait until everything that was read is answered."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    def close(self) -> None:
        """Cancel what is left; nobody is to be answered any more."""
        self._calls.clear()
        for task in self._tasks:
            task.cancel()

    async def _serve(self, call: _Call) -> None:
        answer, status = await call.run(self._handler)
        start = 0
        while len(answer) - start > PIECE_BYTES and self._awaited(call):
            piece = calls_pb2.CallEnd(id=call.id, response=answer[start : start + PIECE_BYTES], more=True)
            await self.send(calls_pb2.MultiplexResponse(ends=(piece,)))
            start += PIECE_BYTES
        if self._awaited(call):
            end = _end(call.id, status)
            end.response = answer[start:] if start else answer
            self._post(calls_pb2.MultiplexResponse(ends=(end,)), call)
            await self._send_all()

    def _awaited(self, call: _Call) -> bool:
        """Whether somebody waits for its answer."""
        return self._calls.get(call.id) is call

    def _handler(self, method: str) -> _Unary | None:
        """What serves a method; None: nobody."""
        known = self._known.get(method)
        if known is None:
            details = _Details(method, self._metadata)
            found = (handler.service(details) for handler in self._handlers)
            handler: Any = next((each for each in found if each is not None and each.unary_unary is not None), None)
            if handler is None:
                return None
            known = self._known[method] = _Unary(handler.unary_unary, handler.response_serializer)
        return known

    async def send(self, message: calls_pb2.MultiplexResponse) -> None:
        """Return when it is sent, with whatever came about meanwhile; what comes later is for somebody else to send."""
        sent: asyncio.Future[None] = self._loop.create_future()
        self._post(message, sent)
        if not self._sending:
            self._begin(self._send_all())
        await sent

    def _post(self, message: calls_pb2.MultiplexResponse, behind: _Call | asyncio.Future[None]) -> None:
        """Into the outbox, for `_send_all`."""
        self._outbox.append(message.SerializeToString())
        self._behind.append(behind)

    async def _send_all(self) -> None:
        """Send until nothing is left, for whoever comes meanwhile, too: others return at once. So only whoever has
        nothing else to do may call it."""
        if self._sending:
            return
        self._sending = True
        try:
            while self._outbox:
                batch, count = next_batch(self._outbox)
                behind = [self._behind.popleft() for _ in range(count)]
                for each in behind:
                    if isinstance(each, _Call) and self._awaited(each):
                        del self._calls[each.id]  # its client may begin another one as soon as it has the answer
                with contextlib.suppress(grpc.aio.BaseError, asyncio.InvalidStateError):  # the stream has ended
                    await self._context.write(batch)
                for each in behind:
                    if isinstance(each, asyncio.Future) and not each.done():
                        each.set_result(None)
        finally:
            self._sending = False


def _end(number: int, status: Status) -> calls_pb2.CallEnd:
    if status.code is grpc.StatusCode.OK and not status.trailing_metadata:
        return calls_pb2.CallEnd(id=number)
    return calls_pb2.CallEnd(
        id=number,
        code=status.code.value[0],
        message=status.details,
        trailing_metadata=metadata_messages(status.trailing_metadata),
    )


class _Call:
    """One call, and the context that its handler gets: as much of ServicerContext as unary handlers have use for."""

    def __init__(self, inherited: Pairs, start: calls_pb2.CallStart, loop: asyncio.AbstractEventLoop) -> None:
        self.id = start.id
        self.method = start.method
        self.task: asyncio.Task[None] | None = None
        self._request = start.request
        self._loop = loop
        self._metadata = inherited + metadata_pairs(start.metadata) if start.metadata else inherited
        self._trailing: Pairs = ()
        self._status: Status | None = None
        self._running = True
        self._late = False
        self._timer: asyncio.TimerHandle | None = None
        if start.HasField("timeout"):
            self._timer = loop.call_later(start.timeout.ToNanoseconds() / 1e9, self._expire)

    def _expire(self) -> None:
        self._late = True
        self.cancel()

    def cancel(self) -> None:
        """Stop the handler, if it still runs."""
        if self._running and self.task is not None:
            self.task.cancel()

    async def run(self, find: Callable[[str], _Unary | None]) -> tuple[bytes, Status]:
        """The answer and the status of what is found to serve its method."""
        try:
            handler = find(self.method)
            if handler is None:
                return b"", _UNKNOWN_METHOD
            answer = await handler.serve(self._request, self)
            return handler.serialise(answer), Status(grpc.StatusCode.OK, "", self._trailing)
        except asyncio.CancelledError:
            return b"", _TOO_LATE if self._late else _CANCELLED
        except grpc.aio.AbortError:
            return b"", self._status or _FAILED
        except Exception as error:
            _log.error("%s failed: %s", self.method, privacy.where(error))
            return b"", _FAILED
        finally:
            self._running = False
            if self._timer is not None:
                self._timer.cancel()

    def invocation_metadata(self) -> Pairs:
        return self._metadata

    def time_remaining(self) -> float | None:
        """Seconds until the deadline; None without one."""
        if self._timer is None:
            return None
        return max(0.0, self._timer.when() - self._loop.time())

    def trailing_metadata(self) -> Pairs:
        return self._trailing

    def set_trailing_metadata(self, trailing_metadata: Pairs) -> None:
        self._trailing = tuple(trailing_metadata)

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Pairs = ()) -> NoReturn:
        await self.abort_with_status(Status(code, details, tuple(trailing_metadata)))

    async def abort_with_status(self, status: grpc.Status) -> NoReturn:
        self._status = Status(status.code, status.details, tuple(status.trailing_metadata))
        raise grpc.aio.AbortError
