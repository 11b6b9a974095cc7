"""Home first: models that cost money are kept for what free ones cannot serve in time, and then at a price limit.

Off unless the policy has `spill_usd`. A row that costs nothing is at home. Where one at home is capable, the rows that
cost are left alone as long as the best at home that is there meets the objectives with a chance of at least
`spill_below`, and those that are expected to cost more than `spill_usd` for this request always. Work in the background
is content with whenever home has time for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from control_plane.selection.query import Query
from control_plane.selection.scorers import usd
from control_plane.selection.table import Mask


@dataclass(frozen=True, slots=True)
class Spared:
    """Rows that are left alone, and why."""

    rows: Mask
    """Those rows, shape (rows,)."""
    home: int
    """The row at home that does it; -1: none, these are too dear."""

    def detail(self, query: Query, row: int) -> str:
        """Why one of `rows` is rejected."""
        if self.home < 0:
            return (
                f"expected to cost {usd(query)[row]:.6f} US dollars > {query.policy.spill_usd:.6f} for what home cannot"
            )
        rival = query.table.rows[self.home]
        chance = float(query.forecast.meets[self.home])
        return f"costs money; {rival.server_id}/{rival.card.name} serves it in time with a chance of {chance:.2f}"


def spared(query: Query, capable: Mask, present: Mask) -> Spared | None:
    """The rows that are left alone for home's sake. None: no row is, or the policy does not ask."""
    limit, paid = query.policy.spill_usd, query.table.paid
    if limit is None or paid is None or not (capable & ~paid).any():
        return None
    home = present & ~paid
    if home.any():
        best = int(np.where(home, query.forecast.meets, -1.0).argmax())
        if query.content or query.forecast.meets[best] >= query.policy.spill_below:
            return Spared(paid, best)
    dear = paid & (usd(query) > limit)
    return Spared(dear, -1) if dear.any() else None
