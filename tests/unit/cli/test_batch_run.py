"""A batch and its results while the service fails for now."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from modelyard.cli import batch
from modelyard.cli.batch_file import Entry, read_entries
from modelyard.cli.batch_view import BatchView
from modelyard.client import AsyncClient, ConnectionFailed, StoreFull
from modelyard.rpc.errors import Refusal
from modelyard.rpc.reasons import Reason
from modelyard.testing import FakeTaskQueue
from modelyard.v1.task_queue_pb2 import Task, TaskSpec

FULL = Refusal(Reason.STORE_FULL, "the disk is full")
AWAY = Refusal(Reason.STORE_UNAVAILABLE, "the database does not answer", retry_after=0.01)


def entries(count: int = 5) -> list[Entry]:
    text = "\n".join(json.dumps({"prompt": f"{n}"}) for n in range(count))
    return read_entries("f.jsonl", text, "g", {})


async def run(fake: FakeTaskQueue, path: Path, count: int = 5, retry_failed: bool = False) -> dict[str, Any]:
    async with AsyncClient(fake.address) as client:
        return await batch.run(client, entries(count), path, "g", retry_failed=retry_failed, quiet=True)


class Full(FakeTaskQueue):
    """Its disk is full for some submissions."""

    refused = 0

    def _submit(self, spec: TaskSpec, key: str) -> tuple[Task, bool]:
        if self.refused:
            self.refused -= 1
            raise FULL
        return super()._submit(spec, key)


async def test_a_full_store_is_waited_for_and_told_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async with Full() as fake:
        fake.refused = 12
        counts = await run(fake, tmp_path / "r")
    assert counts == {"prompts": 5, "succeeded": 5, "failed": 0} and len(fake.tasks) == 5
    assert capsys.readouterr().err.count("waiting: the disk is full") == 1


async def test_a_store_that_stays_full_is_given_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "_GIVE_UP", 0.2)
    async with Full() as fake:
        fake.refused = 1_000_000
        with pytest.raises(StoreFull):
            await run(fake, tmp_path / "r")
    assert "run the same command again" in capsys.readouterr().err


async def test_every_call_is_repeated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async with FakeTaskQueue() as fake:
        fake.hold = True
        for method in ("GetQueueStats", "BatchSubmitTasks", "WatchTasks", "GetTask"):
            fake.inject_error(method, AWAY, times=2)
        fake.cut("BatchSubmitTasks", after=2)
        fake.cut("WatchTasks", after=1)
        running = asyncio.create_task(run(fake, tmp_path / "r"))
        await fake.until(lambda: len(fake.tasks) == 5)
        for id in list(fake.tasks):
            fake.finish(id)
        async with asyncio.timeout(20):
            assert (await running)["succeeded"] == 5
    assert len(fake.tasks) == 5
    assert "waiting: the database does not answer" in capsys.readouterr().err


async def test_a_control_plane_that_restarts_is_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async with FakeTaskQueue() as fake:
        fake.hold = True
        running = asyncio.create_task(run(fake, tmp_path / "r"))
        await fake.until(lambda: len(fake.tasks) == 5)
        port = int(fake.address.rpartition(":")[2])
        await fake.stop()
        fake.hold = False
        for id in list(fake.tasks):
            fake.finish(id)
        told = ""
        async with asyncio.timeout(20):
            while "waiting: " not in told:  # somebody has asked in vain
                await asyncio.sleep(0.01)
                told += capsys.readouterr().err
            await fake.start(port)
            assert (await running)["succeeded"] == 5


async def test_nobody_there_at_the_beginning_is_told_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with AsyncClient("127.0.0.1:1") as client:
        with pytest.raises(ConnectionFailed):
            await batch.run(client, entries(), tmp_path / "r", "g", retry_failed=False, quiet=True)
    assert capsys.readouterr().err == ""


async def test_two_files_with_one_file_of_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "r"
    async with FakeTaskQueue() as fake:
        await run(fake, path, 3)
        first = path.read_text().splitlines()
        async with AsyncClient(fake.address) as client:
            other = read_entries("b.jsonl", '{"prompt": "b"}', "b.jsonl", {})
            await batch.run(client, other, path, "b.jsonl", retry_failed=False, quiet=True)
    mine, *others = path.read_text().splitlines()
    assert json.loads(mine)["key"] == other[0].key and others == first
    assert "3 results of other or edited lines" in capsys.readouterr().err


async def test_what_had_ended_before_is_no_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    views: list[BatchView] = []

    def view(total: int, quiet: bool) -> BatchView:
        views.append(BatchView(total))
        return views[-1]

    monkeypatch.setattr(batch, "_view", view)
    async with FakeTaskQueue() as fake:
        await run(fake, tmp_path / "first")
        await run(fake, tmp_path / "second")
    assert [view.done for view in views] == [5, 5]
    assert [view.rate is None for view in views] == [False, True]
