"""python -m control_plane, which is what `modelyard control-plane` runs."""

from __future__ import annotations

import modelyard.program.before_grpc  # noqa: F401  must come before everything that imports gRPC

# isort: split
import os
import sys
from pathlib import Path

from control_plane.app import serve
from control_plane.config import PROGRAM, SECTION, ControlPlaneSettings, with_aliases
from modelyard.program.process import configure_logging, run
from modelyard.program.settings import SettingsError, load


def main() -> int:
    status = 0
    try:
        settings = load(
            ControlPlaneSettings,
            program=PROGRAM,
            section=SECTION,
            description="The control plane: one front door for a fleet of model servers.",
            argv=sys.argv[1:],
            env=with_aliases(os.environ),
            cwd=Path.cwd(),
        )
        configure_logging("debug" if settings.debug else settings.log_level, settings.log_format)
        status = run(serve(settings))
    except* (SettingsError, OSError) as errors:
        print(f"{PROGRAM}: {errors.exceptions[0]}", file=sys.stderr)
        status = 2
    return status


if __name__ == "__main__":
    sys.exit(main())
