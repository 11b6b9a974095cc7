"""Traces: what requests came when. Readers for the published formats, and scaling to a wanted rate.

Formats, told apart by the suffix and by the fields of the first line:

- Azure (.csv): columns TIMESTAMP, ContextTokens, GeneratedTokens. No prompt structure, so no prefix is ever shared.
- Mooncake (.jsonl): `timestamp` in ms, `input_length`, `output_length`, `hash_ids`: one id per 512-token block of the
  prompt; equal leading ids mean an equal prefix.
- own (.jsonl): `arrival` in s, `prompt_tokens`, `output_tokens`, and as wanted `blocks` (like `hash_ids`),
  `max_tokens`, `task_type`, `tenant`, `priority`, `model`.
"""

from __future__ import annotations

import csv
import datetime
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import msgspec

BLOCK_TOKENS = 512
"""Tokens in a block of a prefix."""

_Line = TypeVar("_Line", bound=msgspec.Struct)


class TraceError(Exception):
    """A trace that cannot be read; the message has the file and the line."""


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """What a dispatcher may know of a request. Compared by identity."""

    id: int
    """Position in the trace, from 0."""
    arrival: float
    """Seconds from the start of the trace."""
    prompt_tokens: int
    blocks: tuple[int, ...] | None = None
    """One id per full block of `BLOCK_TOKENS` tokens of the prompt, for that block and all before it: prompts with an
    id in common have that prefix in common. None: the prompt shares nothing, or the trace is silent."""
    max_tokens: int | None = None
    task_type: str = ""
    tenant: str = ""
    priority: int = 0
    """Higher goes first."""
    model: str = ""
    """Name of the model asked for; empty for any."""


@dataclass(frozen=True, slots=True)
class Trace:
    """Jobs in order of arrival, and apart from them, for no dispatcher to see, how long the answers get."""

    name: str
    jobs: tuple[Job, ...]
    output_tokens: tuple[int, ...]
    """By `Job.id`; at least 1."""

    @property
    def span(self) -> float:
        """Seconds from 0 to the last arrival, and one mean gap: n jobs at rate r span n / r."""
        return self.jobs[-1].arrival * len(self.jobs) / max(len(self.jobs) - 1, 1)

    @property
    def rate(self) -> float:
        """Mean arrivals per second. 0 where everything arrives at once."""
        return len(self.jobs) / self.span if self.span else 0.0

    def at_rate(self, rate: float) -> Trace:
        """The same jobs with time stretched so that they arrive at `rate` per second on average."""
        if rate <= 0:
            raise ValueError(f"rate {rate}: must be above 0")
        factor = self.rate / rate
        return replace(self, jobs=tuple(replace(job, arrival=job.arrival * factor) for job in self.jobs))

    def part(self, first: int = 0, count: int | None = None) -> Trace:
        """`count` jobs from number `first` on, the first of them at 0 s. Raises ValueError where none is left."""
        jobs = self.jobs[first:] if count is None else self.jobs[first : first + count]
        if not jobs:
            raise ValueError(f"{self.name}: no job from number {first} on")
        start = jobs[0].arrival
        numbered = tuple(replace(job, id=n, arrival=job.arrival - start) for n, job in enumerate(jobs))
        return Trace(self.name, numbered, self.output_tokens[first : first + len(jobs)])

    def between(self, start: float, end: float) -> Trace:
        """The jobs that arrive from `start` to before `end`, in seconds."""
        inside = [job.id for job in self.jobs if start <= job.arrival < end]
        if not inside:
            raise ValueError(f"{self.name}: no job from {start:g} s to {end:g} s")
        return self.part(inside[0], len(inside))

    def looped(self, times: int) -> Trace:
        """The trace `times` over, one after the other. Blocks of later rounds are new: a repeated conversation would be
        found whole in every cache."""
        if times == 1:
            return self
        count, span = len(self.jobs), self.span
        fresh = 1 + max((block for job in self.jobs for block in job.blocks or ()), default=0)
        jobs = tuple(
            replace(
                job,
                id=job.id + n * count,
                arrival=job.arrival + n * span,
                blocks=tuple(block + n * fresh for block in job.blocks) if job.blocks else job.blocks,
            )
            for n in range(times)
            for job in self.jobs
        )
        return Trace(self.name, jobs, self.output_tokens * times)


def trace(name: str, entries: Iterable[tuple[Job, int]]) -> Trace:
    """A trace of jobs with their output tokens, in any order: they are sorted, numbered, and start at 0 s. Their blocks
    may have ids that say nothing of what is before them."""
    ordered = sorted(entries, key=lambda entry: entry[0].arrival)
    start = ordered[0][0].arrival if ordered else 0.0
    known: dict[tuple[int, int], int] = {}
    jobs = tuple(
        replace(job, id=n, arrival=job.arrival - start, blocks=_chained(job.blocks, known))
        for n, (job, _) in enumerate(ordered)
    )
    return Trace(name, jobs, tuple(output for _, output in ordered))


def _chained(blocks: tuple[int, ...] | None, known: dict[tuple[int, int], int]) -> tuple[int, ...] | None:
    """Ids that stand for all that is before them too. `known`: by the id before, chained, and that of the block."""
    if blocks is None:
        return None
    chain, before = [], -1
    for block in blocks:
        before = known.setdefault((before, block), len(known))
        chain.append(before)
    return tuple(chain)


# ------------------------------------------------------------------ reading ---


class _Mooncake(msgspec.Struct):
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: list[int] | None = None


class _Own(msgspec.Struct):
    arrival: float
    prompt_tokens: int
    output_tokens: int
    blocks: list[int] | None = None
    max_tokens: int | None = None
    task_type: str = ""
    tenant: str = ""
    priority: int = 0
    model: str = ""


def read(path: Path) -> Trace:
    """The trace in a file. Raises TraceError and OSError."""
    entries = _azure(path) if path.suffix == ".csv" else _json_lines(path)
    if not entries:
        raise TraceError(f"{path}: no requests in it")
    return trace(path.stem, entries)


AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


def _azure(path: Path) -> list[tuple[Job, int]]:
    entries = []
    with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
        rows = csv.reader(file)
        columns = next(rows, [])
        missing = [name for name in AZURE if name not in columns]
        if missing:
            raise TraceError(f"{path}:1: no column {', '.join(missing)}")
        places = [columns.index(name) for name in AZURE]
        for row in rows:
            if not row:
                continue
            try:
                when, prompt, output = (row[place] for place in places)
                entry = _entry(_seconds(when), int(prompt), int(output))
            except IndexError:
                raise TraceError(f"{path}:{rows.line_num}: fewer columns than the first line has") from None
            except ValueError as error:
                raise TraceError(f"{path}:{rows.line_num}: {error}") from None
            entries.append(entry)
    return entries


def _seconds(text: str) -> float:
    """Of a time like 2023-11-16 18:17:03.9799600: its seven digits after the point are one more than Python reads."""
    whole, _, fraction = text.partition(".")
    moment = datetime.datetime.fromisoformat(whole).replace(tzinfo=datetime.UTC)
    return moment.timestamp() + (float(f"0.{fraction}") if fraction else 0.0)


def _json_lines(path: Path) -> list[tuple[Job, int]]:
    lines = path.read_bytes().splitlines()
    first = next((line for line in lines if line.strip()), b"{}")
    reader: Callable[[bytes], tuple[Job, int]] = _mooncake if b'"input_length"' in first else _own
    entries = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entries.append(reader(line))
        except (ValueError, msgspec.MsgspecError) as error:
            raise TraceError(f"{path}:{number}: {error}") from None
    return entries


_mooncake_decoder = msgspec.json.Decoder(_Mooncake)
_own_decoder = msgspec.json.Decoder(_Own)


def _mooncake(line: bytes) -> tuple[Job, int]:
    found = _mooncake_decoder.decode(line)
    return _entry(found.timestamp / 1000.0, found.input_length, found.output_length, found.hash_ids)


def _own(line: bytes) -> tuple[Job, int]:
    found = _own_decoder.decode(line)
    job, output = _entry(found.arrival, found.prompt_tokens, found.output_tokens, found.blocks)
    job = replace(
        job,
        max_tokens=found.max_tokens,
        task_type=found.task_type,
        tenant=found.tenant,
        priority=found.priority,
        model=found.model,
    )
    return job, output


def _entry(arrival: float, prompt: int, output: int, blocks: Sequence[int] | None = None) -> tuple[Job, int]:
    """Raises ValueError. An answer of no token is one of one token: every request here has a first token."""
    if prompt < 0 or output < 0:
        raise ValueError("tokens below 0")
    if not abs(arrival) < float("inf"):
        raise ValueError(f"arrival {arrival}: not a time")
    # Engines keep full blocks only, so the id of a last part block is left out.
    kept = None if blocks is None else tuple(blocks[: prompt // BLOCK_TOKENS])
    return Job(id=0, arrival=arrival, prompt_tokens=max(prompt, 1), blocks=kept), max(output, 1)
