"""Agents, matches and decisions as the client shows them: plain immutable values, no protobuf."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from modelyard.client._types import Value


@dataclass(frozen=True, slots=True)
class Agent(Value):
    """An agent as it describes itself."""

    id: str
    description: str = ""
    skills: Mapping[str, float] = field(default_factory=dict)
    """Level [0, 1] by name."""
    task_types: tuple[str, ...] = ()
    """Kinds of work that it takes. Empty: any."""
    max_concurrency: int = 1
    labels: Mapping[str, str] = field(default_factory=dict)
    endpoint: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class AgentExperience(Value):
    """What was learned of an agent in one kind of task. Counts fade with time, so they are no whole numbers."""

    task_type: str
    """Empty: tasks that named none."""
    tasks: float
    successes: float
    """Of them; one with a score counts as its score."""
    typical_duration: float | None = None
    """Seconds: geometric mean of the successes."""


@dataclass(frozen=True, slots=True)
class AgentStatus(Value):
    """An agent as the control plane sees it."""

    agent: Agent
    state: str
    """"live" or "lost"."""
    running: int = 0
    """Assignments that are not reported yet."""
    lease_until: datetime | None = None
    registered_at: datetime | None = None
    experience: tuple[AgentExperience, ...] = ()


@dataclass(frozen=True, slots=True)
class ScoreTerm(Value):
    """One part of a score, which is the sum of the contributions."""

    name: str
    value: float
    """[0, 1]"""
    weight: float
    contribution: float
    """value * weight / sum of the weights."""
    detail: str = ""
    """From what the value was made."""


@dataclass(frozen=True, slots=True)
class CandidateRejection(Value):
    """One reason why a candidate cannot be chosen."""

    reason: str
    """"skill", "task_type", "label", "excluded", "busy" or "lost"."""
    detail: str = ""


@dataclass(frozen=True, slots=True)
class CapabilityMatch(Value):
    """A model or agent, and how well it fits."""

    kind: str
    """"model" or "agent"."""
    id: str
    score: float
    """[0, 1]"""
    terms: tuple[ScoreTerm, ...] = ()
    rejections: tuple[CandidateRejection, ...] = ()
    available: bool = False
    """Whether it can be had now."""


@dataclass(frozen=True, slots=True)
class CapabilityMatches(Value):
    """The candidates for a task, the best first."""

    matches: tuple[CapabilityMatch, ...]
    similarity: str = ""
    """"embedding", "lexical", or "" if there was nothing to compare."""
    similarity_detail: str = ""
    """With which model, or why not with embeddings."""


@dataclass(frozen=True, slots=True)
class AgentCandidate(Value):
    """One agent in a decision."""

    agent_id: str
    score: float
    """[0, 1]"""
    terms: tuple[ScoreTerm, ...] = ()
    capability_terms: tuple[ScoreTerm, ...] = ()
    """Of which the value of the term "capability" is the weighted mean."""
    rejections: tuple[CandidateRejection, ...] = ()


@dataclass(frozen=True, slots=True)
class RoutingDecision(Value):
    """Which agent, and why."""

    agent_id: str
    """Empty: none."""
    summary: str
    candidates: tuple[AgentCandidate, ...] = ()
    """Those that could be chosen first, the best of them first."""
    similarity: str = ""
    similarity_detail: str = ""


@dataclass(frozen=True, slots=True)
class Interaction(Value):
    """What one agent has handed to another."""

    from_agent_id: str
    to_agent_id: str
    assigned: int = 0
    succeeded: int = 0
    failed: int = 0
    """Expired ones included."""
    mean_duration: float | None = None
    """Seconds that successes took."""
    last_at: datetime | None = None
