"""Many rows in one statement, as each database does it best.

SQLite: `VALUES` of up to 64 rows. A statement gives up Python's lock once and gets it back once, however many rows it
has; executemany would do so for each row, and every time wait for a busy event loop. PostgreSQL: one array for each
column.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

from sqlalchemy import ARRAY, ColumnElement, Connection, Table, Text, any_, bindparam, func, select

Row = tuple[Any, ...]

_SIZES = (64, 16, 4, 1)
"""Rows of one statement. Few sizes, so that SQLite keeps them all prepared."""


def insert(connection: Connection, table: Table, columns: Sequence[str], rows: Sequence[Row]) -> None:
    """Insert rows whose values are in the order of the columns."""
    into = _into(table.name, tuple(columns))
    _execute(connection, table, tuple(columns), rows, lambda source: f"{into} {source}")


def upsert(
    connection: Connection, table: Table, columns: Sequence[str], keys: Sequence[str], rows: Sequence[Row]
) -> None:
    """Insert rows, over those that are there with the same keys. No two may have the same."""
    into = _into(table.name, tuple(columns))
    changes = ", ".join(f'"{name}" = excluded."{name}"' for name in columns if name not in keys)
    over = f"ON CONFLICT ({_listed(keys)}) DO UPDATE SET {changes}"
    _execute(connection, table, tuple(columns), rows, lambda source: f"{into} {source} {over}")


def add(connection: Connection, table: Table, columns: Sequence[str], keys: Sequence[str], rows: Sequence[Row]) -> None:
    """Insert rows, or add their values to those that are there with the same keys. No two may have the same. Rows are
    locked in their order: sort them."""
    into = _into(table.name, tuple(columns))
    sums = ", ".join(f'"{name}" = {table.name}."{name}" + excluded."{name}"' for name in columns if name not in keys)
    over = f"ON CONFLICT ({_listed(keys)}) DO UPDATE SET {sums}"
    _execute(connection, table, tuple(columns), rows, lambda source: f"{into} {source} {over}")


def update(
    connection: Connection, table: Table, keys: Sequence[str], columns: Sequence[str], rows: Sequence[Row]
) -> None:
    """Update rows that are found by keys. A row is the values of the keys, then those of the columns.

    Raises RuntimeError if one is not there.
    """
    found = " AND ".join(f'{table.name}."{key}" = new.column{i}' for i, key in enumerate(keys, 1))
    changes = ", ".join(f'"{name}" = new.column{i}' for i, name in enumerate(columns, len(keys) + 1))
    written = _execute(
        connection,
        table,
        (*keys, *columns),
        rows,
        lambda source: f"UPDATE {table.name} SET {changes} FROM ({source}) AS new WHERE {found}",  # noqa: S608 - ours
    )
    if written != len(rows):
        raise RuntimeError(f"{len(rows)} rows of {table.name} were to be changed, {written} were there")


def among(connection: Connection, column: ColumnElement[str], values: Sequence[str]) -> ColumnElement[bool]:
    """Whether a column of text has one of the values. The statement is the same for any number of them."""
    if connection.dialect.name == "sqlite":
        listed = func.json_each(bindparam(None, json.dumps(values), type_=Text, unique=True)).table_valued("value")
        return column.in_(select(listed.c.value))
    return column == any_(bindparam(None, list(values), type_=ARRAY(Text), unique=True))


def _into(table: str, columns: Sequence[str]) -> str:
    return f"INSERT INTO {table} ({_listed(columns)})"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f'"{name}"' for name in names)


def _execute(
    connection: Connection, table: Table, columns: tuple[str, ...], rows: Sequence[Row], statement: Callable[[str], str]
) -> int:
    """Run a statement whose source of rows has columns that are named column1, column2, ...; rows it was about."""
    if connection.dialect.name != "sqlite":
        source = _arrays(table, columns)
        return connection.exec_driver_sql(statement(source), tuple(map(list, zip(*rows, strict=True)))).rowcount
    start = written = 0
    for size in _SIZES:
        while len(rows) - start >= size:
            values = tuple(value for row in rows[start : start + size] for value in row)
            written += connection.exec_driver_sql(statement(_values(len(columns), size)), values).rowcount
            start += size
    return written


@cache
def _values(columns: int, count: int) -> str:
    row = "(" + ",".join("?" * columns) + ")"
    return "VALUES " + ",".join([row] * count)


@cache
def _arrays(table: Table, columns: tuple[str, ...]) -> str:
    from sqlalchemy.dialects import postgresql  # 2 MB, for those who use it

    dialect = postgresql.dialect()  # type: ignore[no-untyped-call]
    types = [table.c[name].type.compile(dialect) for name in columns]
    arrays = ", ".join(f"${i}::{type}[]" for i, type in enumerate(types, 1))
    names = ", ".join(f"column{i}" for i in range(1, len(columns) + 1))
    return f"SELECT * FROM unnest({arrays}) AS source({names})"  # noqa: S608 - names of types and numbers
