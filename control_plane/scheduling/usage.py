"""What requests have used, added up by tenant, model, server, kind of work and hour until it is written down."""

from __future__ import annotations

from dataclasses import astuple, dataclass, field
from typing import NamedTuple

HOUR = 3600
"""Seconds."""


class UsageKey(NamedTuple):
    """What is added up together."""

    hour: int
    """In which the requests ended: its begin, seconds since 1970."""
    tenant: str
    model: str
    provider: str
    server_id: str
    task_type: int


@dataclass(slots=True)
class Tally:
    """Sums over attempts that have ended."""

    requests: int = 0
    """Attempts that gave an answer."""
    failed: int = 0
    """Attempts that gave none, or not all of it."""
    estimated: int = 0
    """Of all these, those whose tokens nobody has counted."""
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    """Of the prompt's."""
    completion_tokens: int = 0
    nano_usd: int = 0
    """1e-9 US dollars."""

    def add(self, other: Tally) -> None:
        self.requests += other.requests
        self.failed += other.failed
        self.estimated += other.estimated
        self.prompt_tokens += other.prompt_tokens
        self.cached_prompt_tokens += other.cached_prompt_tokens
        self.completion_tokens += other.completion_tokens
        self.nano_usd += other.nano_usd

    def values(self) -> tuple[int, ...]:
        """In the order of the fields."""
        return astuple(self)


@dataclass(eq=False, slots=True)
class UsageBook:
    """Sums that nobody has taken yet."""

    _tallies: dict[UsageKey, Tally] = field(default_factory=dict)

    def add(self, key: UsageKey, tally: Tally) -> None:
        known = self._tallies.get(key)
        if known is None:
            self._tallies[key] = tally
        else:
            known.add(tally)

    def take(self) -> dict[UsageKey, Tally]:
        """Everything since the last call."""
        taken, self._tallies = self._tallies, {}
        return taken

    def __len__(self) -> int:
        return len(self._tallies)
