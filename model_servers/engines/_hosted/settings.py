"""Settings that every engine in front of a hosted API has."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator, model_validator

from model_servers.engine import EngineModel, Feature, TaskType
from modelyard.program.settings import Settings

_TASK_TYPES = {kind.name.lower(): kind for kind in TaskType}
_FEATURES = {str(feature.name).lower(): feature for feature in Feature if feature}
_NEEDS = {
    TaskType.TOOL_USE: Feature.FUNCTION_CALLING,
    TaskType.VISION: Feature.VISION,
    TaskType.EMBEDDING: Feature.EMBEDDING,
}
CAPABILITY = 0.8
"""Of a hosted model of which nothing is said, for everything that its features allow."""


class HostedPrice(Settings):
    """US dollars per million tokens."""

    prompt: float = Field(0.0, ge=0, description="Prompt tokens.")
    cached_prompt: float = Field(0.0, ge=0, description="Prompt tokens that the provider had cached.")
    completion: float = Field(0.0, ge=0, description="Generated tokens.")


class HostedModel(Settings):
    """One model of the provider. What is absent is learned from the provider where it tells."""

    name: str = Field("", description="Fleet-wide name; empty: `id`.")
    id: str = Field("", description="What the provider calls it; empty: `name`.")
    context_length: int | None = Field(None, ge=2, description="Most tokens of prompt and answer.")
    max_output_tokens: int | None = Field(None, ge=1, description="Most tokens of an answer.")
    capabilities: dict[str, float] | None = Field(
        None, description="Kind of work to score in [0, 1]; absent: 0.8 for all that the features allow."
    )
    features: tuple[str, ...] | None = Field(None, description="What it can do.")
    price: HostedPrice = Field(HostedPrice(), description="Price of its tokens.")
    prompt_cache: bool = Field(
        False, description="Ask the provider to cache the prompt up to its end; writing to the cache costs extra."
    )
    sampling: bool | None = Field(
        None, description="Whether it takes temperature, top_p and top_k; they are left out where it does not."
    )
    forced_tools: bool | None = Field(
        None, description="Whether a tool call can be required of it; absent: yes, unless the provider says no."
    )
    structured_output: bool | None = Field(
        None, description="Whether the provider enforces JSON schemas for it; otherwise a required tool call does."
    )
    extra: dict[str, Any] = Field(
        default_factory=dict,
        description="Further fields of each request as the provider documents them, for example how to think.",
    )

    @field_validator("capabilities")
    @classmethod
    def _known_kinds(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        for kind, score in (value or {}).items():
            if kind not in _TASK_TYPES:
                raise ValueError(f"no kind of work is called {kind!r}; known are {', '.join(_TASK_TYPES)}")
            if not 0 <= score <= 1:
                raise ValueError(f"the score of {kind} must be in [0, 1]")
        return value

    @field_validator("features")
    @classmethod
    def _known_features(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for feature in value or ():
            if feature not in _FEATURES:
                raise ValueError(f"no feature is called {feature!r}; known are {', '.join(_FEATURES)}")
        return value

    @property
    def public_name(self) -> str:
        return self.name or self.id

    @property
    def provider_id(self) -> str:
        return self.id or self.name

    def describe(self, provider: str, context_length: int, features: Feature) -> EngineModel:
        """For the fleet; the arguments are what holds where the settings say nothing."""
        if self.features is not None:
            features = Feature.NONE
            for feature in self.features:
                features |= _FEATURES[feature]
        scores = self.capabilities
        if scores is None:
            # What only embeds has no other kind of work.
            generates = bool(features & ~Feature.EMBEDDING)
            scores = {
                name: CAPABILITY
                for name, kind in _TASK_TYPES.items()
                if _NEEDS.get(kind, Feature.NONE) in features and (generates or kind is TaskType.EMBEDDING)
            }
        return EngineModel(
            name=self.public_name,
            provider=provider,
            context_length=self.context_length or context_length,
            capabilities={int(_TASK_TYPES[kind]): score for kind, score in scores.items()},
            features=features,
            price=(self.price.prompt, self.price.cached_prompt, self.price.completion),
        )


class HostedSettings(Settings):
    """Times are seconds."""

    models: tuple[HostedModel, ...] = Field((), description="The models: names, or mappings as described below.")
    slots: int = Field(16, ge=1, le=1024, description="Requests sent to the provider at the same time.")
    max_waiting: int = Field(64, ge=0, description="Requests that wait for a slot before the engine is busy.")
    connect_seconds: float = Field(10.0, gt=0, description="Longest wait for a connection.")
    first_token_seconds: float = Field(
        120.0, gt=0, description="Longest wait for the first sign of an answer; what takes longer has failed."
    )
    stall_seconds: float = Field(
        120.0,
        gt=0,
        description="Longest silence within an answer; a model that thinks without showing it is silent meanwhile.",
    )
    check_seconds: float = Field(
        5.0,
        gt=0,
        description="Pause between two looks, which are free, at a provider that failed.",
    )

    @field_validator("models", mode="before")
    @classmethod
    def _names_suffice(cls, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [{"name": item} if isinstance(item, str) else item for item in value]
        return value

    @model_validator(mode="after")
    def _names_differ(self) -> HostedSettings:
        names = [model.public_name for model in self.models]
        if not all(names):
            raise ValueError("models: each needs a name or an id")
        if len(set(names)) != len(names):
            raise ValueError("models: two have the same name")
        return self
