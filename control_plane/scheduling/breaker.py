"""Circuit breaker of one model on one server.

Pattern: M. Nygard, Release It!, "Circuit Breaker". CLOSED: requests pass. After `failures` failures in a row OPEN:
none passes until a pause is over. Then HALF_OPEN: one at a time is let through; its success closes the breaker, its
failure opens it for a longer pause.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from control_plane.domain.server import BreakerState


@dataclass(frozen=True, slots=True)
class BreakerPolicy:
    """When a breaker opens and for how long.

    Raises:
        ValueError: a value is out of its range; names the field.
    """

    failures: int = 5
    """Failures in a row that open it, >= 1."""
    pause: float = 1.0
    """Seconds until the first trial, > 0."""
    pause_factor: float = 2.0
    """Growth of the pause per failed trial, >= 1."""
    pause_cap: float = 30.0
    """Longest pause in seconds, > 0."""

    def __post_init__(self) -> None:
        if self.failures < 1:
            raise ValueError(f"failures must be >= 1, is {self.failures}")
        if not 1 <= self.pause_factor < math.inf:
            raise ValueError(f"pause_factor must be finite and >= 1, is {self.pause_factor}")
        for name in ("pause", "pause_cap"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be finite and > 0, is {getattr(self, name)}")


@dataclass(frozen=True, slots=True)
class Breaker:
    """A breaker at one moment; every transition returns the next.

    Every request that `allows` lets pass is announced with `on_dispatch` and ends with exactly one of `on_success`,
    `on_failure` and `on_cancel`. Whoever dispatches keeps `epoch` as it was right after `on_dispatch` and hands it
    back with the outcome: outcomes of an earlier epoch change nothing, so that a request from before the breaker
    opened can neither close it nor free the place of the trial.
    """

    policy: BreakerPolicy
    state: BreakerState = BreakerState.CLOSED
    """OPEN until a trial is dispatched, even when the pause is over."""
    failed: int = 0
    """While CLOSED: failures in a row."""
    pause: float = 0.0
    """Latest pause in seconds; 0 while CLOSED."""
    retry_at: float = 0.0
    """While OPEN: monotonic seconds at which a trial may start."""
    on_trial: bool = False
    """While HALF_OPEN: the one place is taken."""
    epoch: int = 0
    """Grows when the breaker opens, closes or starts a trial."""

    @classmethod
    def closed(cls, policy: BreakerPolicy) -> Breaker:
        """A new one, through which requests pass."""
        return cls(policy)

    @property
    def doubtful(self) -> bool:
        """Whether the latest request that said anything has failed."""
        return self.state is not BreakerState.CLOSED or self.failed > 0

    def allows(self, now: float) -> bool:
        """Whether a request may be dispatched."""
        if self.state is BreakerState.CLOSED:
            return True
        return not self.on_trial if self.state is BreakerState.HALF_OPEN else now >= self.retry_at

    def on_dispatch(self, now: float) -> Breaker:
        """A request goes out. Raises ValueError if the breaker does not allow it."""
        if not self.allows(now):
            raise ValueError(f"a breaker that is {self.state.name} lets no request pass")
        if self.state is BreakerState.CLOSED:
            return self
        return replace(self, state=BreakerState.HALF_OPEN, on_trial=True, epoch=self.epoch + 1)

    def on_success(self, now: float, epoch: int) -> Breaker:
        """A request has succeeded."""
        if self._stale(epoch):
            return self
        if self.state is BreakerState.CLOSED:
            return replace(self, failed=0) if self.failed else self
        return Breaker(self.policy, epoch=self.epoch + 1)

    def on_failure(self, now: float, epoch: int) -> Breaker:
        """A request has failed by the server's fault."""
        if self._stale(epoch) or self.state is BreakerState.OPEN:
            return self
        failed = self.failed + 1
        if self.state is BreakerState.CLOSED and failed < self.policy.failures:
            return replace(self, failed=failed)
        longer = self.pause * self.policy.pause_factor if self.pause else self.policy.pause
        pause = min(longer, self.policy.pause_cap)
        return Breaker(
            self.policy, BreakerState.OPEN, pause=pause, retry_at=now + pause, on_trial=False, epoch=self.epoch + 1
        )

    def on_cancel(self, now: float, epoch: int) -> Breaker:
        """A request has ended without a word about the server; a trial frees its place."""
        return self if self._stale(epoch) or not self.on_trial else replace(self, on_trial=False)

    def _stale(self, epoch: int) -> bool:
        return epoch != self.epoch
