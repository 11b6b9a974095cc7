"""Numbers and times of arguments -> messages of the contract. What does not fit raises InvalidArgument, which names the
argument; what is of another type TypeError."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from modelyard.client._errors import InvalidArgument

M = TypeVar("M", bound=Message)

MOST_TIMEOUT = 1e9
"""Seconds. gRPC counts nanoseconds since 1970 in 63 bits: of a much longer timeout it says that it has passed."""

_MOST_DURATION = 315_576_000_000.0
"""Seconds, as the contract's durations."""


def filled(kind: type[M], /, **fields: Any) -> M:
    """A message with these fields, whose names tell of which arguments they are made."""
    try:
        return kind(**fields)
    except ValueError:
        for name, value in fields.items():
            try:
                kind(**{name: value})
            except ValueError:
                raise InvalidArgument(name, f"{value!r} is out of range") from None
        raise


def timeout(given: float | None, name: str = "timeout") -> float | None:
    """Seconds that a call may take; None and infinity are no limit, what has passed already is left to the call."""
    if given is None or given == math.inf:
        return None
    if not given <= MOST_TIMEOUT:  # NaN is not either
        raise InvalidArgument(name, f"must be a number of seconds, at most {MOST_TIMEOUT:g}, not {given:g}")
    return given


def duration(name: str, seconds: float | None) -> Duration | None:
    """Seconds."""
    if seconds is None:
        return None
    _number(name, seconds)
    if not -_MOST_DURATION <= seconds <= _MOST_DURATION:
        raise InvalidArgument(name, f"{seconds:g} seconds is no duration")
    message = Duration()
    message.FromTimedelta(timedelta(seconds=seconds))
    return message


def timestamp(name: str, given: datetime | float | None) -> Timestamp | None:
    """A time with its zone, or seconds from now."""
    if given is None:
        return None
    if not isinstance(given, datetime):
        _number(name, given)
        try:
            given = datetime.now(UTC) + timedelta(seconds=given)
        except (OverflowError, ValueError):
            raise InvalidArgument(name, f"{given:g} seconds from now is no time") from None
    if given.tzinfo is None:
        raise InvalidArgument(name, "a time needs its zone, for example datetime.now(timezone.utc)")
    message = Timestamp()
    message.FromDatetime(utc(name, given))
    return message


def utc(name: str, given: datetime) -> datetime:
    """The time in UTC; one without a zone is of this machine's."""
    try:
        return given.astimezone(UTC)
    except (OverflowError, ValueError, OSError):
        raise InvalidArgument(name, f"{given.isoformat()} is not within the years 1 to 9999 of UTC") from None


def _number(name: str, given: Any) -> None:
    if isinstance(given, bool) or not isinstance(given, int | float):
        raise TypeError(f"{name} is a number of seconds, not {type(given).__name__}")
