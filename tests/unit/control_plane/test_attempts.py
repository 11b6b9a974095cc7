"""Two servers for one request: what becomes of the slots."""

from __future__ import annotations

import asyncio
from typing import Any, cast

from control_plane.api.attempts import Attempts, Progress, _Life
from control_plane.domain.request import RouteRequest
from control_plane.fleet.grants import Grant
from control_plane.fleet.server import Outcome, OutcomeKind
from control_plane.scheduling.retry import RetryPolicy
from tests.unit.control_plane.test_scheduler import House


async def test_one_that_is_told_to_stop_before_its_first_step_gives_its_slot_back() -> None:
    house = House()
    for name in ("a", "b"):
        house.attach(name)
    request = RouteRequest("r")
    first, second = await house.acquire(request), await house.acquire(request)
    go = asyncio.Event()

    async def attempt(grant: Grant, progress: Progress) -> tuple[str, Outcome]:
        await go.wait()
        return grant.flight.server_id, Outcome(OutcomeKind.SUCCESS)

    owner = Attempts(house.scheduler, RetryPolicy(), house.clock, cast(Any, None))
    life: _Life[str] = _Life(owner, request, attempt, [], None, 0, ())
    sooner = life._started(first)
    await asyncio.sleep(0)
    later = life._started(second)
    life._won(life._going[0].progress)  # in the very moment in which the second is started
    go.set()
    assert await sooner == first.flight.server_id
    await asyncio.gather(later, return_exceptions=True)
    await asyncio.sleep(0)
    assert later.cancelled()
    assert not first.flight.server.flights and not second.flight.server.flights
