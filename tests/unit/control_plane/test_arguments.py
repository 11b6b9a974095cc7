"""What the programs say of a wrong command line."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

import pytest

from control_plane import db, predictor
from control_plane.simulation import __main__ as simulation


@pytest.mark.parametrize(
    ("main", "arguments", "message"),
    [
        (simulation.main, ("--trace", "x", "--policy", "nope"), "argument --policy: no policy nope"),
        (simulation.main, (), "--trace"),
        (predictor.main, ("train", "--since", "foo"), "argument --since: 'foo' is no time like \"7d\""),
        (predictor.main, ("nonsense",), "invalid choice: 'nonsense'"),
        (db.main, ("upgrade", "--foo"), "unrecognized arguments: --foo"),
        (db.main, (), "upgrade|status"),
    ],
)
def test_wrong_usage_is_json_where_json_is_asked_for(
    main: Callable[[Sequence[str]], int],
    arguments: tuple[str, ...],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--json"])
    told = capsys.readouterr()
    error = json.loads(told.out)["error"]
    assert stop.value.code == 2 and error["reason"] == "USAGE" and message in error["message"], told
    assert message in told.err
    with pytest.raises(SystemExit):
        main(arguments)
    told = capsys.readouterr()
    assert told.out == "" and message in told.err
