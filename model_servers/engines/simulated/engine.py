"""The simulated engine: slots, prefill, decoding and a prefix cache, without a model.

Time is modelled, not spent: requests take turns in one prefill lane, decode at min(single stream, aggregate / running),
slower while a prompt is in the lane, and sleep to the moment their next token is due.
"""

from __future__ import annotations

import asyncio
import os
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import replace
from functools import partial

from model_servers.engine import (
    CANARY_ID,
    ContextTooLong,
    Delta,
    Embeddings,
    EngineFailed,
    EngineLoad,
    EngineModel,
    EngineStatus,
    Feature,
    Finished,
    GenerationRequest,
    Health,
    ModelState,
    OutOfMemory,
    Progress,
    UnknownModel,
    Unsupported,
    Usage,
)
from model_servers.engines.simulated.answer import Answer, compose, is_held
from model_servers.engines.simulated.cache import PrefixCache, block_keys
from model_servers.engines.simulated.faults import FaultScript
from model_servers.engines.simulated.settings import Fault, SimulatedSettings
from model_servers.engines.simulated.slots import Pauses, Slots
from model_servers.engines.simulated.text import count_tokens, embed, fingerprint, render_prompt, told_tokens

VERSION = "1"
CRASH_STATUS = 70
_STEPS = 10
"""In which the progress of a pull or a load is told."""
_SHORT_PROMPT = 100
"""Tokens that the expected TTFT is told for."""


class SimulatedEngine:
    """See SimulatedSettings for what can be simulated."""

    def __init__(self, settings: SimulatedSettings) -> None:
        self._settings = settings
        self._scale = 0.0 if settings.instant else settings.time_scale
        self._decoding = 0
        self._lane = Slots(1)
        """One prompt is computed at a time."""
        self._lane_free_at = 0.0
        """When it was left last, by the clock of the event loop."""
        self._models = {
            model.name: replace(
                model.describe(settings.context_length),
                expected_ttft=self._prefill_seconds(_SHORT_PROMPT),
                expected_tpot=self._seconds_per_token(),
            )
            for model in settings.models
        }
        self._memory_used = self._warm_bytes()
        self._scripts = {model.name: model for model in settings.models}
        self._one_step: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._faults = FaultScript(settings.faults, settings.seed)
        self._slots = Slots(settings.slots)
        self._pauses = Pauses()
        self._text = ThreadPoolExecutor(max_workers=1, thread_name_prefix="simulated-text")
        self._stalled = False
        self._stall_ends: asyncio.TimerHandle | None = None
        self._frozen = Pauses()
        """Those who wait for the end of a stall."""
        self._cache = PrefixCache(settings.cache_blocks)
        self._context_tokens = 0
        self._generation = 0
        """Counts breakdowns: whoever started before the latest one has failed."""
        self._health = Health.STARTING
        self._detail = ""
        self._closed = False
        self._largest_context = max(model.context_length for model in self._models.values())

    def set_faults(self, faults: Sequence[Fault]) -> None:
        """Another script from now on, counting requests anew; for tests."""
        self._faults = FaultScript(faults, self._settings.seed)

    async def start(self) -> None:
        if self._faults.refuses_start:
            self._health, self._detail = Health.UNHEALTHY, "the script says so"
            raise EngineFailed("the simulated engine was told not to start; remove the fault 'refuse_start'")
        if self._settings.start_seconds:
            await asyncio.sleep(self._settings.start_seconds * self._scale)
        self._health = Health.READY

    def status(self) -> EngineStatus:
        slots = self._slots
        return EngineStatus(
            engine="simulated",
            version=VERSION,
            device=self._settings.device,
            memory_bytes=self._settings.memory_bytes,
            memory_used_bytes=self._memory_used,
            models=tuple(self._models.values()),
            load=EngineLoad(
                slots=slots.size,
                running=slots.running,
                waiting=slots.waiting,
                kv_cache_utilization=min(1.0, self._context_tokens / (slots.size * self._largest_context)),
            ),
            health=self._health,
            health_detail=self._detail,
        )

    # -------------------------------------------------------------- models ---

    async def pull(self, model: str) -> AsyncGenerator[Progress, None]:
        """See ManagesModels."""
        async with self._one_step[self._model(model).name]:
            if self._models[model].state is ModelState.ABSENT:
                seconds = self._scripts[model].pull_seconds
                async for progress in self._pass(model, ModelState.PULLING, ModelState.COLD, seconds):
                    yield progress
            else:
                yield Progress(self._models[model].state)

    async def load(self, model: str) -> AsyncGenerator[Progress, None]:
        """See ManagesModels."""
        async with self._one_step[self._model(model).name]:
            known = self._models[model]
            if known.state is ModelState.ABSENT:
                raise UnknownModel(f"model {model!r} is not here; pull it first")
            if known.state is ModelState.WARM:
                yield Progress(ModelState.WARM)
                return
            total, used = self._settings.memory_bytes, self._memory_used
            if total and used + known.memory_bytes > total:
                raise OutOfMemory(f"model {model!r} takes {known.memory_bytes} bytes, {total - used} are free")
            if self._faults.refuses_load(model):
                raise EngineFailed(f"model {model!r} does not load (simulated)")
            seconds = self._scripts[model].load_seconds
            async for progress in self._pass(model, ModelState.LOADING, ModelState.WARM, seconds):
                yield progress

    async def unload(self, model: str) -> AsyncGenerator[Progress, None]:
        """See ManagesModels."""
        async with self._one_step[self._model(model).name]:
            if self._models[model].state is ModelState.WARM:
                self._set(model, ModelState.COLD)
            yield Progress(self._models[model].state)

    async def _pass(
        self, model: str, through: ModelState, to: ModelState, seconds: float
    ) -> AsyncGenerator[Progress, None]:
        """From one state to another; back to where it was if that is not finished."""
        before = self._models[model].state
        size = self._models[model].memory_bytes
        self._set(model, through)
        try:
            for step in range(_STEPS if seconds and self._scale else 1):
                yield Progress(through, f"{through.name.lower()} (simulated)", size * step // _STEPS, size)
                if seconds and self._scale:
                    await self._pauses.sleep(seconds * self._scale / _STEPS)
        except BaseException:
            self._set(model, before)
            raise
        self._set(model, to)
        yield Progress(to, completed_bytes=size, total_bytes=size)

    def _set(self, model: str, state: ModelState) -> None:
        self._models[model] = replace(self._models[model], state=state)
        self._memory_used = self._warm_bytes()

    def _warm_bytes(self) -> int:
        return sum(model.memory_bytes for model in self._models.values() if model.state is ModelState.WARM)

    async def _warm(self, name: str) -> EngineModel:
        """The model, loaded if it is not."""
        if self._model(name).state is not ModelState.WARM:
            async with aclosing(self.load(name)) as steps:
                async for _ in steps:
                    pass
        return self._models[name]

    async def restart(self) -> None:
        """See Restarts. What was pulled stays; other models are as at the start."""
        if self._closed:
            raise EngineFailed("the engine was closed")
        self._health, self._detail = Health.STARTING, "restarting"
        self._break("the engine was restarted")
        self._thaw()
        for name, script in self._scripts.items():
            if self._models[name].state is not ModelState.ABSENT:
                self._set(name, ModelState.WARM if script.state == "warm" else ModelState.COLD)
        await self.start()

    def _thaw(self) -> None:
        self._stalled = False
        if self._stall_ends is not None:
            self._stall_ends.cancel()
            self._stall_ends = None
        self._frozen.wake_all()

    async def _until_thawed(self) -> None:
        while self._stalled:
            await self._frozen.sleep(None)

    # ---------------------------------------------------------------- work ---

    async def count_tokens(self, request: GenerationRequest) -> int:
        self._model(request.model)
        return count_tokens(render_prompt(request))

    async def embed(self, model: str, inputs: Sequence[str]) -> Embeddings:
        known = await self._warm(model)
        if Feature.EMBEDDING not in known.features:
            raise Unsupported(f"model {model!r} does not embed")
        tokens = [count_tokens(text) for text in inputs]
        if max(tokens, default=0) > known.context_length:
            raise ContextTooLong(f"an input has {max(tokens)} tokens, {known.context_length} fit")
        fault = self._faults.next(model)
        generation = self._generation
        async with self._slots.hold():
            await self._strike(fault, generation)
            await self._prefill(lambda: sum(tokens), fault.factor if fault and fault.kind == "slow" else 1.0)
            vectors = []
            for n, text in enumerate(inputs):
                if n % 64 == 63:
                    await asyncio.sleep(0)  # hashing 2,048 inputs must not hold up the others
                vectors.append(embed(text, self._settings.embedding_dimension, f"{self._settings.seed}/{model}"))
        return Embeddings(tuple(vectors), sum(tokens))

    async def close(self) -> None:
        self._closed = True
        self._health, self._detail = Health.UNHEALTHY, "closed"
        self._break("the engine was closed")
        self._text.shutdown(wait=False)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Delta | Finished, None]:
        model = await self._warm(request.model)
        prompt = render_prompt(request)
        prompt_tokens = count_tokens(prompt)
        room = model.context_length - prompt_tokens
        wanted = request.sampling.max_tokens
        if room < (wanted or 1):
            asked = f" and up to {wanted} of the answer" if wanted else ""
            raise ContextTooLong(f"{prompt_tokens} tokens of the prompt{asked} do not fit into {model.context_length}")
        make = partial(
            compose,
            request,
            fingerprint(prompt, self._settings.seed, request.sampling.seed),
            self._settings.seed,
            (self._settings.told_answers and told_tokens(prompt)) or self._settings.answer_tokens,
            wanted or room,
        )
        # A schema may take a while: not on the event loop.
        answer = await asyncio.get_running_loop().run_in_executor(self._text, make) if is_held(request) else make()
        caching = Feature.PREFIX_CACHE in model.features and self._settings.cache_blocks > 0
        block = self._settings.block_tokens
        keys = block_keys(model.name, prompt, block) if caching else ()
        fault = None if request.request_id == CANARY_ID else self._faults.next(model.name)
        generation = self._generation
        loop = asyncio.get_running_loop()
        arrived = loop.time()
        async with self._slots.hold():
            queued = loop.time() - arrived
            cached = 0

            def uncached() -> int:
                nonlocal cached
                # At least one token of the prompt is always computed: it yields the first of the answer.
                cached = min(self._cache.match(keys) * block, (prompt_tokens - 1) // block * block)
                return prompt_tokens - cached

            self._context_tokens += prompt_tokens + answer.tokens
            try:
                await self._prefill(uncached, fault.factor if fault and fault.kind == "slow" else 1.0)
                self._cache.insert(keys)
                self._decoding += 1
                last: Delta | None = None
                try:
                    async with aclosing(self._decode(answer, fault, generation)) as pieces:
                        async for piece, ends in pieces:
                            if ends:
                                last = piece
                            else:
                                yield piece
                finally:
                    self._decoding -= 1
            finally:
                self._context_tokens -= prompt_tokens + answer.tokens
            if caching and not answer.tool:
                self._cache.insert(block_keys(model.name, prompt + answer.text, block))
            yield Finished(
                answer.finish_reason,
                Usage(
                    prompt_tokens=prompt_tokens,
                    cached_prompt_tokens=cached,
                    completion_tokens=answer.tokens,
                ),
                queued=queued,
                last=last,
            )

    async def _prefill(self, tokens: Callable[[], int], factor: float) -> None:
        """Prompts are computed one after the other, as a busy accelerator would. How many `tokens` there are to compute
        is asked when it is this one's turn: the one before may have left them in the cache."""
        await self._until_thawed()
        time = asyncio.get_running_loop().time
        arrived = time()
        async with self._lane.hold():
            # A turn begins when the one before was due to end: timers are late, and that must not add up.
            begin = max(arrived, self._lane_free_at)
            seconds = self._prefill_seconds(tokens()) * factor
            self._lane_free_at = begin
            try:
                if seconds:
                    await self._pauses.sleep(max(0.0, begin + seconds - time()))
                self._lane_free_at = begin + seconds
            except BaseException:
                self._lane_free_at = time()
                raise

    def _prefill_seconds(self, tokens: int) -> float:
        speed = self._settings.prefill_tokens_per_second
        return tokens / speed * self._scale if speed else 0.0

    def _seconds_per_token(self) -> float:
        speed = self._settings.decode_tokens_per_second
        together = self._settings.aggregate_tokens_per_second
        slowest = 1 / speed if speed else 0.0
        if together:
            slowest = max(slowest, self._decoding / together)
        if self._lane.running:
            slowest /= self._settings.prefill_interference
        return slowest * self._scale

    async def _decode(
        self, answer: Answer, fault: Fault | None, generation: int
    ) -> AsyncGenerator[tuple[Delta, bool], None]:
        """The pieces as they become due, each with whether the answer ends with it."""
        chunk = self._settings.tokens_per_chunk
        strike_at = -1 if fault is None or fault.kind == "slow" else min(fault.tokens, answer.tokens)
        factor = fault.factor if fault and fault.kind == "slow" else 1.0
        time = asyncio.get_running_loop().time
        timed = self._seconds_per_token() > 0
        due = time()
        sent = 0
        while True:
            if sent == strike_at:
                await self._strike(fault, generation)
            await self._until_thawed()
            if generation != self._generation:
                raise EngineFailed("the engine lost its running requests")
            if sent >= answer.tokens:
                return
            count = min(chunk, answer.tokens - sent)
            if timed and sent:
                pace = self._seconds_per_token() * factor
                due += count * pace
                late = time() - due
                if late < 0:
                    await self._pauses.sleep(-late)
                elif pace > 0 and late > pace:
                    # The reader was slower than the model: what has become due since goes out at once.
                    more = min(int(late / pace), answer.tokens - sent - count)
                    count += more
                    due += more * pace
            if sent < strike_at < sent + count:
                count = strike_at - sent
            ends = sent + count >= answer.tokens and strike_at < answer.tokens
            yield answer.piece(sent, count), ends
            sent += count

    async def _strike(self, fault: Fault | None, generation: int) -> None:
        if generation != self._generation:
            raise EngineFailed("the engine lost its running requests")
        if fault is None or fault.kind == "slow":
            return
        if fault.kind == "hang":
            await self._pauses.sleep(None)
        elif fault.kind == "stall":
            self._stalled = True
            if fault.seconds:
                self._stall_ends = asyncio.get_running_loop().call_later(fault.seconds, self._thaw)
            await self._until_thawed()
        elif fault.kind == "crash":
            os._exit(CRASH_STATUS)
        elif fault.kind == "disconnect":
            self._health, self._detail = Health.UNHEALTHY, "simulated loss of the connection to the engine"
            asyncio.get_running_loop().call_later(fault.seconds, self._recover)
            self._break("the connection to the engine was lost (simulated)")
            raise EngineFailed("the connection to the engine was lost (simulated)")
        else:
            raise EngineFailed("a simulated fault")

    def _break(self, why: str) -> None:
        """Fail everything that runs or waits."""
        self._generation += 1
        self._pauses.fail_all(lambda: EngineFailed(why))
        self._frozen.fail_all(lambda: EngineFailed(why))
        self._slots.fail_waiting(lambda: EngineFailed(why))
        self._lane.fail_waiting(lambda: EngineFailed(why))

    def _recover(self) -> None:
        if not self._closed:
            self._health, self._detail = Health.READY, ""

    def _model(self, name: str) -> EngineModel:
        if self._closed:
            raise EngineFailed("the engine was closed")
        model = self._models.get(name)
        if model is None:
            raise UnknownModel(f"no model is called {name!r}; there are: {', '.join(self._models)}")
        return model
