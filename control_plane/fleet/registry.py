"""The live picture of the fleet: who is here, what they hold, how they do.

One object, one event loop, no awaits: every method is a single step. Time comes in as `now`
(monotonic seconds) and `wall` (seconds since 1970, shown to people only).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from msgspec.structs import replace

from control_plane.domain.definition import Definitions
from control_plane.domain.errors import DomainError, unknown_server
from control_plane.domain.learned import Learned
from control_plane.domain.lease import Lease
from control_plane.domain.model import ModelCard, ModelName, Provider, ServerId
from control_plane.domain.request import RouteRequest
from control_plane.domain.server import BreakerState, Failed, Health, LeaseState, Report
from control_plane.fleet.expectations import Expectations
from control_plane.fleet.server import Attachment, Flight, Outcome, OutcomeKind, Pair, PairKey, Server
from control_plane.prefix.index import Floats
from control_plane.scheduling.breaker import Breaker, BreakerPolicy
from control_plane.scheduling.stats import RuntimeStats, StatsPolicy
from control_plane.selection.table import CandidateRow, CandidateTable

log = logging.getLogger(__name__)

# A success rate this close to where it began needs no more watching.
_NEARLY = 0.005

# What was learned of models that a server holds no more is kept for as many of them as it holds,
# and at least for so many: a restart or a reload must not forget, ever new names must not pile up.
_GONE_KEPT = 64

# Pairs of an earlier process that have not been seen yet.
_REMEMBERED = 10_000


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
        self._lapses_at = -math.inf
        """No lease runs out before, and nobody is to be forgotten; monotonic seconds."""
        self.on_capacity: Callable[[], None] = lambda: None
        self._expectations = Expectations()
        self.on_end: Callable[[Flight], None] = lambda flight: None
        """Told of each flight once, when it ends."""
        self._table = CandidateTable([])
        self._ended: dict[tuple[Server, PairKey], float] = {}
        """Of which flights have ended since the table was looked at, and when the last one did."""

    # ------------------------------------------------------------- reading ---

    @property
    def table(self) -> CandidateTable:
        """What the selector reads, up to date. Flights may end many at a time, and nobody looks in between."""
        if self._ended:
            self._catch_up()
        return self._table

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
                    pair.stats, pair.broke_off = pair.stats.renewed(now), False
            server.attached_wall = server.reported_wall = wall
            server.lease = Lease.grant(epoch, now, self._policy.lease_duration)
        server.attachment, self._without_tickets = Attachment(server, on_directive), None
        self._lapses_at = min(self._lapses_at, server.lease.expires_at)
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
        before, was_ready = server.state, server.ready
        server.lease = server.lease.renewed(now, self._policy.lease_duration)
        self._epochs[server.id] = server.lease.epoch
        server.reported_wall = wall
        static = report.models != server.report.models or report.identity != server.report.identity or not server.cards
        health = report.health is not server.report.health
        self._accept(server, report, rebuild=static, now=now, was_ready=was_ready)
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
        self._catch_up()
        if now >= self._lapses_at:
            self._lapse(now)
        for key in list(self._troubled):
            self._recover(*key, now)
        self._expectations.tick(self._servers.values(), now)

    def _lapse(self, now: float) -> None:
        """Note which leases have run out, and forget those that are lost for long."""
        for server in list(self._servers.values()):
            if now < server.lease.expires_at:
                continue
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
                    self._expectations.forget(server.id, card)
                self._rebuild(now)
                self._changed(server, urgent=True)
        # Leases that are renewed run out later than that, so this is looked at once per lease, not at each tick.
        self._lapses_at = min((server.lease.expires_at for server in self._servers.values()), default=math.inf)

    def sound(self, row: int) -> bool:
        """Whether nothing speaks against the pair in a row of the table: its circuit breaker does not watch it, and it
        is not held back."""
        chosen = self.table.rows[row]
        pair = self._pair(self._servers[chosen.server_id], (chosen.card.name, chosen.card.provider))
        return pair.breaker.state is BreakerState.CLOSED and not pair.broke_off

    # --------------------------------------------------------- dispatching ---

    def begin(
        self,
        row: int,
        now: float,
        request: RouteRequest | None = None,
        cached: float = 0.0,
        patience: float = math.inf,
        *,
        ahead: bool = False,
    ) -> Flight:
        """Take a slot for a request on the chosen row of the table; so many tokens of its prompt are expected to be
        `cached` there. A server of which little is known is given `patience` seconds for the first token. `ahead`: it
        is still to come."""
        chosen = self.table.rows[row]
        server_id, model, provider = chosen.server_id, chosen.card.name, chosen.card.provider
        server = self._servers[server_id]
        pair = self._pair(server, (model, provider))
        pair.breaker = pair.breaker.on_dispatch(now)
        if pair.breaker.state is not BreakerState.CLOSED:
            self._refresh_pair(server_id, (model, provider), now)
        cold = self.table.cold is not None and bool(self.table.cold[row])
        flight = Flight(server, model, provider, chosen.card.price, pair, pair.breaker.epoch, now, cold)
        flight.request, flight.ahead = request, ahead
        flight.held = pair.broke_off and (request is None or request.server_id is None)  # else nobody else may be asked
        self._expectations.begin(flight, row, now, cached, patience)
        server.flights.add(flight)
        self.table.take(row)
        self._expectations.refresh(server, now)
        self._changed(server, urgent=False)
        return flight

    def end(self, flight: Flight, outcome: Outcome, now: float) -> None:
        """Give the slot back and learn from the outcome. A second call does nothing."""
        server = flight.server
        if flight not in server.flights:
            return
        server.flights.discard(flight)
        self._expectations.end(flight, outcome, now)
        self.on_end(flight)
        key, pair = (flight.model, flight.provider), flight.pair
        if outcome.kind is OutcomeKind.SUCCESS:
            ttft, service = (None, None) if flight.cold else (outcome.ttft, now - flight.began)
            pair.stats = pair.stats.observe_success(ttft, outcome.tpot, now, service)
            pair.breaker = pair.breaker.on_success(now, flight.breaker_epoch)
            pair.broke_off &= not flight.held  # one that began before says nothing of now
        elif outcome.kind is OutcomeKind.FAILURE:
            pair.stats = pair.stats.observe_failure(now)
            pair.breaker = pair.breaker.on_failure(now, flight.breaker_epoch)
            pair.broke_off |= outcome.broken_off
        else:
            pair.breaker = pair.breaker.on_cancel(now, flight.breaker_epoch)
        if self._servers.get(server.id) is server:
            self._ended[server, key] = now
            self._changed(server, urgent=False)
        self.on_capacity()

    def first_token(self, flight: Flight, now: float) -> None:
        """The first token of a flight has come: the server may begin with the next prompt."""
        if self._expectations.first_token(flight, now):
            self._expectations.refresh(flight.server, now)
            self.on_capacity()

    def has_come(self, flight: Flight, now: float) -> None:
        """The server is working on a request that was asked for ahead of need."""
        if flight in flight.server.idle:
            flight.server.idle.discard(flight)
            self._expectations.refresh(flight.server, now)

    # ---------------------------------------------------------- prediction ---

    @property
    def caches_prefixes(self) -> bool:
        """Whether some model here keeps the beginnings of prompts."""
        return self._expectations.caches_prefixes

    def cached(self, request: RouteRequest) -> Floats | None:
        """Tokens of the prompt that each row of the table is expected to have in its prefix cache, shape (rows,)."""
        return self._expectations.cached(request)

    def judge(self, tenant: str, request_id: str, score: float, now: float) -> bool | None:
        """See `Judgements.judge`."""
        return self._expectations.judgements.judge(tenant, request_id, score, now)

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

    def knowledge(self, now: float) -> dict[str, str]:
        """See `Expectations.knowledge`."""
        return self._expectations.knowledge(now)

    def knowledge_kept(self) -> None:
        """See `Expectations.kept`."""
        self._expectations.kept()

    def know(self, entries: Mapping[str, str], now: float) -> None:
        """See `Expectations.know`. To be called before a server attaches."""
        self._expectations.know(entries, now)

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

    def _accept(self, server: Server, report: Report, *, rebuild: bool, now: float, was_ready: bool = False) -> None:
        old, server.report = server.report, report
        self._echo(server, report.lease_epoch)
        if rebuild:
            before = server.cards
            server.cards = tuple(self._definitions.apply(card) for card in report.models)
            server.held = frozenset((card.name, card.provider) for card in server.cards)
            for card in server.cards:
                self._identify(server, card)
                self._expectations.declare(server, card, self._pair(server, (card.name, card.provider)), now)
            for card in before:
                if (card.name, card.provider) not in server.held:
                    self._expectations.forget(server.id, card)
            gone = [key for key in server.pairs if key not in server.held]
            for key in gone[: max(0, len(gone) - max(_GONE_KEPT, len(server.held)))]:
                del server.pairs[key]
            self._rebuild(now)
            for card in server.cards:
                self._refresh_pair(server.id, (card.name, card.provider), now)
        elif was_ready and server.ready and _as_busy(old, report):
            return  # nothing that the table tells: so it is with most reports
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

    def _catch_up(self) -> None:
        """Bring the rows up to date of which flights have ended."""
        ended, self._ended = self._ended, {}
        for (server, key), now in ended.items():
            if self._servers.get(server.id) is server:
                self._refresh(server)
                self._expectations.refresh(server, now)
                self._refresh_pair(server.id, key, now)

    def _rebuild(self, now: float) -> None:
        """The set of rows changed: build the table anew and fill in what moves."""
        before = self._table  # as it stands: what it lacks may have come since
        self._table = CandidateTable(
            [
                CandidateRow(server.id, card, server.report.identity.labels)
                for server in self._servers.values()
                for card in server.cards
            ]
        )
        fresh = [self._table.rows[number] for number in self._table.carry(before)]
        self._expectations.rebuilt(self._table, self._servers, now)
        for server in self._servers.values():
            self._refresh(server)
            self._expectations.refresh(server, now)
        for row in fresh:
            self._refresh_pair(row.server_id, (row.card.name, row.card.provider), now)
        self._catch_up()

    def _refresh(self, server: Server) -> None:
        load = server.report.load
        self._table.set_server(
            server.id,
            ready=server.ready,
            draining=server.draining,
            slots=load.slots,
            used=len(server.flights) + load.foreign,
            waiting=load.waiting,
        )

    def _refresh_pair(self, server_id: ServerId, key: PairKey, now: float) -> None:
        """Bring the pair's row up to date."""
        server = self._servers.get(server_id)
        if server is None or key not in server.held:
            return
        stats = self._pair(server, key).stats
        self._table.set_stats(server_id, *key, success=1.0, ttft=stats.ttft, tpot=stats.tpot, service=stats.service)
        self._expectations.show((server_id, *key), now)
        self._recover(server_id, key, now)

    def _recover(self, server_id: ServerId, key: PairKey, now: float) -> None:
        """Bring up to date what time alone changes of a pair's row; while it does, the pair stays under watch."""
        server = self._servers.get(server_id)
        if server is None or key not in server.held:
            self._troubled.discard((server_id, key))
            return
        pair = self._pair(server, key)
        stats, breaker = pair.stats, pair.breaker
        success = stats.success_at(now)
        self._table.set_success(server_id, *key, success)
        self._table.set_breaker(server_id, *key, open=not breaker.allows(now))
        if breaker.state is BreakerState.CLOSED and abs(success - stats.prior) < _NEARLY:
            self._troubled.discard((server_id, key))
        else:
            self._troubled.add((server_id, key))

    def _changed(self, server: Server, *, urgent: bool) -> None:
        for listener in self._listeners:
            listener(server.id, urgent)


def _as_busy(old: Report, new: Report) -> bool:
    """Whether both reports leave as much room."""
    before, now = old.load, new.load
    return (before.slots, before.foreign, before.waiting, old.draining) == (
        now.slots, now.foreign, now.waiting, new.draining,
    )  # fmt: skip


def superseded(server_id: ServerId) -> DomainError:
    return DomainError("SUPERSEDED", f"a newer instance attached as {server_id!r}: stop this one or rename it")


def placements(servers: Iterable[Server]) -> dict[ModelName, list[tuple[Server, ModelCard]]]:
    """Which servers hold which model, by name."""
    found: dict[ModelName, list[tuple[Server, ModelCard]]] = {}
    for server in servers:
        for card in server.cards:
            found.setdefault(card.name, []).append((server, card))
    return dict(sorted(found.items()))
