"""A prompt as routing knows it: never its text."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Blocks:
    """A prompt as a chain of blocks. An id stands for the block and for all before it, so that equal ids mean that the
    prompts are equal up to there. What is left after the last whole block is in no block."""

    ids: tuple[int, ...]
    sizes: tuple[int, ...]
    """Tokens of each block, > 0."""
    ends: tuple[int, ...]
    """Tokens up to the end of each block."""
    tokens: int
    """Of the whole prompt, > 0."""
    error: float = 0.0
    """How far sizes may be off the engine's own count, as a share of it: [0, 1)."""
