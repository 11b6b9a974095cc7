"""Time to the first token and per output token of every model on every server, learned from every answer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from control_plane.prediction.features import Coefficients, Features, Kin, RowKey, Vector, duration
from control_plane.prediction.filter import ALIKE, BOUNDS, CENTRE, LONGEST_IDLE, SIZE, TPOT, TTFT, Belief
from control_plane.prediction.kin import Group, KinTree, Share, chain, contribute, expect
from control_plane.prediction.policy import LatencyPolicy

MOST_SPREAD = 10.0
"""Of ln(quantile / median)."""
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
    """Quantiles of ln(observed / promised) in standard deviations, and the noise; TTFT and TPOT."""

    quantiles: list[list[float]]
    """One for each level."""
    noise: list[float]
    count: list[float]

    def copy(self) -> Ratios:
        return Ratios([list(of) for of in self.quantiles], list(self.noise), [0.0, 0.0])

    def learn(
        self, kind: int, levels: tuple[float, ...], surprise: float, broken: float, uncertain: float, slowest: float
    ) -> None:
        """From ln(observed / expected), just before it was learned, and ln(observed / promised), at dispatch.

        A step of stochastic gradient descent on the pinball loss, and a moving average of the square.
        Source: Koenker and Bassett, "Regression Quantiles", Econometrica, 1978.
        """
        seen = self.count[kind] = self.count[kind] + 1
        noise = self.noise[kind]
        variance = noise + uncertain
        z = broken / math.sqrt(variance)
        step = max(slowest / 2, 1 / (seen + 10))
        quantiles = self.quantiles[kind]
        for number, level in enumerate(levels):
            quantiles[number] += step * (level if z > quantiles[number] else level - 1)
        square = min(surprise * surprise, 9 * variance)
        noise += max(slowest, 1 / (seen + 5)) * (square - uncertain - noise)
        self.noise[kind] = LEAST_NOISE if noise < LEAST_NOISE else noise if noise < MOST_NOISE else MOST_NOISE


@dataclass(slots=True)
class Row:
    kin: Kin
    groups: tuple[Group, ...]
    share: Share
    belief: Belief
    prior: Vector
    """What kin let expect, shape (6,): the mean that `belief` was last told of."""
    prior_covariance: Vector
    """Shape (6, 6)."""
    seen: int
    """Sum of the versions of `groups` at that time."""
    ratios: Ratios
    uncertain: list[float]
    """Variance of ln(expected) for requests as they come, TTFT and TPOT: a moving average."""
    observed: int = 0
    """Answers; those that were learned before a restart count once."""
    evidence: float = 0.0
    """At `evidence_at`."""
    evidence_at: float = 0.0
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
        unborn = Belief([], [], now)
        share = Share(np.zeros((3, SIZE)))
        row = Row(kin, self._tree.join(chain(kin)), share, unborn, CENTRE, ALIKE, -1, self._ratios.copy(), [])
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
        row.seen = _version(row.groups)
        row.belief = belief = Belief(mean.tolist(), row.prior_covariance.tolist(), row.belief.at)
        for told, kind, index in ((row.kin.prefill, TTFT, 1), (row.kin.decode, TPOT, 0)):
            if told is not None and 0 < told < math.inf:
                shares = [float(index == term) for term in range(4 if kind == TTFT else 2)]
                expected = math.exp(belief.mean[index if kind == TTFT else 4 + index])
                _tell(belief, kind, shares, math.log(1 / told / expected), TOLD_VARIANCE)
        for kind, told, variance_told in (
            (TTFT, row.kin.ttft, TOLD_MEAN_VARIANCE),
            (TPOT, row.kin.tpot, TOLD_VARIANCE),
        ):
            if told is not None and 0 < told < math.inf:
                expected, shares = belief.expected(kind, TYPICAL)
                _tell(belief, kind, shares, math.log(told / expected), variance_told)
        row.uncertain = [belief.gain(kind, belief.expected(kind, TYPICAL)[1])[1] for kind in (TTFT, TPOT)]

    def _renew(self, row: Row) -> None:
        """Take in what kin have taught since."""
        if row.evidence > SURE or _version(row.groups) == row.seen:
            return
        if not row.observed:
            self._begin(row)
            return
        mean, _ = expect(row.groups, row.share, CENTRE, WIDEST)
        covariance = np.array(row.belief.covariance)
        moved = row.belief.mean + covariance @ np.linalg.solve(row.prior_covariance, mean - row.prior)
        row.belief.mean = np.clip(moved, *np.transpose(BOUNDS)).tolist()
        row.prior, row.seen = mean, _version(row.groups)

    # ------------------------------------------------------------- reading ---

    def coefficients(self, key: RowKey, now: float) -> Coefficients[float]:
        """What is expected of a row. Raises KeyError: it was never declared."""
        row = self._rows[key]
        self._renew(row)
        base, prompt, backlog, waiting, tpot_base, per_stream = map(math.exp, row.belief.mean)
        late = math.exp(self._late(row, now))
        idle = min(max(0.0, now - row.belief.at), LONGEST_IDLE)
        spreads = []
        for kind in (TTFT, TPOT):
            deviation = math.sqrt(row.uncertain[kind] + self._rate * idle + row.ratios.noise[kind])
            quantiles = sorted(row.ratios.quantiles[kind])
            spreads.append(tuple([math.exp(min(deviation * z, MOST_SPREAD)) for z in quantiles]))
        return Coefficients(
            base * late,
            prompt * late,
            backlog * late,
            waiting * late,
            tpot_base,
            per_stream,
            spreads[TTFT],
            spreads[TPOT],
            self._evidence(row, now),
        )

    def _evidence(self, row: Row, now: float) -> float:
        return row.evidence * math.exp2(-max(0.0, now - row.evidence_at) / EVIDENCE_HALF_LIFE)

    def _late(self, row: Row, now: float) -> float:
        if not row.late:
            return 0.0
        return row.late * math.exp2(-max(0.0, now - row.late_at) / self.policy.overdue_half_life_s)

    # ------------------------------------------------------------ learning ---

    def observe(
        self,
        key: RowKey,
        features: Features,
        ttft: float | None,
        tpot: float | None,
        now: float,
        *,
        promised_ttft: float | None = None,
        promised_tpot: float | None = None,
    ) -> None:
        """An answer has come. ttft, tpot: seconds; None: not measured (yet: they may come in two calls).

        promised: what `ttft()` and `tpot()` of features.py said at dispatch, from which the quantiles are learned;
        without it, from what they would say now, which is too good where answers come late. What cannot be is ignored,
        and so is a row that was never declared.
        """
        row = self._rows.get(key)
        if row is None:
            return
        ttft, tpot = duration(ttft, 1e-5, 1e5), duration(tpot, 1e-6, 1e3)
        if features.cold:
            ttft = None
        if ttft is None and tpot is None:
            return
        self._renew(row)
        row.observed += 1
        row.evidence = self._evidence(row, now) + 1
        row.evidence_at = now
        row.belief.drift(self._rate, now)
        if ttft is not None:
            if row.late:
                row.late, row.late_at = self._late(row, now) / 4, now
            self._learn(row, TTFT, features, ttft, promised_ttft)
        if tpot is not None:
            self._learn(row, TPOT, features, tpot, promised_tpot)
        # What the row knows by now: often while it learns fast, and now and then later.
        if row.observed <= 4 or row.observed % 8 == 0:
            known = 1 - np.diagonal(row.belief.covariance) / np.diagonal(row.prior_covariance)
            contribute(row.groups, row.share, np.minimum(np.maximum(known, 0.0), 1.0), np.array(row.belief.mean))
            row.seen += len(row.groups)

    def _learn(self, row: Row, kind: int, features: Features, observed: float, promised: float | None) -> None:
        expected, shares = row.belief.expected(kind, features)
        surprise, noise = math.log(observed / expected), row.ratios.noise[kind]
        broken = surprise
        if promised is not None and 1e-9 < promised < math.inf:
            broken = math.log(observed / promised)
        uncertain = row.belief.update(kind, shares, surprise, noise)
        levels = self.policy.levels
        row.ratios.learn(kind, levels, surprise, broken, uncertain, 0.03)
        self._ratios.learn(kind, levels, surprise, broken, uncertain, 0.005)
        left = uncertain * noise / (uncertain + noise)
        row.uncertain[kind] += max(0.1, 1 / row.ratios.count[kind]) * (left - row.uncertain[kind])

    def overdue(self, key: RowKey, features: Features, elapsed: float, now: float) -> None:
        """No first token after `elapsed` seconds: until answers come, the row counts as slow as that.

        May be called again and again as time passes. What was to be expected changes nothing.
        """
        row = self._rows.get(key)
        if row is None or features.cold or not 0 < elapsed < math.inf:
            return
        expected, shares = row.belief.expected(TTFT, features)
        _, uncertain = row.belief.gain(TTFT, shares)
        late = math.log(elapsed / expected)
        # Three standard deviations: 1 of 700 answers that are on time is suspected.
        if late > 3 * math.sqrt(uncertain + row.ratios.noise[TTFT]) and late > self._late(row, now):
            row.late, row.late_at = late, now


def _version(groups: tuple[Group, ...]) -> int:
    """Grows whenever one of the groups learns."""
    return sum([group.version for group in groups])


def _tell(belief: Belief, kind: int, shares: list[float], surprise: float, variance: float) -> None:
    """What a server says of itself: as an observation, but no sign of a change however surprising."""
    gain, uncertain = belief.gain(kind, shares)
    belief.correct(gain, surprise, uncertain + variance)
