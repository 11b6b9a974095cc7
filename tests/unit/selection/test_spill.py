"""Models that cost money are kept for what free ones cannot serve in time."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from control_plane.domain.decision import RejectionReason, Verdict
from control_plane.domain.model import ModelCard, ModelName, Price, Provider, ServerId
from control_plane.domain.request import RouteRequest
from control_plane.domain.task import TaskType
from control_plane.prediction.features import Coefficients
from control_plane.selection.policy import Policy, Weights
from control_plane.selection.query import Query
from control_plane.selection.select import explain, select
from control_plane.selection.table import CandidateRow, CandidateTable

NOW = 100.0
REQUEST = RouteRequest("r", prompt_tokens=1000, max_tokens=1000)
QUALITY = Weights(1, 0, 0, 0, 0, 0)
HOME_FIRST = Policy(QUALITY, spill_usd=0.05)


def house(busy: float = 0.0, price: float = 10.0, *, home: bool = True) -> CandidateTable:
    """A free model that prefills 1000 tokens in a second, busy for so many, and a better one for a `price`."""
    rows = [CandidateRow(ServerId("api"), card("big", Price(price, 0.0, price), 1.0))]
    if home:
        rows.append(CandidateRow(ServerId("mac"), card("small", Price(0.0, 0.0, 0.0), 0.5)))
    table = CandidateTable(rows)
    for number, row in enumerate(table.rows):
        table.set_server(row.server_id, ready=True, draining=False, slots=4, used=0, waiting=0)
        table.set_prediction(number, Coefficients(0.01, 0.001, 0.001, 0.0, 0.02, 0.0, (1.0, 1.2), (1.0, 1.2), 9.0))
    if home:
        table.set_work(ServerId("mac"), streams=0, lane_until=NOW + busy, slot_at=math.nan)
    return table


def card(name: str, price: Price, quality: float) -> ModelCard:
    return ModelCard(ModelName(name), Provider("p"), 100_000, {TaskType.CHAT: quality}, price=price)


def ask(table: CandidateTable, policy: Policy = HOME_FIRST, **more: object) -> str:
    choice = select(Query(table, REQUEST, policy, now=NOW, **more))  # type: ignore[arg-type]
    return table.rows[choice.row].server_id if choice.verdict is Verdict.CHOSEN else choice.verdict.name


def test_home_serves_what_it_can_serve_in_time() -> None:
    assert ask(house(), Policy(QUALITY)) == "api", "without the setting the score decides"
    assert ask(house()) == "mac"
    record = explain(Query(house(), REQUEST, HOME_FIRST, now=NOW))
    (rejection,) = record.candidates[-1].rejections
    assert (
        rejection.reason is RejectionReason.SPARED
        and "mac/small serves it in time with a chance of 1.00" in rejection.detail
    )


def test_it_waits_for_home_as_long_as_that_is_in_time_and_spills_when_it_is_not() -> None:
    choice = select(Query(house(1.0), REQUEST, HOME_FIRST, now=NOW))
    assert choice.verdict is Verdict.WAIT and choice.prefers and choice.later == 1
    assert ask(house(1.0), waited=1.5) == "api"
    assert ask(house(5.0)) == "api"
    assert ask(house(5.0), content=True) == "WAIT", "nobody waits for it"


def test_at_a_price_limit() -> None:
    assert ask(house(5.0, price=30.0)) == "WAIT"
    record = explain(Query(house(5.0, price=30.0), REQUEST, HOME_FIRST, now=NOW))
    assert "expected to cost 0.060000 US dollars > 0.050000" in str(record.candidates)


def test_where_home_is_away_or_cannot_do_it() -> None:
    assert ask(house(price=30.0, home=False)) == "api", "there is no home to spare it for"
    away = house()
    away.set_server(ServerId("mac"), ready=False, draining=False, slots=4, used=0, waiting=0)
    assert ask(away) == "api"
    pinned = RouteRequest("r", prompt_tokens=1000, max_tokens=1000, model=ModelName("big"))
    assert select(Query(house(price=90.0), pinned, HOME_FIRST, now=NOW)).verdict is Verdict.CHOSEN


@given(busy=st.floats(0, 20), price=st.floats(0, 100), waited=st.floats(0, 20), limit=st.floats(0, 1))
def test_nothing_is_paid_above_the_limit_and_a_request_can_always_be_served(
    busy: float, price: float, waited: float, limit: float
) -> None:
    table, policy = house(busy, price), Policy(QUALITY, spill_usd=limit)
    query = Query(table, REQUEST, policy, now=NOW, waited=waited)
    choice = select(query)
    assert choice.verdict is not Verdict.IMPOSSIBLE
    if choice.verdict is Verdict.CHOSEN and table.rows[choice.row].server_id == "api":
        assert 2000 * price * 1e-6 <= limit + 1e-12
    assert explain(query).verdict is choice.verdict
