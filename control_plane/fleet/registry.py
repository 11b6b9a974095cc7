"""The live picture of the fleet: who is here, what they hold, how they do.

One object, one event loop, no awaits: every method is a single step. Time comes in as `now`
(monotonic seconds) and `wall` (seconds since 1970, shown to people only).
"""

from __future__ import annotations

import logging
import math
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import partial

from control_plane.domain.definition import Definitions
from control_plane.domain.errors import DomainError, unknown_server
from control_plane.domain.learned import Learned
from control_plane.domain.lease import Lease
from control_plane.domain.model import ModelCard, ModelName, ModelState, Price, Provider, ServerId
from control_plane.domain.request import RouteRequest
from control_plane.domain.server import BreakerState, Failed, Health, LeaseState, Report
from control_plane.domain.task import Feature, TaskType
from control_plane.fleet.charge import Charge
from control_plane.prediction.features import Coefficients, Features, Kin, RowKey, ttft
from control_plane.prediction.latency import LatencyModel
from control_plane.prediction.output_length import OutputLength
from control_plane.prefix.cache import CacheRow, Credit
from control_plane.prefix.index import Floats, PrefixIndex
from control_plane.scheduling.breaker import Breaker, BreakerPolicy
from control_plane.scheduling.stats import RuntimeStats, StatsPolicy
from control_plane.selection.table import CandidateRow, CandidateTable

log = logging.getLogger(__name__)

# A success rate this close to where it began needs no more watching.
_NEARLY = 0.005

# What was learned of models that a server holds no more is kept for as many of them as it holds,
# and at least for so many: a restart or a reload must not forget, ever new names must not pile up.
_GONE_KEPT = 64

# A first token is too late after so many times what nine of ten are expected to take, and after so many seconds.
_OVERDUE = 2.0
_OVERDUE_SOONEST = 1.0
# Observations before it is known how long that takes. Till then nobody is waited for longer than the objective.
_EVIDENCE = 0.5

# Kinds of requests whose length of answer is looked up once a second.
_LENGTHS_KEPT = 1000

PairKey = tuple[ModelName, Provider]

# Pairs of an earlier process that have not been seen yet.
_REMEMBERED = 10_000


class OutcomeKind(Enum):
    SUCCESS = "success"
    FAILURE = "failure"
    NEUTRAL = "neutral"
    """Says nothing about the server: cancelled, refused for the request's own sake, busy."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a dispatched request ended."""

    kind: OutcomeKind
    ttft: float | None = None
    """Seconds from dispatch to the first token."""
    tpot: float | None = None


@dataclass(slots=True)
class Pair:
    """What was learned of one model on one server."""

    stats: RuntimeStats
    breaker: Breaker
    fingerprint: str
    """Under which it was learned."""


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
    on_lost: Callable[[], None] | None = None
    """Called when the server's lease runs out: nothing will come any more."""
    on_overdue: Callable[[], None] | None = None
    """Called once when its first token is so late that another server is to be asked. Only what says when the first
    token has come may set it."""
    overdue_at: float = math.inf
    """Monotonic seconds when that is."""
    request: RouteRequest | None = None
    promised_ttft: float | None = None
    """Median seconds from its dispatch, as expected then."""
    promised_tpot: float | None = None
    features: Features = field(default_factory=partial(Features, 0.0))
    """At its dispatch."""
    expected_first: float = 0.0
    """Monotonic seconds of the first token, as expected at the dispatch."""
    expected_end: float = 0.0
    """Monotonic seconds."""
    work: float = 0.0
    """Seconds of service that it is expected to take of the server."""
    lane: float = 0.0
    """Of those, seconds for which nobody else's prompt is prefilled."""
    credit: Credit | None = None
    """For what its prompt leaves in the server's prefix cache."""
    charge: Charge = field(default_factory=Charge)
    """Who pays for it."""

    @property
    def server_id(self) -> ServerId:
        return self.server.id

    @property
    def endpoint(self) -> str:
        return self.server.report.identity.endpoint


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
    prefilling: dict[Flight, None] = field(default_factory=dict)
    """Flights without a first token yet, in order."""
    lane_until: float = 0.0
    """Monotonic seconds when the last of them is expected to have it."""
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


@dataclass(frozen=True, slots=True)
class InitialStats:
    """What is assumed of a model until it is measured; None: what is assumed of any."""

    success: float | None = None
    ttft: float | None = None
    """Seconds."""
    tpot: float | None = None


@dataclass(frozen=True, slots=True)
class FleetPolicy:
    lease_duration: float
    forget_after: float
    warm_up: float
    stats: StatsPolicy
    breaker: BreakerPolicy
    initial: Mapping[str, InitialStats] = field(default_factory=dict)
    """By "name" or "provider/name" of a model; the latter takes precedence, a definition's own over both."""


class Fleet:
    """Owner of the fleet picture and of the candidate table that the selector reads."""

    def __init__(self, policy: FleetPolicy, definitions: Definitions, now: float) -> None:
        self._policy = policy
        self._definitions = definitions
        self._servers: dict[ServerId, Server] = {}
        self._epochs: dict[ServerId, int] = {}
        self._warm_at = now + policy.warm_up
        self._remembered: dict[tuple[ServerId, PairKey], tuple[str, RuntimeStats]] = {}
        """Fingerprint and statistics of an earlier process."""
        self._troubled: set[tuple[ServerId, PairKey]] = set()
        self._listeners: list[Callable[[ServerId, bool], None]] = []
        self._without_tickets: frozenset[Failed] | None = None
        self.on_capacity: Callable[[], None] = lambda: None
        self._latency = LatencyModel()
        self._coefficients: dict[RowKey, Coefficients[float]] = {}
        """Of every row of the table, as the table has them."""
        self._lengths = OutputLength()
        self._lengths_at: dict[tuple[TaskType, ModelName, int | None], tuple[float, float]] = {}
        """Mean of an answer, and until when it is good enough, monotonic seconds."""
        self._prefixes = PrefixIndex()
        self._caching = False
        self.on_end: Callable[[Flight], None] = lambda flight: None
        """Told of each flight once, when it ends."""
        self.table = CandidateTable([])

    # ------------------------------------------------------------- reading ---

    def servers(self) -> list[Server]:
        """Every server known, by id. Safe from another thread: what it sorts is a copy made in one step."""
        return sorted(self._servers.values(), key=lambda server: server.id)

    def server(self, server_id: str) -> Server:
        """Raises UNKNOWN_SERVER."""
        try:
            return self._servers[ServerId(server_id)]
        except KeyError:
            raise unknown_server(server_id, tuple(sorted(self._servers))) from None

    def instance(self, server_id: ServerId) -> str | None:
        """The instance that a server reports now; None if it is not known."""
        server = self._servers.get(server_id)
        return server.report.identity.instance_id if server else None

    def without_tickets(self) -> frozenset[Failed]:
        """Servers that cannot be called directly, as they are now."""
        if self._without_tickets is None:
            self._without_tickets = frozenset(
                Failed(server.id, server.report.identity.instance_id)
                for server in self._servers.values()
                if not server.knows_key
            )
        return self._without_tickets

    @property
    def definitions(self) -> Definitions:
        return self._definitions

    def warming_up(self, now: float) -> float:
        """Seconds until it may be known what the fleet can do, 0 if it is known: servers still
        attach after the start, and one whose engine comes up may not know its models yet."""
        if now < self._warm_at:
            return self._warm_at - now
        unknown = any(
            server.lease.state is LeaseState.LIVE and server.report.health is Health.STARTING and not server.cards
            for server in self._servers.values()
        )
        return max(self._policy.warm_up, 1.0) if unknown else 0.0

    def model_names(self) -> tuple[str, ...]:
        """Every model offered or defined, by name."""
        names = {card.name for server in self._servers.values() for card in server.cards}
        names.update(definition.name for definition in self._definitions)
        return tuple(sorted(names))

    def resolve(self, text: str) -> tuple[ModelName, Provider | None] | None:
        """'name' or 'provider/name' as a pin; None if no such model is offered or defined."""
        found = self.table.resolve(text)
        if found is None:
            for definition in self._definitions:
                if text == definition.name:
                    return definition.name, None
                if text == f"{definition.provider}/{definition.name}":
                    return definition.name, definition.provider
        return found

    def listen(self, listener: Callable[[ServerId, bool], None]) -> Callable[[], None]:
        """Call `listener(server_id, urgent)` at every change; returns how to stop that."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    # ----------------------------------------------------------- attaching ---

    def attach(self, report: Report, now: float, wall: float, on_directive: Callable[[], None]) -> Attachment:
        """Begin a report stream: grants the next lease epoch and supersedes an older stream."""
        server_id = report.identity.server_id
        epoch = self._epochs[server_id] = self._epochs.get(server_id, 0) + 1
        server = self._servers.get(server_id)
        if server is None:
            server = Server(report, Lease.grant(epoch, now, self._policy.lease_duration), wall, wall)
            self._servers[server_id] = server
        else:
            if server.attachment is not None:
                server.attachment.superseded = True
                server.attachment.on_directive()
            if server.report.identity.instance_id != report.identity.instance_id:
                # A new process: the drain order was for the old one, and its work died with it.
                server.drain_ordered = False
                self._abandon(server)
                for pair in server.pairs.values():
                    pair.stats = pair.stats.renewed(now)
            server.attached_wall = server.reported_wall = wall
            server.lease = Lease.grant(epoch, now, self._policy.lease_duration)
        server.attachment, self._without_tickets = Attachment(server, on_directive), None
        self._accept(server, report, rebuild=True, now=now)
        log.info(
            "%s attached: %s, %s, epoch %d, %d models",
            server_id, report.identity.endpoint, report.engine, epoch, len(report.models),
        )  # fmt: skip
        return server.attachment

    def update(self, attachment: Attachment, report: Report, now: float, wall: float) -> None:
        """A later report of the same stream. Raises SUPERSEDED, or INVALID_REQUEST when the
        stream changes its server_id."""
        server = attachment.server
        if attachment.superseded:
            raise superseded(server.id)
        if report.identity.server_id != server.id:
            raise DomainError("INVALID_REQUEST", "identity.server_id must not change during a stream")
        before = server.state
        server.lease = server.lease.renewed(now, self._policy.lease_duration)
        self._epochs[server.id] = server.lease.epoch
        server.reported_wall = wall
        static = report.models != server.report.models or report.identity != server.report.identity or not server.cards
        health = report.health is not server.report.health
        self._accept(server, report, rebuild=static, now=now)
        self._changed(server, urgent=static or health or server.state is not before)

    def heard(self, attachment: Attachment, lease_epoch: int, now: float) -> None:
        """A report of tickets alone: a sign of life, and a word on the lease. Raises SUPERSEDED."""
        server = attachment.server
        if attachment.superseded:
            raise superseded(server.id)
        if server.lease.state is LeaseState.LIVE:  # one that is lost comes back with a whole report
            server.lease = server.lease.renewed(now, self._policy.lease_duration)
        if self._echo(server, lease_epoch):
            self._refresh(server)
            self._changed(server, urgent=True)
            self.on_capacity()

    def detach(self, attachment: Attachment, *, expected: bool = False) -> None:
        """The stream ended, for whatever reason; `expected` if this side ended it."""
        server = attachment.server
        if attachment.superseded or server.attachment is not attachment:
            return
        server.attachment = None
        server.lease = server.lease.broken()
        level = logging.INFO if expected or server.draining else logging.WARNING
        log.log(level, "%s: report stream ended, %s", server.id, server.lease.state.name)
        self._refresh(server)
        self._changed(server, urgent=True)

    def drain(self, server_id: str, undo: bool) -> Server:
        """Order a server to take nothing new, or to serve again. Raises UNKNOWN_SERVER."""
        server = self.server(server_id)
        if server.drain_ordered is undo:
            server.drain_ordered = not undo
            log.info("%s: %s", server_id, "serve again" if undo else "drain")
            self._refresh(server)
            if server.attachment:
                server.attachment.on_directive()
            self._changed(server, urgent=True)
        return server

    def define(self, definitions: Definitions, now: float) -> None:
        """Put new model definitions in force."""
        self._definitions = definitions
        for server in self._servers.values():
            server.cards = tuple(definitions.apply(card) for card in server.report.models)
        self._rebuild(now)
        for server in self._servers.values():
            self._changed(server, urgent=True)

    def tick(self, now: float) -> None:
        """Let time pass: leases expire, breakers reopen, rates recover, the lost are forgotten."""
        for server in list(self._servers.values()):
            lease = server.lease.at(now)
            if lease.state is not server.lease.state:
                server.lease = lease
                server.lost_at = now
                log.warning("%s: LOST, lease of epoch %d ran out", server.id, lease.epoch)
                self._abandon(server)
                self._refresh(server)
                self._changed(server, urgent=True)
            elif lease.state is LeaseState.LOST and now - server.lost_at > self._policy.forget_after:
                del self._servers[server.id]
                for card in server.cards:
                    self._latency.forget((server.id, card.name, card.provider))
                self._rebuild(now)
                self._changed(server, urgent=True)
        for key in list(self._troubled):
            self._refresh_pair(*key, now)
        for pair in self._latency.moved(now):
            self._predict(pair, now)
        for server in self._servers.values():
            if server.prefilling and now >= min(server.lane_until, next(iter(server.prefilling)).overdue_at):
                self._overdue(server, now)

    # --------------------------------------------------------- dispatching ---

    def begin(
        self,
        row: int,
        now: float,
        request: RouteRequest | None = None,
        cached: float = 0.0,
        patience: float = math.inf,
    ) -> Flight:
        """Take a slot for a request on the chosen row of the table; so many tokens of its prompt are expected to be
        `cached` there. A server of which little is known is given `patience` seconds for the first token."""
        chosen = self.table.rows[row]
        server_id, model, provider = chosen.server_id, chosen.card.name, chosen.card.provider
        server = self._servers[server_id]
        pair = self._pair(server, (model, provider))
        pair.breaker = pair.breaker.on_dispatch(now)
        if pair.breaker.state is not BreakerState.CLOSED:
            self._refresh_pair(server_id, (model, provider), now)
        cold = self.table.cold is not None and bool(self.table.cold[row])
        flight = Flight(server, model, provider, chosen.card.price, pair, pair.breaker.epoch, now, cold)
        flight.request = request
        self._expect(flight, row, now, cached, patience)
        server.flights.add(flight)
        self.table.take(row)
        self._refresh_work(server, now)
        self._changed(server, urgent=False)
        return flight

    def end(self, flight: Flight, outcome: Outcome, now: float) -> None:
        """Give the slot back and learn from the outcome. A second call does nothing."""
        server = flight.server
        if flight not in server.flights:
            return
        server.flights.discard(flight)
        begun = flight not in server.prefilling
        self._out_of_prefill(flight, now)
        self.on_end(flight)
        key, pair = (flight.model, flight.provider), flight.pair
        if outcome.kind is OutcomeKind.SUCCESS:
            self._learn(flight, outcome, now)
            ttft, service = (None, None) if flight.cold else (outcome.ttft, now - flight.began)
            pair.stats = pair.stats.observe_success(ttft, outcome.tpot, now, service)
            pair.breaker = pair.breaker.on_success(now, flight.breaker_epoch)
        elif outcome.kind is OutcomeKind.FAILURE:
            pair.stats = pair.stats.observe_failure(now)
            pair.breaker = pair.breaker.on_failure(now, flight.breaker_epoch)
        else:
            pair.breaker = pair.breaker.on_cancel(now, flight.breaker_epoch)
        if flight.credit is not None:
            if begun or outcome.kind is OutcomeKind.SUCCESS:
                self._prefixes.confirm(flight.credit)
            else:
                self._prefixes.abandon(flight.credit)
        if self._servers.get(server.id) is server:
            self._refresh(server)
            self._refresh_work(server, now)
            self._refresh_pair(server.id, key, now)
            self._changed(server, urgent=False)
        self.on_capacity()

    def first_token(self, flight: Flight, now: float) -> None:
        """The first token of a flight has come: the server may begin with the next prompt."""
        if flight in flight.server.prefilling:
            self._out_of_prefill(flight, now)
            self._refresh_work(flight.server, now)
            self.on_capacity()

    # ---------------------------------------------------------- prediction ---

    @property
    def caches_prefixes(self) -> bool:
        """Whether some model here keeps the beginnings of prompts."""
        return self._caching

    def cached(self, request: RouteRequest) -> Floats | None:
        """Tokens of the prompt that each row of the table is expected to have in its prefix cache, shape (rows,)."""
        return self._prefixes.match(request.blocks) if request.blocks is not None else None

    def _expect(self, flight: Flight, row: int, now: float, cached: float, patience: float) -> None:
        """What is expected of a flight that begins."""
        request, server, table = flight.request, flight.server, self.table
        if request is None:
            return
        load = server.report.load
        backlog = sum(other.features.uncached_tokens for other in server.prefilling)
        streams = len(server.flights) - len(server.prefilling) + load.foreign
        flight.features = Features(
            request.prompt_tokens, cached, backlog, streams, load.waiting, load.kv_cache_utilization, flight.cold
        )
        coefficients = self._coefficients[self._row_key(flight)]
        wait = max(0.0, server.lane_until - now)
        uncached = flight.features.uncached_tokens
        flight.lane = coefficients.per_backlog_token * uncached
        flight.expected_first = now + wait + ttft(coefficients, uncached, 0.0, 0.0)
        if flight.cold:
            flight.expected_first += float(table.load_time[row]) if table.load_time[row] > 0 else 0.0
        if not flight.cold:
            expected = ttft(coefficients, uncached, backlog, float(load.waiting)) * coefficients.ttft_spread[-1]
            longest = math.inf if coefficients.evidence >= _EVIDENCE else patience
            flight.overdue_at = now + min(longest, max(_OVERDUE_SOONEST, _OVERDUE * expected))
        flight.promised_ttft = ttft(coefficients, uncached, backlog, float(load.waiting))
        flight.promised_tpot = coefficients.tpot_base + coefficients.tpot_per_stream * streams
        tokens = self._length(request, flight.model, now)
        decoding = tokens * flight.promised_tpot
        flight.expected_end = flight.expected_first + decoding
        flight.work = flight.lane + decoding / max(load.slots, 1)
        if request.blocks is not None:
            flight.credit = self._prefixes.dispatch(self._row_key(flight), request.blocks)
        server.prefilling[flight] = None
        server.lane_until = max(server.lane_until, now) + flight.lane

    def _length(self, request: RouteRequest, model: ModelName, now: float) -> float:
        """Mean tokens of an answer, looked up once a second."""
        key = request.task_type, model, request.max_tokens
        known = self._lengths_at.get(key)
        if known is None or now >= known[1]:
            if len(self._lengths_at) >= _LENGTHS_KEPT:
                self._lengths_at.clear()
            known = self._lengths_at[key] = self._lengths.expect(*key).mean, now + 1.0
        return known[0]

    def _out_of_prefill(self, flight: Flight, now: float) -> None:
        server = flight.server
        if flight in server.prefilling:
            del server.prefilling[flight]
            flight.expected_end += now - flight.expected_first
            left = sum(other.lane for other in server.prefilling)
            server.lane_until = now + left if server.prefilling else 0.0

    def _overdue(self, server: Server, now: float) -> None:
        """Prompts that should be through are not, as far as is known."""
        if now >= server.lane_until and not any(flight.on_overdue for flight in server.prefilling):
            server.prefilling.clear()  # nobody will tell of their first tokens
        for flight in list(server.prefilling):
            if flight.on_overdue is not None and now >= flight.overdue_at:
                log.info("%s: no first token after %.1f s", server.id, now - flight.began)
                flight.overdue_at, late = math.inf, flight.on_overdue
                late()
        for flight in server.prefilling:
            if flight.on_overdue is not None:
                self._latency.overdue(self._row_key(flight), flight.features, now - flight.began, now)
                # It may take as long again as it has been late.
                server.lane_until = now + (now - flight.expected_first) / 2 + flight.lane
                self._predict(self._row_key(flight), now)
                break
        self._refresh_work(server, now)

    def _learn(self, flight: Flight, outcome: Outcome, now: float) -> None:
        if flight.request is None:
            return
        features, used = flight.features, flight.charge.used
        if used is not None and used.whole and used.prompt:
            if flight.credit is not None:
                self._prefixes.finish(flight.credit, used.cached_prompt, used.prompt)
                flight.credit = None
            features = replace(features, prompt_tokens=used.prompt, cached_tokens=used.cached_prompt)
        self._latency.observe(
            self._row_key(flight), features, outcome.ttft, outcome.tpot, now,
            promised_ttft=flight.promised_ttft, promised_tpot=flight.promised_tpot,
        )  # fmt: skip
        if used is not None and used.whole and used.completion:
            self._lengths.observe(flight.request.task_type, flight.model, used.completion)

    def _refresh_work(self, server: Server, now: float) -> None:
        slot_at = math.nan
        if server.flights and len(server.flights) + server.report.load.foreign >= server.report.load.slots:
            # Whatever has outlived its expectation may go on for a quarter of the time that it has taken.
            slot_at = min(max(flight.expected_end, now + (now - flight.began) / 4) for flight in server.flights)
        self.table.set_work(
            server.id,
            streams=max(0, len(server.flights) - len(server.prefilling)) + server.report.load.foreign,
            lane_until=server.lane_until,
            slot_at=slot_at,
        )

    def _predict(self, key: RowKey, now: float) -> None:
        """Bring what is expected of a row up to date."""
        row = self.table.find(*key)
        if row is not None:
            self._coefficients[key] = coefficients = self._latency.coefficients(key, now)
            self.table.set_prediction(row, coefficients)

    def _row_key(self, flight: Flight) -> RowKey:
        return flight.server.id, flight.model, flight.provider

    def _declare(self, server: Server, card: ModelCard, now: float) -> None:
        """What is known beforehand of a model's speed on a server."""
        stats = self._pair(server, (card.name, card.provider)).stats
        told_ttft, told_tpot = stats.ttft or card.ttft, stats.tpot or card.tpot
        kin = Kin(
            server.report.engine, server.report.hardware.device, card.name, card.fingerprint,
            ttft=told_ttft, tpot=told_tpot,
        )  # fmt: skip
        self._latency.declare((server.id, card.name, card.provider), kin, now)

    # ------------------------------------------------------------- learned ---

    def learned(self, now: float, wall: float) -> list[Learned]:
        """What was measured, to be kept for the next process."""
        return [
            Learned(
                server.id, model, provider, pair.fingerprint, stats.success_at(now), wall,
                stats.ttft, stats.tpot, stats.service, stats.requests, stats.failures,
            )
            for server in self._servers.values()
            for (model, provider), pair in server.pairs.items()
            if (stats := pair.stats).requests
        ]  # fmt: skip

    def remember(self, learned: Iterable[Learned], now: float, wall: float) -> None:
        """Take over what an earlier process measured, once a server reports the model under the same fingerprint."""
        for entry in learned:
            if len(self._remembered) >= _REMEMBERED:
                break
            key = entry.server_id, (entry.model, entry.provider)
            fresh = self._fresh(*key[1])
            stats = replace(
                fresh, success=entry.success, ttft=entry.ttft, tpot=entry.tpot, service=entry.service,
                requests=entry.requests, failures=entry.failures, updated_at=now - max(0.0, wall - entry.at),
            )  # fmt: skip
            self._remembered[key] = entry.fingerprint, stats

    # ------------------------------------------------------------- private ---

    def _accept(self, server: Server, report: Report, *, rebuild: bool, now: float) -> None:
        server.report = report
        self._echo(server, report.lease_epoch)
        if rebuild:
            before = server.cards
            server.cards = tuple(self._definitions.apply(card) for card in report.models)
            server.held = frozenset((card.name, card.provider) for card in server.cards)
            for card in server.cards:
                self._identify(server, card)
                self._declare(server, card, now)
            for card in before:
                if (card.name, card.provider) not in server.held:
                    self._latency.forget((server.id, card.name, card.provider))
            gone = [key for key in server.pairs if key not in server.held]
            for key in gone[: max(0, len(gone) - max(_GONE_KEPT, len(server.held)))]:
                del server.pairs[key]
            self._rebuild(now)
        else:
            self._refresh(server)
        self._changed(server, urgent=rebuild)
        self.on_capacity()

    def _echo(self, server: Server, lease_epoch: int) -> bool:
        """Take note of what the server has been told; whether that makes a difference to tickets."""
        server.echoed = lease_epoch
        if server.knows_key is server.direct:
            return False
        server.direct, self._without_tickets = server.knows_key, None
        return True

    def _identify(self, server: Server, card: ModelCard) -> None:
        """Begin to learn anew where the fingerprint is another one; an empty one says nothing."""
        key = (card.name, card.provider)
        known = key in server.pairs
        pair = self._pair(server, key)
        remembered = self._remembered.pop((server.id, key), None)
        if remembered is not None and not known and remembered[0] == card.fingerprint:
            pair.stats = remembered[1]
        if card.fingerprint and pair.fingerprint not in ("", card.fingerprint):
            log.info("%s: %s is another one than before, what was learned of it is forgotten", server.id, card.id)
            del server.pairs[key]
            pair = self._pair(server, key)
        pair.fingerprint = card.fingerprint or pair.fingerprint

    def _abandon(self, server: Server) -> None:
        server.tickets_since = server.lease.epoch + 1
        for flight in list(server.flights):
            if flight.on_lost:
                flight.on_lost()

    def _pair(self, server: Server, key: PairKey) -> Pair:
        pair = server.pairs.get(key)
        if pair is None:
            pair = server.pairs[key] = Pair(self._fresh(*key), Breaker.closed(self._policy.breaker), "")
        return pair

    def _fresh(self, model: ModelName, provider: Provider) -> RuntimeStats:
        """Before anything was measured."""
        definition = self._definitions.get(provider, model)
        given = self._policy.initial
        preset = given.get(f"{provider}/{model}") or given.get(model) or InitialStats()
        if definition is not None:
            preset = InitialStats(
                preset.success if definition.initial_success is None else definition.initial_success,
                preset.ttft if definition.initial_ttft is None else definition.initial_ttft,
                preset.tpot if definition.initial_tpot is None else definition.initial_tpot,
            )
        return RuntimeStats.initial(self._policy.stats, success=preset.success, ttft=preset.ttft, tpot=preset.tpot)

    def _rebuild(self, now: float) -> None:
        """The set of rows changed: build the table anew and fill in what moves."""
        self.table = CandidateTable(
            [
                CandidateRow(server.id, card, server.report.identity.labels)
                for server in self._servers.values()
                for card in server.cards
            ]
        )
        self._coefficients.clear()
        self._caching = any(Feature.PREFIX_CACHE in row.card.features for row in self.table.rows)
        self._prefixes.align(
            CacheRow(
                row.server_id,
                row.card.name,
                row.card.provider,
                self._servers[row.server_id].report.identity.instance_id,
                row.card.fingerprint,
                caches=Feature.PREFIX_CACHE in row.card.features,
                resident=row.card.state in (ModelState.WARM, ModelState.LOADING),
            )
            for row in self.table.rows
        )
        for server in self._servers.values():
            self._refresh(server)
            self._refresh_work(server, now)
            for card in server.cards:
                self._refresh_pair(server.id, (card.name, card.provider), now)

    def _refresh(self, server: Server) -> None:
        load = server.report.load
        self.table.set_server(
            server.id,
            ready=server.ready,
            draining=server.draining,
            slots=load.slots,
            used=len(server.flights) + load.foreign,
            waiting=load.waiting,
        )

    def _refresh_pair(self, server_id: ServerId, key: PairKey, now: float) -> None:
        """Bring the pair's row up to date; pairs that time alone will change stay under watch."""
        server = self._servers.get(server_id)
        if server is None or key not in server.held:
            self._troubled.discard((server_id, key))
            return
        pair = self._pair(server, key)
        stats, breaker = pair.stats, pair.breaker
        success = stats.success_at(now)
        self.table.set_stats(server_id, *key, success=success, ttft=stats.ttft, tpot=stats.tpot, service=stats.service)
        self._predict((server_id, *key), now)
        self.table.set_breaker(server_id, *key, open=not breaker.allows(now))
        if breaker.state is BreakerState.CLOSED and abs(success - stats.prior) < _NEARLY:
            self._troubled.discard((server_id, key))
        else:
            self._troubled.add((server_id, key))

    def _changed(self, server: Server, *, urgent: bool) -> None:
        for listener in self._listeners:
            listener(server.id, urgent)


def superseded(server_id: ServerId) -> DomainError:
    return DomainError("SUPERSEDED", f"a newer instance attached as {server_id!r}: stop this one or rename it")


def placements(servers: Iterable[Server]) -> dict[ModelName, list[tuple[Server, ModelCard]]]:
    """Which servers hold which model, by name."""
    found: dict[ModelName, list[tuple[Server, ModelCard]]] = {}
    for server in servers:
        for card in server.cards:
            found.setdefault(card.name, []).append((server, card))
    return dict(sorted(found.items()))
