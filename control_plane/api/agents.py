"""The Agents service: parse -> call -> render."""

from __future__ import annotations

import uuid
from collections import OrderedDict
from collections.abc import Sequence

import grpc

from control_plane.api import agent_convert as convert
from control_plane.api.convert import duration
from control_plane.api.metrics import Metrics
from control_plane.api.orchestrator import served
from control_plane.api.similarity import Embedder
from control_plane.api.tenant import tenant_of
from control_plane.config import AgentSettings
from control_plane.domain.agent import Need, Skill
from control_plane.domain.errors import DomainError, agents_warming_up, draining
from control_plane.domain.model import ModelCard
from control_plane.domain.ports import Clock
from control_plane.domain.task import Feature, TaskType
from control_plane.fleet.registry import Fleet, placements
from control_plane.routing.matcher import Candidate, Vectors
from control_plane.routing.policy import MatchPolicy, RoutePolicy
from control_plane.routing.router import Agent, TaskRouter
from modelyard.rpc.server import InFlight
from modelyard.v1 import agents_pb2

_MODEL, _AGENT = agents_pb2.CANDIDATE_KIND_MODEL, agents_pb2.CANDIDATE_KIND_AGENT

_FEATURES = tuple(feature for feature in Feature if feature not in (Feature.NONE, Feature.STREAMING))
_MOST_MODELS = 4096
"""Whose descriptions are kept in memory."""


def route_policy(settings: AgentSettings) -> RoutePolicy:
    """What the settings say."""
    return RoutePolicy(
        match=MatchPolicy(**settings.match.model_dump()),
        **settings.weights.model_dump(),
        shrinkage=settings.shrinkage,
        half_life=settings.half_life,
        forget_after=settings.forget_after,
        max_agents=settings.max_agents,
    )


class AgentsServicer:
    """All methods of the service. Once `stop_accepting` was called, all but reports are refused with DRAINING."""

    def __init__(
        self,
        router: TaskRouter,
        embedder: Embedder,
        fleet: Fleet,
        settings: AgentSettings,
        clock: Clock,
        metrics: Metrics,
        in_flight: InFlight,
    ) -> None:
        self.metrics = metrics
        self._router = router
        self._embedder = embedder
        self._fleet = fleet
        self._settings = settings
        self._clock = clock
        self._in_flight = in_flight
        self._warm_at = clock.monotonic() + settings.warm_up
        self._models: OrderedDict[str, Candidate] = OrderedDict()
        self._stopping = False

    def stop_accepting(self) -> None:
        """Refuse new work from now on."""
        self._stopping = True

    def tick(self) -> None:
        """Let time pass: assignments expire, agents that are long gone are forgotten."""
        for ended in self._router.tick(self._clock.monotonic()):
            self.metrics.assignment(ended.outcome)

    def _admit(self) -> InFlight:
        if self._stopping:
            raise draining()
        self.tick()
        return self._in_flight

    def _status(self, tenant: str, agent: Agent) -> agents_pb2.AgentStatus:
        now, router = self._clock.monotonic(), self._router
        learned = router.experience.of((tenant, agent.id), now)
        return convert.status(agent, router.running(tenant, agent.id), learned, now, self._clock.wall())

    # -------------------------------------------------------------- agents ---

    @served
    async def RegisterAgent(
        self, request: agents_pb2.RegisterAgentRequest, context: grpc.aio.ServicerContext
    ) -> agents_pb2.RegisterAgentResponse:
        self._admit()
        tenant = tenant_of(context)
        spec, ttl = convert.register_request(request, self._settings.ttl)
        agent = self._router.register(tenant, spec, ttl, self._clock.monotonic())
        return agents_pb2.RegisterAgentResponse(
            agent=self._status(tenant, agent), ttl=duration(ttl), registration=agent.registration
        )

    @served
    async def Heartbeat(
        self, request: agents_pb2.HeartbeatRequest, context: grpc.aio.ServicerContext
    ) -> agents_pb2.HeartbeatResponse:
        self._admit()
        id = convert.agent_id(request.agent_id)
        agent = self._router.renew(tenant_of(context), id, self._clock.monotonic(), request.registration)
        return agents_pb2.HeartbeatResponse(ttl=duration(agent.ttl))

    @served
    async def UnregisterAgent(
        self, request: agents_pb2.UnregisterAgentRequest, context: grpc.aio.ServicerContext
    ) -> agents_pb2.UnregisterAgentResponse:
        self._admit()
        self._router.unregister(tenant_of(context), convert.agent_id(request.agent_id), request.registration)
        return agents_pb2.UnregisterAgentResponse()

    @served
    async def ListAgents(
        self, request: agents_pb2.ListAgentsRequest, context: grpc.aio.ServicerContext
    ) -> agents_pb2.ListAgentsResponse:
        self._admit()
        tenant = tenant_of(context)
        return agents_pb2.ListAgentsResponse(
            agents=[self._status(tenant, agent) for agent in self._router.agents(tenant)]
        )

    # ------------------------------------------------------------ matching ---

    @served
    async def MatchCapabilities(
        self, request: agents_pb2.MatchCapabilitiesRequest, context: grpc.aio.ServicerContext
    ) -> agents_pb2.MatchCapabilitiesResponse:
        with self._admit():
            tenant = tenant_of(context)
            need, limit = convert.match_request(request)
            agents = [] if request.kind == _MODEL else self._router.agents(tenant)
            models = [] if request.kind == _AGENT else self._model_candidates()
            candidates = [*(agent.candidate for agent in agents), *(model for model, _ in models)]
            vectors, similarity, detail = await self._vectors(tenant, need, candidates)
            matches = self._router.matcher.match(need, candidates, vectors)
            now = self._clock.monotonic()
            free = [
                agent.alive(now) and self._router.running(tenant, agent.id) < agent.spec.max_concurrency
                for agent in agents
            ]
            kinds = [_AGENT] * len(agents) + [_MODEL] * len(models)
            rows = list(zip(matches, kinds, [*free, *(there for _, there in models)], strict=True))
            if not request.include_rejected:
                rows = [row for row in rows if not row[0].rejections]
            rows.sort(key=lambda row: (bool(row[0].rejections), -row[0].score, row[1], row[0].id))
            return agents_pb2.MatchCapabilitiesResponse(
                matches=[convert.match(*row) for row in rows[:limit]],
                similarity=similarity,
                similarity_detail=detail,
            )

    async def _vectors(
        self, tenant: str, need: Need, candidates: Sequence[Candidate]
    ) -> tuple[Vectors | None, agents_pb2.Similarity, str]:
        """Embeddings for the comparison, how texts are compared, and a word about that."""
        texts = self._router.matcher.texts(need, candidates) if candidates else set()
        if not texts:
            compares = bool(candidates and (need.description or need.skills))
            return None, agents_pb2.SIMILARITY_LEXICAL if compares else agents_pb2.SIMILARITY_UNSPECIFIED, ""
        vectors, detail = await self._embedder.vectors(tenant, texts)
        similarity = agents_pb2.SIMILARITY_LEXICAL if vectors is None else agents_pb2.SIMILARITY_EMBEDDING
        self.metrics.compared("lexical" if vectors is None else "embedding")
        return vectors, similarity, detail

    def _model_candidates(self) -> list[tuple[Candidate, bool]]:
        """Every model of the fleet, and whether a live server offers it."""
        found = []
        for name, placed in sorted(placements(self._fleet.servers()).items()):
            there = any(server.ready and card.state.serves for server, card in placed)
            found.append((self._model_candidate(name, [card for _, card in placed]), there))
        return found

    def _model_candidate(self, name: str, cards: Sequence[ModelCard]) -> Candidate:
        """What cards and definitions say of a model."""
        best: dict[TaskType, float] = {}
        features = Feature.NONE
        for card in cards:
            features |= card.features
            for kind, score in card.capabilities.items():
                best[kind] = max(score, best.get(kind, 0.0))
        skills = {_words(kind.name): score for kind, score in sorted(best.items(), key=lambda one: (-one[1], one[0]))}
        able = [_words(feature.name or "") for feature in _FEATURES if feature in features]
        providers = ", ".join(sorted({card.provider for card in cards}))
        good = ", ".join(f"{kind} {score:.2f}" for kind, score in skills.items())
        text = f"model {name} of {providers}: {good}; {', '.join(able)}"
        known = self._models.get(text)
        if known is None:
            told = (*(Skill(k, s) for k, s in skills.items()), *(Skill(one) for one in able if one not in skills))
            known = self._models[text] = Candidate(name, text, told, best)
        self._models.move_to_end(text)
        if len(self._models) > _MOST_MODELS:
            self._models.popitem(last=False)
        return known

    # ------------------------------------------------------------- routing ---

    @served
    async def RouteTask(
        self, request: agents_pb2.RouteTaskRequest, context: grpc.aio.ServicerContext
    ) -> agents_pb2.RouteTaskResponse:
        with self._admit():
            tenant, router = tenant_of(context), self._router
            task, timeout = convert.route_request(request, self._settings.assignment_timeout)
            candidates = [agent.candidate for agent in router.agents(tenant)]
            vectors, similarity, detail = await self._vectors(tenant, task.need, candidates)
            self.tick()
            # From here on nothing is awaited: what is decided is what is there.
            now = self._clock.monotonic()
            decision = router.decide(tenant, task, now, vectors)
            response = agents_pb2.RouteTaskResponse(decision=convert.decision(decision, similarity, detail))
            if request.dry_run:
                return response
            if decision.agent_id is None:
                refusal = router.refusal(tenant, task, decision, now)
                raise agents_warming_up(self._warm_at - now) if _final(refusal) and now < self._warm_at else refusal
            made = router.reserve(tenant, decision.agent_id, task, uuid.uuid4().hex, timeout, now)
            response.assignment.CopyFrom(convert.assignment(made, now, self._clock.wall()))
            return response

    @served
    async def ReportAssignment(
        self, request: agents_pb2.ReportAssignmentRequest, context: grpc.aio.ServicerContext
    ) -> agents_pb2.ReportAssignmentResponse:
        self.tick()
        id, outcome, seconds, score = convert.report_request(request)
        ended = self._router.report(tenant_of(context), id, outcome, self._clock.monotonic(), seconds, score)
        if not ended.again:
            self.metrics.assignment(ended.outcome)
        return agents_pb2.ReportAssignmentResponse(
            outcome=ended.outcome.value,  # type: ignore[arg-type]
            agent_id=ended.agent_id,
        )

    @served
    async def ListInteractions(
        self, request: agents_pb2.ListInteractionsRequest, context: grpc.aio.ServicerContext
    ) -> agents_pb2.ListInteractionsResponse:
        self._admit()
        agent_id, limit = convert.interactions_request(request)
        found = self._router.interactions(tenant_of(context), agent_id)
        now, wall = self._clock.monotonic(), self._clock.wall()
        return agents_pb2.ListInteractionsResponse(
            interactions=[convert.interaction(one, now, wall) for one in found[:limit]], truncated=len(found) > limit
        )


def _final(refusal: Exception) -> bool:
    return isinstance(refusal, DomainError) and refusal.retry_after is None


def _words(name: str) -> str:
    return name.replace("_", " ").lower()
