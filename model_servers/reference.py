"""The tables of settings in the README files, made from the settings models.

`python -m model_servers.reference` writes them anew; a test fails when they are out of date.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel

from model_servers.config import SECTION, ModelServerSettings
from model_servers.engines._hosted.settings import HostedModel
from model_servers.engines._ollama.settings import OllamaModel, OllamaSettings
from model_servers.engines._openai.settings import NamedModel
from model_servers.engines.anthropic import AnthropicSettings
from model_servers.engines.bedrock import BedrockSettings
from model_servers.engines.openai_compatible import OpenAICompatibleSettings
from model_servers.engines.simulated.settings import Fault, SimulatedModel, SimulatedSettings
from model_servers.engines.vllm import VllmSettings
from modelyard.program.documents import renew
from modelyard.program.settings import keys, table

_HERE = Path(__file__).parent


def engine_table(model: type[BaseModel]) -> str:
    """Settings of an engine: they have no environment variables or flags of their own."""
    rows = ["| key | default | meaning |", "|---|---|---|"]
    for key in keys(model):
        default = "" if key.default in (None, "") or isinstance(key.default, dict) else f"`{_short(key.default)}`"
        rows.append(f"| `{key.dotted}` | {default} | {key.description} |")
    return "\n".join(rows)


def _short(value: object) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join("..." if isinstance(item, BaseModel) else str(item) for item in value) + "]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def tables() -> dict[Path, dict[str, str]]:
    """For each document, the text between its markers `<!-- name -->` and `<!-- end of name -->`."""
    return {
        _HERE / "README.md": {"settings": table(ModelServerSettings, SECTION)},
        _HERE / "engines" / "README.md": {
            "simulated": engine_table(SimulatedSettings),
            "simulated models": engine_table(SimulatedModel),
            "simulated faults": engine_table(Fault),
            "ollama": engine_table(OllamaSettings),
            "ollama models": engine_table(OllamaModel),
            "anthropic": engine_table(AnthropicSettings),
            "bedrock": engine_table(BedrockSettings),
            "hosted models": engine_table(HostedModel),
            "openai_compatible": engine_table(OpenAICompatibleSettings),
            "openai_compatible models": engine_table(NamedModel),
            "vllm": engine_table(VllmSettings),
        },
    }


if __name__ == "__main__":
    renew(tables())
