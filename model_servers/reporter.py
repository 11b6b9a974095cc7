"""The report stream to one control plane: kept up for as long as the process lives."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable

import grpc
import grpc.aio

from model_servers.description import SelfDescription
from model_servers.lifecycle import Changes, Lifecycle
from model_servers.tickets import Tickets
from modelyard.program.process import first_of
from modelyard.rpc.channels import Option, channel
from modelyard.rpc.errors import Refusal, from_rpc_error
from modelyard.rpc.reasons import Reason
from modelyard.v1 import fleet_pb2, orchestrator_pb2_grpc

_log = logging.getLogger(__name__)

FIRST_INTERVAL = 1.0
"""Seconds between reports until a directive says otherwise."""
_SHORTEST_INTERVAL, _LONGEST_INTERVAL = 0.02, 60.0
_FIRST_ANSWER = 5.0
"""Seconds for connecting and for the first directive."""
_MISSED = 3
"""A control plane that leaves that many reports unanswered is given up and dialled anew."""
_LEAST_PATIENCE = 3.0
"""Seconds until then, however often it wants reports: a process that is held up for a second is not gone, and to dial
it anew voids every ticket."""
_AFTER_OUTCOME = 0.001
"""Seconds that an outcome waits, so that the answer goes out before the report of it."""
_BETWEEN_OUTCOMES = 0.01
"""Seconds from one report of tickets alone to the next; those that end meanwhile are told together."""
_REFUSED_PAUSE = 10.0
"""Seconds before a stream is tried again that was refused for what it said."""

# A control plane that comes back must have its fleet within one report interval.
_OPTIONS: tuple[Option, ...] = (
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 400),
)


class Reporter:
    """Reports to one control plane and does what its directives say."""

    def __init__(
        self,
        target: str,
        description: SelfDescription,
        lifecycle: Lifecycle,
        tickets: Tickets,
        *,
        chance: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self.target = target
        self._description = description
        self._lifecycle = lifecycle
        self._chance = chance
        self._tickets = tickets
        self._ticket_news = Changes()
        self._ledger = tickets.ledger(target, self._ticket_news)
        self._interval = FIRST_INTERVAL
        self._orchestrator_id = ""
        self._epoch = 0
        self._attached = False
        self._sent = -1
        self._failures = 0
        self._settling = False
        self._progress = asyncio.Event()

    @property
    def attached(self) -> bool:
        """Whether the control plane has answered on the current stream."""
        return self._attached

    async def run(self) -> None:
        """Keep reporting. Returns only when a newer instance has taken this server's place."""
        async with channel(self.target, options=_OPTIONS, own_connection=True) as connection:
            stub = orchestrator_pb2_grpc.OrchestratorStub(connection)  # type: ignore[no-untyped-call]
            while True:
                reason = await self._one_stream(stub)
                self._detached()
                if reason is Reason.SUPERSEDED:
                    self._lifecycle.order(self.target, drain=False)
                    return
                await asyncio.sleep(self._pause(reason))

    async def _one_stream(self, stub: orchestrator_pb2_grpc.OrchestratorStub) -> Reason:
        """Report until the stream ends; returns why it did."""
        self._epoch = 0
        call = stub.Attach(wait_for_ready=True)
        try:
            await first_of(self._send(call), self._receive(call))
        except grpc.aio.AioRpcError as error:
            return self._explain(from_rpc_error(error))
        except asyncio.InvalidStateError:
            # The stream ended under a write; its status says why.
            return self._explain(Refusal(Reason.SERVERS_AWAY, str(await call.details() or "the stream ended")))
        except TimeoutError:
            return self._explain(Refusal(Reason.SERVERS_AWAY, "no answer"))
        finally:
            call.cancel()
        return self._explain(Refusal(Reason.SERVERS_AWAY, "it ended the stream"))

    async def _send(self, call: grpc.aio.StreamStreamCall) -> None:
        changes, news, time = self._lifecycle.changes, self._ticket_news, asyncio.get_running_loop().time
        try:
            while True:
                version, told = changes.version, news.version
                report = self._description.report(self._orchestrator_id, self._epoch)
                report.tickets.CopyFrom(self._ledger.report(required=self._tickets.required, whole=True))
                await call.write(report)
                self._sent = version
                self._tell_progress()
                due = time() + self._interval
                while changes.version <= version:
                    try:
                        async with asyncio.timeout_at(due):  # not around a write: cancelling one ends the stream
                            await first_of(changes.beyond(version), news.beyond(told))
                    except TimeoutError:
                        break
                    if news.version > told:
                        await asyncio.sleep(_AFTER_OUTCOME)
                        told = news.version
                        await call.write(self._tickets_alone())
                        await asyncio.sleep(_BETWEEN_OUTCOMES)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            # A write to a stream that has ended tells little; the reading side hears the status.
            await call.code()
            await asyncio.sleep(_FIRST_ANSWER)
            raise

    def _tickets_alone(self) -> fleet_pb2.ServerReport:
        return fleet_pb2.ServerReport(
            lease_epoch=self._epoch, tickets=self._ledger.report(required=self._tickets.required, whole=False)
        )

    async def _receive(self, call: grpc.aio.StreamStreamCall) -> None:
        time = asyncio.get_running_loop().time
        async with asyncio.timeout(_FIRST_ANSWER) as patience:
            async for directive in call:
                self._obey(directive)
                patience.reschedule(time() + max(_MISSED * self._interval, _LEAST_PATIENCE))

    def _obey(self, directive: fleet_pb2.ServerDirective) -> None:
        self._orchestrator_id = directive.orchestrator_id
        if self._ledger.orchestrator_id not in ("", directive.orchestrator_id):
            self._ledger = self._tickets.ledger(self.target, self._ticket_news)
        self._ledger.obey(directive)
        if directive.lease_epoch != self._epoch:
            self._epoch = directive.lease_epoch
            if directive.HasField("tickets"):
                self._ticket_news.tell()  # until the epoch is echoed, nobody is sent here with a ticket
        if self._settling:
            self._tell_progress()
        wanted = directive.next_report_in.ToNanoseconds() / 1e9
        interval = min(max(wanted or FIRST_INTERVAL, _SHORTEST_INTERVAL), _LONGEST_INTERVAL)
        if interval != self._interval:
            # The sender sleeps by the old interval: one early report puts it on the new one.
            self._interval = interval
            self._lifecycle.changes.tell()
        self._failures = 0
        if not self._attached:
            self._attached = True
            _log.info("attached to control plane %s, epoch %d", self.target, self._epoch)
            self._tell_progress()
        self._lifecycle.order(self.target, drain=directive.desired_state == fleet_pb2.DESIRED_STATE_DRAIN)

    def _explain(self, refusal: Refusal) -> Reason:
        if refusal.reason is Reason.SUPERSEDED and not refusal.transport:
            server_id = self._description.identity.server_id
            _log.error("a newer instance of %s reports to %s; this one stops doing so", server_id, self.target)
            return refusal.reason
        if refusal.reason in (Reason.INVALID_REQUEST, Reason.UNSUPPORTED):
            _log.error("%s refuses the reports, trying again slowly: %s", self.target, refusal.message)
            return refusal.reason
        if refusal.reason is Reason.DRAINING and self._attached:
            _log.info("control plane %s shuts down; attaching again when it is back", self.target)
            return Reason.SERVERS_AWAY
        # Once when it is lost, not again with every try.
        level = logging.WARNING if self._attached or not self._failures else logging.DEBUG
        _log.log(level, "no control plane at %s, trying on: %s", self.target, refusal.message)
        return Reason.SERVERS_AWAY

    def _pause(self, reason: Reason) -> float:
        if reason is not Reason.SERVERS_AWAY:
            return _REFUSED_PAUSE
        self._failures += 1
        longest = 0.1 * 2 ** min(self._failures - 1, 10)
        return min(self._chance(longest / 2, longest), self._interval)

    def _detached(self) -> None:
        self._attached = False
        self._sent = -1
        self._tell_progress()

    def _tell_progress(self) -> None:
        progress, self._progress = self._progress, asyncio.Event()
        progress.set()

    async def delivered(self) -> None:
        """Wait until the present state was sent, or there is nobody to send it to."""
        version = self._lifecycle.changes.version
        while self._attached and self._sent < version:
            await self._progress.wait()

    async def settled(self) -> None:
        """Wait until the outcomes of all tickets have arrived, or there is nobody to tell them to."""
        self._settling = True
        while self._attached and self._ledger.owes:
            await self._progress.wait()
