"""What a policy is to the simulator: told of events, asked for actions; ours, the baselines and the oracle alike.

Times are seconds of the simulated clock. A dispatcher sees what a control plane sees: requests, what comes back from
hosts, and their reports; never how fast a host is, what is in its cache, or how long an answer will get.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from control_plane.simulation.traces import Job


class Send(NamedTuple):
    """Send the request to a host. A request may be on several hosts until its first token; the first to answer gets it,
    and the others are to be cancelled."""

    job: Job
    host: str
    held: bool = False
    """The client gets nothing of the answer until it is whole, so that it can be asked for elsewhere until then."""


class Cancel(NamedTuple):
    """Take the request away from a host. Nothing more is heard of it from there."""

    job: Job
    host: str


class GiveUp(NamedTuple):
    """Tell the client that its request has failed. Whatever of it is still on a host is cancelled."""

    job: Job
    reason: str


Action = Send | Cancel | GiveUp


class Usage(NamedTuple):
    """What a host says at the end of an answer."""

    prompt_tokens: int
    cached_tokens: int
    output_tokens: int


class Report(NamedTuple):
    """What a host says of itself, once a second and whenever its health changes."""

    slots: int
    running: int
    waiting: int
    kv: float
    """Share of the KV memory that running requests hold, 0 to 1."""
    healthy: bool


@dataclass(frozen=True, slots=True)
class HostInfo:
    """What a host says of itself when it registers."""

    id: str
    hardware: str
    """Class of hardware, as `gpu`; hosts of one class are kin."""
    slots: int
    cache_tokens: int
    """Size of its prefix cache; 0 for none."""
    models: tuple[str, ...] = ()
    """Models that it serves; empty for all."""


class Streams(Protocol):
    """What has come back so far, which a relay sees."""

    def tokens(self, job: Job, host: str, now: float) -> int:
        """Tokens of this answer that have come from this host. 0 where it has nothing of it."""
        ...

    def deadline(self, job: Job) -> float:
        """When its client leaves, which it says with its request."""
        ...


class Dispatcher(Protocol):
    """A policy. Events come with rising `now`; after each of them `decide` is called once."""

    def arrive(self, job: Job, now: float) -> None: ...

    def first_token(self, job: Job, host_id: str, now: float, cached_tokens: int) -> None:
        """The first token of the attempt that the client gets, told once per request; of one that is held back, in any
        case."""
        ...

    def finished(self, job: Job, host_id: str, now: float, usage: Usage) -> None:
        """The answer is complete, and the request is over."""
        ...

    def failed(self, job: Job, host_id: str, kind: str, now: float, tokens_so_far: int) -> None:
        """An attempt has failed. Kinds: `refused`, `http500`, `reset`, `gone`; and `timeout`, where the client has left
        and the request is over, told for each host that had it, or once with host_id "" where none had.

        After the first token of the client's attempt nothing can be sent again: a GiveUp in the next `decide` tells the
        client, without it the stream is cut silently. Before, the request stays with the dispatcher."""
        ...

    def report(self, host_id: str, reported: Report, now: float) -> None: ...

    def decide(self, now: float) -> Iterable[Action]: ...

    def wake_at(self) -> float | None:
        """When `decide` wants to be called even if nothing happens. Asked after each `decide`; a time that is past
        means at once."""
        ...


Factory = Callable[[Sequence[HostInfo], Streams, int], Dispatcher]
"""Makes a dispatcher of the hosts, what has come back, and a seed."""
