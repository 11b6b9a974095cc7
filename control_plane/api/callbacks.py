"""The methods of the TaskQueue service about callbacks: parse -> call -> render."""

from __future__ import annotations

import base64
import binascii
import json
from typing import TYPE_CHECKING

import grpc

from control_plane.api.metrics import Metrics
from control_plane.api.notices import notice_type
from control_plane.api.orchestrator import served
from control_plane.api.task_convert import set_timestamp
from control_plane.api.tenant import tenant_of
from control_plane.tasks.callbacks import CallbackState, DeliveryRecord, without_query
from modelyard.rpc.errors import Refusal, Violation, invalid
from modelyard.rpc.reasons import Reason
from modelyard.v1 import task_queue_pb2

if TYPE_CHECKING:
    from control_plane.tasks.deliveries import Deliveries

MAX_ID_CHARACTERS = 100
_STATES = frozenset(task_queue_pb2.CallbackState.values())
_PAGE, _MOST_PAGE = 100, 1000


class CallbackMethods:
    """Part of the servicer."""

    metrics: Metrics
    deliveries: Deliveries | None = None
    """None: this control plane keeps no tasks."""

    def _deliveries(self) -> Deliveries:
        if self.deliveries is None:
            raise Refusal(Reason.UNSUPPORTED, "this control plane keeps no tasks (setting tasks.store)")
        return self.deliveries

    @served
    async def ListCallbacks(
        self, request: task_queue_pb2.ListCallbacksRequest, context: grpc.aio.ServicerContext
    ) -> task_queue_pb2.ListCallbacksResponse:
        tenant = tenant_of(context)
        violations = _check_id(request.task_id, "task_id")
        if not 0 <= request.page_size <= _MOST_PAGE:
            violations.append(Violation("page_size", f"must be 0 to {_MOST_PAGE}"))
        states = sorted({state for state in request.states if state})
        if unknown := [state for state in states if state not in _STATES]:
            violations.append(Violation("states", f"unknown value {unknown[0]}"))
        conditions: list[object] = [states, request.task_id]
        before = _before(request.page_token, conditions, violations)
        if violations:
            raise invalid(violations)
        size = request.page_size or _PAGE
        found = await self._deliveries().page(
            tenant, [CallbackState(state) for state in states], request.task_id, size + 1, before
        )
        token = _token(conditions, found[size - 1].id) if len(found) > size else ""
        return task_queue_pb2.ListCallbacksResponse(callbacks=map(rendered, found[:size]), next_page_token=token)

    @served
    async def ResendCallback(
        self, request: task_queue_pb2.ResendCallbackRequest, context: grpc.aio.ServicerContext
    ) -> task_queue_pb2.ResendCallbackResponse:
        tenant = tenant_of(context)
        violations = _check_id(request.id, "id") if request.id else [Violation("id", "is required")]
        if violations:
            raise invalid(violations)
        return task_queue_pb2.ResendCallbackResponse(
            callback=rendered(await self._deliveries().resend(tenant, request.id))
        )


def _check_id(id: str, field: str) -> list[Violation]:
    if len(id) > MAX_ID_CHARACTERS or not (id.isascii() and id.isprintable()):
        return [Violation(field, f"must be at most {MAX_ID_CHARACTERS} printable ASCII characters")]
    return []


def _token(conditions: list[object], id: str) -> str:
    return base64.urlsafe_b64encode(json.dumps([conditions, id]).encode()).decode()


def _before(token: str, conditions: list[object], violations: list[Violation]) -> str:
    if not token:
        return ""
    try:
        of, id = json.loads(base64.b64decode(token.encode("ascii"), altchars=b"-_", validate=True))
        if of == conditions and isinstance(id, str) and not _check_id(id, "page_token"):
            return id
    except (binascii.Error, ValueError, TypeError, RecursionError):
        pass
    violations.append(Violation("page_token", "does not belong to these conditions"))
    return ""


def rendered(record: DeliveryRecord) -> task_queue_pb2.CallbackDelivery:
    """A callback as the contract has it."""
    message = task_queue_pb2.CallbackDelivery(
        id=record.id,
        task_id=record.task_id,
        type=notice_type(record.task_state),
        url=without_query(record.url),
        state=record.state.value,  # type: ignore[arg-type]
        attempt_count=record.attempts,
        failure_message=record.failure,
    )
    set_timestamp(message.created_at, record.created_at)
    if record.state is CallbackState.PENDING:
        set_timestamp(message.next_attempt_at, record.due_at)
    if record.finished_at is not None:
        set_timestamp(message.finished_at, record.finished_at)
    return message
