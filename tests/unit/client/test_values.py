"""Arguments that no message can hold are told by name, before anything is sent."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest

from modelyard.client import AsyncClient, Client, InvalidRequest, NewTask, RequestQueue
from modelyard.client import _values as values

BEYOND = datetime(9999, 12, 31, 23, 59, 59, tzinfo=timezone(timedelta(hours=-23)))
NOWHERE = "127.0.0.1:1"
HUGE = 99999999999999999999


def test_what_fits() -> None:
    assert values.timeout(None) is None and values.timeout(math.inf) is None and values.timeout(-1.0) == -1.0
    assert values.timeout(values.MOST_TIMEOUT) == values.MOST_TIMEOUT
    found = values.duration("x", 1.5)
    assert found is not None and found.ToNanoseconds() == 1_500_000_000
    assert values.duration("x", 315_576_000_000) is not None
    last = values.timestamp("x", datetime(9999, 12, 31, tzinfo=UTC))
    assert last is not None and last.ToDatetime(UTC).year == 9999


@pytest.mark.parametrize(
    ("argument", "make"),
    [
        ("max_tokens", lambda: NewTask("x", max_tokens=HUGE)),
        ("top_k", lambda: NewTask("x", top_k=99999999999)),
        ("seed", lambda: NewTask("x", seed=-1)),
        ("min_context_length", lambda: NewTask("x", min_context_length=HUGE)),
        ("max_attempts", lambda: NewTask("x", max_attempts=HUGE)),
        ("attempt_timeout", lambda: NewTask("x", attempt_timeout=math.nan)),
        ("attempt_timeout", lambda: NewTask("x", attempt_timeout=1e30)),
        ("deadline", lambda: NewTask("x", deadline=math.nan)),
        ("deadline", lambda: NewTask("x", deadline=math.inf)),
        ("not_before", lambda: NewTask("x", not_before=BEYOND)),
        ("not_before", lambda: NewTask("x", not_before=datetime(2100, 1, 1))),  # noqa: DTZ001
        ("max_concurrency", lambda: Client(NOWHERE).agents.register("a", max_concurrency=-1)),
        ("ttl", lambda: Client(NOWHERE).agents.register("a", ttl=math.inf)),
        ("timeout", lambda: Client(NOWHERE, timeout=1e308)),
        ("timeout", lambda: Client(NOWHERE, timeout=math.nan)),
        ("timeout", lambda: RequestQueue(AsyncClient(NOWHERE), timeout=1e308)),
    ],
)
def test_what_does_not(argument: str, make: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=f"^{argument}: ") as caught:
        make()
    assert isinstance(caught.value, InvalidRequest)
    assert [one.field for one in caught.value.violations] == [argument]
    assert caught.value.reason == "INVALID_REQUEST"


@pytest.mark.parametrize(
    ("argument", "call"),
    [
        ("timeout", lambda client: client.generate("x", timeout=1e308)),
        ("timeout", lambda client: client.generate("x", timeout=math.nan, direct="always")),
        ("timeout", lambda client: client.models(timeout=1e308)),
        ("timeout", lambda client: client.health(timeout=1e308)),
        ("timeout", lambda client: anext(client.load_model("m", timeout=math.nan))),
        ("timeout", lambda client: client.tasks.get("t", timeout=1e308)),
        ("timeout", lambda client: client.tasks.wait("t", timeout=math.nan)),
        ("created_after", lambda client: anext(client.tasks.list(created_after=math.nan))),
        ("page_size", lambda client: anext(client.tasks.list(page_size=HUGE))),
        ("after_event_id", lambda client: anext(client.tasks.watch("t", after=-1))),
        ("since", lambda client: client.usage(since=BEYOND)),
        ("until", lambda client: client.usage(until=BEYOND)),
        ("limit", lambda client: client.agents.interactions(limit=-1)),
        ("limit", lambda client: client.agents.match("x", limit=HUGE)),
        ("within", lambda client: client.agents.route("x", within=1e300)),
        ("duration", lambda client: client.agents.report("nope", success=True, duration=math.inf)),
        ("duration", lambda client: client.agents.report("nope", success=True, duration=1e300)),
    ],
)
async def test_what_no_call_takes(argument: str, call: Callable[[AsyncClient], Awaitable[Any]]) -> None:
    async with AsyncClient(NOWHERE) as client:
        with pytest.raises(InvalidRequest, match=f"^{argument}: "):
            await call(client)
