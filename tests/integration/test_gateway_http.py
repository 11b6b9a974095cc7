"""The gateway on the level of HTTP: what no SDK sends, clients that go away, and the end of the process."""

from __future__ import annotations

import asyncio
import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from modelyard.rpc.reasons import Reason
from modelyard.testing import FakeModelServer
from tests.harness.front_door import PATIENCE, attached, client
from tests.harness.gateway import CHAT, HELLO, Wire, http_door
from tests.harness.model_servers import model_server
from tests.harness.programs import control_plane, simulated_server, until

SLOW = {"instant": False, "decode_tokens_per_second": 50, "answer_tokens": 100_000, "context_length": 200_000}
CANARY = "zanzibar-4711-xylophone"


# ---------------------------------------------------------------- requests ---


async def test_requests_that_make_no_sense() -> None:
    async with http_door() as http, attached(http.door, FakeModelServer("one")):
        post = http.request
        malformed = await post("POST", CHAT, b'{"model": "auto", "messages": [')
        assert (malformed.status, malformed.error["type"]) == (400, "invalid_request_error")
        assert "not valid JSON" in malformed.error["message"]
        wrong = await post("POST", CHAT, {**HELLO, "messages": [{"role": "user", "content": [{"type": 5}]}]})
        assert (wrong.status, wrong.error["param"]) == (400, "messages[0].content[0].type")
        assert (await post("POST", CHAT, b"")).status == 400
        assert (await post("POST", CHAT, b"\xff\x00")).status == 400
        unknown = await post("POST", "/v1/nothing", HELLO)
        assert (unknown.status, unknown.error["code"]) == (404, "unknown_url")
        assert (await post("GET", "/")).status == 404
        assert (await post("POST", CHAT + "/", HELLO)).status == 404
        method = await post("GET", CHAT)
        assert (method.status, method.headers["allow"]) == (405, "POST")
        assert (await post("OPTIONS", CHAT)).status == 405  # and no CORS
        assert http.counted("http_chat", "INVALID_REQUEST") == 4
        assert (await post("POST", CHAT, HELLO)).status == 200


async def test_headers_that_make_no_sense() -> None:
    async with http_door() as http, attached(http.door, FakeModelServer("one")):
        for name, value, param in (
            ("x_request_id", "x" * 65, "X-Request-Id"),
            ("x_request_id", "caf\xe9", "X-Request-Id"),
            ("x_modelyard_priority", "urgent", "X-Modelyard-Priority"),
            ("x_modelyard_timeout", "-1", "X-Modelyard-Timeout"),
            ("x_modelyard_task_type", "poetry", "X-Modelyard-Task-Type"),
        ):
            answer = await http.request("POST", CHAT, HELLO, **{name: value})
            assert (answer.status, answer.error["param"]) == (400, param)
        for kind in ("", "text/plain", "application/x-www-form-urlencoded"):
            # What a web page may send to another origin without asking is not taken.
            assert (await http.request("POST", CHAT, HELLO, content_type=kind)).status == 415
        assert (await http.request("POST", CHAT, HELLO, content_type="Application/JSON; charset=utf-8")).status == 200
        assert (await http.request("POST", CHAT, HELLO, content_encoding="gzip")).status == 415


async def test_bytes_that_are_no_http() -> None:
    async with http_door() as http:
        async with http.wire() as wire:
            wire.writer.write(b"\x16\x03\x01 this is no HTTP\r\n\r\n")
            answer = await wire.answer()
            assert (answer.status, answer.json["error"]["code"]) == (400, "bad_http")
            assert await wire.closed()
        async with http.wire() as wire:
            wire.writer.write(b"GET /health HTTP/1.1\r\nx: ")
            for _ in range(64):
                wire.writer.write(b"y" * 4096)
            await wire.writer.drain()
            assert (await wire.answer()).status == 400


async def test_bodies_that_are_too_large() -> None:
    async with http_door(limits={"max_request_bytes": 2048}) as http, attached(http.door, FakeModelServer("one")):
        large = await http.request("POST", CHAT, {**HELLO, "user": "x" * 4096})
        assert (large.status, large.error["code"]) == (413, "request_too_large")
        async with http.wire() as wire:  # without telling the length before
            await wire.send("POST", CHAT, transfer_encoding="chunked", content_length="")
            for _ in range(3):
                wire.writer.write(b"400\r\n" + b" " * 1024 + b"\r\n")
            assert (await wire.answer()).status == 413
        assert (await http.request("POST", CHAT, HELLO)).status == 200


async def test_a_body_that_does_not_arrive() -> None:
    async with http_door(gateway={"body_timeout": 0.1}) as http:
        async with http.wire() as wire:
            await wire.send("POST", CHAT, b'{"model"', content_length="100")
            answer = await wire.answer()
            assert (answer.status, answer.error["code"]) == (408, "request_timeout")


async def test_connections_are_kept_and_pipelined() -> None:
    body = json.dumps(HELLO).encode()
    async with http_door() as http, attached(http.door, FakeModelServer("one")), http.wire() as wire:
        for _ in range(3):
            await wire.send("POST", CHAT, body)
        ids = {(await wire.answer()).json["id"] for _ in range(3)}
        assert len(ids) == 3


async def test_health_and_readiness() -> None:
    async with http_door() as http:
        assert (await http.request("GET", "/health")).json == {"status": "ok"}
        assert (await http.request("GET", "/ready")).json == {"status": "ready"}
        http.door.plane.servicer.stop_accepting()
        assert (await http.request("GET", "/health")).status == 200
        assert (await http.request("GET", "/ready")).status == 503
        refused = await http.request("POST", CHAT, HELLO)
        assert (refused.status, refused.error["code"]) == (503, "draining")


# ------------------------------------------------- clients that go away ---


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_goes_away_stops_the_engine(stream: bool) -> None:
    async with (
        http_door() as http,
        model_server(orchestrators=(http.door.address,), engine_settings=SLOW) as server,
    ):
        await http.door.until_ready("tested")
        async with http.wire() as wire:
            await wire.send("POST", CHAT, json.dumps({**HELLO, "stream": stream}).encode())
            if stream:
                assert (await wire.head()).headers["content-type"].startswith("text/event-stream")
                assert await wire.chunk()
            await server.until_load(running=1)
        await server.until_load(running=0)
        await http.door.until_idle()

        async def counted() -> bool:
            return http.counted("http_chat", "cancelled") == 1

        await until(counted)


async def test_a_client_that_goes_away_leaves_the_queue() -> None:
    async with http_door() as http, attached(http.door, FakeModelServer("one", slots=1)) as (fake,):
        gate = fake.gate("Complete")
        depth = http.door.plane.scheduler.depth
        running = asyncio.create_task(http.request("POST", CHAT, HELLO))
        await gate.arrived.wait()
        async with http.wire() as wire:
            await wire.send("POST", CHAT, json.dumps(HELLO).encode())

            async def queued() -> bool:
                return sum(depth().values()) == 1

            await until(queued)

        async def left() -> bool:
            return sum(depth().values()) == 0

        await until(left)
        gate.open()
        assert (await running).status == 200


async def test_a_client_that_does_not_read_is_cut_off(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    flood = ["x" * 60_000] * 400  # more than the buffers of both sides hold
    async with http_door(limits={"write_timeout": 0.4}) as http, attached(http.door, FakeModelServer("one")) as (fake,):
        fake.answer(*flood)
        async with http.wire() as wire:
            wire.writer.transport.pause_reading()  # type: ignore[attr-defined]
            await wire.send("POST", CHAT, json.dumps({**HELLO, "stream": True}).encode())

            async def counted() -> bool:
                return http.counted("http_chat", Reason.SLOW_READER) == 1

            await until(counted, PATIENCE)
            await http.door.until_idle()
            gateway = http.door.plane.gateway
            assert gateway is not None

            async def cut() -> bool:
                return gateway.connections == 0

            await until(cut)
    assert not [record for record in caplog.records if record.name.startswith("uvicorn")]


# ---------------------------------------------------------- life and logs ---


async def test_a_drain_lets_streams_end_and_closes_the_port() -> None:
    engine = {"decode_tokens_per_second": 40, "aggregate_tokens_per_second": 0, "answer_tokens": 30}
    async with control_plane("--fleet.warm-up", "0") as plane:
        url = plane.facts["gateway"]
        host, port = url.removeprefix("http://").split(":")
        async with simulated_server("one", plane.address, **engine):
            async with client(plane.address) as door:
                await door.until_ready("one")
            streaming = Wire(*await asyncio.open_connection(host, int(port)))
            idle = Wire(*await asyncio.open_connection(host, int(port)))
            await streaming.send("POST", CHAT, json.dumps({**HELLO, "stream": True}).encode())
            assert (await streaming.head()).status == 200
            first = await streaming.chunk()
            stopping = asyncio.create_task(plane.stop())
            assert await idle.closed()
            rest = [first]
            while chunk := await streaming.chunk():
                rest.append(chunk)
            assert rest[-1].endswith(b"data: [DONE]\n\n")
            assert await streaming.closed()
            assert await stopping == 0
            with pytest.raises(OSError):
                await asyncio.open_connection(host, int(port))
            for wire in (streaming, idle):
                wire.writer.close()
    assert "Traceback" not in plane.log.decode(), plane.log.decode()


async def test_the_end_of_the_grace_is_told_to_streams() -> None:
    async with control_plane("--fleet.warm-up", "0", "--drain-grace", "0.2") as plane:
        host, port = plane.facts["gateway"].removeprefix("http://").split(":")
        async with simulated_server("one", plane.address, **{**SLOW, "aggregate_tokens_per_second": 0}):
            async with client(plane.address) as door:
                await door.until_ready("one")
            streaming = Wire(*await asyncio.open_connection(host, int(port)))
            await streaming.send("POST", CHAT, json.dumps({**HELLO, "stream": True}).encode())
            assert (await streaming.head()).status == 200
            stopping = asyncio.create_task(plane.stop())
            last = b""
            while chunk := await streaming.chunk():
                last = chunk
            assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "draining"
            assert await stopping == 0
            streaming.writer.close()
    assert "Traceback" not in plane.log.decode(), plane.log.decode()


async def test_prompts_are_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with http_door() as http, attached(http.door, FakeModelServer("one")):
        asked = {**HELLO, "messages": [{"role": "user", "content": CANARY}]}
        assert (await http.request("POST", CHAT, asked)).status == 200
        assert (await http.request("POST", CHAT, {**asked, "temperature": 9})).status == 400
        assert (await http.request("POST", CHAT, json.dumps(asked).encode()[:-1])).status == 400
    assert caplog.records
    assert CANARY not in caplog.text


async def test_a_bug_is_told_with_an_incident_and_nothing_more(caplog: pytest.LogCaptureFixture) -> None:
    async with http_door() as http, attached(http.door, FakeModelServer("one")):

        async def broken(*arguments: object, **options: object) -> None:
            raise ZeroDivisionError(CANARY)

        http.door.plane.servicer.Generate = broken  # type: ignore[method-assign]
        answer = await http.request("POST", CHAT, HELLO)
        assert (answer.status, answer.error["code"]) == (500, "internal_error")
        assert CANARY not in answer.error["message"]
        incident = answer.error["message"].rsplit(" ", 1)[1]
        assert incident in caplog.text


IDLE = """
import asyncio, sys, urllib.request
from control_plane.app import running
from control_plane.config import ControlPlaneSettings

HEAVY = ("uvicorn", "starlette", "httptools", "alembic", "asyncpg", "greenlet", "httpx", "control_plane.gateway.routes")

def loaded():
    return sorted(name for name in HEAVY if name in sys.modules)

async def main():
    settings = ControlPlaneSettings.model_validate(
        {"port": 0, "gateway": {"port": 0}, "tasks": {"store": "sqlite:///" + sys.argv[1]}}
    )
    async with running(settings) as (plane, _):
        await asyncio.sleep(0.5)  # heartbeats, sweeps
        print(loaded())
        def health():
            with urllib.request.urlopen(plane.gateway.url + "/health") as answer:
                return answer.status
        print(await asyncio.gather(*(asyncio.to_thread(health) for _ in range(3))))
        print("uvicorn" in loaded())
    async with running(settings) as (plane, _):  # nobody comes
        pass

asyncio.run(main())
"""


def test_an_idle_control_plane_has_loaded_neither_the_http_stack_nor_other_databases(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", IDLE, str(tmp_path / "tasks.db")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout.split("\n")[:3] == ["[]", "[200, 200, 200]", "True"], done.stderr
    assert done.returncode == 0, done.stderr
