"""Which predictor's word holds now: that of the trained one, as long as it is no worse than the rules.

Everybody predicts every attempt: the rules, the version in force, and the candidate in its shadow. When the attempt has
ended, each is told how wrong it was. Rolling losses are exponentially weighted means over about WINDOW attempts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum

from control_plane.predictors.artefact import RULES
from control_plane.predictors.attempt import Attempt, Prediction, Question
from control_plane.predictors.rules import Rules
from control_plane.predictors.scores import TARGETS, Losses, losses, worse_in
from control_plane.predictors.trees import Trees

WINDOW = 200.0
"""Attempts."""
ENOUGH = 50
"""Attempts before rolling losses mean something."""
TOLERANCE = 0.10
"""The trained one is left for the rules when it is worse than they by so much, and taken back when it is not worse by
half of that."""


class Role(Enum):
    RULES = "rules"
    PROMOTED = "promoted"
    SHADOW = "shadow"


@dataclass(slots=True)
class Rolling:
    """Losses of one predictor; None: not measured yet."""

    attempts: int = 0
    means: dict[str, float] = field(default_factory=dict)
    _counts: dict[str, int] = field(default_factory=dict)

    def add(self, found: Losses) -> None:
        """One more attempt."""
        self.attempts += 1
        for target in TARGETS:
            loss = getattr(found, target)
            if loss is None:
                continue
            count = self._counts[target] = self._counts.get(target, 0) + 1
            before = self.means.get(target, 0.0)
            self.means[target] = before + (loss - before) / min(float(count), WINDOW)

    @property
    def losses(self) -> Losses:
        """As they are now."""
        return Losses(*(self.means.get(target) for target in TARGETS))


@dataclass(frozen=True, slots=True)
class Foretold:
    """What was predicted of one attempt when it began."""

    question: Question
    predictions: Mapping[Role, Prediction]
    versions: Mapping[Role, str]
    """Of those who predicted."""
    role: Role
    """Whose word held."""

    @property
    def prediction(self) -> Prediction:
        """The one that held."""
        return self.predictions[self.role]

    @property
    def version(self) -> str:
        """Whose it is: of a trained predictor, or "rules"."""
        return self.versions[self.role]


class Live:
    """Predicts, learns, compares. One event loop, no I/O."""

    def __init__(self, attempts: Iterable[Attempt] = ()) -> None:
        self.rules = Rules(attempts)
        self.trained: dict[Role, tuple[str, Trees]] = {}
        """Version and models of the promoted one and of the shadow."""
        self.rolling: dict[Role, Rolling] = {Role.RULES: Rolling()}
        self._beside: dict[Role, Rolling] = {}
        """Of the rules, over the same attempts as the trained one."""
        self.worse: tuple[str, ...] = ()
        """Targets in which the promoted one is worse than the rules, so that theirs is the word that holds."""

    @property
    def role(self) -> Role:
        """Whose word holds."""
        return Role.PROMOTED if Role.PROMOTED in self.trained and not self.worse else Role.RULES

    @property
    def version(self) -> str:
        """In force now."""
        return self.version_of(self.role)

    def version_of(self, role: Role) -> str:
        """Of one that predicts; "rules"."""
        return self.trained[role][0] if role in self.trained else RULES

    def put(self, role: Role, version: str, trees: Trees | None) -> None:
        """Let a version take a place, or nobody. What was learned of the version before is forgotten."""
        self.trained.pop(role, None)
        for kept in (self.rolling, self._beside):
            kept.pop(role, None)
        if role is Role.PROMOTED:
            self.worse = ()
        if trees is not None:
            self.trained[role] = version, trees
            self.rolling[role], self._beside[role] = Rolling(), Rolling()

    def predict(self, question: Question) -> Foretold:
        """What is to be expected of an attempt that begins."""
        told = self.rules.predict(question)
        found = {Role.RULES: told}
        for role, (_, trees) in self.trained.items():
            found[role] = trees.predict(question, told)
        return Foretold(question, found, {role: self.version_of(role) for role in found}, self.role)

    def observe(self, foretold: Foretold, attempt: Attempt) -> dict[Role, Losses]:
        """Learn from its end; how wrong each was. One that has taken its place since is not held to it."""
        wrong = {
            role: losses(prediction, attempt)
            for role, prediction in foretold.predictions.items()
            if foretold.versions[role] == self.version_of(role)
        }
        for role, found in wrong.items():
            self.rolling[role].add(found)
            if role in self._beside:
                self._beside[role].add(wrong[Role.RULES])
        self.rules.observe(attempt)
        self._judge()
        return wrong

    def _judge(self) -> None:
        mine, theirs = self.rolling.get(Role.PROMOTED), self._beside.get(Role.PROMOTED)
        if mine is None or theirs is None or mine.attempts < ENOUGH:
            return
        tolerance = TOLERANCE / 2 if self.worse else TOLERANCE
        self.worse = worse_in(mine.losses, theirs.losses, tolerance)
