"""When a failed attempt is made again, how often, how soon, and who is to blame."""

from __future__ import annotations

import math
from dataclasses import dataclass

FINAL_REASONS = frozenset({"INVALID_REQUEST", "DEADLINE_EXCEEDED", "SLOW_READER"})
"""The request itself is at fault, or its caller: another server would say the same."""

REQUEST_REASONS = frozenset({"UNSUPPORTED", "CONTEXT_TOO_LONG", "CONTENT_REFUSED"})
"""The request does not suit this model; another may do. Where none does, waiting does not help either."""

BLAMELESS_REASONS = (
    REQUEST_REASONS | {"SERVER_BUSY", "DRAINING", "UNKNOWN_MODEL", "RATE_LIMITED", "OUT_OF_MEMORY"} | {"TICKET_REFUSED"}
)
"""The server is sound but not the right one at this moment: another may do."""

STANDING_REASONS = REQUEST_REASONS | {
    "DRAINING",
    "UNKNOWN_MODEL",
    "RATE_LIMITED",
    "OUT_OF_MEMORY",
    "CREDENTIALS_REJECTED",
}
"""Asked again within the life of a request, this server would say the same."""


def retryable(reason: str) -> bool:
    """Whether another server may succeed. Reasons are those of modelyard/v1/orchestrator.proto."""
    return reason not in FINAL_REASONS


def repeatable(reason: str) -> bool:
    """Whether the same server may succeed if there is no other."""
    return retryable(reason) and reason not in STANDING_REASONS


def blames_server(reason: str) -> bool:
    """Whether the failure counts against the server's success rate and circuit breaker."""
    return reason not in FINAL_REASONS and reason not in BLAMELESS_REASONS


class Allowance:
    """For how many requests two servers may be asked: a share of them all, and a few at once.

    Source: the retry budget of Finagle, a token bucket that requests fill.
    """

    _MOST = 10.0

    def __init__(self, share: float) -> None:
        """`share` of the requests, in [0, 1]. Raises ValueError."""
        if not 0 <= share <= 1:
            raise ValueError(f"share must be in [0, 1], is {share}")
        self._share = share
        self._tokens = 0.0

    def request(self) -> None:
        """One more has come."""
        self._tokens = min(self._MOST, self._tokens + self._share)

    def left(self) -> bool:
        """Whether one may be asked twice now."""
        return self._tokens >= 1.0

    def spend(self) -> None:
        """One is."""
        self._tokens -= 1.0


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Exponential backoff with full jitter.

    Source: M. Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.

    Raises:
        ValueError: a value is out of its range; names the field.
    """

    max_attempts: int = 3
    """Attempts of a request, the first one included, >= 1."""
    base: float = 0.02
    """Longest delay before the first retry, seconds, >= 0."""
    factor: float = 2.0
    """Growth of the longest delay per retry, >= 1."""
    cap: float = 2.0
    """Bound of the longest delay, seconds, >= 0."""

    def __post_init__(self) -> None:
        if self.max_attempts < 1:
            raise ValueError(f"max_attempts must be >= 1, is {self.max_attempts}")
        if not 1 <= self.factor < math.inf:
            raise ValueError(f"factor must be finite and >= 1, is {self.factor}")
        for name in ("base", "cap"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be finite and >= 0, is {getattr(self, name)}")

    def delay(self, attempt: int, jitter01: float) -> float:
        """Seconds to wait after attempt number `attempt` (from 1) has failed.

        `jitter01` is a random number in [0, 1]; delay = jitter01 * min(cap, base * factor ** (attempt - 1)).
        """
        longest = self.base
        # Step by step: the power would overflow for a large attempt.
        for _ in range(attempt - 1):
            longest *= self.factor
            if longest >= self.cap:
                break
        return jitter01 * min(self.cap, longest)
