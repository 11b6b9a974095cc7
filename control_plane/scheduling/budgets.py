"""Budgets of tenants: what is reserved when a request is given a server, and what it turned out to cost.

A budget is an amount of money or of tokens per window of time. Its truth is in a store that several control planes may
share. What one of them may reserve without asking is its share: `wishes` says what it has used and how large a share it
wants, `answered` what the store gives. Between two exchanges nothing leaves this process, so a reservation costs no
more than some additions, and shares never add up to more than the budget.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import Enum
from typing import NamedTuple

from control_plane.domain.funds import UNLIMITED, Amounts

_IDLE = 5
"""Exchanges without a reservation after which the whole share is given back."""

_AHEAD = 8
"""At most one in so many parts of what is left is held ahead of need: the others belong to other control planes."""


class Unit(Enum):
    NANO_USD = "nano_usd"
    TOKENS = "tokens"

    @property
    def index(self) -> int:
        """In `Amounts`."""
        return Amounts._fields.index(self.value)


class Window(Enum):
    """A stretch of time, by the calendar in UTC."""

    HOUR = "hour"
    DAY = "day"
    MONTH = "month"
    TOTAL = "total"
    """From the first request on, without end."""

    def around(self, at: float) -> tuple[int, float]:
        """When the window begins and ends that a moment is in, seconds since 1970."""
        if self is Window.TOTAL:
            return 0, math.inf
        moment = datetime.fromtimestamp(at, UTC).replace(minute=0, second=0, microsecond=0)
        if self is Window.HOUR:
            return _span(moment, moment + timedelta(hours=1))
        moment = moment.replace(hour=0)
        if self is Window.DAY:
            return _span(moment, moment + timedelta(days=1))
        moment = moment.replace(day=1)
        return _span(moment, (moment + timedelta(days=32)).replace(day=1))


def _span(start: datetime, end: datetime) -> tuple[int, float]:
    return round(start.timestamp()), end.timestamp()


@dataclass(frozen=True, slots=True)
class Budget:
    """A limit. Raises ValueError if it is below 0."""

    unit: Unit
    window: Window
    limit: int
    """1e-9 US dollars, or tokens."""

    def __post_init__(self) -> None:
        if not 0 <= self.limit <= UNLIMITED:
            raise ValueError(f"limit must be >= 0 and fit into 64 bits, is {self.limit}")


class PotKey(NamedTuple):
    """Names a budget in one window."""

    tenant: str
    unit: str
    window: str
    starts: int
    """Seconds since 1970."""


class Wish(NamedTuple):
    """What is told to the store of one budget, and wanted of it."""

    key: PotKey
    limit: int
    used: int
    """Since the wish before."""
    in_hand: int
    """Reserved now, <= share."""
    share: int
    """Wanted; what was used is out of it."""
    least: int
    """A smaller share than that is of no use: who cannot have it keeps no more than is in hand, or two control planes
    would each hold half of what the other waits for."""


class Answer(NamedTuple):
    """The store's answer to a wish."""

    spent: int
    """By everybody, the wish's `used` with it."""
    share: int
    """Given."""


@dataclass(slots=True, eq=False)
class Pot:
    """One budget in one window, as it stands in this process."""

    key: PotKey
    index: int
    """Of its unit in `Amounts`."""
    limit: int
    ends: float
    """Seconds since 1970."""
    spent: int = 0
    """As the store last said."""
    share: int = 0
    """From the store: for what is reserved, used since, and free."""
    reserved: int = 0
    used: int = 0
    """Since the last wish that was answered."""
    asked: bool = False
    """The store has answered once."""
    denied: bool = False
    """It had not all that was wanted: no need to ask again at once."""
    _taken: int = 0
    """Reserved since the last wish."""
    _demand: int = 0
    """The like of late."""
    _largest: int = 0
    """Needed at once by one request of late."""
    _liked: int = 0
    """Would have been good to have at once since the last wish."""
    _short: int = 0
    """Needed at once in vain since the last wish: somebody waits for it."""
    _asked_for: int = 0
    """What was short when the last wish was made."""
    _idle: int = 0

    @property
    def now(self) -> int:
        """What can be reserved at once."""
        return max(0, self.share - self.reserved - self.used)

    @property
    def later(self) -> int:
        """What may become free in this window, if what is reserved turns out to cost nothing."""
        return max(0, self.limit - self.spent - self.used)

    @property
    def urgent(self) -> bool:
        """More should be asked for at once."""
        return (self._short > 0 or self._liked > 0) and not self.denied

    def words(self) -> str:
        """What is left, for people."""
        window = "" if self.key.window == Window.TOTAL.value else f" this {self.key.window}"
        if self.key.unit == Unit.TOKENS.value:
            return f"{self.later} of {self.limit} tokens left{window}"
        return f"{self.later * 1e-9:.6f} of {self.limit * 1e-9:.6f} US dollars left{window}"

    def reserve(self, amount: int) -> None:
        self.reserved += amount
        self._taken += amount
        if amount > self._largest:
            self._largest = amount

    def settle(self, reserved: int, used: int) -> None:
        self.reserved -= reserved
        self.used += used

    def need(self, amount: int, *, waits: bool) -> bool:
        """Take note that so much is needed at once, or would be good to have; whether it is there."""
        self._largest = max(self._largest, amount)
        if amount <= self.now:
            return True
        if waits:
            self._short = max(self._short, amount)
        else:
            self._liked = max(self._liked, amount)
        return False

    def expect(self, amount: int) -> None:
        """Take note that a request may need so much, without asking for it at once."""
        self._largest = max(self._largest, amount)

    def wish(self, *, last: bool = False) -> Wish | None:
        """What to ask the store for, at regular intervals and when it is urgent. None: nothing has changed. `last`:
        give back all that is not in hand."""
        self._idle = 0 if self._taken or self._short or self._liked else self._idle + 1
        self._demand = max(self._taken, self._demand // 2) if self._idle < _IDLE else 0
        if self._idle >= _IDLE:
            self._largest = 0
        ahead = max(2 * self._demand, 2 * self._largest)
        ahead = max(self._short, self._liked, min(ahead, self.later // _AHEAD))
        want = self.reserved + (0 if last else ahead)
        changed = self.used or self._taken or self._short or self._liked or (want == self.reserved < self.share)
        if not changed:
            return None
        least = 0 if last or not self._short else self.reserved + self._short
        self._asked_for, self._taken, self._short, self._liked = self._short, 0, 0, 0
        # What is given back, or may be, must not be reserved while the wish is on its way.
        self.share = min(self.share, (self.reserved if least else max(want, self.reserved)) + self.used)
        return Wish(self.key, self.limit, self.used, self.reserved, want, least)

    def answered(self, wish: Wish, answer: Answer) -> None:
        self.asked = True
        self.used -= wish.used
        self.spent, self.share = answer.spent, answer.share
        self.denied = answer.share < wish.share
        if self.now < self._asked_for <= self.later:
            self._short = max(self._short, self._asked_for)  # whoever waits for it still does

    @property
    def forgettable(self) -> bool:
        """Nothing here that the store does not know."""
        return self._idle >= _IDLE and not (self.share or self.reserved or self.used or self._short or self._liked)


@dataclass(slots=True, eq=False)
class Reservation:
    """An amount that is set aside in every pot of a tenant until it is settled."""

    amounts: Amounts
    pots: tuple[Pot, ...]
    open: bool = True


@dataclass(frozen=True, slots=True)
class Shortage:
    """Why nothing was reserved."""

    pot: Pot
    """That has the least for it."""
    needed: int

    @property
    def final(self) -> bool:
        """Not before the window ends."""
        return self.needed > self.pot.later


@dataclass(eq=False)
class Ledger:
    """All budgets of this process. `now` is seconds since 1970 by the store's clock."""

    default: Sequence[Budget] = ()
    tenants: Mapping[str, Sequence[Budget]] = field(default_factory=dict)
    """Of tenants for whom the default does not hold."""
    valid_until: float = math.inf
    """Until then the store keeps the shares for this process."""
    _pots: dict[str, tuple[Pot, ...]] = field(default_factory=dict)
    """Of the present windows, by tenant."""
    _turned: set[str] = field(default_factory=set)
    """Tenants of whom a window has ended."""
    _past: list[Pot] = field(default_factory=list)
    """Of windows that have ended, with something that the store is to be told."""

    def budgets_of(self, tenant: str) -> Sequence[Budget]:
        return self.tenants.get(tenant, self.default)

    def pots(self, tenant: str, now: float) -> tuple[Pot, ...]:
        """One for each budget of a tenant; empty: it has none."""
        pots = self._pots.get(tenant)
        if pots is None:
            budgets = self.budgets_of(tenant)
            if not budgets:
                return ()
            pots = self._pots[tenant] = tuple(_pot(tenant, budget, now) for budget in budgets)
        for pot in pots:
            if now >= pot.ends:
                return self._renewed(tenant, pots, now)
        return pots

    def turn(self, tenant: str, now: float) -> bool:
        """Let time pass for a tenant; whether a window has ended since the last call."""
        self.pots(tenant, now)
        if tenant in self._turned:
            self._turned.discard(tenant)
            return True
        return False

    def _renewed(self, tenant: str, pots: tuple[Pot, ...], now: float) -> tuple[Pot, ...]:
        self._past += [pot for pot in pots if now >= pot.ends]
        fresh = tuple(
            _pot(tenant, budget, now) if now >= pot.ends else pot
            for pot, budget in zip(pots, self.budgets_of(tenant), strict=True)
        )
        self._pots[tenant] = fresh
        self._turned.add(tenant)
        return fresh

    def funds(self, tenant: str, now: float) -> tuple[Amounts, Amounts] | None:
        """What a tenant may spend at once, and what may become free later. None: as much as it likes."""
        pots = self.pots(tenant, now)
        if not pots:
            return None
        valid = now < self.valid_until
        money = money_later = tokens = tokens_later = UNLIMITED
        for pot in pots:
            free = pot.share - pot.reserved - pot.used if valid else 0
            later = pot.limit - pot.spent - pot.used
            if pot.index == 0:
                money = free if free < money else money
                money_later = later if later < money_later else money_later
            else:
                tokens = free if free < tokens else tokens
                tokens_later = later if later < tokens_later else tokens_later
        now_, later_ = Amounts(max(0, money), max(0, tokens)), Amounts(max(0, money_later), max(0, tokens_later))
        return now_, later_ if later_.covers(now_) else Amounts(*map(max, now_, later_))

    def reserve(self, tenant: str, most: Amounts, now: float) -> Reservation | Shortage:
        """Set aside the most that a request can come to, in all budgets of its tenant or in none."""
        pots = self.pots(tenant, now)
        valid = now < self.valid_until
        for pot in pots:
            needed = most[pot.index]
            if needed > 0 and not (valid and needed <= pot.share - pot.reserved - pot.used):
                return Shortage(pot, needed)
        for pot in pots:
            pot.reserve(most[pot.index])
        return Reservation(most, pots)

    def settle(self, reservation: Reservation, used: Amounts) -> None:
        """End a reservation with what was used, which is believed even where it is more. A second call does nothing.

        It counts in the window in which it was reserved.
        """
        if reservation.open:
            reservation.open = False
            for pot in reservation.pots:
                pot.settle(reservation.amounts[pot.index], used[pot.index])

    def release(self, reservation: Reservation) -> None:
        """End a reservation of which nothing was used."""
        self.settle(reservation, Amounts())

    def need(self, tenant: str, amounts: Amounts, now: float, *, waits: bool = True) -> bool:
        """Take note that so much is needed at once, by somebody who waits for it, or would be good to have. False: not
        all of it is there, and asking the store for more may help."""
        there = True
        for pot in self.pots(tenant, now):
            # What can never be paid for needs no share, but a pot that nobody has asked about may hold anything.
            wanted = min(amounts[pot.index], pot.later)
            if wanted and not pot.need(wanted, waits=waits):
                there = there and pot.denied
        return there

    def expect(self, tenant: str, amounts: Amounts, now: float) -> None:
        """Take note that a request that is still to come may need so much: what is kept at hand follows that."""
        for pot in self.pots(tenant, now):
            pot.expect(min(amounts[pot.index], pot.later))

    def blocking(self, tenant: str, amounts: Amounts, now: float) -> tuple[Pot, ...]:
        """The pots in which there is less than that, for as long as their windows last."""
        return tuple(pot for pot in self.pots(tenant, now) if amounts[pot.index] > pot.later)

    # ------------------------------------------------------------- exchange ---

    @property
    def urgent(self) -> bool:
        """The store should be asked at once."""
        return any(pot.urgent for pots in self._pots.values() for pot in pots)

    def wishes(self, now: float, *, last: bool = False) -> tuple[Wish, ...]:
        """What to tell the store, and to ask it for; the `last` ones give back all that is not in hand. They must be
        answered, however often they have to be repeated, before others are made."""
        for tenant in [tenant for tenant, pots in self._pots.items() if any(now >= pot.ends for pot in pots)]:
            self._renewed(tenant, self._pots[tenant], now)
        wishes = [wish for pot in self._all() if (wish := pot.wish(last=last)) is not None]
        wishing = {wish.key.tenant for wish in wishes}
        idle = [tenant for tenant, pots in self._pots.items() if all(pot.forgettable for pot in pots)]
        for tenant in (tenant for tenant in idle if tenant not in wishing):
            del self._pots[tenant]
            self._turned.discard(tenant)
        return tuple(sorted(wishes))

    def answered(self, wishes: Iterable[Wish], answers: Mapping[PotKey, Answer]) -> frozenset[str]:
        """Take over what the store has said; the tenants for whom something has changed."""
        pots = {pot.key: pot for pot in self._all()}
        told = set()
        for wish in wishes:
            pot, answer = pots[wish.key], answers[wish.key]
            if (pot.now, pot.later) != _after(pot, wish, answer):
                told.add(wish.key.tenant)
            pot.answered(wish, answer)
        self._past = [pot for pot in self._past if pot.share or pot.reserved or pot.used]
        return frozenset(told)

    @property
    def denied(self) -> bool:
        """Somebody waits for what others hold."""
        return any(pot.denied for pot in self._all())

    def ask_again(self) -> None:
        """An interval has passed: what was denied may be there now."""
        for pot in self._all():
            pot.denied = False

    @property
    def holds(self) -> bool:
        """Whether the store keeps a share for this process."""
        return any(pot.share or pot.reserved or pot.used for pot in self._all())

    def _all(self) -> list[Pot]:
        return [*self._past, *(pot for pots in self._pots.values() for pot in pots)]


def _after(pot: Pot, wish: Wish, answer: Answer) -> tuple[int, int]:
    used = pot.used - wish.used
    return max(0, answer.share - pot.reserved - used), max(0, pot.limit - answer.spent - used)


def _pot(tenant: str, budget: Budget, now: float) -> Pot:
    starts, ends = budget.window.around(now)
    key = PotKey(tenant, budget.unit.value, budget.window.value, starts)
    return Pot(key, budget.unit.index, budget.limit, ends)
