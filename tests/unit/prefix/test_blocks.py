"""Blocks: equal where prompts begin equally, and only there."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from control_plane.prefix.blocks import Blocks, known_blocks, own_blocks
from modelyard.rpc.prompts import BLOCK_ENDS, BLOCK_TOKENS, digests

SECRET = b"secret"


def fingerprint(prompt: bytes, secret: bytes, tenant: str, before: bytes = b"") -> Blocks:
    return own_blocks(digests(prompt), BLOCK_TOKENS, BLOCK_ENDS, len(prompt) // 4, secret, tenant, before)


def equal_beginning(one: Blocks, other: Blocks) -> int:
    """Tokens of the first blocks that both have."""
    tokens = 0
    for mine, others, end in zip(one.ids, other.ids, one.ends, strict=False):
        if mine != others:
            break
        tokens = end
    return tokens


def text(length: int) -> bytes:
    return bytes(number * number % 251 for number in range(length))


@settings(deadline=None)
@given(st.integers(0, 60_000), st.integers(0, 60_000), st.integers(0, 60_000))
def test_prompts_share_what_is_before_their_first_difference(shared: int, one: int, other: int) -> None:
    start = text(shared)
    tokens = equal_beginning(
        fingerprint(start + b"\x01" * one, SECRET, "acme"), fingerprint(start + b"\x02" * other, SECRET, "acme")
    )
    if one and other:
        assert tokens * 4 <= shared
    # No block is longer than 64 tokens or a 16th of what is before it.
    assert tokens * 4 >= shared - max(256, shared / 16)


def test_a_changed_byte_changes_all_blocks_from_there_on() -> None:
    prompt = bytearray(text(200_000))
    before = fingerprint(bytes(prompt), SECRET, "acme")
    for place in (0, 255, 256, 30_000, 150_000):
        prompt[place] ^= 1
        after = fingerprint(bytes(prompt), SECRET, "acme")
        prompt[place] ^= 1
        same = [mine == other for mine, other in zip(before.ids, after.ids, strict=True)]
        first = sum(end * 4 <= place for end in before.ends)
        assert same == [True] * first + [False] * (len(same) - first)


@pytest.mark.parametrize(("secret", "tenant"), [(SECRET, "evil"), (SECRET, ""), (b"another", "acme"), (SECRET, "acmE")])
def test_no_block_is_of_two_tenants_or_of_two_secrets(secret: bytes, tenant: str) -> None:
    prompt = text(100_000)
    ours, theirs = fingerprint(prompt, SECRET, "acme"), fingerprint(prompt, secret, tenant)
    assert ours == fingerprint(prompt, SECRET, "acme")
    assert len(set(ours.ids)) == len(ours.ids) > 50
    assert not set(ours.ids) & set(theirs.ids)


@settings(deadline=None)
@given(st.text(min_size=1, max_size=8), st.integers(0, 8), st.integers(0, 8))
def test_where_a_tenants_name_ends_is_known(name: str, one: int, other: int) -> None:
    rest = text(1000)
    ours = fingerprint(name[one:].encode() + rest, SECRET, name[:one])
    theirs = fingerprint(name[other:].encode() + rest, SECRET, name[:other])
    assert bool(set(ours.ids) & set(theirs.ids)) is (name[:one] == name[:other])


def test_a_prompt_after_something_else_is_another() -> None:
    prompt = text(1000)
    ours, theirs = (fingerprint(prompt, SECRET, "acme", before) for before in (b"", b"Be brief."))
    assert ours.ids and not set(ours.ids) & set(theirs.ids)


def test_more_hashes_than_the_prompt_has_tokens_for_are_dropped() -> None:
    blocks = own_blocks(digests(text(1000)), BLOCK_TOKENS, BLOCK_ENDS, 130, SECRET, "acme")
    assert blocks.ends == (64, 128) and len(blocks.ids) == len(blocks.sizes) == 2 and blocks.tokens == 130


def test_sizes_are_bounded_and_so_is_their_number() -> None:
    blocks = fingerprint(bytes(1 << 20), SECRET, "acme")
    assert len(blocks.ids) == len(blocks.sizes) == len(blocks.ends) == 224
    assert blocks.tokens == 1 << 18 and blocks.ends[-1] <= blocks.tokens
    assert all(size <= max(64, (end - size) // 16) for size, end in zip(blocks.sizes, blocks.ends, strict=True))
    assert blocks.sizes[0] == 64 and blocks.ends[-1] == sum(blocks.sizes)


def test_a_short_prompt_has_no_block() -> None:
    assert fingerprint(b"", SECRET, "acme") == Blocks((), (), (), 1, 0.25)
    assert fingerprint(bytes(255), SECRET, "acme").ids == ()
    assert len(fingerprint(bytes(256), SECRET, "acme").ids) == 1


@settings(deadline=None)
@given(st.lists(st.integers(), min_size=1, max_size=30), st.integers(1, 20_000))
def test_given_ids_stand_for_the_prompt(ids: list[int], tokens: int) -> None:
    blocks = known_blocks(ids, tokens)
    assert blocks.tokens == tokens and blocks.error == 0.0
    assert blocks.ids == tuple(ids[: len(blocks.ids)])
    assert all(0 < size <= 512 for size in blocks.sizes)
    assert blocks.ends[-1] == sum(blocks.sizes) == min(tokens, 512 * len(ids))
