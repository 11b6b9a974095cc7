"""Agents, what is asked of them, and what can be said of how well they fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from types import MappingProxyType
from typing import NewType

from control_plane.domain.task import TaskType

AgentId = NewType("AgentId", str)


def _nothing() -> Mapping[str, str]:
    return MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Skill:
    """Something that somebody can do."""

    name: str
    level: float = 1.0
    """[0, 1]"""


@dataclass(frozen=True, slots=True)
class SkillNeed:
    """A skill without which a task cannot be done."""

    name: str
    min_level: float = 0.0
    """[0, 1]"""


@dataclass(frozen=True, slots=True)
class AgentSpec:
    """An agent as it describes itself."""

    id: AgentId
    description: str = ""
    skills: tuple[Skill, ...] = ()
    task_types: frozenset[TaskType] = frozenset()
    """Empty: any."""
    max_concurrency: int = 1
    labels: Mapping[str, str] = field(default_factory=_nothing)
    endpoint: str = ""
    metadata: Mapping[str, str] = field(default_factory=_nothing)


@dataclass(frozen=True, slots=True)
class Need:
    """What a task asks of whoever does it."""

    description: str = ""
    skills: tuple[SkillNeed, ...] = ()
    task_type: TaskType | None = None


@dataclass(frozen=True, slots=True)
class AgentTask:
    """A task that an agent is wanted for."""

    need: Need = Need()
    labels: Mapping[str, str] = field(default_factory=_nothing)
    """That the agent must have."""
    excluded: frozenset[AgentId] = frozenset()
    from_agent: AgentId | None = None


class CandidateRejectionReason(IntEnum):
    """Numbers equal those of the contract."""

    SKILL = 1
    TASK_TYPE = 2
    LABEL = 3
    EXCLUDED = 4
    BUSY = 5
    LOST = 6

    @property
    def permanent(self) -> bool:
        """Whether waiting cannot help."""
        return self not in (CandidateRejectionReason.BUSY, CandidateRejectionReason.LOST)


@dataclass(frozen=True, slots=True)
class CandidateRejection:
    """One reason why a candidate cannot be chosen."""

    reason: CandidateRejectionReason
    detail: str


@dataclass(frozen=True, slots=True)
class Term:
    """One part of a score."""

    name: str
    value: float
    """[0, 1]"""
    weight: float
    """>= 0"""
    detail: str = ""
    """For people: from what the value was made."""


def contributions(terms: Sequence[Term]) -> list[float]:
    """What each term adds to the score: value * weight / sum of the weights."""
    total = sum(term.weight for term in terms)
    return [term.value * term.weight / total if total else 0.0 for term in terms]


def score(terms: Sequence[Term]) -> float:
    """The sum of the contributions, [0, 1]; 1 if nothing counts."""
    if not any(term.weight for term in terms):
        return 1.0
    return min(1.0, sum(contributions(terms)))


@dataclass(frozen=True, slots=True)
class Match:
    """How well a candidate fits a need."""

    id: str
    score: float
    """Sum of the contributions, [0, 1]; 1 if nothing was asked for."""
    terms: tuple[Term, ...] = ()
    rejections: tuple[CandidateRejection, ...] = ()


@dataclass(frozen=True, slots=True)
class AgentCandidate:
    """One agent in a decision."""

    id: AgentId
    score: float
    """Sum of the contributions, [0, 1]."""
    terms: tuple[Term, ...]
    capability: Match
    rejections: tuple[CandidateRejection, ...] = ()


@dataclass(frozen=True, slots=True)
class RoutingDecision:
    """Which agent is to do a task, and why."""

    agent_id: AgentId | None
    summary: str
    candidates: tuple[AgentCandidate, ...]
    """Those that could be chosen first, the best of them first; then the others, by id."""


class AssignmentOutcome(IntEnum):
    """Numbers equal those of the contract."""

    SUCCESS = 1
    FAILURE = 2
    EXPIRED = 3


@dataclass(frozen=True, slots=True)
class Tally:
    """What an agent did in one kind of task, or in all. Counts fade with time."""

    tasks: float = 0.0
    successes: float = 0.0
    """Of them; one with a score counts as its score."""
    timed: float = 0.0
    """Successes whose duration is known."""
    log_seconds: float = 0.0
    """Sum of the natural logarithms of their durations in seconds."""

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.tasks + other.tasks,
            self.successes + other.successes,
            self.timed + other.timed,
            self.log_seconds + other.log_seconds,
        )

    def __mul__(self, factor: float) -> Tally:
        return Tally(self.tasks * factor, self.successes * factor, self.timed * factor, self.log_seconds * factor)


@dataclass(frozen=True, slots=True)
class LearnedOfAgent:
    """What outlives a control plane of what it learned of an agent in one kind of task."""

    tenant: str
    agent_id: AgentId
    task_type: int
    """0: tasks that named none."""
    at: float
    """Seconds since 1970 of the last outcome; the counts are those of then."""
    tally: Tally = Tally()
