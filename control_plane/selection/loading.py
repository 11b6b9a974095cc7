"""Load here, queue there, or use another: when a cold model is worth its loading.

A row whose model is cold would keep the request waiting for `load_time`. It is rejected if another row, one that is
warm and could serve the request, is expected to start it sooner: at once with a free slot, else after
(waiting + 1) / slots * service time. If no warm row is sooner, the cold one wins or loses by its score.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from control_plane.selection.forecast import load_seconds, service_seconds
from control_plane.selection.query import Query
from control_plane.selection.table import Mask


@dataclass(frozen=True, slots=True)
class Outrun:
    """Cold rows that are not worth their loading, and why."""

    rows: Mask
    """Those rows, shape (rows,)."""
    rival: int
    """The warm row that is expected to start first."""
    start: float
    """Seconds until it does."""

    def detail(self, query: Query, row: int) -> str:
        """Why one of `rows` is rejected."""
        rival = query.table.rows[self.rival]
        start = f"is expected to start it in {self.start:.1f} s" if self.start else "can start it now"
        loading = load_seconds(query.table, query.policy)[row]
        return f"loading takes about {loading:.1f} s; {rival.server_id}/{rival.card.name} {start}"


def outrun(query: Query, capable: Mask, present: Mask) -> Outrun | None:
    """The cold ones among the `capable` rows that a warm one outruns, which is one of those `present`; None if there is
    none of either."""
    table = query.table
    if table.cold is None or table.warm is None:
        return None
    rivals = present & table.warm
    idle = rivals & (table.free > 0)
    if np.count_nonzero(idle):
        rival, start = int(idle.argmax()), 0.0
    elif np.count_nonzero(rivals):
        expected = query.forecast
        service = service_seconds(table, expected.seconds - expected.start)
        turns = (table.waiting + (query.queued + 1)) * table.per_slot
        starts = np.where(rivals, turns * service, np.inf)
        rival = int(starts.argmin())
        start = float(starts[rival])
    else:
        return None
    return Outrun(capable & table.cold & (start < load_seconds(table, query.policy)), rival, start)
