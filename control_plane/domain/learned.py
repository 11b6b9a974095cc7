"""What outlives a control plane of what it measured."""

from __future__ import annotations

from dataclasses import dataclass

from control_plane.domain.model import ModelName, Provider, ServerId


@dataclass(frozen=True, slots=True)
class Learned:
    """Moving averages of one model on one server."""

    server_id: ServerId
    model: ModelName
    provider: Provider
    fingerprint: str
    """Under which it was learned; under another one it says nothing."""
    success: float
    """[0, 1] at `at`."""
    at: float
    """Seconds since 1970."""
    ttft: float | None = None
    tpot: float | None = None
    service: float | None = None
    requests: int = 0
    failures: int = 0
