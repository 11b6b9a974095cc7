"""What the conformance suite needs of a model server that it is to start itself."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Endpoint:
    """A running model server."""

    address: str
    """host:port of the ModelServer service."""
    model: str
    """The model to use."""
    embedding_model: str = ""
    """Empty: `model`."""
    vision_model: str = ""
    """Empty: `model`."""


@dataclass(frozen=True)
class Fault:
    """What goes wrong behind the model server, for every request, until it is replaced."""

    kind: Literal["hang", "stall", "reset", "status", "garbage"]
    """hang: accepted, then not a byte; stall: no more after some pieces of the answer; reset: the
    connection is cut in the middle of the answer; status: the vendor's error; garbage: bytes that are no answer."""
    status: int = 0
    """With "status": the HTTP status, or the engine's nearest to it."""
    retry_after: float | None = None
    """With "status": seconds that the vendor asks to wait, if it does."""
    pieces: int = 2
    """With "stall" and "reset": pieces of the answer that come before."""


@dataclass(frozen=True)
class Target:
    """One entry of `TARGETS` in a module of tests/conformance/targets."""

    name: str
    """For example "ollama (stand-in)"."""
    start: Callable[[], AbstractAsyncContextManager[Endpoint]]
    """Starts everything. May call pytest.skip where something is missing."""
    faults: Callable[[Endpoint, Fault | None], None] | None = None
    """Makes what stands behind the model server fail from now on; None: work again. Raises NotImplementedError for
    a fault that it cannot have. The engine's patience with a silent vendor must be a few seconds at most."""
