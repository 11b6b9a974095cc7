"""Moving means of what requests took, per model, for `Performance` of the contract."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

_WEIGHT = 0.2
"""Of the newest request in a moving mean."""
_MEMORY_SECONDS = 30.0
"""Busy seconds after which a token's share in the throughput has fallen to 1/e."""
_LEAST_PREFILL_TOKENS = 32
"""Shorter prompts tell of overheads, not of the speed of prefill."""


@dataclass(frozen=True, slots=True)
class Timing:
    """What one request took, in seconds; None where it did not get that far."""

    queued: float
    ttft: float | None
    tpot: float | None
    total: float


@dataclass(frozen=True, slots=True)
class Means:
    """None and 0: not known yet."""

    ttft: float | None = None
    tpot: float | None = None
    prefill_tokens_per_second: float = 0.0
    decode_tokens_per_second: float = 0.0


class _Model:
    def __init__(self) -> None:
        self.ttft: float | None = None
        self.tpot: float | None = None
        self.prefill: float | None = None
        self.running = 0
        self.busy = 0.0
        self.tokens = 0.0
        self.since = 0.0


class Recorder:
    """Fed by the servicer: `begin` and `end` around each generation."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._models: dict[str, _Model] = {}

    def begin(self, name: str) -> None:
        model = self._models.setdefault(name, _Model())
        self._pass_time(model)
        model.running += 1

    def end(self, name: str, timing: Timing | None, *, computed: int = 0, generated: int = 0) -> None:
        """`timing` is None for a failed request, which only stops counting as running.

        `computed` are the prompt tokens that no cache had, `generated` those of the answer.
        """
        model = self._models[name]
        self._pass_time(model)
        model.running -= 1
        if timing is None:
            return
        model.tokens += generated
        model.ttft = _mean(model.ttft, timing.ttft)
        model.tpot = _mean(model.tpot, timing.tpot)
        if timing.ttft is not None and computed >= _LEAST_PREFILL_TOKENS:
            seconds = timing.ttft - timing.queued
            if seconds > 0:
                model.prefill = _mean(model.prefill, computed / seconds)

    def _pass_time(self, model: _Model) -> None:
        now = self._clock()
        if model.running:
            passed = now - model.since
            fading = math.exp(-passed / _MEMORY_SECONDS)
            model.busy = model.busy * fading + passed
            model.tokens *= fading
        model.since = now

    def means(self, name: str) -> Means | None:
        """None if nothing was measured yet."""
        model = self._models.get(name)
        if model is None or model.ttft is None:
            return None
        return Means(
            ttft=model.ttft,
            tpot=model.tpot,
            prefill_tokens_per_second=model.prefill or 0.0,
            decode_tokens_per_second=model.tokens / model.busy if model.busy > 0 else 0.0,
        )


def _mean(mean: float | None, value: float | None) -> float | None:
    if value is None:
        return mean
    return value if mean is None else mean + _WEIGHT * (value - mean)
