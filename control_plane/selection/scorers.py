"""Scorers: how good each pair of server and model is for a request, in [0, 1], more is better.

Every function takes the question and returns shape (rows,).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from control_plane.selection.query import Query
from control_plane.selection.table import Floats


def capability(query: Query) -> Floats:
    """How good an answer is to be expected: how good the model is at the kind of work, as its card says, times the
    share of its answers that were good ones."""
    return query.table.quality[query.request.task_type]


def success(query: Query) -> Floats:
    """Moving average of success, as the control plane saw it."""
    return query.table.success


def latency(query: Query) -> Floats:
    """OBJECTIVE * P(objective is met) + (1 - OBJECTIVE) * ref / (ref + seconds to the end of the answer): what meets
    the objective goes first, and of several the fastest. The seconds are 0.5 at the reference."""
    expected = query.forecast
    reference = query.policy.latency_reference_s
    promptness: Floats = reference / (reference + expected.seconds)
    return OBJECTIVE * expected.meets + (1 - OBJECTIVE) * promptness


def cost(query: Query) -> Floats:
    """ref / (ref + expected US dollars): 1 for free models, 0.5 at the reference."""
    reference = query.policy.cost_reference_usd
    return reference / (reference + usd(query))


def load(query: Query) -> Floats:
    """(free slots - requests waiting on the server) / slots, at least 0: the emptiest server first."""
    return query.table.emptiness


def provider(query: Query) -> Floats:
    """The configured liking of the provider, divided by the largest."""
    return preferences(query) / query.policy.preference_scale


def usd(query: Query) -> Floats:
    """What the request is expected to cost, US dollars, shape (rows,)."""
    # Prices are per million tokens.
    expected: Floats = (query.request.prompt_tokens * 1e-6) * query.table.prompt_price
    expected += (query.output_tokens * 1e-6) * query.table.completion_price
    return expected


def preferences(query: Query) -> Floats:
    """The configured liking of each row's provider, shape (rows,)."""
    likings = [query.policy.provider_preference.get(name, 1.0) for name in query.table.provider_codes]
    return np.array(likings, dtype=np.float64)[query.table.provider_code]


OBJECTIVE = 0.7
"""Share of the objective in the latency score."""

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


def scores(query: Query) -> tuple[Floats, Floats]:
    """Weighted mean of the parts, and the same without that of the load, each of shape (rows,).

    Not a matrix product: BLAS may round equal columns differently by their place, and ties must break on the id.
    """
    table, policy = query.table, query.policy
    shares = policy.shares

    def lasting() -> Floats:
        free = shares.cost if table.paid is None else 0.0
        return capability(query) * shares.capability + (provider(query) * shares.provider + free)

    later = table.success * shares.success
    later += table.once((query.request.task_type, policy.identity), lasting)
    later += latency(query) * shares.latency
    if table.paid is not None:
        later += cost(query) * shares.cost
    now = table.emptiness * shares.load
    now += later
    return np.minimum(now, 1.0, out=now), later
