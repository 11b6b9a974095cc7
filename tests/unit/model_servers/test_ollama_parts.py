"""Parts of the Ollama engine that need no server: slots, bodies of requests, lines of answers, errors, settings."""

from __future__ import annotations

import asyncio
import heapq
import json
import random
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from model_servers.engine import (
    Busy,
    ContextTooLong,
    CredentialsRejected,
    EngineFailed,
    Feature,
    FinishReason,
    GenerationRequest,
    Image,
    Message,
    ModelState,
    OutOfMemory,
    RateLimited,
    Role,
    Sampling,
    TaskType,
    Tool,
    ToolCall,
    ToolChoiceMode,
    UnknownModel,
    Unsupported,
)
from model_servers.engines._ollama import faults, wire
from model_servers.engines._ollama.catalogue import Catalogue, Loaded, Shown, features, shown
from model_servers.engines._ollama.names import at_least, is_remote, parse_version, short_name
from model_servers.engines._ollama.slots import START, Gate, SlotEstimate
from model_servers.engines.ollama import OllamaModel, OllamaSettings, plugin

HELLO = (Message(Role.USER, ("Hello there",)),)
RUNNING = wire.Running("tiny", num_ctx=1000, keep_alive="5m", refuses=True)
OLD = wire.Running("tiny", num_ctx=1000, keep_alive="5m", refuses=False)
WEATHER = Tool("weather", "Of a city.", '{"properties": {"at": {"$ref": "#/$defs/x"}}, "$defs": {"x": {"enum": [1]}}}')
CLOCK = Tool("clock")


def asking(**more: Any) -> GenerationRequest:
    return GenerationRequest("tiny", **({"messages": HELLO} | more))


# ---------------------------------------------------------------- imports ---


def test_importing_the_module_is_light() -> None:
    code = (
        "import sys, model_servers.engines.ollama\n"
        "print(sorted({'ollama', 'httpx', 'httpcore', 'anyio'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "[]", "")


def test_the_plugin_and_its_settings() -> None:
    assert (plugin.name, plugin.extra, plugin.metered) == ("ollama", "ollama", False)
    for model in (OllamaSettings, OllamaModel):
        assert not [name for name, field in model.model_fields.items() if not field.description]
    settings = OllamaSettings.model_validate({"models": ["a:latest", {"name": "b:7b"}], "warm": ["a", "a:latest"]})
    assert [model.name for model in settings.models] == ["a", "b:7b"] and settings.warm == ("a",)
    assert [OllamaSettings(keep_alive=each).keep_alive for each in ("-1", 60, "1h30m")] == [-1.0, 60.0, "1h30m"]
    assert OllamaSettings(url="host:1").url == "http://host:1"


@pytest.mark.parametrize(
    "wrong",
    [
        {"url": "ftp://x"},
        {"keep_alive": "soon"},
        {"models": ["a", "a:latest"]},
        {"capabilities": {"cooking": 1}},
        {"models": [{"name": "a", "capabilities": {"chat": 2}}]},
        {"slots": 0},
        {"slotz": 1},
    ],
)
def test_settings_that_cannot_be(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        OllamaSettings.model_validate(wrong)


def test_names_and_versions() -> None:
    assert (short_name("llama3.2:latest"), short_name("llama3.2:1b")) == ("llama3.2", "llama3.2:1b")
    assert [is_remote(name) for name in ("gpt-oss:120b-cloud", "kimi:cloud", "cloud", "a:7b")] == [
        True,
        True,
        False,
        False,
    ]
    assert parse_version("0.12.11-rc1") == (0, 12, 11) and parse_version("?") == ()
    assert at_least("0.13.0", (0, 12, 6)) and at_least("0.0.0", (0, 12, 6)) and not at_least("0.12.5", (0, 12, 6))
    assert not at_least("", (0, 12, 6))


# ------------------------------------------------------------------ slots ---


def simulate(slots: int, estimate: SlotEstimate, *, clients: int, requests: int, seconds: float = 1.0) -> list[int]:
    """A server with so many slots and a queue, and clients that keep `estimate.slots` requests inside it.

    Returns the estimate after each finished request.
    """
    draw = random.Random(slots)
    now, found = 0.0, []
    free = [0.0] * slots
    """When each slot is free."""
    inside: list[tuple[float, int, float, float]] = []
    """End, others at the beginning, seconds in the queue, seconds of work."""
    while len(found) < requests:
        while len(inside) < min(clients, estimate.slots):
            start = max(now, heapq.heappop(free))
            worked = draw.uniform(0.2, 2.0) * seconds
            heapq.heappush(free, start + worked)
            heapq.heappush(inside, (start + worked, len(inside), start - now, worked))
        now, beside, waited, worked = heapq.heappop(inside)
        estimate.observe(beside, waited + draw.uniform(0.0, 0.005), worked)
        found.append(estimate.slots)
    return found


@pytest.mark.parametrize("slots", [1, 2, 4])
def test_slots_are_found_under_load(slots: int) -> None:
    found = simulate(slots, SlotEstimate(16), clients=32, requests=200)
    settled = found[40:]
    assert set(settled) <= {slots, slots + 1, slots + 2}, "more is tried now and then"
    assert settled.count(slots) > 0.7 * len(settled)


def test_slots_grow_to_their_bound_and_not_beyond() -> None:
    assert max(simulate(64, SlotEstimate(6), clients=32, requests=100)) == 6


def test_little_load_teaches_little() -> None:
    estimate = SlotEstimate(16)
    assert simulate(4, estimate, clients=1, requests=50)[-1] == START


def test_what_is_not_clear_teaches_nothing() -> None:
    estimate = SlotEstimate(16)
    estimate.observe(beside=1, waited=5.0, worked=0.0)  # no durations: an old server
    estimate.observe(beside=1, waited=0.1, worked=1.0)  # neither a queue nor none
    estimate.observe(beside=0, waited=5.0, worked=1.0)  # alone: somebody else's request
    assert estimate.slots == START
    estimate.observe(beside=1, waited=0.5, worked=1.0)
    assert estimate.slots == 1


def test_a_wait_behind_strangers_is_unlearned() -> None:
    estimate = SlotEstimate(16)
    for beside in range(4):
        estimate.observe(beside, 0.0, 1.0)
    assert estimate.slots == 5
    estimate.observe(1, 0.9, 1.0)
    assert estimate.slots == 1
    assert simulate(4, estimate, clients=32, requests=200)[-1] in (4, 5)


async def test_the_gate_admits_in_order_of_arrival_and_grows() -> None:
    size = 1
    gate = Gate(lambda: size)
    order: list[int] = []
    leave = [asyncio.Event() for _ in range(5)]

    async def one(number: int) -> None:
        async with gate.hold():
            order.append(number)
            await leave[number].wait()

    tasks = [asyncio.create_task(one(number)) for number in range(5)]
    await asyncio.sleep(0)
    assert (order, gate.inside, gate.waiting) == ([0], 1, 4)
    tasks[1].cancel()  # waits
    leave[0].set()
    await asyncio.wait({tasks[0], tasks[1]})
    await asyncio.sleep(0)
    assert (order, gate.inside, gate.waiting) == ([0, 2], 1, 2)
    size = 3
    gate.admit()
    await asyncio.sleep(0)
    assert (order, gate.inside, gate.waiting) == ([0, 2, 3, 4], 3, 0)
    for event in leave:
        event.set()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert gate.inside == 0


async def test_a_place_given_to_one_who_just_left_goes_on() -> None:
    gate = Gate(lambda: 1)
    entered = asyncio.Event()

    async def one() -> None:
        async with gate.hold():
            entered.set()

    async with gate.hold():
        first, second = asyncio.create_task(one()), asyncio.create_task(one())
        await asyncio.sleep(0)
    first.cancel()  # the place is its own already, but it has not run since
    async with asyncio.timeout(1):
        await entered.wait()
        await second
    assert gate.inside == 0 and first.cancelled()


async def test_a_closed_gate_raises() -> None:
    gate = Gate(lambda: 1)
    async with gate.hold():
        waiting = asyncio.create_task(gate.hold().__aenter__())
        await asyncio.sleep(0)
        gate.close(lambda: EngineFailed("closed"))
        with pytest.raises(EngineFailed, match="closed"):
            await waiting
    with pytest.raises(EngineFailed, match="closed"):
        async with gate.hold():
            pass
    assert gate.inside == 0


# --------------------------------------------------------------- requests ---


def test_every_sampling_parameter_has_its_option() -> None:
    sampling = Sampling(
        max_tokens=7, temperature=0.5, top_p=0.9, top_k=3, min_p=0.1, stop=("a", "b"), seed=2**63 + 5,
        frequency_penalty=0.2, presence_penalty=0.3, repetition_penalty=1.1, logprobs=True, top_logprobs=2,
    )  # fmt: skip
    running = wire.Running("tiny", 1000, -1, True, stops=("b", "<|end|>"))
    call = wire.make_call(asking(sampling=sampling), running)
    assert call.body["options"] == {
        "num_ctx": 1000, "num_predict": 7, "temperature": 0.5, "top_p": 0.9, "top_k": 3, "min_p": 0.1, "seed": 5,
        "stop": ["a", "b", "<|end|>"], "frequency_penalty": 0.2, "presence_penalty": 0.3, "repeat_penalty": 1.1,
    }  # fmt: skip
    assert (call.body["logprobs"], call.body["top_logprobs"]) == (True, 2)
    assert (call.body["truncate"], call.body["shift"], call.body["keep_alive"]) == (False, False, -1)


def test_what_is_not_asked_for_is_the_models_own() -> None:
    body = wire.make_call(asking(), wire.Running("tiny", 1000, "5m", True, stops=("<|end|>",))).body
    assert set(body["options"]) == {"num_ctx", "num_predict"}
    assert 900 < body["options"]["num_predict"] < 1000, "bounded by what the context leaves"
    assert not {"think", "format", "tools", "logprobs"} & set(body)


def test_messages() -> None:
    conversation = (
        Message(Role.SYSTEM, ("Be brief.",)),
        Message(Role.USER, ("Look", Image(b"\x89PNG", "image/png"), " here")),
        Message(Role.ASSISTANT, tool_calls=(ToolCall("c1", "weather", '{"at": 1}'),)),
        Message(Role.TOOL, ("sunny",), tool_call_id="c1"),
    )
    call = wire.make_call(
        asking(messages=conversation, tools=(WEATHER,)), wire.Running("t", 4000, 1, True, think="low")
    )
    assert call.path == "/api/chat" and call.body["think"] == "low"
    assert call.body["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Look here", "images": ["iVBORw=="]},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "c1", "function": {"name": "weather", "arguments": {"at": 1}}}],
        },
        {"role": "tool", "content": "sunny", "tool_call_id": "c1", "tool_name": "weather"},
    ]
    (tool,) = call.body["tools"]
    assert tool["function"]["parameters"] == {"type": "object", **json.loads(WEATHER.parameters_schema)}


def test_raw_prompts() -> None:
    call = wire.make_call(asking(messages=(), prompt="Once"), RUNNING)
    assert (call.path, call.body["prompt"], call.body["raw"]) == ("/api/generate", "Once", True)
    with pytest.raises(Unsupported, match="raw prompt"):
        wire.make_call(asking(messages=(), prompt="Once", tools=(CLOCK,)), RUNNING)


def test_formats() -> None:
    assert wire.make_call(asking(json_object=True), RUNNING).body["format"] == "json"
    assert wire.make_call(asking(json_schema='{"type": "array"}'), RUNNING).body["format"] == {"type": "array"}
    with pytest.raises(Unsupported, match="not valid JSON"):
        wire.make_call(asking(json_schema="{"), RUNNING)


def test_tool_choice() -> None:
    tools = (WEATHER, CLOCK)
    assert "tools" not in wire.make_call(asking(tools=tools, tool_choice=ToolChoiceMode.NONE), RUNNING).body
    free = wire.make_call(asking(tools=tools), RUNNING)
    assert "format" not in free.body and not free.forced
    some = wire.make_call(asking(tools=tools, tool_choice=ToolChoiceMode.REQUIRED), RUNNING)
    assert some.forced and [one["properties"]["name"]["enum"] for one in some.body["format"]["anyOf"]] == [
        ["weather"],
        ["clock"],
    ]
    assert some.body["format"]["$defs"] == {"x": {"enum": [1]}}, "references count from the root"
    one = wire.make_call(asking(tools=tools, tool_choice=ToolChoiceMode.REQUIRED, tool_name="clock"), RUNNING)
    assert one.body["format"]["properties"]["name"]["enum"] == ["clock"] and "$defs" not in one.body["format"]


@pytest.mark.parametrize(
    ("words", "max_tokens", "running", "fits"),
    [
        (100, None, RUNNING, True),
        (100, 800, RUNNING, True),
        (100, 950, RUNNING, False),
        (10_000, None, RUNNING, False),
        (500, None, RUNNING, True),
        (500, None, OLD, False),  # an old server would cut it silently if its tokens were short
    ],
)
def test_what_cannot_fit_is_refused(words: int, max_tokens: int | None, running: wire.Running, fits: bool) -> None:
    request = asking(messages=(Message(Role.USER, ("word " * words,)),), sampling=Sampling(max_tokens=max_tokens))
    if fits:
        wire.make_call(request, running)
    else:
        with pytest.raises(ContextTooLong, match="raise num_ctx"):
            wire.make_call(request, running)


def test_own_stop_strings_are_read_from_the_parameters() -> None:
    text = 'num_keep                       24\nstop                           "<|eot|>"\nstop "\\n"\nstop bare\nstop ""'
    assert wire.own_stops(text) == ("<|eot|>", "\n", "bare")
    assert wire.own_stops(None) == ()


# ---------------------------------------------------------------- answers ---


def read(call: wire.Call, *lines: dict[str, Any], running: wire.Running = RUNNING) -> list[Any]:
    reader = wire.Reader(call, running)
    found = []
    for line in map(wire.parse_line, lines):
        found.append(reader.finish(line, 0.25) if line.done else reader.delta(line))
    return found


def says(text: str, **more: Any) -> dict[str, Any]:
    return {"message": {"role": "assistant", "content": text, **more}, "done": False}


def end(**more: Any) -> dict[str, Any]:
    return {"message": {"content": ""}, "done": True, "done_reason": "stop", "prompt_eval_count": 9, **more}


def test_an_answer_with_thoughts_and_logprobs() -> None:
    call = wire.make_call(asking(sampling=Sampling(logprobs=True, top_logprobs=1)), RUNNING)
    logprobs = [{"token": "Hi", "logprob": -0.5, "top_logprobs": [{"token": "Ho", "logprob": 0.0001}]}]
    thought, said, finished = read(
        call, says("", thinking="Hm"), says("Hi") | {"logprobs": logprobs}, end(eval_count=2)
    )
    assert (thought.reasoning_text, thought.text, thought.tokens) == ("Hm", "", 1)
    assert said.text == "Hi" and said.logprobs[0].top == (("Ho", 0.0),), "never above 0"
    assert finished.finish_reason is FinishReason.STOP and finished.queued == 0.25 and finished.last is None
    assert (finished.usage.prompt_tokens, finished.usage.completion_tokens, finished.usage.reasoning_tokens) == (
        9,
        2,
        1,
    )


@pytest.mark.parametrize(
    ("last", "reason"),
    [
        (end(done_reason="length", eval_count=5), FinishReason.LENGTH),
        (end(done_reason="stop", eval_count=5), FinishReason.STOP),
        (end(done_reason="load"), FinishReason.STOP),
        (end(done_reason="", eval_count=5), FinishReason.LENGTH),
        (end(done_reason="", eval_count=4), FinishReason.STOP),
    ],
)
def test_finish_reasons(last: dict[str, Any], reason: FinishReason) -> None:
    (finished,) = read(wire.make_call(asking(sampling=Sampling(max_tokens=5)), RUNNING), last)
    assert finished.finish_reason is reason


def test_tool_calls() -> None:
    calls = [{"function": {"name": "weather", "arguments": {"at": None}}}, {"id": "x", "function": {"name": "clock"}}]
    delta, finished = read(
        wire.make_call(asking(tools=(WEATHER, CLOCK)), RUNNING), says("", tool_calls=calls), end(eval_count=12)
    )
    first, second = delta.tool_calls
    assert (first.index, first.name, first.arguments_json) == (0, "weather", '{"at": null}') and first.id
    assert (second.index, second.id, second.name, second.arguments_json) == (1, "x", "clock", "{}")
    assert finished.finish_reason is FinishReason.TOOL_CALLS


def test_a_forced_call_is_read_from_the_text_or_taken_as_it_comes() -> None:
    call = wire.make_call(asking(tools=(CLOCK,), tool_choice=ToolChoiceMode.REQUIRED), RUNNING)
    *nothing, finished = read(call, says('{"name": "clock", '), says('"arguments": {}}'), end(eval_count=8))
    assert nothing == [None, None] and finished.finish_reason is FinishReason.TOOL_CALLS
    assert finished.last.tool_calls[0].name == "clock" and finished.last.tokens == 8

    native = [{"function": {"name": "clock", "arguments": {}}}]
    delta, finished = read(call, says("", tool_calls=native), end(eval_count=8))
    assert delta.tool_calls and finished.last is None and finished.finish_reason is FinishReason.TOOL_CALLS

    _, cut = read(call, says('{"name": "clo'), end(done_reason="length"))
    assert cut.finish_reason is FinishReason.LENGTH and cut.last is None
    with pytest.raises(EngineFailed, match="constrained"):
        read(call, says("I would rather not"), end())


def test_a_prompt_that_was_cut_is_no_answer() -> None:
    call = wire.make_call(asking(), OLD)
    with pytest.raises(ContextTooLong, match=r"0\.12\.6"):
        read(call, end(prompt_eval_count=1000), running=OLD)
    with pytest.raises(EngineFailed, match="cut the prompt"):
        read(call, says("Hi"), end(prompt_eval_count=999), running=OLD)
    (fits,) = read(call, end(prompt_eval_count=990), running=OLD)
    assert fits.usage.prompt_tokens == 990
    (exact,) = read(wire.make_call(asking(), RUNNING), end(prompt_eval_count=1000))
    assert exact.usage.prompt_tokens == 1000, "a server that refuses does not cut"


def test_time_in_ollamas_queue_is_what_is_left() -> None:
    line = wire.parse_line(
        end(total_duration=10_000_000_000, load_duration=2 * 10**9, prompt_eval_duration=10**9, eval_duration=3 * 10**9)
    )
    assert (line.waited, line.worked) == (4.0, 4.0)
    assert (wire.parse_line(end()).waited, wire.parse_line(end()).worked) == (0.0, 0.0)


@pytest.mark.parametrize("garbage", [{"message": "x"}, {"done": "yes"}, {"eval_count": "many"}])
def test_what_is_no_line_of_an_answer(garbage: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        wire.parse_line(garbage)


# ----------------------------------------------------------------- errors ---


@pytest.mark.parametrize(
    ("text", "status", "kind"),
    [
        ("model 'x' not found", 404, UnknownModel),
        ('model "x" not found, try pulling it first', -1, UnknownModel),
        ("pull model manifest: file does not exist", -1, UnknownModel),
        ("server busy, please try again.  maximum pending requests exceeded", 503, Busy),
        ("too many requests", 429, RateLimited),
        ("unauthorized", 401, CredentialsRejected),
        ("forbidden", 403, CredentialsRejected),
        ("model requires more system memory (8.1 GiB) than is available (7.3 GiB)", 500, OutOfMemory),
        ("llama runner process has terminated: cudaMalloc failed: out of memory", 500, OutOfMemory),
        ("request (9 tokens) exceeds the available context size (8 tokens), try increasing it", 400, ContextTooLong),
        ("the input length exceeds the context length", 400, ContextTooLong),
        ("registry.ollama.ai/library/x does not support tools", 400, Unsupported),
        ("invalid JSON schema in format", 400, Unsupported),
        ("llama runner process has terminated: exit status 2", 500, EngineFailed),
        ("", 500, EngineFailed),
    ],
)
def test_errors_have_their_types(text: str, status: int, kind: type[Exception]) -> None:
    assert type(faults.from_response(text, status, "x")) is kind
    assert type(faults.from_response(text, status, "x", started=True)) is EngineFailed


def test_errors_quote_nothing_of_prompt_or_answer() -> None:
    said = faults.from_response("error parsing tool call: raw='{\"secret\": 1}', err=invalid", 500, "x")
    assert str(said) == "Ollama failed: error parsing tool call"
    assert "secret" not in str(faults.from_response("<html>secret", 500, "x"))
    assert len(faults.harmless("x" * 10_000)) < 200


@pytest.mark.parametrize(("header", "seconds"), [("7", 7.0), ("", 1.0), ("Wed, 21 Oct", 1.0), ("-3", 0.0)])
def test_retry_after(header: str, seconds: float) -> None:
    assert faults.rate_limited(header).retry_after == seconds


# -------------------------------------------------------------- catalogue ---


def answer(**more: Any) -> Any:
    """What the client's `show` gives."""
    found = {"modelinfo": {}, "details": None, "capabilities": None, "parameters": None}
    return SimpleNamespace(**(found | more))


def test_what_ollama_shows_of_a_model() -> None:
    facts = {"general.architecture": "llama", "llama.context_length": 8192}
    found = shown("d", 5, answer(modelinfo=facts, capabilities=["completion", "tools"], parameters='stop "x"'))
    assert found == Shown("d", 5, "", 8192, frozenset({"completion", "tools"}), ("x",))
    assert shown("d", 5, answer()).abilities == {"completion"}, "an old server that does not say"
    assert shown("d", 5, answer(modelinfo={"bert.pooling_type": 1})).abilities == {"embedding"}


def test_features_follow_abilities_and_version() -> None:
    text = Feature.STREAMING | Feature.JSON | Feature.JSON_SCHEMA
    assert features(frozenset({"completion"}), "0.12.10") == text
    assert features(frozenset({"completion", "tools", "vision", "thinking"}), "0.12.11") == (
        text | Feature.FUNCTION_CALLING | Feature.VISION | Feature.LOGPROBS
    )
    assert features(frozenset({"embedding"}), "0.13.0") == Feature.EMBEDDING


def catalogue(**settings: Any) -> Catalogue:
    found = Catalogue(OllamaSettings.model_validate(settings))
    found.version = "0.13.0"
    found.here = {"a": Shown("d", 5, "Q4_0", 32_000, frozenset({"completion"}))}
    return found


def test_the_context_length_is_bounded() -> None:
    assert catalogue().num_ctx("a") == 8192
    assert catalogue(max_num_ctx=100_000).num_ctx("a") == 32_000
    assert catalogue(num_ctx=16_000).num_ctx("a") == 16_000
    assert catalogue(num_ctx=64_000).num_ctx("a") == 32_000, "never beyond what the model was trained for"
    assert catalogue(num_ctx=16_000, models=[{"name": "a", "num_ctx": 2000}]).num_ctx("a") == 2000


def test_states_of_a_model() -> None:
    known = catalogue(models=["b"], warm=["a"])
    known.load_seconds["a"] = 3.0
    a, b = {model.name: model for model in known.describe()}.values()  # named ones first
    if a.name == "b":
        a, b = b, a
    assert (a.state, b.state, a.memory_bytes, a.load_seconds) == (ModelState.COLD, ModelState.ABSENT, 5, 3.0)
    assert "ollama pull b" in b.state_detail and a.quantization == "Q4_0"
    with known.doing("b", ModelState.PULLING) as step:
        step.detail = "10%"
        assert known.state("b") == (ModelState.PULLING, "10%")
    known.failed["b"] = "no room"
    assert known.state("b") == (ModelState.FAILED, "no room")
    known.loaded["a"] = Loaded(size=9, context_length=4096)
    (a,) = (model for model in known.describe() if model.name == "a")
    assert (a.state, a.memory_bytes, a.context_length) == (ModelState.WARM, 9, 4096), "as Ollama has really loaded it"


def test_scores_are_given_for_what_the_model_can_do() -> None:
    (model,) = catalogue().describe()
    assert TaskType.CHAT in model.capabilities
    assert not {TaskType.VISION, TaskType.EMBEDDING, TaskType.TOOL_USE} & set(model.capabilities)
    (model,) = catalogue(models=[{"name": "a", "capabilities": {"chat": 0.9}}], capabilities={"writing": 1}).describe()
    assert model.capabilities == {TaskType.CHAT: 0.9}


def test_warm_models_stay_and_only_thinkers_think() -> None:
    known = catalogue(warm=["a"], think=True)
    assert (known.running("a").keep_alive, known.running("a").think) == (-1, None)
    known.here["t"] = Shown("d", 5, "", 0, frozenset({"completion", "thinking"}))
    assert (known.running("t").keep_alive, known.running("t").think) == ("30m", True)
