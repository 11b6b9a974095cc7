"""Load here, queue there, or use another; and models that are not here at all."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from control_plane.domain.decision import DecisionRecord, RejectionReason, ScoredCandidate, Verdict
from control_plane.domain.model import ModelCard, ModelName, ModelState, Price, Provider, ServerId
from control_plane.domain.request import RouteRequest
from control_plane.domain.task import TaskType
from control_plane.selection.policy import Policy
from control_plane.selection.query import Query
from control_plane.selection.select import explain, select
from control_plane.selection.table import CandidateRow, CandidateTable

POLICY = Policy(ttft_prior_s=1.0, tpot_prior_s=0.0, load_time_prior_s=10.0)
REQUEST = RouteRequest("r", prompt_tokens=100, max_tokens=100)
LLAMA, SIM = ModelName("llama"), Provider("sim")
COLD, WARM, LOADING = ModelState.COLD, ModelState.WARM, ModelState.LOADING


def card(state: ModelState, load_time: float | None = None, **fields: object) -> ModelCard:
    return ModelCard(LLAMA, SIM, 8192, {TaskType.CHAT: 0.8}, state=state, load_time=load_time, **fields)  # type: ignore[arg-type]


def fleet(**cards: ModelCard) -> CandidateTable:
    """A server with two free slots per card."""
    table = CandidateTable(CandidateRow(ServerId(name), model) for name, model in cards.items())
    for name in cards:
        server(table, name)
    return table


def server(table: CandidateTable, name: str, **changes: object) -> None:
    state = {"ready": True, "draining": False, "slots": 2, "used": 0, "waiting": 0, **changes}
    table.set_server(ServerId(name), **state)  # type: ignore[arg-type]


def served_in(table: CandidateTable, name: str, service: float) -> None:
    table.set_stats(ServerId(name), LLAMA, SIM, success=1.0, ttft=None, tpot=None, service=service)


def chosen(table: CandidateTable, request: RouteRequest = REQUEST, queued: int = 0) -> str:
    choice = select(Query(table, request, POLICY, queued=queued))
    return table.rows[choice.row].server_id if choice.verdict is Verdict.CHOSEN else choice.verdict.name


def candidate(record: DecisionRecord, name: str) -> ScoredCandidate:
    return next(found for found in record.candidates if found.server_id == name)


def words(table: CandidateTable, name: str, queued: int = 0) -> list[tuple[RejectionReason, str]]:
    record = explain(Query(table, REQUEST, POLICY, queued=queued))
    return [(rejection.reason, rejection.detail) for rejection in candidate(record, name).rejections]


# ------------------------------------------------------------------ the rule ---


def test_a_warm_model_with_a_free_slot_is_used() -> None:
    table = fleet(a=card(COLD, 12.0), b=card(WARM))
    assert chosen(table) == "b"
    assert words(table, "a") == [
        (RejectionReason.LOADING_TAKES_LONGER, "loading takes about 12.0 s; b/llama can start it now")
    ]


def test_the_request_waits_where_a_slot_is_free_sooner() -> None:
    table = fleet(cold=card(COLD, 12.0), gpu=card(WARM))
    server(table, "gpu", used=2)
    served_in(table, "gpu", 6.2)
    assert chosen(table) == "WAIT"
    told = "loading takes about 12.0 s; gpu/llama is expected to start it in 3.1 s"
    assert words(table, "cold") == [(RejectionReason.LOADING_TAKES_LONGER, told)]
    assert words(table, "gpu") == [(RejectionReason.NO_FREE_SLOT, "2 of 2 slots taken")]
    assert "cold would have to load the model" in explain(Query(table, REQUEST, POLICY)).summary


def test_it_is_loaded_where_the_others_take_longer() -> None:
    table = fleet(cold=card(COLD, 12.0), gpu=card(WARM))
    server(table, "gpu", used=2, waiting=1)
    served_in(table, "gpu", 12.0)
    assert chosen(table) == "cold", "(1 + 1) / 2 * 12 s: not sooner"
    served_in(table, "gpu", 11.9)
    assert chosen(table) == "WAIT"
    served_in(table, "gpu", 12.5)
    assert chosen(table) == "cold"
    assert words(table, "cold") == []


def test_a_tie_does_not_reject() -> None:
    table = fleet(cold=card(COLD, 12.0), gpu=card(WARM))
    server(table, "gpu", used=2)
    served_in(table, "gpu", 24.0)
    assert chosen(table) == "cold"


def test_a_long_queue_is_what_another_one_is_loaded_for() -> None:
    table = fleet(cold=card(COLD, 12.0), gpu=card(WARM))
    server(table, "gpu", used=2)
    served_in(table, "gpu", 2.0)
    assert chosen(table, queued=10) == "WAIT"
    assert chosen(table, queued=12) == "cold"


def test_priors_where_nothing_is_known() -> None:
    table = fleet(cold=card(COLD), gpu=card(WARM))
    server(table, "gpu", used=2, waiting=17)
    assert words(table, "cold") == [
        (
            RejectionReason.LOADING_TAKES_LONGER,
            "loading takes about 10.0 s; gpu/llama is expected to start it in 9.0 s",
        )
    ], "the prior of a load; (17 + 1) / 2 * 1 s, the prior of a request"
    server(table, "gpu", used=2, waiting=19)
    assert chosen(table) == "cold"


def test_the_measured_service_time_goes_before_the_expected_one() -> None:
    table = fleet(cold=card(COLD, 3.0), gpu=card(WARM))
    server(table, "gpu", used=2)
    assert chosen(table) == "WAIT"
    served_in(table, "gpu", 60.0)
    assert chosen(table) == "cold"


@pytest.mark.parametrize("away", ["ready", "draining", "breaker", "success", "failed"])
def test_who_is_not_present_outruns_nobody(away: str) -> None:
    gpu = card(ModelState.FAILED if away == "failed" else WARM)
    table = fleet(cold=card(COLD, 12.0), gpu=gpu)
    if away == "ready":
        server(table, "gpu", ready=False)
    elif away == "draining":
        server(table, "gpu", draining=True)
    elif away == "breaker":
        table.set_breaker(ServerId("gpu"), LLAMA, SIM, open=True)
    elif away == "success":
        table.set_stats(ServerId("gpu"), LLAMA, SIM, success=0.1, ttft=None, tpot=None)
    assert chosen(table) == "cold"


def test_who_cannot_serve_the_request_outruns_nobody() -> None:
    table = fleet(cold=card(COLD, 12.0), gpu=card(WARM))
    assert chosen(table, RouteRequest("r", server_id=ServerId("cold"))) == "cold"
    assert chosen(table, RouteRequest("r", excluded=frozenset({ServerId("gpu")}))) == "cold"
    assert select(Query(table, REQUEST, POLICY, frozenset({ServerId("gpu")}))).verdict is Verdict.CHOSEN


def test_of_cold_ones_the_sooner_loaded_wins_and_loading_counts_as_cold() -> None:
    table = fleet(a=card(COLD, 30.0), b=card(COLD, 2.0), c=card(COLD))
    assert chosen(table) == "b"
    parts = {
        found.server_id: next(part.value for part in found.parts if part.scorer == "latency")
        for found in explain(Query(table, REQUEST, POLICY)).candidates
    }
    promptness = {"a": 5 / 36, "b": 5 / 8, "c": 5 / 16}
    assert all(0.3 * value < parts[name] < 0.3 * value + 0.7 for name, value in promptness.items())
    assert parts["b"] > parts["c"] > parts["a"]
    table = fleet(a=card(LOADING, 30.0), b=card(WARM))
    assert chosen(table) == "b"


# ------------------------------------------------------------------ not here ---


@pytest.mark.parametrize(
    ("state", "said", "told", "away"),
    [
        (ModelState.ABSENT, "", "the model is absent", True),
        (ModelState.PULLING, "40 %", "the model is still pulling: 40 %", False),
        (ModelState.FAILED, "no token for 30 s", "the model has failed: no token for 30 s", True),
    ],
)
def test_models_that_are_not_here_get_nothing(state: ModelState, said: str, told: str, away: bool) -> None:
    table = fleet(a=card(state, state_detail=said))
    choice = select(Query(table, REQUEST, POLICY))
    assert (choice.verdict, choice.all_away) == (Verdict.WAIT, away)
    assert words(table, "a") == [(RejectionReason.MODEL_NOT_HERE, told)]
    assert explain(Query(table, REQUEST, POLICY)).summary == f"1 capable server, it cannot start now: a: {told}"
    assert not RejectionReason.MODEL_NOT_HERE.permanent
    table = fleet(a=card(state), b=card(COLD, 100.0))
    assert chosen(table) == "b"


# ---------------------------------------------------------------------- cost ---


def test_the_expected_price_is_told() -> None:
    table = fleet(a=card(WARM, price=Price(1.0, 0.0, 3.0)), b=card(WARM))
    costs = {
        found.server_id: found.estimated_cost_nano_usd for found in explain(Query(table, REQUEST, POLICY)).candidates
    }
    assert costs == {"a": 100 * 1_000 + 100 * 3_000, "b": 0}
    open_end = explain(Query(table, RouteRequest("r", prompt_tokens=100), POLICY))
    assert candidate(open_end, "a").estimated_cost_nano_usd == 100 * 1_000 + 256 * 3_000


# ---------------------------------------------------------------- properties ---

times = st.sampled_from([0.0, 0.5, 1.0, 9.9, 10.0, 60.0, math.nan])


@st.composite
def fleets(draw: st.DrawFn) -> CandidateTable:
    names = draw(st.lists(st.sampled_from("abcdef"), unique=True, min_size=1, max_size=6))
    table = fleet(
        **{
            name: card(draw(st.sampled_from(ModelState)), draw(st.none() | st.floats(0, 100)), ttft=draw(times))
            for name in names
        }
    )
    for name in names:
        server(
            table,
            name,
            ready=draw(st.integers(0, 4)) > 0,
            draining=draw(st.integers(0, 4)) == 0,
            slots=draw(st.integers(1, 3)),
            used=draw(st.integers(0, 4)),
            waiting=draw(st.integers(0, 5)),
        )
        served_in(table, name, draw(times))
        table.set_breaker(ServerId(name), LLAMA, SIM, open=draw(st.integers(0, 4)) == 0)
    return table


def start_on(table: CandidateTable, row: int, queued: int) -> float:
    """Seconds until a warm row starts the request, written out once more."""
    if table.free[row] > 0:
        return 0.0
    ttft = float(table.ttft[row])
    service = float(table.service[row])
    expected = POLICY.ttft_prior_s if math.isnan(ttft) else ttft
    waiting = int(table.waiting[row]) + queued
    return (waiting + 1) / int(table.slots[row]) * (expected if math.isnan(service) else service)


@given(fleets(), st.integers(0, 20))
def test_a_cold_model_is_rejected_only_in_favour_of_one_that_starts_sooner(table: CandidateTable, queued: int) -> None:
    record = explain(Query(table, REQUEST, POLICY, queued=queued))
    warm = [
        row
        for row, each in enumerate(table.rows)
        if each.card.state is WARM and table.ready[row] and not table.draining[row] and not table.breaker_open[row]
    ]
    soonest = min((start_on(table, row, queued) for row in warm), default=math.inf)
    for each in table.rows:
        reasons = {rejection.reason for rejection in candidate(record, each.server_id).rejections}
        outrun = RejectionReason.LOADING_TAKES_LONGER in reasons
        if each.card.state in (COLD, LOADING):
            load = POLICY.load_time_prior_s if each.card.load_time is None else each.card.load_time
            assert outrun == (soonest < load)
        else:
            assert not outrun
    # So a request never waits for nothing: whoever could start it now is passed over for one that starts it soon.
    could = [c for c in record.candidates if {r.reason for r in c.rejections} <= {RejectionReason.LOADING_TAKES_LONGER}]
    if could and not warm:
        assert record.verdict is Verdict.CHOSEN


@given(fleets())
def test_the_only_capable_one_is_never_rejected_for_another(table: CandidateTable) -> None:
    for each in table.rows:
        pinned = RouteRequest("r", server_id=each.server_id)
        reasons = {r.reason for r in candidate(explain(Query(table, pinned, POLICY)), each.server_id).rejections}
        assert RejectionReason.LOADING_TAKES_LONGER not in reasons
