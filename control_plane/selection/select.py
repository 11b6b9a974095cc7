"""Filter, score, pick; and the same with reasons."""

from __future__ import annotations

import msgspec
import numpy as np

from control_plane.domain.decision import (
    DecisionRecord,
    Rejection,
    RejectionReason,
    ScoredCandidate,
    ScorePart,
    Verdict,
)
from control_plane.domain.funds import Amounts
from control_plane.selection.filters import (
    AVOIDED,
    FREE,
    FUNDED,
    PERMANENT,
    TRANSIENT,
    cheapest,
    passing,
    permanent,
    present,
)
from control_plane.selection.formulas import FORMULAS, of_request, of_rows
from control_plane.selection.loading import outrun
from control_plane.selection.patience import Better, better_later, worth_waiting_for
from control_plane.selection.query import Query
from control_plane.selection.scorers import SCORERS, parts, scores
from control_plane.selection.spill import spared
from control_plane.selection.summary import summarise
from control_plane.selection.table import Floats, Mask


class Choice(msgspec.Struct, frozen=True):
    """How a selection ended; `explain` tells why."""

    verdict: Verdict
    row: int = -1
    """Of the table; -1 unless CHOSEN."""
    later: int = -1
    """With WAIT: the row that the request is expected to start on, -1 where that is not known. It is known of one that
    prefers it to a row that is free, and of every one where it was asked to plan."""
    prefill: float = 0.0
    """Seconds that its prompt is expected to take there."""
    prefers: bool = False
    """With WAIT: a row is free, and another is better later."""
    all_away: bool = False
    """With WAIT: every server that could serve the request is not ready, draining or has lost its model."""
    all_failed: bool = False
    """With IMPOSSIBLE: servers can serve such a request, but each of them failed in an earlier attempt of this one."""
    unaffordable: bool = False
    """With IMPOSSIBLE: servers could serve the request if there were more left of the tenant's budget."""
    propensity: float = 1.0
    """With CHOSEN: the probability of this choice among those that could have been made."""
    explored: bool = False
    """With CHOSEN: not the best, but one as good as, of which more is to be learned."""
    lacking: Amounts | None = None
    """What must be there for one more row to be paid for: with WAIT at once, with `unaffordable` at any time. None: no
    row lacks that."""


def select(query: Query) -> Choice:
    """The best row for a request as its table stands.

    WAIT if a row could serve it but not now, or will serve it better later than any can now; IMPOSSIBLE if none can.
    Of equal scores the least (server, model, provider) wins.
    """
    table = query.table
    capable = _capable(query)
    startable = capable & present(query)
    eligible = passing(FREE, query, startable)
    if table.cold is not None and np.count_nonzero(eligible & table.cold):
        slower = outrun(query, capable, startable)
        if slower is not None:
            eligible &= ~slower.rows
    spare = spared(query, capable, startable)
    if spare is not None:
        left_alone, eligible = (eligible & spare.rows).any(), eligible & ~spare.rows
        startable = startable & ~spare.rows
        if left_alone and spare.home >= 0 and not eligible.any():
            return Choice(
                Verdict.WAIT, later=spare.home, prefill=float(query.forecast.prefill[spare.home]), prefers=True
            )
    rows = eligible.nonzero()[0]
    if len(rows) == 0:
        return _refusal(query, capable, startable)
    if len(rows) == 1 and np.count_nonzero(capable) == 1:
        # Nothing to compare: a pinned model on one server is the commonest request there is.
        return Choice(Verdict.CHOSEN, int(rows[0]))
    score, later = scores(query)
    # Scores are >= 0, and argmax returns the first of equals.
    best = int(np.where(eligible, score, -1.0).argmax())
    if query.content or (table.cold is not None and table.cold[best]):
        return Choice(Verdict.CHOSEN, best)  # that loading it is worth while has been decided
    better = better_later(query, startable, eligible, best, later)
    if better is None:
        return _explored(query, eligible, best, score)
    prefill = float(query.forecast.prefill[better.row])
    return Choice(Verdict.WAIT, later=better.row, prefill=prefill, prefers=True)


def explain(query: Query) -> DecisionRecord:
    """What `select` answers to the same question, with its reasons.

    The choice is `select`'s own, and scores and rejections come from the same functions: the two cannot differ.
    """
    choice = select(query)
    candidates = _candidates(query, choice)
    # Sorting is stable and rows are sorted by id: equals stay in the order in which `select` prefers them.
    eligible = sorted((c for c in candidates if not c.rejections), key=lambda candidate: -candidate.score)
    rejected = [candidate for candidate in candidates if candidate.rejections]
    chosen = candidates[choice.row] if choice.verdict is Verdict.CHOSEN else None
    return DecisionRecord(
        verdict=choice.verdict,
        chosen=chosen,
        candidates=(*eligible, *rejected),
        summary=summarise(
            choice.verdict,
            eligible,
            rejected,
            all_failed=choice.all_failed,
            unaffordable=choice.unaffordable,
            explored=chosen if choice.explored else None,
        ),
        formulas=FORMULAS,
        terms=of_request(query),
        propensity=choice.propensity,
        explored=choice.explored,
    )


def _explored(query: Query, eligible: Mask, best: int, scores: Floats) -> Choice:
    """The best, or now and then one of those that are about as good: what is never chosen is never known."""
    share = query.policy.exploration
    if not share:
        return Choice(Verdict.CHOSEN, best)
    near = eligible & (scores >= scores[best] - query.policy.exploration_margin)
    if query.table.cold is not None:
        near &= ~query.table.cold
    rows = near.nonzero()[0]
    if len(rows) < 2:
        return Choice(Verdict.CHOSEN, best)
    each = share / len(rows)
    row = int(rows[min(int(query.draw / each), len(rows) - 1)]) if query.draw < share else best
    return Choice(Verdict.CHOSEN, row, propensity=each + (1 - share if row == best else 0.0), explored=row != best)


def _capable(query: Query) -> Mask:
    """Rows that could serve the request, now or later."""
    return passing((*AVOIDED, *FUNDED), query, permanent(query))


def _refusal(query: Query, capable: Mask, startable: Mask) -> Choice:
    if not capable.any():
        if query.funds is not None:
            dear = passing(AVOIDED, query, permanent(query))
            if dear.any():
                return Choice(Verdict.IMPOSSIBLE, unaffordable=True, lacking=cheapest(query, dear, unpaid=False))
        all_failed = bool(query.avoid) and bool(permanent(query).any())
        return Choice(Verdict.IMPOSSIBLE, all_failed=all_failed)
    there = capable & query.table.ready & ~query.table.draining
    if query.table.obtainable is not None:
        there &= query.table.obtainable
    later = worth_waiting_for(query, startable) if query.planned is not None else -1
    prefill = float(query.forecast.prefill[later]) if later >= 0 else 0.0
    lacking = cheapest(query, there, unpaid=True)
    return Choice(Verdict.WAIT, later=later, prefill=prefill, all_away=not there.any(), lacking=lacking)


def _candidates(query: Query, choice: Choice) -> list[ScoredCandidate]:
    """Every row of the table, in its order."""
    values = parts(query)
    totals = scores(query)[0].tolist()
    rejections: list[list[Rejection]] = [[] for _ in query.table.rows]
    for condition in (*PERMANENT, *AVOIDED, *FUNDED, *TRANSIENT):
        mask = condition.passes(query)
        if mask is not None:
            for row in (~mask).nonzero()[0].tolist():
                rejections[row].append(Rejection(condition.reason, condition.detail(query, row)))
    capable = _capable(query)
    startable = capable & present(query)
    slower = outrun(query, capable, startable)
    if slower is not None:
        for row in slower.rows.nonzero()[0].tolist():
            rejections[row].append(Rejection(RejectionReason.LOADING_TAKES_LONGER, slower.detail(query, row)))
    spare = spared(query, capable, startable)
    if spare is not None:
        for row in spare.rows.nonzero()[0].tolist():
            rejections[row].append(Rejection(RejectionReason.SPARED, spare.detail(query, row)))
    if choice.prefers:
        better = Better(choice.later, float(query.forecast.start[choice.later]))
        for row, reasons in enumerate(rejections):
            if not reasons:
                reasons.append(Rejection(RejectionReason.BETTER_LATER, better.detail(query, row)))
    weights = [(name, float(getattr(query.policy.weights, name))) for name, _ in SCORERS]
    terms = of_rows(query)
    columns = zip(*(column.tolist() for column in terms.values()), strict=True)
    return [
        ScoredCandidate(
            server_id=row.server_id,
            model=row.card.name,
            provider=row.card.provider,
            score=score,
            parts=tuple(ScorePart(name, value, weight) for (name, weight), value in zip(weights, column, strict=True)),
            rejections=tuple(reasons),
            estimated_cost_nano_usd=row.card.price.nano_usd(query.request.prompt_tokens, 0, query.output_tokens),
            terms=dict(zip(terms, numbers, strict=True)),
        )
        for row, score, column, reasons, numbers in zip(
            query.table.rows, totals, values.T.tolist(), rejections, columns, strict=True
        )
    ]
