"""A file of prompts, and the file of their results.

Prompts: one JSON object a line, {"prompt": ...} or {"messages": [...]}, with the options of a task beside it. Each line
has an idempotency key made of what it says: the same line of the same file is the same task, however often it is run.

Results: one JSON object a line. While a batch runs they are added as they come; when all are there, the file is
replaced at once by one that has them in the order of the prompts. Results of other lines stay, behind them.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Self

from modelyard.cli.errors import NOT_UTF8, USAGE, CliError

if TYPE_CHECKING:
    from modelyard.client import NewTask

_MOST_PROBLEMS = 20

_TIMES = ("not_before", "deadline")
_RENAMED = {"key": "idempotency_key", "labels": "task_labels"}
_FORBIDDEN = ("request_id", "explain", "group", "idempotency_key", "task_labels")


@dataclass(frozen=True, slots=True)
class Entry:
    """One line with a prompt."""

    line: int
    """In the file, from 1."""
    id: Any
    """As the line has it, to find its result; None: it has none."""
    key: str
    """Its idempotency key."""
    task: NewTask


def read_entries(name: str, text: str, group: str, common: Mapping[str, Any]) -> list[Entry]:
    """Every prompt of a file; `common` are options of those that do not say otherwise. Raises CliError that names every
    line that is wrong: then nothing was submitted."""
    entries: list[Entry] = []
    problems: list[str] = []
    seen: Counter[str] = Counter()
    lines: dict[str, int] = {}
    for number, line in enumerate(text.removeprefix("\ufeff").split("\n"), 1):
        if not line.strip():
            continue
        try:
            entry = _entry(number, line, group, common, seen)
            if entry.key in lines:
                raise ValueError(f"line {lines[entry.key]} has the same key")
            lines[entry.key] = number
            entries.append(entry)
        except (ValueError, TypeError) as error:
            problems.append(f"{name}:{number}: {_told(error)}")
    if problems:
        more = f"\n... and {len(problems) - _MOST_PROBLEMS} more" if len(problems) > _MOST_PROBLEMS else ""
        told = "\n".join(problems[:_MOST_PROBLEMS]) + more
        raise CliError(f"nothing was submitted:\n{told}", USAGE, "INVALID_REQUEST")
    if not entries:
        raise CliError(f'{name}: has no prompts; a line is for example {{"prompt": "Hello"}}', USAGE, "USAGE")
    return entries


def _entry(number: int, line: str, group: str, common: Mapping[str, Any], seen: Counter[str]) -> Entry:
    from modelyard.client import TaskOptions
    from modelyard.rpc.task_validation import check_submit

    try:
        given = json.loads(line, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    except _Twice:
        raise
    except ValueError as error:
        raise ValueError(f"is not JSON: {error}") from None
    if not isinstance(given, dict):
        raise ValueError('is no JSON object such as {"prompt": "Hello"}')
    if ("prompt" in given) == ("messages" in given):
        raise ValueError('needs either "prompt" or "messages"')
    known = {name for name in TaskOptions.__annotations__ if name not in _FORBIDDEN} | _RENAMED.keys()
    if unknown := sorted(given.keys() - known - {"id", "prompt", "messages"}):
        raise ValueError(f"unknown field {unknown[0]!r}; known: id, prompt, messages, {', '.join(sorted(known))}")
    asked = given["prompt"] if "prompt" in given else given["messages"]
    if not isinstance(asked, str if "prompt" in given else list):
        raise TypeError('"prompt" is a text, "messages" a list')
    options = {**common, **{name: value for name, value in given.items() if name in known}}
    key = options.pop("key", None)
    if key is None:
        key = _key(group, asked, options, given.get("id"), seen)
    elif not isinstance(key, str) or not key:
        raise TypeError('"key" is a text')
    for name in _TIMES:
        if isinstance(options.get(name), str):
            try:
                options[name] = datetime.fromisoformat(options[name])
            except ValueError as error:
                raise ValueError(f'"{name}": {error}') from None
        elif options.get(name) is not None:  # seconds from now would be another time when it runs again
            raise TypeError(f'"{name}" is a time such as "2030-01-31T12:00:00+00:00"')
    if "labels" in options:
        options["task_labels"] = options.pop("labels")
    task = _task(asked, group, {"idempotency_key": key, **options}, "prompt" if "prompt" in given else "messages")
    if violations := check_submit(task.request):
        raise ValueError("; ".join(f"{found.field.removeprefix('spec.')}: {found.description}" for found in violations))
    return Entry(number, given.get("id"), key, task)


class _Twice(ValueError):
    """An object has a key twice: only one of the values would hold."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        name = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise _Twice(f"has the key {name!r} twice")
    return found


_WRONG = (ValueError, TypeError, KeyError, AttributeError, OverflowError)
"""What values of a wrong type can end with."""


def _task(asked: Any, group: str, options: Mapping[str, Any], name: str) -> NewTask:
    """The task. Raises ValueError that names the field."""
    from modelyard.client import NewTask

    labels = options.get("task_labels")
    if labels is not None and not (
        isinstance(labels, dict) and all(isinstance(value, str) for value in labels.values())
    ):
        raise ValueError('"labels": is an object whose values are texts')
    try:
        return NewTask(asked, group=group, **options)
    except _WRONG as error:
        told = _told(error)
    # Which one it was shows when each is alone.
    own = {renamed: name for name, renamed in _RENAMED.items()}
    alone: list[tuple[str, Callable[[], NewTask]]] = [(name, lambda: NewTask(asked))]
    for option, value in options.items():
        alone.append((own.get(option, option), partial(NewTask, "Hello", **{option: value})))
    for field, make in alone:
        try:
            make()
        except _WRONG as error:
            if _told(error) == told:
                raise ValueError(f'"{field}": {told}') from None
    raise ValueError(told)


def _told(error: Exception) -> str:
    if isinstance(error, UnicodeError):
        return "is no Unicode text: it has half of a surrogate pair"
    return f"{error} is missing" if isinstance(error, KeyError) else str(error)


def _key(group: str, asked: Any, options: Mapping[str, Any], id: Any, seen: Counter[str]) -> str:
    """Equal lines have different keys by their order among themselves, and lines of other files others by the group."""
    facts = json.dumps([group, asked, options, id], sort_keys=True, ensure_ascii=False)
    digest = hashlib.sha256(facts.encode("utf-8", "surrogatepass")).hexdigest()[:40]
    seen[digest] += 1
    return f"batch-{digest}" if seen[digest] == 1 else f"batch-{digest}-{seen[digest]}"


def read_text(path: Path) -> str:
    """The text of a file. Raises CliError."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise CliError(f"{path}: {NOT_UTF8}", USAGE, "USAGE") from None
    except OSError as error:
        raise CliError(f"{path}: {error.strerror or error}", USAGE, "USAGE") from None


# ------------------------------------------------------------------- results ---


class Results:
    """Where results go: a file that can be gone on with, or standard output."""

    def __init__(self, path: Path | None, out: IO[str]) -> None:
        self._path = path
        self._out = out
        self._file: io.BufferedRandom | None = None
        self.kept: dict[str, dict[str, Any]] = {}
        """Results that were there, by key."""

    def __enter__(self) -> Self:
        if self._path is None:
            return self
        try:
            self._file = os.fdopen(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+b")
            self._lock()
            self._read()
        except OSError as error:
            self._close()
            raise CliError(f"{self._path}: {error.strerror or error}") from None
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _lock(self) -> None:
        assert self._file is not None
        with contextlib.suppress(ImportError):  # Windows
            import fcntl

            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise CliError(f"{self._path}: another batch is writing it") from None

    def _read(self) -> None:
        assert self._file is not None
        end = 0
        for line in self._file:
            if not line.endswith(b"\n"):
                break  # cut off in the middle: it is got again
            try:
                result = json.loads(line)
                self.kept[result["key"]] = result
            except (ValueError, TypeError, KeyError):
                told = f"{self._path}: is there and holds something else than results of a batch: choose another file"
                raise CliError(told, USAGE, "USAGE") from None
            end += len(line)
        self._file.truncate(end)
        self._file.seek(end)

    def add(self, result: Mapping[str, Any]) -> None:
        """Write a result as it comes."""
        text = json.dumps(result, ensure_ascii=False)
        if self._file is None:
            print(text, file=self._out, flush=True)
            return
        self._file.write(_encoded(text) + b"\n")
        self._file.flush()
        self.kept[result["key"]] = dict(result)

    def settle(self, entries: list[Entry]) -> int:
        """Replace the file by one that has a result for each prompt, in their order, and then those of other lines:
        perhaps they are of another file, and not ours to throw away. The number of those; refusals are no results."""
        if self._file is None or self._path is None:
            return 0
        ordered = [self.kept[entry.key] for entry in entries if entry.key in self.kept]
        keys = {entry.key for entry in entries}
        others = [kept for key, kept in self.kept.items() if key not in keys and kept.get("state") != "refused"]
        beside = self._path.with_name(f".{self._path.name}.{os.getpid()}.tmp")
        try:
            with beside.open("wb") as file:
                for text in _lines(ordered + others):
                    file.write(text)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(self._path)
        finally:
            beside.unlink(missing_ok=True)
        return len(others)


def _lines(results: list[dict[str, Any]]) -> Iterator[bytes]:
    for result in results:
        yield _encoded(json.dumps(result, ensure_ascii=False)) + b"\n"


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "backslashreplace")
