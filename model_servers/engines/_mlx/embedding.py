"""Texts to vectors, a group at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def embed_group(network: Any, inputs: Sequence[Sequence[int]]) -> list[list[float]]:
    """Mean over positions of the last hidden states, scaled to length 1; [inputs, width].

    Padding goes to the right, where causal attention keeps it from touching the real positions.
    """
    import mlx.core as mx
    import numpy as np

    lengths = [len(tokens) for tokens in inputs]
    width = max(lengths)
    padded = mx.array([[*tokens, *([0] * (width - len(tokens)))] for tokens in inputs])
    hidden = network.model(padded).astype(mx.float32)
    counts = mx.array(lengths)[:, None]
    mask = (mx.arange(width)[None, :] < counts).astype(mx.float32)[..., None]
    mean = (hidden * mask).sum(axis=1) / counts
    norm = mx.maximum(mx.linalg.norm(mean, axis=-1, keepdims=True), 1e-12)
    rows: list[list[float]] = np.array(mean / norm).tolist()
    return rows
