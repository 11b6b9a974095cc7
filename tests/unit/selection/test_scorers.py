"""Scorers: what each means, and that all stay in [0, 1]."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from control_plane.domain.model import ModelCard, ModelName, Price, Provider, ServerId
from control_plane.domain.request import RouteRequest
from control_plane.domain.task import TaskType
from control_plane.selection import scorers
from control_plane.selection.policy import Policy, Weights
from control_plane.selection.query import Query
from control_plane.selection.table import UNKNOWN_SIGMA, CandidateRow, CandidateTable

A = ServerId("a")


def query(card: ModelCard, request: RouteRequest | None = None, policy: Policy | None = None) -> Query:
    table = CandidateTable([CandidateRow(A, card)])
    table.set_server(A, ready=True, draining=False, slots=4, used=0, waiting=0)
    return Query(table, request or RouteRequest("r"), policy or Policy())


def card(**fields: object) -> ModelCard:
    return ModelCard(ModelName("m"), Provider("p"), 8192, **fields)  # type: ignore[arg-type]


def test_capability_is_that_of_the_kind_of_work() -> None:
    asked = query(card(capabilities={TaskType.CHAT: 0.8, TaskType.VISION: 0.1}))
    assert scorers.capability(asked).tolist() == [0.8]


def within(objective: float, expected: float, sigma: float = UNKNOWN_SIGMA) -> float:
    return 1 / (1 + math.exp(-1.702 * math.log(objective / expected) / sigma))


def test_latency_by_hand() -> None:
    policy = Policy(
        latency_reference_s=5.0, ttft_objective_s=2.0, ttft_objective_per_prompt_token_s=0.001, tpot_objective_s=0.1
    )
    asked = query(card(ttft=1.0, tpot=0.04), RouteRequest("r", prompt_tokens=500, max_tokens=100), policy)
    meets = within(2.5, 1.0) * within(0.1, 0.04)
    assert scorers.latency(asked).tolist() == pytest.approx([0.7 * meets + 0.3 * 5.0 / (5.0 + 1.0 + 100 * 0.04)])


def test_latency_falls_back_on_the_prior() -> None:
    policy = Policy(latency_reference_s=1.0, ttft_prior_s=0.5, tpot_prior_s=0.05, expected_output_tokens=10)
    meets = within(2.0, 0.5) * within(0.15, 0.05)
    assert scorers.latency(query(card(), policy=policy)).tolist() == pytest.approx([0.7 * meets + 0.3 * 0.5])


def test_cost_is_half_at_the_reference_and_one_for_free() -> None:
    request = RouteRequest("r", prompt_tokens=4000, max_tokens=1000)
    price = Price(prompt=1.0, completion=6.0)
    assert scorers.cost(query(card(price=price), request)).tolist() == pytest.approx([0.5])
    assert scorers.cost(query(card(), request)).tolist() == [1.0]


@pytest.mark.parametrize(
    ("slots", "used", "waiting", "value"),
    [(4, 0, 0, 1.0), (4, 1, 0, 0.75), (4, 1, 2, 0.25), (4, 4, 9, 0.0), (4, 7, 0, 0.0), (0, 0, 0, 0.0)],
)
def test_load(slots: int, used: int, waiting: int, value: float) -> None:
    asked = query(card())
    asked.table.set_server(A, ready=True, draining=False, slots=slots, used=used, waiting=waiting)
    assert scorers.load(asked).tolist() == [value]


def test_provider_preference_is_relative_to_the_largest() -> None:
    rows = [CandidateRow(A, ModelCard(ModelName("m"), Provider(name), 8192)) for name in ("best", "named", "other")]
    policy = Policy(provider_preference={Provider("best"): 2.0, Provider("named"): 0.5})
    asked = Query(CandidateTable(rows), RouteRequest("r"), policy)
    assert scorers.provider(asked).tolist() == [1.0, 0.25, 0.5]


def test_weights_match_the_scorers() -> None:
    assert [name for name, _ in scorers.SCORERS] == list(Weights.__dataclass_fields__)


numbers = st.floats(allow_nan=True, allow_infinity=True)


@given(
    success=numbers,
    ttft=numbers,
    tpot=numbers,
    prices=st.tuples(*[st.floats(0, 1e12)] * 2),
    tokens=st.tuples(*[st.integers(0, 2**31)] * 2),
    load=st.tuples(*[st.integers(0, 2**31)] * 3),
    capability=numbers,
    weights=st.tuples(*[st.floats(0, 1e308)] * 6).filter(any),
)
def test_scores_stay_in_the_unit_interval(
    success: float,
    ttft: float,
    tpot: float,
    prices: tuple[float, float],
    tokens: tuple[int, int],
    load: tuple[int, int, int],
    capability: float,
    weights: tuple[float, ...],
) -> None:
    model = card(price=Price(prices[0], 0.0, prices[1]), capabilities={TaskType.CHAT: capability})
    asked = query(model, RouteRequest("r", prompt_tokens=tokens[0], max_tokens=tokens[1]), Policy(Weights(*weights)))
    asked.table.set_stats(A, model.name, model.provider, success=success, ttft=ttft, tpot=tpot)
    asked.table.set_server(A, ready=True, draining=False, slots=load[0], used=load[1], waiting=load[2])
    with np.errstate(over="ignore"):
        values = scorers.parts(asked)
        score, _ = scorers.scores(asked)
    assert ((values >= 0) & (values <= 1)).all()
    assert 0 <= score[0] <= 1
