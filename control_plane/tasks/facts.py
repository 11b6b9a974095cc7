"""Facts as values, for those who need no database."""

from __future__ import annotations

from dataclasses import dataclass

TASKS_PREFIX = "tasks/"
"""Keys that only the control plane writes: the final states of tasks."""


@dataclass(frozen=True, slots=True)
class BeliefRecord:
    """A fact, or that there was one."""

    key: str
    value: str
    """JSON; of no meaning if it was deleted."""
    confidence: float
    """[0, 1]"""
    source: str
    updated_at: float
    """Seconds since the epoch by the database's clock."""
    version: int
    """Grows with every write of any fact; what becomes visible later has a greater one."""
    deleted: bool = False
