"""Signed tickets: what was signed is read, what was changed is refused."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from modelyard.rpc.tickets import MAC_BYTES, read, sign, verified
from modelyard.v1.ticket_pb2 import Ticket

KEY = bytes(range(32))

made = st.builds(
    Ticket,
    id=st.integers(1, 2**64 - 1),
    orchestrator_id=st.text("0123456789abcdef", max_size=32),
    server_id=st.text("abc-", max_size=63),
    instance_id=st.text(max_size=40),
    lease_epoch=st.integers(0, 2**64 - 1),
    model=st.text(max_size=100),
    relayed=st.booleans(),
)


@given(made)
def test_a_ticket_says_what_was_signed(ticket: Ticket) -> None:
    signed = sign(KEY, ticket)
    assert verified(KEY, signed)
    assert read(signed) == ticket


@given(made, st.data())
def test_any_flipped_bit_is_found(ticket: Ticket, data: st.DataObject) -> None:
    signed = bytearray(sign(KEY, ticket))
    bit = data.draw(st.integers(0, 8 * len(signed) - 1))
    signed[bit // 8] ^= 1 << bit % 8
    assert not verified(KEY, bytes(signed))


@given(made, st.binary(max_size=20))
def test_nothing_can_be_put_behind_or_cut_off(ticket: Ticket, tail: bytes) -> None:
    signed = sign(KEY, ticket)
    assert verified(KEY, signed + tail) == (not tail)
    for length in range(len(signed)):
        assert not verified(KEY, signed[:length])


@given(made, st.binary(max_size=40))
def test_another_key_signs_nothing_of_ours(ticket: Ticket, key: bytes) -> None:
    assert verified(KEY, sign(key, ticket)) == (key == KEY)


def test_without_a_key_nothing_is_signed() -> None:
    assert not verified(b"", sign(b"", Ticket(id=1)))


@given(st.binary(max_size=200))
def test_noise_is_no_ticket(noise: bytes) -> None:
    assert not verified(KEY, noise)
    read(noise)  # must not raise


def test_a_huge_one_is_not_even_looked_at() -> None:
    signed = sign(KEY, Ticket(id=1, model="m" * 5000))
    assert len(signed) > MAC_BYTES
    assert not verified(KEY, signed)
