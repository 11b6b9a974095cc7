"""What the fleet's owner prefers: the numbers behind every choice."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import astuple, dataclass, field, fields
from types import MappingProxyType

from control_plane.domain.model import Provider


@dataclass(frozen=True, slots=True)
class Weights:
    """Weight of each scorer, >= 0, not all 0. Only their proportions matter.

    The field names are the scorers' names, in the order of `scorers.SCORERS`.

    Raises:
        ValueError: a weight is negative or not finite, or all are 0; names the field.
    """

    capability: float = 3.0
    success: float = 2.0
    latency: float = 3.0
    cost: float = 1.0
    load: float = 2.0
    provider: float = 1.0

    def __post_init__(self) -> None:
        for name, value in zip(_WEIGHT_NAMES, astuple(self), strict=True):
            if not 0 <= value < math.inf:
                raise ValueError(f"weights.{name} must be finite and >= 0, is {value}")
        if not any(astuple(self)):
            raise ValueError(f"weights: at least one of {', '.join(_WEIGHT_NAMES)} must be above 0")


_WEIGHT_NAMES = tuple(f.name for f in fields(Weights))


@dataclass(frozen=True, slots=True)
class Policy:
    """Weights, thresholds and references of the selector, validated.

    Raises:
        ValueError: a value is out of its range; names the field.
    """

    weights: Weights = field(default_factory=Weights)
    availability_threshold: float = 0.2
    """A pair of server and model whose success rate is below waits for its recovery, [0, 1]."""
    latency_reference_s: float = 5.0
    """Expected seconds that score 0.5, > 0."""
    ttft_prior_s: float = 0.5
    """Time to first token where none was measured, seconds, >= 0."""
    tpot_prior_s: float = 0.05
    """Time per output token where none was measured, seconds, >= 0."""
    load_time_prior_s: float = 10.0
    """Time to load a cold model where its server knows none, seconds, >= 0."""
    ttft_objective_s: float = 2.0
    """Seconds to the first token within which a request is served well, > 0; beside those for its prompt."""
    ttft_objective_per_prompt_token_s: float = 0.001
    """Seconds more per token of the prompt, >= 0."""
    tpot_objective_s: float = 0.15
    """Seconds per output token within which a request is served well, > 0."""
    late_binding_s: float = 0.05
    """A server whose prefill is busy for longer, seconds, gets no more: requests wait where they can still go
    elsewhere. > 0."""
    cost_reference_usd: float = 0.01
    """Expected price of a request that scores 0.5, US dollars, > 0."""
    expected_output_tokens: int = 256
    """Length of an answer whose request sets no max_tokens, >= 1."""
    provider_preference: Mapping[Provider, float] = field(default_factory=lambda: MappingProxyType({}))
    """Liking per provider, >= 0; one that is missing has 1. Scores are these divided by the largest."""

    spill_usd: float | None = None
    """Models that cost money are kept for what free ones cannot serve in time, at up to so many US dollars a request,
    >= 0. None: the score decides."""
    spill_below: float = 0.5
    """Chance to meet the objectives at home below which that is so, [0, 1]."""
    exploration: float = 0.0
    """Share of requests that go to one of those that score about as well as the best, in [0, 0.5]."""
    exploration_margin: float = 0.05
    """By how much the score of those may be less, [0, 1]."""

    shares: Weights = field(init=False, repr=False, compare=False)
    """Weights divided by their sum."""
    identity: object = field(init=False, repr=False, compare=False, default_factory=object)
    """Stands for this very policy where something is kept under a key."""
    preference_scale: float = field(init=False, repr=False, compare=False)
    """What preferences are divided by."""

    def __post_init__(self) -> None:
        if not 0 <= self.availability_threshold <= 1:
            raise ValueError(f"availability_threshold must be in [0, 1], is {self.availability_threshold}")
        for name in (
            "latency_reference_s", "cost_reference_usd", "ttft_objective_s", "tpot_objective_s", "late_binding_s",
        ):  # fmt: skip
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be finite and > 0, is {getattr(self, name)}")
        for name in ("ttft_prior_s", "tpot_prior_s", "load_time_prior_s", "ttft_objective_per_prompt_token_s"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be finite and >= 0, is {getattr(self, name)}")
        if self.spill_usd is not None and not 0 <= self.spill_usd < math.inf:
            raise ValueError(f"spill_usd must be finite and >= 0, is {self.spill_usd}")
        if not 0 <= self.spill_below <= 1:
            raise ValueError(f"spill_below must be in [0, 1], is {self.spill_below}")
        if not 0 <= self.exploration <= 0.5:
            raise ValueError(f"exploration must be in [0, 0.5], is {self.exploration}")
        if not 0 <= self.exploration_margin <= 1:
            raise ValueError(f"exploration_margin must be in [0, 1], is {self.exploration_margin}")
        if self.expected_output_tokens < 1:
            raise ValueError(f"expected_output_tokens must be >= 1, is {self.expected_output_tokens}")
        for provider, liking in self.provider_preference.items():
            if not 0 <= liking < math.inf:
                raise ValueError(f"provider_preference.{provider} must be finite and >= 0, is {liking}")
        object.__setattr__(self, "preference_scale", max(1.0, *self.provider_preference.values(), 0.0))
        # Dividing by the largest first keeps huge weights from overflowing in the sum.
        largest = max(astuple(self.weights))
        scaled = [weight / largest for weight in astuple(self.weights)]
        # A frozen value with derived parts: they are set once, here.
        object.__setattr__(self, "shares", Weights(*(weight / sum(scaled) for weight in scaled)))

    def ttft_objective(self, prompt_tokens: int) -> float:
        """Seconds from arrival to the first token within which a request is served well."""
        return self.ttft_objective_s + self.ttft_objective_per_prompt_token_s * prompt_tokens
