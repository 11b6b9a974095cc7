"""Stop strings, tool calls and reasoning are found however the text is cut into pieces."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_servers.engines._mlx.markup import (
    CallArguments,
    CallBegins,
    Event,
    Marks,
    MarkupReader,
    Reasoning,
    StopMatcher,
    Text,
    possible_prefix,
)

HERMES = Marks(call_start="<tool_call>", call_end="</tool_call>", think_start="<think>", think_end="</think>")


def pieces(text: str, cuts: list[int]) -> list[str]:
    places = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    return [text[a:b] for a, b in itertools.pairwise(places)]


def stop_at(parts: list[str], stops: list[str]) -> tuple[str, bool]:
    matcher, said = StopMatcher(stops), ""
    for part in parts:
        passed, met = matcher.push(part)
        said += passed
        if met:
            return said, True
    return said + matcher.flush(), False


# ------------------------------------------------------------ stop strings ---


@pytest.mark.parametrize(
    ("text", "stops", "expected", "met"),
    [
        ("hello world", ["wor"], "hello ", True),
        ("hello", ["x"], "hello", False),
        ("aab", ["ab"], "a", True),
        ("abcab", ["abd"], "abcab", False),
        ("one END two", ["END", "one END"], "", True),
        ("abc", ["abc", "b"], "a", True),
        ("", ["a"], "", False),
        ("text", [], "text", False),
    ],
)
def test_stop_strings(text: str, stops: list[str], expected: str, met: bool) -> None:
    for parts in ([text], list(text)):
        assert stop_at(parts, stops) == (expected, met)


@given(
    st.text("ab<", max_size=20),
    st.lists(st.text("ab<", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(0, 30), max_size=6),
)
def test_stopping_does_not_depend_on_the_cuts(text: str, stops: list[str], cuts: list[int]) -> None:
    whole = stop_at(list(text), stops)
    assert stop_at(pieces(text, cuts), stops) == whole
    assert not any(stop in whole[0] for stop in stops)
    assert whole[1] == any(stop in text for stop in stops)


def test_only_what_may_become_a_stop_string_is_held_back() -> None:
    matcher = StopMatcher(["###"])
    assert matcher.push("ab##") == ("ab", False)
    assert matcher.push("x") == ("##x", False)
    assert matcher.push("##") == ("", False)
    assert matcher.flush() == "##"


def test_possible_prefix() -> None:
    assert possible_prefix("abc<to", ["<tool_call>"]) == 3
    assert possible_prefix("abc", ["<tool_call>"]) == 0
    assert possible_prefix("<tool_call>", ["<tool_call>"]) == 0


# -------------------------------------------------------------- tool calls ---


def read(parts: list[str], marks: Marks = HERMES, *, complete: bool = True, **begin: Any) -> tuple[list[Event], int]:
    """Events with neighbours of one kind joined, and the number of complete calls."""
    reader, events = MarkupReader(marks, **begin), list[Event]()
    for part in parts:
        events += reader.push(part)
    events += reader.flush(complete=complete)
    joined: list[Event] = []
    for event in events:
        last = joined[-1] if joined else None
        if isinstance(event, Text) and isinstance(last, Text):
            joined[-1] = Text(last.text + event.text)
        elif isinstance(event, Reasoning) and isinstance(last, Reasoning):
            joined[-1] = Reasoning(last.text + event.text)
        elif isinstance(event, CallArguments) and isinstance(last, CallArguments):
            joined[-1] = CallArguments(last.json_text + event.json_text)
        else:
            joined.append(event)
    return joined, reader.calls


CALL = '<tool_call>\n{"name": "go", "arguments": {"to": "a }\\" b", "by": [1, {"x": {}}]}}\n</tool_call>'
GO = [CallBegins("go"), CallArguments('{"to": "a }\\" b", "by": [1, {"x": {}}]}')]


@pytest.mark.parametrize(
    ("text", "events", "calls"),
    [
        ("plain <b>text</b>", [Text("plain <b>text</b>")], 0),
        (CALL, GO, 1),
        (f"I go. {CALL}\n", [Text("I go. "), *GO], 1),
        (f"{CALL}\n{CALL}", [*GO, *GO], 2),
        (f"{CALL}\nDone.", [*GO, Text("Done.")], 1),
        (
            '<tool_call>{"arguments": {"a": 1}, "name": "go"}</tool_call>',
            [CallBegins("go"), CallArguments('{"a": 1}')],
            1,
        ),
        ('<tool_call>{"name": "go"}</tool_call>', [CallBegins("go"), CallArguments("{}")], 1),
        ("<tool_call>nonsense</tool_call>", [Text("nonsense")], 0),
        ("<think>hm\n</think>\n\nYes.", [Reasoning("hm\n"), Text("Yes.")], 0),
        (f"<think>go?</think>{CALL}", [Reasoning("go?"), *GO], 1),
        ("a < b", [Text("a < b")], 0),
    ],
)
def test_markup(text: str, events: list[Event], calls: int) -> None:
    for parts in ([text], list(text), [text[i : i + 3] for i in range(0, len(text), 3)]):
        assert read(parts) == (events, calls)


@given(st.lists(st.integers(0, 300), max_size=8))
def test_calls_do_not_depend_on_the_cuts(cuts: list[int]) -> None:
    text = f"<think>so</think>First. {CALL}\n{CALL} End <tool"
    expected = [Reasoning("so"), Text("First. "), *GO, *GO, Text("End <tool")]
    assert read(pieces(text, cuts)) == (expected, 2)


def test_arguments_are_streamed_and_no_tag_leaks() -> None:
    reader = MarkupReader(HERMES)
    seen: list[list[Event]] = [reader.push(char) for char in CALL]
    arguments = [i for i, events in enumerate(seen) if any(isinstance(event, CallArguments) for event in events)]
    assert len(arguments) > 10
    assert not any(isinstance(event, Text) for events in seen for event in events)


def test_a_call_that_is_cut_off_is_neither_text_nor_complete() -> None:
    events, calls = read([CALL[:60]], complete=False)
    assert calls == 0
    assert events[0] == CallBegins("go")
    assert not any(isinstance(event, Text) for event in events)
    assert read(["<tool_call>{", '"na'], complete=False) == ([], 0)


def test_a_tool_that_was_not_offered_is_not_called() -> None:
    inner = CALL.removeprefix("<tool_call>").removesuffix("</tool_call>").strip()
    whole = '<tool_call>{"arguments": {}, "name": "go"}</tool_call>'
    for parts in ([CALL], list(CALL)):
        assert read(parts, offered={"stay"}) == ([Text(inner)], 0)
        assert read(parts, offered={"stay", "go"}) == (GO, 1)
    assert read([whole], offered={"stay"}) == ([Text('{"arguments": {}, "name": "go"}')], 0)
    assert read([CALL, whole.replace("go", "stay")], offered={"stay"})[1] == 1


def test_a_prompt_may_begin_a_call_or_the_reasoning() -> None:
    inner = '{"name": "go", "arguments": {}}'
    assert read(list(inner), in_call=True) == ([CallBegins("go"), CallArguments("{}")], 1)
    assert read(list("hm</think>Yes"), in_reasoning=True) == ([Reasoning("hm"), Text("Yes")], 0)


def test_other_call_formats_are_read_as_a_whole() -> None:
    def parse(text: str) -> list[dict[str, object]]:
        name, value = text.split("=")
        return [{"name": name, "arguments": {"value": value}}, {"name": name, "arguments": '{"raw": true}'}]

    marks = Marks(call_start="[[", call_end="]]", parse_call=parse)
    events, calls = read(list("so [[f=1]]"), marks)
    assert calls == 2
    assert events[:2] == [Text("so "), CallBegins("f")]
    assert [json.loads(e.json_text) for e in events if isinstance(e, CallArguments)] == [{"value": "1"}, {"raw": True}]
