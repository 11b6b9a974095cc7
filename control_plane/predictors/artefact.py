"""A trained predictor as a file: JSON with the models as text, and what must be known of it. None of it is code."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from control_plane.predictors import trees
from control_plane.predictors.attempt import Attempt, Prediction
from control_plane.predictors.rules import Rules
from control_plane.predictors.scores import Evaluation, Score, score, worse_in
from control_plane.predictors.trees import FEATURES, Progress, Trees

FORMAT = "modelyard-predictor/1"
LEAST = 200
"""Attempts that a training needs."""
HELD_OUT = 0.2
"""Share of the attempts, the latest ones, that a training does not see: on those it is measured."""
RULES = "rules"
"""Stands for them where a version is named."""


class ArtefactError(ValueError):
    """It cannot be used; the message says why."""


class NothingYet(ArtefactError):
    """There is no version yet, or nothing to compare it on or with."""


@dataclass(frozen=True, slots=True)
class Data:
    """What it was trained on."""

    since: float
    """When the first attempt began, seconds since 1970."""
    until: float
    """The last one. What began later is new to the predictor."""
    attempts: int


@dataclass(frozen=True, slots=True)
class Holdout:
    """How it did on the attempts right after those that it was trained on, and how the rules did."""

    until: float
    trained: Score
    rules: Score


class Artefact(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A trained predictor."""

    format: str
    version: str
    """Its name in a folder; empty before it is in one."""
    created: float
    """Seconds since 1970."""
    library: str
    """Name and version of what made the models, and reads them."""
    data: Data
    holdout: Holdout
    features: list[str]
    categories: dict[str, list[str]]
    """The values of each that were known."""
    models: dict[str, str]
    """LightGBM's text, by target."""

    def trees(self) -> Trees:
        """Ready to predict. Raises TreesError."""
        return Trees(self.models, self.categories)


def digest(data: bytes) -> str:
    """SHA-256 in hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def encode(artefact: Artefact) -> bytes:
    """The bytes of the file."""
    return msgspec.json.encode(artefact)


def decode(data: bytes, sha256: str) -> Artefact:
    """What `encode` has made. Raises ArtefactError unless the bytes are those of this checksum, and make sense."""
    if digest(data) != sha256:
        raise ArtefactError("its checksum is not the one in the registry")
    try:
        artefact = msgspec.json.decode(data, type=Artefact)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ArtefactError(f"it cannot be read: {error}") from None
    if artefact.format != FORMAT:
        raise ArtefactError(f"its format is {artefact.format[:40]!r}, this program knows {FORMAT!r}")
    if artefact.features != list(FEATURES) or set(artefact.categories) != set(trees.CATEGORIES):
        raise ArtefactError("it was trained with other features than this program has: train it again")
    return artefact


def train(attempts: Sequence[Attempt], now: float, progress: Progress = lambda what, done, of: None) -> Artefact:
    """A predictor trained on the earlier part of these attempts and measured on the later one. It has no name yet.

    Raises ArtefactError where there are too few, and TreesError.
    """
    ordered = sorted(attempts, key=lambda attempt: attempt.at)
    if len(ordered) < LEAST:
        raise ArtefactError(f"there are {len(ordered)} attempts to learn from, {LEAST} are needed")
    cut = int(len(ordered) * (1.0 - HELD_OUT))
    earlier, later = ordered[:cut], ordered[cut:]
    categories = trees.vocabulary(earlier)
    library = trees.lightgbm()
    models = trees.train(earlier, categories, progress)
    if not models:
        raise ArtefactError("nothing varies in these attempts: there is nothing to learn beyond the rules")
    made = Trees(models, categories)
    told = foretold(ordered)[cut:]
    predicted = made.predict_all([attempt.question for attempt in later], told)
    return Artefact(
        FORMAT, "", now, f"lightgbm {library.__version__}",
        Data(earlier[0].at, earlier[-1].at, len(earlier)),
        Holdout(later[-1].at, score(predicted, later), score(told, later)),
        list(FEATURES), categories, models,
    )  # fmt: skip


def foretold(attempts: Sequence[Attempt]) -> list[Prediction]:
    """What the rules predict of each attempt, having learned from those before it."""
    rules, found = Rules(), []
    for attempt in attempts:
        found.append(rules.predict(attempt.question))
        rules.observe(attempt)
    return found


def evaluate(candidate: Artefact, other: Artefact | None, attempts: Sequence[Attempt], now: float) -> Evaluation:
    """The candidate beside another, or beside the rules, on the attempts that are new to both.

    Raises NothingYet where there are none, ArtefactError and TreesError.
    """
    ordered = sorted(attempts, key=lambda attempt: attempt.at)
    seen = max(one.data.until for one in (candidate, other) if one is not None)
    told = foretold(ordered)
    fresh = [i for i, attempt in enumerate(ordered) if attempt.at > seen]
    if not fresh:
        raise NothingYet("no attempt is later than what it was trained on")
    later, rules = [ordered[i] for i in fresh], [told[i] for i in fresh]
    questions = [attempt.question for attempt in later]
    mine = score(candidate.trees().predict_all(questions, rules), later)
    theirs = score(rules if other is None else other.trees().predict_all(questions, rules), later)
    against = RULES if other is None else other.version
    return Evaluation(
        against, now, later[0].at, later[-1].at, mine, theirs, worse_in(mine.losses, theirs.losses)
    )  # fmt: skip
