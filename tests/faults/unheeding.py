"""The control plane, deaf to the news that a task has passed into other hands: its attempts go on to the end and write.

All that stands between them and a second result is the epoch. With --unfenced first, that is gone too: a planted bug,
for the checker to find.

python -m tests.faults.unheeding takes the arguments of control_plane.
"""

from __future__ import annotations

import sys
from typing import Any

from control_plane.__main__ import main
from control_plane.tasks import dispatcher, transitions


def _interrupt(self: Any, why: Any) -> None:
    """What was taken away goes on."""


def _apply(self: transitions.OfAttempt, row: Any, work: Any, lanes: Any) -> bool:
    if row is None:
        return False
    self.change(row, work, lanes)
    return True


if __name__ == "__main__":
    dispatcher._Attempt.interrupt = _interrupt  # type: ignore[method-assign]
    if sys.argv[1:2] == ["--unfenced"]:
        del sys.argv[1]
        transitions.OfAttempt.apply = _apply  # type: ignore[method-assign]
    sys.exit(main())
