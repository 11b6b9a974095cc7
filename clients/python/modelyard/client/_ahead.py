"""Tickets of direct mode that are taken ahead of need: who asks for the like again and again need not wait for each."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

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
_STOCK_SECONDS, _MOST = 0.02, 8
"""Tickets are taken for the calls of so many seconds, and for so many calls at most: what calls that follow at once
spend on taking them is divided by that."""
_MOST_SHAPES = 64
"""That are remembered."""

Asked = Callable[[int], orchestrator_pb2.AssignRequest]
"""What would be asked for the request of a call, if its prompt had so many tokens."""


class TicketsAhead:
    """What one client holds, and knows of what it asks for."""

    def __init__(self) -> None:
        self._shapes: dict[Hashable, Shape] = {}
        self._closed = False

    def shape(self, key: Hashable) -> Shape | None:
        """That of requests that routing cannot tell apart but for their length; None: there are no tickets ahead."""
        if self._closed:
            return None
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


class _Ticket(NamedTuple):
    assigned: orchestrator_pb2.AssignResponse
    room: int
    """Tokens of a prompt that it is good for."""
    until: float
    """Monotonic seconds."""


class Shape:
    """Requests that are all the same to routing but for the length of their prompts, and the tickets for the next."""

    def __init__(self) -> None:
        self._ended = -math.inf
        self._took = self._pause = math.inf
        self._prompt_tokens = 0
        self._pauses = {True: -math.inf, False: -math.inf}
        """Until when there is no try during a call (True) and after one."""
        self._most, self._most_until = _MOST, -math.inf
        """Tickets that are to be had at a time, as was found out until then."""
        self._held: deque[_Ticket] = deque()
        """The oldest first."""
        self._asking: _Asking | None = None

    def begins(self) -> bool:
        """A call begins; whether it follows another soon."""
        self._pause = time.monotonic() - self._ended
        return self._pause < _SOON

    async def take(self, prompt_tokens: int) -> orchestrator_pb2.AssignResponse | None:
        """A ticket, which nobody else gets, if one fits and is still good; waits a little for one on its way."""
        self._prompt_tokens = prompt_tokens
        taken, asking = self._take(prompt_tokens), self._asking
        if taken is None and asking is not None and asking.unclaimed and _fits(asking.room, prompt_tokens):
            asking.unclaimed -= 1
            await asyncio.wait([asking.task], timeout=_WAIT_SECONDS)
            taken = self._take(prompt_tokens)
        return taken

    def _take(self, prompt_tokens: int) -> orchestrator_pb2.AssignResponse | None:
        held = self._held
        self._forget_old()
        return held.popleft().assigned if held and _fits(held[0].room, prompt_tokens) else None

    def _forget_old(self) -> None:
        now = time.monotonic()
        while self._held and self._held[0].until <= now:
            self._held.popleft()

    def begun(self, stub: Any, asked: Asked) -> None:
        """A call that follows another has gone to the model server."""
        if self._took < _BRIEF and self._pause < _AT_ONCE:
            self._ask(stub, asked, during=True)

    def ended(self, stub: Any, asked: Asked, took: float, *, followed: bool) -> None:
        """A call has succeeded, so many seconds after it went to the model server."""
        self._ended, self._took = time.monotonic(), took
        if followed:
            self._ask(stub, asked, during=False)

    def refused(self) -> None:
        """The model server did not take one: those that came with it are not better."""
        self._held.clear()

    def drop(self) -> None:
        self._held.clear()
        self._most, self._most_until = 0, math.inf
        if self._asking is not None:
            self._asking.task.cancel()

    def _ask(self, stub: Any, asked: Asked, *, during: bool) -> None:
        """Take tickets if half of those that are wanted have been used."""
        now = time.monotonic()
        most = self._most if now < self._most_until else _MOST
        wanted = min(most, 1 + int(_STOCK_SECONDS / max(self._took + self._pause, 1e-6)))
        self._forget_old()
        if self._asking is None and 2 * len(self._held) < wanted and now >= self._pauses[during]:
            tokens = room(self._prompt_tokens)
            self._asking = _Asking(self, stub, asked, tokens, wanted - len(self._held), during=during)

    def came(self, tickets: list[_Ticket], asking: _Asking) -> None:
        """What was asked for, or less."""
        self._asking = None
        until = time.monotonic() + _PAUSE
        if not tickets:
            self._pauses[asking.during] = until
        elif len(tickets) < asking.count:
            self._most, self._most_until = len(tickets) + len(self._held), until
        self._held.extend(tickets)


class _Asking:
    """A call for tickets that is under way."""

    def __init__(self, shape: Shape, stub: Any, asked: Asked, tokens: int, count: int, *, during: bool) -> None:
        self.room = tokens
        self.count = self.unclaimed = count
        """Tickets, and those of them that nobody waits for."""
        self.during = during
        self.task = asyncio.ensure_future(self._ask(shape, stub, asked))

    async def _ask(self, shape: Shape, stub: Any, asked: Asked) -> None:
        wanted = asked(self.room)
        wanted.ahead, wanted.ahead_requests = True, self.count
        began, tickets = time.monotonic(), []
        try:
            assigned: orchestrator_pb2.AssignResponse = await stub.Assign(wanted, timeout=_ANSWER_SECONDS)
            if assigned.ticket:
                until = began + _USED * assigned.valid_for.ToNanoseconds() / 1e9
                tickets = [_Ticket(each, self.room, until) for each in (assigned, *assigned.more)]
        except grpc.aio.AioRpcError:
            pass
        finally:
            shape.came(tickets, self)


def room(prompt_tokens: int) -> int:
    """Tokens of the next prompt that a ticket is asked for: as a conversation grows, and no more, for what is asked for
    weighs in the choice of the server."""
    return prompt_tokens + max(128, prompt_tokens // 4)


def _fits(tokens: int, prompt_tokens: int) -> bool:
    """Whether a ticket for so many tokens is for such a prompt."""
    return prompt_tokens <= tokens <= 2 * room(prompt_tokens)
