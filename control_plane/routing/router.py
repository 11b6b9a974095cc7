"""Agents of all tenants, and which of them is to do a task: the stateful object of this room."""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from control_plane.domain.agent import (
    AgentCandidate,
    AgentId,
    AgentSpec,
    AgentTask,
    AssignmentOutcome,
    CandidateRejection,
    CandidateRejectionReason,
    LearnedOfAgent,
    Match,
    RoutingDecision,
    Tally,
    Term,
    score,
)
from control_plane.domain.errors import (
    agent_superseded,
    agents_busy,
    no_capable_agent,
    too_many_agents,
    unknown_agent,
    unknown_assignment,
)
from control_plane.routing.experience import Experience, Pace, in_kind, paces, reliability, together
from control_plane.routing.interactions import Interaction, Interactions
from control_plane.routing.matcher import Candidate, CapabilityMatcher, Vectors, candidate_of
from control_plane.routing.policy import RoutePolicy

_SOONEST, _UNKNOWN = 0.1, 1.0
"""Seconds after which asking again may help, at least, and where nobody's duration is known."""

_LOOK_INTERVAL = 1.0
"""Seconds between two looks for agents that are gone for long."""

_NAMED = 3
"""Agents that a sentence names."""


@dataclass(eq=False, slots=True)
class Agent:
    """An agent that is registered."""

    spec: AgentSpec
    candidate: Candidate
    ttl: float
    """Seconds."""
    lease_until: float
    """Monotonic seconds."""
    since: float
    """Monotonic seconds of its first registration."""
    registration: int = 0
    """Number of the latest."""

    @property
    def id(self) -> AgentId:
        return self.spec.id

    def alive(self, now: float) -> bool:
        """Whether its lease holds."""
        return now < self.lease_until


@dataclass(frozen=True, slots=True)
class Assignment:
    """A task that an agent has."""

    id: str
    tenant: str
    agent: AgentSpec
    kind: int
    """Number of the kind of task, 0: none was named."""
    from_agent: AgentId | None
    began: float
    """Monotonic seconds."""
    deadline: float
    """Monotonic seconds; not reported by then, it counts as failed."""


@dataclass(frozen=True, slots=True)
class Ended:
    """How an assignment ended."""

    tenant: str
    agent_id: AgentId
    outcome: AssignmentOutcome
    again: bool = False
    """That was known before."""


@dataclass(frozen=True, slots=True)
class _Record:
    """What is known of an agent at the moment of a decision."""

    here: Tally
    """In tasks of this kind."""
    total: Tally
    reliable: float
    mean: float
    pace: Pace


class TaskRouter:
    """Registers agents, routes tasks among them, learns from how that goes.

    Memory is bounded by the policy. Every method takes the time in monotonic seconds; leases and deadlines that have
    passed by then hold no more, whether or not `tick` was called.
    """

    def __init__(self, policy: RoutePolicy) -> None:
        self.matcher = CapabilityMatcher(policy.match)
        self.experience = Experience(policy.half_life, policy.most_learned)
        self._policy = policy
        self._agents: dict[str, dict[AgentId, Agent]] = {}
        self._open: dict[str, Assignment] = {}
        self._running: dict[tuple[str, AgentId], dict[str, Assignment]] = {}
        self._deadlines: list[tuple[float, str]] = []
        self._ended: OrderedDict[str, Ended] = OrderedDict()
        self._look_at = -math.inf
        self._registrations = 0
        self._interactions = Interactions(policy.most_interactions)

    # -------------------------------------------------------------- agents ---

    def register(self, tenant: str, spec: AgentSpec, ttl: float, now: float) -> Agent:
        """Make an agent known, or put it in place of what it was. Raises TOO_MANY_AGENTS."""
        agents = self._agents.setdefault(tenant, {})
        known = agents.get(spec.id)
        if known is None:
            most = self._policy.max_agents
            if len(agents) >= most or self.registered() >= self._policy.most_agents:
                self._drop_empty(tenant)
                raise too_many_agents(most)
            known = agents[spec.id] = Agent(spec, candidate_of(spec), ttl, 0.0, now)
        elif known.spec != spec:
            known.spec, known.candidate = spec, candidate_of(spec)
        known.ttl, known.lease_until = ttl, now + ttl
        self._registrations += 1
        known.registration = self._registrations
        return known

    def renew(self, tenant: str, agent_id: AgentId, now: float, registration: int = 0) -> Agent:
        """Begin an agent's lease anew. Raises UNKNOWN_AGENT, and SUPERSEDED if another `registration` holds."""
        agent = self._known(tenant, agent_id, registration)
        agent.lease_until = now + agent.ttl
        return agent

    def unregister(self, tenant: str, agent_id: AgentId, registration: int = 0) -> None:
        """Take an agent off the list. Raises UNKNOWN_AGENT, and SUPERSEDED if another `registration` holds."""
        self._known(tenant, agent_id, registration)
        del self._agents[tenant][agent_id]
        self._drop_empty(tenant)

    def agents(self, tenant: str) -> list[Agent]:
        """Of a tenant, by id."""
        return sorted(self._agents.get(tenant, {}).values(), key=lambda agent: agent.id)

    def registered(self) -> int:
        """Agents of all tenants."""
        return sum(map(len, self._agents.values()))

    def running(self, tenant: str, agent_id: AgentId) -> int:
        """Assignments of an agent that are not reported."""
        return len(self._running.get((tenant, agent_id), ()))

    def _known(self, tenant: str, agent_id: AgentId, registration: int = 0) -> Agent:
        agent = self._agents.get(tenant, {}).get(agent_id)
        if agent is None:
            raise unknown_agent(agent_id)
        if registration not in (0, agent.registration):
            raise agent_superseded(agent_id)
        return agent

    def _drop_empty(self, tenant: str) -> None:
        if not self._agents.get(tenant, True):
            del self._agents[tenant]

    # ------------------------------------------------------------- routing ---

    def decide(self, tenant: str, task: AgentTask, now: float, vectors: Vectors | None = None) -> RoutingDecision:
        """Who would be chosen, and why. `vectors`: see CapabilityMatcher.match."""
        agents = self.agents(tenant)
        policy, kind = self._policy, int(task.need.task_type or 0)
        matches = self.matcher.match(task.need, [agent.candidate for agent in agents], vectors)
        learned = {agent.id: self.experience.of((tenant, agent.id), now) for agent in agents}
        totals = {id: together(list(kinds.values())) for id, kinds in learned.items()}
        here = {id: kinds.get(kind, Tally()) for id, kinds in learned.items()}
        reliable, mean = reliability(totals, policy.shrinkage)
        pace = paces(here, policy.shrinkage)
        records = {id: _Record(here[id], totals[id], reliable[id], mean, pace[id]) for id in learned}
        candidates = [
            self._candidate(tenant, task, agent, match, records[agent.id], now)
            for agent, match in zip(agents, matches, strict=True)
        ]
        eligible = sorted((one for one in candidates if not one.rejections), key=lambda one: (-one.score, one.id))
        rejected = [one for one in candidates if one.rejections]
        return RoutingDecision(
            eligible[0].id if eligible else None, _summary(eligible, rejected), (*eligible, *rejected)
        )

    def _candidate(
        self, tenant: str, task: AgentTask, agent: Agent, match: Match, record: _Record, now: float
    ) -> AgentCandidate:
        policy, spec = self._policy, agent.spec
        here, total, pace = record.here, record.total, record.pace
        rejections = list(match.rejections)

        def reject(reason: CandidateRejectionReason, detail: str) -> None:
            rejections.append(CandidateRejection(reason, detail))

        for name, value in sorted(task.labels.items()):
            if spec.labels.get(name) != value:
                reject(CandidateRejectionReason.LABEL, f"label {name} is not {value!r}")
        if agent.id in task.excluded:
            reject(CandidateRejectionReason.EXCLUDED, "the request excludes it")
        alive = agent.alive(now)
        if not alive:
            reject(CandidateRejectionReason.LOST, f"its lease ran out {now - agent.lease_until:.3g} s ago")
        running, places = self.running(tenant, agent.id), spec.max_concurrency
        free = max(0, places - running)
        if not free:
            reject(CandidateRejectionReason.BUSY, f"all its {places} places are taken")
        expected = "" if pace.seconds is None else f"{pace.seconds:.3g} s expected"
        terms = (
            Term("capability", match.score, policy.capability),
            Term(
                "experience",
                in_kind(here, policy.shrinkage),
                policy.experience,
                f"{here.successes:.3g} of {here.tasks:.3g} tasks of this kind",
            ),
            Term(
                "availability",
                free / places if alive else 0.0,
                policy.availability,
                f"{free} of {places} places free",
            ),
            Term(
                "success",
                record.reliable,
                policy.success,
                f"{total.successes:.3g} of {total.tasks:.3g} tasks, mean of all {record.mean:.2f}",
            ),
            Term("speed", pace.value, policy.speed, expected),
        )
        return AgentCandidate(agent.id, score(terms), terms, match, tuple(rejections))

    def refusal(self, tenant: str, task: AgentTask, decision: RoutingDecision, now: float) -> Exception:
        """Why nobody was chosen: AGENTS_BUSY if waiting can help, with the time in which a place may be free, else
        NO_CAPABLE_AGENT."""
        hopeful = [one.id for one in decision.candidates if not any(f.reason.permanent for f in one.rejections)]
        if not hopeful:
            return no_capable_agent(decision.summary)
        return agents_busy(decision.summary, self._wait(tenant, hopeful, int(task.need.task_type or 0), now))

    def _wait(self, tenant: str, agents: Iterable[AgentId], kind: int, now: float) -> float:
        """Seconds in which one of these is expected to have a place."""
        ids = [agent.id for agent in self.agents(tenant)]
        soonest = math.inf
        expected: dict[int, dict[AgentId, Pace]] = {}
        for id in agents:
            for open in self._running.get((tenant, id), {}).values():
                if open.kind not in expected:
                    tallies = {one: self.experience.of((tenant, one), now).get(open.kind, Tally()) for one in ids}
                    expected[open.kind] = paces(tallies, self._policy.shrinkage)
                seconds = expected[open.kind][id].seconds if id in expected[open.kind] else None
                left = _UNKNOWN if seconds is None else max(_SOONEST, open.began + seconds - now)
                soonest = min(soonest, left, max(_SOONEST, open.deadline - now))
        return soonest if soonest < math.inf else _UNKNOWN

    def reserve(
        self, tenant: str, agent_id: AgentId, task: AgentTask, assignment_id: str, timeout: float, now: float
    ) -> Assignment:
        """Take a place of an agent that `decide` has just chosen. Raises UNKNOWN_AGENT, AGENTS_BUSY."""
        agent = self._known(tenant, agent_id)
        running = self._running.get((tenant, agent_id), {})
        if len(running) >= agent.spec.max_concurrency or len(self._open) >= self._policy.most_open:
            raise agents_busy("no assignment more can be open", _UNKNOWN)
        kind = int(task.need.task_type or 0)
        assignment = Assignment(assignment_id, tenant, agent.spec, kind, task.from_agent, now, now + timeout)
        self._open[assignment_id] = assignment
        self._running.setdefault((tenant, agent_id), {})[assignment_id] = assignment
        heapq.heappush(self._deadlines, (assignment.deadline, assignment_id))
        if task.from_agent is not None:
            self._interactions.assigned(tenant, task.from_agent, agent_id, now)
        return assignment

    # ------------------------------------------------------------ outcomes ---

    def report(
        self,
        tenant: str,
        assignment_id: str,
        outcome: AssignmentOutcome,
        now: float,
        duration: float | None = None,
        score: float = 1.0,
    ) -> Ended:
        """End an assignment, after so many seconds if that is said, else those since it was routed. What was known
        before stands. Raises UNKNOWN_ASSIGNMENT."""
        self.tick(now)
        known = self._ended.get(assignment_id)
        if known is not None and known.tenant == tenant:
            return Ended(tenant, known.agent_id, known.outcome, again=True)
        assignment = self._open.get(assignment_id)
        if assignment is None or assignment.tenant != tenant:
            raise unknown_assignment(assignment_id)
        seconds = now - assignment.began if duration is None else duration
        return self._end(assignment, outcome, score, seconds, now)

    def tick(self, now: float) -> list[Ended]:
        """End assignments whose deadline has passed, forget agents that are gone for long; what has expired."""
        expired = []
        while self._deadlines and self._deadlines[0][0] <= now:
            _, id = heapq.heappop(self._deadlines)
            assignment = self._open.get(id)
            if assignment is not None:
                taken = assignment.deadline - assignment.began
                expired.append(self._end(assignment, AssignmentOutcome.EXPIRED, 0.0, taken, now))
        if now < self._look_at:
            return expired
        self._look_at = now + _LOOK_INTERVAL
        for tenant, agents in list(self._agents.items()):
            for agent in [one for one in agents.values() if one.lease_until + self._policy.forget_after <= now]:
                del agents[agent.id]
            self._drop_empty(tenant)
        return expired

    def _end(
        self, assignment: Assignment, outcome: AssignmentOutcome, score: float, seconds: float, now: float
    ) -> Ended:
        who = (assignment.tenant, assignment.agent.id)
        del self._open[assignment.id]
        running = self._running[who]
        del running[assignment.id]
        if not running:
            del self._running[who]
        if len(self._deadlines) > 2 * len(self._open) + 64:  # mostly of those that were reported in time
            self._deadlines = [(one.deadline, one.id) for one in self._open.values()]
            heapq.heapify(self._deadlines)
        success = outcome is AssignmentOutcome.SUCCESS
        self.experience.add(who, assignment.kind, score if success else 0.0, seconds if success else None, now)
        if assignment.from_agent is not None:
            self._interactions.ended(assignment.tenant, assignment.from_agent, assignment.agent.id, success, seconds)
        ended = Ended(assignment.tenant, assignment.agent.id, outcome)
        self._ended[assignment.id] = ended
        if len(self._ended) > self._policy.most_ended:
            self._ended.popitem(last=False)
        return ended

    def open(self) -> int:
        """Assignments that are not reported."""
        return len(self._open)

    def interactions(self, tenant: str, agent_id: AgentId | None = None) -> list[Interaction]:
        """Who handed tasks to whom; those with most assignments first."""
        return self._interactions.of(tenant, agent_id)

    def remember(self, learned: Iterable[LearnedOfAgent], now: float, wall: float) -> None:
        """Take over what an earlier process learned, the oldest first."""
        self.experience.remember(learned, now, wall)
        self.experience.forget_faded(now)


def _summary(eligible: list[AgentCandidate], rejected: list[AgentCandidate]) -> str:
    if eligible:
        best = eligible[0]
        parts = ", ".join(f"{term.name} {term.value:.2f}" for term in best.terms)
        others = ", ".join(f"{one.id} {one.score:.2f}" for one in eligible[1:_NAMED])
        return f"{best.id} scores {best.score:.2f}: {parts}" + (f"; next {others}" if others else "")
    if not rejected:
        return "no agent is registered"
    # Those that could be had soon first, then the nearest misses.
    nearest = sorted(rejected, key=lambda one: (sum(found.reason.permanent for found in one.rejections), one.id))
    said = "; ".join(f"{one.id}: {', '.join(f.detail for f in one.rejections)}" for one in nearest[:_NAMED])
    more = len(rejected) - _NAMED
    return f"no agent can have it now: {said}" + (f"; and {more} more" if more > 0 else "")
