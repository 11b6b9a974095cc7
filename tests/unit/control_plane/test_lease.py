from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from control_plane.domain.lease import Lease
from control_plane.domain.server import LeaseState

steps = st.lists(st.tuples(st.sampled_from(["renew", "break", "look"]), st.floats(0, 5, allow_nan=False)), max_size=40)


def test_the_life_of_a_lease() -> None:
    lease = Lease.grant(1, now=0.0, duration=3.0)
    assert lease.at(2.9).state is LeaseState.LIVE
    assert lease.at(3.0).state is LeaseState.LOST
    assert lease.broken().state is LeaseState.SUSPECT
    assert lease.broken().at(3.0).state is LeaseState.LOST
    assert lease.broken().at(3.0).broken().state is LeaseState.LOST


@given(steps)
def test_epochs_only_grow_and_nothing_returns_from_lost_under_its_old_epoch(path: list[tuple[str, float]]) -> None:
    now, lease = 0.0, Lease.grant(1, 0.0, 3.0)
    lost_epochs: set[int] = set()
    for step, pause in path:
        now += pause
        before = lease
        lease = lease.at(now)
        if lease.state is LeaseState.LOST:
            lost_epochs.add(lease.epoch)
        if step == "renew":
            lease = lease.renewed(now, 3.0)
            assert lease.state is LeaseState.LIVE
            assert lease.expires_at == now + 3.0
            assert lease.epoch not in lost_epochs
        elif step == "break":
            lease = lease.broken()
            assert lease.state is not LeaseState.LIVE
            assert lease.expires_at == before.expires_at
        assert lease.epoch >= before.epoch
