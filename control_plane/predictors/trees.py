"""Gradient-boosted trees for what the rules do not see: how times depend on lengths, servers, hours.

LightGBM, for four targets: quantiles 0.5 and 0.9 of ln(seconds), success, the median of ln(1 + tokens). What the rules
predict is among the features, so that trees have to learn only what differs. It is imported when it is needed (extra
`predictors`), and its models are text: nothing in an artefact is executed but by its reader.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from control_plane.predictors.attempt import Attempt, Prediction, Question
from control_plane.predictors.rules import Rules

if TYPE_CHECKING:
    from lightgbm import Booster

Matrix: TypeAlias = NDArray[np.float64]
Progress: TypeAlias = Callable[[str, int, int], None]
"""What is done, steps so far, steps in all."""

CATEGORIES = ("task_type", "model", "provider", "server_id", "priority")
NUMBERS = (
    "prompt_tokens", "max_tokens", "hour", "rules_seconds_p50", "rules_seconds_p90", "rules_success", "rules_tokens"
)  # fmt: skip
FEATURES = (*CATEGORIES, *NUMBERS)
MOST_VALUES = 200
"""Of a category; rarer ones are `not known`, as new ones are."""

TARGETS: Mapping[str, Mapping[str, Any]] = {
    "seconds_p50": {"objective": "quantile", "alpha": 0.5},
    "seconds_p90": {"objective": "quantile", "alpha": 0.9},
    "success": {"objective": "binary"},
    "completion_tokens": {"objective": "regression_l1"},
}
_PARAMETERS: Mapping[str, Any] = {
    "num_leaves": 15,
    "learning_rate": 0.05,
    "min_data_in_leaf": 20,
    "max_cat_to_onehot": 8,
    "num_threads": 1,
    "deterministic": True,
    "force_row_wise": True,
    "seed": 1,
    "verbosity": -1,
}
ROUNDS = 300
PATIENCE = 20
"""Rounds without gain on the latest part of the training data after which a model is complete."""
LATEST = 0.15
"""Share of the training data that is held back for that."""


class TreesError(ValueError):
    """Trees cannot be trained or read; the message says why and what helps."""


def lightgbm() -> Any:
    """The library. Raises TreesError where it is not installed, or has no OpenMP."""
    try:
        import lightgbm
    except ImportError:
        raise TreesError("trained predictors need LightGBM: pip install 'modelyard[predictors]'") from None
    except OSError as error:
        raise TreesError(f"LightGBM does not start ({error}): it needs OpenMP (macOS: brew install libomp)") from None
    return lightgbm


Vocabulary: TypeAlias = Mapping[str, Sequence[str]]


def vocabulary(attempts: Sequence[Attempt]) -> dict[str, list[str]]:
    """The values of each category, the most frequent first."""
    return {
        name: [value for value, _ in Counter(_value(attempt.question, name) for attempt in attempts)
               .most_common(MOST_VALUES)]
        for name in CATEGORIES
    }  # fmt: skip


def _value(question: Question, name: str) -> str:
    value = getattr(question, name)
    return value if isinstance(value, str) else str(value.name)


class Encoder:
    """Questions as rows of numbers; what is not known is NaN."""

    def __init__(self, categories: Vocabulary) -> None:
        self._codes = [{value: float(code) for code, value in enumerate(categories[name])} for name in CATEGORIES]

    def row(self, question: Question, rules: Prediction) -> list[float]:
        """One row, in the order of FEATURES."""
        return [
            *(codes.get(_value(question, name), math.nan) for name, codes in zip(CATEGORIES, self._codes, strict=True)),
            math.log1p(question.prompt_tokens),
            math.nan if question.max_tokens is None else math.log1p(question.max_tokens),
            float(question.hour),
            math.log(rules.seconds_p50),
            math.log(rules.seconds_p90),
            rules.success,
            math.log1p(rules.completion_tokens),
        ]


def train(
    attempts: Sequence[Attempt], categories: Vocabulary, progress: Progress = lambda what, done, of: None
) -> dict[str, str]:
    """A model of each target, as text, from attempts in their order. Targets that do not vary have none.

    What the rules predict of an attempt is what they knew from those before it. Raises TreesError.
    """
    library = lightgbm()
    encoder, rules = Encoder(categories), Rules()
    rows = []
    for attempt in attempts:
        rows.append(encoder.row(attempt.question, rules.predict(attempt.question)))
        rules.observe(attempt)
    matrix = np.array(rows, dtype=np.float64).reshape(len(attempts), len(FEATURES))
    models = {}
    for number, (target, objective) in enumerate(TARGETS.items()):
        labels = np.array([_label(target, attempt) for attempt in attempts], dtype=np.float64)
        there = ~np.isnan(labels)
        if there.sum() < 2 * _PARAMETERS["min_data_in_leaf"] or np.ptp(labels[there]) == 0.0:
            continue
        models[target] = _fit(library, matrix[there], labels[there], objective, target, number, progress)
    return models


def _label(target: str, attempt: Attempt) -> float:
    if target == "success":
        return float(attempt.ok)
    if not attempt.ok:
        return math.nan
    if target == "completion_tokens":
        return math.nan if attempt.completion_tokens is None else math.log1p(attempt.completion_tokens)
    return math.log(max(attempt.seconds, 1e-3))


def _fit(
    library: Any, matrix: Matrix, labels: Matrix, objective: Mapping[str, Any], target: str, number: int,
    progress: Progress,
) -> str:  # fmt: skip
    def told(environment: Any) -> None:
        progress(f"training {target}", number * ROUNDS + environment.iteration + 1, len(TARGETS) * ROUNDS)

    held = max(1, int(len(labels) * LATEST))
    parameters = {**_PARAMETERS, **objective}
    which = {"feature_name": list(FEATURES), "categorical_feature": list(CATEGORIES)}
    earlier = library.Dataset(matrix[:-held], labels[:-held], params=parameters, **which)
    later = library.Dataset(matrix[-held:], labels[-held:], reference=earlier, params=parameters)
    found = library.train(
        parameters, earlier, ROUNDS, valid_sets=[later],
        callbacks=[library.early_stopping(PATIENCE, verbose=False), told],
    )  # fmt: skip
    text: str = found.model_to_string(num_iteration=found.best_iteration)
    return text


class Trees:
    """Trained models, ready to predict."""

    def __init__(self, models: Mapping[str, str], categories: Vocabulary) -> None:
        """Raises TreesError: the library is missing, or cannot read a model."""
        library = lightgbm()
        self._encoder = Encoder(categories)
        self._boosters: dict[str, Booster] = {}
        for target, text in models.items():
            if target not in TARGETS:
                raise TreesError(f"unknown target {target!r}")
            try:
                booster = library.Booster(model_str=text)
            except Exception as error:
                raise TreesError(f"the model of {target} cannot be read: {type(error).__name__}") from None
            if booster.feature_name() != list(FEATURES):
                raise TreesError(f"the model of {target} has other features than this program")
            self._boosters[target] = booster

    def predict(self, question: Question, rules: Prediction) -> Prediction:
        """About 60 microseconds for each target."""
        return self.predict_all([question], [rules])[0]

    def predict_all(self, questions: Sequence[Question], rules: Sequence[Prediction]) -> list[Prediction]:
        """For each question, where the rules have said this. A target without a model is left to them."""
        if not questions:
            return []
        rows = [self._encoder.row(question, told) for question, told in zip(questions, rules, strict=True)]
        matrix = np.array(rows, dtype=np.float64)
        # One thread: the team of another one would be built up and torn down for every row, for 20 times as long.
        found = {
            target: np.asarray(booster.predict(matrix, num_threads=1), dtype=np.float64)
            for target, booster in self._boosters.items()
        }
        return [
            self._one(question, told, found, i) for i, (question, told) in enumerate(zip(questions, rules, strict=True))
        ]

    def _one(self, question: Question, rules: Prediction, found: Mapping[str, Matrix], i: int) -> Prediction:
        def value(target: str, otherwise: float, of: Callable[[float], float]) -> float:
            return of(float(found[target][i])) if target in found else otherwise

        p50 = value("seconds_p50", rules.seconds_p50, math.exp)
        tokens = max(0.0, value("completion_tokens", rules.completion_tokens, math.expm1))
        return Prediction(
            p50,
            max(p50, value("seconds_p90", rules.seconds_p90, math.exp)),
            min(1.0, max(0.0, value("success", rules.success, float))),
            tokens if question.max_tokens is None else min(tokens, float(question.max_tokens)),
        )
