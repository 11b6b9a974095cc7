"""Settings of the model server."""

from __future__ import annotations

import re
import socket
from typing import Any, Literal

from pydantic import Field, field_validator

from modelyard.program.settings import Settings

SECTION = "model_server"
PROGRAM = "modelyard model-server"

_SERVER_ID = re.compile(r"[a-z0-9._-]{1,63}")
_ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\s:/\[\]]{1,253}):(\d{1,5})")

Address = str
"""host:port"""


def is_address(text: str) -> bool:
    match = _ADDRESS.fullmatch(text)
    return match is not None and 1 <= int(match[2]) <= 65535


def default_server_id(host_name: str, engine: str) -> str:
    """A server id from the names of host and engine, so that one host can run several engines."""
    text = f"{host_name.split('.')[0]}-{engine}".lower()
    return re.sub(r"[^a-z0-9._-]+", "-", text).strip("-")[:63] or "server"


class ModelServerSettings(Settings):
    """One model server: one engine, the control planes it reports to, and its limits."""

    server_id: str = Field(
        "", description="Name in the fleet, stable over restarts: `a-z0-9._-`, at most 63. Empty: host name and engine."
    )
    engine: str = Field("simulated", min_length=1, description="Name of the engine plug-in.")
    engine_settings: dict[str, Any] = Field(
        default_factory=dict, description="Settings of the engine itself, as YAML; see the engine's documentation."
    )
    host: str = Field(
        "127.0.0.1",
        min_length=1,
        description="Address to listen on. Other hosts get in only if this is changed: there is no authentication.",
    )
    port: int = Field(0, ge=0, le=65535, description="Port to listen on; 0: a free one.")
    advertise: str = Field("", description="host:port that control planes dial. Empty: where the server listens.")
    orchestrators: tuple[Address, ...] = Field(
        ("127.0.0.1:7460",), description="Control planes to report to, host:port each. Empty: stand alone."
    )
    labels: dict[str, str] = Field(default_factory=dict, max_length=32, description="Free labels of the server.")
    max_waiting: int | None = Field(
        None, ge=0, description="Requests that may wait beyond the engine's slots. Empty: twice the slots."
    )
    max_request_bytes: int = Field(8 << 20, ge=1024, le=1 << 30, description="Largest request accepted.")
    max_generation_seconds: float = Field(
        600.0, gt=0, description="Longest a request may take, whatever deadline its caller gives."
    )
    slow_reader_seconds: float = Field(
        10.0, gt=0, description="How long a caller may leave a piece of its answer unread before it is cut off."
    )
    keep_warm: tuple[str, ...] = Field(
        (), description="Models that are loaded at the start, after a restart of the engine, and when found cold."
    )
    idle_unload_seconds: float = Field(
        0.0, ge=0, description="Unload a model that nobody has used for so long; 0: never. Not those kept warm."
    )
    memory_limit_bytes: int = Field(
        0, ge=0, description="Memory that warm models may take together; idle ones make room for another. 0: no limit."
    )
    stall_seconds: float | None = Field(
        None,
        gt=0,
        description=(
            "Silence of a model with work in hand, beyond what its prompts need, after which the engine is unhealthy. "
            "Empty: 10, or 120 for engines whose tokens cost money, which may think unheard."
        ),
    )
    canary_seconds: float = Field(
        20.0,
        ge=0,
        description="Generate one token on a warm model that nobody has used for so long, to see that it works; "
        "0: never. Never with engines whose tokens cost money.",
    )
    exit_when_stuck: bool = Field(
        False,
        description="End the process, status 1, when the engine stopped producing tokens and cannot be restarted "
        "inside it; for a supervisor that starts it again.",
    )
    require_ticket: bool = Field(
        False,
        description="Refuse Generate and Embed from anybody but the control planes that the server reports to and "
        "clients that they have given a ticket.",
    )
    drain_grace: float = Field(
        30.0, ge=0, description="Seconds that running requests have to end when the server is stopped."
    )
    watch_parent: bool = Field(False, description="Stop when standard input ends, as it does when the parent dies.")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least level that is logged.")
    log_format: Literal["text", "json"] = Field("text", description="Log for people, or one JSON object a line.")

    @field_validator("server_id")
    @classmethod
    def _valid_id(cls, value: str) -> str:
        if value and not _SERVER_ID.fullmatch(value):
            raise ValueError("must be 1 to 63 lower-case letters, digits, '.', '_' or '-'")
        return value

    @field_validator("advertise")
    @classmethod
    def _valid_endpoint(cls, value: str) -> str:
        if value and not is_address(value):
            raise ValueError("must be host:port")
        return value

    @field_validator("orchestrators")
    @classmethod
    def _valid_targets(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for address in value:
            if not is_address(address):
                raise ValueError(f"{address!r} is not host:port")
        if len(set(value)) != len(value):
            raise ValueError("names a control plane twice")
        return value

    def identity_name(self) -> str:
        """The server id, made up from host and engine where none was given."""
        return self.server_id or default_server_id(socket.gethostname(), self.engine)


def endpoint(settings: ModelServerSettings, port: int) -> str:
    """Where control planes reach a server that listens on `port`."""
    if settings.advertise:
        return settings.advertise
    host = settings.host
    if host in ("0.0.0.0", "::", "[::]", "*"):  # noqa: S104  compared with, not bound
        host = socket.gethostname()  # a wildcard cannot be dialled
    return f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"
