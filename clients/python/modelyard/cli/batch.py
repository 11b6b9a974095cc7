"""`modelyard tasks batch`: a file of prompts through the durable queue, resumable at every point."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from modelyard.cli import output
from modelyard.cli.batch_file import Entry, Results
from modelyard.cli.batch_view import Bar, BatchView, Lines

if TYPE_CHECKING:
    from modelyard.client import AsyncClient, ModelyardError, NewTask, Submission, Task

_FETCHES = 16
"""Results that are fetched at the same time."""

_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0
"""Seconds until what failed for now is tried again, doubled each time."""

_GIVE_UP = 60.0
"""Seconds without an answer or a result after which a batch gives up what keeps failing."""

_SOUND = 5.0
"""A watch that has held for so many seconds was sound, even if nothing came."""

T = TypeVar("T")

_ENDED = ("succeeded", "failed", "cancelled", "expired")


async def run(
    client: AsyncClient, entries: list[Entry], path: Path | None, group: str, *, retry_failed: bool, quiet: bool
) -> dict[str, Any]:
    """Submit what has no result yet, wait for everything, write results. The counts. Raises ModelyardError when
    something cannot be mended by waiting, or was not for too long."""
    from modelyard.client import ModelyardError

    with Results(path, sys.stdout) as results, _view(len(entries), quiet) as view:
        # What failed is kept unless it is to be done again; what was refused is no task yet.
        left = [
            entry
            for entry in entries
            if (kept := results.kept.get(entry.key)) is None
            or kept.get("state") not in _ENDED
            or (retry_failed and kept["state"] != "succeeded")
        ]
        view.kept(len(entries) - len(left))
        work = _Batch(client, left, results, view, group, retry_failed)
        try:
            await work.run()
        except (asyncio.CancelledError, ModelyardError) as ended:
            if work.nobody_there:
                raise
            where = f"; results so far are in {path}" if path else ""
            how = "stopped" if isinstance(ended, asyncio.CancelledError) else "given up"
            output.note(
                f"{how}: {view.words()}{where}. What was submitted goes on: run the same command again for the rest"
            )
            raise
        others = results.settle(entries)
        failed = view.failed
        if path is not None:
            failed = sum(results.kept[entry.key]["state"] != "succeeded" for entry in entries)
    told = {"prompts": len(entries), "succeeded": len(entries) - failed, "failed": failed}
    if others:
        output.note(f"{others} results of other or edited lines were there before and stay, at the end of {path}")
    return told


def _view(total: int, quiet: bool) -> BatchView:
    if quiet:
        return BatchView(total)
    return Bar(total) if output.is_terminal(sys.stderr) else Lines(total)


class _Batch:
    """One run over what has no result yet."""

    def __init__(
        self,
        client: AsyncClient,
        entries: list[Entry],
        results: Results,
        view: BatchView,
        group: str,
        retry_failed: bool,
    ) -> None:
        self._client = client
        self._results = results
        self._view = view
        self._group = group
        self._retry_failed = retry_failed
        self._left = entries
        self._open = {entry.key: entry for entry in entries}
        """Without a result."""
        self._by_task: dict[str, list[Entry]] = {}
        self._ended_early: set[str] = set()
        """Ids of tasks whose end was told before the answer to their submission."""
        self._earlier: set[str] = set()
        """Ids of tasks that had ended before this run."""
        self._fetches = asyncio.Semaphore(_FETCHES)
        self._all_done = asyncio.Event()
        self._waiting = _Waiting()
        self.nobody_there = False
        """From the beginning."""

    async def run(self) -> None:
        if not self._left:
            return
        from modelyard.client import ConnectionFailed

        # From here on: what ends later is told by an event, what has ended says so when it is submitted. That nobody
        # is there at the beginning is told at once: perhaps the address is wrong.
        try:
            position = (await self._persist(self._client.tasks.stats, but=ConnectionFailed)).last_event_id
        except ConnectionFailed:
            self.nobody_there = True
            raise
        try:
            async with asyncio.TaskGroup() as group:
                watcher = group.create_task(self._watch(position, group))
                await self._submit(group)
                await self._all_done.wait()
                watcher.cancel()
        except BaseExceptionGroup as errors:
            raise _first(errors) from None

    async def _persist(self, call: Callable[[], Awaitable[T]], but: type[Exception] | tuple[()] = ()) -> T:
        """The answer of a call that is repeated while it fails for now; `but` what is raised at once."""
        from modelyard.client import ModelyardError

        attempts = _Attempts(self._waiting)
        while True:
            try:
                answer = await call()
            except but:
                raise
            except ModelyardError as failure:
                await attempts.wait_or_raise(failure)
            else:
                attempts.came()
                return answer

    # ---------------------------------------------------------------- submit ---

    async def _submit(self, group: asyncio.TaskGroup) -> None:
        from modelyard.client import ModelyardError, TryAgain

        waiting = self._left
        attempts = _Attempts(self._waiting)
        while waiting:
            again: list[Entry] = []
            failure: ModelyardError | None = None
            answered = 0
            try:
                # Who waits here says so: the SDK would in silence.
                answers = self._client.tasks.submit_many(_tasks(waiting), patience=0)
                async with contextlib.aclosing(answers):
                    async for answer in answers:
                        entry = waiting[answer.index]
                        answered = answer.index + 1
                        if isinstance(answer.error, TryAgain):
                            failure = answer.error
                            again.append(entry)
                            continue
                        attempts.came()
                        await self._answered(entry, answer, group)
            except ModelyardError as broken:
                failure = broken
                again += waiting[answered:]
            waiting = again
            if failure is not None:
                await attempts.wait_or_raise(failure)

    async def _answered(self, entry: Entry, answer: Submission, group: asyncio.TaskGroup) -> None:
        task = answer.task
        if task is None:
            assert answer.error is not None
            self._end(entry, {"state": "refused", "error": _error(answer.error.reason, answer.error.message)})
            return
        self._view.accepted()
        if self._retry_failed and not answer.created and task.done and task.state != "succeeded":
            failed = task.id
            task = await self._persist(lambda: self._again(failed))
        elif not answer.created and task.done:
            self._earlier.add(task.id)
        self._by_task.setdefault(task.id, []).append(entry)
        if task.done or task.id in self._ended_early:
            group.create_task(self._fetch(task.id))

    async def _again(self, id: str) -> Task:
        from modelyard.client import WrongState

        try:
            return await self._client.tasks.retry(id)
        except WrongState:  # the answer to an earlier call was lost, or somebody else was faster
            return await self._client.tasks.get(id)

    # ---------------------------------------------------------------- results ---

    async def _watch(self, position: int, group: asyncio.TaskGroup) -> None:
        from modelyard.client import ModelyardError

        attempts = _Attempts(self._waiting)
        while True:
            opened = time.monotonic()
            events = self._client.tasks.watch_all(group=self._group, states=_ENDED, after=position, patience=0)
            try:
                async with contextlib.aclosing(events):
                    async for event in events:
                        attempts.came()
                        position = event.id
                        if event.task_id in self._by_task:
                            group.create_task(self._fetch(event.task_id))
                        else:
                            self._ended_early.add(event.task_id)
                await asyncio.sleep(_FIRST_PAUSE)  # it is not meant to end
            except ModelyardError as failure:
                if time.monotonic() - opened > _SOUND:
                    attempts.came()
                await attempts.wait_or_raise(failure)

    async def _fetch(self, id: str) -> None:
        async with self._fetches:
            if not any(entry.key in self._open for entry in self._by_task[id]):
                return
            task = await self._persist(lambda: self._client.tasks.get(id))
        if not task.done:  # somebody has queued it again
            return
        for entry in self._by_task[id]:
            self._end(entry, _facts(task), earlier=id in self._earlier)

    def _end(self, entry: Entry, facts: dict[str, Any], *, earlier: bool = False) -> None:
        if self._open.pop(entry.key, None) is None:
            return
        named = {} if entry.id is None else {"id": entry.id}
        self._results.add({"line": entry.line, **named, "key": entry.key, **facts})
        self._view.finished(failed=facts["state"] != "succeeded", earlier=earlier)
        if not self._open:
            self._all_done.set()


class _Waiting:
    """What a batch waits for: each reason is told once, and again when it comes back much later."""

    def __init__(self) -> None:
        self.last_progress = time.monotonic()
        self._met: dict[str, float] = {}

    def progress(self) -> None:
        """Something came."""
        self.last_progress = time.monotonic()

    def tell(self, failure: ModelyardError) -> None:
        now = time.monotonic()
        last, self._met[failure.reason] = self._met.get(failure.reason), now
        if last is None or now - last > _GIVE_UP:
            output.note(f"waiting: {' '.join(failure.message.split())}; tried again for up to {_GIVE_UP:g} s")


class _Attempts:
    """Whether and when one thing that failed is tried again."""

    def __init__(self, waiting: _Waiting) -> None:
        self._waiting = waiting
        self._failing_since: float | None = None
        self._pause = _FIRST_PAUSE

    def came(self) -> None:
        """It did not fail."""
        self._waiting.progress()
        self._failing_since, self._pause = None, _FIRST_PAUSE

    async def wait_or_raise(self, failure: ModelyardError) -> None:
        """Wait until it may be tried again, or raise the failure: waiting does not mend it, or has not for too long."""
        from modelyard.client import DeadlineExceeded, SlowReader, StreamBroken, TryAgain

        if not isinstance(failure, (TryAgain, StreamBroken, SlowReader, DeadlineExceeded)):
            raise failure
        now = time.monotonic()
        if self._failing_since is None:
            self._failing_since = now
        if now - max(self._failing_since, self._waiting.last_progress) > _GIVE_UP:
            raise failure
        self._waiting.tell(failure)
        await asyncio.sleep(min(max(self._pause, failure.retry_after or 0), _LONGEST_PAUSE))
        self._pause = min(2 * self._pause, _LONGEST_PAUSE)


async def _tasks(entries: list[Entry]) -> AsyncIterator[NewTask]:
    for entry in entries:
        yield entry.task


def _facts(task: Task) -> dict[str, Any]:
    """What a result says."""
    facts: dict[str, Any] = {"task": task.id, "state": task.state, "attempts": task.attempt_count}
    result = task.result
    if result is None:
        facts["error"] = _error(task.failure_reason or task.state.upper(), task.failure_message)
        return facts
    facts["text"] = result.text
    if result.reasoning_text:
        facts["reasoning_text"] = result.reasoning_text
    if result.tool_calls:
        facts["tool_calls"] = [call.to_dict() for call in result.tool_calls]
    if result.logprobs:
        facts["logprobs"] = [each.to_dict() for each in result.logprobs]
    facts |= {
        "finish_reason": result.finish_reason,
        "model": result.model,
        "provider": result.provider,
        "server": result.server_id,
        "usage": result.usage.to_dict(),
    }
    if result.cost_usd:
        facts["cost_usd"] = result.cost_usd
    return facts


def _error(reason: str, message: str) -> dict[str, str]:
    return {"reason": reason, "message": message}


def _first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    """The failure that ended the others."""
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
