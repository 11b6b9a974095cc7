"""The policies by name."""

from __future__ import annotations

from control_plane.simulation.baselines import BASELINES
from control_plane.simulation.dispatcher import Factory
from control_plane.simulation.harness import Maker, blind
from control_plane.simulation.oracle import ORACLES
from control_plane.simulation.ours import Ours

BEST_ORACLE = "oracle"
"""Stands for whichever of `ORACLES` does best in a scenario."""

POLICIES: dict[str, Factory] = {"modelyard": Ours, **BASELINES}
"""Policies that see what a control plane sees."""

NAMES = (*POLICIES, *ORACLES, BEST_ORACLE)


def makers(name: str, seed: int) -> dict[str, Maker]:
    """What a name stands for: one policy, or for `oracle` all of the oracles. Raises KeyError."""
    if name == BEST_ORACLE:
        return dict(ORACLES)
    if name in ORACLES:
        return {name: ORACLES[name]}
    return {name: blind(POLICIES[name], seed)}
