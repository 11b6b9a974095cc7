"""Ports: what the control plane needs from outside."""

from __future__ import annotations

from typing import Protocol


class Clock(Protocol):
    """Time, injected once at the composition root."""

    def monotonic(self) -> float:
        """Seconds from some fixed point, never going back. For every interval."""
        ...

    def wall(self) -> float:
        """Seconds since 1970. For showing to people only."""
        ...
