"""`python -m model_servers`: one model server until it is told to stop."""

from __future__ import annotations

import modelyard.program.before_grpc  # noqa: F401  must come before everything that imports gRPC

# isort: split
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from model_servers import registry
from model_servers.app import ModelServer
from model_servers.config import PROGRAM, SECTION, ModelServerSettings
from model_servers.engine import Engine
from modelyard.program import settings as layers
from modelyard.program.process import announce_ready, configure_logging, run, settle_memory, told_to_stop

_USAGE = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns the exit status: 0 stopped as told, 1 failed, 2 settings that cannot be used."""
    try:
        settings = layers.load(
            ModelServerSettings,
            program=PROGRAM,
            section=SECTION,
            description="Serve one engine to modelyard control planes.",
            argv=sys.argv[1:] if argv is None else argv,
            env=os.environ,
            cwd=Path.cwd(),
        )
        configure_logging(settings.log_level, settings.log_format)
        plugin = registry.find(settings.engine)
        engine = registry.create(plugin, registry.validate(plugin, settings.engine_settings))
    except (layers.SettingsError, registry.EngineUnavailable) as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return _USAGE
    try:
        return run(_serve(settings, engine, metered=plugin.metered))
    except OSError as error:  # an address to listen on that is taken, or not of this machine
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return _USAGE


async def _serve(settings: ModelServerSettings, engine: Engine, *, metered: bool) -> int:
    def announce(program: str, **facts: str | int) -> None:
        settle_memory()
        announce_ready(program, **facts)

    server = ModelServer(settings, engine, metered=metered)
    return await server.run(told_to_stop(watch_parent=settings.watch_parent), announce)


if __name__ == "__main__":
    sys.exit(main())
