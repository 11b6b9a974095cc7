"""Whose answers are good, as their readers say: the latest answers are remembered, so that they can be judged."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from control_plane.domain.model import ModelName
from control_plane.domain.request import RouteRequest
from control_plane.domain.task import TaskType
from control_plane.prediction.state import TallyState
from control_plane.prediction.success import SuccessModel
from control_plane.selection.table import CandidateTable

_REMEMBERED = 20_000
"""Answers."""
_WEIGHT = 5.0
"""Of a judgement: as many answers of which nobody says anything. Most are never judged."""
_REFRESH = 60.0
"""Seconds after which what was judged has faded noticeably."""


@dataclass(slots=True)
class _Answer:
    model: ModelName
    task: TaskType
    judged: bool = False


class Judgements:
    """Owner of the expected share of good answers. An answer of which nobody says anything counts as a good one."""

    def __init__(self) -> None:
        self.success = SuccessModel()
        self._answers: OrderedDict[tuple[str, str], _Answer] = OrderedDict()
        self._judged = False
        """Whether anybody has ever said anything: till then all answers are good."""
        self.unkept = False
        """Whether somebody has said something since it was kept."""
        self._table = CandidateTable([])
        self._fresh_until = 0.0

    def answered(self, request: RouteRequest, model: ModelName, now: float) -> None:
        """A request has got its answer."""
        self.success.observe(model, request.task_type, True, now)
        if request.request_id:
            self._answers[request.tenant, request.request_id] = _Answer(model, request.task_type)
            if len(self._answers) > _REMEMBERED:
                self._answers.popitem(last=False)

    def judge(self, tenant: str, request_id: str, score: float, now: float) -> bool | None:
        """Somebody says how good an answer was, [0, 1]. False: it was judged before, and that stands; None: it is not
        known (any more)."""
        answer = self._answers.get((tenant, request_id))
        if answer is None:
            return None
        if answer.judged:
            return False
        answer.judged = True
        self.success.feedback(answer.model, answer.task, score, now, _WEIGHT)
        self._judged = self.unkept = True
        self._refresh(answer.model, now)
        return True

    def restore(self, state: Iterable[TallyState], now: float) -> None:
        """Take over what was said to an earlier process."""
        tallies = tuple(state)
        self.success.restore(tallies, now)
        self._judged |= any(tally.bad > 0 for tally in tallies)

    def rebuilt(self, table: CandidateTable, now: float) -> None:
        """There is a new table."""
        self._table = table
        for model in table.model_codes if self._judged else ():
            self._refresh(model, now)

    def tick(self, now: float) -> None:
        """Let time pass: what was said long ago counts less."""
        if now >= self._fresh_until:
            self._fresh_until = now + _REFRESH
            for model in self._table.model_codes if self._judged else ():
                self._refresh(model, now)

    def _refresh(self, model: ModelName, now: float) -> None:
        if model in self._table.model_codes:
            for task in TaskType:
                self._table.set_good(model, task, self.success.expect(model, task, now).rate)
