"""Rows of a comparison as aligned text, as JSON and as one HTML page that needs nothing else."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from control_plane.simulation.compare import Row
from control_plane.simulation.metrics import Summary


@dataclass(frozen=True, slots=True)
class Heading:
    """What was compared."""

    trace: str
    requests: int
    fleet: str
    hosts: int
    faults: str
    capacity: float | None
    """Arrivals per second, where it was measured."""
    seed: int


COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("load", lambda row: "-" if row.load is None else f"{row.load:.2f}"),
    ("req/s", lambda row: f"{row.rate:.2f}"),
    ("policy", lambda row: row.policy if row.policy == row.strategy else f"{row.policy} ({row.strategy})"),
    ("goodput", lambda row: f"{row.summary.goodput:.3f}"),
    ("TTFT p50", lambda row: f"{row.summary.ttft_p50:.2f}"),
    ("p99", lambda row: f"{row.summary.ttft_p99:.1f}"),
    ("errors", lambda row: f"{row.summary.errors:.3f}"),
    ("unanswered", lambda row: f"{row.summary.unanswered:.3f}"),
    ("truncated", lambda row: f"{row.summary.truncated:.3f}"),
    ("silent", lambda row: f"{row.summary.silent:.3f}"),
    ("prefix hits", lambda row: f"{row.summary.prefix_hits:.3f}"),
    ("requests by hardware", lambda row: by_hardware(row.summary)),
    ("run s", lambda row: f"{row.wall_seconds:.1f}"),
)

_LEFT = ("policy", "requests by hardware")


def by_hardware(found: Summary) -> str:
    """Share of the complete answers by class of hardware, in the order of the fleet."""
    shares: dict[str, int] = {}
    for host in found.hosts:
        shares[host.hardware] = shares.get(host.hardware, 0) + host.finished
    total = sum(shares.values()) or 1
    return ", ".join(f"{name} {count / total:.0%}" for name, count in shares.items())


def titles(heading: Heading) -> list[str]:
    faults = f", faults: {heading.faults}" if heading.faults else ""
    lines = [
        f"trace {heading.trace}, {heading.requests} requests; "
        f"fleet {heading.fleet}, {heading.hosts} hosts{faults}; seed {heading.seed}"
    ]
    if heading.capacity is not None:
        lines.append(f"capacity: {heading.capacity:.2f} requests/s, which least in-flight sustains")
    return lines


def text(heading: Heading, rows: Sequence[Row]) -> str:
    table = [[name for name, _ in COLUMNS], *([show(row) for _, show in COLUMNS] for row in rows)]
    widths = [max(len(line[place]) for line in table) for place in range(len(COLUMNS))]
    lines = titles(heading)
    for line in table:
        cells = [
            cell.ljust(width) if name in _LEFT else cell.rjust(width)
            for (name, _), cell, width in zip(COLUMNS, line, widths, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def facts(heading: Heading, rows: Iterable[Row]) -> dict[str, Any]:
    """For JSON."""
    return {**asdict(heading), "rows": [asdict(row) for row in rows]}


# --------------------------------------------------------------------- HTML ---

_WIDTH = 420
_BAR = 18
_NAMES = 190

_STYLE = """
body{font:14px/1.4 system-ui,sans-serif;margin:2rem auto;max-width:75rem;padding:0 1rem;color:#222;background:#fff}
table{border-collapse:collapse}td,th{padding:.2rem .6rem;text-align:right;border-bottom:1px solid #ddd}
td.l,th.l{text-align:left}figure{display:inline-block;margin:0 1rem 1rem 0;vertical-align:top}
figcaption{font-weight:600}svg text{font:12px system-ui,sans-serif;fill:#222}
@media(prefers-color-scheme:dark){body{color:#ddd;background:#181818}svg text{fill:#ddd}td,th{border-color:#444}}
"""


def page(heading: Heading, rows: Sequence[Row]) -> str:
    """A whole HTML page."""
    parts = ["<!doctype html><html lang=en><meta charset=utf-8><title>modelyard simulate</title>", _style()]
    parts.append("<h1>modelyard simulate</h1>")
    parts += [f"<p>{html.escape(line)}</p>" for line in titles(heading)]
    for rate in dict.fromkeys(row.rate for row in rows):
        group = [row for row in rows if row.rate == rate]
        load = group[0].load
        share = "" if load is None else f", {load:.0%} of capacity"
        parts.append(f"<h2>{rate:.2f} requests/s{share}</h2>")
        parts.append(_figure("Goodput: share of requests within the objective", _bars(group)))
        parts.append(_figure("TTFT, p50 to p99, seconds", _ranges(group)))
        parts.append(_figure("Mean share of slots in use, per host", _use(group)))
    parts.append("<h2>Table</h2>" + _table(rows) + "</html>")
    return "\n".join(parts)


def _style() -> str:
    return f"<style>{_STYLE}</style>"


def _figure(caption: str, drawing: str) -> str:
    return f"<figure><figcaption>{html.escape(caption)}</figcaption>{drawing}</figure>"


def _svg(width: float, height: float, parts: Iterable[str]) -> str:
    return f'<svg width="{width:.0f}" height="{height:.0f}" role="img">{"".join(parts)}</svg>'


def _label(x: float, y: float, words: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}">{html.escape(words)}</text>'


def _bars(rows: Sequence[Row]) -> str:
    parts = []
    for place, row in enumerate(rows):
        y, length = place * _BAR, row.summary.goodput * _WIDTH
        parts.append(_label(0, y + 13, row.policy))
        parts.append(f'<rect x="{_NAMES}" y="{y + 3}" width="{length:.1f}" height="{_BAR - 5}" fill="#4a7fb5"/>')
        parts.append(_label(_NAMES + length + 4, y + 13, f"{row.summary.goodput:.3f}"))
    return _svg(_NAMES + _WIDTH + 50, len(rows) * _BAR, parts)


def _ranges(rows: Sequence[Row]) -> str:
    """On a logarithmic axis."""
    low = min(max(row.summary.ttft_p50, 0.01) for row in rows)
    high = max(max(row.summary.ttft_p99, 0.01) for row in rows)
    first, last = math.floor(math.log10(low)), max(math.ceil(math.log10(high)), math.floor(math.log10(low)) + 1)

    def at(seconds: float) -> float:
        return _NAMES + (math.log10(max(seconds, 0.01)) - first) / (last - first) * _WIDTH

    bottom = len(rows) * _BAR
    parts = []
    for power in range(first, last + 1):
        x = at(10.0**power)
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{bottom}" stroke="#999" stroke-width=".5"/>')
        parts.append(_label(x - 8, bottom + 14, f"{10.0**power:g}"))
    for place, row in enumerate(rows):
        y = place * _BAR + 9
        left, right = at(row.summary.ttft_p50), at(row.summary.ttft_p99)
        parts.append(_label(0, y + 4, row.policy))
        parts.append(
            f'<line x1="{left:.1f}" x2="{right:.1f}" y1="{y}" y2="{y}" stroke="#b5574a" stroke-width="4"/>'
            f'<circle cx="{left:.1f}" cy="{y}" r="4" fill="#b5574a"/>'
        )
    return _svg(_NAMES + _WIDTH + 30, bottom + 20, parts)


_MOST_HOSTS = 60


def _use(rows: Sequence[Row]) -> str:
    """Policies down, hosts across; the darker the fuller."""
    hosts = rows[0].summary.hosts[:_MOST_HOSTS]
    cell = max(min(_WIDTH / len(hosts), 60.0), 8.0)
    parts = []
    for place, row in enumerate(rows):
        y = place * _BAR
        parts.append(_label(0, y + 13, row.policy))
        for column, host in enumerate(row.summary.hosts[:_MOST_HOSTS]):
            what = f"{host.id}: {host.slots:.0%} of slots, busy {host.busy:.0%}, {host.finished} requests"
            parts.append(
                f'<rect x="{_NAMES + column * cell:.1f}" y="{y + 2}" width="{cell - 1:.1f}" height="{_BAR - 3}" '
                f'fill="#3d7a4e" fill-opacity="{0.06 + 0.94 * min(host.slots, 1.0):.2f}">'
                f"<title>{html.escape(what)}</title></rect>"
            )
    if cell >= 40:
        parts += [_label(_NAMES + column * cell, len(rows) * _BAR + 13, host.id) for column, host in enumerate(hosts)]
    return _svg(_NAMES + cell * len(hosts) + 10, len(rows) * _BAR + 18, parts)


def _table(rows: Sequence[Row]) -> str:
    def line(cells: Iterable[str], tag: str) -> str:
        inner = "".join(
            f"<{tag}{' class=l' if name in _LEFT else ''}>{html.escape(cell)}</{tag}>"
            for (name, _), cell in zip(COLUMNS, cells, strict=True)
        )
        return f"<tr>{inner}</tr>"

    head = line((name for name, _ in COLUMNS), "th")
    return f"<table>{head}{''.join(line((show(row) for _, show in COLUMNS), 'td') for row in rows)}</table>"
