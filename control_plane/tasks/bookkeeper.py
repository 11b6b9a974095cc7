"""Keeps `fleet.accounts` and the database in step: once a second, and at once when a share of a budget is wanted."""

from __future__ import annotations

import asyncio
import logging
import math
from dataclasses import dataclass, field

from control_plane.domain.errors import DomainError
from control_plane.fleet.accounts import Accounts
from control_plane.tasks.accounting import Accounting, Exchange

log = logging.getLogger(__name__)

# Seconds between two exchanges, while somebody waits for what others hold, and after one that failed.
_INTERVAL, _DENIED, _PAUSE = 1.0, 0.2, 1.0

# Seconds between two looks for control planes that are gone, as a share of the lease; between two purges.
_LOST_SHARE, _PURGE_INTERVAL = 0.5, 3600.0


@dataclass(eq=False, slots=True)
class _Pending:
    """An exchange that was not answered yet."""

    exchange: Exchange
    asking: list[asyncio.Future[None]] = field(default_factory=list)


class Bookkeeper:
    """`run` it in the background; `close` it when nothing runs any more."""

    def __init__(self, accounts: Accounts, store: Accounting, retention: float) -> None:
        """`retention`: seconds that usage is kept."""
        self.store = store
        self.accounts = accounts
        self._retention = retention
        self._lock = asyncio.Lock()
        self._wake = asyncio.Event()
        self._number = 0
        self._pending: _Pending | None = None
        self._heard = -math.inf
        """When the store last answered."""
        self._looked = self._purged = -math.inf
        self._away = False
        accounts.on_urgent = self._wake.set

    async def run(self) -> None:
        """Exchange until it is cancelled."""
        while True:
            await self._look_after()
            failed = not await self._try()
            self._wake.clear()
            if failed:
                await asyncio.sleep(_PAUSE)
            try:
                async with asyncio.timeout(_DENIED if self.accounts.ledger.denied else _INTERVAL):
                    await self._wake.wait()
            except TimeoutError:
                self.accounts.ledger.ask_again()

    async def flush(self) -> None:
        """Write down everything that was used until now. Raises DomainError."""
        await self._exchange()

    async def close(self) -> None:
        """Write down what is left and give back all shares."""
        try:
            await self._exchange()  # one that was under way first
            await self._exchange(last=True)
            await self.store.leave()
        except Exception as error:
            log.warning("the latest usage is lost: %s", _words(error))

    async def _try(self) -> bool:
        try:
            await self._exchange()
        except Exception as error:
            if not self._away:
                log.warning("usage and budgets are not written for now: %s", _words(error))
            self._away = True
            return False
        self._away = False
        return True

    async def _exchange(self, *, last: bool = False) -> None:
        async with self._lock:
            accounts, ledger, store = self.accounts, self.accounts.ledger, self.store
            now = accounts.now()
            pending = self._pending
            if pending is None:
                # The numbers are taken and the wishes made in one step: what comes later is for the next exchange.
                asking, wishes = accounts.asking(), ledger.wishes(now, last=last)
                renew = store.shared and ledger.holds and now > self._heard + store.lease / 3
                if not wishes and not len(accounts.book) and not renew:
                    accounts.exchanged(asking, frozenset())
                    return
                self._number += 1
                pending = self._pending = _Pending(Exchange(self._number, accounts.book.take(), wishes), asking)
            try:
                answers = await store.exchange(pending.exchange)
            except BaseException:
                accounts.exchanged(pending.asking, frozenset())
                raise
            self._pending, self._heard = None, now
            told = ledger.answered(pending.exchange.wishes, answers)
            # The store reckons from a later moment.
            ledger.valid_until = now + store.lease if store.shared else math.inf
            accounts.exchanged(pending.asking, told)

    async def _look_after(self) -> None:
        """Now and then, what others have left behind and what is old."""
        now = self.accounts.now()
        try:
            if not math.isfinite(self._looked) or (
                self.store.shared and now >= self._looked + _LOST_SHARE * self.store.lease
            ):
                await self.store.settle_lost()
                self._looked = now
            if now >= self._purged + _PURGE_INTERVAL:
                await self.store.purge(self._retention)
                self._purged = now
        except Exception as error:
            log.debug("usage is not looked after: %s", _words(error))


def _words(error: Exception) -> str:
    """For logs: the text of an exception that is not ours may quote what was written."""
    return error.message if isinstance(error, DomainError) else type(error).__name__
