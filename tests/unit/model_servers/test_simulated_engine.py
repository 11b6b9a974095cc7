"""The simulated engine by itself, in instant mode unless time is what is tested."""

from __future__ import annotations

import asyncio
import json
import time
from contextlib import aclosing

import pytest

from model_servers.engine import (
    ContextTooLong,
    Delta,
    EngineFailed,
    Feature,
    Finished,
    FinishReason,
    GenerationRequest,
    Health,
    InvalidRequest,
    Message,
    Role,
    Sampling,
    Tool,
    ToolChoiceMode,
    UnknownModel,
    Unsupported,
)
from model_servers.engines.simulated import SimulatedEngine, SimulatedSettings
from model_servers.engines.simulated.cache import PrefixCache, block_keys
from model_servers.engines.simulated.schema import minimal_json


def ask(text: str = "Hello", **more) -> GenerationRequest:
    return GenerationRequest("simulated", (Message(Role.USER, (text,)),), **more)


async def started(**settings) -> SimulatedEngine:
    engine = SimulatedEngine(SimulatedSettings(**{"instant": True, **settings}))
    await engine.start()
    return engine


async def collect(engine: SimulatedEngine, request: GenerationRequest) -> tuple[str, list[Delta], Finished]:
    *deltas, finished = [item async for item in engine.generate(request)]
    if finished.last is not None:
        deltas.append(finished.last)
    return "".join(delta.text for delta in deltas), deltas, finished


async def test_natural_answer_says_that_it_is_simulated_and_ends_with_a_sentence():
    text, deltas, finished = await collect(await started(), ask())
    assert "simulated" in text and text.endswith(".")
    assert finished.finish_reason is FinishReason.STOP
    assert finished.usage.completion_tokens == len(deltas) == sum(delta.tokens for delta in deltas)


async def test_prompts_and_seeds_determine_the_answer():
    engine, same, other = await started(), await started(), await started(seed=1)
    texts = [(await collect(e, ask("one", sampling=Sampling(seed=3))))[0] for e in (engine, engine, same, other)]
    assert texts[0] == texts[1] == texts[2] != texts[3]
    assert (await collect(engine, ask("two", sampling=Sampling(seed=3))))[0] != texts[0]


async def test_exact_answer_length_and_chunks():
    _, deltas, finished = await collect(await started(answer_tokens=100, tokens_per_chunk=8), ask())
    assert [delta.tokens for delta in deltas] == [8] * 12 + [4]
    assert finished.usage.completion_tokens == 100


async def test_max_tokens_cuts_the_same_text_short():
    engine = await started()
    whole, _, _ = await collect(engine, ask())
    cut, _, finished = await collect(engine, ask(sampling=Sampling(max_tokens=10)))
    assert whole.startswith(cut) and finished.usage.completion_tokens == 10
    assert finished.finish_reason is FinishReason.LENGTH


async def test_earliest_stop_string_wins():
    text, _, finished = await collect(await started(), ask(sampling=Sampling(stop=("read", "model", "zzz"))))
    assert text == "This is a simulated answer: no "
    assert finished.finish_reason is FinishReason.STOP


async def test_context_length_bounds_prompt_and_answer():
    engine = await started(context_length=40, answer_tokens=500)
    with pytest.raises(ContextTooLong):
        await collect(engine, ask("x" * 400))
    with pytest.raises(ContextTooLong):
        await collect(engine, ask(sampling=Sampling(max_tokens=40)))
    _, _, finished = await collect(engine, ask())
    assert finished.usage.prompt_tokens + finished.usage.completion_tokens == 40
    assert finished.finish_reason is FinishReason.LENGTH


async def test_required_tool_is_called_with_fitting_arguments():
    tools = (Tool("first"), Tool("second", "", json.dumps({"type": "object", "required": ["q"]})))
    request = ask(tools=tools, tool_choice=ToolChoiceMode.REQUIRED, tool_name="second")
    _, deltas, finished = await collect(await started(), request)
    calls = [call for delta in deltas for call in delta.tool_calls]
    assert (calls[0].name, bool(calls[0].id)) == ("second", True)
    assert not any(call.name or call.id for call in calls[1:])
    assert "q" in json.loads("".join(call.arguments_json for call in calls))
    assert finished.finish_reason is FinishReason.TOOL_CALLS


async def test_next_turn_finds_the_conversation_in_the_cache():
    engine = await started(block_tokens=16)
    first = Message(Role.USER, ("tell me a long story " * 20,))
    answer, _, before = await collect(engine, GenerationRequest("simulated", (first,)))
    turns = (first, Message(Role.ASSISTANT, (answer,)), Message(Role.USER, ("and then?",)))
    _, _, after = await collect(engine, GenerationRequest("simulated", turns))
    assert before.usage.cached_prompt_tokens == 0
    assert before.usage.prompt_tokens < after.usage.cached_prompt_tokens < after.usage.prompt_tokens


async def test_no_cache_without_the_feature_or_with_no_blocks():
    for settings in ({"models": [{"name": "simulated", "features": ["streaming"]}]}, {"cache_blocks": 0}):
        engine = await started(block_tokens=16, **settings)
        for _ in range(2):
            _, _, finished = await collect(engine, ask("x" * 1000))
        assert finished.usage.cached_prompt_tokens == 0


def test_cache_forgets_the_least_recently_used_block():
    cache = PrefixCache(3)
    a, b = block_keys("m", "a" * 128, 16), block_keys("m", "b" * 128, 16)
    cache.insert(a)
    cache.insert(b)
    assert (cache.match(a), cache.match(b), len(cache)) == (1, 2, 3)
    assert block_keys("m", "a" * 63, 16) == ()
    assert block_keys("other", "a" * 128, 16) != a


async def test_slots_are_given_in_order_and_freed_at_once():
    engine = await started(slots=1, faults=[{"kind": "hang", "at_request": 1, "tokens": 1}])
    hanging = engine.generate(ask())
    await anext(hanging)
    order: list[str] = []

    async def wait_for(name: str) -> None:
        await collect(engine, ask())
        order.append(name)

    waiting = [asyncio.create_task(wait_for(name)) for name in ("a", "b", "c")]
    while engine.status().load.waiting < 3:
        await asyncio.sleep(0)
    waiting[1].cancel()
    await hanging.aclose()
    await asyncio.gather(*waiting, return_exceptions=True)
    assert order == ["a", "c"]
    load = engine.status().load
    assert (load.running, load.waiting, load.kv_cache_utilization) == (0, 0, 0)


async def test_closing_fails_what_runs_and_what_waits():
    engine = await started(slots=1, faults=[{"kind": "hang", "tokens": 1}])
    tasks = [asyncio.create_task(collect(engine, ask())) for _ in range(2)]
    while engine.status().load.waiting < 1:
        await asyncio.sleep(0)
    await engine.close()
    await engine.close()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(result, EngineFailed) for result in results)
    assert engine.status().health is Health.UNHEALTHY


async def test_speeds_are_kept():
    loop = asyncio.get_running_loop()
    engine = await started(
        instant=False, prefill_tokens_per_second=1000, decode_tokens_per_second=500, aggregate_tokens_per_second=500,
        answer_tokens=50,
    )  # fmt: skip
    begun = loop.time()
    await collect(engine, ask("x" * 388))  # with the roles around it about 100 tokens
    alone = loop.time() - begun
    assert alone >= 0.1 + 49 / 500 - 0.01
    begun = loop.time()
    await asyncio.gather(*(collect(engine, ask()) for _ in range(2)))
    assert loop.time() - begun >= 2 * 49 / 500 - 0.02  # two share what one had


def raw(text: str, **more) -> GenerationRequest:
    return GenerationRequest("simulated", prompt=text, **more)


async def test_answers_are_slower_while_a_prompt_is_computed():
    loop = asyncio.get_running_loop()
    engine = await started(
        instant=False, prefill_tokens_per_second=1000, decode_tokens_per_second=100, aggregate_tokens_per_second=0,
        answer_tokens=50, prefill_interference=0.25,
    )  # fmt: skip
    async with aclosing(engine.generate(raw("short"))) as stream:
        await anext(stream)
        long = asyncio.create_task(collect(engine, raw("x" * 40_000)))  # ten seconds in the lane
        begun = loop.time()
        for _ in range(7):
            await anext(stream)
        assert loop.time() - begun >= 6 / 100 / 0.25 - 0.01  # the first was due before the lane was busy
        long.cancel()


async def test_a_prompt_that_is_given_up_leaves_the_lane_at_once():
    engine = await started(instant=False, prefill_tokens_per_second=1000, context_length=2**20, answer_tokens=1)
    long = asyncio.create_task(collect(engine, raw("x" * 400_000)))
    short = asyncio.create_task(collect(engine, raw("short")))
    while engine.status().load.running < 2:
        await asyncio.sleep(0)
    long.cancel()
    async with asyncio.timeout(5):
        await short


async def test_a_prompt_finds_what_the_one_before_it_in_the_lane_has_left_in_the_cache():
    engine = await started(instant=False, prefill_tokens_per_second=5000, block_tokens=16, answer_tokens=1)
    both = await asyncio.gather(*(collect(engine, raw("x" * 640)) for _ in range(2)))
    assert [finished.usage.cached_prompt_tokens for _, _, finished in both] == [0, 144]


async def test_a_prompt_may_tell_how_long_its_answer_is():
    engine = await started(told_answers=True, answer_tokens=7)
    tokens = [
        (await collect(engine, request))[2].usage.completion_tokens
        for request in (ask("Go on [12 tokens]"), raw("Go on [3 tokens]"), ask("[12 tokens] or so"))
    ]
    assert tokens == [12, 3, 7]
    assert (await collect(await started(answer_tokens=7), ask("[12 tokens]")))[2].usage.completion_tokens == 7


async def test_closing_fails_prompts_that_wait_for_the_lane():
    engine = await started(instant=False, prefill_tokens_per_second=1)
    tasks = [asyncio.create_task(collect(engine, ask())) for _ in range(2)]
    while engine.status().load.running < 2:
        await asyncio.sleep(0)
    await engine.close()
    assert all(isinstance(each, EngineFailed) for each in await asyncio.gather(*tasks, return_exceptions=True))


async def test_slow_reader_of_the_generator_gets_what_became_due():
    engine = await started(
        instant=False, decode_tokens_per_second=1000, aggregate_tokens_per_second=0, answer_tokens=100
    )
    sizes = []
    async with aclosing(engine.generate(ask())) as items:
        async for item in items:
            if isinstance(item, Delta):
                sizes.append(item.tokens)
                await asyncio.sleep(0.03)
            elif item.last is not None:
                sizes.append(item.last.tokens)
    assert sum(sizes) == 100 and max(sizes) > 5


async def test_fault_conditions():
    engine = await started(
        faults=[{"kind": "error", "after_requests": 2, "every": 2, "times": 1}, {"kind": "error", "model": "other"}]
    )
    failed = []
    for number in range(1, 7):
        try:
            await collect(engine, ask())
        except EngineFailed:
            failed.append(number)
    assert failed == [4]


async def test_faults_by_chance_repeat_with_the_seed():
    async def pattern(seed: int) -> list[bool]:
        engine = await started(seed=seed, faults=[{"kind": "error", "probability": 0.5}])
        return [isinstance(r, Exception) for r in [await attempt(engine) for _ in range(20)]]

    async def attempt(engine):
        try:
            return await collect(engine, ask())
        except EngineFailed as error:
            return error

    assert await pattern(1) == await pattern(1) != await pattern(2)


async def test_refuse_start():
    with pytest.raises(EngineFailed):
        await started(faults=[{"kind": "refuse_start"}])


async def test_unknown_model_everywhere():
    engine = await started()
    unknown = GenerationRequest("nobody", prompt="x")
    for call in (collect(engine, unknown), engine.count_tokens(unknown), engine.embed("nobody", ["x"])):
        with pytest.raises(UnknownModel, match="simulated"):
            await call


async def test_images_count_and_settings_reach_the_description():
    engine = await started(models=["one", {"name": "two", "features": ["streaming", "vision"], "price": {"prompt": 2}}])
    one, two = engine.status().models
    assert one.name == "one" and Feature.VISION not in one.features
    assert two.price == (2.0, 0.0, 0.0) and two.features == Feature.STREAMING | Feature.VISION


async def test_configured_speeds_are_expected_before_anything_is_measured():
    engine = await started(instant=False, prefill_tokens_per_second=1000, decode_tokens_per_second=50, time_scale=2)
    (model,) = engine.status().models
    assert (model.expected_ttft, model.expected_tpot) == (pytest.approx(0.2), pytest.approx(0.04))
    (model,) = (await started()).status().models
    assert (model.expected_ttft, model.expected_tpot) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ({}, {}),
        ({"type": "object", "required": ["a"], "properties": {"a": {"enum": ["x", "y"]}, "b": {}}}, {"a": "x"}),
        ({"$ref": "#/$defs/p", "$defs": {"p": {"type": "array", "items": {"const": 1}, "minItems": 2}}}, [1, 1]),
        ({"anyOf": [{"type": "integer", "minimum": 5}, {"type": "null"}]}, 5),
        ({"type": "number", "exclusiveMinimum": 0, "maximum": 0.5}, 0.25),
        ({"type": "integer", "exclusiveMinimum": 2, "multipleOf": 5}, 5),
        ({"type": "integer", "maximum": -3}, -3),
        ({"type": "string", "minLength": 12, "maxLength": 12}, "simulated..."),
        ({"type": "string", "format": "date"}, "2000-01-01"),
        ({"type": ["null", "string"]}, None),
        ({"allOf": [{"required": ["a"]}, {"properties": {"a": {"type": "boolean"}}}]}, {"a": False}),
    ],
)
def test_minimal_json(schema, expected):
    assert json.loads(minimal_json(json.dumps(schema))) == expected


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ('{"$ref": "#"}', "no finite instance"),
        ('{"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}', "no finite instance"),
        ('{"required": ["a"], "properties": {"a": {"$ref": "#"}}}', "no finite instance"),
        ('{"$ref": "#/SECRET"}', "leads nowhere"),
        ('{"$ref": 5}', "must be a string"),
        ('{"enum": 5}', "'enum' must be a list"),
        ('{"required": 5}', "'required' must be a list"),
        ('{"required": [["SECRET"]]}', "malformed"),
        ('{"required": ["a"], "properties": {"a": "SECRET"}}', "must be an object or a boolean"),
        ('{"properties": 5, "required": ["a"]}', "'properties' must be an object"),
        ('{"allOf": 5}', "'allOf' must be a list"),
        ('{"type": "string", "minLength": "SECRET"}', "'minLength' must be a number"),
        ('{"type": "integer", "minimum": 1, "multipleOf": 0}', "'multipleOf' must be above 0"),
        ('{"type": "integer", "minimum": Infinity}', "malformed"),
        ('{"type": "SECRET"}', "'type'"),
        ('{"type": {}}', "'type'"),
        ('{"required": ["a"], "properties": {"a": false}}', "accepts nothing"),
        ("SECRET", "malformed"),
    ],
)
async def test_bad_schemas_are_the_fault_of_the_request(schema, expected):
    engine = await started()
    with pytest.raises(InvalidRequest, match=expected) as caught:
        await collect(engine, ask(json_schema=schema))
    assert caught.value.field == "response_format.json_schema.schema" and "SECRET" not in str(caught.value)
    tools = (Tool("a"), Tool("b", parameters_schema=schema))
    with pytest.raises(InvalidRequest, match=expected) as caught:
        await collect(engine, ask(tools=tools, tool_choice=ToolChoiceMode.REQUIRED, tool_name="b"))
    assert caught.value.field == "tools[1].parameters_schema"
    assert engine.status().load.running == 0


DOUBLING = {f"a{n}": {"type": "array", "minItems": 2, "items": {"$ref": f"#/$defs/a{n + 1}"}} for n in range(30)}
HUGE = [
    '{"type": "array", "minItems": 300, "items": {"type": "array", "minItems": 30000}}',
    '{"type": "array", "minItems": 1000000000}',
    '{"type": "string", "minLength": 1000000000}',
    json.dumps({"$ref": "#/$defs/a0", "$defs": DOUBLING | {"a30": {"type": "null"}}}),
]


@pytest.mark.parametrize("schema", HUGE)
async def test_a_value_that_does_not_fit_is_cut_off_and_holds_nobody_up(schema):
    engine = await started(tokens_per_chunk=20_000)
    clock = time.process_time  # what other programs take is not the engine's
    longest, before, done = 0.0, clock(), False

    async def watch() -> None:
        nonlocal longest, before
        while not done:
            await asyncio.sleep(0.001)
            longest, before = max(longest, clock() - before), clock()

    watcher = asyncio.create_task(watch())
    async with asyncio.timeout(20):
        text, _, finished = await collect(engine, ask(json_schema=schema, sampling=Sampling(max_tokens=20_000)))
    done = True
    await watcher
    assert finished.finish_reason is FinishReason.LENGTH and len(text) == 80_000
    assert longest < 0.25, f"the event loop stood still for {longest:.2f} s"


def test_work_without_a_text_is_bounded():
    bomb = {f"a{n}": {"allOf": [{"$ref": f"#/$defs/a{n + 1}"}] * 2} for n in range(40)}
    with pytest.raises(Unsupported, match="too much work"):
        minimal_json(json.dumps({"$ref": "#/$defs/a0", "$defs": bomb | {"a40": {}}}))


@pytest.mark.parametrize("schema", ['{"$ref": "http://x"}', '{"type": "string", "pattern": "a"}'])
def test_schemas_without_a_known_value_are_unsupported(schema):
    with pytest.raises(Unsupported):
        minimal_json(schema)
