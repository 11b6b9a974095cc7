from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from modelyard.v1 import task_pb2 as _task_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class AgentState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    AGENT_STATE_UNSPECIFIED: _ClassVar[AgentState]
    AGENT_STATE_LIVE: _ClassVar[AgentState]
    AGENT_STATE_LOST: _ClassVar[AgentState]

class CandidateKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CANDIDATE_KIND_UNSPECIFIED: _ClassVar[CandidateKind]
    CANDIDATE_KIND_MODEL: _ClassVar[CandidateKind]
    CANDIDATE_KIND_AGENT: _ClassVar[CandidateKind]

class Similarity(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SIMILARITY_UNSPECIFIED: _ClassVar[Similarity]
    SIMILARITY_EMBEDDING: _ClassVar[Similarity]
    SIMILARITY_LEXICAL: _ClassVar[Similarity]

class CandidateRejectionReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CANDIDATE_REJECTION_REASON_UNSPECIFIED: _ClassVar[CandidateRejectionReason]
    CANDIDATE_REJECTION_REASON_SKILL: _ClassVar[CandidateRejectionReason]
    CANDIDATE_REJECTION_REASON_TASK_TYPE: _ClassVar[CandidateRejectionReason]
    CANDIDATE_REJECTION_REASON_LABEL: _ClassVar[CandidateRejectionReason]
    CANDIDATE_REJECTION_REASON_EXCLUDED: _ClassVar[CandidateRejectionReason]
    CANDIDATE_REJECTION_REASON_BUSY: _ClassVar[CandidateRejectionReason]
    CANDIDATE_REJECTION_REASON_LOST: _ClassVar[CandidateRejectionReason]

class AssignmentOutcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ASSIGNMENT_OUTCOME_UNSPECIFIED: _ClassVar[AssignmentOutcome]
    ASSIGNMENT_OUTCOME_SUCCESS: _ClassVar[AssignmentOutcome]
    ASSIGNMENT_OUTCOME_FAILURE: _ClassVar[AssignmentOutcome]
    ASSIGNMENT_OUTCOME_EXPIRED: _ClassVar[AssignmentOutcome]
AGENT_STATE_UNSPECIFIED: AgentState
AGENT_STATE_LIVE: AgentState
AGENT_STATE_LOST: AgentState
CANDIDATE_KIND_UNSPECIFIED: CandidateKind
CANDIDATE_KIND_MODEL: CandidateKind
CANDIDATE_KIND_AGENT: CandidateKind
SIMILARITY_UNSPECIFIED: Similarity
SIMILARITY_EMBEDDING: Similarity
SIMILARITY_LEXICAL: Similarity
CANDIDATE_REJECTION_REASON_UNSPECIFIED: CandidateRejectionReason
CANDIDATE_REJECTION_REASON_SKILL: CandidateRejectionReason
CANDIDATE_REJECTION_REASON_TASK_TYPE: CandidateRejectionReason
CANDIDATE_REJECTION_REASON_LABEL: CandidateRejectionReason
CANDIDATE_REJECTION_REASON_EXCLUDED: CandidateRejectionReason
CANDIDATE_REJECTION_REASON_BUSY: CandidateRejectionReason
CANDIDATE_REJECTION_REASON_LOST: CandidateRejectionReason
ASSIGNMENT_OUTCOME_UNSPECIFIED: AssignmentOutcome
ASSIGNMENT_OUTCOME_SUCCESS: AssignmentOutcome
ASSIGNMENT_OUTCOME_FAILURE: AssignmentOutcome
ASSIGNMENT_OUTCOME_EXPIRED: AssignmentOutcome

class AgentSkill(_message.Message):
    __slots__ = ("name", "level")
    NAME_FIELD_NUMBER: _ClassVar[int]
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    name: str
    level: float
    def __init__(self, name: _Optional[str] = ..., level: _Optional[float] = ...) -> None: ...

class AgentSpec(_message.Message):
    __slots__ = ("id", "description", "skills", "task_types", "max_concurrency", "labels", "endpoint", "metadata")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    class MetadataEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    ID_FIELD_NUMBER: _ClassVar[int]
    DESCRIPTION_FIELD_NUMBER: _ClassVar[int]
    SKILLS_FIELD_NUMBER: _ClassVar[int]
    TASK_TYPES_FIELD_NUMBER: _ClassVar[int]
    MAX_CONCURRENCY_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    ENDPOINT_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    id: str
    description: str
    skills: _containers.RepeatedCompositeFieldContainer[AgentSkill]
    task_types: _containers.RepeatedScalarFieldContainer[_task_pb2.TaskType]
    max_concurrency: int
    labels: _containers.ScalarMap[str, str]
    endpoint: str
    metadata: _containers.ScalarMap[str, str]
    def __init__(self, id: _Optional[str] = ..., description: _Optional[str] = ..., skills: _Optional[_Iterable[_Union[AgentSkill, _Mapping]]] = ..., task_types: _Optional[_Iterable[_Union[_task_pb2.TaskType, str]]] = ..., max_concurrency: _Optional[int] = ..., labels: _Optional[_Mapping[str, str]] = ..., endpoint: _Optional[str] = ..., metadata: _Optional[_Mapping[str, str]] = ...) -> None: ...

class AgentStatus(_message.Message):
    __slots__ = ("agent", "state", "running", "lease_until", "registered_at", "experience")
    AGENT_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    LEASE_UNTIL_FIELD_NUMBER: _ClassVar[int]
    REGISTERED_AT_FIELD_NUMBER: _ClassVar[int]
    EXPERIENCE_FIELD_NUMBER: _ClassVar[int]
    agent: AgentSpec
    state: AgentState
    running: int
    lease_until: _timestamp_pb2.Timestamp
    registered_at: _timestamp_pb2.Timestamp
    experience: _containers.RepeatedCompositeFieldContainer[AgentExperience]
    def __init__(self, agent: _Optional[_Union[AgentSpec, _Mapping]] = ..., state: _Optional[_Union[AgentState, str]] = ..., running: _Optional[int] = ..., lease_until: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., registered_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., experience: _Optional[_Iterable[_Union[AgentExperience, _Mapping]]] = ...) -> None: ...

class AgentExperience(_message.Message):
    __slots__ = ("task_type", "tasks", "successes", "typical_duration")
    TASK_TYPE_FIELD_NUMBER: _ClassVar[int]
    TASKS_FIELD_NUMBER: _ClassVar[int]
    SUCCESSES_FIELD_NUMBER: _ClassVar[int]
    TYPICAL_DURATION_FIELD_NUMBER: _ClassVar[int]
    task_type: _task_pb2.TaskType
    tasks: float
    successes: float
    typical_duration: _duration_pb2.Duration
    def __init__(self, task_type: _Optional[_Union[_task_pb2.TaskType, str]] = ..., tasks: _Optional[float] = ..., successes: _Optional[float] = ..., typical_duration: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class RequiredSkill(_message.Message):
    __slots__ = ("name", "min_level")
    NAME_FIELD_NUMBER: _ClassVar[int]
    MIN_LEVEL_FIELD_NUMBER: _ClassVar[int]
    name: str
    min_level: float
    def __init__(self, name: _Optional[str] = ..., min_level: _Optional[float] = ...) -> None: ...

class RegisterAgentRequest(_message.Message):
    __slots__ = ("agent", "ttl")
    AGENT_FIELD_NUMBER: _ClassVar[int]
    TTL_FIELD_NUMBER: _ClassVar[int]
    agent: AgentSpec
    ttl: _duration_pb2.Duration
    def __init__(self, agent: _Optional[_Union[AgentSpec, _Mapping]] = ..., ttl: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class RegisterAgentResponse(_message.Message):
    __slots__ = ("agent", "ttl", "registration")
    AGENT_FIELD_NUMBER: _ClassVar[int]
    TTL_FIELD_NUMBER: _ClassVar[int]
    REGISTRATION_FIELD_NUMBER: _ClassVar[int]
    agent: AgentStatus
    ttl: _duration_pb2.Duration
    registration: int
    def __init__(self, agent: _Optional[_Union[AgentStatus, _Mapping]] = ..., ttl: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., registration: _Optional[int] = ...) -> None: ...

class HeartbeatRequest(_message.Message):
    __slots__ = ("agent_id", "registration")
    AGENT_ID_FIELD_NUMBER: _ClassVar[int]
    REGISTRATION_FIELD_NUMBER: _ClassVar[int]
    agent_id: str
    registration: int
    def __init__(self, agent_id: _Optional[str] = ..., registration: _Optional[int] = ...) -> None: ...

class HeartbeatResponse(_message.Message):
    __slots__ = ("ttl",)
    TTL_FIELD_NUMBER: _ClassVar[int]
    ttl: _duration_pb2.Duration
    def __init__(self, ttl: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class UnregisterAgentRequest(_message.Message):
    __slots__ = ("agent_id", "registration")
    AGENT_ID_FIELD_NUMBER: _ClassVar[int]
    REGISTRATION_FIELD_NUMBER: _ClassVar[int]
    agent_id: str
    registration: int
    def __init__(self, agent_id: _Optional[str] = ..., registration: _Optional[int] = ...) -> None: ...

class UnregisterAgentResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListAgentsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListAgentsResponse(_message.Message):
    __slots__ = ("agents",)
    AGENTS_FIELD_NUMBER: _ClassVar[int]
    agents: _containers.RepeatedCompositeFieldContainer[AgentStatus]
    def __init__(self, agents: _Optional[_Iterable[_Union[AgentStatus, _Mapping]]] = ...) -> None: ...

class CandidateRejection(_message.Message):
    __slots__ = ("reason", "detail")
    REASON_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    reason: CandidateRejectionReason
    detail: str
    def __init__(self, reason: _Optional[_Union[CandidateRejectionReason, str]] = ..., detail: _Optional[str] = ...) -> None: ...

class ScoreTerm(_message.Message):
    __slots__ = ("name", "value", "weight", "contribution", "detail")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    CONTRIBUTION_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    name: str
    value: float
    weight: float
    contribution: float
    detail: str
    def __init__(self, name: _Optional[str] = ..., value: _Optional[float] = ..., weight: _Optional[float] = ..., contribution: _Optional[float] = ..., detail: _Optional[str] = ...) -> None: ...

class CapabilityMatch(_message.Message):
    __slots__ = ("kind", "id", "score", "terms", "rejections", "available")
    KIND_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    TERMS_FIELD_NUMBER: _ClassVar[int]
    REJECTIONS_FIELD_NUMBER: _ClassVar[int]
    AVAILABLE_FIELD_NUMBER: _ClassVar[int]
    kind: CandidateKind
    id: str
    score: float
    terms: _containers.RepeatedCompositeFieldContainer[ScoreTerm]
    rejections: _containers.RepeatedCompositeFieldContainer[CandidateRejection]
    available: bool
    def __init__(self, kind: _Optional[_Union[CandidateKind, str]] = ..., id: _Optional[str] = ..., score: _Optional[float] = ..., terms: _Optional[_Iterable[_Union[ScoreTerm, _Mapping]]] = ..., rejections: _Optional[_Iterable[_Union[CandidateRejection, _Mapping]]] = ..., available: bool = ...) -> None: ...

class MatchCapabilitiesRequest(_message.Message):
    __slots__ = ("description", "required_skills", "task_type", "kind", "limit", "include_rejected")
    DESCRIPTION_FIELD_NUMBER: _ClassVar[int]
    REQUIRED_SKILLS_FIELD_NUMBER: _ClassVar[int]
    TASK_TYPE_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    INCLUDE_REJECTED_FIELD_NUMBER: _ClassVar[int]
    description: str
    required_skills: _containers.RepeatedCompositeFieldContainer[RequiredSkill]
    task_type: _task_pb2.TaskType
    kind: CandidateKind
    limit: int
    include_rejected: bool
    def __init__(self, description: _Optional[str] = ..., required_skills: _Optional[_Iterable[_Union[RequiredSkill, _Mapping]]] = ..., task_type: _Optional[_Union[_task_pb2.TaskType, str]] = ..., kind: _Optional[_Union[CandidateKind, str]] = ..., limit: _Optional[int] = ..., include_rejected: bool = ...) -> None: ...

class MatchCapabilitiesResponse(_message.Message):
    __slots__ = ("matches", "similarity", "similarity_detail")
    MATCHES_FIELD_NUMBER: _ClassVar[int]
    SIMILARITY_FIELD_NUMBER: _ClassVar[int]
    SIMILARITY_DETAIL_FIELD_NUMBER: _ClassVar[int]
    matches: _containers.RepeatedCompositeFieldContainer[CapabilityMatch]
    similarity: Similarity
    similarity_detail: str
    def __init__(self, matches: _Optional[_Iterable[_Union[CapabilityMatch, _Mapping]]] = ..., similarity: _Optional[_Union[Similarity, str]] = ..., similarity_detail: _Optional[str] = ...) -> None: ...

class RouteTaskRequest(_message.Message):
    __slots__ = ("description", "required_skills", "task_type", "required_labels", "excluded_agent_ids", "from_agent_id", "timeout", "dry_run")
    class RequiredLabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    DESCRIPTION_FIELD_NUMBER: _ClassVar[int]
    REQUIRED_SKILLS_FIELD_NUMBER: _ClassVar[int]
    TASK_TYPE_FIELD_NUMBER: _ClassVar[int]
    REQUIRED_LABELS_FIELD_NUMBER: _ClassVar[int]
    EXCLUDED_AGENT_IDS_FIELD_NUMBER: _ClassVar[int]
    FROM_AGENT_ID_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_FIELD_NUMBER: _ClassVar[int]
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    description: str
    required_skills: _containers.RepeatedCompositeFieldContainer[RequiredSkill]
    task_type: _task_pb2.TaskType
    required_labels: _containers.ScalarMap[str, str]
    excluded_agent_ids: _containers.RepeatedScalarFieldContainer[str]
    from_agent_id: str
    timeout: _duration_pb2.Duration
    dry_run: bool
    def __init__(self, description: _Optional[str] = ..., required_skills: _Optional[_Iterable[_Union[RequiredSkill, _Mapping]]] = ..., task_type: _Optional[_Union[_task_pb2.TaskType, str]] = ..., required_labels: _Optional[_Mapping[str, str]] = ..., excluded_agent_ids: _Optional[_Iterable[str]] = ..., from_agent_id: _Optional[str] = ..., timeout: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., dry_run: bool = ...) -> None: ...

class RouteTaskResponse(_message.Message):
    __slots__ = ("assignment", "decision")
    ASSIGNMENT_FIELD_NUMBER: _ClassVar[int]
    DECISION_FIELD_NUMBER: _ClassVar[int]
    assignment: Assignment
    decision: RoutingDecision
    def __init__(self, assignment: _Optional[_Union[Assignment, _Mapping]] = ..., decision: _Optional[_Union[RoutingDecision, _Mapping]] = ...) -> None: ...

class Assignment(_message.Message):
    __slots__ = ("id", "agent", "deadline")
    ID_FIELD_NUMBER: _ClassVar[int]
    AGENT_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_FIELD_NUMBER: _ClassVar[int]
    id: str
    agent: AgentSpec
    deadline: _timestamp_pb2.Timestamp
    def __init__(self, id: _Optional[str] = ..., agent: _Optional[_Union[AgentSpec, _Mapping]] = ..., deadline: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class RoutingDecision(_message.Message):
    __slots__ = ("agent_id", "summary", "candidates", "similarity", "similarity_detail")
    AGENT_ID_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    SIMILARITY_FIELD_NUMBER: _ClassVar[int]
    SIMILARITY_DETAIL_FIELD_NUMBER: _ClassVar[int]
    agent_id: str
    summary: str
    candidates: _containers.RepeatedCompositeFieldContainer[AgentCandidate]
    similarity: Similarity
    similarity_detail: str
    def __init__(self, agent_id: _Optional[str] = ..., summary: _Optional[str] = ..., candidates: _Optional[_Iterable[_Union[AgentCandidate, _Mapping]]] = ..., similarity: _Optional[_Union[Similarity, str]] = ..., similarity_detail: _Optional[str] = ...) -> None: ...

class AgentCandidate(_message.Message):
    __slots__ = ("agent_id", "score", "terms", "capability_terms", "rejections")
    AGENT_ID_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    TERMS_FIELD_NUMBER: _ClassVar[int]
    CAPABILITY_TERMS_FIELD_NUMBER: _ClassVar[int]
    REJECTIONS_FIELD_NUMBER: _ClassVar[int]
    agent_id: str
    score: float
    terms: _containers.RepeatedCompositeFieldContainer[ScoreTerm]
    capability_terms: _containers.RepeatedCompositeFieldContainer[ScoreTerm]
    rejections: _containers.RepeatedCompositeFieldContainer[CandidateRejection]
    def __init__(self, agent_id: _Optional[str] = ..., score: _Optional[float] = ..., terms: _Optional[_Iterable[_Union[ScoreTerm, _Mapping]]] = ..., capability_terms: _Optional[_Iterable[_Union[ScoreTerm, _Mapping]]] = ..., rejections: _Optional[_Iterable[_Union[CandidateRejection, _Mapping]]] = ...) -> None: ...

class ReportAssignmentRequest(_message.Message):
    __slots__ = ("assignment_id", "outcome", "duration", "score")
    ASSIGNMENT_ID_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    DURATION_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    assignment_id: str
    outcome: AssignmentOutcome
    duration: _duration_pb2.Duration
    score: float
    def __init__(self, assignment_id: _Optional[str] = ..., outcome: _Optional[_Union[AssignmentOutcome, str]] = ..., duration: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., score: _Optional[float] = ...) -> None: ...

class ReportAssignmentResponse(_message.Message):
    __slots__ = ("outcome", "agent_id")
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    AGENT_ID_FIELD_NUMBER: _ClassVar[int]
    outcome: AssignmentOutcome
    agent_id: str
    def __init__(self, outcome: _Optional[_Union[AssignmentOutcome, str]] = ..., agent_id: _Optional[str] = ...) -> None: ...

class ListInteractionsRequest(_message.Message):
    __slots__ = ("agent_id", "limit")
    AGENT_ID_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    agent_id: str
    limit: int
    def __init__(self, agent_id: _Optional[str] = ..., limit: _Optional[int] = ...) -> None: ...

class ListInteractionsResponse(_message.Message):
    __slots__ = ("interactions", "truncated")
    INTERACTIONS_FIELD_NUMBER: _ClassVar[int]
    TRUNCATED_FIELD_NUMBER: _ClassVar[int]
    interactions: _containers.RepeatedCompositeFieldContainer[Interaction]
    truncated: bool
    def __init__(self, interactions: _Optional[_Iterable[_Union[Interaction, _Mapping]]] = ..., truncated: bool = ...) -> None: ...

class Interaction(_message.Message):
    __slots__ = ("from_agent_id", "to_agent_id", "assigned", "succeeded", "failed", "mean_duration", "last_at")
    FROM_AGENT_ID_FIELD_NUMBER: _ClassVar[int]
    TO_AGENT_ID_FIELD_NUMBER: _ClassVar[int]
    ASSIGNED_FIELD_NUMBER: _ClassVar[int]
    SUCCEEDED_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    MEAN_DURATION_FIELD_NUMBER: _ClassVar[int]
    LAST_AT_FIELD_NUMBER: _ClassVar[int]
    from_agent_id: str
    to_agent_id: str
    assigned: int
    succeeded: int
    failed: int
    mean_duration: _duration_pb2.Duration
    last_at: _timestamp_pb2.Timestamp
    def __init__(self, from_agent_id: _Optional[str] = ..., to_agent_id: _Optional[str] = ..., assigned: _Optional[int] = ..., succeeded: _Optional[int] = ..., failed: _Optional[int] = ..., mean_duration: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., last_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...
