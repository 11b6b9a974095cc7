"""How one sequence draws its tokens. Imported by the engine thread only: it needs MLX.

Order: repetition penalty, frequency and presence penalties, grammar mask, temperature, min_p, top_k, top_p. Every
operation is lazy and works on one row, so a sequence's draws depend on its own logits and key alone.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from model_servers.engine import Sampling, TokenLogprob

Processor = Callable[[Any, Any], Any]
"""(context: token ids [n], logits [1, vocabulary]) -> logits [1, vocabulary]; called once per generated token."""


def greedy(logprobs: Any) -> Any:
    """[rows, vocabulary] -> [rows]. One shared function: a batch of greedy rows is drawn in one call."""
    return mx.argmax(logprobs, axis=-1)


def make_sampler(sampling: Sampling) -> Callable[[Any], Any]:
    """Draws from [1, vocabulary] log-probabilities with a key of its own, split once per token.

    MLX's global random state would make the outcome depend on the neighbours in the batch.
    """
    temperature = sampling.temperature or 0.0
    if temperature <= 0.0:
        return greedy
    seed = sampling.seed if sampling.seed is not None else int.from_bytes(os.urandom(8), "little")
    key = mx.random.key(seed)
    top_k, top_p, min_p = sampling.top_k or 0, sampling.top_p or 1.0, sampling.min_p or 0.0

    def draw(logprobs: Any) -> Any:
        nonlocal key
        key, now = mx.random.split(key)
        logits = logprobs.astype(mx.float32) * (1.0 / temperature)
        if min_p > 0.0:
            floor = mx.max(logits, axis=-1, keepdims=True) + math.log(min_p)
            logits = mx.where(logits < floor, -mx.inf, logits)
        if 0 < top_k < logits.shape[-1] or top_p < 1.0:
            ranked = mx.sort(logits, axis=-1)
            if 0 < top_k < logits.shape[-1]:
                kth = ranked[..., -top_k, None]
                logits = mx.where(logits < kth, -mx.inf, logits)
                ranked = mx.where(ranked < kth, -mx.inf, ranked)
            if top_p < 1.0:
                # Keep a token while the likelier ones together have not reached top_p.
                likelier = mx.cumsum(mx.softmax(ranked, axis=-1), axis=-1, reverse=True, inclusive=False)
                least = mx.min(mx.where(likelier < top_p, ranked, mx.inf), axis=-1, keepdims=True)
                logits = mx.where(logits < least, -mx.inf, logits)
        return mx.random.categorical(logits, key=now)

    return draw


def make_penalties(sampling: Sampling, prompt: Sequence[int]) -> Processor | None:
    """The penalties as one processor, or None if there are none.

    Repetition counts tokens of prompt and answer, frequency and presence those of the answer: as vLLM does.
    """
    repetition = sampling.repetition_penalty or 1.0
    frequency = sampling.frequency_penalty or 0.0
    presence = sampling.presence_penalty or 0.0
    if repetition == 1.0 and not frequency and not presence:
        return None
    in_prompt = mx.array(sorted(set(prompt)))
    counts: Any = None
    said = False

    def penalize(context: Any, logits: Any) -> Any:
        nonlocal counts, said
        if counts is None:
            counts = mx.zeros((logits.shape[-1],), dtype=mx.float32)
        if said:  # the first call's context is the prompt alone
            counts = counts.at[context[-1:]].add(1.0)
        said = True
        logits = logits.astype(mx.float32)
        if repetition != 1.0:
            occurred = (counts > 0).at[in_prompt].maximum(True)
            weakened = mx.where(logits > 0, logits / repetition, logits * repetition)
            logits = mx.where(occurred, weakened, logits)
        return logits - frequency * counts - presence * (counts > 0)

    return penalize


class LogprobRecorder:
    """Keeps the model's own log-probabilities: natural, before penalties, mask and temperature.

    The generator computes one token ahead, hence the queue.
    """

    def __init__(self, top: int, text_of: Callable[[int], str]) -> None:
        self._top = top
        self._text_of = text_of
        self._rows: deque[Any] = deque()

    def __call__(self, context: Any, logits: Any) -> Any:
        row = logits[0].astype(mx.float32)
        self._rows.append(row - mx.logsumexp(row))
        return logits

    def take(self, token: int) -> TokenLogprob:
        """The entry of the next token in order, which is `token`."""
        row = np.array(self._rows.popleft())
        best: list[int] = []
        if self._top:
            top = min(self._top, row.size)
            found = np.argpartition(-row, top - 1)[:top]
            best = found[np.lexsort((found, -row[found]))].tolist()
        return TokenLogprob(
            token=self._text_of(token),
            logprob=min(0.0, float(row[token])),
            top=tuple((self._text_of(other), min(0.0, float(row[other]))) for other in best),
        )


class Guarded:
    """Runs the processors of one request so that a fault in them stays with that request."""

    def __init__(self, processors: Sequence[Processor]) -> None:
        self._processors = processors
        self.failure: Exception | None = None

    def __call__(self, context: Any, logits: Any) -> Any:
        if self.failure is not None:
            return logits
        dtype, untouched = logits.dtype, logits
        try:
            for processor in self._processors:
                logits = processor(context, logits)
        except Exception as failure:
            self.failure = failure
            return untouched
        # Rows of one batch are joined again: they must agree in type.
        return logits.astype(dtype)
