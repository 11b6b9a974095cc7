"""`modelyard up` on a machine where an Ollama runs: found, filled, used, lost and found again."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from modelyard.client import AsyncClient, ServerStatus
from tests.harness.programs import program, simulated_server, until

MODELYARD = Path(sys.executable).parent / "modelyard"


class Fleet:
    """`modelyard up --json` and what it has said so far."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.events: list[dict[str, Any]] = []
        assert process.stdout
        self._lines = process.stdout

    async def heard(self, kind: str, limit: float = 60) -> dict[str, Any]:
        """The next event of this kind; those before it are kept."""
        async with asyncio.timeout(limit):
            while line := await self._lines.readline():
                self.events.append(json.loads(line))
                if self.events[-1]["event"] == kind:
                    return self.events[-1]
        raise AssertionError(f"`up` ended without {kind!r}: {self.events}")


@asynccontextmanager
async def up(*arguments: str, **environment: str) -> AsyncIterator[Fleet]:
    process = await asyncio.create_subprocess_exec(
        MODELYARD, "up", "--json", "--port", "0", "--metrics-port", "-1", "--gateway-port", "-1", *arguments,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
        env={**{k: v for k, v in os.environ.items() if not k.startswith("MODELYARD_")}, **environment},
    )  # fmt: skip
    try:
        yield Fleet(process)
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGINT)
        await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode == 0


async def test_an_ollama_is_found_filled_used_lost_and_found_again(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        first = AsyncExitStack()
        standin = await first.enter_async_context(program("tests.standins.ollama", "--pull-seconds", "0.4"))
        url = str(standin.facts["url"])
        port = url.rsplit(":", 1)[1]
        fleet = await stack.enter_async_context(
            up("--pull", "tiny", OLLAMA_HOST=url, HF_HUB_CACHE=str(tmp_path), VLLM_URL="http://127.0.0.1:9")
        )
        ready = await fleet.heard("up")
        assert any(f"at {url} with no models yet" in event.get("message", "") for event in fleet.events)
        steps = [event for event in fleet.events if event["event"] == "model"]
        assert any(step["state"] == "pulling" and 0 < step["completed_bytes"] < step["total_bytes"] for step in steps)
        assert steps[-1]["state"] == "warm"

        client = await stack.enter_async_context(AsyncClient(ready["address"]))

        async def ollama(**wanted: str) -> ServerStatus | None:
            (server,) = [server for server in await client.servers() if server.engine == "ollama"]
            return server if all(getattr(server, key) == value for key, value in wanted.items()) else None

        answer = await client.generate("Hello", model="tiny", max_tokens=8)
        assert answer.server_id == "ollama-1" and answer.text

        async def told() -> bool:  # reports come once a second
            status = await ollama()
            assert status and status.pool
            model = status.models[0]
            return status.pool.reused > 0 and model.state == "warm" and model.memory_bytes > 0

        await until(told)

        # The same model elsewhere, where nothing is read: there the traffic goes when Ollama dies.
        await stack.enter_async_context(simulated_server("spare", ready["address"], models=["tiny"], instant=True))
        await until(lambda: _live(client, "spare"))
        standin.kill()
        await first.aclose()
        await until(lambda: ollama(health="unhealthy"), timeout=5)
        answer = await client.generate("Hello", model="tiny", max_tokens=8)
        assert answer.server_id == "spare"

        await stack.enter_async_context(program("tests.standins.ollama", "--port", port, "--models", "tiny"))
        await until(lambda: ollama(health="ready"), timeout=10)
        answer = await client.generate("Hello", model="tiny", server_id="ollama-1", max_tokens=8)
        assert answer.server_id == "ollama-1"


async def _live(client: AsyncClient, server_id: str) -> bool:
    return any(server.server_id == server_id and server.lease_state == "live" for server in await client.servers())
