"""Trees, what is kept of them, what promotes them, and who holds when they are wrong."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from control_plane.predictors import live as module
from control_plane.predictors.artefact import RULES, Artefact, ArtefactError, decode, digest, encode, evaluate, train
from control_plane.predictors.attempt import Attempt, Prediction
from control_plane.predictors.live import Live, Role
from control_plane.predictors.scores import Evaluation, Losses, losses, objections, score, worse_in
from control_plane.predictors.shelf import Objected, Shelf
from control_plane.predictors.trees import Trees, TreesError
from tests.harness.attempts import BEGIN, attempt, history, question

numbers = st.floats(0.01, 1e5)
predictions = st.builds(
    lambda p50, more, success, tokens: Prediction(p50, p50 + more, success, tokens),
    numbers, numbers, st.floats(0, 1), st.floats(0, 1e5),
)  # fmt: skip


@cache
def good() -> Artefact:
    return named(train(history(1000), BEGIN), "v1")


@cache
def bad() -> Artefact:
    """What it was taught is the wrong way round."""
    return named(train(history(1000, seconds=lambda asked: 1000 / asked.prompt_tokens), BEGIN), "v2")


def named(artefact: Artefact, version: str) -> Artefact:
    return msgspec.structs.replace(artefact, version=version)


# -------------------------------------------------------------------- scores ---


@given(predictions, st.floats(0.01, 1e5), st.booleans(), st.integers(0, 10**5))
def test_the_truth_is_never_worse(told: Prediction, seconds: float, ok: bool, tokens: int) -> None:
    happened = attempt(seconds, ok, tokens)
    perfect = Prediction(seconds, seconds, float(ok), float(tokens))
    assert worse_in(losses(perfect, happened), losses(told, happened), 0.0) == ()
    assert (losses(told, happened).seconds is None) is not ok


@given(st.lists(predictions, min_size=1, max_size=30))
def test_nobody_is_worse_than_himself(told: list[Prediction]) -> None:
    found = score(told, [attempt(at=BEGIN + i) for i in range(len(told))])
    assert worse_in(found.losses, found.losses, 0.0) == () and found.attempts == len(told)


def test_worse_by_more_than_the_tolerance_is_an_objection() -> None:
    plain, worse = Losses(1.0, 0.1, None), Losses(1.06, 0.1, 5.0)
    assert worse_in(worse, plain) == ("seconds",) and worse_in(Losses(1.04, 0.1, None), plain) == ()
    few = score([Prediction(1, 2, 1, 1)], [attempt()])
    told = objections(Evaluation("v1", 0, 0, 0, few, few, ()), "v1")
    assert told == ("it was evaluated on 1 attempts, 100 are needed",)
    assert objections(None, RULES) == ("it was not evaluated beside rules",)


# ----------------------------------------------------------------- artefacts ---


def test_trees_learn_what_the_rules_do_not_know() -> None:
    made = good()
    assert made.data.attempts == 800 and made.holdout.trained.attempts == 200
    trained, rules = made.holdout.trained, made.holdout.rules
    assert trained.losses.seconds is not None and rules.losses.seconds is not None
    assert trained.losses.seconds < rules.losses.seconds / 4, "times depend on the prompt"
    assert worse_in(trained.losses, rules.losses) == ()
    assert trained.covered is not None and 0.8 <= trained.covered <= 0.97
    trees, told = made.trees(), Prediction(2.0, 8.0, 0.9, 50.0)
    short, long = (trees.predict(question(prompt_tokens=size), told) for size in (100, 8000))
    assert long.seconds_p50 > 10 * short.seconds_p50 and long.completion_tokens <= 64 == question().max_tokens
    assert trees.predict_all([question(prompt_tokens=100)], [told]) == [short]
    unknown = trees.predict(question(server_id="new", model="new", provider="new"), told)
    assert 0 < unknown.seconds_p50 <= unknown.seconds_p90


def test_the_same_attempts_make_the_same_models() -> None:
    assert named(train(history(1000), BEGIN), "v1") == good()


def test_too_little_to_learn_from() -> None:
    with pytest.raises(ArtefactError, match="there are 199 attempts to learn from, 200 are needed"):
        train(history(199), BEGIN)


def test_a_file_is_taken_for_what_its_checksum_says() -> None:
    data = encode(good())
    assert decode(data, digest(data)) == good()
    with pytest.raises(ArtefactError, match="checksum"):
        decode(data[:-1] + b" ", digest(data))
    for broken, why in (
        (b"\xff\xfe", "cannot be read"),
        (b"{}", "cannot be read"),
        (data.replace(b"modelyard-predictor/1", b"modelyard-predictor/9"), "format"),
        (data.replace(b'"prompt_tokens"', b'"prompt_tokenz"'), "other features"),
    ):
        with pytest.raises(ArtefactError, match=why):
            decode(broken, digest(broken))
    with pytest.raises(TreesError, match="the model of success cannot be read"):
        Trees({"success": "tree\nnonsense"}, good().categories)
    with pytest.raises(TreesError, match="unknown target"):
        Trees({"happiness": good().models["success"]}, good().categories)


def test_without_the_library_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    made = good()
    monkeypatch.setitem(sys.modules, "lightgbm", None)
    for work in (lambda: train(history(300), BEGIN), made.trees):
        with pytest.raises(TreesError, match=r"pip install 'modelyard\[predictors\]'"):
            work()


def test_the_library_is_imported_only_where_it_is_wanted() -> None:
    code = "import sys, control_plane.app, control_plane.predictor; print({'lightgbm', 'scipy'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_a_candidate_is_compared_on_what_is_new_to_both() -> None:
    later = history(400, seed=9, begin=BEGIN + 1000 * 60)
    everything = [*history(1000), *later]
    beside_rules = evaluate(good(), None, everything, BEGIN)
    assert beside_rules.since > good().data.until and beside_rules.candidate.attempts == 600
    assert (beside_rules.against, beside_rules.worse) == (RULES, ())
    worse = evaluate(bad(), good(), everything, BEGIN)
    assert worse.against == "v1" and "seconds" in worse.worse and worse.enough
    assert evaluate(good(), bad(), everything, BEGIN).worse == ()
    with pytest.raises(ArtefactError, match="no attempt is later"):
        evaluate(good(), None, history(800), BEGIN)


# --------------------------------------------------------------------- shelf ---


def shelf_with(folder: Path, *made: Artefact) -> Shelf:
    shelf = Shelf(folder / "predictors")
    for one in made:
        shelf.add(one)
    return shelf


def evaluated(shelf: Shelf, version: str, worse: Sequence[str] = ()) -> None:
    registry = shelf.registry()
    some = good().holdout.trained
    shelf.evaluated(version, Evaluation(registry.promoted, 1, 2, 3, some, some, tuple(worse)))


def test_only_what_was_evaluated_and_is_not_worse_is_promoted(tmp_path: Path) -> None:
    shelf = shelf_with(tmp_path, good(), good())
    assert shelf.registry().candidate == "v2"
    with pytest.raises(Objected, match="v1 is not put in force: it was not evaluated beside rules"):
        shelf.promote("v1", 1.0, force=False)
    evaluated(shelf, "v1")
    assert shelf.promote("v1", 1.0, force=False) == ()
    with pytest.raises(ArtefactError, match="in force already"):
        shelf.promote("v1", 1.0, force=True)
    with pytest.raises(Objected, match="not evaluated beside v1"):
        shelf.promote("v2", 2.0, force=False)
    evaluated(shelf, "v2", ["seconds"])
    with pytest.raises(Objected, match="its loss in seconds"):
        shelf.promote("v2", 2.0, force=False)
    (overridden,) = shelf.promote("v2", 2.0, force=True)
    registry = shelf.registry()
    assert registry.history[-1].overridden == [overridden] and registry.candidate is None
    assert shelf.rollback(3.0) == ("v2", "v1")
    assert shelf.registry().candidate is None, "what was rolled back is no candidate"
    with pytest.raises(Objected, match="rolled back before"):
        shelf.promote("v2", 4.0, force=False)
    assert shelf.rollback(5.0) == ("v1", RULES)
    with pytest.raises(ArtefactError, match="nothing to roll back"):
        shelf.rollback(6.0)
    assert [(step.verb, step.version, step.before) for step in registry.history] == [
        ("promote", "v1", RULES), ("promote", "v2", "v1")
    ]  # fmt: skip


def test_what_is_not_whole_is_not_put_in_force(tmp_path: Path) -> None:
    shelf = shelf_with(tmp_path, good())
    evaluated(shelf, "v1")
    path = shelf.folder / "v1.json"
    path.write_bytes(path.read_bytes()[:-10])
    for force in (False, True):
        with pytest.raises(ArtefactError, match="checksum"):
            shelf.promote("v1", 1.0, force=force)
    path.unlink()
    with pytest.raises(ArtefactError, match=r"v1\.json: No such file"):
        shelf.promote("v1", 1.0, force=True)
    with pytest.raises(ArtefactError, match="no version 'v7'; there are: v1"):
        shelf.promote("v7", 1.0, force=True)
    assert shelf.registry().promoted == RULES
    registry = json.loads((shelf.folder / "registry.json").read_bytes())
    registry["entries"][0]["file"] = "../elsewhere.json"
    (shelf.folder / "registry.json").write_text(json.dumps(registry))
    with pytest.raises(ArtefactError, match="not in the folder"):
        shelf.promote("v1", 1.0, force=True)
    (shelf.folder / "registry.json").write_text("{")
    with pytest.raises(ArtefactError, match="cannot be read"):
        shelf.registry()


def test_what_fails_on_its_way_leaves_nothing(tmp_path: Path) -> None:
    shelf = shelf_with(tmp_path, good())
    with pytest.raises(ArtefactError), shelf._changed() as registry:
        registry.promoted = "v1"
        raise ArtefactError("no")
    assert shelf.registry().promoted == RULES
    (shelf.folder / "v2.json").mkdir()  # where the next one would be
    with pytest.raises(OSError, match="directory"):
        shelf.add(good())
    assert [entry.version for entry in shelf.registry().entries] == ["v1"]
    assert {path.name for path in shelf.folder.iterdir()} == {"lock", "registry.json", "v1.json", "v2.json"}


def test_several_writers_do_not_lose_each_others_versions(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path / "predictors")
    threads = [threading.Thread(target=shelf.add, args=(good(),)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [entry.version for entry in shelf.registry().entries] == [f"v{i}" for i in range(1, 9)]


# ---------------------------------------------------------------------- live ---


def played(live: Live, attempts: Sequence[Attempt]) -> None:
    for one in attempts:
        live.observe(live.predict(one.question), one)


def test_the_rules_hold_where_the_trained_one_is_worse_and_yield_when_it_is_not() -> None:
    live = Live(history(200))
    live.put(Role.PROMOTED, "v2", bad().trees())
    assert live.version == "v2", "it is believed in until it is known to be wrong"
    played(live, history(module.ENOUGH - 1, seed=3))
    assert live.version == "v2"
    played(live, history(200, seed=4))
    assert "seconds" in live.worse and live.version == RULES
    asked = live.predict(question(prompt_tokens=8000))
    assert asked.version == RULES and set(asked.predictions) == {Role.RULES, Role.PROMOTED}, "it goes on in the shadow"
    played(live, history(3000, seed=5, seconds=lambda asked: 1000 / asked.prompt_tokens))
    assert live.worse == () and live.version == "v2", "now it is right"
    live.put(Role.PROMOTED, "v1", None)
    assert live.version == RULES and Role.PROMOTED not in live.rolling


def test_the_shadow_is_measured_and_has_no_say() -> None:
    live = Live(history(200))
    live.put(Role.SHADOW, "v1", good().trees())
    foretold = live.predict(question())
    assert foretold.version == RULES == live.version and foretold.versions[Role.SHADOW] == "v1"
    played(live, history(300, seed=6))
    mine, rules = (live.rolling[role].losses.seconds for role in (Role.SHADOW, Role.RULES))
    assert mine is not None and rules is not None and mine < rules / 3


def test_an_end_is_not_held_against_who_came_later() -> None:
    live = Live()
    live.put(Role.PROMOTED, "v2", bad().trees())
    foretold = live.predict(question())
    live.put(Role.PROMOTED, "v1", good().trees())
    assert set(live.observe(foretold, attempt())) == {Role.RULES}
    assert live.rolling[Role.PROMOTED].attempts == 0


def test_an_unknown_hour_is_no_reason_to_fail() -> None:
    told = good().trees().predict(replace(question(), hour=23, max_tokens=None), Prediction(1.0, 2.0, 0.5, 10.0))
    assert told.seconds_p50 > 0
