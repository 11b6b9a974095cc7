from modelyard.v1 import fleet_pb2 as _fleet_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Verdict(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    VERDICT_UNSPECIFIED: _ClassVar[Verdict]
    VERDICT_CHOSEN: _ClassVar[Verdict]
    VERDICT_WAIT: _ClassVar[Verdict]
    VERDICT_IMPOSSIBLE: _ClassVar[Verdict]

class RejectionReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REJECTION_REASON_UNSPECIFIED: _ClassVar[RejectionReason]
    REJECTION_REASON_MODEL_MISMATCH: _ClassVar[RejectionReason]
    REJECTION_REASON_PROVIDER_MISMATCH: _ClassVar[RejectionReason]
    REJECTION_REASON_SERVER_MISMATCH: _ClassVar[RejectionReason]
    REJECTION_REASON_TASK_TYPE: _ClassVar[RejectionReason]
    REJECTION_REASON_CONTEXT_TOO_SHORT: _ClassVar[RejectionReason]
    REJECTION_REASON_FEATURE_MISSING: _ClassVar[RejectionReason]
    REJECTION_REASON_EXCLUDED: _ClassVar[RejectionReason]
    REJECTION_REASON_AVAILABILITY: _ClassVar[RejectionReason]
    REJECTION_REASON_BREAKER_OPEN: _ClassVar[RejectionReason]
    REJECTION_REASON_NOT_READY: _ClassVar[RejectionReason]
    REJECTION_REASON_DRAINING: _ClassVar[RejectionReason]
    REJECTION_REASON_NO_FREE_SLOT: _ClassVar[RejectionReason]
    REJECTION_REASON_LOADING_TAKES_LONGER: _ClassVar[RejectionReason]
    REJECTION_REASON_MODEL_NOT_HERE: _ClassVar[RejectionReason]
    REJECTION_REASON_TOO_EXPENSIVE: _ClassVar[RejectionReason]
    REJECTION_REASON_BUDGET: _ClassVar[RejectionReason]
    REJECTION_REASON_PREFILL_BUSY: _ClassVar[RejectionReason]
    REJECTION_REASON_BETTER_LATER: _ClassVar[RejectionReason]
    REJECTION_REASON_SPARED: _ClassVar[RejectionReason]
VERDICT_UNSPECIFIED: Verdict
VERDICT_CHOSEN: Verdict
VERDICT_WAIT: Verdict
VERDICT_IMPOSSIBLE: Verdict
REJECTION_REASON_UNSPECIFIED: RejectionReason
REJECTION_REASON_MODEL_MISMATCH: RejectionReason
REJECTION_REASON_PROVIDER_MISMATCH: RejectionReason
REJECTION_REASON_SERVER_MISMATCH: RejectionReason
REJECTION_REASON_TASK_TYPE: RejectionReason
REJECTION_REASON_CONTEXT_TOO_SHORT: RejectionReason
REJECTION_REASON_FEATURE_MISSING: RejectionReason
REJECTION_REASON_EXCLUDED: RejectionReason
REJECTION_REASON_AVAILABILITY: RejectionReason
REJECTION_REASON_BREAKER_OPEN: RejectionReason
REJECTION_REASON_NOT_READY: RejectionReason
REJECTION_REASON_DRAINING: RejectionReason
REJECTION_REASON_NO_FREE_SLOT: RejectionReason
REJECTION_REASON_LOADING_TAKES_LONGER: RejectionReason
REJECTION_REASON_MODEL_NOT_HERE: RejectionReason
REJECTION_REASON_TOO_EXPENSIVE: RejectionReason
REJECTION_REASON_BUDGET: RejectionReason
REJECTION_REASON_PREFILL_BUSY: RejectionReason
REJECTION_REASON_BETTER_LATER: RejectionReason
REJECTION_REASON_SPARED: RejectionReason

class Requirements(_message.Message):
    __slots__ = ("model", "provider", "server_id", "excluded_server_ids", "min_context_length", "features", "labels", "max_cost_nano_usd", "excluded_models")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PROVIDER_FIELD_NUMBER: _ClassVar[int]
    SERVER_ID_FIELD_NUMBER: _ClassVar[int]
    EXCLUDED_SERVER_IDS_FIELD_NUMBER: _ClassVar[int]
    MIN_CONTEXT_LENGTH_FIELD_NUMBER: _ClassVar[int]
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    MAX_COST_NANO_USD_FIELD_NUMBER: _ClassVar[int]
    EXCLUDED_MODELS_FIELD_NUMBER: _ClassVar[int]
    model: str
    provider: str
    server_id: str
    excluded_server_ids: _containers.RepeatedScalarFieldContainer[str]
    min_context_length: int
    features: _containers.RepeatedScalarFieldContainer[_fleet_pb2.ModelFeature]
    labels: _containers.ScalarMap[str, str]
    max_cost_nano_usd: int
    excluded_models: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, model: _Optional[str] = ..., provider: _Optional[str] = ..., server_id: _Optional[str] = ..., excluded_server_ids: _Optional[_Iterable[str]] = ..., min_context_length: _Optional[int] = ..., features: _Optional[_Iterable[_Union[_fleet_pb2.ModelFeature, str]]] = ..., labels: _Optional[_Mapping[str, str]] = ..., max_cost_nano_usd: _Optional[int] = ..., excluded_models: _Optional[_Iterable[str]] = ...) -> None: ...

class Decision(_message.Message):
    __slots__ = ("verdict", "server_id", "model", "provider", "candidates", "summary", "formulas", "terms", "propensity", "explored")
    class TermsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    VERDICT_FIELD_NUMBER: _ClassVar[int]
    SERVER_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PROVIDER_FIELD_NUMBER: _ClassVar[int]
    CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    FORMULAS_FIELD_NUMBER: _ClassVar[int]
    TERMS_FIELD_NUMBER: _ClassVar[int]
    PROPENSITY_FIELD_NUMBER: _ClassVar[int]
    EXPLORED_FIELD_NUMBER: _ClassVar[int]
    verdict: Verdict
    server_id: str
    model: str
    provider: str
    candidates: _containers.RepeatedCompositeFieldContainer[Candidate]
    summary: str
    formulas: _containers.RepeatedCompositeFieldContainer[Formula]
    terms: _containers.ScalarMap[str, float]
    propensity: float
    explored: bool
    def __init__(self, verdict: _Optional[_Union[Verdict, str]] = ..., server_id: _Optional[str] = ..., model: _Optional[str] = ..., provider: _Optional[str] = ..., candidates: _Optional[_Iterable[_Union[Candidate, _Mapping]]] = ..., summary: _Optional[str] = ..., formulas: _Optional[_Iterable[_Union[Formula, _Mapping]]] = ..., terms: _Optional[_Mapping[str, float]] = ..., propensity: _Optional[float] = ..., explored: bool = ...) -> None: ...

class Formula(_message.Message):
    __slots__ = ("name", "text")
    NAME_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    name: str
    text: str
    def __init__(self, name: _Optional[str] = ..., text: _Optional[str] = ...) -> None: ...

class Candidate(_message.Message):
    __slots__ = ("server_id", "model", "provider", "score", "parts", "rejections", "estimated_cost_nano_usd", "terms")
    class TermsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    SERVER_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PROVIDER_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    REJECTIONS_FIELD_NUMBER: _ClassVar[int]
    ESTIMATED_COST_NANO_USD_FIELD_NUMBER: _ClassVar[int]
    TERMS_FIELD_NUMBER: _ClassVar[int]
    server_id: str
    model: str
    provider: str
    score: float
    parts: _containers.RepeatedCompositeFieldContainer[ScorePart]
    rejections: _containers.RepeatedCompositeFieldContainer[Rejection]
    estimated_cost_nano_usd: int
    terms: _containers.ScalarMap[str, float]
    def __init__(self, server_id: _Optional[str] = ..., model: _Optional[str] = ..., provider: _Optional[str] = ..., score: _Optional[float] = ..., parts: _Optional[_Iterable[_Union[ScorePart, _Mapping]]] = ..., rejections: _Optional[_Iterable[_Union[Rejection, _Mapping]]] = ..., estimated_cost_nano_usd: _Optional[int] = ..., terms: _Optional[_Mapping[str, float]] = ...) -> None: ...

class ScorePart(_message.Message):
    __slots__ = ("scorer", "value", "weight")
    SCORER_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    scorer: str
    value: float
    weight: float
    def __init__(self, scorer: _Optional[str] = ..., value: _Optional[float] = ..., weight: _Optional[float] = ...) -> None: ...

class Rejection(_message.Message):
    __slots__ = ("reason", "detail", "permanent")
    REASON_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    PERMANENT_FIELD_NUMBER: _ClassVar[int]
    reason: RejectionReason
    detail: str
    permanent: bool
    def __init__(self, reason: _Optional[_Union[RejectionReason, str]] = ..., detail: _Optional[str] = ..., permanent: bool = ...) -> None: ...
