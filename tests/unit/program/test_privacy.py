"""What logs and messages may tell of an exception."""

from __future__ import annotations

from modelyard.program import privacy


def test_type_and_place_are_told_but_no_text() -> None:
    secret = "the prompt"

    def inner() -> None:
        raise KeyError(secret)

    def outer() -> None:
        try:
            inner()
        except KeyError as error:
            raise ValueError(f"no {secret}") from error

    try:
        outer()
    except ValueError as error:
        assert privacy.kind(error) == "ValueError"
        told = privacy.where(error)
    assert secret not in told
    assert "in outer" in told
    assert "behind it: KeyError" in told
    assert "in inner" in told


def test_a_suppressed_cause_stays_out_and_circles_end() -> None:
    first, second = ValueError("a"), TypeError("b")
    first.__context__, first.__suppress_context__ = second, True
    assert privacy.where(first) == "ValueError"
    first.__cause__, second.__cause__ = second, first
    assert privacy.where(first) == "ValueError\nbehind it: TypeError"
