"""`modelyard models pull|load|unload` and what `models` and `servers` show of a model's life, as a user runs them."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import re
import signal
import subprocess
from collections.abc import AsyncIterator

import pytest

from modelyard.rpc.errors import Refusal
from modelyard.rpc.reasons import Reason
from modelyard.testing import FakeModelServer, FakeOrchestrator, model_info
from modelyard.v1 import fleet_pb2
from tests.integration.test_cli import CLI, environment, modelyard

PULLING, COLD, WARM = fleet_pb2.MODEL_STATE_PULLING, fleet_pb2.MODEL_STATE_COLD, fleet_pb2.MODEL_STATE_WARM
GB = 10**9


@pytest.fixture
async def fake() -> AsyncIterator[FakeOrchestrator]:
    async with FakeOrchestrator() as control_plane:
        yield control_plane


async def run(fake: FakeOrchestrator, *arguments: str) -> subprocess.CompletedProcess[str]:
    return await asyncio.to_thread(modelyard, *arguments, MODELYARD_ADDRESS=fake.address)


def step(state: fleet_pb2.ModelState, done: float = 0, total: float = 0, detail: str = "") -> fleet_pb2.ModelProgress:
    return fleet_pb2.ModelProgress(
        state=state, detail=detail, completed_bytes=int(done * GB), total_bytes=int(total * GB)
    )


PULL = (step(PULLING, 0, 4, "layers"), *(step(PULLING, n / 100, 4, "layers") for n in range(400)), step(COLD, 4, 4))


async def test_piped_progress_is_a_few_lines(fake: FakeOrchestrator) -> None:
    fake.steps = PULL
    done = await run(fake, "models", "pull", "llama", "--server", "gpu-1")
    assert (done.returncode, done.stdout) == (0, "llama is cold on gpu-1\n")
    lines = done.stderr.splitlines()
    assert lines[0] == "llama on gpu-1: pulling, layers, 0% of 4.0 GB"
    assert lines[5] == "llama on gpu-1: pulling, layers, 50% of 4.0 GB"
    assert lines[-1] == "llama on gpu-1: cold, 100% of 4.0 GB"
    assert len(lines) == 11
    assert fake.calls[0].request.server_id == "gpu-1"


async def test_json_is_a_line_for_each_step(fake: FakeOrchestrator) -> None:
    fake.steps = (step(PULLING, 1, 4, "layers"), step(COLD))
    done = await run(fake, "models", "pull", "llama", "--json")
    assert [json.loads(line) for line in done.stdout.splitlines()] == [
        {"server_id": "fake-1", "state": "pulling", "detail": "layers", "completed_bytes": GB, "total_bytes": 4 * GB},
        {"server_id": "fake-1", "state": "cold", "detail": "", "completed_bytes": 0, "total_bytes": 0},
    ]
    assert done.stderr == ""


async def test_load_and_unload(fake: FakeOrchestrator) -> None:
    assert (await run(fake, "models", "load", "llama")).stdout == "llama is warm on fake-1\n"
    assert (await run(fake, "models", "--json", "unload", "llama")).stdout.startswith('{"server_id": "fake-1"')
    assert [call.method for call in fake.calls] == ["LoadModel", "UnloadModel"]


@pytest.mark.parametrize(
    ("refusal", "status", "words"),
    [
        (Refusal(Reason.UNKNOWN_MODEL, "no model 'x'"), 4, "see `modelyard models`"),
        (Refusal(Reason.OUT_OF_MEMORY, "86 GB needed"), 5, "make room with `modelyard models unload`"),
        (Refusal(Reason.UNSUPPORTED, "engine mlx of a manages no models"), 1, "see `modelyard servers`"),
        (Refusal(Reason.NO_CAPABLE_SERVER, "no model server manages models"), 4, "see `modelyard servers`"),
        (Refusal(Reason.INVALID_REQUEST, "server_id: is required, as several can: a, b"), 2, "a, b"),
    ],
)
async def test_refusals(fake: FakeOrchestrator, refusal: Refusal, status: int, words: str) -> None:
    fake.steps = (step(PULLING, 1, 4), refusal)
    done = await run(fake, "models", "load", "x", "--json")
    assert done.returncode == status
    assert words in done.stderr and len(done.stderr.splitlines()) == 1
    assert json.loads(done.stdout.splitlines()[-1])["error"]["reason"] == refusal.reason.value


async def on_terminal(fake: FakeOrchestrator, *arguments: str) -> tuple[asyncio.subprocess.Process, int]:
    """A command whose standard error is a terminal, and the other end of that."""
    ours, theirs = pty.openpty()
    process = await asyncio.create_subprocess_exec(
        *CLI,
        *arguments,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=theirs,
        env=environment(MODELYARD_ADDRESS=fake.address, TERM="xterm", COLUMNS="120"),
    )
    os.close(theirs)
    return process, ours


def read_until(terminal: int, pattern: str) -> str:
    """What is written up to the pattern, or to the end."""
    seen = b""
    while not re.search(pattern, seen.decode(errors="replace")):
        try:
            piece = os.read(terminal, 4096)
        except OSError:  # Linux tells the end of a terminal so
            piece = b""
        if not piece:
            break
        seen += piece
    return seen.decode(errors="replace")


async def test_a_terminal_gets_a_bar_that_ctrl_c_clears_away(fake: FakeOrchestrator) -> None:
    fake.steps = (step(PULLING, 1, 4, "layer [1]"), asyncio.Event())
    process, terminal = await on_terminal(fake, "models", "pull", "llama")
    try:
        shown = await asyncio.wait_for(asyncio.to_thread(read_until, terminal, "1.0 GB of 4.0 GB"), 30)
        assert "llama on fake-1: pulling, layer [1]" in shown
        assert "\x1b[?25l" in shown, "the cursor is hidden"
        process.send_signal(signal.SIGINT)
        await fake.until(lambda: fake.calls[0].outcome == "cancelled")
        rest = await asyncio.wait_for(asyncio.to_thread(read_until, terminal, "(?!)"), 30)
        assert await asyncio.wait_for(process.wait(), 30) == 130
        assert "\x1b[?25h" in rest, "the cursor is back"
        assert "Traceback" not in rest
        assert process.stdout and await process.stdout.read() == b""
    finally:
        os.close(terminal)


async def test_the_bar_goes_to_the_end(fake: FakeOrchestrator) -> None:
    fake.steps = (step(fleet_pb2.MODEL_STATE_LOADING), step(WARM, 4, 4))
    process, terminal = await on_terminal(fake, "models", "load", "llama")
    try:
        shown = await asyncio.wait_for(asyncio.to_thread(read_until, terminal, "(?!)"), 30)
        assert await asyncio.wait_for(process.wait(), 30) == 0
        assert "4.0 GB of 4.0 GB" in shown
        assert process.stdout and await process.stdout.read() == b"llama is warm on fake-1\n"
    finally:
        os.close(terminal)


# ------------------------------------------------------------------- looking ---


async def test_models_and_servers_show_state_and_memory(fake: FakeOrchestrator) -> None:
    cold = model_info("m", "p", state=COLD, memory_bytes=4_100_000_000, load_time={"seconds": 12})
    failed = model_info("n", "p", state=fleet_pb2.MODEL_STATE_FAILED, state_detail="no token for 30 s")
    fake.models = [
        fleet_pb2.Model(
            name="m",
            providers=["p"],
            context_length=8192,
            placements=[
                {"server_id": "a", "lease_state": 1, "info": cold},
                {"server_id": "b", "lease_state": 1, "info": model_info("m", "p")},
            ],
        )
    ]
    report = FakeModelServer("a", [cold, failed]).report()
    report.hardware.MergeFrom(fleet_pb2.HardwareInfo(memory_bytes=80 * GB, memory_used_bytes=12 * GB))
    report.pool.MergeFrom(fleet_pb2.ConnectionPool(size=8, opened=1, reused=3))
    fake.servers = [fleet_pb2.ModelServerStatus(report=report, lease_state=fleet_pb2.LEASE_STATE_LIVE)]

    listed = (await run(fake, "models")).stdout
    assert "a (cold), b" in listed
    shown = (await run(fake, "models", "m")).stdout
    assert shown == (await run(fake, "models", "show", "m")).stdout
    assert re.search(r"a +live +cold +p +8192 +- +4\.1 GB +12 s", shown), shown
    assert json.loads((await run(fake, "models", "--json", "m")).stdout)["placements"][0]["info"]["state"] == "cold"

    rows = (await run(fake, "servers")).stdout.splitlines()
    assert "model is" in rows[0] and "host memory" in rows[0]
    assert re.search(r"  m +cold +4\.1 GB +12 GB of 80 GB  ", rows[1]), rows[1]
    assert re.search(r"  n +failed: no token for 30 s +- ", rows[2]), rows[2]
    (told,) = json.loads((await run(fake, "servers", "--json")).stdout)["servers"]
    assert told["pool"] == {"size": 8, "in_use": 0, "opened": 1, "reused": 3, "hit_rate": 0.75}
    assert [model["memory_bytes"] for model in told["models"]] == [4_100_000_000, 0]


async def test_wrong_orders(fake: FakeOrchestrator) -> None:
    for arguments in (("pull",), ("pull", "a", "b"), ("m", "extra"), ("--nonsense",), ("pull", "m", "--timeout", "0")):
        done = await run(fake, "models", *arguments)
        assert done.returncode == 2, arguments
    assert not fake.calls
