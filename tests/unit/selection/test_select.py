"""select() and explain(): verdicts, reasons, sentences, and that the two never differ."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

import control_plane.selection
from control_plane.domain.decision import DecisionRecord, RejectionReason, Verdict
from control_plane.domain.model import ModelCard, ModelName, ModelState, Price, Provider, ServerId
from control_plane.domain.request import RouteRequest
from control_plane.domain.task import Feature, TaskType
from control_plane.selection.filters import AVOIDED, PERMANENT, PRESENT, TRANSIENT, passing, permanent, present
from control_plane.selection.policy import Policy, Weights
from control_plane.selection.query import Query
from control_plane.selection.scorers import SCORERS, parts, scores
from control_plane.selection.select import explain, select
from control_plane.selection.table import CandidateRow, CandidateTable

POLICY = Policy()
LLAMA, MLX = ModelName("llama"), Provider("mlx")
MAC, GPU = ServerId("mac"), ServerId("gpu")
REQUEST = RouteRequest("r", prompt_tokens=100, max_tokens=100)
EXCLUDED_MODEL = "model llama is excluded by the request"


def card(quality: float = 0.8, **fields: object) -> ModelCard:
    base = ModelCard(LLAMA, MLX, 8192, {TaskType.CHAT: quality}, Feature.STREAMING | Feature.JSON)
    return replace(base, **fields)  # type: ignore[arg-type]


def fleet(*servers: str, **fields: object) -> CandidateTable:
    table = CandidateTable(CandidateRow(ServerId(server), card(**fields)) for server in servers)  # type: ignore[arg-type]
    for server in servers:
        table.set_server(ServerId(server), ready=True, draining=False, slots=4, used=0, waiting=0)
    return table


def reasons(record: DecisionRecord) -> list[RejectionReason]:
    return [rejection.reason for candidate in record.candidates for rejection in candidate.rejections]


def details(record: DecisionRecord) -> list[str]:
    return [rejection.detail for candidate in record.candidates for rejection in candidate.rejections]


# ------------------------------------------------------------------ choosing ---


def test_the_better_one_is_chosen() -> None:
    table = CandidateTable([CandidateRow(GPU, card(0.2)), CandidateRow(MAC, card(0.9))])
    for server in (MAC, GPU):
        table.set_server(server, ready=True, draining=False, slots=4, used=0, waiting=0)
    choice = select(Query(table, REQUEST, POLICY))
    assert (choice.verdict, table.rows[choice.row].server_id) == (Verdict.CHOSEN, MAC)
    record = explain(Query(table, REQUEST, POLICY))
    assert [candidate.server_id for candidate in record.candidates] == [MAC, GPU]
    assert record.summary.startswith("mac/mlx/llama scores 0.")
    assert ": capability 0.90, success 1.00, latency " in record.summary
    assert "; next gpu/mlx/llama 0." in record.summary


@pytest.mark.parametrize("size", range(2, 40))
def test_equals_go_to_the_least_id(size: int) -> None:
    # Many sizes: vectorised arithmetic must not round equal columns differently by their place.
    table = fleet(*(f"host-{number:02}" for number in range(size)), price=Price(0.3, 0, 0.7), ttft=0.123, tpot=0.0456)
    assert select(Query(table, REQUEST, POLICY)).row == 0


def test_taking_slots_spreads_requests() -> None:
    table = fleet("a", "b", "c")
    chosen = []
    for _ in range(12):
        choice = select(Query(table, REQUEST, POLICY))
        chosen.append(choice.row)
        table.take(choice.row)
    assert sorted(chosen) == [0] * 4 + [1] * 4 + [2] * 4
    assert select(Query(table, REQUEST, POLICY)).verdict is Verdict.WAIT
    table.give(1)
    assert select(Query(table, REQUEST, POLICY)).row == 1


def test_weights_decide() -> None:
    table = CandidateTable([CandidateRow(GPU, card(0.9, price=Price(50, 0, 50))), CandidateRow(MAC, card(0.5))])
    for server in (MAC, GPU):
        table.set_server(server, ready=True, draining=False, slots=4, used=0, waiting=0)
    by_quality = select(Query(table, REQUEST, Policy(Weights(1, 0, 0, 0, 0, 0))))
    by_price = select(Query(table, REQUEST, Policy(Weights(0, 0, 0, 1, 0, 0))))
    assert [table.rows[choice.row].server_id for choice in (by_quality, by_price)] == [GPU, MAC]


# ------------------------------------------------------------------- filters ---


@pytest.mark.parametrize(
    ("change", "reason", "detail"),
    [
        ({"model": ModelName("qwen")}, RejectionReason.MODEL_MISMATCH, "model llama is not qwen"),
        ({"provider": Provider("vllm")}, RejectionReason.PROVIDER_MISMATCH, "provider mlx is not vllm"),
        ({"server_id": GPU}, RejectionReason.SERVER_MISMATCH, "server mac is not gpu"),
        ({"task_type": TaskType.VISION}, RejectionReason.TASK_TYPE, "no capability for vision"),
        ({"prompt_tokens": 11_900}, RejectionReason.CONTEXT_TOO_SHORT, "context 8192 < 12000 needed"),
        ({"min_context_length": 8193}, RejectionReason.CONTEXT_TOO_SHORT, "context 8192 < 8193 needed"),
        (
            {"features": Feature.JSON | Feature.VISION | Feature.LOGPROBS},
            RejectionReason.FEATURE_MISSING,
            "lacks vision, logprobs",
        ),
        ({"excluded": frozenset({MAC})}, RejectionReason.EXCLUDED, "server mac is excluded by the request"),
        ({"excluded_models": frozenset({(LLAMA, None)})}, RejectionReason.EXCLUDED, EXCLUDED_MODEL),
        ({"excluded_models": frozenset({(LLAMA, MLX)})}, RejectionReason.EXCLUDED, EXCLUDED_MODEL),
    ],
)
def test_permanent_filters(change: dict[str, object], reason: RejectionReason, detail: str) -> None:
    table, request = fleet("mac"), replace(REQUEST, **change)  # type: ignore[arg-type]
    assert select(Query(table, request, POLICY)).verdict is Verdict.IMPOSSIBLE
    record = explain(Query(table, request, POLICY))
    assert (reasons(record), details(record)) == ([reason], [detail])
    assert reason.permanent
    assert record.summary == f"no server can serve this request; nearest is mac/mlx/llama: {detail}"


def test_a_price_is_too_high_from_the_first_nano_dollar_on() -> None:
    table = fleet("mac", price=Price(1.0, 0.5, 2.0))  # 100 * 1 + 100 * 2 dollars per million
    request = replace(REQUEST, max_cost_nano_usd=300_000)
    assert select(Query(table, request, POLICY)).verdict is Verdict.CHOSEN
    assert explain(Query(table, request, POLICY)).candidates[0].estimated_cost_nano_usd == 300_000
    record = explain(Query(table, replace(request, max_cost_nano_usd=299_999), POLICY))
    assert record.verdict is Verdict.IMPOSSIBLE and reasons(record) == [RejectionReason.TOO_EXPENSIVE]
    assert details(record) == ["expected to cost 0.000300 US dollars > 0.000300 allowed"]
    assert record.candidates[0].rejections[0].reason.permanent
    unbounded = replace(request, max_tokens=None)  # 256 tokens are expected
    assert select(Query(table, unbounded, POLICY)).verdict is Verdict.IMPOSSIBLE


@given(st.floats(0, 1e6), st.floats(0, 1e6), st.integers(0, 10**6), st.integers(1, 10**6), st.integers(1, 10**15))
def test_the_price_filter_agrees_with_the_estimate(
    prompt: float, completion: float, prompt_tokens: int, max_tokens: int, most: int
) -> None:
    table = fleet("mac", price=Price(prompt, 0, completion), context_length=10**7)
    request = RouteRequest("r", prompt_tokens=prompt_tokens, max_tokens=max_tokens, max_cost_nano_usd=most)
    record = explain(Query(table, request, POLICY))
    assert (record.verdict is Verdict.CHOSEN) == (record.candidates[0].estimated_cost_nano_usd <= most)


def test_other_models_and_providers_are_not_excluded() -> None:
    excluded = frozenset({(LLAMA, Provider("vllm")), (ModelName("qwen"), None)})
    assert select(Query(fleet("mac"), replace(REQUEST, excluded_models=excluded), POLICY)).verdict is Verdict.CHOSEN


def test_the_permitted_limit_passes() -> None:
    request = replace(REQUEST, prompt_tokens=8092, features=Feature.JSON, model=LLAMA, provider=MLX, server_id=MAC)
    assert select(Query(fleet("mac"), request, POLICY)).verdict is Verdict.CHOSEN


@pytest.mark.parametrize(
    ("state", "reason", "sentence"),
    [
        ({"ready": False}, RejectionReason.NOT_READY, "mac is not ready"),
        ({"draining": True}, RejectionReason.DRAINING, "mac is draining"),
        ({"used": 4}, RejectionReason.NO_FREE_SLOT, "mac has no free slot"),
        ({"breaker": True}, RejectionReason.BREAKER_OPEN, "mac is paused after failures"),
        ({"success": 0.1}, RejectionReason.AVAILABILITY, "mac fails too often"),
    ],
)
def test_transient_filters(state: dict[str, float], reason: RejectionReason, sentence: str) -> None:
    table = fleet("mac")
    server: dict[str, object] = {"ready": True, "draining": False, "slots": 4, "used": 0, "waiting": 0}
    server |= {key: value for key, value in state.items() if key in server}
    table.set_server(MAC, **server)  # type: ignore[arg-type]
    table.set_breaker(MAC, LLAMA, MLX, open=bool(state.get("breaker")))
    table.set_stats(MAC, LLAMA, MLX, success=state.get("success", 1.0), ttft=None, tpot=None)
    choice = select(Query(table, REQUEST, POLICY))
    assert choice.verdict is Verdict.WAIT
    assert choice.all_away is (reason in (RejectionReason.NOT_READY, RejectionReason.DRAINING))
    record = explain(Query(table, REQUEST, POLICY))
    assert reasons(record) == [reason]
    assert not reason.permanent
    assert record.summary == f"1 capable server, it cannot start now: {sentence}"


def test_details_have_numbers() -> None:
    table = fleet("mac")
    table.set_server(MAC, ready=True, draining=False, slots=4, used=5, waiting=0)
    table.set_stats(MAC, LLAMA, MLX, success=0.12, ttft=None, tpot=None)
    assert details(explain(Query(table, REQUEST, POLICY))) == ["success rate 0.12 < 0.20", "5 of 4 slots taken"]


# ------------------------------------------------------------------ verdicts ---


def test_an_empty_fleet() -> None:
    table = CandidateTable()
    assert select(Query(table, REQUEST, POLICY)).verdict is Verdict.IMPOSSIBLE
    assert explain(Query(table, REQUEST, POLICY)).summary == "no model server is attached"


def test_wait_counts_servers_and_names_some() -> None:
    table = fleet(*(f"h{number}" for number in range(7)))
    for server in table.spans:
        table.set_server(server, ready=True, draining=server == "h1", slots=1, used=1, waiting=0)
    summary = explain(Query(table, REQUEST, POLICY)).summary
    assert summary == (
        "7 capable servers, none can start now: h0 has no free slot, h1 is draining, h2 has no free slot, "
        "h3 has no free slot, h4 has no free slot and 2 more"
    )


def test_all_away_only_if_every_capable_one_is() -> None:
    table = fleet("gpu", "mac")
    table.set_server(MAC, ready=False, draining=False, slots=4, used=0, waiting=0)
    table.set_server(GPU, ready=True, draining=False, slots=4, used=4, waiting=0)
    assert not select(Query(table, REQUEST, POLICY)).all_away
    assert select(Query(table, replace(REQUEST, server_id=MAC), POLICY)).all_away


def test_avoided_servers_are_not_asked_again() -> None:
    table = fleet("gpu", "mac")
    assert table.rows[select(Query(table, REQUEST, POLICY, frozenset({GPU}))).row].server_id == MAC
    record = explain(Query(table, REQUEST, POLICY, frozenset({GPU})))
    assert details(record) == ["server gpu failed in an earlier attempt of this request"]


def test_when_every_capable_server_has_failed() -> None:
    table, avoid = fleet("gpu", "mac"), frozenset({GPU, MAC, ServerId("gone")})
    choice = select(Query(table, REQUEST, POLICY, avoid))
    assert (choice.verdict, choice.all_failed) == (Verdict.IMPOSSIBLE, True)
    assert explain(Query(table, REQUEST, POLICY, avoid)).summary == "every capable server has failed in this request"


def test_a_hopeless_request_has_not_failed_everywhere() -> None:
    request = replace(REQUEST, prompt_tokens=10**6)
    choice = select(Query(fleet("mac"), request, POLICY, frozenset({MAC})))
    assert (choice.verdict, choice.all_failed) == (Verdict.IMPOSSIBLE, False)


def test_waiting_for_the_ones_that_have_not_failed() -> None:
    table = fleet("gpu", "mac")
    table.set_server(MAC, ready=True, draining=False, slots=4, used=4, waiting=0)
    assert select(Query(table, REQUEST, POLICY, frozenset({GPU}))).verdict is Verdict.WAIT


def test_the_nearest_miss_lacks_least() -> None:
    rows = [
        CandidateRow(ServerId("a"), card(1.0, context_length=100, features=Feature.NONE)),
        CandidateRow(ServerId("b"), card(0.1, context_length=100)),
        CandidateRow(ServerId("c"), card(0.2, context_length=100)),
    ]
    request = replace(REQUEST, features=Feature.JSON)
    assert (
        "nearest is c/mlx/llama: context 100 < 200 needed"
        in explain(Query(CandidateTable(rows), request, POLICY)).summary
    )


# --------------------------------------------------------------- exploration ---


def test_exploring_is_bounded_and_its_propensity_is_the_frequency() -> None:
    table = fleet("a", "b", "c", "d")
    policy = Policy(exploration=0.3, exploration_margin=0.1)
    table.set_stats(ServerId("d"), ModelName("llama"), Provider("mlx"), success=0.3, ttft=None, tpot=None)
    draws = [number / 1000 for number in range(1000)]
    choices = [select(Query(table, REQUEST, policy, draw=draw)) for draw in draws]
    chosen = [choice.row for choice in choices]
    assert [chosen.count(row) for row in range(4)] == [800, 100, 100, 0]
    for choice in choices:
        assert choice.propensity == pytest.approx(0.8 if choice.row == 0 else 0.1)
        assert choice.explored == (choice.row != 0)
    record = explain(Query(table, REQUEST, policy, draw=0.15))
    assert record.explored and record.chosen is not None and record.chosen.server_id == "b"
    assert record.propensity == pytest.approx(0.1) and "explor" in record.summary
    alone = select(Query(fleet("a"), REQUEST, policy, draw=0.0))
    assert (alone.propensity, alone.explored) == (1.0, False)


# ------------------------------------------------------------------ property ---

servers = st.sampled_from([ServerId(name) for name in "abcd"])
models = st.sampled_from([ModelName("m1"), ModelName("m2")])
providers = st.sampled_from([Provider("p1"), Provider("p2")])
features = st.integers(0, 3).map(lambda bits: Feature(bits << 3))
tasks = st.sampled_from([TaskType.CHAT, TaskType.VISION])
units = st.sampled_from([0.0, 0.19, 0.2, 0.5, 1.0])


@st.composite
def tables(draw: st.DrawFn) -> CandidateTable:
    keys = draw(st.sets(st.tuples(servers, models, providers), max_size=8))
    table = CandidateTable(
        CandidateRow(
            server,
            ModelCard(
                model,
                provider,
                draw(st.sampled_from([100, 200])),
                draw(st.dictionaries(tasks, units)),
                draw(features),
                Price(draw(units), 0.0, draw(units)),
                state=draw(st.sampled_from(ModelState)),
                load_time=draw(st.none() | units),
            ),
        )
        for server, model, provider in keys
    )
    for server in table.spans:
        table.set_server(
            server,
            ready=draw(st.booleans()),
            draining=draw(st.integers(0, 4)) == 0,
            slots=draw(st.integers(0, 3)),
            used=draw(st.integers(0, 3)),
            waiting=draw(st.integers(0, 2)),
        )
    for server, model, provider in keys:
        table.set_breaker(server, model, provider, open=draw(st.integers(0, 4)) == 0)
        table.set_stats(server, model, provider, success=draw(units), ttft=draw(st.none() | units), tpot=None)
    return table


requests = st.builds(
    RouteRequest,
    request_id=st.just("r"),
    task_type=tasks,
    prompt_tokens=st.sampled_from([10, 100, 150]),
    max_tokens=st.none() | st.just(50),
    model=st.none() | models,
    provider=st.none() | providers,
    server_id=st.none() | servers,
    excluded=st.frozensets(servers, max_size=2),
    features=features,
)


@given(tables(), requests, st.frozensets(servers, max_size=2), st.integers(0, 3))
def test_an_explanation_never_differs_from_the_choice(
    table: CandidateTable, request: RouteRequest, avoid: frozenset[ServerId], queued: int
) -> None:
    choice = select(Query(table, request, POLICY, avoid, queued))
    record = explain(Query(table, request, POLICY, avoid, queued))
    assert record.verdict is choice.verdict
    assert record.summary
    assert len(record.candidates) == len(table)
    eligible = [candidate for candidate in record.candidates if not candidate.rejections]
    rejected = record.candidates[len(eligible) :]
    assert all(candidate.rejections for candidate in rejected)
    assert eligible == sorted(eligible, key=lambda c: (-c.score, c.server_id, c.model, c.provider))
    assert list(rejected) == sorted(rejected, key=lambda c: (c.server_id, c.model, c.provider))
    only_transient = [c for c in rejected if not any(r.reason.permanent for r in c.rejections)]
    if choice.verdict is Verdict.CHOSEN:
        row = table.rows[choice.row]
        assert record.chosen == eligible[0]
        assert (eligible[0].server_id, eligible[0].model, eligible[0].provider) == (
            row.server_id,
            row.card.name,
            row.card.provider,
        )
    else:
        assert record.chosen is None and choice.row == -1 and not eligible
        assert (choice.verdict is Verdict.WAIT) == bool(only_transient)
        away = ("is not live", "is draining", "is absent", "has failed")
        assert choice.all_away == (
            bool(only_transient)
            and all(any(words in r.detail for words in away for r in c.rejections) for c in only_transient)
        )
    for candidate in record.candidates:
        weight = sum(part.weight for part in candidate.parts)
        mean = sum(part.weight * part.value for part in candidate.parts) / weight
        assert candidate.score == pytest.approx(mean)


@given(tables(), st.lists(requests, min_size=2, max_size=3), st.lists(st.tuples(st.booleans(), models, tasks, units)))
def test_what_is_kept_or_combined_is_what_it_is_made_of(
    table: CandidateTable, asked: list[RouteRequest], changes: list[tuple[bool, ModelName, TaskType, float]]
) -> None:
    for number, (grow, model, task, share) in enumerate(changes):
        if len(table):
            (table.give if grow else table.take)(number % len(table))
        if table.knows_model(model):
            table.set_good(model, task, share)
        for request in asked:
            scores(Query(table, request, POLICY))  # so that something is kept
    dear = Policy(Weights(cost=9.0), provider_preference={Provider("p1"): 0.1})
    for request, policy in product(asked, (POLICY, dear)):
        query = Query(table, request, policy)
        assert permanent(query).tolist() == passing(PERMANENT, query).tolist()
        assert present(query).tolist() == passing(PRESENT, query).tolist()
        shares = np.array([getattr(policy.shares, name) for name, _ in SCORERS])
        assert scores(query)[0] == pytest.approx(shares @ parts(query))
    assert table.emptiness.tolist() == [
        min(1.0, max(0.0, (free - waiting) / max(slots, 1)))
        for free, waiting, slots in zip(table.free, table.waiting, table.slots, strict=True)
    ]
    for task, column in table.quality.items():
        assert column.tolist() == (table.capability[task] * table.good.get(task, np.ones(len(table)))).tolist()


@given(tables(), requests)
def test_selecting_changes_nothing(table: CandidateTable, request: RouteRequest) -> None:
    assert select(Query(table, request, POLICY)) == select(Query(table, request, POLICY))
    assert explain(Query(table, request, POLICY)) == explain(Query(table, request, POLICY))


# ---------------------------------------------------------------------- docs ---


def test_the_readme_has_every_policy() -> None:
    readme = Path(control_plane.selection.__path__[0], "README.md").read_text(encoding="utf-8")
    settings = [name for name, field in Policy.__dataclass_fields__.items() if field.init]
    filters = [condition.reason.name for condition in (*PERMANENT, *AVOIDED, *TRANSIENT)]
    for name in (*settings, *filters, *(name for name, _ in SCORERS), *(reason.name for reason in RejectionReason)):
        assert f"`{name}`" in readme, name
