"""The event loop: every job ends once, whatever fails and whatever the policy does."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from control_plane.simulation.dispatcher import Action, Cancel, GiveUp, HostInfo, Send, Streams, Usage
from control_plane.simulation.engine import Fault, HostSpec
from control_plane.simulation.harness import FaultEvent, PolicyError, Result, Settings, blind, simulate
from control_plane.simulation.metrics import Objective, summary
from control_plane.simulation.policies import NAMES, makers
from control_plane.simulation.traces import Job, Trace
from tests.unit.simulation.fleets import PLAIN, Scripted, jobs, told

A, B = replace(PLAIN, id="a"), replace(PLAIN, id="b")
PRESENT = Settings(network=0.0)


class Both(Scripted):
    """Sends each job to both hosts."""

    def __init__(self, hosts: Sequence[HostInfo], streams: Streams) -> None:
        super().__init__(hosts, streams, lambda job: "")

    def arrive(self, job: Job, now: float) -> None:
        self.todo += [Send(job, "a"), Send(job, "b")]


def run(
    trace: Trace,
    make: Callable[[Sequence[HostInfo], Streams], Scripted],
    *faults: FaultEvent,
    settings: Settings = PRESENT,
    specs: Sequence[HostSpec] = (A, B),
) -> tuple[Result, Scripted]:
    made: list[Scripted] = []

    def factory(hosts: Sequence[HostInfo], streams: Streams, seed: int) -> Scripted:
        made.append(make(hosts, streams))
        return made[0]

    result = simulate(trace, specs, blind(factory), faults=faults, settings=settings)
    return result, made[0]


def to(host: str) -> Callable[[Sequence[HostInfo], Streams], Scripted]:
    return lambda hosts, streams: Scripted(hosts, streams, lambda job: host)


def test_a_dispatcher_hears_of_everything_in_order() -> None:
    _, heard = run(jobs((0, 1000, 11, [7])), to("a"), settings=Settings(network=0.5))
    assert told(heard, "first") == [(0, "a", 2.0, 0)]
    assert told(heard, "finished") == [(0, "a", pytest.approx(3.0), Usage(1000, 0, 11))]
    reports = told(heard, "report")
    assert [(host, now) for host, _, now in reports[:4]] == [("a", 0.0), ("b", 0.5), ("a", 1.0), ("b", 1.5)]


def test_a_dispatcher_is_not_told_how_long_answers_get() -> None:
    assert not any("output" in name for name in Job.__slots__)
    assert set(HostInfo.__slots__) == {"id", "hardware", "slots", "cache_tokens", "models"}


def test_the_first_to_answer_gets_the_request() -> None:
    fast = replace(B, prefill=2000.0)
    result, heard = run(jobs((0, 1000, 11)), Both, specs=(A, fast))
    outcome = result.outcomes[0]
    assert (outcome.host, outcome.first_at, outcome.attempts, outcome.error) == ("b", 0.5, 2, "")
    assert told(heard, "first") == [(0, "b", 0.5, 0)]
    # What nobody wants is stopped with the end of the request.
    assert {use.id: use.finished for use in result.hosts} == {"a": 0, "b": 1}


def test_an_answer_that_is_held_back_is_seen_when_it_is_whole_and_can_be_asked_for_elsewhere_until_then() -> None:
    class Held(Scripted):
        def arrive(self, job: Job, now: float) -> None:
            self.todo.append(Send(job, "a", held=True))

    def make(hosts: Sequence[HostInfo], streams: Streams) -> Scripted:
        made = Held(hosts, streams, lambda job: "")
        made.on_failed = lambda job, host, kind, tokens: (Send(job, "b"),)
        return made

    whole, heard = run(jobs((0, 1000, 11)), make)
    assert told(heard, "first") == [(0, "a", 1.0, 0)]
    assert (whole.outcomes[0].host, whole.outcomes[0].ttft, whole.outcomes[0].tpot) == ("a", pytest.approx(2.0), 0.0)
    broken, heard = run(jobs((0, 1000, 11)), make, FaultEvent(1.5, "a", Fault.RESET))
    assert told(heard, "failed") == [(0, "a", "reset", 1.5, 6)]
    assert [host for _, host, *_ in told(heard, "first")] == ["a", "b"]
    outcome = broken.outcomes[0]
    assert (outcome.host, outcome.ttft, outcome.error, outcome.cut) == ("b", pytest.approx(2.5), "", False)


def test_a_dispatcher_is_told_when_a_client_will_leave() -> None:
    _, heard = run(jobs((0, 1000, 2)), to("a"), settings=Settings(client_timeout=7.0))
    assert heard.streams.deadline(Job(0, 3.0, 1000, None)) == 10.0


def test_what_is_cancelled_frees_its_host_at_once() -> None:
    class Hedge(Both):
        def first_token(self, job: Job, host_id: str, now: float, cached_tokens: int) -> None:
            super().first_token(job, host_id, now, cached_tokens)
            self.todo.append(Cancel(job, "a" if host_id == "b" else "b"))

    trace = jobs((0, 1000, 101), (0.6, 1000, 1))
    result, heard = run(trace, Hedge, specs=(A, replace(B, prefill=2000.0)))
    # B makes the first token at 0.5 s, and A is free from then on: it has the second job from 0.6 s on, as B has.
    assert [outcome.host for outcome in result.outcomes] == ["b", "b"]
    assert [outcome.first_at for outcome in result.outcomes] == pytest.approx([0.5, 1.1])
    running = [report.running for host, report, now in told(heard, "report") if host == "a" and now > 1.2]
    assert set(running) == {0}


def test_a_client_leaves_after_its_patience() -> None:
    patient = Settings(network=0.0, client_timeout=5.0)
    result, heard = run(jobs((0, 1000, 101), (0, 9000, 1), (1, 1, 1)), to("a"), settings=patient)
    first, second, third = result.outcomes
    # The first streams from 1 s on at half speed.
    assert (first.error, first.end_at, first.tokens, first.cut) == ("timeout", 5.0, 21, False)
    assert (second.error, second.ttft, second.host) == ("timeout", math.inf, "")
    # The prompt in the lane was dropped at 5 s, the third runs then.
    assert third.first_at == pytest.approx(5.001)
    assert told(heard, "failed") == [(0, "a", "timeout", 5.0, 21), (1, "a", "timeout", 5.0, 0)]


def test_a_client_leaves_what_was_never_sent() -> None:
    result, heard = run(jobs((0, 1, 1)), to(""), settings=Settings(client_timeout=5.0))
    assert told(heard, "failed") == [(0, "", "timeout", 5.0, 0)]
    assert (result.outcomes[0].error, result.outcomes[0].attempts) == ("timeout", 0)


@pytest.mark.parametrize("says_so", [True, False])
def test_a_cut_stream_is_silent_unless_the_client_is_told(says_so: bool) -> None:
    def make(hosts: Sequence[HostInfo], streams: Streams) -> Scripted:
        made = Scripted(hosts, streams, lambda job: "a")
        made.on_failed = lambda job, host, kind, tokens: (GiveUp(job, "HOST_LOST"),) if says_so else ()
        return made

    result, heard = run(jobs((0, 1000, 101)), make, FaultEvent(2.0, "a", Fault.GONE, healthy=False))
    outcome = result.outcomes[0]
    assert told(heard, "failed") == [(0, "a", "gone", 2.0, 11)]
    assert (outcome.cut, outcome.silent, outcome.tokens, outcome.end_at) == (True, not says_so, 11, 2.0)
    assert outcome.error == ("HOST_LOST" if says_so else "gone")
    counted = summary(result)
    assert (counted.errors, counted.truncated, counted.silent) == (1.0, 1.0, float(not says_so))


def test_a_request_without_a_token_can_be_sent_again() -> None:
    def make(hosts: Sequence[HostInfo], streams: Streams) -> Scripted:
        made = Scripted(hosts, streams, lambda job: "a")
        made.on_failed = lambda job, host, kind, tokens: (Send(job, "b"),)
        return made

    result, heard = run(jobs((0, 1000, 11)), make, FaultEvent(0.5, "a", Fault.GONE, healthy=False))
    outcome = result.outcomes[0]
    assert (outcome.error, outcome.host, outcome.attempts, outcome.first_at) == ("", "b", 2, 1.5)
    assert told(heard, "failed") == [(0, "a", "gone", 0.5, 0)]
    # The change of health was told when it happened.
    assert (False, 0.5) in [(report.healthy, now) for host, report, now in told(heard, "report") if host == "a"]
    assert max(now for host, _, now in told(heard, "report") if host == "a") == 0.5


def test_a_stalled_stream_can_be_seen_and_given_up() -> None:
    class Watching(Scripted):
        def report(self, host_id: str, reported: object, now: float) -> None:
            self.told.append(("seen", self.streams.tokens(trace.jobs[0], "a", now), now))
            if now == 5.0:
                self.todo.append(GiveUp(trace.jobs[0], "STALLED"))

    trace = jobs((0, 1000, 101))
    result, heard = run(
        trace, lambda hosts, streams: Watching(hosts, streams, lambda job: "a"), FaultEvent(2.0, "a", Fault.HANG)
    )
    # The first token at 1 s, ten more in the second after it.
    assert [tokens for tokens, now in told(heard, "seen") if now in (0, 1.5, 2.5, 4.5)] == [0, 6, 11, 11]
    outcome = result.outcomes[0]
    assert (outcome.error, outcome.cut, outcome.silent, outcome.tokens) == ("STALLED", True, False, 11)


def test_decide_is_called_when_it_asks_for_it() -> None:
    class Later(Scripted):
        def arrive(self, job: Job, now: float) -> None:
            self.kept, self.wake = job, 3.25

        def decide(self, now: float) -> Iterable[Action]:
            if now == self.wake:
                self.wake = None
                return [Send(self.kept, "a")]
            return []

    result, _ = run(jobs((0, 1000, 1)), lambda hosts, streams: Later(hosts, streams, lambda job: ""))
    assert result.outcomes[0].first_at == 4.25


@pytest.mark.parametrize(
    ("nonsense", "message"),
    [
        (lambda job: [Send(job, "c")], "no host 'c'"),
        (lambda job: [Send(job, "a"), Send(job, "a")], "is on a already"),
        (lambda job: [Cancel(job, "a")], "nothing to cancel"),
        (lambda job: [GiveUp(job, "x"), Send(job, "a")], "is over"),
    ],
)
def test_nonsense_is_refused(nonsense: Callable[[Job], list[Action]], message: str) -> None:
    class Wrong(Scripted):
        def arrive(self, job: Job, now: float) -> None:
            self.todo += nonsense(job)

    with pytest.raises(PolicyError, match=message):
        run(jobs((0, 1000, 1)), lambda hosts, streams: Wrong(hosts, streams, lambda job: ""))


def test_a_policy_that_goes_round_in_circles_is_stopped() -> None:
    def make(hosts: Sequence[HostInfo], streams: Streams) -> Scripted:
        made = Scripted(hosts, streams, lambda job: "a")
        made.wake = 0.0
        return made

    with pytest.raises(PolicyError, match="in a row"):
        run(jobs((0, 1000, 1)), make)


# ------------------------------------------------------------- conservation ---

SPECS = [
    HostSpec("fast", "gpu", 5000.0, 50.0, 200.0, 8, 20_000),
    HostSpec("middle", "mac", 1000.0, 30.0, 60.0, 3, 10_000),
    HostSpec("slow", "cpu", 200.0, 10.0, 15.0, 1, 0),
]
FAULTS = st.builds(
    lambda at, host, fault, healthy: FaultEvent(at, host, fault, healthy=healthy),
    st.floats(0, 40),
    st.sampled_from([spec.id for spec in SPECS]),
    st.sampled_from(list(Fault)),
    st.booleans(),
)
TRACES = st.lists(
    st.tuples(
        st.floats(0, 30), st.integers(1, 6000), st.integers(1, 200), st.lists(st.integers(0, 9), max_size=5)
    ),
    min_size=1,
    max_size=40,
)  # fmt: skip


@settings(deadline=None, max_examples=30)
@given(TRACES, st.lists(FAULTS, max_size=6), st.sampled_from([name for name in NAMES if name != "oracle"]))
def test_every_job_ends_once(
    entries: list[tuple[float, int, int, list[int]]], faults: list[FaultEvent], policy: str
) -> None:
    trace = jobs(*((arrival, prompt, output, blocks[: prompt // 512]) for arrival, prompt, output, blocks in entries))
    result = simulate(trace, SPECS, makers(policy, 1)[policy], faults=faults, settings=Settings(client_timeout=30.0))
    assert len(result.outcomes) == len(entries)
    for outcome in result.outcomes:
        assert outcome.over and not outcome.runs
        assert outcome.job.arrival <= outcome.end_at <= outcome.job.arrival + 30.0
        if not outcome.error:
            assert outcome.tokens == trace.output_tokens[outcome.job.id]
            assert outcome.host and not outcome.cut
            assert outcome.job.arrival < outcome.first_at <= outcome.end_at
        assert not outcome.silent or outcome.cut
        assert not outcome.cut or 0 < outcome.tokens <= trace.output_tokens[outcome.job.id]
        assert 0 <= outcome.cached < outcome.job.prompt_tokens
    complete = sum(not outcome.error for outcome in result.outcomes)
    # Answers that came to their end as the client left are the host's, not the client's.
    assert complete <= sum(use.finished for use in result.hosts)
    counted = summary(result)
    assert counted.errors == pytest.approx(1 - complete / len(entries))
    assert sum(counted.kinds.values()) == len(entries) - complete
    assert counted.goodput <= 1 - counted.errors + 1e-9


@pytest.mark.parametrize("policy", [name for name in NAMES if name != "oracle"])
def test_a_seed_fixes_everything(policy: str) -> None:
    trace = jobs(*((n * 0.2, 100 + n * 37 % 900, 1 + n % 50, [n % 7]) for n in range(120)))
    faults = [FaultEvent(5.0, "fast", Fault.HANG), FaultEvent(12.0, "fast", Fault.NONE)]

    def again(seed: int) -> list[tuple[str, float, str]]:
        result = simulate(trace, SPECS, makers(policy, seed)[policy], faults=faults)
        return [(outcome.host, outcome.end_at, outcome.error) for outcome in result.outcomes]

    assert again(1) == again(1)
    if policy in ("random", "p2c"):
        assert again(1) != again(2)


def test_metrics_by_hand() -> None:
    # One in time, one whose first token is late, one slow to stream, one that fails.
    trace = jobs((0, 1000, 11), (20, 5000, 1), (40, 1000, 3), (60, 9_999_000, 1))
    result, _ = run(trace, to("a"), specs=(A,))
    counted = summary(result, Objective(ttft=1.5, ttft_per_token=0.0, tpot=0.09))
    assert counted.requests == 4
    assert counted.goodput == 0.0  # 0.1 s per token is too slow
    assert summary(result, Objective(ttft=1.5, ttft_per_token=0.0, tpot=0.15)).goodput == 0.5
    assert summary(result, Objective(ttft=1.5, ttft_per_token=0.001, tpot=0.15)).goodput == 0.75
    assert (counted.errors, counted.unanswered, counted.truncated) == (0.25, 0.25, 0.0)
    assert counted.ttft_p50 == pytest.approx(3.0)  # between 1 and 5
    assert counted.ttft_p99 == pytest.approx(5 + 0.97 * 115)  # the last counts with the time-out
    assert counted.kinds == {"timeout": 1}
