"""Budgets: shares never add up to more than the limit, reservations come back, windows follow the calendar."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import UTC, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from control_plane.domain.funds import UNLIMITED, Amounts, Reckoning
from control_plane.domain.model import Price
from control_plane.domain.request import RouteRequest
from control_plane.domain.task import TaskType
from control_plane.scheduling.budgets import (
    Answer,
    Budget,
    Ledger,
    PotKey,
    Reservation,
    Shortage,
    Unit,
    Window,
    Wish,
)

NOW = datetime(2026, 3, 31, 23, 30, tzinfo=UTC).timestamp()
DAILY = Budget(Unit.NANO_USD, Window.DAY, 1000)


class Store:
    """What a store promises: it gives no more than there is, and applies each exchange once."""

    def __init__(self) -> None:
        self.spent: dict[PotKey, int] = {}
        self.shares: dict[tuple[PotKey, int], int] = {}

    def exchange(self, owner: int, wishes: tuple[Wish, ...]) -> dict[PotKey, Answer]:
        answers = {}
        for wish in wishes:
            key = wish.key
            self.spent[key] = spent = self.spent.get(key, 0) + wish.used
            present = max(0, self.shares.get((key, owner), 0) - wish.used)
            others = sum(share for (pot, who), share in self.shares.items() if pot == key and who != owner)
            share = min(wish.share, present + max(0, wish.limit - spent - others - present))
            if share < wish.least:
                share = min(wish.in_hand, present)
            self.shares[key, owner] = share
            answers[key] = Answer(spent, share)
        return answers


def paid(ledger: Ledger, store: Store, now: float = NOW, owner: int = 1) -> None:
    wishes = ledger.wishes(now)
    ledger.answered(wishes, store.exchange(owner, wishes))


def money(nano_usd: int) -> Amounts:
    return Amounts(nano_usd, 0)


def reserved(ledger: Ledger, most: Amounts, now: float = NOW) -> Reservation:
    found = ledger.reserve("a", most, now)
    assert isinstance(found, Reservation)
    return found


# ----------------------------------------------------------------- windows ---


@pytest.mark.parametrize(
    ("window", "starts", "ends"),
    [
        (Window.HOUR, "2026-03-31T23:00", "2026-04-01T00:00"),
        (Window.DAY, "2026-03-31T00:00", "2026-04-01T00:00"),
        (Window.MONTH, "2026-03-01T00:00", "2026-04-01T00:00"),
    ],
)
def test_windows_follow_the_calendar(window: Window, starts: str, ends: str) -> None:
    def at(text: str) -> float:
        return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()

    assert window.around(NOW) == (at(starts), at(ends))


def test_the_total_never_ends() -> None:
    assert Window.TOTAL.around(NOW) == (0, math.inf)


@given(st.sampled_from([Window.HOUR, Window.DAY, Window.MONTH]), st.floats(0, 4e9))
def test_one_window_follows_upon_the_other(window: Window, at: float) -> None:
    starts, ends = window.around(at)
    assert starts <= at < ends
    assert window.around(ends)[0] == ends


# ------------------------------------------------------------------ ledger ---


def test_who_has_no_budget_may_spend_anything() -> None:
    ledger = Ledger((DAILY,), {"free": ()})
    assert ledger.funds("free", NOW) is None
    assert ledger.funds("a", NOW) is not None
    assert isinstance(ledger.reserve("free", money(10**15), NOW), Reservation)


def test_nothing_is_there_before_the_store_has_given_a_share() -> None:
    ledger, store = Ledger((DAILY,)), Store()
    assert ledger.funds("a", NOW) == (Amounts(0, UNLIMITED), Amounts(1000, UNLIMITED))
    found = ledger.reserve("a", money(100), NOW)
    assert isinstance(found, Shortage) and not found.final
    assert not ledger.need("a", money(100), NOW)
    assert ledger.urgent
    paid(ledger, store)
    assert not ledger.urgent
    first = reserved(ledger, money(100))
    ledger.settle(first, money(30))
    ledger.settle(first, money(30))  # once more changes nothing
    paid(ledger, store)
    assert store.spent == {PotKey("a", "nano_usd", "day", round(NOW) // 86400 * 86400): 30}


def test_what_can_never_be_paid_for_is_told() -> None:
    ledger = Ledger((DAILY,))
    found = ledger.reserve("a", money(1001), NOW)
    assert isinstance(found, Shortage) and found.final
    (pot,) = ledger.blocking("a", money(1001), NOW)
    assert pot.ends == NOW + 1800
    assert ledger.blocking("a", money(1000), NOW) == ()


def test_a_new_window_begins_with_the_whole_budget() -> None:
    ledger, store = Ledger((DAILY,)), Store()
    ledger.need("a", money(1000), NOW)
    paid(ledger, store)
    old = reserved(ledger, money(1000))
    tomorrow = NOW + 3600
    assert ledger.turn("a", tomorrow) and not ledger.turn("a", tomorrow)
    ledger.need("a", money(1000), tomorrow)
    paid(ledger, store, tomorrow)
    reserved(ledger, money(1000), tomorrow)
    ledger.settle(old, money(900))  # counts where it was reserved
    paid(ledger, store, tomorrow)
    yesterday, today = sorted(store.spent)
    assert store.spent[yesterday] == 900 and store.spent[today] == 0


def test_money_and_tokens_are_looked_at_each_for_itself() -> None:
    ledger, store = Ledger((DAILY, Budget(Unit.TOKENS, Window.TOTAL, 50))), Store()
    ledger.need("a", Amounts(1000, 50), NOW)
    paid(ledger, store)
    assert isinstance(ledger.reserve("a", Amounts(1, 51), NOW), Shortage)
    assert isinstance(ledger.reserve("a", Amounts(1001, 1), NOW), Shortage)
    assert ledger.funds("a", NOW) == (Amounts(1000, 50),) * 2
    reserved(ledger, Amounts(1000, 50))


def test_an_idle_share_is_given_back() -> None:
    ledger, store = Ledger((DAILY,)), Store()
    ledger.need("a", money(100), NOW)
    paid(ledger, store)
    assert sum(store.shares.values()) >= 100
    for _ in range(10):
        paid(ledger, store)
    assert sum(store.shares.values()) == 0
    assert not ledger._pots, "who has not been seen for long is forgotten"


def test_a_server_that_took_more_than_it_should_is_believed() -> None:
    ledger, store = Ledger((DAILY,)), Store()
    ledger.need("a", money(1000), NOW)
    paid(ledger, store)
    ledger.settle(reserved(ledger, money(1000)), money(1500))
    paid(ledger, store)
    assert sum(store.spent.values()) == 1500
    assert ledger.funds("a", NOW) == (Amounts(0, UNLIMITED), Amounts(0, UNLIMITED))


def test_shares_are_good_for_as_long_as_the_store_keeps_them() -> None:
    ledger, store = Ledger((DAILY,)), Store()
    ledger.need("a", money(100), NOW)
    paid(ledger, store)
    ledger.valid_until = NOW + 10
    reserved(ledger, money(10), NOW + 9)
    assert isinstance(ledger.reserve("a", money(10), NOW + 10), Shortage)
    assert ledger.funds("a", NOW + 10) == (Amounts(0, UNLIMITED), Amounts(1000, UNLIMITED))


def test_no_limit_is_below_nothing() -> None:
    with pytest.raises(ValueError, match="limit"):
        Budget(Unit.TOKENS, Window.DAY, -1)


# --------------------------------------------------------------- reckoning ---


def test_the_most_that_a_request_can_come_to() -> None:
    reckoning = Reckoning(prompt_factor=4.0, output_tokens=100)
    price = Price(prompt=1.0, completion=10.0)
    bound = RouteRequest("r", prompt_tokens=25, max_tokens=7)
    assert reckoning.most(bound, price, 4096) == Amounts(100 * 1000 + 7 * 10_000, 107)
    open_ = RouteRequest("r", prompt_tokens=25)
    assert reckoning.most(open_, price, 4096).tokens == 200
    assert reckoning.most(open_, price, 30).tokens == 105, "no more than fits"
    texts = RouteRequest("r", TaskType.EMBEDDING, prompt_tokens=10, more_prompt_tokens=5)
    assert reckoning.most(texts, price, 4096) == Amounts(60_000, 60)
    assert reckoning.most(bound, Price(), 4096) == Amounts(0, 107), "free models cost nothing"


# ------------------------------------------------------------ state machine ---


class ManyControlPlanes(RuleBasedStateMachine):
    """Ledgers over one store: exchanges take time, get lost on their way back and are repeated."""

    LIMITS: Mapping[str, int] = {"nano_usd": 1000, "tokens": 400}

    def __init__(self) -> None:
        super().__init__()
        budgets = (
            Budget(Unit.NANO_USD, Window.HOUR, 1000),
            Budget(Unit.TOKENS, Window.TOTAL, 400),
        )
        self.store = Store()
        self.now = NOW
        self.ledgers = [Ledger(budgets) for _ in range(3)]
        self.under_way: dict[int, tuple[tuple[Wish, ...], dict[PotKey, Answer]]] = {}
        self.open: list[tuple[int, Reservation]] = []
        self.used: dict[PotKey, int] = {}

    which = st.integers(0, 2)
    amounts = st.builds(Amounts, st.integers(0, 300), st.integers(0, 120))

    @rule(number=which, most=amounts)
    def reserve(self, number: int, most: Amounts) -> None:
        ledger = self.ledgers[number]
        funds = ledger.funds("a", self.now)
        assert funds is not None
        found = ledger.reserve("a", most, self.now)
        assert isinstance(found, Reservation) == funds[0].covers(most)
        if isinstance(found, Reservation):
            self.open.append((number, found))
        else:
            ledger.need("a", most, self.now)

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def settle(self, data: st.DataObject) -> None:
        number, reservation = self.open.pop(data.draw(st.integers(0, len(self.open) - 1)))
        most = reservation.amounts
        used = Amounts(data.draw(st.integers(0, most.nano_usd)), data.draw(st.integers(0, most.tokens)))
        self.ledgers[number].settle(reservation, used)
        for pot in reservation.pots:
            self.used[pot.key] = self.used.get(pot.key, 0) + used[pot.index]

    @rule(number=which)
    def ask(self, number: int) -> None:
        """The store hears and answers; the answer is on its way."""
        if number not in self.under_way:
            wishes = self.ledgers[number].wishes(self.now)
            self.under_way[number] = wishes, self.store.exchange(number, wishes)

    @rule(number=which)
    def hear(self, number: int) -> None:
        if number in self.under_way:
            wishes, answers = self.under_way.pop(number)
            self.ledgers[number].answered(wishes, answers)

    @rule(minutes=st.integers(1, 90))
    def wait(self, minutes: int) -> None:
        self.now += 60 * minutes
        for ledger in self.ledgers:
            ledger.ask_again()

    @invariant()
    def never_oversold(self) -> None:
        """Whatever each of those in hand turns out to cost."""
        totals = dict(self.used)
        for _, reservation in self.open:
            for pot in reservation.pots:
                totals[pot.key] = totals.get(pot.key, 0) + reservation.amounts[pot.index]
        assert all(total <= self.LIMITS[key.unit] for key, total in totals.items())

    @invariant()
    def shares_are_within_the_limit(self) -> None:
        for key, spent in self.store.spent.items():
            held = sum(share for (pot, _), share in self.store.shares.items() if pot == key)
            assert spent + held <= self.LIMITS[key.unit]

    def teardown(self) -> None:
        """All is settled: the store knows what was used, and holds nothing for anybody."""
        for number in list(self.under_way):
            self.hear(number)
        for number, reservation in self.open:
            self.ledgers[number].release(reservation)
        for number, ledger in enumerate(self.ledgers):
            wishes = ledger.wishes(self.now, last=True)
            ledger.answered(wishes, self.store.exchange(number, wishes))
            assert not ledger.holds
        assert {key: spent for key, spent in self.store.spent.items() if spent} == {
            key: used for key, used in self.used.items() if used
        }
        assert not any(self.store.shares.values())


TestManyControlPlanes = ManyControlPlanes.TestCase
TestManyControlPlanes.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
