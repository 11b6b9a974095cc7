"""Policies to compare with, from their published descriptions, each with the constants that it comes with.

All of them send a request the moment it arrives, and share one plain resilience, as a good proxy has it: a request that
fails before its first token is tried on up to two other hosts; a host is out for 10 s after three failures in a row,
and as long as it reports itself unhealthy. A request for which no host is in is sent to one that is out. Nobody tells a
client that its stream was cut: the connection ends, as it does behind a proxy.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable, Sequence

from control_plane.simulation.cache import PrefixCache
from control_plane.simulation.dispatcher import Action, Factory, GiveUp, HostInfo, Report, Send, Streams, Usage
from control_plane.simulation.traces import BLOCK_TOKENS, Job

RETRIES = 2
FAILURES_OUT = 3
OUT_SECONDS = 10.0


class Known:
    """What a baseline knows of a host."""

    __slots__ = ("failures", "healthy", "inflight", "info", "out_until", "report", "tokens")

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


class SmgLeastLoad(Baseline):
    """Shepherd Model Gateway's `least_load`: the least (queued + in-flight tokens) / throughput + 0.15 k / (1 - k), k
    the KV utilisation; seconds, so that unlike hosts compare. What is in flight from here counts at once with its
    prompt, what else a host reports with 1,024 tokens a request. The throughput is measured: that of the last minute's
    complete requests while there were any, prompt and answer, and 2,000 tokens/s until there are."""

    THROUGHPUT = 2000.0
    TOKENS = 1024
    KV_WEIGHT = 0.15
    WINDOW = 60.0

    def __init__(self, hosts: Sequence[HostInfo], streams: Streams, seed: int) -> None:
        super().__init__(hosts, streams, seed)
        self.speed = {info.id: _Throughput(self.WINDOW) for info in hosts}

    def pick(self, job: Job, candidates: Sequence[Known], now: float) -> Known:
        return min(candidates, key=self._load)

    def _load(self, host: Known) -> float:
        reported = host.report
        foreign = max(reported.running + reported.waiting - host.inflight, 0)
        tokens = host.tokens + foreign * self.TOKENS
        kv = min(reported.kv, 0.99)
        return tokens / (self.speed[host.info.id].value or self.THROUGHPUT) + self.KV_WEIGHT * kv / (1.0 - kv)

    def sent(self, job: Job, host: Known, now: float) -> None:
        self.speed[host.info.id].begin(now)

    def done(self, job: Job, host: Known, now: float, usage: Usage) -> None:
        self.speed[host.info.id].add(usage.prompt_tokens + usage.output_tokens, now, idle=not host.inflight)


class _Throughput:
    """Tokens per busy second over a window."""

    __slots__ = ("_busy", "_done", "_since", "_window", "value")

    def __init__(self, window: float) -> None:
        self._window = window
        self._done: deque[tuple[float, float, int]] = deque()
        """When, busy seconds until then, and tokens."""
        self._busy = 0.0
        self._since: float | None = None
        self.value = 0.0

    def begin(self, now: float) -> None:
        if self._since is None:
            self._since = now
            if not self._done:
                self._done.append((now, self._busy, 0))

    def add(self, tokens: int, now: float, idle: bool) -> None:
        if self._since is not None:
            self._busy += now - self._since
        self._since = None if idle else now
        done = self._done
        done.append((now, self._busy, tokens))
        while len(done) > 2 and done[0][0] < now - self._window:
            done.popleft()
        seconds = self._busy - done[0][1]
        if seconds > 0.0:
            # The first one only says where the window begins.
            self.value = (sum(entry[2] for entry in done) - done[0][2]) / seconds


class SmgLeastLoadDefault(SmgLeastLoad):
    """The same with the default throughput of 2,000 tokens/s for every host, whatever was measured."""

    def sent(self, job: Job, host: Known, now: float) -> None: ...

    def done(self, job: Job, host: Known, now: float, usage: Usage) -> None: ...


class SmgCacheAware(Baseline):
    """Shepherd Model Gateway's `cache_aware`, as in SGLang's router: where the load is unbalanced, that is most - least
    above 32 and most above 1.1 least requests in flight, the host with the fewest; else the host that has seen the
    longest prefix of the prompt, if that is more than half of it; else the host with the fewest. A tree of prefixes is
    kept per host, those used last, up to `TREE_TOKENS`."""

    THRESHOLD = 0.5
    ABSOLUTE = 32
    RELATIVE = 1.1
    TREE_TOKENS = 1 << 20

    def __init__(self, hosts: Sequence[HostInfo], streams: Streams, seed: int) -> None:
        super().__init__(hosts, streams, seed)
        self.trees = {info.id: PrefixCache(self.TREE_TOKENS) for info in hosts}

    def pick(self, job: Job, candidates: Sequence[Known], now: float) -> Known:
        loads = [host.inflight for host in candidates]
        most, least = max(loads), min(loads)
        if job.blocks and not (most - least > self.ABSOLUTE and most > self.RELATIVE * least):
            matched, place = max(
                (self.trees[host.info.id].matched(job.blocks), -place) for place, host in enumerate(candidates)
            )
            if matched * BLOCK_TOKENS > self.THRESHOLD * job.prompt_tokens:
                return candidates[-place]
        return least_inflight(candidates, self.random)

    def sent(self, job: Job, host: Known, now: float) -> None:
        self.trees[host.info.id].insert(job.blocks)


class LiteLlmLatency(Baseline):
    """LiteLLM's latency-based routing: the least mean over the last 10 latencies of a host, of streams the time to the
    first token; a host without any comes first; a time-out counts as 1,000 s. Among equals any."""

    SAMPLES = 10
    PENALTY = 1000.0

    def __init__(self, hosts: Sequence[HostInfo], streams: Streams, seed: int) -> None:
        super().__init__(hosts, streams, seed)
        self.latencies = {info.id: deque[float](maxlen=self.SAMPLES) for info in hosts}
        self.means = dict.fromkeys(self.latencies, 0.0)

    def pick(self, job: Job, candidates: Sequence[Known], now: float) -> Known:
        least = min(self.means[host.info.id] for host in candidates)
        equals = [host for host in candidates if self.means[host.info.id] == least]
        return equals[0] if len(equals) == 1 else equals[int(self.random.random() * len(equals))]

    def answered(self, job: Job, host: Known, ttft: float) -> None:
        self._learn(host, ttft)

    def broke(self, job: Job, host: Known, kind: str) -> None:
        if kind == "timeout":
            self._learn(host, self.PENALTY)

    def _learn(self, host: Known, latency: float) -> None:
        samples = self.latencies[host.info.id]
        samples.append(latency)
        self.means[host.info.id] = sum(samples) / len(samples)


BASELINES: dict[str, Factory] = {
    "random": Random,
    "round_robin": RoundRobin,
    "least_inflight": LeastInflight,
    "p2c": PowerOfTwo,
    "smg_least_load": SmgLeastLoad,
    "smg_least_load_default": SmgLeastLoadDefault,
    "smg_cache_aware": SmgCacheAware,
    "litellm_latency": LiteLlmLatency,
}
