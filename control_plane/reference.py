"""The tables of settings and metrics in README.md, made from the code.

`python -m control_plane.reference` writes them anew; a test fails when they are out of date.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from control_plane.app import ControlPlane, SystemClock
from control_plane.config import SECTION, ControlPlaneSettings
from modelyard.program.documents import renew
from modelyard.program.settings import table


def metrics_table() -> str:
    """Every metric with its kind, labels and meaning."""
    plane = ControlPlane(ControlPlaneSettings(), SystemClock())
    rows = ["| metric | kind | meaning |", "|---|---|---|"]
    for family in sorted(plane.metrics.registry.collect(), key=lambda family: family.name):
        name = family.name + ("_total" if family.type == "counter" else "")
        rows.append(f"| `{name}` | {family.type} | {family.documentation} |")
    return "\n".join(rows)


def documents() -> Mapping[Path, Mapping[str, str]]:
    """For each document, the text between its markers."""
    return {
        Path(__file__).with_name("README.md"): {
            "settings": table(ControlPlaneSettings, SECTION),
            "metrics": metrics_table(),
        }
    }


if __name__ == "__main__":
    renew(documents())
