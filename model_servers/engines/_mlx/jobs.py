"""What passes between the event loop and the engine thread."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

from model_servers.engines._mlx.prompting import Plan

Outbox = list[tuple[asyncio.Queue[Any], Any]]
"""(where to, what): deltas, ends, vectors and errors of one step."""


@dataclass(eq=False, slots=True)
class Job:
    """One generation on its way through the thread. Its sink receives Delta, Finished or an EngineError."""

    plan: Plan
    sink: asyncio.Queue[Any]
    submitted: float
    started: float = 0.0
    cached: int = 0
    """Prompt tokens that did not have to be computed."""
    made: int = 0
    """Tokens generated, end-of-text included."""
    cancelled: bool = False
    guard: Any = None
    """sampling.Guarded, if the request has logits processors."""
    recorder: Any = None
    """sampling.LogprobRecorder, if log-probabilities were asked for."""


@dataclass(eq=False, slots=True)
class EmbedJob:
    """One Embed request. Its sink receives the list of vectors or an EngineError."""

    inputs: list[list[int]]
    sink: asyncio.Queue[Any]
    cancelled: bool = False
    vectors: dict[int, list[float]] = field(default_factory=dict)
    long: Any = None
    """embedding.LongText, while one is computed. Belongs to the thread."""

    @property
    def done(self) -> bool:
        return len(self.vectors) == len(self.inputs)

    def next_group(self, budget: int) -> list[int]:
        """Indices of the inputs to compute next, longest first; padded they hold at most `budget` tokens."""
        left = sorted((i for i in range(len(self.inputs)) if i not in self.vectors), key=lambda i: -len(self.inputs[i]))
        widest = len(self.inputs[left[0]])
        return left[: max(1, budget // widest)]

    def result(self) -> list[list[float]]:
        return [self.vectors[i] for i in range(len(self.inputs))]


@dataclass(eq=False, slots=True)
class Change:
    """The model is to come into memory, or to leave it. Its sink receives None or an EngineError."""

    warm: bool
    sink: asyncio.Queue[Any]


@dataclass(slots=True)
class Gauges:
    """What the thread shows of itself. Written by it alone, one whole value at a time; read by anyone."""

    running: int = 0
    waiting: int = 0
    kv_tokens: int = 0
    progress_at: float = 0.0
    """When the last step ended, or work arrived after idling."""
    busy: bool = False
    steps: int = 0
    """Grows with everything computed: tokens, pieces of prompts, groups of texts to embed."""
    warm: bool = False
    loading: bool = False
    memory_used: int = 0
    """Bytes that MLX holds, its cache for reuse not counted."""
    load_seconds: float | None = None
    """What the last load took."""
    model_bytes: int = 0
    """What the weights take, measured when they were loaded."""
    failure: str = ""
    """Why the thread ended; empty while it lives."""


def deliver(outbox: Outbox) -> None:
    """On the event loop."""
    for sink, item in outbox:
        sink.put_nowait(item)
