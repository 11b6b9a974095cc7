from __future__ import annotations

import asyncio
import contextlib

import grpc
import grpc.aio
import pytest

from modelyard.rpc.channels import channel, channel_options, sync_channel
from modelyard.rpc.errors import from_rpc_error
from modelyard.testing import FakeOrchestrator
from modelyard.v1 import orchestrator_pb2, orchestrator_pb2_grpc


def test_given_options_take_precedence() -> None:
    options = channel_options([("grpc.keepalive_time_ms", 7)], own_connection=True)
    assert [value for name, value in options if name == "grpc.keepalive_time_ms"] == [7]
    assert dict(options)["grpc.use_local_subchannel_pool"] == 1
    assert "grpc.use_local_subchannel_pool" not in dict(channel_options())


async def test_sync_channel() -> None:
    async with FakeOrchestrator() as fake:

        def ask() -> int:
            with sync_channel(fake.address) as link:
                stub = orchestrator_pb2_grpc.OrchestratorStub(link)
                return len(stub.ListModels(orchestrator_pb2.ListModelsRequest(), timeout=5).models)

        assert await asyncio.to_thread(ask) == 0


class Cable:
    """A TCP relay that can be cut without either end being told."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._plugged = asyncio.Event()
        self._plugged.set()
        self._tasks: set[asyncio.Task] = set()

    async def __aenter__(self) -> Cable:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut(self) -> None:
        self._plugged.clear()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target)
        for source, sink in ((reader, far_writer), (far_reader, writer)):
            task = asyncio.create_task(self._pump(source, sink))
            self._tasks.add(task)

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await source.read(65536):
                await self._plugged.wait()
                sink.write(data)
                await sink.drain()
        sink.close()


async def test_peer_that_falls_silent_is_noticed_within_seconds() -> None:
    async with FakeOrchestrator() as fake, Cable(fake.port) as cable, channel(f"127.0.0.1:{cable.port}") as link:
        watch = orchestrator_pb2_grpc.OrchestratorStub(link).WatchFleet(orchestrator_pb2.WatchFleetRequest())
        await watch.read()
        began = asyncio.get_running_loop().time()
        cable.cut()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await watch.read()
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert from_rpc_error(caught.value).transport
        assert asyncio.get_running_loop().time() - began < 10


async def test_quiet_stream_is_left_alone_by_server_and_channel() -> None:
    # Longer than two keepalive pings: the server must not answer them with too_many_pings.
    options = [("grpc.keepalive_time_ms", 1_000)]
    async with FakeOrchestrator() as fake, channel(fake.address, options=options) as link:
        watch = orchestrator_pb2_grpc.OrchestratorStub(link).WatchFleet(orchestrator_pb2.WatchFleetRequest())
        await watch.read()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(4.5):
                await watch.read()
        assert not [call for call in fake.calls if call.outcome not in ("running", "cancelled")]
