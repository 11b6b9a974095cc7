"""Timeout and retries of one call."""

from __future__ import annotations

import asyncio
import math

from modelyard.client import _values as values
from modelyard.client._errors import ModelyardError, TryAgain

_FIRST_PAUSE = 0.25
_LONGEST_PAUSE = 4.0


class Patience:
    """The seconds and the retries that one call has left; starts when it is made. Raises InvalidArgument for a timeout
    that is none."""

    def __init__(self, timeout: float | None, retries: int) -> None:
        self._clock = asyncio.get_running_loop().time
        timeout = values.timeout(timeout)
        self._end = math.inf if timeout is None else self._clock() + timeout
        self._retries = retries
        self._pause = _FIRST_PAUSE

    def left(self) -> float | None:
        """Seconds for the next try; None: no limit."""
        return None if math.isinf(self._end) else max(0.0, self._end - self._clock())

    async def wait_or_raise(self, failure: ModelyardError, cause: BaseException | None = None) -> None:
        """Wait until a retry is due, or raise the failure if none is left or would come too late."""
        pause = self._pause if failure.retry_after is None else failure.retry_after
        if self._retries <= 0 or not isinstance(failure, TryAgain) or self._clock() + pause >= self._end:
            raise failure from cause
        self._retries -= 1
        self._pause = min(2 * self._pause, _LONGEST_PAUSE)
        await asyncio.sleep(pause)
