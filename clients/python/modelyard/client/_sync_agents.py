"""Agents and the routing of tasks among them, for code without asyncio: `Client.agents`."""

from __future__ import annotations

import builtins
from collections.abc import Mapping, Sequence
from datetime import datetime
from types import TracebackType
from typing import TYPE_CHECKING, Self

from modelyard.client._agent_types import (
    Agent,
    AgentStatus,
    CapabilityMatches,
    Interaction,
    RoutingDecision,
)
from modelyard.client._agents import AsyncAgents, AsyncAssignment, AsyncRegistration, Skills
from modelyard.client._errors import ModelyardError

if TYPE_CHECKING:
    from modelyard.client._sync import Client


class Agents:
    """Agents: who they are, what they can do, and which of them is to do a task. Arguments and methods as AsyncAgents,
    without await.

    with client.agents.register("reviewer", description="Reviews Python", skills=["code review"]):
        ...
    with client.agents.route("Review this change", skills=["code review"]) as assignment:
        hand_over(assignment.agent.endpoint)
    """

    def __init__(self, client: Client, agents: AsyncAgents) -> None:
        self._client = client
        self._agents = agents

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
    ) -> Registration:
        """Make an agent known for as long as a `with` block runs. Its lease is renewed on the client's thread."""
        registration = self._agents.register(
            id,
            description=description,
            skills=skills,
            task_types=task_types,
            max_concurrency=max_concurrency,
            labels=labels,
            endpoint=endpoint,
            metadata=metadata,
            ttl=ttl,
        )
        return Registration(self._client, registration)

    def unregister(self, id: str, *, timeout: float | None = None) -> None:
        """Take an agent off the list. Raises UnknownAgent."""
        self._client._run(self._agents.unregister(id, timeout=timeout))

    def list(self, *, timeout: float | None = None) -> tuple[AgentStatus, ...]:
        """The tenant's agents by id, those that are lost included."""
        return self._client._run(self._agents.list(timeout=timeout))

    def match(
        self,
        description: str = "",
        *,
        skills: Skills = (),
        task_type: str | None = None,
        kind: str | None = None,
        limit: int = 20,
        include_rejected: bool = False,
        timeout: float | None = None,
    ) -> CapabilityMatches:
        """Rank models of the fleet and agents by how well they fit a described task; `kind` is "model" or "agent"."""
        return self._client._run(
            self._agents.match(
                description,
                skills=skills,
                task_type=task_type,
                kind=kind,
                limit=limit,
                include_rejected=include_rejected,
                timeout=timeout,
            )
        )

    def route(
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
    ) -> Assignment:
        """Choose an agent for a task and reserve one of its places. Report how it went within `within` seconds. Raises
        NoCapableAgent, AgentsBusy."""
        made = self._client._run(
            self._agents.route(
                description,
                skills=skills,
                task_type=task_type,
                labels=labels,
                exclude=exclude,
                from_agent=from_agent,
                within=within,
                timeout=timeout,
                retries=retries,
            )
        )
        return Assignment(self._client, made)

    def explain(
        self,
        description: str = "",
        *,
        skills: Skills = (),
        task_type: str | None = None,
        labels: Mapping[str, str] | None = None,
        exclude: Sequence[str] = (),
        timeout: float | None = None,
    ) -> RoutingDecision:
        """Dry run of `route`: who would be chosen now, and why not the others."""
        return self._client._run(
            self._agents.explain(
                description, skills=skills, task_type=task_type, labels=labels, exclude=exclude, timeout=timeout
            )
        )

    def report(
        self,
        assignment_id: str,
        *,
        success: bool,
        score: float | None = None,
        duration: float | None = None,
        timeout: float | None = None,
        retries: int | None = None,
    ) -> str:
        """Say how an assignment ended. What counted: "success", "failure" or "expired"."""
        return self._client._run(
            self._agents.report(
                assignment_id, success=success, score=score, duration=duration, timeout=timeout, retries=retries
            )
        )

    def interactions(
        self, agent: str | None = None, *, limit: int = 100, timeout: float | None = None
    ) -> builtins.tuple[Interaction, ...]:
        """Which agents have handed tasks to which since the control plane runs; those with most first."""
        return self._client._run(self._agents.interactions(agent, limit=limit, timeout=timeout))


class Registration:
    """An agent that is known as long as the `with` block runs. See AsyncRegistration."""

    def __init__(self, client: Client, registration: AsyncRegistration) -> None:
        self._client = client
        self._registration = registration

    @property
    def id(self) -> str:
        """The agent."""
        return self._registration.id

    @property
    def status(self) -> AgentStatus | None:
        """As it was registered last."""
        return self._registration.status

    @property
    def failure(self) -> ModelyardError | None:
        """Why the last renewal failed; None if it did not. They go on."""
        return self._registration.failure

    def start(self) -> Self:
        """Register, and renew from now on."""
        self._client._run(self._registration.start())
        return self

    def close(self) -> None:
        """Unregister. Idempotent."""
        if not self._client._closed:
            self._client._run(self._registration.close())

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Assignment:
    """A task that an agent has. Leave the `with` block: with an exception it has failed, else it has succeeded. See
    AsyncAssignment."""

    def __init__(self, client: Client, assignment: AsyncAssignment) -> None:
        self._client = client
        self._assignment = assignment

    @property
    def id(self) -> str:
        """For `Agents.report`."""
        return self._assignment.id

    @property
    def agent(self) -> Agent:
        """Who has it."""
        return self._assignment.agent

    @property
    def deadline(self) -> datetime | None:
        """When it counts as failed."""
        return self._assignment.deadline

    @property
    def decision(self) -> RoutingDecision:
        """Why this agent."""
        return self._assignment.decision

    @property
    def outcome(self) -> str:
        """What counted, once it was reported."""
        return self._assignment.outcome

    def succeeded(
        self, *, score: float | None = None, duration: float | None = None, timeout: float | None = None
    ) -> str:
        """The task was done."""
        return self._client._run(self._assignment.succeeded(score=score, duration=duration, timeout=timeout))

    def failed(self, *, duration: float | None = None, timeout: float | None = None) -> str:
        """The task was not done."""
        return self._client._run(self._assignment.failed(duration=duration, timeout=timeout))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client._run(self._assignment.__aexit__(kind, error, trace))
