"""What a callback says: TaskNotice as JSON."""

from __future__ import annotations

from google.protobuf import json_format

from control_plane.api import task_convert
from control_plane.domain.errors import DomainError
from control_plane.tasks.callbacks import DeliveryRecord
from control_plane.tasks.model import TaskState
from control_plane.tasks.ports import TaskStore
from modelyard.rpc.reasons import Reason
from modelyard.v1.task_queue_pb2 import TaskNotice


def notice_type(state: TaskState) -> str:
    """ "task.succeeded", "task.failed", "task.cancelled" or "task.expired"."""
    return f"task.{state.name.lower()}"


class Notices:
    """Writes them."""

    def __init__(self, store: TaskStore) -> None:
        self._store = store

    async def render(self, delivery: DeliveryRecord) -> bytes | None:
        """The body of a delivery; None if the task is gone, or no longer in the end that it tells of.

        Raises DomainError STORE_UNAVAILABLE.
        """
        try:
            full = await self._store.get(delivery.tenant, delivery.task_id)
        except DomainError as error:
            if error.reason == Reason.UNKNOWN_TASK:
                return None
            raise
        if full.record.epoch != delivery.epoch or full.record.state is not delivery.task_state:
            return None
        notice = TaskNotice(type=notice_type(delivery.task_state), task=task_convert.finished_task(full))
        task_convert.set_timestamp(notice.timestamp, delivery.created_at)
        return json_format.MessageToJson(notice, indent=None, ensure_ascii=False).encode()
