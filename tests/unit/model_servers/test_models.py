"""The life of a model: the decisions, and the keeper around an engine whose steps each test paces."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_servers.condition import combine
from model_servers.engine import (
    EngineFailed,
    EngineLoad,
    EngineModel,
    EngineStatus,
    Health,
    ModelState,
    OutOfMemory,
    Progress,
    UnknownModel,
    Unsupported,
)
from model_servers.fingerprint import fingerprint
from model_servers.models import FailedLoad, Held, Keeper, Step, idle_models, make_room, missing_models

WARM, COLD, LOADING, ABSENT, FAILED, PULLING = (
    ModelState.WARM,
    ModelState.COLD,
    ModelState.LOADING,
    ModelState.ABSENT,
    ModelState.FAILED,
    ModelState.PULLING,
)


# -------------------------------------------------------------- decisions ---


def models_in_memory() -> st.SearchStrategy[list[Held]]:
    model = st.builds(
        Held,
        name=st.sampled_from("abcdef"),
        memory_bytes=st.integers(0, 50),
        requests=st.integers(0, 1),
        used_at=st.floats(0, 100),
        kept=st.booleans(),
    )
    return st.lists(model, unique_by=lambda held: held.name)


@given(models_in_memory(), st.integers(0, 60), st.integers(1, 200))
def test_room_is_made_by_the_least_recently_used_or_not_at_all(held: list[Held], needed: int, limit: int):
    by_name = {model.name: model for model in held}
    free = {model.name for model in held if model.memory_bytes and not model.requests and not model.kept}
    total = sum(model.memory_bytes for model in held)
    try:
        leaving = make_room("new", needed, held, limit)
    except OutOfMemory as error:
        # Not even all that may leave would do; what stays is named.
        assert total - sum(by_name[name].memory_bytes for name in free) + needed > limit
        assert all(
            f"{model.name} holds" in str(error) for model in held if model.memory_bytes and model.name not in free
        )
        return
    assert set(leaving) <= free
    gone = sum(by_name[name].memory_bytes for name in leaving)
    assert total - gone + needed <= limit
    if leaving:
        assert total - gone + by_name[leaving[-1]].memory_bytes + needed > limit  # no more than must
        youngest = max(by_name[name].used_at for name in leaving)
        assert all(by_name[name].used_at >= youngest for name in free - set(leaving))


def test_no_limit_no_unloading():
    assert make_room("new", 1 << 60, [Held("a", 1 << 40)], 0) == ()


def test_what_is_too_large_for_the_limit_says_so():
    with pytest.raises(OutOfMemory, match=r"'big' needs 2.00 GiB and the limit is 1.00 GiB; raise"):
        make_room("big", 2 << 30, [], 1 << 30)


def test_idle_models_leave_except_kept_and_busy_ones():
    held = [Held("idle", 1), Held("busy", 1, requests=1), Held("kept", 1, kept=True), Held("fresh", 1, used_at=95)]
    assert idle_models(held, 100.0, 60.0) == ("idle",)
    assert idle_models(held, 100.0, 0.0) == ()


def test_what_must_be_warm_is_tried_again_later_and_later():
    failures = {"b": FailedLoad(3, 100.0, "no", True)}
    states = {"a": COLD, "b": FAILED, "c": WARM, "d": LOADING}
    assert missing_models("abcde", states, failures, 103.0) == ("a", "e")
    assert missing_models("abcde", states, failures, 104.0) == ("a", "b", "e")
    assert FailedLoad(50, 0.0, "", True).retry_at() == 60.0


def status(*models: EngineModel, health: Health = Health.READY, **facts) -> EngineStatus:
    values = {"engine": "x", "version": "1", "device": "d", "memory_bytes": 5, "load": EngineLoad(4)}
    return EngineStatus(models=models, health=health, **{**values, **facts})


def test_fingerprint_follows_what_makes_performance_and_nothing_else():
    model = EngineModel("m", "p", 100, quantization="4bit")
    same = fingerprint(status(model), model)
    assert same and same == fingerprint(status(model, memory_used_bytes=9, load=EngineLoad(4, running=3)), model)
    assert same == fingerprint(status(model), replace(model, state=COLD, memory_bytes=3, load_seconds=1.0))
    others = {
        fingerprint(status(model, version="2"), model),
        fingerprint(status(model, device="e"), model),
        fingerprint(status(model, memory_bytes=6), model),
        fingerprint(status(model, engine="y"), model),
        fingerprint(status(model, load=EngineLoad(5)), model),
        fingerprint(status(model), replace(model, context_length=200)),
        fingerprint(status(model), replace(model, quantization="8bit")),
    }
    assert len(others) == 7 and same not in others
    assert fingerprint(status(model, health=Health.STARTING), model) == ""


@pytest.mark.parametrize(
    ("said", "known", "reported"),
    [
        (COLD, LOADING, LOADING),
        (WARM, LOADING, WARM),  # the step is about to end
        (WARM, COLD, COLD),  # an unload waits for running requests
        (ABSENT, PULLING, PULLING),
        (COLD, PULLING, COLD),  # fetched anew
        (WARM, PULLING, WARM),
        (COLD, FAILED, FAILED),
        (WARM, FAILED, WARM),  # the engine did it by itself
    ],
)
def test_the_reported_state_comes_from_engine_and_step(said: ModelState, known: ModelState, reported: ModelState):
    found = combine(
        status(EngineModel("m", "p", 10, state=said)), states={"m": (known, "why")}, load_seconds={}, ailments={}
    )
    assert found.models[0].state is reported
    assert found.models[0].state_detail == ("why" if reported is known and said is not known else "")


def test_an_ailment_makes_model_and_server_sick_and_canaries_are_no_load():
    said = status(EngineModel("m", "p", 10), EngineModel("n", "p", 10), load=EngineLoad(4, running=2, waiting=1))
    found = combine(said, states={}, load_seconds={"n": 2.0}, ailments={"m": "silent"}, canaries=1)
    assert (found.health, found.health_detail) == (Health.UNHEALTHY, "silent")
    assert [model.state for model in found.models] == [FAILED, WARM] and found.models[1].load_seconds == 2.0
    assert (found.load.running, found.load.waiting) == (1, 1)
    broken = replace(said, health=Health.UNHEALTHY, health_detail="gone")
    assert combine(broken, states={}, load_seconds={}, ailments={}).health_detail == "gone"
    assert combine(broken, states={}, load_seconds={}, ailments={"m": "silent"}).health_detail == "silent; gone"


# ----------------------------------------------------------------- keeper ---


class Shelf:
    """An engine with models only; a step goes on when its gate is open."""

    def __init__(self, **states: ModelState) -> None:
        self.models = {name: EngineModel(name, "p", 10, state=state, memory_bytes=10) for name, state in states.items()}
        self.gate = asyncio.Event()
        self.gate.set()
        self.log: list[str] = []
        self.error: Exception | None = None
        self.health = Health.READY

    def status(self) -> EngineStatus:
        return status(*self.models.values(), health=self.health)

    async def _step(self, name: str, model: str, through: ModelState, to: ModelState) -> AsyncGenerator[Progress, None]:
        if model not in self.models:
            raise UnknownModel(model)
        self.log.append(f"{name} {model}")
        try:
            yield Progress(through, "on the way")
            await self.gate.wait()
        except (asyncio.CancelledError, GeneratorExit):
            self.log.append(f"{name} {model} cancelled")
            raise
        if self.error is not None:
            raise self.error
        self.models[model] = replace(self.models[model], state=to)
        yield Progress(to)

    def pull(self, model: str) -> AsyncGenerator[Progress, None]:
        return self._step("pull", model, PULLING, COLD)

    def load(self, model: str) -> AsyncGenerator[Progress, None]:
        return self._step("load", model, LOADING, WARM)

    def unload(self, model: str) -> AsyncGenerator[Progress, None]:
        return self._step("unload", model, COLD, COLD)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def keeper(engine: Shelf, clock: Clock | None = None, **settings) -> Keeper:
    return Keeper(engine, clock=clock or Clock(), **settings)  # type: ignore[arg-type]


async def taken(keeper: Keeper, step: Step, model: str) -> list[Progress]:
    async with aclosing(keeper.follow(step, model)) as steps:
        return [progress async for progress in steps]


async def settle() -> None:
    """Let everything run that can."""
    for _ in range(20):
        await asyncio.sleep(0)


async def test_a_second_call_joins_the_first():
    engine = Shelf(a=COLD)
    engine.gate.clear()
    kept = keeper(engine)
    calls = [asyncio.create_task(taken(kept, Step.LOAD, "a")) for _ in range(3)]
    await settle()
    assert engine.log == ["load a"] and kept.states() == {"a": (LOADING, "on the way")}
    engine.gate.set()
    for progress in await asyncio.gather(*calls):
        assert progress[-1].state is WARM
    assert engine.log == ["load a"] and kept.states() == {}
    assert [progress.state for progress in await taken(kept, Step.LOAD, "a")] == [WARM]
    assert engine.log == ["load a"]


async def test_the_last_follower_who_leaves_stops_the_work_and_the_next_one_begins_anew():
    engine = Shelf(a=COLD)
    engine.gate.clear()
    kept = keeper(engine)
    first, second = (asyncio.create_task(taken(kept, Step.LOAD, "a")) for _ in range(2))
    await settle()
    first.cancel()
    await settle()
    assert engine.log == ["load a"]
    second.cancel()
    third = asyncio.create_task(taken(kept, Step.LOAD, "a"))  # comes while the first work is still being cancelled
    await settle()
    assert engine.log == ["load a", "load a cancelled", "load a"]
    engine.gate.set()
    assert (await third)[-1].state is WARM


async def test_a_follower_that_leaves_at_once_leaves_nothing_behind():
    engine = Shelf(a=COLD)
    kept = keeper(engine)
    steps = kept.follow(Step.LOAD, "a")
    call = asyncio.create_task(anext(steps))
    await asyncio.sleep(0)
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    await settle()
    assert not kept.busy_with("a") and (await taken(kept, Step.LOAD, "a"))[-1].state is WARM


async def test_steps_of_one_model_come_one_after_the_other():
    engine = Shelf(a=ABSENT)
    engine.gate.clear()
    kept = keeper(engine)
    pull = asyncio.create_task(taken(kept, Step.PULL, "a"))
    await settle()
    load = asyncio.create_task(taken(kept, Step.LOAD, "a"))
    await settle()
    assert engine.log == ["pull a"]
    engine.gate.set()
    assert (await pull)[-1].state is COLD and (await load)[-1].state is WARM


async def test_a_request_loads_a_cold_model_and_measures_it():
    clock = Clock()
    engine = Shelf(a=COLD)
    engine.gate.clear()
    kept = keeper(engine, clock)
    requests = [asyncio.create_task(kept.enter("a")) for _ in range(2)]
    await settle()
    clock.now += 3
    engine.gate.set()
    assert await asyncio.gather(*requests) == [3.0, 3.0]
    assert engine.log == ["load a"] and kept.load_seconds == {"a": 3.0}
    assert await kept.enter("a") == 0.0


async def test_an_unload_waits_for_requests_and_requests_wait_for_the_unload():
    engine = Shelf(a=WARM)
    kept = keeper(engine)
    await kept.enter("a")
    unload = asyncio.create_task(taken(kept, Step.UNLOAD, "a"))
    await settle()
    assert engine.log == [] and kept.states()["a"][0] is COLD
    late = asyncio.create_task(kept.enter("a"))
    await settle()
    assert not late.done()
    kept.leave("a")
    assert (await unload)[-1].state is COLD
    await late
    assert engine.log == ["unload a", "load a"]


async def test_an_unload_waits_for_canaries():
    engine = Shelf(a=WARM)
    kept = keeper(engine)
    with kept.borrow("a"):
        unload = asyncio.create_task(taken(kept, Step.UNLOAD, "a"))
        await settle()
        assert engine.log == []
    await unload


async def test_room_is_made_before_a_load():
    clock = Clock()
    engine = Shelf(a=WARM, b=WARM, c=COLD)
    kept = keeper(engine, clock, memory_limit_bytes=25)
    await kept.enter("b")
    kept.leave("b")
    clock.now += 1
    await kept.enter("a")
    kept.leave("a")
    await taken(kept, Step.LOAD, "c")
    assert engine.log == ["unload b", "load c"]
    await kept.enter("a")
    await kept.enter("c")
    with pytest.raises(OutOfMemory, match=r"a holds 0.0 MiB .1 requests.*c holds"):
        await kept.enter("b")
    assert kept.states() == {}  # a model that finds no room has not failed


async def test_loads_see_the_memory_of_each_other():
    engine = Shelf(a=COLD, b=COLD, c=COLD)
    kept = keeper(engine, memory_limit_bytes=20)
    outcomes = await asyncio.gather(*(kept.enter(name) for name in "abc"), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [float, float, OutOfMemory]


async def test_a_model_that_takes_more_than_was_known_makes_room_afterwards():
    engine = Shelf(a=WARM, b=COLD)
    engine.models["b"] = replace(engine.models["b"], memory_bytes=0)
    kept = keeper(engine, memory_limit_bytes=15)

    async def load(model: str) -> AsyncGenerator[Progress, None]:
        engine.models[model] = replace(engine.models[model], state=WARM, memory_bytes=10)
        yield Progress(WARM)

    engine.load = load  # type: ignore[method-assign]
    await taken(kept, Step.LOAD, "b")
    assert engine.models["a"].state is COLD


async def test_upkeep_keeps_warm_what_must_be_and_unloads_the_idle():
    clock = Clock()
    engine = Shelf(a=COLD, b=WARM)
    paused = False
    kept = keeper(engine, clock, keep_warm=("a",), idle_unload_seconds=60.0, paused=lambda: paused)
    engine.health = Health.STARTING
    kept.look_after(clock.now)
    await settle()
    assert engine.log == []
    engine.health = Health.READY
    kept.look_after(clock.now)
    await settle()
    assert engine.log == ["load a"]
    clock.now += 61
    paused = True
    kept.look_after(clock.now)
    await settle()
    assert engine.log == ["load a"]
    paused = False
    kept.look_after(clock.now)
    await settle()
    assert engine.log == ["load a", "unload b"]
    # Somebody's order stands, until the engine begins anew.
    await taken(kept, Step.UNLOAD, "a")
    kept.look_after(clock.now)
    await settle()
    assert engine.log[2:] == ["unload a"]
    kept.restarted()
    kept.look_after(clock.now)
    await settle()
    assert engine.log[3:] == ["load a"]


async def test_a_model_that_does_not_load_is_failed_for_a_while():
    clock = Clock()
    engine = Shelf(a=COLD)
    engine.error = EngineFailed("bad file")
    kept = keeper(engine, clock, keep_warm=("a",))
    with pytest.raises(EngineFailed, match="bad file"):
        await kept.enter("a")
    assert kept.states() == {"a": (FAILED, "bad file")}
    kept.look_after(clock.now)
    await settle()
    assert engine.log == ["load a"]  # not yet again
    clock.now += 31
    assert kept.states() == {}
    engine.error = None
    kept.look_after(clock.now)
    await settle()
    assert engine.models["a"].state is WARM
    with pytest.raises(UnknownModel):
        await taken(kept, Step.LOAD, "nobody")
    assert kept.states() == {}


async def test_a_bug_in_the_engine_reaches_everyone_who_waits():
    engine = Shelf(a=COLD)
    engine.error = RuntimeError("bug")
    kept = keeper(engine)
    outcomes = await asyncio.gather(kept.enter("a"), kept.enter("a"), return_exceptions=True)
    assert [str(outcome) for outcome in outcomes] == ["bug", "bug"]


async def test_an_engine_without_steps_is_only_counted():
    class Plain:
        def status(self) -> EngineStatus:
            return status(EngineModel("a", "p", 10, state=COLD))

    kept = keeper(Plain(), keep_warm=("a",))  # type: ignore[arg-type]
    assert not kept.manages and await kept.enter("a") == 0.0
    kept.leave("a")
    with pytest.raises(Unsupported):
        await taken(kept, Step.LOAD, "a")
    await kept.run()  # has nothing to do


async def test_closing_stops_what_is_under_way():
    engine = Shelf(a=COLD)
    engine.gate.clear()
    kept = keeper(engine)
    load = asyncio.create_task(taken(kept, Step.LOAD, "a"))
    await settle()
    await kept.close()
    with pytest.raises(EngineFailed, match="given up"):
        await load
