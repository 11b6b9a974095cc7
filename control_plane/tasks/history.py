"""What attempts of tasks took, read from the store to learn from. Nothing that people wrote is looked at."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

from sqlalchemy import Connection, case, func, select

from control_plane.domain.task import Priority, TaskType
from control_plane.predictors.attempt import Attempt, Question, hour_of
from control_plane.tasks import schema, versions
from control_plane.tasks.faults import brief
from control_plane.tasks.lanes import from_json
from control_plane.tasks.location import Location, SqliteFile, StoreError
from control_plane.tasks.model import Lane, TaskState
from control_plane.tasks.reading import least_id

T = TypeVar("T")

TokensOf = Callable[[bytes], int]
"""Tokens of the answer in a serialised TaskResult. Raises ValueError."""

PAGE = 200
"""Tasks that are read at a time."""
_LARGEST_RESULT = 256 << 10
"""Bytes; how many tokens a larger result has is not looked up: a page of them must fit into memory."""


def page(connection: Connection, before: str, since: float, tokens_of: TokensOf) -> tuple[list[Attempt], str]:
    """Attempts of the next tasks with ids before this one (empty: of the newest), submitted since then, and the id to
    go on with; empty where there are no more."""
    tasks, results, attempts = schema.tasks, schema.results, schema.attempts
    conditions = [tasks.c.attempts > 0, tasks.c.id >= least_id(since)]
    if before:
        conditions.append(tasks.c.id < before)
    rows = connection.execute(
        select(tasks.c.id, tasks.c.state, tasks.c.attempts, tasks.c.task_type, tasks.c.priority, tasks.c.home_lane_id)
        .where(*conditions).order_by(tasks.c.id.desc()).limit(PAGE)
    ).all()  # fmt: skip
    if not rows:
        return [], ""
    found = {row.id: row for row in rows}
    lanes = _lanes(connection, {row.home_lane_id for row in rows})
    small = case((func.length(results.c.result) <= _LARGEST_RESULT, results.c.result), else_=None)
    answers = {
        row.task_id: _tokens(row.answer, tokens_of)
        for row in connection.execute(
            select(results.c.task_id, small.label("answer")).where(results.c.task_id.in_(list(found)))
        )
    }
    tried = connection.execute(
        select(attempts)
        .where(attempts.c.task_id.in_(list(found)), attempts.c.ended_at.is_not(None))
        .order_by(attempts.c.task_id, attempts.c.number)
    )
    ended = []
    for row in tried:
        task = found[row.task_id]
        lane = lanes.get(task.home_lane_id)
        ok = task.state == TaskState.SUCCEEDED and row.number == task.attempts
        if lane is None or not (ok or row.failed):
            continue  # lost, given back, cancelled or expired: that says nothing of the server
        route = lane.route
        question = Question(
            TaskType(task.task_type), row.model, row.provider, row.server_id, route.prompt_tokens, route.max_tokens,
            Priority(task.priority), hour_of(row.started_at),
        )  # fmt: skip
        seconds = max(0.0, row.ended_at - row.started_at)
        ended.append(Attempt(question, row.started_at, seconds, ok, answers.get(row.task_id) if ok else None))
    return ended, rows[-1].id if len(rows) == PAGE else ""


def _lanes(connection: Connection, ids: set[int]) -> dict[int, Lane]:
    rows = connection.execute(select(schema.lanes.c.id, schema.lanes.c.lane).where(schema.lanes.c.id.in_(ids)))
    return {row.id: from_json(row.lane) for row in rows}


def _tokens(answer: bytes | None, tokens_of: TokensOf) -> int | None:
    if answer is None:
        return None
    try:
        return tokens_of(bytes(answer))
    except ValueError:
        return None


# -------------------------------------------------- beside a control plane ---


class Read(Protocol):
    """Runs an operation on a connection that sees one moment. Raises StoreError."""

    def __call__(self, operation: Callable[[Connection], T]) -> T: ...


@contextmanager
def reader(place: Location) -> Iterator[Read]:
    """A store that a control plane may be using. Raises StoreError."""

    def told(read: Read) -> Read:
        def call(operation: Callable[[Connection], T]) -> T:
            try:
                return read(operation)
            except Exception as error:
                raise StoreError(f"tasks.store {place.shown}: {brief(error)}") from None

        return call

    if isinstance(place, SqliteFile):
        from control_plane.tasks import sqlite

        versions.check(sqlite.status(place), place.shown)
        engine = sqlite.engine(place.path, write=False)
        try:
            with engine.connect() as connection:
                yield told(lambda operation: _at_one_moment(connection, operation))
        finally:
            engine.dispose()
        return
    from control_plane.tasks.opening import open_database

    with asyncio.Runner() as runner:
        database = runner.run(open_database(place))
        try:
            yield told(lambda operation: runner.run(database.read(operation)))
        finally:
            runner.run(database.close())


def _at_one_moment(connection: Connection, operation: Callable[[Connection], T]) -> T:
    with connection.begin():
        return operation(connection)
