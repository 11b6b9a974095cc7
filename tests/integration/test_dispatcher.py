"""Durable tasks on real servers: every task ends, each once, whatever happens to servers, store and control plane."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from pathlib import Path

import pytest

from control_plane.domain.errors import DomainError
from control_plane.tasks.model import TaskState
from modelyard.rpc.errors import Refusal
from modelyard.rpc.reasons import Reason
from modelyard.testing import FakeModelServer
from modelyard.testing.model_server import model_info
from modelyard.v1 import generation_pb2, task_pb2
from modelyard.v1 import task_queue_pb2 as pb
from tests.harness.front_door import PATIENCE, ask, attached, client
from tests.harness.model_servers import model_server
from tests.harness.postgres import Postgres
from tests.harness.programs import control_plane, until
from tests.harness.tasks import Desk, desk, events, tried

FIRST, SECOND = "a-first", "b-second"
LOW, NORMAL, HIGH = task_pb2.TASK_PRIORITY_LOW, task_pb2.TASK_PRIORITY_NORMAL, task_pb2.TASK_PRIORITY_HIGH
QUEUED, SCHEDULED, RUNNING = pb.TASK_STATE_QUEUED, pb.TASK_STATE_SCHEDULED, pb.TASK_STATE_RUNNING
SUCCEEDED, FAILED = pb.TASK_STATE_SUCCEEDED, pb.TASK_STATE_FAILED
CANCELLED, EXPIRED = pb.TASK_STATE_CANCELLED, pb.TASK_STATE_EXPIRED

SLOW = {"instant": False, "decode_tokens_per_second": 20, "answer_tokens": 100_000, "context_length": 200_000}


def pair(slots: int = 4) -> tuple[FakeModelServer, FakeModelServer]:
    return FakeModelServer(FIRST, slots=slots), FakeModelServer(SECOND, slots=slots)


def prompts(*fakes: FakeModelServer) -> list[str]:
    """What was asked, in the order in which it came."""
    calls = [call for fake in fakes for call in fake.calls if call.method in ("Complete", "Generate")]
    return [call.request.input.messages[-1].content[0].text for call in calls]


def failure(reason: Reason = Reason.ENGINE_FAILED, **more: object) -> Refusal:
    return Refusal(reason, "it broke", **more)  # type: ignore[arg-type]


# ------------------------------------------------------------------ running ---


async def test_a_task_becomes_a_result(tmp_path: Path) -> None:
    tool = generation_pb2.GenerationDelta(
        tool_calls=[generation_pb2.ToolCallDelta(index=0, id="1", name="f", arguments_json='{"a":')]
    )
    more = generation_pb2.GenerationDelta(tool_calls=[generation_pb2.ToolCallDelta(index=0, arguments_json=" 1}")])
    thought = generation_pb2.GenerationDelta(reasoning_text="hm", tokens=1)
    price = model_info().price
    price.completion_usd_per_million_tokens = 2.0
    async with (
        desk(tmp_path) as tasks,
        attached(tasks.door, FakeModelServer(FIRST, [model_info(price=price)])) as (fake,),
    ):
        fake.answer(thought, "Hello", ", world", tool, more)
        task = await tasks.until(await tasks.submit("What?", max_tokens=9))
        assert task.state == SUCCEEDED and tried(task) == [(FIRST, "")]
        assert events(task) == ["SUBMITTED", "SCHEDULED", "RUNNING", "SUCCEEDED"]
        result = task.result
        assert (result.text, result.reasoning_text) == ("Hello, world", "hm")
        assert [(call.id, call.name, call.arguments_json) for call in result.tool_calls] == [("1", "f", '{"a": 1}')]
        summary = result.summary
        assert (summary.server_id, summary.model, summary.provider) == (FIRST, "fake", "fake")
        assert summary.usage.completion_tokens == 3 and summary.cost_nano_usd == 6000
        assert task.attempts[0].cost_nano_usd == 6000
        assert summary.timings.HasField("ttft")
        assert summary.timings.total.ToNanoseconds() >= summary.timings.ttft.ToNanoseconds()
        request = fake.calls_of("Complete")[0].request
        assert request.input.sampling.max_tokens == 9 and request.request_id == summary.request_id
        await tasks.door.until_idle()
        learned = (await tasks.door.server(FIRST)).models[0]
        assert (learned.requests, learned.failures) == (1, 0)


async def test_the_preset_of_the_moment_holds(tmp_path: Path) -> None:
    async with desk(tmp_path) as tasks, attached(tasks.door, FakeModelServer(FIRST)) as (fake,):
        await tasks.until(await tasks.submit("What?", preset="critic"))
        roles = [message.role for message in fake.calls_of("Complete")[0].request.input.messages]
        assert roles == [generation_pb2.ROLE_SYSTEM, generation_pb2.ROLE_USER]


async def test_two_hundred_tasks_end_each_once(tmp_path: Path) -> None:
    engine = {"slots": 8, "answer_tokens": 3}
    async with (
        desk(tmp_path) as tasks,
        model_server(server_id="one", orchestrators=(tasks.door.address,), engine_settings=engine),
        model_server(server_id="two", orchestrators=(tasks.door.address,), engine_settings=engine),
    ):
        await tasks.door.until_ready("one", "two")
        ids = await asyncio.gather(*(tasks.submit(f"{n}", key=f"key-{n}") for n in range(200)))
        assert len(set(ids)) == 200
        ended = await tasks.all(ids)
        assert {task.state for task in ended} == {SUCCEEDED}
        assert all(events(task) == ["SUBMITTED", "SCHEDULED", "RUNNING", "SUCCEEDED"] for task in ended)
        assert {server for task in ended for server, _ in tried(task)} == {"one", "two"}
        await tasks.door.until_idle()
        assert tasks.dispatcher.running_here == 0 and tasks.dispatcher.oldest() is None
        states = tasks.door.plane.metrics.task_states
        assert states.value("succeeded") == 200


async def test_two_control_planes_share_a_database(postgres_server: Postgres, tmp_path: Path) -> None:
    store = {"store": await postgres_server.tables()}
    fakes = pair()
    async with desk(tmp_path, tasks=store) as one, desk(tmp_path, tasks=store) as other:
        for fake in fakes:
            fake.on_generate = lambda request: ("x",)
            await fake.start()
        try:
            # Each hears one of the servers.
            await fakes[0].attach(one.door.address)
            await fakes[1].attach(other.door.address)
            ids = await asyncio.gather(*(one.submit(f"{n}") for n in range(60)))
            ended = await other.all(ids)
            assert {task.state for task in ended} == {SUCCEEDED}
            assert all(len(task.attempts) == 1 for task in ended)
            assert {server for task in ended for server, _ in tried(task)} == {FIRST, SECOND}
            hold = asyncio.Event()
            for fake in fakes:
                fake.answer("x", hold)
                fake.on_generate = None
            endless = await one.submit("endless")
            await one.until(endless, RUNNING)
            # Whoever runs it: the other one cancels it, too.
            for tasks in (one, other):
                if not tasks.dispatcher.running_here:
                    assert (await tasks.cancel(endless)).state == CANCELLED
            await until(lambda: _true(not one.dispatcher.running_here + other.dispatcher.running_here), PATIENCE)
            assert "cancelled" in {call.outcome for fake in fakes for call in fake.calls_of("Complete")}
        finally:
            for fake in fakes:
                await fake.detach()
                await fake.stop()


async def test_an_answer_in_one_piece_says_nothing_of_the_pace(tmp_path: Path) -> None:
    async with desk(tmp_path) as tasks, attached(tasks.door, FakeModelServer(FIRST)) as (fake,):
        fake.answer(generation_pb2.GenerationDelta(text="all at once", tokens=5))
        task = await tasks.until(await tasks.submit("What?"))
        assert task.result.summary.usage.completion_tokens == 5
        assert not task.result.summary.timings.HasField("tpot")
        await tasks.door.until_idle()
        learned = (await tasks.door.server(FIRST)).models[0]
        assert learned.HasField("ttft") and not learned.HasField("tpot")


async def test_workers_bound_what_is_in_hand(tmp_path: Path) -> None:
    async with desk(tmp_path, tasks={"workers": 3}) as tasks, attached(tasks.door, *pair(8)) as fakes:
        gates = [fake.gate("Complete") for fake in fakes]
        ids = [await tasks.submit(f"{n}") for n in range(8)] + [await tasks.of("other").submit("other")]
        await until(lambda: _true(len(prompts(*fakes)) == 3), PATIENCE)
        waiting = [task for task in [await tasks.get(id) for id in ids[:8]] if task.state == QUEUED]
        assert len(waiting) == 5 and tasks.dispatcher.running_here == 3
        assert "workers" in waiting[0].waiting_for
        for gate in gates:
            gate.open()
        assert {task.state for task in await tasks.all(ids[:8])} == {SUCCEEDED}
        assert (await tasks.of("other").until(ids[8])).state == SUCCEEDED


# -------------------------------------------------------------------- order ---


async def _true(value: object) -> object:
    return value


def some_time() -> asyncio.Event:
    """That an engine takes, if it is no fake."""
    over = asyncio.Event()
    asyncio.get_running_loop().call_later(0.02, over.set)
    return over


async def held_up(tasks: Desk, fake: FakeModelServer):
    """The only slot of a server is taken by a request of somebody; what sets it free."""
    gate = asyncio.Event()
    fake.on_generate = lambda request: (
        (gate if request.input.messages[-1].content[0].text == "holds the slot" else some_time(), "x")
    )
    holding = asyncio.create_task(tasks.door.generate(ask("holds the slot")))
    await fake.until(lambda: bool(fake.calls_of("Generate")))
    return gate, holding


async def test_urgent_tasks_come_first_and_requests_before_tasks_of_their_class(tmp_path: Path) -> None:
    async with desk(tmp_path) as tasks, attached(tasks.door, FakeModelServer(FIRST, slots=1)) as (fake,):
        gate, holding = await held_up(tasks, fake)
        ids = [await tasks.submit(f"{name}{n}", priority=priority)
               for name, priority in (("low", LOW), ("normal", NORMAL), ("high", HIGH)) for n in range(2)]  # fmt: skip
        await until(lambda: _true(len(tasks.dispatcher._places) == 3), PATIENCE)
        people = [asyncio.create_task(tasks.door.generate(ask("person", priority=NORMAL)))]
        await until(lambda: _true(sum(tasks.door.plane.scheduler.depth().values()) == 1), PATIENCE)
        gate.set()
        assert {task.state for task in await tasks.all(ids)} == {SUCCEEDED}
        for call in (*people, holding):
            assert (await call).done
        assert prompts(fake)[1:] == ["high0", "high1", "person", "normal0", "normal1", "low0", "low1"]


async def test_who_waits_long_becomes_urgent(tmp_path: Path) -> None:
    async with (
        desk(tmp_path, tasks={"ageing": 0.2}) as tasks,
        attached(tasks.door, FakeModelServer(FIRST, slots=1)) as (fake,),
    ):
        gate, holding = await held_up(tasks, fake)
        old = await tasks.submit("old", priority=LOW)
        await until(
            lambda: _true(any(place.request.priority == 4 for place in tasks.dispatcher._places.values())), PATIENCE
        )
        new = await tasks.submit("new", priority=HIGH)
        person = asyncio.create_task(tasks.door.generate(ask("person", priority=HIGH)))
        await until(lambda: _true(sum(tasks.door.plane.scheduler.depth().values()) == 1), PATIENCE)
        gate.set()
        await tasks.all([old, new])
        assert (await person).done and (await holding).done
        assert prompts(fake)[1] == "old"


async def test_nobody_is_kept_waiting_by_a_flood(tmp_path: Path) -> None:
    async with desk(tmp_path) as tasks, attached(tasks.door, FakeModelServer(FIRST, slots=1)) as (fake,):
        gate, holding = await held_up(tasks, fake)
        flood = await asyncio.gather(*(tasks.submit(f"flood{n}") for n in range(40)))
        few = [await tasks.of("other").submit(f"few{n}") for n in range(3)]
        gate.set()
        await asyncio.gather(*(tasks.of("other").until(id) for id in few))
        await tasks.all(flood)
        await holding
        assert max(prompts(fake).index(f"few{n}") for n in range(3)) < 12


async def test_a_task_does_not_start_before_its_time(tmp_path: Path) -> None:
    async with desk(tmp_path) as tasks, attached(tasks.door, FakeModelServer(FIRST)) as (fake,):
        later, now = await tasks.submit("later", wait=0.6), await tasks.submit("now")
        assert (await tasks.until(now)).state == SUCCEEDED
        assert (await tasks.get(later)).state == QUEUED
        task = await tasks.until(later)
        submitted, started = task.history[0].at, task.history[1].at
        assert started.ToNanoseconds() - submitted.ToNanoseconds() >= 0.55e9
        assert prompts(fake) == ["now", "later"]


# ----------------------------------------------------------------- failures ---


async def test_a_failed_attempt_is_made_elsewhere(tmp_path: Path) -> None:
    async with desk(tmp_path) as tasks, attached(tasks.door, *pair()) as (first, _second):
        first.inject_error("Complete", failure(), times=99)
        task = await tasks.until(await tasks.submit())
        assert task.state == SUCCEEDED and (task.attempt_count, task.failure_count) == (2, 1)
        assert sorted(tried(task), key=lambda entry: entry[1]) == [(SECOND, ""), (FIRST, "ENGINE_FAILED")]
        assert events(task) == [
            "SUBMITTED", "SCHEDULED", "RUNNING", "ATTEMPT_FAILED", "SCHEDULED", "RUNNING", "SUCCEEDED",
        ]  # fmt: skip
        assert [(entry.server_id, entry.failure_reason) for entry in task.result.summary.attempts] == tried(task)
        learned = (await tasks.door.server(FIRST)).models[0]
        assert (learned.requests, learned.failures) == (1, 1), "statistics are fed as by requests"


async def test_who_is_alone_is_asked_again(tmp_path: Path) -> None:
    async with desk(tmp_path) as tasks, attached(tasks.door, FakeModelServer(FIRST)) as (fake,):
        fake.inject_error("Complete", failure(), times=2)
        task = await tasks.until(await tasks.submit())
        assert task.state == SUCCEEDED
        assert tried(task) == [(FIRST, "ENGINE_FAILED")] * 2 + [(FIRST, "")]


async def test_attempts_are_bounded(tmp_path: Path) -> None:
    async with desk(tmp_path) as tasks, attached(tasks.door, *pair()) as fakes:
        for fake in fakes:
            fake.inject_error("Complete", failure(), times=99)
        task = await tasks.until(await tasks.submit(max_attempts=3))
        assert task.state == FAILED and len(task.attempts) == 3
        assert (task.failure_reason, task.failure_message) == ("ENGINE_FAILED", "it broke")
        assert not task.HasField("result")


async def test_a_model_that_failed_twice_makes_way_for_another(tmp_path: Path) -> None:
    def offers(server_id: str, model: str, score: float) -> FakeModelServer:
        capabilities = [{"task_type": task_pb2.TASK_TYPE_CHAT, "score": score}]
        return FakeModelServer(server_id, [model_info(model, capabilities=capabilities)])

    bad = [offers(FIRST, "bad", 0.9), offers(SECOND, "bad", 0.9), offers("c-third", "bad", 0.9)]
    async with desk(tmp_path) as tasks, attached(tasks.door, *bad, offers("d-fourth", "good", 0.1)):
        for fake in bad:
            fake.inject_error("Complete", failure(), times=99)
        task = await tasks.until(await tasks.submit())
        assert task.state == SUCCEEDED
        assert [attempt.model for attempt in task.attempts] == ["bad", "bad", "good"]


@pytest.mark.parametrize("reason", [Reason.INVALID_REQUEST, Reason.CONTEXT_TOO_LONG])
async def test_a_permanent_error_is_final(tmp_path: Path, reason: Reason) -> None:
    async with desk(tmp_path) as tasks, attached(tasks.door, FakeModelServer(FIRST)) as (fake,):
        fake.inject_error("Complete", failure(reason), times=99)
        task = await tasks.until(await tasks.submit())
        assert task.state == FAILED and tried(task) == [(FIRST, reason)]


async def test_a_slow_attempt_is_ended_and_made_elsewhere(tmp_path: Path) -> None:
    async with desk(tmp_path) as tasks, attached(tasks.door, *pair()) as (first, _second):
        first.answer("x", asyncio.Event())
        task = await tasks.until(await tasks.submit(attempt_timeout=0.3))
        assert tried(task) == [(FIRST, "DEADLINE_EXCEEDED"), (SECOND, "")]
        await first.until(lambda: first.calls_of("Complete")[0].outcome == "cancelled")


async def test_an_answer_without_measure_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("control_plane.api.execute.MAX_RESULT_BYTES", 1000)
    async with desk(tmp_path) as tasks, attached(tasks.door, FakeModelServer(FIRST)) as (fake,):
        fake.answer(*["x" * 100] * 50)
        task = await tasks.until(await tasks.submit())
        assert (task.state, task.failure_reason) == (FAILED, "UNSUPPORTED")
        await fake.until(lambda: fake.calls_of("Complete")[0].outcome != "running")


# --------------------------------------------------------- deadline, cancel ---


async def test_the_deadline_holds_while_it_waits_and_while_it_runs(tmp_path: Path) -> None:
    async with desk(tmp_path) as tasks:
        waiting = await tasks.until(await tasks.submit(within=0.3))
        assert waiting.state == EXPIRED and events(waiting) == ["SUBMITTED", "EXPIRED"]
        async with attached(tasks.door, FakeModelServer(FIRST)) as (fake,):
            fake.answer("x", asyncio.Event())
            running = await tasks.until(await tasks.submit(within=0.5))
            assert running.state == EXPIRED
            assert events(running) == ["SUBMITTED", "SCHEDULED", "RUNNING", "EXPIRED"]
            await fake.until(lambda: fake.calls_of("Complete")[0].outcome == "cancelled")
            await tasks.door.until_idle()
        learned = (await tasks.door.server(FIRST)).models[0]
        assert learned.failures == 0


async def test_cancelling_stops_the_engine(tmp_path: Path) -> None:
    async with (
        desk(tmp_path) as tasks,
        model_server(orchestrators=(tasks.door.address,), engine_settings=SLOW) as server,
    ):
        await tasks.door.until_ready("tested")
        ids = [await tasks.submit(f"{n}") for n in range(3)]
        await server.until_load(running=3)
        for id in ids:
            await tasks.until(id, RUNNING)
        took = []
        for left, id in zip((2, 1, 0), ids, strict=True):
            began = time.monotonic()
            assert (await tasks.cancel(id)).state == CANCELLED
            await server.until_load(running=left)
            took.append(time.monotonic() - began)
        assert min(took) < 0.25, took
        for id in ids:
            task = await tasks.get(id)
            assert events(task) == ["SUBMITTED", "SCHEDULED", "RUNNING", "CANCELLED"]
        await tasks.door.until_idle()
        await until(lambda: _true(tasks.dispatcher.running_here == 0), PATIENCE)


# ------------------------------------------------------------------ servers ---


async def test_a_server_that_dies_costs_an_attempt(tmp_path: Path) -> None:
    first, second = pair()
    async with desk(tmp_path) as tasks, attached(tasks.door, first, second):
        first.answer("x", asyncio.Event())
        id = await tasks.submit()
        await first.until(lambda: bool(first.calls_of("Complete")))
        await first.detach()
        await first.stop()
        task = await tasks.until(id)
        assert task.state == SUCCEEDED and tried(task)[-1] == (SECOND, "")
        assert tried(task)[0][0] == FIRST and tried(task)[0][1]


async def test_tasks_wait_for_servers_that_are_away(tmp_path: Path) -> None:
    fleet = {"lease_duration": 0.5}
    async with desk(tmp_path, fleet=fleet) as tasks:
        first = FakeModelServer(FIRST)
        async with attached(tasks.door, first):
            assert (await tasks.until(await tasks.submit())).state == SUCCEEDED
        await tasks.door.until_server(FIRST, lambda status: status.lease_state == 3)
        ids = [await tasks.submit(f"{n}") for n in range(5)]
        assert (await tasks.get(ids[0])).state == QUEUED
        unwanted = await tasks.submit("elsewhere", provider="nobody")
        await tasks.until_waiting(ids[0], "cannot start now")
        await tasks.until_waiting(unwanted, "provider fake is not nobody")
        async with attached(tasks.door, FakeModelServer(SECOND)):
            assert {task.state for task in await tasks.all(ids)} == {SUCCEEDED}
        assert (await tasks.get(unwanted)).state == QUEUED
        async with attached(tasks.door, FakeModelServer("c", [model_info(provider="nobody")])):
            assert (await tasks.until(unwanted)).state == SUCCEEDED


async def test_context_between_the_steps_of_the_rounding_is_found(tmp_path: Path) -> None:
    async with desk(tmp_path) as tasks, attached(tasks.door, FakeModelServer(FIRST, [model_info(context_length=9000)])):
        task = await tasks.until(await tasks.submit("word " * 6000, max_tokens=1400))  # 8,904 tokens, rounded 10,240
        assert task.state == SUCCEEDED


# ------------------------------------------------- control plane and store ---


async def test_a_drain_gives_back_what_does_not_end(tmp_path: Path) -> None:
    async with FakeModelServer(FIRST) as fake:
        hold = asyncio.Event()
        fake.on_generate = lambda request: (
            ("x", hold) if request.input.messages[-1].content[0].text == "endless" else ("x",)
        )
        async with desk(tmp_path, drain_grace=0.3) as tasks:
            await fake.attach(tasks.door.address)
            endless = await tasks.submit("endless")
            await tasks.until(endless, RUNNING)
            waiting = await tasks.submit("elsewhere", provider="nobody")
        await fake.until(lambda: fake.calls_of("Complete")[0].outcome == "cancelled")
        hold.set()
        async with desk(tmp_path) as tasks:
            await fake.attach(tasks.door.address)
            task = await tasks.until(endless)
            assert task.state == SUCCEEDED and task.failure_count == 0
            assert events(task) == [
                "SUBMITTED", "SCHEDULED", "RUNNING", "REQUEUED", "SCHEDULED", "RUNNING", "SUCCEEDED",
            ]  # fmt: skip
            assert (await tasks.get(waiting)).state == QUEUED


async def test_a_killed_control_plane_loses_nothing(tmp_path: Path) -> None:
    store = ("--tasks.store", f"sqlite:///{tmp_path / 'tasks.db'}", "--fleet.warm-up", "0")
    async with FakeModelServer(FIRST, slots=4) as fake:
        gate = fake.gate("Complete")
        async with control_plane(*store) as plane, client(plane.address) as door:
            await fake.attach(plane.address)
            tasks = Desk(door)
            ids = [await tasks.submit(f"{n}", key=f"key-{n}") for n in range(12)]
            await fake.until(lambda: len(fake.calls_of("Complete")) == 4)
            for id in ids[:4]:
                await tasks.until(id, RUNNING)
            plane.kill()
            await plane.process.wait()
        await fake.detach()
        gate.open()
        async with control_plane(*store, "--debug", "true") as plane, client(plane.address) as door:
            tasks = Desk(door)
            assert [await tasks.submit(f"{n}", key=f"key-{n}") for n in range(12)] == ids, "they are there already"
            await fake.attach(plane.address)
            ended = await tasks.all(ids)
            assert {task.state for task in ended} == {SUCCEEDED}
            assert [len(task.attempts) for task in ended] == [2] * 4 + [1] * 8
            assert [task.failure_count for task in ended] == [0] * 12
            assert "LEASE_LOST" in {attempt.failure_reason for attempt in ended[0].attempts}
            assert await plane.stop() == 0
        chosen = [line for line in plane.log.decode().splitlines() if "scores" in line]
        assert len(chosen) == 12 and all(FIRST in line for line in chosen), "the debug log says why"


class Flaky:
    """A store that can be away."""

    def __init__(self, store) -> None:
        self.store = store
        self.away = False
        self.full = False
        """It can be read and not written."""
        self.refused: Counter[str] = Counter()

    def __getattr__(self, name: str):
        real = getattr(self.store, name)
        if name in ("now", "listen"):
            return real

        async def maybe(*given):
            if self.away or (self.full and not name.startswith("waiting_")):
                self.refused[name] += 1
                raise DomainError("STORE_UNAVAILABLE", "not now")
            return await real(*given)

        return maybe


async def test_what_runs_while_the_store_is_away_is_written_when_it_is_back(tmp_path: Path) -> None:
    async with desk(tmp_path) as tasks, attached(tasks.door, FakeModelServer(FIRST, slots=2)) as (fake,):
        flaky = tasks.dispatcher._store = Flaky(tasks.dispatcher._store)
        gate = fake.gate("Complete")
        running = [await tasks.submit(f"running{n}") for n in range(2)]
        for id in running:
            await tasks.until(id, RUNNING)
        flaky.away = True
        gate.open()
        await until(lambda: _true(flaky.refused["succeeded"] >= 4), PATIENCE)
        new = [await tasks.submit(f"new{n}") for n in range(3)]  # the API has a store that answers
        await until(lambda: _true(flaky.refused["waiting_lanes"] + flaky.refused["claim"]), PATIENCE)
        assert "store does not answer" in (await tasks.get(new[0])).waiting_for or len(prompts(fake)) == 2
        await tasks.door.until_idle()
        flaky.away = False
        ended = await tasks.all([*running, *new])
        assert {task.state for task in ended} == {SUCCEEDED}
        assert all(len(task.attempts) == 1 for task in ended)
        assert sorted(Counter(prompts(fake)).values()) == [1] * 5


async def test_a_store_that_can_only_be_read_is_tried_with_growing_pauses(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with desk(tmp_path) as tasks, attached(tasks.door, FakeModelServer(FIRST, slots=2)) as (fake,):
        fake.on_generate = lambda request: ("x",)
        flaky = tasks.dispatcher._store = Flaky(tasks.dispatcher._store)
        flaky.full = True
        begin = time.monotonic()
        ids = [await tasks.submit("first")]
        await until(lambda: _true(flaky.refused["claim"] >= 4), PATIENCE)
        assert time.monotonic() - begin >= 0.1 + 0.2 + 0.4, "pauses between the tries grow"
        ids += [await tasks.submit("more", priority=priority) for priority in (LOW, NORMAL, HIGH)]
        tried_before = flaky.refused["claim"]
        await until(lambda: _true(flaky.refused["claim"] > tried_before), PATIENCE)
        told = [record.message for record in caplog.records if record.name == "control_plane.tasks.dispatcher"]
        assert sum("until the store is back" in line for line in told) == 1
        assert not any("answers again" in line for line in told)
        flaky.full = False
        assert {task.state for task in await tasks.all(ids)} == {SUCCEEDED}
        told = [record.message for record in caplog.records if record.name == "control_plane.tasks.dispatcher"]
        assert sum("answers again" in line for line in told) == 1


async def test_what_was_measured_outlives_the_control_plane(tmp_path: Path) -> None:
    known, other = model_info("known", fingerprint="f1"), model_info("other", fingerprint="f1")
    async with FakeModelServer(FIRST, [known, other]) as fake:
        async with desk(tmp_path) as tasks:
            await fake.attach(tasks.door.address)
            for model in ("known", "other"):
                await tasks.until(await tasks.submit(model=model))
            await tasks.door.until_idle()
        other.fingerprint = "f2"
        async with desk(tmp_path) as tasks:
            await fake.attach(tasks.door.address)
            models = {runtime.model: runtime for runtime in (await tasks.door.server(FIRST)).models}
            assert models["known"].requests == 1 and models["other"].requests == 0
            assert models["known"].HasField("ttft") and not models["other"].HasField("ttft")


async def test_without_a_store_there_are_no_tasks_and_no_database_layer(tmp_path: Path) -> None:
    async with desk(tmp_path, tasks={"store": ""}) as tasks:
        assert tasks.door.plane.dispatcher is None
        refused = await tasks.door.refusal(tasks.stub.GetQueueStats(pb.GetQueueStatsRequest()))
        assert refused.reason is Reason.UNSUPPORTED
    assert not list(tmp_path.iterdir())


async def test_states_are_counted(tmp_path: Path) -> None:
    async with desk(tmp_path) as tasks, attached(tasks.door, *pair()) as (first, _):
        first.inject_error("Complete", failure(), times=1)
        await tasks.until(await tasks.submit())
        metrics = tasks.door.plane.metrics
        counted = {state: metrics.task_states.value(state.name.lower()) for state in TaskState}
        assert counted[TaskState.SCHEDULED] == 2 and counted[TaskState.SUCCEEDED] == 1
        assert metrics.task_attempts.value("ENGINE_FAILED") == 1
        assert metrics.task_attempts.value("ok") == 1
