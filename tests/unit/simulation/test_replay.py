"""What a live replay sends, and that the simulated engine does with it what a host of the simulator does."""

from __future__ import annotations

import random

from control_plane.simulation.baselines import RoundRobin
from control_plane.simulation.engine import HostSpec
from control_plane.simulation.harness import blind, simulate
from control_plane.simulation.traces import Job, Trace, trace
from model_servers.engine import Finished, GenerationRequest
from model_servers.engines.simulated import SimulatedEngine, SimulatedSettings
from tests.benchmarks.live import engine
from tests.benchmarks.replay import prompt

HOST = HostSpec("h", "gpu", 10_000.0, 80.0, 2_000.0, 64, 2_000 * 512)
"""Room for everything: what goes first differs, for the engine keeps the beginnings of answers too."""


def conversations(count: int = 80) -> Trace:
    """One after the other, so that each is over before the next begins; some begin as others did."""
    draw = random.Random(3)
    entries = []
    for number in range(count):
        blocks = tuple(draw.randrange(3) for _ in range(draw.randrange(8)))
        entries.append((Job(0, number * 60.0, len(blocks) * 512 + draw.randrange(20, 512), blocks), 1 + number % 50))
    return trace("conversations", entries)


async def test_the_simulated_engine_sees_the_tokens_and_caches_of_the_simulator() -> None:
    work = conversations()
    simulated = simulate(work, [HOST], blind(RoundRobin)).outcomes
    live = SimulatedEngine(SimulatedSettings.model_validate({**engine(HOST, 1.0), "instant": True}))
    await live.start()
    found = []
    for job, output in zip(work.jobs, work.output_tokens, strict=True):
        request = GenerationRequest("simulated", prompt=prompt(job, output, "salt"))
        (usage,) = [item.usage async for item in live.generate(request) if isinstance(item, Finished)]
        found.append((usage.prompt_tokens, usage.cached_prompt_tokens, usage.completion_tokens))
    wanted = [(each.job.prompt_tokens, each.cached, each.tokens) for each in simulated]
    assert found == wanted
    assert any(cached for _, cached, _ in found)


def test_prompts_of_another_run_are_in_no_cache() -> None:
    job = Job(0, 0.0, 2000, (1, 2, 3))
    one, other = prompt(job, 5, "run0"), prompt(job, 5, "run1")
    assert len(one) == len(other) == 8000 and one.endswith("[5 tokens]")
    assert one[:2048] != other[:2048]
