"""Hard filters: what makes a pair of server and model ineligible.

A filter is a function over the whole table that says which rows pass, and one that says for a single row, in words,
why it does not. `None` instead of a mask: the request does not ask, every row passes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from control_plane.domain.decision import RejectionReason
from control_plane.domain.funds import UNLIMITED, Amounts, Funds
from control_plane.domain.model import ModelState, ServerId
from control_plane.domain.task import Feature
from control_plane.selection.query import Query
from control_plane.selection.table import CandidateTable, Floats, Mask


@dataclass(frozen=True, slots=True)
class Filter:
    """A condition, and the words for its failure."""

    reason: RejectionReason
    passes: Callable[[Query], Mask | None]
    detail: Callable[[Query, int], str]
    """Of a row that does not pass."""


# ---------------------------------------------------------------- permanent ---


def _model(query: Query) -> Mask | None:
    if query.request.model is None:
        return None
    return np.equal(query.table.model_code, query.table.model_codes.get(query.request.model, -1))


def _model_detail(query: Query, row: int) -> str:
    return f"model {query.table.rows[row].card.name} is not {query.request.model}"


def _provider(query: Query) -> Mask | None:
    if query.request.provider is None:
        return None
    return np.equal(query.table.provider_code, query.table.provider_codes.get(query.request.provider, -1))


def _provider_detail(query: Query, row: int) -> str:
    return f"provider {query.table.rows[row].card.provider} is not {query.request.provider}"


def _server(query: Query) -> Mask | None:
    if query.request.server_id is None:
        return None
    passing = np.zeros(len(query.table), dtype=np.bool_)
    span = query.table.spans.get(query.request.server_id)
    if span is not None:
        passing[span] = True
    return passing


def _server_detail(query: Query, row: int) -> str:
    return f"server {query.table.rows[row].server_id} is not {query.request.server_id}"


def _labels(query: Query) -> Mask | None:
    if not query.request.labels:
        return None
    table = query.table
    passing = np.zeros(len(table), dtype=np.bool_)
    for span in table.spans.values():
        labels = table.rows[span.start].labels
        passing[span] = all(labels.get(key) == value for key, value in query.request.labels)
    return passing


def _labels_detail(query: Query, row: int) -> str:
    labels = query.table.rows[row].labels
    missing = [f"{key}={value}" for key, value in query.request.labels if labels.get(key) != value]
    return f"server {query.table.rows[row].server_id} lacks the label {', '.join(missing)}"


def _task_type(query: Query) -> Mask | None:
    return query.table.offers[query.request.task_type]


def _task_type_detail(query: Query, row: int) -> str:
    return f"no capability for {query.request.task_type.name.lower()}"


def _context(query: Query) -> Mask | None:
    needed = query.request.context_needed
    return None if needed <= query.table.shortest else query.table.context_length >= needed


def _context_detail(query: Query, row: int) -> str:
    return f"context {query.table.rows[row].card.context_length} < {query.request.context_needed} needed"


def _features(query: Query) -> Mask | None:
    needed = int(query.request.features)
    return np.equal(query.table.features & needed, needed) if needed else None


def _features_detail(query: Query, row: int) -> str:
    missing = query.request.features & ~query.table.rows[row].card.features
    return f"lacks {', '.join((feature.name or '').lower() for feature in Feature if feature & missing)}"


def _excluded(query: Query) -> Mask | None:
    return _outside(query.table, query.request.excluded)


def _excluded_detail(query: Query, row: int) -> str:
    return f"server {query.table.rows[row].server_id} is excluded by the request"


def _excluded_models(query: Query) -> Mask | None:
    if not query.request.excluded_models:
        return None
    table = query.table
    passing = np.ones(len(table), dtype=np.bool_)
    for model, provider in query.request.excluded_models:
        hit = np.equal(table.model_code, table.model_codes.get(model, -1))
        if provider is not None:
            hit &= np.equal(table.provider_code, table.provider_codes.get(provider, -1))
        passing &= ~hit
    return passing


def _excluded_models_detail(query: Query, row: int) -> str:
    return f"model {query.table.rows[row].card.name} is excluded by the request"


def _price(query: Query) -> Mask | None:
    if not query.request.max_cost_nano_usd:
        return None
    return _expected_nano_usd(query) <= query.request.max_cost_nano_usd


def _price_detail(query: Query, row: int) -> str:
    expected, most = _expected_nano_usd(query)[row], query.request.max_cost_nano_usd
    return f"expected to cost {expected * 1e-9:.6f} US dollars > {most * 1e-9:.6f} allowed"


def _expected_nano_usd(query: Query) -> Floats:
    """What the request is expected to cost, 1e-9 US dollars, shape (rows,); whole, as `Price.nano_usd` is."""
    prices = query.request.prompt_tokens * query.table.prompt_price
    return np.rint(1e3 * (prices + query.output_tokens * query.table.completion_price))


def _avoided(query: Query) -> Mask | None:
    return _outside(query.table, query.avoid)


def _avoided_detail(query: Query, row: int) -> str:
    return f"server {query.table.rows[row].server_id} failed in an earlier attempt of this request"


def _outside(table: CandidateTable, servers: frozenset[ServerId]) -> Mask | None:
    if not servers:
        return None
    passing = np.ones(len(table), dtype=np.bool_)
    for server_id in servers:
        span = table.spans.get(server_id)
        if span is not None:
            passing[span] = False
    return passing


# ---------------------------------------------------------------- transient ---


def _most(query: Query, funds: Funds) -> tuple[Floats, Floats]:
    """The most that the request can come to in each row: 1e-9 US dollars and tokens, shape (rows,), the tokens (1,)
    where they are the same in all. The same as `Reckoning.most`, but for the rounding of what no double holds."""
    if query.most is not None:
        return query.most
    table, request = query.table, query.request
    prompt = funds.reckoning.prompt(request)
    output: Floats | int = funds.reckoning.output(request, 0)
    if request.max_tokens is None and output:
        left = np.maximum(table.context_length - request.prompt_tokens, 1)
        output = np.minimum(left, funds.reckoning.output_tokens).astype(np.float64)
    nano_usd = 1e3 * (prompt * table.prompt_price + output * table.completion_price)
    query.most = np.rint(nano_usd), np.atleast_1d(np.asarray(prompt + output, dtype=np.float64))
    return query.most


def _covered(query: Query, funds: Funds, amounts: Amounts) -> Mask:
    nano_usd, tokens = _most(query, funds)
    return np.asarray((nano_usd <= amounts.nano_usd) & (tokens <= amounts.tokens), dtype=np.bool_)


def _all_covered(query: Query, funds: Funds, amounts: Amounts) -> bool:
    """Whether even the dearest row is covered, which is as it is most of the time: no column need be looked at."""
    table = query.table
    return amounts.covers(funds.reckoning.most(query.request, table.dearest, table.longest))


def _funded(query: Query) -> Mask | None:
    funds = query.funds
    if funds is None or _all_covered(query, funds, funds.later):
        return None
    return _covered(query, funds, funds.later)


def _funded_now(query: Query) -> Mask | None:
    funds = query.funds
    if funds is None or funds.now.covers(funds.later) or _all_covered(query, funds, funds.now):
        return None
    later = _funded(query)
    now = _covered(query, funds, funds.now)
    return now if later is None else now | ~later


def _funded_detail(query: Query, row: int) -> str:
    assert query.funds is not None
    nano_usd, tokens = (float(most[row if len(most) > 1 else 0]) for most in _most(query, query.funds))
    left, whose = query.funds.later, f"tenant {query.request.tenant}"
    if nano_usd > left.nano_usd:
        return f"may cost {nano_usd * 1e-9:.6f} US dollars > {left.nano_usd * 1e-9:.6f} left to {whose}"
    if tokens > left.tokens:
        return f"may take {tokens:.0f} tokens > {left.tokens} left to {whose}"
    return f"may cost {nano_usd * 1e-9:.6f} US dollars or {tokens:.0f} tokens, which {whose} has set aside for others"


def cheapest(query: Query, rows: Mask, *, unpaid: bool) -> Amounts | None:
    """The most that the request can come to in the cheapest of these rows, or of those among them that cannot be paid
    for at once; None if there is none."""
    if query.funds is None:
        return None
    if unpaid:
        rows = rows & ~_covered(query, query.funds, query.funds.now)
    numbers = rows.nonzero()[0]
    if len(numbers) == 0:
        return None
    nano_usd, tokens = np.broadcast_arrays(*_most(query, query.funds))
    row = numbers[np.lexsort((tokens[numbers], nano_usd[numbers]))[0]]
    return Amounts(_whole(nano_usd[row]), _whole(tokens[row]))


def _whole(amount: float) -> int:
    """Prices may be absurd."""
    return int(amount) if amount < UNLIMITED else UNLIMITED


def _available(query: Query) -> Mask | None:
    threshold = query.policy.availability_threshold
    return None if query.table.all_succeed(threshold) else query.table.success >= threshold


def _available_detail(query: Query, row: int) -> str:
    return f"success rate {query.table.success[row]:.2f} < {query.policy.availability_threshold:.2f}"


def _breaker(query: Query) -> Mask | None:
    return ~query.table.breaker_open


def _breaker_detail(query: Query, row: int) -> str:
    return "paused by its circuit breaker after failures"


def _ready(query: Query) -> Mask | None:
    return query.table.ready


def _ready_detail(query: Query, row: int) -> str:
    return f"server {query.table.rows[row].server_id} is not live or its engine is not ready"


def _draining(query: Query) -> Mask | None:
    return ~query.table.draining


def _draining_detail(query: Query, row: int) -> str:
    return f"server {query.table.rows[row].server_id} is draining"


def _here(query: Query) -> Mask | None:
    return query.table.here


_NOT_HERE = {
    ModelState.ABSENT: "the model is absent",
    ModelState.PULLING: "the model is still pulling",
    ModelState.FAILED: "the model has failed",
}


def _here_detail(query: Query, row: int) -> str:
    card = query.table.rows[row].card
    return f"{_NOT_HERE[card.state]}: {card.state_detail}" if card.state_detail else _NOT_HERE[card.state]


def _slot(query: Query) -> Mask | None:
    return query.table.free > 0


def _slot_detail(query: Query, row: int) -> str:
    slots = int(query.table.slots[row])
    return f"{slots - int(query.table.free[row])} of {slots} slots taken"


def _lane(query: Query) -> Mask | None:
    return query.table.lane_until <= query.now + query.policy.late_binding_s


def _lane_detail(query: Query, row: int) -> str:
    return f"prompts of others take {query.table.lane_until[row] - query.now:.2f} s more"


_KIND: tuple[Filter, ...] = (
    Filter(RejectionReason.MODEL_MISMATCH, _model, _model_detail),
    Filter(RejectionReason.PROVIDER_MISMATCH, _provider, _provider_detail),
    Filter(RejectionReason.SERVER_MISMATCH, _server, _server_detail),
    Filter(RejectionReason.SERVER_MISMATCH, _labels, _labels_detail),
    Filter(RejectionReason.TASK_TYPE, _task_type, _task_type_detail),
    Filter(RejectionReason.FEATURE_MISSING, _features, _features_detail),
    Filter(RejectionReason.EXCLUDED, _excluded_models, _excluded_models_detail),
)
"""These look at static columns, and at what many requests have in common: see `permanent`."""

_OWN: tuple[Filter, ...] = (
    Filter(RejectionReason.CONTEXT_TOO_SHORT, _context, _context_detail),
    Filter(RejectionReason.EXCLUDED, _excluded, _excluded_detail),
    Filter(RejectionReason.TOO_EXPENSIVE, _price, _price_detail),
)

PERMANENT: tuple[Filter, ...] = (*_KIND, *_OWN)
"""A row that fails one can never serve the request."""

AVOIDED: tuple[Filter, ...] = (Filter(RejectionReason.EXCLUDED, _avoided, _avoided_detail),)
"""A row that fails this can serve such requests, but has failed this one."""

FUNDED: tuple[Filter, ...] = (Filter(RejectionReason.BUDGET, _funded, _funded_detail),)
"""A row that fails this costs more than is left to the tenant, until its budget begins anew."""

_NOW_FUNDED = Filter(RejectionReason.BUDGET, _funded_now, _funded_detail)
_AVAILABLE = Filter(RejectionReason.AVAILABILITY, _available, _available_detail)

PRESENT: tuple[Filter, ...] = (
    _NOW_FUNDED,
    Filter(RejectionReason.NOT_READY, _ready, _ready_detail),
    Filter(RejectionReason.DRAINING, _draining, _draining_detail),
    Filter(RejectionReason.MODEL_NOT_HERE, _here, _here_detail),
    Filter(RejectionReason.BREAKER_OPEN, _breaker, _breaker_detail),
    _AVAILABLE,
)
"""A row that passes these takes requests as fast as its slots allow."""

FREE: tuple[Filter, ...] = (
    Filter(RejectionReason.NO_FREE_SLOT, _slot, _slot_detail),
    Filter(RejectionReason.PREFILL_BUSY, _lane, _lane_detail),
)
"""A row that passes these can start a request now."""

TRANSIENT: tuple[Filter, ...] = (*PRESENT, *FREE)
"""A row that fails only these may serve the request later. The most serious first."""


def passing(filters: tuple[Filter, ...], query: Query, among: Mask | None = None) -> Mask:
    """The rows that pass all filters, shape (rows,), of all or `among` some. May be a column of the table itself: not
    to be written to."""
    result = among
    for condition in filters:
        mask = condition.passes(query)
        if mask is not None:
            result = mask if result is None else result & mask
    return np.ones(len(query.table), dtype=np.bool_) if result is None else result


def permanent(query: Query) -> Mask:
    """What passes PERMANENT. That for a kind of request is computed once for all of them."""
    request = query.request
    kind = (
        request.model, request.provider, request.server_id, request.labels, request.task_type, request.features,
        request.excluded_models,
    )  # fmt: skip
    return passing(_OWN, query, query.table.once(kind, lambda: passing(_KIND, query)))


def present(query: Query) -> Mask:
    """What passes PRESENT; most of those conditions are one column of the table."""
    return passing((_AVAILABLE, _NOW_FUNDED), query, query.table.able)
