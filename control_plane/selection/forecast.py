"""What is expected of every row for a request: when it starts, its TTFT and TPOT, and the chance that both are good.

start = the longer of: prefill of those before; waiting for a slot; and then loading a cold model. Seconds.
ttft  = start + base + per_prompt_token * uncached prompt tokens
tpot  = tpot_base + tpot_per_stream * streams
meets = P(waited + ttft <= objective) * P(tpot <= objective), each 1 / (1 + exp(-1.702 z)) with
z = ln(objective / expected) / sigma: the logistic approximation of the normal distribution, off by less than 0.01.
Source: Bowling et al., "A logistic approximation to the cumulative normal distribution", JIEM 2(1), 2009.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import numpy as np

from control_plane.domain.request import RouteRequest
from control_plane.selection.policy import Policy
from control_plane.selection.table import CandidateTable, Floats, Ints, Mask

PROBIT = 1.702
_SOONEST = 1e-9
"""Of its objective: log() stays finite."""
_FARTHEST = 30.0
"""Of -1.702 z: exp() stays finite."""


@dataclass(slots=True)
class Planned:
    """What those who wait will take of each row's server before the next in order gets anything, shape (rows,)."""

    lane: Floats
    """Seconds of prefill."""
    slots: Ints
    anything: bool = False

    @classmethod
    def nothing(cls, rows: int) -> Planned:
        return cls(np.zeros(rows), np.zeros(rows, dtype=np.int64))

    def add(self, span: slice, prefill: float) -> None:
        """One request more for the server with these rows, seconds of `prefill`."""
        self.lane[span] += prefill
        self.slots[span] += 1
        self.anything = True


class Forecast(msgspec.Struct, frozen=True):
    """Of every row, shape (rows,)."""

    lane: Floats
    """Seconds from now until the prompts of those before are prefilled."""
    turn: Floats | None
    """Seconds from now until a slot is free. None: every row has one."""
    loading: Floats | None
    """Seconds that loading a cold model takes. None: none is cold."""
    start: Floats
    """Seconds from now until the server begins with it."""
    base: Floats
    """Seconds to the first token of an empty prompt."""
    single: Floats
    """Seconds per output token of a single stream."""
    uncached: Floats | int
    """Tokens of the prompt that have to be prefilled."""
    prefill: Floats
    """Seconds that its prompt takes there."""
    ttft: Floats
    """Seconds from now to the first token."""
    tpot: Floats
    """Seconds per output token."""
    seconds: Floats
    """From now to the end of the answer."""
    meets: Floats
    """Probability that TTFT and TPOT are within the objective."""


def forecast(
    table: CandidateTable,
    request: RouteRequest,
    policy: Policy,
    now: float,
    waited: float,
    output_tokens: int,
    cached: Floats | None = None,
    planned: Planned | None = None,
) -> Forecast:
    """See the module. `waited`: seconds since the request arrived, which count against the objective; `cached`:
    tokens of the prompt that each row has in its prefix cache, shape (rows,)."""
    base, single = table.ttft, table.tpot
    if not table.predicted:
        base = np.where(np.isnan(base), policy.ttft_prior_s, base)
        single = np.where(np.isnan(single), policy.tpot_prior_s, single)
    uncached = request.prompt_tokens if cached is None else np.maximum(request.prompt_tokens - cached, 0.0)
    prefill: Floats = table.per_prompt_token * uncached
    lane: Floats = np.maximum(table.lane_until - now, 0.0)
    free = table.free
    if planned is not None and planned.anything:
        lane += planned.lane
        free = free - planned.slots
    full = free <= 0
    turn = _turn(table, free, full, now, base + single * output_tokens) if np.count_nonzero(full) else None
    start = lane if turn is None else np.maximum(lane, turn)
    loading = None if table.cold is None else load_seconds(table, policy)
    if loading is not None:
        start = start + loading
    ttft = start + base
    ttft += prefill
    tpot = table.tpot_per_stream * table.streams
    tpot += single
    # Both objectives at once: what this costs is the number of numpy calls, not of rows.
    ratios = np.empty((2, len(table)))
    np.add(ttft, waited, out=ratios[0])
    ratios[0] /= policy.ttft_objective(request.prompt_tokens)
    np.divide(tpot, policy.tpot_objective_s, out=ratios[1])
    within = _within(ratios, table.sigmas)
    seconds = ttft + tpot * output_tokens
    return Forecast(
        lane, turn, loading, start, base, single, uncached, prefill, ttft, tpot, seconds, within[0] * within[1]
    )


def load_seconds(table: CandidateTable, policy: Policy) -> Floats:
    """Until a cold model is loaded, shape (rows,): the prior where its server does not know, 0 for warm ones."""
    if table.load_times_known:
        return table.load_time
    return np.where(np.isnan(table.load_time), policy.load_time_prior_s, table.load_time)


def service_seconds(table: CandidateTable, typical: Floats) -> Floats:
    """For which a request holds its slot, shape (rows,): as measured, else `typical`."""
    if table.measured:
        return table.service
    return np.where(np.isnan(table.service), typical, table.service)


def _turn(table: CandidateTable, free: Ints, full: Mask, now: float, typical: Floats) -> Floats:
    """Seconds until a slot is free, shape (rows,): 0 where one is, which are those not `full`."""
    turn = service_seconds(table, typical) * table.per_slot
    first = np.where(np.isnan(table.slot_at), turn, np.maximum(table.slot_at - now, 0.0))
    first += (table.waiting - np.minimum(free, 0)) * turn
    return np.where(full, first, 0.0)


def _within(ratios: Floats, sigmas: Floats) -> Floats:
    """P(measured <= objective) from expected / objective, which is overwritten; any shape."""
    np.maximum(ratios, _SOONEST, out=ratios)
    np.log(ratios, out=ratios)
    ratios *= PROBIT
    ratios /= sigmas
    np.minimum(ratios, _FARTHEST, out=ratios)
    np.exp(ratios, out=ratios)
    ratios += 1.0
    return np.reciprocal(ratios, out=ratios)
