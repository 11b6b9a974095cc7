"""What can go wrong, as exceptions.

    ModelyardError                 reason, message, request_id, retry_after, partial
    +-- InvalidRequest             mend the fields in .violations
    |   +-- InvalidArgument        the argument is out of range (a ValueError, too); nothing was sent
    |   +-- ContextTooLong         shorten the prompt, or choose a longer context
    +-- ContentRefused             the provider will not answer this
    +-- UnknownModel               choose one of those named
    +-- UnknownServer              see Client.servers()
    +-- UnknownTask                see Client.tasks.list()
    +-- UnknownBelief              no fact has this key
    +-- UnknownRequest             no such answer to be judged
    +-- UnknownAgent               register it; see Client.agents.list()
    +-- UnknownAssignment          it ended long ago
    +-- IdempotencyConflict        the key names another task: choose another key
    +-- WrongState                 the task's state forbids it: cancel or retry it first
    +-- TaskFailed                 a durable task did not succeed; .task says why
    +-- NoCapableServer            relax what the nearest miss names
    +-- NoCapableAgent             relax what the nearest miss names
    +-- TooManyAgents              unregister those that are not needed
    +-- Unsupported                choose another model
    +-- BudgetExhausted            until .retry_after only free models answer
    +-- TryAgain                   nothing was generated; waiting may help (see .retry_after)
    |   +-- QueueFull
    |   +-- AgentsBusy             every capable agent is full or away
    |   +-- ServerBusy
    |   +-- RateLimited            the provider limits the rate
    |   +-- OutOfMemory            unload another model
    |   +-- StoreFull              free space on the database's disk
    |   +-- StoreUnavailable       the database does not answer
    |   +-- FleetWarmingUp
    |   +-- ServersAway
    |   +-- Draining
    |   +-- AttemptsExhausted
    |   +-- EngineFailed
    |   +-- CredentialsRejected    mend the model server's key
    |   +-- TicketRefused          the model server does not take the ticket of a direct call
    |   +-- ConnectionFailed       no control plane answers
    +-- LeaseLost                  of an attempt: its control plane was gone; the task runs again
    +-- StreamBroken               the answer broke off; .partial has what came
    +-- SlowReader                 read faster, or ask for less
    +-- TimedOut
    |   +-- QueueTimeout           raise the priority, add hosts
    |   +-- DeadlineExceeded       allow more time
    +-- Superseded                 a newer instance has this server id
    +-- Cancelled                  cancelled from this side
    +-- InternalError              a bug in modelyard: report it with the request id

Wrong arguments (a misspelt task type, a message without a role) raise ValueError or TypeError
before anything is sent.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import grpc

from modelyard.rpc.channels import MAX_MESSAGE_BYTES
from modelyard.rpc.errors import Refusal, from_rpc_error
from modelyard.rpc.reasons import Reason

if TYPE_CHECKING:
    from modelyard.client._task_types import Task
    from modelyard.client._types import GenerationResult

REQUEST_ID_KEY = "modelyard-request-id"

FOREIGN_PEER = "no control plane"
"""`metadata["peer"]` of Unsupported where not the model lacks something, but what answers is no control plane."""

_LOST_STATUS = "Internal error from Core"
"""What gRPC's library says, whatever the peer said, where a write meets the end of its stream."""

_TOO_LARGE = re.compile(r"message larger than max \((\d+) vs\. (\d+)\)")
"""gRPC's own words, after "Sent" or "Received"."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One malformed field of a request."""

    field: str
    """Path in the request, for example "input.messages[2].role"."""
    description: str


class ModelyardError(Exception):
    """Base of everything that the client raises for a call that failed."""

    default_reason: ClassVar[str] = "INTERNAL"

    def __init__(
        self,
        message: str,
        *,
        reason: str | None = None,
        request_id: str = "",
        retry_after: float | None = None,
        violations: tuple[FieldViolation, ...] = (),
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason or self.default_reason
        """As in the contract's error table, or CONNECTION_FAILED or CANCELLED."""
        self.request_id = request_id
        """To find the request in the logs; may be empty."""
        self.retry_after = retry_after
        """Seconds after which a retry may help, if the control plane said so."""
        self.violations = violations
        """The malformed fields, of InvalidRequest only."""
        self.metadata: Mapping[str, str] = dict(metadata or {})
        """Details, such as what each attempt failed with."""
        self.partial: GenerationResult | None = None
        """What had arrived of the answer when it failed; None if nothing had."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON. Without `partial`."""
        return {
            "reason": self.reason,
            "message": self.message,
            "request_id": self.request_id,
            "retry_after": self.retry_after,
            "violations": [{"field": v.field, "description": v.description} for v in self.violations],
            "metadata": dict(self.metadata),
        }


class InvalidRequest(ModelyardError):
    """A field is missing or malformed: mend those in `violations`."""

    default_reason = "INVALID_REQUEST"


class InvalidArgument(InvalidRequest, ValueError):
    """An argument that no message can hold, found before anything was sent."""

    def __init__(self, argument: str, description: str) -> None:
        super().__init__(f"{argument}: {description}", violations=(FieldViolation(argument, description),))


class ContextTooLong(InvalidRequest):
    """Prompt and answer do not fit: shorten them, or choose a model with a longer context."""

    default_reason = "CONTEXT_TOO_LONG"


class ContentRefused(ModelyardError):
    """The provider will not answer this: reword it, or choose another provider."""

    default_reason = "CONTENT_REFUSED"


class UnknownModel(ModelyardError):
    """No such model: choose one of those named."""

    default_reason = "UNKNOWN_MODEL"


class UnknownServer(ModelyardError):
    """No such model server: see `Client.servers`."""

    default_reason = "UNKNOWN_SERVER"


class UnknownTask(ModelyardError):
    """No such task, or one of another tenant: see `Client.tasks.list`."""

    default_reason = "UNKNOWN_TASK"


class UnknownBelief(ModelyardError):
    """No fact has this key."""

    default_reason = "UNKNOWN_BELIEF"


class UnknownRequest(ModelyardError):
    """No such answer, or it is too long ago to be judged."""

    default_reason = "UNKNOWN_REQUEST"


class UnknownAgent(ModelyardError):
    """There is no such agent: register it, or see `Client.agents.list()`."""

    default_reason = "UNKNOWN_AGENT"


class UnknownAssignment(ModelyardError):
    """There is no such assignment, or it ended long ago."""

    default_reason = "UNKNOWN_ASSIGNMENT"


class NoCapableAgent(ModelyardError):
    """No registered agent can ever do the task: relax what the nearest miss names."""

    default_reason = "NO_CAPABLE_AGENT"


class TooManyAgents(ModelyardError):
    """The tenant has too many agents: unregister those that are not needed."""

    default_reason = "TOO_MANY_AGENTS"


class IdempotencyConflict(ModelyardError):
    """The idempotency key names another task: choose another key. `metadata` has "task_id" and "differing"."""

    default_reason = "IDEMPOTENCY_CONFLICT"


class WrongState(ModelyardError):
    """The task's state forbids it: cancel it first, or retry it."""

    default_reason = "WRONG_STATE"


class NoCapableServer(ModelyardError):
    """No server can ever serve the request: relax what the nearest miss names."""

    default_reason = "NO_CAPABLE_SERVER"


class Unsupported(ModelyardError):
    """The engine lacks a feature: choose another model."""

    default_reason = "UNSUPPORTED"


class TryAgain(ModelyardError):
    """Nothing was generated, and the same request may succeed later: see `retry_after`."""


class QueueFull(TryAgain):
    """Too many requests are waiting: retry, lower the rate."""

    default_reason = "QUEUE_FULL"


class BudgetExhausted(ModelyardError):
    """The tenant's budget is used up; free models still answer. `retry_after` is when its window ends, which may be
    weeks: nothing is tried again by itself. See `Client.usage`."""

    default_reason = "BUDGET_EXHAUSTED"


class AgentsBusy(TryAgain):
    """Every capable agent is full or away."""

    default_reason = "AGENTS_BUSY"


class ServerBusy(TryAgain):
    """The model server is full."""

    default_reason = "SERVER_BUSY"


class RateLimited(TryAgain):
    """The provider limits the rate of requests."""

    default_reason = "RATE_LIMITED"


class OutOfMemory(TryAgain):
    """The model does not fit beside those in memory: unload one of them, or add memory."""

    default_reason = "OUT_OF_MEMORY"


class StoreFull(TryAgain):
    """The disk of the database is full: free space. Nothing was written, nothing else is lost."""

    default_reason = "STORE_FULL"


class StoreUnavailable(TryAgain):
    """The database does not answer."""

    default_reason = "STORE_UNAVAILABLE"


class FleetWarmingUp(TryAgain):
    """Servers are still coming up: it is not known yet what the fleet can do."""

    default_reason = "FLEET_WARMING_UP"


class ServersAway(TryAgain):
    """All servers that could answer are away."""

    default_reason = "SERVERS_AWAY"


class Draining(TryAgain):
    """The control plane is shutting down: use another replica."""

    default_reason = "DRAINING"


class AttemptsExhausted(TryAgain):
    """Every attempt on every server failed: see `metadata`."""

    default_reason = "ATTEMPTS_EXHAUSTED"


class EngineFailed(TryAgain):
    """The engine failed; another server may do."""

    default_reason = "ENGINE_FAILED"


class CredentialsRejected(TryAgain):
    """The provider refuses the model server's key: mend it there."""

    default_reason = "CREDENTIALS_REJECTED"


class TicketRefused(TryAgain):
    """The model server does not take the ticket of a direct call: it is new, or its control plane is."""

    default_reason = "TICKET_REFUSED"


class ConnectionFailed(TryAgain):
    """No control plane answers at the address."""

    default_reason = "CONNECTION_FAILED"


class LeaseLost(ModelyardError):
    """Of an attempt: the control plane that ran it was gone. The task runs again by itself."""

    default_reason = "LEASE_LOST"


class StreamBroken(ModelyardError):
    """The answer broke off; `partial` has what came. Send the request again for a whole one."""

    default_reason = "STREAM_BROKEN"


class SlowReader(ModelyardError):
    """The stream was not read: read faster, or ask for less."""

    default_reason = "SLOW_READER"


class TimedOut(ModelyardError):
    """Time ran out."""


class QueueTimeout(TimedOut):
    """The request waited too long in the queue: retry, raise the priority, add hosts."""

    default_reason = "QUEUE_TIMEOUT"


class DeadlineExceeded(TimedOut):
    """The timeout of the call passed: allow more time."""

    default_reason = "DEADLINE_EXCEEDED"


class Superseded(ModelyardError):
    """A newer instance has this server id."""

    default_reason = "SUPERSEDED"


class Cancelled(ModelyardError):
    """The call was cancelled from this side."""

    default_reason = "CANCELLED"


class TaskFailed(ModelyardError):
    """A durable task failed, expired or was cancelled: `task` says which, `reason` why."""

    default_reason = "TASK_FAILED"

    def __init__(self, message: str, *, task: Task, reason: str | None = None) -> None:
        super().__init__(message, reason=reason)
        self.task = task


class InternalError(ModelyardError):
    """A bug in modelyard: report it with the request id."""

    default_reason = "INTERNAL"


BY_REASON: Mapping[Reason, type[ModelyardError]] = {
    Reason.INVALID_REQUEST: InvalidRequest,
    Reason.CONTEXT_TOO_LONG: ContextTooLong,
    Reason.UNKNOWN_MODEL: UnknownModel,
    Reason.UNKNOWN_SERVER: UnknownServer,
    Reason.UNKNOWN_TASK: UnknownTask,
    Reason.UNKNOWN_BELIEF: UnknownBelief,
    Reason.UNKNOWN_REQUEST: UnknownRequest,
    Reason.UNKNOWN_AGENT: UnknownAgent,
    Reason.UNKNOWN_ASSIGNMENT: UnknownAssignment,
    Reason.NO_CAPABLE_AGENT: NoCapableAgent,
    Reason.AGENTS_BUSY: AgentsBusy,
    Reason.TOO_MANY_AGENTS: TooManyAgents,
    Reason.IDEMPOTENCY_CONFLICT: IdempotencyConflict,
    Reason.WRONG_STATE: WrongState,
    Reason.NO_CAPABLE_SERVER: NoCapableServer,
    Reason.CONTENT_REFUSED: ContentRefused,
    Reason.QUEUE_FULL: QueueFull,
    Reason.BUDGET_EXHAUSTED: BudgetExhausted,
    Reason.SLOW_READER: SlowReader,
    Reason.SERVER_BUSY: ServerBusy,
    Reason.RATE_LIMITED: RateLimited,
    Reason.OUT_OF_MEMORY: OutOfMemory,
    Reason.STORE_FULL: StoreFull,
    Reason.STORE_UNAVAILABLE: StoreUnavailable,
    Reason.LEASE_LOST: LeaseLost,
    Reason.FLEET_WARMING_UP: FleetWarmingUp,
    Reason.SERVERS_AWAY: ServersAway,
    Reason.DRAINING: Draining,
    Reason.ATTEMPTS_EXHAUSTED: AttemptsExhausted,
    Reason.STREAM_BROKEN: StreamBroken,
    Reason.ENGINE_FAILED: EngineFailed,
    Reason.CREDENTIALS_REJECTED: CredentialsRejected,
    Reason.QUEUE_TIMEOUT: QueueTimeout,
    Reason.DEADLINE_EXCEEDED: DeadlineExceeded,
    Reason.UNSUPPORTED: Unsupported,
    Reason.TICKET_REFUSED: TicketRefused,
    Reason.SUPERSEDED: Superseded,
    Reason.INTERNAL: InternalError,
}


def parsed(message: T | None) -> T:
    """A message of the control plane. gRPC gives None for one that does not parse: raises InternalError."""
    if message is None:
        raise InternalError("the control plane sent a message that does not parse")
    return message


def from_call(error: grpc.RpcError, *, address: str, request_id: str = "", started: bool = False) -> ModelyardError:
    """The exception for a failed call; `started` if some of its answer had arrived."""
    refusal = from_rpc_error(error)
    request_id = refusal.metadata.get("request_id") or _request_id(error) or request_id
    if refusal.transport and (unanswered := _unanswered(refusal, address, started)):
        unanswered.request_id = request_id
        return unanswered
    return BY_REASON[refusal.reason](
        refusal.message,
        request_id=request_id,
        retry_after=refusal.retry_after,
        violations=tuple(FieldViolation(v.field, v.description) for v in refusal.violations),
        metadata=refusal.metadata,
    )


def _unanswered(refusal: Refusal, address: str, started: bool) -> ModelyardError | None:
    """Failures of which the transport tells less than we know; None for the others."""
    code = refusal.code
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and (sizes := _TOO_LARGE.search(refusal.message)):
        return _too_large(int(sizes[1]), int(sizes[2]))
    if refusal.message == _LOST_STATUS:
        return StreamBroken(f"the connection to {address} broke")
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineExceeded("the timeout of the call passed")
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return Unsupported(
            f"what answers at {address} is not a modelyard control plane of this version",
            metadata={"peer": FOREIGN_PEER},
        )
    if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.UNKNOWN):
        # gRPC strings whole histories together; the last piece is the cause.
        cause = refusal.message.rsplit(": ", 1)[-1]
        if started:
            return StreamBroken(f"the connection to {address} broke: {cause}")
        return ConnectionFailed(f"no control plane answers at {address} ({cause}): start one with `modelyard up`")
    return None


def _too_large(size: int, most: int) -> ModelyardError:
    """Of a message that gRPC refused before anybody has seen it."""
    if most == MAX_MESSAGE_BYTES:  # the limit of both directions on this side
        return InvalidRequest(
            f"a message of {size:,} bytes is too large, one may have {most:,}: ask for less at once, or for the answer "
            "with `stream`"
        )
    return InvalidRequest(
        f"the request has {size:,} bytes, and the control plane takes about {most >> 20} MiB (its setting "
        "limits.max_request_bytes): shorten the prompt, or send less with it"
    )


def _request_id(error: Any) -> str:
    """From the trailing metadata, which come with the status: grpc.aio forgets the initial ones of a stream where the
    status is dealt with first."""
    for key, value in error.trailing_metadata() or ():
        if key == REQUEST_ID_KEY:
            return str(value)
    return ""
