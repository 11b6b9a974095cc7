"""Time to the first token and per output token of every model on every server, learned from every answer."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from statistics import NormalDist

import numpy as np

from control_plane.domain.model import ModelName, Provider, ServerId
from control_plane.prediction.belief import (
    ALIKE,
    BOUNDS,
    CENTRE,
    LONGEST_IDLE,
    SIZE,
    TPOT,
    TTFT,
    Belief,
    lower,
    triangle,
)
from control_plane.prediction.calibration import NOISE, Ratios
from control_plane.prediction.features import Coefficients, Features, Kin, RowKey, Vector, duration
from control_plane.prediction.kin import NOTICEABLE, Group, KinTree, Share, chain, contribute, expect, version
from control_plane.prediction.policy import LatencyPolicy
from control_plane.prediction.state import GroupState, LatencyState, RowState

MOST_SPREAD = 10.0
"""Of ln(quantile / median)."""
WIDEST = 4.0
"""Variance of ln(coefficient) where nothing at all is known: 95% are within a factor of 50."""
SURE = 30.0
"""Observations after which what kin do no longer moves a row."""
TOLD_VARIANCE = 1.0
"""Of the logarithm of what a server says of itself: it may be of another load, and it may boast."""
TYPICAL = Features(prompt_tokens=1000, backlog_tokens=1000)
"""What a mean time to the first token is assumed to be about."""
FADES = 1.0
"""Seconds in which the suspicion against a row fades by little."""
EVIDENCE_HALF_LIFE = 3600.0
"""Seconds."""


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
    """Answers."""
    evidence: float = 0.0
    """At `evidence_at`."""
    evidence_at: float = 0.0
    late: float = 0.0
    """ln(how much slower it looks than expected, from requests without an answer), at `late_at`."""
    late_at: float = 0.0
    allowed: float = 0.0
    """Answers that may be learned from, at `allowed_at`."""
    allowed_at: float = 0.0


class LatencyModel:
    """Owner of all rows. One thread; `now` is monotonic seconds throughout."""

    def __init__(self, policy: LatencyPolicy | None = None) -> None:
        self.policy = policy or LatencyPolicy()
        self._rate = self.policy.drift_per_minute**2 / 60
        self._rows: dict[RowKey, Row] = {}
        self._moved: dict[RowKey, None] = {}
        """Rows whose coefficients are others than those that were read last, in order."""
        self._suspected: set[RowKey] = set()
        """Rows that are late."""
        self._fading_at = 0.0
        """When to look at them again."""
        self._unsure: deque[RowKey] = deque()
        """Rows that kin may still move; next to be looked at first."""
        self._unseen = 0
        """Of those, how many were not looked at since some group has moved."""
        self._tree = KinTree(SIZE, self.policy.kept_groups)
        normal = [NormalDist().inv_cdf(level) for level in self.policy.levels]
        self._ratios = Ratios([list(normal), list(normal)], [NOISE, NOISE], [NOISE, NOISE], [0.0, 0.0])
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
                    self._moved[key] = None
            return
        self.forget(key)
        unborn = Belief([], [], now)
        share = Share(np.zeros((3, SIZE)))
        row = Row(kin, self._tree.join(chain(kin)), share, unborn, CENTRE, ALIKE, -1, self._ratios.copy(), [])
        self._begin(row)
        self._rows[key] = row
        self._moved[key] = None
        self._unsure.append(key)
        self._unseen = len(self._unsure)

    def forget(self, key: RowKey) -> None:
        """A row is no more; its kin remember what it taught them."""
        row = self._rows.pop(key, None)
        if row is not None:
            self._tree.leave(row.groups, row.share)
            self._moved.pop(key, None)
            self._suspected.discard(key)
            self._unsure.remove(key)
            self._unseen = len(self._unsure)

    def _begin(self, row: Row) -> None:
        """From kin, and from what its server says of itself."""
        mean, variance = expect(row.groups, row.share, CENTRE, WIDEST)
        deviation = np.sqrt(variance)
        row.prior, row.prior_covariance = np.array(mean), ALIKE * np.outer(deviation, deviation)
        row.seen = version(row.groups)
        row.belief = belief = Belief(list(mean), row.prior_covariance.tolist(), row.belief.at)
        kin = row.kin
        _tell(belief, TTFT, _inverse(kin.prefill), math.exp(belief.mean[1]), [0.0, 1.0, 0.0, 0.0])
        _tell(belief, TPOT, _inverse(kin.decode), math.exp(belief.mean[4]), [1.0, 0.0])
        _tell(belief, TTFT, kin.ttft, *belief.expected(TTFT, TYPICAL))
        _tell(belief, TPOT, kin.tpot, *belief.expected(TPOT, TYPICAL))
        row.uncertain = [belief.gain(kind, belief.expected(kind, TYPICAL)[1])[1] for kind in (TTFT, TPOT)]

    def _renew(self, row: Row) -> None:
        """Take in what kin have taught since."""
        if row.evidence > SURE or version(row.groups) == row.seen:
            return
        if not row.observed:
            self._begin(row)
            return
        mean = np.array(expect(row.groups, row.share, CENTRE, WIDEST)[0])
        covariance = np.array(row.belief.covariance)
        moved = row.belief.mean + covariance @ np.linalg.solve(row.prior_covariance, mean - row.prior)
        row.belief.mean = np.clip(moved, *np.transpose(BOUNDS)).tolist()
        row.prior, row.seen = mean, version(row.groups)

    # ----------------------------------------------------------- survival ---

    def state(self, now: float, keys: Iterable[RowKey] | None = None) -> LatencyState:
        """What outlives this process: of these rows, or of all."""
        rows = self._rows.items() if keys is None else [(key, self._rows[key]) for key in keys if key in self._rows]
        return LatencyState(
            levels=self.policy.levels,
            rows=tuple(
                RowState(
                    key=key,
                    kin=row.kin,
                    mean=tuple(row.belief.mean),
                    covariance=triangle(row.belief.covariance),
                    prior=tuple(row.prior.tolist()),
                    prior_variance=tuple(np.diagonal(row.prior_covariance).tolist()),
                    ratios=row.ratios.state(),
                    uncertain=tuple(row.uncertain),
                    observed=row.observed,
                    evidence=self._evidence(row, now),
                    age=max(0.0, now - row.belief.at),
                )
                for key, row in rows
                if row.observed
            ),
            groups=tuple(
                GroupState(path, tuple(group.gone.ravel().tolist()))
                for path, group in self._tree.groups.items()
                if group.gone[0].any()
            ),
            ratios=self._ratios.state(),
        )

    def restore(self, state: LatencyState, now: float) -> None:
        """Take over what an earlier process learned, rows included: declare them anew when their servers come, forget
        them where they do not. What cannot be is left out; rows that are known already stay as they are."""
        for group in state.groups:
            self._tree.remember(group.path, group.gone)
        self._unseen = len(self._unsure)
        same_levels = state.levels == self.policy.levels
        if same_levels:
            self._ratios.restore(state.ratios)
        for one in state.rows:
            key = ServerId(one.key[0]), ModelName(one.key[1]), Provider(one.key[2])
            if key in self._rows or not one.sound:
                continue
            self.declare(key, one.kin, now)
            row = self._rows[key]
            mean, covariance = np.clip(one.mean, *np.transpose(BOUNDS)), lower(one.covariance)
            row.belief = Belief(mean.tolist(), covariance.tolist(), now - one.age)
            row.prior = np.array(one.prior)
            row.prior_covariance = ALIKE * np.outer(*2 * (np.sqrt(one.prior_variance),))
            row.seen = version(row.groups)
            row.uncertain = list(one.uncertain)
            row.observed, row.evidence, row.evidence_at = one.observed, one.evidence, now
            if same_levels:
                row.ratios.restore(one.ratios)
            self._teach(row)

    # ------------------------------------------------------------- reading ---

    def has_moved(self, key: RowKey) -> bool:
        """Whether what `coefficients` says of a row is another than when it said so last, but for what time changes."""
        return key in self._moved

    def coefficients(self, key: RowKey, now: float) -> Coefficients[float]:
        """What is expected of a row. Raises KeyError: it was never declared."""
        row = self._rows[key]
        self._moved.pop(key, None)
        self._renew(row)
        base, prompt, backlog, waiting, tpot_base, per_stream = map(math.exp, row.belief.mean)
        late = math.exp(self._late(row, now))
        idle = min(max(0.0, now - row.belief.at), LONGEST_IDLE) if row.observed else 0.0  # nothing grows stale
        spreads = []
        for kind in (TTFT, TPOT):
            deviation = math.sqrt(row.uncertain[kind] + self._rate * idle + row.ratios.miss[kind])
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

    def moved(self, now: float, most: int = 256) -> list[RowKey]:
        """Rows whose coefficients have changed noticeably since they were named here, at most so many: those that were
        observed or are suspected, and those that know little and whose kin have learned. For those who keep the
        coefficients in columns: call it often."""
        if not (self._moved or self._unseen or self._suspected):
            return []
        if self._suspected and now >= self._fading_at:
            self._fading_at = now + FADES
            for key in self._suspected:
                self._moved[key] = None
            for key in [key for key in self._suspected if self._late(self._rows[key], now) < NOTICEABLE]:
                self._suspected.discard(key)
                self._rows[key].late = 0.0
        looked = min(most, self._unseen, len(self._unsure))
        self._unseen -= looked
        for _ in range(looked):
            key = self._unsure[0]
            self._unsure.rotate(-1)
            row = self._rows[key]
            if row.evidence <= SURE and version(row.groups) != row.seen:
                self._moved[key] = None
        named = list(islice(self._moved, most))
        for key in named:
            del self._moved[key]
        return named

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
        """An answer has come. ttft, tpot: seconds; None: not measured.

        promised: what `ttft()` and `tpot()` of features.py said at dispatch, from which the quantiles are learned;
        without it, from what they would say now, which is too good where answers come late. What cannot be is ignored,
        and so is a row that was never declared; and of one that is known and not suspected, what is beyond
        `policy.most_per_second`.
        """
        row = self._rows.get(key)
        if row is None:
            return
        ttft, tpot = duration(ttft, 1e-5, 1e5), duration(tpot, 1e-6, 1e3)
        if features.cold:
            ttft = None
        if ttft is None and tpot is None:
            return
        if row.observed > SURE and not row.late and not self._allows(row, now):
            return
        self._renew(row)
        self._moved[key] = None
        row.observed += 1
        row.evidence = self._evidence(row, now) + 1
        row.evidence_at = now
        row.belief.drift(self._rate, now)
        if ttft is not None:
            row.late = 0.0
            self._learn(row, TTFT, features, ttft, promised_ttft)
        if tpot is not None:
            self._learn(row, TPOT, features, tpot, promised_tpot)
        # What the row knows by now: often while it learns fast, and now and then later.
        if row.observed <= 4 or row.observed % 8 == 0:
            self._teach(row)

    def _allows(self, row: Row, now: float) -> bool:
        """Whether one answer more may be learned from: a token bucket that holds those of one second."""
        most = self.policy.most_per_second
        row.allowed = min(max(1.0, most), row.allowed + (now - row.allowed_at) * most)
        row.allowed_at = now
        if row.allowed < 1.0:
            return False
        row.allowed -= 1.0
        return True

    def _teach(self, row: Row) -> None:
        """Tell its groups what the row knows by now."""
        known = 1 - np.diagonal(row.belief.covariance) / np.diagonal(row.prior_covariance)
        before = version(row.groups)
        contribute(row.groups, row.share, np.minimum(np.maximum(known, 0.0), 1.0), np.array(row.belief.mean))
        moved = version(row.groups) - before
        row.seen += moved
        if moved:
            self._unseen = len(self._unsure)

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
        """No first token after `elapsed` seconds: until the next answer comes, the row counts as slower.

        To be called again and again as time passes. What was to be expected changes nothing. Of a row that is known
        well, a wait of more than three standard deviations (1 of 700 answers that are on time) means that it has
        changed: it counts as slow as the wait. Of one that is not, any wait tells of its speed: the mean of a normal
        distribution of which that much is known to lie below.
        Source: Tobin, "Estimation of Relationships for Limited Dependent Variables", Econometrica, 1958.
        """
        row = self._rows.get(key)
        if row is None or features.cold or not 0 < elapsed < math.inf:
            return
        expected, shares = row.belief.expected(TTFT, features)
        _, uncertain = row.belief.gain(TTFT, shares)
        deviation = math.sqrt(uncertain + row.ratios.noise[TTFT])
        surprise = math.log(elapsed / expected)
        late = uncertain / deviation * _hazard(surprise / deviation)
        if surprise > 3 * deviation:
            late = max(late, surprise)
        if late > NOTICEABLE and late > self._late(row, now):
            row.late, row.late_at = late, now
            self._suspected.add(key)
            self._moved[key] = None


def _hazard(z: float) -> float:
    """Of the standard normal distribution: density / (1 - distribution), the mean of what lies above z."""
    if z > 6:
        return z + 1 / z
    return math.exp(-z * z / 2) / (math.sqrt(math.pi / 2) * math.erfc(z / math.sqrt(2))) if z > -6 else 0.0


def _inverse(speed: float | None) -> float | None:
    """Seconds per token; None: that is no speed."""
    return 1 / speed if speed is not None and 1e-9 < speed < math.inf else None


def _tell(belief: Belief, kind: int, told: float | None, expected: float, shares: list[float]) -> None:
    """What a server says of itself, seconds: as an observation, but no sign of a change however surprising."""
    seconds = duration(told, 1e-9, 1e4)
    if seconds is not None:
        gain, uncertain = belief.gain(kind, shares)
        belief.correct(gain, math.log(seconds / expected), uncertain + TOLD_VARIANCE)
