"""vLLM over its HTTP API: beside a running `vllm serve`, or starting and supervising the server itself.

Importing this module is cheap and needs neither aiohttp nor vLLM. vLLM is never imported: it may live in an environment
of its own (`python`).

What holds, and what does not:

- A prompt that may not fit is counted with /tokenize before it is sent; one that fits whatever its tokens are is not.
- Tokens per piece are exact, and so is `count_tokens`.
- Calls keep to the tool's schema: `strict` is set, without which vLLM 0.32 lets arguments be anything.
- Tools need --enable-auto-tool-choice and --tool-call-parser; cached tokens are told only with
  --enable-prompt-tokens-details. What is missing is found out when the server appears, and then not offered.
- Without max_tokens an answer may be as long as the model's generation_config.json says, where it says so.
- More than four stop strings are looked for here, where vLLM is somebody else's.
- Weak models may fill JSON with blanks without end: --structured-outputs-config with disable_any_whitespace helps.
- Images are shown to models that take them; what takes them is found out with /tokenize.
- A process that the engine owns gets a free port of the loopback interface. It is started again when it ends.
"""

from __future__ import annotations

import asyncio
import logging
import re
import sys
import time
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import msgspec
from pydantic import Field, field_validator

from model_servers.engine import (
    ContextTooLong,
    CredentialsRejected,
    Delta,
    Embeddings,
    Engine,
    EngineFailed,
    EngineLoad,
    EngineModel,
    EnginePlugin,
    EngineStatus,
    Feature,
    Finished,
    GenerationRequest,
    Health,
    Image,
    UnknownModel,
    Unsupported,
)
from model_servers.engines._openai import errors, requests
from model_servers.engines._openai.dialect import MOST_STOPS, Dialect
from model_servers.engines._openai.errors import Source
from model_servers.engines._openai.keys import Key
from model_servers.engines._openai.settings import (
    NamedModel,
    base_address,
    describe,
    features_of,
    known_features,
    known_kinds,
)
from model_servers.engines._openai.slots import Slots
from model_servers.engines._openai.watch import Watch
from modelyard.openai import wire
from modelyard.program.settings import Settings

if TYPE_CHECKING:
    from model_servers.engines._vllm.metrics import Metrics
    from model_servers.engines._vllm.process import Process

__all__ = ["OwnedVllmEngine", "VllmEngine", "VllmSettings", "plugin"]

_log = logging.getLogger(__name__)

DIALECT = Dialect(max_stops=4, strict="always", continuous_usage=True)
"""Four stop strings are what vLLM takes since 0.32, unless VLLM_MAX_STOP_STRINGS says otherwise."""
DEFAULT_SLOTS = 256
"""vLLM's own --max-num-seqs on most devices."""
_LOOK_SECONDS = 3.0
_LIST_EVERY = 10
"""Looks between two lists of models: LoRA adapters come and go."""
_KEEP_ALIVE = 4.0
"""Seconds; the server itself closes idle connections after 5."""
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 60.0
_TAIL_LINES = 5
_OWN_FLAGS = ("model", "served-model-name", "host", "port", "api-key", "trust-remote-code")


class VllmSettings(Settings):
    """Settings of the engine vllm."""

    base_url: str = Field("http://127.0.0.1:8000", description="Where `vllm serve` runs. Not used with `model`.")
    model: str = Field(
        "",
        description="Folder or hub id of a model: the engine starts vLLM with it, and ends it. Empty: use `base_url`.",
    )
    name: str = Field("", description="With `model`: its public name. Empty: the folder's name or the hub id.")
    python: str = Field("", description="With `model`: interpreter of the environment that has vLLM. Empty: this one.")
    command: tuple[str, ...] = Field(
        (), description="With `model`: what to run in place of `python -m vllm.entrypoints.openai.api_server`."
    )
    serve_args: tuple[str, ...] = Field((), description="With `model`: more arguments for vLLM.")
    environment: dict[str, str] = Field(
        default_factory=dict, description="With `model`: more environment variables for vLLM."
    )
    allow_download: bool = Field(False, description="With `model`: fetch a hub id that is not in the local cache.")
    start_seconds: float = Field(900.0, gt=0, description="With `model`: longest that vLLM may take to start.")
    stop_seconds: float = Field(10.0, ge=0, description="With `model`: time that vLLM has to end before it is killed.")
    provider: str = Field("vllm", min_length=1, description="Who is named as the provider of the models.")
    models: tuple[NamedModel, ...] = Field(
        (), description="What holds for single models, by name; others that the server has are offered all the same."
    )
    capabilities: dict[str, float] | None = Field(
        None, description="Kind of work to score in [0, 1], for models that do not say their own."
    )
    features: tuple[str, ...] | None = Field(
        None, description="What models can do that do not say their own. Empty: found out when the server appears."
    )
    slots: int | None = Field(
        None,
        ge=1,
        le=65536,
        description="Requests sent at the same time. Empty: --max-num-seqs of `serve_args`, or 256.",
    )
    device: str = Field("", description="What vLLM runs on, for people: it does not tell.")
    memory_bytes: int = Field(0, ge=0, description="Memory of that device. 0: not known.")
    api_key_env: str = Field("", description="Environment variable that holds the key of a server started with one.")
    api_key_file: str = Field("", description="File that holds that key; wins over `api_key_env`.")
    embedding_batch: int = Field(256, ge=1, le=2048, description="Most texts in one request for embeddings.")
    connect_seconds: float = Field(5.0, gt=0, description="Longest a connection may take.")
    first_token_seconds: float = Field(120.0, gt=0, description="Longest wait for the first piece of an answer.")
    stall_seconds: float = Field(30.0, gt=0, description="Longest pause between pieces of an answer.")
    poll_seconds: float = Field(1.0, gt=0, description="Seconds between looks at /metrics and /health.")

    @field_validator("models", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        return tuple({"name": one} if isinstance(one, str) else one for one in value) if value else ()

    @field_validator("base_url")
    @classmethod
    def _address(cls, value: str) -> str:
        return base_address(value).removesuffix("/v1")

    @field_validator("serve_args")
    @classmethod
    def _no_own_flags(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for argument in value:
            flag = argument.split("=")[0].lstrip("-").replace("_", "-").lower()
            # The parser of vLLM takes beginnings of flags for the flags.
            if (
                argument.startswith("-")
                and len(flag) > 1
                and (flag in _OWN_FLAGS or (flag.startswith("tr") and "trust-remote-code".startswith(flag)))
            ):
                raise ValueError(f"{argument.split('=')[0]} is not taken: the engine sets it, or never allows it")
        return value

    @field_validator("capabilities")
    @classmethod
    def _known_kinds(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        return known_kinds(value)

    @field_validator("features")
    @classmethod
    def _known_features(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        return known_features(value)

    def slot_count(self) -> int:
        told = re.search(r"--max[-_]num[-_]seqs[= ](\d+)(?: |$)", " ".join(self.serve_args))
        return self.slots or (max(1, int(told[1])) if told else DEFAULT_SLOTS)

    def public_name(self) -> str:
        if self.name:
            return self.name
        folder = Path(self.model).expanduser()
        return folder.resolve().name if folder.is_dir() else self.model


class _Listed(wire.Wire):
    id: str
    parent: str | None = None
    """Of a LoRA adapter: its base model."""
    max_model_len: int | None = None


class _List(wire.Wire):
    data: list[_Listed]


class _Version(wire.Wire):
    version: str = ""


class _Tokenized(wire.Wire):
    count: int


class VllmEngine:
    """A vLLM that somebody else runs. Implements `model_servers.engine.Engine`."""

    _dialect = DIALECT

    def __init__(self, settings: VllmSettings, *, env: dict[str, str] | None = None) -> None:
        """`env`: where keys are looked for; None: the environment of the process."""
        from model_servers.engines._openai.calls import Calls
        from model_servers.engines._openai.transport import Patience, Transport
        from model_servers.engines._vllm import abilities, metrics

        self._settings = settings
        self._abilities, self._parse_metrics = abilities, metrics.parse
        self._key = Key(settings.api_key_env, settings.api_key_file, env=env)
        self._source = Source(self._name(), self._key.origin)
        slots = settings.slot_count()
        self._transport = Transport(
            f"{settings.base_url}/v1",
            source=self._source,
            headers=self._key.headers,
            pool_size=slots + 2,  # counting and looking need no slot
            patience=Patience(settings.connect_seconds, settings.first_token_seconds, settings.stall_seconds),
            keep_alive=_KEEP_ALIVE,
        )
        self._root = settings.base_url
        self._calls = Calls(self._transport, self._source, self._dialect, settings.embedding_batch)
        self._slots = Slots(slots)
        self._watch = Watch(self._source.name, self._look, every=settings.poll_seconds)
        self._models: dict[str, EngineModel] = {}
        self._version = ""
        self._metrics: Metrics = metrics.Metrics()
        self._others = 0
        """Requests of others that the server had at the last look."""
        self._looks_left = 0
        """Until the models are listed again."""
        self._examined: dict[str, Feature] = {}
        """What was found out about base models since the server appeared."""
        self._load_seconds: float | None = None
        self._closed = False

    def _name(self) -> str:
        return f"vLLM at {urlsplit(self._settings.base_url).netloc}"

    async def start(self) -> None:
        """Raises EngineFailed without a key. A server that is not there makes the engine unhealthy, until it is."""
        self._key.read()
        await self._watch.start()

    async def close(self) -> None:
        self._closed = True
        await self._watch.stop()
        self._slots.close()
        await self._transport.close()

    def status(self) -> EngineStatus:
        health, detail = self._health()
        own, polled = self._slots, self._metrics
        # Those of this engine are counted here; what others sent, and how many wait inside, the last look told.
        inside = own.running + self._others
        waiting = min(polled.waiting, inside)
        return EngineStatus(
            engine=plugin.name,
            version=self._version,
            device=self._settings.device,
            memory_bytes=self._settings.memory_bytes,
            models=tuple(self._models.values()),
            load=EngineLoad(own.size, inside - waiting, own.waiting + waiting, polled.cache),
            health=health,
            health_detail=detail,
            pool=self._transport.pool(),
        )

    def _health(self) -> tuple[Health, str]:
        if self._closed:
            return Health.UNHEALTHY, "the engine was closed"
        return self._watch.health, self._watch.detail

    # ---------------------------------------------------------------- work ---

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Delta | Finished, None]:
        """See Engine.generate."""
        model = self._known(request.model)
        loop = asyncio.get_running_loop()
        arrived = loop.time()
        async with self._slots.hold():
            queued = loop.time() - arrived
            try:
                await self._check_room(request, model)
                async with aclosing(self._calls.generate(request)) as items:
                    async for item in items:
                        yield replace(item, queued=queued) if isinstance(item, Finished) else item
            except (EngineFailed, CredentialsRejected):
                self._watch.doubt()
                raise

    async def embed(self, model: str, inputs: Sequence[str]) -> Embeddings:
        """See Engine.embed."""
        if Feature.EMBEDDING not in self._known(model).features:
            raise Unsupported(f"model {model!r} does not embed")
        async with self._slots.hold():
            try:
                return await self._calls.embed(model, inputs)
            except (EngineFailed, CredentialsRejected):
                self._watch.doubt()
                raise

    async def count_tokens(self, request: GenerationRequest) -> int:
        """See Engine.count_tokens."""
        self._known(request.model)
        if request.prompt is not None:
            body: dict[str, Any] = {"model": request.model, "prompt": request.prompt}
        else:
            body = {"model": request.model, "messages": requests.messages(request)}
            if requests.offers_tools(request):
                body["tools"] = requests.tools(request, self._dialect)
        reply = await self._transport.post(f"{self._root}/tokenize", msgspec.json.encode(body))
        if reply.status != 200:
            raise errors.from_response(self._source, reply.status, reply.headers, reply.body)
        counted: _Tokenized = self._decoded(reply.body, _Tokenized)
        return counted.count

    async def _check_room(self, request: GenerationRequest, model: EngineModel) -> None:
        wanted = request.sampling.max_tokens or 1
        if any(isinstance(part, Image) for message in request.messages for part in message.content):
            return  # what an image takes is known to vLLM alone, which refuses by itself
        if _most_tokens(request) + wanted <= model.context_length:
            return
        tokens = await self.count_tokens(request)
        if tokens + wanted > model.context_length:
            raise ContextTooLong(
                f"{tokens} tokens of the prompt and up to {wanted} of the answer do not fit into {model.context_length}"
            )

    def _known(self, name: str) -> EngineModel:
        if self._closed:
            raise EngineFailed("the engine was closed")
        model = self._models.get(name)
        if model is None:
            raise UnknownModel(f"no model is called {name[:100]!r}; there are: {', '.join(self._models) or 'none'}")
        return model

    # ------------------------------------------------------------- looking ---

    async def _look(self) -> None:
        """Metrics and health of the server, and now and then its models. Raises EngineError if it does not work."""
        self._key.read()
        own = self._slots.running
        found = await self._transport.get(f"{self._root}/metrics", _LOOK_SECONDS)
        metrics = self._parse_metrics(found.body.decode("utf-8", "replace")) if found.status == 200 else None
        if metrics is None:
            raise self._source.lost(f"shows no metrics of vLLM ({found.status}): is this vLLM, and is base_url right?")
        alive = await self._transport.get(f"{self._root}/health", _LOOK_SECONDS)
        if alive.status != 200:
            self._forget()
            raise self._source.lost(f"says that it is unhealthy ({alive.status})")
        # Requests that came or went meanwhile are this engine's, not somebody else's.
        own = max(own, self._slots.running)
        self._metrics, self._others = metrics, max(0, metrics.running + metrics.waiting - own)
        if self._looks_left <= 0 or self._watch.health is not Health.READY:
            await self._list()
            self._looks_left = _LIST_EVERY
        self._looks_left -= 1

    def _forget(self) -> None:
        """Whatever answers next may be another server."""
        self._examined.clear()

    async def _list(self) -> None:
        if self._watch.health is not Health.READY:
            self._forget()
        reply = await self._transport.get("/models", _LOOK_SECONDS)
        if reply.status != 200:
            raise errors.from_response(self._source, reply.status, reply.headers, reply.body)
        listed = {model.id: model for model in self._decoded(reply.body, _List).data}
        version = await self._transport.get(f"{self._root}/version", _LOOK_SECONDS)
        if version.status == 200:
            self._version = self._decoded(version.body, _Version).version
        server = None
        for name, model in listed.items():
            base = model.parent if model.parent in listed else name
            if base is not None and base not in self._examined and self._settings.features is None:
                server = server or await self._abilities.of_server(self._transport, self._root, _LOOK_SECONDS)
                self._examined[base] = await self._abilities.of_model(
                    self._transport, self._root, server, base, prefix_caching=self._metrics.prefix_caching
                )
        models = {name: self._describe(model, listed) for name, model in listed.items()}
        if models != self._models:
            self._models = models

    def _describe(self, model: _Listed, listed: dict[str, _Listed]) -> EngineModel:
        settings = self._settings
        base = listed.get(model.parent or "", model)
        given = next((one for one in settings.models if one.name == model.id), NamedModel(name=model.id))
        length = model.max_model_len or base.max_model_len
        if length is None and given.context_length is None:
            raise self._source.lost(f"does not tell the context of {model.id!r}: name it with `models`")
        told = (
            self._examined.get(base.id, Feature.NONE) if settings.features is None else features_of(settings.features)
        )
        return describe(
            given,
            settings.provider,
            context_length=length or 0,
            features=told,
            capabilities=settings.capabilities,
            load_seconds=self._load_seconds,
        )

    def _decoded(self, body: bytes, kind: type[Any]) -> Any:
        try:
            return msgspec.json.decode(body, type=kind)
        except msgspec.MsgspecError:
            raise self._source.lost("sends what vLLM would not") from None


class OwnedVllmEngine(VllmEngine):
    """A vLLM that the engine starts, supervises and ends. Implements `model_servers.engine.Restarts` too."""

    _dialect = replace(DIALECT, max_stops=MOST_STOPS)

    def __init__(self, settings: VllmSettings, *, env: dict[str, str] | None = None) -> None:
        super().__init__(settings, env=env)
        self._process: Process | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._lock = asyncio.Lock()
        """Held while the process is exchanged."""
        self._starting = True
        self._tail: deque[str] = deque(maxlen=_TAIL_LINES)

    def _name(self) -> str:
        return "vLLM"

    async def start(self) -> None:
        """Raises EngineFailed, with the last lines of vLLM's output, if it does not come up."""
        async with self._lock:
            await self._launch()
        self._keeper = asyncio.create_task(self._keep(), name="vllm-keeper")
        await super().start()

    async def restart(self) -> None:
        """See Restarts."""
        async with self._lock:
            if self._closed:
                raise EngineFailed("the engine was closed")
            await self._launch()
            await self._watch.look()

    async def close(self) -> None:
        self._closed = True
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
        await super().close()
        if self._process is not None:
            await self._process.stop(self._settings.stop_seconds)

    def _health(self) -> tuple[Health, str]:
        if self._starting and not self._closed:
            return Health.STARTING, f"starting vLLM: {self._tail[-1][:120]}" if self._tail else "starting vLLM"
        return super()._health()

    async def _launch(self) -> None:
        """Start a process in place of the one there is, if there is one, and wait until it serves."""
        from model_servers.engines._vllm.process import Process, free_port

        settings = self._settings
        self._starting, began = True, time.monotonic()
        self._tail.clear()
        if self._process is not None:
            await self._process.stop(settings.stop_seconds)
        port = free_port()
        self._root = f"http://127.0.0.1:{port}"
        self._transport.move(f"{self._root}/v1")
        self._forget()
        self._process = process = await Process.start(self._command(port), self._environment(), self._said)
        try:
            async with asyncio.timeout(settings.start_seconds):
                await self._until_serving(process)
        except BaseException as error:
            await process.stop(0 if self._closed else settings.stop_seconds)
            if isinstance(error, TimeoutError):
                raise EngineFailed(f"vLLM has not come up within {settings.start_seconds:g} s{self._last()}") from None
            raise
        self._load_seconds = time.monotonic() - began
        self._starting = False
        _log.info("vLLM serves after %.1f s", self._load_seconds)

    async def _until_serving(self, process: Process) -> None:
        ended = asyncio.create_task(process.wait())
        try:
            while True:
                await asyncio.wait({ended}, timeout=0.2)
                if ended.done():
                    raise EngineFailed(f"vLLM ended with status {ended.result()} while it started{self._last()}")
                try:
                    if (await self._transport.get(f"{self._root}/health", _LOOK_SECONDS)).status == 200:
                        return
                except EngineFailed:
                    pass  # it does not listen yet
        finally:
            ended.cancel()

    async def _keep(self) -> None:
        """Start vLLM again whenever it ends by itself."""
        pause = _FIRST_PAUSE
        while True:
            process = self._process
            if process is None:
                return
            status = await process.wait()
            async with self._lock:
                if process is not self._process:
                    continue  # it was exchanged on purpose
            _log.error("vLLM ended with status %d; it is started again in %g s", status, pause)
            self._watch.doubt()
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
            async with self._lock:
                if process is not self._process:
                    continue
                try:
                    await self._launch()
                    pause = _FIRST_PAUSE
                except EngineFailed as error:
                    self._starting = False
                    _log.error("%s", error)
            await self._watch.look()

    def _command(self, port: int) -> list[str]:
        settings = self._settings
        command = list(settings.command) or [
            settings.python or sys.executable,
            "-m",
            "vllm.entrypoints.openai.api_server",
        ]
        model = Path(settings.model).expanduser()
        return [
            *command,
            "--model",
            str(model) if model.is_dir() else settings.model,
            "--served-model-name",
            settings.public_name(),
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--enable-prompt-tokens-details",
            *settings.serve_args,
        ]

    def _environment(self) -> dict[str, str]:
        offline = {} if self._settings.allow_download else {"HF_HUB_OFFLINE": "1"}
        return {
            "PYTHONUNBUFFERED": "1",
            "VLLM_MAX_STOP_STRINGS": str(MOST_STOPS),
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            **offline,
            **self._settings.environment,
        }

    def _said(self, line: str) -> None:
        self._tail.append(line)
        # Once it serves, its log may tell of requests.
        _log.log(logging.INFO if self._starting else logging.DEBUG, "vllm: %s", line)

    def _last(self) -> str:
        return ": " + " / ".join(line[-300:] for line in self._tail) if self._tail else ""


def _most_tokens(request: GenerationRequest) -> int:
    """No tokenizer makes more tokens than bytes; what a chat template adds is small, and vLLM has the last word."""
    parts = [request.prompt or "", *(tool.parameters_schema + tool.description + tool.name for tool in request.tools)]
    for message in request.messages:
        parts += [message.text, message.name, *(call.name + call.arguments_json for call in message.tool_calls)]
    return sum(len(part.encode()) + 64 for part in parts) + 256


def _create(settings: VllmSettings) -> Engine:
    return OwnedVllmEngine(settings) if settings.model else VllmEngine(settings)


plugin = EnginePlugin(name="vllm", settings=VllmSettings, create=_create, extra="vllm")
