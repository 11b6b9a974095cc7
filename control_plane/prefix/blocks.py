"""The fingerprint of a prompt: hashes of its beginnings, never its text."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from hashlib import blake2b
from itertools import accumulate
from struct import unpack
from zlib import crc32

from control_plane.domain.prompt import Blocks

BYTES_PER_TOKEN = 4
"""As routing estimates prompts."""

# Blocks of 64 tokens at first; after every 32 of them the next are twice as long. So a chat has nearly as fine a grain
# as engines have, and a megabyte has 224 blocks, none of them longer than 64 tokens or a 16th of what comes before it.
_FIRST_BLOCK = 256
_BLOCKS_OF_A_SIZE = 32
_SIZES_IN_BYTES = tuple(_FIRST_BLOCK << doubled for doubled in range(16) for _ in range(_BLOCKS_OF_A_SIZE))
_ENDS_IN_BYTES = tuple(accumulate(_SIZES_IN_BYTES))
_SIZES = tuple(size // BYTES_PER_TOKEN for size in _SIZES_IN_BYTES)
_ENDS = tuple(accumulate(_SIZES))

# Longer blocks enter the chain as their CRC, which takes a quarter of the time. Two unlike blocks of one tenant that
# follow the same beginning are taken for the same once in 2**32 times.
_LONGEST_HASHED = 1024

_TEXT_ERROR = 0.25


def fingerprint(prompt: bytes, secret: bytes, tenant: str) -> Blocks:
    """Blocks of a prompt, which are of no other tenant: about 1 µs a block.

    Tokens are estimated at four bytes each. `secret`, up to 64 bytes, is random and of this process: an id that gets
    out does not tell whether a text that somebody guessed was the prompt.
    """
    count = bisect_right(_ENDS_IN_BYTES, len(prompt))
    chain = blake2b(digest_size=8, key=secret)
    chain.update(tenant.encode() + b"\xff")  # not in UTF-8, so no tenant's name with a text is another's name
    digests = []
    view = memoryview(prompt)
    begin = 0
    for end in _ENDS_IN_BYTES[:count]:
        block = view[begin:end]
        chain.update(block if end - begin <= _LONGEST_HASHED else crc32(block).to_bytes(4, "little"))
        digests.append(chain.digest())
        begin = end
    ids = unpack(f"<{count}Q", b"".join(digests))
    tokens = max(len(prompt) // BYTES_PER_TOKEN, 1)
    return Blocks(ids, _SIZES[:count], _ENDS[:count], tokens, _TEXT_ERROR)


def known_blocks(ids: Sequence[int], tokens: int, block_tokens: int = 512) -> Blocks:
    """Blocks of a prompt of `tokens` > 0 whose ids are given, one for each `block_tokens` of it, as in public traces.
    The last may stand for less; ids beyond the prompt are dropped."""
    ids = tuple(ids[: -(-tokens // block_tokens)])
    sizes = (block_tokens,) * len(ids)
    if ids and len(ids) * block_tokens > tokens:
        sizes = (*sizes[:-1], tokens - (len(ids) - 1) * block_tokens)
    return Blocks(ids, sizes, tuple(accumulate(sizes)), tokens)
