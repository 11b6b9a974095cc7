"""Policies to compare with, from their published descriptions, each with the constants that it comes with.

All of them send a request the moment it arrives, and share one plain resilience, as a good proxy has it: a request that
fails before its first token is tried on up to two other hosts; a host is out for 10 s after three failures in a row,
and as long as it reports itself unhealthy. A request for which no host is in is sent to one that is out. Nobody tells a
client that its stream was cut: the connection ends, as it does behind a proxy.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

from control_plane.simulation.dispatcher import Action, GiveUp, HostInfo, Report, Send, Streams, Usage
from control_plane.simulation.traces import Job

RETRIES = 2
FAILURES_OUT = 3
OUT_SECONDS = 10.0


class Known:
    """What a baseline knows of a host."""

    __slots__ = (
        "failures",
        "healthy",
        "inflight",
        "info",
        "latencies",
        "out_until",
        "recent",
        "recent_tokens",
        "report",
        "tokens",
        "tree",
    )

    def __init__(self, info: HostInfo) -> None:
        self.info = info
        self.report = Report(info.slots, 0, 0, 0.0, True)
        self.inflight = 0
        """Own requests on it."""
        self.tokens = 0
        """Prompt tokens of those."""
        self.failures = 0
        """In a row."""
        self.out_until = 0.0
        self.healthy = True


class Baseline:
    """What the baselines share. A policy is its `pick`."""

    def __init__(self, hosts: Sequence[HostInfo], streams: Streams, seed: int) -> None:
        self.hosts = {info.id: Known(info) for info in hosts}
        self.everyone = list(self.hosts.values())
        self.random = random.Random(seed)
        self._actions: list[Action] = []
        self._tried: dict[Job, list[str]] = {}
        """By job that is not over: where it was sent, in order."""
        self._streaming: set[Job] = set()
        self._doubtful = False
        """Some host has failed or was reported unhealthy."""

    def pick(self, job: Job, candidates: Sequence[Known], now: float) -> Known:
        """One of the candidates, of which there is one at least."""
        raise NotImplementedError

    # What a policy may learn from.

    def sent(self, job: Job, host: Known, now: float) -> None: ...

    def answered(self, job: Job, host: Known, ttft: float) -> None: ...

    def done(self, job: Job, host: Known, now: float, usage: Usage) -> None: ...

    def broke(self, job: Job, host: Known, kind: str) -> None: ...

    # ------------------------------------------------------------ Dispatcher ---

    def arrive(self, job: Job, now: float) -> None:
        self._tried[job] = []
        self._send(job, now)

    def first_token(self, job: Job, host_id: str, now: float, cached_tokens: int) -> None:
        host = self.hosts[host_id]
        host.failures = 0
        self._streaming.add(job)
        self.answered(job, host, now - job.arrival)

    def finished(self, job: Job, host_id: str, now: float, usage: Usage) -> None:
        host = self.hosts[host_id]
        self._release(job, host)
        self._forget(job)
        self.done(job, host, now, usage)

    def failed(self, job: Job, host_id: str, kind: str, now: float, tokens_so_far: int) -> None:
        if not host_id:
            return self._forget(job)
        host = self.hosts[host_id]
        self._release(job, host)
        self.broke(job, host, kind)
        host.failures += 1
        if host.failures >= FAILURES_OUT:
            host.out_until = now + OUT_SECONDS
            self._doubtful = True
        if kind == "timeout" or job in self._streaming:
            return self._forget(job)
        if len(self._tried[job]) <= RETRIES and len(self._tried[job]) < len(self.hosts):
            return self._send(job, now)
        self._forget(job)
        self._actions.append(GiveUp(job, kind))
        return None

    def report(self, host_id: str, reported: Report, now: float) -> None:
        host = self.hosts[host_id]
        host.report = reported
        host.healthy = reported.healthy
        if not reported.healthy:
            self._doubtful = True

    def decide(self, now: float) -> Iterable[Action]:
        actions, self._actions = self._actions, []
        return actions

    def wake_at(self) -> float | None:
        return None

    # ----------------------------------------------------------------- parts ---

    def _send(self, job: Job, now: float) -> None:
        tried = self._tried[job]
        host = self.pick(job, self._candidates(job, tried, now), now)
        tried.append(host.info.id)
        host.inflight += 1
        host.tokens += job.prompt_tokens
        self.sent(job, host, now)
        self._actions.append(Send(job, host.info.id))

    def _candidates(self, job: Job, tried: Sequence[str], now: float) -> Sequence[Known]:
        able = self.everyone
        if job.model:
            able = [host for host in able if not host.info.models or job.model in host.info.models] or able
        if not tried and not self._doubtful:
            return able
        untried = [host for host in able if host.info.id not in tried] or able
        return [host for host in untried if host.healthy and host.out_until <= now] or untried

    def _release(self, job: Job, host: Known) -> None:
        host.inflight -= 1
        host.tokens -= job.prompt_tokens

    def _forget(self, job: Job) -> None:
        self._tried.pop(job, None)
        self._streaming.discard(job)


class Random(Baseline):
    """Any host, each as likely."""

    def pick(self, job: Job, candidates: Sequence[Known], now: float) -> Known:
        return candidates[int(self.random.random() * len(candidates))]


class RoundRobin(Baseline):
    """One after the other."""

    _turn = -1

    def pick(self, job: Job, candidates: Sequence[Known], now: float) -> Known:
        self._turn += 1
        return candidates[self._turn % len(candidates)]


class LeastInflight(Baseline):
    """The host with the fewest requests in flight from here; among equals any."""

    def pick(self, job: Job, candidates: Sequence[Known], now: float) -> Known:
        return least_inflight(candidates, self.random)


def least_inflight(candidates: Sequence[Known], rng: random.Random) -> Known:
    least = min(host.inflight for host in candidates)
    equals = [host for host in candidates if host.inflight == least]
    return equals[0] if len(equals) == 1 else equals[int(rng.random() * len(equals))]


class PowerOfTwo(Baseline):
    """The less loaded of two hosts taken by chance."""

    def pick(self, job: Job, candidates: Sequence[Known], now: float) -> Known:
        if len(candidates) == 1:
            return candidates[0]
        one, other = self.random.sample(candidates, 2)
        return one if one.inflight <= other.inflight else other


BASELINES = {
    "random": Random,
    "round_robin": RoundRobin,
    "least_inflight": LeastInflight,
    "p2c": PowerOfTwo,
}
