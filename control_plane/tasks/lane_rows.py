"""Lanes and their numbers. A lane is written once and found in memory from then on."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from functools import cache
from typing import Any

from sqlalchemy import ColumnElement, Connection, bindparam, delete, func, literal_column, select, tuple_

from control_plane.tasks import schema
from control_plane.tasks.lanes import from_json, to_json
from control_plane.tasks.model import Lane, LaneId
from control_plane.tasks.transaction import Transaction

_MOST_KNOWN = 10_000
_USED = 600.0
"""Seconds to which `used_at` is exact."""
_FLOOR_HOLDS = 1.0
_UNUSED = 24 * 3600.0
"""Seconds after which a lane that no task needs is forgotten. Much longer than `_USED`, so that whoever knows a lane
without having looked for so long finds it still there."""


class Lanes:
    """Numbers of lanes, for the writer alone."""

    def __init__(self) -> None:
        self._ids: dict[Lane, tuple[LaneId, float]] = {}
        self._lanes: dict[int, Lane] = {}

    def ids(self, transaction: Transaction, lanes: Iterable[Lane]) -> dict[Lane, int]:
        """Their numbers; those that are new are written."""
        found: dict[Lane, int] = {}
        missing: dict[str, Lane] = {}
        for lane in set(lanes):
            id, used_at = self._ids.get(lane, (LaneId(0), 0.0))
            if used_at + _USED > transaction.now:
                found[lane] = id
            else:
                missing[to_json(lane)] = lane
        if missing:
            upsert = _upsert(transaction.connection.dialect.name)
            for text, lane in sorted(missing.items()):  # in one order everywhere: no two may wait for each other
                row = transaction.connection.execute(upsert, {"lane": text, "used_at": transaction.now}).one()
                found[lane] = row.id
            fresh = {lane: (LaneId(found[lane]), transaction.now) for lane in missing.values()}
            transaction.after_commit.append(lambda: self._learn(fresh))
        return found

    def lane(self, connection: Connection, id: int) -> Lane:
        """The lane of a number that a task has."""
        lane = self._lanes.get(id)
        if lane is None:
            text = connection.execute(select(schema.lanes.c.lane).where(schema.lanes.c.id == id)).scalar_one()
            if len(self._lanes) >= _MOST_KNOWN:
                self._lanes.clear()
            lane = self._lanes[id] = from_json(text)
        return lane

    def _learn(self, fresh: dict[Lane, tuple[LaneId, float]]) -> None:
        if len(self._ids) + len(fresh) > _MOST_KNOWN:
            self._ids.clear()
        self._ids.update(fresh)

    def forget(self, id: int) -> None:
        """It is gone."""
        self._lanes.pop(id, None)
        for lane in [lane for lane, (known, _) in self._ids.items() if known == id]:
            del self._ids[lane]


@cache
def _upsert(dialect: str) -> Any:
    """Write a lane, or that it is used; its number."""
    if dialect == "sqlite":
        from sqlalchemy.dialects.sqlite import insert
    else:
        from sqlalchemy.dialects.postgresql import insert  # type: ignore[assignment]
    statement = insert(schema.lanes).values(lane=bindparam("lane"), used_at=bindparam("used_at"))
    used = {"used_at": statement.excluded.used_at}
    return statement.on_conflict_do_update(index_elements=["lane"], set_=used).returning(schema.lanes.c.id)


def in_lane(lane: Any, after: Any = "") -> tuple[ColumnElement[bool], ...]:
    """Tasks of a lane that can start now and have a greater id; in their order with FIRST_IN_LANE.

    A range, and its order, for what is an equality: a planner that takes most tasks for startable ones of this lane
    (one lane is common, and statistics are old) would walk the table or its primary key, past every task that is done.
    Only the index of startable tasks has this order.
    """
    tasks = schema.tasks
    return tuple_(tasks.c.lane_id, tasks.c.id) > tuple_(lane, after), tasks.c.lane_id <= lane, schema.STARTABLE


class Floors:
    """Up to which id a lane's tasks have been taken, so that a claim need not walk past them: PostgreSQL keeps the dead
    entries of its indexes until they are vacuumed away, and with a long queue that is after every fifth task.

    Only a hint. It is dropped when a task comes back to the lane, holds for a second in case nobody told of that, and a
    claim that finds too little behind it looks from the beginning.
    """

    def __init__(self) -> None:
        self._floors: dict[LaneId, tuple[str, float]] = {}

    def get(self, lane: LaneId, now: float) -> str:
        """Tasks of the lane up to this id are taken; empty where nobody knows."""
        id, walked = self._floors.get(lane, ("", 0.0))
        return id if now < walked + _FLOOR_HOLDS else ""

    def put(self, lane: LaneId, floor: str, id: str, now: float) -> None:
        """Those up to `id` are taken, too; `floor` is where the claim began."""
        walked = self._floors[lane][1] if floor and lane in self._floors else now
        if len(self._floors) >= _MOST_KNOWN:
            self._floors.clear()
        self._floors[lane] = id, walked

    def drop(self, lanes: Iterable[LaneId]) -> None:
        """Tasks came back to these."""
        for lane in lanes:
            self._floors.pop(lane, None)


FIRST_IN_LANE = (schema.tasks.c.lane_id, schema.tasks.c.id)


def startable(connection: Connection) -> list[LaneId]:
    """Lanes with tasks that can start now: one look into the index for each, however many tasks they hold."""
    tasks = schema.tasks
    first = select(func.min(tasks.c.lane_id).label("lane_id")).where(schema.STARTABLE).cte("walk", recursive=True)
    following = (
        select(func.min(tasks.c.lane_id))
        .where(schema.STARTABLE, tasks.c.lane_id > first.c.lane_id)
        .correlate(first)
        .scalar_subquery()
    )
    walk = first.union_all(select(following).where(first.c.lane_id.is_not(None)))
    return [LaneId(id) for id in connection.execute(select(walk.c.lane_id)).scalars() if id is not None]


def first_tasks(connection: Connection, among: Collection[LaneId] | None) -> list[tuple[LaneId, str, float]]:
    """Number, JSON and submission of the first task of every lane with tasks that can start now."""
    wanted = startable(connection) if among is None else list(among)
    tasks, lanes = schema.tasks, schema.lanes
    found = []
    query = (
        select(tasks.c.created_at, lanes.c.lane)
        .join(lanes, lanes.c.id == tasks.c.lane_id)
        .where(*in_lane(bindparam("wanted")))
        .order_by(*FIRST_IN_LANE)
        .limit(literal_column("1"))
    )
    for id in wanted:
        row = connection.execute(query, {"wanted": id}).first()
        if row is not None:
            found.append((id, row.lane, row.created_at))
    return found


def unused(connection: Connection, now: float, most: int) -> list[int]:
    """Lanes that no task needs and nobody has used for long."""
    lanes, tasks = schema.lanes, schema.tasks
    old = list(
        connection.execute(select(lanes.c.id).where(lanes.c.used_at < now - _UNUSED).limit(literal_column(str(most))))
        .scalars()
    )  # fmt: skip
    if not old:
        return []
    used = set(connection.execute(select(tasks.c.lane_id).where(tasks.c.lane_id.in_(old)).distinct()).scalars())
    used |= set(
        connection.execute(select(tasks.c.home_lane_id).where(tasks.c.home_lane_id.in_(old)).distinct()).scalars()
    )
    return [id for id in old if id not in used]


def forget(transaction: Transaction, ids: Collection[int], lanes: Lanes) -> None:
    """Delete lanes, but for those that were used again since `unused` looked."""
    gone = transaction.connection.execute(
        delete(schema.lanes)
        .where(schema.lanes.c.id.in_(ids), schema.lanes.c.used_at < transaction.now - _UNUSED)
        .returning(schema.lanes.c.id)
    ).scalars().all()  # fmt: skip
    for id in gone:
        lanes.forget(id)
