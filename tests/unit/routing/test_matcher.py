"""Words and CapabilityMatcher: scores in [0, 1], required skills are hard, descriptions are not."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from control_plane.domain.agent import (
    AgentId,
    AgentSpec,
    CandidateRejectionReason,
    Need,
    Skill,
    SkillNeed,
    contributions,
)
from control_plane.domain.task import TaskType
from control_plane.routing import words
from control_plane.routing.matcher import Candidate, CapabilityMatcher, candidate_of
from control_plane.routing.policy import MatchPolicy

NAMES = ("python", "Python 3", "code-review", "Code Reviews", "sql", "nosql", "translation", "C++", "c", "日本語")
SKILL = CandidateRejectionReason.SKILL

skills = st.lists(
    st.builds(Skill, st.sampled_from(NAMES), st.floats(0, 1)), max_size=4, unique_by=lambda skill: skill.name
).map(tuple)
text = st.text(max_size=60) | st.lists(st.sampled_from([*NAMES, "reviews", "the", "poems"])).map(" ".join)
name = st.sampled_from(NAMES) | st.text(max_size=8)
kinds = st.dictionaries(st.sampled_from(TaskType), st.floats(0, 1), max_size=3)
candidates = st.lists(
    st.builds(Candidate, st.text("abc", min_size=1, max_size=3), text, skills, kinds), max_size=5
)  # fmt: skip
needs = st.builds(
    Need,
    text,
    st.lists(st.builds(SkillNeed, name, st.floats(0, 1)), max_size=3).map(tuple),
    st.none() | st.sampled_from(TaskType),
)  # fmt: skip


def matched(need: Need, *given: Candidate, policy: MatchPolicy | None = None, vectors=None):
    return CapabilityMatcher(policy or MatchPolicy()).match(need, given, vectors)


# ------------------------------------------------------------------- words ---


@pytest.mark.parametrize(
    ("required", "offered"),
    [
        ("python", "Python"),
        ("code review", "code-reviews"),
        ("code_review", "Code Reviewing"),
        ("codereview", "code review"),
        ("summarization", "summarizing"),
        ("translation", "Translator"),
        ("planning", "planner"),
        ("résumé writing", "resume writer"),
        ("C++", "c++"),
        ("日本語", "日本語"),
    ],
)
def test_forms_of_a_name_are_the_same(required: str, offered: str) -> None:
    assert words.covers(required, offered) == words.covers(offered, required) == 1.0


@pytest.mark.parametrize(
    ("required", "offered"),
    [
        ("sql", "nosql"),
        ("java", "javascript"),
        ("c", "c++"),
        ("c", "c#"),
        ("unsupervised learning", "supervised learning"),
        ("german translation", "translation"),
        ("code review", "code generation"),
        ("english", "french"),
        ("", "python"),
        ("...", "!!!"),
    ],
)
def test_other_names_are_not(required: str, offered: str) -> None:
    assert words.covers(required, offered) < MatchPolicy().skill_threshold


def test_what_is_more_special_and_what_is_nearly_the_same_will_do() -> None:
    least = MatchPolicy().skill_threshold
    assert least <= words.covers("translation", "german translation") == pytest.approx(0.9)
    assert least <= words.covers("postgres", "postgresql") < 1
    assert least <= words.covers("python", "Python 3 programming") < words.covers("python", "Python 3")


@settings(max_examples=25)
@given(text, text)
def test_every_comparison_is_a_share(one: str, other: str) -> None:
    assert 0.0 <= words.covers(one, other) <= 1.0
    assert words.covers(one, one) == 1.0
    (itself, different) = words.similarities(words.sketch(one), [words.sketch(one), words.sketch(other)])
    assert 0.0 <= different <= 1.0
    assert itself == pytest.approx(1.0) or not words.sketch(one).weights.size


def test_a_description_finds_what_it_is_about() -> None:
    offered = [
        "Reviews pull requests and finds bugs in Python code",
        "Translates legal documents between German and English",
        "Writes short poems about the sea",
    ]
    sketches = [words.sketch(text) for text in offered]
    for query, best in (
        ("find the bug in this python function", 0),
        ("a German contract, to be translated", 1),
        ("one poem, please", 2),
    ):
        found = words.similarities(words.sketch(query), sketches)
        assert max(range(3), key=found.__getitem__) == best, (query, found)


def test_sketches_do_not_depend_on_the_process() -> None:
    """Python's own hash does."""
    assert sorted(words.sketch("code").buckets.tolist()) == [23391, 23396, 26974, 32322]


# ----------------------------------------------------------------- matcher ---


@settings(max_examples=25)
@given(needs, candidates)
def test_scores_are_shares_and_can_be_redone(need: Need, given_: list[Candidate]) -> None:
    for match, candidate in zip(matched(need, *given_), given_, strict=True):
        assert match.id == candidate.id
        assert 0.0 <= match.score <= 1.0
        assert all(0.0 <= term.value <= 1.0 for term in match.terms)
        weight = sum(term.weight for term in match.terms)
        if not match.terms:
            assert match.score == 1.0
            continue
        by_hand = sum(term.value * term.weight for term in match.terms) / weight
        assert match.score == pytest.approx(by_hand, abs=1e-12)
        assert sum(contributions(match.terms)) == pytest.approx(match.score, abs=1e-12)
        assert len(match.terms) == len(need.skills) + bool(need.description) + (need.task_type is not None)


@settings(max_examples=25)
@given(needs, candidates)
def test_a_required_skill_is_there_or_the_candidate_is_refused(need: Need, given_: list[Candidate]) -> None:
    least = MatchPolicy().skill_threshold
    for match, candidate in zip(matched(need, *given_), given_, strict=True):
        missing = [
            wanted
            for wanted in need.skills
            if not any(
                words.covers(wanted.name, skill.name) >= least and skill.level >= wanted.min_level
                for skill in candidate.skills
            )
        ]
        assert [one.reason for one in match.rejections].count(SKILL) == len(missing)


@settings(max_examples=25)
@given(needs, candidates, st.randoms())
def test_the_order_of_candidates_does_not_matter(need: Need, given_: list[Candidate], random) -> None:
    there = dict(zip(map(id, given_), matched(need, *given_), strict=True))
    shuffled = random.sample(given_, len(given_))
    for candidate, match in zip(shuffled, matched(need, *shuffled), strict=True):
        assert match == there[id(candidate)]


def test_levels_count_and_bound() -> None:
    good, poor = (
        candidate_of(AgentSpec(AgentId(name), skills=(Skill("python", level),)))
        for name, level in (("good", 0.9), ("poor", 0.3))
    )
    best, worst = matched(Need(skills=(SkillNeed("Python"),)), good, poor)
    assert (best.score, worst.score) == (0.9, 0.3) and not best.rejections + worst.rejections
    _, refused = matched(Need(skills=(SkillNeed("python", 0.5),)), good, poor)
    (rejection,) = refused.rejections
    assert (rejection.reason, rejection.detail) == (SKILL, "'python' at level 0.30, 0.50 is needed")
    (lacking,) = matched(Need(skills=(SkillNeed("pythonic"),)), poor)
    assert lacking.rejections[0].detail.startswith("no skill 'pythonic', the nearest is 'python' (0.")


def test_a_kind_of_task_that_is_not_taken_refuses() -> None:
    need = Need(task_type=TaskType.CHAT)
    some, other, any_ = matched(
        need,
        Candidate("some", "", task_types={TaskType.CHAT: 0.8}),
        Candidate("other", "", task_types={TaskType.VISION: 1.0}),
        Candidate("any", ""),
    )
    assert (some.score, any_.score, other.score) == (0.8, 0.5, 0.0)
    assert [one.reason for one in other.rejections] == [CandidateRejectionReason.TASK_TYPE]
    assert not some.rejections and not any_.rejections


def vector(*values: float):
    return np.array(values, np.float32)


def test_embeddings_take_the_place_of_words() -> None:
    need = Need("mend my bicycle")
    near, far, against = (Candidate(name, name) for name in ("velo", "cake", "void"))
    matcher = CapabilityMatcher(MatchPolicy())
    assert matcher.texts(need, [near, far]) == {"mend my bicycle", "velo", "cake"}
    vectors = {
        "mend my bicycle": vector(1, 0), "velo": vector(3, 1), "cake": vector(0, 1), "void": vector(-1, 0),
    }  # fmt: skip
    found = matched(need, near, far, against, vectors=vectors)
    assert found[0].score == pytest.approx(3 / math.sqrt(10), abs=1e-6)
    assert [one.score for one in found[1:]] == [0.0, 0.0]
    broken = {**vectors, "velo": vector(1, 2, 3), "cake": vector(math.nan, 1)}
    assert [one.score for one in matched(need, near, far, vectors=broken)] == [0.0, 0.0]


def test_embeddings_decide_about_skills_only_where_that_is_asked_for() -> None:
    need, cook = Need(skills=(SkillNeed("cooking"),)), Candidate("cook", "", (Skill("preparing food", 0.5),))
    vectors = {"cooking": vector(1, 0.1), "preparing food": vector(1, 0)}
    assert matched(need, cook, vectors=vectors)[0].rejections
    policy = MatchPolicy(skill_embedding_threshold=0.9)
    (match,) = matched(need, cook, policy=policy, vectors=vectors)
    assert not match.rejections and match.score == pytest.approx(0.5 * 1 / math.sqrt(1.01), abs=1e-6)
    assert matched(need, cook, policy=policy)[0].rejections, "without embeddings the words decide"
    assert matched(need, Candidate("cook", "", (Skill("preparing food"),)), policy=policy, vectors={
        **vectors, "preparing food": vector(0.1, 1)})[0].rejections  # fmt: skip
