from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from modelyard.v1 import fleet_pb2 as _fleet_pb2
from modelyard.v1 import generation_pb2 as _generation_pb2
from modelyard.v1 import selection_pb2 as _selection_pb2
from modelyard.v1 import task_pb2 as _task_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ReportFeedbackRequest(_message.Message):
    __slots__ = ("request_id", "score")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    score: float
    def __init__(self, request_id: _Optional[str] = ..., score: _Optional[float] = ...) -> None: ...

class ReportFeedbackResponse(_message.Message):
    __slots__ = ("counted",)
    COUNTED_FIELD_NUMBER: _ClassVar[int]
    counted: bool
    def __init__(self, counted: bool = ...) -> None: ...

class GenerateRequest(_message.Message):
    __slots__ = ("input", "task_type", "priority", "requirements", "explain", "request_id", "preset", "unused_ticket", "failed_server_ids")
    INPUT_FIELD_NUMBER: _ClassVar[int]
    TASK_TYPE_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    REQUIREMENTS_FIELD_NUMBER: _ClassVar[int]
    EXPLAIN_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    PRESET_FIELD_NUMBER: _ClassVar[int]
    UNUSED_TICKET_FIELD_NUMBER: _ClassVar[int]
    FAILED_SERVER_IDS_FIELD_NUMBER: _ClassVar[int]
    input: _generation_pb2.GenerationInput
    task_type: _task_pb2.TaskType
    priority: _task_pb2.TaskPriority
    requirements: _selection_pb2.Requirements
    explain: bool
    request_id: str
    preset: str
    unused_ticket: bytes
    failed_server_ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, input: _Optional[_Union[_generation_pb2.GenerationInput, _Mapping]] = ..., task_type: _Optional[_Union[_task_pb2.TaskType, str]] = ..., priority: _Optional[_Union[_task_pb2.TaskPriority, str]] = ..., requirements: _Optional[_Union[_selection_pb2.Requirements, _Mapping]] = ..., explain: bool = ..., request_id: _Optional[str] = ..., preset: _Optional[str] = ..., unused_ticket: _Optional[bytes] = ..., failed_server_ids: _Optional[_Iterable[str]] = ...) -> None: ...

class GenerateResponse(_message.Message):
    __slots__ = ("decision", "delta", "summary")
    DECISION_FIELD_NUMBER: _ClassVar[int]
    DELTA_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    decision: _selection_pb2.Decision
    delta: _generation_pb2.GenerationDelta
    summary: GenerationSummary
    def __init__(self, decision: _Optional[_Union[_selection_pb2.Decision, _Mapping]] = ..., delta: _Optional[_Union[_generation_pb2.GenerationDelta, _Mapping]] = ..., summary: _Optional[_Union[GenerationSummary, _Mapping]] = ...) -> None: ...

class CompleteRequest(_message.Message):
    __slots__ = ("input", "task_type", "priority", "requirements", "explain", "request_id", "preset", "unused_ticket", "failed_server_ids")
    INPUT_FIELD_NUMBER: _ClassVar[int]
    TASK_TYPE_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    REQUIREMENTS_FIELD_NUMBER: _ClassVar[int]
    EXPLAIN_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    PRESET_FIELD_NUMBER: _ClassVar[int]
    UNUSED_TICKET_FIELD_NUMBER: _ClassVar[int]
    FAILED_SERVER_IDS_FIELD_NUMBER: _ClassVar[int]
    input: _generation_pb2.GenerationInput
    task_type: _task_pb2.TaskType
    priority: _task_pb2.TaskPriority
    requirements: _selection_pb2.Requirements
    explain: bool
    request_id: str
    preset: str
    unused_ticket: bytes
    failed_server_ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, input: _Optional[_Union[_generation_pb2.GenerationInput, _Mapping]] = ..., task_type: _Optional[_Union[_task_pb2.TaskType, str]] = ..., priority: _Optional[_Union[_task_pb2.TaskPriority, str]] = ..., requirements: _Optional[_Union[_selection_pb2.Requirements, _Mapping]] = ..., explain: bool = ..., request_id: _Optional[str] = ..., preset: _Optional[str] = ..., unused_ticket: _Optional[bytes] = ..., failed_server_ids: _Optional[_Iterable[str]] = ...) -> None: ...

class CompleteResponse(_message.Message):
    __slots__ = ("decisions", "delta", "summary")
    DECISIONS_FIELD_NUMBER: _ClassVar[int]
    DELTA_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    decisions: _containers.RepeatedCompositeFieldContainer[_selection_pb2.Decision]
    delta: _generation_pb2.GenerationDelta
    summary: GenerationSummary
    def __init__(self, decisions: _Optional[_Iterable[_Union[_selection_pb2.Decision, _Mapping]]] = ..., delta: _Optional[_Union[_generation_pb2.GenerationDelta, _Mapping]] = ..., summary: _Optional[_Union[GenerationSummary, _Mapping]] = ...) -> None: ...

class GenerationSummary(_message.Message):
    __slots__ = ("request_id", "finish_reason", "usage", "timings", "server_id", "model", "provider", "attempts", "cost_nano_usd")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    SERVER_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PROVIDER_FIELD_NUMBER: _ClassVar[int]
    ATTEMPTS_FIELD_NUMBER: _ClassVar[int]
    COST_NANO_USD_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    finish_reason: _generation_pb2.FinishReason
    usage: _generation_pb2.Usage
    timings: _generation_pb2.Timings
    server_id: str
    model: str
    provider: str
    attempts: _containers.RepeatedCompositeFieldContainer[Attempt]
    cost_nano_usd: int
    def __init__(self, request_id: _Optional[str] = ..., finish_reason: _Optional[_Union[_generation_pb2.FinishReason, str]] = ..., usage: _Optional[_Union[_generation_pb2.Usage, _Mapping]] = ..., timings: _Optional[_Union[_generation_pb2.Timings, _Mapping]] = ..., server_id: _Optional[str] = ..., model: _Optional[str] = ..., provider: _Optional[str] = ..., attempts: _Optional[_Iterable[_Union[Attempt, _Mapping]]] = ..., cost_nano_usd: _Optional[int] = ...) -> None: ...

class Attempt(_message.Message):
    __slots__ = ("server_id", "model", "provider", "started_at", "failure_reason", "failure_message", "overtaken")
    SERVER_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PROVIDER_FIELD_NUMBER: _ClassVar[int]
    STARTED_AT_FIELD_NUMBER: _ClassVar[int]
    FAILURE_REASON_FIELD_NUMBER: _ClassVar[int]
    FAILURE_MESSAGE_FIELD_NUMBER: _ClassVar[int]
    OVERTAKEN_FIELD_NUMBER: _ClassVar[int]
    server_id: str
    model: str
    provider: str
    started_at: _timestamp_pb2.Timestamp
    failure_reason: str
    failure_message: str
    overtaken: bool
    def __init__(self, server_id: _Optional[str] = ..., model: _Optional[str] = ..., provider: _Optional[str] = ..., started_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., failure_reason: _Optional[str] = ..., failure_message: _Optional[str] = ..., overtaken: bool = ...) -> None: ...

class AssignRequest(_message.Message):
    __slots__ = ("request", "prompt_tokens", "ahead", "ahead_requests", "prompt_hashes")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    AHEAD_FIELD_NUMBER: _ClassVar[int]
    AHEAD_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_HASHES_FIELD_NUMBER: _ClassVar[int]
    request: GenerateRequest
    prompt_tokens: int
    ahead: bool
    ahead_requests: int
    prompt_hashes: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, request: _Optional[_Union[GenerateRequest, _Mapping]] = ..., prompt_tokens: _Optional[int] = ..., ahead: bool = ..., ahead_requests: _Optional[int] = ..., prompt_hashes: _Optional[_Iterable[int]] = ...) -> None: ...

class AssignResponse(_message.Message):
    __slots__ = ("request_id", "server_id", "endpoint", "model", "provider", "ticket", "valid_for", "time_limit", "queued", "sampling", "preset_messages", "price", "decision", "more", "hold_back")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    SERVER_ID_FIELD_NUMBER: _ClassVar[int]
    ENDPOINT_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PROVIDER_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    VALID_FOR_FIELD_NUMBER: _ClassVar[int]
    TIME_LIMIT_FIELD_NUMBER: _ClassVar[int]
    QUEUED_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    PRESET_MESSAGES_FIELD_NUMBER: _ClassVar[int]
    PRICE_FIELD_NUMBER: _ClassVar[int]
    DECISION_FIELD_NUMBER: _ClassVar[int]
    MORE_FIELD_NUMBER: _ClassVar[int]
    HOLD_BACK_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    server_id: str
    endpoint: str
    model: str
    provider: str
    ticket: bytes
    valid_for: _duration_pb2.Duration
    time_limit: _duration_pb2.Duration
    queued: _duration_pb2.Duration
    sampling: _generation_pb2.SamplingParams
    preset_messages: _containers.RepeatedCompositeFieldContainer[_generation_pb2.Message]
    price: _fleet_pb2.Price
    decision: _selection_pb2.Decision
    more: _containers.RepeatedCompositeFieldContainer[AssignResponse]
    hold_back: bool
    def __init__(self, request_id: _Optional[str] = ..., server_id: _Optional[str] = ..., endpoint: _Optional[str] = ..., model: _Optional[str] = ..., provider: _Optional[str] = ..., ticket: _Optional[bytes] = ..., valid_for: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., time_limit: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., queued: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., sampling: _Optional[_Union[_generation_pb2.SamplingParams, _Mapping]] = ..., preset_messages: _Optional[_Iterable[_Union[_generation_pb2.Message, _Mapping]]] = ..., price: _Optional[_Union[_fleet_pb2.Price, _Mapping]] = ..., decision: _Optional[_Union[_selection_pb2.Decision, _Mapping]] = ..., more: _Optional[_Iterable[_Union[AssignResponse, _Mapping]]] = ..., hold_back: bool = ...) -> None: ...

class EmbedRequest(_message.Message):
    __slots__ = ("inputs", "requirements", "priority", "request_id")
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    REQUIREMENTS_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    inputs: _containers.RepeatedScalarFieldContainer[str]
    requirements: _selection_pb2.Requirements
    priority: _task_pb2.TaskPriority
    request_id: str
    def __init__(self, inputs: _Optional[_Iterable[str]] = ..., requirements: _Optional[_Union[_selection_pb2.Requirements, _Mapping]] = ..., priority: _Optional[_Union[_task_pb2.TaskPriority, str]] = ..., request_id: _Optional[str] = ...) -> None: ...

class EmbedResponse(_message.Message):
    __slots__ = ("embeddings", "usage", "server_id", "model", "provider", "request_id", "cost_nano_usd")
    EMBEDDINGS_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    SERVER_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PROVIDER_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    COST_NANO_USD_FIELD_NUMBER: _ClassVar[int]
    embeddings: _containers.RepeatedCompositeFieldContainer[_generation_pb2.Embedding]
    usage: _generation_pb2.Usage
    server_id: str
    model: str
    provider: str
    request_id: str
    cost_nano_usd: int
    def __init__(self, embeddings: _Optional[_Iterable[_Union[_generation_pb2.Embedding, _Mapping]]] = ..., usage: _Optional[_Union[_generation_pb2.Usage, _Mapping]] = ..., server_id: _Optional[str] = ..., model: _Optional[str] = ..., provider: _Optional[str] = ..., request_id: _Optional[str] = ..., cost_nano_usd: _Optional[int] = ...) -> None: ...

class ListModelsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListModelsResponse(_message.Message):
    __slots__ = ("models",)
    MODELS_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[_fleet_pb2.Model]
    def __init__(self, models: _Optional[_Iterable[_Union[_fleet_pb2.Model, _Mapping]]] = ...) -> None: ...

class GetModelRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class GetModelResponse(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: _fleet_pb2.Model
    def __init__(self, model: _Optional[_Union[_fleet_pb2.Model, _Mapping]] = ...) -> None: ...

class ListModelServersRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListModelServersResponse(_message.Message):
    __slots__ = ("servers",)
    SERVERS_FIELD_NUMBER: _ClassVar[int]
    servers: _containers.RepeatedCompositeFieldContainer[_fleet_pb2.ModelServerStatus]
    def __init__(self, servers: _Optional[_Iterable[_Union[_fleet_pb2.ModelServerStatus, _Mapping]]] = ...) -> None: ...

class WatchFleetRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WatchFleetResponse(_message.Message):
    __slots__ = ("snapshot", "servers", "removed_server_ids")
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    SERVERS_FIELD_NUMBER: _ClassVar[int]
    REMOVED_SERVER_IDS_FIELD_NUMBER: _ClassVar[int]
    snapshot: bool
    servers: _containers.RepeatedCompositeFieldContainer[_fleet_pb2.ModelServerStatus]
    removed_server_ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, snapshot: bool = ..., servers: _Optional[_Iterable[_Union[_fleet_pb2.ModelServerStatus, _Mapping]]] = ..., removed_server_ids: _Optional[_Iterable[str]] = ...) -> None: ...

class ExplainSelectionRequest(_message.Message):
    __slots__ = ("request",)
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    request: GenerateRequest
    def __init__(self, request: _Optional[_Union[GenerateRequest, _Mapping]] = ...) -> None: ...

class ExplainSelectionResponse(_message.Message):
    __slots__ = ("decision", "estimated_prompt_tokens")
    DECISION_FIELD_NUMBER: _ClassVar[int]
    ESTIMATED_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    decision: _selection_pb2.Decision
    estimated_prompt_tokens: int
    def __init__(self, decision: _Optional[_Union[_selection_pb2.Decision, _Mapping]] = ..., estimated_prompt_tokens: _Optional[int] = ...) -> None: ...

class DrainModelServerRequest(_message.Message):
    __slots__ = ("server_id", "undo")
    SERVER_ID_FIELD_NUMBER: _ClassVar[int]
    UNDO_FIELD_NUMBER: _ClassVar[int]
    server_id: str
    undo: bool
    def __init__(self, server_id: _Optional[str] = ..., undo: bool = ...) -> None: ...

class DrainModelServerResponse(_message.Message):
    __slots__ = ("server",)
    SERVER_FIELD_NUMBER: _ClassVar[int]
    server: _fleet_pb2.ModelServerStatus
    def __init__(self, server: _Optional[_Union[_fleet_pb2.ModelServerStatus, _Mapping]] = ...) -> None: ...

class PullModelRequest(_message.Message):
    __slots__ = ("model", "server_id")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    SERVER_ID_FIELD_NUMBER: _ClassVar[int]
    model: str
    server_id: str
    def __init__(self, model: _Optional[str] = ..., server_id: _Optional[str] = ...) -> None: ...

class PullModelResponse(_message.Message):
    __slots__ = ("server_id", "progress")
    SERVER_ID_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    server_id: str
    progress: _fleet_pb2.ModelProgress
    def __init__(self, server_id: _Optional[str] = ..., progress: _Optional[_Union[_fleet_pb2.ModelProgress, _Mapping]] = ...) -> None: ...

class LoadModelRequest(_message.Message):
    __slots__ = ("model", "server_id")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    SERVER_ID_FIELD_NUMBER: _ClassVar[int]
    model: str
    server_id: str
    def __init__(self, model: _Optional[str] = ..., server_id: _Optional[str] = ...) -> None: ...

class LoadModelResponse(_message.Message):
    __slots__ = ("server_id", "progress")
    SERVER_ID_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    server_id: str
    progress: _fleet_pb2.ModelProgress
    def __init__(self, server_id: _Optional[str] = ..., progress: _Optional[_Union[_fleet_pb2.ModelProgress, _Mapping]] = ...) -> None: ...

class UnloadModelRequest(_message.Message):
    __slots__ = ("model", "server_id")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    SERVER_ID_FIELD_NUMBER: _ClassVar[int]
    model: str
    server_id: str
    def __init__(self, model: _Optional[str] = ..., server_id: _Optional[str] = ...) -> None: ...

class UnloadModelResponse(_message.Message):
    __slots__ = ("server_id", "progress")
    SERVER_ID_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    server_id: str
    progress: _fleet_pb2.ModelProgress
    def __init__(self, server_id: _Optional[str] = ..., progress: _Optional[_Union[_fleet_pb2.ModelProgress, _Mapping]] = ...) -> None: ...

class ListPresetsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListPresetsResponse(_message.Message):
    __slots__ = ("presets",)
    PRESETS_FIELD_NUMBER: _ClassVar[int]
    presets: _containers.RepeatedCompositeFieldContainer[Preset]
    def __init__(self, presets: _Optional[_Iterable[_Union[Preset, _Mapping]]] = ...) -> None: ...

class Preset(_message.Message):
    __slots__ = ("name", "description", "defaults")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DESCRIPTION_FIELD_NUMBER: _ClassVar[int]
    DEFAULTS_FIELD_NUMBER: _ClassVar[int]
    name: str
    description: str
    defaults: GenerateRequest
    def __init__(self, name: _Optional[str] = ..., description: _Optional[str] = ..., defaults: _Optional[_Union[GenerateRequest, _Mapping]] = ...) -> None: ...
