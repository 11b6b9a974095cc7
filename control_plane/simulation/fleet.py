"""Fleets and scripts of faults, built in or from YAML files."""

from __future__ import annotations

from control_plane.simulation.engine import HostSpec

CLASSES = {
    "gpu": HostSpec("", "gpu", 10_000.0, 80.0, 2_000.0, 64, 500_000),
    "mac": HostSpec("", "mac", 800.0, 40.0, 120.0, 8, 100_000),
    "cpu": HostSpec("", "cpu", 120.0, 12.0, 24.0, 2, 20_000),
}
"""Classes of hardware that a fleet may name: rates in tokens/s."""

BUILT_IN = {"yardstick": {"gpu": 2, "mac": 3, "cpu": 4}, "uniform": {"gpu": 4}}
