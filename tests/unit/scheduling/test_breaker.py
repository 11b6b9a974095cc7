"""Breaker: opens, tries gently, closes; one trial at a time whatever happens."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from control_plane.domain.server import BreakerState
from control_plane.scheduling.breaker import Breaker, BreakerPolicy

POLICY = BreakerPolicy(failures=3, pause=1.0, pause_factor=2.0, pause_cap=4.0)


def opened(now: float = 0.0) -> Breaker:
    breaker = Breaker.closed(POLICY)
    for _ in range(POLICY.failures):
        breaker = breaker.on_dispatch(now)
        breaker = breaker.on_failure(now, breaker.epoch)
    return breaker


@pytest.mark.parametrize(
    ("name", "bad"), [("failures", 0), ("pause", 0.0), ("pause_factor", 0.9), ("pause_cap", float("inf"))]
)
def test_a_bad_value_is_named(name: str, bad: float) -> None:
    with pytest.raises(ValueError, match=name):
        BreakerPolicy(**{name: bad})  # type: ignore[arg-type]


def test_opens_after_failures_in_a_row() -> None:
    breaker = Breaker.closed(POLICY).on_failure(0, 0).on_failure(0, 0)
    assert breaker.state is BreakerState.CLOSED and breaker.allows(0)
    breaker = breaker.on_success(0, 0).on_failure(0, 0).on_failure(0, 0)
    assert breaker.state is BreakerState.CLOSED
    breaker = breaker.on_failure(0, 0)
    assert breaker.state is BreakerState.OPEN
    assert not breaker.allows(0.99) and breaker.allows(1.0)


def test_it_is_in_doubt_from_a_failure_to_the_next_success() -> None:
    breaker = Breaker.closed(POLICY)
    assert not breaker.doubtful
    failed = breaker.on_failure(0, 0)
    assert failed.doubtful and not failed.on_success(0, 0).doubtful
    trial = opened().on_dispatch(1.0)
    assert opened().doubtful and trial.doubtful
    assert not trial.on_success(1.5, trial.epoch).doubtful


def test_dispatch_through_an_open_breaker_is_a_bug() -> None:
    with pytest.raises(ValueError, match="OPEN"):
        opened().on_dispatch(0.5)


def test_one_trial_then_closed() -> None:
    trial = opened().on_dispatch(1.0)
    assert trial.state is BreakerState.HALF_OPEN and not trial.allows(100.0)
    closed = trial.on_success(1.5, trial.epoch)
    assert closed.state is BreakerState.CLOSED and closed.allows(1.5)
    assert closed.failed == 0 and closed.pause == 0


def test_pauses_grow_to_the_cap() -> None:
    breaker, now, pauses = opened(), 0.0, []
    for _ in range(4):
        pauses.append(breaker.retry_at - now)
        now = breaker.retry_at
        breaker = breaker.on_dispatch(now)
        breaker = breaker.on_failure(now, breaker.epoch)
    assert pauses == [1.0, 2.0, 4.0, 4.0]


def test_a_cancelled_trial_frees_its_place() -> None:
    trial = opened().on_dispatch(1.0)
    freed = trial.on_cancel(1.1, trial.epoch)
    assert freed.state is BreakerState.HALF_OPEN and freed.allows(1.1)
    assert not freed.on_dispatch(1.1).allows(1.1)


def test_outcomes_from_before_it_opened_change_nothing() -> None:
    early = Breaker.closed(POLICY).on_dispatch(0.0).epoch
    trial = opened().on_dispatch(1.0)
    assert trial.on_cancel(1.1, early) is trial
    assert trial.on_success(1.1, early) is trial
    assert trial.on_failure(1.1, early) is trial


def test_late_failures_do_not_prolong_the_pause() -> None:
    breaker = opened()
    assert breaker.on_failure(0.9, breaker.epoch) is breaker


class Traffic(RuleBasedStateMachine):
    """Requests that begin and end in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.breaker = Breaker.closed(POLICY)
        self.running: list[tuple[int, bool]] = []  # epoch, is a trial

    @rule(seconds=st.floats(0, 5))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @precondition(lambda self: self.breaker.allows(self.now))
    @rule()
    def dispatch(self) -> None:
        self.breaker = self.breaker.on_dispatch(self.now)
        self.running.append((self.breaker.epoch, self.breaker.state is BreakerState.HALF_OPEN))

    @precondition(lambda self: self.running)
    @rule(data=st.data(), outcome=st.sampled_from([Breaker.on_success, Breaker.on_failure, Breaker.on_cancel]))
    def end(self, data: st.DataObject, outcome: object) -> None:
        epoch, _ = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
        self.breaker = outcome(self.breaker, self.now, epoch)  # type: ignore[operator]

    @invariant()
    def never_two_trials(self) -> None:
        assert sum(trial for _, trial in self.running) <= 1

    @invariant()
    def pauses_are_bounded(self) -> None:
        if self.breaker.state is BreakerState.OPEN:
            assert self.breaker.retry_at <= self.now + POLICY.pause_cap

    @invariant()
    def always_allows_again(self) -> None:
        breaker = self.breaker
        for epoch, _ in self.running:
            breaker = breaker.on_cancel(self.now, epoch)
        assert breaker.allows(self.now + POLICY.pause_cap)


TestTraffic = Traffic.TestCase
