from __future__ import annotations

import grpc
import grpc.aio
import pytest
from google.protobuf.any_pb2 import Any
from google.rpc import error_details_pb2, status_pb2
from hypothesis import given
from hypothesis import strategies as st

from modelyard.rpc.errors import DETAILS_KEY, Refusal, Violation, from_rpc_error, invalid, to_status
from modelyard.rpc.reasons import CODES, Reason


def failed(code: grpc.StatusCode, message: str = "", trailing: tuple = ()) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(*trailing), details=message)


def over_the_wire(refusal: Refusal) -> Refusal:
    status = to_status(refusal)
    return from_rpc_error(failed(status.code, status.details, status.trailing_metadata))


@pytest.mark.parametrize("reason", Reason)
def test_every_reason_round_trips(reason: Reason) -> None:
    back = over_the_wire(
        Refusal(reason, "why", [Violation("a.b[0]", "c")], retry_after=1.25, metadata={"request_id": "x"})
    )
    assert back.reason is reason
    assert back.code is CODES[reason]
    assert back.message == "why"
    assert back.violations == (Violation("a.b[0]", "c"),)
    assert back.retry_after == 1.25
    assert back.metadata == {"request_id": "x"}
    assert not back.transport


def test_nothing_is_made_up() -> None:
    back = over_the_wire(Refusal(Reason.DRAINING, "bye"))
    assert (back.violations, back.retry_after, back.metadata) == ((), None, {})


@given(
    message=st.text(),
    violations=st.lists(st.builds(Violation, st.text(), st.text()), max_size=100),
    metadata=st.dictionaries(st.text(), st.text()),
    scale=st.sampled_from([1, 1, 1000]),
)
def test_any_refusal_fits_into_trailers(message, violations, metadata, scale) -> None:
    refusal = Refusal(
        Reason.INVALID_REQUEST,
        message * scale,
        [Violation(v.field * scale, v.description * scale) for v in violations],
        retry_after=0,
        metadata={key: value * scale for key, value in metadata.items()},
    )
    status = to_status(refusal)
    on_the_wire = 3 * len(status.details.encode()) + 4 / 3 * len(dict(status.trailing_metadata)[DETAILS_KEY])
    assert on_the_wire < 8000
    back = over_the_wire(refusal)
    assert back.reason is Reason.INVALID_REQUEST
    if len(message.encode()) * scale <= 1000:
        assert back.message == message * scale


def test_long_message_is_cut_at_a_character() -> None:
    back = over_the_wire(Refusal(Reason.INTERNAL, "é" * 5000))
    assert back.message.endswith("é…")
    assert len(back.message.encode()) <= 1000


def test_lone_surrogate_travels_as_a_question_mark() -> None:
    assert over_the_wire(Refusal(Reason.INTERNAL, "a\ud800b")).message == "a?b"


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (grpc.StatusCode.UNAVAILABLE, Reason.SERVERS_AWAY),
        (grpc.StatusCode.CANCELLED, Reason.STREAM_BROKEN),
        (grpc.StatusCode.DEADLINE_EXCEEDED, Reason.DEADLINE_EXCEEDED),
        (grpc.StatusCode.UNIMPLEMENTED, Reason.UNSUPPORTED),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, Reason.SERVER_BUSY),
        (grpc.StatusCode.PERMISSION_DENIED, Reason.INTERNAL),
        (grpc.StatusCode.UNKNOWN, Reason.INTERNAL),
    ],
)
def test_status_without_details(code: grpc.StatusCode, reason: Reason) -> None:
    refusal = from_rpc_error(failed(code, "boo"))
    assert (refusal.reason, refusal.code, refusal.message, refusal.transport) == (reason, code, "boo", True)


def test_every_code_has_a_fallback() -> None:
    for code in grpc.StatusCode:
        assert from_rpc_error(failed(code)).transport


def test_grpcs_own_size_limit_is_an_invalid_request() -> None:
    error = failed(grpc.StatusCode.RESOURCE_EXHAUSTED, "SERVER: Received message larger than max (9 vs. 8)")
    assert from_rpc_error(error).reason is Reason.INVALID_REQUEST


def details(*messages) -> bytes:
    status = status_pb2.Status(code=14, message="m")
    for message in messages:
        status.details.add().Pack(message)
    return status.SerializeToString()


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\xff\xff\xff",
        details(),
        details(error_details_pb2.ErrorInfo(reason="QUEUE_FULL", domain="other")),
        details(error_details_pb2.ErrorInfo(reason="FROM_THE_FUTURE", domain="modelyard")),
        status_pb2.Status(details=[Any(type_url="x/google.rpc.ErrorInfo", value=b"\xff")]).SerializeToString(),
    ],
)
def test_foreign_details_fall_back_to_the_code(raw: bytes) -> None:
    refusal = from_rpc_error(failed(grpc.StatusCode.UNAVAILABLE, "m", ((DETAILS_KEY, raw),)))
    assert refusal.reason is Reason.SERVERS_AWAY
    assert refusal.transport


def test_unknown_reason_is_kept_for_people() -> None:
    raw = details(error_details_pb2.ErrorInfo(reason="FROM_THE_FUTURE", domain="modelyard"))
    refusal = from_rpc_error(failed(grpc.StatusCode.UNAVAILABLE, "m", ((DETAILS_KEY, raw),)))
    assert refusal.metadata["reason"] == "FROM_THE_FUTURE"


def test_invalid_names_the_first_fields() -> None:
    refusal = invalid(Violation(f"f{i}", "bad") for i in range(5))
    assert refusal.message == "f0: bad; f1: bad; f2: bad; and 2 more"
    assert len(refusal.violations) == 5
