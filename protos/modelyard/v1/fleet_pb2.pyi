from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from modelyard.v1 import task_pb2 as _task_pb2
from modelyard.v1 import ticket_pb2 as _ticket_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ModelFeature(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MODEL_FEATURE_UNSPECIFIED: _ClassVar[ModelFeature]
    MODEL_FEATURE_STREAMING: _ClassVar[ModelFeature]
    MODEL_FEATURE_FUNCTION_CALLING: _ClassVar[ModelFeature]
    MODEL_FEATURE_VISION: _ClassVar[ModelFeature]
    MODEL_FEATURE_JSON: _ClassVar[ModelFeature]
    MODEL_FEATURE_JSON_SCHEMA: _ClassVar[ModelFeature]
    MODEL_FEATURE_LOGPROBS: _ClassVar[ModelFeature]
    MODEL_FEATURE_EMBEDDING: _ClassVar[ModelFeature]
    MODEL_FEATURE_PREFIX_CACHE: _ClassVar[ModelFeature]

class ModelState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MODEL_STATE_UNSPECIFIED: _ClassVar[ModelState]
    MODEL_STATE_ABSENT: _ClassVar[ModelState]
    MODEL_STATE_PULLING: _ClassVar[ModelState]
    MODEL_STATE_COLD: _ClassVar[ModelState]
    MODEL_STATE_LOADING: _ClassVar[ModelState]
    MODEL_STATE_WARM: _ClassVar[ModelState]
    MODEL_STATE_FAILED: _ClassVar[ModelState]

class ServerHealth(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SERVER_HEALTH_UNSPECIFIED: _ClassVar[ServerHealth]
    SERVER_HEALTH_STARTING: _ClassVar[ServerHealth]
    SERVER_HEALTH_READY: _ClassVar[ServerHealth]
    SERVER_HEALTH_UNHEALTHY: _ClassVar[ServerHealth]

class DesiredState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DESIRED_STATE_UNSPECIFIED: _ClassVar[DesiredState]
    DESIRED_STATE_SERVE: _ClassVar[DesiredState]
    DESIRED_STATE_DRAIN: _ClassVar[DesiredState]

class LeaseState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    LEASE_STATE_UNSPECIFIED: _ClassVar[LeaseState]
    LEASE_STATE_LIVE: _ClassVar[LeaseState]
    LEASE_STATE_SUSPECT: _ClassVar[LeaseState]
    LEASE_STATE_LOST: _ClassVar[LeaseState]
    LEASE_STATE_DRAINING: _ClassVar[LeaseState]

class BreakerState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    BREAKER_STATE_UNSPECIFIED: _ClassVar[BreakerState]
    BREAKER_STATE_CLOSED: _ClassVar[BreakerState]
    BREAKER_STATE_OPEN: _ClassVar[BreakerState]
    BREAKER_STATE_HALF_OPEN: _ClassVar[BreakerState]
MODEL_FEATURE_UNSPECIFIED: ModelFeature
MODEL_FEATURE_STREAMING: ModelFeature
MODEL_FEATURE_FUNCTION_CALLING: ModelFeature
MODEL_FEATURE_VISION: ModelFeature
MODEL_FEATURE_JSON: ModelFeature
MODEL_FEATURE_JSON_SCHEMA: ModelFeature
MODEL_FEATURE_LOGPROBS: ModelFeature
MODEL_FEATURE_EMBEDDING: ModelFeature
MODEL_FEATURE_PREFIX_CACHE: ModelFeature
MODEL_STATE_UNSPECIFIED: ModelState
MODEL_STATE_ABSENT: ModelState
MODEL_STATE_PULLING: ModelState
MODEL_STATE_COLD: ModelState
MODEL_STATE_LOADING: ModelState
MODEL_STATE_WARM: ModelState
MODEL_STATE_FAILED: ModelState
SERVER_HEALTH_UNSPECIFIED: ServerHealth
SERVER_HEALTH_STARTING: ServerHealth
SERVER_HEALTH_READY: ServerHealth
SERVER_HEALTH_UNHEALTHY: ServerHealth
DESIRED_STATE_UNSPECIFIED: DesiredState
DESIRED_STATE_SERVE: DesiredState
DESIRED_STATE_DRAIN: DesiredState
LEASE_STATE_UNSPECIFIED: LeaseState
LEASE_STATE_LIVE: LeaseState
LEASE_STATE_SUSPECT: LeaseState
LEASE_STATE_LOST: LeaseState
LEASE_STATE_DRAINING: LeaseState
BREAKER_STATE_UNSPECIFIED: BreakerState
BREAKER_STATE_CLOSED: BreakerState
BREAKER_STATE_OPEN: BreakerState
BREAKER_STATE_HALF_OPEN: BreakerState

class ServerReport(_message.Message):
    __slots__ = ("identity", "engine", "hardware", "models", "load", "health", "health_detail", "lease_epoch", "state", "pool", "tickets")
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    HARDWARE_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    HEALTH_FIELD_NUMBER: _ClassVar[int]
    HEALTH_DETAIL_FIELD_NUMBER: _ClassVar[int]
    LEASE_EPOCH_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    POOL_FIELD_NUMBER: _ClassVar[int]
    TICKETS_FIELD_NUMBER: _ClassVar[int]
    identity: ServerIdentity
    engine: EngineInfo
    hardware: HardwareInfo
    models: _containers.RepeatedCompositeFieldContainer[ModelInfo]
    load: ServerLoad
    health: ServerHealth
    health_detail: str
    lease_epoch: int
    state: DesiredState
    pool: ConnectionPool
    tickets: _ticket_pb2.TicketReport
    def __init__(self, identity: _Optional[_Union[ServerIdentity, _Mapping]] = ..., engine: _Optional[_Union[EngineInfo, _Mapping]] = ..., hardware: _Optional[_Union[HardwareInfo, _Mapping]] = ..., models: _Optional[_Iterable[_Union[ModelInfo, _Mapping]]] = ..., load: _Optional[_Union[ServerLoad, _Mapping]] = ..., health: _Optional[_Union[ServerHealth, str]] = ..., health_detail: _Optional[str] = ..., lease_epoch: _Optional[int] = ..., state: _Optional[_Union[DesiredState, str]] = ..., pool: _Optional[_Union[ConnectionPool, _Mapping]] = ..., tickets: _Optional[_Union[_ticket_pb2.TicketReport, _Mapping]] = ...) -> None: ...

class ServerIdentity(_message.Message):
    __slots__ = ("server_id", "instance_id", "endpoint", "labels", "version")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    SERVER_ID_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    ENDPOINT_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    server_id: str
    instance_id: str
    endpoint: str
    labels: _containers.ScalarMap[str, str]
    version: str
    def __init__(self, server_id: _Optional[str] = ..., instance_id: _Optional[str] = ..., endpoint: _Optional[str] = ..., labels: _Optional[_Mapping[str, str]] = ..., version: _Optional[str] = ...) -> None: ...

class EngineInfo(_message.Message):
    __slots__ = ("name", "version", "manages_models")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    MANAGES_MODELS_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: str
    manages_models: bool
    def __init__(self, name: _Optional[str] = ..., version: _Optional[str] = ..., manages_models: bool = ...) -> None: ...

class ConnectionPool(_message.Message):
    __slots__ = ("size", "in_use", "opened", "reused")
    SIZE_FIELD_NUMBER: _ClassVar[int]
    IN_USE_FIELD_NUMBER: _ClassVar[int]
    OPENED_FIELD_NUMBER: _ClassVar[int]
    REUSED_FIELD_NUMBER: _ClassVar[int]
    size: int
    in_use: int
    opened: int
    reused: int
    def __init__(self, size: _Optional[int] = ..., in_use: _Optional[int] = ..., opened: _Optional[int] = ..., reused: _Optional[int] = ...) -> None: ...

class HardwareInfo(_message.Message):
    __slots__ = ("device", "memory_bytes", "cpu_cores", "platform", "memory_used_bytes")
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    CPU_CORES_FIELD_NUMBER: _ClassVar[int]
    PLATFORM_FIELD_NUMBER: _ClassVar[int]
    MEMORY_USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    device: str
    memory_bytes: int
    cpu_cores: int
    platform: str
    memory_used_bytes: int
    def __init__(self, device: _Optional[str] = ..., memory_bytes: _Optional[int] = ..., cpu_cores: _Optional[int] = ..., platform: _Optional[str] = ..., memory_used_bytes: _Optional[int] = ...) -> None: ...

class Capability(_message.Message):
    __slots__ = ("task_type", "score")
    TASK_TYPE_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    task_type: _task_pb2.TaskType
    score: float
    def __init__(self, task_type: _Optional[_Union[_task_pb2.TaskType, str]] = ..., score: _Optional[float] = ...) -> None: ...

class Price(_message.Message):
    __slots__ = ("prompt_usd_per_million_tokens", "cached_prompt_usd_per_million_tokens", "completion_usd_per_million_tokens")
    PROMPT_USD_PER_MILLION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_PROMPT_USD_PER_MILLION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_USD_PER_MILLION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    prompt_usd_per_million_tokens: float
    cached_prompt_usd_per_million_tokens: float
    completion_usd_per_million_tokens: float
    def __init__(self, prompt_usd_per_million_tokens: _Optional[float] = ..., cached_prompt_usd_per_million_tokens: _Optional[float] = ..., completion_usd_per_million_tokens: _Optional[float] = ...) -> None: ...

class ModelInfo(_message.Message):
    __slots__ = ("name", "provider", "capabilities", "context_length", "features", "price", "quantization", "performance", "state", "state_detail", "memory_bytes", "load_time", "fingerprint")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PROVIDER_FIELD_NUMBER: _ClassVar[int]
    CAPABILITIES_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_LENGTH_FIELD_NUMBER: _ClassVar[int]
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    PRICE_FIELD_NUMBER: _ClassVar[int]
    QUANTIZATION_FIELD_NUMBER: _ClassVar[int]
    PERFORMANCE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    STATE_DETAIL_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    LOAD_TIME_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    name: str
    provider: str
    capabilities: _containers.RepeatedCompositeFieldContainer[Capability]
    context_length: int
    features: _containers.RepeatedScalarFieldContainer[ModelFeature]
    price: Price
    quantization: str
    performance: Performance
    state: ModelState
    state_detail: str
    memory_bytes: int
    load_time: _duration_pb2.Duration
    fingerprint: str
    def __init__(self, name: _Optional[str] = ..., provider: _Optional[str] = ..., capabilities: _Optional[_Iterable[_Union[Capability, _Mapping]]] = ..., context_length: _Optional[int] = ..., features: _Optional[_Iterable[_Union[ModelFeature, str]]] = ..., price: _Optional[_Union[Price, _Mapping]] = ..., quantization: _Optional[str] = ..., performance: _Optional[_Union[Performance, _Mapping]] = ..., state: _Optional[_Union[ModelState, str]] = ..., state_detail: _Optional[str] = ..., memory_bytes: _Optional[int] = ..., load_time: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., fingerprint: _Optional[str] = ...) -> None: ...

class ModelProgress(_message.Message):
    __slots__ = ("state", "detail", "completed_bytes", "total_bytes")
    STATE_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    COMPLETED_BYTES_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    state: ModelState
    detail: str
    completed_bytes: int
    total_bytes: int
    def __init__(self, state: _Optional[_Union[ModelState, str]] = ..., detail: _Optional[str] = ..., completed_bytes: _Optional[int] = ..., total_bytes: _Optional[int] = ...) -> None: ...

class Performance(_message.Message):
    __slots__ = ("ttft", "tpot", "prefill_tokens_per_second", "decode_tokens_per_second")
    TTFT_FIELD_NUMBER: _ClassVar[int]
    TPOT_FIELD_NUMBER: _ClassVar[int]
    PREFILL_TOKENS_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    DECODE_TOKENS_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    ttft: _duration_pb2.Duration
    tpot: _duration_pb2.Duration
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    def __init__(self, ttft: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., tpot: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., prefill_tokens_per_second: _Optional[float] = ..., decode_tokens_per_second: _Optional[float] = ...) -> None: ...

class ServerLoad(_message.Message):
    __slots__ = ("slots", "running", "waiting", "foreign", "kv_cache_utilization")
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    FOREIGN_FIELD_NUMBER: _ClassVar[int]
    KV_CACHE_UTILIZATION_FIELD_NUMBER: _ClassVar[int]
    slots: int
    running: int
    waiting: int
    foreign: int
    kv_cache_utilization: float
    def __init__(self, slots: _Optional[int] = ..., running: _Optional[int] = ..., waiting: _Optional[int] = ..., foreign: _Optional[int] = ..., kv_cache_utilization: _Optional[float] = ...) -> None: ...

class ServerDirective(_message.Message):
    __slots__ = ("orchestrator_id", "lease_epoch", "lease_duration", "next_report_in", "desired_state", "tickets")
    ORCHESTRATOR_ID_FIELD_NUMBER: _ClassVar[int]
    LEASE_EPOCH_FIELD_NUMBER: _ClassVar[int]
    LEASE_DURATION_FIELD_NUMBER: _ClassVar[int]
    NEXT_REPORT_IN_FIELD_NUMBER: _ClassVar[int]
    DESIRED_STATE_FIELD_NUMBER: _ClassVar[int]
    TICKETS_FIELD_NUMBER: _ClassVar[int]
    orchestrator_id: str
    lease_epoch: int
    lease_duration: _duration_pb2.Duration
    next_report_in: _duration_pb2.Duration
    desired_state: DesiredState
    tickets: _ticket_pb2.TicketDirective
    def __init__(self, orchestrator_id: _Optional[str] = ..., lease_epoch: _Optional[int] = ..., lease_duration: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., next_report_in: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., desired_state: _Optional[_Union[DesiredState, str]] = ..., tickets: _Optional[_Union[_ticket_pb2.TicketDirective, _Mapping]] = ...) -> None: ...

class ModelServerStatus(_message.Message):
    __slots__ = ("report", "lease_state", "lease_epoch", "attached_at", "reported_at", "in_flight", "models", "assigned")
    REPORT_FIELD_NUMBER: _ClassVar[int]
    LEASE_STATE_FIELD_NUMBER: _ClassVar[int]
    LEASE_EPOCH_FIELD_NUMBER: _ClassVar[int]
    ATTACHED_AT_FIELD_NUMBER: _ClassVar[int]
    REPORTED_AT_FIELD_NUMBER: _ClassVar[int]
    IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    ASSIGNED_FIELD_NUMBER: _ClassVar[int]
    report: ServerReport
    lease_state: LeaseState
    lease_epoch: int
    attached_at: _timestamp_pb2.Timestamp
    reported_at: _timestamp_pb2.Timestamp
    in_flight: int
    models: _containers.RepeatedCompositeFieldContainer[ModelRuntime]
    assigned: int
    def __init__(self, report: _Optional[_Union[ServerReport, _Mapping]] = ..., lease_state: _Optional[_Union[LeaseState, str]] = ..., lease_epoch: _Optional[int] = ..., attached_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., reported_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., in_flight: _Optional[int] = ..., models: _Optional[_Iterable[_Union[ModelRuntime, _Mapping]]] = ..., assigned: _Optional[int] = ...) -> None: ...

class ModelRuntime(_message.Message):
    __slots__ = ("model", "success_rate", "ttft", "tpot", "requests", "failures", "breaker")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    SUCCESS_RATE_FIELD_NUMBER: _ClassVar[int]
    TTFT_FIELD_NUMBER: _ClassVar[int]
    TPOT_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    FAILURES_FIELD_NUMBER: _ClassVar[int]
    BREAKER_FIELD_NUMBER: _ClassVar[int]
    model: str
    success_rate: float
    ttft: _duration_pb2.Duration
    tpot: _duration_pb2.Duration
    requests: int
    failures: int
    breaker: BreakerState
    def __init__(self, model: _Optional[str] = ..., success_rate: _Optional[float] = ..., ttft: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., tpot: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., requests: _Optional[int] = ..., failures: _Optional[int] = ..., breaker: _Optional[_Union[BreakerState, str]] = ...) -> None: ...

class Model(_message.Message):
    __slots__ = ("name", "providers", "placements", "context_length", "features", "capabilities")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PROVIDERS_FIELD_NUMBER: _ClassVar[int]
    PLACEMENTS_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_LENGTH_FIELD_NUMBER: _ClassVar[int]
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    CAPABILITIES_FIELD_NUMBER: _ClassVar[int]
    name: str
    providers: _containers.RepeatedScalarFieldContainer[str]
    placements: _containers.RepeatedCompositeFieldContainer[ModelPlacement]
    context_length: int
    features: _containers.RepeatedScalarFieldContainer[ModelFeature]
    capabilities: _containers.RepeatedCompositeFieldContainer[Capability]
    def __init__(self, name: _Optional[str] = ..., providers: _Optional[_Iterable[str]] = ..., placements: _Optional[_Iterable[_Union[ModelPlacement, _Mapping]]] = ..., context_length: _Optional[int] = ..., features: _Optional[_Iterable[_Union[ModelFeature, str]]] = ..., capabilities: _Optional[_Iterable[_Union[Capability, _Mapping]]] = ...) -> None: ...

class ModelPlacement(_message.Message):
    __slots__ = ("server_id", "lease_state", "info")
    SERVER_ID_FIELD_NUMBER: _ClassVar[int]
    LEASE_STATE_FIELD_NUMBER: _ClassVar[int]
    INFO_FIELD_NUMBER: _ClassVar[int]
    server_id: str
    lease_state: LeaseState
    info: ModelInfo
    def __init__(self, server_id: _Optional[str] = ..., lease_state: _Optional[_Union[LeaseState, str]] = ..., info: _Optional[_Union[ModelInfo, _Mapping]] = ...) -> None: ...
