"""A prompt as blocks, from hashes of its beginnings: never its text."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from hashlib import blake2b
from itertools import accumulate

from control_plane.domain.prompt import Blocks

_TEXT_ERROR = 0.25
"""Of tokens that are reckoned from the length of a text."""


def own_blocks(
    ids: Sequence[int],
    sizes: tuple[int, ...],
    ends: tuple[int, ...],
    tokens: int,
    secret: bytes,
    tenant: str,
    before: bytes = b"",
) -> Blocks:
    """Blocks of a prompt from the hashes of its beginnings, which are those of no other tenant, and of nothing that
    comes after something else than `before`. sizes, ends: tokens of each block and up to its end, at least as many as
    ids; what goes beyond the prompt's `tokens` is dropped.

    `secret`, up to 64 bytes, is random and of this process: a tenant that makes up hashes does not meet another's.
    """
    tokens = max(tokens, 1)
    count = min(len(ids), bisect_right(ends, tokens))
    # No tenant's name holds the byte in between, which is not in UTF-8.
    mark = int.from_bytes(blake2b(tenant.encode() + b"\xff" + before, digest_size=8, key=secret).digest(), "little")
    return Blocks(tuple([each ^ mark for each in ids[:count]]), sizes[:count], ends[:count], tokens, _TEXT_ERROR)


def known_blocks(ids: Sequence[int], tokens: int, block_tokens: int = 512) -> Blocks:
    """Blocks of a prompt of `tokens` > 0 whose ids are given, one for each `block_tokens` of it, as in public traces.
    The last may stand for less; ids beyond the prompt are dropped."""
    ids = tuple(ids[: -(-tokens // block_tokens)])
    sizes = (block_tokens,) * len(ids)
    if ids and len(ids) * block_tokens > tokens:
        sizes = (*sizes[:-1], tokens - (len(ids) - 1) * block_tokens)
    return Blocks(ids, sizes, tuple(accumulate(sizes)), tokens)
