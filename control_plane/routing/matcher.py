"""How well candidates, models or agents, fit a described task and required skills."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from control_plane.domain.agent import (
    AgentSpec,
    CandidateRejection,
    CandidateRejectionReason,
    Match,
    Need,
    Skill,
    SkillNeed,
    Term,
    score,
)
from control_plane.domain.task import TaskType
from control_plane.routing import words
from control_plane.routing.policy import MatchPolicy

Vectors = Mapping[str, NDArray[np.float32]]
"""Embeddings by text, all of one model."""

_UNSAID = 0.5
"""Value for the kind of task of a candidate that takes any: it does not say that it is good at this one."""


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """What can be matched."""

    id: str
    text: str
    """Everything that it says of itself, to be compared with descriptions."""
    skills: tuple[Skill, ...] = ()
    task_types: Mapping[TaskType, float] = field(default_factory=dict)
    """How good it is at each kind of task that it takes, [0, 1]. Empty: it takes any."""
    sketch: words.Sketch = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sketch", words.sketch(self.text))


def candidate_of(spec: AgentSpec) -> Candidate:
    """An agent as a candidate."""
    skills = ", ".join(skill.name for skill in spec.skills)
    kinds = ", ".join(kind.name.replace("_", " ").lower() for kind in sorted(spec.task_types))
    text = ". ".join(part for part in (spec.description, skills, kinds) if part)
    return Candidate(spec.id, text, spec.skills, dict.fromkeys(sorted(spec.task_types), 1.0))


class CapabilityMatcher:
    """Ranks candidates. Keeps nothing."""

    def __init__(self, policy: MatchPolicy) -> None:
        self._policy = policy

    def texts(self, need: Need, candidates: Iterable[Candidate]) -> set[str]:
        """The texts whose embeddings `match` would use."""
        found: set[str] = set()
        candidates = list(candidates)
        if need.description and self._policy.description:
            found.update((need.description, *(candidate.text for candidate in candidates)))
        if need.skills and self._policy.skill_embedding_threshold is not None:
            found.update(wanted.name for wanted in need.skills)
            found.update(skill.name for candidate in candidates for skill in candidate.skills)
        found.discard("")
        return found

    def match(self, need: Need, candidates: Sequence[Candidate], vectors: Vectors | None = None) -> list[Match]:
        """One match for each candidate, in their order. With `vectors` of all `texts`, descriptions are compared by
        them, else by words: the two are never mixed."""
        if need.description:
            compared = (
                words.similarities(words.sketch(need.description), [one.sketch for one in candidates])
                if vectors is None
                else [_cosine(vectors[need.description], vectors.get(one.text)) for one in candidates]
            )
        else:
            compared = [0.0] * len(candidates)
        return [self._one(need, one, alike, vectors) for one, alike in zip(candidates, compared, strict=True)]

    def _one(self, need: Need, candidate: Candidate, alike: float, vectors: Vectors | None) -> Match:
        policy = self._policy
        terms: list[Term] = []
        rejections: list[CandidateRejection] = []
        for wanted in need.skills:
            value, detail, missing = self._skill(wanted, candidate, vectors)
            terms.append(Term(f"skill: {wanted.name}", value, policy.skills / len(need.skills), detail))
            if missing:
                rejections.append(CandidateRejection(CandidateRejectionReason.SKILL, missing))
        if need.description:
            terms.append(Term("description", alike, policy.description))
        if need.task_type is not None:
            kind = need.task_type.name.lower()
            good = candidate.task_types.get(need.task_type)
            if good is not None:
                terms.append(Term("task_type", good, policy.task_type, f"{kind} {good:.2f}"))
            elif candidate.task_types:
                terms.append(Term("task_type", 0.0, policy.task_type))
                rejections.append(CandidateRejection(CandidateRejectionReason.TASK_TYPE, f"does not take {kind}"))
            else:
                terms.append(Term("task_type", _UNSAID, policy.task_type, "takes any"))
        return Match(candidate.id, score(terms), tuple(terms), tuple(rejections))

    def _skill(self, wanted: SkillNeed, candidate: Candidate, vectors: Vectors | None) -> tuple[float, str, str]:
        """Value, detail, and what is missing if something is."""
        best, detail = -1.0, ""
        near, nearest = 0.0, None
        for skill in candidate.skills:
            alike, same = self._alike(wanted.name, skill.name, vectors)
            if same and skill.level >= wanted.min_level:
                if alike * skill.level > best:
                    best = alike * skill.level
                    detail = f"{skill.name!r}: similarity {alike:.2f} x level {skill.level:.2f}"
            elif (same, alike, skill.level) > (nearest is not None and nearest[1], near, -1.0):
                near, nearest = alike, (skill, same)
        if best >= 0.0:
            return best, detail, ""
        missing = f"no skill {wanted.name!r}"
        if nearest is not None:
            skill, same = nearest
            if same:
                missing = f"{skill.name!r} at level {skill.level:.2f}, {wanted.min_level:.2f} is needed"
            elif near:
                missing += f", the nearest is {skill.name!r} ({near:.2f})"
        return 0.0, "", missing

    def _alike(self, wanted: str, offered: str, vectors: Vectors | None) -> tuple[float, bool]:
        """How alike two skills are, and whether that is enough."""
        policy = self._policy
        alike = words.covers(wanted, offered)
        same = alike >= policy.skill_threshold
        if vectors is not None and policy.skill_embedding_threshold is not None and alike < 1.0:
            meant = _cosine(vectors[wanted], vectors.get(offered))
            if meant >= policy.skill_embedding_threshold:
                return max(alike, meant), True
        return alike, same


def _cosine(one: NDArray[np.float32], other: NDArray[np.float32] | None) -> float:
    """Of two embeddings, [0, 1]: 0 where it is negative, and of what has no text or another length."""
    if other is None or one.shape != other.shape:
        return 0.0
    a, b = one.astype(np.float64), other.astype(np.float64)
    length = float(np.linalg.norm(a) * np.linalg.norm(b))
    cosine = float(a @ b) / length if length else 0.0
    return min(1.0, max(0.0, cosine)) if np.isfinite(cosine) else 0.0
