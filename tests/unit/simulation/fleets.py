"""Small traces, hosts and a dispatcher that does what it is told."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from control_plane.simulation.dispatcher import Action, GiveUp, HostInfo, Report, Send, Streams, Usage
from control_plane.simulation.engine import HostSpec
from control_plane.simulation.traces import Job, Trace, trace

PLAIN = HostSpec("h", "plain", prefill=1000.0, decode_single=10.0, decode_aggregate=15.0, slots=4, cache_tokens=1 << 20)
"""1,000 tokens/s of prefill, 10 tokens/s alone, 15 together."""


def jobs(*entries: tuple[float, int, int] | tuple[float, int, int, Sequence[int]]) -> Trace:
    """Of (arrival, prompt tokens, output tokens) and, as wanted, blocks. The first arrives at 0."""
    return trace(
        "test",
        [
            (Job(0, arrival, prompt, tuple(blocks[0]) if blocks else None), output)
            for arrival, prompt, output, *blocks in entries
        ],
    )


def give_up(job: Job, host: str, kind: str, tokens: int) -> Iterable[Action]:
    """Where there was no token yet: a stream that is cut is left to end silently."""
    return () if kind == "timeout" or tokens else (GiveUp(job, kind),)


class Scripted:
    """Sends each job where `where` says, at once; keeps what it is told. Gives up what has failed."""

    def __init__(self, hosts: Sequence[HostInfo], streams: Streams, where: Callable[[Job], str]) -> None:
        self.hosts, self.streams, self.where = hosts, streams, where
        self.told: list[tuple[Any, ...]] = []
        self.todo: list[Action] = []
        self.wake: float | None = None
        self.on_failed = give_up

    def arrive(self, job: Job, now: float) -> None:
        if host := self.where(job):
            self.todo.append(Send(job, host))

    def first_token(self, job: Job, host_id: str, now: float, cached_tokens: int) -> None:
        self.told.append(("first", job.id, host_id, now, cached_tokens))

    def finished(self, job: Job, host_id: str, now: float, usage: Usage) -> None:
        self.told.append(("finished", job.id, host_id, now, usage))

    def failed(self, job: Job, host_id: str, kind: str, now: float, tokens_so_far: int) -> None:
        self.told.append(("failed", job.id, host_id, kind, now, tokens_so_far))
        self.todo.extend(self.on_failed(job, host_id, kind, tokens_so_far))

    def report(self, host_id: str, reported: Report, now: float) -> None:
        self.told.append(("report", host_id, reported, now))

    def decide(self, now: float) -> Iterable[Action]:
        todo, self.todo = self.todo, []
        return todo

    def wake_at(self) -> float | None:
        return self.wake


def told(dispatcher: Scripted, what: str) -> list[tuple[Any, ...]]:
    return [entry[1:] for entry in dispatcher.told if entry[0] == what]
