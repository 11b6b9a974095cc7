"""Tickets of direct calls: how they are signed and read. See modelyard/v1/ticket.proto."""

from __future__ import annotations

import hmac
from functools import lru_cache

from google.protobuf.message import DecodeError

from modelyard.v1.ticket_pb2 import Ticket

MAC_BYTES = 32
_MOST_BYTES = 4096
"""Of a whole ticket: names in it have limits of their own, this keeps a hostile caller's hashing short."""


def sign(key: bytes, ticket: Ticket) -> bytes:
    """The ticket as it travels."""
    body = ticket.SerializeToString()
    return _mac(key, body) + body


def verified(key: bytes, signed: bytes) -> bool:
    """Whether it was signed with this very key, which must not be empty, and not changed since."""
    if not key or not MAC_BYTES < len(signed) <= _MOST_BYTES:
        return False
    return hmac.compare_digest(_mac(key, signed[MAC_BYTES:]), signed[:MAC_BYTES])


def read(signed: bytes) -> Ticket | None:
    """What a ticket says, verified or not; None if it says nothing."""
    try:
        return Ticket.FromString(signed[MAC_BYTES:])
    except DecodeError:
        return None


def _mac(key: bytes, body: bytes) -> bytes:
    """HMAC-SHA256. Copies one that was begun with the key: hmac.digest() looks the algorithm up for each call, and lets
    go of the interpreter's lock, which other threads then take."""
    begun = _begun(key).copy()
    begun.update(body)
    return begun.digest()


@lru_cache(maxsize=1024)
def _begun(key: bytes) -> hmac.HMAC:
    """One key for each model server, as long as it is attached."""
    return hmac.new(key, digestmod="sha256")
