"""The engine vllm over real HTTP, before a stand-in; and as the owner of a process."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import ValidationError

from model_servers.engine import (
    ContextTooLong,
    CredentialsRejected,
    EngineFailed,
    Feature,
    Finished,
    FinishReason,
    GenerationRequest,
    Health,
    Image,
    Message,
    Restarts,
    Role,
    Sampling,
    Tool,
    ToolChoiceMode,
    Unsupported,
)
from model_servers.engines.vllm import OwnedVllmEngine, VllmEngine, VllmSettings, plugin
from tests.harness.model_servers import eventually
from tests.standins.vllm import VERSION, VllmStandIn

ROOT = Path(__file__).resolve().parents[2]
MODEL = VllmStandIn.model


@asynccontextmanager
async def engine_before(
    standin: VllmStandIn, env: dict[str, str] | None = None, **settings
) -> AsyncIterator[VllmEngine]:
    given = {"base_url": standin.url, "poll_seconds": 0.05}
    engine = VllmEngine(VllmSettings(**{**given, **settings}), env=env or {})
    await engine.start()
    try:
        yield engine
    finally:
        await engine.close()


def asked(text: str = "Hello", model: str = MODEL, **more) -> GenerationRequest:
    sampling = more.pop("sampling", Sampling(max_tokens=20, temperature=0))
    return GenerationRequest(model, (Message(Role.USER, (text,)),), sampling=sampling, **more)


async def collect(engine, wanted: GenerationRequest) -> tuple[str, Finished]:
    *deltas, finished = [item async for item in engine.generate(wanted)]
    if finished.last is not None:
        deltas.append(finished.last)
    assert sum(delta.tokens for delta in deltas) == finished.usage.completion_tokens
    return "".join(delta.text for delta in deltas), finished


async def test_everything_is_learned_from_the_server():
    async with VllmStandIn(context_length=2048) as standin, engine_before(standin, device="H100") as engine:
        status = engine.status()
        assert (status.engine, status.version, status.device) == ("vllm", VERSION, "H100")
        assert status.health is Health.READY and status.load.slots == 256
        base, adapter = status.models
        assert (base.name, adapter.name) == (MODEL, VllmStandIn.adapter)
        assert base.context_length == adapter.context_length == 2048, "an adapter has the context of its base"
        text = Feature.STREAMING | Feature.JSON | Feature.JSON_SCHEMA | Feature.LOGPROBS
        assert base.features == adapter.features == text | Feature.FUNCTION_CALLING | Feature.PREFIX_CACHE
        assert (await collect(engine, asked(model=adapter.name)))[0]


async def test_adapters_come_and_go():
    async with VllmStandIn() as standin, engine_before(standin) as engine:
        standin.adapters = ["new-adapter"]
        await eventually(lambda: [model.name for model in engine.status().models] == [MODEL, "new-adapter"])


@pytest.mark.parametrize(
    ("flags", "missing"),
    [
        ({"tools": False}, Feature.FUNCTION_CALLING),
        ({"prompt_tokens_details": False}, Feature.PREFIX_CACHE),
        ({"vision": False}, Feature.VISION),
    ],
)
async def test_what_the_server_was_started_without_is_not_offered(flags, missing):
    async with VllmStandIn(**{"vision": True, **flags}) as standin, engine_before(standin) as engine:
        features = engine.status().models[0].features
        everything = Feature.FUNCTION_CALLING | Feature.PREFIX_CACHE | Feature.VISION
        assert features & everything == everything & ~missing


async def test_settings_win_over_what_is_found_out():
    named = [{"name": MODEL, "context_length": 100, "quantization": "fp8"}]
    async with VllmStandIn() as standin, engine_before(standin, models=named, features=["streaming"]) as engine:
        base = engine.status().models[0]
        assert (base.context_length, base.quantization, base.features) == (100, "fp8", Feature.STREAMING)
        with pytest.raises(ContextTooLong):
            await collect(engine, asked("x" * 400))
        assert not [r for r in standin.requests if r.path.endswith("completions")], "no probing, no generation"


async def test_tokens_are_counted_as_generation_counts_them():
    tools = (Tool("look", "Looks.", '{"type": "object", "properties": {}}'),)
    async with VllmStandIn() as standin, engine_before(standin) as engine:
        raw = GenerationRequest(MODEL, prompt="Once upon a time", sampling=Sampling(max_tokens=4))
        for wanted in (asked(), asked("What is it?", tools=tools), raw):
            _, finished = await collect(engine, wanted)
            assert await engine.count_tokens(wanted) == finished.usage.prompt_tokens


async def test_what_does_not_fit_is_not_sent_and_what_surely_fits_is_not_counted():
    async with VllmStandIn(context_length=1024) as standin, engine_before(standin) as engine:

        def asked_of(path: str) -> int:
            return sum(recorded.path == path for recorded in standin.requests)

        counted, generated = asked_of("/tokenize"), asked_of("/v1/chat/completions")
        await collect(engine, asked("short"))
        assert (asked_of("/tokenize"), asked_of("/v1/chat/completions")) == (counted, generated + 1)
        for wanted in (asked("x" * 5000), asked("x" * 3900, sampling=Sampling(max_tokens=100))):
            with pytest.raises(ContextTooLong, match="1024"):
                await collect(engine, wanted)
        assert (asked_of("/tokenize"), asked_of("/v1/chat/completions")) == (counted + 2, generated + 1)
        _, finished = await collect(engine, asked("x" * 3900, sampling=Sampling(max_tokens=10)))
        assert finished.usage.prompt_tokens + 10 <= 1024


async def test_calls_keep_to_their_schema_because_it_is_asked_for():
    schema = '{"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}'
    wanted = asked(tools=(Tool("find", "", schema),), tool_choice=ToolChoiceMode.REQUIRED, tool_name="find")
    async with VllmStandIn() as standin, engine_before(standin) as engine:
        _, finished = await collect(engine, wanted)
        assert finished.finish_reason is FinishReason.TOOL_CALLS, "vLLM says stop after a call that was named"
        assert standin.requests[-1].body["tools"][0]["function"]["strict"] is True


async def test_images_are_sent():
    look = Message(Role.USER, ("What is it?", Image(b"\x89PNG", "image/png")))
    wanted = GenerationRequest(MODEL, (look,), sampling=Sampling(max_tokens=4))
    async with VllmStandIn(vision=True) as standin, engine_before(standin) as engine:
        _, finished = await collect(engine, wanted)
        assert finished.usage.prompt_tokens > 256


async def test_a_server_for_embeddings():
    async with VllmStandIn(embeds=True) as standin, engine_before(standin, embedding_batch=2) as engine:
        assert engine.status().models[0].features == Feature.EMBEDDING
        found = await engine.embed(MODEL, ["a", "b", "a"])
        assert found.vectors[0] == found.vectors[2] != found.vectors[1]
    async with VllmStandIn() as standin, engine_before(standin) as engine:
        with pytest.raises(Unsupported):
            await engine.embed(MODEL, ["a"])


async def test_load_counts_own_requests_now_and_those_of_others_at_the_last_look():
    async with VllmStandIn(token_seconds=0.01, max_num_seqs=2) as standin, engine_before(standin, slots=3) as engine:
        standin.foreign = 5
        await eventually(lambda: engine.status().load.running == 5)
        assert engine.status().load.kv_cache_utilization == 0.5
        standin.foreign = 0
        tasks = [asyncio.create_task(collect(engine, asked("Count to 1000"))) for _ in range(4)]
        # Two in the batch; one waits inside vLLM, one here.
        await eventually(lambda: (engine.status().load.running, engine.status().load.waiting) == (2, 2))
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await eventually(lambda: (engine.status().load.running, engine.status().load.waiting) == (0, 0))
        assert all(generation.generated < generation.wanted for generation in standin.generations[-2:])


async def test_leaving_stops_the_server():
    async with VllmStandIn(token_seconds=0.005) as standin, engine_before(standin) as engine:
        async with aclosing(engine.generate(asked("Count to 1000", sampling=Sampling(max_tokens=500)))) as items:
            async for _ in items:
                break
        generation = standin.generations[-1]
        await eventually(lambda: generation.cancelled)
        assert generation.generated < 250


async def test_more_stop_strings_than_vllm_takes():
    async with VllmStandIn(token_seconds=0.002) as standin, engine_before(standin) as engine:
        sampling = Sampling(max_tokens=200, temperature=0)
        free, whole = await collect(engine, asked("Count to 1000", sampling=sampling))
        stops = ("@1@", "@2@", "@3@", "@4@", free[100:108])
        text, cut = await collect(engine, asked("Count to 1000", sampling=replace(sampling, stop=stops)))
        assert text == free[: free.index(stops[-1])]
        assert cut.usage.prompt_tokens == whole.usage.prompt_tokens, "told with every piece"
        assert cut.usage.completion_tokens == 27
        await eventually(lambda: standin.generations[-1].cancelled)


async def test_a_server_that_goes_and_comes_back():
    async with VllmStandIn() as standin, engine_before(standin) as engine:
        await standin.stop()
        async with asyncio.timeout(5):
            await eventually(lambda: engine.status().health is Health.UNHEALTHY)
        assert "cannot be reached" in engine.status().health_detail
        standin.tools = False  # another server, started otherwise
        await standin.start()
        await eventually(lambda: engine.status().health is Health.READY)
        assert Feature.FUNCTION_CALLING not in engine.status().models[0].features
        assert (await collect(engine, asked()))[0]


async def test_a_server_that_says_it_is_unhealthy():
    async with VllmStandIn() as standin, engine_before(standin) as engine:
        standin.healthy = False
        await eventually(lambda: engine.status().health is Health.UNHEALTHY)
        standin.healthy = True
        await eventually(lambda: engine.status().health is Health.READY)


async def test_nobody_there_at_the_start_is_unhealthy_and_no_failure():
    async with VllmStandIn() as standin:
        await standin.stop()
        async with engine_before(standin) as engine:
            assert engine.status().health is Health.UNHEALTHY and engine.status().models == ()
            await standin.start()
            await eventually(lambda: engine.status().health is Health.READY)
            assert engine.status().models


async def test_a_server_with_a_key():
    async with VllmStandIn(key="token-abc") as standin:
        async with engine_before(standin, {"VLLM_KEY": "token-abc"}, api_key_env="VLLM_KEY") as engine:
            assert (await collect(engine, asked()))[0]
        async with engine_before(standin) as engine:
            status = engine.status()
            assert status.health is Health.UNHEALTHY and "api_key_env" in status.health_detail
        async with engine_before(standin, {"VLLM_KEY": "wrong"}, api_key_env="VLLM_KEY") as engine:
            assert "VLLM_KEY" in engine.status().health_detail and "wrong" not in engine.status().health_detail


async def test_a_key_that_is_refused_later():
    async with VllmStandIn(key="token-abc") as standin:
        async with engine_before(standin, {"VLLM_KEY": "token-abc"}, api_key_env="VLLM_KEY") as engine:
            standin.key = "another"
            with pytest.raises(CredentialsRejected, match="VLLM_KEY"):
                await collect(engine, asked())


# ------------------------------------------------------- an owned process ---


def owned(**settings) -> VllmSettings:
    given = {
        "model": "/models/some-model",
        "command": (sys.executable, "-m", "tests.standins.vllm"),
        "environment": {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "protos")])},
        "poll_seconds": 0.1,
        "stop_seconds": 2.0,
        "start_seconds": 30.0,
    }
    return VllmSettings(**{**given, **settings})


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def test_a_process_is_started_restarted_and_ended():
    engine = plugin.create(owned(name="mine"))
    assert isinstance(engine, OwnedVllmEngine) and isinstance(engine, Restarts)
    assert engine.status().health is Health.STARTING
    await engine.start()
    try:
        status = engine.status()
        assert status.health is Health.READY and status.models[0].name == "mine"
        assert status.models[0].load_seconds > 0
        assert Feature.PREFIX_CACHE in status.models[0].features, "the flag that tells cached tokens is set"
        assert (await collect(engine, asked(model="mine")))[0]

        first = engine._process._process.pid
        os.kill(first, signal.SIGKILL)
        await eventually(lambda: engine.status().health is not Health.READY)
        await eventually(lambda: engine.status().health is Health.READY)
        second = engine._process._process.pid
        assert second != first and (await collect(engine, asked(model="mine")))[0]

        running = asyncio.create_task(collect(engine, asked("Count to 1000", model="mine")))
        await eventually(lambda: engine.status().load.running == 1)
        await engine.restart()
        with pytest.raises(EngineFailed):
            await running
        third = engine._process._process.pid
        assert not _alive(second) and third != second
        assert engine.status().health is Health.READY and (await collect(engine, asked(model="mine")))[0]
    finally:
        await engine.close()
    assert not _alive(third)


async def test_a_process_that_does_not_come_up_says_why():
    engine = plugin.create(owned(serve_args=("--fail", "no memory for the model")))
    with pytest.raises(EngineFailed, match=r"status 1 while it started.*no memory for the model"):
        await engine.start()
    await engine.close()
    engine = plugin.create(owned(command=("/no/such/program",)))
    with pytest.raises(EngineFailed):
        await engine.start()
    await engine.close()


async def test_a_process_dies_with_its_parent():
    if sys.platform != "linux":
        pytest.skip("only Linux can do that")
    script = (
        "import asyncio, os\n"
        "from model_servers.engines._vllm.process import Process\n"
        "async def main():\n"
        "    process = await Process.start(['sleep', '600'], {}, print)\n"
        "    print(process._process.pid, flush=True)\n"
        "    await asyncio.Event().wait()\n"
        "asyncio.run(main())\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "protos")])}
    parent = await asyncio.create_subprocess_exec(sys.executable, "-c", script, stdout=asyncio.subprocess.PIPE, env=env)
    child = int(await parent.stdout.readline())
    await eventually(lambda: b"sleep" in Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")[0])
    parent.kill()
    await parent.wait()

    def gone() -> bool:
        # An orphan that ended may be waiting for init to take note.
        status = Path(f"/proc/{child}/stat")
        return not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z"

    await eventually(gone)


def test_slots_of_a_process_follow_its_arguments():
    assert VllmSettings().slot_count() == 256
    assert owned(serve_args=("--max-num-seqs", "12")).slot_count() == 12
    assert owned(serve_args=("--max-num-seqs=12", "--enforce-eager")).slot_count() == 12
    assert owned(serve_args=("--max-num-seqs", "12"), slots=3).slot_count() == 3


@pytest.mark.parametrize(
    "argument",
    ["--trust-remote-code", "--trust_remote_code=true", "--trust", "--host", "--port=1", "--api-key", "--model"],
)
def test_arguments_that_are_not_the_operators_to_set(argument):
    with pytest.raises(ValidationError):
        owned(serve_args=(argument,))
