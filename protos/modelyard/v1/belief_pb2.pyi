from google.protobuf import struct_pb2 as _struct_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Belief(_message.Message):
    __slots__ = ("key", "value", "confidence", "source", "updated_at", "version")
    KEY_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    CONFIDENCE_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    UPDATED_AT_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    key: str
    value: _struct_pb2.Value
    confidence: float
    source: str
    updated_at: _timestamp_pb2.Timestamp
    version: int
    def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[_struct_pb2.Value, _Mapping]] = ..., confidence: _Optional[float] = ..., source: _Optional[str] = ..., updated_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., version: _Optional[int] = ...) -> None: ...

class PutBeliefRequest(_message.Message):
    __slots__ = ("belief",)
    BELIEF_FIELD_NUMBER: _ClassVar[int]
    belief: Belief
    def __init__(self, belief: _Optional[_Union[Belief, _Mapping]] = ...) -> None: ...

class PutBeliefResponse(_message.Message):
    __slots__ = ("belief",)
    BELIEF_FIELD_NUMBER: _ClassVar[int]
    belief: Belief
    def __init__(self, belief: _Optional[_Union[Belief, _Mapping]] = ...) -> None: ...

class GetBeliefRequest(_message.Message):
    __slots__ = ("key",)
    KEY_FIELD_NUMBER: _ClassVar[int]
    key: str
    def __init__(self, key: _Optional[str] = ...) -> None: ...

class GetBeliefResponse(_message.Message):
    __slots__ = ("belief",)
    BELIEF_FIELD_NUMBER: _ClassVar[int]
    belief: Belief
    def __init__(self, belief: _Optional[_Union[Belief, _Mapping]] = ...) -> None: ...

class ListBeliefsRequest(_message.Message):
    __slots__ = ("prefix", "page_size", "page_token")
    PREFIX_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    prefix: str
    page_size: int
    page_token: str
    def __init__(self, prefix: _Optional[str] = ..., page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListBeliefsResponse(_message.Message):
    __slots__ = ("beliefs", "next_page_token")
    BELIEFS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    beliefs: _containers.RepeatedCompositeFieldContainer[Belief]
    next_page_token: str
    def __init__(self, beliefs: _Optional[_Iterable[_Union[Belief, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class DeleteBeliefRequest(_message.Message):
    __slots__ = ("key",)
    KEY_FIELD_NUMBER: _ClassVar[int]
    key: str
    def __init__(self, key: _Optional[str] = ...) -> None: ...

class DeleteBeliefResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WatchBeliefsRequest(_message.Message):
    __slots__ = ("prefix", "after_version")
    PREFIX_FIELD_NUMBER: _ClassVar[int]
    AFTER_VERSION_FIELD_NUMBER: _ClassVar[int]
    prefix: str
    after_version: int
    def __init__(self, prefix: _Optional[str] = ..., after_version: _Optional[int] = ...) -> None: ...

class WatchBeliefsResponse(_message.Message):
    __slots__ = ("belief", "version", "deleted")
    BELIEF_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DELETED_FIELD_NUMBER: _ClassVar[int]
    belief: Belief
    version: int
    deleted: bool
    def __init__(self, belief: _Optional[_Union[Belief, _Mapping]] = ..., version: _Optional[int] = ..., deleted: bool = ...) -> None: ...
