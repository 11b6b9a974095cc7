"""Models behind OpenAI's HTTP API: OpenAI, Groq, xAI, OpenRouter, Together, or any other base URL.

Importing this module is cheap and does not need aiohttp, which is imported when the engine is created.

What holds, and what does not:

- Sampling parameters that a provider does not know are left out: top_k, min_p and repetition_penalty at OpenAI, Groq
  and xAI. Seeds have 63 bits there; whether the same seed gives the same answer is the provider's to keep.
- More stop strings than the provider takes are looked for here. The connection is closed where one is met, so
  that the usage of such an answer is counted from its pieces, and its prompt tokens are an estimate.
- Tokens per piece are not told by these servers: a piece counts as one, and what the usage tells beyond that as part of
  the last one.
- Prompt tokens cannot be counted without generating: `count_tokens` raises Unsupported.
- Where the provider has no /completions, a raw prompt is sent as a message of the user.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

import msgspec
from pydantic import Field, field_validator, model_validator

from model_servers.engine import (
    CredentialsRejected,
    Delta,
    Embeddings,
    EngineFailed,
    EngineLoad,
    EngineModel,
    EnginePlugin,
    EngineStatus,
    Feature,
    Finished,
    GenerationRequest,
    Health,
    UnknownModel,
    Unsupported,
)
from model_servers.engines._openai import errors
from model_servers.engines._openai.dialect import Dialect
from model_servers.engines._openai.errors import Source
from model_servers.engines._openai.keys import Key
from model_servers.engines._openai.settings import (
    NamedModel,
    base_address,
    describe,
    features_of,
    known_features,
    known_kinds,
    plain_headers,
)
from model_servers.engines._openai.slots import Slots
from model_servers.engines._openai.watch import Watch
from modelyard.openai import wire
from modelyard.program.settings import Settings

if TYPE_CHECKING:
    from model_servers.engines._openai.calls import Calls
    from model_servers.engines._openai.transport import Transport

__all__ = ["OpenAICompatibleEngine", "OpenAICompatibleSettings", "plugin"]

VERSION = "1"
_PROBE_SECONDS = 10.0
_LOCAL_PROBE, _FAR_PROBE = 2.0, 30.0

_TEXT = ("streaming", "function_calling", "json", "json_schema")


@dataclass(frozen=True, slots=True)
class Preset:
    """What is known of a provider."""

    base_url: str
    key_variable: str
    dialect: Dialect
    features: tuple[str, ...] = _TEXT


_NO_EXTRAS = Dialect(
    max_tokens_field="max_completion_tokens", completions=False, extra_sampling=False, max_stops=4, says_json=True
)
PRESETS = {
    "openai": Preset(
        "https://api.openai.com/v1",
        "OPENAI_API_KEY",
        replace(_NO_EXTRAS, strict="where possible"),
        (*_TEXT, "vision", "logprobs", "prefix_cache"),
    ),
    "groq": Preset("https://api.groq.com/openai/v1", "GROQ_API_KEY", _NO_EXTRAS),
    "xai": Preset("https://api.x.ai/v1", "XAI_API_KEY", _NO_EXTRAS),
    "openrouter": Preset(
        "https://openrouter.ai/api/v1", "OPENROUTER_API_KEY", Dialect(completions=False, max_stops=4, says_json=True)
    ),
    "together": Preset("https://api.together.xyz/v1", "TOGETHER_API_KEY", Dialect(says_json=True)),
}

_EMBEDS = re.compile(r"embed|bge-|gte-|\be5-", re.IGNORECASE)
_NO_TEXT = re.compile(
    r"tts|whisper|dall-e|image|audio|realtime|moderation|transcribe|sora|speech|rerank|guard|davinci-002|babbage",
    re.IGNORECASE,
)


class OpenAICompatibleSettings(Settings):
    """Settings of the engine openai_compatible."""

    provider: str = Field(
        "",
        description="openai, groq, xai, openrouter or together: sets address, key and habits of that provider. "
        "Another name is only reported. Empty: openai, or with `base_url` the host's name.",
    )
    base_url: str = Field("", description="Address up to and with /v1. Empty: that of the provider.")
    api_key_env: str = Field(
        "", description="Environment variable that holds the key. Empty: the provider's own, if any."
    )
    api_key_file: str = Field("", description="File that holds the key; wins over `api_key_env`.")
    api_key_header: str = Field(
        "Authorization",
        min_length=1,
        description="Header for the key: a bearer token in Authorization, else the bare key.",
    )
    headers: dict[str, str] = Field(default_factory=dict, description="More headers for every request. No secrets.")
    models: tuple[NamedModel, ...] = Field((), description="The models: names, or mappings as described below.")
    discover: bool = Field(True, description="Without `models`: offer what GET /models lists.")
    context_length: int = Field(
        128_000, ge=1, description="Tokens, for models of which neither server nor settings say."
    )
    capabilities: dict[str, float] | None = Field(
        None, description="Kind of work to score in [0, 1], for models that do not say their own."
    )
    features: tuple[str, ...] | None = Field(
        None, description="What models can do that do not say their own. Empty: what is known of the provider."
    )
    slots: int = Field(8, ge=1, le=4096, description="Requests sent at the same time; others wait in order of arrival.")
    max_tokens_field: Literal["max_tokens", "max_completion_tokens"] | None = Field(
        None,
        description="What the provider calls the limit of an answer. Empty: known for the named ones, else max_tokens.",
    )
    completions: bool | None = Field(
        None, description="Raw prompts go to /completions, else into a message. Empty: known, else yes."
    )
    extra_sampling: bool | None = Field(
        None, description="Send top_k, min_p and repetition_penalty. Empty: known for the named providers, else yes."
    )
    max_stop_strings: int | None = Field(
        None,
        ge=0,
        le=16,
        description="Stop strings the provider takes; with more of them the engine cuts. Empty: known, else 16.",
    )
    embedding_batch: int = Field(256, ge=1, le=2048, description="Most texts in one request for embeddings.")
    connect_seconds: float = Field(10.0, gt=0, description="Longest a connection may take.")
    first_token_seconds: float = Field(120.0, gt=0, description="Longest wait for the first piece of an answer.")
    stall_seconds: float = Field(30.0, gt=0, description="Longest pause between pieces of an answer.")
    probe_seconds: float | None = Field(
        None, gt=0, description="Seconds between looks at GET /models while idle. Empty: 2 on this host, else 30."
    )

    @field_validator("models", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        return tuple({"name": one} if isinstance(one, str) else one for one in value) if value else ()

    @field_validator("base_url")
    @classmethod
    def _address(cls, value: str) -> str:
        return base_address(value) if value else value

    @field_validator("headers")
    @classmethod
    def _no_secrets(cls, value: dict[str, str]) -> dict[str, str]:
        return plain_headers(value)

    @field_validator("capabilities")
    @classmethod
    def _known_kinds(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        return known_kinds(value)

    @field_validator("features")
    @classmethod
    def _known_features(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        return known_features(value)

    @model_validator(mode="after")
    def _usable(self) -> OpenAICompatibleSettings:
        if self.provider and not self.base_url and self.provider not in PRESETS:
            raise ValueError(f"provider {self.provider!r} needs a base_url; known by name are {', '.join(PRESETS)}")
        if not self.models and not self.discover:
            raise ValueError("name models, or set discover")
        return self

    def preset(self) -> Preset | None:
        if self.provider:
            return PRESETS.get(self.provider)
        return None if self.base_url else PRESETS["openai"]

    def address(self) -> str:
        preset = self.preset()
        return self.base_url or (preset.base_url if preset else "")

    def provider_name(self) -> str:
        return self.provider or (urlsplit(self.base_url).hostname or "" if self.base_url else "openai")

    def dialect(self) -> Dialect:
        preset = self.preset()
        known = preset.dialect if preset else Dialect()
        given = {
            "max_tokens_field": self.max_tokens_field,
            "completions": self.completions,
            "extra_sampling": self.extra_sampling,
            "max_stops": self.max_stop_strings,
        }
        return replace(known, **{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]


class _Listed(wire.Wire):
    """A model of GET /models, with what various servers add."""

    id: str
    context_length: int | None = None
    """OpenRouter, Together."""
    context_window: int | None = None
    """Groq."""
    max_model_len: int | None = None
    """vLLM."""


class _List(wire.Wire):
    data: list[_Listed]


class OpenAICompatibleEngine:
    """Implements `model_servers.engine.Engine`."""

    def __init__(self, settings: OpenAICompatibleSettings, *, env: dict[str, str] | None = None) -> None:
        """`env`: where keys are looked for; None: the environment of the process."""
        from model_servers.engines._openai.calls import Calls
        from model_servers.engines._openai.transport import Patience, Transport

        self._settings = settings
        preset, address = settings.preset(), settings.address()
        self._key = Key(
            settings.api_key_env or (preset.key_variable if preset else ""),
            settings.api_key_file,
            header=settings.api_key_header,
            env=env,
        )
        self._source = Source(urlsplit(address).netloc, self._key.origin)
        self._transport: Transport = Transport(
            address,
            source=self._source,
            headers=lambda: {**settings.headers, **self._key.headers()},
            pool_size=settings.slots + 1,  # one for looking after the server
            patience=Patience(settings.connect_seconds, settings.first_token_seconds, settings.stall_seconds),
            keep_alive=15.0,
        )
        self._calls: Calls = Calls(self._transport, self._source, settings.dialect(), settings.embedding_batch)
        self._slots = Slots(settings.slots)
        every = settings.probe_seconds or (_LOCAL_PROBE if _is_local(address) else _FAR_PROBE)
        self._watch = Watch(self._source.name, self._look, every=every, only_idle=True)
        self._models = {model.name: self._describe(model, None) for model in settings.models}
        self._closed = False

    async def start(self) -> None:
        """Raises EngineFailed without a key. A server that does not answer makes the engine unhealthy for so long."""
        self._key.read()
        await self._watch.start()

    async def close(self) -> None:
        self._closed = True
        await self._watch.stop()
        self._slots.close()
        await self._transport.close()

    def status(self) -> EngineStatus:
        health, detail = self._watch.health, self._watch.detail
        if self._closed:
            health, detail = Health.UNHEALTHY, "the engine was closed"
        return EngineStatus(
            engine=plugin.name,
            version=VERSION,
            device="",
            memory_bytes=0,
            models=tuple(self._models.values()),
            load=EngineLoad(self._slots.size, self._slots.running, self._slots.waiting),
            health=health,
            health_detail=detail,
            pool=self._transport.pool(),
        )

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Delta | Finished, None]:
        """See Engine.generate."""
        self._known(request.model)
        arrived = _now()
        async with self._slots.hold():
            queued = _now() - arrived
            try:
                async with aclosing(self._calls.generate(request)) as items:
                    async for item in items:
                        yield replace(item, queued=queued) if isinstance(item, Finished) else item
            except (EngineFailed, CredentialsRejected):
                self._watch.doubt()
                raise
            self._watch.worked()

    async def embed(self, model: str, inputs: Sequence[str]) -> Embeddings:
        """See Engine.embed."""
        if Feature.EMBEDDING not in self._known(model).features:
            raise Unsupported(f"model {model!r} does not embed")
        async with self._slots.hold():
            try:
                found = await self._calls.embed(model, inputs)
            except (EngineFailed, CredentialsRejected):
                self._watch.doubt()
                raise
            self._watch.worked()
            return found

    async def count_tokens(self, request: GenerationRequest) -> int:
        """Always Unsupported: these servers count only while they generate, and an estimate would not be exact."""
        self._known(request.model)
        raise Unsupported(f"{self._source.name} counts tokens only while it generates")

    # ------------------------------------------------------------ its side ---

    async def _look(self) -> None:
        """One look at GET /models. Raises EngineError if the server does not work."""
        self._key.read()
        reply = await self._transport.get("/models", _PROBE_SECONDS)
        if reply.status == 200:
            self._discover(reply.body)
            return
        error = errors.from_response(self._source, reply.status, reply.headers, reply.body)
        needs_list = not self._settings.models and not self._models
        if isinstance(error, CredentialsRejected) or reply.status >= 500 or needs_list:
            raise error
        # Somebody answers. Not every server lists its models, and a limited rate is no illness.

    def _discover(self, body: bytes) -> None:
        try:
            listed = {model.id: model for model in msgspec.json.decode(body, type=_List).data}
        except msgspec.MsgspecError:
            if self._settings.models:
                return
            raise self._source.lost("lists no models in OpenAI's format: name them with `models`") from None
        given = self._settings.models or [NamedModel(name=name) for name in listed if not _NO_TEXT.search(name)]
        if not given:
            raise self._source.lost("lists no models: name them with `models`")
        models = {model.name: self._describe(model, listed.get(model.name)) for model in given}
        if models != self._models:
            self._models = models

    def _describe(self, given: NamedModel, listed: _Listed | None) -> EngineModel:
        settings, preset = self._settings, self._settings.preset()
        names = settings.features
        if names is None:
            names = preset.features if preset else _TEXT
            if _EMBEDS.search(given.name):
                names = ("embedding",)
        told = (listed.context_length or listed.context_window or listed.max_model_len) if listed else None
        return describe(
            given,
            settings.provider_name(),
            context_length=told or settings.context_length,
            features=features_of(names),
            capabilities=settings.capabilities,
        )

    def _known(self, name: str) -> EngineModel:
        if self._closed:
            raise EngineFailed("the engine was closed")
        model = self._models.get(name)
        if model is None:
            raise UnknownModel(f"no model is called {name[:100]!r}; there are: {', '.join(self._models) or 'none'}")
        return model


def _now() -> float:
    return asyncio.get_running_loop().time()


def _is_local(address: str) -> bool:
    host = urlsplit(address).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


plugin = EnginePlugin(
    name="openai_compatible",
    settings=OpenAICompatibleSettings,
    create=OpenAICompatibleEngine,
    metered=True,
    extra="openai",
)
