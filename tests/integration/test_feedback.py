"""Clients say how good answers were, and the selector goes by it."""

from __future__ import annotations

from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from control_plane.app import running
from control_plane.config import ControlPlaneSettings
from modelyard.client import AsyncClient, InvalidRequest, UnknownRequest
from modelyard.testing import FakeModelServer
from modelyard.testing.model_server import model_info
from modelyard.v1 import fleet_pb2, task_pb2
from tests.harness.model_servers import eventually


def scores(**by_kind: float) -> list[fleet_pb2.Capability]:
    kinds = task_pb2.TaskType
    return [
        fleet_pb2.Capability(task_type=kinds.Value(f"TASK_TYPE_{kind.upper()}"), score=score)
        for kind, score in by_kind.items()
    ]


@asynccontextmanager
async def two_models(tmp_path: Path, **selection):
    settings = ControlPlaneSettings(
        port=0, metrics_port=-1, fleet={"warm_up": 0}, gateway={"port": -1}, selection=selection,
        tasks={"store": f"sqlite:///{tmp_path / 'tasks.db'}"},
    )  # fmt: skip
    async with (
        running(settings) as (plane, address),
        FakeModelServer("a", [model_info("boaster", capabilities=scores(chat=0.8, writing=0.8))]) as a,
        FakeModelServer("b", [model_info("honest", capabilities=scores(chat=0.7, writing=0.7))]) as b,
        AsyncClient(address) as client,
    ):
        for server in (a, b):
            await server.attach(address)
        yield plane, client


async def test_a_model_whose_answers_are_bad_gets_less_of_that_kind_of_work(tmp_path: Path) -> None:
    async with two_models(tmp_path, weights={"latency": 0}) as (_, client):  # how fast a test runs is beside the point
        for _ in range(40):
            await client.generate("Hello", model="boaster", task_type="writing")
        for number in range(12):
            done = await client.generate("Hello", model="boaster", task_type="chat")
            assert await client.report_feedback(done.request_id, 0.0)
            if not number:
                assert not await client.report_feedback(done.request_id, 1.0), "the first judgement stands"
        decision = await client.explain("Hello", task_type="chat")
        assert decision.server_id == "b"
        by_server = {candidate.server_id: candidate for candidate in decision.candidates}
        assert by_server["a"].terms["quality"] == pytest.approx(0.8) and by_server["a"].terms["good_answers"] < 0.5
        assert by_server["b"].terms["good_answers"] > by_server["a"].terms["good_answers"]
        other = await client.explain("Hello", task_type="writing")
        assert other.server_id == "a", "nobody has complained of its writing"


async def test_what_cannot_be_judged(tmp_path: Path) -> None:
    async with two_models(tmp_path) as (_, client):
        done = await client.generate("Hello")
        with pytest.raises(UnknownRequest):
            await client.report_feedback("nobody", 1.0)
        async with AsyncClient(client.address, tenant="other") as stranger:
            with pytest.raises(UnknownRequest):
                await stranger.report_feedback(done.request_id, 0.0)
        for score in (-0.1, 1.1, float("nan")):
            with pytest.raises(InvalidRequest, match="score"):
                await client.report_feedback(done.request_id, score)
        assert await client.report_feedback(done.request_id, 1.0)


async def test_the_answer_of_a_task_can_be_judged(tmp_path: Path) -> None:
    async with two_models(tmp_path) as (_, client):
        task = await client.tasks.submit("Hello")
        done = await client.tasks.wait(task.id)
        assert done.result is not None
        assert await client.report_feedback(done.result.request_id, 0.5)


async def test_classes_may_have_weights_of_their_own(tmp_path: Path) -> None:
    low = {"capability": 0, "success": 0, "latency": 0, "cost": 0, "load": 0, "provider": 1}
    async with two_models(tmp_path, class_weights={"low": low}) as (_, client):
        weights = {
            priority: {part.scorer: part.weight for part in decision.candidates[0].parts}
            for priority in ("low", "high")
            if (decision := await client.explain("Hello", priority=priority))
        }
        assert weights["low"] == low and weights["high"]["capability"] == 3


async def test_exploring_is_told_and_counted(tmp_path: Path) -> None:
    async with two_models(tmp_path, exploration=0.5, exploration_margin=1) as (plane, client):
        decisions = [(await client.generate("Hello", explain=True)).decisions[0] for _ in range(40)]
        explored = [decision for decision in decisions if decision.explored]
        assert 0 < len(explored) < 40
        for decision in decisions:
            assert decision.propensity == pytest.approx(0.25 if decision.explored else 0.75)
        value = plane.metrics.registry.get_sample_value
        await eventually(
            lambda: (
                sum(value("modelyard_explored_total", {"model": model}) or 0.0 for model in ("boaster", "honest"))
                == len(explored)
            )
        )
