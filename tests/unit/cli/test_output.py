"""Tables, durations and decisions as text."""

from __future__ import annotations

import io
import os
import sys

import pytest
from rich.console import Console

from modelyard.cli import output
from modelyard.cli.decision_view import candidates, decision_lines, refusals, weights_of
from modelyard.cli.demo_view import Writer
from modelyard.cli.errors import Failure
from modelyard.cli.output import Column
from modelyard.client import Candidate, Decision, Rejection, ScorePart


def test_aligned_text_has_as_many_words_as_columns() -> None:
    columns = (Column(""), Column("name"), Column("count", right=True))
    rows = [("*", "a", "1"), ("", "longer", ""), ("", "two\nlines", "300")]
    assert output.aligned(columns, rows) == [
        "   name       count",
        "*  a              1",
        "   longer         -",
        "   two lines    300",
    ]


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "-"),
        (812, "812 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (9_960, "10 kB"),
        (999_600, "1.0 MB"),
        (4_100_000_000, "4.1 GB"),
        (85_899_345_920, "86 GB"),
        (2**64 - 1, "18447 PB"),
    ],
)
def test_sizes(count: int, text: str) -> None:
    assert output.size(count) == text


def test_terminals_are_not_steered() -> None:
    assert output.printable("a\x1b[31mb\x07\u009bc\td\r\ne") == "a\ufffd[31mb\ufffd\ufffdc\td\ne"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (0.0, "0 ms"),
        (0.0031, "3.1 ms"),
        (0.0995, "0.10 s"),
        (0.5, "0.50 s"),
        (9.999, "10 s"),
        (61, "61 s"),
    ],
)
def test_durations(value: float | None, text: str) -> None:
    assert output.seconds(value) == text


def test_narrow_terminals_lose_optional_columns_first() -> None:
    columns = (Column("name"), Column("device", optional=1), Column("endpoint", optional=2))
    row = ["a" * 10, "b" * 10, "c" * 10]
    titles = []
    for width in (40, 30, 20):
        table = output.fitting_table(Console(width=width), columns, [row])
        titles.append([column.header for column in table.columns])
    assert titles == [["name", "device", "endpoint"], ["name", "device"], ["name"]]


def rendered(width: int, columns: tuple[Column, ...], row: list[str]) -> str:
    screen = Console(width=width, file=io.StringIO(), force_terminal=False)
    screen.print(output.fitting_table(screen, columns, [row]))
    return screen.file.getvalue()  # type: ignore[attr-defined]


def test_the_key_stays_readable_however_narrow_the_terminal() -> None:
    columns = (Column(""), Column("server"), Column("engine"), Column("models", flexible=True), Column("slots"))
    row = ["*", "a-server-name", "simulated", "one, two, three, four", "8"]
    for width in (50, 40, 30, 20):
        told = rendered(width, columns, row)
        assert "a-server-name" in told
        assert "\N{HORIZONTAL ELLIPSIS}" not in told
        assert max(map(len, told.splitlines())) <= width
    assert "one," in rendered(50, columns, row)
    # Not even the key fits: it is folded, nothing of it is lost.
    assert "".join(rendered(12, columns, row).split()).endswith("a-server-name")


def test_a_reader_that_left_is_told_as_print_tells_it(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w", encoding="utf-8") as broken:
        monkeypatch.setattr(sys, "stdout", broken)
        with pytest.raises(BrokenPipeError):
            output.console().print("nobody reads this")
        os.dup2(os.open(os.devnull, os.O_WRONLY), writer)  # what is left in the buffer goes there


def test_a_failure_is_one_line() -> None:
    failure = Failure(5, "QUEUE_FULL", "too many waiting.", "try again later", retry_after=2.0)
    assert failure.line() == "too many waiting. (retry after 2 s); try again later"
    assert failure.to_dict() == {
        "error": {
            "reason": "QUEUE_FULL",
            "message": "too many waiting.",
            "cure": "try again later",
            "retry_after": 2.0,
        }
    }


PARTS = (ScorePart("capability", 0.5, 3), ScorePart("novelty", 1.0, 1))
DECISION = Decision(
    "chosen",
    "a",
    "m",
    "p",
    (
        Candidate("a", "m", "p", 0.625, PARTS),
        Candidate("b", "m", "p", 0.5, PARTS),
        Candidate("c", "n", "p", 0.4, PARTS, (Rejection("draining", "c is draining", False),)),
    ),
    "a/p/m scores 0.63",
)


def test_decisions() -> None:
    columns, rows = candidates(DECISION)
    assert [column.title for column in columns] == ["", "server", "model", "score", "capability", "novelty"]
    assert [row[0] for row in rows] == ["→", " ", "✕"]
    assert rows[0][1:] == ["a", "m", "0.625", "0.50", "1.00"]
    assert [column.title for column in candidates(DECISION, short=True)[0]][-2:] == ["able", "novelty"]
    assert refusals(DECISION) == ["✕ c/n: c is draining"]
    assert weights_of(DECISION) == "score: able = capability x3, novelty = novelty x1"


def test_a_decision_without_candidates_has_no_table() -> None:
    stream = io.StringIO()
    decision_lines(Console(file=stream), Decision("impossible", "", "", "", (), "the fleet is empty"))
    assert stream.getvalue() == "impossible: the fleet is empty\n"


def test_streamed_text_is_wrapped_at_words(capsys: pytest.CaptureFixture[str]) -> None:
    writer = Writer(16)
    for piece in ("On", "e two th", "ree\nfour ", "incomprehensibilities", " six"):
        writer.write(piece)
    writer.end()
    assert capsys.readouterr().out == "  One two three\n  four \n  incomprehensibilities\n  six\n"
