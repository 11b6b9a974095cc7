"""Kinds of work, urgency and model features. Numbers equal those of the contract."""

from __future__ import annotations

from enum import IntEnum, IntFlag


class TaskType(IntEnum):
    CHAT = 1
    REASONING = 2
    CODE_GENERATION = 3
    CODE_REVIEW = 4
    SUMMARIZATION = 5
    TRANSLATION = 6
    WRITING = 7
    EXTRACTION = 8
    CLASSIFICATION = 9
    DATA_ANALYSIS = 10
    RESEARCH = 11
    PLANNING = 12
    TOOL_USE = 13
    VISION = 14
    EMBEDDING = 15


class Priority(IntEnum):
    """Higher is served first."""

    LOW = 1
    NORMAL = 2
    HIGH = 3
    CRITICAL = 4


class Feature(IntFlag):
    """Features as a bit set; bit n stands for number n of the contract's ModelFeature."""

    NONE = 0
    STREAMING = 1 << 1
    FUNCTION_CALLING = 1 << 2
    VISION = 1 << 3
    JSON = 1 << 4
    JSON_SCHEMA = 1 << 5
    LOGPROBS = 1 << 6
    EMBEDDING = 1 << 7
    PREFIX_CACHE = 1 << 8
