"""Both programs as a client sees them that nobody here wrote: buf curl, by reflection."""

from __future__ import annotations

import asyncio
import base64

import grpc.aio
import pytest
from google.rpc import error_details_pb2
from grpc_reflection.v1alpha import reflection_pb2

from modelyard.testing import FakeModelServer
from modelyard.v1 import belief_pb2, model_server_pb2, orchestrator_pb2, task_queue_pb2
from tests.harness.buf import buf, curl
from tests.harness.front_door import attached, front_door
from tests.harness.model_servers import model_server

ORCHESTRATOR, MODEL_SERVER = "modelyard.v1.Orchestrator", "modelyard.v1.ModelServer"
CHAT = {"input": {"messages": [{"role": "ROLE_USER", "content": [{"text": "Hello"}]}]}}
TASK_QUEUE = "modelyard.v1.TaskQueue"
HEALTH = "grpc.health.v1.Health/Check"


@pytest.fixture(autouse=True)
def _installed() -> None:
    buf()


def methods(descriptor, service: str) -> set[str]:
    return {
        f"{descriptor.services_by_name[service].full_name}/{m.name}"
        for m in descriptor.services_by_name[service].methods
    }


async def test_methods_are_listed():
    async with front_door() as door, model_server() as server:
        ours, theirs = await asyncio.gather(
            curl(door.address, "", None, "--list-methods"), curl(server.address, "", None, "--list-methods")
        )
        assert methods(orchestrator_pb2.DESCRIPTOR, "Orchestrator") <= set(ours.output.split())
        assert methods(model_server_pb2.DESCRIPTOR, "ModelServer") <= set(theirs.output.split())
        for listed in (ours, theirs):
            assert {"grpc.health.v1.Health/Check", "grpc.health.v1.Health/Watch"} <= set(listed.output.split())


async def test_a_generation_is_streamed_as_json():
    async with front_door() as door, attached(door, FakeModelServer("one")):
        answer = await curl(door.address, f"{ORCHESTRATOR}/Generate", {**CHAT, "requestId": "b-1", "explain": True})
        assert answer.status == 0, answer.errors
        decision, *deltas, last = answer.messages
        assert decision["decision"]["verdict"] == "VERDICT_CHOSEN"
        assert decision["decision"]["serverId"] == "one"
        assert [message["delta"]["text"] for message in deltas] == ["Hello", ", ", "world"]
        summary = last["summary"]
        assert summary["requestId"] == "b-1"
        assert summary["finishReason"] == "FINISH_REASON_STOP"
        assert summary["usage"]["completionTokens"] == 3
        assert summary["timings"]["total"].endswith("s")


async def test_a_model_server_answers_directly():
    async with model_server() as server:
        body = {"model": "simulated", "input": {**CHAT["input"], "sampling": {"maxTokens": 3}}}
        answer = await curl(server.address, f"{MODEL_SERVER}/Generate", body)
        assert answer.status == 0, answer.errors
        assert answer.messages[-1]["result"]["usage"]["completionTokens"] == 3
        described = await curl(server.address, f"{MODEL_SERVER}/Describe", {})
        assert described.messages[0]["report"]["identity"]["serverId"] == "tested"


async def test_lists_are_readable():
    async with front_door() as door, attached(door, FakeModelServer("one")):
        models, servers = await asyncio.gather(
            curl(door.address, f"{ORCHESTRATOR}/ListModels", {}),
            curl(door.address, f"{ORCHESTRATOR}/ListModelServers", {}),
        )
        assert models.messages[0]["models"][0]["name"] == "fake"
        (status,) = servers.messages[0]["servers"]
        assert status["leaseState"] == "LEASE_STATE_LIVE"
        assert status["report"]["identity"]["serverId"] == "one"
        assert status["attachedAt"].endswith("Z")


async def test_health_is_the_standard_one():
    async with front_door() as door, model_server() as server:
        for address, names in ((door.address, ("", ORCHESTRATOR)), (server.address, ("", MODEL_SERVER))):
            answers = await asyncio.gather(*(curl(address, HEALTH, {"service": name}) for name in names))
            assert [answer.messages for answer in answers] == [[{"status": "SERVING"}]] * 2
        unknown = await curl(door.address, HEALTH, {"service": "nobody"})
        assert unknown.error["code"] == "not_found"


async def test_error_details_are_visible():
    async with front_door() as door:
        malformed = dict(CHAT, input={**CHAT["input"], "sampling": {"temperature": 9}})
        answer = await curl(door.address, f"{ORCHESTRATOR}/Generate", malformed)
        assert answer.error["code"] == "invalid_argument"
        # buf shows the types that it does not know itself as they travel, in base64.
        details = {detail["type"]: base64.b64decode(detail["value"] + "==") for detail in answer.error["details"]}
        info = error_details_pb2.ErrorInfo.FromString(details["google.rpc.ErrorInfo"])
        assert (info.reason, info.domain) == ("INVALID_REQUEST", "modelyard")
        bad = error_details_pb2.BadRequest.FromString(details["google.rpc.BadRequest"])
        assert [violation.field for violation in bad.field_violations] == ["input.sampling.temperature"]
        unknown = await curl(door.address, f"{ORCHESTRATOR}/GetModel", {"name": "gpt-9"})
        assert unknown.error["code"] == "not_found" and "gpt-9" in unknown.error["message"]


async def test_durable_tasks_by_reflection(tmp_path):
    store = {"tasks": {"store": f"sqlite:///{tmp_path / 'tasks.db'}"}}
    async with front_door(**store) as door, attached(door, FakeModelServer("one")):
        listed = await curl(door.address, "", None, "--list-methods")
        assert methods(task_queue_pb2.DESCRIPTOR, "TaskQueue") <= set(listed.output.split())
        assert methods(belief_pb2.DESCRIPTOR, "Beliefs") <= set(listed.output.split())
        spec = {"input": CHAT["input"], "group": "g", "deadline": "2100-01-01T00:00:00Z"}
        body = {"spec": spec, "idempotencyKey": "k-1"}
        submitted = await curl(door.address, f"{TASK_QUEUE}/SubmitTask", body, "-H", "modelyard-tenant: team-1")
        assert submitted.status == 0, submitted.errors
        task = submitted.messages[0]["task"]
        assert (submitted.messages[0]["created"], task["state"]) == (True, "TASK_STATE_QUEUED")
        watched = await curl(
            door.address, f"{TASK_QUEUE}/WatchTask", {"id": task["id"]}, "-H", "modelyard-tenant: team-1"
        )
        assert watched.messages[-1]["task"]["result"]["text"] == "Hello, world"
        foreign = await curl(door.address, f"{TASK_QUEUE}/GetTask", {"id": task["id"]})
        assert foreign.error["code"] == "not_found"
        body["spec"] = {**spec, "group": "h"}
        conflict = await curl(door.address, f"{TASK_QUEUE}/SubmitTask", body, "-H", "modelyard-tenant: team-1")
        assert conflict.error["code"] == "already_exists" and "spec.group" in conflict.error["message"]
        answers = await asyncio.gather(
            *(curl(door.address, HEALTH, {"service": name}) for name in (TASK_QUEUE, "modelyard.v1.Beliefs"))
        )
        assert [answer.messages for answer in answers] == [[{"status": "SERVING"}]] * 2


async def test_reflection_speaks_both_versions():
    ask = reflection_pb2.ServerReflectionRequest(list_services="*").SerializeToString()
    async with front_door() as door, grpc.aio.insecure_channel(door.address) as link:
        for version in ("v1", "v1alpha"):
            call = link.stream_stream(f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo")(iter([ask]))
            answer = reflection_pb2.ServerReflectionResponse.FromString(await call.read())
            names = {service.name for service in answer.list_services_response.service}
            assert {ORCHESTRATOR, "grpc.health.v1.Health"} <= names
            call.cancel()
