"""The models of one Ollama: what they can do, and where each is in its life. No I/O."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from model_servers.engine import EngineModel, Feature, ModelState, TaskType
from model_servers.engines._ollama.names import at_least
from model_servers.engines._ollama.settings import DEFAULT_CAPABILITIES, OllamaModel, OllamaSettings
from model_servers.engines._ollama.wire import Running, own_stops

_REFUSES = (0, 12, 6)
"""The first version that keeps `truncate` and `shift`."""
_LOGPROBS = (0, 12, 11)

_NEEDS = {
    TaskType.EMBEDDING: Feature.EMBEDDING,
    TaskType.TOOL_USE: Feature.FUNCTION_CALLING,
    TaskType.VISION: Feature.VISION,
}


@dataclass(frozen=True, slots=True)
class Shown:
    """What Ollama tells of a model that it has."""

    digest: str
    size: int
    """Bytes of its files."""
    quantization: str
    context_length: int
    """The longest it was trained for, tokens; 0: not told."""
    abilities: frozenset[str]
    stops: tuple[str, ...] = ()

    @property
    def generates(self) -> bool:
        return "completion" in self.abilities


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model in memory. Bytes and tokens; 0: not told."""

    size: int = 0
    size_vram: int = 0
    context_length: int = 0


def shown(digest: str, size: int, answer: Any) -> Shown:
    """From the client's ShowResponse."""
    facts: Mapping[str, Any] = answer.modelinfo or {}
    details = answer.details
    return Shown(
        digest=digest,
        size=size,
        quantization=(details.quantization_level or "") if details else "",
        context_length=_fact(facts, "context_length"),
        abilities=_abilities(answer.capabilities, facts),
        stops=own_stops(answer.parameters),
    )


def _fact(facts: Mapping[str, Any], name: str) -> int:
    value = facts.get(f"{facts.get('general.architecture')}.{name}")
    return value if isinstance(value, int) else 0


def _abilities(told: Sequence[str] | None, facts: Mapping[str, Any]) -> frozenset[str]:
    if told is not None:
        return frozenset(told)
    # Versions before 0.6.4 do not say; what pools its outputs is there to embed.
    pools = any(name.endswith(".pooling_type") for name in facts)
    return frozenset({"embedding" if pools else "completion"})


def features(abilities: frozenset[str], version: str) -> Feature:
    found = Feature.NONE
    if "completion" in abilities:
        found |= Feature.STREAMING | Feature.JSON | Feature.JSON_SCHEMA
        if "tools" in abilities:
            found |= Feature.FUNCTION_CALLING
        if "vision" in abilities:
            found |= Feature.VISION
        if at_least(version, _LOGPROBS):
            found |= Feature.LOGPROBS
    if "embedding" in abilities:
        found |= Feature.EMBEDDING
    return found


@dataclass(slots=True)
class Step:
    """Something that is being done to a model now."""

    state: ModelState
    detail: str = ""


class Catalogue:
    """All that is known of the models, told by Ollama or seen by ourselves."""

    def __init__(self, settings: OllamaSettings) -> None:
        self._settings = settings
        self._named = {model.name: model for model in settings.models}
        self.version = ""
        self.here: dict[str, Shown] = {}
        self.loaded: dict[str, Loaded] = {}
        self.load_seconds: dict[str, float] = {}
        """What the last load took."""
        self.failed: dict[str, str] = {}
        """Why the last pull or load did not work."""
        self._steps: dict[str, list[Step]] = {}

    @property
    def wanted(self) -> tuple[str, ...]:
        """Models that the settings ask for."""
        return tuple(dict.fromkeys((*self._named, *self._settings.warm)))

    @contextmanager
    def doing(self, name: str, state: ModelState) -> Iterator[Step]:
        """While inside, the model is in that state."""
        step = Step(state)
        steps = self._steps.setdefault(name, [])
        steps.append(step)
        try:
            yield step
        finally:
            steps.remove(step)
            if not steps:
                del self._steps[name]

    def state(self, name: str) -> tuple[ModelState, str]:
        """Where the model is in its life, and a detail for people."""
        if steps := self._steps.get(name):
            return steps[-1].state, steps[-1].detail
        if name in self.loaded:
            return ModelState.WARM, ""
        if name in self.failed:
            return ModelState.FAILED, self.failed[name]
        if name in self.here:
            return ModelState.COLD, ""
        return ModelState.ABSENT, f"not pulled; `ollama pull {name}` fetches it"

    def num_ctx(self, name: str) -> int:
        """The context length that the model is run with, tokens."""
        model = self._named.get(name)
        found = self.here.get(name)
        own = found.context_length if found else 0
        wanted = (model.num_ctx if model else None) or self._settings.num_ctx
        if wanted is None:
            wanted = self._settings.max_num_ctx
        return min(wanted, own) if own else wanted

    def running(self, name: str) -> Running:
        """How to run a model that is here."""
        settings = self._settings
        found = self.here[name]
        return Running(
            name=name,
            num_ctx=self.num_ctx(name),
            keep_alive=-1 if name in settings.warm else settings.keep_alive,
            refuses=at_least(self.version, _REFUSES),
            stops=found.stops,
            think=settings.think if "thinking" in found.abilities else None,
        )

    def describe(self) -> tuple[EngineModel, ...]:
        """Every model, in the order of the settings, then as Ollama lists them."""
        return tuple(self._describe(name) for name in dict.fromkeys((*self.wanted, *self.here, *self._steps)))

    def _describe(self, name: str) -> EngineModel:
        found, loaded = self.here.get(name), self.loaded.get(name)
        # Of a model that is still to be pulled nothing is known; most can at least complete text.
        able = features(found.abilities if found else frozenset({"completion"}), self.version)
        state, detail = self.state(name)
        num_ctx = self.num_ctx(name)
        return EngineModel(
            name=name,
            provider=self._settings.provider,
            context_length=min(num_ctx, loaded.context_length or num_ctx) if loaded else num_ctx,
            capabilities=self._capabilities(self._named.get(name), able),
            features=able,
            quantization=found.quantization if found else "",
            state=state,
            state_detail=detail,
            memory_bytes=(loaded.size if loaded else 0) or (found.size if found else 0),
            load_seconds=self.load_seconds.get(name),
        )

    def _capabilities(self, model: OllamaModel | None, able: Feature) -> dict[int, float]:
        scores = (model.capabilities if model else None) or self._settings.capabilities or DEFAULT_CAPABILITIES
        found = {}
        for kind, score in scores.items():
            task = TaskType[kind.upper()]
            if _NEEDS.get(task, Feature.STREAMING) in able:
                found[int(task)] = score
        return found
