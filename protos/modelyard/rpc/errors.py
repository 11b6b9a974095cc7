"""Refusals and the rich gRPC statuses they travel as.

A refusal crosses the wire as a status with `google.rpc.ErrorInfo` (reason, domain, metadata),
for malformed requests `google.rpc.BadRequest`, and where waiting helps `google.rpc.RetryInfo`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import grpc
from google.rpc import error_details_pb2, status_pb2

from modelyard.rpc.reasons import CODES, DOMAIN, Reason

DETAILS_KEY = "grpc-status-details-bin"

# Statuses travel in HTTP/2 trailers, which peers cut off at 8 KiB. The message goes there twice,
# once percent-encoded (up to 3 bytes a byte), once in the details (base64: 4 for 3).
_MESSAGE_BYTES = 1000
_VIOLATION_BYTES = 1800
_METADATA_BYTES = 700


@dataclass(frozen=True, slots=True)
class Violation:
    """One malformed field, as in `google.rpc.BadRequest`."""

    field: str
    """Path, for example "input.messages[2].content[0].text"."""
    description: str


class Refusal(Exception):
    """A request that is refused, or a call that failed, with its reason.

    `code` is the reason's code, except for statuses that did not come from modelyard.
    `transport` is True where no peer said so: the connection failed, the deadline passed
    here, or the peer knows nothing of reasons; the reason is then the nearest one.
    """

    def __init__(
        self,
        reason: Reason,
        message: str,
        violations: Iterable[Violation] = (),
        *,
        retry_after: float | None = None,
        metadata: Mapping[str, str] | None = None,
        code: grpc.StatusCode | None = None,
        transport: bool = False,
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        """For the caller, whose request it may quote; not for logs (modelyard.program.privacy)."""
        self.violations = tuple(violations)
        self.retry_after = retry_after
        """Seconds after which a retry may help."""
        self.metadata: Mapping[str, str] = dict(metadata or {})
        self.code = code or CODES[reason]
        self.transport = transport

    def __repr__(self) -> str:
        return f"Refusal({self.reason}, {self.message!r})"


def invalid(violations: Iterable[Violation]) -> Refusal:
    """The refusal of a malformed request; `violations` must not be empty."""
    found = tuple(violations)
    message = "; ".join(f"{violation.field}: {violation.description}" for violation in found[:3])
    if len(found) > 3:
        message += f"; and {len(found) - 3} more"
    return Refusal(Reason.INVALID_REQUEST, message, found)


class Status(NamedTuple):
    """What `ServicerContext.abort_with_status` reads; satisfies `grpc.Status`."""

    code: grpc.StatusCode
    details: str
    trailing_metadata: tuple[tuple[str, str | bytes], ...]


def to_status(refusal: Refusal) -> Status:
    """The rich status of a refusal, cut to what fits into trailers."""
    code = CODES[refusal.reason]
    message = _cut(refusal.message, _MESSAGE_BYTES)
    status = status_pb2.Status(code=code.value[0], message=message)
    metadata = _fitting(refusal.metadata.items(), _METADATA_BYTES)
    status.details.add().Pack(
        error_details_pb2.ErrorInfo(reason=refusal.reason.value, domain=DOMAIN, metadata=dict(metadata))
    )
    if refusal.violations:
        pairs = _fitting(((v.field, v.description) for v in refusal.violations), _VIOLATION_BYTES)
        bad = error_details_pb2.BadRequest()
        for field, description in pairs:
            bad.field_violations.add(field=field, description=description)
        status.details.add().Pack(bad)
    if refusal.retry_after is not None:
        info = error_details_pb2.RetryInfo()
        info.retry_delay.FromNanoseconds(max(0, round(refusal.retry_after * 1e9)))
        status.details.add().Pack(info)
    return Status(code, message, ((DETAILS_KEY, status.SerializeToString()),))


def from_rpc_error(error: grpc.RpcError) -> Refusal:
    """The refusal that a failed call carries (grpc.aio and synchronous calls alike).

    A status without modelyard's details becomes the nearest reason with `transport` set.
    """
    source: Any = error
    code: grpc.StatusCode = source.code() or grpc.StatusCode.UNKNOWN
    message: str = source.details() or ""
    for key, value in source.trailing_metadata() or ():
        if key == DETAILS_KEY:
            return _from_details(value, code, message)
    return _fallback(code, message)


def _from_details(raw: bytes, code: grpc.StatusCode, message: str) -> Refusal:
    status = status_pb2.Status()
    info = error_details_pb2.ErrorInfo()
    bad = error_details_pb2.BadRequest()
    retry = error_details_pb2.RetryInfo()
    try:
        status.ParseFromString(raw)
        for detail in status.details:
            for target in (info, bad, retry):
                if detail.Is(target.DESCRIPTOR):
                    detail.Unpack(target)
    except Exception:  # a peer's malformed details must not hide the status itself
        return _fallback(code, message)
    retry_after = retry.retry_delay.ToNanoseconds() / 1e9 if retry.HasField("retry_delay") else None
    if info.domain != DOMAIN or info.reason not in Reason.__members__:
        # A foreign service, or a newer peer with a reason we do not know: the code still tells.
        plain = _fallback(code, message)
        extra = {**info.metadata, **({"reason": info.reason} if info.reason else {})}
        return Refusal(plain.reason, message, retry_after=retry_after, metadata=extra, code=code, transport=True)
    return Refusal(
        Reason(info.reason),
        message,
        tuple(Violation(v.field, v.description) for v in bad.field_violations),
        retry_after=retry_after,
        metadata=dict(info.metadata),
        code=code,
    )


_NEAREST: Mapping[grpc.StatusCode, Reason] = {
    grpc.StatusCode.INVALID_ARGUMENT: Reason.INVALID_REQUEST,
    grpc.StatusCode.OUT_OF_RANGE: Reason.INVALID_REQUEST,
    grpc.StatusCode.NOT_FOUND: Reason.UNKNOWN_MODEL,
    grpc.StatusCode.FAILED_PRECONDITION: Reason.NO_CAPABLE_SERVER,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Reason.SERVER_BUSY,
    grpc.StatusCode.UNAVAILABLE: Reason.SERVERS_AWAY,
    # A server that is torn down cancels its calls; our own cancelling raises CancelledError instead.
    grpc.StatusCode.CANCELLED: Reason.STREAM_BROKEN,
    grpc.StatusCode.DEADLINE_EXCEEDED: Reason.DEADLINE_EXCEEDED,
    grpc.StatusCode.UNIMPLEMENTED: Reason.UNSUPPORTED,
    grpc.StatusCode.ABORTED: Reason.SUPERSEDED,
}


def _fallback(code: grpc.StatusCode, message: str) -> Refusal:
    reason = _NEAREST.get(code, Reason.INTERNAL)
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "message larger than max" in message:
        # gRPC's own limit answers before any handler sees the call: "... (N vs. M)".
        reason, message = Reason.INVALID_REQUEST, f"the message is too large: {message}"
    return Refusal(reason, message or code.name.lower(), code=code, transport=True)


def _cut(text: str, limit: int) -> str:
    """`text`, at most `limit` bytes of UTF-8, with lone surrogates (which cannot travel) replaced."""
    raw = text.encode("utf-8", "replace")
    if len(raw) <= limit:
        return raw.decode()
    return raw[: limit - 3].decode("utf-8", "ignore") + "…"


def _fitting(pairs: Iterable[tuple[str, str]], limit: int) -> list[tuple[str, str]]:
    """As many of the pairs as fit into `limit` bytes, the values cut to a quarter of it."""
    fitting: list[tuple[str, str]] = []
    left = limit
    for key, value in pairs:
        pair = _cut(key, limit // 4), _cut(value, limit // 4)
        left -= len(pair[0].encode()) + len(pair[1].encode()) + 8
        if left < 0:
            break
        fitting.append(pair)
    return fitting
