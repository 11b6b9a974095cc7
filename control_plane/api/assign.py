"""Direct mode: Assign reserves a slot and signs a ticket; reports say what became of it.

A reservation is a flight like that of a relayed request. It ends, whatever comes first: with the outcome that the
server reports; unused, with a report from after the ticket's expiry that does not name it; with the lease; or when the
client gives the ticket back. A report that comes twice finds nothing to end the second time.
"""

from __future__ import annotations

import hmac
import itertools
from dataclasses import dataclass
from functools import partial

import grpc
from msgspec.structs import replace

from control_plane.api import convert
from control_plane.api.attempts import NEUTRAL
from control_plane.api.generate import Generation, identify, new_request_id, out_of_time, take_down
from control_plane.api.metrics import Metrics
from control_plane.api.tenant import tenant_of
from control_plane.domain.errors import DomainError
from control_plane.domain.ports import Clock
from control_plane.domain.request import RouteRequest
from control_plane.domain.server import Failed
from control_plane.fleet.grants import Grant
from control_plane.fleet.registry import Fleet
from control_plane.fleet.scheduler import Scheduler
from control_plane.fleet.server import Flight, Outcome, OutcomeKind, Server
from control_plane.scheduling.retry import blames_server
from modelyard.rpc import tickets
from modelyard.rpc.errors import Refusal, invalid
from modelyard.rpc.reasons import Reason
from modelyard.rpc.server import InFlight
from modelyard.rpc.validation import MAX_OUTCOMES, check_assign_request
from modelyard.v1.fleet_pb2 import ServerDirective
from modelyard.v1.generation_pb2 import GenerationInput
from modelyard.v1.orchestrator_pb2 import AssignRequest, AssignResponse, GenerateRequest
from modelyard.v1.ticket_pb2 import Ticket, TicketOutcome, TicketReport

COUNTED_AS = "Direct"
"""Name under which metrics count what became of tickets."""


@dataclass(eq=False, slots=True)
class Reservation:
    """A slot that a ticket stands for."""

    id: int
    ticket: bytes
    flight: Flight
    expires_at: float
    """Monotonic seconds."""
    preceded: float
    """Seconds from receipt of the request to the ticket."""


class Assignments:
    """Owner of all reservations. `in_flight` counts them beside the requests that are relayed."""

    def __init__(
        self,
        orchestrator_id: str,
        fleet: Fleet,
        scheduler: Scheduler,
        generation: Generation,
        lifetime: float,
        ahead_lifetime: float,
        clock: Clock,
        metrics: Metrics,
    ) -> None:
        self.in_flight = InFlight()
        self._orchestrator_id = orchestrator_id
        self._fleet = fleet
        self._scheduler = scheduler
        self._generation = generation
        self._lifetime = lifetime
        self._ahead_lifetime = ahead_lifetime
        self._clock = clock
        self._metrics = metrics
        self._ids = itertools.count(1)
        self._reserved: dict[Server, dict[int, Reservation]] = {}

    # -------------------------------------------------------------- Assign ---

    async def assign(self, request: AssignRequest, context: grpc.aio.ServicerContext) -> AssignResponse:
        """Serve one Assign call."""
        request_id = request.request.request_id or new_request_id()
        try:
            return await self._assign(request, request_id, context)
        except (DomainError, Refusal):
            identify(request_id, context)  # an answer has it inside, and metadata take time
            raise

    async def _assign(
        self, request: AssignRequest, request_id: str, context: grpc.aio.ServicerContext
    ) -> AssignResponse:
        arrived = self._clock.monotonic()
        asked = request.request
        violations = check_assign_request(request)
        if violations:
            raise invalid(violations)
        filled, preset = self._generation.presets.fill(asked)
        pinned = self._generation.pinned(filled.requirements)
        tenant = tenant_of(context)
        route = convert.route_request(
            filled, request_id, tenant, pinned, more_tokens=request.prompt_tokens,
            blocks=self._generation.blocks_of(request.prompt_hashes, request.prompt_tokens, tenant, filled.input),
        )  # fmt: skip
        # The deadline of a call ahead says nothing of the request that is still to come.
        limit = self._generation.max_generation if request.ahead else self._generation.time_limit(context)
        if preset is not None and preset.timeout is not None:
            limit = min(limit, preset.timeout)
        avoid = self._fleet.without_tickets()
        if request.ahead:
            return self._ahead(request, route, avoid, filled, arrived, limit)
        await self._generation.funded(route)
        try:
            grant = await self._scheduler.acquire(route, avoid, explain=asked.explain, leaves=arrived + limit)
        except TimeoutError:
            raise out_of_time(limit) from None
        except DomainError as error:
            if avoid and error.reason in ("NO_CAPABLE_SERVER", "SERVERS_AWAY"):
                raise Refusal(
                    Reason.UNSUPPORTED, f"no model server that takes tickets can serve it: {error.message}"
                ) from error
            raise
        return self._assigned(grant, filled, request_id, arrived, limit)

    def _ahead(
        self,
        request: AssignRequest,
        route: RouteRequest,
        avoid: frozenset[Failed],
        filled: GenerateRequest,
        arrived: float,
        limit: float,
    ) -> AssignResponse:
        """One for each slot that may be held; the first is empty if there is none."""
        routes = [route, *(replace(route, request_id=new_request_id()) for _ in range(1, request.ahead_requests))]
        first, *more = [
            self._assigned(Grant(flight, 0.0, None), filled, each.request_id, arrived, limit)
            for each, flight in zip(routes, self._scheduler.ahead(routes, avoid), strict=False)
        ] or [AssignResponse(request_id=route.request_id)]
        first.more.extend(more)
        return first

    def _assigned(
        self, grant: Grant, filled: GenerateRequest, request_id: str, arrived: float, limit: float
    ) -> AssignResponse:
        """Sign a ticket for the slot of a grant."""
        flight, now = grant.flight, self._clock.monotonic()
        lifetime = self._ahead_lifetime if flight.ahead else self._lifetime
        reservation = self._reserve(flight, request_id, arrived, now, lifetime)
        response = AssignResponse(
            request_id=request_id,
            server_id=flight.server_id,
            endpoint=flight.endpoint,
            model=flight.model,
            provider=flight.provider,
            ticket=reservation.ticket,
            hold_back=flight.held,
        )
        convert.set_duration(response.valid_for, lifetime)
        convert.set_duration(response.time_limit, max(0.0, arrived + limit - now))
        convert.set_duration(response.queued, grant.queued)
        source: GenerationInput = filled.input
        if source.HasField("sampling"):
            response.sampling.CopyFrom(source.sampling)
        if flight.charge.output_limit is not None:
            response.sampling.max_tokens = flight.charge.output_limit
        if source.messages:
            response.preset_messages.extend(source.messages)
        price = flight.price
        if price.prompt or price.cached_prompt or price.completion:
            response.price.CopyFrom(convert.price(price))
        if grant.record:
            response.decision.CopyFrom(convert.decision(grant.record))
        return response

    def _reserve(self, flight: Flight, request_id: str, arrived: float, now: float, lifetime: float) -> Reservation:
        number, expires_at = next(self._ids), now + lifetime
        signed = self._signed(flight, number, request_id, expires_at)
        # Of a ticket ahead the client has not waited for.
        preceded = 0.0 if flight.ahead else now - arrived
        reservation = Reservation(number, signed, flight, expires_at, preceded)
        self._reserved.setdefault(flight.server, {})[number] = reservation
        self.in_flight.__enter__()
        flight.assigned = True
        flight.on_lost = partial(self._lose, reservation)
        return reservation

    def for_relay(self, flight: Flight, request_id: str) -> bytes:
        """The ticket of a relayed request, for a server that serves nobody without one; else empty."""
        if not flight.server.report.needs_tickets:
            return b""
        expires_at = self._clock.monotonic() + self._lifetime
        return self._signed(flight, next(self._ids), request_id, expires_at, relayed=True)

    def _signed(
        self, flight: Flight, number: int, request_id: str, expires_at: float, *, relayed: bool = False
    ) -> bytes:
        server = flight.server
        ticket = Ticket(
            id=number,
            orchestrator_id=self._orchestrator_id,
            server_id=flight.server_id,
            instance_id=server.report.identity.instance_id,
            lease_epoch=server.lease.epoch,
            model=flight.model,
            request_id=request_id,
            relayed=relayed,
        )
        convert.set_duration(ticket.expires_at, expires_at)
        return tickets.sign(server.ticket_key, ticket)

    # ------------------------------------------------------------- reports ---

    def direct(self, directive: ServerDirective, server: Server, acknowledged: int) -> None:
        """Fill in what a server that takes tickets must know."""
        if server.report.takes_tickets:
            order = directive.tickets
            order.key, order.acknowledged, order.since_epoch = server.ticket_key, acknowledged, server.tickets_since
            convert.set_duration(order.clock, self._clock.monotonic())

    def heard(self, server: Server, told: TicketReport) -> int:
        """A server's checked word on tickets; the sequence that it need not tell again."""
        if told.orchestrator_id != self._orchestrator_id:
            return 0  # of another process, or of none yet
        reserved = self._reserved.get(server, {})
        for outcome in told.outcomes:
            reservation = reserved.get(outcome.ticket_id)
            if reservation is not None:
                self._settle(reservation, outcome)
        if told.HasField("as_of") and reserved:
            as_of, in_use = convert.seconds(told.as_of), frozenset(told.in_use)
            # What a server will tell of later, because its outcomes do not all fit, is not in use any more either.
            complete = len(told.outcomes) < MAX_OUTCOMES
            for reservation in list(reserved.values()) if complete else ():
                if reservation.id in in_use:
                    self._fleet.has_come(reservation.flight, self._clock.monotonic())
                elif reservation.expires_at < as_of:
                    self._end(reservation, NEUTRAL, "unused")
        return told.outcomes[-1].sequence if told.outcomes else 0

    def _lose(self, reservation: Reservation) -> None:
        """The server's lease ran out. Its client may have an answer nevertheless, of which nobody will tell."""
        reservation.flight.charge.begin()
        reservation.flight.charge.give_up()
        self._end(reservation, NEUTRAL, "lost")

    def _settle(self, reservation: Reservation, outcome: TicketOutcome) -> None:
        """Learn from an outcome what would have been learned from relaying the request."""
        charge = reservation.flight.charge
        charge.begin()
        if not outcome.HasField("result"):
            reason = outcome.failure_reason or Reason.ENGINE_FAILED
            known = reason in Reason.__members__
            if outcome.tokens_until_failure or not known:
                charge.break_off(outcome.tokens_until_failure)
            blamed = known and blames_server(reason)
            begun = bool(outcome.tokens_until_failure)
            ended = Outcome(OutcomeKind.FAILURE, broken_off=begun) if blamed else NEUTRAL
            self._end(reservation, ended, reason if known else "cancelled")
            return
        result, flight = outcome.result, reservation.flight
        take_down(charge, result.usage)
        # The server's word on times is believed as far as they can be true.
        elapsed = self._clock.monotonic() - flight.began
        timings = result.timings
        ttft = min(convert.seconds(timings.ttft), elapsed) if timings.HasField("ttft") else None
        tpot = min(convert.seconds(timings.tpot), elapsed) if timings.HasField("tpot") else None
        # It was not at work while the client was on its way, or the report.
        flight.began += elapsed - min(convert.seconds(timings.total), elapsed)
        if ttft is not None:
            self._metrics.first_token(flight.model, reservation.preceded + ttft)
        if tpot is not None:
            self._metrics.pace(flight.model, tpot)
        self._metrics.used(flight.model, result.usage)
        self._end(reservation, Outcome(OutcomeKind.SUCCESS, ttft=ttft, tpot=tpot), "ok")

    def give_back(self, ticket: bytes) -> None:
        """End the reservation of a ticket that its holder could not use. A false ticket ends none."""
        told = tickets.read(ticket)
        if told is None or told.orchestrator_id != self._orchestrator_id:
            return
        for reserved in self._reserved.values():
            reservation = reserved.get(told.id)
            if reservation is not None:
                if hmac.compare_digest(reservation.ticket, ticket):
                    self._end(reservation, NEUTRAL, "unused")
                return

    def _end(self, reservation: Reservation, outcome: Outcome, counted: str) -> None:
        server = reservation.flight.server
        reserved = self._reserved.get(server)
        if reserved is None or reserved.pop(reservation.id, None) is None:
            return
        if not reserved:
            del self._reserved[server]
        self._metrics.finished(COUNTED_AS, counted)
        self._scheduler.release(reservation.flight, outcome)
        self.in_flight.__exit__(None, None, None)
