"""Why a request was refused: the error table of modelyard/v1/orchestrator.proto as code.

A test holds this module and that table equal, both ways.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType

import grpc

DOMAIN = "modelyard"
"""`google.rpc.ErrorInfo.domain` of every status made by modelyard."""


class Reason(StrEnum):
    """`google.rpc.ErrorInfo.reason`. Causes and cures stand in the contract's table."""

    INVALID_REQUEST = "INVALID_REQUEST"
    CONTEXT_TOO_LONG = "CONTEXT_TOO_LONG"
    UNKNOWN_MODEL = "UNKNOWN_MODEL"
    UNKNOWN_SERVER = "UNKNOWN_SERVER"
    UNKNOWN_TASK = "UNKNOWN_TASK"
    UNKNOWN_BELIEF = "UNKNOWN_BELIEF"
    UNKNOWN_REQUEST = "UNKNOWN_REQUEST"
    UNKNOWN_AGENT = "UNKNOWN_AGENT"
    UNKNOWN_ASSIGNMENT = "UNKNOWN_ASSIGNMENT"
    IDEMPOTENCY_CONFLICT = "IDEMPOTENCY_CONFLICT"
    NO_CAPABLE_SERVER = "NO_CAPABLE_SERVER"
    NO_CAPABLE_AGENT = "NO_CAPABLE_AGENT"
    CONTENT_REFUSED = "CONTENT_REFUSED"
    WRONG_STATE = "WRONG_STATE"
    QUEUE_FULL = "QUEUE_FULL"
    AGENTS_BUSY = "AGENTS_BUSY"
    TOO_MANY_AGENTS = "TOO_MANY_AGENTS"
    BUDGET_EXHAUSTED = "BUDGET_EXHAUSTED"
    SLOW_READER = "SLOW_READER"
    SERVER_BUSY = "SERVER_BUSY"
    RATE_LIMITED = "RATE_LIMITED"
    OUT_OF_MEMORY = "OUT_OF_MEMORY"
    STORE_FULL = "STORE_FULL"
    FLEET_WARMING_UP = "FLEET_WARMING_UP"
    SERVERS_AWAY = "SERVERS_AWAY"
    DRAINING = "DRAINING"
    ATTEMPTS_EXHAUSTED = "ATTEMPTS_EXHAUSTED"
    STREAM_BROKEN = "STREAM_BROKEN"
    ENGINE_FAILED = "ENGINE_FAILED"
    CREDENTIALS_REJECTED = "CREDENTIALS_REJECTED"
    STORE_UNAVAILABLE = "STORE_UNAVAILABLE"
    LEASE_LOST = "LEASE_LOST"
    QUEUE_TIMEOUT = "QUEUE_TIMEOUT"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    UNSUPPORTED = "UNSUPPORTED"
    TICKET_REFUSED = "TICKET_REFUSED"
    SUPERSEDED = "SUPERSEDED"
    INTERNAL = "INTERNAL"


CODES: Mapping[Reason, grpc.StatusCode] = MappingProxyType(
    {
        Reason.INVALID_REQUEST: grpc.StatusCode.INVALID_ARGUMENT,
        Reason.CONTEXT_TOO_LONG: grpc.StatusCode.INVALID_ARGUMENT,
        Reason.UNKNOWN_MODEL: grpc.StatusCode.NOT_FOUND,
        Reason.UNKNOWN_SERVER: grpc.StatusCode.NOT_FOUND,
        Reason.UNKNOWN_TASK: grpc.StatusCode.NOT_FOUND,
        Reason.UNKNOWN_BELIEF: grpc.StatusCode.NOT_FOUND,
        Reason.UNKNOWN_REQUEST: grpc.StatusCode.NOT_FOUND,
        Reason.UNKNOWN_AGENT: grpc.StatusCode.NOT_FOUND,
        Reason.UNKNOWN_ASSIGNMENT: grpc.StatusCode.NOT_FOUND,
        Reason.IDEMPOTENCY_CONFLICT: grpc.StatusCode.ALREADY_EXISTS,
        Reason.NO_CAPABLE_SERVER: grpc.StatusCode.FAILED_PRECONDITION,
        Reason.NO_CAPABLE_AGENT: grpc.StatusCode.FAILED_PRECONDITION,
        Reason.CONTENT_REFUSED: grpc.StatusCode.FAILED_PRECONDITION,
        Reason.WRONG_STATE: grpc.StatusCode.FAILED_PRECONDITION,
        Reason.QUEUE_FULL: grpc.StatusCode.RESOURCE_EXHAUSTED,
        Reason.AGENTS_BUSY: grpc.StatusCode.RESOURCE_EXHAUSTED,
        Reason.TOO_MANY_AGENTS: grpc.StatusCode.RESOURCE_EXHAUSTED,
        Reason.BUDGET_EXHAUSTED: grpc.StatusCode.RESOURCE_EXHAUSTED,
        Reason.SLOW_READER: grpc.StatusCode.RESOURCE_EXHAUSTED,
        Reason.SERVER_BUSY: grpc.StatusCode.RESOURCE_EXHAUSTED,
        Reason.RATE_LIMITED: grpc.StatusCode.RESOURCE_EXHAUSTED,
        Reason.OUT_OF_MEMORY: grpc.StatusCode.RESOURCE_EXHAUSTED,
        Reason.STORE_FULL: grpc.StatusCode.RESOURCE_EXHAUSTED,
        Reason.FLEET_WARMING_UP: grpc.StatusCode.UNAVAILABLE,
        Reason.SERVERS_AWAY: grpc.StatusCode.UNAVAILABLE,
        Reason.DRAINING: grpc.StatusCode.UNAVAILABLE,
        Reason.ATTEMPTS_EXHAUSTED: grpc.StatusCode.UNAVAILABLE,
        Reason.STREAM_BROKEN: grpc.StatusCode.UNAVAILABLE,
        Reason.ENGINE_FAILED: grpc.StatusCode.UNAVAILABLE,
        Reason.CREDENTIALS_REJECTED: grpc.StatusCode.UNAVAILABLE,
        Reason.STORE_UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
        Reason.LEASE_LOST: grpc.StatusCode.UNAVAILABLE,
        Reason.QUEUE_TIMEOUT: grpc.StatusCode.DEADLINE_EXCEEDED,
        Reason.DEADLINE_EXCEEDED: grpc.StatusCode.DEADLINE_EXCEEDED,
        Reason.UNSUPPORTED: grpc.StatusCode.UNIMPLEMENTED,
        Reason.TICKET_REFUSED: grpc.StatusCode.UNAUTHENTICATED,
        Reason.SUPERSEDED: grpc.StatusCode.ABORTED,
        Reason.INTERNAL: grpc.StatusCode.INTERNAL,
    }
)
