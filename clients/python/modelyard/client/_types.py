"""What the client takes and gives: plain immutable values, no protobuf."""

from __future__ import annotations

import base64
import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from types import MappingProxyType
from typing import Any


class Value:
    """Base of all values."""

    __slots__ = ()

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON knows them: tuples as lists, times as ISO 8601, bytes as base64."""
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}  # type: ignore[arg-type]


def _plain(value: Any) -> Any:
    if isinstance(value, Value):
        return value.to_dict()
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return value


# ------------------------------------------------------------ conversations ---


@dataclass(frozen=True, slots=True)
class Image(Value):
    """An image, inline."""

    data: bytes
    media_type: str
    """For example "image/png"."""


@dataclass(frozen=True, slots=True)
class ToolCall(Value):
    """A complete call of a tool."""

    id: str
    name: str
    arguments_json: str

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments, parsed. Raises ValueError if the model wrote no JSON object."""
        parsed = json.loads(self.arguments_json or "{}")
        if not isinstance(parsed, dict):
            raise ValueError(f"arguments of {self.name} are no JSON object: {self.arguments_json}")
        return parsed


@dataclass(frozen=True, slots=True)
class Message(Value):
    """One turn of a conversation."""

    role: str
    """"system", "user", "assistant" or "tool"."""
    content: str | tuple[str | Image, ...] = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""
    """With role "tool": the call that this answers."""
    name: str = ""


@dataclass(frozen=True, slots=True)
class Tool(Value):
    """A function that the model may call; you run it."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] | None = None
    """JSON Schema of its arguments; None: it has none."""


# ------------------------------------------------------------------ answers ---


@dataclass(frozen=True, slots=True)
class TopLogprob(Value):
    """One alternative token and its natural-logarithm probability."""

    token: str
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenLogprob(Value):
    """A generated token, its natural-logarithm probability and the likeliest alternatives."""

    token: str
    logprob: float
    top: tuple[TopLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class ToolCallDelta(Value):
    """A fragment of a tool call; fragments with one `index` belong together."""

    index: int
    id: str = ""
    name: str = ""
    arguments_json: str = ""


@dataclass(frozen=True, slots=True)
class Delta(Value):
    """The next piece of an answer."""

    text: str = ""
    tokens: int = 0
    """Tokens that this piece completes."""
    reasoning_text: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Usage(Value):
    """Tokens."""

    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Timings(Value):
    """Seconds, seen from the control plane. None: did not happen."""

    queued: float = 0.0
    ttft: float | None = None
    """To the first token."""
    tpot: float | None = None
    """Per token after the first, mean."""
    total: float = 0.0


@dataclass(frozen=True, slots=True)
class Attempt(Value):
    """One try on one server."""

    server_id: str
    model: str
    provider: str
    started_at: datetime | None = None
    failure_reason: str = ""
    """Empty: it succeeded."""
    failure_message: str = ""
    overtaken: bool = False
    """Another server, which was asked beside this one, was sooner."""


@dataclass(frozen=True, slots=True)
class ScorePart(Value):
    """One part of a score."""

    scorer: str
    value: float
    """[0, 1], more is better."""
    weight: float


@dataclass(frozen=True, slots=True)
class Rejection(Value):
    """Why a candidate was not eligible."""

    reason: str
    """For example "context_too_short"."""
    detail: str
    permanent: bool
    """No passing of time can mend it."""


@dataclass(frozen=True, slots=True)
class Candidate(Value):
    """A server and model that was looked at; eligible if `rejections` is empty."""

    server_id: str
    model: str
    provider: str
    score: float
    parts: tuple[ScorePart, ...] = ()
    rejections: tuple[Rejection, ...] = ()
    estimated_cost_usd: float = 0.0
    """With as many tokens as the request may generate."""
    terms: Mapping[str, float] = field(default_factory=dict)
    """Numbers that enter the formulas of the decision, and what is expected: start, ttft, tpot, seconds."""


@dataclass(frozen=True, slots=True)
class Decision(Value):
    """The record of one choice; candidates best first, rejected ones last."""

    verdict: str
    """"chosen", "wait" or "impossible"."""
    server_id: str
    """Empty unless chosen; likewise model and provider."""
    model: str
    provider: str
    candidates: tuple[Candidate, ...] = ()
    summary: str = ""
    """One sentence for people."""
    estimated_prompt_tokens: int | None = None
    """Of dry runs only."""
    formulas: Mapping[str, str] = field(default_factory=dict)
    """How scores are computed, in the order in which they can be: `modelyard explain --arithmetic`."""
    terms: Mapping[str, float] = field(default_factory=dict)
    """Numbers of the request and of the configuration that enter the formulas."""
    propensity: float = 1.0
    """Probability with which this choice was made."""
    explored: bool = False
    """One about as good as the best was chosen, to learn of it."""


@dataclass(frozen=True, slots=True)
class GenerationResult(Value):
    """A whole answer, or with `finish_reason` "" what had come of one that failed."""

    text: str
    finish_reason: str
    """"stop", "length", "tool_calls" or "content_filter"."""
    tool_calls: tuple[ToolCall, ...] = ()
    reasoning_text: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    usage: Usage = Usage()
    timings: Timings = Timings()
    server_id: str = ""
    model: str = ""
    provider: str = ""
    attempts: tuple[Attempt, ...] = ()
    """Every attempt, the successful one last."""
    decisions: tuple[Decision, ...] = ()
    """One per attempt, if `explain` was set."""
    cost_usd: float = 0.0
    request_id: str = ""

    @property
    def message(self) -> Message:
        """The answer as a message, to go on with the conversation."""
        return Message("assistant", self.text, self.tool_calls)


@dataclass(frozen=True, slots=True)
class EmbedResult(Value):
    """Vectors, one per input, in order."""

    vectors: tuple[tuple[float, ...], ...]
    usage: Usage
    server_id: str
    model: str
    provider: str
    request_id: str = ""
    cost_usd: float = 0.0


# -------------------------------------------------------------------- fleet ---


@dataclass(frozen=True, slots=True)
class Price(Value):
    """US dollars per million tokens."""

    prompt: float = 0.0
    cached_prompt: float = 0.0
    completion: float = 0.0


@dataclass(frozen=True, slots=True)
class ModelRuntime(Value):
    """What the control plane measured of a model on a server."""

    success_rate: float
    ttft: float | None
    """Seconds; None: never measured. Likewise tpot."""
    tpot: float | None
    requests: int
    failures: int
    breaker: str
    """"closed", "open" or "half_open"."""


@dataclass(frozen=True, slots=True)
class ServedModel(Value):
    """A model on a server."""

    name: str
    provider: str
    context_length: int
    features: tuple[str, ...] = ()
    capabilities: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    """Score in [0, 1] per task type."""
    price: Price = Price()
    quantization: str = ""
    ttft: float | None = None
    """Seconds, measured by the server. None: not known. Likewise tpot."""
    tpot: float | None = None
    prefill_tokens_per_second: float = 0.0
    decode_tokens_per_second: float = 0.0
    state: str = "warm"
    """"absent", "pulling", "cold", "loading", "warm" or "failed"."""
    state_detail: str = ""
    """Why it failed, or how far it is on its way."""
    memory_bytes: int = 0
    """Memory that it takes while it is warm. 0: not known."""
    load_time: float | None = None
    """Seconds from cold to warm. None: not known."""
    fingerprint: str = ""
    """Changes when what was learned of the model no longer holds."""
    runtime: ModelRuntime | None = None
    """Only in what `servers` and `watch_fleet` tell."""


@dataclass(frozen=True, slots=True)
class Placement(Value):
    """Where a model is, definitions applied."""

    server_id: str
    lease_state: str
    info: ServedModel


@dataclass(frozen=True, slots=True)
class Model(Value):
    """A model as the whole fleet offers it."""

    name: str
    providers: tuple[str, ...]
    placements: tuple[Placement, ...]
    context_length: int
    features: tuple[str, ...]
    capabilities: Mapping[str, float]
    """Best score in [0, 1] per task type."""


@dataclass(frozen=True, slots=True)
class ConnectionPool(Value):
    """Connections from a model server to its engine, since the server's start."""

    size: int
    """Most at the same time. 0: no bound."""
    in_use: int
    opened: int
    """Requests that had to open a connection."""
    reused: int
    """Requests that found an open one."""
    hit_rate: float | None
    """reused / (opened + reused). None: no request yet."""


@dataclass(frozen=True, slots=True)
class ModelProgress(Value):
    """One step of pulling, loading or unloading a model."""

    server_id: str
    """The model server at work."""
    state: str
    """Of the model after this step; as ServedModel.state."""
    detail: str = ""
    """For people: what is being done."""
    completed_bytes: int = 0
    total_bytes: int = 0
    """0: not known."""


@dataclass(frozen=True, slots=True)
class Preset(Value):
    """A named bundle of parameters and requirements; empty and missing values leave the request's own."""

    name: str
    description: str
    task_type: str
    priority: str
    system: str
    sampling: Mapping[str, Any]
    """Parameters of `generate`, such as temperature and max_tokens."""
    model: str
    provider: str
    min_context_length: int
    features: tuple[str, ...]
    labels: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class ServerStatus(Value):
    """A model server as the control plane sees it."""

    server_id: str
    lease_state: str
    """"live", "suspect", "lost" or "draining"."""
    health: str
    """"starting", "ready" or "unhealthy"."""
    health_detail: str
    engine: str
    engine_version: str
    endpoint: str
    instance_id: str
    version: str
    labels: Mapping[str, str]
    device: str
    platform: str
    memory_bytes: int
    cpu_cores: int
    slots: int
    running: int
    waiting: int
    foreign: int
    """Of running and waiting: not sent by this control plane."""
    kv_cache_utilization: float
    in_flight: int
    """Requests of this control plane that it works on."""
    models: tuple[ServedModel, ...]
    lease_epoch: int
    attached_at: datetime | None
    reported_at: datetime | None
    memory_used_bytes: int = 0
    """Of memory_bytes: what the models take. 0: not known."""
    manages_models: bool = False
    """Models can be pulled, loaded and unloaded."""
    pool: ConnectionPool | None = None
    """None: the engine is not reached over a network."""
    assigned: int = 0
    """Of in_flight: reserved for clients that call the server themselves."""


@dataclass(frozen=True, slots=True)
class FleetChange(Value):
    """A change of the fleet; the first one of a watch is the whole fleet."""

    snapshot: bool
    servers: tuple[ServerStatus, ...]
    """New or changed ones; all of them if `snapshot`."""
    removed_server_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Health(Value):
    """Health of the control plane."""

    alive: bool
    """The process answers and is not shutting down."""
    serving: bool
    """It takes requests."""
