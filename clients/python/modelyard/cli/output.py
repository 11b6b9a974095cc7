"""Rendering in one place: tables and notes for terminals, aligned text for pipes, JSON for programs.

Facts go to standard output, everything about them (notes, progress, errors) to standard error.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

# Everything that could steer a terminal, except line feed and tab.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a table."""

    title: str
    right: bool = False
    style: str = ""
    flexible: bool = False
    """May be wrapped where the terminal is narrow."""
    optional: int = 0
    """Above 0: left out where the terminal is narrow, the greatest first."""


Row = Sequence[str]

_NARROWEST = 8
"""Characters that a flexible column is left."""


def is_terminal(stream: IO[str]) -> bool:
    try:
        return stream.isatty()
    except ValueError:  # closed
        return False


def printable(text: str) -> str:
    """`text` without characters that could steer a terminal."""
    return _CONTROLS.sub("\N{REPLACEMENT CHARACTER}", text.replace("\r\n", "\n"))


def console(*, stderr: bool = False) -> Console:
    """A rich console for standard output or standard error. Raises BrokenPipeError as print does."""
    from rich.console import Console

    class Screen(Console):
        def on_broken_pipe(self) -> None:  # rich would exit with status 1
            raise BrokenPipeError

    return Screen(stderr=stderr, highlight=False, emoji=False, markup=False, soft_wrap=False)


def print_json(value: Any, *, indent: int | None = 2) -> None:
    """One JSON value on standard output."""
    print(json.dumps(value, indent=indent, ensure_ascii=False), flush=True)


def print_table(columns: Sequence[Column], rows: Sequence[Row], *, empty: str = "none", title: str = "") -> None:
    """A table on a terminal, aligned text in a pipe."""
    if not is_terminal(sys.stdout):
        if title:
            print(title)
        for line in aligned(columns, rows):
            print(line)
        return
    screen = console()
    if not rows:
        screen.print(empty, style="dim")
        return
    screen.print(fitting_table(screen, columns, rows, title=title))


def fitting_table(screen: Console, columns: Sequence[Column], rows: Sequence[Row], *, title: str = "") -> Any:
    """A rich table without the columns that the terminal has no room for: the optional ones first, the key never."""
    kept = list(range(len(columns)))
    key = next((index for index, column in enumerate(columns) if column.title), 0)

    def width(flexible: int | None = None) -> int:
        """Characters needed, with flexible columns not wider than that."""
        cells = [max([len(columns[i].title), *(len(row[i]) for row in rows)]) for i in kept]
        if flexible is not None:
            cells = [min(cell, flexible) if columns[i].flexible else cell for i, cell in zip(kept, cells, strict=True)]
        return sum(cells) + 2 * (len(kept) - 1)

    while width() > screen.width and any(columns[index].optional for index in kept):
        kept.remove(max(kept, key=lambda index: columns[index].optional))
    while width(_NARROWEST) > screen.width and kept[-1] > key:
        kept.pop()
    fitting = [replace(columns[i], flexible=True) if i == key and len(kept) <= key + 1 else columns[i] for i in kept]
    return rich_table(fitting, [[row[i] for i in kept] for row in rows], title=title)


def aligned(columns: Sequence[Column], rows: Sequence[Row]) -> list[str]:
    """The table as lines of text, the columns separated by two spaces."""
    cells = [
        [column.title for column in columns],
        *([_flat(cell, columns[i]) for i, cell in enumerate(row)] for row in rows),
    ]
    widths = [max(len(row[index]) for row in cells) for index in range(len(columns))]
    lines = []
    for row in cells:
        parts = [
            cell.rjust(width) if column.right else cell.ljust(width)
            for cell, width, column in zip(row, widths, columns, strict=True)
        ]
        lines.append("  ".join(parts).rstrip())
    return lines


def _flat(cell: str, column: Column) -> str:
    """One line, and never nothing: columns must be countable. Marks have no title and may be empty."""
    return " ".join(printable(cell).split()) or ("-" if column.title else "")


def rich_table(columns: Sequence[Column], rows: Sequence[Row], *, title: str = "") -> Any:
    """The same as a rich renderable."""
    from rich.table import Table
    from rich.text import Text

    table = Table(
        box=None,
        padding=(0, 2, 0, 0),
        pad_edge=False,
        title=title or None,
        title_justify="left",
        header_style="dim underline",
    )
    for column in columns:
        table.add_column(
            column.title,
            justify="right" if column.right else "left",
            no_wrap=not column.flexible,
            overflow="fold" if column.flexible else "ellipsis",
            style=column.style or None,
        )
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    return table


def note(text: str) -> None:
    """A remark for people on standard error, dim on a terminal."""
    if is_terminal(sys.stderr):
        console(stderr=True).print(printable(text), style="dim", soft_wrap=True)
    else:
        print(text, file=sys.stderr, flush=True)


def problem(text: str) -> None:
    """An error for people on standard error."""
    if is_terminal(sys.stderr):
        from rich.text import Text

        line = Text("modelyard: ", style="bold red").append(printable(text), style="default not bold")
        console(stderr=True).print(line, soft_wrap=True)
    else:
        print(f"modelyard: {printable(text)}", file=sys.stderr, flush=True)


def seconds(value: float | None) -> str:
    """A duration as people read it: "3.1 ms", "0.42 s", "12 s"; "-" if it is not known."""
    if value is None:
        return "-"
    if value < 0.0995:
        return f"{value * 1000:.3g} ms"
    return f"{value:.2f} s" if value < 9.995 else f"{value:.0f} s"


def size(count: int) -> str:
    """Bytes as people read them: "812 MB", "4.1 GB"; "-" if it is 0, which means not known."""
    if not count:
        return "-"
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB", "PB"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    return f"{value:.1f} {unit}" if value < 9.95 and unit != "B" else f"{value:.0f} {unit}"


def rate(tokens: float, duration: float | None) -> float | None:
    """Tokens a second; None where it cannot be told."""
    return tokens / duration if duration and tokens > 0 else None
