"""An engine in front of a hosted API: everything but the API itself."""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Awaitable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import TypeVar

from model_servers.engine import (
    ContextTooLong,
    CredentialsRejected,
    Delta,
    Embeddings,
    EngineError,
    EngineFailed,
    EngineLoad,
    EngineModel,
    EngineStatus,
    Feature,
    Finished,
    GenerationRequest,
    Health,
    Pool,
    UnknownModel,
    Unsupported,
)
from model_servers.engines._hosted.answer import Answer, Counted, Event
from model_servers.engines._hosted.conversation import Plan, estimated_prompt_tokens, make_plan, most_prompt_tokens
from model_servers.engines._hosted.settings import HostedModel, HostedSettings
from model_servers.engines._hosted.slots import Slots

_log = logging.getLogger(__name__)

_CHECK_SECONDS = 15.0
"""Longest that a look at the provider may take."""
_LEAST_ROOM = 4096
"""Tokens that an answer without a limit is given however long the prompt may be."""
TOO_LONG = ("too long", "too many input tokens", "exceed context limit", "context length", "context window")
"""What vendors say, in lower case, of a prompt that does not fit; they have no code for it."""

T = TypeVar("T")


def retry_seconds(header: str | None) -> float:
    """Of a Retry-After header in seconds; the other form, a date, is not in use here."""
    try:
        return min(max(float(header or 1.0), 0.0), 3600.0)
    except ValueError:
        return 1.0


@dataclass(frozen=True, slots=True)
class Known:
    """A model as it is offered: what the settings say, and for the rest what was learned."""

    settings: HostedModel
    described: EngineModel
    max_output: int | None = None
    structured: bool = False
    forced: bool = True
    sampling: bool = True
    thinking_can_be_off: bool | None = None
    """None: not known."""


class HostedEngine(ABC):
    """Implements `model_servers.engine.Engine` on top of what a vendor's module adds.

    Health: a look at the provider that costs nothing, at the start and after each failure. A key that is
    refused there and a provider that cannot be reached make the engine unhealthy until a later look finds it
    well; a single failed answer, a rate limit and an overload do not.
    """

    name: str
    """Of the engine and of the models' provider."""

    def __init__(self, settings: HostedSettings) -> None:
        self._settings = settings
        self._slots = Slots(settings.slots, settings.max_waiting)
        self._health = Health.STARTING
        self._detail = "not started"
        self._suspicion = asyncio.Event()
        self._watch: asyncio.Task[None] | None = None
        self._waits: set[asyncio.Timeout] = set()
        self._closed = False

    # ------------------------------------------------- what the vendor adds ---

    @property
    @abstractmethod
    def _version(self) -> str:
        """Of the vendor's library."""

    @abstractmethod
    async def _connect(self) -> None:
        """Make the client. Raises EngineFailed with a cure."""

    @abstractmethod
    async def _check(self) -> None:
        """Ask the provider something that costs nothing. Raises EngineError."""

    @abstractmethod
    async def _disconnect(self) -> None:
        """Close all connections. Also called when the client was never made."""

    @abstractmethod
    def _models(self) -> dict[str, Known]:
        """By fleet-wide name. Asked for often."""

    @abstractmethod
    def _events(
        self, known: Known, request: GenerationRequest, plan: Plan, max_tokens: int | None
    ) -> AsyncGenerator[Event, None]:
        """Ask and stream. Raises EngineError; leaving it closes the connection.

        `max_tokens`: most that the answer may have; None: neither the client nor the settings say."""

    @abstractmethod
    async def _count(self, known: Known, request: GenerationRequest, plan: Plan) -> int:
        """Prompt tokens as the provider counts them. Raises EngineError; Unsupported where it does not."""

    async def _embed(self, known: Known, inputs: Sequence[str]) -> Embeddings:
        raise Unsupported(f"{self.name} has no embeddings")

    def _pool(self) -> Pool | None:
        return None

    # ----------------------------------------------------------- lifecycle ---

    async def start(self) -> None:
        """See Engine.start. Comes up also when the provider is not well: see the class."""
        await self._connect()
        await self._look()
        if self._health is Health.UNHEALTHY:
            self._suspicion.set()
        self._watch = asyncio.create_task(self._keep_watch(), name=f"{self.name}-health")

    async def close(self) -> None:
        """See Engine.close."""
        self._closed = True
        self._health, self._detail = Health.UNHEALTHY, "closed"
        if self._watch is not None:
            self._watch.cancel()
        for wait in tuple(self._waits):
            try:
                wait.reschedule(0)
            except RuntimeError:
                pass  # over already
        await asyncio.sleep(0)  # they end before their connections do
        await self._disconnect()

    def status(self) -> EngineStatus:
        """See Engine.status."""
        return EngineStatus(
            engine=self.name,
            version=self._version,
            device="hosted",
            memory_bytes=0,
            models=tuple(known.described for known in self._models().values()),
            load=EngineLoad(slots=self._slots.size, running=self._slots.running, waiting=self._slots.waiting),
            health=self._health,
            health_detail=self._detail,
            pool=self._pool(),
        )

    async def _keep_watch(self) -> None:
        while True:
            await self._suspicion.wait()
            self._suspicion.clear()
            if self._health is Health.UNHEALTHY:
                await asyncio.sleep(self._settings.check_seconds)
            await self._look()
            if self._health is Health.UNHEALTHY:
                self._suspicion.set()
            else:
                await asyncio.sleep(self._settings.check_seconds)

    async def _look(self) -> None:
        trouble = ""
        try:
            async with asyncio.timeout(_CHECK_SECONDS):
                await self._check()
        except TimeoutError:
            trouble = f"{self.name} does not answer within {_CHECK_SECONDS:g} s; check the network"
        except EngineError as error:
            trouble = str(error)
        if self._closed:
            return
        if trouble and trouble != self._detail:
            _log.warning("%s is not well: %s", self.name, trouble)
        elif not trouble and self._health is Health.UNHEALTHY:
            _log.info("%s is well again", self.name)
        self._health, self._detail = (Health.UNHEALTHY if trouble else Health.READY), trouble

    def _suspect(self, error: EngineError) -> None:
        if isinstance(error, CredentialsRejected | EngineFailed):
            self._suspicion.set()

    # ---------------------------------------------------------------- work ---

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Delta | Finished, None]:
        """See Engine.generate."""
        known = self._known(request.model)
        plan = make_plan(request, structured=known.structured, forced=known.forced)
        answer = Answer(plan, request.sampling.stop, estimated_prompt_tokens(request))
        arrived = asyncio.get_running_loop().time()
        await self._within(None, self._slots.acquire())
        try:
            queued = asyncio.get_running_loop().time() - arrived
            max_tokens = await self._room(known, request, plan)
            async with aclosing(self._events(known, request, plan, max_tokens)) as events:
                patience = self._settings.first_token_seconds
                while not answer.stopped:
                    try:
                        event = await self._within(patience, anext(events))
                    except StopAsyncIteration:
                        break
                    if not isinstance(event, Counted):
                        patience = self._settings.stall_seconds
                    delta = answer.push(event)
                    if delta is not None:
                        yield delta
            finished = answer.finish()
        except EngineError as error:
            self._suspect(error)
            if answer.begun and not isinstance(error, EngineFailed):
                raise EngineFailed(f"the answer broke off: {error}") from error
            raise
        finally:
            self._slots.release()
        yield Finished(finished.finish_reason, finished.usage, queued, finished.last)

    async def embed(self, model: str, inputs: Sequence[str]) -> Embeddings:
        """See Engine.embed."""
        known = self._known(model)
        if Feature.EMBEDDING not in known.described.features:
            raise Unsupported(f"model {model!r} does not embed")
        await self._within(None, self._slots.acquire())
        try:
            return await self._answered(self._embed(known, inputs))
        finally:
            self._slots.release()

    async def count_tokens(self, request: GenerationRequest) -> int:
        """See Engine.count_tokens."""
        known = self._known(request.model)
        plan = make_plan(request, structured=known.structured, forced=known.forced)
        return await self._answered(self._count(known, request, plan))

    def _known(self, name: str) -> Known:
        if self._closed:
            raise EngineFailed("the engine was closed")
        models = self._models()
        if name not in models:
            raise UnknownModel(f"no model is called {name!r}; there are: {', '.join(models) or 'none'}")
        return models[name]

    async def _room(self, known: Known, request: GenerationRequest, plan: Plan) -> int | None:
        """What the answer may have. Raises ContextTooLong; only a prompt that may be too long is counted first."""
        given = request.sampling.max_tokens
        context = known.described.context_length
        longest = most_prompt_tokens(request)
        if longest + (given or 1) > context:
            try:
                count = await self._answered(self._count(known, request, plan))
            except ContextTooLong:
                raise
            except EngineError as error:  # then the provider has to refuse it
                _log.info("request %r: its prompt cannot be counted: %s", request.request_id, type(error).__name__)
            else:
                if count + (given or 1) > context:
                    asked = f" and up to {given} of the answer" if given else ""
                    raise ContextTooLong(f"{count} tokens of the prompt{asked} do not fit into {context}")
                longest = count
        if given is not None:
            return min(given, known.max_output or given)
        if known.max_output is None:
            return None
        return min(known.max_output, max(context - longest, min(_LEAST_ROOM, context // 2)))

    async def _answered(self, work: Awaitable[T]) -> T:
        try:
            return await self._within(self._settings.first_token_seconds, work)
        except EngineError as error:
            self._suspect(error)
            raise

    async def _within(self, seconds: float | None, work: Awaitable[T]) -> T:
        """Raises EngineFailed when it takes longer, and when the engine is closed."""
        wait = asyncio.timeout(seconds)
        try:
            async with wait:
                self._waits.add(wait)
                if self._closed:
                    wait.reschedule(0)
                return await work
        except TimeoutError:
            if self._closed:
                raise EngineFailed("the engine was closed") from None
            raise EngineFailed(f"{self.name} sent nothing for {seconds:g} s") from None
        finally:
            self._waits.discard(wait)
