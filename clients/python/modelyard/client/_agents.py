"""Agents and the routing of tasks among them, for asyncio: `AsyncClient.agents`."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from datetime import datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from modelyard.client import _agent_types as types
from modelyard.client import _answers as answers
from modelyard.client import _names as names
from modelyard.client import _values as values
from modelyard.client._errors import ModelyardError, UnknownAgent
from modelyard.client._service import Service
from modelyard.client._values import filled
from modelyard.v1 import agents_pb2, agents_pb2_grpc

if TYPE_CHECKING:
    from modelyard.client._async import AsyncClient

Skills = Sequence[str] | Mapping[str, float]
"""Names, or names with levels [0, 1]: of an agent, how good it is (1 without one); of a task, how good it must be."""

_CLOSING = 5.0
"""Seconds that the farewell of an agent may take."""


class AsyncAgents(Service):
    """Agents: who they are, what they can do, and which of them is to do a task.

    async with client.agents.register("reviewer", description="Reviews Python", skills=["code review"]):
        ...                                       # takes on tasks as long as this block runs

    async with await client.agents.route("Review this change", skills=["code review"]) as assignment:
        await hand_over(assignment.agent.endpoint)   # an exception here reports a failure, else it is a success
    """

    def __init__(self, client: AsyncClient) -> None:
        super().__init__(client, agents_pb2_grpc.AgentsStub)

    def register(
        self,
        id: str,
        *,
        description: str = "",
        skills: Skills = (),
        task_types: Sequence[str] = (),
        max_concurrency: int = 1,
        labels: Mapping[str, str] | None = None,
        endpoint: str = "",
        metadata: Mapping[str, str] | None = None,
        ttl: float | None = None,
    ) -> AsyncRegistration:
        """Make an agent known for as long as an `async with` block runs: its lease of `ttl` seconds is renewed in the
        background, and after a restart of the control plane it is registered anew."""
        request = agents_pb2.RegisterAgentRequest(
            agent=filled(
                agents_pb2.AgentSpec,
                id=id,
                description=description,
                skills=[agents_pb2.AgentSkill(name=name, level=level) for name, level in _levels(skills, 1.0).items()],
                task_types=[names.TASK_TYPE.number(one) for one in task_types],
                max_concurrency=max_concurrency,
                labels=labels,
                endpoint=endpoint,
                metadata=metadata,
            ),
            ttl=values.duration("ttl", ttl),
        )
        return AsyncRegistration(self, request)

    async def unregister(self, id: str, *, timeout: float | None = None) -> None:
        """Take an agent off the list. Raises UnknownAgent."""
        await self._unregister(id, 0, timeout)

    async def list(self, *, timeout: float | None = None) -> tuple[types.AgentStatus, ...]:
        """The tenant's agents by id, those that are lost included."""
        response = await self._call("ListAgents", agents_pb2.ListAgentsRequest(), timeout)
        return tuple(map(_status, response.agents))

    async def match(
        self,
        description: str = "",
        *,
        skills: Skills = (),
        task_type: str | None = None,
        kind: str | None = None,
        limit: int = 20,
        include_rejected: bool = False,
        timeout: float | None = None,
    ) -> types.CapabilityMatches:
        """Rank models of the fleet and agents by how well they fit a described task; `kind` is "model" or "agent".
        Required skills exclude who lacks them, a description nobody."""
        request = filled(
            agents_pb2.MatchCapabilitiesRequest,
            description=description,
            required_skills=_required(skills),
            task_type=_task_type(task_type),
            kind=names.CANDIDATE_KIND.number(kind) if kind else 0,
            limit=limit,
            include_rejected=include_rejected,
        )
        response = await self._call("MatchCapabilities", request, timeout)
        return types.CapabilityMatches(
            tuple(map(_match, response.matches)),
            names.SIMILARITY.name(response.similarity),
            response.similarity_detail,
        )

    async def route(
        self,
        description: str = "",
        *,
        skills: Skills = (),
        task_type: str | None = None,
        labels: Mapping[str, str] | None = None,
        exclude: Sequence[str] = (),
        from_agent: str | None = None,
        within: float | None = None,
        timeout: float | None = None,
        retries: int | None = None,
    ) -> AsyncAssignment:
        """Choose an agent for a task and reserve one of its places. Hand the task over yourself, and report how it
        went within `within` seconds, or it counts as failed.

        Raises NoCapableAgent, and AgentsBusy with the seconds in which a place may be free, for which `retries` waits.
        """
        request = _route_request(description, skills, task_type, labels, exclude, from_agent)
        if (limit := values.duration("within", within)) is not None:
            request.timeout.CopyFrom(limit)
        response = await self._call("RouteTask", request, timeout, retries)
        return AsyncAssignment(self, response)

    async def explain(
        self,
        description: str = "",
        *,
        skills: Skills = (),
        task_type: str | None = None,
        labels: Mapping[str, str] | None = None,
        exclude: Sequence[str] = (),
        timeout: float | None = None,
    ) -> types.RoutingDecision:
        """Dry run of `route`: who would be chosen now, and why not the others."""
        request = _route_request(description, skills, task_type, labels, exclude, None)
        request.dry_run = True
        return _decision((await self._call("RouteTask", request, timeout)).decision)

    async def report(
        self,
        assignment_id: str,
        *,
        success: bool,
        score: float | None = None,
        duration: float | None = None,
        timeout: float | None = None,
        retries: int | None = None,
    ) -> str:
        """Say how an assignment ended: after `duration` seconds (default: those since it was routed); of a success, how
        good it was, [0, 1]. What counted: "success", "failure", or "expired" if it came too late; the first report
        counts. Raises UnknownAssignment."""
        outcome = names.ASSIGNMENT_OUTCOME.number("success" if success else "failure")
        request = agents_pb2.ReportAssignmentRequest(
            assignment_id=assignment_id,
            outcome=outcome,  # type: ignore[arg-type]
            score=score,
            duration=values.duration("duration", duration),
        )
        response = await self._call("ReportAssignment", request, timeout, retries)
        return names.ASSIGNMENT_OUTCOME.name(response.outcome)

    async def interactions(
        self, agent: str | None = None, *, limit: int = 100, timeout: float | None = None
    ) -> tuple[types.Interaction, ...]:
        """Which agents have handed tasks to which since the control plane runs; those with most first."""
        request = filled(agents_pb2.ListInteractionsRequest, agent_id=agent or "", limit=limit)
        response = await self._call("ListInteractions", request, timeout)
        return tuple(map(_interaction, response.interactions))

    # What Registration needs.

    async def _register(
        self, request: agents_pb2.RegisterAgentRequest, timeout: float | None = None
    ) -> tuple[types.AgentStatus, float, int]:
        response = await self._call("RegisterAgent", request, timeout)
        return _status(response.agent), response.ttl.ToTimedelta().total_seconds(), response.registration

    async def _unregister(self, id: str, registration: int, timeout: float | None) -> None:
        request = agents_pb2.UnregisterAgentRequest(agent_id=id, registration=registration)
        await self._call("UnregisterAgent", request, timeout, retries=0)

    async def _renew(self, id: str, registration: int, timeout: float) -> float:
        request = agents_pb2.HeartbeatRequest(agent_id=id, registration=registration)
        response = await self._call("Heartbeat", request, timeout, retries=0)
        ttl: float = response.ttl.ToTimedelta().total_seconds()
        return ttl


class AsyncRegistration:
    """An agent that is known as long as the `async with` block runs."""

    def __init__(self, agents: AsyncAgents, request: agents_pb2.RegisterAgentRequest) -> None:
        self._agents = agents
        self._request = request
        self._renewing: asyncio.Task[None] | None = None
        self._registration = 0
        self.id = request.agent.id
        self.status: types.AgentStatus | None = None
        """As it was registered last."""
        self.failure: ModelyardError | None = None
        """Why the last renewal failed; None if it did not. They go on, but where somebody has registered the same id
        later (SUPERSEDED): that one holds."""

    async def start(self) -> Self:
        """Register, and renew from now on. Raises InvalidRequest, TooManyAgents and what any call may."""
        self.status, ttl, self._registration = await self._agents._register(self._request)
        self._renewing = asyncio.create_task(self._renew(ttl), name=f"agent-{self.id}")
        return self

    async def close(self) -> None:
        """Unregister; where nobody answers, the lease runs out by itself. Idempotent."""
        if self._renewing is None:
            return
        self._renewing.cancel()
        await asyncio.gather(self._renewing, return_exceptions=True)
        self._renewing = None
        if self._agents._client._closed:
            return
        with contextlib.suppress(ModelyardError):
            await self._agents._unregister(self.id, self._registration, _CLOSING)

    async def _renew(self, ttl: float) -> None:
        while True:
            await asyncio.sleep(ttl / 3)
            try:
                try:
                    ttl = await self._agents._renew(self.id, self._registration, ttl / 3)
                except UnknownAgent:
                    self.status, ttl, self._registration = await self._agents._register(self._request, ttl)
                self.failure = None
            except ModelyardError as failure:
                self.failure = failure
                if failure.reason == "SUPERSEDED":
                    return

    async def __aenter__(self) -> Self:
        return await self.start()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


class AsyncAssignment:
    """A task that an agent has. Report how it went, or leave the `async with` block: with an exception it has failed,
    else it has succeeded."""

    def __init__(self, agents: AsyncAgents, response: agents_pb2.RouteTaskResponse) -> None:
        self._agents = agents
        self.id: str = response.assignment.id
        self.agent: types.Agent = _agent(response.assignment.agent)
        self.deadline: datetime | None = answers.time(response.assignment, "deadline")
        """When it counts as failed."""
        self.decision: types.RoutingDecision = _decision(response.decision)
        """Why this agent."""
        self.outcome: str = ""
        """What counted, once it was reported: "success", "failure" or "expired"."""

    async def succeeded(
        self, *, score: float | None = None, duration: float | None = None, timeout: float | None = None
    ) -> str:
        """The task was done. See AsyncAgents.report."""
        return await self._report(True, score, duration, timeout)

    async def failed(self, *, duration: float | None = None, timeout: float | None = None) -> str:
        """The task was not done. See AsyncAgents.report."""
        return await self._report(False, None, duration, timeout)

    async def _report(self, success: bool, score: float | None, duration: float | None, timeout: float | None) -> str:
        self.outcome = await self._agents.report(
            self.id, success=success, score=score, duration=duration, timeout=timeout
        )
        return self.outcome

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.outcome:
            return
        if error is None:
            await self.succeeded()
            return
        with contextlib.suppress(ModelyardError):  # the error is what matters; unreported it expires as a failure
            await self.failed()


# ----------------------------------------------------------------- requests ---


def _levels(skills: Skills, level: float) -> dict[str, float]:
    if isinstance(skills, str):
        raise TypeError("skills are several: give a list, or a dict with levels")
    return dict(skills) if isinstance(skills, Mapping) else dict.fromkeys(skills, level)


def _required(skills: Skills) -> list[agents_pb2.RequiredSkill]:
    return [agents_pb2.RequiredSkill(name=name, min_level=level) for name, level in _levels(skills, 0.0).items()]


def _task_type(given: str | None) -> Any:
    return names.TASK_TYPE.number(given) if given else 0


def _route_request(
    description: str,
    skills: Skills,
    task_type: str | None,
    labels: Mapping[str, str] | None,
    exclude: Sequence[str],
    from_agent: str | None,
) -> agents_pb2.RouteTaskRequest:
    return agents_pb2.RouteTaskRequest(
        description=description,
        required_skills=_required(skills),
        task_type=_task_type(task_type),
        required_labels=labels,
        excluded_agent_ids=[exclude] if isinstance(exclude, str) else exclude,
        from_agent_id=from_agent or "",
    )


# ------------------------------------------------------------------ answers ---


def _seconds(message: Any, field: str) -> float | None:
    return getattr(message, field).ToTimedelta().total_seconds() if message.HasField(field) else None


def _agent(message: agents_pb2.AgentSpec) -> types.Agent:
    return types.Agent(
        id=message.id,
        description=message.description,
        skills={skill.name: skill.level for skill in message.skills},
        task_types=names.TASK_TYPE.each(message.task_types),
        max_concurrency=message.max_concurrency,
        labels=dict(message.labels),
        endpoint=message.endpoint,
        metadata=dict(message.metadata),
    )


def _status(message: agents_pb2.AgentStatus) -> types.AgentStatus:
    return types.AgentStatus(
        agent=_agent(message.agent),
        state=names.AGENT_STATE.name(message.state),
        running=message.running,
        lease_until=answers.time(message, "lease_until"),
        registered_at=answers.time(message, "registered_at"),
        experience=tuple(
            types.AgentExperience(
                names.TASK_TYPE.name(one.task_type), one.tasks, one.successes, _seconds(one, "typical_duration")
            )
            for one in message.experience
        ),
    )


def _terms(messages: Any) -> tuple[types.ScoreTerm, ...]:
    return tuple(
        types.ScoreTerm(term.name, term.value, term.weight, term.contribution, term.detail) for term in messages
    )


def _rejections(messages: Any) -> tuple[types.CandidateRejection, ...]:
    return tuple(types.CandidateRejection(names.CANDIDATE_REJECTION.name(one.reason), one.detail) for one in messages)


def _match(message: agents_pb2.CapabilityMatch) -> types.CapabilityMatch:
    return types.CapabilityMatch(
        names.CANDIDATE_KIND.name(message.kind),
        message.id,
        message.score,
        _terms(message.terms),
        _rejections(message.rejections),
        message.available,
    )


def _decision(message: agents_pb2.RoutingDecision) -> types.RoutingDecision:
    return types.RoutingDecision(
        agent_id=message.agent_id,
        summary=message.summary,
        candidates=tuple(
            types.AgentCandidate(
                one.agent_id, one.score, _terms(one.terms), _terms(one.capability_terms), _rejections(one.rejections)
            )
            for one in message.candidates
        ),
        similarity=names.SIMILARITY.name(message.similarity),
        similarity_detail=message.similarity_detail,
    )


def _interaction(message: agents_pb2.Interaction) -> types.Interaction:
    return types.Interaction(
        from_agent_id=message.from_agent_id,
        to_agent_id=message.to_agent_id,
        assigned=message.assigned,
        succeeded=message.succeeded,
        failed=message.failed,
        mean_duration=_seconds(message, "mean_duration"),
        last_at=answers.time(message, "last_at"),
    )
