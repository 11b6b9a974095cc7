"""Sends callbacks that are due, again and again until they are accepted or given up."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from control_plane.domain.errors import DomainError
from control_plane.tasks.callbacks import Answer, CallbackState, DeliveryRecord, Repetition, Rules, headers, origin_of
from modelyard.program import privacy

if TYPE_CHECKING:
    from control_plane.tasks.deliveries import Deliveries
    from control_plane.tasks.webhook import Sender

log = logging.getLogger(__name__)

_POLL = 1.0
"""Seconds after which to look again for what another control plane has made, or the database could not tell."""


class Deliverer:
    """Runs as a task of the control plane.

    render    body of the notice of a delivery; None if its task has no such end any more
    secrets   reads the secrets, newest first; raises ValueError
    outcome   is told what became of each attempt: delivered, failed, dead
    """

    def __init__(
        self,
        deliveries: Deliveries,
        render: Callable[[DeliveryRecord], Awaitable[bytes | None]],
        rules: Rules,
        secrets: Callable[[], tuple[bytes, ...]],
        repetition: Repetition,
        *,
        timeout: float,
        most: int,
        most_per_host: int,
        outcome: Callable[[str], None] = lambda _: None,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._deliveries = deliveries
        self._render = render
        self._rules = rules
        self._secrets = secrets
        self._repetition = repetition
        self._timeout = timeout
        self._most = most
        self._most_per_host = most_per_host
        self._outcome = outcome
        self._jitter = jitter
        self._running: Counter[str] = Counter()
        self._wake = asyncio.Event()
        self._ended = asyncio.Event()
        self._stopping = False
        self._store_away = False
        self._sender: Sender | None = None

    @property
    def lease(self) -> float:
        """Seconds for which nobody else takes a callback that is being sent: longer than an attempt can last."""
        return 2 * self._timeout + 5

    def stop(self) -> None:
        """Take nothing new; `run` returns when what is being sent has ended."""
        self._stopping = True
        self._wake.set()

    async def drain(self, grace: float) -> None:
        """Take nothing new, and let what is being sent end, for at most so many seconds. What has not ended by then is
        sent again when its lease is over."""
        self.stop()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace):
                await self._ended.wait()

    async def run(self) -> None:
        """Until `stop`. Failures of the database are waited out."""
        forget = self._deliveries.listen(self._wake.set)
        try:
            async with asyncio.TaskGroup() as group:
                while not self._stopping:
                    self._wake.clear()
                    await self._wait(await self._round(group))
        finally:
            forget()
            self._ended.set()
            if self._sender:
                await self._sender.close()

    async def _wait(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._wake.wait()

    async def _round(self, group: asyncio.TaskGroup) -> float:
        """Start what is due and may run; seconds until it is worth looking again, if nothing happens before."""
        free = self._most - self._running.total()
        if free <= 0:
            return _POLL  # the end of one wakes us
        try:
            due = await self._deliveries.next_due()
            left = _POLL if due is None else due - self._deliveries.now()
            if left > 0:
                self._answered()
                return min(left, _POLL)
            taken = await self._deliveries.claim(free, self._most_per_host, dict(self._running), self.lease)
        except DomainError as error:
            if not self._store_away:
                log.warning("callbacks wait until the task store is back: %s", error.reason)
            self._store_away = True
            return _POLL
        self._answered()
        for delivery in taken:
            origin = origin_of(delivery.url)
            self._running[origin] += 1
            group.create_task(self._deliver(delivery, origin), name=f"callback {delivery.id}")
        # What is due and was not taken waits for its host: the end of what runs against it wakes us.
        return 0.0 if taken else _POLL

    def _answered(self) -> None:
        if self._store_away:
            log.warning("callbacks are sent again")
        self._store_away = False

    async def _deliver(self, delivery: DeliveryRecord, origin: str) -> None:
        try:
            await self._attempt(delivery)
        except DomainError as error:
            # Not recorded: it is sent again, under the same id, when the lease is over.
            log.warning("callback %s: the outcome could not be recorded: %s", delivery.id, error.reason)
        finally:
            self._running[origin] -= 1
            if not self._running[origin]:
                del self._running[origin]
            self._wake.set()

    async def _attempt(self, delivery: DeliveryRecord) -> None:
        try:
            body = await self._render(delivery)
            if body is None:
                await self._deliveries.drop(delivery.id)
                return
            answer = await self._send(delivery, body)
        except DomainError:
            raise
        except Exception as error:  # one task that cannot be told of must not end all of it
            log.error("callback %s could not be sent: %s", delivery.id, privacy.where(error))
            answer = Answer(False, "not sent: a bug in modelyard, see the log of the control plane")
        if answer.accepted:
            self._outcome("delivered")
            await self._deliveries.ended(delivery.id, delivery.attempts, CallbackState.DELIVERED, "")
            return
        pause = None if answer.final else self._repetition.pause(delivery.attempts, self._jitter(), answer.retry_after)
        if pause is None:
            self._outcome("dead")
            log.warning("callback %s is given up after %d attempts: %s", delivery.id, delivery.attempts, answer.failure)
            await self._deliveries.ended(delivery.id, delivery.attempts, CallbackState.DEAD, answer.failure)
        else:
            self._outcome("failed")
            due_at = self._deliveries.now() + pause
            await self._deliveries.again(delivery.id, delivery.attempts, due_at, answer.failure)

    async def _send(self, delivery: DeliveryRecord, body: bytes) -> Answer:
        try:
            secrets = self._secrets()
        except ValueError as error:
            log.error("callbacks cannot be signed: %s", error)
            return Answer(False, "not sent: it could not be signed, see the log of the control plane")
        if self._sender is None:
            from control_plane.tasks.webhook import Sender

            self._sender = Sender(self._rules, self._timeout)
        signed = headers(delivery.id, self._deliveries.now(), body, secrets)
        return await self._sender.send(delivery.url, signed, body)
