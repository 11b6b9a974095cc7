"""Read models_dir: model definitions, one YAML file per provider, top-level key `models`; and presets, key `presets`.

    # ollama.yaml: the file's name is the provider
    models:
      llama3.1:8b:
        capabilities: {chat: 0.7, code_generation: 0.5}   # 0 to 1 per kind of work
        context_length: 8192
        features: [streaming, json, function_calling]
        price: {prompt: 0, cached_prompt: 0, completion: 0}   # US dollars per million tokens
        initial: {success: 0.95, ttft: 0.4, tpot: 0.05}       # until measured

Every key is optional. Presets are described in presets.py. A mistake is refused with file, line and key.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, field_validator, model_validator

from control_plane.domain.definition import Definitions, ModelDefinition
from control_plane.domain.model import ModelName, Price, Provider
from control_plane.domain.task import Feature, TaskType
from control_plane.initial_stats import InitialStats
from control_plane.presets import PresetEntry, entries_in
from modelyard.program.settings import Settings, SettingsError, YamlFile
from modelyard.rpc.validation import MAX_AMOUNT, MAX_CONTEXT_LENGTH, MAX_SECONDS, MAX_TEXT

log = logging.getLogger(__name__)

Score = Annotated[float, Field(ge=0, le=1)]
# The bounds are those of a model server's report: what is defined is shown in the same fields.
Usd = Annotated[float, Field(ge=0, le=MAX_AMOUNT)]
Seconds = Annotated[float, Field(gt=0, le=MAX_SECONDS)]
Name = Annotated[str, Field(min_length=1, max_length=MAX_TEXT)]


class _Price(Settings):
    prompt: Usd = 0.0
    cached_prompt: Usd = 0.0
    completion: Usd = 0.0


class _Model(Settings):
    capabilities: dict[str, Score] | None = None
    context_length: Annotated[int, Field(ge=1, le=MAX_CONTEXT_LENGTH)] | None = None
    features: list[str] | None = None
    price: _Price | None = None
    initial: InitialStats = InitialStats()

    @field_validator("capabilities")
    @classmethod
    def _known_kinds(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        _names_in(value or (), TaskType, "kind of work")
        return value

    @field_validator("features")
    @classmethod
    def _known_features(cls, value: list[str] | None) -> list[str] | None:
        _names_in(value or (), [feature for feature in Feature if feature], "feature")
        return value


class Entries(Settings):
    """What one file holds."""

    models: dict[Name, _Model] = Field(default_factory=dict)
    presets: dict[Name, PresetEntry] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _something(self) -> Entries:
        if not self.model_fields_set:
            raise ValueError("must have a top-level key 'models' or 'presets'")
        return self


@dataclass(frozen=True, slots=True)
class Catalogue:
    """What a folder holds."""

    definitions: Definitions
    presets: Mapping[str, PresetEntry]


def _names_in(names: Any, enum: Any, what: str) -> None:
    known = [member.name.lower() for member in enum]
    for name in names:
        if name not in known:
            raise ValueError(f"unknown {what} {name!r}; known: {', '.join(known)}")


def read_entries(path: Path) -> Entries:
    """The entries of one file. Raises SettingsError."""
    document = YamlFile(path)
    try:
        return Entries.model_validate(document.data if document.data is not None else {})
    except ValidationError as error:
        lines = []
        for problem in error.errors(include_url=False):
            message = "unknown key" if problem["type"] == "extra_forbidden" else problem["msg"]
            lines.append(f"{document.where(problem['loc'])}: {message}")
        raise SettingsError("\n".join(lines)) from None


def _definitions(path: Path, entries: Entries) -> Iterator[ModelDefinition]:
    if not path.stem.isprintable():  # bytes that are no UTF-8 could not be told to anybody
        raise SettingsError(f"{str(path)!r}: the name of the file is the provider's and must be printable")
    provider = Provider(path.stem)
    for name, model in entries.models.items():
        features = None
        if model.features is not None:
            features = Feature.NONE
            for feature in model.features:
                features |= Feature[feature.upper()]
        yield ModelDefinition(
            provider=provider,
            name=ModelName(name),
            capabilities=None
            if model.capabilities is None
            else {TaskType[kind.upper()]: score for kind, score in model.capabilities.items()},
            context_length=model.context_length,
            features=features,
            price=Price(**model.price.model_dump()) if model.price else None,
            initial_success=model.initial.success,
            initial_ttft=model.initial.ttft,
            initial_tpot=model.initial.tpot,
        )


def read(folder: Path) -> Catalogue:
    """Everything in a folder. Raises SettingsError naming file, line and key."""
    if not folder.is_dir():
        raise SettingsError(f"models_dir: {folder} is not a folder")
    files = [(path, read_entries(path)) for path in _files(folder)]
    try:
        presets = entries_in((path, entries.presets) for path, entries in files)
    except ValueError as error:
        raise SettingsError(str(error)) from None
    return Catalogue(
        Definitions(definition for path, entries in files for definition in _definitions(path, entries)), presets
    )


def _files(folder: Path) -> list[Path]:
    return sorted([*folder.glob("*.yaml"), *folder.glob("*.yml")])


class Watcher:
    """Notices changed files; a bad edit keeps what was read before and is logged once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._seen = self._stamp()

    def _stamp(self) -> tuple[tuple[str, int, int], ...]:
        stamps = []
        for path in _files(self._folder):
            try:
                status = path.stat()
            except OSError:
                continue  # gone between listing and looking: the next look will tell
            stamps.append((path.name, status.st_mtime_ns, status.st_size))
        return tuple(stamps)

    def poll(self) -> Catalogue | None:
        """Everything anew if something changed and all of it is sound, else None."""
        stamp = self._stamp()
        if stamp == self._seen:
            return None
        self._seen = stamp
        try:
            catalogue = read(self._folder)
        except SettingsError as error:
            log.error("models and presets not changed, the previous ones stay in force:\n%s", error)
            return None
        log.info("models and presets read again from %s", self._folder)
        return catalogue
