"""Who handed tasks to whom, and how that went."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from control_plane.domain.agent import AgentId


@dataclass(slots=True)
class Interaction:
    """What one agent has handed to another."""

    from_agent: AgentId
    to_agent: AgentId
    assigned: int = 0
    succeeded: int = 0
    failed: int = 0
    """Expired ones included."""
    seconds: float = 0.0
    """Sum of the durations of the successes."""
    last_at: float = 0.0
    """Monotonic seconds of the last assignment."""

    @property
    def mean_seconds(self) -> float | None:
        """Of a success; None: there was none."""
        return self.seconds / self.succeeded if self.succeeded else None


class Interactions:
    """Of at most `most` pairs; those whose last assignment is longest ago are forgotten."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._pairs: OrderedDict[tuple[str, AgentId, AgentId], Interaction] = OrderedDict()

    def assigned(self, tenant: str, from_agent: AgentId, to_agent: AgentId, now: float) -> None:
        """A task was handed over."""
        key = (tenant, from_agent, to_agent)
        pair = self._pairs.setdefault(key, Interaction(from_agent, to_agent))
        pair.assigned += 1
        pair.last_at = now
        self._pairs.move_to_end(key)
        if len(self._pairs) > self._most:
            self._pairs.popitem(last=False)

    def ended(self, tenant: str, from_agent: AgentId, to_agent: AgentId, success: bool, seconds: float) -> None:
        """It has ended, after so many seconds."""
        pair = self._pairs.get((tenant, from_agent, to_agent))
        if pair is None:
            return
        if success:
            pair.succeeded += 1
            pair.seconds += seconds
        else:
            pair.failed += 1

    def of(self, tenant: str, agent: AgentId | None = None) -> list[Interaction]:
        """Of a tenant, or of one of its agents; those with most assignments first."""
        found = [
            pair
            for (owner, _, _), pair in self._pairs.items()
            if owner == tenant and (agent is None or agent in (pair.from_agent, pair.to_agent))
        ]
        return sorted(found, key=lambda pair: (-pair.assigned, pair.from_agent, pair.to_agent))
