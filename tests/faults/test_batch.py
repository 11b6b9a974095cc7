"""`modelyard tasks batch` while its control plane is killed and started again: every result once.

The full figure, by hand: MODELYARD_TEST_PROMPTS=500 pytest tests/faults/test_batch.py
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from modelyard.client import AsyncClient
from tests.faults.cluster import QUICK, Restartable
from tests.harness.ports import free_port
from tests.harness.programs import simulated_server, until

PROMPTS = int(os.environ.get("MODELYARD_TEST_PROMPTS", "120"))
PATIENCE = 60.0

pytestmark = pytest.mark.timeout(180)


class Batch:
    """The file, and the command on it, as often as it is run."""

    def __init__(self, folder: Path, address: str) -> None:
        self.file, self.out, self.address = folder / "prompts.jsonl", folder / "results.jsonl", address
        self.file.write_text("".join(json.dumps({"id": n, "prompt": f"Say {n}"}) + "\n" for n in range(PROMPTS)))

    async def start(self) -> asyncio.subprocess.Process:
        kept = {key: value for key, value in os.environ.items() if not key.startswith("MODELYARD_")}
        return await asyncio.create_subprocess_exec(
            sys.executable, "-m", "modelyard.cli", "--address", self.address, "tasks", "batch", str(self.file),
            "-o", str(self.out), stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE, env=kept,
        )  # fmt: skip

    def results(self) -> list[dict[str, Any]]:
        if not self.out.exists():
            return []
        lines = self.out.read_text().split("\n")
        return [json.loads(line) for line in lines[:-1]]  # the last one may be in the middle of being written

    async def until(self, count: int, running: asyncio.subprocess.Process) -> None:
        async def reached() -> bool:
            return len(self.results()) >= count or running.returncode is not None

        await until(reached, PATIENCE)
        assert running.returncode is None, "it was over too soon to be disturbed"

    async def end(self, running: asyncio.subprocess.Process) -> str:
        _, said = await asyncio.wait_for(running.communicate(), 2 * PATIENCE)
        assert running.returncode == 0, said.decode()
        return said.decode()

    async def check(self) -> None:
        """Each prompt has one result and one task."""
        results = self.results()
        assert [result["id"] for result in results] == list(range(PROMPTS))
        assert all(result["state"] == "succeeded" and result["text"] for result in results)
        async with AsyncClient(self.address) as client:
            tasks = [task async for task in client.tasks.list(page_size=500)]
            assert len(tasks) == PROMPTS and {task.id for task in tasks} == {result["task"] for result in results}
            ends = [event async for event in _ends(client)]
        assert sorted(ends) == sorted(task.id for task in tasks), "a result was recorded twice, or not at all"


async def _ends(client: AsyncClient) -> AsyncIterator[str]:
    """Tasks that have succeeded, by the event log."""
    left = PROMPTS
    async for event in client.tasks.watch_all(states=("succeeded",), after=0):
        yield event.task_id
        left -= 1
        if not left:
            return


@asynccontextmanager
async def fleet(folder: Path) -> AsyncIterator[tuple[Restartable, Batch]]:
    port = free_port()
    plane = Restartable(
        "control_plane", "--port", str(port), "--metrics-port", "-1", "--gateway.port", "-1",
        "--tasks.store", f"sqlite:///{folder}/tasks.db", "--fleet.report-interval", "0.2",
    )  # fmt: skip
    try:
        await plane.start()
        async with simulated_server("sim", f"127.0.0.1:{port}", **{**QUICK, "slots": 4}):
            yield plane, Batch(folder, f"127.0.0.1:{port}")
    finally:
        await plane.kill()


async def test_a_batch_goes_on_while_the_control_plane_is_killed(tmp_path: Path) -> None:
    async with fleet(tmp_path) as (plane, batch):
        running = await batch.start()
        for share in (0.0, 0.5):  # as soon as it is under way, then later
            await batch.until(max(1, int(PROMPTS * share)), running)
            await plane.kill()
            await plane.start()
        said = await batch.end(running)
        assert "waiting: " in said and "Traceback" not in said
        await batch.check()
        again = await batch.end(await batch.start())
        assert f"{PROMPTS} succeeded" in again
        await batch.check()


async def test_a_batch_that_is_killed_with_its_control_plane_is_run_again(tmp_path: Path) -> None:
    async with fleet(tmp_path) as (plane, batch):
        running = await batch.start()
        await batch.until(PROMPTS // 4, running)
        running.kill()
        await plane.kill()
        await running.wait()
        await plane.start()
        said = await batch.end(await batch.start())
        assert f"{PROMPTS} succeeded" in said and "Traceback" not in said
        await batch.check()
