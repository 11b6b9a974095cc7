"""Texts to vectors, a group of short ones or a piece of a long one at a time: decoding goes on in between."""

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


class LongText:
    """One text, computed through a KV cache as prompts are."""

    def __init__(self, network: Any, tokens: Sequence[int]) -> None:
        from mlx_lm.models.cache import make_prompt_cache

        self._network = network
        self._tokens = tokens
        self._cache = make_prompt_cache(network)
        self._position = 0
        self._sum: Any = 0

    def step(self, budget: int) -> list[float] | None:
        """Computes the next `budget` tokens. Returns the vector (see embed_group) with the last, None before."""
        import mlx.core as mx
        import numpy as np

        piece = self._tokens[self._position : self._position + budget]
        hidden = self._network.model(mx.array([piece]), cache=self._cache).astype(mx.float32)
        self._sum = self._sum + hidden.sum(axis=1)
        self._position += len(piece)
        mx.eval(self._sum, [layer.state for layer in self._cache])
        if self._position < len(self._tokens):
            return None
        mean = self._sum / len(self._tokens)
        norm = mx.maximum(mx.linalg.norm(mean, axis=-1, keepdims=True), 1e-12)
        vector: list[float] = np.array(mean / norm)[0].tolist()
        return vector
