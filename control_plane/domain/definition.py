"""Model definitions: what the operator knows of a model that its server cannot know."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from msgspec.structs import replace

from control_plane.domain.model import ModelCard, ModelName, Price, Provider
from control_plane.domain.task import Feature, TaskType


@dataclass(frozen=True, slots=True)
class ModelDefinition:
    """One entry of a provider's YAML file; None leaves the server's own word in force."""

    provider: Provider
    name: ModelName
    capabilities: Mapping[TaskType, float] | None = None
    context_length: int | None = None
    features: Feature | None = None
    price: Price | None = None
    initial_success: float | None = None
    initial_ttft: float | None = None
    initial_tpot: float | None = None

    def apply(self, card: ModelCard) -> ModelCard:
        """The card with this definition's values. The shorter context length holds: the server's
        is what its memory allows, the definition's what the operator allows."""
        return replace(
            card,
            capabilities=card.capabilities if self.capabilities is None else self.capabilities,
            context_length=min(card.context_length, self.context_length or card.context_length),
            features=card.features if self.features is None else self.features,
            price=card.price if self.price is None else self.price,
        )


class Definitions:
    """All definitions, by provider and name."""

    def __init__(self, definitions: Iterable[ModelDefinition] = ()) -> None:
        self._by_id = {(definition.provider, definition.name): definition for definition in definitions}

    def __iter__(self) -> Iterator[ModelDefinition]:
        return iter(self._by_id.values())

    def get(self, provider: Provider, name: ModelName) -> ModelDefinition | None:
        return self._by_id.get((provider, name))

    def apply(self, card: ModelCard) -> ModelCard:
        definition = self.get(card.provider, card.name)
        return definition.apply(card) if definition else card
