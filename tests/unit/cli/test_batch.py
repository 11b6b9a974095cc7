"""A file of prompts and the file of its results."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from modelyard.cli.batch_file import Entry, Results, read_entries
from modelyard.cli.batch_view import BatchView
from modelyard.cli.errors import CliError
from modelyard.cli.options import TASK_STATES
from modelyard.client import TASK_STATES as OF_THE_CONTRACT


def entries(*lines: Any, group: str = "g", **common: Any) -> list[Entry]:
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    return read_entries("f.jsonl", text, group, common)


def keys(*lines: Any, **options: Any) -> list[str]:
    return [entry.key for entry in entries(*lines, **options)]


def test_states_are_those_of_the_contract() -> None:
    assert TASK_STATES == OF_THE_CONTRACT


def test_what_a_line_says() -> None:
    found = entries(
        {"prompt": "Hello", "id": 7, "max_tokens": 5, "labels": {"a": "b"}, "deadline": "2100-01-01T00:00:00+00:00"},
        "",
        {"messages": [{"role": "user", "content": "Hi"}], "key": "mine", "task_type": "writing"},
        priority="high",
        max_tokens=9,
    )
    assert [(entry.line, entry.id) for entry in found] == [(1, 7), (3, None)]
    first, second = (entry.task.request for entry in found)
    assert first.spec.input.messages[0].content[0].text == "Hello" and first.spec.group == "g"
    assert (first.spec.input.sampling.max_tokens, second.spec.input.sampling.max_tokens) == (5, 9)
    assert first.spec.priority == second.spec.priority == 3 and dict(first.spec.labels) == {"a": "b"}
    assert first.spec.deadline.seconds == 4102444800
    assert second.idempotency_key == "mine" and second.spec.task_type == 7


def test_keys_are_made_of_what_lines_say() -> None:
    a, b = {"prompt": "a"}, {"prompt": "b"}
    assert keys(a, b) == keys(a, b) == list(reversed(keys(b, a)))
    assert keys(a, b)[0] == keys(a, {"prompt": "edited"})[0]
    assert len({*keys(a), *keys({"prompt": "edited"}), *keys(a, group="other"), *keys(a, max_tokens=3)}) == 4
    assert len({*keys(a), *keys({**a, "id": 1}), *keys({**a, "seed": 1})}) == 3
    twice = keys(a, a, a)
    assert len(set(twice)) == 3 and twice[0] == keys(a)[0]
    assert keys({"prompt": "a", "seed": 1}) == keys({"seed": 1, "prompt": "a"})


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", "is not JSON"),
        ("[1]", "is no JSON object"),
        ("[" * 100_000, "nested"),
        ({}, 'either "prompt" or "messages"'),
        ({"prompt": "a", "messages": []}, 'either "prompt" or "messages"'),
        ({"prompt": 5}, '"prompt" is a text'),
        ({"messages": "a"}, '"messages" a list'),
        ({"prompt": "a", "temprature": 1}, "unknown field 'temprature'; known: id, prompt"),
        ({"prompt": "a", "request_id": "x"}, "unknown field"),
        ({"prompt": "a", "temperature": 9}, "temperature: must be 0 to 2"),
        ({"prompt": "a", "temperature": "hot"}, '"temperature": '),
        ({"prompt": "a", "max_tokens": 5, "model": 7}, '"model": '),
        ({"prompt": "a", "max_tokens": 10**30}, '"max_tokens": '),
        ({"prompt": "a", "attempt_timeout": "5"}, '"attempt_timeout": '),
        ({"prompt": "a", "labels": 5}, '"labels": is an object'),
        ({"prompt": "a", "labels": {"a": 5}}, '"labels": is an object'),
        ({"prompt": "a", "tools": [5]}, '"tools": '),
        ({"prompt": "a", "stop": 5}, '"stop": '),
        ({"prompt": "h\ud800"}, '"prompt": is no Unicode text'),
        ({"prompt": "a", "key": "h\ud800"}, '"key": is no Unicode text'),
        ('{"prompt": "a", "max_tokens": 1, "max_tokens": 2}', "has the key 'max_tokens' twice"),
        ('{"prompt": "a", "labels": {"b": "1", "b": "2"}}', "has the key 'b' twice"),
        ({"prompt": "a", "max_attempts": 0}, "max_attempts"),
        ({"prompt": "a", "task_type": "nonsense"}, "allowed: chat"),
        ({"prompt": "a", "deadline": 60}, "is a time such as"),
        ({"prompt": "a", "deadline": "tomorrow"}, '"deadline": Invalid isoformat'),
        ({"prompt": "a", "deadline": "2030-01-01T00:00"}, "zone"),
        ({"prompt": "a", "key": ""}, '"key" is a text'),
        ({"prompt": "a", "key": "ä"}, "idempotency_key"),
        ({"prompt": "a", "callback": "ftp://x"}, "callback.url"),
        ({"prompt": ""}, "must not be empty"),
        ({"messages": [{"content": "a"}]}, '"role"'),
        ({"messages": [{"role": "user", "content": [{"type": "image", "media_type": "image/png"}]}]}, "missing"),
    ],
)
def test_a_wrong_line_is_named(line: Any, told: str) -> None:
    with pytest.raises(CliError) as caught:
        entries({"prompt": "good"}, "", line)
    assert "f.jsonl:3: " in caught.value.message and told in caught.value.message
    assert caught.value.status == 2 and "nothing was submitted" in caught.value.message


def test_all_wrong_lines_are_named_up_to_a_point() -> None:
    with pytest.raises(CliError) as caught:
        entries(*["x"] * 50)
    assert "f.jsonl:20: " in caught.value.message and "f.jsonl:21: " not in caught.value.message
    assert "and 30 more" in caught.value.message
    for nothing in ("", "\n \n"):
        with pytest.raises(CliError, match="no prompts"):
            read_entries("f", nothing, "g", {})
    with pytest.raises(CliError, match="line 1 has the same key"):
        entries({"prompt": "a", "key": "k"}, {"prompt": "b", "key": "k"})


def result(entry: Entry, **more: Any) -> dict[str, Any]:
    return {"line": entry.line, "key": entry.key, "state": "succeeded", **more}


def test_results_are_kept_and_stand_in_order_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    found = entries(*({"prompt": f"{n}"} for n in range(4)))
    with Results(path, io.StringIO()) as results:
        results.add(result(found[2]))
        results.add(result(found[0], text="h\ud800"))
    assert [json.loads(line)["line"] for line in path.read_text().splitlines()] == [3, 1]
    with path.open("ab") as file:
        file.write(b'{"key": "torn')  # the power went
    with Results(path, io.StringIO()) as results:
        assert set(results.kept) == {found[2].key, found[0].key}
        results.add(result(found[1]))
        results.add(result(found[3]))
        results.add({"key": "of a line that was edited", "state": "succeeded"})
        results.add({"key": "of a line that was mended", "state": "refused"})
        assert results.settle(found) == 1
    assert [json.loads(line).get("line") for line in path.read_text().splitlines()] == [1, 2, 3, 4, None]
    assert [file.name for file in tmp_path.iterdir()] == ["results.jsonl"]


@pytest.mark.parametrize("content", ["notes\n", "[]\n", '{"prompt": "a"}\n', "1\n"])
def test_a_file_of_something_else_is_left_alone(tmp_path: Path, content: str) -> None:
    path = tmp_path / "notes.txt"
    path.write_text(content)
    with pytest.raises(CliError, match="choose another file"), Results(path, io.StringIO()):
        pass
    assert path.read_text() == content


def test_two_batches_do_not_write_one_file(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    with Results(path, io.StringIO()), pytest.raises(CliError, match="another batch"), Results(path, io.StringIO()):
        pass
    with Results(path, io.StringIO()):
        pass
    with pytest.raises(CliError, match="No such file"), Results(tmp_path / "no" / "where", io.StringIO()):
        pass


def test_counts_in_words() -> None:
    view = BatchView(10)
    view.kept(2)
    for _ in range(3):
        view.accepted()
    view.finished(failed=False)
    assert view.rate is not None
    view.finished(failed=True)
    assert view.words().startswith("5 of 10 submitted, 4 done, 1 failed, ") and view.words().endswith(" left")


def test_results_of_earlier_runs_are_no_rate() -> None:
    view = BatchView(10)
    for _ in range(5):
        view.accepted()
        view.finished(failed=False, earlier=True)
    assert view.rate is None and view.left is None and view.words() == "5 of 10 submitted, 5 done"
