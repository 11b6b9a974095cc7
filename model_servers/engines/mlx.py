"""The MLX engine: models on Apple silicon, and on plain Linux CPUs.

One model per engine, generated in a continuous batch of `slots` sequences by one dedicated thread (see
`_mlx/worker.py`). Importing this module is cheap and needs neither MLX nor mlx_lm; both are imported when the engine
starts.

What holds, and what does not:

- Seeds: each sequence draws with a random key of its own, so its output does not depend on its neighbours, except
  where two tokens are equally likely to within rounding: the shape of a batch changes the order of float additions.
  In float32 (the default on a CPU) that is about one part in a million; in 16 bits it is visible.
- Log-probabilities are the model's own: natural, before penalties, grammar and temperature.
- Absent sampling parameters come from the model's generation_config.json; without one, decoding is greedy.
- A call that the model makes of a tool that was not offered is passed on as text, not as a call.
- A consumer that does not read is not waited for: one sequence of a batch cannot be paused. What is queued for it is
  bounded by the answer's length; closing the generator ends it.
- A forced tool call is exactly one call. JSON output beside optional tools: the JSON, or calls.
- Unloading frees the weights and every cache; tokenizer and grammar stay, so that prompts can be counted. Loading
  cannot be interrupted, and neither can a step of MLX: a thread that is stuck in one is left behind (see `restart`).
- An answer that was cut off (FinishReason.LENGTH) is not valid JSON just because a schema was asked for.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import TypeVar

from model_servers.engine import (
    Busy,
    Delta,
    Embeddings,
    EngineError,
    EngineFailed,
    EngineLoad,
    EngineModel,
    EnginePlugin,
    EngineStatus,
    Feature,
    Finished,
    GenerationRequest,
    Health,
    ModelState,
    Progress,
    TaskType,
    UnknownModel,
    Unsupported,
)
from model_servers.engines._mlx.jobs import EmbedJob, Job
from model_servers.engines._mlx.loading import Model, describe, load
from model_servers.engines._mlx.prompting import embedding_tokens, make_plan, make_prompt, pieces, weight
from model_servers.engines._mlx.settings import (
    BUNDLED,
    BUNDLED_CAPABILITIES,
    DEFAULT_CAPABILITIES,
    MlxSettings,
)
from model_servers.engines._mlx.worker import Worker

__all__ = ["MlxEngine", "MlxSettings", "plugin"]

T = TypeVar("T")

_log = logging.getLogger(__name__)

_THREAD_SECONDS = 5.0
"""How long the engine thread may take to end after its current step."""
_SHORT_TEXT = 1 << 15
"""Characters that are tokenized within some tens of milliseconds."""

_TASK_TYPES = {task.name.lower(): task for task in TaskType}


class MlxEngine:
    """Implements `Engine`, `ManagesModels` and `Restarts` of `model_servers.engine`."""

    def __init__(
        self,
        settings: MlxSettings | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        loader: Callable[[MlxSettings], Model] = load,
        thread_seconds: float = _THREAD_SECONDS,
    ) -> None:
        """`clock` (seconds, monotonic) and `loader` are also called on the engine thread.

        `thread_seconds`: after how long a thread that does not end counts as stuck.
        """
        self._loader = loader
        self._thread_seconds = thread_seconds
        self._settings = settings or MlxSettings()
        self._clock = clock
        self._worker: Worker | None = None
        self._model: Model | None = None
        self._described: tuple[EngineModel, ...] = ()
        self._open = 0
        """Requests whose caller has not seen the end."""
        self._preparing = 0
        """Of those: on the text thread."""
        self._closed = False
        # Templates, tokenizing and grammars: too slow for the event loop, no business of the engine thread. Long texts
        # have a thread of their own, so that short ones never wait for them.
        self._text = ThreadPoolExecutor(max_workers=1, thread_name_prefix="mlx-text")
        self._long_text = ThreadPoolExecutor(max_workers=1, thread_name_prefix="mlx-long-text")

    # ----------------------------------------------------------- lifecycle ---

    async def start(self) -> None:
        """Loads the model, or with `lazy` describes it. Raises EngineFailed with a cure.

        May be called again once the engine has failed.
        """
        if self._closed or (self._worker is not None and not self._worker.gauges.failure):
            raise EngineFailed("the MLX engine was started or closed before")
        unknown = set(self._settings.capabilities or ()) - set(_TASK_TYPES)
        if unknown:
            raise EngineFailed(f"unknown capabilities {sorted(unknown)}; known are {', '.join(_TASK_TYPES)}")
        self._model = None  # of a thread that died
        self._worker = Worker(self._settings, asyncio.get_running_loop(), self._clock, self._loader, describe)
        model = await self._worker.start()
        if self._closed:
            raise EngineFailed("the MLX engine was closed while it started")
        self._model = model
        self._described = (_describe(self._settings, model),)

    async def close(self) -> None:
        """Ends the thread after its current step and frees the model. Idempotent."""
        self._closed = True
        self._model = None
        if self._worker is not None and not await self._end_thread(self._worker):
            _log.error("the MLX engine thread is stuck in a computation and is left behind")
        self._text.shutdown(wait=False)
        self._long_text.shutdown(wait=False)

    async def _end_thread(self, worker: Worker) -> bool:
        """Whether the thread has ended."""
        worker.stop()
        if worker.thread.ident is not None:
            await asyncio.get_running_loop().run_in_executor(None, worker.thread.join, self._thread_seconds)
        return not worker.thread.is_alive()

    async def restart(self) -> None:
        """See Restarts: a new thread, and the model loaded anew. A thread that is stuck cannot be ended from here."""
        if self._closed:
            raise EngineFailed("the MLX engine was closed")
        if self._worker is not None and not await self._end_thread(self._worker):
            raise EngineFailed(
                "the MLX engine thread is stuck in a computation and cannot be ended; restart the model server "
                "(with exit_when_stuck it ends by itself, for a supervisor to start it again)"
            )
        await self.start()

    # -------------------------------------------------------------- models ---

    async def pull(self, model: str) -> AsyncGenerator[Progress, None]:
        """See ManagesModels. The one model is here, or the engine had not started."""
        worker = self._known(model)
        yield Progress(ModelState.WARM if worker.gauges.warm else ModelState.COLD)

    async def load(self, model: str) -> AsyncGenerator[Progress, None]:
        """See ManagesModels."""
        worker = self._known(model)
        yield Progress(ModelState.LOADING, total_bytes=worker.gauges.model_bytes)
        await worker.change(warm=True)
        size = worker.gauges.model_bytes
        yield Progress(ModelState.WARM, completed_bytes=size, total_bytes=size)

    async def unload(self, model: str) -> AsyncGenerator[Progress, None]:
        """See ManagesModels. Raises EngineFailed if requests are running."""
        await self._known(model).change(warm=False)
        yield Progress(ModelState.COLD)

    def _known(self, model: str) -> Worker:
        return self._ready(model)[0]

    def status(self) -> EngineStatus:
        """See Engine.status. Memory is what models can use on the device, in bytes."""
        worker, model = self._worker, self._model
        health, detail = self._health()
        load = EngineLoad(slots=self._settings.slots)
        models, used, steps = self._described, 0, 0
        if worker is not None and model is not None:
            gauges = worker.gauges
            load = EngineLoad(
                slots=self._settings.slots,
                running=gauges.running,
                waiting=self._preparing + worker.waiting,
                kv_cache_utilization=min(1.0, gauges.kv_tokens / (self._settings.slots * model.context_length)),
            )
            state = ModelState.WARM if gauges.warm else ModelState.LOADING if gauges.loading else ModelState.COLD
            models = tuple(
                replace(each, state=state, memory_bytes=gauges.model_bytes, load_seconds=gauges.load_seconds)
                for each in models
            )
            used, steps = gauges.memory_used, gauges.steps
        return EngineStatus(
            engine="mlx",
            version=model.version if model else "",
            device=model.device if model else "",
            memory_bytes=model.memory_bytes if model else 0,
            models=models,
            load=load,
            health=health,
            health_detail=detail,
            memory_used_bytes=used,
            progress=steps,
        )

    def _health(self) -> tuple[Health, str]:
        if self._closed:
            return Health.UNHEALTHY, "the MLX engine was closed"
        if self._worker is None:
            return Health.STARTING, "not started"
        gauges = self._worker.gauges
        if gauges.failure:
            return Health.UNHEALTHY, gauges.failure
        if self._model is None:
            return Health.STARTING, "loading the model"
        silent = self._clock() - gauges.progress_at
        if gauges.busy and not gauges.loading and silent > self._settings.stall_seconds:
            return Health.UNHEALTHY, f"no progress for {silent:.0f} s with work in hand"
        return Health.READY, ""

    # ---------------------------------------------------------------- work ---

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Delta | Finished, None]:
        """See Engine.generate."""
        worker, model = self._ready(request.model)
        self._check_room()
        submitted = self._clock()
        self._open += 1
        job: Job | None = None
        try:
            plan = await self._off_loop(lambda: make_plan(model, request), weight(request))
            job = Job(plan, asyncio.Queue(), submitted)
            worker.submit(job)
            while True:
                item = await job.sink.get()
                if isinstance(item, EngineError):
                    job = None
                    raise item
                if isinstance(item, Finished):
                    job = None
                    yield item
                    return
                yield item
        finally:
            self._open -= 1
            if job is not None:
                worker.cancel(job)

    async def embed(self, model: str, inputs: Sequence[str]) -> Embeddings:
        """See Engine.embed: means of the last hidden states over all positions, scaled to length 1."""
        worker, loaded = self._ready(model)
        if Feature.EMBEDDING not in loaded.features:
            raise Unsupported(f"the architecture of model {loaded.name} gives no hidden states to embed with")
        if not inputs:
            return Embeddings(vectors=(), prompt_tokens=0)
        self._check_room()
        self._open += 1
        job = None
        try:
            tokens: list[list[int]] = []
            size = sum(map(len, inputs))
            # In pieces: others come in between, and cancelling ends it.
            for piece in pieces(inputs, _SHORT_TEXT):
                tokens += await self._off_loop(partial(_tokenize, loaded, piece), size)
            job = EmbedJob(tokens, asyncio.Queue())
            worker.submit(job)
            outcome = await job.sink.get()
            job = None
        finally:
            self._open -= 1
            if job is not None:
                worker.cancel(job)
        if isinstance(outcome, EngineError):
            raise outcome
        return Embeddings(vectors=tuple(outcome), prompt_tokens=sum(len(one) for one in tokens))

    async def count_tokens(self, request: GenerationRequest) -> int:
        """See Engine.count_tokens."""
        _, model = self._ready(request.model)
        prompt = await self._off_loop(lambda: make_prompt(model, request), weight(request))
        return len(prompt.tokens)

    def _ready(self, name: str) -> tuple[Worker, Model]:
        health, detail = self._health()
        worker, model = self._worker, self._model
        if worker is None or model is None or (health is Health.UNHEALTHY and worker.gauges.failure):
            raise EngineFailed(detail or "the MLX engine is not running")
        if name != model.name:
            raise UnknownModel(f"this engine has the model {model.name!r}, not {name!r}")
        return worker, model

    def _check_room(self) -> None:
        if self._open >= self._settings.slots + self._settings.max_waiting:
            raise Busy(f"{self._settings.slots} slots and {self._settings.max_waiting} waiting places are taken")

    async def _off_loop(self, call: Callable[[], T], size: int) -> T:
        """`size`: characters of the whole request."""
        thread = self._text if size <= _SHORT_TEXT else self._long_text
        self._preparing += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(thread, call)
        finally:
            self._preparing -= 1


def _tokenize(model: Model, texts: Sequence[str]) -> list[list[int]]:
    return [embedding_tokens(model, text) for text in texts]


def _describe(settings: MlxSettings, model: Model) -> EngineModel:
    scores = settings.capabilities
    if scores is None:
        scores = BUNDLED_CAPABILITIES if settings.model == BUNDLED else DEFAULT_CAPABILITIES
    # A kind of work whose feature is missing must not be offered.
    needs = {"embedding": Feature.EMBEDDING, "tool_use": Feature.FUNCTION_CALLING}
    return EngineModel(
        name=model.name,
        provider=settings.provider,
        context_length=model.context_length,
        capabilities={
            int(_TASK_TYPES[task]): score
            for task, score in scores.items()
            if needs.get(task, Feature.NONE) in model.features
        },
        features=model.features,
        quantization=model.quantization,
    )


plugin = EnginePlugin(name="mlx", settings=MlxSettings, create=MlxEngine, extra="mlx")
