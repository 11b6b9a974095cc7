"""A model as the selector sees it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from types import MappingProxyType
from typing import NewType

import msgspec

from control_plane.domain.task import Feature, TaskType

# Prices come from servers and may be absurd; the contract has 64 bits for what they amount to.
_MOST_NANO_USD = 2**63 - 1

ServerId = NewType("ServerId", str)
ModelName = NewType("ModelName", str)
Provider = NewType("Provider", str)


class ModelState(IntEnum):
    """Where a model is in its life on one server. Numbers equal those of the contract."""

    ABSENT = 1
    PULLING = 2
    COLD = 3
    LOADING = 4
    WARM = 5
    FAILED = 6

    @property
    def serves(self) -> bool:
        """Whether a request can be sent: a cold model loads when one comes."""
        return self in (ModelState.COLD, ModelState.LOADING, ModelState.WARM)


@dataclass(frozen=True, slots=True)
class Price:
    """US dollars per million tokens, all >= 0."""

    prompt: float = 0.0
    cached_prompt: float = 0.0
    completion: float = 0.0

    def nano_usd(self, prompt_tokens: int, cached_prompt_tokens: int, completion_tokens: int) -> int:
        """Price of a request in 1e-9 US dollars, rounded to the nearest whole, at most 2**63 - 1."""
        cached = min(cached_prompt_tokens, prompt_tokens)
        nano_usd = 1e3 * (
            (prompt_tokens - cached) * self.prompt + cached * self.cached_prompt + completion_tokens * self.completion
        )
        return round(nano_usd) if nano_usd < _MOST_NANO_USD else _MOST_NANO_USD


class ModelCard(msgspec.Struct, frozen=True):
    """One model on one server, definitions applied."""

    name: ModelName
    provider: Provider
    context_length: int
    capabilities: Mapping[TaskType, float] = msgspec.field(default_factory=lambda: MappingProxyType({}))
    """Score in [0, 1] per kind of work; a missing kind is not offered."""
    features: Feature = Feature.NONE
    price: Price = Price()
    quantization: str = ""
    ttft: float | None = None
    """Mean time to first token that the server measured, seconds."""
    tpot: float | None = None
    """Mean time per output token that the server measured, seconds."""
    state: ModelState = ModelState.WARM
    state_detail: str = ""
    """For people: why it failed, or how far it is."""
    memory_bytes: int = 0
    """Memory that it takes while warm. 0: not known."""
    load_time: float | None = None
    """Seconds from cold to warm. None: not known."""
    fingerprint: str = ""
    """Changes when what was learned of the model no longer holds. Empty: never changes."""

    @property
    def id(self) -> str:
        return f"{self.provider}/{self.name}"
