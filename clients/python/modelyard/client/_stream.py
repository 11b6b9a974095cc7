"""An answer while it is made."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import grpc
import grpc.aio

from modelyard.client import _answers as answers
from modelyard.client._direct import Direct
from modelyard.client._errors import (
    Cancelled,
    InternalError,
    ModelyardError,
    StreamBroken,
    TryAgain,
    from_call,
    parsed,
)
from modelyard.client._timing import Patience
from modelyard.client._types import Decision, Delta, GenerationResult
from modelyard.v1 import orchestrator_pb2

if TYPE_CHECKING:
    from modelyard.client._async import AsyncClient


class GenerationStream:
    """The events of one answer: an async iterator, and an async context manager.

        async with client.stream("hello", explain=True) as stream:
            async for event in stream:
                match event:
                    case Decision(): print(event.summary)
                    case Delta(): print(event.text, end="")
        print(stream.result.usage)

    Iterating raises ModelyardError when the answer fails; its `partial` has what had come.
    """

    def __init__(
        self,
        client: AsyncClient,
        request: orchestrator_pb2.GenerateRequest,
        patience: Callable[[], Patience],
        direct: Direct | None = None,
    ) -> None:
        self._client = client
        self._request = request
        self._make_patience = patience
        self._direct = direct
        self.whole = False
        """Nobody wants the pieces: they may come together at the end."""
        self._patience: Patience | None = None
        self._call: Any = None
        self._answer = answers.Answer()
        self._result: GenerationResult | None = None
        self._ended = False
        self._cancelled = False

    @property
    def result(self) -> GenerationResult:
        """The whole answer, once it has been read to its end."""
        if self._result is None:
            raise RuntimeError("the answer has not been read to its end")
        return self._result

    @property
    def partial(self) -> GenerationResult | None:
        """What has come so far; None if nothing has."""
        return self._result or self._answer.partial(self._request.request_id)

    async def collect(self) -> GenerationResult:
        """Read to the end and return the whole answer."""
        try:
            async for _ in self:
                pass
        finally:
            await self.aclose()
        return self.result

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        """The pieces of the answer alone, without decisions."""
        try:
            async for event in self:
                if isinstance(event, Delta):
                    yield event
        finally:
            await self.aclose()

    def cancel(self) -> None:
        """Stop the model. Whoever is reading gets Cancelled."""
        self._cancelled = True
        if self._call is not None:
            self._call.cancel()

    async def aclose(self) -> None:
        """End the stream, stopping the model if it still works. Idempotent."""
        self._ended = True
        if self._call is not None:
            self._call.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def abandon(self) -> None:
        """As aclose, for a stream that nobody reads any more."""
        if self._call is not None and not self._ended:
            self._call.cancel()

    def __del__(self) -> None:
        # Whoever breaks out of a loop over us without `async with` must still stop the model.
        self.abandon()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Delta | Decision:
        while not self._ended:
            try:
                message = await self._read()
            except BaseException:
                await self.aclose()
                raise
            event: Delta | Decision | None = None  # None: a step of a newer control plane
            if isinstance(message, answers.Ending):
                if message.delta is not None:
                    event = answers.delta(message.delta)
            elif message.HasField("delta"):
                event = answers.delta(message.delta)
            elif message.HasField("decision"):
                event = answers.decision(message.decision)
            if event is not None:
                self._answer.add(event)
            # The last piece may have come with it.
            if isinstance(message, answers.Ending):
                self._result = self._answer.ended(message)
                await self._finish()
            elif message.HasField("summary"):
                self._result = self._answer.result(message.summary)
                await self._finish()
            if event is not None:
                return event
        raise StopAsyncIteration

    async def _read(self) -> orchestrator_pb2.GenerateResponse | answers.Ending:
        """The next message, making the call anew where that is allowed. Raises ModelyardError."""
        if self._patience is None:
            self._patience = self._make_patience()
        while True:
            try:
                if self._cancelled:
                    raise asyncio.CancelledError
                if self._call is None:
                    self._call = self._client._generating(
                        self._request, self._patience.left(), self._direct, self.whole
                    )
                message = await self._call.read()
                if message is not grpc.aio.EOF:
                    return parsed(message)  # type: ignore[no-any-return]
                raise self._failed(StreamBroken("the control plane ended the stream without a summary"))
            except InternalError as error:  # of a message that does not parse
                raise self._failed(StreamBroken(error.message) if self._answer.started else error) from None
            except grpc.aio.AioRpcError as error:
                failure = from_call(
                    error,
                    address=self._client.address,
                    request_id=self._request.request_id,
                    started=self._answer.started,
                )
                await self._again(failure, error)
            except ModelyardError as failure:
                await self._again(failure, failure.__cause__)
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if self._cancelled and not (task and task.cancelling()):
                    raise self._failed(Cancelled("the call was cancelled")) from None
                self._client._raise_if_closed()
                raise

    async def _again(self, failure: ModelyardError, cause: BaseException | None) -> None:
        """Get ready for another call, or raise the failure."""
        assert self._patience is not None
        if self._answer.started or not isinstance(failure, TryAgain):
            raise self._failed(failure) from cause
        await self._patience.wait_or_raise(failure, cause)
        self._call, self._answer = None, answers.Answer()

    async def _finish(self) -> None:
        """Take the status, which follows the summary at once, so that the call ends in order."""
        self._ended = True
        try:
            await self._call.read()
        except grpc.aio.AioRpcError:
            pass  # the answer is whole, whatever became of the connection
        finally:
            self._call.cancel()

    def _failed(self, failure: ModelyardError) -> ModelyardError:
        failure.partial = self.partial
        return failure
