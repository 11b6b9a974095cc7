from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Coroutine
from datetime import UTC, datetime
from typing import Any

import grpc
import pytest

from modelyard.client import (
    AsyncClient,
    Cancelled,
    ConnectionFailed,
    ConnectionPool,
    DeadlineExceeded,
    Decision,
    Delta,
    FieldViolation,
    FleetWarmingUp,
    GenerationStream,
    InternalError,
    InvalidRequest,
    ModelProgress,
    ModelyardError,
    OutOfMemory,
    QueueFull,
    StreamBroken,
    ToolCall,
    UnknownModel,
    UnknownServer,
    Unsupported,
)
from modelyard.client._errors import BY_REASON
from modelyard.rpc.errors import Refusal, Violation
from modelyard.rpc.reasons import Reason
from modelyard.testing import FakeModelServer, FakeOrchestrator, model_info
from modelyard.v1 import fleet_pb2, generation_pb2, orchestrator_pb2, selection_pb2


@pytest.fixture
async def fake():
    async with FakeOrchestrator() as orchestrator:
        yield orchestrator


@pytest.fixture
async def client(fake: FakeOrchestrator):
    async with AsyncClient(fake.address) as made:
        yield made


# --------------------------------------------------------------- generating ---


async def test_generate(fake: FakeOrchestrator, client: AsyncClient) -> None:
    fake.summary.timings.ttft.FromMilliseconds(250)
    fake.summary.cost_nano_usd = 1_500_000
    fake.summary.attempts[0].started_at.FromDatetime(datetime(2025, 1, 2, tzinfo=UTC))
    result = await client.generate("hi", request_id="me", max_tokens=5)
    assert (result.text, result.finish_reason, result.request_id) == ("Hello, world", "stop", "me")
    assert (result.server_id, result.model, result.provider) == ("fake-1", "fake", "fake")
    assert (result.usage.prompt_tokens, result.usage.completion_tokens) == (3, 3)
    assert (result.timings.ttft, result.timings.tpot, result.cost_usd) == (0.25, None, 0.0015)
    assert result.attempts[0].started_at == datetime(2025, 1, 2, tzinfo=UTC)
    assert result.message.content == "Hello, world"
    assert json.loads(json.dumps(result.to_dict()))["attempts"][0]["started_at"] == "2025-01-02T00:00:00+00:00"
    assert fake.calls[0].request.input.sampling.max_tokens == 5


async def test_stream_events_and_result(fake: FakeOrchestrator, client: AsyncClient) -> None:
    async with client.stream("hi", explain=True) as stream:
        with pytest.raises(RuntimeError, match="not been read"):
            _ = stream.result
        events = [event async for event in stream]
    assert isinstance(events[0], Decision)
    assert [event.text for event in events[1:] if isinstance(event, Delta)] == ["Hello", ", ", "world"]
    assert stream.result.text == "Hello, world"
    assert stream.result.decisions == (events[0],)
    assert [event async for event in stream] == []
    await fake.until(lambda: fake.calls[0].outcome == "ok")


async def test_deltas_leaves_decisions_out(client: AsyncClient) -> None:
    assert [delta.text async for delta in client.stream("hi", explain=True).deltas()] == ["Hello", ", ", "world"]


async def test_tool_calls_logprobs_and_reasoning_are_put_together(fake: FakeOrchestrator, client: AsyncClient) -> None:
    fake.answer(
        generation_pb2.GenerationDelta(reasoning_text="hm "),
        generation_pb2.GenerationDelta(
            reasoning_text="ok",
            tool_calls=[{"index": 1, "id": "b", "name": "g"}, {"index": 0, "id": "a", "name": "f"}],
            logprobs=[{"token": "x", "logprob": -0.5, "top": [{"token": "y", "logprob": -1}]}],
        ),
        generation_pb2.GenerationDelta(tool_calls=[{"index": 0, "arguments_json": '{"n"'}]),
        generation_pb2.GenerationDelta(tool_calls=[{"index": 0, "arguments_json": ": 1}"}]),
    )
    fake.summary.finish_reason = generation_pb2.FINISH_REASON_TOOL_CALLS
    result = await client.generate("hi")
    assert result.tool_calls == (ToolCall("a", "f", '{"n": 1}'), ToolCall("b", "g", ""))
    assert (result.tool_calls[0].arguments, result.tool_calls[1].arguments) == ({"n": 1}, {})
    assert (result.reasoning_text, result.finish_reason) == ("hm ok", "tool_calls")
    assert result.logprobs[0].top[0].token == "y"


async def test_embed(client: AsyncClient) -> None:
    result = await client.embed(["a", "bcd"])
    assert result.vectors == ((1.0, 1.0), (3.0, 1.0))
    assert result.usage.prompt_tokens == 2


async def test_explain(fake: FakeOrchestrator, client: AsyncClient) -> None:
    fake.decision = selection_pb2.Decision(
        verdict=selection_pb2.VERDICT_IMPOSSIBLE,
        candidates=[
            {
                "server_id": "s",
                "score": 0.5,
                "parts": [{"scorer": "cost", "value": 1, "weight": 2}],
                "rejections": [{"reason": 5, "detail": "too long", "permanent": True}],
            }
        ],
        summary="no",
    )
    decision = await client.explain("hi", model="m")
    assert (decision.verdict, decision.summary, decision.estimated_prompt_tokens) == ("impossible", "no", 3)
    assert decision.candidates[0].rejections[0].reason == "context_too_short"
    assert decision.candidates[0].parts[0].weight == 2
    assert fake.calls[0].request.request.requirements.model == "m"


# ------------------------------------------------------------------ leaving ---


async def ended(fake: FakeOrchestrator) -> None:
    await fake.until(lambda: all(call.outcome != "running" for call in fake.calls))
    assert fake.calls[-1].outcome == "cancelled"


async def test_breaking_out_of_the_loop_stops_the_model(fake: FakeOrchestrator, client: AsyncClient) -> None:
    fake.answer("a", asyncio.Event())
    async for _ in client.stream("hi"):
        break
    await ended(fake)


async def test_leaving_deltas_stops_the_model(fake: FakeOrchestrator, client: AsyncClient) -> None:
    fake.answer("a", asyncio.Event())
    deltas = client.stream("hi").deltas()
    await anext(deltas)
    await deltas.aclose()
    await ended(fake)


async def test_leaving_the_with_block_stops_the_model(fake: FakeOrchestrator, client: AsyncClient) -> None:
    fake.answer("a", asyncio.Event())
    async with client.stream("hi") as stream:
        assert await anext(stream)
    await ended(fake)
    assert stream.partial and stream.partial.text == "a"


async def test_cancel_tells_the_reader(fake: FakeOrchestrator, client: AsyncClient) -> None:
    fake.answer("a", asyncio.Event())
    stream = client.stream("hi")
    reading = asyncio.create_task(stream.collect())
    await fake.until(lambda: bool(fake.calls))
    while stream.partial is None:
        await asyncio.sleep(0)
    stream.cancel()
    with pytest.raises(Cancelled) as caught:
        await reading
    assert caught.value.partial and caught.value.partial.text == "a"
    await ended(fake)


async def test_cancelling_the_task_is_no_modelyard_error(fake: FakeOrchestrator, client: AsyncClient) -> None:
    fake.answer("a", asyncio.Event())
    reading = asyncio.create_task(client.generate("hi"))
    await fake.until(lambda: bool(fake.calls))
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    await ended(fake)


async def test_cancel_before_the_start(fake: FakeOrchestrator, client: AsyncClient) -> None:
    stream = client.stream("hi")
    stream.cancel()
    with pytest.raises(Cancelled):
        await anext(stream)
    assert not fake.calls


async def test_closing_the_client_tells_its_readers(fake: FakeOrchestrator) -> None:
    fake.answer("a", asyncio.Event())
    gate = fake.gate("ListModels")
    async with AsyncClient(fake.address) as client:
        stream = client.stream("hi")
        await anext(stream)
        tasks = [asyncio.create_task(anext(stream)), asyncio.create_task(client.models())]
        watching = asyncio.create_task(anext(aiter(client.watch_fleet())))
        assert (await watching).snapshot
        await gate.arrived.wait()
    for outcome in await asyncio.gather(*tasks, return_exceptions=True):
        assert isinstance(outcome, Cancelled)
    with pytest.raises(RuntimeError, match="closed"):
        await client.models()
    await client.close()


# ------------------------------------------------------------------ failing ---


@pytest.mark.parametrize("reason", Reason)
async def test_every_reason_is_its_exception(fake: FakeOrchestrator, client: AsyncClient, reason: Reason) -> None:
    refusal = Refusal(reason, "why", [Violation("f", "d")], retry_after=2, metadata={"k": "v"})
    fake.inject_error("Complete", refusal)
    fake.inject_error("ListModels", refusal)
    for call in (client.generate("hi", request_id="me"), client.models()):
        with pytest.raises(ModelyardError) as caught:
            await call
        error = caught.value
        assert type(error) is BY_REASON[reason]
        assert (error.reason, error.message, str(error)) == (reason.value, "why", "why")
        assert (error.retry_after, error.metadata["k"]) == (2, "v")
        assert error.violations == (FieldViolation("f", "d"),)
        assert error.partial is None
        assert json.dumps(error.to_dict())


async def test_request_id_of_a_failure_is_the_control_planes(fake: FakeOrchestrator, client: AsyncClient) -> None:
    fake.inject_error("Complete", Refusal(Reason.INTERNAL, "bug"))
    with pytest.raises(InternalError) as caught:
        await client.generate("hi")
    assert caught.value.request_id == "fake-0"


async def read(stream: GenerationStream) -> list[Any]:
    return [chunk async for chunk in stream]


async def test_request_id_of_a_failure_that_is_there_before_it_is_waited_for() -> None:
    """gRPC learns the status of a stream before it asks for its initial metadata, and has none then."""
    loop, served = asyncio.new_event_loop(), FakeOrchestrator()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def there(work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, loop).result(10)

    there(served.start())
    try:
        async with AsyncClient(served.address) as client:
            await client.generate("connected")
            for number in range(1, 11):
                served.inject_error("Generate", Refusal(Reason.INTERNAL, "bug"))
                asking = asyncio.create_task(read(client.stream("hi")))
                while len(served.calls) <= number:
                    await asyncio.sleep(0)
                time.sleep(0.01)  # this loop is busy, the answer comes meanwhile
                with pytest.raises(InternalError) as caught:
                    await asking
                assert caught.value.request_id == f"fake-{number}"
    finally:
        there(served.stop())
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def test_answer_that_breaks_off_keeps_what_came(fake: FakeOrchestrator, client: AsyncClient) -> None:
    fake.answer("a", "b", Refusal(Reason.STREAM_BROKEN, "died"))
    with pytest.raises(StreamBroken) as caught:
        await client.stream("hi", request_id="me", retries=5).collect()
    assert caught.value.partial and caught.value.partial.text == "ab"
    assert caught.value.partial.finish_reason == ""
    assert len(fake.calls) == 1


async def test_stream_without_a_summary_has_failed(fake: FakeOrchestrator, client: AsyncClient) -> None:
    fake.answer("a", summary=False)
    with pytest.raises(StreamBroken, match="without a summary") as caught:
        await client.stream("hi").collect()
    assert caught.value.partial and caught.value.partial.text == "a"
    with pytest.raises(StreamBroken, match="without a summary"):
        await client.generate("hi")


async def test_control_plane_that_dies_mid_answer(fake: FakeOrchestrator, client: AsyncClient) -> None:
    fake.answer("a", asyncio.Event())
    stream = client.stream("hi")
    await anext(stream)
    await fake.stop()
    with pytest.raises(StreamBroken) as caught:
        await anext(stream)
    assert caught.value.partial and caught.value.partial.text == "a"


async def test_nobody_answers() -> None:
    async with FakeOrchestrator() as fake:
        address = fake.address
    async with AsyncClient(address) as client:
        for call in (client.generate("hi"), client.models(), client.health(), anext(client.watch_fleet())):
            with pytest.raises(ConnectionFailed, match=rf"no control plane answers at {address} .*modelyard up"):
                await call


async def test_reconnects_when_it_is_back() -> None:
    async with FakeOrchestrator() as fake, AsyncClient(fake.address, retries=20) as client:
        await client.models()
        await fake.stop()
        with pytest.raises(ConnectionFailed):
            await client.generate("hi", retries=0)
        await fake.start(fake.port)
        assert (await client.generate("hi")).text == "Hello, world"


async def test_something_else_answers() -> None:
    async with FakeModelServer() as server, AsyncClient(server.address) as client:
        with pytest.raises(Unsupported, match="not a modelyard control plane"):
            await client.models()
        assert await client.health() == type(await client.health())(alive=True, serving=False)


async def test_timeout_reaches_the_server_and_ends_the_call(fake: FakeOrchestrator, client: AsyncClient) -> None:
    fake.answer("a", asyncio.Event())
    with pytest.raises(DeadlineExceeded) as caught:
        await client.stream("hi", timeout=0.2).collect()
    assert caught.value.partial and caught.value.partial.text == "a"
    assert 0 < (fake.calls[0].time_remaining or 0) < 0.5
    fake.answer("a")
    await client.generate("hi", timeout=float("inf"))
    assert fake.calls[1].time_remaining is None
    fake.answer("a", asyncio.Event())
    with pytest.raises(DeadlineExceeded) as whole:
        await client.generate("hi", timeout=0.2)
    assert whole.value.partial is None and fake.calls[2].method == "Complete"
    await fake.until(lambda: fake.calls[2].outcome == "cancelled")


async def test_timeout_of_the_client_is_the_default(fake: FakeOrchestrator) -> None:
    async with AsyncClient(fake.address, timeout=30) as client:
        await client.models()
        await client.models(timeout=10)
    assert 11 < (fake.calls[0].time_remaining or 0) < 32
    assert 0 < (fake.calls[1].time_remaining or 0) < 11  # gRPC rounds


# ----------------------------------------------------------------- retrying ---


async def test_retries_what_was_never_started(fake: FakeOrchestrator, client: AsyncClient) -> None:
    for method in ("Complete", "Embed"):
        fake.inject_error(method, Refusal(Reason.FLEET_WARMING_UP, "wait", retry_after=0.01), 2)
    assert (await client.generate("hi", retries=2)).text == "Hello, world"
    assert (await client.embed("hi", retries=2)).vectors
    assert [call.outcome for call in fake.calls] == ["FLEET_WARMING_UP", "FLEET_WARMING_UP", "ok"] * 2


async def test_gives_up_after_its_retries(fake: FakeOrchestrator, client: AsyncClient) -> None:
    fake.inject_error("Complete", Refusal(Reason.QUEUE_FULL, "full", retry_after=0.01), 5)
    with pytest.raises(QueueFull):
        await client.generate("hi", retries=2)
    assert len(fake.calls) == 3
    with pytest.raises(QueueFull):
        await client.generate("hi")
    assert len(fake.calls) == 4


async def test_never_waits_beyond_the_timeout(fake: FakeOrchestrator, client: AsyncClient) -> None:
    fake.inject_error("Complete", Refusal(Reason.FLEET_WARMING_UP, "wait", retry_after=60))
    with pytest.raises(FleetWarmingUp):
        await client.generate("hi", retries=1, timeout=5)


async def test_never_retries_a_wrong_request(fake: FakeOrchestrator, client: AsyncClient) -> None:
    fake.inject_error("Complete", Refusal(Reason.INVALID_REQUEST, "no"))
    with pytest.raises(InvalidRequest):
        await client.generate("hi", retries=5)
    assert len(fake.calls) == 1


# ------------------------------------------------------------- whole answers ---


class Older(FakeOrchestrator):
    """Knows no Complete, and answers as gRPC itself does."""

    asked = 0

    async def Complete(self, request, context):
        self.asked += 1
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")


async def test_a_whole_answer_is_that_of_the_stream(fake: FakeOrchestrator, client: AsyncClient) -> None:
    call = generation_pb2.ToolCallDelta(index=0, id="c1", name="add", arguments_json='{"a":')
    rest = generation_pb2.ToolCallDelta(index=0, arguments_json="1}")
    fake.answer(
        generation_pb2.GenerationDelta(reasoning_text="Hm. ", tokens=1),
        "Hel",
        "lo",
        generation_pb2.GenerationDelta(tool_calls=[call], tokens=1),
        generation_pb2.GenerationDelta(tool_calls=[rest], tokens=1),
    )
    asked = {"request_id": "me", "explain": True, "max_tokens": 9, "preset": "p"}
    whole = await client.generate("hi", **asked)  # type: ignore[arg-type]
    streamed = await client.stream("hi", **asked).collect()  # type: ignore[arg-type]
    assert whole == streamed
    assert whole.text == "Hello" and whole.tool_calls[0].arguments_json == '{"a":1}' and whole.decisions
    assert [call.method for call in fake.calls] == ["Complete", "Generate"]
    sent = [call.request.SerializeToString(deterministic=True) for call in fake.calls]
    assert sent[0] == sent[1]


async def test_an_older_control_plane_is_asked_by_stream_and_remembered() -> None:
    async with Older() as fake, AsyncClient(fake.address, timeout=10) as client:
        for _ in range(3):
            assert (await client.generate("hi")).text == "Hello, world"
        assert fake.asked == 1
        assert [call.method for call in fake.calls] == ["Generate"] * 3
        assert all(0 < (call.time_remaining or 0) < 12 for call in fake.calls)


async def test_log_probabilities_come_in_a_stream(fake: FakeOrchestrator, client: AsyncClient) -> None:
    assert (await client.generate("hi", logprobs=True)).text == "Hello, world"
    assert [call.method for call in fake.calls] == ["Generate"]


async def test_a_control_plane_that_dies_is_asked_again_where_that_is_wished(fake: FakeOrchestrator) -> None:
    async with AsyncClient(fake.address, retries=20) as client:
        gate = fake.gate("Complete")
        asking = asyncio.create_task(client.generate("hi"))
        await gate.arrived.wait()
        await fake.stop()
        gate.open()
        await fake.start(fake.port)
        assert (await asking).text == "Hello, world"


@pytest.mark.parametrize("kind", [FakeOrchestrator, Older])
async def test_messages_that_grpc_refuses_are_told_in_our_words(kind: type[FakeOrchestrator]) -> None:
    async with kind() as fake, AsyncClient(fake.address) as client:
        for size in (10 << 20, 65 << 20):  # more than the control plane takes, more than one message may have
            for call in (client.generate("x" * size), client.stream("x" * size).collect(), client.embed("x" * size)):
                with pytest.raises(InvalidRequest) as caught:
                    await call
                said = str(caught.value)
                assert "larger than max" not in said and f"{size:,}"[:3] in said
                assert ("limits.max_request_bytes" in said) == (size == 10 << 20), said


# -------------------------------------------------------------------- fleet ---


def status(server_id: str = "s1") -> fleet_pb2.ModelServerStatus:
    server = FakeModelServer(server_id)
    made = fleet_pb2.ModelServerStatus(report=server.report(), lease_state=fleet_pb2.LEASE_STATE_LIVE, in_flight=2)
    made.models.add(model="fake", success_rate=0.5, requests=4, failures=2, breaker=fleet_pb2.BREAKER_STATE_OPEN)
    made.attached_at.FromSeconds(1_700_000_000)
    return made


async def test_servers_models_and_drain(fake: FakeOrchestrator, client: AsyncClient) -> None:
    fake.servers = [status()]
    fake.models = [
        fleet_pb2.Model(
            name="m",
            providers=["p"],
            placements=[{"server_id": "s1", "lease_state": 1, "info": model_info("m", "p")}],
            features=[3],
            capabilities=[{"task_type": 1, "score": 0.5}],
        )
    ]
    (server,) = await client.servers()
    assert (server.server_id, server.lease_state, server.health, server.in_flight) == ("s1", "live", "ready", 2)
    assert server.attached_at and server.attached_at.tzinfo is UTC
    assert server.reported_at is None
    (served,) = server.models
    assert served.runtime and (served.runtime.breaker, served.runtime.ttft) == ("open", None)
    assert served.capabilities["chat"] == 0.5
    assert json.dumps(server.to_dict())
    (model,) = await client.models()
    assert await client.model("m") == model
    assert (model.features, model.placements[0].info.name) == (("vision",), "m")
    with pytest.raises(UnknownModel):
        await client.model("x")
    assert (await client.drain("s1")).lease_state == "draining"
    assert (await client.drain("s1", undo=True)).lease_state == "live"
    with pytest.raises(UnknownServer):
        await client.drain("x")


async def test_watch_fleet(fake: FakeOrchestrator, client: AsyncClient) -> None:
    fake.servers = [status()]
    changes = client.watch_fleet()
    first = await anext(changes)
    assert first.snapshot and first.servers[0].server_id == "s1"
    fake.publish(orchestrator_pb2.WatchFleetResponse(removed_server_ids=["s1"]))
    second = await anext(changes)
    assert (second.snapshot, second.removed_server_ids) == (False, ("s1",))
    await changes.aclose()
    await ended(fake)


async def test_state_memory_and_pool(fake: FakeOrchestrator, client: AsyncClient) -> None:
    plain, rich = status("a"), status("b")
    life = {"state": fleet_pb2.MODEL_STATE_PULLING, "state_detail": "40 %", "memory_bytes": 5, "fingerprint": "x"}
    rich.report.models[0].MergeFrom(fleet_pb2.ModelInfo(**life, load_time={"seconds": 2, "nanos": 500_000_000}))
    rich.report.hardware.memory_used_bytes = 7
    rich.report.engine.manages_models = True
    rich.report.pool.MergeFrom(fleet_pb2.ConnectionPool(size=8, in_use=1, opened=1, reused=3))
    fake.servers = [plain, rich]
    before, after = await client.servers()
    assert (before.memory_used_bytes, before.manages_models, before.pool) == (0, False, None)
    model = before.models[0]
    assert (model.state, model.state_detail, model.memory_bytes, model.load_time) == ("warm", "", 0, None)
    assert (after.memory_used_bytes, after.manages_models) == (7, True)
    assert after.pool == ConnectionPool(size=8, in_use=1, opened=1, reused=3, hit_rate=0.75)
    model = after.models[0]
    assert (model.state, model.state_detail, model.memory_bytes, model.load_time) == ("pulling", "40 %", 5, 2.5)
    assert model.fingerprint == "x"
    assert after.to_dict()["pool"]["hit_rate"] == 0.75
    rich.report.pool.Clear()
    rich.report.pool.SetInParent()
    (_, idle) = await client.servers()
    assert idle.pool and idle.pool.hit_rate is None


async def test_the_estimated_cost_of_a_candidate(fake: FakeOrchestrator, client: AsyncClient) -> None:
    fake.decision.candidates.add(server_id="s", estimated_cost_nano_usd=1_500_000)
    assert (await client.explain("hi")).candidates[0].estimated_cost_usd == 0.0015


# ------------------------------------------------------------------- orders ---


def step(state: fleet_pb2.ModelState, done: int = 0, total: int = 0) -> fleet_pb2.ModelProgress:
    return fleet_pb2.ModelProgress(state=state, detail="layer", completed_bytes=done, total_bytes=total)


PULLING, COLD = fleet_pb2.MODEL_STATE_PULLING, fleet_pb2.MODEL_STATE_COLD


async def test_orders_tell_every_step(fake: FakeOrchestrator, client: AsyncClient) -> None:
    fake.steps = (step(PULLING, 1, 2), step(COLD, 2, 2))
    assert [each async for each in client.pull_model("m", server_id="s1")] == [
        ModelProgress("s1", "pulling", "layer", 1, 2),
        ModelProgress("s1", "cold", "layer", 2, 2),
    ]
    fake.steps = ()
    assert [each.state async for each in client.load_model("m")] == ["warm"]
    assert [each.state async for each in client.unload_model("m")] == ["cold"]
    asked = [(call.method, call.request.model, call.request.server_id) for call in fake.calls]
    assert asked == [("PullModel", "m", "s1"), ("LoadModel", "m", ""), ("UnloadModel", "m", "")]


async def test_leaving_an_order_stops_it(fake: FakeOrchestrator, client: AsyncClient) -> None:
    fake.steps = (step(PULLING), asyncio.Event())
    steps = client.pull_model("m")
    assert (await anext(steps)).state == "pulling"
    await steps.aclose()
    await ended(fake)
    task = asyncio.create_task(anext(steps := client.load_model("m")))
    await task
    waiting = asyncio.create_task(anext(steps))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await ended(fake)


async def test_orders_fail_with_their_reason(fake: FakeOrchestrator, client: AsyncClient) -> None:
    fake.steps = (step(PULLING), Refusal(Reason.OUT_OF_MEMORY, "too large", retry_after=2))
    with pytest.raises(OutOfMemory) as caught:
        [each async for each in client.load_model("m")]
    assert caught.value.retry_after == 2
    for reason in Reason:
        fake.inject_error("UnloadModel", Refusal(reason, "why"))
        with pytest.raises(BY_REASON[reason]):
            await anext(client.unload_model("m"))


async def test_an_order_has_only_the_time_it_is_given(fake: FakeOrchestrator) -> None:
    async with AsyncClient(fake.address, timeout=5) as client:
        assert [each async for each in client.load_model("m")]
        assert fake.calls[0].time_remaining is None
        fake.steps = (asyncio.Event(),)
        with pytest.raises(DeadlineExceeded):
            await anext(client.load_model("m", timeout=0.2))


async def test_an_order_whose_control_plane_dies(fake: FakeOrchestrator, client: AsyncClient) -> None:
    fake.steps = (step(PULLING), asyncio.Event())
    steps = client.pull_model("m")
    await anext(steps)
    await fake.stop()
    with pytest.raises(StreamBroken):
        await anext(steps)


async def test_health(fake: FakeOrchestrator, client: AsyncClient) -> None:
    health = await client.health()
    assert (health.alive, health.serving) == (True, True)
    await fake.health.set_serving(fake.service.full_name, False)
    health = await client.health()
    assert (health.alive, health.serving) == (True, False)


# ------------------------------------------------------------------- client ---


async def test_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MODELYARD_ADDRESS", raising=False)
    assert AsyncClient().address == "127.0.0.1:7460"
    monkeypatch.setenv("MODELYARD_ADDRESS", "host:1")
    assert AsyncClient().address == "host:1"
    assert AsyncClient("other:2").address == "other:2"


def test_made_outside_a_loop_and_bound_to_one() -> None:
    client = AsyncClient("127.0.0.1:1")

    async def use() -> None:
        with pytest.raises(ConnectionFailed):
            await client.models(timeout=5)

    async def use_elsewhere() -> None:
        with pytest.raises(RuntimeError, match="one per loop"):
            await client.models()

    async def both() -> None:
        await use()
        await asyncio.to_thread(asyncio.run, use_elsewhere())
        await client.close()

    asyncio.run(both())


async def test_wrong_arguments_fail_before_anything_is_sent(fake: FakeOrchestrator, client: AsyncClient) -> None:
    with pytest.raises(ValueError, match="unknown task type"):
        client.stream("hi", task_type="x")
    with pytest.raises(TypeError):
        await client.generate("hi", temprature=1)  # type: ignore[call-arg]
    assert not fake.calls


# --------------------------------------------------- messages that do not parse ---


class Garbled(FakeOrchestrator):
    """Answers with bytes that are no message, as a control plane relays them unread from a careless server."""

    GARBAGE = b"\x12\x02\xff\xff"
    before = 0
    """Good deltas before the bad one."""

    async def Generate(self, request, context):
        for _ in range(self.before):
            yield orchestrator_pb2.GenerateResponse(delta=generation_pb2.GenerationDelta(text="good ", tokens=1))
        yield self.GARBAGE
        yield orchestrator_pb2.GenerateResponse(summary=self.summary)

    async def Complete(self, request, context):
        return self.GARBAGE

    async def Embed(self, request, context):
        return b"\x0a\x02\xff\xff"

    async def ListModels(self, request, context):
        return b"\x0a\x02\xff\xff"

    async def WatchFleet(self, request, context):
        yield b"\x12\x02\xff\xff"


async def test_an_answer_that_does_not_parse_is_a_typed_failure() -> None:
    async with Garbled() as fake, AsyncClient(fake.address) as client:
        with pytest.raises(InternalError, match="does not parse") as first:
            await client.stream("hi").collect()
        assert first.value.partial is None
        fake.before = 2
        with pytest.raises(StreamBroken, match="does not parse") as broken:
            await client.stream("hi").collect()
        assert broken.value.partial is not None
        assert broken.value.partial.text == "good good "
        for call in (client.generate("hi"), client.embed("abc"), client.models(), anext(client.watch_fleet())):
            with pytest.raises(InternalError, match="does not parse"):
                await call
