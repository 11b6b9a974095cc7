"""Settings of the simulated engine."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from model_servers.engine import EngineModel, Feature, ModelState, TaskType
from modelyard.program.settings import Settings

_TASK_TYPES = tuple(kind.name.lower() for kind in TaskType)
_FEATURES = tuple(str(feature.name).lower() for feature in Feature)


class SimulatedPrice(Settings):
    """US dollars per million tokens."""

    prompt: float = Field(0.0, ge=0, description="Prompt tokens.")
    cached_prompt: float = Field(0.0, ge=0, description="Prompt tokens found in the prefix cache.")
    completion: float = Field(0.0, ge=0, description="Generated tokens.")


class SimulatedModel(Settings):
    """One model that the simulated engine pretends to have."""

    name: str = Field("simulated", min_length=1, description="Fleet-wide name.")
    provider: str = Field("simulated", min_length=1, description="Who provides it.")
    context_length: int | None = Field(None, ge=1, description="Tokens; absent: that of the engine.")
    capabilities: dict[str, float] = Field(
        default_factory=lambda: {kind: 0.5 for kind in _TASK_TYPES if kind != "vision"},
        description="Kind of work to score in [0, 1].",
    )
    features: tuple[str, ...] = Field(
        tuple(feature for feature in _FEATURES if feature != "vision"), description="What it can do."
    )
    price: SimulatedPrice = Field(SimulatedPrice(), description="Price of its tokens.")
    quantization: str = Field("", description="For example 4bit.")
    state: Literal["absent", "cold", "warm"] = Field(
        "warm", description="At the start: to be pulled, to be loaded, or in memory."
    )
    pull_seconds: float = Field(0.0, ge=0, description="How long pulling it takes.")
    load_seconds: float = Field(0.0, ge=0, description="How long loading it takes.")
    memory_bytes: int = Field(0, ge=0, description="Memory that it takes while it is warm; 0: not known.")

    @field_validator("capabilities")
    @classmethod
    def _known_kinds(cls, value: dict[str, float]) -> dict[str, float]:
        for kind, score in value.items():
            if kind not in _TASK_TYPES:
                raise ValueError(f"no kind of work is called {kind!r}; known are {', '.join(_TASK_TYPES)}")
            if not 0 <= score <= 1:
                raise ValueError(f"the score of {kind} must be in [0, 1]")
        return value

    @field_validator("features")
    @classmethod
    def _known_features(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for feature in value:
            if feature not in _FEATURES:
                raise ValueError(f"no feature is called {feature!r}; known are {', '.join(_FEATURES)}")
        return value

    def describe(self, context_length: int) -> EngineModel:
        features = Feature.NONE
        for feature in self.features:
            features |= Feature[feature.upper()]
        return EngineModel(
            name=self.name,
            provider=self.provider,
            context_length=self.context_length or context_length,
            capabilities={int(TaskType[kind.upper()]): score for kind, score in self.capabilities.items()},
            features=features,
            price=(self.price.prompt, self.price.cached_prompt, self.price.completion),
            quantization=self.quantization,
            state=ModelState[self.state.upper()],
            memory_bytes=self.memory_bytes,
            load_seconds=self.load_seconds or None,
        )


class Fault(Settings):
    """One scripted fault. Without a condition it strikes every request; with several, all must hold."""

    kind: Literal[
        "hang", "stall", "error", "error_after_tokens", "crash", "slow", "refuse_start", "refuse_load", "disconnect"
    ] = Field(
        "error",
        description=(
            "hang: no more tokens, until cancelled; stall: no more tokens for any request, until `seconds` have "
            "passed (0: never) or the engine is restarted, and it does not say so; error, error_after_tokens: the "
            "request fails; crash: the process ends at once; slow: everything takes `factor` times as long; "
            "refuse_start: the engine does not start; refuse_load: a model does not load, `times` times; disconnect: "
            "all running requests fail and the engine is unhealthy for `seconds`."
        ),
    )
    at_request: int | None = Field(None, ge=1, description="Only the n-th request, from 1.")
    after_requests: int | None = Field(None, ge=0, description="Only requests after the first n.")
    every: int | None = Field(None, ge=1, description="Only each n-th request.")
    probability: float = Field(1.0, ge=0, le=1, description="Chance per request, drawn from the engine's seed.")
    times: int = Field(0, ge=0, description="Strikes at most that often; 0: no limit.")
    model: str = Field("", description="Only requests for this model; empty: any.")
    tokens: int = Field(0, ge=0, description="Strikes after that many tokens of the answer.")
    factor: float = Field(10.0, gt=0, description="With slow: how many times as long.")
    seconds: float = Field(1.0, ge=0, description="With disconnect and stall: how long it lasts.")


class SimulatedSettings(Settings):
    """An engine that computes nothing: it behaves like one that does, as fast or slow as wanted."""

    models: tuple[SimulatedModel, ...] = Field(
        (SimulatedModel(),), min_length=1, description="The models: names, or mappings as described below."
    )
    slots: int = Field(4, ge=1, le=4096, description="Requests generated at the same time.")
    prefill_tokens_per_second: float = Field(
        4000.0, ge=0, description="Prompt tokens computed a second, one request after the other; 0: infinitely fast."
    )
    decode_tokens_per_second: float = Field(
        60.0, ge=0, description="Tokens a second of one request running alone; 0: infinitely fast."
    )
    aggregate_tokens_per_second: float = Field(
        160.0, ge=0, description="Most tokens a second of all running requests together; 0: no such limit."
    )
    prefill_interference: float = Field(
        1.0, gt=0, le=1, description="Share of their speed that answers keep while a prompt is computed."
    )
    instant: bool = Field(False, description="All speeds infinite, no sleep anywhere: for load tests.")
    time_scale: float = Field(1.0, ge=0, description="Every duration is multiplied with this.")
    start_seconds: float = Field(0.0, ge=0, description="How long starting takes.")
    device: str = Field("simulated", min_length=1, description="What it says that it runs on.")
    memory_bytes: int = Field(
        0, ge=0, description="Memory of the host: what does not fit beside warm models does not load; 0: no limit."
    )
    context_length: int = Field(32768, ge=1, description="Context length of models that do not say their own.")
    answer_tokens: int = Field(
        0, ge=0, description="Tokens of a free-text answer; 0: 40 to 200, depending on prompt and seed."
    )
    told_answers: bool = Field(
        False, description="A prompt that ends in `[N tokens]` gets a free-text answer of as many."
    )
    tokens_per_chunk: int = Field(1, ge=1, description="Tokens sent together.")
    block_tokens: int = Field(512, ge=1, description="Tokens of a block of the prefix cache.")
    cache_blocks: int = Field(256, ge=0, description="Blocks that the prefix cache holds; 0: no cache.")
    embedding_dimension: int = Field(64, ge=1, le=8192, description="Components of an embedding.")
    seed: int = Field(0, ge=0, description="Another seed, other texts.")
    faults: tuple[Fault, ...] = Field((), description="Scripted faults, for tests; see below.")

    @field_validator("models", mode="before")
    @classmethod
    def _names_suffice(cls, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [{"name": item} if isinstance(item, str) else item for item in value]
        return value

    @model_validator(mode="after")
    def _names_differ(self) -> SimulatedSettings:
        names = [model.name for model in self.models]
        if len(set(names)) != len(names):
            raise ValueError("models: two have the same name")
        return self
