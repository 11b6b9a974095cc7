"""Tickets of direct calls: who holds a good one may enter, once; its control plane is told how the request ended.

A `Ledger` is what one control plane process and this server know of each other's tickets. It lives until that control
plane is replaced by another process; its key is good for as long as the lease is, counted from its last word.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice

from model_servers.lifecycle import Changes
from modelyard.rpc import tickets
from modelyard.rpc.errors import Refusal
from modelyard.rpc.reasons import Reason
from modelyard.rpc.validation import MAX_OUTCOMES
from modelyard.v1.fleet_pb2 import ServerDirective
from modelyard.v1.generation_pb2 import GenerationResult
from modelyard.v1.model_server_pb2 import ModelServerGenerateResponse
from modelyard.v1.ticket_pb2 import Ticket, TicketOutcome, TicketReport

_MOST_REMEMBERED = 100_000
"""Used tickets of one control plane that have not expired yet. More than it can sign in that time."""

CANCELLED = "CANCELLED"
"""Failure of a request whose client went away."""


class Ledger:
    """The tickets of one control plane process at this server."""

    def __init__(self, news: Changes, clock: Callable[[], float]) -> None:
        self.orchestrator_id = ""
        self._news = news
        self._clock = clock
        self._key = b""
        self._since = 0
        self._good_until = 0.0
        self._ahead = self._latest = 0.0
        self._used: dict[int, float] = {}
        self._in_use: set[int] = set()
        self._outcomes: deque[TicketOutcome] = deque()
        self._sequence = 0

    def obey(self, directive: ServerDirective) -> None:
        """Take over what a directive says."""
        now, told = self._clock(), directive.tickets
        self.orchestrator_id = directive.orchestrator_id
        self._key, self._since = told.key, told.since_epoch
        self._good_until = now + directive.lease_duration.ToNanoseconds() / 1e9
        self._ahead = told.clock.ToNanoseconds() / 1e9 - now
        while self._outcomes and self._outcomes[0].sequence <= told.acknowledged:
            self._outcomes.popleft()

    def now(self) -> float:
        """The control plane's clock, as far as it is known here. A directive that took longer than the one before does
        not turn it back: what was told as expired stays so."""
        self._latest = max(self._latest, self._clock() + self._ahead)
        return self._latest

    @property
    def owes(self) -> bool:
        """Whether outcomes were not acknowledged yet."""
        return bool(self._outcomes)

    @property
    def remembered(self) -> int:
        """Used tickets that could still be replayed."""
        return len(self._used)

    def report(self, *, required: bool, whole: bool) -> TicketReport:
        """What to tell the control plane: everything, or outcomes alone."""
        report = TicketReport(
            required=required,
            orchestrator_id=self.orchestrator_id,
            outcomes=islice(self._outcomes, MAX_OUTCOMES),
        )
        if whole and self.orchestrator_id:
            report.in_use.extend(self._in_use)
            report.as_of.FromNanoseconds(round(self.now() * 1e9))
        return report

    def signed(self, ticket: bytes) -> bool:
        return tickets.verified(self._key, ticket)

    def take(self, ticket: Ticket) -> None:
        """Mark as used. Raises Refusal if it is not good any more."""
        now = self.now()
        for number in list(islice(self._used, 2)):  # two go for one that comes
            if self._used[number] < now:
                del self._used[number]
        if self._clock() >= self._good_until:
            raise _refused("its control plane has not been heard of for too long")
        if ticket.lease_epoch < self._since:
            raise _refused("it was made before the lease was lost, its slot is taken")
        expires_at = ticket.expires_at.seconds + ticket.expires_at.nanos / 1e9
        if now >= expires_at:
            raise _refused("it has expired")
        if ticket.id in self._used:
            raise _refused("it was used before")
        if len(self._used) >= _MOST_REMEMBERED:
            raise _refused("there are too many at this moment")
        self._used[ticket.id] = expires_at
        if not ticket.relayed:
            self._in_use.add(ticket.id)

    def settle(self, number: int, result: GenerationResult | None, failure: str, tokens: int) -> None:
        """Keep an outcome until it is acknowledged, and have it reported. `tokens` had been generated when it
        failed."""
        self._in_use.discard(number)
        self._sequence += 1
        self._outcomes.append(
            TicketOutcome(
                sequence=self._sequence,
                ticket_id=number,
                result=result,
                failure_reason=failure,
                tokens_until_failure=tokens,
            )
        )
        self._news.tell()


class Use:
    """A request at work, with a ticket or without."""

    __slots__ = ("_settle", "orchestrator_id", "tokens")

    def __init__(
        self, orchestrator_id: str, settle: Callable[[GenerationResult | None, str, int], None] | None = None
    ) -> None:
        self.orchestrator_id = orchestrator_id
        """Whose load it is; empty: nobody's."""
        self.tokens = 0
        """Generated so far, as far as that has been noted."""
        self._settle = settle

    def ends_with(self, message: bytes) -> None:
        """The last message of the answer, a serialised ModelServerGenerateResponse, is about to be sent. It is told to
        the control plane at once: whoever has read it may ask for the next slot in the same moment."""
        if self._settle is not None:
            self.end(ModelServerGenerateResponse.FromString(message).result)

    def end(self, result: GenerationResult | None = None, failure: str = "") -> None:
        """The request is over; what comes later does not count."""
        settle, self._settle = self._settle, None
        if settle is not None:
            settle(result, failure, 0 if result is not None else self.tokens)


class Tickets:
    """The door for tickets, and the ledgers of all control planes."""

    def __init__(self, *, required: bool, clock: Callable[[], float]) -> None:
        self.required = required
        self.server_id = self.instance_id = ""
        self._clock = clock
        self._ledgers: dict[str, Ledger] = {}

    def ledger(self, control_plane: str, news: Changes) -> Ledger:
        """A new ledger for the process that now answers at that address; the previous one's tickets are void."""
        ledger = self._ledgers[control_plane] = Ledger(news, self._clock)
        return ledger

    @contextmanager
    def use(self, ticket: bytes, model: str, claimed: str) -> Iterator[Use]:
        """Around a request. `claimed` is the control plane that it says it comes from, which a ticket proves.

        Raises Refusal TICKET_REFUSED.
        """
        if not ticket:
            if self.required:
                raise _refused("there is none, and this server serves nobody without: ask a control plane", "the call")
            yield Use(claimed)
            return
        ledger, said = self._read(ticket, model)
        ledger.take(said)
        use = Use(said.orchestrator_id, None if said.relayed else partial(ledger.settle, said.id))
        failure = Reason.ENGINE_FAILED.value  # if it ends without a result
        try:
            yield use
        except asyncio.CancelledError:
            failure = CANCELLED
            raise
        except Refusal as refusal:
            failure = refusal.reason
            raise
        except BaseException:
            failure = Reason.INTERNAL
            raise
        finally:
            use.end(None, failure)

    def _read(self, ticket: bytes, model: str) -> tuple[Ledger, Ticket]:
        ledger = next((each for each in self._ledgers.values() if each.signed(ticket)), None)
        said = tickets.read(ticket) if ledger else None
        if ledger is None or said is None:
            raise _refused("no control plane that this server reports to has signed it")
        if said.server_id != self.server_id:
            raise _refused(f"it is for model server {said.server_id!r}")
        if said.instance_id != self.instance_id:
            raise _refused("it was made for an earlier run of this server")
        if said.model != model:
            raise _refused(f"it is for model {said.model[:100]!r}")
        return ledger, said


def _refused(why: str, what: str = "the ticket") -> Refusal:
    return Refusal(Reason.TICKET_REFUSED, f"{what} is refused: {why}")
