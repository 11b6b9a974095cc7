"""What a prediction is made from, and how: values only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeAlias, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from control_plane.domain.model import ModelName, Provider, ServerId

RowKey: TypeAlias = tuple[ServerId, ModelName, Provider]
"""One model on one server."""

Number = TypeVar("Number", float, NDArray[np.float64])
"""A number, or a column of them."""

Vector: TypeAlias = NDArray[np.float64]

MOST = 1e9
"""Of any count: more is absurd."""


@dataclass(frozen=True, slots=True)
class Kin:
    """Where a row belongs, and what its server says of its speed."""

    engine: str
    device: str
    """The class of hardware."""
    model: str
    fingerprint: str = ""
    """Of the configuration: quantization, context, engine version."""
    prefill: float | None = None
    """Prompt tokens per second that the server says it can prefill. None: it does not say."""
    decode: float | None = None
    """Tokens per second of a single stream."""
    ttft: float | None = None
    """Mean seconds to the first token that the server measured."""
    tpot: float | None = None
    """Mean seconds per output token that the server measured."""


class Features(msgspec.Struct, frozen=True):
    """A request at its dispatch, as the control plane knows it."""

    prompt_tokens: float
    cached_tokens: float = 0.0
    """Of the prompt, in the server's prefix cache: as predicted; as reported, where an answer is observed."""
    backlog_tokens: float = 0.0
    """Uncached prompt tokens of the requests ahead that have no first token yet."""
    streams: float = 0.0
    """Other requests that are decoding."""
    waiting: float = 0.0
    """Requests that the server has accepted and not started for want of a slot."""
    kv: float = 0.0
    """Share of the KV cache in use, [0, 1]. Kept for what reads it later; no formula here does."""
    cold: bool = False
    """The model has to be loaded first: the time to the first token says nothing of the next."""

    @property
    def uncached_tokens(self) -> float:
        """Of the prompt, >= 0."""
        return count(count(self.prompt_tokens) - count(self.cached_tokens))


class Coefficients(msgspec.Struct, Generic[Number], frozen=True):
    """Of one row (floats) or of many (columns); all finite and >= 0.

    median TTFT = base + per_prompt_token * uncached + per_backlog_token * backlog + per_waiting * waiting
    median TPOT = tpot_base + tpot_per_stream * streams
    quantile    = median * spread of its level
    """

    base: Number
    """Seconds."""
    per_prompt_token: Number
    """Seconds per uncached token of the prompt."""
    per_backlog_token: Number
    """Seconds per uncached token of those ahead in prefill."""
    per_waiting: Number
    """Seconds per request that waits on the server for a slot."""
    tpot_base: Number
    """Seconds."""
    tpot_per_stream: Number
    """Seconds per other decoding stream."""
    ttft_spread: tuple[Number, ...]
    """Quantile / median, one for each of the policy's levels."""
    tpot_spread: tuple[Number, ...]
    evidence: Number
    """Effective number of observations of the row itself, those of long ago count less. 0: all is guessed from kin."""


def ttft(coefficients: Coefficients[Number], uncached: Number, backlog: Number, waiting: Number) -> Number:
    """Median seconds from dispatch to the first token of a warm model. Floats or columns, each >= 0."""
    return (
        coefficients.base
        + coefficients.per_prompt_token * uncached
        + coefficients.per_backlog_token * backlog
        + coefficients.per_waiting * waiting
    )


def tpot(coefficients: Coefficients[Number], streams: Number) -> Number:
    """Median seconds per output token beside other streams. Floats or columns, each >= 0."""
    return coefficients.tpot_base + coefficients.tpot_per_stream * streams


def predict(coefficients: Coefficients[float], features: Features) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Quantiles of TTFT and TPOT in seconds, one for each of the policy's levels; without the load time of a cold
    model."""
    first = ttft(coefficients, features.uncached_tokens, count(features.backlog_tokens), count(features.waiting))
    each = tpot(coefficients, count(features.streams))
    return (
        tuple(first * spread for spread in coefficients.ttft_spread),
        tuple(each * spread for spread in coefficients.tpot_spread),
    )


def count(value: float) -> float:
    """A count as it may enter a formula: what is negative or no number counts as 0, what is infinite as `MOST`."""
    return (value if value < MOST else MOST) if value > 0 else 0.0


def duration(value: float | None, least: float, most: float) -> float | None:
    """Seconds; None for what is not within bounds, and so no duration."""
    return value if value is not None and least <= value <= most else None
