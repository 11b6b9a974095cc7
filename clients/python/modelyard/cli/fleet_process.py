"""The programs of a fleet as child processes: start, watch, restart, drain; none is left behind.

Every child holds a pipe from us as standard input and stops when it closes (`--watch-parent`), so
that the fleet ends with us even when we are killed. Children live in process groups of their own:
Ctrl-C in a terminal reaches us alone, and we drain in order, the control plane first.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from modelyard.cli.errors import CliError
from modelyard.cli.programs import command

CONTROL_PLANE = "control-plane"

_LAST_LINES = 12
_LINE_BYTES = 1 << 16
_SETTLED = 60.0
"""Seconds after which a child that ends is not counted as failing at its start."""
_MOST_FAILURES = 6
_MOST_FALSE_STARTS = 2
"""For a server that never came up: its settings or its host are at fault, not chance."""
_USAGE = 2
"""Exit status of a program whose settings are wrong: another start would end the same."""


@dataclass(frozen=True, slots=True)
class Program:
    """What to start."""

    name: str
    """For people; of a model server: its id."""
    module: str
    arguments: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to a child."""

    kind: Literal["starting", "ready", "log", "exited", "given_up", "stopping"]
    name: str
    text: str = ""
    """The line of a log."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Of starting: the pid. Of ready: what the ready line says."""
    status: int = 0
    """Exit status; negative: the number of the signal."""
    restart_in: float | None = None
    """Seconds."""


Listener = Callable[[Event], None]


def _tolerant(listener: Listener) -> Listener:
    """Whoever watched may have left (a closed pipe, a terminal that hung up): the fleet runs on."""

    def tell(event: Event) -> None:
        try:
            listener(event)
        except OSError:
            pass

    return tell


class Child:
    """One running program."""

    def __init__(
        self, program: Program, listener: Listener, environment: Mapping[str, str], *, hold_log: bool = False
    ) -> None:
        """`hold_log`: show the log when it is ready, because its obituary quotes the end of it."""
        self.program = program
        self.last_lines: deque[str] = deque(maxlen=_LAST_LINES)
        self.facts: Mapping[str, Any] | None = None
        self._listener = listener
        self._environment = environment
        self._held: list[str] | None = [] if hold_log else None
        self._process: asyncio.subprocess.Process | None = None
        self._readers: list[asyncio.Task[None]] = []
        self._ready: asyncio.Future[Mapping[str, Any]] = asyncio.get_running_loop().create_future()

    async def start(self) -> None:
        line = command(self.program.module, self.program.arguments)
        pipe = asyncio.subprocess.PIPE
        self._process = await asyncio.create_subprocess_exec(
            *line, stdin=pipe, stdout=pipe, stderr=pipe, process_group=0, env=dict(self._environment)
        )
        self._listener(Event("starting", self.program.name, facts={"pid": self._process.pid}))
        self._readers = [
            asyncio.create_task(self._read_facts(_asked_for(self._process.stdout)), name=f"{self.program.name}-facts"),
            asyncio.create_task(self._read_log(_asked_for(self._process.stderr)), name=f"{self.program.name}-log"),
        ]

    async def until_ready(self) -> Mapping[str, Any]:
        """The facts of the ready line. Raises CliError when the program ends without one."""
        ended = asyncio.create_task(self.wait())
        quoted = 0
        try:
            either: set[asyncio.Future[Any]] = {self._ready, ended}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if self._ready.done():
                return self._ready.result()
            status = ended.result()
            quoted = len(self.last_lines)
        finally:
            ended.cancel()
            self._show_held(but=quoted)
        raise CliError(self.obituary(status), status=_USAGE if status == _USAGE else 1, reason="START_FAILED")

    @property
    def status(self) -> int | None:
        """Exit status; None while it runs."""
        return self._process.returncode if self._process else None

    async def wait(self) -> int:
        """The exit status, after the last line was read."""
        if self._process is None:
            return 0
        status = await self._process.wait()
        # A grandchild may hold the pipes open: do not wait for their end for long.
        await asyncio.wait(self._readers, timeout=1.0)
        return status

    def obituary(self, status: int) -> str:
        """How the program ended, with its last words."""
        how = f"ended with status {status}" if status >= 0 else f"was ended by {_signal_name(-status)}"
        lines = [line for line in self.last_lines if line.strip()]
        said = f": {lines[-1]}" if len(lines) == 1 else "".join(f"\n    {line}" for line in lines)
        return f"{self.program.name} {how}{said}"

    def interrupt(self) -> None:
        """Ask it to drain and end."""
        self._signal(signal.SIGTERM, group=False)

    def kill(self) -> None:
        """End it and whatever it started, at once."""
        self._signal(signal.SIGKILL, group=True)

    def _signal(self, number: signal.Signals, *, group: bool) -> None:
        process = self._process
        if process is None or process.returncode is not None:
            return
        try:
            if group:
                os.killpg(process.pid, number)
            else:
                process.send_signal(number)
        except ProcessLookupError:
            pass  # it was quicker

    async def _read_facts(self, stream: asyncio.StreamReader) -> None:
        async for line in _lines(stream):
            facts = _parse(line)
            if facts is None:
                self._listener(Event("log", self.program.name, text=line))
            elif facts.get("event") == "ready" and not self._ready.done():
                self.facts = facts
                self._show_held()
                self._ready.set_result(facts)
                self._listener(Event("ready", self.program.name, facts=facts))

    async def _read_log(self, stream: asyncio.StreamReader) -> None:
        async for line in _lines(stream):
            self.last_lines.append(line)
            if self._held is None:
                self._listener(Event("log", self.program.name, text=line))
            else:
                self._held.append(line)

    def _show_held(self, but: int = 0) -> None:
        """What was held back of the log, without so many lines at the end; the rest is shown as it comes."""
        held, self._held = self._held or [], None
        for line in held[: len(held) - but]:
            self._listener(Event("log", self.program.name, text=line))


def _asked_for(stream: asyncio.StreamReader | None) -> asyncio.StreamReader:
    if stream is None:
        raise RuntimeError("the child has no pipe")
    return stream


def _parse(line: str) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


async def _lines(stream: asyncio.StreamReader) -> AsyncIterator[str]:
    """Lines of any length; the overlong ones in pieces."""
    rest = b""
    while chunk := await stream.read(_LINE_BYTES):
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield line.decode(errors="replace").rstrip("\r")
        if len(rest) > _LINE_BYTES:
            yield rest.decode(errors="replace")
            rest = b""
    if rest:
        yield rest.decode(errors="replace")


def _pause(failures: int) -> float:
    """Seconds until a child that has failed so often is started again."""
    return min(30.0, 0.5 * 2.0 ** (failures - 1))


def _ports(facts: Mapping[str, Any]) -> list[str]:
    """Flags for a control plane that takes the place of one with these facts: where others know it to be."""
    flags = {"address": "--port", "gateway": "--gateway.port", "metrics": "--metrics-port"}
    ports: list[str] = []
    for name, flag in flags.items():
        if found := re.search(r":(\d+)(/|$)", str(facts.get(name, "")).removeprefix("http://")):
            ports += [flag, found[1]]
    return ports


class FleetProcess:
    """A control plane and its model servers. Leaving the context ends whatever still runs."""

    def __init__(self, listener: Listener, environment: Mapping[str, str] | None = None) -> None:
        self._listener = _tolerant(listener)
        self._environment = dict(os.environ if environment is None else environment)
        self._control_plane: Child | None = None
        self._arguments: tuple[str, ...] = ()
        self._servers: dict[str, Child] = {}
        self._supervisors: dict[str, asyncio.Task[Child]] = {}
        self._stopping = False

    async def __aenter__(self) -> FleetProcess:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.kill()
        for task in self._supervisors.values():
            task.cancel()
        await asyncio.gather(*self._supervisors.values(), return_exceptions=True)
        children = self._children()
        for child in children:
            child.kill()  # one may have been started while its supervisor was cancelled
        await asyncio.gather(*(child.wait() for child in children))

    def _children(self) -> list[Child]:
        return [*([self._control_plane] if self._control_plane else []), *self._servers.values()]

    async def start_control_plane(self, arguments: Sequence[str]) -> Mapping[str, Any]:
        """Start it and return the facts of its ready line. Raises CliError if it does not get there."""
        self._arguments = ("--watch-parent", "true", *arguments)
        child = self._control_plane = self._new_control_plane()
        await child.start()
        return await child.until_ready()

    def _new_control_plane(self, ports: Sequence[str] = ()) -> Child:
        program = Program(CONTROL_PLANE, "control_plane", (*self._arguments, *ports))
        return Child(program, self._listener, self._environment, hold_log=True)

    async def control_plane_end(self) -> str:
        """Keep the control plane running, at the same ports, and wait until it has ended for good; how it did."""
        child, failures = self._control_plane, 0
        if child is None:
            return ""
        ports = _ports(child.facts or {})
        loop = asyncio.get_running_loop()
        while True:
            begun = loop.time()
            status = await child.wait()
            failures = 1 if loop.time() - begun > _SETTLED else failures + 1
            if self._stopping or status in (0, _USAGE) or not ports:
                return child.obituary(status)
            if failures >= _MOST_FAILURES:
                return f"{child.obituary(status)}\nIt was started {failures} times and does not stay."
            pause = _pause(failures)
            self._listener(Event("exited", CONTROL_PLANE, text=child.obituary(status), status=status, restart_in=pause))
            await asyncio.sleep(pause)
            child = self._control_plane = self._new_control_plane(ports)
            await child.start()
            with contextlib.suppress(CliError):  # its end is told by the next turn
                await child.until_ready()

    def start_server(self, program: Program) -> asyncio.Task[Child]:
        """Start a model server and keep it running.

        The task ends when the server is given up; its result is the last process.
        """
        task = asyncio.create_task(self._supervise(program), name=program.name)
        self._supervisors[program.name] = task
        return task

    async def _supervise(self, program: Program) -> Child:
        loop = asyncio.get_running_loop()
        program = Program(program.name, program.module, ("--watch-parent", "true", *program.arguments))
        failures, came_up = 0, False
        while True:
            child = Child(program, self._listener, self._environment)
            begun = loop.time()
            self._servers[program.name] = child
            await child.start()
            status = await child.wait()
            if self._stopping:
                return child
            failures = 1 if loop.time() - begun > _SETTLED else failures + 1
            came_up = came_up or child.facts is not None
            hopeless = status == _USAGE and child.facts is None
            if hopeless or failures >= (_MOST_FAILURES if came_up else _MOST_FALSE_STARTS):
                self._listener(Event("given_up", program.name, text=child.obituary(status), status=status))
                return child
            pause = _pause(failures)
            self._listener(Event("exited", program.name, text=child.obituary(status), status=status, restart_in=pause))
            await asyncio.sleep(pause)

    async def drain(self) -> None:
        """Control plane first: it refuses new requests and finishes its own on servers that still serve."""
        self._stopping = True
        if self._control_plane:
            self._listener(Event("stopping", CONTROL_PLANE))
            self._control_plane.interrupt()
            await self._control_plane.wait()
        for name, child in self._servers.items():
            self._listener(Event("stopping", name))
            child.interrupt()
        await asyncio.gather(*(child.wait() for child in self._servers.values()))

    def kill(self) -> None:
        """End everything at once."""
        self._stopping = True
        for child in self._children():
            child.kill()
