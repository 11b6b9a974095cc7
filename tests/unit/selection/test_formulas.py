"""The arithmetic that a decision tells is the arithmetic by which it was made."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from control_plane.domain.decision import DecisionRecord, ScoredCandidate
from control_plane.domain.request import RouteRequest
from control_plane.domain.task import TaskType
from control_plane.prediction.features import Coefficients
from control_plane.selection.forecast import Planned
from control_plane.selection.policy import Policy, Weights
from control_plane.selection.query import Query
from control_plane.selection.scorers import SCORERS
from control_plane.selection.select import explain
from control_plane.selection.table import CandidateTable
from tests.unit.selection.test_select import requests, tables

NAMES = tuple(name for name, _ in SCORERS)
small = st.floats(0, 10)


def by_hand(record: DecisionRecord, candidate: ScoredCandidate) -> Mapping[str, float]:
    """What somebody finds who has the decision and nothing else."""
    known: dict[str, float] = {**record.terms, **candidate.terms}
    for name, text in record.formulas:
        known[name] = eval(text, {"__builtins__": {}, "min": min, "max": max}, known)
    return known


@st.composite
def questions(draw: st.DrawFn) -> Query:
    table: CandidateTable = draw(tables())
    size = len(table)
    for row in range(size):
        if draw(st.booleans()):
            table.set_prediction(
                row,
                Coefficients(
                    draw(small), draw(st.floats(0, 0.01)), 0.0, 0.0, draw(small), draw(small),
                    (1.0, draw(st.floats(1.0, 5.0))), (1.0, draw(st.floats(1.0, 5.0))), 1.0,
                ),
            )  # fmt: skip
    for server in table.spans:
        table.set_work(
            server, streams=draw(st.integers(0, 9)), lane_until=draw(small), slot_at=draw(st.just(math.nan) | small)
        )
    if draw(st.booleans()):
        for model in table.model_codes:
            table.set_good(model, TaskType.CHAT, draw(st.floats(0, 1)))
    planned = None
    if draw(st.booleans()):
        planned = Planned(
            np.array(draw(st.lists(small, min_size=size, max_size=size))), np.zeros(size, dtype=np.int64), True
        )
    policy = Policy(
        Weights(*(draw(st.floats(0.1, 5)) for _ in NAMES)),
        provider_preference=draw(st.dictionaries(st.sampled_from(["p1", "p2"]), st.floats(0, 3))),
    )
    cached = draw(st.none() | st.lists(st.floats(0, 200), min_size=size, max_size=size).map(np.array))
    request: RouteRequest = draw(requests)
    return Query(table, request, policy, now=draw(small), waited=draw(small), cached=cached, planned=planned)


@given(questions())
def test_the_arithmetic_can_be_redone_from_the_decision_alone(query: Query) -> None:
    record = explain(query)
    for candidate in record.candidates:
        found = by_hand(record, candidate)
        for part in candidate.parts:
            assert found[part.scorer] == pytest.approx(part.value, abs=1e-9)
            assert found[f"weight_{part.scorer}"] == part.weight
        assert found["score"] == pytest.approx(candidate.score, abs=1e-9)
        for name in ("start", "ttft", "tpot", "seconds"):
            assert found[name] == pytest.approx(candidate.terms[name])


@given(questions())
def test_every_term_is_a_number_and_is_used(query: Query) -> None:
    record = explain(query)
    texts = " ".join(text for _, text in record.formulas)
    for candidate in record.candidates:
        for name, value in {**record.terms, **candidate.terms}.items():
            assert math.isfinite(value) and name in texts, name
