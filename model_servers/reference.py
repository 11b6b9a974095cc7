"""The tables of settings in the README files, made from the settings models.

`python -m model_servers.reference` writes them anew; a test fails when they are out of date.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from pydantic import BaseModel

from model_servers.config import SECTION, ModelServerSettings
from model_servers.engines.simulated.settings import Fault, SimulatedModel, SimulatedSettings
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
        },
    }


def renew(document: str, parts: dict[str, str]) -> str:
    """The document with its tables replaced. Raises ValueError if a marker is missing."""
    for name, text in parts.items():
        pattern = re.compile(f"(<!-- {name} -->\n).*?(<!-- end of {name} -->)", re.DOTALL)
        document, count = pattern.subn(lambda match, text=text: f"{match[1]}{text}\n{match[2]}", document)  # type: ignore[misc]
        if count != 1:
            raise ValueError(f"{count} places are marked {name!r}, there must be one")
    return document


def main() -> int:
    for path, parts in tables().items():
        path.write_text(renew(path.read_text(encoding="utf-8"), parts), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
