"""One attempt at a callback, against real HTTP servers."""

from __future__ import annotations

import asyncio
import logging
import shutil
import ssl
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from aiohttp import web

from control_plane.tasks.callbacks import Answer, Rules, headers, read_secrets
from control_plane.tasks.webhook import Sender
from tests.harness.receivers import Receiver, receiver, reset, silence, status, verified

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
BODY = b'{"type":"task.succeeded"}'
LOOPBACK = Rules.of((), ("127.0.0.1:*", "localhost:*"), insecure_loopback=True)


@pytest_asyncio.fixture
async def hook() -> AsyncIterator[Receiver]:
    async with receiver() as kept:
        yield kept


async def send(url: str, rules: Rules = LOOPBACK, timeout: float = 5.0) -> Answer:
    sender = Sender(rules, timeout)
    try:
        return await sender.send(url, headers("t.1", 1700000000.5, BODY, read_secrets(SECRET)), BODY)
    finally:
        await sender.close()


async def test_what_arrives_is_signed(hook: Receiver) -> None:
    assert (await send(hook.url + "?a=b")).accepted
    (received,) = hook.received
    assert received.path == "/hook?a=b"
    assert received.body == BODY
    assert received.headers["content-type"] == "application/json"
    assert received.headers["webhook-timestamp"] == "1700000000"
    assert received.headers["user-agent"].startswith("modelyard/")
    assert verified(received, SECRET)
    received.body += b" "
    assert not verified(received, SECRET)


@pytest.mark.parametrize(("code", "final"), [(500, False), (404, False), (410, True), (429, False)])
async def test_other_answers_do_not_accept(hook: Receiver, code: int, final: bool) -> None:
    hook.then = status(code)
    answer = await send(hook.url)
    assert (answer.accepted, answer.final) == (False, final)
    assert str(code) in answer.failure


async def test_redirects_are_not_followed(hook: Receiver) -> None:
    async with receiver() as other:
        hook.then = status(307, Location=other.url)
        answer = await send(hook.url)
        assert "redirects are not followed" in answer.failure
        assert other.received == []


async def test_a_reset_and_a_dead_port(hook: Receiver) -> None:
    hook.then = reset
    assert "connection broke" in (await send(hook.url)).failure
    async with receiver() as gone:
        url = gone.url
    assert "cannot be connected to" in (await send(url)).failure


async def test_silence_ends_with_the_timeout(hook: Receiver) -> None:
    hook.then = silence
    assert "no answer within 0.2 s" in (await send(hook.url, timeout=0.2)).failure


async def test_endless_answers_are_cut_off_and_never_told(hook: Receiver, caplog: pytest.LogCaptureFixture) -> None:
    written = 0

    async def endless(request: web.Request) -> web.StreamResponse:
        nonlocal written
        response = web.StreamResponse(status=500, reason="CANARY-REASON")
        await response.prepare(request)
        while True:
            await response.write(b"CANARY" * 1000)
            written += 6000

    hook.then = endless
    with caplog.at_level(logging.DEBUG):
        answer = await send(hook.url)
    assert answer.failure == "the receiver answered 500"
    assert "CANARY" not in caplog.text
    assert written < 20_000_000


async def test_answers_that_are_no_http(caplog: pytest.LogCaptureFixture) -> None:
    async def babble(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(100)
        writer.write(b"CANARY\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(babble, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        with caplog.at_level(logging.DEBUG):
            answer = await send(f"http://127.0.0.1:{port}/")
    assert not answer.accepted
    assert "CANARY" not in answer.failure + caplog.text


async def test_connections_are_used_again(hook: Receiver) -> None:
    sender = Sender(LOOPBACK, 5.0)
    for _ in range(5):
        assert (await sender.send(hook.url, {}, BODY)).accepted
    await sender.close()
    assert len(hook.connections) == 1


@pytest.mark.parametrize(
    "host", ["localhost", "2130706433", "0x7f000001", "127.1", "0177.0.0.1", "localhost.localdomain"]
)
async def test_private_addresses_are_refused_after_resolving(hook: Receiver, host: str) -> None:
    """Whatever the name looks like, what it resolves to is checked, and nothing is connected to."""
    port = hook.url.rpartition(":")[2].partition("/")[0]
    answer = await send(f"https://{host}:{port}/", Rules.of(("*:*",), (), insecure_loopback=False))
    assert not answer.accepted
    assert any(why in answer.failure for why in ("not public", "no valid IP address", "cannot be resolved"))
    assert hook.received == [] and not hook.connections


async def test_rules_are_checked_at_each_attempt(hook: Receiver) -> None:
    answer = await send(hook.url, Rules.of(("hooks.example.org",), (), insecure_loopback=False))
    assert answer.final and "tasks.callbacks.hosts" in answer.failure
    assert hook.received == []


@pytest.mark.skipif(not shutil.which("openssl"), reason="makes its certificate with openssl")
async def test_certificates_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        [
            "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
            "-days", "1",
            "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1",
            "-keyout", str(key), "-out", str(certificate),
        ],
        check=True, capture_output=True,
    )  # fmt: skip
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, key)
    async with receiver(tls) as hook:
        assert (await send(hook.url)).failure.endswith("the receiver's certificate is not trusted")
        assert hook.received == []
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert (await send(hook.url.replace("127.0.0.1", "localhost"))).accepted
        assert verified(hook.received[0], SECRET)
