"""Hosts against what one can work out by hand, and against a naive simulation of the same physics."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from control_plane.simulation.cache import PrefixCache
from control_plane.simulation.dispatcher import HostInfo, Streams
from control_plane.simulation.engine import Fault, HostSpec
from control_plane.simulation.harness import FaultEvent, Result, Settings, blind, simulate
from control_plane.simulation.traces import Trace
from tests.unit.simulation.fleets import PLAIN, Scripted, jobs

NO_NETWORK = Settings(network=0.0, client_timeout=1e6)


def run(trace: Trace, *specs: HostSpec, settings: Settings = NO_NETWORK, faults: tuple[FaultEvent, ...] = ()) -> Result:
    """Everything on the first host."""
    first = specs[0].id

    def make(hosts: list[HostInfo], streams: Streams, seed: int) -> Scripted:
        return Scripted(hosts, streams, lambda job: first)

    return simulate(trace, specs, blind(make), settings=settings, faults=faults)


def times(result: Result) -> list[tuple[float, float]]:
    """(first token, end) of each job."""
    return [(pytest.approx(outcome.first_at), pytest.approx(outcome.end_at)) for outcome in result.outcomes]


def test_one_request() -> None:
    assert times(run(jobs((0, 2000, 11)), PLAIN)) == [(2.0, 3.0)]
    assert run(jobs((0, 2000, 11)), PLAIN).outcomes[0].tpot == pytest.approx(0.1)
    assert times(run(jobs((0, 2000, 1)), PLAIN)) == [(2.0, 2.0)]


def test_network_counts_each_way() -> None:
    assert times(run(jobs((0, 2000, 11)), PLAIN, settings=Settings(network=0.25))) == [(2.5, 3.5)]


def test_two_streams_share() -> None:
    # The second prefill ends at 0.2 s. Until then the first stream has half of 10/s: 0.5 tokens. Then both have 7.5/s.
    result = run(jobs((0, 100, 16), (0, 100, 16)), replace(PLAIN))
    first = 0.2 + 14.5 / 7.5
    # When the first is done, the second has 0.5 tokens to go, at 10/s.
    assert times(result) == [(0.1, first), (0.2, first + 0.5 / 10)]


def test_a_prefill_slows_decoding() -> None:
    # 1 s of decoding alone is 10 tokens; 2 s beside a prefill are 10 at half the rate; 10 more take a second.
    result = run(jobs((0, 1000, 31), (2, 2000, 1)), PLAIN)
    assert times(result) == [(1.0, 5.0), (4.0, 4.0)]
    result = run(jobs((0, 1000, 31), (2, 2000, 1)), replace(PLAIN, interference=1.0))
    assert times(result) == [(1.0, 4.0), (4.0, 4.0)]


def test_prompts_take_turns() -> None:
    assert [first for first, _ in times(run(jobs((0, 1000, 1), (0.5, 3000, 1), (0.6, 500, 1)), PLAIN))] == [1, 4, 4.5]


def test_slots_bound_what_runs() -> None:
    single = replace(PLAIN, slots=1)
    # The second waits for the whole of the first, the third for the second.
    assert times(run(jobs((0, 1000, 11), (0, 1000, 11), (0, 1000, 11)), single)) == [(1, 2), (3, 4), (5, 6)]


def test_a_known_prefix_is_not_computed_again() -> None:
    trace = jobs((0, 1500, 1, [1, 2]), (10, 1600, 1, [1, 2, 3]), (20, 1100, 1, [2, 1]), (30, 1024, 1, [1, 2]))
    result = run(trace, PLAIN)
    assert [outcome.cached for outcome in result.outcomes] == [0, 1024, 0, 1023]  # the last token makes the first
    assert [first for first, _ in times(result)] == [1.5, 10.576, 21.1, 30.001]
    assert result.hosts[0].cached_tokens == 2047
    assert [outcome.cached for outcome in run(trace, replace(PLAIN, cache_tokens=0)).outcomes] == [0, 0, 0, 0]


def test_blocks_last_used_are_kept() -> None:
    cache = PrefixCache(3 * 512)
    cache.insert((1, 2))
    cache.insert((3,))
    cache.use((1, 2), 2)
    cache.insert((4,))  # instead of 3
    assert [cache.matched((1, 2)), cache.matched((3,)), cache.matched((4,))] == [2, 0, 1]
    cache.insert((5,))  # instead of 2: the end of a prompt goes before its beginning
    assert [cache.matched((1, 2)), len(cache)] == [1, 3]
    cache.insert(tuple(range(10, 20)))
    assert cache.matched(tuple(range(10, 20))) == 3


@given(st.lists(st.lists(st.integers(0, 20), max_size=6).map(tuple), max_size=40), st.integers(0, 8))
def test_a_cache_is_never_too_big_and_knows_what_came_last(prompts: list[tuple[int, ...]], blocks: int) -> None:
    cache = PrefixCache(blocks * 512)
    for prompt in prompts:
        cache.insert(prompt)
        assert len(cache) <= blocks
        assert cache.matched(prompt) >= min(len(set(prompt[:blocks])), len(prompt), blocks)


def test_a_cold_model_is_loaded_first() -> None:
    cold = replace(PLAIN, cold=True, load_seconds=5.0)
    assert times(run(jobs((0, 1000, 1), (1, 1000, 1)), cold)) == [(6, 6), (7, 7)]
    assert times(run(jobs((0, 1000, 1)), replace(cold, cold=False))) == [(1, 1)]


def test_a_model_makes_room_for_another() -> None:
    spec = replace(PLAIN, models=("a", "b"), load_seconds=5.0)
    trace = jobs((0, 1000, 1), (10, 1000, 1), (20, 1000, 1))
    named = replace(trace, jobs=tuple(replace(job, model=name) for job, name in zip(trace.jobs, "aba", strict=True)))
    assert [first for first, _ in times(run(named, spec))] == [1, 16, 26]
    assert [first for first, _ in times(run(named, replace(spec, resident=2)))] == [1, 11, 21]
    other = replace(trace, jobs=tuple(replace(job, model="c") for job in trace.jobs))
    assert {outcome.error for outcome in run(other, spec).outcomes} == {"http404"}


# ------------------------------------------------------------------- faults ---


def fault(at: float, what: Fault, host: str = "h", **more: float) -> FaultEvent:
    return FaultEvent(at, host, what, **more)  # type: ignore[arg-type]


def test_hang_stalls_and_goes_on() -> None:
    result = run(jobs((0, 1000, 11), (1.5, 1000, 1)), PLAIN, faults=(fault(1.25, Fault.HANG), fault(11.25, Fault.NONE)))
    # The prompt that came in the hang is computed from its end; the stream had 2.5 tokens, gets 5 in that second.
    assert times(result) == [(1, pytest.approx(12.5)), (12.25, 12.25)]


def test_a_prompt_in_the_lane_survives_a_hang() -> None:
    result = run(jobs((0, 1000, 1)), PLAIN, faults=(fault(0.25, Fault.HANG), fault(5, Fault.NONE)))
    assert times(result) == [(5.75, 5.75)]


def test_slowdown_divides_all_rates() -> None:
    faults = (fault(0.5, Fault.SLOWDOWN), fault(100, Fault.NONE))
    # Half a second of prefill at a tenth is 5 s, then 10 tokens at 1/s.
    assert times(run(jobs((0, 1000, 11)), PLAIN, faults=faults)) == [(5.5, 15.5)]
    back = (fault(0.5, Fault.SLOWDOWN), fault(3, Fault.NONE))
    assert times(run(jobs((0, 1000, 11)), PLAIN, faults=back)) == [(3.25, 4.25)]


@pytest.mark.parametrize(
    ("what", "kind", "streaming"),
    [(Fault.REFUSE, "refused", ""), (Fault.HTTP500, "http500", ""), (Fault.GONE, "refused", "gone")],
)
def test_what_is_new_fails_at_once(what: Fault, kind: str, streaming: str) -> None:
    result = run(
        jobs((0, 1000, 21), (2, 1000, 1), (5, 1000, 1)), PLAIN, faults=(fault(1.5, what), fault(4, Fault.NONE))
    )
    first, second, third = result.outcomes
    assert (first.error, second.error, third.error) == (streaming, kind, "")
    assert second.end_at == pytest.approx(2.0)
    assert third.end_at == pytest.approx(6.0)
    assert first.tokens == (6 if streaming else 21)


def test_a_host_that_was_gone_has_forgotten_its_prefixes() -> None:
    trace = jobs((0, 1024, 1, [1, 2]), (5, 1024, 1, [1, 2]))
    result = run(trace, PLAIN, faults=(fault(3, Fault.GONE), fault(4, Fault.NONE)))
    assert [outcome.cached for outcome in result.outcomes] == [0, 0]


def test_reset_cuts_streams_and_spares_what_comes_after() -> None:
    faults = (fault(1.5, Fault.RESET), fault(4, Fault.NONE))
    trace = jobs((0, 1000, 21), (1.6, 100, 21), (3.5, 100, 21), (6, 100, 21))
    running, during, across, after = run(trace, PLAIN, faults=faults).outcomes
    assert (running.error, running.cut, running.tokens, running.end_at) == ("reset", True, 6, 1.5)
    assert (during.error, during.tokens) == ("reset", 11)
    assert (across.error, across.tokens, after.error) == ("", 21, "")


# ------------------------------------------------- against a naive simulation ---


@dataclass
class Naive:
    """One request of the simulation below."""

    arrival: float
    prefill: float
    tokens: float
    first: float = math.inf
    end: float = math.inf


def naive(trace: Trace, spec: HostSpec) -> list[tuple[float, float]]:
    """The same physics with everything looked at on every event; without caches and faults."""
    everyone = [
        Naive(job.arrival, job.prompt_tokens / spec.prefill, trace.output_tokens[job.id] - 1) for job in trace.jobs
    ]
    coming, waiting, lane, streams, now = list(everyone), [], [], [], 0.0
    while coming or waiting or lane or streams:
        while waiting and len(lane) + len(streams) < spec.slots:
            lane.append(waiting.pop(0))
        rate = min(spec.decode_single, spec.decode_aggregate / max(len(streams), 1))
        rate *= spec.interference if lane else 1.0
        step = min(
            [entry.arrival - now for entry in coming[:1]]
            + [entry.prefill for entry in lane[:1]]
            + [stream.tokens / rate for stream in streams]
        )
        now += step
        for stream in streams:
            stream.tokens -= step * rate
        if lane:
            lane[0].prefill -= step
        for stream in [stream for stream in streams if stream.tokens <= 1e-9]:
            stream.end = now
            streams.remove(stream)
        if lane and lane[0].prefill <= 1e-12:
            done = lane.pop(0)
            done.first = now
            if done.tokens:
                streams.append(done)
            else:
                done.end = now
        while coming and coming[0].arrival <= now + 1e-12:
            waiting.append(coming.pop(0))
    return [(entry.first, entry.end) for entry in everyone]


@given(
    st.lists(
        st.tuples(st.floats(0, 20), st.integers(1, 3000), st.integers(1, 60)), min_size=1, max_size=25
    ),
    st.integers(1, 5),
    st.sampled_from([0.25, 0.5, 1.0]),
)  # fmt: skip
def test_as_a_naive_simulation(entries: list[tuple[float, int, int]], slots: int, interference: float) -> None:
    trace = jobs(*entries)
    spec = replace(PLAIN, slots=slots, interference=interference)
    found = [(outcome.first_at, outcome.end_at) for outcome in run(trace, spec).outcomes]
    for ours, theirs in zip(found, naive(trace, spec), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-6)


def test_what_a_host_says_of_itself() -> None:
    dispatchers: list[Scripted] = []

    def make(hosts: list[HostInfo], streams: Streams, seed: int) -> Scripted:
        dispatchers.append(Scripted(hosts, streams, lambda job: "h"))
        return dispatchers[0]

    spec = replace(PLAIN, slots=2, cache_tokens=10_000)
    simulate(jobs((0, 500, 31), (0, 2000, 1), (0, 100, 1)), [spec], blind(make), settings=NO_NETWORK)
    reports = {entry[3]: entry[2] for entry in dispatchers[0].told if entry[0] == "report"}
    assert (reports[1.0].slots, reports[1.0].running, reports[1.0].waiting, reports[1.0].healthy) == (2, 2, 1, True)
    # 500 + 2,000 tokens of prompts, and half a second of decoding at half the rate.
    assert reports[1.0].kv == pytest.approx((2500 + 2.5) / 10_000)
