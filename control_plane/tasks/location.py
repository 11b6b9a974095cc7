"""Where the tasks are kept: the setting `tasks.store`, read and checked."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import SplitResult, unquote, urlsplit

AUTO = "auto"
_FORMS = "sqlite:///PATH, postgresql://USER@HOST/DATABASE or auto"


class StoreError(ValueError):
    """The store cannot be used as it is; the message says why and what helps, and holds no password."""


@dataclass(frozen=True, slots=True)
class SqliteFile:
    path: Path

    @property
    def shown(self) -> str:
        """For people."""
        return f"sqlite:///{self.path}"


@dataclass(frozen=True, slots=True)
class PostgresDatabase:
    dsn: str
    """As libpq understands it, with the password if it has one."""
    shown: str
    """For people: without password."""

    def __repr__(self) -> str:
        return f"PostgresDatabase({self.shown!r})"


Location = SqliteFile | PostgresDatabase


def located(url: str, env: Mapping[str, str]) -> Location:
    """What a store's URL means. Raises StoreError.

    sqlite:///relative.db and sqlite:////absolute.db name a file; auto is a file in the user's state folder.
    """
    if url == AUTO:
        return SqliteFile(state_folder(env) / "tasks.db")
    try:
        parts = urlsplit(url)
        several = "," in parts.netloc  # hosts, as libpq allows
        port = None if several else parts.port
    except ValueError:  # its message would quote the URL
        raise StoreError(f"tasks.store is no valid URL; it is {_FORMS}") from None
    if parts.scheme == "sqlite":
        return _sqlite(url, parts)
    if parts.scheme in ("postgresql", "postgres"):
        return _postgresql(url, parts, port, several)
    raise StoreError(f"tasks.store: unknown kind {parts.scheme or 'without a scheme'!r}; it is {_FORMS}")


def _sqlite(url: str, parts: SplitResult) -> SqliteFile:
    if not url.startswith("sqlite:///") or parts.query or parts.fragment:
        raise StoreError("tasks.store: a file is written sqlite:///relative/path or sqlite:////absolute/path")
    name = unquote(parts.path)[1:]
    if not name or name.startswith(":memory:") or name.endswith("/"):
        raise StoreError("tasks.store: sqlite:/// needs the path of a file; tasks in memory would not be durable")
    if "\0" in name:
        raise StoreError("tasks.store: the path has a zero byte")
    return SqliteFile(Path(name).expanduser().absolute())


def _postgresql(url: str, parts: SplitResult, port: int | None, several: bool) -> PostgresDatabase:
    host = parts.hostname or ""
    if several:
        host = parts.netloc.rpartition("@")[2]
    elif ":" in host:
        host = f"[{host}]"
    if parts.fragment:
        raise StoreError("tasks.store: a database has no #fragment; write # in a password as %23")
    if not parts.path.strip("/") and "dbname=" not in parts.query and "service=" not in parts.query:
        raise StoreError("tasks.store: name the database, as in postgresql://USER@HOST/DATABASE")
    user = f"{parts.username}@" if parts.username else ""
    return PostgresDatabase(url, f"postgresql://{user}{host}{f':{port}' if port else ''}{parts.path}")


def predictors_folder(given: Path | None, place: Location) -> Path | None:
    """Where the trained predictors of a control plane with this store are; None: it has none."""
    if given is not None:
        return given.expanduser().absolute()
    return place.path.with_suffix(".predictors") if isinstance(place, SqliteFile) else None


def state_folder(env: Mapping[str, str]) -> Path:
    """Where programs of this user keep what must outlive them."""
    home = Path(env["HOME"]) if env.get("HOME") else Path.home()
    if sys.platform == "darwin":
        return home / "Library" / "Application Support" / "modelyard"
    if os.name == "nt" and env.get("LOCALAPPDATA"):
        return Path(env["LOCALAPPDATA"]) / "modelyard"
    given = env.get("XDG_STATE_HOME", "")
    return (Path(given) if Path(given).is_absolute() else home / ".local" / "state") / "modelyard"
