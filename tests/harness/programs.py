"""The real programs as child processes on free ports."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

START_TIMEOUT = 60.0


class Program:
    """A running program that printed its ready line."""

    def __init__(self, process: asyncio.subprocess.Process, facts: dict[str, Any]) -> None:
        self.process = process
        self.facts = facts
        self.log = bytearray()

    @property
    def address(self) -> str:
        return str(self.facts["address"])

    @property
    def pid(self) -> int:
        return self.process.pid

    def kill(self) -> None:
        self.process.kill()

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    async def stop(self) -> int:
        """SIGTERM, then the exit status."""
        if self.process.returncode is None:
            self.process.terminate()
        return await asyncio.wait_for(self.process.wait(), 30)


@asynccontextmanager
async def program(module: str, *argv: str) -> AsyncIterator[Program]:
    """`python -m module argv`, ready to serve; killed on the way out if still there."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", module, *argv,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        env={key: value for key, value in os.environ.items() if not key.startswith("MODELYARD_")},
    )  # fmt: skip
    assert process.stdout and process.stderr
    running = Program(process, {})

    async def collect() -> None:
        assert process.stderr
        while line := await process.stderr.readline():
            running.log += line

    collector = asyncio.create_task(collect())
    try:
        line = await asyncio.wait_for(process.stdout.readline(), START_TIMEOUT)
        if not line:
            await process.wait()
            await collector
            raise RuntimeError(f"{module} ended with {process.returncode}:\n{running.log.decode()}")
        running.facts = json.loads(line)
        yield running
    finally:
        if process.returncode is None:
            try:
                process.send_signal(signal.SIGCONT)
                process.kill()
            except ProcessLookupError:
                pass
        await process.wait()
        await collector


@asynccontextmanager
async def control_plane(*argv: str) -> AsyncIterator[Program]:
    """Without tasks, if `argv` says nothing else: a test must not write into its user's home."""
    async with program(
        "control_plane", "--port", "0", "--metrics-port", "0", "--gateway.port", "0", "--tasks.store", "", *argv
    ) as running:
        yield running


@asynccontextmanager
async def simulated_server(
    server_id: str, orchestrators: list[str] | str, *argv: str, **settings: Any
) -> AsyncIterator[Program]:
    """A model server with the simulated engine; `settings` are the engine's."""
    addresses = [orchestrators] if isinstance(orchestrators, str) else orchestrators
    async with program(
        "model_servers", "--engine", "simulated", "--server-id", server_id,
        "--orchestrators", json.dumps(addresses), "--engine-settings", json.dumps(settings), *argv,
    ) as running:  # fmt: skip
        yield running


async def until(condition: Callable[[], Awaitable[Any]], timeout: float = 30.0, every: float = 0.02) -> Any:
    """The first true value that `condition` returns. Raises TimeoutError."""
    async with asyncio.timeout(timeout):
        while True:
            value = await condition()
            if value:
                return value
            await asyncio.sleep(every)
