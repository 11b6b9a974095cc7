"""Who of those that wait can still be served well: a plan of all of them.

In fair order, within that by deadline, each is given the server on which its first token comes soonest after those
before it. Where that is too late for one, and another of its rank takes more of a server on which it would be in time,
the longest of those gives way. So the most requests are in time: Moore and Hodgson's rule, which is exact for one
machine and a heuristic for several that differ. Without it one request that has become too late makes the next one too
late, and under overload nobody is served well.
Source: J. M. Moore, "An n Job, One Machine Sequencing Algorithm for Minimizing the Number of Late Jobs", Management
Science, 1968.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import msgspec
import numpy as np

from control_plane.domain.model import ServerId
from control_plane.domain.request import RouteRequest
from control_plane.selection.filters import present
from control_plane.selection.policy import Policy
from control_plane.selection.query import Query
from control_plane.selection.table import CandidateTable, Floats, Mask


class Case(msgspec.Struct, frozen=True):
    """A request that waits."""

    request: RouteRequest
    policy: Policy
    waited: float
    """Seconds."""
    rank: Hashable
    """It makes room only for those of the same."""
    reach: Mask
    """Rows that can serve its kind, shape (rows,)."""
    avoided: frozenset[ServerId]
    """Servers that failed in earlier attempts of it."""
    cached: Floats | None
    """Tokens of its prompt that each row is expected to have in its prefix cache, shape (rows,). None: nothing."""


def triage(table: CandidateTable, cases: Sequence[Case], now: float) -> list[bool]:
    """Of each request, in fair order, whether it is in time. What a server takes for a prompt is expected to take
    longer by one standard deviation: that much of what is planned comes true five times in six."""
    rows = len(table)
    anything = Query(table, RouteRequest("any"), cases[0].policy, now=now)
    expected = anything.forecast
    slower = np.exp(table.sigmas[0])
    begins = expected.ttft * slower
    tokens = np.array([case.request.prompt_tokens for case in cases], dtype=np.float64)
    uncached = np.repeat(tokens[:, np.newaxis], rows, axis=1)
    for number, case in enumerate(cases):
        if case.cached is not None:
            np.maximum(uncached[number] - case.cached, 0.0, out=uncached[number])
    works = uncached * (table.per_prompt_token * slower)
    needed = np.array([case.request.context_needed for case in cases])
    paces = np.array([case.policy.tpot_objective_s for case in cases])
    unfit = (needed[:, np.newaxis] > table.context_length) | (expected.tpot > paces[:, np.newaxis])
    there = present(anything)
    for number, case in enumerate(cases):
        unfit[number] |= ~(case.reach & there)
        for server_id in (*case.avoided, *case.request.excluded):
            span = table.spans.get(server_id)
            if span is not None:
                unfit[number, span] = True
    works[unfit] = np.inf
    left = [case.policy.ttft_objective(case.request.prompt_tokens) - case.waited for case in cases]
    return in_time(begins, works, left, [case.rank for case in cases], table)


def in_time(
    begins: Floats, works: Floats, left: Sequence[float], ranks: Sequence[Hashable], table: CandidateTable
) -> list[bool]:
    """The plan. begins: seconds until each row can have a first token of no prompt at all, shape (rows,); works:
    seconds that each prompt takes of each row, infinite where it cannot be served, shape (requests, rows); left:
    seconds that each request still has."""
    ends = begins.copy()
    kept = [True] * len(left)
    planned: dict[int, list[tuple[float, int]]] = {}
    """By the first row of a server: seconds and number of each request."""

    def take(span: slice, work: float, number: int) -> None:
        planned.setdefault(span.start, []).append((work, number))
        ends[span] += work

    for number, seconds in enumerate(left):
        work = works[number]
        sums = ends + work
        row = int(sums.argmin())
        if sums[row] <= seconds:
            take(table.span(row), float(work[row]), number)
            continue
        kept[number] = False
        gains = []
        for first, others in planned.items():
            span = table.span(first)
            row = first + int(work[span].argmin())
            own, (most, other) = float(work[row]), max(others)
            if (
                most > own
                and ranks[other] == ranks[number]
                and begins[row] + own <= seconds
                and ends[row] - most + own <= seconds
            ):
                gains.append((most - own, row))
        if gains:
            _, row = max(gains)
            span = table.span(row)
            others = planned[span.start]
            longest = max(others)
            others.remove(longest)
            if not others:
                del planned[span.start]
            ends[span] -= longest[0]
            kept[longest[1]], kept[number] = False, True
            take(span, float(work[row]), number)
    return kept
