"""The plan of all who wait: as many as possible in time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from control_plane.domain.model import ModelCard, ModelName, Provider, ServerId
from control_plane.domain.request import RouteRequest
from control_plane.domain.task import TaskType
from control_plane.prediction.features import Coefficients
from control_plane.selection.policy import Policy
from control_plane.selection.table import CandidateRow, CandidateTable
from control_plane.selection.triage import Case, in_time, triage

M, P = ModelName("m"), Provider("p")
POLICY = Policy(ttft_objective_s=2.0, ttft_objective_per_prompt_token_s=0.0, tpot_objective_s=0.1)
NOW = 1000.0


def fleet(context: int = 100_000, tpot: float = 0.02, **per_token: float) -> CandidateTable:
    """Idle servers that prefill a token in so many seconds."""
    table = CandidateTable(
        CandidateRow(ServerId(name), ModelCard(M, P, context, {TaskType.CHAT: 0.5})) for name in per_token
    )
    for name, seconds in per_token.items():
        table.set_server(ServerId(name), ready=True, draining=False, slots=4, used=0, waiting=0)
        sure = Coefficients(0.0, seconds, seconds, 0.0, tpot, 0.0, (1.0, 1.0), (1.0, 1.0), 10.0)
        table.set_prediction(table.index(ServerId(name), M, P), sure)
    return table


def case(table: CandidateTable, tokens: int, waited: float = 0.0, rank: int = 0, **more: object) -> Case:
    fields: dict[str, object] = {"reach": np.ones(len(table), np.bool_), "avoided": frozenset(), "cached": None}
    return Case(RouteRequest("r", prompt_tokens=tokens), POLICY, waited, rank, **(fields | more))  # type: ignore[arg-type]


def planned(works: Sequence[float], left: Sequence[float], ranks: Sequence[int] | None = None) -> list[bool]:
    """On one server that is free."""
    return in_time(
        np.zeros(1), np.array(works, float)[:, np.newaxis], left, ranks or [0] * len(works), fleet(only=0.001)
    )


def test_the_longest_gives_way_where_not_all_can_be_in_time() -> None:
    assert planned([1, 1, 1], [1, 2, 3]) == [True, True, True]
    assert planned([1.5, 1, 1], [2, 2.1, 3.1]) == [False, True, True]
    assert planned([1, 1, 2.5], [1, 2, 3]) == [True, True, False], "one that is longer than the others gives way itself"


def test_nobody_gives_way_to_another_rank() -> None:
    assert planned([1.5, 1, 1], [2, 2.1, 3.1], [0, 1, 1]) == [True, False, True]


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 25)), min_size=1, max_size=8))
def test_on_one_server_as_many_as_can_be(jobs: list[tuple[int, int]]) -> None:
    jobs.sort(key=lambda job: job[1])
    kept = planned([work for work, _ in jobs], [left for _, left in jobs])

    def feasible(chosen: Sequence[tuple[int, int]]) -> bool:
        end = 0
        for work, left in chosen:
            end += work
            if end > left:
                return False
        return True

    assert feasible([job for job, keep in zip(jobs, kept, strict=True) if keep])
    most = max(size for size in range(len(jobs) + 1) if any(map(feasible, combinations(jobs, size))))
    assert sum(kept) == most


@given(
    st.lists(st.tuples(st.floats(0.1, 9), st.floats(0.1, 9), st.floats(0, 25)), max_size=12),
    st.floats(0, 9),
    st.floats(0, 9),
)
def test_nobody_is_in_time_who_could_not_be_alone(jobs: list[tuple[float, float, float]], a: float, b: float) -> None:
    jobs.sort(key=lambda job: job[2])
    works = np.array([job[:2] for job in jobs]).reshape(-1, 2)
    kept = in_time(np.array([a, b]), works, [job[2] for job in jobs], [0] * len(jobs), fleet(x=1.0, y=1.0))
    for (one, other, left), keep in zip(jobs, kept, strict=True):
        assert not keep or min(a + one, b + other) <= left + 1e-9


def test_each_takes_what_is_soonest_and_servers_are_busy_for_all_their_models() -> None:
    table = fleet(fast=0.001, slow=0.002)
    both = [case(table, 1800), case(table, 900), case(table, 900)]
    assert triage(table, both[:2], NOW) == [True, True]
    assert triage(table, both, NOW) == [False, True, True]
    table.set_work(ServerId("fast"), streams=0, lane_until=NOW + 5.0, slot_at=math.nan)
    assert triage(table, [case(table, 900), case(table, 1100)], NOW) == [True, False]


def test_what_keeps_a_request_from_a_server() -> None:
    table = fleet(fast=0.001, slow=1.0)
    fast = table.index(ServerId("fast"), M, P)
    other = np.ones(2, np.bool_)
    other[fast] = False
    assert triage(table, [case(table, 1000)], NOW) == [True]
    assert triage(table, [case(table, 1000, waited=1.5)], NOW) == [False]
    assert triage(table, [case(table, 1000, reach=other)], NOW) == [False]
    assert triage(table, [case(table, 1000, avoided=frozenset({ServerId("fast")}))], NOW) == [False]
    assert triage(table, [case(table, 1000, waited=1.5, cached=np.full(2, 900.0))], NOW) == [True]
    table.set_server(ServerId("fast"), ready=False, draining=False, slots=4, used=0, waiting=0)
    assert triage(table, [case(table, 1000)], NOW) == [False]
    assert triage(fleet(context=500, fast=0.001), [case(fleet(fast=0.001), 1000)], NOW) == [False]
    assert triage(fleet(tpot=0.2, fast=0.001), [case(fleet(fast=0.001), 1000)], NOW) == [False]


@pytest.mark.parametrize("count", [2, 40])
def test_who_is_unsure_is_planned_with_something_to_spare(count: int) -> None:
    table = fleet(only=0.001)
    unsure = Coefficients(0.0, 0.001, 0.001, 0.0, 0.02, 0.0, (1.0, 2.0), (1.0, 2.0), 10.0)
    assert triage(table, [case(table, 1500)] + [case(table, 1)] * count, NOW)[0]
    table.set_prediction(0, unsure)
    assert not triage(table, [case(table, 1500)] + [case(table, 1)] * count, NOW)[0]
