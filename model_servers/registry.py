"""Finding engine plug-ins by name: entry points of the group `modelyard.engines`.

The engines that come with modelyard are plug-ins like any other. The table below only helps a
source tree whose installed metadata is older than its pyproject.toml.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from pydantic import BaseModel, ValidationError

from model_servers.engine import Engine, EngineFailed, EnginePlugin

GROUP = "modelyard.engines"

BUILT_IN = {
    "simulated": "model_servers.engines.simulated:plugin",
    "mlx": "model_servers.engines.mlx:plugin",
    "ollama": "model_servers.engines.ollama:plugin",
    "anthropic": "model_servers.engines.anthropic:plugin",
    "bedrock": "model_servers.engines.bedrock:plugin",
    "openai_compatible": "model_servers.engines.openai_compatible:plugin",
    "vllm": "model_servers.engines.vllm:plugin",
}


class EngineUnavailable(Exception):
    """The engine cannot be used on this host; the message says why and what helps."""


def available() -> dict[str, EntryPoint]:
    """Every installed plug-in by name; an installed one wins over the table."""
    found = {name: EntryPoint(name, value, GROUP) for name, value in BUILT_IN.items()}
    found.update({point.name: point for point in entry_points(group=GROUP)})
    return found


def find(name: str) -> EnginePlugin:
    """The plug-in of that name. Raises EngineUnavailable."""
    known = available()
    if name not in known:
        raise EngineUnavailable(f"engine: no engine is called {name!r}; installed are: {', '.join(sorted(known))}")
    point = known[name]
    try:
        plugin = getattr(importlib.import_module(point.module), point.attr)
    except ImportError as error:
        raise EngineUnavailable(f"engine: {name!r} cannot be loaded from {point.value!r}: {error}") from error
    except AttributeError:
        raise EngineUnavailable(f"engine: {name!r}: there is no {point.value!r}") from None
    if not isinstance(plugin, EnginePlugin):
        raise EngineUnavailable(f"engine: {name!r}: {point.value!r} is not an EnginePlugin")
    return plugin


def validate(plugin: EnginePlugin, given: Mapping[str, Any]) -> BaseModel:
    """The engine's own settings. Raises EngineUnavailable naming each key that does not fit."""
    try:
        return plugin.settings.model_validate(dict(given))
    except ValidationError as error:
        lines = []
        for problem in error.errors(include_url=False):
            key = ".".join(("engine_settings", *map(str, problem["loc"])))
            if problem["type"] == "extra_forbidden":
                known = ", ".join(plugin.settings.model_fields)
                lines.append(f"{key}: unknown setting of engine {plugin.name!r}; it knows: {known}")
            elif problem["type"] == "missing":
                lines.append(f"{key}: {problem['msg']}")
            else:
                lines.append(f"{key}: {problem['msg']} (got {problem['input']!r})")
        raise EngineUnavailable("\n".join(lines)) from None


def create(plugin: EnginePlugin, settings: BaseModel) -> Engine:
    """The engine, not started. Raises EngineUnavailable when its vendor's library is missing."""
    try:
        return plugin.create(settings)
    except ImportError as error:
        cure = f"; install it with: pip install 'modelyard[{plugin.extra}]'" if plugin.extra else ""
        missing = error.name or str(error)
        raise EngineUnavailable(f"engine: {plugin.name!r} needs {missing}, which is not installed{cure}") from error
    except EngineFailed as error:
        raise EngineUnavailable(f"engine: {plugin.name!r}: {error}") from error
