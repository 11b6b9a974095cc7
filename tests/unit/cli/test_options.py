"""Options of the command line against what the SDK and the contract know."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from modelyard.cli import options
from modelyard.cli.errors import REASONS, CliError
from modelyard.client import PRIORITIES, TASK_TYPES, Image, Message
from modelyard.rpc.reasons import Reason


def test_choices_are_those_of_the_contract() -> None:
    assert options.TASK_TYPES == TASK_TYPES
    assert options.PRIORITIES == PRIORITIES


def test_every_reason_has_a_status_and_no_other() -> None:
    assert set(REASONS) == {reason.value for reason in Reason} | {"CONNECTION_FAILED"}


def test_what_is_not_given_is_not_sent_but_zero_is() -> None:
    asked, given = options.request(
        "Hello", model=None, stop=(), logprobs=False, temperature=0.0, seed=0, top_k=0, system=""
    )
    assert asked == "Hello"
    assert given == {"temperature": 0.0, "seed": 0, "top_k": 0, "system": ""}


def test_formats(tmp_path: Path) -> None:
    schema = {"type": "object"}
    (tmp_path / "s.json").write_text(json.dumps(schema))
    assert options.request("x", json_object=True)[1] == {"response_format": "json"}
    assert options.request("x", schema=json.dumps(schema))[1] == {"response_format": schema}
    assert options.request("x", schema=str(tmp_path / "s.json"))[1] == {"response_format": schema}
    for wrong in ("{", "[]", "nowhere.json"):
        with pytest.raises(CliError, match="--schema"):
            options.request("x", schema=wrong)


def test_images_come_before_the_prompt(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"jpeg")
    (tmp_path / "a.txt").write_bytes(b"text")
    asked, _ = options.request("What is it?", images=(tmp_path / "a.jpg",))
    assert asked == [Message("user", (Image(b"jpeg", "image/jpeg"), "What is it?"))]
    with pytest.raises(CliError, match="not an image"):
        options.request("x", images=(tmp_path / "a.txt",))
    with pytest.raises(CliError, match="exclude"):
        options.request("x", images=(tmp_path / "a.jpg",), raw_prompt=True)
