"""The `modelyard` command.

`main` runs before anything beyond the standard library is imported, so that a missing extra is
answered with its cure instead of a traceback, and `modelyard --help` does not wait for gRPC.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from modelyard.cli.extras import cure

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    problem = cure("the modelyard command", "cli")
    if problem:
        print(f"modelyard: {problem}", file=sys.stderr)
        return 1
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # what ends is told in our words
    from modelyard.cli._root import run

    return run(arguments)
