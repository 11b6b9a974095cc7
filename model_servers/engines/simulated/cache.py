"""The prefix cache of the simulated engine: which leading blocks of a prompt were seen before."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b

from model_servers.engines.simulated.text import CHARACTERS_PER_TOKEN


def block_keys(scope: str, text: str, block_tokens: int) -> tuple[bytes, ...]:
    """One key per full block; each covers everything before it, so equal keys mean equal prefixes."""
    size = block_tokens * CHARACTERS_PER_TOKEN
    if len(text) < size:
        return ()
    keys = []
    digest = blake2b(scope.encode(), digest_size=16)
    for start in range(0, len(text) - size + 1, size):
        digest.update(text[start : start + size].encode("utf-8", "surrogatepass"))
        keys.append(digest.copy().digest())
    return tuple(keys)


class PrefixCache:
    """Least recently used blocks go first."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._blocks: OrderedDict[bytes, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._blocks)

    def match(self, keys: Sequence[bytes]) -> int:
        """How many leading blocks are here."""
        found = 0
        for key in keys:
            if key not in self._blocks:
                break
            found += 1
        return found

    def insert(self, keys: Sequence[bytes]) -> None:
        # Last block first: a prefix is used whenever its continuation is, so it must be the younger.
        for key in reversed(keys[: self._capacity]):
            self._blocks[key] = None
            self._blocks.move_to_end(key)
        while len(self._blocks) > self._capacity:
            self._blocks.popitem(last=False)
