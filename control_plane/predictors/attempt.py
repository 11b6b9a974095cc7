"""What is known of an attempt before it starts, what is predicted of it, and what became of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass

import msgspec

from control_plane.domain.task import Priority, TaskType


@dataclass(frozen=True, slots=True)
class Question:
    """Everything that a prediction may depend on: known when a task gets its server."""

    task_type: TaskType
    model: str
    provider: str
    server_id: str
    prompt_tokens: int
    """As the store has it: estimated, and rounded up to a quarter of an octave (`tasks.lanes.rounded`)."""
    max_tokens: int | None = None
    """None: left open."""
    priority: Priority = Priority.NORMAL
    hour: int = 0
    """Of the day, UTC, 0 to 23."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """Of one attempt."""

    seconds_p50: float
    """Of the attempt, if it succeeds: the queue before it is not counted."""
    seconds_p90: float
    success: float
    """Probability, 0 to 1."""
    completion_tokens: float
    """Median."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """One that has ended."""

    question: Question
    at: float
    """When it began, seconds since 1970."""
    seconds: float
    """That it took."""
    ok: bool
    """Whether it gave a result."""
    completion_tokens: int | None = None
    """Of its answer. None: there is none, or nobody knows."""


def hour_of(at: float) -> int:
    """The hour of the day (UTC) of a time in seconds since 1970."""
    return int(at // 3600) % 24


# ------------------------------------------------------------------- JSONL ---


class _Line(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """One attempt in a file. Names as the API has them; no text of anybody."""

    at: float
    task_type: str
    model: str
    provider: str
    server_id: str
    prompt_tokens: int
    seconds: float
    ok: bool
    priority: str = "normal"
    max_tokens: int | None = None
    completion_tokens: int | None = None


def to_lines(attempts: Iterable[Attempt]) -> Iterator[bytes]:
    """One line of JSON for each."""
    for attempt in attempts:
        asked = asdict(attempt.question)
        del asked["hour"]
        asked["task_type"], asked["priority"] = (asked[name].name.lower() for name in ("task_type", "priority"))
        line = _Line(
            **asked, at=attempt.at, seconds=attempt.seconds, ok=attempt.ok, completion_tokens=attempt.completion_tokens
        )
        yield msgspec.json.encode(line) + b"\n"


def from_lines(lines: Iterable[bytes]) -> Iterator[Attempt]:
    """What `to_lines` has made. Raises ValueError with the number of the line."""
    decoder = msgspec.json.Decoder(_Line)
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        try:
            line = decoder.decode(text)
            question = Question(
                TaskType[line.task_type.upper()], line.model, line.provider, line.server_id, line.prompt_tokens,
                line.max_tokens, Priority[line.priority.upper()], hour_of(line.at),
            )  # fmt: skip
        except (msgspec.DecodeError, KeyError, ValueError, OverflowError) as error:
            raise ValueError(f"line {number}: {error}") from None
        yield Attempt(question, line.at, line.seconds, line.ok, line.completion_tokens)
