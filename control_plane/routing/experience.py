"""What is learned of agents: how much of each kind of task they have done, how reliably and how fast. It fades."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from control_plane.domain.agent import AgentId, LearnedOfAgent, Tally

Who = tuple[str, AgentId]
"""Tenant and agent."""

_EVEN = 0.5
"""Success rate that is believed of somebody of whom nothing is known."""

_SHORTEST, _LONGEST = 1e-3, 1e9
"""Seconds that a task is believed to have taken."""

_NOTHING = 0.01
"""Tasks below which what has faded is forgotten."""


@dataclass(slots=True)
class _Record:
    tally: Tally
    at: float

    def faded(self, now: float, half_life: float) -> Tally:
        left: float = 0.5 ** (max(0.0, now - self.at) / half_life)
        return self.tally * left


class Experience:
    """Tallies of all agents by kind of task (0: none was named). Of at most `most` agents."""

    def __init__(self, half_life: float, most: int) -> None:
        self._half_life = half_life
        self._most = most
        self._records: OrderedDict[Who, dict[int, _Record]] = OrderedDict()
        self._changed: set[tuple[Who, int]] = set()

    def add(self, who: Who, kind: int, success: float, duration: float | None, now: float) -> None:
        """A task has ended: with a success of [0, 1], after so many seconds if that is known. How long a failure took
        says nothing."""
        timed = duration is not None and success > 0.0
        seconds = min(max(duration or 0.0, _SHORTEST), _LONGEST)
        new = Tally(1.0, success, float(timed), math.log(seconds) if timed else 0.0)
        kinds = self._records.setdefault(who, {})
        old = kinds[kind].faded(now, self._half_life) if kind in kinds else Tally()
        kinds[kind] = _Record(old + new, now)
        self._records.move_to_end(who)
        self._changed.add((who, kind))
        self._bound()

    def of(self, who: Who, now: float) -> dict[int, Tally]:
        """By kind, faded to now."""
        kinds = self._records.get(who, {})
        return {kind: record.faded(now, self._half_life) for kind, record in sorted(kinds.items())}

    def forget_faded(self, now: float) -> None:
        """Forget what counts for next to nothing by now."""
        for who in [*self._records]:
            kinds = self._records[who]
            for kind in [kind for kind, one in kinds.items() if one.faded(now, self._half_life).tasks < _NOTHING]:
                del kinds[kind]
            if not kinds:
                del self._records[who]

    def _bound(self) -> None:
        while len(self._records) > self._most:
            self._records.popitem(last=False)

    # ------------------------------------------------------------- keeping ---

    def changed(self, now: float, wall: float) -> list[LearnedOfAgent]:
        """What has changed since the last call, to be kept. Call `again` for what could not be."""
        changed, self._changed = self._changed, set()
        found = []
        for who, kind in sorted(changed):
            record = self._records.get(who, {}).get(kind)
            if record is not None:
                found.append(LearnedOfAgent(*who, kind, wall - (now - record.at), record.tally))
        return found

    def again(self, learned: Iterable[LearnedOfAgent]) -> None:
        """These were not kept."""
        self._changed.update(((one.tenant, one.agent_id), one.task_type) for one in learned)

    def remember(self, learned: Iterable[LearnedOfAgent], now: float, wall: float) -> None:
        """Take over what an earlier process learned, the oldest first; what cannot be is left out."""
        for one in learned:
            tally = one.tally
            if all(math.isfinite(v) for v in (one.at, tally.log_seconds)) and (
                0.0 <= tally.successes <= tally.tasks < math.inf and 0.0 <= tally.timed <= tally.tasks
            ):
                at = min(now, now - (wall - one.at))
                self._records.setdefault((one.tenant, one.agent_id), {})[one.task_type] = _Record(tally, at)
        self._bound()

    def __iter__(self) -> Iterator[Who]:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)


def in_kind(tally: Tally, shrinkage: float) -> float:
    """How much experience in a kind of task is worth, (0, 1): the success rate in it, shrunk to a half. Both how often
    an agent has succeeded and how often it has failed count."""
    return (tally.successes + shrinkage * _EVEN) / (tally.tasks + shrinkage)


def reliability(tallies: Mapping[AgentId, Tally], shrinkage: float) -> tuple[dict[AgentId, float], float]:
    """Success rate of each agent over all kinds, shrunk towards the mean of all agents, and that mean.

    In the mean each agent counts once, with its rate shrunk to a half: so a success raises nobody else by more than
    the one who had it, and more success never lowers a rank. (With n tasks and f failures of the one, k the shrinkage
    and m the mean of A agents, it rises by (f + k(1 - m)) / ((n + k)(n + 1 + k)) or more, another with o tasks by
    k / (o + k) / A * (f + k/2) / ((n + k)(n + 1 + k)); and 1 - m >= k / (o + k) / (2 A).)
    """
    if not tallies:
        return {}, _EVEN
    mean = sum(in_kind(tally, shrinkage) for tally in tallies.values()) / len(tallies)
    return {id: (tally.successes + shrinkage * mean) / (tally.tasks + shrinkage) for id, tally in tallies.items()}, mean


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast an agent is in a kind of task."""

    value: float
    """(0, 1): 0.5 is the usual pace of all agents, twice as fast 2/3, half as fast 1/3."""
    seconds: float | None
    """Expected of it, shrunk to what is usual. None: nobody's duration is known."""


def paces(tallies: Mapping[AgentId, Tally], shrinkage: float) -> dict[AgentId, Pace]:
    """Of each agent in one kind of task. Usual is the geometric mean of the agents' geometric means; an agent's own is
    shrunk towards it."""
    means = {id: tally.log_seconds / tally.timed for id, tally in tallies.items() if tally.timed > 0.0}
    if not means:
        return dict.fromkeys(tallies, Pace(0.5, None))
    usual = sum(means.values()) / len(means)
    found = {}
    for id, tally in tallies.items():
        slower = tally.timed * (means.get(id, usual) - usual) / (tally.timed + shrinkage)
        found[id] = Pace(1.0 / (1.0 + math.exp(slower)), math.exp(usual + slower))
    return found


def together(tallies: Sequence[Tally]) -> Tally:
    """Their sum."""
    return sum(tallies, Tally())
