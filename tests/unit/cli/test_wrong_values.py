"""Values that no request can hold: told with the name of their option, and as JSON where that is asked for."""

from __future__ import annotations

import json

import pytest

from modelyard.cli import main, options
from modelyard.client._values import MOST_TIMEOUT

BEYOND = "9999-12-31T23:59:59-23:00"


def test_the_longest_time_is_that_of_the_sdk() -> None:
    assert options.SECONDS.max == MOST_TIMEOUT


@pytest.mark.parametrize(
    ("option", "arguments"),
    [
        ("--since", ("usage", "--since", "99999999999d")),
        ("--since", ("usage", "--since", "9" * 400 + "w")),
        ("--since", ("usage", "--since", "0001-01-01T00:00:00+05:00")),
        ("--since", ("usage", "--since", BEYOND)),
        ("--until", ("usage", "--until", "yesterday")),
        ("--not-before", ("tasks", "submit", "x", "--not-before", BEYOND)),
        ("--not-before", ("tasks", "submit", "x", "--not-before", "soon")),
        ("--deadline", ("tasks", "submit", "x", "--deadline", "nan")),
        ("--deadline", ("tasks", "submit", "x", "--deadline", "1e30")),
        ("--attempt-timeout", ("tasks", "submit", "x", "--attempt-timeout", "nan")),
        ("--after", ("tasks", "watch", "--after", "99999999999999999999")),
        ("--duration", ("agents", "report", "nope", "--duration", "1e300")),
        ("--duration", ("agents", "report", "nope", "--duration", "inf")),
        ("--duration", ("agents", "report", "nope", "--duration", "nan")),
        ("--score", ("agents", "report", "nope", "--score", "nan")),
        ("--within", ("agents", "route", "x", "--within", "inf")),
        ("--max-tokens", ("generate", "x", "--max-tokens", "99999999999999999999")),
        ("--top-k", ("generate", "x", "--top-k", "99999999999")),
        ("--temperature", ("generate", "x", "--temperature", "nan")),
        ("--timeout", ("generate", "x", "--timeout", "nan")),
        ("--timeout", ("generate", "x", "--timeout", "1e308")),
        ("--confidence", ("beliefs", "put", "k", "1", "--confidence", "nan")),
    ],
)
def test_the_option_is_named(option: str, arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--address", "127.0.0.1:1", *arguments, "--json"]) == 2
    told = capsys.readouterr()
    error = json.loads(told.out)["error"]
    assert error["reason"] == "USAGE" and option in error["message"]
    assert option in told.err and "Traceback" not in told.err


def test_a_timeout_of_the_settings(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELYARD_TIMEOUT", "1e300")
    assert main(["--address", "127.0.0.1:1", "models", "--json"]) == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["reason"] == "INVALID_CONFIG" and "MODELYARD_TIMEOUT" in error["message"]
