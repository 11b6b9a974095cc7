"""Agents over real gRPC: registered, matched, routed, reported; embedded or compared by words; kept over a restart."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import io
import json
import subprocess
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from control_plane.domain.agent import AgentId, LearnedOfAgent, Tally
from model_servers import registry
from modelyard.cli import main
from modelyard.client import (
    AgentsBusy,
    AsyncClient,
    Client,
    FleetWarmingUp,
    InvalidRequest,
    NoCapableAgent,
    TooManyAgents,
    UnknownAgent,
    UnknownAssignment,
)
from modelyard.rpc.errors import Refusal
from modelyard.rpc.reasons import Reason
from modelyard.testing import FakeModelServer
from modelyard.testing.model_server import model_info
from modelyard.v1 import agents_pb2, agents_pb2_grpc, fleet_pb2, generation_pb2, model_server_pb2
from tests.harness.buf import curl
from tests.harness.front_door import FrontDoor, attached, front_door
from tests.harness.model_servers import eventually, model_server
from tests.harness.postgres import Postgres
from tests.harness.programs import until
from tests.integration.test_cli import modelyard

SERVICE = "modelyard.v1.Agents"
TOPICS = ("python", "german", "sea")


class Embedding(FakeModelServer):
    """Embeds a text as how often it names each topic."""

    async def Embed(self, request: Any, context: Any) -> Any:
        async with self._received("Embed", context, request):
            texts = [text.lower() for text in request.inputs]
            return model_server_pb2.ModelServerEmbedResponse(
                embeddings=[generation_pb2.Embedding(values=[text.count(one) for one in TOPICS]) for text in texts],
                usage=generation_pb2.Usage(prompt_tokens=len(texts)),
            )


def embedding() -> Embedding:
    return Embedding("embedder", [model_info("embedder")], slots=64)


@asynccontextmanager
async def door_with(*servers: FakeModelServer, **given: Any) -> AsyncIterator[tuple[FrontDoor, AsyncClient]]:
    given["agents"] = {"warm_up": 0.0, **given.get("agents", {})}
    async with front_door(**given) as door, attached(door, *servers), AsyncClient(door.address) as client:
        yield door, client


def stub(door: FrontDoor) -> Any:
    return agents_pb2_grpc.AgentsStub(door.channel)  # type: ignore[no-untyped-call]


# ---------------------------------------------------------------- registering ---


async def test_an_agent_is_there_as_long_as_its_block_runs() -> None:
    async with door_with() as (_, client):
        async with client.agents.register(
            "coder",
            description="Writes Python",
            skills={"python": 0.9, "sql": 0.4},
            task_types=["code_generation"],
            max_concurrency=3,
            labels={"zone": "eu"},
            endpoint="https://coder.example",
            metadata={"queue": "7"},
        ) as registration:
            (status,) = await client.agents.list()
            assert registration.status is not None and status.agent == registration.status.agent
            agent = status.agent
            assert (agent.id, agent.description, agent.max_concurrency) == ("coder", "Writes Python", 3)
            assert agent.skills == {"python": 0.9, "sql": 0.4} and agent.task_types == ("code_generation",)
            assert (agent.labels, agent.endpoint, agent.metadata) == (
                {"zone": "eu"}, "https://coder.example", {"queue": "7"},
            )  # fmt: skip
            assert (status.state, status.running, status.experience) == ("live", 0, ())
            assert status.lease_until is not None
            assert timedelta(seconds=25) < status.lease_until - datetime.now(UTC) < timedelta(seconds=31)
            async with client.agents.register("coder", description="Writes Rust"):
                assert [one.agent.description for one in await client.agents.list()] == ["Writes Rust"]
        assert await client.agents.list() == ()
        with pytest.raises(UnknownAgent):
            await client.agents.unregister("coder")


async def test_leases_run_out_and_are_renewed_also_for_who_was_forgotten() -> None:
    async with door_with() as (door, client):
        await stub(door).RegisterAgent(agents_pb2.RegisterAgentRequest(agent={"id": "mute"}, ttl={"seconds": 1}))
        async with client.agents.register("steady", ttl=1.0) as registration:

            async def states() -> dict[str, str]:
                return {one.agent.id: one.state for one in await client.agents.list()}

            async def mute_is_lost() -> bool:
                return (await states())["mute"] == "lost"

            await until(mute_is_lost)
            assert (await states())["steady"] == "live", "it was renewed meanwhile"
            with pytest.raises(AgentsBusy) as caught:
                await client.agents.route(exclude=["steady"], labels={})
            assert caught.value.retry_after and "lease ran out" in str(caught.value)
            await stub(door).Heartbeat(agents_pb2.HeartbeatRequest(agent_id="mute"))
            assert (await states())["mute"] == "live"
            await client.agents.unregister("steady")  # as a restart of the control plane would

            async def is_back() -> bool:
                return "steady" in await states()

            await until(is_back)
            assert registration.failure is None
        assert set(await states()) <= {"mute"}


async def test_who_registers_an_id_later_holds_it_also_when_the_first_goes() -> None:
    async with door_with() as (door, client), AsyncClient(door.address) as other:
        async with client.agents.register("dup", description="first", ttl=1.5) as first:
            async with other.agents.register("dup", description="second", ttl=1.5):
                await eventually(lambda: first.failure is not None)
                assert first.failure is not None and first.failure.reason == "SUPERSEDED"
                await first.close()
                (left,) = await client.agents.list()
                assert left.agent.description == "second"
            assert not await client.agents.list()


async def test_assignments_expire_and_count_as_failures() -> None:
    async with door_with() as (door, client), client.agents.register("a"):
        made = await client.agents.route(task_type="chat", within=1.0)

        async def over() -> bool:
            return (await client.agents.list())[0].running == 0

        assert not await over()
        await until(over)
        assert await made.succeeded() == "expired" == made.outcome
        (experience,) = (await client.agents.list())[0].experience
        assert (experience.task_type, round(experience.tasks, 3), experience.successes) == ("chat", 1.0, 0.0)
        text = door.plane.metrics.registry.get_sample_value("modelyard_agent_assignments_total", {"outcome": "expired"})
        assert text == 1


# -------------------------------------------------------------------- routing ---


async def test_a_task_goes_to_who_can_do_it_and_every_number_can_be_redone() -> None:
    async with (
        door_with(agents={"weights": {"speed": 4.0}}) as (_, client),
        client.agents.register("python", description="Reviews Python", skills={"code review": 0.8}, max_concurrency=2),
        client.agents.register("poet", description="Writes poems", skills=["poetry"]),
    ):
        made = await client.agents.route("Review a change in Python", skills={"Code-Reviews": 0.5}, task_type="chat")
        assert made.agent.id == "python" and made.deadline is not None
        decision = made.decision
        assert (decision.similarity, decision.similarity_detail) == ("lexical", "no model embeds")
        weights = {"capability": 3, "experience": 1, "availability": 2, "success": 2, "speed": 4}
        for candidate in decision.candidates:
            assert {term.name: term.weight for term in candidate.terms} == weights
            by_hand = sum(term.value * term.weight for term in candidate.terms) / sum(weights.values())
            assert candidate.score == pytest.approx(by_hand, abs=1e-12)
            assert sum(term.contribution for term in candidate.terms) == pytest.approx(by_hand, abs=1e-12)
            parts = candidate.capability_terms
            capability = sum(part.value * part.weight for part in parts) / sum(part.weight for part in parts)
            assert candidate.terms[0].value == pytest.approx(capability, abs=1e-12)
        chosen, refused = decision.candidates
        skill, description, kind = chosen.capability_terms
        assert (skill.name, skill.value, skill.weight) == ("skill: Code-Reviews", 0.8, 2.0)
        assert skill.detail == "'code review': similarity 1.00 x level 0.80"
        assert description.value > refused.capability_terms[1].value and kind.value == 0.5
        assert [one.reason for one in refused.rejections] == ["skill"]
        assert decision.summary.startswith("python scores 0.") and decision.agent_id == "python"

        assert await made.succeeded(duration=12.0, score=0.5) == "success"
        assert await made.failed() == "success", "the first word counts"
        (experience,) = next(one for one in await client.agents.list() if one.agent.id == "python").experience
        assert experience.successes == pytest.approx(0.5, rel=1e-5)
        assert experience.typical_duration == pytest.approx(12.0, rel=1e-6)
        again = await client.agents.explain(skills=["code review"], task_type="chat")
        terms = {term.name: term for term in again.candidates[0].terms}
        assert terms["experience"].value == pytest.approx((0.5 + 2) / 5, rel=1e-5)
        mean = (2.5 / 5 + 2 / 4) / 2
        assert terms["success"].value == pytest.approx((0.5 + 4 * mean) / 5, rel=1e-5)
        assert terms["speed"].detail == "12 s expected"


async def test_places_are_reserved_and_given_back() -> None:
    async with door_with() as (_, client), client.agents.register("a", max_concurrency=2):
        first, second = await asyncio.gather(client.agents.route(), client.agents.route())
        assert first.id != second.id
        await first.succeeded(duration=50.0)
        third = await client.agents.route()
        with pytest.raises(AgentsBusy) as busy:
            await client.agents.route()
        assert busy.value.retry_after == pytest.approx(50.0, abs=5), "what is expected of it, less what has passed"
        dry = await client.agents.explain()
        assert not dry.agent_id and dry.candidates[0].rejections[0].reason == "busy"
        with pytest.raises(RuntimeError, match="mine"):
            async with second:
                raise RuntimeError("mine")
        async with third:
            pass
        assert (second.outcome, third.outcome) == ("failure", "success")
        assert (await client.agents.list())[0].running == 0
        with pytest.raises(NoCapableAgent, match="no skill 'sql'") as hopeless:
            await client.agents.route(skills=["sql"])
        assert hopeless.value.retry_after is None
        with pytest.raises(NoCapableAgent, match="excludes it"):
            await client.agents.route(exclude=["a"])
        with pytest.raises(NoCapableAgent, match="label zone"):
            await client.agents.route(labels={"zone": "eu"})
        with pytest.raises(UnknownAssignment):
            await client.agents.report("4711", success=True)


async def test_many_at_once_never_take_more_places_than_there_are() -> None:
    async with door_with() as (_, client), client.agents.register("a", max_concurrency=7), client.agents.register("b"):
        got = await asyncio.gather(*(client.agents.route() for _ in range(40)), return_exceptions=True)
        made = [one.agent.id for one in got if not isinstance(one, BaseException)]
        assert sorted(made) == ["a"] * 7 + ["b"]
        assert all(isinstance(one, AgentsBusy) for one in got if isinstance(one, BaseException))


async def test_who_waits_for_a_place_gets_it() -> None:
    async with door_with() as (_, client), client.agents.register("a"):
        made = await client.agents.route()
        waiting = asyncio.ensure_future(client.agents.route(retries=20))
        await asyncio.sleep(0)
        await made.succeeded(duration=0.1)
        assert (await waiting).agent.id == "a"


async def test_after_a_start_it_is_not_final_that_nobody_can() -> None:
    async with door_with(agents={"warm_up": 60.0}) as (_, client):
        with pytest.raises(FleetWarmingUp) as caught:
            await client.agents.route(skills=["sql"])
        assert caught.value.retry_after is not None and 50 < caught.value.retry_after <= 60


async def test_interactions() -> None:
    async with door_with() as (_, client), client.agents.register("a", max_concurrency=9):
        for by, seconds in (("boss", 2.0), ("boss", 4.0), ("peer", None)):
            made = await client.agents.route(from_agent=by)
            await (made.succeeded(duration=seconds) if seconds else made.failed())
        boss, peer = await client.agents.interactions()
        assert (boss.from_agent_id, boss.to_agent_id, boss.assigned, boss.succeeded, boss.failed) == (
            "boss", "a", 2, 2, 0,
        )  # fmt: skip
        assert boss.mean_duration == 3.0 and boss.last_at is not None
        assert (peer.failed, peer.mean_duration) == (1, None)
        assert [one.from_agent_id for one in await client.agents.interactions("peer")] == ["peer"]
        assert [one.from_agent_id for one in await client.agents.interactions(limit=1)] == ["boss"]


# -------------------------------------------------------------------- tenants ---


async def test_another_tenants_agent_is_as_one_that_is_not_there() -> None:
    async with door_with() as (door, client), AsyncClient(door.address, tenant="other") as other:
        async with client.agents.register("a", skills=["sql"]):
            made = await client.agents.route(skills=["sql"], from_agent="boss")

            async def told(call: Any) -> tuple[str, str, Any]:
                with pytest.raises(Exception) as caught:
                    await call
                error: Any = caught.value
                return error.reason, str(error).replace(made.id, "ID").replace("nobody", "a"), error.retry_after

            async def beat(id: str) -> None:
                await other.agents._renew(id, 0, 5.0)

            pairs = [
                (other.agents.unregister("a"), other.agents.unregister("nobody")),
                (beat("a"), beat("nobody")),
                (other.agents.report(made.id, success=True), other.agents.report("ID", success=True)),
            ]
            for real, absent in pairs:
                assert await told(real) == await told(absent)
            assert await other.agents.list() == () == await other.agents.interactions()
            assert (await other.agents.match(skills=["sql"], include_rejected=True)).matches == ()
            assert (await told(other.agents.route(skills=["sql"])))[:2] == (
                "NO_CAPABLE_AGENT", "no agent is registered",
            )  # fmt: skip
            async with other.agents.register("a", description="theirs"):
                assert (await client.agents.list())[0].agent.description == ""
            assert await made.succeeded() == "success"
            with pytest.raises(UnknownAssignment):
                await other.agents.report(made.id, success=True)


# ----------------------------------------------------------------- violations ---

AGENT = {"id": "a"}


VIOLATIONS: list[tuple[str, Any, list[str]]] = [
        ("RegisterAgent", {}, ["agent"]),
        ("RegisterAgent", {"agent": {}}, ["agent.id"]),
        ("RegisterAgent", {"agent": {"id": "Not An Id"}}, ["agent.id"]),
        ("RegisterAgent", {"agent": {**AGENT, "description": "x" * 2001}}, ["agent.description"]),
        ("RegisterAgent", {"agent": {**AGENT, "skills": [{"name": "ok"}, {"name": " "}]}}, ["agent.skills[1].name"]),
        ("RegisterAgent", {"agent": {**AGENT, "skills": [{"name": "a"}, {"name": "a"}]}}, ["agent.skills[1].name"]),
        ("RegisterAgent", {"agent": {**AGENT, "skills": [{"name": "a\x07"}]}}, ["agent.skills[0].name"]),
        ("RegisterAgent", {"agent": {**AGENT, "skills": [{"name": "x" * 101}]}}, ["agent.skills[0].name"]),
        ("RegisterAgent", {"agent": {**AGENT, "skills": [{"name": "a", "level": 1.01}]}}, ["agent.skills[0].level"]),
        (
            "RegisterAgent",
            {"agent": {**AGENT, "skills": [{"name": "a", "level": float("nan")}]}},
            ["agent.skills[0].level"],
        ),
        ("RegisterAgent", {"agent": {**AGENT, "skills": [{"name": str(i)} for i in range(65)]}}, ["agent.skills"]),
        ("RegisterAgent", {"agent": {**AGENT, "task_types": [1, 0]}}, ["agent.task_types[1]"]),
        ("RegisterAgent", {"agent": {**AGENT, "task_types": [99]}}, ["agent.task_types[0]"]),
        ("RegisterAgent", {"agent": {**AGENT, "max_concurrency": 1001}}, ["agent.max_concurrency"]),
        ("RegisterAgent", {"agent": {**AGENT, "labels": {"": "x"}}}, ["agent.labels"]),
        ("RegisterAgent", {"agent": {**AGENT, "labels": {"zone": "x" * 257}}}, ["agent.labels[zone]"]),
        ("RegisterAgent", {"agent": {**AGENT, "metadata": {str(i): "" for i in range(33)}}}, ["agent.metadata"]),
        ("RegisterAgent", {"agent": {**AGENT, "endpoint": "x" * 501}}, ["agent.endpoint"]),
        ("RegisterAgent", {"agent": AGENT, "ttl": {"nanos": 1}}, ["ttl"]),
        ("RegisterAgent", {"agent": AGENT, "ttl": {"seconds": 3601}}, ["ttl"]),
        ("Heartbeat", {}, ["agent_id"]),
        ("UnregisterAgent", {"agent_id": "A"}, ["agent_id"]),
        ("MatchCapabilities", {}, ["description"]),
        ("MatchCapabilities", {"description": "x" * 4001}, ["description"]),
        ("MatchCapabilities", {"task_type": 99, "kind": 9, "limit": 1001}, ["task_type", "kind", "limit"]),
        ("RouteTask", {"required_skills": [{"name": "a", "min_level": -0.1}]}, ["required_skills[0].min_level"]),
        ("RouteTask", {"required_skills": [{"name": str(i)} for i in range(33)]}, ["required_skills"]),
        ("RouteTask", {"excluded_agent_ids": ["ok", "NOT"]}, ["excluded_agent_ids[1]"]),
        ("RouteTask", {"excluded_agent_ids": [str(i) for i in range(101)]}, ["excluded_agent_ids"]),
        ("RouteTask", {"from_agent_id": "!"}, ["from_agent_id"]),
        ("RouteTask", {"timeout": {"seconds": 7 * 86400 + 1}}, ["timeout"]),
        ("ReportAssignment", {}, ["assignment_id", "outcome"]),
        ("ReportAssignment", {"assignment_id": "x", "outcome": 3}, ["outcome"]),
        ("ReportAssignment", {"assignment_id": "x", "outcome": 1, "duration": {}}, ["duration"]),
        ("ReportAssignment", {"assignment_id": "x", "outcome": 1, "duration": {"seconds": -1}}, ["duration", ]),
        ("ReportAssignment", {"assignment_id": "x", "outcome": 1, "score": 1.5}, ["score"]),
        ("ReportAssignment", {"assignment_id": "x", "outcome": 2, "score": 1.0}, ["score"]),
        ("ListInteractions", {"agent_id": "A", "limit": 1001}, ["agent_id", "limit"]),
]  # fmt: skip


async def test_limits_are_told_by_field() -> None:
    async with front_door() as door:
        for method, given, fields in VIOLATIONS:
            message = getattr(agents_pb2, f"{method}Request")(**given)
            refusal = await door.refusal(getattr(stub(door), method)(message))
            assert refusal.reason is Reason.INVALID_REQUEST, (method, given)
            assert [violation.field for violation in refusal.violations] == fields, (method, given)
        assert not door.plane.router.registered() and not door.plane.router.open()


async def test_a_tenant_has_so_many_agents_and_no_more() -> None:
    async with door_with(agents={"max_agents": 2}) as (_, client):
        async with client.agents.register("a"), client.agents.register("b"):
            with pytest.raises(TooManyAgents, match=r"2 \(agents.max_agents\)"):
                await client.agents.register("c").start()
        async with client.agents.register("c"):
            pass


async def test_nothing_new_while_it_drains_but_reports() -> None:
    async with door_with() as (door, client), client.agents.register("a"):
        made = await client.agents.route()
        door.plane.agents.stop_accepting()
        refused = await door.refusal(stub(door).ListAgents(agents_pb2.ListAgentsRequest()))
        assert refused.reason is Reason.DRAINING
        assert await made.succeeded() == "success"


# -------------------------------------------------------------------- matching ---


async def test_models_and_agents_are_ranked_together() -> None:
    coder = model_info(
        "coder",
        capabilities=[fleet_pb2.Capability(task_type=3, score=0.9)],  # type: ignore[arg-type]
        features=[fleet_pb2.MODEL_FEATURE_VISION],
    )
    talker = model_info("talker", capabilities=[fleet_pb2.Capability(task_type=1, score=0.7)], features=[])  # type: ignore[arg-type]
    async with (
        door_with(FakeModelServer("one", [coder, talker])) as (_, client),
        client.agents.register("dev", skills={"code generation": 0.6}, task_types=["code_generation", "chat"]),
    ):
        found = await client.agents.match(skills=["generating code"], include_rejected=True)
        assert [(one.kind, one.id, one.score) for one in found.matches] == [
            ("model", "coder", pytest.approx(0.9)), ("agent", "dev", 0.6), ("model", "talker", 0.0),
        ]  # fmt: skip
        assert [one.reason for one in found.matches[-1].rejections] == ["skill"]
        assert all(one.available for one in found.matches)
        chat = await client.agents.match(task_type="chat")
        assert [(one.id, one.score) for one in chat.matches] == [("dev", 1.0), ("talker", pytest.approx(0.7))]
        assert [one.id for one in (await client.agents.match(skills=["vision"])).matches] == ["coder"]
        (only,) = (await client.agents.match("write code", kind="model", limit=1)).matches
        assert (only.kind, only.id) == ("model", "coder")
        made = await client.agents.route()
        (busy,) = (await client.agents.match("code", kind="agent")).matches
        assert not busy.available, "its only place is taken"
        await made.succeeded()


async def test_descriptions_are_compared_by_embeddings_of_the_fleet_and_kept() -> None:
    fake = embedding()
    async with (
        door_with(fake) as (door, client),
        client.agents.register("coder", description="Python, python, python by the sea"),
        client.agents.register("translator", description="German letters"),
    ):
        found = await client.agents.match("Ein Brief: german, but of python", kind="agent")
        assert (found.similarity, found.similarity_detail) == ("embedding", "fake/embedder")
        scores = {one.id: one.score for one in found.matches}
        # (1, 1, 0) with (3, 0, 1) and (0, 1, 0)
        assert scores == {"coder": pytest.approx(3 / 20**0.5), "translator": pytest.approx(1 / 2**0.5)}
        (call,) = fake.calls_of("Embed")
        assert len(call.request.inputs) == 3 and call.request.model == "embedder"
        await client.agents.match("Ein Brief: german, but of python", kind="agent")
        assert len(fake.calls_of("Embed")) == 1, "all is known"
        decision = await client.agents.explain("a python")
        assert decision.agent_id == "coder" and decision.similarity == "embedding"
        assert [len(one.request.inputs) for one in fake.calls_of("Embed")] == [3, 1]
        # Not for another tenant, who could tell by the time it takes.
        async with AsyncClient(door.address, tenant="other") as other, other.agents.register("x", description="sea"):
            await other.agents.match("a python", kind="agent")
        assert len(fake.calls_of("Embed")[-1].request.inputs) == 2
        await client.agents.match(skills=["python"])
        assert len(fake.calls_of("Embed")) == 3, "skills are compared by words"


async def test_embeddings_may_decide_about_skills_where_that_is_set() -> None:
    async with (
        door_with(embedding(), agents={"match": {"skill_embedding_threshold": 0.99}}) as (_, client),
        client.agents.register("coder", skills=["writing Python"]),
        client.agents.register("sailor", skills=["the sea"]),
    ):
        assert (await client.agents.explain(skills=["snakes called python"])).agent_id == "coder"


async def test_a_hanging_embedder_costs_its_timeout_once() -> None:
    fake = embedding()
    async with (
        door_with(fake, agents={"embedding": {"timeout": 0.2}}) as (door, client),
        client.agents.register("coder", description="Writes Python programs"),
        client.agents.register("poet", description="Writes poems about the sea"),
    ):
        gate = fake.gate("Embed")
        began = time.monotonic()
        decision = await client.agents.explain("a poem, please")
        assert 0.2 <= time.monotonic() - began < 5
        assert (decision.agent_id, decision.similarity) == ("poet", "lexical")
        assert decision.similarity_detail == "fake/embedder took longer than 0.2 s to embed"
        made = await client.agents.route("a program in Python")
        assert (made.agent.id, made.decision.similarity) == ("coder", "lexical")
        assert made.decision.similarity_detail == "fake/embedder has just failed to embed"
        assert len(fake.calls_of("Embed")) == 1, "not asked again so soon"
        gate.open()
        await door.until_idle()


async def test_an_embedder_that_fails_or_is_not_there_is_named() -> None:
    fake = embedding()
    fake.inject_error("Embed", Refusal(Reason.CONTENT_REFUSED, "a secret description"), times=99)
    async with door_with(fake) as (_, client), client.agents.register("a", description="x"):
        decision = await client.agents.explain("y")
        assert decision.similarity_detail == "fake/embedder does not embed: CONTENT_REFUSED"
    async with (
        door_with(embedding(), agents={"embedding": {"model": "other"}}) as (_, client),
        client.agents.register("a", description="x"),
    ):
        assert (await client.agents.explain("y")).similarity_detail == "model 'other' embeds nothing"
    async with (
        door_with(embedding(), agents={"embedding": {"enabled": False}}) as (_, client),
        client.agents.register("a", description="x"),
    ):
        assert (await client.agents.explain("y")).similarity_detail == "agents.embedding.enabled is off"


async def test_a_fault_of_ours_in_embedding_ends_in_words(caplog: pytest.LogCaptureFixture) -> None:
    async with door_with(embedding()) as (door, client), client.agents.register("a", description="x"):

        async def broken(*_: Any) -> Any:
            raise KeyError("a secret description")

        door.plane.agents._embedder._embed = broken
        decision = await client.agents.explain("y")
        assert decision.similarity_detail == "fake/embedder does not embed: INTERNAL"
        assert "does not embed" in caplog.text and "secret" not in caplog.text


async def test_with_a_real_model_the_cosine_can_be_redone() -> None:
    plugin = registry.find("mlx")
    engine = registry.create(
        plugin, registry.validate(plugin, {"model": "bundled", "name": "yardling", "capabilities": {"embedding": 0.2}})
    )
    about = "Translates legal documents between German and English"
    async with (
        door_with(agents={"embedding": {"timeout": 30.0}}) as (door, client),
        model_server(engine, server_id="mlx", orchestrators=(door.address,)),
    ):
        await door.until_ready("mlx")
        async with (
            client.agents.register("translator", description=about),
            client.agents.register("coder", description="Reviews pull requests and finds bugs in Python code"),
        ):
            wanted = "a German contract, to be translated"
            decision = await client.agents.explain(wanted)
            assert (decision.similarity, decision.agent_id) == ("embedding", "translator"), decision
            one, other = (np.array(vector) for vector in (await client.embed([wanted, about])).vectors)
            cosine = float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))
            assert decision.candidates[0].terms[0].value == pytest.approx(cosine, abs=1e-3)


# ------------------------------------------------------------------------ kept ---


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
async def test_a_restart_forgets_no_experience(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    if kind == "sqlite":
        url = f"sqlite:///{tmp_path}/tasks.db"
    else:
        server: Postgres = request.getfixturevalue("postgres_server")
        url = await server.tables()
    async with door_with(tasks={"store": url}) as (_, client), client.agents.register("old", max_concurrency=9):
        for seconds, kind_ in ((4.0, "chat"), (9.0, "chat"), (1.0, None)):
            await (await client.agents.route(task_type=kind_)).succeeded(duration=seconds)
        await (await client.agents.route(task_type="chat")).failed()
        (before,) = await client.agents.list()
    async with door_with(tasks={"store": url}) as (_, client):
        assert await client.agents.list() == ()
        async with client.agents.register("new"), client.agents.register("old"):
            after = next(one for one in await client.agents.list() if one.agent.id == "old")
            assert [one.task_type for one in after.experience] == ["", "chat"]
            for was, still in zip(before.experience, after.experience, strict=True):
                assert still.tasks == pytest.approx(was.tasks, rel=1e-4)
                assert still.successes == pytest.approx(was.successes, rel=1e-4)
            assert after.experience[1].typical_duration == pytest.approx(6.0, rel=1e-4)
            assert (await client.agents.explain()).agent_id == "old"
            await (await client.agents.route(exclude=["new"])).failed()
    async with door_with(tasks={"store": url}) as (_, client), client.agents.register("old"):
        unnamed, _ = (await client.agents.list())[0].experience
        assert (round(unnamed.tasks, 2), round(unnamed.successes, 2)) == (2.0, 1.0)


# ------------------------------------------------------------- other clients ---


async def test_the_client_without_asyncio() -> None:
    async with door_with() as (door, _):

        def work() -> None:
            with Client(door.address) as client, client.agents.register("a", skills=["sql"], ttl=2.0) as agent:
                assert agent.id == "a" and agent.status is not None and agent.failure is None
                assert [one.agent.id for one in client.agents.list()] == ["a"]
                assert client.agents.match(skills=["sql"], kind="agent").matches[0].score == 1.0
                with client.agents.route(skills=["sql"], from_agent="boss") as made:
                    assert made.agent.id == made.decision.agent_id == "a" and made.deadline and not made.outcome
                assert made.outcome == made.succeeded() == made.failed() == "success"
                assert client.agents.report(made.id, success=False) == "success"
                assert client.agents.explain().agent_id == "a"
                assert client.agents.interactions()[0].succeeded == 1
                with pytest.raises(TypeError, match="several"):
                    client.agents.route(skills="sql")
                with pytest.raises(ValueError, match="unknown task type"):
                    client.agents.route(task_type="nonsense")
                with pytest.raises(InvalidRequest):
                    client.agents.unregister("NOT")

        await asyncio.to_thread(work)


def in_this_process(*arguments: str) -> subprocess.CompletedProcess[str]:
    """As `modelyard` of test_cli, without the second that a process takes to start."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(arguments)
    return subprocess.CompletedProcess(arguments, status, out.getvalue(), err.getvalue())


async def test_the_command_line() -> None:
    async with (
        door_with() as (door, client),
        client.agents.register("coder", description="Writes Python", skills={"python": 0.9}, endpoint="here:1"),
        client.agents.register("poet", description="Writes poems", max_concurrency=2),
    ):

        async def run(*arguments: str, status: int = 0) -> Any:
            done = await asyncio.to_thread(in_this_process, "--address", door.address, "agents", *arguments)
            assert done.returncode == status, done.stderr
            return json.loads(done.stdout) if "--json" in arguments else done

        whole = await asyncio.to_thread(modelyard, "--address", door.address, "agents", "list", "--json")
        assert [one["agent"]["id"] for one in json.loads(whole.stdout)["agents"]] == ["coder", "poet"], whole.stderr
        listed = (await run("list")).stdout.splitlines()
        assert [line.split()[:3] for line in listed[1:]] == [["coder", "live", "0/1"], ["poet", "live", "0/2"]]
        matched = await run("match", "Write a program in Python", "--skill", "Python:0.5", "--all")
        assert "no skill 'Python'" in matched.stdout and "coder" in matched.stdout.splitlines()[1]
        assert "similarity 1.00 x level 0.90" in matched.stderr and "compared by words" in matched.stderr
        dry = await run("route", "some Python", "--dry-run")
        assert dry.stdout.startswith("coder scores 0.") and "capability x3" in dry.stderr
        assert (await run("route", "x", "--dry-run", "--json"))["decision"]["candidates"][0]["terms"]
        routed = await run("route", "--skill", "python", "--from", "boss", "--json")
        assert routed["assignment"]["agent"]["endpoint"] == "here:1" and routed["decision"]["agent_id"] == "coder"
        busy = await run("route", "--skill", "python", "--json", status=5)
        assert busy["error"]["reason"] == "AGENTS_BUSY" and busy["error"]["retry_after"] > 0
        assert (await run("route", "--skill", "python", "--dry-run", "--json", status=5))["decision"]["candidates"]
        assert "are taken" in (await run("route", "--skill", "python", "--dry-run", status=5)).stdout
        assert (await run("report", routed["assignment"]["id"], "--score", "0.5")).stdout == "success\n"
        told = await run("report", routed["assignment"]["id"], "--failed")
        assert told.stdout == "it had been reported as a success before, that stands\n"
        told = await run("interactions", "--json")
        assert told["interactions"][0]["from_agent_id"] == "boss" and told["interactions"][0]["succeeded"] == 1
        assert (await run("interactions", "poet")).stdout.split() == [
            "from",
            "to",
            "assigned",
            "succeeded",
            "failed",
            "mean",
            "time",
        ]
        await run("route", "--skill", "cooking", "--dry-run", status=4)
        none = await run("route", "--skill", "cooking", status=4)
        assert "--dry-run" in none.stderr
        assert "is no level" in (await run("match", "--skill", "python:much", status=2)).stderr


async def test_a_client_that_nobody_here_wrote() -> None:
    async with door_with() as (door, _):
        agent = {"id": "coder", "skills": [{"name": "python", "level": 0.8}], "endpoint": "here:1"}
        made = await curl(door.address, f"{SERVICE}/RegisterAgent", {"agent": agent, "ttl": "60s"})
        assert made.messages[0]["agent"]["state"] == "AGENT_STATE_LIVE", made.errors
        routed = await curl(door.address, f"{SERVICE}/RouteTask", {"requiredSkills": [{"name": "Python"}]})
        assignment = routed.messages[0]["assignment"]
        assert assignment["agent"]["endpoint"] == "here:1"
        busy = await curl(door.address, f"{SERVICE}/RouteTask", {"description": "more"})
        assert busy.error["code"] == "resource_exhausted"
        ended = await curl(
            door.address,
            f"{SERVICE}/ReportAssignment",
            {"assignmentId": assignment["id"], "outcome": "ASSIGNMENT_OUTCOME_SUCCESS"},
        )
        assert ended.messages == [{"outcome": "ASSIGNMENT_OUTCOME_SUCCESS", "agentId": "coder"}]


async def test_the_store_keeps_the_newest_rows(tmp_path: Path) -> None:
    async with door_with(tasks={"store": f"sqlite:///{tmp_path}/tasks.db"}) as (door, _):
        store = door.plane.agent_store
        assert store is not None
        rows = [
            LearnedOfAgent("default", AgentId(f"a{at}"), 1, float(at), Tally(1.0, 0.5, 0.5, -0.25)) for at in range(10)
        ]
        await store.keep(rows, before=2.0, limit=5)
        assert await store.learned(100) == rows[5:], "the oldest first"
        assert await store.learned(2) == rows[8:]
        await store.keep([dataclasses.replace(rows[9], tally=Tally(3.0))], before=7.0, limit=5)
        kept = await store.learned(100)
        assert [one.agent_id for one in kept] == ["a7", "a8", "a9"] and kept[-1].tally == Tally(3.0)
