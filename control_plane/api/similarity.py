"""Embeddings of descriptions from a model of the fleet, for who compares them. Without them, words do."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import OrderedDict
from collections.abc import Awaitable, Collection
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from control_plane.api.tenant import TENANT_KEY
from control_plane.config import AgentEmbeddingSettings
from control_plane.domain.errors import DomainError
from control_plane.domain.ports import Clock
from control_plane.domain.server import LeaseState
from control_plane.domain.task import Feature, TaskType
from control_plane.fleet.registry import Fleet
from control_plane.routing.matcher import Vectors
from modelyard.program import privacy
from modelyard.rpc.errors import Refusal
from modelyard.rpc.reasons import Reason
from modelyard.v1.orchestrator_pb2 import EmbedRequest, EmbedResponse

log = logging.getLogger(__name__)

_PAUSE = 10.0
"""Seconds for which a model that failed or hung is not asked again."""

_AT_ONCE = 64
"""Texts of one request: what has come stays when a later one takes too long."""

_MOST_CHARACTERS = 2000
"""Of a text that are embedded."""

_OWN_FAULTS = frozenset(
    {Reason.BUDGET_EXHAUSTED, Reason.CONTEXT_TOO_LONG, Reason.CONTENT_REFUSED, Reason.INVALID_REQUEST}
)
"""That say nothing about the model for others."""


class _OnBehalf:
    """What a tenant's call of Embed would bring along."""

    def __init__(self, tenant: str) -> None:
        self._tenant = tenant

    def time_remaining(self) -> float | None:
        return None

    def invocation_metadata(self) -> list[tuple[str, str]]:
        return [(TENANT_KEY, self._tenant)]

    def set_trailing_metadata(self, trailing_metadata: Any, /) -> None:
        pass

    async def write(self, message: bytes, /) -> None:
        raise NotImplementedError("Embed writes no stream")


class Embed(Protocol):
    """Generation.embed."""

    def __call__(self, source: EmbedRequest, context: Any) -> Awaitable[EmbedResponse]: ...


class Embedder:
    """Vectors of texts, all of one model, kept for the next time.

    They are asked for like any other request of the tenant: they wait, count against its budget and show in its usage.
    What was embedded for one tenant is not used for another, who could tell by the time it takes what others wrote.
    """

    def __init__(self, embed: Embed, fleet: Fleet, clock: Clock, settings: AgentEmbeddingSettings) -> None:
        self._embed = embed
        self._fleet = fleet
        self._clock = clock
        self._settings = settings
        self._kept: OrderedDict[tuple[str, str, str], NDArray[np.float32]] = OrderedDict()
        self._paused: dict[str, float] = {}

    async def vectors(self, tenant: str, texts: Collection[str]) -> tuple[Vectors | None, str]:
        """The embeddings of the texts and the model, or None and why there are none. Never raises, but when it is
        cancelled."""
        if not self._settings.enabled:
            return None, "agents.embedding.enabled is off"
        model = self._model()
        if not model:
            return None, f"model {self._settings.model!r} embeds nothing" if self._settings.model else "no model embeds"
        found = {text: vector for text in texts if (vector := self._known((tenant, model, text))) is not None}
        missing = sorted(set(texts) - found.keys())
        if not missing:
            return found, model
        if self._paused.get(model, 0.0) > self._clock.monotonic():
            return None, f"{model} has just failed to embed"
        try:
            async with asyncio.timeout(self._settings.timeout):
                for start in range(0, len(missing), _AT_ONCE):
                    some = missing[start : start + _AT_ONCE]
                    for text, vector in zip(some, await self._ask(tenant, model, some), strict=True):
                        found[text] = vector
                        self._keep((tenant, model, text), vector)
        except TimeoutError:
            self._pause(model)
            return None, f"{model} took longer than {self._settings.timeout:g} s to embed"
        except (DomainError, Refusal) as error:
            if error.reason not in _OWN_FAULTS:
                self._pause(model)
            return None, f"{model} does not embed: {Reason(error.reason)}"
        except Exception as error:
            self._pause(model)
            log.warning("%s does not embed: %s", model, privacy.kind(error))
            return None, f"{model} does not embed: {Reason.INTERNAL}"
        return found, model

    async def _ask(self, tenant: str, model: str, texts: list[str]) -> list[NDArray[np.float32]]:
        request = EmbedRequest(
            inputs=[text[:_MOST_CHARACTERS] for text in texts], request_id=f"agents-{secrets.token_hex(8)}"
        )
        request.requirements.model = model
        response = await self._embed(request, _OnBehalf(tenant))
        return [np.array(embedding.values, np.float32) for embedding in response.embeddings]

    def _model(self) -> str:
        """ "provider/name" of a model that a live server embeds with: the one that is set, or the cheapest, of those
        the best, of those the first by name. Empty: there is none."""
        wanted = self._settings.model
        pinned = self._fleet.resolve(wanted) if wanted else None
        if wanted and pinned is None:
            return ""
        offered = [
            (card.price.prompt, -score, card.id)
            for server in self._fleet.servers()
            if server.state is LeaseState.LIVE
            for card in server.cards
            if Feature.EMBEDDING in card.features and (score := card.capabilities.get(TaskType.EMBEDDING))
            if pinned is None or (card.name == pinned[0] and pinned[1] in (None, card.provider))
        ]
        return min(offered)[2] if offered else ""

    def _pause(self, model: str) -> None:
        now = self._clock.monotonic()
        self._paused = {one: until for one, until in self._paused.items() if until > now}
        self._paused[model] = now + _PAUSE

    def _known(self, key: tuple[str, str, str]) -> NDArray[np.float32] | None:
        vector = self._kept.get(key)
        if vector is not None:
            self._kept.move_to_end(key)
        return vector

    def _keep(self, key: tuple[str, str, str], vector: NDArray[np.float32]) -> None:
        self._kept[key] = vector
        while len(self._kept) > self._settings.cache:
            self._kept.popitem(last=False)
