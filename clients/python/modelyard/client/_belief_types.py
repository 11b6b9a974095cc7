"""Beliefs and callbacks as the client shows them: plain immutable values, no protobuf."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from modelyard.client._types import Value

Json = None | bool | int | float | str | list[Any] | tuple[Any, ...] | dict[str, Any]
"""What a belief may hold: any JSON. Numbers are doubles there: whole ones come back as int, and integers beyond
2**53 are refused."""


@dataclass(frozen=True, slots=True)
class Belief(Value):
    """What somebody holds to be true."""

    key: str
    value: Any
    """Any JSON; None also if it was deleted."""
    confidence: float = 1.0
    """[0, 1]"""
    source: str = ""
    """Who says so."""
    updated_at: datetime | None = None
    version: int = 0
    """Grows with every write of any belief: `watch` goes on after the last one seen."""
    deleted: bool = False
    """It is no longer held; only from `watch`."""


@dataclass(frozen=True, slots=True)
class CallbackDelivery(Value):
    """One callback of one task, and what became of it."""

    id: str
    """Its `webhook-id`."""
    task_id: str
    type: str
    """"task.succeeded", "task.failed", "task.cancelled" or "task.expired"."""
    url: str
    """Without its query."""
    state: str
    """"pending", "delivered" or "dead"."""
    attempt_count: int = 0
    """Since it was made or sent again."""
    created_at: datetime | None = None
    """When the task became terminal."""
    next_attempt_at: datetime | None = None
    """Only while it is pending."""
    finished_at: datetime | None = None
    """When it was accepted or given up."""
    failure_message: str = ""
    """Why the last attempt failed."""
