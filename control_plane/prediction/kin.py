"""Partial pooling: what a row may be expected to be like, from those that are like it.

Row <- (engine, device, model, fingerprint) <- (engine, device, model) <- (engine, device) <- engine <- all. Each group
is the sum of what its rows have learned; the mean of a group is drawn from that of the group above, the more so the
less its own rows know (normal-normal shrinkage). Everything is a logarithm: hosts differ by factors.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

from control_plane.prediction.features import Kin, Vector

GroupKey: TypeAlias = tuple[str, ...]


def chain(kin: Kin) -> tuple[GroupKey, ...]:
    """The groups of a row, the widest first."""
    path = (kin.engine, kin.device, kin.model, kin.fingerprint)
    return tuple(path[:depth] for depth in range(len(path) + 1))


DIFFER: tuple[float, ...] = (0.0, 0.7, 1.5, 1.0, 0.4)
"""Standard deviation of ln(speed) of a group's mean around that of the group above, by depth: engines differ by a
factor of 2, classes of hardware by 5, models by 3, configurations of a model by 1.5."""
WITHIN: tuple[float, ...] = (2.0, 1.8, 1.2, 0.5, 0.3)
"""Standard deviation of rows around the mean of their group, by depth, before it is known."""
WITHIN_WEIGHT = 3.0
"""Rows for which that counts."""


NOTICEABLE = 0.05
"""Of ln(coefficient)."""
TINY = 1e-6
"""Of a weight: none."""


@dataclass(slots=True)
class Share:
    """What a row has put into the sums of its groups; shape (3, coefficients): how much it knows of each coefficient
    (1: well), and that times ln(coefficient) and its square."""

    sums: Vector
    empty: bool = True


@dataclass(slots=True)
class Group:
    """Sums over rows; shape (3, coefficients)."""

    sums: Vector
    gone: Vector
    """Of rows that are no more, each halving those before: a host that comes and goes is not many hosts."""
    rows: int = 0
    """Alive ones. Such a group is not forgotten."""
    moved: float = 0.0
    """How far the mean has moved since the version grew, at most."""
    version: int = 0
    """Grows whenever the mean has moved noticeably."""
    expected: tuple[int, list[float], list[float]] | None = None
    """Of a row that knows nothing itself: what `expect` said, and the version of which."""


@dataclass(slots=True)
class KinTree:
    """Groups by path."""

    size: int
    """Coefficients of a row."""
    kept: int
    """Most groups without a row that are remembered."""
    groups: OrderedDict[GroupKey, Group] = field(default_factory=OrderedDict)

    def join(self, path: tuple[GroupKey, ...]) -> tuple[Group, ...]:
        """The groups of a new row."""
        groups = tuple(self._group(key) for key in path)
        for group in groups:
            group.rows += 1
        self._trim()
        return groups

    def leave(self, groups: tuple[Group, ...], share: Share) -> None:
        """A row is no more; its kin remember it."""
        for group in groups:
            group.rows -= 1
            group.sums -= share.sums
            group.gone = group.gone / 2 + share.sums

    def remember(self, path: GroupKey, gone: tuple[float, ...]) -> None:
        """Take over what rows of a group have left behind; ignored if it cannot be."""
        sums = np.array(gone)
        if sums.shape == (3 * self.size,) and np.isfinite(sums).all() and (sums[: self.size] >= 0).all():
            group = self._group(path)
            group.gone = group.gone + sums.reshape(3, self.size)
            group.version += 1
            self._trim()

    def _group(self, key: GroupKey) -> Group:
        group = self.groups.get(key)
        if group is None:
            group = self.groups[key] = Group(np.zeros((3, self.size)), np.zeros((3, self.size)))
        self.groups.move_to_end(key)
        return group

    def _trim(self) -> None:
        excess = len(self.groups) - self.kept
        if excess > 0:
            idle = [key for key, group in self.groups.items() if not group.rows and key]
            for key in idle[:excess]:
                del self.groups[key]


def version(groups: tuple[Group, ...]) -> int:
    """Grows whenever one of the groups has moved noticeably."""
    return sum([group.version for group in groups])


def contribute(groups: tuple[Group, ...], share: Share, weight: Vector, value: Vector) -> None:
    """Replace what a row has put into its groups: `weight` in [0, 1] and ln(coefficient) `value`, shape (size,)."""
    sums = np.array((weight, weight * value, weight * value * value))
    more = sums - share.sums
    share.sums, share.empty = sums, False
    for group in groups:
        old = group.sums + group.gone
        mean = old[1] / np.maximum(old[0], TINY)
        group.moved += float(np.abs((more[1] - mean * more[0]) / (1 + old[0])).max())
        group.sums += more
        if group.moved > NOTICEABLE:
            group.moved = 0.0
            group.version += 1


def expect(groups: tuple[Group, ...], share: Share, mean: Vector, variance: float) -> tuple[list[float], list[float]]:
    """Mean and variance of ln(coefficient) of a row, from all rows of its groups but itself, one for each coefficient.

    mean, variance: of the widest group before anything was observed.
    Source: Gelman et al., "Bayesian Data Analysis", 3rd edition, section 5.4.
    """
    now = version(groups)
    cached = groups[-1].expected
    if share.empty and cached is not None and cached[0] == now:
        return cached[1], cached[2]
    levels = [(group.sums - share.sums + group.gone).tolist() for group in groups]
    means, variances = [], []
    for index, centre in enumerate(mean.tolist()):
        among, within = variance, variance
        for (weights, totals, squares), differ, assumed in zip(levels, DIFFER, WITHIN, strict=True):
            among += differ * differ
            weight = weights[index]
            within = assumed * assumed
            if weight > TINY:
                observed = totals[index] / weight
                # How much rows of the group differ: as assumed, corrected by how much they do.
                scatter = max(0.0, squares[index] - weight * observed * observed)
                within = (WITHIN_WEIGHT * within + scatter) / (WITHIN_WEIGHT + weight)
                gain = among * weight / (among * weight + within)
                centre += gain * (observed - centre)
                among *= 1 - gain
        means.append(centre)
        variances.append(among + within)
    if share.empty:
        groups[-1].expected = now, means, variances
    return means, variances
