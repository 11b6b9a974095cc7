"""modelyard's own policy in the simulator: the control plane's code, judged by the harness."""

from __future__ import annotations

import random

import pytest

from control_plane.simulation.engine import Fault
from control_plane.simulation.fleet import fleet
from control_plane.simulation.harness import FaultEvent, Result, simulate
from control_plane.simulation.metrics import summary
from control_plane.simulation.policies import makers
from control_plane.simulation.traces import Job, Trace, trace

FLEET = fleet("yardstick").hosts


def workload(count: int = 400, rate: float = 1.2, seed: int = 1) -> Trace:
    """Prompts from a few words to many pages, some of which begin alike."""
    draw = random.Random(seed)
    jobs, now = [], 0.0
    for number in range(count):
        now += draw.expovariate(rate)
        prompt = int(min(60_000, draw.lognormvariate(8.0, 1.6))) + 10
        family = draw.randrange(40)
        blocks = tuple(
            family * 1000 + index if index < 6 else number * 10_000 + index for index in range(prompt // 512)
        )
        jobs.append((Job(number, now, prompt, blocks), draw.randrange(2, 200)))
    return trace("made up", jobs)


def run(policy: str, work: Trace, faults: tuple[FaultEvent, ...] = ()) -> Result:
    return simulate(work, FLEET, makers(policy, 0)[policy], faults=faults)


def test_it_beats_what_knows_less() -> None:
    work = workload()
    ours = summary(run("modelyard", work)).goodput
    for baseline in ("least_inflight", "smg_least_load", "round_robin"):
        assert ours > summary(run(baseline, work)).goodput, baseline


def test_more_than_can_be_served_well_leaves_nearly_as_many_served_well_as_can_be() -> None:
    work = workload(rate=5.0)
    ours = summary(run("modelyard", work)).goodput
    assert 0.9 * summary(run("oracle_late_earliest", work)).goodput < ours
    assert ours > 1.3 * summary(run("smg_least_load", work)).goodput


def test_the_same_run_twice() -> None:
    work = workload(100)
    first, second = run("modelyard", work), run("modelyard", work)
    assert [(o.host, o.first_at, o.end_at) for o in first.outcomes] == [
        (o.host, o.first_at, o.end_at) for o in second.outcomes
    ]


@pytest.mark.parametrize("fault", [Fault.REFUSE, Fault.HTTP500, Fault.HANG])
def test_a_host_that_fails_before_the_first_token_costs_no_client_its_answer(fault: Fault) -> None:
    work = workload(150, rate=0.5)
    broken = FaultEvent(work.jobs[75].arrival, FLEET[0].id, fault)
    result = run("modelyard", work, (broken,))
    streaming = [o for o in result.outcomes if o.host == FLEET[0].id and o.first_at < broken.at < o.end_at]
    failed = [o for o in result.outcomes if o.error and o not in streaming]
    assert not failed


def test_a_host_that_cuts_streams_cuts_none_that_was_sent_after_the_first_was_seen() -> None:
    work = workload(300, rate=1.5)
    fault = FaultEvent(work.jobs[100].arrival, FLEET[0].id, Fault.RESET)
    result = run("modelyard", work, (fault,))
    cut = [outcome for outcome in result.outcomes if outcome.cut]
    assert cut and {outcome.host for outcome in cut} == {FLEET[0].id}
    first = min(outcome.end_at for outcome in cut)
    assert all(outcome.job.arrival <= first for outcome in cut)
    errors = [outcome for outcome in result.outcomes if outcome.error and not outcome.cut]
    assert not errors


def unanswered(result: Result) -> int:
    return sum(not outcome.host for outcome in result.outcomes)


def test_who_is_late_does_not_wait_for_a_fast_host_until_its_client_leaves() -> None:
    """The fast host that is left has enough to do with prompts that nobody else can serve in time, and long ones give
    way to them again and again; a slow one would need a minute for those, and is free."""
    before = workload(200)
    start = before.span + 60.0
    jobs = [(job, before.output_tokens[job.id]) for job in before.jobs]
    jobs += [(Job(0, start + 1.52 * number, 15_000 + number, None), 5) for number in range(250)]
    jobs += [(Job(0, start + 20.0 * number, 40_000 + number, None), 5) for number in range(19)]
    gone = FaultEvent(start - 5.0, FLEET[1].id, Fault.GONE, healthy=False)
    assert unanswered(run("modelyard", trace("long ones give way", jobs), (gone,))) <= 1


def test_where_all_are_slow_a_request_is_not_taken_from_each_half_way() -> None:
    """Little is known, the one fast host becomes slow, and every prompt takes 40 s and more wherever it is."""
    jobs = [(Job(0, 4.0 * number, 40_000 + 50 * number, None), 5) for number in range(60)]
    gone = FaultEvent(0.5, FLEET[1].id, Fault.GONE, healthy=False)
    slow = FaultEvent(60.0, FLEET[0].id, Fault.SLOWDOWN)
    work, faults = trace("long", jobs), (gone, slow)
    assert unanswered(run("modelyard", work, faults)) <= 1.6 * unanswered(run("oracle_late_slack", work, faults))


def test_a_stream_that_is_cut_is_told() -> None:
    work = workload(150, rate=1.0)
    result = run("modelyard", work, (FaultEvent(work.jobs[75].arrival, FLEET[0].id, Fault.RESET),))
    assert not any(outcome.silent for outcome in result.outcomes)
