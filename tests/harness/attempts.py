"""Attempts of tasks that never were: what takes how long is known, so what a predictor may learn is, too."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace

from control_plane.domain.task import Priority, TaskType
from control_plane.predictors.attempt import Attempt, Question, hour_of

BEGIN = 1_700_000_000.0


def question(**given: object) -> Question:
    plain = Question(TaskType.CHAT, "llama", "vllm", "gpu-1", 128, 64, Priority.NORMAL, 12)
    return replace(plain, **given)  # type: ignore[arg-type]


def attempt(
    seconds: float = 2.0, ok: bool = True, tokens: int | None = 32, at: float = BEGIN, **asked: object
) -> Attempt:
    return Attempt(question(**asked), at, seconds, ok, tokens if ok else None)


def true_seconds(asked: Question) -> float:
    """Twice as long on the slow server, and longer for long prompts: the latter no rule knows."""
    return (2.0 if asked.server_id == "slow" else 1.0) * asked.prompt_tokens / 500


def history(
    count: int, seed: int = 0, begin: float = BEGIN, seconds: Callable[[Question], float] = true_seconds
) -> list[Attempt]:
    """Attempts a minute apart on two servers, with prompts of four lengths; on `slow` one in five fails."""
    rng = random.Random(seed)
    found = []
    for number in range(count):
        at = begin + 60.0 * number
        asked = question(
            server_id=rng.choice(("fast", "slow")), prompt_tokens=rng.choice((100, 500, 2000, 8000)), hour=hour_of(at)
        )
        took = seconds(asked) * math.exp(rng.gauss(0, 0.1))
        ok = asked.server_id == "fast" or rng.random() > 0.2
        found.append(Attempt(asked, at, took, ok, asked.prompt_tokens // 10 if ok else None))
    return found
