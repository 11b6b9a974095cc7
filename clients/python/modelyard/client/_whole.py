"""Answers that are wanted whole: one message from the control plane, a stream where it knows no such call."""

from __future__ import annotations

import math
import time
from typing import Any

import grpc
import grpc.aio

from modelyard.rpc.errors import from_rpc_error
from modelyard.v1 import orchestrator_pb2


class WholeAnswers:
    """The stub of a control plane, for whom pieces are of no use: Generate is asked for the whole answer."""

    def __init__(self, stub: Any) -> None:
        self.stub = stub
        self.Assign = stub.Assign
        self.only_streams = False
        """The control plane is too old for Complete."""

    def Generate(self, request: orchestrator_pb2.GenerateRequest, timeout: float | None) -> Any:
        """A call that is read as that of a stream."""
        # Log-probabilities can make an answer larger than one message may be.
        if self.only_streams or request.input.sampling.logprobs:
            return self.stub.Generate(request, timeout=timeout)
        return WholeCall(self, request, timeout)


class WholeCall:
    """A Complete call, read and cancelled like a Generate call."""

    def __init__(self, answers: WholeAnswers, request: orchestrator_pb2.GenerateRequest, timeout: float | None) -> None:
        self._answers = answers
        self._request = request
        self._end = math.inf if timeout is None else time.monotonic() + timeout
        asked = orchestrator_pb2.CompleteRequest.FromString(request.SerializeToString())
        self._call: Any = answers.stub.Complete(asked, timeout=timeout)
        self._stream: Any = None
        self._left: list[orchestrator_pb2.GenerateResponse] | None = None

    async def read(self) -> Any:
        """The next GenerateResponse, EOF at the end."""
        if self._stream is None and self._left is None:
            try:
                self._left = _messages(await self._call)
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.UNIMPLEMENTED or not from_rpc_error(error).transport:
                    raise
                self._answers.only_streams = True
                left = None if math.isinf(self._end) else max(0.0, self._end - time.monotonic())
                self._call = self._stream = self._answers.stub.Generate(self._request, timeout=left)
        if self._stream is not None:
            return await self._stream.read()
        return self._left.pop(0) if self._left else grpc.aio.EOF

    def cancel(self) -> None:
        self._call.cancel()


def _messages(response: orchestrator_pb2.CompleteResponse | None) -> list[Any]:
    """What a stream would have told. gRPC gives None for a message that does not parse."""
    if response is None:
        return [None]
    told = [orchestrator_pb2.GenerateResponse(decision=decision) for decision in response.decisions]
    if response.HasField("summary"):
        end = orchestrator_pb2.GenerateResponse(summary=response.summary)
        if response.HasField("delta"):
            end.delta.CopyFrom(response.delta)
        told.append(end)
    return told
