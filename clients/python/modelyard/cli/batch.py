"""`modelyard tasks batch`: a file of prompts through the durable queue, resumable at every point."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelyard.cli import output
from modelyard.cli.batch_file import Entry, Results
from modelyard.cli.batch_view import Bar, BatchView, Lines

if TYPE_CHECKING:
    from modelyard.client import AsyncClient, ModelyardError, NewTask, Submission, Task

_FETCHES = 16
"""Results that are fetched at the same time."""

_AGAIN = 1.0
"""Seconds after which tasks are submitted again that could not be accepted for now."""

_GIVE_UP = 60.0
"""Seconds without anything being accepted after which a batch gives up."""

_ENDED = ("succeeded", "failed", "cancelled", "expired")


async def run(
    client: AsyncClient, entries: list[Entry], path: Path | None, group: str, *, retry_failed: bool, quiet: bool
) -> dict[str, Any]:
    """Submit what has no result yet, wait for everything, write results. The counts."""
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
        except asyncio.CancelledError:
            where = f"; results so far are in {path}" if path else ""
            output.note(f"stopped: {view.words()}{where}. What was submitted goes on: run the same again for the rest")
            raise
        dropped = results.settle(entries)
        failed = view.failed
        if path is not None:
            failed = sum(results.kept[entry.key]["state"] != "succeeded" for entry in entries)
    told = {"prompts": len(entries), "succeeded": len(entries) - failed, "failed": failed}
    if dropped:
        output.note(f"{dropped} older results belong to no line of the file any more and were left out")
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
        self._fetches = asyncio.Semaphore(_FETCHES)
        self._all_done = asyncio.Event()

    async def run(self) -> None:
        if not self._left:
            return
        # From here on: what ends later is told by an event, what has ended says so when it is submitted.
        position = (await self._client.tasks.stats()).last_event_id
        try:
            async with asyncio.TaskGroup() as group:
                watcher = group.create_task(self._watch(position, group))
                await self._submit(group)
                await self._all_done.wait()
                watcher.cancel()
        except BaseExceptionGroup as errors:
            raise _first(errors) from None

    # ---------------------------------------------------------------- submit ---

    async def _submit(self, group: asyncio.TaskGroup) -> None:
        from modelyard.client import TryAgain

        waiting = self._left
        clock = asyncio.get_running_loop().time
        accepted_at = clock()
        while waiting:
            again: list[Entry] = []
            failure: ModelyardError | None = None
            async with contextlib.aclosing(self._client.tasks.submit_many(_tasks(waiting))) as answers:
                async for answer in answers:
                    entry = waiting[answer.index]
                    if isinstance(answer.error, TryAgain):
                        failure = answer.error
                        again.append(entry)
                        continue
                    accepted_at = clock()
                    await self._answered(entry, answer, group)
            if failure is not None:
                if clock() - accepted_at > _GIVE_UP:
                    raise failure
                await asyncio.sleep(failure.retry_after or _AGAIN)
            waiting = again

    async def _answered(self, entry: Entry, answer: Submission, group: asyncio.TaskGroup) -> None:
        task = answer.task
        if task is None:
            assert answer.error is not None
            self._end(entry, {"state": "refused", "error": _error(answer.error.reason, answer.error.message)})
            return
        self._view.accepted()
        if self._retry_failed and not answer.created and task.done and task.state != "succeeded":
            task = await self._client.tasks.retry(task.id)
        self._by_task.setdefault(task.id, []).append(entry)
        if task.done or task.id in self._ended_early:
            group.create_task(self._fetch(task.id))

    # ---------------------------------------------------------------- results ---

    async def _watch(self, position: int, group: asyncio.TaskGroup) -> None:
        events = self._client.tasks.watch_all(group=self._group, states=_ENDED, after=position)
        async with contextlib.aclosing(events):
            async for event in events:
                if event.task_id in self._by_task:
                    group.create_task(self._fetch(event.task_id))
                else:
                    self._ended_early.add(event.task_id)

    async def _fetch(self, id: str) -> None:
        async with self._fetches:
            if not any(entry.key in self._open for entry in self._by_task[id]):
                return
            task = await self._client.tasks.get(id)
        if not task.done:  # somebody has queued it again
            return
        for entry in self._by_task[id]:
            self._end(entry, _facts(task))

    def _end(self, entry: Entry, facts: dict[str, Any]) -> None:
        if self._open.pop(entry.key, None) is None:
            return
        named = {} if entry.id is None else {"id": entry.id}
        self._results.add({"line": entry.line, **named, "key": entry.key, **facts})
        self._view.finished(failed=facts["state"] != "succeeded")
        if not self._open:
            self._all_done.set()


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
