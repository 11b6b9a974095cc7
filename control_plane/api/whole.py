"""A whole answer in one message, for whom pieces are of no use: it costs a fraction of a stream."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import grpc

from control_plane.api import convert
from control_plane.api.attempts import AttemptFailed, Progress
from control_plane.api.upstream import Upstream
from modelyard.rpc.errors import Refusal, from_rpc_error
from modelyard.rpc.reasons import Reason
from modelyard.v1.model_server_pb2 import ModelServerCompleteResponse


@dataclass(frozen=True, slots=True)
class Whole:
    """An answer, and when its first and last token came: monotonic seconds, 0 if none did."""

    answer: ModelServerCompleteResponse
    size: int
    """Bytes."""
    first: float
    last: float


async def complete(
    upstream: Upstream,
    instance_id: str,
    request: bytes,
    *,
    timeout: float,
    progress: Progress,
    clock: Callable[[], float],
) -> Whole | None:
    """Ask a server for the whole answer. None if it has no such call, which is remembered of the instance.

    Raises AioRpcError, and AttemptFailed for what is no answer.
    """
    if upstream.only_streams == instance_id:
        return None
    started = clock()
    call = upstream.complete(request, timeout=timeout)
    progress.call = call
    try:
        message = await call
    except grpc.aio.AioRpcError as error:
        if error.code() is grpc.StatusCode.UNIMPLEMENTED and from_rpc_error(error).transport:
            upstream.only_streams = instance_id
            return None
        raise
    answer = ModelServerCompleteResponse.FromString(message)
    if not answer.HasField("result"):
        raise AttemptFailed(Refusal(Reason.ENGINE_FAILED, "the server sent an answer without a result"))
    if not answer.HasField("delta"):
        return Whole(answer, len(message), 0.0, 0.0)
    # How long it took is what was measured here; how that divides, only the server has seen.
    last, result = clock(), answer.result
    decoding = convert.seconds(result.timings.tpot) * max(0, result.usage.completion_tokens - 1)
    return Whole(answer, len(message), max(started, last - max(0.0, decoding)), last)
