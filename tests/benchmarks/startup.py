"""How long a user waits before anything happens: whole processes, median of several."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

_COMMANDS = {
    "modelyard --help": [str(Path(sys.executable).with_name("modelyard")), "--help"],
    "import modelyard.client": [sys.executable, "-c", "import modelyard.client"],
}


def run(quick: bool = False) -> dict[str, float]:
    """Seconds of wall time per command."""
    return {name: _median(command, 3 if quick else 9) for name, command in _COMMANDS.items()}


def _median(command: list[str], times: int) -> float:
    taken = []
    for _ in range(times + 1):
        started = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        taken.append(time.perf_counter() - started)
    return statistics.median(taken[1:])  # the first one warms the file cache


if __name__ == "__main__":
    for name, value in run().items():
        print(f"{name}: {value:.3f} s")
