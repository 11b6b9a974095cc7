"""A decision in one sentence."""

from __future__ import annotations

from collections.abc import Sequence

from control_plane.domain.decision import Rejection, RejectionReason, ScoredCandidate, Verdict
from control_plane.domain.model import ServerId

_NAMED = 5
"""Servers that a sentence names before it counts the rest."""

_STATE = {
    RejectionReason.NOT_READY: "is not ready",
    RejectionReason.DRAINING: "is draining",
    RejectionReason.BREAKER_OPEN: "is paused after failures",
    RejectionReason.AVAILABILITY: "fails too often",
    RejectionReason.NO_FREE_SLOT: "has no free slot",
    RejectionReason.BUDGET: "costs more than is left of the budget",
    RejectionReason.LOADING_TAKES_LONGER: "would have to load the model",
    RejectionReason.PREFILL_BUSY: "is busy with the prompts of others",
    RejectionReason.BETTER_LATER: "would take longer than waiting for another",
    RejectionReason.SPARED: "is kept for what free models cannot serve in time",
}


def summarise(
    verdict: Verdict,
    eligible: Sequence[ScoredCandidate],
    rejected: Sequence[ScoredCandidate],
    *,
    all_failed: bool,
    unaffordable: bool = False,
    explored: ScoredCandidate | None = None,
) -> str:
    """The sentence. `eligible` has the best first, `rejected` is sorted by id; one that was `explored` was chosen."""
    if verdict is Verdict.CHOSEN:
        return _chosen(eligible) if explored is None else _explored(explored, eligible[0])
    if not rejected:
        return "no model server is attached"
    if verdict is Verdict.WAIT:
        return _wait([candidate for candidate in rejected if not _permanent(candidate)])
    if unaffordable:
        return _unaffordable(rejected)
    if all_failed:
        return "every capable server has failed in this request"
    return _impossible(rejected)


def _chosen(eligible: Sequence[ScoredCandidate]) -> str:
    first = eligible[0]
    reasons = ", ".join(f"{part.scorer} {part.value:.2f}" for part in first.parts if part.weight > 0)
    then = f"; next {_label(eligible[1])} {eligible[1].score:.2f}" if len(eligible) > 1 else ""
    return f"{_label(first)} scores {first.score:.2f}: {reasons}{then}"


def _explored(chosen: ScoredCandidate, best: ScoredCandidate) -> str:
    return f"{_label(chosen)} scores {chosen.score:.2f}, explored in place of {_label(best)} {best.score:.2f}"


def _wait(capable: Sequence[ScoredCandidate]) -> str:
    # One reason for each server, that of its row which is nearest to starting.
    nearest: dict[ServerId, ScoredCandidate] = {}
    for candidate in capable:
        known = nearest.get(candidate.server_id)
        if known is None or len(candidate.rejections) < len(known.rejections):
            nearest[candidate.server_id] = candidate
    states = [_state(server_id, candidate.rejections[0]) for server_id, candidate in nearest.items()]
    rest = f" and {len(states) - _NAMED} more" if len(states) > _NAMED else ""
    count = "1 capable server, it cannot" if len(states) == 1 else f"{len(states)} capable servers, none can"
    return f"{count} start now: {', '.join(states[:_NAMED])}{rest}"


def _state(server_id: ServerId, rejection: Rejection) -> str:
    if rejection.reason is RejectionReason.MODEL_NOT_HERE:
        return f"{server_id}: {rejection.detail}"  # absent, on its way or failed: only the detail says which
    return f"{server_id} {_STATE[rejection.reason]}"


def _impossible(rejected: Sequence[ScoredCandidate]) -> str:
    # min() keeps the first of equals, that is the least id.
    nearest = min(rejected, key=lambda candidate: (len(_permanent(candidate)), -candidate.score))
    misses = ", ".join(rejection.detail for rejection in _permanent(nearest))
    return f"no server can serve this request; nearest is {_label(nearest)}: {misses}"


def _unaffordable(rejected: Sequence[ScoredCandidate]) -> str:
    capable = [candidate for candidate in rejected if not _permanent(candidate)]
    nearest = min(capable, key=lambda candidate: candidate.estimated_cost_nano_usd)
    why = next(rejection.detail for rejection in nearest.rejections if rejection.reason is RejectionReason.BUDGET)
    return f"the budget does not allow it; cheapest is {_label(nearest)}: {why}"


def _permanent(candidate: ScoredCandidate) -> list[Rejection]:
    return [rejection for rejection in candidate.rejections if rejection.reason.permanent]


def _label(candidate: ScoredCandidate) -> str:
    return f"{candidate.server_id}/{candidate.provider}/{candidate.model}"
