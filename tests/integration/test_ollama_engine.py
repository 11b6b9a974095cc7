"""The Ollama engine against a stand-in that speaks Ollama's API over real HTTP, and a real one where it answers."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import logging
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from statistics import median_low
from typing import Any

import pytest

from model_servers import registry
from model_servers.engine import (
    Busy,
    ContextTooLong,
    CredentialsRejected,
    Delta,
    EngineError,
    EngineFailed,
    EngineModel,
    Feature,
    Finished,
    FinishReason,
    GenerationRequest,
    Health,
    Image,
    ManagesModels,
    Message,
    ModelState,
    OutOfMemory,
    Progress,
    RateLimited,
    Role,
    Sampling,
    Tool,
    ToolCall,
    ToolChoiceMode,
    UnknownModel,
    Unsupported,
)
from model_servers.engines.ollama import OllamaEngine, OllamaSettings, plugin
from tests.conformance.targets.ollama import REAL, find_models
from tests.harness.model_servers import eventually
from tests.harness.programs import program
from tests.standins.ollama import EMBEDDER, SEER, TINY, Fault, OllamaStandIn, StandInModel, tokens_of

pytestmark = pytest.mark.skipif(importlib.util.find_spec("ollama") is None, reason="the extra ollama is not installed")

WEATHER = Tool(
    "get_weather",
    "Current weather of a city.",
    json.dumps({"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}),
)


@asynccontextmanager
async def running(standin: OllamaStandIn, **settings: Any) -> AsyncIterator[OllamaEngine]:
    engine = OllamaEngine(
        OllamaSettings.model_validate({"url": standin.url, "poll_seconds": 0.05, "start_seconds": 0, **settings})
    )
    await engine.start()
    try:
        yield engine
    finally:
        await engine.close()


@asynccontextmanager
async def both(*, standin: dict[str, Any] | None = None, **settings: Any) -> AsyncIterator[tuple[OllamaStandIn, Any]]:
    async with OllamaStandIn(**(standin or {})) as server, running(server, **settings) as engine:
        yield server, engine


def asking(
    text: str = "Hello", model: str = "tiny", *, sampling: Sampling | None = None, **more: Any
) -> GenerationRequest:
    messages = more.pop("messages", (Message(Role.USER, (text,)),))
    return GenerationRequest(model, messages=messages, sampling=sampling or Sampling(seed=1), **more)


class Answer:
    def __init__(self) -> None:
        self.deltas: list[Delta] = []
        self.finished: Finished | None = None

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self.deltas)


async def answer(engine: OllamaEngine, request: GenerationRequest) -> Answer:
    found = Answer()
    async with aclosing(engine.generate(request)) as items:
        async for item in items:
            if isinstance(item, Delta):
                found.deltas.append(item)
            else:
                found.finished = item
                if item.last:
                    found.deltas.append(item.last)
    assert found.finished is not None
    return found


def model(engine: OllamaEngine, name: str) -> EngineModel:
    return next(model for model in engine.status().models if model.name == name)


async def steps(stream: AsyncIterator[Progress]) -> list[Progress]:
    return [step async for step in stream]


# ---------------------------------------------------------------- answers ---


async def test_what_is_there_is_described() -> None:
    async with both() as (standin, engine):
        status = engine.status()
        assert (status.engine, status.version, status.health) == ("ollama", standin.version, Health.READY)
        assert [m.name for m in status.models] == ["tiny", "thinker", "seer", "embedder"]
        assert {m.state for m in status.models} == {ModelState.COLD}
        tiny = model(engine, "tiny")
        assert (tiny.context_length, tiny.quantization) == (4096, "Q4_K_M")
        assert Feature.FUNCTION_CALLING | Feature.LOGPROBS in tiny.features
        assert model(engine, "embedder").features == Feature.EMBEDDING
        assert isinstance(engine, ManagesModels) and not plugin.metered


async def test_an_answer_and_its_usage() -> None:
    async with both() as (standin, engine):
        found = await answer(engine, asking(sampling=Sampling(seed=3, max_tokens=20)))
        assert len(tokens_of(found.text)) == 20 == sum(delta.tokens for delta in found.deltas)
        finished = found.finished
        assert finished and finished.finish_reason is FinishReason.LENGTH and finished.usage.completion_tokens == 20
        assert finished.usage.prompt_tokens == len(tokens_of("<user>Hello<assistant>"))
        assert (await answer(engine, asking(sampling=Sampling(seed=3, max_tokens=20)))).text == found.text
        assert (await answer(engine, asking(sampling=Sampling(seed=4, max_tokens=20)))).text != found.text
        assert standin.asked("/api/chat")[0]["options"]["num_ctx"] == 4096


async def test_stop_strings_do_not_cost_the_models_own() -> None:
    async with both() as (standin, engine):
        whole = (await answer(engine, asking())).text
        stop = whole.split()[5]
        found = await answer(engine, asking(sampling=Sampling(seed=1, stop=(stop,))))
        assert found.text == whole[: whole.index(stop)]
        assert found.finished and found.finished.finish_reason is FinishReason.STOP
        assert standin.asked("/api/chat")[-1]["options"]["stop"] == [stop, "<|end|>"]


async def test_thoughts_are_told_apart() -> None:
    async with both() as (standin, engine):
        found = await answer(engine, asking(model="thinker"))
        assert "".join(delta.reasoning_text for delta in found.deltas) == "Let me see what is asked."
        assert found.text and found.finished and found.finished.usage.reasoning_tokens > 0
        async with running(standin, think=False) as quiet:
            assert not any(delta.reasoning_text for delta in (await answer(quiet, asking(model="thinker"))).deltas)


async def test_tools_free_and_required() -> None:
    async with both() as (standin, engine):
        tools = (Tool("get_time"), WEATHER)
        free = await answer(engine, asking("Please use get_weather.", tools=tools))
        assert free.finished and free.finished.finish_reason is FinishReason.TOOL_CALLS
        (call,) = free.deltas[0].tool_calls
        assert call.name == "get_weather" and set(json.loads(call.arguments_json)) == {"city"} and call.id
        forced = await answer(engine, asking(tools=tools, tool_choice=ToolChoiceMode.REQUIRED, tool_name="get_weather"))
        assert forced.finished and forced.finished.finish_reason is FinishReason.TOOL_CALLS
        (call,) = forced.deltas[-1].tool_calls
        assert call.name == "get_weather" and set(json.loads(call.arguments_json)) == {"city"} and not forced.text
        again = (
            Message(Role.USER, ("Please use get_weather.",)),
            Message(Role.ASSISTANT, tool_calls=(ToolCall(call.id, call.name, call.arguments_json),)),
            Message(Role.TOOL, ("rain",), tool_call_id=call.id),
        )
        told = await answer(engine, asking(messages=again, tools=tools))
        assert told.text and told.finished and told.finished.finish_reason is FinishReason.STOP
        assert standin.asked("/api/chat")[-1]["messages"][-1]["tool_name"] == "get_weather"


async def test_formats_logprobs_and_images() -> None:
    async with both() as (_, engine):
        assert isinstance(json.loads((await answer(engine, asking(json_object=True))).text), dict)
        schema = '{"type": "object", "properties": {"n": {"type": "integer", "minimum": 3}}, "required": ["n"]}'
        assert json.loads((await answer(engine, asking(json_schema=schema))).text) == {"n": 3}
        logprobs = await answer(engine, asking(sampling=Sampling(logprobs=True, top_logprobs=3, max_tokens=4)))
        entries = [entry for delta in logprobs.deltas for entry in delta.logprobs]
        assert "".join(entry.token for entry in entries) == logprobs.text and len(entries) == 4
        assert all(len(entry.top) == 3 and entry.logprob <= 0 for entry in entries)

        def looks(data: bytes) -> GenerationRequest:
            content = ("What is this?", Image(data, "image/png"))
            return asking(model="seer", messages=(Message(Role.USER, content),))

        seen = [(await answer(engine, looks(data))).text for data in (b"one", b"one", b"two")]
        assert seen[0].startswith("I see") and seen[0] == seen[1] != seen[2]


async def test_raw_prompts_embeddings_and_counting() -> None:
    async with both() as (_, engine):
        raw = await answer(engine, GenerationRequest("tiny", prompt="Once upon a time", sampling=Sampling(seed=1)))
        assert raw.text and raw.finished and raw.finished.usage.prompt_tokens == len(tokens_of("Once upon a time"))
        found = await engine.embed("embedder", ["a river", "a river", "the engine"])
        assert len(found.vectors) == 3 and found.vectors[0] == found.vectors[1] != found.vectors[2]
        assert found.prompt_tokens == len(tokens_of("a river")) * 2 + len(tokens_of("the engine"))
        for request in (asking("How long is this?"), asking(tools=(WEATHER,), tool_choice=ToolChoiceMode.REQUIRED)):
            finished = (await answer(engine, request)).finished
            assert finished and await engine.count_tokens(request) == finished.usage.prompt_tokens
        with pytest.raises(Unsupported):
            await engine.embed("tiny", ["x"])


# ---------------------------------------------------------------- context ---


async def test_a_prompt_that_is_too_long_never_reaches_ollama() -> None:
    async with both(num_ctx=256) as (standin, engine):
        with pytest.raises(ContextTooLong, match="num_ctx"):
            await answer(engine, asking("word " * 2000))
        with pytest.raises(ContextTooLong):
            await answer(engine, asking(sampling=Sampling(max_tokens=260)))
        with pytest.raises(ContextTooLong):
            await engine.embed("embedder", ["word " * 2000])
        assert standin.requests == []


async def test_what_the_estimate_lets_through_ollama_refuses() -> None:
    short_tokens = "a b c d e f " * 50  # two bytes each
    async with both(num_ctx=256) as (standin, engine):
        with pytest.raises(ContextTooLong, match="num_ctx"):
            await answer(engine, asking(short_tokens))
        with pytest.raises(ContextTooLong):
            await engine.embed("embedder", [short_tokens])
        assert standin.generated == 0 and len(standin.requests) == 2


async def test_an_old_ollama_is_not_let_to_cut_silently() -> None:
    async with both(standin={"version": "0.12.5"}, num_ctx=256) as (standin, engine):
        assert Feature.LOGPROBS not in model(engine, "tiny").features
        with pytest.raises(ContextTooLong, match=r"0\.12\.6"):  # might fit, might not: there is no way to tell
            await answer(engine, asking("a b c d e f " * 50))
        assert standin.requests == []
        # One token a character: the estimate fails, and the truth comes with the end.
        with pytest.raises(EngineFailed, match="cut the prompt"):
            await answer(engine, asking("?" * 400))
        assert (await answer(engine, asking("word " * 50))).text


async def test_a_loaded_model_is_not_loaded_anew_for_the_first_request() -> None:
    async with both(num_ctx=300) as (standin, engine):
        await steps(engine.load("tiny"))
        await answer(engine, asking())
        await answer(engine, GenerationRequest("tiny", prompt="Once"))
        await steps(engine.load("embedder"))
        await engine.embed("embedder", ["x"])
        assert standin.loads == {"tiny": 1, "embedder": 1} and standin.loaded == {"tiny": 300, "embedder": 300}


# ------------------------------------------------------- slots and cancel ---


async def test_closing_the_generator_stops_the_work() -> None:
    async with both(standin={"token_seconds": 0.01, "answer_tokens": 2000}) as (standin, engine):
        async with aclosing(engine.generate(asking())) as items:
            assert isinstance(await anext(items), Delta)
            assert engine.status().load.running == 1
        assert engine.status().load.running == 0
        await eventually(lambda: standin.cancelled == 1)
        stopped_at = standin.generated
        assert stopped_at < 100
        assert (await answer(engine, asking(sampling=Sampling(max_tokens=2)))).finished
        assert standin.generated == stopped_at + 2


async def test_those_who_wait_are_served_in_order_and_can_leave() -> None:
    async with both(standin={"token_seconds": 0.002}, slots=1) as (standin, engine):
        order: list[str] = []

        async def one(text: str) -> None:
            await answer(engine, asking(text, sampling=Sampling(max_tokens=20)))
            order.append(text)

        tasks = [asyncio.create_task(one(text)) for text in "abcd"]
        await eventually(lambda: engine.status().load.running == 1 and engine.status().load.waiting == 3)
        tasks[2].cancel()
        await asyncio.wait(tasks)
        assert order == ["a", "b", "d"] and standin.most_at_once == 1
        assert [body["messages"][0]["content"] for body in standin.asked("/api/chat")] == ["a", "b", "d"]


@pytest.mark.parametrize("slots", [1, 3])
async def test_slots_are_inferred_from_real_timings(slots: int) -> None:
    async with both(standin={"parallel": slots, "token_seconds": 0.004}) as (standin, engine):
        found: list[int] = []

        async def client() -> float:
            queued = 0.0
            for _ in range(5):
                finished = (await answer(engine, asking(sampling=Sampling(max_tokens=30)))).finished
                queued += finished.queued if finished else 0
                found.append(engine.status().load.slots)
            return queued

        queued = await asyncio.gather(*(client() for _ in range(slots + 2)))
        # One more than there are is tried when the last ones were calm; on a busy machine a time may mislead.
        assert median_low(found[len(found) // 2 :]) in (slots, slots + 1)
        assert standin.most_at_once == slots and min(queued) > 0


async def test_connections_are_used_again() -> None:
    async with both() as (_, engine):
        for _ in range(10):
            await answer(engine, asking(sampling=Sampling(max_tokens=3)))
        pool = engine.status().pool
        assert pool and pool.opened <= 1 and pool.opened + pool.reused == 10 and pool.size == 64
        async with aclosing(engine.generate(asking())) as items:  # broken off: this one is lost
            await anext(items)
            assert engine.status().pool.in_use >= 1
        await eventually(lambda: engine.status().pool.in_use == 0)
        before = engine.status().pool.opened
        await asyncio.gather(*(answer(engine, asking(sampling=Sampling(max_tokens=3))) for _ in range(2)))
        after = engine.status().pool
        assert after.opened > before and after.opened + after.reused == 13


# ----------------------------------------------------------------- errors ---


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (Fault("status", 401), CredentialsRejected),
        (Fault("status", 403), CredentialsRejected),
        (Fault("status", 429, retry_after=7), RateLimited),
        (Fault("status", 500), EngineFailed),
        (Fault("status", 500, message="model requires more system memory (9 GiB) than is available"), OutOfMemory),
        (Fault("status", 503), Busy),
        (Fault("garbage"), EngineFailed),
        (Fault("error_line", pieces=0), EngineFailed),
        (Fault("error_line"), EngineFailed),
        (Fault("reset", pieces=0), EngineFailed),
        (Fault("reset"), EngineFailed),
        (Fault("no_end"), EngineFailed),
        (Fault("hang"), EngineFailed),
        (Fault("stall"), EngineFailed),
    ],
    ids=lambda value: f"{value.kind}-{value.status}-{value.pieces}" if isinstance(value, Fault) else "",
)
async def test_faults_have_their_types_and_pass(fault: Fault, kind: type[EngineError]) -> None:
    patience = {"first_token_seconds": 0.2, "stall_seconds": 0.2, "load_seconds": 0.2}
    async with both(**patience) as (standin, engine):
        await answer(engine, asking())
        standin.fault = fault
        with pytest.raises(EngineError) as caught:
            await answer(engine, asking("something private"))
        assert type(caught.value) is kind and "private" not in str(caught.value)
        if isinstance(caught.value, RateLimited):
            assert caught.value.retry_after == 7
        load = engine.status().load
        assert (load.running, load.waiting) == (0, 0)
        standin.fault = None
        assert (await answer(engine, asking())).text
        assert engine.status().health is Health.READY


async def test_an_error_line_after_a_200_that_names_a_cause() -> None:
    async with both() as (standin, engine):
        standin.fault = Fault("error_line", pieces=0, message="llama runner: out of memory")
        with pytest.raises(OutOfMemory, match="num_ctx"):
            await answer(engine, asking())
        standin.fault = Fault("error_line", message="llama runner: out of memory")
        with pytest.raises(EngineFailed, match="broke the answer off"):  # too late for anything else
            await answer(engine, asking())


async def test_a_model_that_is_gone() -> None:
    async with both() as (standin, engine):
        with pytest.raises(UnknownModel, match="ollama pull nobody"):
            await answer(engine, asking(model="nobody"))
        del standin.present["tiny"]
        with pytest.raises(UnknownModel, match="ollama pull tiny"):
            await answer(engine, asking())
        assert "tiny" not in [m.name for m in engine.status().models]


async def test_nobody_listens_at_start() -> None:
    standin = OllamaStandIn()
    await standin.start()
    await standin.stop()
    engine = OllamaEngine(OllamaSettings(url=standin.url, start_seconds=0.1))
    with pytest.raises(EngineFailed, match="ollama serve"):
        await engine.start()
    await engine.close()


async def test_starting_waits_for_ollama() -> None:
    standin = OllamaStandIn()
    await standin.start()
    await standin.stop()
    engine = OllamaEngine(OllamaSettings(url=standin.url))
    starting = asyncio.create_task(engine.start())
    await asyncio.sleep(0)
    assert engine.status().health is Health.STARTING
    await standin.start()
    await starting
    assert engine.status().health is Health.READY
    await engine.close()
    await standin.stop()


async def test_closing_fails_what_runs_and_what_waits() -> None:
    async with both(standin={"token_seconds": 0.01, "answer_tokens": 2000}, slots=1) as (standin, engine):
        tasks = [asyncio.create_task(answer(engine, asking())) for _ in range(2)]
        await eventually(lambda: standin.generated > 2 and engine.status().load.waiting == 1)
        await engine.close()
        for task in tasks:
            with pytest.raises(EngineFailed, match="closed"):
                await task
        assert engine.status().health is Health.UNHEALTHY
        with pytest.raises(EngineFailed, match="closed"):
            await answer(engine, asking())
        await engine.close()


# ------------------------------------------------------- life of a model ---


async def test_pull_load_unload() -> None:
    async with both(standin={"models": (EMBEDDER,), "library": (TINY,)}, models=["tiny:latest"]) as (standin, engine):
        assert model(engine, "tiny").state is ModelState.ABSENT
        pulled: list[Progress] = []
        async for step in engine.pull("tiny"):
            if step.completed_bytes and not pulled:
                seen = model(engine, "tiny")
                assert seen.state is ModelState.PULLING and "%" in seen.state_detail
            pulled.append(step)
        assert {step.state for step in pulled[:-1]} == {ModelState.PULLING}
        assert pulled[-1].state is ModelState.COLD is model(engine, "tiny").state
        done = [step.completed_bytes for step in pulled if step.total_bytes]
        assert done == sorted(done) and pulled[-1].completed_bytes == pulled[-1].total_bytes == TINY.size

        *_, loading, warm = await steps(engine.load("tiny"))
        assert (loading.state, warm.state) == (ModelState.LOADING, ModelState.WARM)
        found = model(engine, "tiny")
        assert found.state is ModelState.WARM and found.memory_bytes > TINY.size
        assert found.load_seconds and found.load_seconds >= standin.load_seconds
        status = engine.status()
        assert status.device == "CPU" and status.memory_used_bytes == found.memory_bytes < status.memory_bytes

        assert (await steps(engine.unload("tiny")))[-1].state is ModelState.COLD is model(engine, "tiny").state
        assert standin.loaded == {} and engine.status().memory_used_bytes == 0
        assert (await answer(engine, asking())).text, "a cold model is loaded"
        assert model(engine, "tiny").state is ModelState.WARM

        for step in (engine.load, engine.unload, engine.pull):
            with pytest.raises(UnknownModel):
                await steps(step("nobody"))


async def test_unloading_waits_until_it_is_gone() -> None:
    async with both(standin={"token_seconds": 0.005, "answer_tokens": 40}) as (standin, engine):
        task = asyncio.create_task(answer(engine, asking()))
        await eventually(lambda: standin.generated > 2)
        await steps(engine.unload("tiny"))
        assert task.done() and standin.loaded == {}
        assert (await task).text


async def test_a_pull_that_breaks_goes_on_where_it_was() -> None:
    async with both(standin={"models": (), "library": (TINY,)}) as (standin, engine):
        async with aclosing(engine.pull("tiny")) as pulling:
            async for step in pulling:
                if step.completed_bytes:
                    break
        assert "tiny" not in [m.name for m in engine.status().models]
        standin.fault = Fault("reset")
        with pytest.raises(EngineFailed):
            await steps(engine.pull("tiny"))
        standin.fault = Fault("no_end")
        with pytest.raises(EngineFailed, match="without a result"):
            await steps(engine.pull("tiny"))
        standin.fault = None
        first = next(step for step in await steps(engine.pull("tiny")) if step.completed_bytes)
        assert first.completed_bytes > 0.5 * TINY.size


async def test_a_model_that_does_not_fit() -> None:
    big = StandInModel("big", size=10**9)
    async with both(standin={"models": (TINY, big), "memory": 5 * 10**8}) as (_, engine):
        with pytest.raises(OutOfMemory, match="unload another"):
            await steps(engine.load("big"))
        found = model(engine, "big")
        assert found.state is ModelState.FAILED and "memory" in found.state_detail
        with pytest.raises(OutOfMemory):
            await answer(engine, asking(model="big"))
        assert (await answer(engine, asking())).text


async def test_named_models_are_pulled_and_warmed_by_themselves(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="model_servers.engines.ollama")
    library = {"models": (SEER,), "library": (TINY, EMBEDDER)}
    async with both(standin=library, auto_pull=True, models=["embedder"], warm=["tiny"]) as (standin, engine):
        assert engine.status().health is Health.READY, "pulling does not hold up the start"
        await eventually(lambda: model(engine, "tiny").state is ModelState.WARM)
        await eventually(lambda: model(engine, "embedder").state is ModelState.COLD)
        assert standin.loaded == {"tiny": 4096}
        assert any("100 %" in record.getMessage() for record in caplog.records)
        assert standin.asked("/api/generate")[0]["keep_alive"] == -1

        standin._drop("tiny")  # as when Ollama needed the memory
        await eventually(lambda: standin.loads["tiny"] == 2 and model(engine, "tiny").state is ModelState.WARM)

        await steps(engine.unload("tiny"))  # on purpose: it rests
        await engine._look(full=True)
        engine._provide_wanted()
        assert not engine._tasks.keys() - {"watch"} and standin.loads["tiny"] == 2
        await answer(engine, asking())
        assert standin.loads["tiny"] == 3


async def test_a_request_may_wait_for_a_named_model_to_be_pulled() -> None:
    async with both(auto_pull=True, models=["tiny"]) as (standin, engine):
        standin.present.pop("tiny")  # behind the engine's back
        assert (await answer(engine, asking())).text
        assert "tiny" in standin.present
        standin.present.pop("seer")  # nobody named this one
        with pytest.raises(UnknownModel):
            await answer(engine, asking(model="seer"))
        assert [body["model"] for body in standin.asked("/api/pull")].count("seer") == 0


async def test_what_cannot_be_warmed_is_told_and_tried_again_later() -> None:
    async with both(standin={"models": (SEER,)}, auto_pull=True, warm=["nowhere"]) as (standin, engine):
        await eventually(lambda: model(engine, "nowhere").state is ModelState.FAILED)
        assert "library" in model(engine, "nowhere").state_detail
        assert len(standin.asked("/api/pull")) == 1 and engine.status().health is Health.READY


async def test_keep_alive_ends() -> None:
    async with both(keep_alive="100ms") as (standin, engine):
        await answer(engine, asking())
        assert model(engine, "tiny").state is ModelState.WARM
        await eventually(lambda: model(engine, "tiny").state is ModelState.COLD)
        assert standin.loaded == {}


# ----------------------------------------------------- gone and back again ---


async def test_a_killed_ollama_is_unhealthy_and_comes_back() -> None:
    loop = asyncio.get_running_loop()
    async with both(standin={"token_seconds": 0.01, "answer_tokens": 500}, warm=["tiny"], poll_seconds=1.0) as (
        standin,
        engine,
    ):
        await eventually(lambda: model(engine, "tiny").state is ModelState.WARM)
        task = asyncio.create_task(answer(engine, asking()))
        await eventually(lambda: standin.generated > 2)
        killed_at = loop.time()
        await standin.stop()
        with pytest.raises(EngineFailed):
            await task
        await eventually(lambda: engine.status().health is Health.UNHEALTHY)
        assert loop.time() - killed_at < 5
        assert "ollama serve" in engine.status().health_detail
        assert model(engine, "tiny").state is ModelState.COLD, "listed still, in memory no more"
        with pytest.raises(EngineFailed, match="ollama serve"):
            await answer(engine, asking())

        standin.present["new"] = StandInModel("new")
        standin.token_seconds = 0.0
        await standin.start()
        await eventually(lambda: engine.status().health is Health.READY)
        assert model(engine, "new").state is ModelState.COLD
        await eventually(lambda: model(engine, "tiny").state is ModelState.WARM)
        assert (await answer(engine, asking())).text


async def test_a_hanging_ollama_is_unhealthy_within_five_seconds() -> None:
    async with both() as (standin, engine):  # looks more often than by default, which saves less than a second
        standin.fault = Fault("hang", everywhere=True)
        async with asyncio.timeout(4):
            await eventually(lambda: engine.status().health is Health.UNHEALTHY)
        standin.fault = None
        await eventually(lambda: engine.status().health is Health.READY)


async def test_a_program_that_is_killed_for_real() -> None:
    async with program("tests.standins.ollama", "--models", "tiny") as standin:
        engine = registry.create(plugin, registry.validate(plugin, {"url": standin.facts["url"], "poll_seconds": 0.1}))
        await engine.start()
        assert [m.name for m in engine.status().models] == ["tiny"]
        standin.kill()
        await eventually(lambda: engine.status().health is Health.UNHEALTHY)
        await engine.close()


# --------------------------------------------------------------- real one ---


async def test_a_real_ollama() -> None:
    found = await asyncio.to_thread(find_models)
    if "completion" not in found:
        pytest.skip(f"no Ollama with a model answers at {REAL}")
    engine = OllamaEngine(OllamaSettings(url=REAL, num_ctx=2048))
    await engine.start()
    try:
        request = asking("Count to five.", found["completion"], sampling=Sampling(max_tokens=8, seed=1, temperature=0))
        first = await answer(engine, request)
        assert first.finished and 1 <= first.finished.usage.completion_tokens <= 8
        assert first.finished.usage.prompt_tokens == await engine.count_tokens(request)
        assert model(engine, found["completion"]).state is ModelState.WARM
        with pytest.raises(ContextTooLong):
            await answer(engine, asking("a b c " * 1200, found["completion"]))
        if "embedding" in found:
            assert (await engine.embed(found["embedding"], ["Hello"])).vectors[0]
    finally:
        await engine.close()
