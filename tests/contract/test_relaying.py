"""What lets the control plane pass deltas on unread, and the shape of the contract that code relies on."""

from __future__ import annotations

import pytest

from modelyard.v1 import (
    belief_pb2,
    fleet_pb2,
    generation_pb2,
    model_server_pb2,
    orchestrator_pb2,
    selection_pb2,
    task_pb2,
    task_queue_pb2,
)

FILES = [
    belief_pb2,
    fleet_pb2,
    generation_pb2,
    model_server_pb2,
    orchestrator_pb2,
    selection_pb2,
    task_pb2,
    task_queue_pb2,
]


def test_a_delta_has_the_same_bytes_from_both() -> None:
    theirs = model_server_pb2.ModelServerGenerateResponse.DESCRIPTOR.fields_by_name["delta"]
    ours = orchestrator_pb2.GenerateResponse.DESCRIPTOR.fields_by_name["delta"]
    assert (theirs.number, theirs.message_type.full_name) == (ours.number, ours.message_type.full_name)
    delta = generation_pb2.GenerationDelta(text="hé", tokens=2)
    sent = model_server_pb2.ModelServerGenerateResponse(delta=delta).SerializeToString()
    assert orchestrator_pb2.GenerateResponse.FromString(sent).delta == delta


def test_no_other_event_shares_a_number() -> None:
    theirs = {f.number: f.name for f in model_server_pb2.ModelServerGenerateResponse.DESCRIPTOR.fields}
    ours = {f.number: f.name for f in orchestrator_pb2.GenerateResponse.DESCRIPTOR.fields}
    assert {ours[number] for number in theirs.keys() & ours.keys()} == {"delta"}


@pytest.mark.parametrize("suffix", ["Request", "Response"])
def test_a_whole_answer_has_the_numbers_of_a_stream(suffix) -> None:
    stream, whole = (getattr(model_server_pb2, f"ModelServer{name}{suffix}") for name in ("Generate", "Complete"))
    shapes = [
        [(field.number, field.name, field.type, field.message_type) for field in message.DESCRIPTOR.fields]
        for message in (stream, whole)
    ]
    assert shapes[0] == shapes[1]


def test_a_request_for_a_whole_answer_is_that_for_a_stream() -> None:
    stream, whole = (
        [(each.number, each.name, each.type, each.message_type, each.enum_type) for each in message.DESCRIPTOR.fields]
        for message in (orchestrator_pb2.GenerateRequest, orchestrator_pb2.CompleteRequest)
    )
    assert stream == whole
    ends = orchestrator_pb2.GenerateResponse.DESCRIPTOR, orchestrator_pb2.CompleteResponse.DESCRIPTOR
    for name in ("delta", "summary"):
        assert len({(end.fields_by_name[name].number, end.fields_by_name[name].message_type) for end in ends}) == 1


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.DESCRIPTOR.name)
def test_package(file) -> None:
    assert file.DESCRIPTOR.package == "modelyard.v1"


def test_services_are_those_that_programs_serve() -> None:
    assert set(orchestrator_pb2.DESCRIPTOR.services_by_name) == {"Orchestrator"}
    assert set(model_server_pb2.DESCRIPTOR.services_by_name) == {"ModelServer"}
    assert set(task_queue_pb2.DESCRIPTOR.services_by_name) == {"TaskQueue"}
    assert set(belief_pb2.DESCRIPTOR.services_by_name) == {"Beliefs"}


@pytest.mark.parametrize("name", ["input", "task_type", "priority", "requirements", "preset"])
def test_a_spec_says_what_a_request_says(name: str) -> None:
    spec = task_queue_pb2.TaskSpec.DESCRIPTOR.fields_by_name[name]
    request = orchestrator_pb2.GenerateRequest.DESCRIPTOR.fields_by_name[name]
    assert (spec.message_type, spec.enum_type, spec.type) == (request.message_type, request.enum_type, request.type)


def test_both_ways_to_submit_have_the_same_fields() -> None:
    one, many = task_queue_pb2.SubmitTaskRequest.DESCRIPTOR, task_queue_pb2.BatchSubmitTasksRequest.DESCRIPTOR
    assert {f.number: f.name for f in one.fields} == {f.number: f.name for f in many.fields}
