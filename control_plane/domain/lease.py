"""The lease of a model server: how long the control plane believes its last word."""

from __future__ import annotations

import msgspec
from msgspec.structs import replace

from control_plane.domain.server import LeaseState


class Lease(msgspec.Struct, frozen=True):
    """LIVE while reports arrive, SUSPECT once the stream broke, LOST when `expires_at` passes."""

    epoch: int
    state: LeaseState
    expires_at: float
    """Monotonic seconds."""

    @staticmethod
    def grant(epoch: int, now: float, duration: float) -> Lease:
        return Lease(epoch, LeaseState.LIVE, now + duration)

    def renewed(self, now: float, duration: float) -> Lease:
        """After a report on the lease's own stream. A LOST lease does not come back: work was
        given elsewhere under the assumption that it ended, so the next epoch begins."""
        if self.state is LeaseState.LOST:
            return Lease.grant(self.epoch + 1, now, duration)
        return Lease(self.epoch, LeaseState.LIVE, now + duration)

    def broken(self) -> Lease:
        """After the stream broke. The expiry stands: a broken stream is no sign of life."""
        return replace(self, state=LeaseState.SUSPECT) if self.state is LeaseState.LIVE else self

    def at(self, now: float) -> Lease:
        """The lease once time has passed."""
        return replace(self, state=LeaseState.LOST) if now >= self.expires_at else self
