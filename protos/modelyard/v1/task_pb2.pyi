from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from typing import ClassVar as _ClassVar

DESCRIPTOR: _descriptor.FileDescriptor

class TaskType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TASK_TYPE_UNSPECIFIED: _ClassVar[TaskType]
    TASK_TYPE_CHAT: _ClassVar[TaskType]
    TASK_TYPE_REASONING: _ClassVar[TaskType]
    TASK_TYPE_CODE_GENERATION: _ClassVar[TaskType]
    TASK_TYPE_CODE_REVIEW: _ClassVar[TaskType]
    TASK_TYPE_SUMMARIZATION: _ClassVar[TaskType]
    TASK_TYPE_TRANSLATION: _ClassVar[TaskType]
    TASK_TYPE_WRITING: _ClassVar[TaskType]
    TASK_TYPE_EXTRACTION: _ClassVar[TaskType]
    TASK_TYPE_CLASSIFICATION: _ClassVar[TaskType]
    TASK_TYPE_DATA_ANALYSIS: _ClassVar[TaskType]
    TASK_TYPE_RESEARCH: _ClassVar[TaskType]
    TASK_TYPE_PLANNING: _ClassVar[TaskType]
    TASK_TYPE_TOOL_USE: _ClassVar[TaskType]
    TASK_TYPE_VISION: _ClassVar[TaskType]
    TASK_TYPE_EMBEDDING: _ClassVar[TaskType]

class TaskPriority(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TASK_PRIORITY_UNSPECIFIED: _ClassVar[TaskPriority]
    TASK_PRIORITY_LOW: _ClassVar[TaskPriority]
    TASK_PRIORITY_NORMAL: _ClassVar[TaskPriority]
    TASK_PRIORITY_HIGH: _ClassVar[TaskPriority]
    TASK_PRIORITY_CRITICAL: _ClassVar[TaskPriority]
TASK_TYPE_UNSPECIFIED: TaskType
TASK_TYPE_CHAT: TaskType
TASK_TYPE_REASONING: TaskType
TASK_TYPE_CODE_GENERATION: TaskType
TASK_TYPE_CODE_REVIEW: TaskType
TASK_TYPE_SUMMARIZATION: TaskType
TASK_TYPE_TRANSLATION: TaskType
TASK_TYPE_WRITING: TaskType
TASK_TYPE_EXTRACTION: TaskType
TASK_TYPE_CLASSIFICATION: TaskType
TASK_TYPE_DATA_ANALYSIS: TaskType
TASK_TYPE_RESEARCH: TaskType
TASK_TYPE_PLANNING: TaskType
TASK_TYPE_TOOL_USE: TaskType
TASK_TYPE_VISION: TaskType
TASK_TYPE_EMBEDDING: TaskType
TASK_PRIORITY_UNSPECIFIED: TaskPriority
TASK_PRIORITY_LOW: TaskPriority
TASK_PRIORITY_NORMAL: TaskPriority
TASK_PRIORITY_HIGH: TaskPriority
TASK_PRIORITY_CRITICAL: TaskPriority
