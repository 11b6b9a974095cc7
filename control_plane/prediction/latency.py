"""Time to the first token and per output token of every model on every server, learned from every answer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from control_plane.prediction import filter as kalman
from control_plane.prediction.features import Coefficients, Features, Kin, RowKey, count, duration
from control_plane.prediction.filter import ALIKE, CENTRE, SIZE, TERMS, TPOT, TTFT, Belief, Vector
from control_plane.prediction.kin import Group, KinTree, Share, chain, contribute, expect
from control_plane.prediction.policy import LatencyPolicy

WIDEST = 4.0
"""Variance of ln(coefficient) where nothing at all is known: 95% are within a factor of 50."""
NOISE = 0.09
"""Variance of ln(observed / expected) before it was measured."""
LEAST_NOISE, MOST_NOISE = 0.0025, 4.0
SURE = 30.0
"""Observations after which what kin do no longer moves a row."""
TOLD_VARIANCE = 0.25
"""Of the logarithm of what a server says of itself."""
TOLD_MEAN_VARIANCE = 1.0
"""The same for a mean TTFT, of which nobody says under what load it was."""
TYPICAL = Features(prompt_tokens=1000, backlog_tokens=1000)
"""What such a mean is assumed to be about."""
EVIDENCE_HALF_LIFE = 3600.0
"""Seconds."""


@dataclass(slots=True)
class Ratios:
    """Quantiles of ln(observed / expected) in standard deviations, and the noise; TTFT and TPOT."""

    quantiles: list[list[float]]
    """One for each level."""
    noise: list[float]
    count: list[float]

    def copy(self) -> Ratios:
        return Ratios([list(of) for of in self.quantiles], list(self.noise), [0.0, 0.0])

    def learn(self, kind: int, levels: tuple[float, ...], surprise: float, uncertain: float, slowest: float) -> None:
        """A step of stochastic gradient descent on the pinball loss, and a moving average of the square.

        Source: Koenker and Bassett, "Regression Quantiles", Econometrica, 1978.
        """
        self.count[kind] += 1
        noise = self.noise[kind]
        deviation = math.sqrt(noise + uncertain)
        z = surprise / deviation
        step = max(slowest, 1 / (self.count[kind] + 10))
        quantiles = self.quantiles[kind]
        for number, level in enumerate(levels):
            quantiles[number] += step * (level if z > quantiles[number] else level - 1)
        z = min(max(z, -3.0), 3.0)
        noise += max(slowest, 1 / (self.count[kind] + 5)) * ((z * deviation) ** 2 - uncertain - noise)
        self.noise[kind] = min(max(noise, LEAST_NOISE), MOST_NOISE)


@dataclass(slots=True)
class Row:
    kin: Kin
    groups: tuple[Group, ...]
    share: Share
    belief: Belief
    prior: Vector
    """What kin let expect, shape (6,): the mean that `belief` was last told of."""
    prior_covariance: kalman.Matrix
    seen: int
    """Sum of the versions of `groups` at that time."""
    typical: Vector
    """Moving average of the shares of the terms, shape (6,): the first four and the last two sum to 1."""
    ratios: Ratios
    observed: int = 0
    evidence: float = 0.0
    """At `belief.at`."""
    late: float = 0.0
    """ln(how much slower it looks than expected, from requests without an answer), at `late_at`."""
    late_at: float = 0.0


class LatencyModel:
    """Owner of all rows. One thread; `now` is monotonic seconds throughout."""

    def __init__(self, policy: LatencyPolicy | None = None) -> None:
        self.policy = policy or LatencyPolicy()
        self._rate = self.policy.drift_per_minute**2 / 60
        self._rows: dict[RowKey, Row] = {}
        self._tree = KinTree(SIZE, self.policy.kept_groups)
        normal = [NormalDist().inv_cdf(level) for level in self.policy.levels]
        self._ratios = Ratios([list(normal), list(normal)], [NOISE, NOISE], [0.0, 0.0])
        """Of all rows: where a new one begins."""

    def __len__(self) -> int:
        return len(self._rows)

    # ---------------------------------------------------------------- rows ---

    def declare(self, key: RowKey, kin: Kin, now: float) -> None:
        """A row is there. What was learned of it stays if it is known and of the same kin; what its server says of
        its speed counts while nothing was observed."""
        row = self._rows.get(key)
        if row is not None and chain(row.kin) == chain(kin):
            if row.kin != kin:
                row.kin = kin
                if not row.observed:
                    self._begin(row)
            return
        self.forget(key)
        share = Share(np.zeros(SIZE), np.zeros(SIZE))
        blank = Belief(CENTRE, np.eye(SIZE), now, [0.0, 0.0], [0.0, 0.0])
        typical = np.array([0.25] * 4 + [0.5] * 2)
        row = Row(
            kin, self._tree.join(chain(kin)), share, blank, CENTRE, np.eye(SIZE), -1, typical, self._ratios.copy()
        )
        self._begin(row)
        self._rows[key] = row

    def forget(self, key: RowKey) -> None:
        """A row is no more; its kin remember what it taught them."""
        row = self._rows.pop(key, None)
        if row is not None:
            self._tree.leave(row.groups, row.share)

    def _begin(self, row: Row) -> None:
        """From kin, and from what its server says of itself."""
        mean, variance = expect(row.groups, row.share, CENTRE, WIDEST)
        deviation = np.sqrt(variance)
        row.prior, row.prior_covariance = mean, ALIKE * np.outer(deviation, deviation)
        row.seen = sum(group.version for group in row.groups)
        row.belief = belief = Belief(mean, row.prior_covariance.copy(), row.belief.at, [0.0, 0.0], [0.0, 0.0])
        for seconds, index in ((_inverse(row.kin.prefill), 1), (_inverse(row.kin.decode), 4)):
            if seconds is not None:
                shares = np.zeros(SIZE)
                shares[index] = 1.0
                _tell(belief, shares, math.log(seconds) - float(belief.mean[index]), TOLD_VARIANCE)
        for kind, told, variance_told in (
            (TTFT, row.kin.ttft, TOLD_MEAN_VARIANCE),
            (TPOT, row.kin.tpot, TOLD_VARIANCE),
        ):
            seconds = duration(told, 1e-5, 1e4)
            if seconds is not None:
                expected, shares = _expected(belief.mean, kind, TYPICAL)
                _tell(belief, shares, math.log(seconds / expected), variance_told)

    def _renew(self, row: Row) -> None:
        """Take in what kin have taught since."""
        seen = sum(group.version for group in row.groups)
        if seen == row.seen or row.evidence > SURE:
            return
        if not row.observed:
            self._begin(row)
            return
        mean, _ = expect(row.groups, row.share, CENTRE, WIDEST)
        moved = row.belief.covariance @ np.linalg.solve(row.prior_covariance, mean - row.prior)
        row.belief.mean = np.minimum(np.maximum(row.belief.mean + moved, kalman.LEAST), kalman.MOST)
        row.prior, row.seen = mean, seen

    # ------------------------------------------------------------- reading ---

    def coefficients(self, key: RowKey, now: float) -> Coefficients[float]:
        """What is expected of a row. Raises KeyError: it was never declared."""
        row = self._rows[key]
        self._renew(row)
        base, prompt, backlog, waiting, tpot_base, per_stream = np.exp(row.belief.mean).tolist()
        late = math.exp(self._late(row, now))
        idle = max(0.0, now - row.belief.at)
        spreads = []
        for kind, terms in enumerate(TERMS):
            shares = row.typical[terms]
            uncertain = float(shares @ row.belief.covariance[terms, terms] @ shares) + self._rate * min(idle, 3600.0)
            deviation = math.sqrt(uncertain + row.ratios.noise[kind])
            quantiles = sorted(row.ratios.quantiles[kind])
            spreads.append(tuple(math.exp(min(deviation * z, 20.0)) for z in quantiles))
        return Coefficients(
            base * late, prompt * late, backlog * late, waiting * late, tpot_base, per_stream,
            spreads[TTFT], spreads[TPOT], row.evidence * math.exp2(-idle / EVIDENCE_HALF_LIFE),
        )  # fmt: skip

    def _late(self, row: Row, now: float) -> float:
        if not row.late:
            return 0.0
        return row.late * math.exp2(-max(0.0, now - row.late_at) / self.policy.overdue_half_life_s)

    # ------------------------------------------------------------ learning ---

    def observe(self, key: RowKey, features: Features, ttft: float | None, tpot: float | None, now: float) -> None:
        """An answer has come. ttft, tpot: seconds; None: not measured. What cannot be is ignored, and so is a row
        that was never declared."""
        row = self._rows.get(key)
        if row is None:
            return
        ttft, tpot = duration(ttft, 1e-5, 1e5), duration(tpot, 1e-6, 1e3)
        if features.cold:
            ttft = None
        if ttft is None and tpot is None:
            return
        self._renew(row)
        idle = max(0.0, now - row.belief.at)
        row.evidence = row.evidence * math.exp2(-idle / EVIDENCE_HALF_LIFE) + 1
        row.observed += 1
        row.belief.drift(self._rate, now)
        if ttft is not None:
            row.late, row.late_at = self._late(row, now) / 4, now
            self._learn(row, TTFT, features, ttft)
        if tpot is not None:
            self._learn(row, TPOT, features, tpot)
        # What the row knows by now: often while it learns fast, and now and then later.
        if row.observed <= 4 or row.observed % 8 == 0:
            weight = 1 - np.diagonal(row.belief.covariance) / np.diagonal(row.prior_covariance)
            contribute(row.groups, row.share, np.minimum(np.maximum(weight, 0.0), 1.0), row.belief.mean)
            row.seen += len(row.groups)

    def _learn(self, row: Row, kind: int, features: Features, observed: float) -> None:
        expected, shares = _expected(row.belief.mean, kind, features)
        surprise = math.log(observed / expected)
        uncertain = row.belief.update(kind, shares, surprise, row.ratios.noise[kind])
        row.ratios.learn(kind, self.policy.levels, surprise, uncertain, 0.03)
        self._ratios.learn(kind, self.policy.levels, surprise, uncertain, 0.005)
        terms = TERMS[kind]
        row.typical[terms] += 0.1 * (shares[terms] - row.typical[terms])

    def overdue(self, key: RowKey, features: Features, elapsed: float, now: float) -> None:
        """No first token after `elapsed` seconds: until answers come, the row counts as slow as that.

        May be called again and again as time passes. What was to be expected changes nothing.
        """
        row = self._rows.get(key)
        if row is None or features.cold or not 0 < elapsed < math.inf:
            return
        expected, shares = _expected(row.belief.mean, TTFT, features)
        uncertain = float(shares @ row.belief.covariance @ shares)
        late = math.log(elapsed / expected)
        # Three standard deviations: 1 of 700 answers that are on time is suspected.
        if late > 3 * math.sqrt(uncertain + row.ratios.noise[TTFT]) and late > self._late(row, now):
            row.late, row.late_at = late, now


def _expected(mean: Vector, kind: int, features: Features) -> tuple[float, Vector]:
    """Seconds, and the share of each coefficient in them, shape (6,)."""
    shares = np.zeros(SIZE)
    if kind == TTFT:
        base, prompt, backlog, waiting = mean[:4].tolist()
        parts = (
            math.exp(base),
            math.exp(prompt) * features.uncached_tokens,
            math.exp(backlog) * count(features.backlog_tokens),
            math.exp(waiting) * count(features.waiting),
        )
        total = parts[0] + parts[1] + parts[2] + parts[3]
        shares[:4] = parts
    else:
        base, streams = mean[4:].tolist()
        alone, beside = math.exp(base), math.exp(streams) * count(features.streams)
        total = alone + beside
        shares[4:] = alone, beside
    shares /= total
    return total, shares


def _inverse(speed: float | None) -> float | None:
    """Seconds per token; None: no speed."""
    return duration(1 / speed, 1e-8, 1e2) if speed is not None and 0 < speed < math.inf else None


def _tell(belief: Belief, shares: Vector, surprise: float, variance: float) -> None:
    """What a server says of itself: as an observation, but no sign of a change however surprising."""
    gain = belief.covariance @ shares
    total = float(gain @ shares) + variance
    belief.mean = np.minimum(np.maximum(belief.mean + gain * (surprise / total), kalman.LEAST), kalman.MOST)
    belief.covariance -= np.outer(gain, gain / total)
