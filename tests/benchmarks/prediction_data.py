"""Answers of a mixed fleet to a trace, with what a control plane knew of each at its dispatch.

A small generator for judging predictors, not the simulator: hosts prefill one prompt at a time, first come first
served, over the tokens that their prefix cache lacks; streams share the decoding, slowed down while a prompt is
prefilled; slots bound what runs. On top comes what no control plane sees: noise, jitter of the network, outliers,
a mild growth of the cost per token with the length of the prompt, and prefixes that were believed to be cached.
"""

from __future__ import annotations

import csv
import heapq
import json
import random
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from control_plane.prediction.features import Features, Kin

BLOCK = 512


@dataclass(frozen=True)
class Speed:
    """Of a class of hosts; the base is in seconds, the rest in tokens per second and tokens."""

    prefill: float
    single: float
    aggregate: float
    slots: int
    base: float
    cache_tokens: int


CLASSES = {
    "gpu": Speed(10_000, 80, 2_000, 64, 0.03, 400_000),
    "mac": Speed(800, 40, 120, 8, 0.08, 100_000),
    "cpu": Speed(120, 12, 24, 2, 0.1, 30_000),
}
FLEET = (*["gpu"] * 2, *["mac"] * 3, *["cpu"] * 4)
INTERFERENCE = 0.5
"""Of its rate at which a host decodes while it prefills."""


@dataclass(frozen=True)
class Arrival:
    at: float
    prompt: int
    output: int
    blocks: tuple[int, ...] = ()


@dataclass(eq=False)
class Request:
    arrival: Arrival
    host: int
    features: Features
    """At dispatch."""
    cached: int
    """Tokens that were in the cache indeed."""
    work: float = 0.0
    first: float = 0.0
    """Time of the first token."""
    done: float = 0.0

    @property
    def ttft(self) -> float:
        return self.first - self.arrival.at

    @property
    def tpot(self) -> float | None:
        return (self.done - self.first) / (self.arrival.output - 1) if self.arrival.output > 1 else None

    @property
    def answered(self) -> Features:
        """At dispatch, with the cached tokens that the answer reported."""
        was = self.features
        return Features(was.prompt_tokens, self.cached, was.backlog_tokens, was.streams, was.waiting)


@dataclass(eq=False)
class Host:
    number: int
    name: str
    speed: Speed
    slow: Callable[[float], float]
    """Factor by time."""
    now: float = 0.0
    waiting: deque[Request] = field(default_factory=deque)
    prefilling: deque[Request] = field(default_factory=deque)
    decoding: list[tuple[float, int, Request]] = field(default_factory=list)
    """Heap by the progress at which each is done."""
    progress: float = 0.0
    """Tokens that a stream would have that was there from the beginning."""
    unanswered: dict[int, float] = field(default_factory=dict)
    """Uncached tokens of the requests without a first token, as the control plane believes."""
    cache: OrderedDict[int, None] = field(default_factory=OrderedDict)

    @property
    def kin(self) -> Kin:
        return Kin("engine", self.name, "model", "fp")

    def features(self, arrival: Arrival, cached: float) -> Features:
        return Features(
            arrival.prompt, cached, sum(self.unanswered.values()), len(self.decoding), float(len(self.waiting))
        )

    def cached_tokens(self, arrival: Arrival) -> int:
        hits = 0
        for block in arrival.blocks:
            if block not in self.cache:
                break
            hits += 1
        return min(hits * BLOCK, max(arrival.prompt - 1, 0))

    def remember(self, arrival: Arrival) -> None:
        for block in arrival.blocks:
            self.cache[block] = None
            self.cache.move_to_end(block)
        while len(self.cache) > self.speed.cache_tokens // BLOCK:
            self.cache.popitem(last=False)

    def rate(self) -> float:
        """Tokens per second of each stream."""
        share = min(self.speed.single, self.speed.aggregate / max(len(self.decoding), 1))
        return share * (INTERFERENCE if self.prefilling else 1.0) / self.slow(self.now)

    def next_event(self) -> float:
        times = [float("inf")]
        if self.prefilling:
            times.append(self.now + self.prefilling[0].work * self.slow(self.now))
        if self.decoding:
            times.append(self.now + max(0.0, self.decoding[0][0] - self.progress) / self.rate())
        return min(times)

    def advance(self, until: float) -> list[Request]:
        """Work until a time; the requests that had their first or their last token on the way, in order."""
        events = []
        while (at := self.next_event()) <= until:
            self._move(at)
            if self.prefilling and self.prefilling[0].work <= 1e-9:
                request = self.prefilling.popleft()
                request.first = at
                del self.unanswered[id(request)]
                heapq.heappush(self.decoding, (self.progress + request.arrival.output - 1, id(request), request))
                events.append(request)
            while self.decoding and self.decoding[0][0] <= self.progress + 1e-9:
                request = heapq.heappop(self.decoding)[2]
                request.done = at
                events.append(request)
            self._admit()
        self._move(until)
        return events

    def _move(self, to: float) -> None:
        elapsed = max(0.0, to - self.now)
        if self.decoding:
            self.progress += elapsed * self.rate()
        if self.prefilling:
            self.prefilling[0].work = max(0.0, self.prefilling[0].work - elapsed / self.slow(self.now))
        self.now = max(self.now, to)

    def take(self, request: Request) -> None:
        self.unanswered[id(request)] = request.features.uncached_tokens
        self.waiting.append(request)
        self._admit()

    def _admit(self) -> None:
        while self.waiting and len(self.prefilling) + len(self.decoding) < self.speed.slots:
            self.prefilling.append(self.waiting.popleft())


def generate(
    arrivals: list[Arrival], seed: int, slow: Callable[[int, float], float] = lambda host, at: 1.0
) -> tuple[list[Host], list[tuple[float, str, Request]]]:
    """Hosts, and what happened in order: (time, "dispatch" | "first" | "done", request)."""
    rng = random.Random(seed)
    hosts = [
        Host(number, name, CLASSES[name], lambda at, number=number: slow(number, at))
        for number, name in enumerate(FLEET)
    ]
    log: list[tuple[float, str, Request]] = []

    def collect(host: Host, until: float) -> None:
        for request in host.advance(until):
            if request.done:
                log.append((request.done, "done", request))
            else:
                log.append((request.first, "first", request))

    for arrival in arrivals:
        for host in hosts:
            collect(host, arrival.at)
        host = _choose(hosts, arrival, rng)
        cached = host.cached_tokens(arrival)
        believed = 0 if rng.random() < 0.1 else cached
        request = Request(arrival, host.number, host.features(arrival, believed), cached)
        uncached = arrival.prompt - cached
        work = uncached / host.speed.prefill * (1 + uncached / 100_000)
        request.work = host.speed.base * rng.expovariate(1) + (work + host.speed.base) * rng.lognormvariate(0, 0.1)
        if rng.random() < 0.01:
            request.work *= 5
        host.remember(arrival)
        log.append((arrival.at, "dispatch", request))
        host.take(request)
    for host in hosts:
        collect(host, arrivals[-1].at + 1e5)
    log.sort(key=lambda event: event[0])
    return hosts, log


def _choose(hosts: list[Host], arrival: Arrival, rng: random.Random) -> Host:
    """Mostly where it starts soonest, sometimes elsewhere: every host is seen under every load."""

    def start(host: Host) -> float:
        uncached = arrival.prompt - host.cached_tokens(arrival)
        full = len(host.prefilling) + len(host.decoding) + len(host.waiting) >= host.speed.slots
        return (sum(host.unanswered.values()) + uncached) / host.speed.prefill + (5.0 if full else 0.0)

    bearable = [host for host in hosts if start(host) < 60] or [min(hosts, key=start)]
    return rng.choice(bearable) if rng.random() < 0.15 else min(bearable, key=start)


# ------------------------------------------------------------------- traces ---


def azure(path: Path, load: float) -> list[Arrival]:
    """Arrivals of AzureLLMInferenceTrace, its time scaled to a share of the fleet's prefill."""
    with path.open() as lines:
        rows = [
            (datetime.fromisoformat(row["TIMESTAMP"][:26]), int(row["ContextTokens"]), int(row["GeneratedTokens"]))
            for row in csv.DictReader(lines)
        ]
    begin = rows[0][0]
    return _scaled([Arrival((at - begin).total_seconds(), prompt, max(out, 1)) for at, prompt, out in rows], load, 1.0)


def mooncake(path: Path, load: float) -> list[Arrival]:
    """Arrivals of a Mooncake trace, likewise; a part of its prompts will be cached."""
    with path.open() as lines:
        rows = [json.loads(line) for line in lines]
    arrivals = [
        Arrival(row["timestamp"] / 1e3, row["input_length"], max(row["output_length"], 1), tuple(row["hash_ids"]))
        for row in rows
    ]
    return _scaled(arrivals, load, 0.6)


def _scaled(arrivals: list[Arrival], load: float, uncached: float) -> list[Arrival]:
    prefill = sum(CLASSES[name].prefill for name in FLEET)
    seconds = sum(arrival.prompt for arrival in arrivals) * uncached / prefill / load
    factor = seconds / max(arrivals[-1].at, 1e-9)
    return [Arrival(a.at * factor, a.prompt, a.output, a.blocks) for a in arrivals]
