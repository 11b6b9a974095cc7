"""Runs a command that must not outlive whoever started it: `python tied.py PARENT COMMAND...`.

On Linux the kernel ends the command when its parent dies, however the parent dies; elsewhere nothing is done.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1

if __name__ == "__main__":
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))
        if os.getppid() != int(sys.argv[1]):
            sys.exit(1)  # it died before the kernel was told
    os.execvp(sys.argv[2], sys.argv[2:])  # noqa: S606  the operator's own command
