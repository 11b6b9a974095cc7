"""Reading an answer's text as it grows: stop strings, tool calls, visible reasoning. Pure.

All three look for marks that may arrive in pieces, so text that could still become a mark is held back until it
is decided. Pieces are small, so plain string search beats an automaton here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any


def possible_prefix(text: str, marks: Sequence[str]) -> int:
    """Length of the longest end of `text` that is a proper beginning of one of `marks`."""
    longest = max((len(mark) for mark in marks), default=0) - 1
    for size in range(min(longest, len(text)), 0, -1):
        tail = text[-size:]
        if any(mark.startswith(tail) for mark in marks if len(mark) > size):
            return size
    return 0


class StopMatcher:
    """Passes text on up to the first stop string, however the text is cut into pieces.

    "First" is the one whose last character comes first, ties going to the longest: the only rule that does not
    depend on where tokens begin.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Returns (text to pass on, whether a stop string was met)."""
        if not self._stops:
            return text, False
        self._held += text
        found = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            _, start = min(found)
            passed, self._held = self._held[:start], ""
            return passed, True
        keep = possible_prefix(self._held, self._stops)
        cut = len(self._held) - keep
        passed, self._held = self._held[:cut], self._held[cut:]
        return passed, False

    def flush(self) -> str:
        """What was held back, when no more text can come."""
        held, self._held = self._held, ""
        return held


# ------------------------------------------------------------------ events ---


@dataclass(frozen=True, slots=True)
class Text:
    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    text: str


@dataclass(frozen=True, slots=True)
class CallBegins:
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    json_text: str


Event = Text | Reasoning | CallBegins | CallArguments


class _State(Enum):
    TEXT = auto()
    REASONING = auto()
    CALL = auto()


_CALL_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
"""Start of a Hermes call in the usual order of keys; then the arguments can be streamed."""


class _JsonObjectEnd:
    """Finds the end of a JSON object whose text arrives in pieces."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def feed(self, text: str) -> int | None:
        """Index just behind the closing brace, or None if it has not come."""
        for index, char in enumerate(text):
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif char == "\\":
                    self._escaped = True
                elif char == '"':
                    self._in_string = False
            elif char == '"':
                self._in_string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth == 0:
                    return index + 1
        return None


@dataclass(frozen=True, slots=True)
class Marks:
    """The tags of one model. An empty start means that the model does not have that kind."""

    call_start: str = ""
    call_end: str = ""
    call_glue: str = ""
    """Stands between the start tag and the call."""
    parse_call: Callable[[str], Any] | None = None
    """For formats other than Hermes JSON: inner text -> {"name", "arguments"} or a list of them."""
    think_start: str = ""
    think_end: str = ""


def _string(literal: str) -> str | None:
    try:
        return str(json.loads(literal, strict=False))
    except ValueError:
        return None


class MarkupReader:
    """Splits the raw text of an answer into visible text, reasoning and tool calls."""

    def __init__(
        self,
        marks: Marks,
        *,
        offered: Collection[str] | None = None,
        in_reasoning: bool = False,
        in_call: bool = False,
    ) -> None:
        """`offered`: tools that may be called, None: any. `in_reasoning`, `in_call`: the prompt already ends with
        that start tag."""
        self._marks = marks
        self._offered = offered
        self._state = _State.REASONING if in_reasoning else _State.CALL if in_call else _State.TEXT
        self._held = ""
        self._arguments: _JsonObjectEnd | None = None
        self._streamed = False
        self._strip = in_call
        self.calls = 0
        """Calls that are complete."""

    def push(self, text: str) -> list[Event]:
        self._held += text
        events: list[Event] = []
        while self._advance(events):
            pass
        return events

    def flush(self, *, complete: bool) -> list[Event]:
        """The rest, when no more text can come. `complete`: the model ended by itself, was not cut off.

        A call that was cut off is never passed on as if it were whole, nor as text.
        """
        events: list[Event] = []
        held, self._held = self._held, ""
        if self._state is _State.CALL:
            if complete and not self._streamed:
                self._whole_call(held, events)
        elif self._state is _State.REASONING:
            if held:
                events.append(Reasoning(held))
        else:
            self._text(held, events)
        return events

    def _advance(self, events: list[Event]) -> bool:
        """One step; False when more text is needed."""
        if self._state is _State.CALL:
            return self._in_call(events)
        if self._state is _State.REASONING:
            passed, found = self._until(self._marks.think_end)
            if passed:
                events.append(Reasoning(passed))
            if found:
                # The blank lines between reasoning and answer belong to neither.
                self._state, self._strip = _State.TEXT, True
            return found
        starts = {
            tag: state
            for tag, state in ((self._marks.call_start, _State.CALL), (self._marks.think_start, _State.REASONING))
            if tag
        }
        places = [(at, tag) for tag in starts if (at := self._held.find(tag)) >= 0]
        if not places:
            keep = possible_prefix(self._held, tuple(starts))
            cut = len(self._held) - keep
            passed, self._held = self._held[:cut], self._held[cut:]
            self._text(passed, events)
            return False
        at, tag = min(places)
        self._text(self._held[:at], events)
        self._held = self._held[at + len(tag) :]
        self._state = starts[tag]
        return True

    def _until(self, mark: str) -> tuple[str, bool]:
        at = self._held.find(mark)
        found = at >= 0
        cut = at if found else len(self._held) - possible_prefix(self._held, (mark,))
        passed = self._held[:cut]
        self._held = self._held[cut + len(mark) if found else cut :]
        return passed, found

    def _text(self, text: str, events: list[Event]) -> None:
        if self._strip:
            text = text.lstrip()
        if text:
            self._strip = False
            events.append(Text(text))

    def _in_call(self, events: list[Event]) -> bool:
        if self._arguments is None and not self._streamed and self._marks.parse_call is None:
            head = _CALL_HEAD.match(self._held)
            name = _string(head[1]) if head else None
            if head and name is not None and self._may_call(name):
                events.append(CallBegins(name))
                self._held = self._held[head.end() :]
                self._arguments, self._streamed = _JsonObjectEnd(), True
        if self._arguments is not None:
            end = self._arguments.feed(self._held)
            piece = self._held if end is None else self._held[:end]
            self._held = self._held[len(piece) :]
            if piece:
                events.append(CallArguments(piece))
            if end is None:
                return False
            self._arguments = None
            self.calls += 1
        inner, found = self._held, False
        at = self._held.find(self._marks.call_end)
        if at >= 0:
            inner, found = self._held[:at], True
            self._held = self._held[at + len(self._marks.call_end) :]
        if not found:
            return False
        if not self._streamed:
            self._whole_call(inner, events)
        self._state, self._streamed, self._strip = _State.TEXT, False, True
        return True

    def _may_call(self, name: str) -> bool:
        return self._offered is None or name in self._offered

    def _whole_call(self, inner: str, events: list[Event]) -> None:
        """A call that could not be streamed.

        What cannot be read as one, and a call of a tool that was not offered, is passed on as text, without its tags.
        """
        try:
            parsed = (self._marks.parse_call or json.loads)(inner.strip())
            found = [
                (str(call["name"]), call.get("arguments", call.get("parameters", {})))
                for call in (parsed if isinstance(parsed, list) else [parsed])
            ]
        except Exception:  # a parser of another package, fed by a model: anything may be wrong
            found = []
        if not found or not all(self._may_call(name) for name, _ in found):
            self._text(inner.strip(), events)
            return
        for name, arguments in found:
            events.append(CallBegins(name))
            events.append(CallArguments(arguments if isinstance(arguments, str) else json.dumps(arguments)))
            self.calls += 1
