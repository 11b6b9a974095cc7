"""Beliefs and callbacks, for asyncio: `AsyncClient.beliefs`, `AsyncClient.callbacks`."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import AsyncGenerator, Sequence
from typing import TYPE_CHECKING, Any

from google.protobuf import json_format

from modelyard.client import _answers as answers
from modelyard.client import _names as names
from modelyard.client._belief_types import Belief, CallbackDelivery, Json
from modelyard.client._service import PATIENCE, Service
from modelyard.client._values import filled
from modelyard.v1 import belief_pb2, belief_pb2_grpc, task_queue_pb2, task_queue_pb2_grpc

if TYPE_CHECKING:
    from modelyard.client._async import AsyncClient


class AsyncBeliefs(Service):
    """What is held to be true: facts by key that agents and services share and watch.

        await client.beliefs.put("weather/berlin", {"sky": "grey"}, confidence=0.8, source="station-7")
        async for belief in client.beliefs.watch("tasks/"):
            print(belief.key, belief.value["state"])

    The final state of every durable task is written to "tasks/<id>".
    """

    def __init__(self, client: AsyncClient) -> None:
        super().__init__(client, belief_pb2_grpc.BeliefsStub)

    async def put(
        self,
        key: str,
        value: Json,
        *,
        confidence: float = 1.0,
        source: str = "",
        timeout: float | None = None,
        retries: int | None = None,
    ) -> Belief:
        """Write a fact over whatever was there; it is on disk when this returns. `value` is any JSON, at most 64 KiB.
        Its numbers are doubles; whole ones come back as int. Raises ValueError or TypeError for what is no JSON, and
        for integers beyond 2**53, which would lose digits."""
        belief = belief_pb2.Belief(key=key, confidence=confidence, source=source)
        _write(value, belief.value)
        request = belief_pb2.PutBeliefRequest(belief=belief)
        return _belief((await self._call("PutBelief", request, timeout, retries)).belief)

    async def get(self, key: str, *, timeout: float | None = None) -> Belief:
        """One fact; raises UnknownBelief."""
        return _belief((await self._call("GetBelief", belief_pb2.GetBeliefRequest(key=key), timeout)).belief)

    async def list(
        self, prefix: str = "", *, limit: int | None = None, page_size: int = 100, timeout: float | None = None
    ) -> AsyncGenerator[Belief, None]:
        """Facts whose keys begin with a prefix, by key, at most `limit`; read in pages."""
        request = filled(
            belief_pb2.ListBeliefsRequest,
            prefix=prefix,
            page_size=page_size if limit is None else max(1, min(page_size, limit)),
        )
        left = itertools.count() if limit is None else iter(range(limit))
        while True:
            page = await self._call("ListBeliefs", request, timeout)
            for message in page.beliefs:
                if next(left, None) is None:
                    return
                yield _belief(message)
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    async def delete(self, key: str, *, timeout: float | None = None) -> None:
        """Forget a fact. Raises UnknownBelief."""
        await self._call("DeleteBelief", belief_pb2.DeleteBeliefRequest(key=key), timeout, retries=0)

    async def watch(
        self, prefix: str = "", *, after: int | None = None, patience: float = PATIENCE
    ) -> AsyncGenerator[Belief, None]:
        """Facts whose keys begin with a prefix, as they are written or deleted, without end: those of versions after
        `after`, then new ones. Without `after` only those from now on; 0: all that are known first.

        Who reads slowly misses intermediate values, never the latest. Goes on by itself when the connection breaks,
        for at most `patience` seconds without an answer.
        """

        def open() -> Any:
            return self._open(
                "WatchBeliefs", filled(belief_pb2.WatchBeliefsRequest, prefix=prefix, after_version=after)
            )

        async with contextlib.aclosing(self._resumed(open, patience)) as changes:
            async for change in changes:
                after = change.version
                if change.HasField("belief"):
                    yield _belief(change.belief, change.deleted)


class AsyncCallbacks(Service):
    """What became of the callbacks of durable tasks.

    async for callback in client.callbacks.list(states="dead"):
        await client.callbacks.resend(callback.id)
    """

    def __init__(self, client: AsyncClient) -> None:
        super().__init__(client, task_queue_pb2_grpc.TaskQueueStub)

    async def list(
        self,
        *,
        states: str | Sequence[str] = (),
        task_id: str | None = None,
        limit: int | None = None,
        page_size: int = 100,
        timeout: float | None = None,
    ) -> AsyncGenerator[CallbackDelivery, None]:
        """Callbacks, those of the newest tasks first, at most `limit`; read in pages. `states` are "pending",
        "delivered" and "dead"."""
        request = filled(
            task_queue_pb2.ListCallbacksRequest,
            states=[names.CALLBACK_STATE.number(one) for one in ([states] if isinstance(states, str) else states)],
            task_id=task_id or "",
            page_size=page_size if limit is None else max(1, min(page_size, limit)),
        )
        left = itertools.count() if limit is None else iter(range(limit))
        while True:
            page = await self._call("ListCallbacks", request, timeout)
            for message in page.callbacks:
                if next(left, None) is None:
                    return
                yield _callback(message)
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    async def resend(self, id: str, *, timeout: float | None = None) -> CallbackDelivery:
        """Send a callback again, at once and with its full number of attempts. Raises UnknownTask if there is none."""
        return _callback(
            (await self._call("ResendCallback", task_queue_pb2.ResendCallbackRequest(id=id), timeout)).callback
        )


_EXACT = 2**53
"""Up to here every integer is a double."""


def _write(value: Json, into: Any) -> None:
    try:
        json_format.ParseDict(_plain(value), into)
    except json_format.ParseError as error:
        raise ValueError(f"a belief holds JSON: {error}") from None


def _plain(value: Any) -> Any:
    """The same in the types that protobuf's JSON knows. Raises ValueError, TypeError."""
    if isinstance(value, float) and not -1.8e308 < value < 1.8e308:
        raise ValueError("a belief holds JSON, which has no NaN and no infinity")
    if isinstance(value, int) and not -_EXACT <= value <= _EXACT:
        raise ValueError("numbers of a belief are doubles: integers beyond 2**53 would lose digits; write texts")
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"keys of JSON objects are texts, not {type(key).__name__}")
        return {key: _plain(item) for key, item in value.items()}
    raise TypeError(f"a belief holds JSON, not {type(value).__name__}")


def _read(value: Any) -> Any:
    """The same with whole numbers as int, as far as every integer is exact."""
    if isinstance(value, float) and value.is_integer() and -_EXACT <= value <= _EXACT:
        return int(value)
    if isinstance(value, list):
        return [_read(item) for item in value]
    if isinstance(value, dict):
        return {key: _read(item) for key, item in value.items()}
    return value


def _belief(message: belief_pb2.Belief, deleted: bool = False) -> Belief:
    return Belief(
        key=message.key,
        value=_read(json_format.MessageToDict(message.value)) if message.HasField("value") else None,
        confidence=message.confidence,
        source=message.source,
        updated_at=answers.time(message, "updated_at"),
        version=message.version,
        deleted=deleted,
    )


def _callback(message: task_queue_pb2.CallbackDelivery) -> CallbackDelivery:
    return CallbackDelivery(
        id=message.id,
        task_id=message.task_id,
        type=message.type,
        url=message.url,
        state=names.CALLBACK_STATE.name(message.state),
        attempt_count=message.attempt_count,
        created_at=answers.time(message, "created_at"),
        next_attempt_at=answers.time(message, "next_attempt_at"),
        finished_at=answers.time(message, "finished_at"),
        failure_message=message.failure_message,
    )
