"""What a server says of itself: Describe, health, reflection."""

from __future__ import annotations

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2

from modelyard.rpc.reasons import Reason
from modelyard.rpc.validation import check_report
from modelyard.v1 import fleet_pb2
from tests.conformance.subject import PATIENCE, SERVICE, Subject, call, refused, refused_with, says

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_the_report_is_valid(subject: Subject) -> None:
    report = await subject.describe()
    assert check_report(report) == []
    assert report.identity == subject.report.identity, "identity lasts as long as the process"
    assert report.health == fleet_pb2.SERVER_HEALTH_READY
    assert report.lease_epoch == 0


async def test_the_report_lists_the_model(subject: Subject) -> None:
    report = await subject.describe()
    names = {model.name for model in report.models}
    assert {subject.model, subject.embedding_model, subject.vision_model} <= names
    for model in report.models:
        assert (
            model.memory_bytes == 0
            or model.memory_bytes <= report.hardware.memory_bytes
            or (report.hardware.memory_bytes == 0)
        ), "a model that is here fits into the memory there is"


async def test_an_idle_server_reports_no_load(subject: Subject) -> None:
    await subject.until_idle()
    await subject.generate(says("Hello"))
    await subject.until_idle()
    report = await subject.describe()
    assert report.load.foreign == 0


async def test_health_is_the_standard_one(subject: Subject) -> None:
    health = health_pb2_grpc.HealthStub(subject.channel)
    for service in ("", SERVICE):
        answer = await call(health.Check(health_pb2.HealthCheckRequest(service=service), timeout=PATIENCE))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING, service or "the whole server"
    refusal = await refused(call(health.Check(health_pb2.HealthCheckRequest(service="no.such"), timeout=PATIENCE)))
    assert refusal.code.name == "NOT_FOUND"


async def test_reflection_describes_the_service(subject: Subject) -> None:
    asked = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE),
    ]
    for version in ("v1", "v1alpha"):
        method = subject.channel.stream_stream(f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo")
        call = method(iter([each.SerializeToString() for each in asked]), timeout=PATIENCE)
        listed, described = [reflection_pb2.ServerReflectionResponse.FromString(raw) async for raw in call]
        assert SERVICE in {service.name for service in listed.list_services_response.service}
        assert described.file_descriptor_response.file_descriptor_proto


async def test_an_unknown_model_is_refused_and_the_known_ones_named(subject: Subject) -> None:
    name = "no-such-model-anywhere"
    for attempt in (
        subject.generate(says("Hello"), model=name),
        subject.embed("Hello", model=name),
        subject.count(says("Hello"), model=name),
    ):
        refusal = await refused_with(Reason.UNKNOWN_MODEL, attempt)
        assert any(model.name in refusal.message for model in subject.report.models), refusal.message
