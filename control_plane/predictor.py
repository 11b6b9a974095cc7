"""python -m control_plane.predictor VERB, which is what `modelyard predictor` runs: trained predictors, the forecast.

It runs beside the control plane: it reads the task store, and changes the folder of predictors that control planes
watch.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from control_plane.arguments import Parser
from control_plane.predictors import artefact as artefacts
from control_plane.predictors.artefact import RULES, Artefact, ArtefactError, NothingYet
from control_plane.predictors.attempt import Attempt, from_lines, to_lines
from control_plane.predictors.forecast import Forecast
from control_plane.predictors.scores import TARGETS, Evaluation, Score
from control_plane.predictors.shelf import Entry, Objected, Registry, Shelf
from control_plane.predictors.trees import TreesError
from control_plane.progress import bar
from control_plane.tasks.location import Location, StoreError, located, predictors_folder

PROGRAM = "modelyard predictor"
REFUSED, USAGE, NOTHING, INTERRUPTED = 1, 2, 5, 130
DEFAULT_SINCE = "30d"
MOST_ATTEMPTS = 200_000
_AGO = re.compile(r"(\d+(?:\.\d+)?)([hdw])")
_SECONDS = {"h": 3600.0, "d": 86400.0, "w": 7 * 86400.0}

Facts = dict[str, Any]
Outcome = tuple[Facts, str, int]
"""For --json, for people, exit status."""


def main(argv: Sequence[str]) -> int:
    arguments = _arguments(argv)
    try:
        facts, told, status = VERBS[arguments.verb][1](arguments)
    except Objected as error:
        cure = "evaluating it anew may help (`modelyard predictor evaluate`), --force overrides all of it"
        return _refused(arguments, "OBJECTED", f"{error}; {cure}", REFUSED)
    except NothingYet as error:
        return _refused(arguments, "NOTHING_YET", str(error), NOTHING)
    except (ArtefactError, TreesError) as error:
        return _refused(arguments, "PREDICTOR", str(error), REFUSED)
    except (StoreError, ValueError, OSError) as error:
        return _refused(arguments, "USAGE", str(error), USAGE)
    except KeyboardInterrupt:
        return _refused(arguments, "INTERRUPTED", "stopped; what was not finished is not there", INTERRUPTED)
    print(json.dumps(facts, indent=2) if arguments.json else told)
    return status


def _refused(arguments: argparse.Namespace, reason: str, message: str, status: int) -> int:
    if arguments.json:
        print(json.dumps({"error": {"reason": reason, "message": message}}))
    print(f"{PROGRAM}: {message}", file=sys.stderr)
    return status


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog=PROGRAM, description="Trained predictors of what tasks take, and the forecast.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="|".join(VERBS))
    for verb, (text, _) in VERBS.items():
        sub = verbs.add_parser(verb, help=text, description=text[0].upper() + text[1:] + ".")
        if verb in ("evaluate", "show"):
            sub.add_argument("version", nargs="?", metavar="VERSION", help="default: the newest")
        if verb == "promote":
            sub.add_argument("version", metavar="VERSION")
            sub.add_argument("--force", action="store_true", help="override objections; they are told and kept")
        if verb in ("train", "evaluate", "export"):
            sub.add_argument(
                "--since", type=_ago, default=DEFAULT_SINCE, metavar="AGO", help="36h, 7d, 2w (%(default)s)"
            )
            sub.add_argument(
                "--limit", type=int, default=MOST_ATTEMPTS, metavar="N", help="most attempts, the latest (%(default)s)"
            )
        if verb in ("train", "evaluate"):
            sub.add_argument(
                "--from", dest="source", type=Path, metavar="FILE.jsonl", help="attempts that were exported"
            )
        if verb == "export":
            sub.add_argument("file", type=Path, metavar="FILE.jsonl")
        if verb == "forecast":
            sub.add_argument("--minutes", type=float, default=60.0, metavar="N", help="to look ahead (%(default)s)")
        if verb not in ("export", "forecast"):
            sub.add_argument("--dir", type=Path, metavar="DIR", help="default: the setting predictors.dir")
        sub.add_argument("--store", metavar="URL", help="the task store (default: the setting tasks.store)")
        sub.add_argument("--config", metavar="FILE", help="configuration file (default: ./modelyard.yaml if it exists)")
        sub.add_argument("--json", action="store_true", help="print facts as JSON")
    return parser.parse_args(argv)


def _ago(text: str) -> float:
    """Seconds since 1970."""
    found = _AGO.fullmatch(text)
    if not found:
        raise argparse.ArgumentTypeError(f'{text!r} is no time like "7d"')
    return time.time() - float(found[1]) * _SECONDS[found[2]]


# ------------------------------------------------------------------- verbs ---


def _train(arguments: argparse.Namespace) -> Outcome:
    shelf = _shelf(arguments)
    with bar() as told:
        progress = told or _silent
        attempts = _attempts(arguments, progress)
        made = shelf.add(artefacts.train(attempts, time.time(), progress))
    evaluation = None
    try:
        evaluation = _evaluated(shelf, made, attempts)
    except ArtefactError:
        pass  # what is in force has seen all of it: it takes later attempts
    facts = {**_facts(made), "dir": str(shelf.folder), "evaluation": _told(evaluation)}
    learned, measured = made.data.attempts, made.holdout.trained.attempts
    text = [
        f"{made.version}: trained on {learned} attempts, measured on the {measured} after them",
        *_table({made.version: made.holdout.trained, RULES: made.holdout.rules}),
    ]
    if evaluation and evaluation.against != RULES:
        text += ["", *_compared(made.version, evaluation)]
    return facts, "\n".join(text), 0


def _evaluate(arguments: argparse.Namespace) -> Outcome:
    shelf = _shelf(arguments)
    registry = shelf.registry()
    candidate = shelf.artefact(registry.entry(arguments.version or registry.newest))
    if registry.promoted == candidate.version:
        raise NothingYet(f"{candidate.version} is in force itself, there is nothing to compare it with")
    with bar() as told:
        evaluation = _evaluated(shelf, candidate, _attempts(arguments, told or _silent))
    facts = {"version": candidate.version, "evaluation": _told(evaluation)}
    return facts, "\n".join(_compared(candidate.version, evaluation)), REFUSED if evaluation.worse else 0


def _evaluated(shelf: Shelf, candidate: Artefact, attempts: Sequence[Attempt]) -> Evaluation:
    """Beside what is in force, taken down. Raises ArtefactError."""
    registry = shelf.registry()
    other = None if registry.promoted == RULES else shelf.artefact(registry.entry(registry.promoted))
    evaluation = artefacts.evaluate(candidate, other, attempts, time.time())
    shelf.evaluated(candidate.version, evaluation)
    return evaluation


def _list(arguments: argparse.Namespace) -> Outcome:
    shelf = _shelf(arguments)
    registry = shelf.registry()
    facts = {
        "dir": str(shelf.folder),
        "promoted": registry.promoted,
        "candidate": registry.candidate,
        "versions": [_entry(registry, entry) for entry in registry.entries],
    }
    rows = [
        f"{entry.version:8} {_when(entry.created)}  {entry.data.attempts:>8}  {_place(registry, entry)}"
        for entry in registry.entries
    ]
    head = f"{'version':8} {'created':20}  attempts"
    return facts, "\n".join([head, *rows, f"in force: {registry.promoted}"]), 0


def _show(arguments: argparse.Namespace) -> Outcome:
    shelf = _shelf(arguments)
    registry = shelf.registry()
    entry = registry.entry(arguments.version or registry.newest)
    found = shelf.artefact(entry)
    facts = {**_entry(registry, entry), **_facts(found), "history": [
        msgspec.to_builtins(step) for step in registry.history if entry.version in (step.version, step.before)
    ]}  # fmt: skip
    text = [
        f"{found.version}: {_place(registry, entry) or 'candidate'}, made {_when(found.created)} by {found.library}",
        f"trained on {found.data.attempts} attempts, {_when(found.data.since)} to {_when(found.data.until)}",
        f"sha256 {entry.sha256}",
        *_table({found.version: found.holdout.trained, RULES: found.holdout.rules}),
    ]
    for evaluation in entry.evaluations[-1:]:
        text += ["", *_compared(found.version, evaluation)]
    return facts, "\n".join(text), 0


def _promote(arguments: argparse.Namespace) -> Outcome:
    shelf = _shelf(arguments)
    before = shelf.registry().promoted
    overridden = shelf.promote(arguments.version, time.time(), force=arguments.force)
    facts = {"promoted": arguments.version, "before": before, "overridden": list(overridden)}
    text = [f"in force: {arguments.version}, before it {before}", *(f"overridden: {one}" for one in overridden)]
    return facts, "\n".join(text), 0


def _rollback(arguments: argparse.Namespace) -> Outcome:
    before, after = _shelf(arguments).rollback(time.time())
    return {"promoted": after, "before": before}, f"in force: {after}, before it {before}", 0


def _export(arguments: argparse.Namespace) -> Outcome:
    arguments.source = None
    with bar() as told:
        attempts = _attempts(arguments, told or _silent)
    part = arguments.file.with_name(f".{arguments.file.name}.part")
    try:
        with part.open("wb") as file:
            file.writelines(to_lines(attempts))
        part.replace(arguments.file)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    return {"file": str(arguments.file), "attempts": len(attempts)}, f"{len(attempts)} attempts in {arguments.file}", 0


def _forecast(arguments: argparse.Namespace) -> Outcome:
    from control_plane.tasks import forecasts
    from control_plane.tasks.history import reader

    if not 0 < arguments.minutes <= 7 * 24 * 60:
        raise ValueError("--minutes: more than 0, at most a week")
    forecast = Forecast(_settings(arguments, os.environ).forecast.half_life)
    with reader(_location(arguments)) as read:
        forecast.load(read(forecasts.kept))
    now, seconds = time.time(), arguments.minutes * 60.0
    rows = []
    for kind, model in forecast.known():
        expected = forecast.expect((kind, model), now, seconds)
        rows.append({
            "task_type": kind.name.lower(), "model": model, "per_minute": round(expected.per_minute, 6),
            "mean": round(expected.mean, 3), "p90": expected.p90,
        })  # fmt: skip
    text = [f"{'task type':16} {'model':24} {'per minute':>10} {'mean':>10} {'p90':>8}"] + [
        f"{row['task_type']:16} {row['model']:24} {row['per_minute']:>10.2f} {row['mean']:>10.1f} {row['p90']:>8.0f}"
        for row in rows
    ]
    return {"at": _when(now), "minutes": arguments.minutes, "forecast": rows}, "\n".join(text), 0


VERBS: Mapping[str, tuple[str, Callable[[argparse.Namespace], Outcome]]] = {
    "train": ("train a new version on the attempts of the task store", _train),
    "evaluate": (
        f"compare a version with what is in force on attempts new to both; exit status {REFUSED} if worse,"
        f" {NOTHING} if there is nothing to compare it on or with yet", _evaluate
    ),
    "list": ("show every version", _list),
    "show": ("show what is known of a version", _show),
    "promote": ("put a version in force that was evaluated and is not worse", _promote),
    "rollback": ("put in force again what was before", _rollback),
    "export": ("write attempts to a file, without anything that people wrote", _export),
    "forecast": ("show how many requests are expected, by kind of work and model", _forecast),
}  # fmt: skip


# ------------------------------------------------------------------ inputs ---


def _silent(what: str, done: int, of: int) -> None:
    pass


def _attempts(arguments: argparse.Namespace, progress: Callable[[str, int, int], None]) -> list[Attempt]:
    """The latest ones, in their order. Raises StoreError, ValueError, OSError."""
    found: list[Attempt] = []
    if arguments.source is not None:
        with arguments.source.open("rb") as file:
            for attempt in from_lines(file):
                if len(found) % 1000 == 0:
                    progress("reading", len(found), 0)
                found.append(attempt)
    else:
        for some in _pages(_location(arguments), arguments.since):
            found += some
            progress("reading", len(found), 0)
            if len(found) >= arguments.limit:
                break
    return sorted(found, key=lambda attempt: attempt.at)[-arguments.limit :]


def _pages(place: Location, since: float) -> Iterator[list[Attempt]]:
    from control_plane.api.task_convert import completion_tokens
    from control_plane.tasks import history

    before = ""
    with history.reader(place) as read:
        while True:
            some, before = read(partial(history.page, before=before, since=since, tokens_of=completion_tokens))
            yield some
            if not before:
                return


def _settings(arguments: argparse.Namespace, env: Mapping[str, str]) -> Any:
    """The control plane's. Raises StoreError."""
    from control_plane.config import SECTION, ControlPlaneSettings, with_aliases
    from modelyard.program.settings import SettingsError, load

    try:
        return load(
            ControlPlaneSettings,
            program=PROGRAM,
            section=SECTION,
            description="",
            argv=["--config", arguments.config] if arguments.config else [],
            env=with_aliases(env),
            cwd=Path.cwd(),
        )
    except SettingsError as error:
        raise StoreError(str(error)) from None


def _location(arguments: argparse.Namespace) -> Location:
    """Of the task store. Raises StoreError."""
    store = arguments.store or _settings(arguments, os.environ).tasks.store
    if not store:
        raise StoreError("no tasks are kept: the setting tasks.store is empty; name a database with --store")
    return located(store, os.environ)


def _shelf(arguments: argparse.Namespace) -> Shelf:
    """Raises StoreError where no folder is known."""
    given = arguments.dir
    if given is None and not arguments.store:
        given = _settings(arguments, os.environ).predictors.dir
    folder = given or predictors_folder(None, _location(arguments))
    if folder is None:
        raise StoreError("name the folder of the predictors with --dir, or in the setting predictors.dir")
    return Shelf(folder.expanduser().absolute())


# ------------------------------------------------------------------ output ---


def _when(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _place(registry: Registry, entry: Entry) -> str:
    if entry.version == registry.promoted:
        return "in force"
    if entry.retired:
        return "rolled back"
    return "candidate" if entry.version == registry.candidate else ""


def _entry(registry: Registry, entry: Entry) -> Facts:
    latest = entry.evaluations[-1] if entry.evaluations else None
    return {
        "version": entry.version,
        "created": _when(entry.created),
        "place": _place(registry, entry),
        "attempts": entry.data.attempts,
        "sha256": entry.sha256,
        "evaluation": _told(latest),
        "objections": list(registry.objections(entry.version)) if entry.version != registry.promoted else [],
    }


def _facts(artefact: Artefact) -> Facts:
    return {
        "version": artefact.version,
        "created": _when(artefact.created),
        "library": artefact.library,
        "data": {
            "since": _when(artefact.data.since),
            "until": _when(artefact.data.until),
            "attempts": artefact.data.attempts,
        },
        "features": artefact.features,
        "models": sorted(artefact.models),
        "holdout": {
            "until": _when(artefact.holdout.until),
            "trained": msgspec.to_builtins(artefact.holdout.trained),
            "rules": msgspec.to_builtins(artefact.holdout.rules),
        },
    }


def _told(evaluation: Evaluation | None) -> Facts | None:
    if evaluation is None:
        return None
    return {
        "against": evaluation.against,
        "at": _when(evaluation.at),
        "since": _when(evaluation.since),
        "until": _when(evaluation.until),
        "attempts": evaluation.candidate.attempts,
        "candidate": msgspec.to_builtins(evaluation.candidate),
        "other": msgspec.to_builtins(evaluation.other),
        "worse": list(evaluation.worse),
        "enough": evaluation.enough,
    }


def _compared(version: str, evaluation: Evaluation) -> list[str]:
    attempts = evaluation.candidate.attempts
    verdict = f"worse in {', '.join(evaluation.worse)}" if evaluation.worse else "not worse"
    if not evaluation.enough:
        verdict += ", but on too few attempts"
    return [
        f"{version} beside {evaluation.against} on {attempts} attempts that are new to both: {verdict}",
        *_table({version: evaluation.candidate, evaluation.against: evaluation.other}),
    ]


def _table(scores: Mapping[str, Score]) -> list[str]:
    lines = [f"{'loss in':10} {' '.join(f'{target:>18}' for target in TARGETS)}  within p90"]
    for name, score in scores.items():
        cells = [getattr(score.losses, target) for target in TARGETS]
        values = " ".join(f"{'-' if cell is None else format(cell, '.4f'):>18}" for cell in cells)
        lines.append(f"{name:10} {values}  {'-' if score.covered is None else format(score.covered, '.3f'):>10}")
    return lines


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
