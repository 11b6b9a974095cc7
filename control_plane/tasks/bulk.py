"""Many rows in few statements, as each database does it best.

SQLite: `VALUES` of up to 64 rows. A statement gives up Python's lock once and gets it back once, however many rows it
has; executemany would do so for each row, and every time wait for a busy event loop. PostgreSQL: executemany, which
sends all rows at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from sqlalchemy import (
    ARRAY,
    ColumnElement,
    Connection,
    Table,
    Text,
    any_,
    bindparam,
    func,
    select,
)
from sqlalchemy import insert as sql_insert
from sqlalchemy import update as sql_update
from sqlalchemy.dialects.postgresql import insert as postgresql_insert

Row = tuple[Any, ...]

_SIZES = (64, 16, 4, 1)
"""Rows of one statement. Few sizes, so that SQLite keeps them all prepared."""


def insert(connection: Connection, table: Table, columns: Sequence[str], rows: Sequence[Row]) -> None:
    """Insert rows whose values are in the order of the columns."""
    if connection.dialect.name == "sqlite":
        _in_chunks(connection, rows, lambda count: _insert_text(table.name, tuple(columns), count))
    else:
        connection.execute(_insert(table), [dict(zip(columns, row, strict=True)) for row in rows])


def upsert(
    connection: Connection, table: Table, columns: Sequence[str], keys: Sequence[str], rows: Sequence[Row]
) -> None:
    """Insert rows, over those that are there with the same keys. No two may have the same."""
    if connection.dialect.name == "sqlite":
        tail = _conflict(tuple(columns), tuple(keys))
        _in_chunks(connection, rows, lambda count: _insert_text(table.name, tuple(columns), count) + tail)
    else:
        statement = _upsert(table, tuple(keys))
        connection.execute(statement, [dict(zip(columns, row, strict=True)) for row in rows])


def update(
    connection: Connection, table: Table, keys: Sequence[str], columns: Sequence[str], rows: Sequence[Row]
) -> None:
    """Update rows that are found by keys. A row is the values of the keys, then those of the columns."""
    if connection.dialect.name == "sqlite":
        _in_chunks(connection, rows, lambda count: _update_text(table.name, tuple(keys), tuple(columns), count))
    else:
        names = [*(f"key_{key}" for key in keys), *columns]
        connection.execute(
            _update(table, tuple(keys), tuple(columns)), [dict(zip(names, row, strict=True)) for row in rows]
        )


def among(connection: Connection, column: ColumnElement[str], values: Sequence[str]) -> ColumnElement[bool]:
    """Whether a column of text has one of the values. The statement is the same for any number of them."""
    if connection.dialect.name == "sqlite":
        import json

        listed = func.json_each(bindparam(None, json.dumps(values), type_=Text, unique=True)).table_valued("value")
        return column.in_(select(listed.c.value))
    return column == any_(bindparam(None, list(values), type_=ARRAY(Text), unique=True))


# ------------------------------------------------------------------ SQLite ---


def _in_chunks(connection: Connection, rows: Sequence[Row], statement: Any) -> None:
    start = 0
    for size in _SIZES:
        while len(rows) - start >= size:
            values = tuple(value for row in rows[start : start + size] for value in row)
            connection.exec_driver_sql(statement(size), values)
            start += size


def _values(columns: int, count: int) -> str:
    row = "(" + ",".join("?" * columns) + ")"
    return "VALUES " + ",".join([row] * count)


@cache
def _insert_text(table: str, columns: tuple[str, ...], count: int) -> str:
    return f"INSERT INTO {table} ({', '.join(_quoted(columns))}) {_values(len(columns), count)}"


@cache
def _conflict(columns: tuple[str, ...], keys: tuple[str, ...]) -> str:
    changes = ", ".join(f"{name} = excluded.{name}" for name in _quoted(c for c in columns if c not in keys))
    return f" ON CONFLICT ({', '.join(_quoted(keys))}) DO UPDATE SET {changes}"


@cache
def _update_text(table: str, keys: tuple[str, ...], columns: tuple[str, ...], count: int) -> str:
    changes = ", ".join(f"{name} = new.column{len(keys) + 1 + i}" for i, name in enumerate(_quoted(columns)))
    found = " AND ".join(f"{table}.{key} = new.column{1 + i}" for i, key in enumerate(_quoted(keys)))
    values = _values(len(keys) + len(columns), count)
    return f"UPDATE {table} SET {changes} FROM ({values}) AS new WHERE {found}"  # noqa: S608 - names of our own tables


def _quoted(names: Any) -> list[str]:
    return [f'"{name}"' for name in names]


# -------------------------------------------------------------- PostgreSQL ---


@cache
def _insert(table: Table) -> Any:
    return sql_insert(table)


@cache
def _upsert(table: Table, keys: tuple[str, ...]) -> Any:
    statement = postgresql_insert(table)
    changes = {column.name: statement.excluded[column.name] for column in table.columns if column.name not in keys}
    return statement.on_conflict_do_update(index_elements=list(keys), set_=changes)


@cache
def _update(table: Table, keys: tuple[str, ...], columns: tuple[str, ...]) -> Any:
    statement = sql_update(table).values({name: bindparam(name) for name in columns})
    for key in keys:
        statement = statement.where(table.c[key] == bindparam(f"key_{key}"))
    return statement
