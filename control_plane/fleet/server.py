"""What the fleet picture is made of: servers, what was learned of their models, and the requests they work on."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from typing import TypeAlias

import msgspec

from control_plane.domain.lease import Lease
from control_plane.domain.model import ModelCard, ModelName, Price, Provider, ServerId
from control_plane.domain.request import RouteRequest
from control_plane.domain.server import Health, LeaseState, Report
from control_plane.fleet.charge import Charge
from control_plane.prediction.features import Features, RowKey
from control_plane.prefix.cache import Credit
from control_plane.scheduling.breaker import Breaker
from control_plane.scheduling.stats import RuntimeStats

PairKey: TypeAlias = tuple[ModelName, Provider]
"""One model, of whatever server."""


class OutcomeKind(Enum):
    SUCCESS = "success"
    FAILURE = "failure"
    NEUTRAL = "neutral"
    """Says nothing about the server: cancelled, refused for the request's own sake, busy."""


class Outcome(msgspec.Struct, frozen=True):
    """How a dispatched request ended."""

    kind: OutcomeKind
    ttft: float | None = None
    """Seconds from dispatch to the first token."""
    tpot: float | None = None
    broken_off: bool = False
    """It failed after its first token."""


@dataclass(slots=True)
class Pair:
    """What was learned of one model on one server."""

    stats: RuntimeStats
    breaker: Breaker
    fingerprint: str
    """Under which it was learned."""
    broke_off: bool = False
    """It has broken off an answer, and given none since that it began later: what it says next is held back until it
    is whole, so that another server can still be asked."""


@dataclass(slots=True)
class Expected:
    """What is expected of a flight at its dispatch."""

    features: Features = field(default_factory=partial(Features, 0.0))
    """What that is expected from."""
    ttft: float | None = None
    """Median seconds from the dispatch."""
    tpot: float | None = None
    first_at: float = 0.0
    """Monotonic seconds of the first token, after the prompts of those before."""
    end_at: float = 0.0
    """Monotonic seconds of the end of its answer; put right when the first token comes."""
    slow_at: float = math.inf
    """Monotonic seconds at which nine of ten have their first token."""
    overdue_at: float = math.inf
    """Monotonic seconds at which its first token is too late."""
    work: float = 0.0
    """Seconds of service that it takes of the server."""
    uncached: float = 0.0
    """Tokens of its prompt that have to be prefilled."""
    lane: float = 0.0
    """Of those seconds, the ones for which nobody else's prompt is prefilled."""
    credit: Credit | None = None
    """For what its prompt leaves in the server's prefix cache."""


@dataclass(eq=False, slots=True)
class Flight:
    """A request that a server is working on. Ends with Fleet.end, exactly once."""

    server: Server
    model: ModelName
    provider: Provider
    price: Price
    pair: Pair
    """What the outcome is learned for; one that has been replaced since learns in vain."""
    breaker_epoch: int
    began: float
    """Monotonic seconds of the dispatch."""
    cold: bool
    """The model had to be loaded: its times say nothing of the next request."""
    assigned: bool = False
    """Its client calls the server itself."""
    ahead: bool = False
    """Its client has asked for a ticket ahead of need."""
    held: bool = False
    """Its server has just broken off an answer: nothing of this one is passed on until it is whole."""
    on_lost: Callable[[], None] | None = None
    """Called when the server's lease runs out: nothing will come any more."""
    on_overdue: Callable[[], None] | None = None
    """Called when its first token is so late that another server may be sooner, and again while it goes on waiting.
    Only what says when the first token has come may set it."""
    request: RouteRequest | None = None
    expected: Expected = field(default_factory=Expected)
    charge: Charge = field(default_factory=Charge)
    """Who pays for it."""

    @property
    def server_id(self) -> ServerId:
        return self.server.id

    @property
    def row_key(self) -> RowKey:
        return self.server.id, self.model, self.provider

    @property
    def endpoint(self) -> str:
        return self.server.report.identity.endpoint


class Prefilling(dict["Flight", None]):
    """Flights without a first token yet, in order, and what they come to."""

    __slots__ = ("_done", "_going", "seconds", "tokens")

    def __init__(self) -> None:
        self.clear()

    def add(self, flight: Flight) -> None:
        """The last in order."""
        self[flight] = self._going[flight] = None
        self.tokens += flight.expected.uncached
        self.seconds += flight.expected.lane

    def discard(self, flight: Flight) -> bool:
        """Whether it was one of them."""
        if flight not in self:
            return False
        del self[flight]
        self.tokens -= flight.expected.uncached
        self.seconds -= flight.expected.lane
        if flight in self._going:
            del self._going[flight]
        else:
            self._done -= flight.expected.uncached
        if not self:
            self.clear()  # of what rounding has left
        return True

    def clear(self) -> None:
        super().clear()
        self.tokens = self.seconds = 0.0
        """Of prompts that have to be prefilled, and for which they keep the server."""
        self._going: dict[Flight, None] = {}
        """Those that were not expected to have their first tokens when somebody last looked."""
        self._done = 0.0
        """Tokens of the others."""

    def backlog(self, now: float) -> float:
        """Tokens of prompts that are still to be prefilled, as far as is known: they are done in order."""
        partly = 0.0
        through: list[Flight] = []
        for flight in self._going:
            expected = flight.expected
            left = expected.first_at - now
            if left <= 0:
                through.append(flight)
            elif left >= expected.lane:
                break
            else:
                partly += expected.uncached * (1 - left / expected.lane)
        for flight in through:
            del self._going[flight]
            self._done += flight.expected.uncached
        return max(0.0, self.tokens - self._done - partly)


@dataclass(eq=False, slots=True)
class Server:
    """One model server."""

    report: Report
    lease: Lease
    attached_wall: float
    reported_wall: float
    cards: tuple[ModelCard, ...] = ()
    """Models with definitions applied."""
    held: frozenset[PairKey] = frozenset()
    """Keys of the cards."""
    drain_ordered: bool = False
    attachment: Attachment | None = None
    pairs: dict[PairKey, Pair] = field(default_factory=dict)
    flights: set[Flight] = field(default_factory=set)
    prefilling: Prefilling = field(default_factory=Prefilling)
    lane_until: float = 0.0
    """Monotonic seconds when the last of them is expected to have it."""
    idle: set[Flight] = field(default_factory=set)
    """Those that were asked for ahead of need and, as far as is known, have not come: they hold a slot, no more."""
    lost_at: float = 0.0
    echoed: int = 0
    """The lease epoch that the server has been told of, by its own word; with it came the key of tickets."""
    ticket_key: bytes = field(default_factory=lambda: secrets.token_bytes(32))
    direct: bool = False
    """Whether it was last seen to know the key."""
    tickets_since: int = 0
    """Tickets of earlier lease epochs are void: what they stood for was given up."""

    @property
    def id(self) -> ServerId:
        return self.report.identity.server_id

    @property
    def draining(self) -> bool:
        return self.drain_ordered or self.report.draining

    @property
    def state(self) -> LeaseState:
        """The lease's state; a draining server with a live lease is DRAINING."""
        if self.draining and self.lease.state is LeaseState.LIVE:
            return LeaseState.DRAINING
        return self.lease.state

    @property
    def ready(self) -> bool:
        sound = self.lease.state is LeaseState.LIVE and self.report.health is Health.READY
        return sound and (self.knows_key or not self.report.needs_tickets)

    @property
    def knows_key(self) -> bool:
        """Whether it can tell our tickets from forged ones."""
        return self.report.takes_tickets and self.echoed == self.lease.epoch


@dataclass(eq=False, slots=True)
class Attachment:
    """One report stream."""

    server: Server
    on_directive: Callable[[], None]
    """Called when the server must be told something before its next report."""
    superseded: bool = False
