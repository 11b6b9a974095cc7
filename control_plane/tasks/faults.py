"""What a failure of the database means."""

from __future__ import annotations

import sqlite3
from enum import Enum

from sqlalchemy.exc import DBAPIError, IntegrityError, InterfaceError, TimeoutError

from control_plane.domain.errors import DomainError

_RETRY_UNAVAILABLE = 1.0
_RETRY_FULL = 10.0

_SQLITE_FULL = {sqlite3.SQLITE_FULL, getattr(sqlite3, "SQLITE_IOERR_WRITE", 778)}
_SQLITE_COMMAND = {sqlite3.SQLITE_ERROR, sqlite3.SQLITE_MISMATCH, sqlite3.SQLITE_TOOBIG, sqlite3.SQLITE_RANGE}


class Fault(Enum):
    UNAVAILABLE = "the database does not answer"
    FULL = "its disk is full"
    CONFLICT = "another transaction was in the way"
    COMMAND = "one of the commands is at fault, or the program is"


def fault_of(error: BaseException) -> Fault:
    """What lies behind an exception of SQLAlchemy, a driver or the system."""
    if isinstance(error, DomainError):
        return Fault.COMMAND
    if isinstance(error, IntegrityError):
        return Fault.CONFLICT
    if isinstance(error, DBAPIError) and error.orig is not None:
        if isinstance(error.orig, sqlite3.Error):
            return _of_sqlite(error.orig)
        state = getattr(error.orig, "sqlstate", None) or getattr(error.orig, "pgcode", None)
        if state:
            return _of_postgresql(state)
        return Fault.UNAVAILABLE if error.connection_invalidated or isinstance(error, InterfaceError) else Fault.COMMAND
    if isinstance(error, sqlite3.Error):
        return _of_sqlite(error)
    state = getattr(error, "sqlstate", None)
    if isinstance(state, str):
        return _of_postgresql(state)
    if isinstance(error, OSError | TimeoutError | EOFError):  # the built-in TimeoutError is an OSError
        return Fault.UNAVAILABLE
    if type(error).__module__.startswith("asyncpg"):  # such as ConnectionDoesNotExistError without a state
        return Fault.UNAVAILABLE
    return Fault.COMMAND


def _of_sqlite(error: sqlite3.Error) -> Fault:
    code = getattr(error, "sqlite_errorcode", None)
    if code is None:  # the driver itself complains, for example about a value that it cannot bind
        return Fault.COMMAND
    if code in _SQLITE_FULL or code & 0xFF == sqlite3.SQLITE_FULL:
        return Fault.FULL
    if code & 0xFF == sqlite3.SQLITE_CONSTRAINT:
        return Fault.CONFLICT
    return Fault.COMMAND if code & 0xFF in _SQLITE_COMMAND else Fault.UNAVAILABLE


def _of_postgresql(state: str) -> Fault:
    """By SQLSTATE, see appendix A of PostgreSQL's manual."""
    if state == "53100":
        return Fault.FULL
    if state[:2] == "40" or state == "55P03":
        return Fault.CONFLICT
    # Connections, resources, operator's intervention, system errors, authorisation, no such database, a read-only
    # standby; and locks or statements that took too long.
    if state[:2] in {"08", "53", "57", "58", "28", "3D", "XX", "F0"} or state in {"25006", "25P03", "25P04"}:
        return Fault.UNAVAILABLE
    return Fault.COMMAND


def translated(error: BaseException) -> BaseException:
    """What the caller is told: a refusal where the database is the cause, else the exception itself."""
    fault = fault_of(error)
    if fault is Fault.FULL:
        return DomainError("STORE_FULL", "the disk of the task store is full", _RETRY_FULL)
    if fault is Fault.UNAVAILABLE or (fault is Fault.CONFLICT and not isinstance(error, IntegrityError)):
        return unavailable(brief(error))
    return error


def unavailable(why: str) -> DomainError:
    return DomainError("STORE_UNAVAILABLE", f"the task store does not answer: {why}", _RETRY_UNAVAILABLE)


def brief(error: BaseException) -> str:
    """One short line without the statement and its values: they hold prompts."""
    root: BaseException = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
    # The wrapper of asyncpg puts its own class before the text.
    text = str(root.__cause__ or root).strip().splitlines()
    return (text[0] if text else type(root).__name__)[:200]
