"""Tickets of direct calls: how they are signed and read. See modelyard/v1/ticket.proto."""

from __future__ import annotations

import hmac

from google.protobuf.message import DecodeError

from modelyard.v1.ticket_pb2 import Ticket

MAC_BYTES = 32
_MOST_BYTES = 4096
"""Of a whole ticket: names in it have limits of their own, this keeps a hostile caller's hashing short."""


def sign(key: bytes, ticket: Ticket) -> bytes:
    """The ticket as it travels."""
    body = ticket.SerializeToString()
    return hmac.digest(key, body, "sha256") + body


def verified(key: bytes, signed: bytes) -> bool:
    """Whether it was signed with this very key, which must not be empty, and not changed since."""
    if not key or not MAC_BYTES < len(signed) <= _MOST_BYTES:
        return False
    return hmac.compare_digest(hmac.digest(key, signed[MAC_BYTES:], "sha256"), signed[:MAC_BYTES])


def read(signed: bytes) -> Ticket | None:
    """What a ticket says, verified or not; None if it says nothing."""
    try:
        return Ticket.FromString(signed[MAC_BYTES:])
    except DecodeError:
        return None
