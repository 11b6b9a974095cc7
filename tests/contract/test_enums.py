"""Every enum that mirrors one of the contract has its names and numbers, all of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from control_plane.domain import agent, decision, model, server, task
from control_plane.scheduling import budgets
from control_plane.tasks import model as task_model
from model_servers import engine
from modelyard.cli import usage as usage_command
from modelyard.client import FEATURES, PRIORITIES, TASK_STATES, TASK_TYPES, _names
from modelyard.v1 import accounting_pb2, agents_pb2, fleet_pb2, generation_pb2, selection_pb2, task_pb2, task_queue_pb2


def numbers(enum, prefix: str) -> dict[str, int]:
    return {name.removeprefix(prefix): number for name, number in enum.items() if number}


TASK_TYPE = numbers(task_pb2.TaskType, "TASK_TYPE_")
PRIORITY = numbers(task_pb2.TaskPriority, "TASK_PRIORITY_")
FEATURE = numbers(fleet_pb2.ModelFeature, "MODEL_FEATURE_")
HEALTH = numbers(fleet_pb2.ServerHealth, "SERVER_HEALTH_")
MODEL_STATE = numbers(fleet_pb2.ModelState, "MODEL_STATE_")

MIRRORS = [
    (task.TaskType, TASK_TYPE),
    (task.Priority, PRIORITY),
    (server.LeaseState, numbers(fleet_pb2.LeaseState, "LEASE_STATE_")),
    (server.Health, HEALTH),
    (server.BreakerState, numbers(fleet_pb2.BreakerState, "BREAKER_STATE_")),
    (decision.Verdict, numbers(selection_pb2.Verdict, "VERDICT_")),
    (decision.RejectionReason, numbers(selection_pb2.RejectionReason, "REJECTION_REASON_")),
    (agent.CandidateRejectionReason, numbers(agents_pb2.CandidateRejectionReason, "CANDIDATE_REJECTION_REASON_")),
    (agent.AssignmentOutcome, numbers(agents_pb2.AssignmentOutcome, "ASSIGNMENT_OUTCOME_")),
    (engine.Role, numbers(generation_pb2.Role, "ROLE_")),
    (engine.FinishReason, numbers(generation_pb2.FinishReason, "FINISH_REASON_")),
    (engine.Health, HEALTH),
    (model.ModelState, MODEL_STATE),
    (engine.ModelState, MODEL_STATE),
    (engine.ToolChoiceMode, numbers(generation_pb2.ToolChoiceMode, "TOOL_CHOICE_MODE_")),
    (task_model.TaskState, numbers(task_queue_pb2.TaskState, "TASK_STATE_")),
    (task_model.EventType, numbers(task_queue_pb2.TaskEventType, "TASK_EVENT_TYPE_")),
]


@pytest.mark.parametrize(("mirror", "contract"), MIRRORS, ids=lambda value: getattr(value, "__qualname__", ""))
def test_mirror(mirror, contract: dict[str, int]) -> None:
    assert {member.name: member.value for member in mirror} == contract


@pytest.mark.parametrize("mirror", [task.Feature, engine.Feature])
def test_feature_bit_is_its_number(mirror) -> None:
    assert {member.name: member.value for member in mirror} == {name: 1 << bit for name, bit in FEATURE.items()}


def test_permanent_rejections_are_those_the_contract_calls_so() -> None:
    comments = (
        (Path(__file__).parents[2] / "protos/modelyard/v1/selection.proto")
        .read_text()
        .split("enum RejectionReason")[1]
        .split("}")[0]
    )
    for reason in decision.RejectionReason:
        comment = comments.split(f"REJECTION_REASON_{reason.name} =")[0].rsplit("=", 1)[-1]
        if "Transient" in comment:
            assert not reason.permanent
        else:  # EXCLUDED holds for the whole request, so it counts as permanent
            assert reason.permanent


def test_zero_is_always_unspecified() -> None:
    for file in (accounting_pb2, agents_pb2, fleet_pb2, generation_pb2, selection_pb2, task_pb2, task_queue_pb2):
        for enum in file.DESCRIPTOR.enum_types_by_name.values():
            assert enum.values_by_number[0].name.endswith("_UNSPECIFIED")


def test_names_of_the_client() -> None:
    tables = {
        _names.ROLE: (generation_pb2.Role, "ROLE_"),
        _names.TASK_TYPE: (task_pb2.TaskType, "TASK_TYPE_"),
        _names.PRIORITY: (task_pb2.TaskPriority, "TASK_PRIORITY_"),
        _names.FEATURE: (fleet_pb2.ModelFeature, "MODEL_FEATURE_"),
        _names.TOOL_CHOICE_MODE: (generation_pb2.ToolChoiceMode, "TOOL_CHOICE_MODE_"),
        _names.FINISH_REASON: (generation_pb2.FinishReason, "FINISH_REASON_"),
        _names.VERDICT: (selection_pb2.Verdict, "VERDICT_"),
        _names.REJECTION_REASON: (selection_pb2.RejectionReason, "REJECTION_REASON_"),
        _names.LEASE_STATE: (fleet_pb2.LeaseState, "LEASE_STATE_"),
        _names.HEALTH: (fleet_pb2.ServerHealth, "SERVER_HEALTH_"),
        _names.MODEL_STATE: (fleet_pb2.ModelState, "MODEL_STATE_"),
        _names.TASK_STATE: (task_queue_pb2.TaskState, "TASK_STATE_"),
        _names.TASK_EVENT_TYPE: (task_queue_pb2.TaskEventType, "TASK_EVENT_TYPE_"),
        _names.USAGE_DIMENSION: (accounting_pb2.UsageDimension, "USAGE_DIMENSION_"),
        _names.BUDGET_UNIT: (accounting_pb2.BudgetUnit, "BUDGET_UNIT_"),
        _names.BUDGET_WINDOW: (accounting_pb2.BudgetWindow, "BUDGET_WINDOW_"),
        _names.AGENT_STATE: (agents_pb2.AgentState, "AGENT_STATE_"),
        _names.CANDIDATE_KIND: (agents_pb2.CandidateKind, "CANDIDATE_KIND_"),
        _names.SIMILARITY: (agents_pb2.Similarity, "SIMILARITY_"),
        _names.CANDIDATE_REJECTION: (agents_pb2.CandidateRejectionReason, "CANDIDATE_REJECTION_REASON_"),
        _names.ASSIGNMENT_OUTCOME: (agents_pb2.AssignmentOutcome, "ASSIGNMENT_OUTCOME_"),
        _names.BREAKER_STATE: (fleet_pb2.BreakerState, "BREAKER_STATE_"),
    }
    for table, (enum, prefix) in tables.items():
        expected = {name.lower(): number for name, number in numbers(enum, prefix).items()}
        assert dict(table.numbers) == expected
        assert all(table.name(number) == name and table.number(name) == number for name, number in expected.items())
        assert table.name(0) == ""
        assert table.name(999) == "unknown_999"
    assert set(TASK_TYPES) == {name.lower() for name in TASK_TYPE}
    assert PRIORITIES == ("low", "normal", "high", "critical")
    assert set(FEATURES) == {name.lower() for name in FEATURE}
    assert tuple(state.name.lower() for state in task_model.TaskState) == TASK_STATES
    assert tuple(_names.USAGE_DIMENSION) == usage_command.DIMENSIONS
    assert {one.value for one in budgets.Unit} == set(_names.BUDGET_UNIT)
    assert {one.value for one in budgets.Window} == set(_names.BUDGET_WINDOW)
