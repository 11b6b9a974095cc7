from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from control_plane.domain.model import ModelName, Provider, ServerId
from control_plane.domain.request import RouteRequest
from control_plane.domain.server import Failed
from control_plane.domain.task import Feature, Priority, TaskType
from control_plane.scheduling.retry import RetryPolicy
from control_plane.tasks import lanes
from control_plane.tasks.lanes import Failure
from control_plane.tasks.model import Claim, Lane, Placement, TaskId, TaskRecord, TaskState, Tenant

names = st.text(min_size=1, max_size=6)
models = st.frozensets(st.tuples(names.map(ModelName), st.none() | names.map(Provider)), max_size=3)
failed = st.frozensets(st.builds(Failed, names.map(ServerId), st.text(max_size=4)), max_size=3)
tokens = st.integers(0, 2**24)
routes = st.builds(
    RouteRequest,
    st.just(""),
    task_type=st.sampled_from(TaskType),
    priority=st.sampled_from(Priority),
    prompt_tokens=tokens,
    max_tokens=st.none() | st.integers(1, 2**24),
    model=st.none() | names,
    provider=st.none() | names,
    server_id=st.none() | names,
    excluded=st.frozensets(names, max_size=3),
    excluded_models=models,
    max_cost_nano_usd=st.integers(0, 2**63 - 1),
    min_context_length=tokens,
    features=st.sampled_from([Feature.NONE, Feature.JSON, Feature.VISION | Feature.LOGPROBS]),
    labels=st.dictionaries(names, names, max_size=3).map(lambda labels: tuple(sorted(labels.items()))),
    preset=st.text(max_size=5),
)
all_lanes = st.builds(
    lambda tenant, route, unfit, avoided, spent: Lane(
        Tenant(tenant), route.priority, replace(route, tenant=tenant), unfit, avoided, spent
    ),
    names, routes, failed, failed, models,
)  # fmt: skip


# ------------------------------------------------------------------- needs ---


@given(routes)
def test_rounding_is_upwards_and_never_beyond_a_power_of_two(route: RouteRequest) -> None:
    rounded = lanes.rounded(route)
    assert rounded.context_needed >= route.context_needed
    power = 1 << (route.context_needed - 1).bit_length()
    assert rounded.context_needed <= power
    assert rounded.context_needed <= max(route.context_needed * 1.25 + 1, route.min_context_length)
    assert lanes.rounded(rounded) == rounded
    assert replace(rounded, prompt_tokens=0) == replace(route, prompt_tokens=0), "nothing else changes"


@given(routes)
def test_the_least_that_a_rounded_task_may_need_is_no_more_than_it_needs(route: RouteRequest) -> None:
    assert lanes.least(lanes.rounded(route)).context_needed <= route.context_needed


def test_an_octave_has_four_steps() -> None:
    assert sorted({lanes.quarter_octave(n) for n in range(1025, 4097)}) == [
        1280, 1536, 1792, 2048, 2560, 3072, 3584, 4096,
    ]  # fmt: skip


# -------------------------------------------------------------------- JSON ---


@given(all_lanes)
def test_json_and_back(lane: Lane) -> None:
    text = lanes.to_json(lane)
    assert lanes.from_json(text) == lane
    assert lanes.to_json(lanes.from_json(text)) == text


@given(all_lanes, all_lanes)
def test_equal_lanes_have_equal_texts_and_others_do_not(one: Lane, other: Lane) -> None:
    assert (lanes.to_json(one) == lanes.to_json(other)) == (one == other)


@given(all_lanes, st.randoms())
def test_the_order_of_sets_does_not_show(lane: Lane, random) -> None:
    shuffled = list(lane.unfit)
    random.shuffle(shuffled)
    assert lanes.to_json(replace(lane, unfit=frozenset(shuffled))) == lanes.to_json(lane)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"tenant":"t"}', '{"tenant":"t","priority":9,"task_type":1}', "null"]
)
def test_what_is_no_lane_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        lanes.from_json(text)


def test_a_lane_of_a_later_version_is_refused_by_name() -> None:
    facts = json.loads(lanes.to_json(lanes.lane_of(Tenant("t"), RouteRequest("r"))))
    with pytest.raises(ValueError, match="colour"):
        lanes.from_json(json.dumps({**facts, "colour": "red"}))


# ----------------------------------------------------------------- urgency ---

seconds = st.floats(0, 1e6)


@given(st.sampled_from(Priority), seconds, seconds, st.floats(0.1, 1e4))
def test_waiting_only_raises_the_class_and_at_the_time_foretold(
    priority: Priority, oldest: float, waited: float, ageing: float
) -> None:
    now = oldest + waited
    current = lanes.effective_class(priority, oldest, now, ageing)
    assert current >= priority
    change = lanes.next_class_at(priority, oldest, now, ageing)
    if change is None:
        assert current is Priority.CRITICAL
    else:
        slack = 1e-6 * (1 + abs(change))
        assert lanes.effective_class(priority, oldest, change + slack, ageing) > current
        if change - slack > now:
            assert lanes.effective_class(priority, oldest, change - slack, ageing) == current


@given(st.sampled_from(Priority), seconds, st.floats(0.1, 1e4))
def test_everything_becomes_critical(priority: Priority, oldest: float, ageing: float) -> None:
    assert lanes.effective_class(priority, oldest, oldest + 3.001 * ageing, ageing) is Priority.CRITICAL


# ---------------------------------------------------------------- failures ---

POLICY = RetryPolicy(base=1.0, factor=2.0, cap=60.0)
LANE = lanes.lane_of(Tenant("t"), RouteRequest("r", prompt_tokens=100))
PLACE = Placement(ServerId("a"), "1", ModelName("m"), Provider("p"))
FINAL = ("INVALID_REQUEST", "SLOW_READER")
REPEATABLE = ("ENGINE_FAILED", "SERVERS_AWAY", "SERVER_BUSY", "DEADLINE_EXCEEDED", "INTERNAL")
STANDING = ("RATE_LIMITED", "OUT_OF_MEMORY", "DRAINING", "UNKNOWN_MODEL", "CREDENTIALS_REJECTED")
UNSUITED = ("CONTEXT_TOO_LONG", "UNSUPPORTED", "CONTENT_REFUSED")


def claim(lane: Lane = LANE, failures: int = 0, past=(), **fields) -> Claim:
    record = TaskRecord(
        TaskId("1"), Tenant("t"), TaskState.SCHEDULED, Priority.NORMAL, TaskType.CHAT, "", "", 1, failures + 1,
        failures, 5, 0.0, 0.0, **fields,
    )  # fmt: skip
    return Claim(record, b"", lane, tuple((ServerId(server), ModelName(m), reason) for server, m, reason in past))


def retry(one: Claim, reason: str, others: bool = True, jitter: float = 1.0, retry_after: float | None = None):
    return lanes.retry_of(one, PLACE, Failure(reason, "", retry_after), others, POLICY, 100.0, jitter)


@pytest.mark.parametrize("reason", FINAL)
def test_a_permanent_error_is_final(reason: str) -> None:
    assert retry(claim(), reason) is None


@pytest.mark.parametrize("reason", REPEATABLE)
def test_who_failed_may_do_another_time(reason: str) -> None:
    again = retry(claim(), reason, others=False)
    assert again is not None
    assert again.lane.failed == {Failed(ServerId("a"), "1")} and not again.lane.unfit
    assert list(lanes.avoidances(again.lane))[1] == (LANE.route, frozenset())


@pytest.mark.parametrize("reason", STANDING)
def test_who_would_say_the_same_is_not_asked_again(reason: str) -> None:
    again = retry(claim(), reason)
    assert again is not None
    assert all(Failed(ServerId("a"), "1") in avoided for _, avoided in lanes.avoidances(again.lane))


@pytest.mark.parametrize("reason", UNSUITED)
def test_what_does_not_suit_one_model_is_tried_with_another_or_given_up(reason: str) -> None:
    assert retry(claim(), reason, others=False) is None
    again = retry(claim(), reason)
    assert again is not None
    strictest, _ = next(lanes.avoidances(again.lane))
    assert strictest.excluded_models == {("m", "p")}


def test_a_model_that_failed_on_two_servers_is_avoided_while_there_are_others() -> None:
    again = retry(claim(past=[("b", "m", "ENGINE_FAILED")], failures=1), "ENGINE_FAILED")
    assert again is not None
    strictest, then, *_ = lanes.avoidances(again.lane)
    assert strictest[0].excluded_models == {("m", None)} and then[0].excluded_models == frozenset()
    same_server = retry(claim(past=[("a", "m", "ENGINE_FAILED")], failures=1), "ENGINE_FAILED")
    assert same_server is not None and not same_server.lane.avoided_models


def test_attempts_are_counted() -> None:
    assert retry(claim(failures=3), "ENGINE_FAILED") is not None
    assert retry(claim(failures=4), "ENGINE_FAILED") is None


@given(st.integers(0, 3), st.floats(0, 1))
def test_pauses_grow_and_stay_in_their_bounds(failures: int, jitter: float) -> None:
    again = retry(claim(failures=failures), "ENGINE_FAILED", jitter=jitter)
    assert again is not None
    longest = 2.0**failures
    assert longest / 2 <= again.ready_at - 100.0 <= longest


def test_a_server_says_when_it_can_be_asked_again() -> None:
    again = retry(claim(), "RATE_LIMITED", retry_after=20.0)
    assert again is not None and again.ready_at == 120.0
    again = retry(claim(), "RATE_LIMITED", retry_after=1e9)
    assert again is not None and again.ready_at == 160.0, "but not for ever"


def test_there_is_no_retry_beyond_the_deadline() -> None:
    assert retry(claim(deadline=100.5), "ENGINE_FAILED") is None
    assert retry(claim(deadline=101.5), "ENGINE_FAILED") is not None


@given(all_lanes)
def test_the_first_choice_avoids_most_and_the_last_only_whom_it_must(lane: Lane) -> None:
    choices = list(lanes.avoidances(lane))
    assert choices[0][1] == lane.unfit | lane.failed
    assert lane.avoided_models <= choices[0][0].excluded_models
    assert choices[-1][0].excluded_models == lane.route.excluded_models
    assert all(lane.unfit <= avoided for _, avoided in choices)
    assert len(choices) == len(set(choices))
