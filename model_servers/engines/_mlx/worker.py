"""The engine thread: all of MLX happens here, and nothing else does.

MLX on Metal does not survive use from several threads, so one thread loads the model, generates in a continuous
batch and embeds. Commands come in through a queue (on which the thread sleeps when it has nothing to do); what it
makes goes out once per step, all requests together, so that the event loop is woken once and not per token.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import queue
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from model_servers.engine import EngineError, EngineFailed
from model_servers.engines._mlx.embedding import LongText, embed_group
from model_servers.engines._mlx.jobs import Change, EmbedJob, Gauges, Job, Outbox, deliver
from model_servers.engines._mlx.loading import Model
from model_servers.engines._mlx.settings import MlxSettings
from modelyard.program import privacy

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Stop:
    pass


@dataclass(frozen=True, slots=True)
class _Cancel:
    job: Job | EmbedJob


@dataclass(slots=True)
class _State:
    """Owned by the thread."""

    model: Model
    batch: Any = None
    """batch.Batch, which cannot be imported before MLX is set up; None while the model is not in memory."""
    waiting: deque[Job] = field(default_factory=deque)
    embeds: deque[EmbedJob] = field(default_factory=deque)

    @property
    def idle(self) -> bool:
        return not (self.waiting or self.embeds or self.running)

    @property
    def running(self) -> tuple[Job, ...]:
        return () if self.batch is None else tuple(self.batch.running.values())


class Worker:
    """Starts and feeds the thread. Every method may be called from the event loop; none blocks."""

    def __init__(
        self,
        settings: MlxSettings,
        loop: asyncio.AbstractEventLoop,
        clock: Callable[[], float],
        loader: Callable[[MlxSettings], Model],
        describer: Callable[[MlxSettings], Model],
    ) -> None:
        self._settings = settings
        self._loop = loop
        self._clock = clock
        self._loader = loader
        self._describer = describer
        self._commands: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._closing = threading.Lock()
        self._ended = ""
        self._loaded: asyncio.Future[Model] | None = None
        self.gauges = Gauges(progress_at=clock())
        self.thread = threading.Thread(target=self._main, name="mlx-engine", daemon=True)

    # ------------------------------------------------- from the event loop ---

    async def start(self) -> Model:
        """Starts the thread and waits until the model is loaded, or with `lazy` described. Raises EngineFailed.

        What is returned has no network: that stays with the thread, which may have to let it go.
        """
        loaded: asyncio.Future[Model] = self._loop.create_future()
        self._loaded = loaded
        self.thread.start()
        try:
            return await loaded
        finally:
            self._loaded = None  # it would keep the weights alive

    def submit(self, job: Job | EmbedJob) -> None:
        """Raises EngineFailed if the thread has ended."""
        self._put(job)

    async def change(self, *, warm: bool) -> None:
        """Brings the model into memory, or takes it out if nothing runs. Raises EngineFailed.

        Cancelling ends the wait, not the work: what MLX does cannot be interrupted.
        """
        change = Change(warm, asyncio.Queue())
        self._put(change)
        outcome = await change.sink.get()
        if outcome is not None:
            raise outcome

    def cancel(self, job: Job | EmbedJob) -> None:
        """Stops the work on `job` before the next step; nothing happens if it has ended."""
        job.cancelled = True
        with contextlib.suppress(EngineFailed):
            self._put(_Cancel(job))

    @property
    def waiting(self) -> int:
        """Requests handed over and not started."""
        return self.gauges.waiting + self._commands.qsize()

    def stop(self) -> None:
        """Ends the thread after the current step; what runs fails."""
        with contextlib.suppress(EngineFailed):
            self._put(_Stop())

    def _put(self, command: Any) -> None:
        # The lock pairs with _end(): nothing can slip into the queue after it has been emptied for good.
        with self._closing:
            if self._ended:
                raise EngineFailed(self._ended)
            self._commands.put(command)

    # ------------------------------------------------------ on the thread ---

    def _main(self) -> None:
        state: _State | None = None
        reason = "the MLX engine was closed"
        try:
            state = self._prepare()
            self._post(partial(self._announce, replace(state.model, network=None)))
            while self._take_commands(state):
                self._work(state)
        except EngineError as error:
            reason = str(error)
        except BaseException as error:  # whatever it is, requests must hear of it
            log.error("the MLX engine thread died: %s", privacy.where(error))
            reason = f"the MLX engine thread died ({privacy.kind(error)}; see its log)"
        self._end(state, reason)
        if state is not None:
            # What is freed on this thread has to be given back on this thread.
            del state
            _release()

    def _announce(self, model: Model) -> None:
        if self._loaded is not None and not self._loaded.done():  # None if start() was cancelled
            self._loaded.set_result(model)

    def _prepare(self) -> _State:
        if self._settings.lazy:
            model = self._describer(self._settings)
            self.gauges.model_bytes = model.weight_bytes
            return _State(model)
        began = self._clock()
        model = self._loader(self._settings)
        state = _State(model)
        self._take_in(state, model, began)
        return state

    def _take_in(self, state: _State, model: Model, began: float) -> None:
        # Only now: loading has found MLX and set it up.
        from model_servers.engines._mlx.batch import Batch

        # What was announced at the start stays: prompts are made with that tokenizer.
        state.model = replace(state.model, network=model.network)
        state.batch = Batch(state.model, self._settings, self._clock)
        gauges = self.gauges
        gauges.load_seconds = self._clock() - began
        gauges.model_bytes, gauges.memory_used = model.weight_bytes, state.batch.memory_used
        gauges.warm = True

    def _warm(self, state: _State) -> None:
        """Raises what the loader raises."""
        if state.batch is not None:
            return
        self.gauges.loading = True
        try:
            began = self._clock()
            self._take_in(state, self._loader(self._settings), began)
        finally:
            self.gauges.loading = False

    def _cool(self, state: _State) -> None:
        """Raises EngineFailed if requests run."""
        if not state.idle:
            raise EngineFailed("the model has running requests")
        if state.batch is not None:
            state.batch.close()
            state.batch = None
            state.model = replace(state.model, network=None)
            self.gauges.warm = False
            self.gauges.memory_used = _release()

    def _change(self, state: _State, change: Change) -> None:
        outcome: EngineError | None = None
        try:
            if change.warm:
                self._warm(state)
            else:
                self._cool(state)
        except EngineError as error:
            outcome = error
        except Exception as error:
            log.exception("the model could not be %s", "loaded" if change.warm else "unloaded")
            outcome = EngineFailed(f"the MLX model could not be {'loaded' if change.warm else 'unloaded'}: {error}")
        self._show(state)
        self._post(partial(deliver, [(change.sink, outcome)]))

    def _take_commands(self, state: _State) -> bool:
        """Takes what has come in, sleeping if there is nothing else to do. False: stop."""
        block = state.idle
        if block and self.gauges.busy:
            self.gauges.busy = False
        while True:
            try:
                command = self._commands.get(block=block)
            except queue.Empty:
                return True
            if block:
                self.gauges.progress_at = self._clock()
                self.gauges.busy = True
            block = False
            if isinstance(command, _Stop):
                return False
            if isinstance(command, _Cancel):
                self._cancel(state, command.job)
            elif isinstance(command, Change):
                self._change(state, command)
            elif command.cancelled:
                pass
            elif isinstance(command, Job):
                state.waiting.append(command)
            else:
                state.embeds.append(command)

    def _cancel(self, state: _State, job: Job | EmbedJob) -> None:
        if not isinstance(job, Job):
            job.long = None
            if job in state.embeds:
                state.embeds.remove(job)
        elif job in state.waiting:
            state.waiting.remove(job)
        elif state.batch is not None:
            state.batch.remove(job)
        self._show(state)

    def _work(self, state: _State) -> None:
        """One step of everything: admit, one token for each sequence, one group of texts to embed."""
        outbox: Outbox = []
        if state.batch is None and not state.idle:
            self._warm_for_requests(state, outbox)
        if state.batch is not None:
            while state.waiting and not state.batch.full:
                state.batch.admit(state.waiting.popleft(), outbox)
            before = state.batch.steps
            if state.batch.running:
                state.batch.step(outbox)
            self.gauges.steps += state.batch.steps - before
            if state.embeds:
                self._embed(state, outbox)
                self.gauges.steps += 1
        self._show(state)
        if outbox:
            self._post(partial(deliver, outbox))

    def _warm_for_requests(self, state: _State, outbox: Outbox) -> None:
        """Load for who waits; if that fails, they have failed."""
        try:
            self._warm(state)
        except Exception as error:
            log.exception("the model could not be loaded")
            failed = error if isinstance(error, EngineError) else EngineFailed(f"the model does not load: {error}")
            left: tuple[Job | EmbedJob, ...] = (*state.waiting, *state.embeds)
            outbox += [(job.sink, failed) for job in left]
            state.waiting.clear()
            state.embeds.clear()

    def _embed(self, state: _State, outbox: Outbox) -> None:
        job = state.embeds[0]
        group = job.next_group(state.model.step_tokens)
        try:
            vectors = _vectors(state.model, job, group)
        except Exception as error:
            log.error("embedding failed: %s", privacy.where(error))
            state.embeds.popleft()
            job.long = None
            outbox.append((job.sink, EngineFailed(f"embedding failed ({privacy.kind(error)})")))
            return
        if vectors is None:
            return
        job.vectors.update(zip(group, vectors, strict=True))
        if job.done:
            state.embeds.popleft()
            outbox.append((job.sink, job.result()))

    def _show(self, state: _State) -> None:
        gauges = self.gauges
        batch = state.batch
        gauges.running = 0 if batch is None else len(batch.running)
        gauges.waiting = len(state.waiting) + len(state.embeds)
        gauges.kv_tokens = 0 if batch is None else batch.kv_tokens
        if batch is not None:
            gauges.memory_used = batch.memory_used
        gauges.progress_at = self._clock()

    def _end(self, state: _State | None, reason: str) -> None:
        """Everyone who still waits is told; then the model goes."""
        with self._closing:
            self._ended = reason
        outbox: Outbox = []
        with contextlib.suppress(queue.Empty):
            while True:
                command = self._commands.get_nowait()
                if not isinstance(command, _Stop | _Cancel):
                    outbox.append((command.sink, EngineFailed(reason)))
        if state is not None:
            for embed in state.embeds:
                embed.long = None
            left: tuple[Job | EmbedJob, ...] = (*state.running, *state.waiting, *state.embeds)
            outbox += [(job.sink, EngineFailed(reason)) for job in left]
            if state.batch is not None:
                with contextlib.suppress(Exception):
                    state.batch.close()
        self.gauges.running = self.gauges.waiting = self.gauges.kv_tokens = 0
        self.gauges.busy = self.gauges.warm = False
        self.gauges.failure = reason

        def tell() -> None:
            if self._loaded is not None and not self._loaded.done():
                self._loaded.set_exception(EngineFailed(reason))
            deliver(outbox)

        self._post(tell)

    def _post(self, call: Callable[[], Any]) -> None:
        # The loop may be gone already (interpreter shutdown): then nobody waits either.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(call)


def _vectors(model: Model, job: EmbedJob, group: list[int]) -> list[list[float]] | None:
    """One step towards the vectors of a group; None: there is more to compute first."""
    first = job.inputs[group[0]]
    if len(first) <= model.step_tokens:
        return embed_group(model.network, [job.inputs[i] for i in group])
    # Longer than a step may take: alone in its group.
    if job.long is None:
        job.long = LongText(model.network, first)
    vector = job.long.step(model.step_tokens)
    if vector is None:
        return None
    job.long = None
    return [vector]


def _release() -> int:
    """Gives back what nothing refers to any more; returns the bytes that MLX still holds."""
    import mlx.core as mx

    gc.collect()
    mx.clear_cache()
    return int(mx.get_active_memory())
