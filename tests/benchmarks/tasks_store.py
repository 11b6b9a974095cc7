"""The task store alone, without gRPC: submissions and claims a second, and how they change with a long queue.

    python -m tests.benchmarks.tasks_store [--database sqlite|postgresql] [--long 1000000] [--json]

64 clients submit tasks of 500 bytes with random idempotency keys, each waiting for its answer. Claims take 16 tasks at
a time and mark each as succeeded. Both are measured with 1,000 queued tasks and with `--long`, in one run on one file;
the ratio is between the two. Databases are real: SQLite with synchronous=FULL, PostgreSQL with fsync.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import secrets
import statistics
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from control_plane.tasks.model import Filter, LaneId
from control_plane.tasks.store import SqlTaskStore
from tests.harness.postgres import postgres
from tests.harness.task_store import PLACE, TENANT, new_task, opened

CLIENTS = 64
SHORT = 1000
_SPEC = b"x" * 500


@dataclass(frozen=True)
class Row:
    """Figures at one length of the queue."""

    database: str
    queued: int
    submits: float
    """A second."""
    submit_p50: float
    """Milliseconds."""
    claims: float
    """Tasks a second, claimed and succeeded."""
    claim_p50: float
    """Milliseconds for one claim of one task, nothing else going on."""
    page_p50: float
    """Milliseconds for the newest 100."""
    rss: float
    """MB of this process."""


async def fill(store: SqlTaskStore, count: int) -> None:
    """As many tasks as the queue is to have, through the store's own submit."""
    left = count

    async def client() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            await store.submit(new_task(secrets.token_hex(8), _SPEC))

    await asyncio.gather(*(client() for _ in range(1024)))


async def measure(database: str, store: SqlTaskStore, queued: int, work: int) -> Row:
    (lane,) = await store.waiting_lanes()
    submits, submit_times = await submitted(store, work)
    claims = await claimed(store, lane.id, work)
    alone = []
    for _ in range(100):
        begin = time.perf_counter()
        (one,) = await store.claim(lane.id, [PLACE])
        alone.append(time.perf_counter() - begin)
        await store.succeeded(one.id, one.epoch, b"result", 0)
        await store.submit(new_task(secrets.token_hex(8), _SPEC))
    pages = []
    for _ in range(20):
        begin = time.perf_counter()
        await store.page(TENANT, Filter(), 100)
        pages.append(time.perf_counter() - begin)
    return Row(
        database, queued, submits, 1e3 * statistics.median(submit_times), claims, 1e3 * statistics.median(alone),
        1e3 * statistics.median(pages), rss(),
    )  # fmt: skip


async def submitted(store: SqlTaskStore, count: int) -> tuple[float, list[float]]:
    """Submissions a second, and how long each took."""
    times: list[float] = []

    async def client() -> None:
        for _ in range(count // CLIENTS):
            begin = time.perf_counter()
            await store.submit(new_task(secrets.token_hex(8), _SPEC))
            times.append(time.perf_counter() - begin)

    begin = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return len(times) / (time.perf_counter() - begin), times


async def claimed(store: SqlTaskStore, lane: LaneId, count: int) -> float:
    """Tasks a second that were claimed and succeeded."""
    done = 0
    begin = time.perf_counter()
    while done < count:
        claims = await store.claim(lane, [PLACE] * 16)
        await asyncio.gather(*(store.succeeded(claim.id, claim.epoch, b"result", 0) for claim in claims))
        done += len(claims)
    return done / (time.perf_counter() - begin)


def rss() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


async def run(database: str, url: str, long: int, work: int) -> list[Row]:
    async with opened(url) as store:
        rows = []
        for queued in (SHORT, long):
            have = min(sum((await store.counts(TENANT)).values()), queued)
            await fill(store, queued - have)
            await measure(database, store, queued, work // 4)  # warm
            rows.append(await measure(database, store, queued, work))
        return rows


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--database", choices=("sqlite", "postgresql"), action="append")
    parser.add_argument("--long", type=int, default=1_000_000, help="tasks in the long queue")
    parser.add_argument("--work", type=int, default=6400, help="submissions and claims of one measurement")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows: list[Row] = []
    for database in arguments.database or ("sqlite", "postgresql"):
        with ExitStack() as stack:
            if database == "sqlite":
                folder = stack.enter_context(tempfile.TemporaryDirectory())
                url = f"sqlite:///{folder}/tasks.db"
            else:
                url = await stack.enter_context(postgres("max_wal_size=2GB")).tables()
            rows += await run(database, url, arguments.long, arguments.work)
    if arguments.json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
        return
    print(f"{'':22} {'submits/s':>10} {'p50 ms':>8} {'claims/s':>9} {'claim ms':>9} {'page ms':>8} {'RSS MB':>7}")
    for row in rows:
        print(
            f"{row.database:11}{row.queued:>11,} {row.submits:10,.0f} {row.submit_p50:8.2f} {row.claims:9,.0f} "
            f"{row.claim_p50:9.2f} {row.page_p50:8.2f} {row.rss:7.0f}"
        )
    for short, full in zip(rows[::2], rows[1::2], strict=True):
        print(
            f"{short.database}: cost at {full.queued:,} / at {short.queued:,}: submit "
            f"{short.submits / full.submits:.2f}, claim {short.claims / full.claims:.2f}, "
            f"one claim {full.claim_p50 / short.claim_p50:.2f} (wanted: below 2)"
        )


if __name__ == "__main__":
    asyncio.run(main())
