"""Now here, or later elsewhere: when waiting for a busy server is better than starting at once on a free one.

A prompt that a fast server begins in a second and a slow one needs a minute for is not to be taken by the slow one only
because that is idle. Rows that cannot start the request now compete with the one that would be chosen by their score
without the load, which says nothing of the time when they start: their start is part of the forecast. Where the one
that is free is in time and begins its answer no later than the other, it is taken all the same: so the fast servers
stay free for those who need them. And a request that is late anyway does not wait for a fast server until its client
leaves.
"""

from __future__ import annotations

import math

import msgspec
import numpy as np

from control_plane.selection.filters import AVOIDED, passing, permanent, present
from control_plane.selection.query import Query
from control_plane.selection.scorers import latency
from control_plane.selection.table import Floats, Mask

_SURE = 0.84
"""Chance of meeting the objective at which it is taken as met: one standard deviation to spare."""
_LAST_CHANCE = 1.25
"""Of the seconds to the first token on a free server: with less than that left, one that is late takes it."""


class Better(msgspec.Struct, frozen=True):
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


def better_later(query: Query, startable: Mask, eligible: Mask, chosen: int, scores: Floats) -> Better | None:
    """The row that is worth waiting for rather than starting on `chosen`; None if none is. scores: without the load,
    shape (rows,)."""
    rivals = startable & ~eligible
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
    if query.late and _rather_now(query, startable, chosen, best):
        return None
    return Better(best, float(query.forecast.start[best]))


def _rather_now(query: Query, startable: Mask, chosen: int, best: int) -> bool:
    """Whether one that is late starts on the free row `chosen`. Before it starts on `best` all go first that can still
    be served well, and so they have done for as long as it waits: that long they are expected to go on. Once no server
    could be in time for it, however idle, that is too long if the free one has its first token sooner; and at any time
    if its client will leave. Only a row that is known to answer, and how soon, is worth giving up the other for."""
    table, expected = query.table, query.forecast
    surely = float(expected.ttft[chosen] * np.exp(table.sigmas[0, chosen]))
    if table.success[chosen] < _SURE or surely > query.left:
        return False
    soonest = float((expected.ttft - expected.start)[startable].min())
    hopeless = query.waited + soonest > query.policy.ttft_objective(query.request.prompt_tokens)
    sooner = surely <= expected.ttft[best] + query.waited
    return (hopeless and sooner) or query.left < _LAST_CHANCE * surely


def in_vain(query: Query, row: int) -> bool:
    """Whether its client is expected to be gone before its first token."""
    return bool(query.forecast.ttft[row] > query.left)


def sooner(query: Query, elapsed: float) -> bool:
    """Whether to begin anew on another server is better than to go on waiting for a first token that is overdue. It may
    take as long again; where all servers are slow, to leave each of them half-way would get no answer at all."""
    there = passing(AVOIDED, query, permanent(query)) & present(query)
    surely = float((query.forecast.ttft * np.exp(query.table.sigmas[0]))[there].min(initial=math.inf))
    return surely <= query.left and (surely <= elapsed or query.left < _LAST_CHANCE * surely)


def worth_waiting_for(query: Query, startable: Mask) -> int:
    """The row for which a request waits where none can start it, -1 if none is there."""
    return int(np.where(startable, latency(query), -1.0).argmax()) if startable.any() else -1
