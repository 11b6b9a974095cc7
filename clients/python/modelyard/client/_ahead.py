"""Tickets of direct mode that are taken ahead of need: who asks for the like again and again need not wait for each."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import grpc.aio

from modelyard.v1 import orchestrator_pb2

_SOON = 1.0
"""Seconds after the end of a call within which the next of its shape makes it likely that there will be more."""
_BRIEF, _AT_ONCE = 0.25, 0.003
"""Seconds of a call that a ticket outlives for certain, and of a pause in which there is no time to take one: where
both are so short it is taken while the call runs, else after its end, when nobody waits for anything."""
_USED = 0.8
"""Share of a ticket's life, from before it was asked for, in which it is used: the rest is for the way."""
_ANSWER_SECONDS, _WAIT_SECONDS = 1.0, 0.05
"""How long an answer is waited for in the background, and by a call that could use the ticket."""
_PAUSE = 1.0
"""Seconds without another try, of the kind that was in vain: during a call its own prompt may be in the way."""
_MOST_SHAPES = 64
"""That are remembered."""


class TicketsAhead:
    """What one client holds, and knows of what it asks for."""

    def __init__(self) -> None:
        self._shapes: dict[bytes, Shape] = {}
        self._closed = False

    def shape(self, asked: orchestrator_pb2.AssignRequest) -> Shape | None:
        """That of a request; None: there is no ticket ahead for such."""
        outline = asked.request
        # A decision is made for the one request that asks for it, and an id is in the ticket.
        if self._closed or outline.explain or outline.request_id:
            return None
        key = outline.SerializeToString(deterministic=True)
        shape = self._shapes.pop(key, None) or Shape()
        self._shapes[key] = shape  # the last used is the last
        if len(self._shapes) > _MOST_SHAPES:
            self._shapes.pop(next(iter(self._shapes))).drop()
        return shape

    def close(self) -> None:
        """Drop all; their reservations expire."""
        self._closed = True
        shapes, self._shapes = self._shapes, {}
        for shape in shapes.values():
            shape.drop()


class Shape:
    """Requests that are all the same to routing but for the length of their prompts, and the ticket for the next."""

    def __init__(self) -> None:
        self._ended = -math.inf
        self._took = self._pause = math.inf
        self._pauses = {True: -math.inf, False: -math.inf}
        """Until when there is no try during a call (True) and after one."""
        self._held: _Ticket | None = None

    def begins(self) -> bool:
        """A call begins; whether it follows another soon."""
        self._pause = time.monotonic() - self._ended
        return self._pause < _SOON

    async def take(self, prompt_tokens: int) -> orchestrator_pb2.AssignResponse | None:
        """The ticket, which nobody else gets, if it fits and is still good; waits a little for one on its way."""
        held = self._held
        if held is None or not held.good or not prompt_tokens <= held.room <= 2 * room(prompt_tokens):
            return None
        self._held = None
        if not held.answer.done():
            await asyncio.wait([held.answer], timeout=_WAIT_SECONDS)
        if not held.good or not held.answer.done() or held.answer.cancelled():
            return None
        return held.answer.result()

    def begun(self, stub: Any, asked: orchestrator_pb2.AssignRequest) -> None:
        """A call that follows another has gone to the model server."""
        if self._took < _BRIEF and self._pause < _AT_ONCE:
            self._ask(stub, asked, during=True)

    def ended(self, stub: Any, asked: orchestrator_pb2.AssignRequest, took: float, *, followed: bool) -> None:
        """A call has succeeded, so many seconds after it went to the model server."""
        self._ended, self._took = time.monotonic(), took
        if followed:
            self._ask(stub, asked, during=False)

    def drop(self) -> None:
        if self._held is not None:
            self._held.answer.cancel()
            self._held = None

    def _ask(self, stub: Any, asked: orchestrator_pb2.AssignRequest, *, during: bool) -> None:
        if (self._held is None or not self._held.good) and time.monotonic() >= self._pauses[during]:
            self._held = _Ticket(stub, asked, partial(self._without, during))

    def _without(self, during: bool) -> None:
        self._pauses[during] = time.monotonic() + _PAUSE


class _Ticket:
    """A ticket, or the hope of one."""

    def __init__(self, stub: Any, asked: orchestrator_pb2.AssignRequest, on_none: Callable[[], None]) -> None:
        self._on_none = on_none
        self.room = room(asked.prompt_tokens)
        """Tokens of a prompt that it is good for."""
        self._asked_at = time.monotonic()
        self._until = self._asked_at + _ANSWER_SECONDS
        wanted = orchestrator_pb2.AssignRequest(request=asked.request, prompt_tokens=self.room, ahead=True)
        self.answer = asyncio.ensure_future(self._answer(stub, wanted))

    @property
    def good(self) -> bool:
        return time.monotonic() < self._until

    async def _answer(
        self, stub: Any, wanted: orchestrator_pb2.AssignRequest
    ) -> orchestrator_pb2.AssignResponse | None:
        """None: there is none."""
        with contextlib.suppress(grpc.aio.AioRpcError):
            assigned: orchestrator_pb2.AssignResponse = await stub.Assign(wanted, timeout=_ANSWER_SECONDS)
            if assigned.ticket:
                self._until = self._asked_at + _USED * assigned.valid_for.ToNanoseconds() / 1e9
                return assigned
        self._until = -math.inf
        self._on_none()
        return None


def room(prompt_tokens: int) -> int:
    """Tokens of the next prompt that a ticket is asked for: as a conversation grows, and no more, for what is asked for
    weighs in the choice of the server."""
    return prompt_tokens + max(128, prompt_tokens // 4)
