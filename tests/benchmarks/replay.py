"""A trace replayed in real time, its requests sent over real gRPC: to a control plane, or by a policy of the simulator
straight to model servers.

All times are seconds of the trace, of which `speed` pass in one real second.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import grpc

from control_plane.domain.server import Health
from control_plane.fleet.registry import Fleet
from control_plane.fleet.server import Flight, OutcomeKind
from control_plane.fleet.server import Outcome as FlightOutcome
from control_plane.simulation.baselines import Baseline
from control_plane.simulation.dispatcher import GiveUp, HostInfo, Send, Usage
from control_plane.simulation.harness import Outcome, Result, Settings
from control_plane.simulation.traces import BLOCK_TOKENS, Job, Trace
from modelyard.rpc.errors import from_rpc_error
from modelyard.v1 import generation_pb2, model_server_pb2, orchestrator_pb2
from modelyard.v1.model_server_pb2_grpc import ModelServerStub
from modelyard.v1.orchestrator_pb2_grpc import OrchestratorStub

CHARACTERS_PER_TOKEN = 4
"""Of the simulated engine."""
MODEL = "simulated"


class Stopwatch:
    """Seconds of the trace since `start`."""

    def __init__(self, speed: float) -> None:
        self.speed = speed
        self._began = 0.0
        self.lateness: list[float] = []
        """Of timers of the event loop, real seconds."""

    def start(self) -> None:
        self._began = asyncio.get_running_loop().time()

    def now(self) -> float:
        return (asyncio.get_running_loop().time() - self._began) * self.speed

    async def until(self, moment: float) -> None:
        await asyncio.sleep(max(0.0, (moment - self.now()) / self.speed))

    async def watch(self) -> None:
        """Note how late timers are, until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + 0.02
            await asyncio.sleep(0.02)
            self.lateness.append(loop.time() - due)


def prompt(job: Job, output_tokens: int, salt: str) -> str:
    """A text of as many tokens as the job's prompt has; texts of jobs with blocks in common begin alike. Its last words
    tell a simulated engine how long the answer is. `salt` makes texts of another run unlike."""
    size = job.prompt_tokens * CHARACTERS_PER_TOKEN
    blocks = "".join(_filled(f"{salt}/{block} ", BLOCK_TOKENS * CHARACTERS_PER_TOKEN) for block in job.blocks or ())
    told = f" [{output_tokens} tokens]"
    text = blocks + _filled(f"{salt} job {job.id} ", max(size - len(blocks), 0))
    return text[: max(size - len(told), 0)] + told


def _filled(words: str, size: int) -> str:
    return (words * (size // len(words) + 1))[:size]


Serve = Callable[[Outcome, str], Awaitable[None]]
"""Has a request with this prompt served, and notes in the outcome what comes of it."""


async def replay(trace: Trace, serve: Serve, watch: Stopwatch, salt: str, settings: Settings) -> Result:
    """Open loop: every request is sent when its time has come, however many are not answered. Clients leave after
    `settings.client_timeout`."""
    outcomes = [Outcome(job) for job in trace.jobs]

    async def one(outcome: Outcome, text: str) -> None:
        try:
            async with asyncio.timeout(settings.client_timeout / watch.speed):
                await serve(outcome, text)
        except TimeoutError:
            outcome.error, outcome.cut = "timeout", False
        outcome.over = True
        outcome.end_at = watch.now()

    watch.start()
    lateness = asyncio.create_task(watch.watch())
    try:
        async with asyncio.TaskGroup() as group:
            for outcome, tokens in zip(outcomes, trace.output_tokens, strict=True):
                text = prompt(outcome.job, tokens, salt)
                await watch.until(outcome.job.arrival)
                group.create_task(one(outcome, text))
    finally:
        lateness.cancel()
    return Result(tuple(outcomes), (), watch.now(), 0, settings)


class ThroughControlPlane:
    """Requests go to a control plane, which does the rest."""

    def __init__(self, link: grpc.aio.Channel, watch: Stopwatch) -> None:
        self._stub = OrchestratorStub(link)
        self._watch = watch

    async def serve(self, outcome: Outcome, text: str) -> None:
        request = orchestrator_pb2.GenerateRequest(input=generation_pb2.GenerationInput(prompt=text))
        call, ended = self._stub.Generate(request), False
        try:
            async for response in call:
                if response.HasField("delta"):
                    _took(outcome, response.delta, self._watch)
                if response.HasField("summary"):
                    ended, summary = True, response.summary
                    outcome.host, outcome.attempts = summary.server_id, len(summary.attempts)
                    outcome.cached = summary.usage.cached_prompt_tokens
        except grpc.aio.AioRpcError as error:
            refusal = from_rpc_error(error)
            outcome.error = refusal.reason.value
        _ended(outcome, ended)


class ThroughBaseline:
    """A relay of its own, which asks a baseline of the simulator for the server, and tells it what the simulator would.
    Nothing waits here."""

    def __init__(
        self,
        baseline: Callable[[Sequence[HostInfo], Any, int], Baseline],
        infos: Sequence[HostInfo],
        links: Mapping[str, grpc.aio.Channel],
        watch: Stopwatch,
        seed: int,
    ) -> None:
        self._baseline = baseline(infos, self, seed)
        self._stubs = {server_id: ModelServerStub(link) for server_id, link in links.items()}
        self._watch = watch

    def tokens(self, job: Job, host: str, now: float) -> int:
        """Of `Streams`: no baseline asks."""
        raise NotImplementedError

    async def serve(self, outcome: Outcome, text: str) -> None:
        job, now = outcome.job, self._watch.now
        request = model_server_pb2.ModelServerGenerateRequest(
            model=MODEL, input=generation_pb2.GenerationInput(prompt=text)
        )
        self._baseline.arrive(job, now())
        while server_id := self._next(outcome):
            outcome.attempts += 1
            try:
                await self._stream(outcome, server_id, request)
                return
            except asyncio.CancelledError:
                self._baseline.failed(job, server_id, "timeout", now(), outcome.tokens)
                raise
            except grpc.aio.AioRpcError as error:
                outcome.error = from_rpc_error(error).reason.value
                self._baseline.failed(job, server_id, "http500", now(), outcome.tokens)
        _ended(outcome, False)

    def _next(self, outcome: Outcome) -> str:
        """Where the request goes; empty: nowhere. A baseline acts on what it was told last, and on nothing else."""
        for action in self._baseline.decide(self._watch.now()):
            if isinstance(action, Send):
                return action.host
            if isinstance(action, GiveUp):
                outcome.error = action.reason
        return ""

    async def _stream(
        self, outcome: Outcome, server_id: str, request: model_server_pb2.ModelServerGenerateRequest
    ) -> None:
        ended, job = False, outcome.job
        async for response in self._stubs[server_id].Generate(request):
            if response.HasField("delta") and _took(outcome, response.delta, self._watch):
                self._baseline.first_token(job, server_id, outcome.first_at, 0)
            if response.HasField("result"):
                ended, usage = True, response.result.usage
                outcome.host, outcome.cached = server_id, usage.cached_prompt_tokens
                told = Usage(usage.prompt_tokens, usage.cached_prompt_tokens, usage.completion_tokens)
                self._baseline.finished(job, server_id, self._watch.now(), told)
        outcome.error = ""
        _ended(outcome, ended)


def _took(outcome: Outcome, delta: generation_pb2.GenerationDelta, watch: Stopwatch) -> bool:
    """Note a piece of the answer; whether it was the first."""
    first = outcome.first_at == math.inf
    if first:
        outcome.first_at = watch.now()
        outcome.host = outcome.host or "?"  # until the end of the answer tells
    outcome.tokens += delta.tokens
    return first


def _ended(outcome: Outcome, complete: bool) -> None:
    """The stream has ended, whatever its end was."""
    if not complete:
        outcome.cut = outcome.first_at < math.inf
        outcome.silent = outcome.cut and not outcome.error
        outcome.error = outcome.error or "cut"


def foretold(fleet: Fleet) -> list[tuple[float, float]]:
    """Will hold, of every request that a server of this fleet has answered: the TTFT that was expected at its dispatch
    and what it was, seconds from the dispatch."""
    pairs: list[tuple[float, float]] = []
    end = fleet.end

    def noted(flight: Flight, outcome: FlightOutcome, now: float) -> None:
        expected, measured = flight.expected.ttft, outcome.ttft
        answered = flight in flight.server.flights and outcome.kind is OutcomeKind.SUCCESS and not flight.cold
        if answered and expected is not None and measured is not None:
            pairs.append((expected, measured))
        end(flight, outcome, now)

    fleet.end = noted  # type: ignore[method-assign]
    return pairs


def all_ready(fleet: Fleet, count: int) -> bool:
    """Whether so many servers have reported that they are."""
    ready = [server for server in fleet.servers() if server.ready and server.report.health is Health.READY]
    return len(ready) >= count
