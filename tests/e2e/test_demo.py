"""`modelyard demo` in a process of its own: a whole fleet, with a real model where one can run."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from modelyard.cli.extras import missing
from modelyard.cli.plan import bundled_model
from tests.harness.programs import until

CLI = [sys.executable, "-m", "modelyard.cli", "demo"]
REAL = bundled_model() is not None and not missing("mlx")


def _children(parent: int) -> set[int]:
    listing = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,stat="], capture_output=True, text=True).stdout
    rows = [line.split() for line in listing.splitlines()]
    return {int(pid) for pid, ppid, state in rows if int(ppid) == parent and not state.startswith("Z")}


def _running(pids: set[int]) -> set[int]:
    listing = subprocess.run(["ps", "-A", "-o", "pid=,stat="], capture_output=True, text=True).stdout
    rows = [line.split() for line in listing.splitlines()]
    return {int(pid) for pid, state in rows if not state.startswith("Z")} & pids


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("demo")
    # Settings of another fleet, which must not reach the private one.
    (folder / "modelyard.yaml").write_text("control_plane: {port: 1}\nclient: {address: 'nowhere:1'}\n")
    env = {**os.environ, "MODELYARD_ADDRESS": "nowhere:1", "MODELYARD_CONTROL_PLANE_PORT": "1"}
    done = subprocess.run([*CLI, "--json"], capture_output=True, text=True, cwd=folder, env=env, timeout=110)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    facts = json.loads(done.stdout)
    assert isinstance(facts, dict)
    return facts


def test_every_request_is_told_with_decision_and_timings(told: dict[str, Any]) -> None:
    assert len(told["requests"]) >= 5
    for request in told["requests"]:
        assert request["decisions"], request["title"]
        assert request["decisions"][0]["candidates"]
        if "error" in request:
            continue
        assert request["text"] or request["tool_calls"]
        assert request["timings"]["ttft"] > 0
        assert request["usage"]["completion_tokens"] > 0
        assert request["server_id"] == request["decisions"][-1]["server_id"]


def test_the_fleet_is_told_and_simulated_servers_are_called_so(told: dict[str, Any]) -> None:
    engines = {server["server_id"]: server["engine"] for server in told["servers"]}
    assert len(engines) == 3
    assert 0 < told["startup_seconds"] < told["total_seconds"]
    for request in told["requests"]:
        if "error" not in request:
            assert request["simulated"] is (engines[request["server_id"]] == "simulated")
    assert told["remark"] is None or not REAL


def test_the_demo_shows_what_it_says(told: dict[str, Any]) -> None:
    by_type = {request["task_type"]: request for request in told["requests"]}
    assert json.loads(by_type["classification"]["text"])["sentiment"] in ("positive", "negative", "neutral")
    assert by_type["tool_use"]["tool_calls"][0]["name"] in ("list_servers", "roll_dice")
    assert by_type["code_generation"]["server_id"] == "sim-big"
    attempts = by_type["translation"]["attempts"]
    assert [attempt["failure_reason"] != "" for attempt in attempts] == [True, False]
    refused = by_type["summarization"]
    assert refused["error"]["reason"] == "NO_CAPABLE_SERVER"
    assert refused["decisions"][0]["verdict"] == "impossible"
    reasons = {r["reason"] for c in refused["decisions"][0]["candidates"] for r in c["rejections"]}
    assert "context_too_short" in reasons


@pytest.mark.skipif(not REAL, reason="needs MLX and the bundled model")
def test_a_real_model_answers(told: dict[str, Any]) -> None:
    question = told["requests"][0]
    assert question["prompt"] == "What is modelyard?"
    assert question["model"] == "yardling"
    assert "modelyard" in question["text"].lower()
    # The first impression of it: small things, but right.
    by_type = {request["task_type"]: request for request in told["requests"]}
    assert json.loads(by_type["classification"]["text"]) == {"sentiment": "negative"}
    (call,) = by_type["tool_use"]["tool_calls"]
    assert (call["name"], json.loads(call["arguments_json"])) == ("roll_dice", {"sides": 12})
    assert "eau" in by_type["translation"]["text"]


def test_ctrl_c_ends_everything(tmp_path: Path) -> None:
    process = subprocess.Popen(CLI, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    assert process.stdout
    line = process.stdout.readline()
    assert line
    children = _children(process.pid)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    if not line.startswith("A fleet"):
        return  # the remark comes before the fleet

    async def gone() -> bool:
        return not _running(children)

    assert len(children) == 4
    asyncio.run(until(gone, timeout=20, every=0.05))


def test_a_reader_that_leaves_ends_everything(tmp_path: Path) -> None:
    process = subprocess.Popen(CLI, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    assert process.stdout
    assert process.stderr
    for _ in range(3):  # as `head -3`: the fleet runs by now
        assert process.stdout.readline()
    children = _children(process.pid)
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait(60) == 141
    assert len(children) == 4
    assert not _running(children)
