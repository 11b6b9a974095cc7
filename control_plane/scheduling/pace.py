"""How often something may happen: at once for a while, then at a steady rate."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class TokenBucket:
    """Tokens come back one per `interval`, at most `burst` are kept; each event takes one.

    Source: J. Turner, "New Directions in Communications", IEEE Communications Magazine, 1986.
    """

    burst: int
    """>= 1."""
    interval: float
    """Seconds, > 0."""
    _tokens: float = field(init=False)
    _at: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        if self.burst < 1:
            raise ValueError(f"burst must be >= 1, is {self.burst}")
        if not self.interval > 0:
            raise ValueError(f"interval must be > 0, is {self.interval}")
        self._tokens = float(self.burst)

    def take(self, now: float) -> float:
        """Take a token at `now` (monotonic seconds); the seconds until the next event may happen, 0 if it may at
        once."""
        gained = max(0.0, now - self._at) / self.interval
        self._tokens = min(float(self.burst), self._tokens + gained) - 1
        self._at = now
        return max(0.0, 1 - self._tokens) * self.interval
