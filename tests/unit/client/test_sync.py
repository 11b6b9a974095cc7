from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import TypeVar

import pytest

from modelyard.client import Cancelled, Client, Delta, InternalError, InvalidRequest, OutOfMemory, QueueFull
from modelyard.rpc.errors import Refusal
from modelyard.rpc.reasons import Reason
from modelyard.testing import FakeOrchestrator
from modelyard.v1 import fleet_pb2, orchestrator_pb2

T = TypeVar("T")


@pytest.fixture
async def fake():
    async with FakeOrchestrator() as orchestrator:
        yield orchestrator


async def using(fake: FakeOrchestrator, work: Callable[[Client], T]) -> T:
    """Run `work` with a client on another thread, beside the fake's loop."""

    def run() -> T:
        with Client(fake.address) as client:
            return work(client)

    result = await asyncio.to_thread(run)
    assert not [thread for thread in threading.enumerate() if thread.name == "modelyard-client"]
    return result


async def test_every_method(fake: FakeOrchestrator) -> None:
    def work(client: Client) -> None:
        assert client.generate("hi").text == "Hello, world"
        assert client.embed("abc").vectors == ((3.0, 1.0),)
        assert client.explain("hi").verdict == "chosen"
        assert (client.models(), client.servers()) == ((), ())
        assert client.health().serving
        assert next(iter(client.watch_fleet())).snapshot
        assert [step.state for step in client.pull_model("m")] == ["cold"]
        assert [step.state for step in client.load_model("m", server_id="s")] == ["warm"]
        assert [step.state for step in client.unload_model("m", timeout=5)] == ["cold"]

    await using(fake, work)


async def test_stream(fake: FakeOrchestrator) -> None:
    def work(client: Client) -> None:
        with client.stream("hi") as stream:
            assert [event.text for event in stream if isinstance(event, Delta)] == ["Hello", ", ", "world"]
        assert stream.result.text == "Hello, world"
        assert [delta.text for delta in client.stream("hi", explain=True).deltas()] == ["Hello", ", ", "world"]
        assert client.stream("hi").collect().text == "Hello, world"

    await using(fake, work)


async def test_breaking_out_of_a_loop_stops_the_model(fake: FakeOrchestrator) -> None:
    fake.answer("a", asyncio.Event())
    stopped = threading.Event()

    def work(client: Client) -> None:
        for _ in client.stream("hi"):
            break
        for _ in client.stream("hi").deltas():
            break
        assert stopped.wait(10)

    working = asyncio.create_task(using(fake, work))
    await fake.until(lambda: [call.outcome for call in fake.calls] == ["cancelled"] * 2)
    stopped.set()
    await working


async def test_watching_stops_when_left(fake: FakeOrchestrator) -> None:
    def work(client: Client) -> None:
        changes = client.watch_fleet()
        assert next(changes).snapshot
        changes.close()

    await using(fake, work)
    fake.publish(orchestrator_pb2.WatchFleetResponse())
    await fake.until(lambda: fake.calls[0].outcome == "cancelled")


async def test_leaving_an_order_stops_it(fake: FakeOrchestrator) -> None:
    fake.steps = (fleet_pb2.ModelProgress(state=fleet_pb2.MODEL_STATE_PULLING), asyncio.Event())
    stopped = threading.Event()

    def work(client: Client) -> None:
        for step in client.pull_model("m"):
            assert step.state == "pulling"
            break
        assert stopped.wait(10)

    working = asyncio.create_task(using(fake, work))
    await fake.until(lambda: [call.outcome for call in fake.calls] == ["cancelled"])
    stopped.set()
    await working


async def test_errors(fake: FakeOrchestrator) -> None:
    fake.inject_error("Complete", Refusal(Reason.INVALID_REQUEST, "no"))
    fake.inject_error("Embed", Refusal(Reason.QUEUE_FULL, "full"))
    fake.inject_error("LoadModel", Refusal(Reason.OUT_OF_MEMORY, "too large"))

    def work(client: Client) -> None:
        with pytest.raises(InvalidRequest):
            client.generate("hi")
        with pytest.raises(QueueFull):
            client.embed("hi")
        with pytest.raises(OutOfMemory):
            list(client.load_model("m"))
        with pytest.raises(ValueError, match="unknown priority"):
            client.generate("hi", priority="x")

    await using(fake, work)


async def test_cancel_from_another_thread(fake: FakeOrchestrator) -> None:
    fake.answer("a", asyncio.Event())

    def work(client: Client) -> None:
        stream = client.stream("hi")
        next(stream)
        stream.cancel()
        with pytest.raises(Cancelled) as caught:
            next(stream)
        assert caught.value.partial and caught.value.partial.text == "a"

    await using(fake, work)


async def test_close_from_another_thread_ends_the_reading(fake: FakeOrchestrator) -> None:
    fake.answer("a", asyncio.Event())
    reading = threading.Event()

    def work(client: Client) -> None:
        stream = client.stream("hi")
        next(stream)
        closer = threading.Thread(target=lambda: (reading.wait(), client.close()))
        closer.start()
        reading.set()
        with pytest.raises((Cancelled, RuntimeError)):
            next(stream)
        closer.join()
        with pytest.raises(RuntimeError, match="closed"):
            client.models()
        client.close()

    await using(fake, work)


async def test_several_threads_share_a_client(fake: FakeOrchestrator) -> None:
    def work(client: Client) -> None:
        texts: list[str] = []
        threads = [threading.Thread(target=lambda: texts.append(client.generate("hi").text)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert texts == ["Hello, world"] * 8

    await using(fake, work)


def test_a_client_that_is_never_used_starts_nothing() -> None:
    before = threading.active_count()
    with Client("127.0.0.1:1"):
        assert threading.active_count() == before


PROGRAM = """
import sys
from modelyard.client import Client
client = Client(sys.argv[1])
for event in client.stream("hi"):
    print(event.text, flush=True)
"""


async def start(fake: FakeOrchestrator, program: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, fake.address, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


async def test_ctrl_c_cancels_the_call_and_ends_the_program(fake: FakeOrchestrator) -> None:
    fake.answer("a", asyncio.Event())
    process = await start(fake, PROGRAM)
    assert process.stdout and await process.stdout.readline() == b"a\n"
    os.kill(process.pid, signal.SIGINT)
    await fake.until(lambda: fake.calls[0].outcome == "cancelled")
    _, stderr = await asyncio.wait_for(process.communicate(), 20)
    assert process.returncode != 0
    assert b"KeyboardInterrupt" in stderr
    assert b"Exception ignored" not in stderr


async def test_program_that_never_closes_its_client_ends(fake: FakeOrchestrator) -> None:
    process = await start(fake, PROGRAM)
    stdout, stderr = await asyncio.wait_for(process.communicate(), 20)
    assert stdout.decode().split() == ["Hello", ",", "world"]
    assert process.returncode == 0
    assert b"Traceback" not in stderr


async def test_what_does_not_parse_is_a_typed_failure() -> None:
    class Garbled(FakeOrchestrator):
        async def Generate(self, request, context):
            yield b"\x12\x02\xff\xff"

        async def Complete(self, request, context):
            return b"\x12\x02\xff\xff"

        async def ListModels(self, request, context):
            return b"\x0a\x02\xff\xff"

    def work(client: Client) -> None:
        for call in (lambda: client.generate("hi"), client.models, lambda: list(client.stream("hi").deltas())):
            with pytest.raises(InternalError, match="does not parse"):
                call()

    async with Garbled() as fake:
        await using(fake, work)
