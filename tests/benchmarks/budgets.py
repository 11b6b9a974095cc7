"""What a budget costs a request: looking at it, setting aside, settling, taking down the usage, microseconds.

`python -m tests.benchmarks.budgets`
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from time import perf_counter

from control_plane.domain.funds import Amounts, Reckoning
from control_plane.domain.request import RouteRequest
from control_plane.fleet.accounts import Accounts
from control_plane.fleet.server import Flight, Pair, Server
from control_plane.scheduling.breaker import Breaker, BreakerPolicy
from control_plane.scheduling.budgets import Answer, Budget, Ledger, Reservation, Unit, Window
from control_plane.scheduling.stats import RuntimeStats, StatsPolicy
from control_plane.selection.policy import Policy
from control_plane.selection.query import Query
from control_plane.selection.select import select
from tests.benchmarks.select import fleet
from tests.unit.control_plane.builders import report

NOW = 1.8e9
LARGE = 10**15
BUDGETS = (Budget(Unit.NANO_USD, Window.DAY, LARGE), Budget(Unit.TOKENS, Window.MONTH, LARGE))


def ledger() -> Ledger:
    """With the whole of two budgets for everybody."""
    found = Ledger(BUDGETS)
    found.need("a", Amounts(LARGE, LARGE), NOW)
    wishes = found.wishes(NOW)
    found.answered(wishes, {wish.key: Answer(0, LARGE) for wish in wishes})
    return found


def run() -> dict[str, float]:
    """Medians in microseconds by name of the measurement."""
    pure, most = ledger(), Amounts(1_000_000, 1000)

    def reserve_and_settle() -> None:
        reservation = pure.reserve("a", most, NOW)
        assert isinstance(reservation, Reservation)
        pure.settle(reservation, most)

    table, request, policy = fleet(100), RouteRequest("r", prompt_tokens=100, tenant="a"), Policy()
    with_budgets = Accounts(ledger(), Reckoning(), lambda: NOW)
    without = Accounts(Ledger(), Reckoning(), lambda: NOW)
    row = select(Query(table, request, policy)).row
    card = table.rows[row].card

    def accounted(accounts: Accounts) -> Callable[[], None]:
        server = Server(report(), None, 0.0, 0.0)  # type: ignore[arg-type]
        pair = Pair(RuntimeStats.initial(StatsPolicy()), Breaker.closed(BreakerPolicy()), "")
        flight = Flight(server, card.name, card.provider, card.price, pair, 0, 0.0, False)

        def once() -> None:
            accounts.funds(request.tenant)
            charge = accounts.open(request, card)
            assert charge is not None
            flight.charge = charge
            charge.begin()
            charge.count(100, 0, 200)
            accounts.close(flight)

        return once

    funds = with_budgets.funds("a")
    return {
        "reserve + settle, two budgets": _median(reserve_and_settle),
        "funds, open, count, close: two budgets": _median(accounted(with_budgets)),
        "funds, open, count, close: no budget": _median(accounted(without)),
        "select, 100 candidates, two budgets": _median(lambda: select(Query(table, request, policy, funds=funds))),
        "select, 100 candidates, no budget": _median(lambda: select(Query(table, request, policy))),
    }


def _median(call: Callable[[], object], times: int = 200, rounds: int = 50) -> float:
    measured = []
    for _ in range(rounds):
        begun = perf_counter()
        for _ in range(times):
            call()
        measured.append((perf_counter() - begun) / times)
    return median(measured) * 1e6


if __name__ == "__main__":
    for measurement, microseconds in run().items():
        print(f"{measurement:45} {microseconds:9.2f} µs")
