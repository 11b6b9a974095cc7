"""Settings of the Ollama engine."""

from __future__ import annotations

import re
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from model_servers.engine import TaskType
from model_servers.engines._ollama.names import short_name
from modelyard.program.settings import Settings

_NUMBER = re.compile(r"-?\d+(\.\d+)?")
_DURATION = re.compile(rf"{_NUMBER.pattern}|(\d+(\.\d+)?(ms|s|m|h))+")
_TASK_TYPES = tuple(kind.name.lower() for kind in TaskType)

DEFAULT_CAPABILITIES: dict[str, float] = {
    "chat": 0.5,
    "reasoning": 0.4,
    "code_generation": 0.4,
    "code_review": 0.4,
    "summarization": 0.5,
    "translation": 0.4,
    "writing": 0.5,
    "extraction": 0.5,
    "classification": 0.5,
    "data_analysis": 0.4,
    "research": 0.4,
    "planning": 0.4,
    "tool_use": 0.4,
    "vision": 0.4,
    "embedding": 0.5,
}
"""For a model of which nothing is said: middling at everything that it can do at all."""


class OllamaModel(Settings):
    """A model that is to be there, or about which more is known than Ollama tells."""

    name: str = Field(
        min_length=1, max_length=200, description='As Ollama names it; without a tag, ":latest" is meant.'
    )
    num_ctx: int | None = Field(None, ge=16, description="Context length to run it with; absent: that of the engine.")
    capabilities: dict[str, float] | None = Field(
        None, description="Kind of work to score in [0, 1]; absent: those of the engine."
    )

    @field_validator("name")
    @classmethod
    def _one_spelling(cls, value: str) -> str:
        return short_name(value)

    @field_validator("capabilities")
    @classmethod
    def _known_kinds(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        return _checked_capabilities(value)


class OllamaSettings(Settings):
    """A sidecar beside a running `ollama serve`."""

    url: str = Field("http://127.0.0.1:11434", description="Where Ollama listens.")
    models: tuple[OllamaModel, ...] = Field(
        (), description="Models beyond those that Ollama has: names, or mappings as described below."
    )
    auto_pull: bool = Field(
        False,
        description="Fetch the models named in `models` and `warm` when they are not there. Nothing else ever is.",
    )
    warm: tuple[str, ...] = Field((), description="Models that are loaded at start and kept in memory.")
    keep_alive: str | float = Field(
        "30m", description="How long other models stay in memory after a request: seconds, or 10m, 24h; -1: for ever."
    )
    num_ctx: int | None = Field(
        None, ge=16, description="Context length of every model; absent: the model's own, at most `max_num_ctx`."
    )
    max_num_ctx: int = Field(
        8192,
        ge=16,
        description="Bound of the models' own context lengths: memory grows with it, times parallel requests.",
    )
    slots: int | None = Field(
        None, ge=1, le=256, description="Requests at the same time, as OLLAMA_NUM_PARALLEL says; absent: inferred."
    )
    max_slots: int = Field(16, ge=1, le=256, description="Most slots that are inferred.")
    think: bool | Literal["low", "medium", "high"] | None = Field(
        None, description="Whether, or how hard, models that can think do so; absent: as the model does by itself."
    )
    connections: int = Field(64, ge=1, le=1024, description="Most connections to Ollama at the same time.")
    connect_seconds: float = Field(2.0, gt=0, description="How long connecting may take.")
    first_token_seconds: float = Field(
        300.0, gt=0, description="How long Ollama may be silent before the first token: prefill, and its own queue."
    )
    load_seconds: float = Field(600.0, gt=0, description="How long loading a model may take.")
    stall_seconds: float = Field(
        120.0, gt=0, description="How long it may be silent between tokens. It is while it makes a long tool call."
    )
    poll_seconds: float = Field(1.0, gt=0, le=1.5, description="Seconds between two looks at what Ollama has and runs.")
    start_seconds: float = Field(10.0, ge=0, description="How long starting waits for Ollama to answer.")
    provider: str = Field("ollama", min_length=1, description="Who is named as the provider of the models.")
    capabilities: dict[str, float] | None = Field(
        None, description="Kind of work to score in [0, 1] of every model; absent: middling at all it can do."
    )

    @field_validator("url")
    @classmethod
    def _http(cls, value: str) -> str:
        parts = urlsplit(value if "://" in value else f"http://{value}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("must be the URL of an Ollama server, such as http://127.0.0.1:11434")
        return parts.geturl().rstrip("/")

    @field_validator("models", mode="before")
    @classmethod
    def _names_suffice(cls, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [{"name": item} if isinstance(item, str) else item for item in value]
        return value

    @field_validator("warm")
    @classmethod
    def _one_spelling(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(short_name(name) for name in value))

    @field_validator("keep_alive")
    @classmethod
    def _duration(cls, value: str | float) -> str | float:
        if not _DURATION.fullmatch(str(value)):
            raise ValueError("must be seconds, or a duration such as 90s, 10m or 24h, or -1")
        # As text, Ollama wants a unit.
        return float(value) if _NUMBER.fullmatch(str(value)) else value

    @field_validator("capabilities")
    @classmethod
    def _known_kinds(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        return _checked_capabilities(value)

    @model_validator(mode="after")
    def _names_differ(self) -> OllamaSettings:
        names = [model.name for model in self.models]
        if len(set(names)) != len(names):
            raise ValueError("models: two have the same name")
        return self


def _checked_capabilities(value: dict[str, float] | None) -> dict[str, float] | None:
    for kind, score in (value or {}).items():
        if kind not in _TASK_TYPES:
            raise ValueError(f"no kind of work is called {kind!r}; known are {', '.join(_TASK_TYPES)}")
        if not 0 <= score <= 1:
            raise ValueError(f"the score of {kind} must be in [0, 1]")
    return value
