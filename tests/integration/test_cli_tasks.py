"""`modelyard tasks` through real programs: a control plane with a database, the bundled model, interruptions.

The full figure, by hand: MODELYARD_TEST_PROMPTS=500 pytest tests/integration/test_cli_tasks.py -k interrupted
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.harness.programs import until
from tests.integration.test_cli import Up, modelyard, up

PROMPTS = int(os.environ.get("MODELYARD_TEST_PROMPTS", "60"))


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        with up("--no-discover", cwd=tmp_path_factory.mktemp("fleet")) as running:
            yield running


def facts(done: subprocess.CompletedProcess[str]) -> Any:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_submit_and_wait(fleet: Up) -> None:
    done = fleet("tasks", "submit", "--wait", "--max-tokens", "20", "What is modelyard?")
    assert done.returncode == 0 and "modelyard" in done.stdout and done.stderr.startswith("task ")
    id = done.stderr.split()[1]
    whole = facts(fleet("tasks", "get", id, "--json"))
    assert (whole["state"], whole["result"]["text"]) == ("succeeded", done.stdout.rstrip("\n"))
    assert whole["attempts"][0]["model"] == "yardling"
    shown = fleet("tasks", "get", id).stdout
    assert id in shown and "yardling" in shown and "succeeded" in shown
    events = fleet("tasks", "watch", id, "--json").stdout.splitlines()
    types = [json.loads(event)["type"] for event in events]
    assert types == ["submitted", "scheduled", "running", "succeeded"]
    assert "succeeded" in fleet("tasks", "watch", id).stdout


def test_orders_and_lists(fleet: Up) -> None:
    def submit(*more: str) -> str:
        done = fleet("tasks", "submit", "--group", "orders", "--key", "k-1", *more, "Hello")
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    id = submit("--label", "a=b", "--not-before", "2100-01-01T00:00:00+00:00")
    assert submit("--label", "a=b", "--not-before", "2100-01-01T00:00:00+00:00") == id
    conflict = fleet("tasks", "submit", "--key", "k-1", "Something else", "--json")
    assert conflict.returncode == 2 and json.loads(conflict.stdout)["error"]["reason"] == "IDEMPOTENCY_CONFLICT"
    (listed,) = facts(fleet("tasks", "list", "--group", "orders", "--json"))["tasks"]
    assert (listed["id"], listed["state"], listed["idempotency_key"]) == (id, "queued", "k-1")
    assert "waits for" in fleet("tasks", "get", id).stdout
    assert facts(fleet("tasks", "stats", "--json"))["states"]["queued"] == 1
    assert not facts(fleet("tasks", "list", "--tenant", "other", "--json"))["tasks"]
    assert fleet("tasks", "get", id, "--tenant", "other").returncode == 4
    wrong = fleet("tasks", "delete", id)
    assert wrong.returncode == 1 and "Traceback" not in wrong.stderr
    assert fleet("tasks", "cancel", id).stdout == f"{id} is cancelled\n"
    assert fleet("tasks", "get", id, "--wait").returncode == 1
    assert fleet("tasks", "watch", id).returncode == 1
    assert fleet("tasks", "retry", id).stdout == f"{id} is queued\n"
    assert fleet("tasks", "get", id, "--wait").returncode == 0  # its time was then, it runs now
    assert fleet("tasks", "cancel", id).returncode == 1
    assert fleet("tasks", "delete", id).stdout == f"{id} is deleted\n"
    missing = fleet("tasks", "get", id)
    assert missing.returncode == 4 and "modelyard tasks list" in missing.stderr
    assert fleet("tasks", "list", "--state", "failed").stdout.startswith("task")
    missing = fleet("tasks", "callbacks", "resend", "nosuch")
    assert missing.returncode == 4 and "modelyard tasks callbacks list" in missing.stderr


def test_why_a_task_waits_is_told(fleet: Up) -> None:
    done = fleet("tasks", "submit", "--not-before", "600", "--wait", "--timeout", "4", "Hello")
    assert done.returncode == 5 and done.stderr.count("queued: it waits for its time") == 2, done.stderr
    assert "was not finished within 4 s; it is queued: it waits for its time" in done.stderr
    assert fleet("tasks", "cancel", done.stderr.split()[1]).returncode == 0


def prompts(path: Path, count: int, **more: Any) -> None:
    lines = [{"id": f"p{n}", "prompt": f"What is slot number {n}?", "max_tokens": 8, **more} for n in range(count)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def results_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_an_interrupted_wait_tells_how_to_go_on(fleet: Up) -> None:
    waiting = fleet.spawn("tasks", "submit", "--not-before", "600", "--wait", "--tenant", "team-a", "Hello")
    assert waiting.stderr
    id = waiting.stderr.readline().split()[1]
    waiting.send_signal(signal.SIGINT)
    _, said = waiting.communicate(timeout=30)
    assert waiting.returncode == 130 and "Traceback" not in said
    assert f"task {id} goes on: `modelyard tasks get {id} --wait --tenant team-a`" in said
    assert fleet("tasks", "cancel", id, "--tenant", "team-a").returncode == 0


def test_an_interrupted_batch_goes_on(fleet: Up, tmp_path: Path) -> None:
    file, out = tmp_path / "prompts.jsonl", tmp_path / "results.jsonl"
    prompts(file, PROMPTS)
    command = ("tasks", "batch", str(file), "-o", str(out))
    for share in (0.1, 0.4):
        running = fleet.spawn(*command)

        async def enough() -> bool:
            return len(results_of_torn(out)) >= share * PROMPTS  # noqa: B023

        asyncio.run(until(enough, timeout=120, every=0.01))
        running.send_signal(signal.SIGINT)
        _, said = running.communicate(timeout=30)
        assert running.returncode == 130 and "run the same command again" in said and "Traceback" not in said
        assert len(results_of(out)) < PROMPTS
    done = fleet(*command)
    assert done.returncode == 0, done.stderr
    assert f"{PROMPTS} results in {out}: {PROMPTS} succeeded, 0 failed" in done.stderr
    results = results_of(out)
    assert [result["id"] for result in results] == [f"p{n}" for n in range(PROMPTS)]
    assert len({result["task"] for result in results}) == PROMPTS
    assert all(result["state"] == "succeeded" and result["text"] for result in results)
    # Nothing was submitted twice, and running it once more submits nothing.
    again = fleet(*command)
    assert again.returncode == 0 and results_of(out) == results
    listed = facts(fleet("tasks", "list", "--group", "prompts.jsonl", "--all", "--json"))["tasks"]
    assert sorted(task["id"] for task in listed) == sorted(result["task"] for result in results)
    # An edited line is a new task; its old result stays behind those of the file.
    lines = file.read_text().splitlines(keepends=True)
    lines[3] = lines[3].replace("slot", "lease")
    file.write_text("".join(lines))
    assert facts(fleet(*command, "--json")) == {"prompts": PROMPTS, "succeeded": PROMPTS, "failed": 0}
    *edited, old = results_of(out)
    assert old == results[3]
    assert [a == b for a, b in zip(results, edited, strict=True)] == [n != 3 for n in range(PROMPTS)]


def results_of_torn(path: Path) -> list[bytes]:
    """Complete lines of a file that is being written."""
    return path.read_bytes().split(b"\n")[:-1] if path.exists() else []


def test_nothing_is_submitted_of_a_wrong_file(fleet: Up, tmp_path: Path) -> None:
    file = tmp_path / "wrong.jsonl"
    file.write_text('{"prompt": "good"}\n{"prompt": "bad", "temperature": 9}\n')
    done = fleet("tasks", "batch", str(file))
    assert done.returncode == 2 and done.stdout == ""
    assert f"{file}:2: input.sampling.temperature: must be 0 to 2" in done.stderr
    assert not facts(fleet("tasks", "list", "--group", "wrong.jsonl", "--json"))["tasks"]
    for bad in (tmp_path / "absent.jsonl", tmp_path):
        assert fleet("tasks", "batch", str(bad)).returncode == 2
    file.write_bytes(b"\xff\xfe")
    assert "UTF-8" in fleet("tasks", "batch", str(file)).stderr
    file.write_text('{"prompt": "good"}\n')
    same = fleet("tasks", "batch", str(file), "-o", str(file))
    assert same.returncode == 2 and "would replace" in same.stderr


def test_what_fails_is_told_and_can_be_done_again(fleet: Up, tmp_path: Path) -> None:
    file, out = tmp_path / "some.jsonl", tmp_path / "results.jsonl"
    lines = [
        {"id": 1, "prompt": "What is modelyard?", "max_tokens": 4},
        {"id": 2, "prompt": "Hello", "model": "nobody"},
        {"id": 3, "prompt": "Hello", "min_context_length": 1_000_000, "deadline": "2000-01-01T00:00:00+00:00"},
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = fleet("tasks", "batch", str(file), "-o", str(out))
    assert done.returncode == 1 and "1 succeeded, 2 failed" in done.stderr
    first, second, third = results_of(out)
    assert first["state"] == "succeeded" and first["usage"]["completion_tokens"] == 4
    assert (second["state"], second["error"]["reason"]) == ("refused", "UNKNOWN_MODEL")
    assert (third["state"], third["error"]["reason"]) == ("refused", "INVALID_REQUEST")
    # What was refused is no task: mended, it is done.
    lines[1]["model"] = "yardling"
    del lines[2]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert fleet("tasks", "batch", str(file), "-o", str(out)).returncode == 0
    assert [result["state"] for result in results_of(out)] == ["succeeded", "succeeded"]


def test_a_server_that_is_not_there_is_told_of(fleet: Up) -> None:
    done = fleet("tasks", "submit", "--server", "nope", "--group", "absent", "Hello")
    assert done.returncode == 0, done.stderr
    assert "no model server 'nope' is known now (known: mlx-1)" in done.stderr
    assert fleet("tasks", "cancel", done.stdout.strip()).returncode == 0
    there = fleet("tasks", "submit", "--wait", "--server", "mlx-1", "--max-tokens", "2", "Hello")
    assert there.returncode == 0 and "known now" not in there.stderr
    refused = fleet("generate", "--server", "nope", "Hello")
    assert refused.returncode in (4, 5) and "nope" in refused.stderr


def test_a_batch_from_a_pipe_to_a_pipe(fleet: Up) -> None:
    lines = "".join(json.dumps({"id": n, "prompt": "What is a lease?", "max_tokens": 3}) + "\n" for n in range(3))
    done = fleet("tasks", "batch", "-", "--priority", "high", stdin=lines)
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert sorted(result["id"] for result in results) == [0, 1, 2]
    assert "3 done" in done.stderr


def test_nobody_there() -> None:
    for command in (["list"], ["submit", "x"], ["watch"], ["watch", "x"], ["batch", "-"]):
        done = modelyard("--address", "127.0.0.1:1", "tasks", *command, stdin='{"prompt": "a"}')
        assert done.returncode == 3, (command, done.stderr)
        assert "no control plane answers" in done.stderr and "Traceback" not in done.stderr
