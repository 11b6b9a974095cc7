"""The progress of one model: a bar on a terminal, a few lines in a pipe, an object a line for programs."""

from __future__ import annotations

import json
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from modelyard.cli import output

if TYPE_CHECKING:
    from modelyard.client import ModelProgress


class ProgressView:
    """Base: a context manager around the steps. Leaving it tidies the terminal, whatever has happened."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def step(self, step: ModelProgress) -> None:
        """The next step."""
        raise NotImplementedError


class JsonLines(ProgressView):
    """Every step, to standard output."""

    def step(self, step: ModelProgress) -> None:
        print(json.dumps(step.to_dict(), ensure_ascii=False), flush=True)


class Lines(ProgressView):
    """A line whenever something new begins and at every tenth of it, to standard error."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._told: tuple[object, ...] = ()

    def step(self, step: ModelProgress) -> None:
        done = share(step)
        news = (step.state, step.detail, None if done is None else int(done * 10))
        if news == self._told:
            return
        self._told = news
        words = [f"{self._name} on {step.server_id}: {step.state}", step.detail]
        if done is not None:
            words.append(f"{done:.0%} of {output.size(step.total_bytes)}")
        output.note(", ".join(word for word in words if word))


class Bar(ProgressView):
    """One line that moves, on standard error; gone when it is over."""

    def __init__(self, name: str) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        self._name = name
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[amount]}"),
            TimeElapsedColumn(),
            console=output.console(stderr=True),
            transient=True,
        )
        self._task: Any = None

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def step(self, step: ModelProgress) -> None:
        from rich.markup import escape

        said = f", {step.detail}" if step.detail else ""
        description = escape(output.printable(f"{self._name} on {step.server_id}: {step.state}{said}"))
        if self._task is None:
            self._task = self._progress.add_task(description, total=None, amount="")
        total = step.total_bytes
        # Without a total the bar runs to and fro.
        self._progress.update(
            self._task,
            description=description,
            completed=step.completed_bytes,
            total=total or None,
            amount=f"{output.size(step.completed_bytes)} of {output.size(total)}" if total else "",
        )


def share(step: ModelProgress) -> float | None:
    """How much of it is done, [0, 1]; None if that is not known."""
    return min(1.0, step.completed_bytes / step.total_bytes) if step.total_bytes else None
