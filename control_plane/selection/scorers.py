"""Scorers: how good each pair of server and model is for a request, in [0, 1], more is better.

Every function takes the question and returns shape (rows,).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from control_plane.selection.filters import Query
from control_plane.selection.table import Floats


def capability(query: Query) -> Floats:
    """How good the model is at the kind of work, as its card says."""
    return query.table.capability[query.request.task_type]


def success(query: Query) -> Floats:
    """Moving average of success, as the control plane saw it."""
    return query.table.success


def latency(query: Query) -> Floats:
    """ref / (ref + expected), expected = load time of a cold model + ttft + tpot * tokens: 1 at once, 0.5 at the
    reference."""
    expected = expected_seconds(query) + query.policy.latency_reference_s
    if query.table.cold is not None:
        expected += load_seconds(query)
    return query.policy.latency_reference_s / expected


def cost(query: Query) -> Floats:
    """ref / (ref + expected US dollars): 1 for free models, 0.5 at the reference."""
    table, reference = query.table, query.policy.cost_reference_usd
    # Prices are per million tokens.
    expected: Floats = (query.request.prompt_tokens * 1e-6) * table.prompt_price
    expected += (query.output_tokens * 1e-6) * table.completion_price
    expected += reference
    return reference / expected


def load(query: Query) -> Floats:
    """(free slots - requests waiting on the server) / slots, at least 0: the emptiest server first."""
    table = query.table
    share = (table.free - table.waiting) / np.maximum(table.slots, 1)
    return np.minimum(np.maximum(share, 0.0), 1.0)


def provider(query: Query) -> Floats:
    """The configured liking of the provider, divided by the largest."""
    table, policy = query.table, query.policy
    likings = [policy.provider_preference.get(name, 1.0) for name in table.provider_codes]
    return np.array(likings, dtype=np.float64)[table.provider_code] / policy.preference_scale


SCORERS: tuple[tuple[str, Callable[[Query], Floats]], ...] = (
    ("capability", capability),
    ("success", success),
    ("latency", latency),
    ("cost", cost),
    ("load", load),
    ("provider", provider),
)
"""In the order of `policy.Weights`."""


def parts(query: Query) -> Floats:
    """What each scorer says, shape (scorers, rows)."""
    values = np.empty((len(SCORERS), len(query.table)))
    for number, (_, scorer) in enumerate(SCORERS):
        values[number] = scorer(query)
    return values


def weigh(values: Floats, query: Query) -> Floats:
    """Weighted mean of the parts, shape (rows,).

    Not a matrix product: BLAS may round equal columns differently by their place, and ties must break on the id.
    """
    mean: Floats = np.add.reduce(values * query.policy.shares, axis=0)
    return np.minimum(mean, 1.0, out=mean)


def expected_seconds(query: Query) -> Floats:
    """ttft + tpot * tokens of a warm model, shape (rows,); priors where nothing was measured."""
    table, policy = query.table, query.policy
    ttft = np.where(np.isnan(table.ttft), policy.ttft_prior_s, table.ttft)
    tpot = np.where(np.isnan(table.tpot), policy.tpot_prior_s, table.tpot)
    expected: Floats = ttft + tpot * query.output_tokens
    return expected


def load_seconds(query: Query) -> Floats:
    """Until a cold model is loaded, shape (rows,): the prior where its server does not know, 0 for warm ones."""
    load_time = query.table.load_time
    return np.where(np.isnan(load_time), query.policy.load_time_prior_s, load_time)
