"""Settings that the engines which speak OpenAI's API have in common."""

from __future__ import annotations

from urllib.parse import urlsplit

from pydantic import Field, field_validator

from model_servers.engine import EngineModel, Feature, TaskType
from modelyard.program.settings import Settings

TASK_TYPES = tuple(kind.name.lower() for kind in TaskType)
FEATURES = tuple(str(feature.name).lower() for feature in Feature)

DEFAULT_CAPABILITIES = dict.fromkeys(TASK_TYPES, 0.5)
"""For a model of which nothing is said: middling at everything that its features allow."""
_NEEDS = {"embedding": Feature.EMBEDDING, "tool_use": Feature.FUNCTION_CALLING, "vision": Feature.VISION}
"""A kind of work whose feature is missing must not be offered."""


class Price(Settings):
    """US dollars per million tokens."""

    prompt: float = Field(0.0, ge=0, description="Prompt tokens, US dollars per million.")
    cached_prompt: float = Field(0.0, ge=0, description="Prompt tokens found in the cache.")
    completion: float = Field(0.0, ge=0, description="Generated tokens.")


class NamedModel(Settings):
    """One model, as far as its server does not tell."""

    name: str = Field(min_length=1, description="As the server calls it.")
    context_length: int | None = Field(None, ge=1, description="Tokens; absent: what the server says, or the engine's.")
    capabilities: dict[str, float] | None = Field(None, description="Kind of work to score in [0, 1].")
    features: tuple[str, ...] | None = Field(
        None, description="What it can do; absent: as the engine knows or guesses."
    )
    price: Price = Field(Price(), description="Price of its tokens.")
    quantization: str = Field("", description="For example fp8.")

    @field_validator("capabilities")
    @classmethod
    def _known_kinds(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        return known_kinds(value)

    @field_validator("features")
    @classmethod
    def _known_features(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        return known_features(value)


def known_kinds(value: dict[str, float] | None) -> dict[str, float] | None:
    for kind, score in (value or {}).items():
        if kind not in TASK_TYPES:
            raise ValueError(f"no kind of work is called {kind!r}; known are {', '.join(TASK_TYPES)}")
        if not 0 <= score <= 1:
            raise ValueError(f"the score of {kind} must be in [0, 1]")
    return value


def known_features(value: tuple[str, ...] | None) -> tuple[str, ...] | None:
    for feature in value or ():
        if feature not in FEATURES:
            raise ValueError(f"no feature is called {feature!r}; known are {', '.join(FEATURES)}")
    return value


def base_address(value: str) -> str:
    """A validated base URL without the slash at its end."""
    parts = urlsplit(value)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("must begin with http:// or https://")
    if parts.username or parts.password:
        raise ValueError("must hold no user and no password: name a key with api_key_env or api_key_file")
    if parts.query or parts.fragment:
        raise ValueError("must hold no query")
    return value.rstrip("/")


def plain_headers(value: dict[str, str]) -> dict[str, str]:
    for name in value:
        if name.lower() in ("authorization", "api-key", "x-api-key", "proxy-authorization", "cookie"):
            raise ValueError(f"{name} carries a secret: name it with api_key_env or api_key_file, and api_key_header")
    return value


def features_of(names: tuple[str, ...]) -> Feature:
    found = Feature.NONE
    for name in names:
        found |= Feature[name.upper()]
    return found


def describe(
    given: NamedModel,
    provider: str,
    *,
    context_length: int,
    features: Feature,
    capabilities: dict[str, float] | None,
    load_seconds: float | None = None,
) -> EngineModel:
    """The model as it is reported; what was named in the settings wins."""
    if given.features is not None:
        features = features_of(given.features)
    scores = given.capabilities or capabilities or DEFAULT_CAPABILITIES
    only_embeds = features & (Feature.STREAMING | Feature.EMBEDDING) == Feature.EMBEDDING
    return EngineModel(
        name=given.name,
        provider=provider,
        context_length=given.context_length or context_length,
        capabilities={
            int(TaskType[kind.upper()]): score
            for kind, score in scores.items()
            if _NEEDS.get(kind, Feature.NONE) in features and (kind == "embedding" or not only_embeds)
        },
        features=features,
        price=(given.price.prompt, given.price.cached_prompt, given.price.completion),
        quantization=given.quantization,
        load_seconds=load_seconds,
    )
