"""The engine openai_compatible over real HTTP."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager

import pytest

from model_servers import registry
from model_servers.engine import (
    Busy,
    ContentRefused,
    ContextTooLong,
    CredentialsRejected,
    Delta,
    EngineFailed,
    Feature,
    Finished,
    FinishReason,
    GenerationRequest,
    Health,
    Message,
    RateLimited,
    Role,
    Sampling,
    UnknownModel,
    Unsupported,
)
from model_servers.engines.openai_compatible import OpenAICompatibleEngine, OpenAICompatibleSettings
from tests.harness.model_servers import eventually, model_server, request
from tests.standins.common import Fault
from tests.standins.openai import OpenAIStandIn

MODEL = OpenAIStandIn.model


@asynccontextmanager
async def engine_before(standin: OpenAIStandIn, **settings) -> AsyncIterator[OpenAICompatibleEngine]:
    given = {
        "provider": "openai",
        "base_url": f"{standin.url}/v1",
        "api_key_env": "STAND_IN_KEY",
        "context_length": standin.context_length,
        "first_token_seconds": 0.5,
        "stall_seconds": 0.3,
        "probe_seconds": 0.1,
    }
    env = {"STAND_IN_KEY": standin.key}
    engine = OpenAICompatibleEngine(OpenAICompatibleSettings(**{**given, **settings}), env=env)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.close()


def asked(text: str = "Hello", model: str = MODEL, **sampling) -> GenerationRequest:
    return GenerationRequest(model, (Message(Role.USER, (text,)),), sampling=Sampling(**sampling))


async def collect(engine, wanted: GenerationRequest) -> tuple[str, Finished]:
    *deltas, finished = [item async for item in engine.generate(wanted)]
    if finished.last is not None:
        deltas.append(finished.last)
    return "".join(delta.text for delta in deltas), finished


async def test_models_are_taken_from_the_server_and_described():
    async with OpenAIStandIn() as standin, engine_before(standin) as engine:
        status = engine.status()
    assert (status.engine, status.health) == ("openai_compatible", Health.READY)
    models = {model.name: model for model in status.models}
    assert set(models) == {MODEL, OpenAIStandIn.embedding_model}, "what makes no text is left out"
    assert models[MODEL].provider == "openai" and Feature.VISION in models[MODEL].features
    assert models[OpenAIStandIn.embedding_model].features == Feature.EMBEDDING


async def test_named_models_are_offered_with_their_prices():
    named = {"name": MODEL, "price": {"prompt": 2, "completion": 10}, "features": ["streaming"], "context_length": 77}
    async with OpenAIStandIn() as standin, engine_before(standin, models=[named]) as engine:
        (model,) = engine.status().models
        assert (model.price, model.context_length, model.features) == ((2, 0, 10), 77, Feature.STREAMING)
        with pytest.raises(UnknownModel, match=MODEL):
            await collect(engine, asked(model="other"))


async def test_connections_are_used_again_and_counted():
    async with OpenAIStandIn() as standin, engine_before(standin, slots=2, probe_seconds=60) as engine:
        for _ in range(5):
            await collect(engine, asked(max_tokens=8))
        pool = engine.status().pool
        assert (pool.size, pool.in_use, pool.opened) == (3, 0, 1)
        assert pool.reused == 5
        await asyncio.gather(*(collect(engine, asked(str(n), max_tokens=8)) for n in range(6)))
        assert engine.status().pool.opened <= 2, "no more connections than slots"


async def test_requests_beyond_the_slots_wait_in_order():
    async with OpenAIStandIn(token_seconds=0.005) as standin, engine_before(standin, slots=1) as engine:
        tasks = []
        for n in range(3):
            tasks.append(asyncio.create_task(collect(engine, asked(f"number {n}", max_tokens=10))))
            await asyncio.sleep(0)
        await eventually(lambda: (engine.status().load.running, engine.status().load.waiting) == (1, 2))
        results = [finished for _, finished in await asyncio.gather(*tasks)]
        assert results[0].queued < results[1].queued < results[2].queued
        assert [g.request.messages[0].content for g in standin.generations] == ["number 0", "number 1", "number 2"]
        assert engine.status().load.running == engine.status().load.waiting == 0


async def test_leaving_stops_the_server():
    async with OpenAIStandIn(token_seconds=0.005) as standin, engine_before(standin, slots=1) as engine:
        async with aclosing(engine.generate(asked("Count to 1000"))) as items:
            async for _ in items:
                break
        (generation,) = standin.generations
        await eventually(lambda: generation.cancelled)
        assert generation.generated < generation.wanted / 2
        assert engine.status().pool.in_use == 0
        _, finished = await collect(engine, asked(max_tokens=3))
        assert finished.queued < 0.5, "the slot is free again"


async def test_more_stop_strings_than_the_provider_takes():
    async with OpenAIStandIn(token_seconds=0.002) as standin, engine_before(standin) as engine:
        free, _ = await collect(engine, asked("Count to 1000", max_tokens=200, temperature=0))
        stops = ("@1@", "@2@", "@3@", "@4@", free[100:108])
        text, finished = await collect(engine, asked("Count to 1000", max_tokens=200, temperature=0, stop=stops))
        assert text == free[: free.index(stops[-1])]
        assert finished.finish_reason is FinishReason.STOP
        assert finished.usage.completion_tokens < 200 and finished.usage.prompt_tokens >= 1
        await eventually(lambda: standin.generations[-1].cancelled)


async def test_embeddings_in_batches():
    async with OpenAIStandIn() as standin, engine_before(standin, embedding_batch=3) as engine:
        texts = [f"text {n}" for n in range(8)]
        found = await engine.embed(OpenAIStandIn.embedding_model, texts)
        alone = await engine.embed(OpenAIStandIn.embedding_model, texts[4:5])
        assert len(found.vectors) == 8 and found.vectors[4] == alone.vectors[0]
        assert found.prompt_tokens == 16
        assert [len(r.body["input"]) for r in standin.requests if r.path.endswith("embeddings")] == [3, 3, 2, 1]
        with pytest.raises(Unsupported):
            await engine.embed(MODEL, ["x"])


async def test_tokens_are_not_guessed():
    async with OpenAIStandIn() as standin, engine_before(standin) as engine:
        with pytest.raises(Unsupported):
            await engine.count_tokens(asked())


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (Fault("status", 401), CredentialsRejected),
        (Fault("status", 403), CredentialsRejected),
        (Fault("status", 404), UnknownModel),
        (Fault("status", 429, retry_after=7), RateLimited),
        (Fault("status", 500), EngineFailed),
        (Fault("status", 502), EngineFailed),
        (Fault("status", 503, retry_after=7), Busy),
        (Fault("status", 529, retry_after=7), Busy),
        (Fault("hang"), EngineFailed),
        (Fault("stall", pieces=2), EngineFailed),
        (Fault("reset", pieces=0), EngineFailed),
        (Fault("reset", pieces=2), EngineFailed),
        (Fault("garbage"), EngineFailed),
    ],
    ids=lambda value: f"{value.kind}-{value.status}-{value.pieces}" if isinstance(value, Fault) else "",
)
async def test_faults(fault: Fault, error: type[Exception], caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.DEBUG)
    async with OpenAIStandIn() as standin, engine_before(standin) as engine:
        standin.fault = fault
        with pytest.raises(error) as caught:
            async with asyncio.timeout(3):
                await collect(engine, asked("A secret prompt"))
        assert type(caught.value) is error
        if fault.retry_after:
            assert caught.value.retry_after == 7
        standin.fault = None
        assert (await collect(engine, asked()))[0], "nothing is left behind"
        said = f"{caught.value} {caplog.text}"
        assert "secret prompt" not in said and standin.key not in said


async def test_errors_that_need_a_certain_request():
    async with OpenAIStandIn(context_length=64) as standin, engine_before(standin) as engine:
        standin.refuses = "bomb"
        with pytest.raises(ContextTooLong):
            await collect(engine, asked("x" * 400))
        with pytest.raises(ContentRefused):
            await collect(engine, asked("a bomb"))
        with pytest.raises(Unsupported, match="invalid_json_schema"):
            await collect(engine, GenerationRequest(MODEL, asked().messages, json_schema='{"type": "array"}'))
        standin.breaks_after = 3
        items = []
        with pytest.raises(EngineFailed, match="server_error"):
            async for item in engine.generate(asked("tell me")):
                items.append(item)
        assert items and all(isinstance(item, Delta) for item in items)


async def test_a_refused_key_makes_it_unhealthy_until_the_file_holds_another(tmp_path):
    file = tmp_path / "key"
    file.write_text("sk-old-key")
    async with OpenAIStandIn() as standin, engine_before(standin, api_key_file=str(file)) as engine:
        status = engine.status()
        assert status.health is Health.UNHEALTHY
        assert str(file) in status.health_detail and "sk-old" not in status.health_detail
        file.write_text(standin.key)
        await eventually(lambda: engine.status().health is Health.READY)
        assert (await collect(engine, asked()))[0]


async def test_a_server_that_goes_and_comes_back():
    async with OpenAIStandIn(token_seconds=0.01) as standin, engine_before(standin) as engine:
        running = asyncio.create_task(collect(engine, asked("Count to 1000")))
        await eventually(lambda: standin.generations)
        await standin.stop()
        with pytest.raises(EngineFailed):
            await running
        await eventually(lambda: engine.status().health is Health.UNHEALTHY)
        assert "cannot be reached" in engine.status().health_detail
        await standin.start()
        await eventually(lambda: engine.status().health is Health.READY)
        assert (await collect(engine, asked(max_tokens=3)))[0]


async def test_no_key_no_start():
    settings = OpenAICompatibleSettings(provider="groq")
    engine = OpenAICompatibleEngine(settings, env={})
    with pytest.raises(EngineFailed, match="GROQ_API_KEY"):
        await engine.start()
    await engine.close()


async def test_closing_fails_what_runs_and_what_waits():
    async with OpenAIStandIn(token_seconds=0.02) as standin, engine_before(standin, slots=1) as engine:
        tasks = [asyncio.create_task(collect(engine, asked("Count to 1000"))) for _ in range(3)]
        await eventually(lambda: standin.generations and engine.status().load.waiting == 2)
        await engine.close()
        async with asyncio.timeout(2):
            results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(result) for result in results] == [EngineFailed] * 3
        assert engine.status().health is Health.UNHEALTHY
        with pytest.raises(EngineFailed):
            await collect(engine, asked())
        await engine.close()


# ------------------------------------------ servers that do not behave well ---

_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
_PIECE = b'data: {"choices": [{"index": 0, "delta": {"content": "Hi"}, "finish_reason": "stop"}]}\n\ndata: [DONE]\n\n'


@asynccontextmanager
async def raw_server(answer) -> AsyncIterator[str]:
    """`answer(reader, writer, number)`: what happens on each connection after a request has come."""
    connections = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        try:
            await answer(reader, writer, connections)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    finally:
        server.close()


async def _request(reader: asyncio.StreamReader) -> None:
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    length = next((int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.startswith(b"content-length")), 0)
    await reader.readexactly(length)


def _chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


@asynccontextmanager
async def engine_at(url: str, **settings) -> AsyncIterator[OpenAICompatibleEngine]:
    given = {"base_url": url, "models": ["m"], "first_token_seconds": 0.4, "stall_seconds": 0.3, "probe_seconds": 60}
    engine = OpenAICompatibleEngine(OpenAICompatibleSettings(**{**given, **settings}), env={})
    try:
        yield engine  # not started: nothing but the test speaks to the server
    finally:
        await engine.close()


async def test_an_idle_connection_that_was_closed_is_no_failure():
    async def answer(reader, writer, number):
        await _request(reader)
        writer.write(_HEAD + _chunk(_PIECE) + b"0\r\n\r\n")
        await writer.drain()
        if number == 1:
            await _request(reader)  # closed without a word, as a server does whose patience ends just then
        else:
            await reader.read()

    async with raw_server(answer) as url, engine_at(url) as engine:
        assert (await collect(engine, asked(model="m")))[0] == "Hi"
        assert (await collect(engine, asked(model="m")))[0] == "Hi"
        assert engine.status().pool.opened == 2


async def test_signs_of_life_are_no_tokens():
    async def answer(reader, writer, number):
        await _request(reader)
        writer.write(_HEAD)
        while True:
            writer.write(_chunk(b": keep-alive\n\n"))
            await writer.drain()
            await asyncio.sleep(0.05)

    async with raw_server(answer) as url, engine_at(url) as engine:
        with pytest.raises(EngineFailed, match=r"nothing for 0\.4 s"):
            async with asyncio.timeout(3):
                await collect(engine, asked(model="m"))


async def test_pieces_cut_anywhere_are_put_together():
    async def answer(reader, writer, number):
        await _request(reader)
        writer.write(_HEAD)
        for at in range(0, len(_PIECE), 7):
            writer.write(_chunk(_PIECE[at : at + 7]))
            await writer.drain()
            await asyncio.sleep(0)
        writer.write(b"0\r\n\r\n")
        await writer.drain()
        await reader.read()

    async with raw_server(answer) as url, engine_at(url) as engine:
        text, finished = await collect(engine, asked(model="m"))
    assert text == "Hi" and finished.usage.completion_tokens == 1 and finished.usage.prompt_tokens >= 1


async def test_an_error_that_comes_with_status_200():
    body = b'{"error": {"message": "Provider returned error", "code": 429}}'
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)

    async def answer(reader, writer, number):
        await _request(reader)
        writer.write(head + body)
        await writer.drain()
        await reader.read()

    async with raw_server(answer) as url, engine_at(url) as engine:
        with pytest.raises(RateLimited):
            await collect(engine, asked(model="m"))


async def test_a_redirect_is_not_followed_with_the_key():
    async def answer(reader, writer, number):
        await _request(reader)
        writer.write(b"HTTP/1.1 302 Found\r\nLocation: http://example.invalid/\r\nContent-Length: 0\r\n\r\n")
        await writer.drain()
        await reader.read()

    async with raw_server(answer) as url, engine_at(url) as engine:
        with pytest.raises(EngineFailed, match="302"):
            await collect(engine, asked(model="m"))


# ------------------------------------------------- through a model server ---


async def test_a_model_server_reports_its_pool_and_streams():
    async with OpenAIStandIn() as standin, engine_before(standin) as engine:
        # The server starts the engine itself; this one only lends its settings.
        plugin = registry.find("openai_compatible")
        assert plugin.metered and plugin.extra == "openai"
        fresh = OpenAICompatibleEngine(engine._settings, env={"STAND_IN_KEY": standin.key})
        async with model_server(fresh) as server:
            answer = await server.generate(request(model=MODEL, max_tokens=20))
            assert answer.text and answer.result.usage.completion_tokens == 20
            report = await server.report()
            assert report.engine.name == "openai_compatible"
            assert report.pool.size == 9 and report.pool.opened >= 1
