"""How far a batch is: a bar on a terminal, a few lines in a pipe. Both on standard error."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any, Self

from modelyard.cli import output


class BatchView:
    """Base: counts, and shows nothing. A context manager; leaving it tidies the terminal."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.submitted = 0
        self.done = 0
        """Terminal ones, failed ones included."""
        self.failed = 0
        self._kept = 0
        self._started = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def kept(self, count: int) -> None:
        """So many results were there already."""
        self.submitted, self.done, self._kept = count, count, count
        self.show()

    def accepted(self) -> None:
        """A task is in the queue."""
        self.submitted += 1
        self.show()

    def finished(self, *, failed: bool, earlier: bool = False) -> None:
        """A task is terminal; `earlier`: it was before this run, and says nothing about the rate."""
        self._kept += earlier
        self.done += 1
        self.failed += failed
        self.show()

    @property
    def rate(self) -> float | None:
        """Results a second of this run; None before the first."""
        elapsed = time.monotonic() - self._started
        return (self.done - self._kept) / elapsed if elapsed > 0 and self.done > self._kept else None

    @property
    def left(self) -> float | None:
        """Seconds until all are there, at this rate."""
        return (self.total - self.done) / self.rate if self.rate else None

    def words(self) -> str:
        """The counts in one line."""
        parts = [
            f"{self.submitted} of {self.total} submitted",
            f"{self.done} done",
            f"{self.failed} failed" if self.failed else "",
            f"{self.rate:.3g}/s" if self.rate else "",
            f"{output.seconds(self.left)} left" if self.left else "",
        ]
        return ", ".join(part for part in parts if part)

    def show(self) -> None:
        """The counts have changed."""


class Lines(BatchView):
    """A line at every tenth of the way."""

    _told: tuple[int, ...] = ()

    def show(self) -> None:
        news = (self.done * 10 // self.total, self.submitted * 2 // self.total)
        if news != self._told:
            self._told = news
            output.note(self.words())


class Bar(BatchView):
    """One line that moves, gone when it is over."""

    def __init__(self, total: int) -> None:
        super().__init__(total)
        from rich.progress import BarColumn, Progress, TextColumn

        self._progress = Progress(
            BarColumn(bar_width=30),
            TextColumn("{task.description}"),
            console=output.console(stderr=True),
            transient=True,
        )
        self._bar: Any = self._progress.add_task("", total=total)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def show(self) -> None:
        self._progress.update(self._bar, completed=self.done, description=self.words())
