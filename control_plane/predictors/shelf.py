"""The folder of trained predictors: one file for each version, and `registry.json`, which says what is in force.

What is in force is the registry's word: a version is there once the registry names it, with its checksum. Every file is
written under another name, brought to disk, and renamed; who changes the registry holds a lock. Readers need none.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec

from control_plane.predictors.artefact import RULES, Artefact, ArtefactError, Data, NothingYet, decode, digest, encode
from control_plane.predictors.scores import Evaluation, objections

FORMAT = "modelyard-predictors/1"
REGISTRY = "registry.json"
MOST_BYTES = 256 << 20
"""Of a file."""
EVALUATIONS = 20
"""That are kept of a version."""


class Entry(msgspec.Struct, forbid_unknown_fields=True):
    """What the registry knows of a version."""

    version: str
    file: str
    sha256: str
    created: float
    library: str
    data: Data
    evaluations: list[Evaluation] = []
    """The latest last."""
    retired: bool = False
    """It was in force and was rolled back."""


class Step(msgspec.Struct, forbid_unknown_fields=True):
    """A change of what is in force."""

    at: float
    verb: str
    version: str
    """In force from then on; "rules": none of them."""
    before: str
    overridden: list[str] = []
    """Objections that were overridden."""


class Registry(msgspec.Struct, forbid_unknown_fields=True):
    """All versions, the oldest first."""

    format: str = FORMAT
    entries: list[Entry] = []
    promoted: str = RULES
    """The version in force, or "rules"."""
    previous: list[str] = []
    """What was in force before, the latest last: `rollback` goes there."""
    history: list[Step] = []
    made: int = 0
    """Versions so far."""

    def entry(self, version: str) -> Entry:
        """Raises ArtefactError for an unknown version."""
        for entry in self.entries:
            if entry.version == version:
                return entry
        known = ", ".join(entry.version for entry in self.entries) or "none yet"
        raise ArtefactError(f"no version {version[:40]!r}; there are: {known}")

    @property
    def newest(self) -> str:
        """Raises NothingYet where there is none."""
        if not self.entries:
            raise NothingYet("no predictor was trained yet: `modelyard predictor train`")
        return self.entries[-1].version

    @property
    def candidate(self) -> str | None:
        """The version that is to be watched beside the one in force: the newest, if it was never in force."""
        if not self.entries:
            return None
        last = self.entries[-1]
        used = last.retired or last.version == self.promoted or last.version in self.previous
        return None if used else last.version

    def objections(self, version: str) -> tuple[str, ...]:
        """Why a version must not be put in force now, for people; empty: it may."""
        entry, against = self.entry(version), self.promoted
        latest = next((one for one in reversed(entry.evaluations) if one.against == against), None)
        retired = ("it was rolled back before, which only --force overrides",) if entry.retired else ()
        return (*retired, *objections(latest, against))


class Shelf:
    """See the module. Methods that read raise ArtefactError for what makes no sense, and OSError."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def stamp(self) -> tuple[int, int, int] | None:
        """Another one whenever the registry has changed; None: there is none."""
        try:
            found = (self.folder / REGISTRY).stat()
        except FileNotFoundError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino

    def registry(self) -> Registry:
        """As it is now; an empty one where there is none."""
        path = self.folder / REGISTRY
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return Registry()
        try:
            found = msgspec.json.decode(data, type=Registry)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ArtefactError(f"{path} cannot be read: {error}") from None
        if found.format != FORMAT:
            raise ArtefactError(f"{path} has the format {found.format[:40]!r}, this program knows {FORMAT!r}")
        return found

    def artefact(self, entry: Entry) -> Artefact:
        """Of a version, checked."""
        path = self.folder / entry.file
        if path.parent != self.folder:
            raise ArtefactError(f"{entry.version}: its file is not in the folder")
        try:
            if path.stat().st_size > MOST_BYTES:
                raise ArtefactError("it is too large")
            return decode(path.read_bytes(), entry.sha256)
        except ArtefactError as error:
            raise ArtefactError(f"{path}: {error}") from None
        except OSError as error:
            raise ArtefactError(f"{path}: {error.strerror or error}") from None

    # ------------------------------------------------------------- changes ---

    @contextlib.contextmanager
    def _changed(self) -> Iterator[Registry]:
        """The registry, to be changed by one at a time; written if nothing is raised."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with _locked(self.folder / "lock"):
            registry = self.registry()
            yield registry
            _write(self.folder / REGISTRY, msgspec.json.format(msgspec.json.encode(registry), indent=1))

    def add(self, artefact: Artefact) -> Artefact:
        """Keep it as a new version, whose name it is given."""
        with self._changed() as registry:
            registry.made += 1
            named = msgspec.structs.replace(artefact, version=f"v{registry.made}")
            data, file = encode(named), f"{named.version}.json"
            _write(self.folder / file, data)
            registry.entries.append(Entry(named.version, file, digest(data), named.created, named.library, named.data))
        return named

    def evaluated(self, version: str, evaluation: Evaluation) -> None:
        """Take down how a version did."""
        with self._changed() as registry:
            entry = registry.entry(version)
            entry.evaluations = [*entry.evaluations, evaluation][-EVALUATIONS:]

    def promote(self, version: str, now: float, *, force: bool) -> tuple[str, ...]:
        """Put a version in force; the objections that were overridden. Raises Objected where there are some and they
        are not to be overridden, and ArtefactError where it cannot be read."""
        with self._changed() as registry:
            entry = registry.entry(version)
            if registry.promoted == version:
                raise ArtefactError(f"{version} is in force already")
            self.artefact(entry)
            found = registry.objections(version)
            if found and not force:
                raise Objected(version, found)
            registry.history.append(Step(now, "promote", version, registry.promoted, list(found)))
            registry.previous.append(registry.promoted)
            registry.promoted, entry.retired = version, False
        return found

    def rollback(self, now: float) -> tuple[str, str]:
        """Go back to what was in force before; the versions before and after."""
        with self._changed() as registry:
            before = registry.promoted
            if before == RULES:
                raise ArtefactError("no version is in force, there is nothing to roll back")
            after = registry.previous.pop() if registry.previous else RULES
            registry.entry(before).retired = True
            registry.promoted = after
            registry.history.append(Step(now, "rollback", after, before))
        return before, after


class Objected(Exception):
    """A version is not put in force."""

    def __init__(self, version: str, objections: tuple[str, ...]) -> None:
        super().__init__(f"{version} is not put in force: {'; '.join(objections)}")
        self.objections = objections


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Nobody else holds it; given back when this process ends, however it does."""
    with path.open("ab") as file:
        if os.name == "nt":
            import msvcrt

            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_LOCK, 1)  # type: ignore[attr-defined,unused-ignore]
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _write(path: Path, data: bytes) -> None:
    """The whole file or nothing of it, also when the power fails."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    if os.name != "nt":
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the rename, too
        finally:
            os.close(folder)
