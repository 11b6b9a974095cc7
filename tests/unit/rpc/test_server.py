"""Real servers on a free port: there is no honest fake of grpc.aio."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2

from modelyard.rpc.channels import channel
from modelyard.rpc.errors import Refusal, Violation, from_rpc_error
from modelyard.rpc.reasons import Reason
from modelyard.rpc.server import (
    InFlight,
    Unread,
    bind,
    create_server,
    drain,
    enable_standard_services,
    service_handler,
    takes_unread,
)
from modelyard.v1 import fleet_pb2, generation_pb2, orchestrator_pb2, orchestrator_pb2_grpc

SERVICE = orchestrator_pb2.DESCRIPTOR.services_by_name["Orchestrator"]
PATH = "/modelyard.v1.Orchestrator/"
DELTA = orchestrator_pb2.GenerateResponse(delta=generation_pb2.GenerationDelta(text="x"))


@asynccontextmanager
async def serving(servicer: object, **limits: int) -> AsyncIterator[grpc.aio.Channel]:
    server = create_server()
    server.add_generic_rpc_handlers((service_handler(SERVICE, servicer, **limits),))
    port = bind(server, "127.0.0.1", 0)
    await server.start()
    async with channel(f"127.0.0.1:{port}") as link:
        yield link
    await server.stop(None)


def stub(link: grpc.aio.Channel) -> orchestrator_pb2_grpc.OrchestratorStub:
    return orchestrator_pb2_grpc.OrchestratorStub(link)


async def refusal_of(call) -> Refusal:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        if hasattr(call, "__aiter__"):
            async for _ in call:
                pass
        else:
            await call
    return from_rpc_error(caught.value)


# ----------------------------------------------------------------- handlers ---


async def test_a_method_may_take_its_request_unread():
    class Lazy:
        @takes_unread
        async def GetModel(self, request, context):
            assert isinstance(request, Unread) and request.size == 3
            assert request.read() is not request.read()  # a message lives as long as it is wanted
            return orchestrator_pb2.GetModelResponse(model=fleet_pb2.Model(name=request.read().name))

    async with serving(Lazy(), max_request_bytes=3) as link:
        request = orchestrator_pb2.GetModelRequest(name="m")
        assert (await stub(link).GetModel(request)).model.name == "m"
        garbage = link.unary_unary(PATH + "GetModel")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await garbage(b"\xff\xff\xff")
        assert from_rpc_error(caught.value).reason is Reason.INVALID_REQUEST


class Answers:
    async def ListModels(self, request, context):
        return orchestrator_pb2.ListModelsResponse(models=[fleet_pb2.Model(name="m")])

    async def GetModel(self, request, context):
        return orchestrator_pb2.GetModelResponse(model=fleet_pb2.Model(name=request.name)).SerializeToString()

    async def Generate(self, request, context):
        yield DELTA
        yield DELTA.SerializeToString()

    async def WatchFleet(self, request, context):
        await context.write(orchestrator_pb2.WatchFleetResponse(snapshot=True))
        await context.write(orchestrator_pb2.WatchFleetResponse().SerializeToString())

    async def Attach(self, requests, context):
        async for report in requests:
            yield fleet_pb2.ServerDirective(lease_epoch=report.lease_epoch)


async def test_messages_and_bytes_in_every_style() -> None:
    async with serving(Answers()) as link:
        assert (await stub(link).ListModels(orchestrator_pb2.ListModelsRequest())).models[0].name == "m"
        got = await stub(link).GetModel(orchestrator_pb2.GetModelRequest(name="n"))
        assert got.model.name == "n"
        assert [m async for m in stub(link).Generate(orchestrator_pb2.GenerateRequest())] == [DELTA, DELTA]
        watched = [m.snapshot async for m in stub(link).WatchFleet(orchestrator_pb2.WatchFleetRequest())]
        assert watched == [True, False]
        reports = iter([fleet_pb2.ServerReport(lease_epoch=n) for n in (1, 2)])
        assert [d.lease_epoch async for d in stub(link).Attach(reports)] == [1, 2]


async def test_missing_method_is_unimplemented() -> None:
    async with serving(Answers()) as link:
        refusal = await refusal_of(stub(link).Embed(orchestrator_pb2.EmbedRequest()))
        assert refusal.code is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize("method", ["ListModels", "Generate", "WatchFleet"])
async def test_bytes_that_do_not_parse(method: str) -> None:
    async with serving(Answers()) as link:
        kind = link.unary_unary if method == "ListModels" else link.unary_stream
        refusal = await refusal_of(kind(PATH + method)(b"\xff\xff"))
        assert refusal.reason is Reason.INVALID_REQUEST
        assert "do not parse" in refusal.message


async def test_bytes_that_do_not_parse_in_a_stream() -> None:
    async with serving(Answers()) as link:
        call = link.stream_stream(PATH + "Attach")(iter([b"", b"\xff\xff"]))
        assert await call.read() == b""
        assert (await refusal_of(call.read())).reason is Reason.INVALID_REQUEST


async def test_request_that_is_too_large() -> None:
    async with serving(Answers(), max_request_bytes=100) as link:
        await stub(link).GetModel(orchestrator_pb2.GetModelRequest(name="x" * 98))
        refusal = await refusal_of(stub(link).GetModel(orchestrator_pb2.GetModelRequest(name="x" * 99)))
        assert refusal.reason is Reason.INVALID_REQUEST
        assert "101 bytes" in refusal.message


async def test_request_beyond_grpcs_own_limit() -> None:
    server = create_server(max_request_bytes=1000)
    server.add_generic_rpc_handlers((service_handler(SERVICE, Answers()),))
    port = bind(server, "127.0.0.1", 0)
    await server.start()
    async with channel(f"127.0.0.1:{port}") as link:
        refusal = await refusal_of(stub(link).GetModel(orchestrator_pb2.GetModelRequest(name="x" * (2 << 20))))
        assert refusal.reason is Reason.INVALID_REQUEST
    await server.stop(None)


class Fails:
    def __init__(self, error: BaseException) -> None:
        self.error = error

    async def ListModels(self, request, context):
        raise self.error

    async def Generate(self, request, context):
        yield DELTA
        raise self.error

    async def WatchFleet(self, request, context):
        await context.write(b"")
        raise self.error


def every_style(link: grpc.aio.Channel):
    yield stub(link).ListModels(orchestrator_pb2.ListModelsRequest())
    yield stub(link).Generate(orchestrator_pb2.GenerateRequest())
    yield stub(link).WatchFleet(orchestrator_pb2.WatchFleetRequest())


async def test_refusal_becomes_a_rich_status() -> None:
    given = Refusal(Reason.QUEUE_FULL, "voll: ü", [Violation("f", "d")], retry_after=2, metadata={"k": "v"})
    async with serving(Fails(given)) as link:
        for call in every_style(link):
            refusal = await refusal_of(call)
            assert (refusal.reason, refusal.message, refusal.retry_after) == (Reason.QUEUE_FULL, "voll: ü", 2)
            assert (refusal.violations, refusal.metadata) == (given.violations, {"k": "v"})


async def test_longest_refusal_arrives() -> None:
    text = "\u2028" * 10_000
    given = Refusal(Reason.INTERNAL, text, [Violation(text, text)] * 50, retry_after=2, metadata={"k": text})
    async with serving(Fails(given)) as link:
        refusal = await refusal_of(stub(link).ListModels(orchestrator_pb2.ListModelsRequest()))
        assert refusal.reason is Reason.INTERNAL
        assert not refusal.transport


async def test_any_other_exception_is_an_incident(caplog: pytest.LogCaptureFixture) -> None:
    async with serving(Fails(ValueError("secret"))) as link:
        for call in every_style(link):
            caplog.clear()
            refusal = await refusal_of(call)
            assert refusal.reason is Reason.INTERNAL
            assert "secret" not in refusal.message
            assert refusal.metadata["incident"] in refusal.message
            assert refusal.metadata["incident"] in caplog.text
            assert "ValueError" in caplog.text
            assert __file__ in caplog.text
            assert "secret" not in caplog.text


async def test_trailing_metadata_survives_a_refusal() -> None:
    class Servicer:
        async def ListModels(self, request, context):
            context.set_trailing_metadata((("k", "v"),))
            raise Refusal(Reason.DRAINING, "bye")

    async with serving(Servicer()) as link:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub(link).ListModels(orchestrator_pb2.ListModelsRequest())
        assert dict(caught.value.trailing_metadata())["k"] == "v"
        assert from_rpc_error(caught.value).reason is Reason.DRAINING


async def test_plain_abort_passes(caplog: pytest.LogCaptureFixture) -> None:
    class Servicer:
        async def ListModels(self, request, context):
            await context.abort(grpc.StatusCode.DATA_LOSS, "gone")

    async with serving(Servicer()) as link:
        refusal = await refusal_of(stub(link).ListModels(orchestrator_pb2.ListModelsRequest()))
        assert (refusal.code, refusal.message) == (grpc.StatusCode.DATA_LOSS, "gone")
    assert "incident" not in caplog.text


@pytest.mark.parametrize("style", ["generator", "write"])
async def test_cancellation_reaches_the_handler_and_is_not_logged(style: str, caplog) -> None:
    ended = asyncio.Event()

    class Generator:
        async def Generate(self, request, context):
            try:
                yield DELTA
                await asyncio.Event().wait()
            except (asyncio.CancelledError, GeneratorExit):  # the latter where the write had not returned yet
                ended.set()
                raise

    class Write:
        async def Generate(self, request, context):
            try:
                await context.write(DELTA)
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                ended.set()
                raise

    caplog.set_level(logging.WARNING)
    async with serving(Generator() if style == "generator" else Write()) as link:
        call = stub(link).Generate(orchestrator_pb2.GenerateRequest())
        assert await call.read() == DELTA
        call.cancel()
        await asyncio.wait_for(ended.wait(), 5)
    assert not [record for record in caplog.records if record.name.startswith(("modelyard", "grpc"))]


@pytest.mark.parametrize("style", ["generator", "write"])
async def test_cancellation_reaches_a_handler_that_is_writing(style: str, caplog) -> None:
    """The reader takes one message of many: the writer stands in a write, sooner or later, when it is cancelled."""
    large = orchestrator_pb2.GenerateResponse(delta=generation_pb2.GenerationDelta(text="x" * 1_000_000))
    ended: asyncio.Future[type[BaseException]] = asyncio.get_running_loop().create_future()
    written = 0

    class Generator:
        async def Generate(self, request, context):
            nonlocal written
            try:
                while True:
                    yield large
                    written += 1
            except BaseException as error:
                ended.set_result(type(error))
                raise

    class Write:
        async def Generate(self, request, context):
            nonlocal written
            try:
                while True:
                    await context.write(large)
                    written += 1
            except BaseException as error:
                ended.set_result(type(error))
                raise

    async with serving(Generator() if style == "generator" else Write()) as link:
        call = stub(link).Generate(orchestrator_pb2.GenerateRequest())
        await call.read()
        before = -1
        while before != written:  # until nothing more fits between the two
            before = written
            await asyncio.sleep(0.05)
        call.cancel()
        how = await asyncio.wait_for(ended, 5)
    assert how is (GeneratorExit if style == "generator" else asyncio.CancelledError)
    assert not [record for record in caplog.records if record.name.startswith(("modelyard", "grpc"))]


async def test_reader_that_leaves_while_much_is_written_is_no_incident(caplog) -> None:
    ended = asyncio.Event()

    class Servicer:
        async def Generate(self, request, context):
            try:
                while True:
                    yield DELTA
            finally:
                ended.set()

    async with serving(Servicer()) as link:
        for _ in range(20):
            ended.clear()
            call = stub(link).Generate(orchestrator_pb2.GenerateRequest())
            await call.read()
            call.cancel()
            await asyncio.wait_for(ended.wait(), 5)
    assert "incident" not in caplog.text


# --------------------------------------------------------------------- bind ---


async def test_bind_to_a_used_port_says_what_to_do() -> None:
    first, second = create_server(), create_server()
    port = bind(first, "127.0.0.1", 0)
    with pytest.raises(OSError, match=rf"^127\.0\.0\.1:{port} is in use: choose another with --port"):
        bind(second, "127.0.0.1", port)
    await first.stop(None)
    await second.stop(None)


async def test_grpc_adds_nothing_of_its_own_to_a_used_port(capfd: pytest.CaptureFixture[str]) -> None:
    first, second = create_server(), create_server()
    port = bind(first, "127.0.0.1", 0)
    with pytest.raises(OSError, match="in use"):
        bind(second, "127.0.0.1", port)
    assert capfd.readouterr().err == ""
    await first.stop(None)
    await second.stop(None)


async def test_bind_to_a_name_that_nobody_knows() -> None:
    server = create_server()
    with pytest.raises(OSError, match=r"^cannot listen on no\.such\.host\.invalid:1: "):
        bind(server, "no.such.host.invalid", 1)
    await server.stop(None)


async def test_bind_to_an_address_of_another_host() -> None:
    server = create_server()
    with pytest.raises(OSError, match=r"^cannot listen on 192\.0\.2\.1:7460: "):
        bind(server, "192.0.2.1", 7460)
    await server.stop(None)


# ---------------------------------------------------- health and reflection ---

Health = health_pb2.HealthCheckResponse


async def test_health_and_its_watchers() -> None:
    server = create_server()
    health = enable_standard_services(server, [SERVICE.full_name])
    port = bind(server, "127.0.0.1", 0)
    await server.start()
    async with channel(f"127.0.0.1:{port}") as link:
        ask = health_pb2_grpc.HealthStub(link)

        async def state(service: str) -> int:
            return (await ask.Check(health_pb2.HealthCheckRequest(service=service))).status

        assert await state("") == Health.SERVING
        assert await state(SERVICE.full_name) == Health.NOT_SERVING
        assert (await refusal_of(ask.Check(health_pb2.HealthCheckRequest(service="x")))).code is (
            grpc.StatusCode.NOT_FOUND
        )
        watchers = [ask.Watch(health_pb2.HealthCheckRequest(service=SERVICE.full_name)) for _ in range(3)]
        unknown = ask.Watch(health_pb2.HealthCheckRequest(service="x"))
        assert [(await w.read()).status for w in watchers] == [Health.NOT_SERVING] * 3
        assert (await unknown.read()).status == Health.SERVICE_UNKNOWN
        watchers[0].cancel()
        await health.set_serving(SERVICE.full_name, True)
        assert [(await w.read()).status for w in watchers[1:]] == [Health.SERVING] * 2
        await health.shut_down()
        await health.set_serving(SERVICE.full_name, True)
        assert [(await w.read()).status for w in watchers[1:]] == [Health.NOT_SERVING] * 2
        assert await state("") == Health.NOT_SERVING
        for call in (*watchers, unknown):
            call.cancel()
    await server.stop(None)


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
async def test_reflection(version: str) -> None:
    server = create_server()
    enable_standard_services(server, [SERVICE.full_name])
    port = bind(server, "127.0.0.1", 0)
    await server.start()
    async with channel(f"127.0.0.1:{port}") as link:
        call = link.stream_stream(f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo")(
            iter(
                [
                    reflection_pb2.ServerReflectionRequest(list_services="").SerializeToString(),
                    reflection_pb2.ServerReflectionRequest(
                        file_containing_symbol=SERVICE.full_name
                    ).SerializeToString(),
                ]
            )
        )
        listed, described = [reflection_pb2.ServerReflectionResponse.FromString(raw) async for raw in call]
        names = {service.name for service in listed.list_services_response.service}
        assert {SERVICE.full_name, "grpc.health.v1.Health"} <= names
        assert described.file_descriptor_response.file_descriptor_proto
    await server.stop(None)


# -------------------------------------------------------------------- drain ---


class Working:
    """Generates until told; notes the order of things."""

    def __init__(self) -> None:
        self.in_flight = InFlight()
        self.accepting = True
        self.started, self.go_on = asyncio.Event(), asyncio.Event()
        self.cancelled = asyncio.Event()

    async def Generate(self, request, context):
        if not self.accepting:
            raise Refusal(Reason.DRAINING, "bye")
        with self.in_flight:
            self.started.set()
            try:
                await self.go_on.wait()
            except asyncio.CancelledError:
                self.cancelled.set()
                raise
            yield DELTA

    def stop_accepting(self) -> None:
        self.accepting = False


@asynccontextmanager
async def working() -> AsyncIterator[tuple]:
    servicer, server = Working(), create_server()
    server.add_generic_rpc_handlers((service_handler(SERVICE, servicer),))
    health = enable_standard_services(server, [SERVICE.full_name])
    port = bind(server, "127.0.0.1", 0)
    await server.start()
    async with channel(f"127.0.0.1:{port}") as link:
        call = stub(link).Generate(orchestrator_pb2.GenerateRequest())
        reading = asyncio.create_task(call.read())
        await servicer.started.wait()
        yield servicer, server, health, link, reading
        call.cancel()
    await server.stop(None)


async def test_drain_refuses_new_work_and_awaits_the_old() -> None:
    async with working() as (servicer, server, health, link, reading):
        draining = asyncio.create_task(
            drain(server, health, stop_accepting=servicer.stop_accepting, in_flight=servicer.in_flight, grace=10)
        )
        refusal = await refusal_of(stub(link).Generate(orchestrator_pb2.GenerateRequest()))
        assert refusal.reason is Reason.DRAINING
        assert health.serving("") is False
        assert servicer.in_flight.count == 1
        servicer.go_on.set()
        assert await reading == DELTA
        assert await draining is True
        assert servicer.in_flight.count == 0


async def test_drain_cancels_what_outlasts_its_grace() -> None:
    async def stop_accepting() -> None:
        servicer.stop_accepting()

    async with working() as (servicer, server, health, _, reading):
        clean = await drain(
            server, health, stop_accepting=stop_accepting, in_flight=servicer.in_flight, grace=0.05, notice=0.01
        )
        assert clean is False
        await asyncio.wait_for(servicer.cancelled.wait(), 5)
        with pytest.raises((grpc.aio.AioRpcError, asyncio.CancelledError)):
            await reading
