"""Now here, or later elsewhere: when waiting for a busy server is better than starting at once on a free one.

A prompt that a fast server begins in a second and a slow one needs a minute for is not to be taken by the slow one only
because that is idle. Rows that cannot start the request now compete with the one that would be chosen by their score
without the load, which says nothing of the time when they start: their start is part of the forecast. Where the one
that is free is in time and begins its answer no later than the other, it is taken all the same: so the fast servers
stay free for those who need them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from control_plane.selection.query import Query
from control_plane.selection.scorers import latency
from control_plane.selection.table import Floats, Mask

_SURE = 0.84
"""Chance of meeting the objective at which it is taken as met: one standard deviation to spare."""


@dataclass(frozen=True, slots=True)
class Better:
    """The row worth waiting for."""

    row: int
    start: float
    """Seconds until it is expected to begin."""

    def detail(self, query: Query, row: int) -> str:
        """Why a free row is rejected."""
        rival, expected = query.table.rows[self.row], query.forecast
        return (
            f"first token expected in {expected.ttft[row]:.2f} s; {rival.server_id}/{rival.card.name} is expected to "
            f"start it in {self.start:.2f} s and to have it in {expected.ttft[self.row]:.2f} s"
        )


def better_later(query: Query, present: Mask, eligible: Mask, chosen: int, scores: Floats) -> Better | None:
    """The row that is worth waiting for rather than starting on `chosen`; None if none is. scores: without the load,
    shape (rows,)."""
    rivals = present & ~eligible
    if query.table.warm is not None:
        rivals &= query.table.warm
    if not np.count_nonzero(rivals):
        return None
    best = int(np.where(rivals, scores, -1.0).argmax())
    if scores[best] <= scores[chosen]:
        return None
    expected = query.forecast
    if expected.meets[chosen] >= _SURE and expected.ttft[chosen] <= expected.ttft[best]:
        return None
    return Better(best, float(query.forecast.start[best]))


def worth_waiting_for(query: Query, present: Mask) -> int:
    """The row for which a request waits where none can start it, -1 if none is there."""
    return int(np.where(present, latency(query), -1.0).argmax()) if present.any() else -1
