"""The faults of the reliability bar, by hand: python -m tests.faults [--full] [--only NAME] [--json]

Without --full the sizes are those of the normal tests. Everything runs on loopback, with processes that this program
starts and ends itself. Exit status 1 if a promise was broken.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from pathlib import Path

from tests.faults import scenarios
from tests.faults.scenarios import Report

Run = Callable[[], Awaitable[Report]]


def runs(full: bool, folder: Path) -> dict[str, Run]:
    """Every scenario by its name."""
    tasks, kills = (10_000, 20) if full else (2_000, 5)
    databases = {"sqlite": scenarios.sqlite(folder), "postgres": scenarios.real_postgres()}
    postgres = databases["postgres"]
    return {
        "control-plane-killed-sqlite": lambda: scenarios.control_plane_killed(
            databases["sqlite"], tasks=tasks, kills=kills
        ),
        "control-plane-killed-postgres": lambda: scenarios.control_plane_killed(postgres, tasks=tasks, kills=kills),
        "postgres-killed": lambda: scenarios.postgres_killed(postgres, tasks=tasks, kills=kills),
        "model-servers-killed": lambda: scenarios.model_servers_killed(kills=1_000 if full else 10),
        "half-open": scenarios.half_open,
        "zombie": lambda: scenarios.zombie(postgres, tasks=8_000 if full else 200, rounds=10 if full else 1),
        "zombie-unheeding": lambda: scenarios.zombie(
            postgres, tasks=8_000 if full else 200, rounds=10 if full else 1, program=scenarios.UNHEEDING
        ),
        "replicas": lambda: scenarios.replicas(postgres, tasks=tasks if full else 500),
        "same-key": lambda: scenarios.same_key(postgres),
    }


async def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="the full figures: about an hour")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="this scenario; may be repeated")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    given = parser.parse_args()
    broken = False
    with tempfile.TemporaryDirectory() as folder:
        all_runs = runs(given.full, Path(folder))
        if unknown := set(given.only) - set(all_runs):
            parser.error(f"no scenario {', '.join(sorted(unknown))}; there are: {', '.join(all_runs)}")
        for name in given.only or all_runs:
            began = time.monotonic()
            report = await all_runs[name]()
            report.figures["seconds"] = round(time.monotonic() - began, 1)
            broken |= bool(report.violations)
            if given.json:
                print(json.dumps({**asdict(report), "name": name}), flush=True)
                continue
            print(f"{'BROKEN' if report.violations else 'kept':7}{name}", flush=True)
            for what, value in report.figures.items():
                print(f"       {what}: {value}")
            for wrong in report.violations[:20]:
                print(f"     ! {wrong}")
    return int(broken)


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
