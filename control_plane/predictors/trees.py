"""Gradient-boosted trees for what the rules do not see: how times depend on lengths, servers, hours.

LightGBM, for four targets: quantiles 0.5 and 0.9 of ln(seconds), ln(odds) of success, the median of ln(1 + tokens). The
boosting begins at what the rules predict and corrects that: the rules follow a host that has become slow, so that the
trees need not know of it, and of what they have never seen they say about what the rules say.

The library is imported when it is needed (extra `predictors`), and its models are text: nothing in an artefact is
executed but by its reader.
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
NUMBERS = ("prompt_tokens", "max_tokens", "hour")
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
    "num_leaves": 7,
    "learning_rate": 0.05,
    "min_data_in_leaf": 30,
    "lambda_l2": 5.0,
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
KNOWN = 10_000
"""Questions whose corrections are remembered."""
_SURE = 1e-3
"""Probabilities are kept so far from 0 and 1."""
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

    def row(self, question: Question) -> list[float]:
        """One row, in the order of FEATURES."""
        return [
            *(codes.get(_value(question, name), math.nan) for name, codes in zip(CATEGORIES, self._codes, strict=True)),
            math.log1p(question.prompt_tokens),
            math.nan if question.max_tokens is None else math.log1p(question.max_tokens),
            float(question.hour),
        ]


def train(
    attempts: Sequence[Attempt], categories: Vocabulary, progress: Progress = lambda what, done, of: None
) -> dict[str, str]:
    """A model of each target, as text, from attempts in their order. Targets that do not vary have none.

    What the rules predict of an attempt is what they knew from those before it. Raises TreesError.
    """
    library = lightgbm()
    encoder, rules, told = Encoder(categories), Rules(), []
    for attempt in attempts:
        told.append(rules.predict(attempt.question))
        rules.observe(attempt)
    matrix = np.array([encoder.row(attempt.question) for attempt in attempts], dtype=np.float64)
    models = {}
    for number, (target, objective) in enumerate(TARGETS.items()):
        labels = np.array([_label(target, attempt) for attempt in attempts], dtype=np.float64)
        there = ~np.isnan(labels)
        if there.sum() < 2 * _PARAMETERS["min_data_in_leaf"] or np.ptp(labels[there]) == 0.0:
            continue
        begin = np.array([_begin(target, one) for one in told], dtype=np.float64)
        data = (matrix[there], labels[there], begin[there])
        models[target] = _fit(library, *data, objective, target, number, progress)
    return models


def _begin(target: str, rules: Prediction) -> float:
    """Where the boosting begins."""
    if target == "success":
        sure = min(1.0 - _SURE, max(_SURE, rules.success))
        return math.log(sure / (1.0 - sure))
    if target == "completion_tokens":
        return math.log1p(rules.completion_tokens)
    return math.log(rules.seconds_p50 if target == "seconds_p50" else rules.seconds_p90)


def _label(target: str, attempt: Attempt) -> float:
    if target == "success":
        return float(attempt.ok)
    if not attempt.ok:
        return math.nan
    if target == "completion_tokens":
        return math.nan if attempt.completion_tokens is None else math.log1p(attempt.completion_tokens)
    return math.log(max(attempt.seconds, 1e-3))


def _fit(
    library: Any, matrix: Matrix, labels: Matrix, begin: Matrix, objective: Mapping[str, Any], target: str,
    number: int, progress: Progress,
) -> str:  # fmt: skip
    def told(environment: Any) -> None:
        progress(f"training {target}", number * ROUNDS + environment.iteration + 1, len(TARGETS) * ROUNDS)

    held = max(1, int(len(labels) * LATEST))
    parameters = {**_PARAMETERS, **objective}
    which = {"feature_name": list(FEATURES), "categorical_feature": list(CATEGORIES)}
    earlier = library.Dataset(matrix[:-held], labels[:-held], init_score=begin[:-held], params=parameters, **which)
    later = library.Dataset(
        matrix[-held:], labels[-held:], init_score=begin[-held:], reference=earlier, params=parameters
    )
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
        self._known: dict[Question, dict[str, float]] = {}
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
        """What is to be expected where the rules say this. Tens of microseconds for each target, less for a question
        that was asked before."""
        corrections = self._known.get(question)
        if corrections is None:
            if len(self._known) >= KNOWN:
                self._known.clear()
            (corrections,) = self._corrections([question])
            self._known[question] = corrections
        return _corrected(question, rules, corrections)

    def predict_all(self, questions: Sequence[Question], rules: Sequence[Prediction]) -> list[Prediction]:
        """The same for many at once."""
        if not questions:
            return []
        found = zip(questions, rules, self._corrections(questions), strict=True)
        return [_corrected(*each) for each in found]

    def _corrections(self, questions: Sequence[Question]) -> list[dict[str, float]]:
        """What the trees add to the rules, by target; a target without a model is left to the rules."""
        matrix = np.array([self._encoder.row(question) for question in questions], dtype=np.float64)
        # One thread: the team of another one would be built up and torn down for every row, for 20 times as long.
        found = {
            target: np.asarray(booster.predict(matrix, raw_score=True, num_threads=1), dtype=np.float64)
            for target, booster in self._boosters.items()
        }
        return [{target: float(values[i]) for target, values in found.items()} for i in range(len(questions))]


def _corrected(question: Question, rules: Prediction, corrections: Mapping[str, float]) -> Prediction:
    def value(target: str) -> float:
        return _begin(target, rules) + corrections.get(target, 0.0)

    p50, p90 = math.exp(value("seconds_p50")), math.exp(value("seconds_p90"))
    success = 1.0 / (1.0 + math.exp(-value("success")))
    most = math.inf if question.max_tokens is None else float(question.max_tokens)
    tokens = min(max(0.0, math.expm1(value("completion_tokens"))), most)
    return Prediction(p50, max(p50, p90), success, tokens)
