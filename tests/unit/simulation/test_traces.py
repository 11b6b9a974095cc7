"""Readers of traces, and what can be done with one."""

from __future__ import annotations

from pathlib import Path

import pytest

from control_plane.simulation.traces import Job, TraceError, read, trace
from tests.unit.simulation.fleets import jobs

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:04.0319600,3180,8
2023-11-16 18:17:03.9799600,4808,10
2023-11-16 18:17:05,0,0
"""
MOONCAKE = """{"timestamp": 500, "input_length": 1030, "output_length": 6, "hash_ids": [7, 8, 9]}

{"timestamp": 2500, "input_length": 1024, "output_length": 0, "hash_ids": [7, 5]}
{"timestamp": 2600, "input_length": 1024, "output_length": 3, "hash_ids": [8, 5]}
"""
OWN = (
    '{"arrival": 1.5, "prompt_tokens": 600, "output_tokens": 20, "blocks": [4], "tenant": "t", "model": "m", '
    '"priority": 2, "max_tokens": 50, "task_type": "code"}\n{"arrival": 1.0, "prompt_tokens": 10, "output_tokens": 2}\n'
)


def test_azure(tmp_path: Path) -> None:
    (tmp_path / "code.csv").write_text(AZURE)
    found = read(tmp_path / "code.csv")
    assert found.name == "code"
    assert [job.id for job in found.jobs] == [0, 1, 2]
    assert [job.arrival for job in found.jobs] == pytest.approx([0.0, 0.052, 1.02004], abs=1e-6)
    assert [job.prompt_tokens for job in found.jobs] == [4808, 3180, 1]
    assert found.output_tokens == (10, 8, 1)
    assert {job.blocks for job in found.jobs} == {None}


def test_mooncake(tmp_path: Path) -> None:
    (tmp_path / "chat.jsonl").write_text(MOONCAKE)
    found = read(tmp_path / "chat.jsonl")
    assert [job.arrival for job in found.jobs] == pytest.approx([0.0, 2.0, 2.1])
    assert found.output_tokens == (6, 1, 3)
    first, second, third = (job.blocks or () for job in found.jobs)
    # Full blocks only, and an id stands for all that is before it: 7, 5 has nothing but 7 in common with 7, 8.
    assert [len(first), len(second), len(third)] == [2, 2, 2]
    assert first[0] == second[0]
    assert len({*first, *second, *third}) == 5


def test_own(tmp_path: Path) -> None:
    (tmp_path / "own.jsonl").write_text(OWN)
    plain, full = read(tmp_path / "own.jsonl").jobs
    assert (plain.arrival, plain.blocks, plain.max_tokens) == (0.0, None, None)
    assert (full.arrival, full.tenant, full.model, full.priority) == (0.5, "t", "m", 2)
    assert (full.max_tokens, full.task_type, len(full.blocks or ())) == (50, "code", 1)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "TIMESTAMP,ContextTokens\n", ":1: no column GeneratedTokens"),
        ("a.csv", "", ":1: no column TIMESTAMP, ContextTokens, GeneratedTokens"),
        ("a.csv", AZURE.replace("3180", "many"), ":2: invalid literal"),
        ("a.csv", AZURE.replace("3180", "-1"), ":2: tokens below 0"),
        ("a.csv", AZURE.replace(",3180,8", ""), ":2: fewer columns"),
        ("a.csv", AZURE.replace("2023-11-16 18:17:05", "noon"), ":4: Invalid isoformat string"),
        ("a.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n", ": no requests"),
        ("a.jsonl", "", ": no requests"),
        ("a.jsonl", MOONCAKE.replace("2500", '"soon"'), ":3: Expected `float`, got `str`"),
        ("a.jsonl", MOONCAKE + "{", ":5: Input data was truncated"),
        ("a.jsonl", MOONCAKE.replace('"timestamp": 2500, ', ""), ":3: Object missing required field `timestamp`"),
        ("a.jsonl", "[1]\n", ":1: Expected `object`"),
        ("a.jsonl", OWN.replace("600", "-600"), ":1: tokens below 0"),
        ("a.jsonl", '{"arrival": 1e999, "prompt_tokens": 1, "output_tokens": 1}', ":1:"),
    ],
)
def test_what_cannot_be_read_says_where(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(TraceError) as caught:
        read(tmp_path / name)
    assert str(caught.value).startswith(f"{tmp_path / name}")
    assert message in str(caught.value)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    for name in ("a.csv", "a.jsonl"):
        (tmp_path / name).write_bytes(b"TIMESTAMP,ContextTokens,GeneratedTokens\n\xff\xfe,1,1\n")
        with pytest.raises(TraceError):
            read(tmp_path / name)


def test_rate_and_parts() -> None:
    found = jobs(*((n * 2.0, 100 + n, 1 + n) for n in range(10)))
    assert (found.span, found.rate) == (pytest.approx(20.0), pytest.approx(0.5))
    faster = found.at_rate(5.0)
    assert faster.rate == pytest.approx(5.0)
    assert faster.jobs[9].arrival == pytest.approx(1.8)
    part = found.part(3, 2)
    assert [(job.id, job.arrival, job.prompt_tokens) for job in part.jobs] == [(0, 0.0, 103), (1, 2.0, 104)]
    assert part.output_tokens == (4, 5)
    assert [job.prompt_tokens for job in found.between(4.0, 8.0).jobs] == [102, 103]
    for impossible in (lambda: found.part(10), lambda: found.between(100, 200), lambda: found.at_rate(0)):
        with pytest.raises(ValueError):
            impossible()


def test_a_looped_trace_shares_prefixes_within_a_round_only() -> None:
    twice = jobs((0, 1024, 5, [1, 2]), (1, 1024, 6, [1, 3])).looped(2)
    assert [job.arrival for job in twice.jobs] == pytest.approx([0, 1, 2, 3])
    assert [job.id for job in twice.jobs] == [0, 1, 2, 3]
    assert twice.output_tokens == (5, 6, 5, 6)
    first, second, third, fourth = (job.blocks or () for job in twice.jobs)
    assert first[0] == second[0] and third[0] == fourth[0]
    assert not {*first, *second} & {*third, *fourth}


def test_everything_at_once_stays_at_once() -> None:
    burst = trace("burst", [(Job(0, 5.0, 10), 1)] * 3)
    assert [job.arrival for job in burst.at_rate(3.0).jobs] == [0.0] * 3
