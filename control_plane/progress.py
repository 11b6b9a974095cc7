"""How far a command on a terminal is."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

PATIENCE = 2.0
"""Seconds of work before progress is shown."""


@contextlib.contextmanager
def bar() -> Iterator[Callable[[str, int, int], None] | None]:
    """A bar on a terminal, once there has been work for a while; nothing elsewhere. It is told what is done, how far
    that is, and of how much (0: nobody knows)."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True, refresh_per_second=4) as shown:
        task = shown.add_task("", visible=False)

        def show(what: str, done: int, of: int) -> None:
            late = (shown.get_time() - started) > PATIENCE
            shown.update(task, description=what, completed=done, total=of or None, visible=late)

        started = shown.get_time()
        yield show
