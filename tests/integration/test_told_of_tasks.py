"""Callbacks and beliefs through a real control plane: from submitting a task to the receiver and the command line."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from control_plane.app import running
from modelyard.cli import callbacks as cli_callbacks
from modelyard.client import AsyncClient, Client, InvalidRequest, UnknownTask
from modelyard.client._names import CALLBACK_STATE
from modelyard.program.settings import SettingsError
from modelyard.testing import FakeModelServer
from modelyard.v1 import task_queue_pb2
from tests.harness.front_door import attached, settings
from tests.harness.model_servers import eventually
from tests.harness.receivers import Receiver, receiver, status, verified
from tests.harness.tasks import Desk, desk
from tests.integration.test_cli import modelyard

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
OPEN = {
    "private_hosts": ("127.0.0.1:*",),
    "insecure_loopback": True,
    "max_attempts": 2,
    "timeout": 5.0,
    "retry": {"base": 0.01, "factor": 1.0, "cap": 0.01},
}


@pytest.fixture(autouse=True)
def secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELYARD_CALLBACK_SECRETS", SECRET)


@asynccontextmanager
async def plane(folder: Path, **callbacks: Any) -> AsyncIterator[tuple[Desk, AsyncClient]]:
    async with desk(folder, tasks={"callbacks": callbacks}) as tasks:
        async with attached(tasks.door, FakeModelServer("one")) as (fake,), AsyncClient(tasks.door.address) as client:
            await tasks.door.until_ready("one")
            fake.answer("blue")
            yield tasks, client


async def until_state(client: AsyncClient, state: str) -> Any:
    async def found() -> Any:
        return [one async for one in client.callbacks.list(states=state)]

    return (await eventually(found))[0]


async def test_from_submit_to_the_receiver(tmp_path: Path) -> None:
    async with receiver() as hook, plane(tmp_path, **OPEN) as (tasks, client):
        task = await client.tasks.submit("why", callback=f"{hook.url}?token=1", group="g")
        (received,) = await hook.until(1)
        assert verified(received, SECRET)
        assert received.path == "/hook?token=1"
        assert received.notice["task"]["result"]["text"] == "blue"
        assert received.notice["task"]["group"] == "g"
        delivered = await until_state(client, "delivered")
        assert (delivered.id, delivered.task_id, delivered.type) == (received.id, task.id, "task.succeeded")
        assert delivered.url == hook.url
        belief = await client.beliefs.get(f"tasks/{task.id}")
        assert belief.value["state"] == "succeeded"
        sent = tasks.door.plane.metrics.callbacks.labels("delivered")
        assert sent._value.get() == 1


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("https://elsewhere.example/", r"tasks\.callbacks\.hosts"),
        ("https://127.0.0.1.evil.example/", r"tasks\.callbacks\.hosts"),
        ("http://hooks.example.org/", "must be https"),
        ("https://user:pw@hooks.example.org/", "user"),
        ("https://10.0.0.1/", r"tasks\.callbacks\.hosts"),
        ("", "required"),
    ],
)
async def test_addresses_are_refused_when_a_task_is_submitted(tmp_path: Path, url: str, why: str) -> None:
    async with plane(tmp_path, **{**OPEN, "hosts": ("hooks.example.org",)}) as (_, client):
        with pytest.raises(InvalidRequest, match=why) as refused:
            await client.tasks.submit("why", callback=url)
        assert [violation.field for violation in refused.value.violations] == ["spec.callback.url"]
        assert [task async for task in client.tasks.list()] == []


async def test_callbacks_are_off_unless_a_host_is_named(tmp_path: Path) -> None:
    async with plane(tmp_path) as (tasks, client):
        with pytest.raises(InvalidRequest, match=r"tasks\.callbacks\.hosts"):
            await client.tasks.submit("why", callback="https://hooks.example.org/")
        assert tasks.door.plane.deliverer is None


async def test_hosts_without_a_secret_stop_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MODELYARD_CALLBACK_SECRETS")
    store = f"sqlite:///{tmp_path}/tasks.db"
    for _ in range(2):  # the file is free again after the first
        with pytest.raises(SettingsError, match="MODELYARD_CALLBACK_SECRETS"):
            async with running(settings(tasks={"store": store, "callbacks": OPEN})):
                pass


async def test_a_restart_goes_on_with_what_is_pending(tmp_path: Path) -> None:
    patient = {**OPEN, "max_attempts": 100, "retry": {"base": 0.05, "factor": 1.0, "cap": 0.05}}
    async with receiver() as hook:
        hook.then = status(500)
        async with plane(tmp_path, **patient) as (_, client):
            await client.tasks.submit("why", callback=hook.url)
            await hook.until(2)
        hook.then = status(200)
        before = len(hook.received)
        async with plane(tmp_path, **patient) as (_, client):
            delivered = await until_state(client, "delivered")
        assert len(hook.received) > before
        assert {received.id for received in hook.received} == {delivered.id}


async def dead(hook: Receiver, client: AsyncClient, count: int = 1) -> list[str]:
    hook.then = status(503)
    for _ in range(count):
        await client.tasks.submit("why", callback=hook.url)

    async def found() -> Any:
        all_dead = [one async for one in client.callbacks.list(states="dead", page_size=1)]
        return len(all_dead) == count and all_dead

    return [one.id for one in await eventually(found)]


async def test_dead_letters_over_grpc(tmp_path: Path) -> None:
    async with receiver() as hook, plane(tmp_path, **OPEN) as (tasks, client):
        ids = await dead(hook, client, 3)
        assert ids == sorted(ids, reverse=True)
        assert (await client.tasks.stats()).callbacks_dead == 3
        one = next(iter([one async for one in client.callbacks.list(limit=1)]))
        assert (one.id, one.attempt_count, one.failure_message) == (ids[0], 2, "the receiver answered 503")
        assert [found.id async for found in client.callbacks.list(task_id=one.task_id)] == [one.id]

        async with AsyncClient(tasks.door.address, tenant="other") as other:
            assert [found async for found in other.callbacks.list()] == []
            for id in (one.id, "absent"):
                with pytest.raises(UnknownTask):
                    await other.callbacks.resend(id)

        hook.then = status(200)

        def resend() -> str:
            with Client(tasks.door.address) as sync:
                assert len(list(sync.callbacks.list(states=["dead", "pending"]))) == 3
                return sync.callbacks.resend(one.id).state

        assert await asyncio.to_thread(resend) == "pending"
        assert (await until_state(client, "delivered")).id == one.id
        assert (await client.tasks.stats()).callbacks_dead == 2


async def test_bad_requests_about_callbacks(tmp_path: Path) -> None:
    async with plane(tmp_path) as (_, client):
        for method, request in (
            ("ListCallbacks", task_queue_pb2.ListCallbacksRequest(page_size=1001)),
            ("ListCallbacks", task_queue_pb2.ListCallbacksRequest(states=[9])),  # type: ignore[list-item]
            ("ListCallbacks", task_queue_pb2.ListCallbacksRequest(page_token="nonsense")),
            ("ListCallbacks", task_queue_pb2.ListCallbacksRequest(task_id="x" * 101)),
            ("ResendCallback", task_queue_pb2.ResendCallbackRequest()),
            ("ResendCallback", task_queue_pb2.ResendCallbackRequest(id="\0")),
        ):
            with pytest.raises(InvalidRequest) as refused:
                await client.callbacks._call(method, request)
            assert refused.value.violations


# ------------------------------------------------------------ command line ---


async def cli(tasks: Desk, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return await asyncio.to_thread(modelyard, *arguments, MODELYARD_ADDRESS=tasks.door.address, **environment)


def test_the_command_line_knows_the_states() -> None:
    assert tuple(CALLBACK_STATE) == cli_callbacks.STATES


async def test_callbacks_on_the_command_line(tmp_path: Path) -> None:
    async with receiver() as hook, plane(tmp_path, **OPEN) as (tasks, client):
        (id,) = await dead(hook, client)
        listed = await cli(tasks, "tasks", "callbacks", "list", "--state", "dead")
        assert listed.returncode == 0
        assert id in listed.stdout and "the receiver answered 503" in listed.stdout
        assert (await cli(tasks, "tasks", "callbacks", "resend")).returncode == 2
        hook.then = status(200)
        sent = await cli(tasks, "tasks", "callbacks", "resend", "--dead", "--json")
        assert [one["id"] for one in json.loads(sent.stdout)["callbacks"]] == [id]
        await until_state(client, "delivered")


async def test_beliefs_on_the_command_line(tmp_path: Path) -> None:
    async with plane(tmp_path) as (tasks, client):
        put = await cli(
            tasks,
            "beliefs",
            "put",
            "weather/berlin",
            '{"sky": "grey"}',
            "--confidence",
            "0.5",
            "--source",
            "me",
            "--json",
        )
        assert put.returncode == 0, put.stderr
        assert json.loads(put.stdout)["version"] > 0
        got = await cli(tasks, "beliefs", "get", "weather/berlin")
        assert json.loads(got.stdout) == {"sky": "grey"}
        await client.beliefs.put("other", "x")
        listed = await cli(tasks, "beliefs", "list", "weather/", "--json")
        (belief,) = json.loads(listed.stdout)["beliefs"]
        assert (belief["key"], belief["confidence"], belief["source"]) == ("weather/berlin", 0.5, "me")
        wrong = await cli(tasks, "beliefs", "put", "k", "not json")
        assert (wrong.returncode, "--text" in wrong.stderr) == (2, True)
        gone = await cli(tasks, "beliefs", "get", "weather/berlin", "--tenant", "nobody")
        assert gone.returncode == 4
        assert (await cli(tasks, "beliefs", "delete", "weather/berlin")).returncode == 0
        assert (await cli(tasks, "beliefs", "delete", "weather/berlin")).returncode == 4


async def test_watch_on_the_command_line(tmp_path: Path) -> None:
    async with plane(tmp_path) as (tasks, client):
        from tests.integration.test_cli import CLI, environment

        process = await asyncio.create_subprocess_exec(
            *CLI, "beliefs", "watch", "a/", "--after", "0", "--json", stdout=asyncio.subprocess.PIPE,
            env=environment(MODELYARD_ADDRESS=tasks.door.address),
        )  # fmt: skip
        assert process.stdout
        try:
            await client.beliefs.put("a/1", [1, 2])
            line = await asyncio.wait_for(process.stdout.readline(), 30)
            assert json.loads(line)["value"] == [1, 2]
        finally:
            process.terminate()
            await process.wait()


def test_aiohttp_is_imported_for_the_first_callback_only() -> None:
    parts = "control_plane.app, control_plane.delivery, control_plane.tasks.opening, control_plane.tasks.deliveries"
    code = f"import sys, {parts}; print('aiohttp' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
