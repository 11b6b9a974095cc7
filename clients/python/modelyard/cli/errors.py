"""Expected failures: one line with its cure on standard error, and an exit status that tells them apart.

1    failed
2    the command line or the request is wrong
3    no control plane answers
4    no such model or server, or none that could ever serve the request
5    unavailable or overloaded for now, or out of time
130  interrupted
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modelyard.client import ModelyardError

FAILED, USAGE, UNREACHABLE, NOT_FOUND, UNAVAILABLE, INTERRUPTED = 1, 2, 3, 4, 5, 130

_UP = "start one with `modelyard up`, or name another with --address"
SERVERS = "see `modelyard servers`"
AGENTS = "see `modelyard agents list`"
TASKS = "see `modelyard tasks list`"

# Reason -> (exit status, cure). The reasons are those of the error table in orchestrator.proto.
REASONS: Mapping[str, tuple[int, str]] = {
    "INVALID_REQUEST": (USAGE, ""),
    "CONTEXT_TOO_LONG": (USAGE, "shorten the prompt, or choose a --model with a longer context"),
    "UNKNOWN_MODEL": (NOT_FOUND, "see `modelyard models`"),
    "UNKNOWN_SERVER": (NOT_FOUND, SERVERS),
    "UNKNOWN_TASK": (NOT_FOUND, TASKS),
    "UNKNOWN_BELIEF": (NOT_FOUND, "see `modelyard beliefs list`"),
    "UNKNOWN_REQUEST": (NOT_FOUND, "judge an answer while it is fresh; `generate --json` tells its request_id"),
    "UNKNOWN_AGENT": (NOT_FOUND, AGENTS),
    "UNKNOWN_ASSIGNMENT": (NOT_FOUND, ""),
    "NO_CAPABLE_AGENT": (NOT_FOUND, "`modelyard agents route --dry-run` with the same options shows every agent"),
    "AGENTS_BUSY": (UNAVAILABLE, "try again later"),
    "TOO_MANY_AGENTS": (FAILED, AGENTS),
    "IDEMPOTENCY_CONFLICT": (USAGE, "choose another key"),
    "WRONG_STATE": (FAILED, "see `modelyard tasks get`"),
    "NO_CAPABLE_SERVER": (NOT_FOUND, "`modelyard explain` with the same options shows every candidate"),
    "CONTENT_REFUSED": (FAILED, "reword it, or choose another --model"),
    "QUEUE_FULL": (UNAVAILABLE, "try again later"),
    "BUDGET_EXHAUSTED": (UNAVAILABLE, "see `modelyard usage` for what is left, and when it renews"),
    "SLOW_READER": (UNAVAILABLE, "read faster, or ask for less"),
    "SERVER_BUSY": (UNAVAILABLE, "try again later"),
    "RATE_LIMITED": (UNAVAILABLE, "try again later"),
    "OUT_OF_MEMORY": (UNAVAILABLE, "make room with `modelyard models unload`"),
    "STORE_FULL": (UNAVAILABLE, "free space on the disk of the control plane's database"),
    "STORE_UNAVAILABLE": (UNAVAILABLE, "the control plane's database does not answer; try again later"),
    "LEASE_LOST": (UNAVAILABLE, "try again later"),
    "FLEET_WARMING_UP": (UNAVAILABLE, "try again in a moment"),
    "SERVERS_AWAY": (UNAVAILABLE, SERVERS),
    "DRAINING": (UNAVAILABLE, "the control plane is shutting down"),
    "ATTEMPTS_EXHAUSTED": (UNAVAILABLE, SERVERS),
    "STREAM_BROKEN": (UNAVAILABLE, "the answer is unfinished; send the request again"),
    "ENGINE_FAILED": (UNAVAILABLE, SERVERS),
    "CREDENTIALS_REJECTED": (UNAVAILABLE, "mend the key on the model server's host"),
    "TICKET_REFUSED": (UNAVAILABLE, "send the request again, or with --no-direct"),
    "QUEUE_TIMEOUT": (UNAVAILABLE, "try a higher --priority, or add servers"),
    "DEADLINE_EXCEEDED": (UNAVAILABLE, "allow more time with --timeout"),
    "UNSUPPORTED": (FAILED, "choose another --model"),
    "SUPERSEDED": (FAILED, ""),
    "INTERNAL": (FAILED, ""),
    "CONNECTION_FAILED": (UNREACHABLE, _UP),
}


class CliError(Exception):
    """A failure found by the command line itself."""

    def __init__(self, message: str, status: int = FAILED, reason: str = "FAILED", cure: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.reason = reason
        self.cure = cure


@dataclass(frozen=True, slots=True)
class Failure:
    """What is told about a failure."""

    status: int
    reason: str
    message: str
    cure: str = ""
    retry_after: float | None = None
    violations: tuple[tuple[str, str], ...] = ()
    """Field and description of each malformed field."""
    request_id: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """Details, such as what each attempt failed with."""
    partial_text: str = ""
    """What had come of the answer."""

    def line(self) -> str:
        """For people: one line, but for the last words of a program."""
        message = self.message
        if self.retry_after:
            message += f" (retry after {self.retry_after:.3g} s)"
        if self.request_id and self.reason == "INTERNAL":
            message += f" (request {self.request_id})"
        return f"{message.rstrip('.')}; {self.cure}" if self.cure else message

    def to_dict(self) -> dict[str, Any]:
        """For programs; keys that say nothing are left out."""
        error: dict[str, Any] = {"reason": self.reason, "message": self.message}
        if self.cure:
            error["cure"] = self.cure
        if self.retry_after is not None:
            error["retry_after"] = self.retry_after
        if self.violations:
            error["violations"] = [{"field": field, "description": text} for field, text in self.violations]
        for name, value in (
            ("request_id", self.request_id),
            ("metadata", dict(self.metadata)),
            ("partial_text", self.partial_text),
        ):
            if value:
                error[name] = value
        return {"error": error}


class Failed(Exception):
    """Ends the command with a failure."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


NOT_UTF8 = "is not UTF-8 text; convert it first, for example with `iconv -f LATIN1 -t UTF-8`"


def words(error: Exception) -> str:
    """The message of an exception that is not modelyard's own."""
    if isinstance(error, UnicodeError):  # what the terminal or a file gave was taken over byte by byte
        return f"an argument or the input {NOT_UTF8}"
    return str(error)


def from_sdk(error: ModelyardError, address: str) -> Failure:
    """The failure behind an exception of the SDK (`modelyard.client.ModelyardError`)."""
    from modelyard.client import ConnectionFailed
    from modelyard.client._errors import FOREIGN_PEER

    reason = "CONNECTION_FAILED" if isinstance(error, ConnectionFailed) else error.reason
    status, cure = REASONS.get(reason, (FAILED, ""))
    if error.metadata.get("peer") == FOREIGN_PEER:
        cure = "name a control plane with --address"
    message = " ".join(str(error).split())
    if reason == "CONNECTION_FAILED":
        message = f"no control plane answers at {address}"
    return Failure(
        status,
        reason,
        message,
        cure,
        error.retry_after,
        tuple((found.field, found.description) for found in error.violations),
        error.request_id,
        error.metadata,
        error.partial.text if error.partial else "",
    )
