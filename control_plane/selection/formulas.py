"""The arithmetic of a choice, for people: every formula as text, and the numbers that it takes.

Texts use + - * / ** ( ), min and max; each names what was computed by those before it, or a number of the request or of
a candidate. A test evaluates them and finds the scores of `select`.
"""

from __future__ import annotations

import numpy as np

from control_plane.selection.forecast import PROBIT
from control_plane.selection.query import Query
from control_plane.selection.scorers import OBJECTIVE, SCORERS, preferences, usd
from control_plane.selection.table import Floats

_PROMPTNESS = "latency_reference / (latency_reference + seconds)"
_WEIGHTED = " + ".join(f"weight_{name} * {name}" for name, _ in SCORERS)
_WEIGHTED_LATER = " + ".join(f"weight_{name} * {name}" for name, _ in SCORERS if name != "load")
_WEIGHTS = " + ".join(f"weight_{name}" for name, _ in SCORERS)

FORMULAS: tuple[tuple[str, str], ...] = (
    ("capability", "quality * good_answers"),
    ("success", "success_rate"),
    ("start", "max(lane, turn) + loading"),
    ("ttft", "start + ttft_base + ttft_per_prompt_token * (prompt_tokens - cached_tokens)"),
    ("tpot", "tpot_base + tpot_per_stream * streams"),
    ("seconds", "ttft + tpot * output_tokens"),
    ("ttft_in_time", f"1 / (1 + ((waited + ttft) / ttft_objective) ** ({PROBIT} / ttft_sigma))"),
    ("tpot_in_time", f"1 / (1 + (tpot / tpot_objective) ** ({PROBIT} / tpot_sigma))"),
    ("latency", f"{OBJECTIVE} * ttft_in_time * tpot_in_time + {1 - OBJECTIVE:.1f} * {_PROMPTNESS}"),
    ("cost", "cost_reference / (cost_reference + usd)"),
    ("load", "min(max((free_slots - waiting) / max(slots, 1), 0), 1)"),
    ("provider", "preference / highest_preference"),
    ("score", f"({_WEIGHTED}) / ({_WEIGHTS})"),
    ("score_later", f"({_WEIGHTED_LATER}) / ({_WEIGHTS})"),
)
"""Name and text, in the order in which they can be computed. Seconds, tokens, US dollars. The best `score` is chosen,
unless one that is busy has a better `score_later`."""


def of_request(query: Query) -> dict[str, float]:
    """The numbers that are the same for every candidate."""
    request, policy = query.request, query.policy
    weights = {f"weight_{name}": float(getattr(policy.weights, name)) for name, _ in SCORERS}
    return {
        "prompt_tokens": request.prompt_tokens,
        "output_tokens": query.output_tokens,
        "waited": query.waited,
        "ttft_objective": policy.ttft_objective(request.prompt_tokens),
        "tpot_objective": policy.tpot_objective_s,
        "latency_reference": policy.latency_reference_s,
        "cost_reference": policy.cost_reference_usd,
        "highest_preference": policy.preference_scale,
        **weights,
    }


def of_rows(query: Query) -> dict[str, Floats]:
    """The numbers of each candidate, shape (rows,), and what comes of them but for the parts of the score."""
    table, expected = query.table, query.forecast
    nothing, task = np.zeros(len(table)), query.request.task_type
    return {
        "quality": table.capability[task],
        "good_answers": table.good.get(task, nothing + 1.0),
        "success_rate": table.success,
        "lane": expected.lane,
        "turn": nothing if expected.turn is None else expected.turn,
        "loading": nothing if expected.loading is None else expected.loading,
        "start": expected.start,
        "ttft_base": expected.base,
        "ttft_per_prompt_token": table.per_prompt_token,
        "cached_tokens": query.request.prompt_tokens - expected.uncached + nothing,
        "ttft": expected.ttft,
        "ttft_sigma": table.sigmas[0],
        "tpot_base": expected.single,
        "tpot_per_stream": table.tpot_per_stream,
        "streams": table.streams,
        "tpot": expected.tpot,
        "tpot_sigma": table.sigmas[1],
        "seconds": expected.seconds,
        "usd": usd(query),
        "free_slots": table.free.astype(np.float64),
        "slots": table.slots.astype(np.float64),
        "waiting": table.waiting.astype(np.float64),
        "preference": preferences(query),
    }
