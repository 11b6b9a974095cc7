"""How many requests will come, by task type and model: a level, a profile over the hours of the week, a spread.

    expected in a minute of hour h:  m(h) = B * f(h)
    B      long level: arrivals over minutes, both discounted with a half-life of LONG
    f(h)   (K + a(h)) / (K + e(h)): arrivals in that hour of the week over those that B led to expect, both discounted
           from week to week. The posterior mean of a gamma prior with mean 1 worth K arrivals: an hour of which little
           is known is like any other.
    now    (P * m(h) + w * A) / (P + w * M): arrivals A over minutes M, discounted with a short half-life, beside the
           profile, which is worth P minutes. What was seen just now says the less of an hour the less it is like this
           one: w = min(f(h), f(now)) / max(f(h), f(now)). Silence before nine is no news of nine o'clock.

So the rate is a gamma posterior with shape P m(h) + w A and rate P + w M, and the number of arrivals in a time to come
is negative binomial: mean r t, variance mean + mean^2 / shape. Discounting the sums of a gamma-Poisson model is the
local level model for counts of Harvey and Fernandes (Time series models for count or qualitative observations, 1989);
the multiplicative seasonal factor is Winters' (1960).

Pure: times are seconds since 1970 and come in. Hours are those of UTC. At most SERIES series of about 3 kB.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from control_plane.domain.task import TaskType

MINUTE, HOUR, WEEK = 60, 3600, 7 * 86400
HOURS = 168
LONG = 7 * 1440.0
"""Half-life of the level in minutes."""
WEEKLY = 0.5 ** (1 / 4)
"""What a week leaves of what was seen in an hour of it: a half-life of four weeks."""
K = 2.0
"""Arrivals for which the prior of a factor counts."""
P = 5.0
"""Minutes for which the profile counts beside what was just seen."""
SERIES = 500
_EXACT = 2000.0
"""Mean up to which a quantile is summed up, not approximated by that of a normal distribution."""

Key = tuple[TaskType, str]
"""Kind of work, name of the model."""


@dataclass(frozen=True, slots=True)
class Expected:
    """Arrivals in a stretch of time to come."""

    mean: float
    p90: float
    per_minute: float
    """Mean."""


@dataclass(slots=True)
class State:
    """A series as it is kept."""

    minute: int
    """Since 1970: up to its beginning everything is in the sums."""
    count: int
    """Arrivals in it so far."""
    arrivals: float
    minutes: float
    recent: float
    recent_minutes: float
    seen: list[float]
    """a(h), HOURS of them."""
    expected: list[float]


class Series:
    """Arrivals of one key."""

    def __init__(self, now: float, half_life: float) -> None:
        """`half_life` of what counts as just now, minutes."""
        self._half_life = half_life
        self._minute, self._count = _minute(now), 0
        self._arrivals = self._minutes = self._recent = self._recent_minutes = 0.0
        self._seen: NDArray[np.float64] = np.zeros(HOURS)
        self._expected: NDArray[np.float64] = np.zeros(HOURS)

    def add(self, now: float, count: int = 1) -> None:
        """So many have come."""
        self._advance(_minute(now))
        self._count += count

    def expect(self, now: float, seconds: float) -> Expected:
        """Of the time from now on."""
        self._advance(_minute(now))
        mean = shape = left = 0.0
        at, end = now, now + seconds
        while at < end:
            until = min(end, (at // HOUR + 1) * HOUR)
            share, rate = self._posterior(_hour(at))
            mean += share / rate * (until - at) / MINUTE
            left += until - at
            shape += share * (until - at)
            at = until
        per_minute = mean * MINUTE / seconds if seconds > 0 else 0.0
        return Expected(mean, quantile(0.9, mean, shape / left if left else 0.0), per_minute)

    def factor(self, hour: int) -> float:
        """Of an hour of the week, counted from 1970-01-01 (a Thursday), UTC."""
        return float((K + self._seen[hour]) / (K + self._expected[hour]))

    @property
    def level(self) -> float:
        """Arrivals per minute in the long run."""
        return self._arrivals / self._minutes if self._minutes else 0.0

    def _posterior(self, hour: int) -> tuple[float, float]:
        """Shape and rate (in minutes) of what is believed of a minute of this hour."""
        then, now = self.factor(hour), self.factor(_hour(self._minute * MINUTE))
        alike = min(then, now) / max(then, now)
        # The minute that goes on counts as it is: what has come has come.
        recent = self._recent + self._count
        return P * self.level * then + alike * recent, P + alike * self._recent_minutes

    def _advance(self, minute: int) -> None:
        """Bring everything before this minute into the sums. A clock that jumps back changes nothing."""
        if minute <= self._minute:
            return
        # After a long silence older hours would fade to nothing anyway.
        start = max(self._minute, minute - 4 * WEEK // MINUTE)
        self._absorb(start, 1, self._count)
        self._count, at = 0, start + 1
        while at < minute:  # silence, hour by hour
            end = min(minute, (at // MINUTE + 1) * MINUTE)
            self._absorb(at, end - at, 0)
            at = end
        self._minute = minute

    def _absorb(self, minute: int, minutes: int, count: int) -> None:
        """So many arrivals in so many minutes of one hour."""
        hour = _hour(minute * MINUTE)
        self._expected[hour] += self.level * minutes
        self._seen[hour] += count
        self._arrivals, self._minutes = _faded(self._arrivals, self._minutes, LONG, minutes, count)
        self._recent, self._recent_minutes = _faded(self._recent, self._recent_minutes, self._half_life, minutes, count)
        if (minute + minutes) % MINUTE == 0:  # the hour is over
            self._seen[hour] *= WEEKLY
            self._expected[hour] *= WEEKLY

    # ------------------------------------------------------------- to keep ---

    def dump(self) -> State:
        """Everything, for `load`."""
        return State(
            self._minute, self._count, self._arrivals, self._minutes, self._recent, self._recent_minutes,
            [round(float(one), 4) for one in self._seen], [round(float(one), 4) for one in self._expected],
        )  # fmt: skip

    @classmethod
    def load(cls, state: State, half_life: float) -> Series:
        """Raises ValueError for what no series has said."""
        numbers = (state.arrivals, state.minutes, state.recent, state.recent_minutes, *state.seen, *state.expected)
        sound = all(math.isfinite(one) and one >= 0 for one in (*numbers, state.minute, state.count))
        if not sound or len(state.seen) != HOURS or len(state.expected) != HOURS:
            raise ValueError("no state of a series")
        series = cls(0.0, half_life)
        series._minute, series._count = state.minute, state.count
        series._arrivals, series._minutes = state.arrivals, state.minutes
        series._recent, series._recent_minutes = state.recent, state.recent_minutes
        series._seen, series._expected = np.array(state.seen), np.array(state.expected)
        return series


def _faded(arrivals: float, minutes: float, half_life: float, more: int, count: int) -> tuple[float, float]:
    """Sums after so many more minutes, each of them a little older than the next."""
    keep = 0.5 ** (1.0 / half_life)
    gone = keep**more
    return arrivals * gone + count, minutes * gone + (1.0 - gone) / (1.0 - keep)


class Forecast:
    """Every series, found by its key."""

    def __init__(self, half_life: float) -> None:
        """`half_life` of what counts as just now, seconds."""
        self._half_life = half_life / MINUTE
        self._series: dict[Key, Series] = {}
        self._changed: set[Key] = set()

    def add(self, key: Key, now: float, count: int = 1) -> None:
        """Requests have come."""
        series = self._series.get(key)
        if series is None:
            if len(self._series) >= SERIES:
                self._forget_one(now)
            series = self._series[key] = Series(now, self._half_life)
        series.add(now, count)
        self._changed.add(key)

    def _forget_one(self, now: float) -> None:
        """The one of which least is expected in the next week."""
        del self._series[min(self._series, key=lambda key: self._series[key].expect(now, WEEK).mean)]

    def known(self) -> list[Key]:
        """Of which something is known."""
        return sorted(self._series)

    def expect(self, key: Key, now: float, seconds: float) -> Expected:
        """Nothing, for a key that nobody has heard of."""
        series = self._series.get(key)
        return series.expect(now, seconds) if series else Expected(0.0, 0.0, 0.0)

    def model(self, model: str, now: float, seconds: float) -> float:
        """Mean number of requests for a model, whatever their kind."""
        return math.fsum(self.expect(key, now, seconds).mean for key in self.known() if key[1] == model)

    def changed(self) -> list[tuple[Key, State]]:
        """The series in which something has come since this was last asked, for `load`."""
        keys, self._changed = self._changed & self._series.keys(), set()
        return [(key, self._series[key].dump()) for key in sorted(keys)]

    def unkept(self, states: Iterable[tuple[Key, State]]) -> None:
        """What `changed` has told could not be kept: it tells it again."""
        self._changed.update(key for key, _ in states)

    def load(self, kept: Iterable[tuple[Key, State]]) -> None:
        """Take over what an earlier process knew; what makes no sense is left out."""
        for key, state in kept:
            if len(self._series) >= SERIES:
                return
            try:
                self._series[key] = Series.load(state, self._half_life)
            except ValueError:
                continue


def quantile(share: float, mean: float, shape: float) -> float:
    """The least number that a negative binomial with this mean and shape exceeds with no more than 1 - share; that of a
    Poisson distribution as the shape grows."""
    if mean <= 0.0:
        return 0.0
    shape = max(shape, 1e-9)
    if mean > _EXACT:
        deviation = math.sqrt(mean + mean * mean / shape)
        return float(math.ceil(mean + NormalDist().inv_cdf(share) * deviation))
    # p(0) = (shape / (shape + mean)) ^ shape; p(k + 1) = p(k) (k + shape) / (k + 1) * mean / (mean + shape)
    log_p = -shape * math.log1p(mean / shape)
    step = math.log(mean) - math.log(mean + shape)
    total, number = math.exp(log_p), 0
    most = mean + 20.0 * math.sqrt(mean + mean * mean / shape) + 20.0
    while total < share and number < most:
        log_p += math.log(number + shape) - math.log(number + 1.0) + step
        number += 1
        total += math.exp(log_p)
    return float(number)


def _minute(now: float) -> int:
    return int(now // MINUTE)


def _hour(at: float) -> int:
    return int(at // HOUR) % HOURS
