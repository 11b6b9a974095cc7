"""The Ollama engine: a sidecar beside `ollama serve`, on any host that runs one.

All work goes through Ollama's official client and one pool of connections. Importing this module is cheap and needs
neither; the client is imported when the engine is made.

What holds, and what does not:

- Nothing is truncated silently. `num_ctx` is always sent, a prompt that cannot fit is refused before Ollama sees it,
  and Ollama (0.12.6 and newer) is told to refuse what is left. Older versions cut prompts: there a prompt is refused
  unless it fits even if its tokens are short, and an answer to one that was cut nevertheless ends as an error.
- Ollama has no tokenizer to ask: before the answer, tokens are estimated at four bytes each (two with older versions).
  `count_tokens` has the prompt computed and so is exact, slow, and fills Ollama's prompt cache for the request itself.
- Slots are inferred from timings (see `_ollama/slots.py`), unless the setting `slots` says how many there are.
- A tool that must be called: what the model writes is constrained to one call. Ollama has no other way.
- Images of a message follow its text: Ollama keeps no order between them.
- Cached prompt tokens are not told apart; reasoning tokens are counted as pieces of the stream.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Sequence
from contextlib import ExitStack, aclosing, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

import msgspec

from model_servers.engine import (
    Delta,
    Embeddings,
    EngineError,
    EngineFailed,
    EngineLoad,
    EnginePlugin,
    EngineStatus,
    Feature,
    Finished,
    GenerationRequest,
    Health,
    ModelState,
    OutOfMemory,
    Progress,
    Sampling,
    UnknownModel,
    Unsupported,
)
from model_servers.engines._ollama import faults, wire
from model_servers.engines._ollama.catalogue import Catalogue, Loaded, features, shown
from model_servers.engines._ollama.connection import Connection
from model_servers.engines._ollama.names import is_remote, short_name
from model_servers.engines._ollama.settings import OllamaModel, OllamaSettings
from model_servers.engines._ollama.slots import Gate, SlotEstimate

__all__ = ["OllamaEngine", "OllamaModel", "OllamaSettings", "plugin"]

_log = logging.getLogger(__name__)

T = TypeVar("T")

_LOOK_SECONDS = 1.5
"""How long Ollama may take to say what it runs. With `poll_seconds` and one retry: gone is known within 5 s."""
_SHOW_SECONDS = 10.0
_SOON = 0.1
_LONGEST_PAUSE = 3.0
"""Seconds between looks for an Ollama that is gone."""
_FULL_LOOK_EVERY = 5
"""Looks per reading of the list of models."""
_UNLOAD_SECONDS = 30.0
_RETRY_SECONDS, _LONGEST_RETRY = 5.0, 600.0
"""Pause before a model that could not be pulled or warmed is tried again; doubles."""


class _Embedded(msgspec.Struct):
    """Answer of /api/embed."""

    embeddings: list[list[float]]
    prompt_eval_count: int = 0


@dataclass(frozen=True, slots=True)
class _Work:
    """A request inside Ollama."""

    cold: bool
    """The model had to be loaded for it."""
    answered: Callable[[], None]
    """To be called when the answer begins: the model is loaded then."""


class OllamaEngine:
    """Implements `model_servers.engine.Engine` and `ManagesModels`."""

    def __init__(self, settings: OllamaSettings | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Needs the `ollama` package: raises ImportError. `clock`: seconds, monotonic."""
        self._settings = settings or OllamaSettings()
        self._clock = clock
        self._connection = Connection(self._settings)
        self._catalogue = Catalogue(self._settings)
        self._estimate = SlotEstimate(self._settings.max_slots)
        self._gate = Gate(self._slots)
        self._inside: Counter[str] = Counter()
        """Requests inside Ollama, by model."""
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._wake = asyncio.Event()
        self._health, self._health_detail = Health.STARTING, "not started"
        self._retry_at: dict[str, tuple[float, float]] = {}
        """Models that could not be provided: when to try again (clock), and the pause after that."""
        self._resting: set[str] = set()
        """Models to keep warm that were unloaded on purpose, until someone asks for them."""
        self._stale = False
        """The list of models must be read again."""
        self._closed = False

    # ----------------------------------------------------------- lifecycle ---

    async def start(self) -> None:
        """Waits for Ollama; pulls and warms in the background. Raises EngineFailed with a cure."""
        if self._closed or self._health is not Health.STARTING:
            raise EngineFailed("the Ollama engine was started or closed before")
        give_up = self._clock() + self._settings.start_seconds
        while True:
            try:
                await self._look(full=True)
                break
            except EngineError as error:
                if self._closed or self._clock() >= give_up:
                    raise EngineFailed(str(error)) from None
            await asyncio.sleep(_SOON)
        self._health, self._health_detail = Health.READY, ""
        self._provide_wanted()
        self._spawn("watch", self._watch())

    async def close(self) -> None:
        """Leaves Ollama and its models as they are. Idempotent."""
        self._closed = True
        self._health, self._health_detail = Health.UNHEALTHY, "the Ollama engine was closed"
        self._gate.close(lambda: EngineFailed(self._health_detail))
        tasks = tuple(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._connection.close()

    def status(self) -> EngineStatus:
        """See Engine.status. Memory is the host's RAM where Ollama runs on this host, in bytes."""
        slots = self._slots()
        loaded = self._catalogue.loaded.values()
        inside = self._inside.total()
        return EngineStatus(
            engine="ollama",
            version=self._catalogue.version,
            device=_device(tuple(loaded)),
            memory_bytes=_own_memory() if _is_here(self._settings.url) else 0,
            models=self._catalogue.describe(),
            load=EngineLoad(
                slots=slots, running=min(inside, slots), waiting=max(0, inside - slots) + self._gate.waiting
            ),
            health=self._health,
            health_detail=self._health_detail,
            memory_used_bytes=sum(model.size for model in loaded),
            pool=self._connection.pool(),
        )

    def _slots(self) -> int:
        return self._settings.slots or self._estimate.slots

    # ---------------------------------------------------------------- work ---

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Delta | Finished, None]:
        """See Engine.generate."""
        retry = True
        while True:
            name = await self._provided(request.model)
            running = self._catalogue.running(name)
            call = wire.make_call(request, running)
            reader = wire.Reader(call, running)
            try:
                async with aclosing(self._answer(name, call, reader)) as lines:
                    async for line, queued in lines:
                        if line.done:
                            yield reader.finish(line, queued)
                        elif delta := reader.delta(line):
                            yield delta
                return
            except UnknownModel:
                if not (retry and self._may_pull(name)):
                    raise
                retry = False  # it was here a moment ago: pull it again

    async def embed(self, model: str, inputs: Sequence[str]) -> Embeddings:
        """See Engine.embed."""
        name = await self._provided(model)
        if Feature.EMBEDDING not in features(self._catalogue.here[name].abilities, self._catalogue.version):
            raise Unsupported(f"model {name!r} does not embed")
        if not inputs:
            return Embeddings((), 0)
        running = self._catalogue.running(name)
        for text in inputs:
            wire.make_call(GenerationRequest(name, prompt=text, sampling=Sampling(max_tokens=1)), running)
        body = {
            "model": name,
            "input": list(inputs),
            "truncate": False,
            "keep_alive": running.keep_alive,
            "options": {"num_ctx": running.num_ctx},
        }
        async with self._gate.hold():
            with self._at_work(name) as work:
                patience = self._settings.first_token_seconds + (self._settings.load_seconds if work.cold else 0)
                answer = await self._post("/api/embed", body, patience, "first_token_seconds", name)
                work.answered()
        try:
            found = msgspec.convert(answer, _Embedded)
        except ValueError:
            raise faults.garbage(self._settings.url) from None
        if len(found.embeddings) != len(inputs):
            raise faults.garbage(self._settings.url)
        return Embeddings(tuple(found.embeddings), found.prompt_eval_count)

    async def count_tokens(self, request: GenerationRequest) -> int:
        """See Engine.count_tokens: the prompt is computed, with one token of an answer that nobody reads."""
        name = await self._provided(request.model)
        running = self._catalogue.running(name)
        call = wire.make_call(dataclasses.replace(request, sampling=Sampling(max_tokens=1)), running)
        reader = wire.Reader(call, running)
        async with aclosing(self._answer(name, call, reader)) as lines:
            async for line, _ in lines:
                if line.done:
                    # A forced call was cut short, of course.
                    return reader.finish(msgspec.structs.replace(line, done_reason="length"), 0.0).usage.prompt_tokens
        raise AssertionError("an answer ends with its last line or with an error")

    async def _provided(self, model: str) -> str:
        """The name under which the model is here, after pulling it if that is wanted."""
        if self._health is not Health.READY:
            raise EngineFailed(self._health_detail)
        name = short_name(model)
        if name in self._catalogue.here:
            return name
        if not self._may_pull(name):
            raise UnknownModel(f"Ollama does not have {name!r}: fetch it with `ollama pull {name}`, or set auto_pull")
        async with aclosing(self.pull(name)) as steps:
            async for _ in steps:
                pass
        return name

    def _may_pull(self, name: str) -> bool:
        """Only what the settings name is ever fetched because of a request."""
        return self._settings.auto_pull and name in self._catalogue.wanted

    async def _answer(
        self, name: str, call: wire.Call, reader: wire.Reader
    ) -> AsyncGenerator[tuple[wire.Line, float], None]:
        """The lines of an answer, the last one done; with it the seconds in queues, ours and Ollama's."""
        settings = self._settings
        arrived = self._clock()
        async with self._gate.hold():
            entered = self._clock()
            beside, alone_of_its_kind = self._inside[name], self._inside.total() == self._inside[name]
            with self._at_work(name) as work:
                patience = settings.first_token_seconds + (settings.load_seconds if work.cold else 0)
                setting = "first_token_seconds"
                async with aclosing(self._connection.stream(call)) as lines:
                    while True:
                        line = await self._next(lines, patience, setting, name, reader.started)
                        patience, setting = settings.stall_seconds, "stall_seconds"
                        work.answered()
                        if line.done:
                            await self._connection.drain(lines)
                            break
                        yield line, 0.0
                if work.cold and line.load_duration:
                    self._catalogue.load_seconds[name] = line.load_duration / 1e9
            if alone_of_its_kind:
                self._estimate.observe(beside, line.waited, line.worked)
        # The place is given back before the consumer has read the end.
        yield line, entered - arrived + line.waited

    async def _next(
        self, parts: AsyncGenerator[T, None], patience: float, setting: str, name: str, started: bool = False
    ) -> T:
        try:
            async with asyncio.timeout(patience):
                return await anext(parts)
        except TimeoutError:
            self._wake.set()
            raise faults.silent(patience, setting) from None
        except StopAsyncIteration:
            raise EngineFailed("Ollama ended its answer without a result: see the log of `ollama serve`") from None
        except Exception as error:
            raise self._failure(error, name, started=started) from None

    async def _post(self, path: str, body: dict[str, Any], patience: float, setting: str, name: str) -> dict[str, Any]:
        try:
            return await self._connection.post(path, body, patience, setting, name)
        except EngineError as error:
            raise self._failure(error, name) from None

    def _failure(self, error: Exception, name: str, *, started: bool = False) -> EngineError:
        """The engine's error, after drawing conclusions from it."""
        if self._closed:
            return EngineFailed(self._health_detail)
        found = self._connection.translate(error, name, started=started)
        if isinstance(found, UnknownModel):
            self._catalogue.here.pop(name, None)  # removed behind our back, or so it seems
            self._stale = True
        if isinstance(found, (UnknownModel, EngineFailed)):
            self._wake.set()  # look now
        return found

    @contextmanager
    def _at_work(self, name: str) -> Iterator[_Work]:
        """While inside, a request is inside Ollama."""
        self._resting.discard(name)
        self._inside[name] += 1
        try:
            with ExitStack() as loading:
                cold = name not in self._catalogue.loaded
                if cold:
                    loading.enter_context(self._catalogue.doing(name, ModelState.LOADING))

                def answered() -> None:
                    loading.close()
                    if name not in self._catalogue.loaded:
                        self._catalogue.loaded[name] = Loaded()
                        self._wake.set()  # for its size

                yield _Work(cold, answered)
        finally:
            self._inside[name] -= 1

    # -------------------------------------------------------------- models ---

    async def pull(self, model: str) -> AsyncGenerator[Progress, None]:
        """See ManagesModels.pull. Several at a time share one download in Ollama; what is there stays there."""
        name = short_name(model)
        layers: dict[str, tuple[int, int]] = {}
        status = ""
        with self._catalogue.doing(name, ModelState.PULLING) as step:
            async with aclosing(self._connection.pull(name)) as lines:
                while status != "success":
                    # Between the pieces large files are verified, which takes as long as reading them.
                    line = await self._next(lines, self._settings.load_seconds, "load_seconds", name)
                    status = line.status or ""
                    if line.digest:
                        layers[line.digest] = line.completed or 0, line.total or 0
                    completed, total = map(sum, zip(*layers.values(), strict=True)) if layers else (0, 0)
                    step.detail = f"{completed / total:.0%} of {total / 1e9:.2f} GB" if total else status
                    yield Progress(ModelState.PULLING, status, completed, total)
                await self._connection.drain(lines)
            await self._read_models()
        if name not in self._catalogue.here:
            raise EngineFailed(f"Ollama says that {name!r} is pulled, but does not list it")
        self._catalogue.failed.pop(name, None)
        state, _ = self._catalogue.state(name)
        yield Progress(state, status, completed, total)

    async def load(self, model: str) -> AsyncGenerator[Progress, None]:
        """See ManagesModels.load. What else is in memory may have to go: Ollama decides."""
        name = self._known(model)
        self._resting.discard(name)
        running, size = self._catalogue.running(name), self._catalogue.here[name].size
        body = wire.load_body(running)
        path = "/api/generate"
        if not self._catalogue.here[name].generates:
            path, body = "/api/embed", {key: body[key] for key in ("model", "keep_alive", "options")} | {"input": []}
        was_loaded = name in self._catalogue.loaded
        with self._catalogue.doing(name, ModelState.LOADING):
            yield Progress(ModelState.LOADING, total_bytes=size)
            began = self._clock()
            try:
                await self._post(path, body, self._settings.load_seconds, "load_seconds", name)
            except OutOfMemory as error:
                self._catalogue.failed[name] = str(error)
                raise
            if not was_loaded:
                self._catalogue.load_seconds[name] = self._clock() - began
            await self._read_running()
        self._catalogue.failed.pop(name, None)
        yield Progress(ModelState.WARM, completed_bytes=size, total_bytes=size)

    async def unload(self, model: str) -> AsyncGenerator[Progress, None]:
        """See ManagesModels.unload. A model to keep warm rests until someone asks for it again."""
        name = self._known(model)
        self._resting.add(name)
        body = wire.load_body(self._catalogue.running(name), keep_alive=0)
        await self._post("/api/generate", body, _UNLOAD_SECONDS, "load_seconds", name)
        give_up = self._clock() + _UNLOAD_SECONDS
        await self._read_running()
        while name in self._catalogue.loaded:
            if self._clock() >= give_up:
                raise EngineFailed(f"{name!r} is still in memory {_UNLOAD_SECONDS:g} s after it was to go")
            yield Progress(ModelState.WARM, "waiting for Ollama to let it go")
            await asyncio.sleep(_SOON)
            await self._read_running()
        yield Progress(ModelState.COLD)

    def _known(self, model: str) -> str:
        name = short_name(model)
        if name not in self._catalogue.here:
            raise UnknownModel(f"Ollama does not have {name!r}: fetch it with `ollama pull {name}`")
        return name

    # ------------------------------------------------------- looking after ---

    async def _look(self, *, full: bool) -> None:
        """Asks Ollama what it has and runs. Raises EngineError."""
        version = await self._connection.version(_LOOK_SECONDS)
        if full or version != self._catalogue.version:
            self._catalogue.version = version
            await self._read_models()
        await self._read_running()

    async def _read_models(self) -> None:
        connection, known = self._connection, self._catalogue.here
        listed = await connection.ask(lambda client: client.list(), _LOOK_SECONDS, "poll_seconds")
        here = {}
        for model in listed.models:
            name = short_name(model.model or "")
            if not name or (is_remote(name) and name not in self._catalogue.wanted):
                continue  # the cloud's models cost money: only who names them gets them
            digest = model.digest or ""
            if name in known and known[name].digest == digest:
                here[name] = known[name]
                continue
            try:
                answer = await connection.ask(
                    lambda client, name=name: client.show(name),  # type: ignore[misc]
                    _SHOW_SECONDS,
                    "poll_seconds",
                )
            except faults.NoConnection:
                raise
            except EngineError as error:
                _log.warning("Ollama does not describe its model %s: %s", name, error)
                continue
            here[name] = shown(digest, int(model.size or 0), answer)
        self._catalogue.here = here
        self._stale = False

    async def _read_running(self) -> None:
        running = await self._connection.ask(lambda client: client.ps(), _LOOK_SECONDS, "poll_seconds")
        self._catalogue.loaded = {
            short_name(model.model or model.name or ""): Loaded(
                int(model.size or 0), int(model.size_vram or 0), model.context_length or 0
            )
            for model in running.models
        }
        for name in self._catalogue.loaded:
            self._catalogue.failed.pop(name, None)

    async def _watch(self) -> None:
        """Follows what Ollama does, and whether it is there at all."""
        looks = misses = 0
        while True:
            pause = self._settings.poll_seconds
            if misses:
                lost = self._health is Health.UNHEALTHY
                pause = min(pause * 1.5**misses, _LONGEST_PAUSE) if lost else _SOON
            try:
                async with asyncio.timeout(pause):
                    await self._wake.wait()
            except TimeoutError:
                pass
            self._wake.clear()
            looks += 1
            try:
                await self._look(full=self._stale or looks % _FULL_LOOK_EVERY == 0)
            except EngineError as error:
                misses += 1
                self._stale = True
                if misses > 1 or isinstance(error, faults.NoConnection):
                    self._lose(str(error))
            else:
                misses = 0
                self._find()
                self._provide_wanted()

    def _lose(self, why: str) -> None:
        if self._health is Health.READY:
            _log.warning("Ollama is gone: %s", why)
        self._health, self._health_detail = Health.UNHEALTHY, why
        self._catalogue.loaded = {}

    def _find(self) -> None:
        if self._health is Health.UNHEALTHY:
            _log.info("Ollama is back, version %s", self._catalogue.version)
            self._estimate = SlotEstimate(self._settings.max_slots)  # it may have been started differently
            self._retry_at.clear()
        self._health, self._health_detail = Health.READY, ""

    def _provide_wanted(self) -> None:
        """Starts pulling and warming what the settings ask for and is not so."""
        now = self._clock()
        for name in self._catalogue.wanted:
            absent = name not in self._catalogue.here
            cold = name in self._settings.warm and name not in self._catalogue.loaded and name not in self._resting
            due, pause = self._retry_at.get(name, (0.0, 0.0))
            if ((absent and self._settings.auto_pull) or (cold and not absent)) and now >= due:
                pause = min(max(2 * pause, _RETRY_SECONDS), _LONGEST_RETRY)
                self._spawn(f"provide {name}", self._provide(name, cold, pause))

    async def _provide(self, name: str, warm: bool, pause: float) -> None:
        """Pulls what is absent, and loads what is to be warm."""
        try:
            if name not in self._catalogue.here:
                await self._pull_with_log(name)
            if warm:
                async with aclosing(self.load(name)) as steps:
                    async for _ in steps:
                        pass
                _log.info("model %s is warm", name)
        except EngineError as error:
            self._catalogue.failed[name] = str(error)
            self._retry_at[name] = self._clock() + pause, pause
            _log.warning("model %s cannot be provided, next try in %.0f s: %s", name, pause, error)
        else:
            self._retry_at.pop(name, None)

    async def _pull_with_log(self, name: str) -> None:
        _log.info("pulling model %s", name)
        told = 0
        async with aclosing(self.pull(name)) as steps:
            async for step in steps:
                tenths = 10 * step.completed_bytes // step.total_bytes if step.total_bytes else 0
                if tenths > told:
                    told = tenths
                    _log.info("pulling model %s: %d %% of %.2f GB", name, 10 * tenths, step.total_bytes / 1e9)

    def _spawn(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        """Runs it beside everything else, once at a time."""
        if self._closed or name in self._tasks:
            work.close()
            return
        task = self._tasks[name] = asyncio.create_task(work, name=f"ollama: {name}")
        task.add_done_callback(lambda _: self._ended(name, task))

    def _ended(self, name: str, task: asyncio.Task[None]) -> None:
        self._tasks.pop(name, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._health, self._health_detail = Health.UNHEALTHY, f"a background task of the engine failed: {name}"
            _log.error("%s", self._health_detail, exc_info=error)


def _device(loaded: Sequence[Loaded]) -> str:
    """What the models in memory run on, which is all that Ollama tells of the host."""
    size, on_gpu = sum(model.size for model in loaded), sum(model.size_vram for model in loaded)
    if not size:
        return ""
    return "CPU" if not on_gpu else "GPU" if on_gpu >= size else "GPU and CPU"


def _is_here(url: str) -> bool:
    return urlsplit(url).hostname in ("localhost", "127.0.0.1", "::1")


def _own_memory() -> int:
    """Bytes of RAM of this host; 0 where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return 0


plugin = EnginePlugin(name="ollama", settings=OllamaSettings, create=OllamaEngine, extra="ollama")
