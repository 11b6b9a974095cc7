"""Refusals in OpenAI's words: HTTP status, and the body `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

from modelyard.openai.wire import ErrorBody
from modelyard.rpc.errors import Refusal, Violation, invalid
from modelyard.rpc.reasons import Reason


class _Shape(NamedTuple):
    status: int
    type: str
    code: str


_BAD, _BUSY, _DOWN = "invalid_request_error", "rate_limit_error", "server_error"

# Client libraries send a request again after 408, 409, 429 and 5xx: what no repetition can mend is
# 400 or 404. That a provider refuses the fleet's key is no fault of the caller's: not 401.
_SHAPES: Mapping[Reason, _Shape] = MappingProxyType(
    {
        Reason.INVALID_REQUEST: _Shape(400, _BAD, "invalid_request"),
        Reason.CONTEXT_TOO_LONG: _Shape(400, _BAD, "context_length_exceeded"),
        Reason.UNKNOWN_MODEL: _Shape(404, _BAD, "model_not_found"),
        Reason.UNKNOWN_SERVER: _Shape(404, _BAD, "server_not_found"),
        Reason.UNKNOWN_TASK: _Shape(404, _BAD, "task_not_found"),
        Reason.UNKNOWN_BELIEF: _Shape(404, _BAD, "belief_not_found"),
        Reason.UNKNOWN_REQUEST: _Shape(404, _BAD, "request_not_found"),
        Reason.UNKNOWN_AGENT: _Shape(404, _BAD, "agent_not_found"),
        Reason.UNKNOWN_ASSIGNMENT: _Shape(404, _BAD, "assignment_not_found"),
        Reason.NO_CAPABLE_AGENT: _Shape(400, _BAD, "no_capable_agent"),
        Reason.TOO_MANY_AGENTS: _Shape(400, _BAD, "too_many_agents"),
        Reason.AGENTS_BUSY: _Shape(429, _BUSY, "agents_busy"),
        Reason.IDEMPOTENCY_CONFLICT: _Shape(400, _BAD, "idempotency_conflict"),
        Reason.WRONG_STATE: _Shape(400, _BAD, "wrong_state"),
        Reason.NO_CAPABLE_SERVER: _Shape(400, _BAD, "no_capable_server"),
        Reason.CONTENT_REFUSED: _Shape(400, _BAD, "content_policy_violation"),
        Reason.UNSUPPORTED: _Shape(400, _BAD, "unsupported"),
        Reason.QUEUE_FULL: _Shape(429, _BUSY, "queue_full"),
        Reason.BUDGET_EXHAUSTED: _Shape(429, "insufficient_quota", "insufficient_quota"),
        Reason.SERVER_BUSY: _Shape(429, _BUSY, "server_busy"),
        Reason.RATE_LIMITED: _Shape(429, _BUSY, "rate_limit_exceeded"),
        Reason.SLOW_READER: _Shape(408, _BAD, "slow_reader"),
        Reason.OUT_OF_MEMORY: _Shape(503, _DOWN, "out_of_memory"),
        Reason.STORE_FULL: _Shape(503, _DOWN, "store_full"),
        Reason.STORE_UNAVAILABLE: _Shape(503, _DOWN, "store_unavailable"),
        Reason.LEASE_LOST: _Shape(503, _DOWN, "lease_lost"),
        Reason.FLEET_WARMING_UP: _Shape(503, _DOWN, "fleet_warming_up"),
        Reason.SERVERS_AWAY: _Shape(503, _DOWN, "servers_away"),
        Reason.DRAINING: _Shape(503, _DOWN, "draining"),
        Reason.ATTEMPTS_EXHAUSTED: _Shape(503, _DOWN, "attempts_exhausted"),
        Reason.STREAM_BROKEN: _Shape(503, _DOWN, "stream_broken"),
        Reason.ENGINE_FAILED: _Shape(503, _DOWN, "engine_failed"),
        Reason.CREDENTIALS_REJECTED: _Shape(503, _DOWN, "credentials_rejected"),
        Reason.QUEUE_TIMEOUT: _Shape(504, _DOWN, "queue_timeout"),
        Reason.DEADLINE_EXCEEDED: _Shape(504, _DOWN, "deadline_exceeded"),
        Reason.TICKET_REFUSED: _Shape(503, _DOWN, "ticket_refused"),
        Reason.SUPERSEDED: _Shape(500, _DOWN, "superseded"),
        Reason.INTERNAL: _Shape(500, _DOWN, "internal_error"),
    }
)


@dataclass(frozen=True, slots=True)
class Failure:
    """A refusal, ready to be sent."""

    status: int
    body: ErrorBody
    reason: Reason
    retry_after: float | None = None
    """Seconds."""


class HttpRefusal(Refusal):
    """A request that HTTP itself has a status for, such as 405 or 413."""

    def __init__(self, status: int, message: str, headers: tuple[tuple[bytes, bytes], ...] = ()) -> None:
        super().__init__(Reason.INVALID_REQUEST, message)
        self.status = status
        self.headers = headers


def refuse(param: str, description: str) -> Refusal:
    """The refusal of one field of a request."""
    return invalid([Violation(param, description)])


def failure(refusal: Refusal, rename: Callable[[str], str] | None = None) -> Failure:
    """The failure to send. `rename` turns a path of the contract into one of the request as it was sent."""
    shape = _SHAPES[refusal.reason]
    message, param = refusal.message, None
    if refusal.violations:
        if rename is not None:
            renamed = [Violation(rename(found.field), found.description) for found in refusal.violations]
            message = invalid(renamed).message
            param = renamed[0].field
        else:
            param = refusal.violations[0].field
    elif refusal.reason in (Reason.UNKNOWN_MODEL, Reason.CONTEXT_TOO_LONG):
        param = "model" if refusal.reason is Reason.UNKNOWN_MODEL else "messages"
    status, code = shape.status, shape.code
    if isinstance(refusal, HttpRefusal):
        status = refusal.status
        code = _HTTP_CODES.get(status, code)
    body = ErrorBody(message=message, type=shape.type, param=param, code=code)
    return Failure(status, body, refusal.reason, refusal.retry_after)


_HTTP_CODES = {
    404: "unknown_url",
    405: "method_not_allowed",
    408: "request_timeout",
    413: "request_too_large",
    415: "unsupported_media_type",
}
