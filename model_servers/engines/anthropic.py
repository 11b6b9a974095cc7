"""The anthropic engine: Claude models through Anthropic's Messages API and the official SDK.

Importing this module needs no SDK; it is imported when the engine is made.

What the API lacks: seeds and penalties and min_p are ignored, log-probabilities, embeddings and raw prompts do not
exist. Temperature, top_p and top_k are refused by the API's present version: they are left out, but for models with
the setting `sampling`, which are asked by version 2023-06-01.
"""

from __future__ import annotations

import base64
import logging
import os
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from pathlib import Path
from typing import Any

from pydantic import Field

from model_servers.engine import (
    Busy,
    ContextTooLong,
    CredentialsRejected,
    EngineError,
    EngineFailed,
    EnginePlugin,
    Feature,
    GenerationRequest,
    Image,
    Pool,
    RateLimited,
    Sampling,
    ToolCall,
    UnknownModel,
    Unsupported,
)
from model_servers.engines._hosted.answer import (
    CallArguments,
    CallBegins,
    CallEnds,
    Counted,
    Event,
    Stopped,
    Text,
    Thinking,
)
from model_servers.engines._hosted.conversation import (
    Plan,
    ToolResult,
    Turn,
    arguments,
    parameters,
    system_text,
    turns,
)
from model_servers.engines._hosted.engine import TOO_LONG, HostedEngine, Known, retry_seconds
from model_servers.engines._hosted.settings import HostedModel, HostedSettings

__all__ = ["AnthropicEngine", "AnthropicSettings", "plugin"]

_SAMPLING_VERSION = "2023-06-01"
_CONTEXT_LENGTH = 200_000
_MAX_TOKENS = 8192
"""Of an answer, where neither the client nor the provider sets a limit: the API wants one."""
_FEATURES = Feature.STREAMING | Feature.FUNCTION_CALLING | Feature.JSON | Feature.JSON_SCHEMA
_COUNTED_EXTRAS = ("thinking", "output_config")
"""Of the setting `extra`, what counting takes as well."""
_EXTRA_CONNECTIONS = 4
"""Beyond the slots: for checks and for counting."""
_MESSAGE_CHARS = 200


class AnthropicSettings(HostedSettings):
    """Settings of `AnthropicEngine`. Without `models`, all active models of the account are offered."""

    api_key_env: str = Field("ANTHROPIC_API_KEY", min_length=1, description="Environment variable with the key.")
    api_key_file: str = Field("", description="File with the key instead; read again after failures.")
    base_url: str = Field("https://api.anthropic.com", min_length=1, description="Where the API is.")


class AnthropicEngine(HostedEngine):
    """Implements `model_servers.engine.Engine`."""

    name = "anthropic"

    def __init__(self, settings: AnthropicSettings) -> None:
        """Raises ImportError without the SDK."""
        super().__init__(settings)
        import anthropic
        import httpx2

        # Their debug logs show requests and answers.
        for library in ("anthropic", "httpx2", "httpcore2"):
            logging.getLogger(library).setLevel(logging.WARNING)
        self._sdk = anthropic
        self._http = httpx2
        self._own = settings
        self._client: anthropic.AsyncAnthropic | None = None
        self._connections = _Connections(settings.slots + _EXTRA_CONNECTIONS)
        self._offered = {model.public_name: _offer(model, {}) for model in settings.models}

    # ----------------------------------------------------------- lifecycle ---

    @property
    def _version(self) -> str:
        return str(self._sdk.__version__)

    async def _connect(self) -> None:
        settings = self._own
        self._client = self._sdk.AsyncAnthropic(
            api_key=self._key(),
            base_url=settings.base_url,
            max_retries=0,  # the control plane knows better where to try again
            http_client=self._sdk.DefaultAsyncHttpxClient(
                limits=self._http.Limits(max_connections=self._connections.size),
                timeout=self._http.Timeout(None, connect=settings.connect_seconds),
                event_hooks={"request": [self._connections.watch]},
            ),
        )

    async def _disconnect(self) -> None:
        if self._client is not None:
            await self._client.close()

    async def _check(self) -> None:
        """The list of models: free, refused without a good key, and it tells what the models can do."""
        client = self._ready()
        client.api_key = self._key()
        listed: dict[str, Mapping[str, Any]] = {}
        try:
            async for info in client.models.list(limit=1000):
                listed[info.id] = info.to_dict()
        except Exception as error:
            failure = self._failure(error, "")
            if isinstance(failure, RateLimited | Busy) or getattr(error, "status_code", 0) == 404:
                return  # the key is good; a gateway need not have a list
            raise failure from error
        wanted = self._own.models or tuple(HostedModel(id=name) for name in listed)
        self._offered = {model.public_name: _offer(model, listed.get(model.provider_id, {})) for model in wanted}

    def _models(self) -> dict[str, Known]:
        return self._offered

    def _pool(self) -> Pool:
        return self._connections.pool()

    def _key(self) -> str:
        """Raises EngineFailed with the cure."""
        if self._own.api_key_file:
            try:
                key = Path(self._own.api_key_file).expanduser().read_text(encoding="utf-8").strip()
            except (OSError, UnicodeDecodeError) as error:
                raise EngineFailed(f"api_key_file {self._own.api_key_file} cannot be read: {_kind(error)}") from None
        else:
            # The one setting that is named, not given: keys do not stand in configuration files.
            key = os.environ.get(self._own.api_key_env, "").strip()
        if not key:
            raise EngineFailed(f"there is no key in {self._key_source()}; put one there, or name another place")
        if not key.isascii() or not key.isprintable():
            raise EngineFailed(f"what stands in {self._key_source()} is no key")
        return key

    def _key_source(self) -> str:
        if self._own.api_key_file:
            return f"the file {self._own.api_key_file} (api_key_file)"
        return f"the environment variable {self._own.api_key_env} (api_key_env)"

    def _ready(self) -> Any:
        if self._client is None:
            raise EngineFailed("the engine is not started")
        return self._client

    # ---------------------------------------------------------------- work ---

    async def _events(
        self, known: Known, request: GenerationRequest, plan: Plan, max_tokens: int | None
    ) -> AsyncGenerator[Event, None]:
        asked = self._body(known, request, plan)
        asked["max_tokens"] = max_tokens or _MAX_TOKENS
        stops = [stop for stop in request.sampling.stop if stop.strip()]  # the API refuses blank ones
        if stops:
            asked["stop_sequences"] = stops
        extra = _extra(known, plan, asked)
        headers: dict[str, str] = {}
        if known.sampling and (sampling := _sampling(request.sampling)):
            extra |= sampling
            headers["anthropic-version"] = _SAMPLING_VERSION
        try:
            async with await self._ready().messages.create(
                **asked, stream=True, extra_body=extra, extra_headers=headers
            ) as stream:
                async with aclosing(_read(stream)) as events:
                    async for event in events:
                        yield event
        except (self._sdk.AnthropicError, self._http.HTTPError, *_UNEXPECTED) as error:
            raise self._failure(error, request.model) from error

    async def _count(self, known: Known, request: GenerationRequest, plan: Plan) -> int:
        asked = self._body(known, request, plan)
        asked.pop("cache_control", None)
        extra = {key: value for key, value in _extra(known, plan, asked).items() if key in _COUNTED_EXTRAS}
        try:
            counted = await self._ready().messages.count_tokens(**asked, extra_body=extra)
            return int(counted.input_tokens)
        except (self._sdk.AnthropicError, self._http.HTTPError, *_UNEXPECTED) as error:
            raise self._failure(error, request.model) from error

    def _body(self, known: Known, request: GenerationRequest, plan: Plan) -> dict[str, Any]:
        """What generating and counting have in common."""
        body: dict[str, Any] = {
            "model": known.settings.provider_id,
            "messages": [_turn(turn) for turn in turns(request)],
        }
        if system := system_text(request):
            body["system"] = system
        if known.settings.prompt_cache:
            body["cache_control"] = {"type": "ephemeral"}
        if plan.tools:
            body["tools"] = [
                {"name": tool.name, "description": tool.description, "input_schema": parameters(tool)}
                for tool in plan.tools
            ]
            body["tool_choice"] = {"type": plan.choice}
            if plan.choice == "tool":
                body["tool_choice"] |= {"name": plan.tool_name}
            if plan.answer_tool:
                body["tool_choice"] |= {"disable_parallel_tool_use": True}
        if plan.forced and known.thinking_can_be_off:
            body["thinking"] = {"type": "disabled"}  # a model that thinks cannot be forced
        if plan.schema is not None:
            try:
                schema = self._sdk.transform_schema(plan.schema)
            except (ValueError, AssertionError, *_UNEXPECTED) as error:
                raise Unsupported(f"the provider cannot enforce this JSON schema: {_kind(error)}") from None
            body["output_config"] = {"format": {"type": "json_schema", "schema": schema}}
        return body

    def _failure(self, error: Exception, model: str) -> EngineError:
        if isinstance(error, EngineError):
            return error
        sdk = self._sdk
        if isinstance(error, sdk.APIStatusError):
            return status_failure(
                error.status_code,
                error.type or "",
                error.api_message or "",
                error.response.headers.get("retry-after"),
                model=model,
                key_source=self._key_source(),
            )
        if isinstance(error, sdk.APITimeoutError):
            return EngineFailed(f"no connection to {self._own.base_url} in {self._own.connect_seconds:g} s")
        if isinstance(error, sdk.APIConnectionError):
            return EngineFailed(f"{self._own.base_url} cannot be reached: {_kind(error.__cause__ or error)}")
        if isinstance(error, self._http.HTTPError):
            return EngineFailed(f"the connection to {self._own.base_url} broke: {_kind(error)}")
        return EngineFailed(f"the provider's answer cannot be read: {_kind(error)}")


_UNEXPECTED = (ValueError, TypeError, AttributeError, KeyError)
"""What reading an answer of another shape raises: the SDK builds its types unchecked."""


def _kind(error: BaseException) -> str:
    return type(error).__name__


# ---------------------------------------------------------------- requests ---


def _turn(turn: Turn) -> dict[str, Any]:
    return {"role": turn.role, "content": [_block(part) for part in turn.parts]}


def _block(part: str | Image | ToolCall | ToolResult) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if isinstance(part, Image):
        data = base64.b64encode(part.data).decode("ascii")
        return {"type": "image", "source": {"type": "base64", "media_type": part.media_type, "data": data}}
    if isinstance(part, ToolCall):
        return {"type": "tool_use", "id": part.id, "name": part.name, "input": arguments(part)}
    return {"type": "tool_result", "tool_use_id": part.call_id, "content": [_block(one) for one in part.content]}


def _extra(known: Known, plan: Plan, asked: dict[str, Any]) -> dict[str, Any]:
    """The setting `extra`, where it does not contradict what is asked for."""
    extra = dict(known.settings.extra)
    if plan.forced:
        extra.pop("thinking", None)
    if "output_config" in extra and "output_config" in asked:
        extra["output_config"] = {**extra["output_config"], **asked["output_config"]}
    return extra


def _sampling(sampling: Sampling) -> dict[str, Any]:
    """Temperatures end at 1 here, and the newer of the models that take one want no top_p beside it."""
    asked: dict[str, Any] = {}
    if sampling.temperature is not None:
        asked["temperature"] = min(sampling.temperature, 1.0)
    elif sampling.top_p is not None:
        asked["top_p"] = sampling.top_p
    if sampling.top_k:
        asked["top_k"] = sampling.top_k
    return asked


def _offer(model: HostedModel, listed: Mapping[str, Any]) -> Known:
    """`listed`: the entry of the provider's list; empty where there is none."""
    able = listed.get("capabilities") or {}

    def supports(*path: str) -> bool | None:
        place: Any = able
        for key in path:
            place = place.get(key) if isinstance(place, Mapping) else None
        return bool(place.get("supported")) if isinstance(place, Mapping) else None

    thinking_can_be_off = supports("thinking", "types", "disabled")
    # The models that cannot stop thinking are those that refuse to be forced.
    forced = model.forced_tools if model.forced_tools is not None else thinking_can_be_off is not False
    structured = model.structured_output
    if structured is None:
        structured = bool(supports("structured_outputs"))
    features = _FEATURES
    if not forced:
        features &= ~Feature.JSON
        if not structured:
            features &= ~Feature.JSON_SCHEMA
    if supports("image_input") is not False:
        features |= Feature.VISION
    if model.prompt_cache:
        features |= Feature.PREFIX_CACHE
    return Known(
        settings=model,
        described=model.describe("anthropic", listed.get("max_input_tokens") or _CONTEXT_LENGTH, features),
        max_output=model.max_output_tokens or listed.get("max_tokens") or None,
        structured=structured,
        forced=forced,
        sampling=bool(model.sampling),
        thinking_can_be_off=thinking_can_be_off,
    )


# ----------------------------------------------------------------- answers ---


async def _read(stream: Any) -> AsyncGenerator[Event, None]:
    """The SDK's stream of events as ours."""
    calling = False
    async for event in stream:
        kind = event.type
        if kind == "content_block_delta":
            delta = event.delta
            if delta.type == "text_delta":
                yield Text(delta.text)
            elif delta.type == "input_json_delta":
                if calling and delta.partial_json:
                    yield CallArguments(delta.partial_json)
            elif delta.type == "thinking_delta":
                yield Thinking(delta.thinking)
            else:
                yield Thinking()  # signatures: nothing to pass on, but a sign of life
        elif kind == "content_block_start":
            block = event.content_block
            calling = block.type == "tool_use"
            if calling:
                yield CallBegins(block.id, block.name)
            elif block.type == "text" and block.text:
                yield Text(block.text)
            elif block.type != "text":
                yield Thinking()
        elif kind == "content_block_stop":
            if calling:
                yield CallEnds()
            calling = False
        elif kind == "message_start":
            yield _counted(event.message.usage)
        elif kind == "message_delta":
            yield _counted(event.usage)
            if event.delta.stop_reason:
                yield Stopped(event.delta.stop_reason)


def _counted(usage: Any) -> Counted:
    """Prompt tokens are told in three parts: computed, written to the cache, read from the cache."""
    cached = getattr(usage, "cache_read_input_tokens", None)
    computed = getattr(usage, "input_tokens", None)
    written = getattr(usage, "cache_creation_input_tokens", None)
    details = getattr(usage, "output_tokens_details", None)
    return Counted(
        prompt=None if computed is None else computed + (cached or 0) + (written or 0),
        cached=cached,
        completion=usage.output_tokens,
        reasoning=getattr(details, "thinking_tokens", None),
    )


def status_failure(
    status: int, kind: str, message: str, retry_after: str | None, *, model: str, key_source: str
) -> EngineError:
    """What an error of the API means. `kind` is its error.type, which counts where it is given: errors in the
    middle of a stream come with status 200."""
    said = message.lower()
    if kind == "authentication_error" or (not kind and status == 401):
        return CredentialsRejected(f"Anthropic rejects the key from {key_source}; replace it")
    if kind == "permission_error" or (not kind and status == 403):
        return CredentialsRejected(f"the key from {key_source} may not do this; check its workspace and permissions")
    if kind == "rate_limit_error" or status == 429:
        return RateLimited("Anthropic's rate limit for this key is reached", retry_seconds(retry_after))
    if kind == "overloaded_error" or status in (503, 529):
        return Busy("Anthropic is overloaded", retry_seconds(retry_after))
    if kind == "billing_error" or status == 402 or "credit balance" in said:
        return EngineFailed("Anthropic wants to be paid: check the billing of the account")
    if kind == "not_found_error":
        return UnknownModel(f"Anthropic does not know the model {model!r}, or it is not open to this key")
    if status == 413 or (status in (200, 400) and any(hint in said for hint in TOO_LONG)):
        return ContextTooLong(message[:_MESSAGE_CHARS] or "the request is larger than the API allows")
    if kind == "invalid_request_error" and status in (200, 400, 422):
        return Unsupported(f"Anthropic refuses the form of the request: {message[:_MESSAGE_CHARS]}")
    return EngineFailed(f"Anthropic failed with status {status}{f' ({kind})' if kind else ''}")


# ------------------------------------------------------------- connections ---


class _Connections:
    """Counts connections as the HTTP library tells of them, request by request."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._in_use = 0
        self._opened = 0
        self._sent = 0

    def pool(self) -> Pool:
        return Pool(self.size, max(self._in_use, 0), self._opened, max(self._sent - self._opened, 0))

    async def watch(self, request: Any) -> None:
        """For the event hook "request"."""
        request.extensions["trace"] = self._trace

    async def _trace(self, event: str, _: Mapping[str, Any]) -> None:
        if event == "connection.connect_tcp.complete":
            self._opened += 1
        elif event.endswith(".send_request_headers.started"):
            self._sent += 1
            self._in_use += 1
        elif event.endswith((".response_closed.complete", ".response_closed.failed")):
            self._in_use -= 1


plugin = EnginePlugin(
    name="anthropic", settings=AnthropicSettings, create=AnthropicEngine, metered=True, extra="anthropic"
)
