"""The Engine protocol: everything a model server asks of the software that runs the models.

An engine is driven from one asyncio loop. It converts between these types and its
vendor's; it knows nothing of gRPC, leases or control planes.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum, IntFlag
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from pydantic import BaseModel


class Role(IntEnum):
    """Numbers equal those of the contract."""

    SYSTEM = 1
    USER = 2
    ASSISTANT = 3
    TOOL = 4


class FinishReason(IntEnum):
    """Numbers equal those of the contract."""

    STOP = 1
    LENGTH = 2
    TOOL_CALLS = 3
    CONTENT_FILTER = 4


class Feature(IntFlag):
    """Bit n stands for number n of the contract's ModelFeature."""

    NONE = 0
    STREAMING = 1 << 1
    FUNCTION_CALLING = 1 << 2
    VISION = 1 << 3
    JSON = 1 << 4
    JSON_SCHEMA = 1 << 5
    LOGPROBS = 1 << 6
    EMBEDDING = 1 << 7
    PREFIX_CACHE = 1 << 8


class Health(IntEnum):
    """Numbers equal those of the contract."""

    STARTING = 1
    READY = 2
    UNHEALTHY = 3


class ModelState(IntEnum):
    """Where a model is in its life. Numbers equal those of the contract."""

    ABSENT = 1
    PULLING = 2
    COLD = 3
    LOADING = 4
    WARM = 5
    FAILED = 6


class ToolChoiceMode(IntEnum):
    """Numbers equal those of the contract."""

    AUTO = 1
    NONE = 2
    REQUIRED = 3


class TaskType(IntEnum):
    """The kinds of work that capabilities are about. Numbers equal those of the contract."""

    CHAT = 1
    REASONING = 2
    CODE_GENERATION = 3
    CODE_REVIEW = 4
    SUMMARIZATION = 5
    TRANSLATION = 6
    WRITING = 7
    EXTRACTION = 8
    CLASSIFICATION = 9
    DATA_ANALYSIS = 10
    RESEARCH = 11
    PLANNING = 12
    TOOL_USE = 13
    VISION = 14
    EMBEDDING = 15


# ---------------------------------------------------------------- requests ---


@dataclass(frozen=True, slots=True)
class Image:
    data: bytes
    media_type: str


@dataclass(frozen=True, slots=True)
class ToolCall:
    id: str
    name: str
    arguments_json: str


@dataclass(frozen=True, slots=True)
class Message:
    role: Role
    content: tuple[str | Image, ...] = ()
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""
    name: str = ""

    @property
    def text(self) -> str:
        return "".join(part for part in self.content if isinstance(part, str))


@dataclass(frozen=True, slots=True)
class Sampling:
    """None means the model's own default. Units and ranges: SamplingParams of the contract."""

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    stop: tuple[str, ...] = ()
    seed: int | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    logprobs: bool = False
    top_logprobs: int = 0


@dataclass(frozen=True, slots=True)
class Tool:
    name: str
    description: str = ""
    parameters_schema: str = ""
    """JSON Schema; empty means no arguments."""


CANARY_ID = "canary"
"""GenerationRequest.request_id of what nobody asked for: see model_servers.watchdog."""


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """Exactly one of `messages` and `prompt` is given; values were validated at the edge."""

    model: str
    messages: tuple[Message, ...] = ()
    prompt: str | None = None
    sampling: Sampling = field(default_factory=Sampling)
    json_schema: str | None = None
    """The answer must satisfy this JSON Schema; '{}' style "any object" is `json_object`."""
    json_object: bool = False
    """The answer must be a JSON object."""
    tools: tuple[Tool, ...] = ()
    tool_choice: ToolChoiceMode = ToolChoiceMode.AUTO
    tool_name: str = ""
    """With ToolChoiceMode.REQUIRED: the one tool to call."""
    request_id: str = ""


# ----------------------------------------------------------------- answers ---


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    token: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    index: int
    id: str = ""
    name: str = ""
    arguments_json: str = ""


@dataclass(frozen=True, slots=True)
class Delta:
    """The next piece of an answer; see GenerationDelta of the contract."""

    text: str = ""
    tokens: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()
    tool_calls: tuple[ToolCallDelta, ...] = ()
    reasoning_text: str = ""


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Finished:
    """The end of an answer; always the last item of a stream."""

    finish_reason: FinishReason
    usage: Usage
    queued: float = 0.0
    """Seconds in the engine's own queue before prefill."""
    last: Delta | None = None
    """The last piece of the answer, where it is ready together with the end: it then travels in
    one message with it. Never held back for that."""


@dataclass(frozen=True, slots=True)
class Embeddings:
    vectors: tuple[Sequence[float], ...]
    prompt_tokens: int


# ------------------------------------------------------------- description ---


@dataclass(frozen=True, slots=True)
class EngineModel:
    """A model that the engine offers."""

    name: str
    provider: str
    context_length: int
    capabilities: dict[int, float] = field(default_factory=dict)
    """TaskType number of the contract -> score in [0, 1]."""
    features: Feature = Feature.STREAMING
    price: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """US dollars per million prompt, cached prompt and completion tokens."""
    expected_ttft: float | None = None
    """Seconds to the first token of a short prompt, until something was measured; None: not known."""
    expected_tpot: float | None = None
    """Seconds per token after the first, likewise."""
    quantization: str = ""
    state: ModelState = ModelState.WARM
    state_detail: str = ""
    memory_bytes: int = 0
    """Taken while warm, or to be taken as far as known; 0: not known."""
    load_seconds: float | None = None
    """What the last load took, or an estimate before the first; None: not known."""


@dataclass(frozen=True, slots=True)
class Progress:
    """One step of pulling, loading or unloading a model."""

    state: ModelState
    detail: str = ""
    completed_bytes: int = 0
    total_bytes: int = 0
    """0: not known."""


@dataclass(frozen=True, slots=True)
class Pool:
    """Connections to an engine that is reached over a network; see ConnectionPool of the contract."""

    size: int
    in_use: int
    opened: int
    reused: int


@dataclass(frozen=True, slots=True)
class EngineLoad:
    slots: int
    """Requests the engine generates at the same time."""
    running: int = 0
    waiting: int = 0
    kv_cache_utilization: float = 0.0


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """Everything that holds about the engine right now; cheap to ask for."""

    engine: str
    version: str
    device: str
    memory_bytes: int
    models: tuple[EngineModel, ...]
    load: EngineLoad
    health: Health
    health_detail: str = ""
    memory_used_bytes: int = 0
    """Of `memory_bytes`, what the models take now; 0: not known."""
    pool: Pool | None = None
    progress: int = 0
    """Grows with every step that the engine computes, prefill and tokens that are held back included;
    0: the engine does not tell, and is judged by what it sends."""


# ------------------------------------------------------------------ errors ---


class EngineError(Exception):
    """Base of what an engine may raise. Anything else is a bug and answered as INTERNAL.

    The message is told to the caller, in our own words: what a vendor's library says may hold prompts, answers or
    schemas (see modelyard.program.privacy).
    """


class UnknownModel(EngineError):
    """The engine does not have this model."""


class ContextTooLong(EngineError):
    """Prompt and answer do not fit; raised before anything is computed."""


class InvalidRequest(EngineError):
    """A part of the request cannot be used, and another server would say the same.

    Neither the engine nor its host is to blame, so this does not count against the server.
    """

    def __init__(self, message: str, field: str = "") -> None:
        """`field`: path in the contract's GenerationInput, as "response_format.json_schema.schema"."""
        super().__init__(message)
        self.field = field


class Unsupported(EngineError):
    """The engine or model lacks a feature that the request needs."""


class Busy(EngineError):
    """Slots and waiting room are full."""

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class RateLimited(EngineError):
    """The provider limits the rate; another server may answer now."""

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class OutOfMemory(EngineError):
    """The model does not fit beside what is in memory."""


class CredentialsRejected(EngineError):
    """The provider refuses the key. The message names where the key comes from, never the key."""


class ContentRefused(EngineError):
    """The provider will not answer this input."""


class EngineFailed(EngineError):
    """The engine broke while working on the request."""


# ---------------------------------------------------------------- protocol ---


class Engine(Protocol):
    """What stands behind a model server."""

    async def start(self) -> None:
        """Load what must be loaded. Raises EngineFailed with a cure in the message."""
        ...

    def status(self) -> EngineStatus:
        """The state now. Never blocks, never raises."""
        ...

    def generate(self, request: GenerationRequest) -> AsyncGenerator[Delta | Finished, None]:
        """Stream an answer: any number of Delta, one Finished.

        Closing the generator (aclose, or cancelling the task that iterates it) stops the
        work in the engine at once and frees the slot.
        A model that is cold is loaded first.
        Raises UnknownModel, ContextTooLong, Unsupported, Busy, RateLimited, OutOfMemory,
        CredentialsRejected and ContentRefused before the first item, and InvalidRequest and EngineFailed
        at any time.
        """
        ...

    async def embed(self, model: str, inputs: Sequence[str]) -> Embeddings:
        """One vector per input. Raises as generate."""
        ...

    async def count_tokens(self, request: GenerationRequest) -> int:
        """Prompt tokens of the request, exactly as generate would count them."""
        ...

    async def close(self) -> None:
        """Stop everything and free all memory. Idempotent; running generations raise EngineFailed."""
        ...


@runtime_checkable
class ManagesModels(Protocol):
    """An engine that can also fetch, load and unload its models while it runs.

    Each stream ends when the step is done, with a Progress of the state that was reached. The model
    server calls one step per model at a time. Closing a generator stops the work; what cannot be
    stopped is left to end by itself, and `status` tells.
    Raise UnknownModel, Unsupported (no such step), OutOfMemory and EngineFailed.
    """

    def pull(self, model: str) -> AsyncGenerator[Progress, None]:
        """Fetch the files of a model, known or not yet known."""
        ...

    def load(self, model: str) -> AsyncGenerator[Progress, None]:
        """Bring a model into memory."""
        ...

    def unload(self, model: str) -> AsyncGenerator[Progress, None]:
        """Take a model that has no running requests out of memory."""
        ...


@runtime_checkable
class Restarts(Protocol):
    """An engine that owns what it drives and can start it anew."""

    async def restart(self) -> None:
        """Stop by all means and start again; running generations raise EngineFailed.

        Called when the engine stopped producing tokens. Raises EngineFailed.
        """
        ...


# ----------------------------------------------------------------- plug-in ---


@dataclass(frozen=True, slots=True)
class EnginePlugin:
    """What an entry point of the group `modelyard.engines` must be.

    The module that holds it must import without the vendor's library: that is imported
    by `create` (or later), so that a host installs what its own engine needs and no more.
    """

    name: str
    """As given to `--engine`; also the `EngineInfo.name` of the contract."""
    settings: type[BaseModel]
    """Validates `engine_settings`; every field has a default and a description."""
    create: Callable[[Any], Engine]
    """Called with an instance of `settings`. May raise ImportError and EngineFailed."""
    metered: bool = False
    """Each token costs money: nothing is generated but what was asked for, so no canary."""
    extra: str = ""
    """The extra of the modelyard distribution that brings the vendor's library."""
