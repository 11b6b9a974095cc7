"""The client's side of `Calls` (modelyard/v1/calls.proto): many unary calls over one stream, where the peer has it.

link = SharedChannel(channel("127.0.0.1:7460"))
stub = OrchestratorStub(link)
answer = await stub.Assign(request, timeout=5)
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
from collections import deque
from collections.abc import Callable, Generator, Iterable
from typing import Any, Protocol

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from modelyard.rpc.channels import MAX_MESSAGE_BYTES
from modelyard.v1 import calls_pb2

PATH = "/modelyard.v1.Calls/Multiplex"

Pairs = tuple[tuple[str, str | bytes], ...]
"""Metadata."""

MOST_CALLS = 256
"""At a time on one stream."""
MOST_BYTES = 64 << 10
"""Of a request that shares a stream, and of frames that share a message."""

_IDLE = 10.0
_REST = 1.0
"""Seconds from a stream that failed to the next."""
_FOREIGN_REST = 60.0
"""The same where the peer has no such thing: another may take its place."""

_CODES = {code.value[0]: code for code in grpc.StatusCode}


def metadata_messages(pairs: Iterable[tuple[str, str | bytes]]) -> list[calls_pb2.CallMetadata]:
    """Metadata as they travel."""
    return [
        calls_pb2.CallMetadata(key=key, value=value if isinstance(value, bytes) else value.encode())
        for key, value in pairs
    ]


def metadata_pairs(messages: Iterable[calls_pb2.CallMetadata]) -> Pairs:
    """Metadata as gRPC gives them: bytes where the key ends in "-bin"."""
    return tuple((m.key, m.value if m.key.endswith("-bin") else m.value.decode("utf-8", "replace")) for m in messages)


def next_batch(frames: deque[bytes]) -> tuple[bytes, int]:
    """Take the oldest frame, with as many others as fit into MOST_BYTES: one message of so many frames, as fields of
    serialised messages may be put together. `frames` must not be empty."""
    taken = [frames.popleft()]
    room = MOST_BYTES - len(taken[0])
    while frames and len(frames[0]) <= room:
        room -= len(frames[0])
        taken.append(frames.popleft())
    return b"".join(taken), len(taken)


class UnaryCall(Protocol):
    """A unary call, plain or not. Awaiting it raises AioRpcError if it fails, CancelledError if it is cancelled."""

    def __await__(self) -> Generator[Any, None, Any]: ...

    def cancel(self) -> bool:
        """End it; False if it has ended."""
        ...


class UnaryMethod(Protocol):
    """Makes unary calls."""

    def __call__(self, request: Any, *, timeout: float | None = None, metadata: Any = None) -> UnaryCall: ...


class SharedChannel:
    """A channel for stubs, whose unary calls share a stream while they are frequent and the peer offers it.

    They behave as plain ones: awaited, cancelled, failing with AioRpcError. Plain are those with large requests, those
    above what a stream takes, and all others whenever there is no stream. Everything else is the channel's own.
    """

    def __init__(self, channel: grpc.aio.Channel, *, idle: float = _IDLE) -> None:
        """`idle`: seconds between two calls of a peer that is not called all the time, and so needs no stream."""
        self._idle = idle
        self.plain = channel
        """The channel itself."""
        self._open: Any = channel.stream_stream(PATH)
        self._stream: _Stream | None = None
        self._called = -math.inf
        self._rest_until = -math.inf

    def __getattr__(self, name: str) -> Any:
        return getattr(self.plain, name)

    @property
    def shared(self) -> bool:
        """Whether there is a stream for the next call."""
        return self._stream is not None and self._stream.ready

    def unary_unary(
        self,
        method: str,
        request_serializer: Callable[[Any], bytes] = bytes,
        response_deserializer: Callable[[bytes], Any] = bytes,
        _registered_method: bool = False,
    ) -> UnaryMethod:
        """As of a channel. The calls take a request, `timeout` and `metadata`."""
        plain: Any = self.plain.unary_unary(method, None, response_deserializer)

        def call(request: Any, *, timeout: float | None = None, metadata: Any = None) -> Any:
            raw = request_serializer(request)
            stream = self._usable()
            if stream is None or len(raw) > MOST_BYTES:
                return plain(raw, timeout=timeout, metadata=metadata)
            return stream.start(method, raw, timeout, metadata, response_deserializer)

        return call

    def _usable(self) -> _Stream | None:
        """The stream, if it takes one more. It is opened while calls are made without it."""
        now = asyncio.get_running_loop().time()
        recent, self._called = now - self._called < self._idle, now
        if self._stream is None:
            if recent and now >= self._rest_until:
                self._stream = _Stream(self._open(), self._idle, self._ended)
            return None
        return self._stream if self._stream.ready and len(self._stream.calls) < MOST_CALLS else None

    def _ended(self, rest: float) -> None:
        self._stream = None
        self._rest_until = asyncio.get_running_loop().time() + rest

    async def close(self, grace: float | None = None) -> None:
        """Cancel what runs and close the channel."""
        if self._stream is not None:
            await self._stream.close()
        await self.plain.close(grace)


class _Call(asyncio.Future[Any]):
    """A call over a stream."""

    def __init__(
        self,
        stream: _Stream,
        number: int,
        timeout: float | None,
        deserialise: Callable[[bytes], Any],
    ) -> None:
        super().__init__()
        self._stream = stream
        self._number = number
        self._deserialise = deserialise
        self._pieces: list[bytes] = []
        self._size = 0
        self._timer = None if timeout is None else self.get_loop().call_later(timeout, self._expire)

    def cancel(self, msg: Any = None) -> bool:
        if self.done():
            return False
        self._leave()
        return super().cancel(msg)

    def _leave(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._stream.abandon(self._number)

    def _expire(self) -> None:
        self._leave()
        self.fail(_failure(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded"))

    def fail(self, error: grpc.aio.AioRpcError) -> None:
        """End with an error, unless it has ended."""
        if self._timer is not None:
            self._timer.cancel()
        if not self.done():
            self.set_exception(error)

    def take(self, end: calls_pb2.CallEnd) -> bool:
        """Whether this is all of the answer."""
        self._size += len(end.response)
        if self._size > MAX_MESSAGE_BYTES:
            # As gRPC itself refuses it.
            told = f"CLIENT: Received message larger than max ({self._size} vs. {MAX_MESSAGE_BYTES})"
            self._leave()
            self.fail(_failure(grpc.StatusCode.RESOURCE_EXHAUSTED, told))
            return True
        if end.more:
            self._pieces.append(end.response)
            return False
        if end.code:
            code = _CODES.get(end.code, grpc.StatusCode.UNKNOWN)
            self.fail(_failure(code, end.message, metadata_pairs(end.trailing_metadata)))
            return True
        if self._timer is not None:
            self._timer.cancel()
        answer = b"".join((*self._pieces, end.response)) if self._pieces else end.response
        try:
            self.set_result(self._deserialise(answer))
        except DecodeError:
            self.set_result(None)  # as grpc.aio does
        return True


def _failure(code: grpc.StatusCode, details: str, trailing: Pairs = ()) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(*trailing), details)


class _Stream:
    """The client's end of one stream."""

    def __init__(self, rpc: Any, idle: float, ended: Callable[[float], None]) -> None:
        """`ended` is called with the seconds after which another may be tried."""
        self.calls: dict[int, _Call] = {}
        self.ready = False
        """The peer has said that it is there, and nobody has closed it."""
        self._rpc = rpc
        self._idle = idle
        self._ended = ended
        self._loop = asyncio.get_running_loop()
        self._numbers = itertools.count(1)
        self._used = self._loop.time()
        self._outbox: deque[bytes] = deque()
        self._closing = False
        self._wake: asyncio.Future[None] | None = None
        self._look_again = self._loop.call_later(idle, self._look)
        self._writer = asyncio.create_task(self._write(), name="calls-writer")
        self._reader = asyncio.create_task(self._read(), name="calls-reader")

    def start(
        self, method: str, raw: bytes, timeout: float | None, metadata: Any, deserialise: Callable[[bytes], Any]
    ) -> _Call:
        """Begin a call."""
        number = next(self._numbers)
        start = calls_pb2.CallStart(id=number, method=method, request=raw)
        if timeout is not None:
            start.timeout.FromNanoseconds(max(0, round(timeout * 1e9)))
        if metadata:
            start.metadata.extend(metadata_messages(metadata))
        self._send(calls_pb2.MultiplexRequest(starts=(start,)))
        self._used = self._loop.time()
        call = self.calls[number] = _Call(self, number, timeout, deserialise)
        return call

    def abandon(self, number: int) -> None:
        """Nobody waits for this call any more."""
        if self.calls.pop(number, None) is not None:
            self._send(calls_pb2.MultiplexRequest(cancels=(number,)))

    async def close(self) -> None:
        """End it at once, and what is made over it."""
        self._reader.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)

    def _send(self, message: calls_pb2.MultiplexRequest) -> None:
        self._outbox.append(message.SerializeToString())
        self._wake_writer()

    def _wake_writer(self) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    def _look(self) -> None:
        """Close a stream that nobody uses."""
        if self.calls or self._loop.time() - self._used < self._idle:
            self._look_again = self._loop.call_later(self._idle, self._look)
            return
        self._retire()

    def _retire(self) -> None:
        """Begin no more calls here."""
        self._closing, self.ready = True, False
        self._wake_writer()

    async def _write(self) -> None:
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):  # whoever reads hears why
            while self._outbox or self.calls or not self._closing:
                if self._outbox:
                    await self._rpc.write(next_batch(self._outbox)[0])
                else:
                    self._wake = self._loop.create_future()
                    await self._wake
            await self._rpc.done_writing()

    async def _read(self) -> None:
        rest = _FOREIGN_REST
        error: grpc.aio.AioRpcError | None = None
        try:
            while (raw := await self._rpc.read()) is not grpc.aio.EOF:
                self.ready, rest = not self._closing, _REST
                message = calls_pb2.MultiplexResponse.FromString(raw)
                for end in message.ends:
                    call = self.calls.get(end.id)
                    if call is not None and call.take(end):
                        self.calls.pop(end.id, None)
                if message.stopping or self._closing:
                    self._retire()
            error = _failure(grpc.StatusCode.UNAVAILABLE, "the stream has ended")
        except grpc.aio.AioRpcError as failure:
            error = failure
            if failure.code() is grpc.StatusCode.UNAVAILABLE:
                rest = _REST
        except Exception:
            error = _failure(grpc.StatusCode.INTERNAL, "the peer sent what is no MultiplexResponse")
        finally:
            self.ready = False
            self._look_again.cancel()
            self._writer.cancel()
            self._rpc.cancel()
            left, self.calls = tuple(self.calls.values()), {}
            self._ended(rest)
            for call in left:
                if error is None:  # closed from here
                    call.cancel()
                else:
                    call.fail(_failure(error.code(), error.details() or "", tuple(error.trailing_metadata())))
