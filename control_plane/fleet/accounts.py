"""Who pays for what: budgets at the moment of a choice, usage at the end of an attempt.

One object, one event loop, no awaits but in `ready`. What it knows is exchanged with the store in the background
(`control_plane.tasks.bookkeeper`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from control_plane.domain.funds import Amounts, Funds, Reckoning
from control_plane.domain.model import ModelCard
from control_plane.domain.request import RouteRequest
from control_plane.fleet.charge import Charge
from control_plane.fleet.server import Flight
from control_plane.scheduling.budgets import Ledger, Shortage
from control_plane.scheduling.usage import HOUR, Tally, UsageBook, UsageKey
from control_plane.selection.table import CandidateTable

_MOST_NANO_USD = 10**13
"""That one attempt is believed to have cost: 10,000 US dollars. Prices come from servers and may be absurd; sums of
them must fit into 64 bits."""

_PATIENCE = 1.0
"""Seconds that a request waits at most for a share of its tenant's budget before it is decided with what is there."""


class Accounts:
    """Budgets and usage of all tenants."""

    def __init__(self, ledger: Ledger, reckoning: Reckoning, now: Callable[[], float]) -> None:
        """`now` is seconds since 1970, the store's."""
        self.ledger = ledger
        self.book = UsageBook()
        self.now = now
        self.on_change: Callable[[str], None] = lambda tenant: None
        """Told of a tenant that may have more to spend than before, or less to hope for."""
        self.on_urgent: Callable[[], None] = lambda: None
        """Told when a share is wanted at once."""
        self._reckoning = reckoning
        self._asking: list[asyncio.Future[None]] = []

    def funds(self, tenant: str) -> Funds | None:
        """What a tenant may spend on a request now; None: as much as it likes."""
        amounts = self.ledger.funds(tenant, self.now())
        return None if amounts is None else Funds(*amounts, self._reckoning)

    def limited(self, tenant: str) -> bool:
        """Whether a tenant has budgets."""
        return bool(self.ledger.budgets_of(tenant))

    def spare(self, request: RouteRequest, table: CandidateTable) -> bool:
        """Whether a tenant has the money at hand for a request that is still to come, on any model, and for another one
        meanwhile. What is lacking is looked for in the background."""
        funds = self.funds(request.tenant)
        if funds is None:
            return True
        most = self._reckoning.most(request, table.dearest, table.longest)
        self.ledger.expect(request.tenant, most, self.now())
        return funds.now.covers(Amounts(2 * most.nano_usd, 2 * most.tokens))

    def open(self, request: RouteRequest, card: ModelCard) -> Charge | None:
        """Set aside what a request can come to at most on the model that was chosen for it. None: there is not enough,
        which `select` has seen but for the last digit."""
        charge = Charge(request.tenant, request.task_type, request.prompt_tokens + request.more_prompt_tokens)
        if self.limited(request.tenant):
            most = self._reckoning.most(request, card.price, card.context_length)
            reserved = self.ledger.reserve(request.tenant, most, self.now())
            if isinstance(reserved, Shortage):
                return None
            charge.reservation = reserved
            if request.max_tokens is None:
                charge.output_limit = self._reckoning.output(request, card.context_length) or None
        return charge

    def close(self, flight: Flight) -> None:
        """Take down what an attempt that has ended has used. To be called once."""
        charge = flight.charge
        used = charge.used
        nano_usd = tokens = 0
        if used is not None:
            price = flight.price.nano_usd(used.prompt, used.cached_prompt, used.completion)
            nano_usd = min(price, _MOST_NANO_USD)
            tokens = used.prompt + used.completion
        reservation = charge.reservation
        if reservation is not None:
            spent = reservation.amounts if charge.unheard else Amounts(nano_usd, tokens)
            self.ledger.settle(reservation, spent)
            self.on_change(charge.tenant)
        if charge.sent:
            key = UsageKey(
                int(self.now()) // HOUR * HOUR, charge.tenant, flight.model, flight.provider, flight.server_id,
                int(charge.task_type),
            )  # fmt: skip
            if used is None:
                self.book.add(key, Tally(failed=1))
            else:
                whole = int(used.whole)
                sums = (used.prompt, used.cached_prompt, used.completion, nano_usd)
                self.book.add(key, Tally(whole, 1 - whole, 1 - whole, *sums))

    # ------------------------------------------------------------- shares ---

    async def ready(self, request: RouteRequest, table: CandidateTable) -> None:
        """Wait, if it may be of use, until the share of the tenant's budgets covers the dearest model: without this the
        first request after a pause would find no money and go to a free model. Takes no time as a rule."""
        if not self.limited(request.tenant) or not len(table):
            return
        most = self._reckoning.most(request, table.dearest, table.longest)
        if self.ledger.need(request.tenant, most, self.now(), waits=False):
            return
        waiting: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._asking.append(waiting)
        self.on_urgent()
        try:
            async with asyncio.timeout(_PATIENCE):
                await waiting
        except TimeoutError:
            pass
        finally:
            if waiting in self._asking:
                self._asking.remove(waiting)

    def want(self, tenant: str, amounts: Amounts) -> None:
        """So much is needed at once."""
        if not self.ledger.need(tenant, amounts, self.now()):
            self.on_urgent()

    def asking(self) -> list[asyncio.Future[None]]:
        """Those who wait in `ready` for the exchange that begins now."""
        asking, self._asking = self._asking, []
        return asking

    def exchanged(self, asking: list[asyncio.Future[None]], tenants: frozenset[str]) -> None:
        """The store has answered those, or cannot; for these tenants something has changed."""
        for waiting in asking:
            if not waiting.done():
                waiting.set_result(None)
        for tenant in tenants:
            self.on_change(tenant)

    def renewed(self, tenant: str) -> bool:
        """Whether a window has ended since the last look."""
        return self.ledger.turn(tenant, self.now())

    def wait(self, tenant: str, amounts: Amounts | None) -> tuple[str, float | None]:
        """For somebody who asks for more than there is: what there is, in words, and after how many seconds a budget
        begins anew that allows it. None: no window does, or it ends never."""
        now = self.now()
        pots = self.ledger.blocking(tenant, amounts or Amounts(), now)
        words = ", ".join(pot.words() for pot in pots)
        helps = pots and amounts and all(amounts[pot.index] <= pot.limit and pot.ends < float("inf") for pot in pots)
        return words, max(pot.ends for pot in pots) - now if helps else None


def no_accounts() -> Accounts:
    """Without budgets; what is used is forgotten."""
    return Accounts(Ledger(), Reckoning(), lambda: 0.0)
