"""The record of a choice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum

from control_plane.domain.model import ModelName, Provider, ServerId


class Verdict(IntEnum):
    """Numbers equal those of the contract."""

    CHOSEN = 1
    WAIT = 2
    IMPOSSIBLE = 3


class RejectionReason(IntEnum):
    """Numbers equal those of the contract. See there for what each means."""

    MODEL_MISMATCH = 1
    PROVIDER_MISMATCH = 2
    SERVER_MISMATCH = 3
    TASK_TYPE = 4
    CONTEXT_TOO_SHORT = 5
    FEATURE_MISSING = 6
    EXCLUDED = 7
    AVAILABILITY = 8
    BREAKER_OPEN = 9
    NOT_READY = 10
    DRAINING = 11
    NO_FREE_SLOT = 12
    LOADING_TAKES_LONGER = 13
    MODEL_NOT_HERE = 14
    TOO_EXPENSIVE = 15
    BUDGET = 16
    PREFILL_BUSY = 17
    BETTER_LATER = 18
    SPARED = 19

    @property
    def permanent(self) -> bool:
        """True if no passing of time can mend it."""
        return self <= RejectionReason.EXCLUDED or self is RejectionReason.TOO_EXPENSIVE


@dataclass(frozen=True, slots=True)
class Rejection:
    reason: RejectionReason
    detail: str


@dataclass(frozen=True, slots=True)
class ScorePart:
    scorer: str
    value: float
    """[0, 1], more is better."""
    weight: float


@dataclass(frozen=True, slots=True)
class ScoredCandidate:
    server_id: ServerId
    model: ModelName
    provider: Provider
    score: float
    """Weighted mean of the parts, [0, 1]."""
    parts: tuple[ScorePart, ...]
    rejections: tuple[Rejection, ...]
    estimated_cost_nano_usd: int = 0
    """With as many tokens as the request may generate, 1e-9 US dollars."""
    terms: Mapping[str, float] = field(default_factory=dict)
    """Numbers of this candidate that enter the formulas, by name."""


@dataclass(frozen=True, slots=True)
class DecisionRecord:
    """A choice with every candidate, eligible ones first, best first."""

    verdict: Verdict
    chosen: ScoredCandidate | None
    candidates: tuple[ScoredCandidate, ...]
    summary: str
    """One sentence for people."""
    formulas: tuple[tuple[str, str], ...] = ()
    """Name and text of each, in the order in which they can be computed."""
    terms: Mapping[str, float] = field(default_factory=dict)
    """Numbers of the request and of the configuration that enter the formulas, by name."""
    propensity: float = 1.0
    """Probability with which this choice was made: below 1 where others are explored."""
    explored: bool = False
    """Another one than the best was chosen, to learn of it."""
