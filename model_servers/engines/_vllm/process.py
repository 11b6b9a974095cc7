"""A server program that the engine owns: started, its output read, ended with all its children."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from asyncio.subprocess import DEVNULL, PIPE, STDOUT
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from model_servers.engine import EngineFailed

_LONGEST_LINE = 1 << 20


def free_port() -> int:
    """A port of the loopback interface that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Process:
    """One run of a command, in a process group of its own."""

    def __init__(self, process: asyncio.subprocess.Process, on_line: Callable[[str], None]) -> None:
        self._process = process
        self._reading = asyncio.create_task(self._read(on_line), name=f"output-of-{process.pid}")

    @classmethod
    async def start(
        cls, command: Sequence[str], environment: Mapping[str, str], on_line: Callable[[str], None]
    ) -> Process:
        """`on_line` gets every line of its output. Raises EngineFailed."""
        tied = [sys.executable, "-I", "-S", str(Path(__file__).with_name("tied.py")), str(os.getpid())]
        try:
            process = await asyncio.create_subprocess_exec(
                *tied,
                *command,
                stdin=DEVNULL,
                stdout=PIPE,
                stderr=STDOUT,
                env={**os.environ, **environment},
                start_new_session=True,
                limit=_LONGEST_LINE,
            )
        except (OSError, ValueError) as error:
            raise EngineFailed(f"{command[0]} cannot be started: {error}") from error
        return cls(process, on_line)

    @property
    def running(self) -> bool:
        return self._process.returncode is None

    async def wait(self) -> int:
        """Until it ends; its exit status, negative for the signal that ended it."""
        return await self._process.wait()

    async def stop(self, grace: float) -> None:
        """Ends the whole group, by force after `grace` seconds. Idempotent."""
        if self.running:
            self._signal(signal.SIGTERM)
            try:
                async with asyncio.timeout(grace):
                    await self._process.wait()
            except TimeoutError:
                pass
        # Also when the leader has gone: its children may not have.
        self._signal(signal.SIGKILL)
        await self._process.wait()
        await asyncio.wait({self._reading}, timeout=1.0)
        self._reading.cancel()

    def _signal(self, number: signal.Signals) -> None:
        try:
            os.killpg(self._process.pid, number)
        except (ProcessLookupError, PermissionError):
            pass  # nobody is left

    async def _read(self, on_line: Callable[[str], None]) -> None:
        output = self._process.stdout
        while output is not None:
            try:
                line = await output.readline()
            except ValueError:
                continue  # longer than any line of a log; what is left of it is skipped
            if not line:
                return
            if text := line.decode("utf-8", "replace").strip():
                on_line(text)
