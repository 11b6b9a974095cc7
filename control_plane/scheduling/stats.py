"""What the control plane has measured of one model on one server."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import overload

import msgspec
from msgspec.structs import replace


@dataclass(frozen=True, slots=True)
class StatsPolicy:
    """How fast statistics move.

    Raises:
        ValueError: a value is out of its range; names the field.
    """

    alpha: float = 0.2
    """Weight of the newest observation, (0, 1]."""
    recovery_half_life: float = 60.0
    """Seconds in which a success rate without observations gets half-way back to where it began, > 0."""
    initial_success: float = 1.0
    """Success rate before anything was observed, [0, 1]. Below the selector's threshold nothing is ever tried."""

    def __post_init__(self) -> None:
        if not 0 < self.alpha <= 1:
            raise ValueError(f"alpha must be in (0, 1], is {self.alpha}")
        if not 0 < self.recovery_half_life < math.inf:
            raise ValueError(f"recovery_half_life must be finite and > 0, is {self.recovery_half_life}")
        if not 0 <= self.initial_success <= 1:
            raise ValueError(f"initial_success must be in [0, 1], is {self.initial_success}")


class RuntimeStats(msgspec.Struct, frozen=True):
    """Exponential moving averages: next = old + alpha * (observed - old).

    The success rate drifts back to its prior as time passes. Without that, a pair that has sunk below the selector's
    availability threshold would get no request, so no observation, and so never come back.
    """

    policy: StatsPolicy
    prior: float
    """Where the success rate began and what it drifts back to, [0, 1]."""
    success: float
    """Success rate right after the latest observation, [0, 1]; `success_at` has today's."""
    ttft: float | None = None
    """Seconds to the first token. None: never measured."""
    tpot: float | None = None
    """Seconds per output token. None: never measured."""
    service: float | None = None
    """Seconds that a request holds its slot, from dispatch to result. None: never measured."""
    requests: int = 0
    """Observed, failed ones included."""
    failures: int = 0
    updated_at: float = 0.0
    """Monotonic seconds of the latest observation."""

    @classmethod
    def initial(
        cls,
        policy: StatsPolicy,
        *,
        success: float | None = None,
        ttft: float | None = None,
        tpot: float | None = None,
    ) -> RuntimeStats:
        """Before any observation; None takes the policy's."""
        prior = policy.initial_success if success is None else min(1.0, max(0.0, success))
        return cls(policy, prior, prior, ttft, tpot)

    def success_at(self, now: float) -> float:
        """Success rate at a time, [0, 1]: the distance to the prior halves every `recovery_half_life`."""
        idle = max(0.0, now - self.updated_at)
        return self.prior + (self.success - self.prior) * math.exp2(-idle / self.policy.recovery_half_life)

    def observe_success(
        self, ttft: float | None, tpot: float | None, now: float, service: float | None = None
    ) -> RuntimeStats:
        """After a request that succeeded. None: not measured in this one (an embedding has no tokens)."""
        return RuntimeStats(
            self.policy,
            self.prior,
            success=self._moved(self.success_at(now), 1.0),
            ttft=self._moved(self.ttft, ttft),
            tpot=self._moved(self.tpot, tpot),
            service=self._moved(self.service, service),
            requests=self.requests + 1,
            failures=self.failures,
            updated_at=now,
        )

    def observe_failure(self, now: float) -> RuntimeStats:
        """After a request that failed by the server's fault."""
        return replace(
            self,
            success=self._moved(self.success_at(now), 0.0),
            requests=self.requests + 1,
            failures=self.failures + 1,
            updated_at=now,
        )

    def renewed(self, now: float) -> RuntimeStats:
        """After the server was started anew: one death fails all that runs there at once, and says nothing of the next
        process. How fast it is has not changed."""
        return replace(self, success=self.prior, updated_at=now)

    @overload
    def _moved(self, old: float, observed: float) -> float: ...

    @overload
    def _moved(self, old: float | None, observed: float | None) -> float | None: ...

    def _moved(self, old: float | None, observed: float | None) -> float | None:
        if old is None or observed is None:
            return old if observed is None else observed
        return old + self.policy.alpha * (observed - old)
