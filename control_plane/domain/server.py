"""A model server as the control plane sees it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from types import MappingProxyType

import msgspec

from control_plane.domain.model import ModelCard, ServerId


class LeaseState(IntEnum):
    """Numbers equal those of the contract."""

    LIVE = 1
    SUSPECT = 2
    LOST = 3
    DRAINING = 4


class Health(IntEnum):
    """Numbers equal those of the contract."""

    STARTING = 1
    READY = 2
    UNHEALTHY = 3


class BreakerState(IntEnum):
    """Numbers equal those of the contract."""

    CLOSED = 1
    OPEN = 2
    HALF_OPEN = 3


class Identity(msgspec.Struct, frozen=True):
    server_id: ServerId
    instance_id: str
    endpoint: str
    """host:port of the ModelServer service."""
    labels: Mapping[str, str] = msgspec.field(default_factory=lambda: MappingProxyType({}))
    version: str = ""


class Failed(msgspec.Struct, frozen=True):
    """A server as it was when it failed a request; started anew, it is another one."""

    server_id: ServerId
    instance_id: str


class Hardware(msgspec.Struct, frozen=True):
    device: str = ""
    memory_bytes: int = 0
    cpu_cores: int = 0
    platform: str = ""
    memory_used_bytes: int = 0
    """Of memory_bytes: what models take now. 0: not known."""


class Load(msgspec.Struct, frozen=True):
    slots: int
    running: int = 0
    waiting: int = 0
    foreign: int = 0
    """Requests in hand that this control plane did not send."""
    kv_cache_utilization: float = 0.0


@dataclass(frozen=True, slots=True)
class Pool:
    """Connections from a model server to its engine."""

    size: int = 0
    """Most at the same time. 0: no bound."""
    in_use: int = 0
    opened: int = 0
    """Requests that had to open one."""
    reused: int = 0
    """Requests that found an open one."""


class Report(msgspec.Struct, frozen=True):
    """The whole state of a server at one moment, checked and converted."""

    identity: Identity
    engine: str
    engine_version: str
    hardware: Hardware
    models: tuple[ModelCard, ...]
    load: Load
    health: Health
    health_detail: str = ""
    draining: bool = False
    """The server itself says that it takes nothing new."""
    manages_models: bool = False
    """Models can be pulled, loaded and unloaded."""
    pool: Pool | None = None
    """None: the engine is not reached over a network."""
    lease_epoch: int = 0
    """That the server was last told of. 0: none in this stream."""
    takes_tickets: bool = False
    """Clients may call it with a ticket."""
    needs_tickets: bool = False
    """It serves nobody without one."""
