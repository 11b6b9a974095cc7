"""A whole model server over real gRPC: what ModelServer of the contract promises."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import sys
from asyncio.subprocess import PIPE
from collections.abc import AsyncGenerator, Sequence

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from model_servers.engine import (
    Delta,
    Embeddings,
    EngineLoad,
    EngineModel,
    EngineStatus,
    Feature,
    Finished,
    GenerationRequest,
    Health,
)
from model_servers.engines.simulated.engine import CRASH_STATUS
from modelyard.rpc.channels import channel
from modelyard.rpc.errors import from_rpc_error
from modelyard.rpc.reasons import Reason
from modelyard.v1 import fleet_pb2, generation_pb2, model_server_pb2, model_server_pb2_grpc
from tests.harness.model_servers import PREFIX, eventually, model_server, request
from tests.harness.ports import free_port

HANG = {"kind": "hang", "tokens": 3}


async def refused(call) -> object:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return from_rpc_error(caught.value)


class OddEngine:
    """An engine whose answer each test writes itself."""

    def __init__(self, answer) -> None:
        self._answer = answer
        self.closed_generators = 0

    async def start(self) -> None: ...

    async def close(self) -> None: ...

    def status(self) -> EngineStatus:
        model = EngineModel("odd", "test", 1000, features=Feature.STREAMING)
        return EngineStatus("odd", "1", "", 0, (model,), EngineLoad(1), Health.READY)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Delta | Finished, None]:
        try:
            async for item in self._answer(request):
                yield item
        finally:
            self.closed_generators += 1

    async def embed(self, model: str, inputs: Sequence[str]) -> Embeddings:
        raise NotImplementedError

    async def count_tokens(self, request: GenerationRequest) -> int:
        return 1


async def test_streams_deltas_then_one_result():
    async with model_server() as server:
        answer = await server.generate(request("Tell me something", max_tokens=40))
    assert len(answer.deltas) == 40 and answer.text.startswith("This is a simulated answer")
    result = answer.result
    assert result.finish_reason == generation_pb2.FINISH_REASON_LENGTH
    assert result.usage.completion_tokens == sum(delta.tokens for delta in answer.deltas) == 40
    timings = result.timings
    assert timings.HasField("ttft") and timings.HasField("tpot")
    assert timings.ttft.ToNanoseconds() <= timings.total.ToNanoseconds()


async def test_same_seed_same_answer_other_seed_other_answer():
    async with model_server() as server:
        first, again, other = [await server.generate(request(seed=seed)) for seed in (7, 7, 8)]
    assert first.text == again.text != other.text


async def test_stop_string_is_not_part_of_the_output():
    async with model_server() as server:
        answer = await server.generate(request(stop=["no model"]))
    assert answer.text == "This is a simulated answer: "
    assert answer.result.finish_reason == generation_pb2.FINISH_REASON_STOP


async def test_json_schema_tools_and_logprobs():
    asked = request("Where?")
    asked.input.response_format.json_schema.schema = json.dumps(
        {"type": "object", "required": ["city"], "properties": {"city": {"type": "string"}}}
    )
    called = request("Where?")
    called.input.tools.add(
        name="find", parameters_schema='{"type":"object","required":["n"],"properties":{"n":{"type":"integer"}}}'
    )
    called.input.tool_choice.mode = generation_pb2.TOOL_CHOICE_MODE_REQUIRED
    async with model_server() as server:
        answer = await server.generate(asked)
        assert json.loads(answer.text) == {"city": "simulated"}
        answer = await server.generate(called)
        calls = [call for delta in answer.deltas for call in delta.tool_calls]
        assert [call.name for call in calls if call.name] == ["find"]
        assert json.loads("".join(call.arguments_json for call in calls)) == {"n": 0}
        assert answer.result.finish_reason == generation_pb2.FINISH_REASON_TOOL_CALLS
        answer = await server.generate(request(logprobs=True, top_logprobs=2, max_tokens=4))
        assert [len(delta.logprobs) for delta in answer.deltas] == [1] * 4
        assert len(answer.deltas[0].logprobs[0].top) == 2


async def test_prefix_cache_is_accounted():
    long = "a sentence that repeats. " * 60
    async with model_server(engine_settings={"block_tokens": 64}) as server:
        first = await server.generate(request(long))
        again = await server.generate(request(long))
    assert first.result.usage.cached_prompt_tokens == 0
    assert again.result.usage.cached_prompt_tokens == first.result.usage.prompt_tokens // 64 * 64


async def test_count_tokens_agrees_with_generate():
    async with model_server() as server:
        asked = request("How many tokens am I?")
        counted = await server.stub.CountTokens(
            model_server_pb2.CountTokensRequest(model=asked.model, input=asked.input)
        )
        answer = await server.generate(asked)
    assert counted.prompt_tokens == answer.result.usage.prompt_tokens > 0


async def test_embed():
    async with model_server(engine_settings={"embedding_dimension": 16}) as server:
        answer = await server.stub.Embed(
            model_server_pb2.ModelServerEmbedRequest(model="simulated", inputs=["a", "b", "a"])
        )
    first, second, third = [list(embedding.values) for embedding in answer.embeddings]
    assert len(first) == 16 and first == third != second
    assert sum(value * value for value in first) == pytest.approx(1, abs=1e-5)
    assert answer.usage.prompt_tokens == 3


async def test_malformed_requests_name_the_fields():
    async with model_server() as server:
        refusal = await refused(server.generate(model_server_pb2.ModelServerGenerateRequest()))
        assert refusal.reason is Reason.INVALID_REQUEST
        assert {violation.field for violation in refusal.violations} == {"model", "input"}
        refusal = await refused(server.generate(request(temperature=3.0)))
        assert [violation.field for violation in refusal.violations] == ["input.sampling.temperature"]
        for inputs in ([], ["x"] * 2049):
            refusal = await refused(
                server.stub.Embed(model_server_pb2.ModelServerEmbedRequest(model="simulated", inputs=inputs))
            )
            assert [violation.field for violation in refusal.violations] == ["inputs"]


async def test_prompt_that_does_not_fit_is_refused():
    async with model_server(engine_settings={"context_length": 64}) as server:
        refusal = await refused(server.generate(request("x" * 1000)))
        assert refusal.reason is Reason.CONTEXT_TOO_LONG
        assert [violation.field for violation in refusal.violations] == ["input"]
        refusal = await refused(server.generate(request("x", max_tokens=64)))
        assert refusal.reason is Reason.CONTEXT_TOO_LONG


async def test_unknown_model_and_missing_feature():
    async with model_server(engine_settings={"models": [{"name": "plain", "features": ["streaming"]}]}) as server:
        refusal = await refused(server.generate(request(model="nobody")))
        assert refusal.reason is Reason.UNKNOWN_MODEL and "plain" in refusal.message
        asked = request(model="plain")
        asked.input.response_format.json.SetInParent()
        refusal = await refused(server.generate(asked))
        assert refusal.reason is Reason.UNSUPPORTED and "json" in refusal.message
        refusal = await refused(
            server.stub.Embed(model_server_pb2.ModelServerEmbedRequest(model="plain", inputs=["x"]))
        )
        assert refusal.reason is Reason.UNSUPPORTED


async def test_garbage_and_unknown_fields_do_no_harm():
    async with model_server() as server:
        raw = server.channel.unary_stream(PREFIX + "Generate")

        async def read(body: bytes) -> list[bytes]:
            return [message async for message in raw(body)]

        refusal = await refused(read(b"\xff\xff\xff garbage"))
        assert refusal.reason is Reason.INVALID_REQUEST
        unknown = b"\xfa\x3f\x03abc"  # field 1023, of which this contract knows nothing
        messages = await read(request(max_tokens=2).SerializeToString() + unknown)
        assert len(messages) == 2


async def test_cancelling_frees_the_slot():
    async with model_server(engine_settings={"slots": 1, "faults": [{**HANG, "at_request": 1}]}) as server:
        call = server.stub.Generate(request())
        await call.read()
        await server.until_load(running=1)
        call.cancel()
        await server.until_load(running=0)
        answer = await server.generate(request())
        assert answer.result is not None


async def test_deadline_stops_the_engine():
    async with model_server(engine_settings={"faults": [HANG]}) as server:
        refusal = await refused(server.generate(request(), timeout=0.2))
        assert refusal.code is grpc.StatusCode.DEADLINE_EXCEEDED
        await server.until_load(running=0)


async def test_server_maximum_where_the_caller_gives_no_deadline():
    async with model_server(engine_settings={"faults": [HANG]}, max_generation_seconds=0.1) as server:
        refusal = await refused(server.generate(request()))
        assert refusal.reason is Reason.DEADLINE_EXCEEDED and not refusal.transport


async def test_busy_when_slots_and_waiting_room_are_full():
    async with model_server(
        engine_settings={"slots": 1, "faults": [{**HANG, "at_request": 1}]}, max_waiting=1
    ) as server:
        running = server.stub.Generate(request())
        await running.read()
        waiting = asyncio.create_task(server.generate(request()))
        await server.until_load(running=1, waiting=1)
        refusal = await refused(server.generate(request()))
        assert refusal.reason is Reason.SERVER_BUSY and refusal.retry_after > 0
        running.cancel()
        assert (await waiting).result is not None


async def test_foreign_load_is_what_others_sent():
    async with model_server(engine_settings={"faults": [HANG]}) as server:
        calls = [server.stub.Generate(request(orchestrator_id=sender)) for sender in ("cp-1", "cp-1", "cp-2")]
        for call in calls:
            await call.read()
        report = await server.report()
        assert (report.load.running, report.load.foreign) == (3, 3)
        for call in calls:
            call.cancel()
        await server.until_load(running=0)


@pytest.mark.parametrize("fault", ["error", "error_after_tokens"])
async def test_engine_failure(fault: str):
    script = [{"kind": fault, "tokens": 0 if fault == "error" else 3, "at_request": 1}]
    async with model_server(engine_settings={"faults": script}) as server:
        call = server.stub.Generate(request())
        received = []
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for response in call:
                received.append(response)
        assert from_rpc_error(caught.value).reason is Reason.ENGINE_FAILED
        assert len(received) == script[0]["tokens"]
        assert (await server.generate(request())).result is not None


async def test_engine_that_loses_its_backend_is_unhealthy_for_a_while():
    script = [{"kind": "disconnect", "tokens": 1, "at_request": 1, "seconds": 0.3}]
    async with model_server(engine_settings={"faults": script}) as server:
        health = health_pb2_grpc.HealthStub(server.channel)
        states = health.Watch(health_pb2.HealthCheckRequest(service="modelyard.v1.ModelServer"))
        assert (await states.read()).status == health_pb2.HealthCheckResponse.SERVING
        assert (await refused(server.generate(request()))).reason is Reason.ENGINE_FAILED
        assert (await refused(server.generate(request()))).reason is Reason.ENGINE_FAILED
        assert (await states.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert (await states.read()).status == health_pb2.HealthCheckResponse.SERVING
        assert (await server.generate(request())).result is not None
        states.cancel()


async def test_a_bug_in_the_engine_is_internal_and_tells_nothing():
    async def answer(request):
        yield Delta("a", 1)
        raise RuntimeError("secret detail")

    engine = OddEngine(answer)
    async with model_server(engine) as server:
        refusal = await refused(server.generate(request(model="odd")))
        assert refusal.reason is Reason.INTERNAL and "secret" not in refusal.message
        assert (await server.report()).load.running == 0


async def test_an_answer_without_a_result_has_failed():
    async def answer(request):
        yield Delta("a", 1)

    async with model_server(OddEngine(answer)) as server:
        assert (await refused(server.generate(request(model="odd")))).reason is Reason.ENGINE_FAILED


async def test_slow_reader_is_cut_off():
    async def answer(request):
        while True:
            yield Delta("x" * 60_000, 1)

    engine = OddEngine(answer)
    async with model_server(engine, slow_reader_seconds=0.2) as server:
        call = server.stub.Generate(request(model="odd"))
        await call.read()
        await eventually(lambda: engine.closed_generators)
        assert (await server.report()).load.running == 0
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            while True:
                await call.read()
        assert from_rpc_error(caught.value).reason is Reason.SLOW_READER


async def test_starting_server_describes_itself_and_refuses_work():
    hearer_port = free_port()
    async with model_server(
        engine_settings={"instant": False, "start_seconds": 60}, port=hearer_port, wait_ready=False
    ) as server:
        await eventually(lambda: _describes(server))
        assert (await server.report()).health == fleet_pb2.SERVER_HEALTH_STARTING
        assert (await refused(server.generate(request()))).reason is Reason.SERVER_BUSY
        health = health_pb2_grpc.HealthStub(server.channel)
        alive = await health.Check(health_pb2.HealthCheckRequest())
        ready = await health.Check(health_pb2.HealthCheckRequest(service="modelyard.v1.ModelServer"))
        assert alive.status == health_pb2.HealthCheckResponse.SERVING
        assert ready.status == health_pb2.HealthCheckResponse.NOT_SERVING


async def test_stopping_lets_running_requests_end():
    settings = {
        "instant": False,
        "decode_tokens_per_second": 400,
        "aggregate_tokens_per_second": 0,
        "answer_tokens": 200,
    }
    async with model_server(engine_settings=settings) as server:
        running = asyncio.create_task(server.generate(request()))
        await server.until_load(running=1)
        server.stopping.set()
        answer = await running
        assert answer.result.usage.completion_tokens == 200
        assert await server.task == 0


async def test_stopping_refuses_new_requests_while_others_run():
    async with model_server(engine_settings={"faults": [HANG]}, drain_grace=0.5) as server:
        running = server.stub.Generate(request())
        await running.read()
        server.stopping.set()

        async def drains() -> bool:
            return (await server.report()).state == fleet_pb2.DESIRED_STATE_DRAIN

        await eventually(drains)
        assert (await refused(server.generate(request()))).reason is Reason.DRAINING
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            while await running.read():
                pass
        # The grace is over: the engine was closed under it.
        assert from_rpc_error(caught.value).reason is Reason.ENGINE_FAILED
        assert await server.task == 0


async def test_what_the_engine_expects_is_told_until_something_is_measured():
    speeds = {"instant": False, "prefill_tokens_per_second": 1e6, "decode_tokens_per_second": 1e4}
    async with model_server(engine_settings=speeds) as server:
        fresh = (await server.report()).models[0].performance
        assert (fresh.ttft.ToMicroseconds(), fresh.tpot.ToMicroseconds()) == (100, 100)
        await server.generate(request())
        measured = (await server.report()).models[0].performance
        assert measured.ttft.ToMicroseconds() > 100


async def test_finished_requests_show_in_the_performance():
    async with model_server() as server:
        await server.generate(request("word " * 200))
        performance = (await server.report()).models[0].performance
    assert performance.HasField("ttft") and performance.HasField("tpot")
    assert performance.prefill_tokens_per_second > 0 and performance.decode_tokens_per_second > 0


async def test_engine_that_does_not_start_ends_the_server():
    async with model_server(
        engine_settings={"faults": [{"kind": "refuse_start"}]}, port=free_port(), wait_ready=False
    ) as server:
        assert await server.task == 1


async def test_batch_of_requests_shares_the_engine():
    async with model_server(engine_settings={"slots": 2}) as server:
        answers = await asyncio.gather(*(server.generate(request(f"prompt {n}")) for n in range(6)))
    assert all(answer.result for answer in answers)


async def _describes(server) -> bool:
    try:
        await server.report()
    except grpc.aio.AioRpcError:
        return False
    return True


async def test_requests_cancelled_at_any_moment_leave_nothing_behind():
    settings = {"instant": False, "slots": 2, "time_scale": 0.01, "prefill_tokens_per_second": 100}
    async with model_server(engine_settings=settings, max_waiting=1000) as server:
        draw = random.Random(1)

        async def impatient() -> None:
            call = server.stub.Generate(request())
            await asyncio.sleep(draw.uniform(0, 0.1))
            call.cancel()

        await asyncio.gather(*(impatient() for _ in range(200)))
        await server.until_load(running=0)
        assert (await server.generate(request())).result is not None


async def test_scripted_crash_ends_the_process():
    faults = json.dumps({"instant": True, "faults": [{"kind": "crash", "tokens": 2}]})
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "model_servers", "--orchestrators", "[]", "--engine-settings", faults, stdout=PIPE
    )
    try:
        address = json.loads(await process.stdout.readline())["address"]
        async with channel(address) as connection:
            stub = model_server_pb2_grpc.ModelServerStub(connection)
            with pytest.raises(grpc.aio.AioRpcError):
                async for _ in stub.Generate(request()):
                    pass
        assert await process.wait() == CRASH_STATUS
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def test_a_port_in_use_says_what_to_do():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "model_servers", "--port", str(port), "--orchestrators", "[]", stderr=PIPE
        )
        _, errors = await asyncio.wait_for(process.communicate(), 60)
    # As the control plane: settings that cannot be used, and no line of gRPC's own.
    assert process.returncode == 2
    lines = errors.decode().splitlines()
    assert lines[-1].startswith(f"modelyard model-server: 127.0.0.1:{port} is in use")
    assert "add_port" not in errors.decode() and "Traceback" not in errors.decode()
