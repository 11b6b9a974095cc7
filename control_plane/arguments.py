"""The command lines of programs that print facts as JSON."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """A parser that tells what is wrong with a command line as JSON, too, where it says --json; so do those of its
    verbs. Exit status 2."""

    _json = False

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """As the parser of the standard library; `args` are all that this one is given."""
        self._json = "--json" in (args or ())
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Print it, and exit."""
        if self._json:
            print(json.dumps({"error": {"reason": "USAGE", "message": message}}))
        super().error(message)
