"""Life of a server process: event loop, ready line, signals, a parent that may die, logging."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Awaitable, Coroutine
from typing import Any

READY_EVENT = "ready"

_YOUNG = 10_000
"""Objects that come about between two looks at the latest of them."""


def run(main: Coroutine[Any, Any, int]) -> int:
    """Run `main` to its exit status on uvloop where it is installed."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(main)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main)


def configure_logging(level: str, form: str) -> None:
    """Log to stderr as text for people ("text") or one JSON object a line ("json")."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter() if form == "json" else _TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # At "debug" gRPC tells every start of its event loop.
    logging.getLogger("grpc").setLevel(max(logging.INFO, logging.getLogger().level))
    logging.getLogger("alembic.runtime.plugins").setLevel(logging.WARNING)  # a list of its own parts, each time


class _TextFormatter(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname).1s %(name)s: %(message)s", "%H:%M:%S")


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry)


def announce_ready(program: str, **facts: str | int) -> None:
    """Print the ready line: one JSON object on stdout, for whoever started the program."""
    print(json.dumps({"event": READY_EVENT, "program": program, "pid": os.getpid(), **facts}), flush=True)


def settle_memory() -> None:
    """Tell the garbage collector that everything loaded so far stays: it then looks only at what
    requests leave behind, not at every module again and again, and not after every few of them: next to nothing here
    is in cycles. What starting has used and no longer needs goes back to the system, where the C library can do that.
    To be called once, when ready."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_YOUNG, 10, 10)
    with contextlib.suppress(OSError, AttributeError):  # glibc's own
        ctypes.CDLL(None).malloc_trim(0)


def told_to_stop(*, watch_parent: bool = False) -> asyncio.Future[str]:
    """What happened, for the log, once SIGINT or SIGTERM arrived or, with `watch_parent`,
    standard input ended. Listens from the moment of the call. A second signal kills at once.
    """
    loop = asyncio.get_running_loop()
    told: asyncio.Future[str] = loop.create_future()

    def tell(why: str) -> None:
        if not told.done():
            told.set_result(why)
        elif why.startswith("SIG"):
            os._exit(130)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, tell, signal.Signals(number).name)
    if watch_parent:

        def watch() -> None:
            # Blocking read on a daemon thread: works for pipes on every platform and loop.
            while os.read(0, 4096):
                pass
            try:
                loop.call_soon_threadsafe(tell, "the parent is gone")
            except RuntimeError:
                pass  # the loop has closed: we are on the way out already

        threading.Thread(target=watch, name="parent-watch", daemon=True).start()
    return told


async def first_of(*awaitables: Awaitable[Any]) -> None:
    """Return when the first one ends, cancelling the rest; its exception is raised."""
    tasks = [asyncio.ensure_future(awaitable) for awaitable in awaitables]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
