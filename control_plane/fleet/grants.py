"""What the scheduler and those who ask it pass to each other: promises, grants, and what stands in the queue."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

import msgspec

from control_plane.domain.decision import DecisionRecord
from control_plane.domain.model import ServerId
from control_plane.domain.request import RouteRequest
from control_plane.domain.server import Failed
from control_plane.fleet.server import Flight
from control_plane.scheduling.queue import KindKey, Reached, Waiting
from control_plane.selection.table import Floats, Mask


class Promise(Protocol):
    """Of a grant: a future of asyncio, or of a clock of its own."""

    def done(self) -> bool: ...

    def cancelled(self) -> bool: ...

    def cancel(self) -> Any: ...

    def add_done_callback(self, callback: Callable[[Any], object], /) -> None: ...

    def __await__(self) -> Generator[Any, None, Grant]: ...

    def result(self) -> Grant: ...

    def exception(self) -> BaseException | None: ...

    def set_result(self, result: Grant, /) -> None: ...

    def set_exception(self, exception: BaseException, /) -> None: ...


class Loop(Protocol):
    """Whose clock the scheduler runs by: asyncio's event loop, or a simulated one."""

    def create_future(self) -> Promise: ...

    def call_soon(self, callback: Callable[[], None], /) -> Any: ...


class Grant(msgspec.Struct, frozen=True):
    """A server for a request, its slot taken."""

    flight: Flight
    queued: float
    """Seconds waited."""
    record: DecisionRecord | None
    """The whole decision, if it was asked for."""


class Wanted(msgspec.Struct, frozen=True):
    """A server for a request."""

    request: RouteRequest
    avoid: frozenset[Failed]
    arrived: float
    """Monotonic seconds when the request came first."""
    since: float
    """Monotonic seconds since when it waits."""
    explain: bool
    patient: bool = True
    """It also waits for servers whose models are not known yet."""
    background: bool = False
    """Nobody waits for it, so it takes what is free."""
    late: bool = False
    """It is too late to serve it well: others come first."""
    leaves: float = math.inf
    """Monotonic seconds when its client goes away."""
    due: float | None = None
    """Monotonic seconds when the answer of one that comes now is due. None: it is its turn among those who wait."""


@dataclass(slots=True)
class Waiter:
    """What the queue carries for a request."""

    future: Promise
    explain: bool
    leaves: float = math.inf
    """Monotonic seconds when its client goes away."""
    cached: Floats | None = None
    """Tokens of its prompt in the cache of each row, shape (rows,)."""
    cached_at: float = -math.inf
    """Monotonic seconds when that was looked up."""


class Standing(msgspec.Struct, frozen=True, eq=False):
    """Work in the background that waits for a server."""

    future: Promise
    """Its grant; of work in the background never an exception."""
    entry: Waiting[Waiter] | None
    """None: it did not have to wait."""


@dataclass(slots=True)
class Offer:
    """Rows that have opened, and how far down the queue they were offered."""

    rows: Mask
    reach: dict[KindKey, Mask]
    """Rows that can serve a kind, however much it needs."""
    choices: dict[KindKey, list[tuple[ServerId, int]]] = field(default_factory=dict)
    """Servers of rows that are still open, with their longest context, for kinds that can use one."""
    reached: Reached[Waiter] | None = None
    missed: bool = False
    """Somebody has come in the meantime."""

    def narrow(self, rows: Mask, servers: Callable[[Mask], list[tuple[ServerId, int]]]) -> None:
        """Only these rows are left."""
        self.rows = rows
        self.choices.clear()
        for kind, mask in self.reach.items():
            choices = servers(mask & rows)
            if choices:
                self.choices[kind] = choices


class Outlook(Enum):
    """What there is to hope for."""

    HERE = "here"
    """A server that can do it is there, though perhaps busy."""
    AWAY = "away"
    """Those that can do it are not ready, or draining, or without the model."""
    NONE = "none"
    """No server can do it."""
