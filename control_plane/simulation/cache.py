"""The prefix cache of a host."""

from __future__ import annotations

from collections import OrderedDict

from control_plane.simulation.traces import BLOCK_TOKENS


class PrefixCache:
    """Blocks of prompts, those used last kept. Of one prompt the last blocks go first: a block is of no use without
    those before it."""

    __slots__ = ("_blocks", "capacity")

    def __init__(self, tokens: int) -> None:
        self.capacity = tokens // BLOCK_TOKENS
        self._blocks: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._blocks)

    def matched(self, blocks: tuple[int, ...] | None) -> int:
        """How many leading blocks are in it."""
        if not blocks:
            return 0
        known, count = self._blocks, 0
        for block in blocks:
            if block not in known:
                break
            count += 1
        return count

    def use(self, blocks: tuple[int, ...], count: int) -> None:
        """The first `count`, which are in it, were used."""
        touch = self._blocks.move_to_end
        for place in range(count - 1, -1, -1):
            touch(blocks[place])

    def insert(self, blocks: tuple[int, ...] | None) -> None:
        if not blocks or not self.capacity:
            return
        known = self._blocks
        for block in reversed(blocks[: self.capacity]):
            known[block] = None
            known.move_to_end(block)
        while len(known) > self.capacity:
            known.popitem(last=False)

    def clear(self) -> None:
        self._blocks.clear()
