"""Waiting until model servers have attached to their control plane."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import TYPE_CHECKING

from modelyard.cli.errors import FAILED, USAGE, CliError
from modelyard.cli.fleet_process import Child

if TYPE_CHECKING:
    from modelyard.client import ServerStatus


async def until_attached(address: str, supervisors: Mapping[str, asyncio.Task[Child]]) -> tuple[ServerStatus, ...]:
    """Wait until every server is live and ready, or given up; those that are.

    Raises CliError when servers were asked for and all were given up.
    """
    from modelyard.client import AsyncClient

    live: dict[str, ServerStatus] = {}
    changed = asyncio.Event()

    async def watch() -> None:
        async with AsyncClient(address) as client:
            async for change in client.watch_fleet():
                for server in change.servers:
                    if server.lease_state == "live" and server.health == "ready":
                        live[server.server_id] = server
                    else:
                        live.pop(server.server_id, None)
                changed.set()

    watcher = asyncio.create_task(watch(), name="watch-fleet")
    watcher.add_done_callback(lambda _: changed.set())
    for task in supervisors.values():
        task.add_done_callback(lambda _: changed.set())
    try:
        while True:
            waiting = {name for name, task in supervisors.items() if not task.done()} - set(live)
            if not waiting:
                break
            if watcher.done():
                raise CliError(f"the control plane is gone: {watcher.exception()}", FAILED, "START_FAILED")
            await changed.wait()
            changed.clear()
    finally:
        watcher.cancel()
        await asyncio.gather(watcher, return_exceptions=True)
    if supervisors and not live:
        first = next(iter(supervisors.values())).result()
        status = first.status or 0
        raise CliError(first.obituary(status), USAGE if status == USAGE else FAILED, "START_FAILED")
    return tuple(live[name] for name in supervisors if name in live)
