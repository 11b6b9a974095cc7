"""A model server as the simulator sees it, exact to the event.

A request that a host accepts takes a slot, or waits for one, first come first served. With a slot it waits for the
prefill lane, which works on one prompt at a time at `prefill` tokens/s over those tokens that are not in the prefix
cache. The end of its prefill is its first token. From then on it shares the decoder: each of n streams gets
min(`decode_single`, `decode_aggregate` / n) tokens/s, times `interference` while a prompt is in the prefill lane.

Decoding is processor sharing with equal shares, so one virtual clock, in tokens per stream, stands for all streams: a
stream that has k tokens to go ends when that clock has advanced by k. With a heap of those ends an event costs
O(log n).
"""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict, deque
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Protocol

from control_plane.simulation.cache import PrefixCache
from control_plane.simulation.dispatcher import HostInfo, Report
from control_plane.simulation.traces import BLOCK_TOKENS, Job

_TOLERANCE = 1e-6
"""Tokens by which the virtual clock may be short of an end: rounding, nothing else."""


@dataclass(frozen=True, slots=True)
class HostSpec:
    """A host: rates in tokens/s, times in seconds."""

    id: str
    hardware: str
    prefill: float
    decode_single: float
    decode_aggregate: float
    slots: int
    cache_tokens: int
    interference: float = 0.5
    """Share of its rate that decoding keeps while a prompt is in the prefill lane."""
    load_seconds: float = 0.0
    """Time to load a model. The prefill lane does nothing else meanwhile."""
    cold: bool = False
    """Nothing is loaded when the simulation starts."""
    models: tuple[str, ...] = ()
    """Models that it serves; empty for all."""
    resident: int = 1
    """Models that are loaded at the same time; the one that was not used for longest makes room."""

    @property
    def info(self) -> HostInfo:
        return HostInfo(self.id, self.hardware, self.slots, self.cache_tokens, self.models)


class Fault(IntEnum):
    """What may be wrong with a host."""

    NONE = 0
    REFUSE = 1
    """New requests are refused; what runs goes on."""
    HANG = 2
    """Everything is accepted and nothing gets a token."""
    HTTP500 = 3
    """New requests fail at once; what runs goes on."""
    RESET = 4
    """What streams is cut, at once; later streams in the middle of their answers."""
    SLOWDOWN = 5
    """All rates are divided by a factor."""
    GONE = 6
    """The process is away: requests are refused, what ran is lost, the cache is empty on return."""


class Stage(IntEnum):
    """Where in its host a run is."""

    SENT = 0
    WAITING = 1
    PREFILL = 2
    DECODE = 3
    OVER = 4


class Run:
    """One attempt of one job on one host."""

    __slots__ = ("cached", "cut", "end", "first_at", "held", "host", "job", "output", "owner", "seen", "stage", "start")

    def __init__(self, job: Job, output: int, host: Host, owner: Any) -> None:
        self.job = job
        self.output = output
        self.host = host
        self.owner = owner
        """Of no concern to the host."""
        self.stage = Stage.SENT
        self.cached = 0
        """Prompt tokens found in the prefix cache."""
        self.first_at = math.inf
        """When the host made the first token."""
        self.start = 0.0
        """Virtual time at which decoding began."""
        self.end = 0.0
        """Virtual time at which it ends."""
        self.cut = False
        """It does not get to its end."""
        self.seen = False
        """Its first token has come to the control plane."""
        self.held = False
        """Its client gets nothing of it until it is whole."""


class Sink(Protocol):
    """Who is told what a host does."""

    def first(self, run: Run, now: float) -> None: ...

    def finish(self, run: Run, now: float) -> None: ...

    def fail(self, run: Run, kind: str, now: float) -> None: ...


class Host:
    """The state of one host. Whoever calls a method that changes something asks `next_event` afterwards, and calls
    `step` at that time."""

    __slots__ = (
        "_end",
        "_ends",
        "_factor",
        "_lane",
        "_left",
        "_loaded",
        "_prompts",
        "_queue",
        "_sequence",
        "_sink",
        "_starts",
        "busy_seconds",
        "cache",
        "cached_tokens",
        "clock",
        "decoding",
        "fault",
        "finished",
        "id",
        "lane",
        "output_tokens",
        "prefilled_tokens",
        "rate",
        "running",
        "scheduled",
        "slot_seconds",
        "spec",
        "virtual",
        "waiting",
    )

    def __init__(self, spec: HostSpec, sink: Sink) -> None:
        self.spec = spec
        self.id = spec.id
        self.cache = PrefixCache(spec.cache_tokens)
        self.fault = Fault.NONE
        self.scheduled = math.inf
        """For whoever calls: when `step` is due."""
        self.clock = 0.0
        self.running = 0
        """Requests with a slot."""
        self.waiting = 0
        """Requests without."""
        self.decoding = 0
        self.lane: Run | None = None
        """The run whose prompt is in the prefill lane."""
        self.rate = 0.0
        """Tokens/s per stream."""
        self.virtual = 0.0
        """Tokens that a stream would have got that has been there from the start."""
        self.finished = 0
        self.prefilled_tokens = 0
        self.cached_tokens = 0
        self.output_tokens = 0
        self.busy_seconds = 0.0
        """Seconds with a request in a slot."""
        self.slot_seconds = 0.0
        """Integral of `running` over time."""
        self._sink = sink
        self._queue: deque[Run] = deque()
        """Waiting for a slot."""
        self._lane: deque[Run] = deque()
        """With a slot, waiting for the prefill lane."""
        self._end = math.inf
        """When the prompt in the lane is done."""
        self._left = 0.0
        """Seconds at full speed that it needed when the host hung."""
        self._ends: list[tuple[float, int, Run]] = []
        """Streams by the virtual time of their ends; those taken away since are still among them."""
        self._sequence = 0
        self._starts = 0.0
        """Sum of `start` over the streams, for the tokens generated."""
        self._prompts = 0
        """Sum of prompt tokens over requests with a slot."""
        self._factor = 1.0
        """Divides all rates."""
        self._loaded: OrderedDict[str, None] = OrderedDict()
        if not spec.cold:
            for model in (spec.models or ("",))[: spec.resident]:
                self._loaded[model] = None

    # ---------------------------------------------------------------- events ---

    def accept(self, run: Run, now: float) -> None:
        """A request has come; what becomes of it is told to the sink."""
        self._advance(now)
        fault = self.fault
        if fault is Fault.REFUSE or fault is Fault.GONE:
            self._lose(run, "refused", now)
        elif fault is Fault.HTTP500:
            self._lose(run, "http500", now)
        elif self.spec.models and run.job.model and run.job.model not in self.spec.models:
            self._lose(run, "http404", now)
        elif self.running < self.spec.slots and not self.waiting:
            self._admit(run)
        else:
            run.stage = Stage.WAITING
            self.waiting += 1
            self._queue.append(run)

    def cancel(self, run: Run, now: float) -> None:
        """Nobody wants this any more. Nothing is told to the sink."""
        self._advance(now)
        self._take_away(run)

    def step(self, now: float) -> None:
        """What is due happens."""
        self._advance(now)
        if self.fault is Fault.HANG:
            return
        while True:
            if self.lane is not None and self._end <= now:
                self._prefilled(now)
            elif self.decoding and (end := self._first_end()) is not None and end <= self.virtual + _TOLERANCE:
                self._decoded(heapq.heappop(self._ends)[2], now)
            else:
                return

    def next_event(self) -> float:
        """When something will happen here if nothing comes in between."""
        if self.fault is Fault.HANG:
            return math.inf
        if self.decoding and (end := self._first_end()) is not None:
            rest = end - self.virtual
            ends = self.clock + rest / self.rate if rest > 0.0 else self.clock
            return ends if ends < self._end else self._end
        return self._end

    def begin(self, fault: Fault, factor: float, now: float) -> None:
        """Something goes wrong; what was wrong before is over."""
        self.end_fault(now)
        self.fault = fault
        if fault is Fault.HANG:
            self._left = (self._end - now) if self.lane is not None else 0.0
            self._end = math.inf
        elif fault is Fault.SLOWDOWN:
            self._rescale(factor, now)
        elif fault is Fault.RESET:
            for run in self._streaming():
                self._lose(run, "reset", now)
        elif fault is Fault.GONE:
            lost = [*self._streaming(), *([self.lane] if self.lane else []), *self._lane, *self._queue]
            # From the last to the first, so that no slot is given to one that is about to be lost.
            for run in reversed(lost):
                if run.stage is not Stage.OVER:
                    self._lose(run, "gone", now)
            self.cache.clear()
            self._loaded.clear()
        self._pace()

    def end_fault(self, now: float) -> None:
        """All is well again."""
        self._advance(now)
        if self.fault is Fault.HANG and self.lane is not None:
            self._end = now + self._left
        elif self.fault is Fault.SLOWDOWN:
            self._rescale(1.0, now)
        elif self.fault is Fault.RESET:
            # Those that would have been cut further on are not.
            for run in self._streaming():
                if run.cut:
                    run.cut = False
                    run.end = run.start + run.output - 1
                    self._enter(run)
        self.fault = Fault.NONE
        self._pace()

    def report(self, healthy: bool, now: float) -> Report:
        self._advance(now)
        return Report(self.spec.slots, self.running, self.waiting, self.kv, healthy)

    @property
    def kv(self) -> float:
        """Share of `cache_tokens` that the prompts and answers of running requests hold, at most 1. As of `clock`."""
        held = self._prompts + self.decoding * self.virtual - self._starts
        return min(held / self.spec.cache_tokens, 1.0) if self.spec.cache_tokens else float(self.running > 0)

    def tokens(self, run: Run, now: float) -> int:
        """Tokens that it has made for a run until `now`, which is at or before the last event."""
        if run.stage is Stage.OVER:
            return run.output if not run.cut else int(run.end - run.start) + 1
        if run.stage is not Stage.DECODE or now < run.first_at:
            return 0
        virtual = self.virtual + (now - self.clock) * self.rate
        return 1 + max(int(virtual - run.start + _TOLERANCE), 0)

    # ------------------------------------------------------------- for oracles ---

    @property
    def queued(self) -> tuple[Run, ...]:
        """Waiting for a slot, in order."""
        return tuple(run for run in self._queue if run.stage is Stage.WAITING)

    @property
    def in_lane(self) -> tuple[Run, ...]:
        """With a slot, waiting for the prefill lane, in order."""
        return tuple(run for run in self._lane if run.stage is Stage.PREFILL)

    @property
    def slowness(self) -> float:
        """What its rates are divided by at present."""
        return self._factor

    @property
    def lane_end(self) -> float:
        """When the lane is free of the prompt that is in it."""
        return self._end if self.lane is not None else self.clock

    def streaming_ends(self) -> list[float]:
        """Tokens that each stream has to go, in no order."""
        return [run.end - self.virtual for _, _, run in self._ends if run.stage is Stage.DECODE]

    # ------------------------------------------------------------------- parts ---

    def _advance(self, now: float) -> None:
        elapsed = now - self.clock
        if elapsed > 0.0:
            self.virtual += elapsed * self.rate
            if self.running:
                self.busy_seconds += elapsed
                self.slot_seconds += elapsed * self.running
            self.clock = now

    def _pace(self) -> None:
        """Sets the rate of decoding. To be called after `_advance` whenever what it depends on has changed."""
        streams = self.decoding
        if not streams or self.fault is Fault.HANG:
            self.rate = 0.0
            return
        spec = self.spec
        shared = spec.decode_aggregate / streams
        rate = shared if shared < spec.decode_single else spec.decode_single
        if self.lane is not None:
            rate *= spec.interference
        self.rate = rate / self._factor

    def _rescale(self, factor: float, now: float) -> None:
        if self.lane is not None and self._end < math.inf:
            self._end = now + (self._end - now) * factor / self._factor
        self._factor = factor

    def _admit(self, run: Run) -> None:
        run.stage = Stage.PREFILL
        self.running += 1
        self._prompts += run.job.prompt_tokens
        if self.lane is None:
            self._start_prefill(run)
            self._pace()
        else:
            self._lane.append(run)

    def _start_prefill(self, run: Run) -> None:
        job = run.job
        matched = self.cache.matched(job.blocks)
        if matched:
            self.cache.use(job.blocks or (), matched)
            # The last token is always computed: it makes the first of the answer.
            run.cached = min(matched * BLOCK_TOKENS, job.prompt_tokens - 1)
        self.lane = run
        seconds = (job.prompt_tokens - run.cached) / self.spec.prefill
        if self.spec.load_seconds and job.model not in self._loaded and (job.model or not self._loaded):
            seconds += self.spec.load_seconds
        self._use_model(job.model)
        if self.fault is Fault.HANG:
            self._left, self._end = seconds * self._factor, math.inf
        else:
            self._end = self.clock + seconds * self._factor

    def _use_model(self, model: str) -> None:
        if model in self._loaded:
            self._loaded.move_to_end(model)
        elif model or not self._loaded:
            self._loaded[model] = None
            if len(self._loaded) > self.spec.resident:
                self._loaded.popitem(last=False)

    def _next_prefill(self) -> None:
        self.lane = None
        self._end = math.inf
        while self._lane:
            run = self._lane.popleft()
            if run.stage is Stage.PREFILL:
                self._start_prefill(run)
                return

    def _prefilled(self, now: float) -> None:
        run = self.lane
        if run is None:
            return
        self.cache.insert(run.job.blocks)
        self.prefilled_tokens += run.job.prompt_tokens - run.cached
        self.cached_tokens += run.cached
        run.first_at = now
        run.stage = Stage.DECODE
        run.start = self.virtual
        run.end = self.virtual + run.output - 1
        if self.fault is Fault.RESET and run.output > 1:
            run.cut = True
            run.end = self.virtual + (run.output - 1) / 2
        self.decoding += 1
        self._starts += run.start
        self._enter(run)
        self._next_prefill()
        self._pace()
        self._sink.first(run, now)

    def _enter(self, run: Run) -> None:
        self._sequence += 1
        heapq.heappush(self._ends, (run.end, self._sequence, run))

    def _first_end(self) -> float | None:
        """Virtual time of the next end. Drops entries of streams that were taken away, or that end at another time."""
        ends = self._ends
        while ends:
            end, _, run = ends[0]
            if run.stage is Stage.DECODE and run.end == end:
                return end
            heapq.heappop(ends)
        return None

    def _decoded(self, run: Run, now: float) -> None:
        self.output_tokens += int(run.end - run.start) + 1
        self._take_away(run)
        if run.cut:
            self._sink.fail(run, "reset", now)
        else:
            self.finished += 1
            self._sink.finish(run, now)

    def _streaming(self) -> list[Run]:
        """Each once, in order of their ends."""
        found = {id(run): run for _, _, run in sorted(self._ends) if run.stage is Stage.DECODE}
        return list(found.values())

    def _lose(self, run: Run, kind: str, now: float) -> None:
        if run.stage is Stage.DECODE:
            run.end = self.virtual
        run.cut = True
        self._take_away(run)
        self._sink.fail(run, kind, now)

    def _take_away(self, run: Run) -> None:
        stage, run.stage = run.stage, Stage.OVER
        if stage is Stage.WAITING:
            self.waiting -= 1
            return
        if stage is Stage.DECODE:
            self.decoding -= 1
            self._starts -= run.start
        elif stage is Stage.PREFILL:
            if run is self.lane:
                self._next_prefill()
        else:
            return
        self.running -= 1
        self._prompts -= run.job.prompt_tokens
        while self.waiting and self.running < self.spec.slots:
            follower = self._queue.popleft()
            if follower.stage is Stage.WAITING:
                self.waiting -= 1
                self._admit(follower)
        self._pace()
