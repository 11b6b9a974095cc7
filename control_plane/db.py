"""python -m control_plane.db upgrade|status, which is what `modelyard db` runs: the tables of the task store.

An embedded database is upgraded by the control plane itself when it starts. A PostgreSQL database is not: several
control planes may be at work on it, so somebody has to say when.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from control_plane.arguments import Parser
from control_plane.tasks import versions
from control_plane.tasks.location import Location, SqliteFile, StoreError, located
from control_plane.tasks.versions import Version

PROGRAM = "modelyard db"
USAGE = 2
BEHIND = 1
"""Exit status of `status` where the tables are not those of this program."""


def main(argv: Sequence[str]) -> int:
    arguments = _arguments(argv)
    try:
        place = located(arguments.store or _configured(arguments.config, os.environ), os.environ)
        before, after = _run(arguments.verb, place)
    except (StoreError, OSError) as error:
        if arguments.json:
            print(json.dumps({"error": {"reason": "STORE", "message": str(error)}}))
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return USAGE
    facts = {
        "store": place.shown,
        "schema": after.current or None,
        "newest": after.newest,
        "up_to_date": after.up_to_date,
    }
    if arguments.verb == "upgrade":
        facts["from"] = before.current or None
    print(json.dumps(facts, indent=2) if arguments.json else _told(arguments.verb, place, before, after))
    return 0 if after.up_to_date else BEHIND


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog=PROGRAM, description="The tables of the task store.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="upgrade|status")
    for verb, text in (
        ("upgrade", "make the tables, or bring them up to date"),
        ("status", f"show their version; exit status {BEHIND} where they are not up to date"),
    ):
        sub = verbs.add_parser(verb, help=text, description=text[0].upper() + text[1:] + ".")
        sub.add_argument("--store", metavar="URL", help="the task store (default: the setting tasks.store)")
        sub.add_argument("--config", metavar="FILE", help="configuration file (default: ./modelyard.yaml if it exists)")
        sub.add_argument("--json", action="store_true", help="print facts as JSON")
    return parser.parse_args(argv)


def _configured(config: str | None, env: Mapping[str, str]) -> str:
    """The setting `tasks.store`. Raises StoreError."""
    from control_plane.config import SECTION, ControlPlaneSettings, with_aliases
    from modelyard.program.settings import SettingsError, load

    try:
        settings = load(
            ControlPlaneSettings,
            program=PROGRAM,
            section=SECTION,
            description="",
            argv=["--config", config] if config else [],
            env=with_aliases(env),
            cwd=Path.cwd(),
        )
    except SettingsError as error:
        raise StoreError(str(error)) from None
    if not settings.tasks.store:
        raise StoreError("no tasks are kept: the setting tasks.store is empty; name a database with --store")
    return settings.tasks.store


def _run(verb: str, place: Location) -> tuple[Version, Version]:
    """The versions before and after. Raises StoreError."""
    if isinstance(place, SqliteFile):
        from control_plane.tasks import sqlite

        if verb == "status":
            found = sqlite.status(place)
            return found, found
        return sqlite.upgrade(place)
    from control_plane.tasks import postgresql

    if verb == "status":
        found = asyncio.run(postgresql.status(place))
        return found, found
    return asyncio.run(postgresql.upgrade(place))


def _told(verb: str, place: Location, before: Version, after: Version) -> str:
    if verb == "upgrade" and before.current != after.current:
        return f"{place.shown}: schema {before.current or 'none'} -> {after.current}"
    if after.up_to_date:
        return f"{place.shown}: schema {after.current}, up to date"
    if after.newer:
        return f"{place.shown}: schema {after.current}, newer than this program knows ({after.newest})"
    have = f"schema {after.current}" if after.current else "no tables yet"
    return f"{place.shown}: {have}, {after.newest} is needed: run `{versions.upgrade_command(place.shown)}`"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
