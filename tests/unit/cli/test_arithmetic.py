"""The arithmetic of a decision, recomputed by its reader."""

from __future__ import annotations

import pytest

from modelyard.cli.arithmetic import steps
from modelyard.client import Candidate, Decision

CANDIDATE = Candidate("gpu", "m", "p", 0.5, terms={"ttft": 0.25, "tpot": 0.01})


def decision(**formulas: str) -> Decision:
    return Decision("chosen", "gpu", "m", "p", formulas=formulas, terms={"output_tokens": 100})


def test_each_step_takes_what_came_before() -> None:
    found = steps(decision(seconds="ttft + tpot * output_tokens", score="5 / (max(seconds, 5) + 5)"), CANDIDATE)
    assert [(step.name, step.value) for step in found] == [("seconds", 1.25), ("score", 0.5)]
    assert found[0].numbers == "0.25 + 0.01 * 100" and found[1].numbers == "5 / (max(1.25, 5) + 5)"


@pytest.mark.parametrize(
    "text",
    [
        "nobody + 1",
        "__import__('os')",
        "().__class__",
        "ttft if ttft else 1",
        "max(ttft)",
        "'a' * 9",
        "(1).real",
        "1 +",
    ],
)
def test_what_is_no_arithmetic_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        steps(decision(score=text), CANDIDATE)
