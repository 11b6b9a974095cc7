"""Weights and bounds of matching and routing."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class MatchPolicy:
    """How a match is scored. Weights >= 0 count only where the need has such a part."""

    skills: float = 2.0
    """Weight of all required skills together."""
    description: float = 1.0
    task_type: float = 1.0
    skill_threshold: float = 0.75
    """From which `words.covers` an offered skill is the required one."""
    skill_embedding_threshold: float | None = None
    """From which cosine it is, too. None: never, for what a cosine means depends on the model."""


@dataclass(frozen=True, slots=True)
class RoutePolicy:
    """How agents are scored, and what is kept of them."""

    match: MatchPolicy = field(default_factory=MatchPolicy)
    capability: float = 3.0
    experience: float = 1.0
    availability: float = 2.0
    success: float = 2.0
    speed: float = 1.0
    shrinkage: float = 4.0
    """Tasks (> 0) that an agent must have had to be judged half by itself."""
    half_life: float = 14 * 86400.0
    """Seconds (> 0) in which what was learned counts half."""
    forget_after: float = 600.0
    """Seconds after the end of its lease at which an agent is no longer listed."""
    max_agents: int = 500
    """Of a tenant."""
    most_agents: int = 2000
    """Of all tenants."""
    most_learned: int = 20_000
    """Agents of which something is remembered; those whose last task is longest ago are forgotten."""
    most_open: int = 100_000
    """Assignments that are not reported yet."""
    most_ended: int = 10_000
    """Assignments whose end is remembered."""
    most_interactions: int = 20_000
    """Pairs of agents."""
