"""What is expected of a row, and whether a busy one is worth waiting for."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from control_plane.domain.decision import RejectionReason, Verdict
from control_plane.domain.model import ModelCard, ModelName, Provider, ServerId
from control_plane.domain.request import RouteRequest
from control_plane.domain.task import TaskType
from control_plane.prediction.features import Coefficients
from control_plane.selection.forecast import Forecast, Planned, forecast
from control_plane.selection.patience import sooner
from control_plane.selection.policy import Policy, Weights
from control_plane.selection.query import Query
from control_plane.selection.select import explain, select
from control_plane.selection.table import CandidateRow, CandidateTable

M, P = ModelName("m"), Provider("p")
NOW = 1000.0
POLICY = Policy(ttft_objective_s=2.0, ttft_objective_per_prompt_token_s=0.001, tpot_objective_s=0.1)


def learned(per_token: float, tpot: float = 0.02, spread: float = 1.5) -> Coefficients[float]:
    return Coefficients(0.01, per_token, per_token, 0.0, tpot, 0.001, (1.0, spread), (1.0, spread), 10.0)


def fleet(**per_token: float) -> CandidateTable:
    """Idle servers with four slots that prefill a token in so many seconds."""
    table = CandidateTable(
        CandidateRow(ServerId(name), ModelCard(M, P, 100_000, {TaskType.CHAT: 0.5})) for name in per_token
    )
    for name, seconds in per_token.items():
        table.set_server(ServerId(name), ready=True, draining=False, slots=4, used=0, waiting=0)
        table.set_prediction(table.index(ServerId(name), M, P), learned(seconds))
    return table


def busy(table: CandidateTable, name: str, seconds: float) -> None:
    """With the prompts of others."""
    table.set_work(ServerId(name), streams=0, lane_until=NOW + seconds, slot_at=math.nan)


def expected(table: CandidateTable, prompt: int, **more: object) -> Forecast:
    return forecast(table, RouteRequest("r", prompt_tokens=prompt), POLICY, NOW, 0.0, 100, **more)  # type: ignore[arg-type]


def test_by_hand() -> None:
    table = fleet(a=0.001)
    table.set_work(ServerId("a"), streams=3, lane_until=NOW + 0.5, slot_at=math.nan)
    found = forecast(table, RouteRequest("r", prompt_tokens=1000), POLICY, NOW, 0.25, 100, np.array([400.0]))
    assert found.start[0] == pytest.approx(0.5)
    assert found.prefill[0] == pytest.approx(0.6)
    assert found.ttft[0] == pytest.approx(0.5 + 0.01 + 0.6)
    assert found.tpot[0] == pytest.approx(0.02 + 3 * 0.001)
    assert found.seconds[0] == pytest.approx(1.11 + 100 * 0.023)
    sigma = math.log(1.5) / 1.2815515655446004
    first = 1 / (1 + math.exp(-1.702 * math.log(3.0 / (0.25 + 1.11)) / sigma))
    each = 1 / (1 + math.exp(-1.702 * math.log(0.1 / 0.023) / sigma))
    assert found.meets[0] == pytest.approx(first * each)


def test_a_full_server_starts_when_a_slot_is_free() -> None:
    table = fleet(a=0.001)
    table.set_server(ServerId("a"), ready=True, draining=False, slots=4, used=4, waiting=0)
    table.set_stats(ServerId("a"), M, P, success=1.0, ttft=None, tpot=None, service=8.0)
    table.set_prediction(0, learned(0.001))
    assert expected(table, 100).start[0] == pytest.approx(2.0), "not known: 8 s / 4 slots"
    table.set_work(ServerId("a"), streams=4, lane_until=0.0, slot_at=NOW + 0.3)
    assert expected(table, 100).start[0] == pytest.approx(0.3)
    planned = Planned.nothing(1)
    planned.add(table.span(0), 0.1)
    assert expected(table, 100, planned=planned).start[0] == pytest.approx(0.3 + 2.0), "after the one who goes first"


@given(
    prompt=st.integers(0, 10**6), lane=st.floats(0, 1e5), cached=st.floats(0, 1e6), waited=st.floats(0, 1e5),
    per_token=st.floats(0, 1),
)  # fmt: skip
def test_everything_stays_in_its_bounds_and_more_work_never_helps(
    prompt: int, lane: float, cached: float, waited: float, per_token: float
) -> None:
    table = fleet(a=per_token, b=per_token)
    busy(table, "a", lane)
    request = RouteRequest("r", prompt_tokens=prompt)
    found = forecast(table, request, POLICY, NOW, waited, 100, np.array([cached, cached]))
    for column in (found.start, found.prefill, found.ttft, found.tpot, found.seconds, found.meets):
        assert np.isfinite(column).all() and (column >= 0).all()
    assert (found.meets <= 1).all()
    assert found.ttft[0] >= found.ttft[1] and found.meets[0] <= found.meets[1] + 1e-12


def test_a_long_prompt_waits_for_the_fast_server_and_a_short_one_does_not() -> None:
    table = fleet(cpu=0.01, gpu=0.0001)
    busy(table, "gpu", 0.5)
    long, short = RouteRequest("l", prompt_tokens=5000), RouteRequest("s", prompt_tokens=10)
    choice = select(Query(table, long, POLICY, now=NOW))
    assert (choice.verdict, choice.later, choice.prefers) == (Verdict.WAIT, table.index(ServerId("gpu"), M, P), True)
    assert select(Query(table, short, POLICY, now=NOW)).row == table.index(ServerId("cpu"), M, P)
    assert select(Query(table, long, POLICY, now=NOW, content=True)).row == table.index(ServerId("cpu"), M, P)


def test_a_free_server_that_is_in_time_and_no_later_is_taken() -> None:
    table = fleet(gpu=0.0001, mac=0.001)
    table.set_prediction(table.index(ServerId("mac"), M, P), learned(0.001, tpot=0.06, spread=1.1))
    request, policy = RouteRequest("r", prompt_tokens=1000), Policy(Weights(0, 0, 1, 0, 0, 0), tpot_objective_s=0.1)
    mac, gpu = (table.index(ServerId(name), M, P) for name in ("mac", "gpu"))
    busy(table, "gpu", 1.2)  # its answer would begin later, and end sooner
    assert select(Query(table, request, policy, now=NOW)).row == mac
    busy(table, "gpu", 0.5)
    assert select(Query(table, request, policy, now=NOW)).later == gpu
    busy(table, "gpu", 1.2)
    assert select(Query(table, request, policy, now=NOW, waited=3.5)).later == gpu, "neither can be in time"


def test_one_that_is_late_takes_a_slower_server_before_its_client_leaves() -> None:
    table = fleet(gpu=0.0001, mac=0.002)
    busy(table, "gpu", 5.0)
    mac, gpu = (table.index(ServerId(name), M, P) for name in ("mac", "gpu"))
    table.set_prediction(mac, learned(0.002, spread=1.1))
    request = RouteRequest("r", prompt_tokens=40_000)  # 9 s there, 80 to 86 s here, due after 42 s

    def chosen(waited: float, left: float = math.inf, *, late: bool = True) -> int:
        choice = select(Query(table, request, POLICY, now=NOW, waited=waited, left=left, late=late))
        return choice.row if choice.verdict is Verdict.CHOSEN else -1

    assert chosen(80.0) == mac, "others go first over there, perhaps for as long again"
    assert chosen(80.0, late=False) == -1
    assert chosen(60.0) == -1, "it would be sooner over there, as far as can be told"
    assert chosen(30.0, 90.0) == mac, "its last chance"
    assert chosen(30.0, 150.0) == -1, "it may still be in time over there"
    assert chosen(80.0, 60.0) == -1, "its client would be gone before the first token"
    table.set_success(ServerId("mac"), M, P, 0.8)
    assert chosen(80.0) == chosen(30.0, 90.0) == -1, "it may not answer at all"
    assert select(Query(table, request, POLICY, now=NOW, waited=80.0, late=True)).later == gpu


def test_who_is_overdue_is_taken_elsewhere_where_that_is_sooner() -> None:
    table = fleet(mac=0.001)
    table.set_prediction(0, learned(0.001, spread=1.1))
    request = RouteRequest("r", prompt_tokens=10_000)  # 10 to 11 s

    def leaves(elapsed: float, left: float = math.inf) -> bool:
        return sooner(Query(table, request, POLICY, now=NOW, left=left), elapsed)

    assert not leaves(5.0) and leaves(12.0)
    assert leaves(5.0, 12.0), "its last chance"
    assert not leaves(12.0, 9.0), "it would not be done there either"
    table.set_server(ServerId("mac"), ready=False, draining=False, slots=4, used=0, waiting=0)
    assert not leaves(12.0), "nobody else is there"


def test_who_waits_is_told_for_whom_and_how_long() -> None:
    table = fleet(cpu=0.01, gpu=0.0001)
    busy(table, "gpu", 0.5)
    record = explain(Query(table, RouteRequest("l", prompt_tokens=5000), POLICY, now=NOW))
    reasons = {found.server_id: [told.reason for told in found.rejections] for found in record.candidates}
    assert reasons == {"cpu": [RejectionReason.BETTER_LATER], "gpu": [RejectionReason.PREFILL_BUSY]}
    told = next(found for found in record.candidates if found.server_id == "cpu").rejections[0].detail
    assert told == ("first token expected in 50.01 s; gpu/m is expected to start it in 0.50 s and to have it in 1.01 s")
    assert "gpu is busy with the prompts of others" in record.summary


def test_what_others_will_take_first_makes_waiting_longer() -> None:
    table = fleet(gpu=0.0001, mac=0.001)
    busy(table, "gpu", 0.5)
    request = RouteRequest("r", prompt_tokens=1500)
    policy = Policy(Weights(0, 0, 1, 0, 0, 0))
    planned = Planned.nothing(2)
    gpu = table.index(ServerId("gpu"), M, P)
    assert select(Query(table, request, policy, now=NOW, planned=planned)).later == gpu
    planned.add(table.span(gpu), 5.0)
    assert select(Query(table, request, policy, now=NOW, planned=planned)).verdict is Verdict.CHOSEN


def test_where_a_prefix_is_cached_the_prompt_is_short() -> None:
    table = fleet(a=0.001, b=0.001)
    request = RouteRequest("r", prompt_tokens=3000)
    row = table.index(ServerId("b"), M, P)
    assert select(Query(table, request, POLICY, now=NOW)).row != row
    cached = np.zeros(2)
    cached[row] = 2500.0
    assert select(Query(table, request, POLICY, now=NOW, cached=cached)).row == row
