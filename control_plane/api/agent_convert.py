"""Messages of the Agents service and their domain values."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

from google.protobuf.duration_pb2 import Duration

from control_plane.api import convert
from control_plane.domain.agent import (
    AgentCandidate,
    AgentId,
    AgentSpec,
    AgentTask,
    AssignmentOutcome,
    CandidateRejection,
    Match,
    Need,
    RoutingDecision,
    Skill,
    SkillNeed,
    Tally,
    Term,
    contributions,
)
from control_plane.domain.task import TaskType
from control_plane.routing.interactions import Interaction
from control_plane.routing.router import Agent, Assignment
from modelyard.rpc.errors import Violation, invalid
from modelyard.rpc.validation import MAX_VIOLATIONS, unknown_number
from modelyard.v1 import agents_pb2

T = TypeVar("T")

MAX_AGENT_DESCRIPTION = 2000
MAX_TASK_DESCRIPTION = 4000
MAX_SKILLS = 64
MAX_REQUIRED_SKILLS = 32
MAX_SKILL_CHARACTERS = 100
MAX_CONCURRENCY = 1000
MAX_ENTRIES = 32
MAX_LABEL_CHARACTERS = 256
MAX_METADATA_CHARACTERS = 1000
MAX_ENDPOINT_CHARACTERS = 500
MAX_EXCLUDED = 100
MAX_LIMIT = 1000
MAX_TTL = 3600.0
MAX_TASK_SECONDS = 7 * 86400.0
MAX_CANDIDATES = 100
"""Of a decision that are told."""
_MATCHES, _INTERACTIONS = 20, 100

_AGENT_ID = re.compile(r"[a-z0-9._-]{1,63}")
_ASSIGNMENT_ID = re.compile(r"[\x21-\x7e]{1,64}")


# ------------------------------------------------------------------- parse ---


class Checks:
    """Collects what is wrong with a request."""

    def __init__(self) -> None:
        self.found: list[Violation] = []

    def say(self, field: str, problem: str) -> None:
        self.found.append(Violation(field, problem))

    def done(self) -> None:
        """Raises INVALID_REQUEST if something is wrong."""
        if self.found:
            raise invalid(self.found[:MAX_VIOLATIONS])

    def agent_id(self, given: str, field: str) -> AgentId:
        if not given:
            self.say(field, "is required")
        elif not _AGENT_ID.fullmatch(given):
            self.say(field, 'must be 1 to 63 of a-z, 0-9, ".", "_", "-"')
        return AgentId(given)

    def optional_agent_id(self, given: str, field: str) -> AgentId | None:
        return self.agent_id(given, field) if given else None

    def text(self, given: str, field: str, most: int) -> str:
        if len(given) > most:
            self.say(field, f"must have at most {most} characters")
        return given

    def name(self, given: str, field: str) -> str:
        if not given.strip():
            self.say(field, "is required")
        elif any(character < " " or "\x7f" <= character <= "\x9f" for character in given):
            self.say(field, "must hold no control characters")
        return self.text(given, field, MAX_SKILL_CHARACTERS)

    def share(self, given: float, field: str) -> float:
        if not 0.0 <= given <= 1.0:  # written so that NaN fails it
            self.say(field, "must be 0 to 1")
        return given

    def entries(self, given: Mapping[str, str], field: str, most: int) -> dict[str, str]:
        if len(given) > MAX_ENTRIES:
            self.say(field, f"must have at most {MAX_ENTRIES} entries")
        for key, value in given.items():
            if not key:
                self.say(field, "has an empty key")
            elif len(key) > most or len(value) > most:
                self.say(f"{field}[{key[:40]}]", f"must have at most {most} characters")
        return dict(sorted(given.items()))

    def few(self, given: Iterable[T], field: str, most: int, read: Callable[[T, str], None]) -> None:
        """Read every item with the path to it, but no more than there may be."""
        for index, item in enumerate(given):
            if index == most:
                self.say(field, f"must have at most {most} entries")
                return
            read(item, f"{field}[{index}]")

    def task_type(self, given: int, field: str) -> TaskType | None:
        try:
            return TaskType(given) if given else None
        except ValueError:
            self.say(field, unknown_number(given))
            return None

    def seconds(self, given: Duration, field: str, least: float, most: float) -> float:
        found = given.seconds + given.nanos * 1e-9
        if not least <= found <= most:
            self.say(field, f"must be {least:g} to {most:g} s")
        return found

    def limit(self, given: int, absent: int) -> int:
        if given > MAX_LIMIT:
            self.say("limit", f"must be at most {MAX_LIMIT}")
        return given or absent


def agent_spec(message: agents_pb2.AgentSpec, checks: Checks) -> AgentSpec:
    """An agent's description of itself, in the field `agent`."""
    skills: dict[str, Skill] = {}
    kinds: set[TaskType] = set()

    def skill(one: agents_pb2.AgentSkill, field: str) -> None:
        name = checks.name(one.name, f"{field}.name")
        level = checks.share(one.level, f"{field}.level") if one.HasField("level") else 1.0
        if name in skills:
            checks.say(f"{field}.name", "is there twice")
        skills[name] = Skill(name, level)

    def kind(number: int, field: str) -> None:
        found = checks.task_type(number, field)
        if found is not None:
            kinds.add(found)
        elif not number:
            checks.say(field, "must not be unspecified")

    checks.few(message.skills, "agent.skills", MAX_SKILLS, skill)
    checks.few(message.task_types, "agent.task_types", MAX_SKILLS, kind)
    if message.max_concurrency > MAX_CONCURRENCY:
        checks.say("agent.max_concurrency", f"must be at most {MAX_CONCURRENCY}")
    return AgentSpec(
        checks.agent_id(message.id, "agent.id"),
        checks.text(message.description, "agent.description", MAX_AGENT_DESCRIPTION),
        tuple(skills.values()),
        frozenset(kinds),
        message.max_concurrency or 1,
        checks.entries(message.labels, "agent.labels", MAX_LABEL_CHARACTERS),
        checks.text(message.endpoint, "agent.endpoint", MAX_ENDPOINT_CHARACTERS),
        checks.entries(message.metadata, "agent.metadata", MAX_METADATA_CHARACTERS),
    )


def need(message: agents_pb2.MatchCapabilitiesRequest | agents_pb2.RouteTaskRequest, checks: Checks) -> Need:
    """What a task asks for."""
    skills: dict[str, SkillNeed] = {}

    def skill(one: agents_pb2.RequiredSkill, field: str) -> None:
        name = checks.name(one.name, f"{field}.name")
        if name in skills:
            checks.say(f"{field}.name", "is there twice")
        skills[name] = SkillNeed(name, checks.share(one.min_level, f"{field}.min_level"))

    checks.few(message.required_skills, "required_skills", MAX_REQUIRED_SKILLS, skill)
    text = checks.text(message.description, "description", MAX_TASK_DESCRIPTION)
    return Need(text.strip(), tuple(skills.values()), checks.task_type(message.task_type, "task_type"))


def match_request(message: agents_pb2.MatchCapabilitiesRequest) -> tuple[Need, int]:
    """What is asked for, and how many matches. Raises INVALID_REQUEST."""
    checks = Checks()
    asked = need(message, checks)
    if not (asked.description or message.required_skills or message.task_type):
        checks.say("description", "or required_skills or task_type is required")
    if message.kind not in agents_pb2.CandidateKind.values():
        checks.say("kind", unknown_number(message.kind))
    limit = checks.limit(message.limit, _MATCHES)
    checks.done()
    return asked, limit


def route_request(message: agents_pb2.RouteTaskRequest, timeout: float) -> tuple[AgentTask, float]:
    """The task, and the seconds within which it must be reported. Raises INVALID_REQUEST."""
    checks = Checks()
    excluded: set[AgentId] = set()
    checks.few(
        message.excluded_agent_ids,
        "excluded_agent_ids",
        MAX_EXCLUDED,
        lambda id, field: excluded.add(checks.agent_id(id, field)),
    )
    if message.HasField("timeout"):
        timeout = checks.seconds(message.timeout, "timeout", 1.0, MAX_TASK_SECONDS)
    task = AgentTask(
        need(message, checks),
        checks.entries(message.required_labels, "required_labels", MAX_LABEL_CHARACTERS),
        frozenset(excluded),
        checks.optional_agent_id(message.from_agent_id, "from_agent_id"),
    )
    checks.done()
    return task, timeout


def register_request(message: agents_pb2.RegisterAgentRequest, ttl: float) -> tuple[AgentSpec, float]:
    """The agent and the seconds of its lease. Raises INVALID_REQUEST."""
    checks = Checks()
    if not message.HasField("agent"):
        raise invalid([Violation("agent", "is required")])
    spec = agent_spec(message.agent, checks)
    if message.HasField("ttl"):
        ttl = checks.seconds(message.ttl, "ttl", 1.0, MAX_TTL)
    checks.done()
    return spec, ttl


def agent_id(given: str) -> AgentId:
    """The field `agent_id`. Raises INVALID_REQUEST."""
    checks = Checks()
    found = checks.agent_id(given, "agent_id")
    checks.done()
    return found


def report_request(
    message: agents_pb2.ReportAssignmentRequest,
) -> tuple[str, AssignmentOutcome, float | None, float]:
    """Id, outcome, seconds if they are told, score. Raises INVALID_REQUEST."""
    checks = Checks()
    if not message.assignment_id:
        checks.say("assignment_id", "is required")
    elif not _ASSIGNMENT_ID.fullmatch(message.assignment_id):
        checks.say("assignment_id", "is none that was given out")
    success = agents_pb2.ASSIGNMENT_OUTCOME_SUCCESS
    if message.outcome not in (success, agents_pb2.ASSIGNMENT_OUTCOME_FAILURE):
        checks.say("outcome", "must be SUCCESS or FAILURE")
    seconds = None
    if message.HasField("duration"):
        seconds = checks.seconds(message.duration, "duration", 0.0, MAX_TASK_SECONDS)
        if not seconds:
            checks.say("duration", "must be above 0")
    score = checks.share(message.score, "score") if message.HasField("score") else 1.0
    if message.HasField("score") and message.outcome != success:
        checks.say("score", "is of successes only")
    checks.done()
    return message.assignment_id, AssignmentOutcome(message.outcome), seconds, score


def interactions_request(message: agents_pb2.ListInteractionsRequest) -> tuple[AgentId | None, int]:
    """Of which agent, and how many. Raises INVALID_REQUEST."""
    checks = Checks()
    found = checks.optional_agent_id(message.agent_id, "agent_id"), checks.limit(message.limit, _INTERACTIONS)
    checks.done()
    return found


# ------------------------------------------------------------------ render ---


def spec_message(spec: AgentSpec) -> agents_pb2.AgentSpec:
    return agents_pb2.AgentSpec(
        id=spec.id,
        description=spec.description,
        skills=[agents_pb2.AgentSkill(name=skill.name, level=skill.level) for skill in spec.skills],
        task_types=sorted(spec.task_types),  # type: ignore[arg-type]
        max_concurrency=spec.max_concurrency,
        labels=spec.labels,
        endpoint=spec.endpoint,
        metadata=spec.metadata,
    )


def status(agent: Agent, running: int, learned: Mapping[int, Tally], now: float, wall: float) -> agents_pb2.AgentStatus:
    """`learned`: by kind of task."""
    live = agent.alive(now)
    return agents_pb2.AgentStatus(
        agent=spec_message(agent.spec),
        state=agents_pb2.AGENT_STATE_LIVE if live else agents_pb2.AGENT_STATE_LOST,
        running=running,
        lease_until=convert.timestamp(wall + agent.lease_until - now),
        registered_at=convert.timestamp(wall + agent.since - now),
        experience=[_experience(kind, tally) for kind, tally in learned.items()],
    )


def _experience(kind: int, tally: Tally) -> agents_pb2.AgentExperience:
    message = agents_pb2.AgentExperience(task_type=kind, tasks=tally.tasks, successes=tally.successes)  # type: ignore[arg-type]
    if tally.timed > 0.0:
        convert.set_duration(message.typical_duration, math.exp(tally.log_seconds / tally.timed))
    return message


def _terms(terms: Sequence[Term]) -> list[agents_pb2.ScoreTerm]:
    return [
        agents_pb2.ScoreTerm(
            name=term.name, value=term.value, weight=term.weight, contribution=contribution, detail=term.detail
        )
        for term, contribution in zip(terms, contributions(terms), strict=True)
    ]


def _rejections(rejections: Iterable[CandidateRejection]) -> list[agents_pb2.CandidateRejection]:
    return [
        agents_pb2.CandidateRejection(reason=one.reason.value, detail=one.detail)  # type: ignore[arg-type]
        for one in rejections
    ]


def match(found: Match, kind: agents_pb2.CandidateKind, available: bool) -> agents_pb2.CapabilityMatch:
    return agents_pb2.CapabilityMatch(
        kind=kind,
        id=found.id,
        score=found.score,
        terms=_terms(found.terms),
        rejections=_rejections(found.rejections),
        available=available,
    )


def decision(
    made: RoutingDecision, similarity: agents_pb2.Similarity, similarity_detail: str
) -> agents_pb2.RoutingDecision:
    return agents_pb2.RoutingDecision(
        agent_id=made.agent_id or "",
        summary=made.summary,
        candidates=[_candidate(one) for one in made.candidates[:MAX_CANDIDATES]],
        similarity=similarity,
        similarity_detail=similarity_detail,
    )


def _candidate(one: AgentCandidate) -> agents_pb2.AgentCandidate:
    return agents_pb2.AgentCandidate(
        agent_id=one.id,
        score=one.score,
        terms=_terms(one.terms),
        capability_terms=_terms(one.capability.terms),
        rejections=_rejections(one.rejections),
    )


def assignment(made: Assignment, now: float, wall: float) -> agents_pb2.Assignment:
    return agents_pb2.Assignment(
        id=made.id, agent=spec_message(made.agent), deadline=convert.timestamp(wall + made.deadline - now)
    )


def interaction(one: Interaction, now: float, wall: float) -> agents_pb2.Interaction:
    message = agents_pb2.Interaction(
        from_agent_id=one.from_agent,
        to_agent_id=one.to_agent,
        assigned=one.assigned,
        succeeded=one.succeeded,
        failed=one.failed,
        last_at=convert.timestamp(wall + one.last_at - now),
    )
    if one.mean_seconds is not None:
        convert.set_duration(message.mean_duration, one.mean_seconds)
    return message
