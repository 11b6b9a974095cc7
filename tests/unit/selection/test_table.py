"""CandidateTable: look-up, order and the columns that change."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from control_plane.domain.model import ModelCard, ModelName, Provider, ServerId
from control_plane.selection.table import CandidateRow, CandidateTable

A, B = ServerId("a"), ServerId("b")
LLAMA, MLX = ModelName("llama"), Provider("mlx")


def row(server: str, model: str, provider: str = "mlx", **card: float) -> CandidateRow:
    return CandidateRow(ServerId(server), ModelCard(ModelName(model), Provider(provider), 8192, **card))


def test_rows_are_sorted_and_found() -> None:
    table = CandidateTable([row("b", "llama"), row("a", "qwen"), row("a", "llama")])
    assert [(r.server_id, r.card.name) for r in table.rows] == [("a", "llama"), ("a", "qwen"), ("b", "llama")]
    assert table.index(B, LLAMA, MLX) == table.find(B, LLAMA, MLX) == 2
    assert table.find(B, ModelName("qwen"), MLX) is None
    with pytest.raises(KeyError):
        table.index(B, ModelName("qwen"), MLX)


def test_a_pair_cannot_be_there_twice() -> None:
    with pytest.raises(ValueError, match="same server"):
        CandidateTable([row("a", "llama"), row("a", "llama")])


def test_resolve_prefers_the_exact_name() -> None:
    table = CandidateTable([row("a", "mlx/llama", "hub"), row("a", "llama", "mlx"), row("b", "org/qwen", "hub")])
    assert table.resolve("mlx/llama") == ("mlx/llama", None)
    assert table.resolve("llama") == ("llama", None)
    assert table.resolve("hub/mlx/llama") == ("mlx/llama", "hub")
    assert table.resolve("hub/org/qwen") == ("org/qwen", "hub")
    assert table.resolve("hub/llama") is None
    assert table.knows_model("org/qwen") and not table.knows_model("qwen")


def test_a_server_without_reports_is_not_ready() -> None:
    table = CandidateTable([row("a", "llama")])
    assert not table.ready.any() and not table.free.any()


def test_slots_belong_to_the_server_not_to_the_row() -> None:
    table = CandidateTable([row("a", "llama"), row("a", "qwen"), row("b", "llama")])
    table.set_server(A, ready=True, draining=False, slots=2, used=1, waiting=3)
    assert table.free.tolist() == [1, 1, 0]
    assert table.waiting.tolist() == [3, 3, 0]
    table.take(0)
    table.take(1)
    assert table.free.tolist() == [-1, -1, 0]
    table.give(1)
    table.give(0)
    assert table.free.tolist() == [1, 1, 0]


def test_a_server_without_models_is_ignored() -> None:
    CandidateTable().set_server(A, ready=True, draining=False, slots=1, used=0, waiting=0)


def test_own_measurement_goes_before_the_servers() -> None:
    table = CandidateTable([row("a", "llama", ttft=0.5)])
    assert table.ttft[0] == 0.5 and math.isnan(table.tpot[0])
    table.set_stats(A, LLAMA, MLX, success=0.7, ttft=0.2, tpot=0.01)
    assert (table.success[0], table.ttft[0], table.tpot[0]) == (0.7, 0.2, 0.01)
    table.set_stats(A, LLAMA, MLX, success=math.nan, ttft=None, tpot=math.inf)
    assert (table.success[0], table.ttft[0]) == (0.0, 0.5) and math.isnan(table.tpot[0])


def test_breaker_is_per_pair() -> None:
    table = CandidateTable([row("a", "llama"), row("a", "qwen")])
    table.set_breaker(A, LLAMA, MLX, open=True)
    assert table.breaker_open.tolist() == [True, False]


@given(st.lists(st.tuples(st.integers(0, 1), st.floats(-1, 2)), max_size=8), st.floats(0, 1))
def test_whether_all_succeed_is_what_the_column_says(told: list[tuple[int, float]], share: float) -> None:
    table = CandidateTable([row("a", "llama"), row("b", "llama")])
    for number, success in told:
        table.set_success((A, B)[number], LLAMA, MLX, success)
        assert table.all_succeed(share) == (table.success >= share).all()
    other = CandidateTable([*table.rows, row("c", "llama")])
    other.carry(table)
    assert other.all_succeed(share) == (other.success >= share).all()
    assert CandidateTable().all_succeed(1.0)
