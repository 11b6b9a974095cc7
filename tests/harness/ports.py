"""Ports for what is started, killed and started again on the same address.

A port that was bound to 0 and closed again is a guess: the kernel may give it to somebody else, or to the
same caller twice. These come from below the range that the kernel hands out by itself (Linux: 32768 to
60999), no two of a process are alike, and processes begin at different places."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

_FIRST, _LAST = 20_000, 32_000


def _candidates() -> Iterator[int]:
    room = _LAST - _FIRST
    start = os.getpid() * 101 % room
    return (_FIRST + (start + step) % room for step in range(room))


_left = _candidates()


def free_port() -> int:
    """A port of 127.0.0.1 where nothing listens, given out once.

    Raises:
        RuntimeError: the whole range was used up.
    """
    for port in _left:
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise RuntimeError(f"no port from {_FIRST} to {_LAST} is free")
