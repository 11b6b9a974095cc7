"""The health of a server that is reached over a network: asked in the background, again and again."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from model_servers.engine import EngineError, Health

_log = logging.getLogger(__name__)

_FIRST_PAUSE = 0.5


class Watch:
    """Calls `look`, which raises EngineError when the server does not work. Nothing else decides about health."""

    def __init__(
        self, name: str, look: Callable[[], Awaitable[None]], *, every: float, only_idle: bool = False
    ) -> None:
        """`every`: seconds between looks while all is well; while it is not, pauses grow from 0.5 s up to that.
        `only_idle`: a request that succeeds makes the next look unnecessary."""
        self._name = name
        self._look = look
        self._every = every
        self._only_idle = only_idle
        self._asked = asyncio.Event()
        self._worked_at = float("-inf")
        self._task: asyncio.Task[None] | None = None
        self.health = Health.STARTING
        self.detail = ""

    async def start(self) -> None:
        """Looks once, and from then on in the background."""
        await self.look()
        self._task = asyncio.create_task(self._run(), name=f"watch-{self._name}")

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def worked(self) -> None:
        """A request has succeeded."""
        self._worked_at = asyncio.get_running_loop().time()

    def doubt(self) -> None:
        """A request has failed in a way that may be the server's: look now."""
        self._asked.set()

    async def look(self) -> None:
        try:
            await self._look()
        except EngineError as error:
            self._tell(Health.UNHEALTHY, str(error))
        except Exception as error:  # a look that fails in an unforeseen way must not end the watching
            _log.exception("%s: looking after the server failed", self._name)
            self._tell(Health.UNHEALTHY, f"{self._name} could not be looked after ({type(error).__name__})")
        else:
            self._tell(Health.READY, "")

    def _tell(self, health: Health, detail: str) -> None:
        if health is not self.health:
            if health is Health.READY:
                _log.info("%s: ready", self._name)
            else:
                _log.warning("%s: unhealthy: %s", self._name, detail)
        self.health, self.detail = health, detail

    async def _run(self) -> None:
        time = asyncio.get_running_loop().time
        pause = self._every
        while True:
            self._asked.clear()
            try:
                async with asyncio.timeout(pause):
                    await self._asked.wait()
                # However many requests fail at the same time, and however often.
                await asyncio.sleep(min(_FIRST_PAUSE, self._every) / 5)
            except TimeoutError:
                idle_for = time() - self._worked_at
                if self.health is Health.READY and self._only_idle and idle_for < self._every:
                    pause = self._every - idle_for
                    continue
            await self.look()
            if self.health is Health.READY:
                pause = self._every
            else:
                pause = min(self._every, _FIRST_PAUSE if pause >= self._every else 2 * pause)
