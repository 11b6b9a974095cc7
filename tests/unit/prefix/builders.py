"""Prompts as paths, rows by name, and a cache as it really is."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from control_plane.domain.model import ModelName, Provider, ServerId
from control_plane.prefix.blocks import Blocks, known_blocks
from control_plane.prefix.cache import CacheRow, PrefixPolicy
from control_plane.prefix.index import PrefixIndex

SIZE = 64
"""Tokens of a block."""


def row(server: str, **of: object) -> CacheRow:
    return CacheRow(ServerId(server), ModelName("llama"), Provider("mlx"), **of)  # type: ignore[arg-type]


def indexed(*rows: CacheRow, **policy: float) -> PrefixIndex:
    """An index over these rows."""
    index = PrefixIndex(PrefixPolicy(**policy))  # type: ignore[arg-type]
    index.align(rows)
    return index


def prompt(path: Sequence[object], tokens: int | None = None) -> Blocks:
    """A block for each step: two prompts have as many equal blocks as their paths have equal first steps."""
    steps = tuple(path)
    ids = [hash(("step", *steps[: depth + 1])) for depth in range(len(steps))]
    return known_blocks(ids, tokens or max(len(ids) * SIZE, 1), SIZE)


class TrueCache:
    """Least recently used blocks, `tokens` in all, the tail of a prompt before its head, as in vLLM."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.blocks: OrderedDict[int, int] = OrderedDict()
        self._held = 0

    def look_up(self, blocks: Blocks) -> int:
        """Tokens that the prompt would find."""
        found = 0
        for block, end in zip(blocks.ids, blocks.ends, strict=True):
            if block not in self.blocks:
                break
            found = end
        return found

    def serve(self, blocks: Blocks) -> int:
        """Tokens that the prompt found; then it is all there, as far as it fits."""
        found = self.look_up(blocks)
        for block, size in zip(reversed(blocks.ids), reversed(blocks.sizes), strict=True):
            self._held += size - self.blocks.get(block, 0)
            self.blocks[block] = size
            self.blocks.move_to_end(block)
        while self._held > self.tokens:
            self._held -= self.blocks.popitem(last=False)[1]
        return found

    def clear(self) -> None:
        self.blocks.clear()
        self._held = 0
