"""Trained predictors against the rules and against ridge regression, on what a mixed fleet made of a trace. By hand:

    python -m tests.benchmarks.predictors AZURE.csv MOONCAKE.jsonl

Every request of the trace goes to a fleet of nine hosts in three classes (`prediction_data.py`) and takes what it took
there; one in fifty fails, on one host one in five. Only what is known of a task when it gets its server is given to the
predictors: no load, no cache. The last fifth is predicted. Lower is better.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from control_plane.domain.task import TaskType
from control_plane.predictors import trees
from control_plane.predictors.artefact import HELD_OUT, encode, foretold, train
from control_plane.predictors.attempt import Attempt, Prediction, Question, hour_of
from control_plane.predictors.scores import Score, score
from control_plane.tasks.lanes import quarter_octave
from tests.benchmarks.prediction_data import FLEET, azure, generate, mooncake


def attempts_of(path: Path, load: float, seed: int = 1) -> list[Attempt]:
    """What was done with a trace."""
    read = azure if path.suffix == ".csv" else mooncake
    _, log = generate(read(path, load), seed)
    rng = random.Random(seed)
    found = []
    for at, what, request in log:
        if what != "done":
            continue
        arrival, host = request.arrival, request.host
        ok = rng.random() > (0.2 if host == 3 else 0.02)
        question = Question(
            TaskType.CODE_GENERATION if arrival.prompt < 8000 else TaskType.SUMMARIZATION,
            f"model-{FLEET[host]}",
            "provider",
            f"host-{host}",
            quarter_octave(arrival.prompt),
            hour=hour_of(arrival.at),
        )
        found.append(Attempt(question, arrival.at, at - arrival.at, ok, arrival.output if ok else None))
    return sorted(found, key=lambda attempt: attempt.at)


def ridge(earlier: Sequence[Attempt], later: Sequence[Attempt], told: Sequence[Prediction]) -> list[Prediction]:
    """Ridge regression on one-hot categories, ln(prompt), its square, and the rules; 0.9 from the residuals."""
    known = trees.vocabulary(earlier)

    def row(attempt: Attempt, rules: Prediction) -> list[float]:
        asked = attempt.question
        length = np.log1p(asked.prompt_tokens) / 10
        hot = [float(trees._value(asked, name) == value) for name in trees.CATEGORIES for value in known[name]]
        seen = [np.log(rules.seconds_p50), np.log(rules.seconds_p90), np.log1p(rules.completion_tokens)]
        return [1.0, length, length * length, *hot, *(one * length for one in hot), *seen]

    def fitted(target: str) -> tuple[np.ndarray, float]:
        rows = [
            (row(a, r), trees._label(target, a))
            for a, r in zip(earlier, told[: len(earlier)], strict=True)
            if not np.isnan(trees._label(target, a))
        ]
        x, y = np.array([one for one, _ in rows]), np.array([label for _, label in rows])
        weights = np.linalg.solve(x.T @ x + np.eye(x.shape[1]), x.T @ y)
        return weights, float(np.quantile(y - x @ weights, 0.9))

    seconds, up = fitted("seconds_p50")
    success, _ = fitted("success")
    tokens, _ = fitted("completion_tokens")
    found = []
    for attempt, rules in zip(later, told[len(earlier) :], strict=True):
        x = np.array(row(attempt, rules))
        at = float(x @ seconds)
        chance = min(1.0, max(0.0, float(x @ success)))
        found.append(Prediction(np.exp(at), np.exp(at + up), chance, max(0.0, np.expm1(float(x @ tokens)))))
    return found


def show(name: str, found: Score) -> None:
    losses = found.losses
    print(
        f"| {name:8} | {losses.seconds:.4f} | {found.covered:.3f} | {losses.success:.4f} | "
        f"{losses.completion_tokens:.4f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", nargs="+", type=Path)
    parser.add_argument("--load", type=float, default=0.25, help="share of the fleet's prefill (%(default)s)")
    for path in (arguments := parser.parse_args()).traces:
        attempts = attempts_of(path, arguments.load)
        cut = int(len(attempts) * (1.0 - HELD_OUT))
        begun = time.perf_counter()
        artefact = train(attempts, 0.0)
        took = time.perf_counter() - begun
        told = foretold(attempts)
        size = len(encode(artefact)) / 1e6
        print(f"\n{path.name}: {cut} attempts to learn from, {len(attempts) - cut} to predict")
        print(f"trained in {took:.1f} s, {size:.2f} MB")
        print("|          | seconds | within p90 | success | tokens |")
        show("rules", artefact.holdout.rules)
        show("ridge", score(ridge(attempts[:cut], attempts[cut:], told), attempts[cut:]))
        show("trees", artefact.holdout.trained)
        ready, count = artefact.trees(), 1000
        for what in ("first", "second"):
            begun = time.process_time()
            for attempt, rules in zip(attempts[:count], told[:count], strict=True):
                ready.predict(attempt.question, rules)
            print(f"predictions, {what} time: {(time.process_time() - begun) / count * 1e6:.0f} us each")


if __name__ == "__main__":
    main()
