"""TaskRouter: who gets a task and why, what is learned, and that memory is bounded."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from control_plane.domain.agent import (
    AgentCandidate,
    AgentId,
    AgentSpec,
    AgentTask,
    AssignmentOutcome,
    CandidateRejectionReason,
    Need,
    RoutingDecision,
    Skill,
    SkillNeed,
    Tally,
    contributions,
)
from control_plane.domain.errors import DomainError
from control_plane.domain.task import TaskType
from control_plane.routing.experience import Experience, in_kind, paces, reliability
from control_plane.routing.policy import RoutePolicy
from control_plane.routing.router import TaskRouter

T = "team"
CHAT = AgentTask(Need(task_type=TaskType.CHAT))
SUCCESS, FAILURE, EXPIRED = AssignmentOutcome
DAY = 86400.0


def spec(id: str, *skills: str, **more: Any) -> AgentSpec:
    return AgentSpec(AgentId(id), skills=tuple(Skill(name) for name in skills), **more)


def router(*specs: AgentSpec, ttl: float = 1e9, **policy: Any) -> TaskRouter:
    made = TaskRouter(RoutePolicy(**policy))
    for one in specs:
        made.register(T, one, ttl, 0.0)
    return made


def learn(made: TaskRouter, id: str, *successes: float, kind: int = 1, seconds: float | None = None, now: float = 0.0):
    for success in successes:
        made.experience.add((T, AgentId(id)), kind, success, seconds, now)


def chosen(made: TaskRouter, task: AgentTask = CHAT, now: float = 0.0) -> str | None:
    return made.decide(T, task, now).agent_id


def reserve(made: TaskRouter, id: str, name: str, task: AgentTask = CHAT, timeout: float = 100.0, now: float = 0.0):
    return made.reserve(T, AgentId(id), task, name, timeout, now)


def candidate(decision: RoutingDecision, id: str) -> AgentCandidate:
    (found,) = [one for one in decision.candidates if one.id == id]
    return found


def term(decision: RoutingDecision, id: str, name: str) -> float:
    (found,) = [one for one in candidate(decision, id).terms if one.name == name]
    return found.value


# ---------------------------------------------------------------- properties ---

IDS = ("a", "b", "c", "d")
SKILLS = ("python", "sql", "translation")
outcomes = st.lists(
    st.tuples(st.sampled_from(IDS), st.sampled_from([0, 1, 2]), st.floats(0, 1), st.none() | st.floats(0.01, 1e4)),
    max_size=25,
)
worlds = st.builds(
    lambda agents, outcomes: (agents, outcomes),
    st.lists(
        st.builds(
            lambda id, skills, places, kinds: AgentSpec(
                AgentId(id), "does " + id, tuple(skills), frozenset(kinds), places
            ),
            st.sampled_from(IDS),
            st.lists(
                st.builds(Skill, st.sampled_from(SKILLS), st.floats(0, 1)), max_size=3, unique_by=lambda s: s.name
            ),
            st.integers(1, 3),
            st.lists(st.sampled_from([TaskType.CHAT, TaskType.REASONING]), max_size=2),
        ),
        min_size=1,
        max_size=4,
        unique_by=lambda spec: spec.id,
    ),
    outcomes,
)
tasks = st.builds(
    lambda skills, kind, text: AgentTask(Need(text, tuple(skills), kind)),
    st.lists(st.builds(SkillNeed, st.sampled_from(SKILLS), st.floats(0, 0.5)), max_size=2),
    st.none() | st.just(TaskType.CHAT),
    st.sampled_from(["", "does a little python"]),
)


def made(world: Any) -> TaskRouter:
    agents, outcomes = world
    built = router(*agents)
    for at, (id, kind, success, seconds) in enumerate(outcomes):
        built.experience.add((T, AgentId(id)), kind, success, seconds, float(at))
    return built


@settings(max_examples=30)
@given(worlds, tasks)
def test_decisions_can_be_redone_by_hand_and_are_the_same_each_time(world: Any, task: AgentTask) -> None:
    decision = made(world).decide(T, task, 30.0)
    assert made(world).decide(T, task, 30.0) == decision
    assert {one.id for one in decision.candidates} == {one.id for one in world[0]}
    weights = {"capability": 3, "experience": 1, "availability": 2, "success": 2, "speed": 1}
    for one in decision.candidates:
        assert {term.name: term.weight for term in one.terms} == weights
        assert all(0.0 <= term.value <= 1.0 for term in one.terms)
        by_hand = sum(term.value * weights[term.name] for term in one.terms) / 9
        assert one.score == pytest.approx(by_hand, abs=1e-12)
        assert sum(contributions(one.terms)) == pytest.approx(one.score, abs=1e-12)
        assert one.terms[0].value == one.capability.score
    eligible = [one for one in decision.candidates if not one.rejections]
    best = min(eligible, key=lambda one: (-one.score, one.id), default=None)
    assert decision.agent_id == (best.id if best else None)
    assert eligible == list(decision.candidates[: len(eligible)])


@settings(max_examples=30)
@given(worlds, tasks)
def test_who_lacks_a_required_skill_is_never_chosen(world: Any, task: AgentTask) -> None:
    decision = made(world).decide(T, task, 30.0)
    if decision.agent_id is not None:
        (agent,) = [one for one in world[0] if one.id == decision.agent_id]
        for wanted in task.need.skills:
            assert any(skill.name == wanted.name and skill.level >= wanted.min_level for skill in agent.skills)
        assert task.need.task_type is None or not agent.task_types or task.need.task_type in agent.task_types


@settings(max_examples=80)
@given(worlds, tasks, st.sampled_from(IDS), st.sampled_from([0, 1]), st.floats(0.5, 1))
def test_more_success_never_lowers_the_rank(world: Any, task: AgentTask, id: str, kind: int, success: float) -> None:
    def rank(of: TaskRouter) -> int:
        return [one.id for one in of.decide(T, task, 30.0).candidates if not one.rejections].index(AgentId(id))

    before, after = made(world), made(world)
    if not any(one.id == id and not one.rejections for one in before.decide(T, task, 30.0).candidates):
        return
    after.experience.add((T, AgentId(id)), kind, 1.0, None, 30.0)
    assert rank(after) <= rank(before)
    assert candidate(after.decide(T, task, 30.0), id).score >= candidate(before.decide(T, task, 30.0), id).score - 1e-12


@given(st.lists(st.floats(0.1, 1e5), min_size=2, max_size=8), st.floats(0.1, 0.99))
def test_who_is_faster_is_never_rated_slower(times: list[float], factor: float) -> None:
    def rated(first: float) -> float:
        seconds = [first, *times[1:]]
        return paces({AgentId(str(i)): Tally(1, 1, 1, math.log(s)) for i, s in enumerate(seconds)}, 4.0)[
            AgentId("0")
        ].value

    assert 0 < rated(times[0]) < 1
    assert rated(times[0] * factor) >= rated(times[0])


# -------------------------------------------------------------------- choice ---


def test_ties_go_to_the_least_id_and_nobody_is_said() -> None:
    assert chosen(router(spec("b"), spec("a"), spec("c"))) == "a"
    nobody = router().decide(T, CHAT, 0.0)
    assert (nobody.agent_id, nobody.summary, nobody.candidates) == (None, "no agent is registered", ())


def test_capability_experience_availability_success_and_speed_each_decide() -> None:
    assert chosen(router(spec("a"), spec("b", task_types=frozenset({TaskType.CHAT})))) == "b"
    experienced = router(spec("a"), spec("b"))
    learn(experienced, "b", 1.0)
    assert chosen(experienced) == "b"
    failing = router(spec("a"), spec("b"))
    learn(failing, "a", 0.0, kind=2)
    assert chosen(failing) == "b", "failures in other work count as well"
    busy = router(spec("a", max_concurrency=2), spec("b", max_concurrency=2))
    reserve(busy, "a", "1")
    assert chosen(busy) == "b"
    slow = router(spec("a"), spec("b"))
    learn(slow, "a", 1.0, seconds=10.0)
    learn(slow, "b", 1.0, seconds=5.0)
    assert chosen(slow) == "b"
    decision = slow.decide(T, CHAT, 0.0)
    # Twice as fast, the geometric mean is sqrt(50) s; one task against a shrinkage of four: a fifth of ln(sqrt(2)).
    assert term(decision, "b", "speed") == pytest.approx(1 / (1 + math.exp(-math.log(2) / 2 / 5)))


def test_newcomers_are_taken_for_average() -> None:
    made = router(spec("good"), spec("bad"), spec("new"), shrinkage=4.0)
    learn(made, "good", *[1.0] * 12)
    learn(made, "bad", *[0.0] * 12)
    decision = made.decide(T, CHAT, 0.0)
    mean = (14 / 16 + 2 / 16 + 1 / 2) / 3
    assert term(decision, "new", "success") == pytest.approx(mean)
    assert term(decision, "good", "success") == pytest.approx((12 + 4 * mean) / 16)
    assert term(decision, "new", "experience") == 0.5
    assert [one.id for one in decision.candidates] == ["good", "new", "bad"]


def test_a_score_counts_as_so_much_of_a_success() -> None:
    made = router(spec("a"), spec("b"))
    learn(made, "a", *[0.4] * 5)
    learn(made, "b", *[0.9] * 5)
    assert chosen(made) == "b"
    assert made.experience.of((T, AgentId("a")), 0.0)[1].successes == pytest.approx(2.0)


def test_each_reason_is_told() -> None:
    made = router(
        spec("busy", "sql"), spec("excluded", "sql"), spec("label", "sql", labels={"zone": "us"}), spec("skill")
    )
    made.register(T, spec("lost", "sql"), 5.0, 0.0)
    made.register(T, spec("type", "sql", task_types=frozenset({TaskType.VISION})), 100.0, 0.0)
    reserve(made, "busy", "1")
    task = AgentTask(Need(skills=(SkillNeed("SQL"),), task_type=TaskType.CHAT), {}, frozenset({AgentId("excluded")}))
    decision = made.decide(T, task, 10.0)
    assert decision.agent_id == "label"
    strict = AgentTask(task.need, {"zone": "eu"}, task.excluded)
    decision = made.decide(T, strict, 10.0)
    told = {one.id: [found.reason.name for found in one.rejections] for one in decision.candidates}
    assert {id: names[0] for id, names in told.items() if id != "label"} == {
        "busy": "LABEL", "excluded": "LABEL", "lost": "LABEL", "skill": "SKILL", "type": "TASK_TYPE",
    }  # fmt: skip
    assert told["busy"] == ["LABEL", "BUSY"] and told["lost"] == ["LABEL", "LOST"]
    assert told["excluded"] == ["LABEL", "EXCLUDED"]
    assert "no agent can have it now: " in decision.summary and "and 3 more" in decision.summary


def test_full_or_away_is_busy_with_a_time_and_the_rest_is_hopeless() -> None:
    made = router(spec("a"), spec("b"))
    learn(made, "a", 1.0, 1.0, seconds=30.0)
    reserve(made, "a", "1", now=0.0)
    refused = made.refusal(T, CHAT, made.decide(T, CHAT, 10.0), 10.0)
    assert isinstance(refused, DomainError) and refused.reason == "AGENTS_BUSY"
    # Only "a" has a task; 30 s are expected of it, of which 10 have passed.
    assert refused.retry_after == pytest.approx(20.0)
    assert made.decide(T, CHAT, 10.0).agent_id == "b"
    nobody = AgentTask(Need(skills=(SkillNeed("sql"),)))
    hopeless = made.refusal(T, nobody, made.decide(T, nobody, 10.0), 10.0)
    assert (
        isinstance(hopeless, DomainError)
        and hopeless.reason == "NO_CAPABLE_AGENT"
        and "no skill 'sql'" in str(hopeless)
    )


# ----------------------------------------------------- leases and assignments ---


def test_leases_run_out_renewals_bring_back_and_the_long_gone_are_forgotten() -> None:
    made = TaskRouter(RoutePolicy(forget_after=50.0))
    made.register(T, spec("a"), 10.0, 0.0)
    assert chosen(made, now=9.9) == "a" and chosen(made, now=10.0) is None
    made.renew(T, AgentId("a"), 30.0)
    assert chosen(made, now=39.0) == "a"
    made.tick(89.0)
    assert [agent.id for agent in made.agents(T)] == ["a"]
    made.tick(90.0)
    assert not made.agents(T) and not made.registered()
    with pytest.raises(DomainError, match="no agent 'a'"):
        made.renew(T, AgentId("a"), 90.0)


def test_registering_again_changes_the_words_and_keeps_the_rest() -> None:
    made = router(spec("a"), ttl=10.0)
    learn(made, "a", 1.0)
    reserve(made, "a", "1")
    made.register(T, spec("a", "sql", max_concurrency=2), 10.0, 8.0)
    (agent,) = made.agents(T)
    assert (agent.since, agent.lease_until, made.running(T, agent.id)) == (0.0, 18.0, 1)
    decision = made.decide(T, AgentTask(Need(skills=(SkillNeed("sql"),), task_type=TaskType.CHAT)), 9.0)
    assert decision.agent_id == "a" and term(decision, "a", "availability") == 0.5
    assert term(decision, "a", "experience") == pytest.approx(3 / 5, rel=1e-5)


def test_the_first_word_on_an_assignment_counts() -> None:
    made = router(spec("a"))
    reserve(made, "a", "1")
    assert made.decide(T, CHAT, 1.0).agent_id is None, "its only place is taken"
    assert made.report(T, "1", SUCCESS, 3.0).outcome is SUCCESS
    again = made.report(T, "1", FAILURE, 4.0)
    assert (again.outcome, again.again, made.running(T, AgentId("a"))) == (SUCCESS, True, 0)
    tally = made.experience.of((T, AgentId("a")), 3.0)[1]
    assert (tally.tasks, tally.successes, tally.log_seconds) == (1.0, 1.0, pytest.approx(math.log(3.0)))
    with pytest.raises(DomainError, match="no assignment 'never'"):
        made.report(T, "never", SUCCESS, 4.0)


def test_what_nobody_reports_expires_as_a_failure() -> None:
    made = router(spec("a", max_concurrency=2))
    reserve(made, "a", "1", timeout=10.0)
    reserve(made, "a", "2", timeout=20.0)
    (ended,) = made.tick(10.0)
    assert (ended.outcome, ended.agent_id, made.open()) == (EXPIRED, "a", 1)
    assert made.report(T, "1", SUCCESS, 11.0).outcome is EXPIRED
    late = made.report(T, "2", SUCCESS, 20.0)
    assert late.outcome is EXPIRED, "the deadline holds whether or not anybody ticked"
    assert made.experience.of((T, AgentId("a")), 20.0)[1].tasks == pytest.approx(2.0, rel=1e-4)


def test_assignments_outlive_the_agents_registration() -> None:
    made = router(spec("a"))
    reserve(made, "a", "1")
    made.unregister(T, AgentId("a"))
    assert made.report(T, "1", SUCCESS, 2.0).agent_id == "a"
    made.register(T, spec("a"), 10.0, 3.0)
    assert term(made.decide(T, CHAT, 3.0), "a", "experience") == pytest.approx(0.6, rel=1e-5)


def test_tenants_know_nothing_of_each_other() -> None:
    made = router(spec("a"))
    reserve(made, "a", "1", AgentTask(from_agent=AgentId("boss")))
    for call in (
        lambda: made.renew("other", AgentId("a"), 0.0),
        lambda: made.unregister("other", AgentId("a")),
        lambda: made.report("other", "1", SUCCESS, 1.0),
        lambda: made.reserve("other", AgentId("a"), CHAT, "2", 1.0, 0.0),
    ):
        with pytest.raises(DomainError, match="there is no"):
            call()
    assert not made.agents("other") and not made.interactions("other")
    assert made.decide("other", CHAT, 0.0).agent_id is None
    made.register("other", spec("a"), 10.0, 0.0)
    made.report(T, "1", FAILURE, 1.0)
    with pytest.raises(DomainError, match="there is no"):
        made.report("other", "1", SUCCESS, 1.0)
    assert term(made.decide("other", CHAT, 1.0), "a", "success") == 0.5


# ------------------------------------------------------------------- learned ---


def test_experience_fades_with_its_half_life() -> None:
    made = router(spec("a"), half_life=DAY)
    learn(made, "a", *[1.0] * 4, now=0.0)
    assert term(made.decide(T, CHAT, 0.0), "a", "experience") == pytest.approx(6 / 8)
    assert term(made.decide(T, CHAT, DAY), "a", "experience") == pytest.approx(4 / 6)
    made.experience.forget_faded(20 * DAY)
    assert not len(made.experience)


def test_what_was_learned_outlives_the_process() -> None:
    made = router(spec("a"), half_life=DAY)
    learn(made, "a", 1.0, 0.5, seconds=7.0, now=100.0)
    learned = made.experience.changed(now=150.0, wall=1e9)
    assert not made.experience.changed(150.0, 1e9), "told once"
    made.experience.again(learned)
    assert made.experience.changed(150.0, 1e9) == learned
    after = router(spec("a"), half_life=DAY)
    after.remember(learned, now=5.0, wall=1e9 + 3600)
    at = made.experience.of((T, AgentId("a")), 150.0 + 3600)[1]
    found = after.experience.of((T, AgentId("a")), 5.0)[1]
    for name in ("tasks", "successes", "timed", "log_seconds"):
        assert getattr(found, name) == pytest.approx(getattr(at, name))


def test_nonsense_in_the_store_is_left_out() -> None:
    made = router()
    good = Experience(DAY, 10)
    good.add((T, AgentId("a")), 1, 1.0, None, 0.0)
    (sound,) = good.changed(0.0, 0.0)
    bad = [
        type(sound)(T, AgentId("b"), 1, 0.0, tally)
        for tally in (Tally(1, 2), Tally(math.inf, 1), Tally(1, math.nan), Tally(1, 1, 1, math.inf), Tally(-1, -1))
    ]
    made.remember([*bad, sound, type(sound)(T, AgentId("c"), 1, math.nan, Tally(1, 1))], 0.0, 0.0)
    assert list(made.experience) == [(T, "a")]


def test_rates_of_nobody_and_of_all() -> None:
    assert reliability({}, 4.0) == ({}, 0.5)
    assert in_kind(Tally(), 4.0) == 0.5 < in_kind(Tally(10, 10), 4.0) < in_kind(Tally(100, 100), 4.0)
    assert paces({AgentId("a"): Tally(1, 1)}, 4.0)[AgentId("a")].seconds is None


def test_interactions_are_counted() -> None:
    made = router(spec("a", max_concurrency=9), spec("b", max_concurrency=9))
    for name, to, by in (("1", "a", "boss"), ("2", "a", "boss"), ("3", "b", "boss"), ("4", "a", "b"), ("5", "a", None)):
        reserve(made, to, name, AgentTask(from_agent=AgentId(by) if by else None), now=float(name))
    made.report(T, "1", SUCCESS, 11.0, duration=4.0)
    made.report(T, "2", SUCCESS, 11.0)
    made.report(T, "3", FAILURE, 11.0)
    first, *others = made.interactions(T)
    assert (first.from_agent, first.to_agent, first.assigned, first.succeeded) == ("boss", "a", 2, 2)
    assert (first.mean_seconds, first.last_at) == (pytest.approx((4 + 9) / 2), 2.0)
    assert [(one.from_agent, one.to_agent, one.failed, one.mean_seconds) for one in others] == [
        ("b", "a", 0, None),
        ("boss", "b", 1, None),
    ]
    assert len(made.interactions(T, AgentId("b"))) == 2


# -------------------------------------------------------------------- bounds ---


def test_memory_is_bounded() -> None:
    made = TaskRouter(
        RoutePolicy(
            max_agents=3, most_agents=4, most_learned=2, most_open=5, most_ended=2, most_interactions=2,
        )
    )  # fmt: skip
    for id in "abc":
        made.register(T, spec(id, max_concurrency=100), 1e9, 0.0)
    made.register("other", spec("a"), 1e9, 0.0)
    for tenant, id in ((T, "d"), ("other", "b"), ("third", "a")):
        with pytest.raises(DomainError, match="too many agents"):
            made.register(tenant, spec(id), 1.0, 0.0)
    assert made.register(T, spec("a", max_concurrency=50), 1e9, 0.0), "known ones may come again"
    for name in range(5):
        made.reserve(T, AgentId("abc"[name % 3]), AgentTask(from_agent=AgentId(f"f{name}")), str(name), 9.0, 0.0)
    with pytest.raises(DomainError) as caught:
        made.reserve(T, AgentId("a"), CHAT, "x", 9.0, 0.0)
    assert caught.value.reason == "AGENTS_BUSY" and caught.value.retry_after
    for name in range(4):
        made.report(T, str(name), SUCCESS, 1.0)
    assert made.report(T, "3", SUCCESS, 1.0).again
    with pytest.raises(DomainError, match="no assignment '0'"):
        made.report(T, "0", SUCCESS, 1.0)
    assert len(made.experience) == 2 and len(made.interactions(T)) == 2


def test_deadlines_of_what_was_reported_in_time_take_no_memory() -> None:
    made = router(spec("a", max_concurrency=1000))
    for name in range(500):
        reserve(made, "a", str(name), timeout=1e6)
        made.report(T, str(name), SUCCESS, 1.0)
    assert len(made._deadlines) <= 100
    assert CandidateRejectionReason.BUSY not in {
        found.reason for one in made.decide(T, CHAT, 1.0).candidates for found in one.rejections
    }
