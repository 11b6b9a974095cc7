"""Short names of the contract's enum values: TASK_TYPE_CODE_REVIEW is "code_review"."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from modelyard.v1 import accounting_pb2, agents_pb2, fleet_pb2, generation_pb2, selection_pb2, task_pb2, task_queue_pb2


class Names:
    """One enum's names and numbers, both ways. Number 0 (unspecified) has no name."""

    def __init__(self, enum: Any, prefix: str, what: str) -> None:
        self.numbers: Mapping[str, int] = MappingProxyType(
            {name.removeprefix(prefix).lower(): number for name, number in enum.items() if number}
        )
        self._names = {number: name for name, number in self.numbers.items()}
        self._what = what

    def __iter__(self) -> Any:
        return iter(self.numbers)

    def number(self, name: str) -> int:
        """The number of a name. ValueError lists the allowed ones."""
        try:
            return self.numbers[name]
        except (KeyError, TypeError):
            raise ValueError(f"unknown {self._what} {name!r}; allowed: {', '.join(self.numbers)}") from None

    def name(self, number: int) -> str:
        """The name of a number, "" for 0, "unknown_99" for a number from a newer peer."""
        return self._names.get(number, f"unknown_{number}" if number else "")

    def each(self, numbers: Iterable[int]) -> tuple[str, ...]:
        return tuple(self.name(number) for number in numbers)


ROLE = Names(generation_pb2.Role, "ROLE_", "role")
TASK_TYPE = Names(task_pb2.TaskType, "TASK_TYPE_", "task type")
PRIORITY = Names(task_pb2.TaskPriority, "TASK_PRIORITY_", "priority")
FEATURE = Names(fleet_pb2.ModelFeature, "MODEL_FEATURE_", "feature")
TOOL_CHOICE_MODE = Names(generation_pb2.ToolChoiceMode, "TOOL_CHOICE_MODE_", "tool choice")
FINISH_REASON = Names(generation_pb2.FinishReason, "FINISH_REASON_", "finish reason")
VERDICT = Names(selection_pb2.Verdict, "VERDICT_", "verdict")
REJECTION_REASON = Names(selection_pb2.RejectionReason, "REJECTION_REASON_", "rejection reason")
LEASE_STATE = Names(fleet_pb2.LeaseState, "LEASE_STATE_", "lease state")
HEALTH = Names(fleet_pb2.ServerHealth, "SERVER_HEALTH_", "health")
MODEL_STATE = Names(fleet_pb2.ModelState, "MODEL_STATE_", "model state")
BREAKER_STATE = Names(fleet_pb2.BreakerState, "BREAKER_STATE_", "breaker state")
TASK_STATE = Names(task_queue_pb2.TaskState, "TASK_STATE_", "state")
CALLBACK_STATE = Names(task_queue_pb2.CallbackState, "CALLBACK_STATE_", "state of a callback")
TASK_EVENT_TYPE = Names(task_queue_pb2.TaskEventType, "TASK_EVENT_TYPE_", "event")

USAGE_DIMENSION = Names(accounting_pb2.UsageDimension, "USAGE_DIMENSION_", "dimension of usage")
BUDGET_UNIT = Names(accounting_pb2.BudgetUnit, "BUDGET_UNIT_", "unit of a budget")
BUDGET_WINDOW = Names(accounting_pb2.BudgetWindow, "BUDGET_WINDOW_", "window of a budget")

AGENT_STATE = Names(agents_pb2.AgentState, "AGENT_STATE_", "state of an agent")
CANDIDATE_KIND = Names(agents_pb2.CandidateKind, "CANDIDATE_KIND_", "kind of candidate")
SIMILARITY = Names(agents_pb2.Similarity, "SIMILARITY_", "similarity")
CANDIDATE_REJECTION = Names(agents_pb2.CandidateRejectionReason, "CANDIDATE_REJECTION_REASON_", "rejection reason")
ASSIGNMENT_OUTCOME = Names(agents_pb2.AssignmentOutcome, "ASSIGNMENT_OUTCOME_", "outcome")

TASK_TYPES: tuple[str, ...] = tuple(TASK_TYPE)
"""Every value of `task_type`."""
PRIORITIES: tuple[str, ...] = tuple(PRIORITY)
"""Every value of `priority`, least urgent first."""
FEATURES: tuple[str, ...] = tuple(FEATURE)
"""Every value in `features`."""
TASK_STATES: tuple[str, ...] = tuple(TASK_STATE)
"""Every state of a durable task, the terminal ones last."""
