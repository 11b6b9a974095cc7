from google.protobuf import duration_pb2 as _duration_pb2
from modelyard.v1 import generation_pb2 as _generation_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Ticket(_message.Message):
    __slots__ = ("id", "orchestrator_id", "server_id", "instance_id", "lease_epoch", "model", "request_id", "expires_at", "relayed")
    ID_FIELD_NUMBER: _ClassVar[int]
    ORCHESTRATOR_ID_FIELD_NUMBER: _ClassVar[int]
    SERVER_ID_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    LEASE_EPOCH_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_AT_FIELD_NUMBER: _ClassVar[int]
    RELAYED_FIELD_NUMBER: _ClassVar[int]
    id: int
    orchestrator_id: str
    server_id: str
    instance_id: str
    lease_epoch: int
    model: str
    request_id: str
    expires_at: _duration_pb2.Duration
    relayed: bool
    def __init__(self, id: _Optional[int] = ..., orchestrator_id: _Optional[str] = ..., server_id: _Optional[str] = ..., instance_id: _Optional[str] = ..., lease_epoch: _Optional[int] = ..., model: _Optional[str] = ..., request_id: _Optional[str] = ..., expires_at: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., relayed: bool = ...) -> None: ...

class TicketReport(_message.Message):
    __slots__ = ("required", "orchestrator_id", "outcomes", "in_use", "as_of")
    REQUIRED_FIELD_NUMBER: _ClassVar[int]
    ORCHESTRATOR_ID_FIELD_NUMBER: _ClassVar[int]
    OUTCOMES_FIELD_NUMBER: _ClassVar[int]
    IN_USE_FIELD_NUMBER: _ClassVar[int]
    AS_OF_FIELD_NUMBER: _ClassVar[int]
    required: bool
    orchestrator_id: str
    outcomes: _containers.RepeatedCompositeFieldContainer[TicketOutcome]
    in_use: _containers.RepeatedScalarFieldContainer[int]
    as_of: _duration_pb2.Duration
    def __init__(self, required: bool = ..., orchestrator_id: _Optional[str] = ..., outcomes: _Optional[_Iterable[_Union[TicketOutcome, _Mapping]]] = ..., in_use: _Optional[_Iterable[int]] = ..., as_of: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class TicketOutcome(_message.Message):
    __slots__ = ("sequence", "ticket_id", "result", "failure_reason", "tokens_until_failure")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    TICKET_ID_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    FAILURE_REASON_FIELD_NUMBER: _ClassVar[int]
    TOKENS_UNTIL_FAILURE_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    ticket_id: int
    result: _generation_pb2.GenerationResult
    failure_reason: str
    tokens_until_failure: int
    def __init__(self, sequence: _Optional[int] = ..., ticket_id: _Optional[int] = ..., result: _Optional[_Union[_generation_pb2.GenerationResult, _Mapping]] = ..., failure_reason: _Optional[str] = ..., tokens_until_failure: _Optional[int] = ...) -> None: ...

class TicketDirective(_message.Message):
    __slots__ = ("key", "clock", "acknowledged", "since_epoch")
    KEY_FIELD_NUMBER: _ClassVar[int]
    CLOCK_FIELD_NUMBER: _ClassVar[int]
    ACKNOWLEDGED_FIELD_NUMBER: _ClassVar[int]
    SINCE_EPOCH_FIELD_NUMBER: _ClassVar[int]
    key: bytes
    clock: _duration_pb2.Duration
    acknowledged: int
    since_epoch: int
    def __init__(self, key: _Optional[bytes] = ..., clock: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., acknowledged: _Optional[int] = ..., since_epoch: _Optional[int] = ...) -> None: ...
