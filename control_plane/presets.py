"""Presets: named bundles of parameters and requirements, read from YAML, applied to requests.

    # any file of models_dir, beside `models` or without
    presets:
      researcher:
        description: Gathers facts and names its sources.
        task_type: research
        priority: normal
        system: You gather facts. Say where each one comes from.
        sampling: {temperature: 0.3, max_tokens: 2048}
        timeout: 120                                  # seconds
        requirements: {min_context_length: 8192, features: [function_calling]}
        weights: {capability: 5, latency: 1}          # of the selector, for such requests
        providers:                                    # what differs where a provider is chosen
          openai: {model: gpt-large, sampling: {temperature: 0.2}}
          bedrock: {model: claude-large, region: eu-west-1}

Every key is optional. A provider's entry holds for requests that ask for that provider, and for
those that name neither model nor provider when it is the `default_provider`. `region` is required
for bedrock and admits only servers with the label `region` of that value.

The presets of presets.yaml beside this module are always there; one of the same name replaces it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationInfo, field_validator, model_validator

from control_plane.domain.task import Feature, Priority, TaskType
from control_plane.selection.policy import Weights
from modelyard.program.settings import Settings
from modelyard.rpc.errors import Violation, invalid
from modelyard.rpc.validation import check_generate_request
from modelyard.v1.generation_pb2 import ROLE_SYSTEM, ROLE_USER, ContentPart, Message
from modelyard.v1.orchestrator_pb2 import GenerateRequest

BUILT_IN = Path(__file__).with_name("presets.yaml")

REGIONAL = frozenset({"bedrock"})
"""Providers whose entry needs a region."""

Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


# ------------------------------------------------------------------ reading ---


class _Sampling(Settings):
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    stop: Annotated[tuple[str, ...], Field(max_length=16)] = ()
    seed: Annotated[int, Field(ge=0, lt=2**64)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None


class _Requirements(Settings):
    model: str = ""
    provider: str = ""
    min_context_length: Annotated[int, Field(ge=0)] = 0
    features: list[str] = Field(default_factory=list)
    labels: dict[str, str] = Field(default_factory=dict)

    @field_validator("features")
    @classmethod
    def _known(cls, value: list[str]) -> list[str]:
        return [_member(Feature, name, "feature") for name in value]


class _Provider(Settings):
    """What differs where a provider is chosen."""

    model: Annotated[str, Field(min_length=1)]
    region: Annotated[str, Field(min_length=1)] | None = None
    sampling: _Sampling = _Sampling()


class PresetEntry(Settings):
    """One entry under `presets`."""

    description: str = ""
    task_type: str = ""
    priority: str = ""
    system: str = ""
    sampling: _Sampling = _Sampling()
    timeout: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    requirements: _Requirements = _Requirements()
    weights: dict[str, Weight] | None = None
    providers: dict[str, _Provider] = Field(default_factory=dict)

    @field_validator("task_type", "priority")
    @classmethod
    def _known(cls, value: str, info: ValidationInfo) -> str:
        if not value:
            return value
        return (
            _member(TaskType, value, "kind of work")
            if info.field_name == "task_type"
            else _member(Priority, value, "priority")
        )

    @field_validator("weights")
    @classmethod
    def _usable(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        if value is not None:
            known = [each.name for each in fields(Weights)]
            for name in value:
                if name not in known:
                    raise ValueError(f"unknown scorer {name!r}; known: {', '.join(known)}")
            Weights(**value)
        return value

    @model_validator(mode="after")
    def _regions(self) -> PresetEntry:
        for name, entry in self.providers.items():
            if name in REGIONAL and entry.region is None:
                raise ValueError(f"providers.{name}.region is required, for example us-east-1")
        return self


def _member(enum: Any, name: str, what: str) -> str:
    known = [member.name.lower() for member in enum if member]
    if name not in known:
        raise ValueError(f"unknown {what} {name!r}; known: {', '.join(known)}")
    return name


# ------------------------------------------------------------------ applying ---


@dataclass(frozen=True, slots=True)
class Preset:
    """A preset, ready to be applied."""

    name: str
    description: str
    defaults: GenerateRequest
    """What a request gets where it says nothing itself; `input.messages` has at most a system message."""
    by_provider: Mapping[str, GenerateRequest]
    """What comes on top where this provider is chosen."""
    timeout: float | None = None
    """Seconds; the caller's own deadline holds as well."""
    weights: Mapping[str, float] | None = None
    """Weights that differ from the selector's."""


@dataclass(frozen=True, slots=True)
class Presets:
    """All presets, by name."""

    by_name: Mapping[str, Preset] = field(default_factory=dict)
    default: str = ""
    """The preset of requests that name none; empty: none."""
    default_provider: str = ""
    """Whose entry holds for requests that name neither model nor provider; empty: nobody's."""

    def __iter__(self) -> Iterator[Preset]:
        return iter(sorted(self.by_name.values(), key=lambda preset: preset.name))

    def of(self, request: GenerateRequest) -> Preset | None:
        """The preset of a request. Raises INVALID_REQUEST for an unknown name."""
        name = request.preset or self.default
        if not name:
            return None
        found = self.by_name.get(name)
        if found is None:
            known = ", ".join(sorted(self.by_name)) or "none"
            raise invalid([Violation("preset", f"no preset is called {name[:100]!r}; known: {known}")])
        return found

    def fill(self, request: GenerateRequest) -> tuple[GenerateRequest, Preset | None]:
        """The request with what its preset gives where it says nothing itself; the request itself without one.

        Raises INVALID_REQUEST for an unknown preset.
        """
        preset = self.of(request)
        if preset is None:
            return request, None
        filled = GenerateRequest()
        filled.CopyFrom(preset.defaults)
        asked = request.requirements
        variant = preset.by_provider.get(asked.provider or ("" if asked.model else self.default_provider))
        if variant is not None:
            if variant.input.sampling.stop:
                del filled.input.sampling.stop[:]
            filled.MergeFrom(variant)
        if asked.model or asked.provider:  # whoever pins one of them means no other
            filled.requirements.model = filled.requirements.provider = ""
            if variant is not None and not asked.model:
                filled.requirements.model = variant.requirements.model
        _make_way(filled, request)
        filled.MergeFrom(request)
        filled.preset = preset.name
        return filled, preset


def _make_way(filled: GenerateRequest, request: GenerateRequest) -> None:
    """Merging appends to lists; where the request has a list of its own, the preset's goes."""
    source = request.input
    if source.sampling.stop:
        del filled.input.sampling.stop[:]
    if source.prompt or any(message.role == ROLE_SYSTEM for message in source.messages):
        del filled.input.messages[:]


def compile_presets(entries: Mapping[str, PresetEntry], *, default: str = "", default_provider: str = "") -> Presets:
    """The presets of some entries on top of the built-in ones.

    Raises ValueError: `default` names none of them, or a preset can make no valid request.
    """
    presets = Presets(
        {name: _preset(name, entry) for name, entry in {**_built_in(), **entries}.items()}, default, default_provider
    )
    if default and default not in presets.by_name:
        raise ValueError(f"no preset is called {default!r}; known: {', '.join(sorted(presets.by_name))}")
    return presets


@cache
def _built_in() -> Mapping[str, PresetEntry]:
    from control_plane.definitions import read_entries  # it reads both kinds of entries, so it knows this module

    return read_entries(BUILT_IN).presets


def _preset(name: str, entry: PresetEntry) -> Preset:
    defaults = GenerateRequest(
        task_type=TaskType[entry.task_type.upper()].value if entry.task_type else 0,  # type: ignore[arg-type]
        priority=Priority[entry.priority.upper()].value if entry.priority else 0,  # type: ignore[arg-type]
    )
    if entry.system:
        defaults.input.messages.append(Message(role=ROLE_SYSTEM, content=[ContentPart(text=entry.system)]))
    _sample(defaults, entry.sampling)
    wanted = entry.requirements
    if wanted != _Requirements():
        needed = defaults.requirements
        needed.model, needed.provider = wanted.model, wanted.provider
        needed.min_context_length = wanted.min_context_length
        for feature in wanted.features:
            needed.features.append(Feature[feature.upper()].bit_length() - 1)  # type: ignore[arg-type]
        needed.labels.update(wanted.labels)
    by_provider = {}
    for provider, variant in entry.providers.items():
        change = GenerateRequest()
        change.requirements.model, change.requirements.provider = variant.model, provider
        if variant.region:
            change.requirements.labels["region"] = variant.region
        _sample(change, variant.sampling)
        by_provider[provider] = change
    preset = Preset(name, entry.description, defaults, by_provider, entry.timeout, entry.weights)
    _check(preset)
    return preset


def _sample(request: GenerateRequest, given: _Sampling) -> None:
    values = given.model_dump(exclude_none=True, exclude_defaults=True)
    for key, value in values.items():
        if key == "stop":
            request.input.sampling.stop.extend(value)
        else:
            setattr(request.input.sampling, key, value)


def _check(preset: Preset) -> None:
    """What the contract refuses in requests is refused in presets, before any request comes."""
    hello = GenerateRequest()
    hello.input.messages.append(Message(role=ROLE_USER, content=[ContentPart(text="-")]))
    for provider in ("", *preset.by_provider):
        probe = GenerateRequest()
        probe.CopyFrom(hello)
        probe.requirements.provider = provider
        filled, _ = Presets({preset.name: preset}, preset.name).fill(probe)
        violations = check_generate_request(filled)
        if violations:
            raise ValueError("; ".join(f"preset {preset.name}: {v.field} {v.description}" for v in violations))


def entries_in(files: Iterable[tuple[Path, Mapping[str, PresetEntry]]]) -> dict[str, PresetEntry]:
    """The entries of several files. Raises ValueError when two of them have the same name."""
    found: dict[str, PresetEntry] = {}
    where: dict[str, Path] = {}
    for path, entries in files:
        for name, entry in entries.items():
            if name in found:
                raise ValueError(f"{path}: preset {name!r} is in {where[name]} already")
            found[name], where[name] = entry, path
    return found
