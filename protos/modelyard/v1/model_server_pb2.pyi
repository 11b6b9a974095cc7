from modelyard.v1 import fleet_pb2 as _fleet_pb2
from modelyard.v1 import generation_pb2 as _generation_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DescribeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DescribeResponse(_message.Message):
    __slots__ = ("report",)
    REPORT_FIELD_NUMBER: _ClassVar[int]
    report: _fleet_pb2.ServerReport
    def __init__(self, report: _Optional[_Union[_fleet_pb2.ServerReport, _Mapping]] = ...) -> None: ...

class ModelServerGenerateRequest(_message.Message):
    __slots__ = ("model", "input", "orchestrator_id", "request_id", "ticket")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    INPUT_FIELD_NUMBER: _ClassVar[int]
    ORCHESTRATOR_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    model: str
    input: _generation_pb2.GenerationInput
    orchestrator_id: str
    request_id: str
    ticket: bytes
    def __init__(self, model: _Optional[str] = ..., input: _Optional[_Union[_generation_pb2.GenerationInput, _Mapping]] = ..., orchestrator_id: _Optional[str] = ..., request_id: _Optional[str] = ..., ticket: _Optional[bytes] = ...) -> None: ...

class ModelServerGenerateResponse(_message.Message):
    __slots__ = ("delta", "result")
    DELTA_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    delta: _generation_pb2.GenerationDelta
    result: _generation_pb2.GenerationResult
    def __init__(self, delta: _Optional[_Union[_generation_pb2.GenerationDelta, _Mapping]] = ..., result: _Optional[_Union[_generation_pb2.GenerationResult, _Mapping]] = ...) -> None: ...

class ModelServerCompleteRequest(_message.Message):
    __slots__ = ("model", "input", "orchestrator_id", "request_id", "ticket")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    INPUT_FIELD_NUMBER: _ClassVar[int]
    ORCHESTRATOR_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    model: str
    input: _generation_pb2.GenerationInput
    orchestrator_id: str
    request_id: str
    ticket: bytes
    def __init__(self, model: _Optional[str] = ..., input: _Optional[_Union[_generation_pb2.GenerationInput, _Mapping]] = ..., orchestrator_id: _Optional[str] = ..., request_id: _Optional[str] = ..., ticket: _Optional[bytes] = ...) -> None: ...

class ModelServerCompleteResponse(_message.Message):
    __slots__ = ("delta", "result")
    DELTA_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    delta: _generation_pb2.GenerationDelta
    result: _generation_pb2.GenerationResult
    def __init__(self, delta: _Optional[_Union[_generation_pb2.GenerationDelta, _Mapping]] = ..., result: _Optional[_Union[_generation_pb2.GenerationResult, _Mapping]] = ...) -> None: ...

class ModelServerEmbedRequest(_message.Message):
    __slots__ = ("model", "inputs", "orchestrator_id", "request_id", "ticket")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    ORCHESTRATOR_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    model: str
    inputs: _containers.RepeatedScalarFieldContainer[str]
    orchestrator_id: str
    request_id: str
    ticket: bytes
    def __init__(self, model: _Optional[str] = ..., inputs: _Optional[_Iterable[str]] = ..., orchestrator_id: _Optional[str] = ..., request_id: _Optional[str] = ..., ticket: _Optional[bytes] = ...) -> None: ...

class ModelServerEmbedResponse(_message.Message):
    __slots__ = ("embeddings", "usage")
    EMBEDDINGS_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    embeddings: _containers.RepeatedCompositeFieldContainer[_generation_pb2.Embedding]
    usage: _generation_pb2.Usage
    def __init__(self, embeddings: _Optional[_Iterable[_Union[_generation_pb2.Embedding, _Mapping]]] = ..., usage: _Optional[_Union[_generation_pb2.Usage, _Mapping]] = ...) -> None: ...

class CountTokensRequest(_message.Message):
    __slots__ = ("model", "input")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    INPUT_FIELD_NUMBER: _ClassVar[int]
    model: str
    input: _generation_pb2.GenerationInput
    def __init__(self, model: _Optional[str] = ..., input: _Optional[_Union[_generation_pb2.GenerationInput, _Mapping]] = ...) -> None: ...

class CountTokensResponse(_message.Message):
    __slots__ = ("prompt_tokens",)
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    prompt_tokens: int
    def __init__(self, prompt_tokens: _Optional[int] = ...) -> None: ...

class ModelServerPullModelRequest(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: str
    def __init__(self, model: _Optional[str] = ...) -> None: ...

class ModelServerPullModelResponse(_message.Message):
    __slots__ = ("progress",)
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    progress: _fleet_pb2.ModelProgress
    def __init__(self, progress: _Optional[_Union[_fleet_pb2.ModelProgress, _Mapping]] = ...) -> None: ...

class ModelServerLoadModelRequest(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: str
    def __init__(self, model: _Optional[str] = ...) -> None: ...

class ModelServerLoadModelResponse(_message.Message):
    __slots__ = ("progress",)
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    progress: _fleet_pb2.ModelProgress
    def __init__(self, progress: _Optional[_Union[_fleet_pb2.ModelProgress, _Mapping]] = ...) -> None: ...

class ModelServerUnloadModelRequest(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: str
    def __init__(self, model: _Optional[str] = ...) -> None: ...

class ModelServerUnloadModelResponse(_message.Message):
    __slots__ = ("progress",)
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    progress: _fleet_pb2.ModelProgress
    def __init__(self, progress: _Optional[_Union[_fleet_pb2.ModelProgress, _Mapping]] = ...) -> None: ...
