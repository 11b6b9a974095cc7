"""The MLX engine with a real model on this machine's CPU (or GPU, on a Mac)."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import math
import os
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from model_servers.engine import (
    Busy,
    ContextTooLong,
    Delta,
    EngineFailed,
    Feature,
    Finished,
    FinishReason,
    GenerationRequest,
    Health,
    Image,
    InvalidRequest,
    Message,
    Role,
    Sampling,
    TokenLogprob,
    Tool,
    ToolCall,
    ToolChoiceMode,
    UnknownModel,
    Unsupported,
    Usage,
)
from model_servers.engines._mlx.jobs import Job
from model_servers.engines._mlx.loading import Model, load
from model_servers.engines._mlx.prompting import make_plan
from model_servers.engines.mlx import MlxEngine, MlxSettings

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    # Looked for, not imported: the engine sets things up before MLX is first imported.
    pytest.mark.skipif(importlib.util.find_spec("mlx_lm") is None, reason="the extra mlx is not installed"),
]

LIST_SCHEMA = '{"type": "array", "items": {"type": "integer"}, "minItems": 400}'
"""Whatever the model wants, this goes on for more than a thousand tokens."""

WEATHER = Tool(
    name="get_weather",
    description="Current weather of a city.",
    parameters_schema=json.dumps(
        {
            "type": "object",
            "properties": {"unit": {"$ref": "#/$defs/unit"}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
            "required": ["unit", "days"],
            "additionalProperties": False,
            "$defs": {"unit": {"enum": ["celsius", "fahrenheit"]}},
        }
    ),
)
CLOCK = Tool(name="get_time", description="The time.")


def model_folder() -> str:
    given = os.environ.get("MODELYARD_TEST_MLX_MODEL")
    if given:
        return given
    try:
        from model_servers import bundled

        return str(Path(bundled.path()))
    except (ImportError, FileNotFoundError):
        pytest.skip("the bundled model is not in this tree")


@pytest.fixture(scope="module")
def settings() -> MlxSettings:
    return MlxSettings(model=model_folder(), name="m", slots=8, max_waiting=8)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(settings: MlxSettings) -> AsyncIterator[MlxEngine]:
    engine = MlxEngine(settings)
    await engine.start()
    yield engine
    await engine.close()


@dataclass
class Result:
    deltas: list[Delta]
    end: Finished

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self.deltas)

    @property
    def logprobs(self) -> list[TokenLogprob]:
        return [entry for delta in self.deltas for entry in delta.logprobs]

    @property
    def calls(self) -> list[tuple[str, str]]:
        """(name, arguments) of each call, fragments joined."""
        calls: dict[int, tuple[str, str]] = {}
        for delta in self.deltas:
            for part in delta.tool_calls:
                name, arguments = calls.get(part.index, ("", ""))
                calls[part.index] = (name + part.name, arguments + part.arguments_json)
        return list(calls.values())

    @property
    def usage(self) -> Usage:
        return self.end.usage


def ask(text: str = "Tell me about the yard.", *, sampling: Sampling | None = None, **more: Any) -> GenerationRequest:
    return GenerationRequest(
        model="m",
        messages=(Message(Role.USER, (text,)),),
        sampling=sampling or Sampling(max_tokens=40, temperature=0.0),
        **more,
    )


def endless(max_tokens: int = 1000) -> GenerationRequest:
    return ask("Count.", json_schema=LIST_SCHEMA, sampling=Sampling(max_tokens=max_tokens, temperature=0.0))


async def run(engine: MlxEngine, request: GenerationRequest) -> Result:
    items = [item async for item in engine.generate(request)]
    assert isinstance(items[-1], Finished)
    deltas = [item for item in items if isinstance(item, Delta)]
    assert len(deltas) == len(items) - 1
    if items[-1].last is not None:
        deltas.append(items[-1].last)
    assert sum(delta.tokens for delta in deltas) <= items[-1].usage.completion_tokens
    return Result(deltas, items[-1])


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.002)


# ------------------------------------------------------------- the basics ---


async def test_status_describes_model_and_machine(engine: MlxEngine) -> None:
    status = engine.status()
    assert status.engine == "mlx"
    assert status.health is Health.READY
    assert "mlx-lm" in status.version
    assert status.device
    assert status.memory_bytes > 1 << 30
    (model,) = status.models
    assert model.name == "m"
    assert model.provider == "mlx"
    assert model.context_length >= 512
    wanted = Feature.STREAMING | Feature.JSON_SCHEMA | Feature.LOGPROBS | Feature.EMBEDDING | Feature.FUNCTION_CALLING
    assert wanted in model.features
    assert Feature.VISION not in model.features


async def test_greedy_answers_repeat_and_are_counted(engine: MlxEngine) -> None:
    one, two = await run(engine, ask()), await run(engine, ask())
    assert one.text == two.text
    assert one.usage.prompt_tokens == await engine.count_tokens(ask())
    assert 1 <= one.usage.completion_tokens <= 40


async def test_the_last_piece_comes_together_with_the_end(engine: MlxEngine) -> None:
    (only,) = [item async for item in engine.generate(ask(sampling=Sampling(max_tokens=1, temperature=0.0)))]
    assert isinstance(only, Finished)
    assert only.last is not None
    assert only.last.text
    assert only.last.tokens == only.usage.completion_tokens == 1
    free = await run(engine, ask())
    # A stop string that never becomes whole: what was held back for it is still said, and in the right order.
    near = Sampling(max_tokens=40, temperature=0.0, stop=(free.text[-9:] + "\0",))
    assert (await run(engine, ask(sampling=near))).text == free.text


async def test_max_tokens_cuts_with_length(engine: MlxEngine) -> None:
    result = await run(engine, endless(7))
    assert result.end.finish_reason is FinishReason.LENGTH
    assert result.usage.completion_tokens == 7


async def test_a_raw_prompt_is_continued_as_it_stands(engine: MlxEngine) -> None:
    raw = GenerationRequest(model="m", prompt="The yard", sampling=Sampling(max_tokens=5, temperature=0.0))
    assert await engine.count_tokens(raw) < await engine.count_tokens(ask("The yard"))
    result = await run(engine, raw)
    assert result.usage.prompt_tokens == await engine.count_tokens(raw)


async def test_generation_stops_before_a_stop_string_wherever_tokens_end(engine: MlxEngine) -> None:
    sampling = Sampling(max_tokens=40, temperature=0.0)
    free = await run(engine, ask(sampling=sampling))
    assert len(free.text) > 12
    stop = free.text[5:11]  # six characters: more than one token in most places
    expected = free.text[: free.text.index(stop)]
    stopped = await run(engine, ask(sampling=replace(sampling, stop=("\0never", stop))))
    assert stopped.text == expected
    assert stopped.end.finish_reason is FinishReason.STOP
    assert stopped.usage.completion_tokens <= free.usage.completion_tokens


async def test_what_only_began_like_a_stop_string_is_still_said(engine: MlxEngine) -> None:
    sampling = Sampling(max_tokens=20, temperature=0.0)
    free = await run(engine, ask(sampling=sampling))
    near = await run(engine, ask(sampling=replace(sampling, stop=(free.text[-4:] + "\0",))))
    assert near.text == free.text
    assert near.end.finish_reason is free.end.finish_reason


async def test_the_context_is_checked_before_anything_is_computed(engine: MlxEngine) -> None:
    long = ask("word " * 5000)
    length = engine.status().models[0].context_length
    with pytest.raises(ContextTooLong, match=str(length)):
        await run(engine, long)


class Tokenizer:
    """Delegates to a real one; `encode` of a long text is refused, or waits at a gate."""

    LONG = 40_000

    def __init__(self, tokenizer: Any, gate: threading.Event | None = None) -> None:
        self._tokenizer = tokenizer
        self._gate = gate
        self.reached = threading.Event()

    def encode(self, text: str, **options: Any) -> Any:
        if len(text) > self.LONG:
            assert self._gate is not None, "tokenized in vain"
            self.reached.set()
            assert self._gate.wait(20)
            text = text[:100]
        return self._tokenizer.encode(text, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


async def test_what_cannot_fit_is_refused_without_tokenizing(
    engine: MlxEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = engine._model
    assert model is not None
    assert model.most_bytes_per_token is not None
    monkeypatch.setattr(engine, "_model", replace(model, tokenizer=Tokenizer(model.tokenizer)))
    huge = "hello world " * 600_000
    for request in (ask(huge), replace(ask(), messages=(), prompt=huge)):
        with pytest.raises(ContextTooLong, match="bytes"):
            await engine.count_tokens(request)
        with pytest.raises(ContextTooLong, match="bytes"):
            await run(engine, request)
    with pytest.raises(ContextTooLong, match="bytes"):
        await engine.embed("m", ["fine", huge])
    longest = "a" * (model.context_length * model.most_bytes_per_token)
    monkeypatch.setattr(engine, "_model", model)
    assert await engine.count_tokens(replace(ask(), messages=(), prompt=longest)) > model.context_length


async def test_short_texts_do_not_wait_for_long_ones(engine: MlxEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    model = engine._model
    assert model is not None
    gate = threading.Event()
    tokenizer = Tokenizer(model.tokenizer, gate)
    monkeypatch.setattr(engine, "_model", replace(model, tokenizer=tokenizer, most_bytes_per_token=None))
    long = asyncio.create_task(engine.count_tokens(ask("word " * 50_000)))
    embedding = asyncio.create_task(engine.embed("m", ["word " * 1000] * 20))
    try:
        await asyncio.to_thread(tokenizer.reached.wait, 20)
        async with asyncio.timeout(20):
            assert (await run(engine, ask())).text
            assert (await engine.embed("m", ["short"])).vectors
        assert not long.done()
        assert not embedding.done()
    finally:
        embedding.cancel()
        gate.set()
    assert await long > 1


async def test_an_answer_ends_where_the_context_ends(settings: MlxSettings) -> None:
    engine = MlxEngine(settings.model_copy(update={"context_length": 64}))
    await engine.start()
    try:
        request = replace(endless(), sampling=Sampling(temperature=0.0))
        prompt = await engine.count_tokens(request)
        result = await run(engine, request)
        assert result.end.finish_reason is FinishReason.LENGTH
        assert prompt + result.usage.completion_tokens == 64
    finally:
        await engine.close()


async def test_wrong_requests_are_refused(engine: MlxEngine) -> None:
    with pytest.raises(UnknownModel):
        await run(engine, replace(ask(), model="other"))
    picture = Message(Role.USER, ("What is this?", Image(b"", "image/png")))
    with pytest.raises(Unsupported, match="images"):
        await run(engine, replace(ask(), messages=(picture,)))
    with pytest.raises(InvalidRequest, match="not valid JSON"):
        await run(engine, ask(json_schema="not json"))
    assert (await run(engine, ask())).text


def many_properties(count: int) -> str:
    """More than llguidance's parser takes at one place."""
    fields = {f"SECRET-{i}": {"type": "string"} for i in range(count)}
    return json.dumps({"type": "object", "properties": fields})


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ('{"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}', "no value"),
        ('{"type": "SECRET"}', "'type'"),
        ('{"enum": 5}', "'enum'"),
        ('{"required": 5}', "'required'"),
        ('{"allOf": 5}', "'allOf'"),
        ('{"type": "string", "minLength": "SECRET"}', "'minLength'"),
        ('{"type": "string", "pattern": "SECRET("}', "no grammar"),
        ('{"type": "integer", "multipleOf": 0}', "no grammar"),
        ('{"type": "integer", "minimum": 5, "maximum": 1}', "no value"),
        ('{"items": ' * 150 + "{}" + "}" * 150, "levels deep"),
    ],
)
async def test_a_bad_schema_is_the_fault_of_the_request(engine: MlxEngine, schema: str, expected: str) -> None:
    with pytest.raises(InvalidRequest, match=expected) as caught:
        await run(engine, ask(json_schema=schema))
    assert caught.value.field == "response_format.json_schema.schema"
    assert "SECRET" not in str(caught.value)
    tools = (CLOCK, Tool("f", parameters_schema=schema))
    forced = ask(tools=tools, tool_choice=ToolChoiceMode.REQUIRED, tool_name="f")
    with pytest.raises(InvalidRequest) as caught:
        await run(engine, forced)
    assert caught.value.field == "tools[1].parameters_schema"
    assert "SECRET" not in str(caught.value)


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ('{"not": {"const": "SECRET"}}', "see 'not'"),
        ('{"type": "array", "uniqueItems": true}', "'uniqueItems'"),
        ('{"oneOf": [{"type": "string"}, {"minLength": 3}]}', "see 'oneOf', 'anyOf'"),
        # Compiled, it would take gigabytes.
        ('{"type": "integer", "multipleOf": 99999989}', "'multipleOf'"),
        ('{"type": "integer", "allOf": [{"multipleOf": 97}, {"multipleOf": 89}]}', "'multipleOf'"),
    ],
)
async def test_what_no_grammar_can_enforce_is_unsupported(engine: MlxEngine, schema: str, expected: str) -> None:
    async with asyncio.timeout(10):
        with pytest.raises(Unsupported, match=expected) as caught:
            await run(engine, ask(json_schema=schema))
    assert "SECRET" not in str(caught.value)


async def test_common_multiples_are_enforced(engine: MlxEngine) -> None:
    fields = {f"p{i}": {"type": "number", "multipleOf": 0.01} for i in range(9)} | {"n": {"$ref": "#/$defs/n"}}
    schema = {"type": "object", "properties": fields, "$defs": {"n": {"type": "integer", "multipleOf": 250}}}
    assert (await run(engine, ask(json_schema=json.dumps(schema)))).text.startswith("{")


async def test_a_grammar_that_grows_too_large_is_the_fault_of_the_request(
    engine: MlxEngine, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(InvalidRequest, match="too large or too complex") as caught:
        await run(engine, ask(json_schema=many_properties(1200)))
    # Not before the first token: here the large object comes after a bracket.
    inner = json.dumps({"type": "array", "minItems": 1, "items": json.loads(many_properties(1200))})
    with pytest.raises(InvalidRequest, match="too large or too complex") as later:
        await run(engine, ask(json_schema=inner))
    for error in (caught.value, later.value):
        assert "SECRET" not in str(error)
        assert len(str(error)) < 200
    assert "SECRET" not in caplog.text
    assert engine.status().load.running == 0


# ----------------------------------------------------- sampling and seeds ---


async def test_a_seed_repeats_whatever_runs_beside_it(engine: MlxEngine) -> None:
    sampling = Sampling(max_tokens=30, temperature=0.9, top_p=0.95, top_k=100, min_p=0.01, seed=7)
    alone = await run(engine, ask(sampling=sampling))

    async def company(number: int) -> Result:
        own = Sampling(max_tokens=10 + 6 * number, temperature=1.0 if number % 2 else 0.0, seed=number)
        return await run(engine, ask(f"{'Something else. ' * number}?", sampling=own))

    others = [asyncio.create_task(company(number)) for number in range(4)]
    await until(lambda: engine.status().load.running > 0)
    beside, *_ = await asyncio.gather(run(engine, ask(sampling=sampling)), *(company(n) for n in range(4, 7)), *others)
    assert beside.text == alone.text


async def test_seeds_differ_and_absent_ones_are_random(engine: MlxEngine) -> None:
    hot = Sampling(max_tokens=24, temperature=1.8)
    seeded = {(await run(engine, ask(sampling=replace(hot, seed=seed)))).text for seed in range(3)}
    unseeded = {(await run(engine, ask(sampling=hot))).text for _ in range(3)}
    assert len(seeded) > 1
    assert len(unseeded) > 1


async def test_greedy_answers_do_not_depend_on_the_batch(engine: MlxEngine) -> None:
    questions = [f"Question {number}: what is {'very ' * number}good?" for number in range(6)]
    alone = [(await run(engine, ask(question))).text for question in questions]
    together = await asyncio.gather(*(run(engine, ask(question)) for question in questions))
    assert [result.text for result in together] == alone


async def test_logprobs_are_the_models_own(engine: MlxEngine) -> None:
    sampling = Sampling(max_tokens=6, temperature=0.0, logprobs=True, top_logprobs=20)
    plain = await run(engine, ask(sampling=sampling))
    assert len(plain.logprobs) == sum(delta.tokens for delta in plain.deltas)
    for entry in plain.logprobs:
        values = [value for _, value in entry.top]
        assert len(values) == 20
        assert values == sorted(values, reverse=True)
        assert math.isclose(entry.logprob, values[0], abs_tol=1e-5)
        assert sum(math.exp(value) for value in values) <= 1.0001
    hot = replace(sampling, temperature=1.5, repetition_penalty=3.0, presence_penalty=2.0, seed=1)
    first = (await run(engine, ask(sampling=hot))).logprobs[0]
    # Before penalties and temperature: the same distribution, though another token may have been drawn from it.
    assert [value for _, value in first.top] == pytest.approx([value for _, value in plain.logprobs[0].top], abs=1e-4)


# ------------------------------------------------------------ prompt cache ---


async def test_a_warm_cache_gives_the_answer_of_a_cold_one(engine: MlxEngine, settings: MlxSettings) -> None:
    cold = MlxEngine(settings.model_copy(update={"prompt_cache_entries": 0}))
    await cold.start()
    try:
        assert Feature.PREFIX_CACHE not in cold.status().models[0].features
        first = replace(ask("Which engines are there, and what are they for?"), request_id="a")
        answer = await run(engine, first)
        said = Message(Role.ASSISTANT, (answer.text,))
        second = replace(first, messages=(*first.messages, said, Message(Role.USER, ("And why?",))))
        warm, without = await run(engine, second), await run(cold, second)
        assert warm.text == without.text
        assert warm.usage.cached_prompt_tokens >= answer.usage.prompt_tokens
        assert without.usage.cached_prompt_tokens == 0
        assert replace(warm.usage, cached_prompt_tokens=0) == without.usage
        again = await run(engine, second)
        assert again.text == warm.text
        # All but the one token whose logits begin the answer.
        assert again.usage.cached_prompt_tokens == again.usage.prompt_tokens - 1
    finally:
        await cold.close()


# ------------------------------------------------------------- JSON, tools ---


async def test_json_schema_output_is_valid_and_ends(engine: MlxEngine) -> None:
    schema = {
        "type": "object",
        "properties": {"count": {"type": "integer", "minimum": 0, "maximum": 99}, "kind": {"enum": ["a", "b"]}},
        "required": ["count", "kind"],
        "additionalProperties": False,
    }
    for seed in range(3):
        hot = Sampling(max_tokens=80, temperature=1.2, seed=seed)
        result = await run(engine, ask(json_schema=json.dumps(schema), sampling=hot))
        assert result.end.finish_reason is FinishReason.STOP
        value = json.loads(result.text)
        assert set(value) == {"count", "kind"}
        assert 0 <= value["count"] <= 99


async def test_json_object_output_is_an_object_or_says_length(engine: MlxEngine) -> None:
    result = await run(engine, ask("A JSON object, please.", json_object=True))
    assert result.text.startswith("{")
    if result.end.finish_reason is FinishReason.STOP:
        assert isinstance(json.loads(result.text), dict)
    else:
        assert result.end.finish_reason is FinishReason.LENGTH


async def test_constrained_and_free_requests_share_a_batch(engine: MlxEngine) -> None:
    schema = '{"type": "object", "properties": {"x": {"type": "boolean"}}, "required": ["x"]}'
    free_alone = await run(engine, ask())
    held, free = await asyncio.gather(
        run(engine, ask(json_schema=schema, sampling=Sampling(max_tokens=200, temperature=0.0))), run(engine, ask())
    )
    assert free.text == free_alone.text
    assert held.text.startswith("{")


async def test_a_required_call_is_made_and_valid(engine: MlxEngine) -> None:
    request = ask(
        "How is the weather?",
        tools=(CLOCK, WEATHER),
        tool_choice=ToolChoiceMode.REQUIRED,
        tool_name="get_weather",
        sampling=Sampling(max_tokens=120, temperature=0.0),
    )
    result = await run(engine, request)
    assert result.end.finish_reason is FinishReason.TOOL_CALLS
    assert result.text == ""
    ((name, arguments),) = result.calls
    assert name == "get_weather"
    value = json.loads(arguments)
    assert value["unit"] in ("celsius", "fahrenheit")
    assert 1 <= value["days"] <= 9
    first = next(part for delta in result.deltas for part in delta.tool_calls)
    assert first.id.startswith("call_")
    assert result.usage.prompt_tokens == await engine.count_tokens(request)

    anything = await run(engine, replace(request, tool_name=""))
    assert anything.calls[0][0] in ("get_weather", "get_time")
    with pytest.raises(Unsupported, match="get_lost"):
        await run(engine, replace(request, tool_name="get_lost"))


async def test_json_output_beside_optional_tools_is_json_or_calls(engine: MlxEngine) -> None:
    from llguidance import LLMatcher

    from model_servers.engines._mlx.grammar import answer_or_calls_grammar

    schema = '{"type": "object", "properties": {"x": {"enum": [1, 2]}}, "required": ["x"]}'
    hot = Sampling(max_tokens=120, temperature=1.0, seed=1)
    result = await run(engine, ask("The weather?", json_schema=schema, tools=(WEATHER, CLOCK), sampling=hot))
    if result.end.finish_reason is FinishReason.STOP:
        assert json.loads(result.text)["x"] in (1, 2)

    # Which of the two a small model chooses is its own affair: that both are open is checked on the grammar.
    model = engine._model
    assert model is not None
    text = answer_or_calls_grammar(model.grammar_tokenizer, schema, (CLOCK,), "<tool_call>", "</tool_call>")
    call = '<tool_call>{"name": "get_time", "arguments": {}}</tool_call>'
    for said, whole in (('{"x": 1}', True), (call, True), (f"{call}\n{call}", True), (call[:-3], False), ("Hi", False)):
        matcher = LLMatcher(model.grammar_tokenizer, text, log_level=0)
        tokens = model.tokenizer.encode(said, add_special_tokens=False)
        accepted = matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()
        assert accepted is whole, said


async def test_tools_reach_the_prompt_unless_none_is_chosen(engine: MlxEngine) -> None:
    plain = await engine.count_tokens(ask())
    assert await engine.count_tokens(ask(tools=(WEATHER,))) > plain
    assert await engine.count_tokens(ask(tools=(WEATHER,), tool_choice=ToolChoiceMode.NONE)) == plain


async def test_calls_and_results_are_shown_to_the_model(engine: MlxEngine) -> None:
    asked = ask(tools=(WEATHER,))
    call = ToolCall("call_1", "get_weather", '{"unit": "celsius", "days": 1}')
    history = (
        *asked.messages,
        Message(Role.ASSISTANT, (), tool_calls=(call,)),
        Message(Role.TOOL, ('{"degrees": 21}',), tool_call_id="call_1"),
    )
    result = await run(engine, replace(asked, messages=history))
    assert result.usage.prompt_tokens > await engine.count_tokens(asked) + 10


# ---------------------------------------------------------------- embedding ---


async def test_embeddings_have_length_one_and_do_not_depend_on_company(engine: MlxEngine) -> None:
    texts = ["the yard", "a much longer sentence about models, engines and the people who run them", "x"]
    together = await engine.embed("m", texts)
    assert together.prompt_tokens > len(texts)
    for text, vector in zip(texts, together.vectors, strict=True):
        assert math.isclose(math.hypot(*vector), 1.0, abs_tol=1e-4)
        alone = (await engine.embed("m", [text])).vectors[0]
        assert list(alone) == pytest.approx(list(vector), abs=1e-4)


async def test_embedding_beside_a_running_stream(engine: MlxEngine) -> None:
    stream = engine.generate(endless())
    await anext(stream)
    result = await engine.embed("m", [f"text number {number}" for number in range(200)])
    assert len(result.vectors) == 200
    await anext(stream)  # still alive
    await stream.aclose()


class Recording:
    """A network that writes down how many tokens it was given at once."""

    def __init__(self, network: Any) -> None:
        self._network = network
        self.widths: list[int] = []

    def model(self, tokens: Any, **options: Any) -> Any:
        self.widths.append(int(tokens.size))
        return self._network.model(tokens, **options)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._network(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._network, name)


async def test_a_long_text_is_embedded_in_pieces(engine: MlxEngine, settings: MlxSettings) -> None:
    networks: list[Recording] = []

    def recording(settings: MlxSettings) -> Model:
        model = load(settings)
        networks.append(Recording(model.network))
        return replace(model, network=networks[-1])

    small = MlxEngine(settings.model_copy(update={"prefill_step_size": 32}), loader=recording)
    await small.start()
    try:
        texts = ["short", "the yard and its engines, " * 40, "x"]
        expected = await engine.embed("m", texts)
        found = await small.embed("m", texts)
        assert max(networks[0].widths) == 32
        assert found.prompt_tokens == expected.prompt_tokens > 200
        for ours, theirs in zip(found.vectors, expected.vectors, strict=True):
            assert list(ours) == pytest.approx(list(theirs), abs=1e-4)
    finally:
        await small.close()


async def test_embedding_refuses_what_is_too_long_or_unknown(engine: MlxEngine) -> None:
    with pytest.raises(ContextTooLong):
        await engine.embed("m", ["fine", "word " * 5000])
    with pytest.raises(UnknownModel):
        await engine.embed("other", ["text"])


# -------------------------------------------------- load, cancelling, close ---


async def test_closing_a_stream_stops_the_engine(engine: MlxEngine) -> None:
    stream = engine.generate(endless())
    for _ in range(3):
        await anext(stream)
    load = engine.status().load
    assert load.running == 1
    assert load.kv_cache_utilization > 0
    await stream.aclose()
    await until(lambda: engine.status().load.running == 0)
    worker = engine._worker
    assert worker is not None
    await until(lambda: not worker.gauges.busy)  # the thread sleeps: nothing is computed any more


async def test_cancelling_the_task_frees_the_slot(engine: MlxEngine) -> None:
    tasks = [asyncio.create_task(run(engine, endless())) for _ in range(10)]
    await until(lambda: engine.status().load.running == 8 and engine.status().load.waiting == 2)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await until(lambda: engine.status().load.running == 0)
    assert (await run(engine, ask())).text


async def test_waiting_has_a_bound_and_is_measured(settings: MlxSettings) -> None:
    engine = MlxEngine(settings.model_copy(update={"slots": 1, "max_waiting": 1}))
    await engine.start()
    try:
        first = engine.generate(endless())
        await anext(first)
        second = asyncio.create_task(run(engine, ask(sampling=Sampling(max_tokens=2))))
        await until(lambda: engine.status().load.waiting == 1)
        with pytest.raises(Busy):
            await run(engine, ask())
        await first.aclose()
        assert (await second).end.queued > 0
    finally:
        await engine.close()


async def test_close_fails_what_runs_and_may_be_repeated(settings: MlxSettings) -> None:
    engine = MlxEngine(settings)
    assert engine.status().health is Health.STARTING
    await engine.start()
    stream = engine.generate(endless())
    await anext(stream)
    task = asyncio.create_task(anext(stream))
    await asyncio.gather(engine.close(), engine.close())
    with pytest.raises(EngineFailed):
        await task
        while True:
            await anext(stream)
    assert engine.status().health is Health.UNHEALTHY
    with pytest.raises(EngineFailed):
        await run(engine, ask())


class Breaking:
    """A model that computes, raises or blocks, as told."""

    def __init__(self, network: Any) -> None:
        self._network = network
        self.failures = 0
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.gate.wait(30)
        if self.failures:
            self.failures -= 1
            raise MemoryError("no memory left")
        return self._network(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._network, name)


async def test_failing_steps_fail_requests_and_then_the_engine(settings: MlxSettings) -> None:
    networks: list[Breaking] = []

    def breaking(settings: MlxSettings) -> Model:
        model = load(settings)
        networks.append(Breaking(model.network))
        return replace(model, network=networks[-1])

    engine = MlxEngine(settings, loader=breaking)
    await engine.start()
    try:
        (network,) = networks
        stream = engine.generate(endless())
        await anext(stream)
        network.failures = 1
        with pytest.raises(EngineFailed, match="MemoryError"):
            while True:
                await anext(stream)
        assert engine.status().health is Health.READY
        assert (await run(engine, ask())).text

        network.failures = 1000
        outcomes = []
        for _ in range(3):
            outcomes += await asyncio.gather(run(engine, ask()), run(engine, ask()), return_exceptions=True)
        assert all(isinstance(outcome, EngineFailed) for outcome in outcomes)
        status = engine.status()
        assert status.health is Health.UNHEALTHY
        assert "MemoryError" in status.health_detail
        with pytest.raises(EngineFailed):
            await engine.embed("m", ["text"])
        assert status.load.running == 0

        await engine.start()  # a dead engine can be started anew
        assert (await run(engine, ask())).text
    finally:
        await engine.close()


async def test_an_engine_that_hangs_says_so(settings: MlxSettings) -> None:
    now = 1000.0
    networks: list[Breaking] = []

    def blocking(settings: MlxSettings) -> Model:
        model = load(settings)
        networks.append(Breaking(model.network))
        return replace(model, network=networks[-1])

    engine = MlxEngine(settings, clock=lambda: now, loader=blocking)
    await engine.start()
    try:
        now += 10_000.0
        assert engine.status().health is Health.READY  # idling is no hang
        stream = engine.generate(endless())
        await anext(stream)
        networks[0].gate.clear()
        worker = engine._worker
        assert worker is not None
        now += 10_000.0

        def stuck() -> bool:
            return engine.status().health is Health.UNHEALTHY

        # The step in flight may still end once, at the new time: then the clock goes on.
        await until(lambda: stuck() or worker.gauges.progress_at == now)
        now += 10_000.0
        await until(stuck)
        assert "no progress" in engine.status().health_detail
        networks[0].gate.set()
        await until(lambda: engine.status().health is Health.READY)
        await stream.aclose()
    finally:
        networks[0].gate.set()
        await engine.close()


async def test_a_fault_of_one_request_does_not_touch_its_neighbours(
    engine: MlxEngine, caplog: pytest.LogCaptureFixture
) -> None:
    class Bomb:
        finished = False
        calls = 0

        def __call__(self, context: Any, logits: Any) -> Any:
            self.calls += 1
            if self.calls == 3:
                raise RuntimeError("bo" + "om")
            return logits

    worker, model = engine._worker, engine._model
    assert worker is not None
    assert model is not None
    alone = await run(engine, endless(40))
    neighbour = asyncio.create_task(run(engine, endless(40)))
    await until(lambda: engine.status().load.running == 1)
    job = Job(replace(make_plan(model, endless(40)), constraint=Bomb()), asyncio.Queue(), submitted=0.0)
    worker.submit(job)
    items = [await job.sink.get()]
    while isinstance(items[-1], Delta):
        items.append(await job.sink.get())
    assert isinstance(items[-1], EngineFailed)
    # What the exception says might hold the answer: it is neither told nor logged.
    assert "RuntimeError" in str(items[-1])
    assert "boom" not in str(items[-1]) + caplog.text
    assert "in __call__" in caplog.text
    assert (await neighbour).text == alone.text
    await until(lambda: engine.status().load.running == 0)


async def test_a_missing_model_is_reported_with_a_cure() -> None:
    engine = MlxEngine(MlxSettings(model="nobody/nothing"))
    with pytest.raises(EngineFailed, match="allow_download"):
        await engine.start()
    assert engine.status().health is Health.UNHEALTHY
    await engine.close()
