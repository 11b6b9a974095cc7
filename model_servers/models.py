"""The life of the models of one engine: fetched, loaded, kept warm, unloaded; one step per model at a time.

What is decided is decided by the pure functions at the top; the `Keeper` below carries it out.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from model_servers.engine import (
    Engine,
    EngineError,
    EngineFailed,
    EngineModel,
    EngineStatus,
    Health,
    ManagesModels,
    ModelState,
    OutOfMemory,
    Progress,
    UnknownModel,
    Unsupported,
)
from model_servers.lifecycle import Changes

_log = logging.getLogger(__name__)

_UPKEEP_SECONDS = 0.5
"""Between two looks at what should be loaded or unloaded."""
_LONGEST_PAUSE = 60.0
"""Seconds at most between two tries to load a model that is to be kept warm."""
_FAILED_SECONDS = 30.0
"""For how long a model that did not load counts as failed; then a request may try it again."""


# -------------------------------------------------------------- decisions ---


@dataclass(frozen=True, slots=True)
class Held:
    """A model in memory."""

    name: str
    memory_bytes: int
    """0: not known, counts as nothing."""
    requests: int = 0
    used_at: float = 0.0
    kept: bool = False
    """Named in `keep_warm`: never unloaded to make room."""


def make_room(name: str, needed: int, held: Iterable[Held], limit: int) -> tuple[str, ...]:
    """What to unload, in this order, so that a model of `needed` bytes fits under `limit` bytes (0: none).

    The least recently used go first, and no more of them than must. Raises OutOfMemory naming what is in the way.
    """
    models = tuple(held)
    excess = sum(model.memory_bytes for model in models) + needed - limit
    if not limit or excess <= 0:
        return ()
    leaving = []
    for model in sorted(models, key=lambda model: (model.used_at, model.name)):
        if excess <= 0:
            break
        if model.memory_bytes and not model.requests and not model.kept:
            leaving.append(model.name)
            excess -= model.memory_bytes
    if excess <= 0:
        return tuple(leaving)
    stay = [model for model in models if model.memory_bytes and model.name not in leaving]
    in_the_way = "; ".join(f"{model.name} holds {_size(model.memory_bytes)} ({_why(model)})" for model in stay)
    raise OutOfMemory(
        f"model {name!r} needs {_size(needed)} and the limit is {_size(limit)}"
        + (f": {in_the_way}" if in_the_way else "; raise memory_limit_bytes or choose a smaller model")
    )


def _why(model: Held) -> str:
    return "kept warm" if model.kept else f"{model.requests} requests"


def _size(number: int) -> str:
    return f"{number / (1 << 30):.2f} GiB" if number >= 1 << 27 else f"{number / (1 << 20):.1f} MiB"


def idle_models(held: Iterable[Held], now: float, idle_seconds: float) -> tuple[str, ...]:
    """What nobody has used for that long; 0 seconds: nothing, ever."""
    if not idle_seconds:
        return ()
    return tuple(
        model.name for model in held if not model.requests and not model.kept and now - model.used_at >= idle_seconds
    )


@dataclass(frozen=True, slots=True)
class FailedLoad:
    """The latest of `count` failures in a row."""

    count: int
    at: float
    detail: str
    broken: bool
    """Whether the model counts as failed; one that merely found no room does not."""

    def retry_at(self) -> float:
        return self.at + min(2.0 ** min(self.count - 1, 10), _LONGEST_PAUSE)


def missing_models(
    wanted: Iterable[str], states: Mapping[str, ModelState], failures: Mapping[str, FailedLoad], now: float
) -> tuple[str, ...]:
    """Of what is to be kept warm: what is not, and may be tried now."""
    away = (ModelState.ABSENT, ModelState.COLD, ModelState.FAILED)
    return tuple(
        name
        for name in wanted
        if states.get(name, ModelState.ABSENT) in away and (name not in failures or now >= failures[name].retry_at())
    )


# ----------------------------------------------------------------- keeper ---


class Step(StrEnum):
    PULL = "pull"
    LOAD = "load"
    UNLOAD = "unload"


class _Work:
    """One step of one model under way, and who follows it."""

    def __init__(self, step: Step, model: str) -> None:
        self.step = step
        self.model = model
        self.task: asyncio.Task[None] | None = None
        self.followers = 0
        self.given_up = False
        """Its last follower has left: it is being cancelled, and nobody may join it."""
        self.latest: Progress | None = None
        self.error: BaseException | None = None
        self.done = False
        self.changes = Changes()

    def unfollow(self) -> None:
        self.followers -= 1
        if not self.followers and not self.done and self.task is not None:
            self.given_up = True
            self.task.cancel()

    async def ended(self) -> None:
        while not self.done:
            await self.changes.beyond(self.changes.version)


@dataclass(slots=True)
class _Use:
    requests: int = 0
    borrowed: int = 0
    """Canaries: an unload waits for them, too, but they are no use of the model."""
    used_at: float | None = None


class Keeper:
    """Owns every step. For an engine that manages no models it only counts requests."""

    def __init__(
        self,
        engine: Engine,
        *,
        keep_warm: Sequence[str] = (),
        idle_unload_seconds: float = 0.0,
        memory_limit_bytes: int = 0,
        paused: Callable[[], bool] = lambda: False,
        clock: Callable[[], float],
    ) -> None:
        """`paused`: whether upkeep must wait, because the server is draining or the engine is sick."""
        self._engine = engine
        self._steps = engine if isinstance(engine, ManagesModels) else None
        self._keep_warm = tuple(keep_warm)
        self._wanted = list(keep_warm)
        """Of these, what no one has ordered to be unloaded since."""
        self._idle_seconds = idle_unload_seconds
        self._limit = memory_limit_bytes
        self._paused = paused
        self._clock = clock
        self._uses: defaultdict[str, _Use] = defaultdict(_Use)
        self._released = Changes()
        self._works: dict[str, _Work] = {}
        self._one_load = asyncio.Lock()
        """Loads happen one after the other: each must know what memory the one before has taken."""
        self._failures: dict[str, FailedLoad] = {}
        self.load_seconds: dict[str, float] = {}
        """What the latest load of each model took, measured here."""

    @property
    def manages(self) -> bool:
        return self._steps is not None

    # ----------------------------------------------------------- requests ---

    async def enter(self, model: str) -> float:
        """Use a model until `leave`, loading it first if it is cold; returns seconds waited for that.

        Raises as ManagesModels.load. Cancelling the last request that waits stops the load.
        """
        if self._steps is None:
            self._uses[model].requests += 1
            return 0.0
        began = self._clock()
        waited = False
        while (work := self._works.get(model)) is not None and self._must_wait(work):
            waited = True
            await work.ended()
        # Counted before the wait for the load: from here on no unload begins before `leave`.
        self._uses[model].requests += 1
        try:
            loading = work is not None and work.step is Step.LOAD
            if loading or self._state(model) in (ModelState.COLD, ModelState.FAILED):
                waited = True
                async with contextlib.aclosing(self.follow(Step.LOAD, model)) as steps:
                    async for _ in steps:
                        pass
        except BaseException:
            self.leave(model)
            raise
        return self._clock() - began if waited else 0.0

    def _must_wait(self, work: _Work) -> bool:
        """Whether a request must see the end of this step before it may count as using the model."""
        if work.step is Step.PULL:
            return self._state(work.model) is not ModelState.WARM
        return work.step is Step.UNLOAD or work.given_up

    def leave(self, model: str) -> None:
        use = self._uses[model]
        use.requests -= 1
        use.used_at = self._clock()
        if not use.requests:
            self._released.tell()

    @contextlib.contextmanager
    def borrow(self, model: str) -> Iterator[None]:
        """Keep a warm model from being unloaded, without that counting as use."""
        use = self._uses[model]
        use.borrowed += 1
        try:
            yield
        finally:
            use.borrowed -= 1
            self._released.tell()

    def busy_with(self, model: str) -> bool:
        """Whether a step of the model is under way."""
        return model in self._works

    @property
    def knows_more(self) -> bool:
        """Whether `states` or `load_seconds` say anything."""
        return bool(self._works or self._failures or self.load_seconds)

    # -------------------------------------------------------------- steps ---

    async def follow(self, step: Step, model: str) -> AsyncGenerator[Progress, None]:
        """Take a step, or join the one that is under way; yields progress, the state reached last.

        The latest progress is told, not each: a slow reader holds nothing up. When the last follower leaves, the
        work stops. Raises what the engine raises, and Unsupported for one that manages no models.
        """
        if self._steps is None:
            raise Unsupported(f"this engine loads its models by itself: there is nothing to {step}")
        if model in self._keep_warm and step is not Step.PULL:
            self._want(model, step is Step.LOAD)
        if model not in self._works and (state := self._reached(step, model)) is not None:
            yield Progress(state)
            return
        work = await self._join(step, model)
        try:
            told: Progress | None = None
            while True:
                version, done = work.changes.version, work.done
                if work.latest is not None and work.latest is not told:
                    told = work.latest
                    yield told
                if done:
                    break
                await work.changes.beyond(version)
            if work.error is not None:
                raise work.error
        finally:
            work.unfollow()

    async def _join(self, step: Step, model: str) -> _Work:
        """A work of that kind with one follower more. Waits for the end of a step of another kind."""
        while True:
            work = self._works.get(model)
            if work is None:
                work = self._begin(step, model)
            if work.step is step and not work.given_up:
                work.followers += 1
                return work
            await work.ended()

    def _begin(self, step: Step, model: str) -> _Work:
        work = self._works[model] = _Work(step, model)
        work.task = asyncio.create_task(self._carry_out(work), name=f"{step}-{model}")
        # Not at the end of the coroutine: that never runs if it is cancelled before it begins.
        work.task.add_done_callback(lambda task: self._ended(work, task))
        return work

    def _ended(self, work: _Work, task: asyncio.Task[None]) -> None:
        if task.cancelled():
            work.error = EngineFailed(f"the {work.step} of model {work.model!r} was given up")
        else:
            work.error = error = task.exception()
            if error is not None:
                level = logging.WARNING if isinstance(error, EngineError) else logging.ERROR
                found = error if level > logging.WARNING else None
                _log.log(level, "cannot %s model %r: %s", work.step, work.model, error, exc_info=found)
        work.done = True
        del self._works[work.model]
        work.changes.tell()

    async def _carry_out(self, work: _Work) -> None:
        steps, model = self._steps, work.model
        if steps is None:
            return
        if work.step is Step.PULL:
            await self._drive(work, steps.pull(model))
        elif work.step is Step.UNLOAD:
            await self._until_unused(model)
            await self._drive(work, steps.unload(model))
            _log.info("model %r unloaded", model)
        else:
            async with self._one_load:
                await self._load(work, steps)

    async def _load(self, work: _Work, steps: ManagesModels) -> None:
        model = work.model
        work.latest = Progress(ModelState.LOADING)
        described = self._described(model)
        try:
            await self._free(model, described.memory_bytes if described else 0)
            began = self._clock()
            await self._drive(work, steps.load(model))
        except EngineError as error:
            if described is not None or model in self._keep_warm:  # not for whatever name someone sends
                count = self._failures[model].count if model in self._failures else 0
                broken = not isinstance(error, OutOfMemory | UnknownModel | Unsupported)
                self._failures[model] = FailedLoad(count + 1, self._clock(), str(error), broken)
            raise
        now = self._clock()
        self.load_seconds[model] = now - began
        self._failures.pop(model, None)
        self._uses[model].used_at = now
        _log.info("model %r loaded in %.2f s", model, now - began)
        described = self._described(model)
        if described is not None:
            # What it really takes may be more than was known before.
            with contextlib.suppress(OutOfMemory):
                await self._free(model, described.memory_bytes)

    async def _free(self, model: str, needed: int) -> None:
        """Unload what must make room. Raises OutOfMemory."""
        others = [held for held in self._held() if held.name != model]
        for name in make_room(model, needed, others, self._limit):
            _log.info("model %r makes room for %r", name, model)
            work = await self._join(Step.UNLOAD, name)
            try:
                await work.ended()
            finally:
                work.unfollow()
            if work.error is not None:
                raise work.error

    async def _drive(self, work: _Work, steps: AsyncGenerator[Progress, None]) -> None:
        async with contextlib.aclosing(steps):
            async for progress in steps:
                work.latest = progress
                work.changes.tell()

    async def _until_unused(self, model: str) -> None:
        while (use := self._uses.get(model)) is not None and (use.requests or use.borrowed):
            await self._released.beyond(self._released.version)

    def _want(self, model: str, wanted: bool) -> None:
        if wanted and model not in self._wanted:
            self._wanted.append(model)
        elif not wanted and model in self._wanted:
            self._wanted.remove(model)

    def _reached(self, step: Step, model: str) -> ModelState | None:
        """The state, if there is nothing to do. Pulling a model again may bring a newer one: the engine knows."""
        state = self._state(model)
        done = {Step.LOAD: (ModelState.WARM,), Step.UNLOAD: (ModelState.COLD, ModelState.ABSENT), Step.PULL: ()}
        return state if state in done[step] else None

    def _described(self, model: str) -> EngineModel | None:
        return next((each for each in self._engine.status().models if each.name == model), None)

    def _state(self, model: str) -> ModelState | None:
        described = self._described(model)
        return None if described is None else described.state

    # ------------------------------------------------------------- upkeep ---

    async def run(self) -> None:
        """Load what is to be kept warm, unload what nobody uses; until cancelled."""
        if self._steps is None:
            if self._keep_warm or self._idle_seconds or self._limit:
                _log.warning("keep_warm, idle_unload_seconds and memory_limit_bytes do nothing with this engine")
            return
        pause = min(_UPKEEP_SECONDS, self._idle_seconds / 4 or _UPKEEP_SECONDS)
        while True:
            self.look_after(self._clock())
            await asyncio.sleep(pause)

    def look_after(self, now: float) -> None:
        """One look; begins steps and does not wait for them."""
        status = self._engine.status()
        if status.health is not Health.READY or self._paused():
            return
        states = {model.name: model.state for model in status.models}
        for name in missing_models(self._wanted, states, self._failures, now):
            self._begin_unasked(Step.LOAD, name)
        for name in idle_models(self._held(status), now, self._idle_seconds):
            self._begin_unasked(Step.UNLOAD, name)

    def _begin_unasked(self, step: Step, model: str) -> None:
        if model not in self._works:
            self._begin(step, model).followers += 1  # the server itself, which never leaves

    def restarted(self) -> None:
        """The engine has begun anew: what is to be kept warm is wanted again, and may be tried at once."""
        self._wanted = list(self._keep_warm)
        self._failures.clear()

    def _held(self, status: EngineStatus | None = None) -> list[Held]:
        now = self._clock()
        held = []
        for model in (status or self._engine.status()).models:
            work = self._works.get(model.name)
            leaving = work is not None and work.step is Step.UNLOAD
            if model.state is ModelState.WARM and not leaving:
                use = self._uses[model.name]
                if use.used_at is None:
                    use.used_at = now  # warm since before anyone asked
                kept = model.name in self._keep_warm
                held.append(Held(model.name, model.memory_bytes, use.requests, use.used_at, kept))
        return held

    async def close(self) -> None:
        """Stop every step."""
        tasks = [work.task for work in self._works.values() if work.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # --------------------------------------------------------------- view ---

    def states(self) -> dict[str, tuple[ModelState, str]]:
        """State and detail of the models of which more is known here than the engine may say."""
        now = self._clock()
        known = {
            name: (ModelState.FAILED, failure.detail)
            for name, failure in self._failures.items()
            if failure.broken and now - failure.at < _FAILED_SECONDS
        }
        known.update((name, _state_of(work)) for name, work in self._works.items())
        return known


def _state_of(work: _Work) -> tuple[ModelState, str]:
    progress = work.latest
    detail = progress.detail if progress else ""
    if progress is not None and progress.total_bytes:
        detail = f"{detail} {100 * progress.completed_bytes // progress.total_bytes} %".strip()
    if work.step is Step.UNLOAD:
        # Cold before it is: who comes now has to wait for the end of the unload and for a load.
        return ModelState.COLD, detail or "being unloaded when its requests have ended"
    return (ModelState.PULLING if work.step is Step.PULL else ModelState.LOADING), detail
