"""The bedrock engine: models through the Converse API of Amazon Bedrock and the official SDK, boto3.

Importing this module needs no SDK; it is imported when the engine is made. boto3 blocks: each request runs on a
thread, see `_bedrock/stream.py`.

What the API lacks: seeds, penalties and min_p are ignored; log-probabilities and raw prompts do not exist. top_k is
passed on to the families of models that are known to take it. Embeddings: Titan and Cohere models.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import Field

from model_servers.engine import (
    Busy,
    ContextTooLong,
    CredentialsRejected,
    Embeddings,
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
    close_objects,
    estimated_prompt_tokens,
    parameters,
    system_text,
    turns,
)
from model_servers.engines._hosted.engine import TOO_LONG, HostedEngine, Known, retry_seconds
from model_servers.engines._hosted.settings import HostedModel, HostedSettings

if TYPE_CHECKING:
    from model_servers.engines._bedrock.stream import Connections

__all__ = ["BedrockEngine", "BedrockSettings", "plugin"]

_BEARER_VARIABLE = "AWS_BEARER_TOKEN_BEDROCK"
_CONTEXT_LENGTH = 200_000
_FEATURES = Feature.STREAMING | Feature.FUNCTION_CALLING | Feature.JSON | Feature.JSON_SCHEMA
_SEEING = ("anthropic.claude", "amazon.nova-lite", "amazon.nova-pro", "amazon.nova-premier")
_EXTRA_THREADS = 4
"""Beyond the slots: for checks and for counting."""
_TITAN_AT_ONCE = 4
_COHERE_BATCH = 96
_MESSAGE_CHARS = 200

T = TypeVar("T")


class BedrockSettings(HostedSettings):
    """Settings of `BedrockEngine`. Credentials come from where AWS tools look for them."""

    region: str = Field("", description="AWS region, such as us-east-1; empty: that of the profile or environment.")
    profile: str = Field("", description="Profile of the AWS configuration files; empty: the default chain.")
    endpoint_url: str = Field("", description="Where the API is instead, for gateways and VPC endpoints.")


class BedrockEngine(HostedEngine):
    """Implements `model_servers.engine.Engine`."""

    name = "bedrock"

    def __init__(self, settings: BedrockSettings) -> None:
        """Raises ImportError without the SDK."""
        super().__init__(settings)
        import boto3
        import botocore.exceptions
        import urllib3.exceptions

        from model_servers.engines._bedrock import stream

        # Their debug logs show requests, answers and signatures.
        for library in ("boto3", "botocore", "urllib3"):
            logging.getLogger(library).setLevel(logging.WARNING)
        self._boto3 = boto3
        self._vendor_errors = (
            botocore.exceptions.BotoCoreError,
            botocore.exceptions.ClientError,
            urllib3.exceptions.HTTPError,
        )
        self._stream = stream
        self._own = settings
        self._threads = ThreadPoolExecutor(settings.slots + _EXTRA_THREADS, thread_name_prefix="bedrock")
        self._client: Any = None
        self._connections: Connections | None = None
        self._credentials = "the AWS credential chain"
        self._offered = {model.public_name: _offer(model) for model in settings.models}

    # ----------------------------------------------------------- lifecycle ---

    @property
    def _version(self) -> str:
        return str(self._boto3.__version__)

    async def _connect(self) -> None:
        if not self._offered:
            raise EngineFailed("bedrock offers no models by itself: name some in engine_settings.models")
        try:
            await asyncio.get_running_loop().run_in_executor(self._threads, self._make_client)
        except (*self._vendor_errors, ValueError) as error:
            raise EngineFailed(f"no client for Bedrock can be made: {_kind(error)}: {error}") from error

    def _make_client(self) -> None:
        """On a thread: reads files, and may ask the instance that it runs on."""
        from botocore.config import Config

        settings = self._own
        session = self._boto3.Session(profile_name=settings.profile or None, region_name=settings.region or None)
        if not session.region_name:
            raise EngineFailed(
                "bedrock needs a region: set engine_settings.region, or AWS_REGION, or one in the AWS profile"
            )
        self._client = session.client(
            "bedrock-runtime",
            endpoint_url=settings.endpoint_url or None,
            config=Config(
                connect_timeout=settings.connect_seconds,
                # The engine notices silence by itself; this ends what it could not.
                read_timeout=max(settings.first_token_seconds, settings.stall_seconds) + settings.connect_seconds,
                retries={"total_max_attempts": 1},  # the control plane knows better where to try again
                max_pool_connections=settings.slots + _EXTRA_THREADS,
            ),
        )
        self._connections = self._stream.Connections(self._client)
        credentials = session.get_credentials()
        method = getattr(credentials, "method", "")
        if os.environ.get(_BEARER_VARIABLE):  # the SDK prefers it to all else
            self._credentials = f"the environment variable {_BEARER_VARIABLE}"
        elif settings.profile:
            self._credentials = f"the AWS profile {settings.profile}"
        elif method:
            self._credentials = f"the AWS credential chain ({method})"

    async def _disconnect(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        if self._client is not None:
            self._client.close()

    async def _check(self) -> None:
        """A list of asynchronous jobs, of which nothing is kept: free, at the same address as all else, and a
        refusal tells good credentials without that permission from bad ones."""
        try:
            await self._call(lambda: self._client.list_async_invokes(maxResults=1))
        except CredentialsRejected as error:
            if not _is_permission(error.__cause__):
                raise
        except (RateLimited, Busy, Unsupported, UnknownModel):
            pass  # a gateway need not have it

    def _models(self) -> dict[str, Known]:
        return self._offered

    def _pool(self) -> Pool | None:
        if self._connections is None or not self._connections.found:
            return None
        opened, sent = self._connections.counts()
        return Pool(
            size=self._slots.size + _EXTRA_THREADS,
            in_use=self._slots.running,
            opened=opened,
            reused=max(sent - opened, 0),
        )

    # ---------------------------------------------------------------- work ---

    async def _events(
        self, known: Known, request: GenerationRequest, plan: Plan, max_tokens: int | None
    ) -> AsyncGenerator[Event, None]:
        asked = self._body(known, request, plan)
        config = _inference(request.sampling if known.sampling else Sampling(), request.sampling.stop, max_tokens)
        if config:
            asked["inferenceConfig"] = config
        fields = dict(known.settings.extra)
        if plan.forced:
            fields.pop("thinking", None)  # a model that thinks cannot be forced
        if known.sampling and request.sampling.top_k:
            fields |= _top_k(known.settings.provider_id, request.sampling.top_k)
        if fields:
            asked["additionalModelRequestFields"] = fields
        client = self._ready()
        try:
            async with aclosing(
                self._stream.stream(self._threads, lambda: client.converse_stream(**asked)["stream"])
            ) as items:
                calls: set[int] = set()
                async for item in items:
                    for event in _read(item, calls):
                        yield event
        except Exception as error:
            raise self._failure(error, request.model) from error

    async def _count(self, known: Known, request: GenerationRequest, plan: Plan) -> int:
        asked = self._body(known, request, plan)
        client = self._ready()
        converse = {key: asked[key] for key in ("messages", "system", "toolConfig") if key in asked}
        if hasattr(client, "count_tokens"):
            try:
                counted = await self._call(
                    lambda: client.count_tokens(modelId=asked["modelId"], input={"converse": converse}), request.model
                )
                return int(counted["inputTokens"])
            except (Unsupported, UnknownModel):
                pass  # not for this model
        return estimated_prompt_tokens(request)

    async def _embed(self, known: Known, inputs: Sequence[str]) -> Embeddings:
        identity = known.settings.provider_id
        client = self._ready()

        def invoke(body: dict[str, Any]) -> tuple[dict[str, Any], int]:
            response = client.invoke_model(
                modelId=identity, body=json.dumps(body), contentType="application/json", accept="application/json"
            )
            headers = response["ResponseMetadata"]["HTTPHeaders"]
            return json.loads(response["body"].read()), int(headers.get("x-amzn-bedrock-input-token-count", 0))

        vectors: list[Sequence[float]] = []
        tokens = 0
        if "titan-embed" in identity:
            for at in range(0, len(inputs), _TITAN_AT_ONCE):  # it takes one text a request
                for answer, counted in await asyncio.gather(
                    *(
                        self._call(partial(invoke, {"inputText": text}), known.described.name)
                        for text in inputs[at : at + _TITAN_AT_ONCE]
                    )
                ):
                    vectors.append(answer["embedding"])
                    tokens += counted or answer.get("inputTextTokenCount", 0)
        elif "cohere.embed" in identity:
            for at in range(0, len(inputs), _COHERE_BATCH):
                body = {
                    "texts": list(inputs[at : at + _COHERE_BATCH]),
                    "input_type": "search_document",
                    "truncate": "NONE",
                    "embedding_types": ["float"],
                }
                answer, counted = await self._call(partial(invoke, body), known.described.name)
                found = answer["embeddings"]
                vectors.extend(found["float"] if isinstance(found, dict) else found)
                tokens += counted
        else:
            raise Unsupported(f"embeddings of {identity} are not known here; Titan and Cohere models are")
        if len(vectors) != len(inputs):
            raise EngineFailed(f"{len(inputs)} inputs gave {len(vectors)} embeddings")
        return Embeddings(tuple(vectors), tokens)

    async def _call(self, work: Callable[[], T], model: str = "") -> T:
        try:
            return await self._stream.call(self._threads, work)
        except Exception as error:
            raise self._failure(error, model) from error

    def _body(self, known: Known, request: GenerationRequest, plan: Plan) -> dict[str, Any]:
        """What generating and counting have in common."""
        messages = [_turn(turn) for turn in turns(request)]
        body: dict[str, Any] = {"modelId": known.settings.provider_id, "messages": messages}
        if system := system_text(request):
            body["system"] = [{"text": system}]
        if known.settings.prompt_cache:
            messages[-1]["content"].append({"cachePoint": {"type": "default"}})
        # There is no tool choice "none": tools that must not be called are sent only if calls of them are in sight.
        calls = any(message.tool_calls for message in request.messages)
        if plan.tools and (plan.choice != "none" or calls):
            choice: dict[str, Any] = {"auto": {}}
            if plan.choice == "any":
                choice = {"any": {}}
            elif plan.choice == "tool":
                choice = {"tool": {"name": plan.tool_name}}
            body["toolConfig"] = {"tools": [_tool(tool) for tool in plan.tools], "toolChoice": choice}
        if plan.schema is not None:
            body["outputConfig"] = {
                "textFormat": {
                    "type": "json_schema",
                    "structure": {"jsonSchema": {"name": "answer", "schema": json.dumps(close_objects(plan.schema))}},
                }
            }
        return body

    def _ready(self) -> Any:
        if self._client is None:
            raise EngineFailed("the engine is not started")
        return self._client

    def _failure(self, error: Exception, model: str) -> EngineError:
        """What any exception of the SDK means; also of its insides, since it leaves many unwrapped."""
        if isinstance(error, EngineError):
            return error
        response = getattr(error, "response", None)
        if isinstance(response, Mapping) and "Error" in response:
            details = response["Error"]
            metadata = response.get("ResponseMetadata", {})
            return code_failure(
                str(details.get("Code", "")),
                str(details.get("Message", "")),
                int(metadata.get("HTTPStatusCode") or 0),
                metadata.get("HTTPHeaders", {}).get("retry-after"),
                model=model,
                credentials=self._credentials,
            )
        kind = _kind(error)
        if any(word in kind for word in ("Credential", "Token", "SSO", "NoAuth", "Login")):
            return CredentialsRejected(
                f"there are no usable credentials in {self._credentials} ({kind}): see `aws configure`, `aws sso login`"
            )
        if kind == "ParamValidationError":
            return Unsupported("the request has something that Bedrock's API does not take")
        return EngineFailed(f"the connection to Bedrock failed: {kind}")


def _kind(error: BaseException) -> str:
    return type(error).__name__


# ---------------------------------------------------------------- requests ---


def _turn(turn: Turn) -> dict[str, Any]:
    return {"role": turn.role, "content": [_block(part) for part in turn.parts]}


def _block(part: str | Image | ToolCall | ToolResult) -> dict[str, Any]:
    if isinstance(part, str):
        return {"text": part}
    if isinstance(part, Image):
        return {"image": {"format": part.media_type.removeprefix("image/"), "source": {"bytes": part.data}}}
    if isinstance(part, ToolCall):
        return {"toolUse": {"toolUseId": part.id, "name": part.name, "input": arguments(part)}}
    content = [_block(one) for one in part.content] or [{"text": "(nothing)"}]
    return {"toolResult": {"toolUseId": part.call_id, "content": content}}


def _tool(tool: Any) -> dict[str, Any]:
    spec = {"name": tool.name, "inputSchema": {"json": parameters(tool)}}
    if tool.description:
        spec["description"] = tool.description
    return {"toolSpec": spec}


def _inference(sampling: Sampling, stops: Sequence[str], max_tokens: int | None) -> dict[str, Any]:
    config: dict[str, Any] = {}
    if max_tokens is not None:
        config["maxTokens"] = max_tokens
    if sampling.temperature is not None:
        config["temperature"] = min(sampling.temperature, 1.0)
    elif sampling.top_p is not None:
        config["topP"] = sampling.top_p  # the newer Claude models want only one of the two
    if said := [stop for stop in stops if stop.strip()]:
        config["stopSequences"] = said
    return config


def _top_k(identity: str, top_k: int) -> dict[str, Any]:
    """Outside the common API each family has its own name for it."""
    if "anthropic." in identity or "mistral." in identity:
        return {"top_k": top_k}
    if "amazon.nova" in identity:
        return {"inferenceConfig": {"topK": top_k}}
    if "cohere." in identity:
        return {"k": top_k}
    return {}


def _offer(model: HostedModel) -> Known:
    forced = model.forced_tools is not False
    structured = bool(model.structured_output)
    features = _FEATURES
    if any(family in model.provider_id for family in ("titan-embed", "cohere.embed")):
        features = Feature.EMBEDDING
    else:
        if not forced:
            features &= ~Feature.JSON
            if not structured:
                features &= ~Feature.JSON_SCHEMA
        if any(family in model.provider_id for family in _SEEING):
            features |= Feature.VISION
    if model.prompt_cache:
        features |= Feature.PREFIX_CACHE
    return Known(
        settings=model,
        described=model.describe("bedrock", _CONTEXT_LENGTH, features),
        max_output=model.max_output_tokens,
        structured=structured,
        forced=forced,
        sampling=model.sampling is not False,
    )


# ----------------------------------------------------------------- answers ---


def _read(item: Mapping[str, Any], calls: set[int]) -> Iterator[Event]:
    """One event of the API as ours. `calls`: indexes of the blocks that are tool calls, kept between events."""
    if "contentBlockDelta" in item:
        delta = item["contentBlockDelta"]["delta"]
        if "text" in delta:
            if delta["text"]:
                yield Text(delta["text"])
        elif "toolUse" in delta:
            if delta["toolUse"]["input"]:
                yield CallArguments(delta["toolUse"]["input"])
        else:
            yield Thinking(delta.get("reasoningContent", {}).get("text", ""))
    elif "contentBlockStart" in item:
        use = item["contentBlockStart"]["start"].get("toolUse")
        if use is not None:
            calls.add(item["contentBlockStart"]["contentBlockIndex"])
            yield CallBegins(use["toolUseId"], use["name"])
    elif "contentBlockStop" in item:
        if item["contentBlockStop"]["contentBlockIndex"] in calls:
            yield CallEnds()
    elif "messageStop" in item:
        yield Stopped(item["messageStop"]["stopReason"])
    elif "metadata" in item:
        usage = item["metadata"]["usage"]
        cached = usage.get("cacheReadInputTokens", 0)
        written = usage.get("cacheWriteInputTokens", 0)
        yield Counted(usage["inputTokens"] + cached + written, cached, usage["outputTokens"])


_REJECTED = (
    "AccessDenied",
    "AccessDeniedException",
    "ExpiredToken",
    "ExpiredTokenException",
    "IncompleteSignature",
    "InvalidClientTokenId",
    "InvalidSignatureException",
    "MissingAuthenticationToken",
    "MissingAuthenticationTokenException",
    "NotAuthorized",
    "SignatureDoesNotMatch",
    "UnrecognizedClientException",
)
_LIMITED = ("ThrottlingException", "TooManyRequestsException", "ServiceQuotaExceededException", "Throttling")
_BUSY = ("ServiceUnavailableException", "ModelNotReadyException", "ServiceUnavailable")


def _is_permission(error: BaseException | None) -> bool:
    """Whether credentials were recognised and only lack a permission."""
    response = getattr(error, "response", None)
    details = response.get("Error", {}) if isinstance(response, Mapping) else {}
    return details.get("Code") == "AccessDeniedException" and "not authorized" in str(details.get("Message", ""))


def code_failure(
    code: str, message: str, status: int, retry_after: str | None, *, model: str, credentials: str
) -> EngineError:
    """What an error of the API means. Within a stream codes begin with a small letter."""
    code = code[:1].upper() + code[1:]
    said = message.lower()
    if code in _REJECTED or (status in (401, 403) and code not in _LIMITED):
        what = f"the model {model!r}" if model else "access"
        return CredentialsRejected(
            f"Bedrock refuses {what} to the credentials from {credentials} ({code}): renew them, allow "
            "bedrock:InvokeModelWithResponseStream, or ask for access to the model in the AWS account"
        )
    if code in _LIMITED or (status == 429 and code not in _BUSY):
        return RateLimited("Bedrock's limit for this account and model is reached", retry_seconds(retry_after))
    if code in _BUSY or status == 503:
        return Busy("Bedrock or the model is not ready for more", retry_seconds(retry_after))
    if code == "ResourceNotFoundException" or (code == "ValidationException" and "model identifier is invalid" in said):
        return UnknownModel(f"Bedrock has no model for {model!r} in this region; check `id` in engine_settings.models")
    if code == "ValidationException" or status == 413:
        if status == 413 or any(hint in said for hint in TOO_LONG):
            return ContextTooLong(message[:_MESSAGE_CHARS])
        return Unsupported(f"Bedrock refuses the form of the request: {message[:_MESSAGE_CHARS]}")
    if status == 404 or code in ("UnknownOperationException", "404"):
        return Unsupported("Bedrock does not know this operation here")
    return EngineFailed(f"Bedrock failed: {code or 'no reason given'}")


plugin = EnginePlugin(name="bedrock", settings=BedrockSettings, create=BedrockEngine, metered=True, extra="bedrock")
