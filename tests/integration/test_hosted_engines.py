"""What holds of every engine in front of a hosted API, each before a stand-in for its vendor."""

from __future__ import annotations

import asyncio
import json
import logging
import subprocess
import sys
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import pytest

from model_servers import registry
from model_servers.engine import (
    Busy,
    ContentRefused,
    ContextTooLong,
    CredentialsRejected,
    Delta,
    EngineError,
    EngineFailed,
    Feature,
    Finished,
    FinishReason,
    GenerationRequest,
    Health,
    Image,
    Message,
    RateLimited,
    Role,
    Sampling,
    Tool,
    ToolCall,
    ToolChoiceMode,
    UnknownModel,
    Unsupported,
)
from model_servers.engines._hosted.engine import HostedEngine
from tests.conformance.target import Fault
from tests.harness.model_servers import eventually
from tests.standins.anthropic import AnthropicStandIn
from tests.standins.bedrock import CHAT_MODELS, CONTEXT, BedrockStandIn
from tests.standins.hosted import HostedStandIn

ANTHROPIC_MODEL = "claude-tiny"
SECRET = "what the prompt says is nobody's business"
COUNT = "Count from 1 to 1000."


@dataclass
class Vendor:
    name: str
    standin: Callable[..., HostedStandIn]
    model_id: str
    settings: Callable[[str], dict[str, Any]]
    """From the address."""

    def engine(self, standin: HostedStandIn, **settings: Any) -> Any:
        model = {"name": "m", "id": self.model_id, "context_length": CONTEXT, **settings.pop("model", {})}
        plugin = registry.find(self.name)
        given = {"models": [model], "check_seconds": 0.05, **self.settings(standin.url), **settings}
        return registry.create(plugin, registry.validate(plugin, given))

    async def started(self, standin: HostedStandIn, **settings: Any) -> HostedEngine:
        engine: HostedEngine = self.engine(standin, **settings)
        await engine.start()
        return engine


VENDORS = [
    Vendor("anthropic", AnthropicStandIn, ANTHROPIC_MODEL, lambda url: {"base_url": url}),
    Vendor("bedrock", BedrockStandIn, CHAT_MODELS[0], lambda url: {"endpoint_url": url, "region": "us-east-1"}),
]


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANTHROPIC_API_KEY", "test-key")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIATEST")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "aws-secret")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_PROFILE", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_BEARER_TOKEN_BEDROCK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(params=VENDORS, ids=lambda vendor: vendor.name)
def vendor(request: pytest.FixtureRequest) -> Vendor:
    pytest.importorskip({"anthropic": "anthropic", "bedrock": "boto3"}[request.param.name])
    return request.param


def ask(text: str = "Hello", *, messages: tuple[Message, ...] = (), **more: Any) -> GenerationRequest:
    return GenerationRequest("m", messages or (Message(Role.USER, (text,)),), **more)


async def collect(engine: HostedEngine, request: GenerationRequest) -> tuple[str, list[Delta], Finished]:
    *deltas, finished = [item async for item in engine.generate(request)]
    assert isinstance(finished, Finished)
    if finished.last is not None:
        deltas.append(finished.last)
    return "".join(delta.text for delta in deltas), deltas, finished


async def failure(engine: HostedEngine, request: GenerationRequest) -> EngineError:
    with pytest.raises(EngineError) as caught:
        await collect(engine, request)
    return caught.value


# ----------------------------------------------------------------- answers ---


async def test_tokens_of_deltas_add_up_to_what_the_vendor_counted(vendor: Vendor):
    async with vendor.standin() as standin:
        engine = await vendor.started(standin)
        text, deltas, finished = await collect(engine, ask())
        assert len(deltas) > 10 and text
        assert sum(delta.tokens for delta in deltas) == finished.usage.completion_tokens == standin.generated
        assert finished.usage.prompt_tokens == await engine.count_tokens(ask())
        await engine.close()


async def test_an_array_is_wrapped_for_the_vendor_and_unwrapped_as_it_streams(vendor: Vendor):
    schema = {"type": "array", "items": {"type": "integer"}, "minItems": 40}
    async with vendor.standin() as standin:
        engine = await vendor.started(standin)
        text, deltas, finished = await collect(engine, ask(json_schema=json.dumps(schema)))
        assert json.loads(text) == [0] * 40
        assert len(deltas) > 10
        assert finished.finish_reason is FinishReason.STOP
        cut, _, finished = await collect(engine, ask(json_schema=json.dumps(schema), sampling=Sampling(max_tokens=20)))
        assert text.startswith(cut) and finished.finish_reason is FinishReason.LENGTH
        await engine.close()


async def test_json_is_given_beside_tools_or_a_tool_is_called(vendor: Vendor):
    tools = (Tool("get_weather"),)
    async with vendor.standin() as standin:
        engine = await vendor.started(standin, model={"structured_output": False})
        _, deltas, finished = await collect(engine, ask(tools=tools, json_object=True))
        assert [call.name for delta in deltas for call in delta.tool_calls if call.name] == ["get_weather"]
        assert finished.finish_reason is FinishReason.TOOL_CALLS
        arguments = "".join(call.arguments_json for delta in deltas for call in delta.tool_calls)
        assert arguments == "{}", "a call without arguments has an empty object, whatever the vendor sends"
        text, deltas, finished = await collect(
            engine, ask(tools=tools, tool_choice=ToolChoiceMode.NONE, json_object=True)
        )
        assert json.loads(text) == {} and not any(delta.tool_calls for delta in deltas)
        assert finished.finish_reason is FinishReason.STOP
        await engine.close()


async def test_schemas_are_enforced_by_the_vendor_where_it_can(vendor: Vendor):
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    async with vendor.standin() as standin:
        engine = await vendor.started(standin, model={"structured_output": True})
        text, _, _ = await collect(engine, ask(json_schema=json.dumps(schema)))
        assert json.loads(text) == {"a": False}
        assert not {"tools", "toolConfig"} & standin.bodies[-1].keys()
        # A map with any keys is not to be had that way: it would be empty for ever.
        any_keys = {"type": "object", "additionalProperties": {"type": "integer"}}
        await collect(engine, ask(json_schema=json.dumps(any_keys)))
        assert {"tools", "toolConfig"} & standin.bodies[-1].keys()
        await engine.close()


async def test_a_model_that_cannot_be_forced_offers_less(vendor: Vendor):
    async with vendor.standin() as standin:
        engine = await vendor.started(standin, model={"forced_tools": False, "structured_output": True})
        (model,) = engine.status().models
        assert Feature.JSON_SCHEMA in model.features and Feature.JSON not in model.features
        required = ask(tools=(Tool("f"),), tool_choice=ToolChoiceMode.REQUIRED)
        assert isinstance(await failure(engine, required), Unsupported)
        assert not standin.bodies
        await engine.close()


async def test_what_the_model_thinks_is_told_apart(vendor: Vendor):
    async with vendor.standin() as standin:
        extra = {"thinking": {"type": "enabled", "budget_tokens": 1024}}
        engine = await vendor.started(standin, model={"extra": extra})
        text, deltas, finished = await collect(engine, ask())
        thought = "".join(delta.reasoning_text for delta in deltas)
        assert thought == "First the question, then the answer." and thought not in text
        assert 0 < finished.usage.reasoning_tokens < finished.usage.completion_tokens
        # A model that thinks cannot be forced to call a tool: then it does not think.
        await collect(engine, ask(json_object=True))
        await engine.close()


async def test_a_blank_stop_string_is_matched_here_and_ends_the_answer(vendor: Vendor):
    async with vendor.standin(pace=0.002) as standin:
        engine = await vendor.started(standin)
        text, deltas, finished = await collect(engine, ask(COUNT, sampling=Sampling(stop=(" ",))))
        assert text == "1"
        assert finished.finish_reason is FinishReason.STOP
        assert finished.usage.prompt_tokens > 0 and finished.usage.completion_tokens == 1
        assert sum(delta.tokens for delta in deltas) <= 1
        await eventually(lambda: standin.connections == 0)
        assert standin.generated < 20
        await engine.close()


async def test_refusals_with_and_without_text(vendor: Vendor):
    async with vendor.standin() as standin:
        engine = await vendor.started(standin)
        assert isinstance(await failure(engine, ask("please be refused")), ContentRefused)
        text, _, finished = await collect(engine, ask("be refused in the middle"))
        assert text and finished.finish_reason is FinishReason.CONTENT_FILTER
        assert engine.status().health is Health.READY
        await engine.close()


async def test_the_cached_part_of_the_prompt_is_counted_in(vendor: Vendor):
    async with vendor.standin() as standin:
        engine = await vendor.started(standin, model={"prompt_cache": True})
        assert Feature.PREFIX_CACHE in engine.status().models[0].features
        first, second = [(await collect(engine, ask()))[2].usage for _ in range(2)]
        assert first.prompt_tokens == second.prompt_tokens > second.cached_prompt_tokens > 0
        assert first.cached_prompt_tokens == 0
        await engine.close()


async def test_a_prompt_that_may_be_too_long_is_counted_before_it_is_sent(vendor: Vendor):
    async with vendor.standin() as standin:
        engine = await vendor.started(standin, model={"context_length": 2000})
        assert isinstance(await failure(engine, ask("word " * 2000)), ContextTooLong)
        assert isinstance(await failure(engine, ask(sampling=Sampling(max_tokens=1995))), ContextTooLong)
        assert not standin.bodies
        # More bytes than the context has tokens, yet it fits.
        await collect(engine, ask("everyday " * 400))
        await engine.close()


async def test_the_vendor_says_that_a_prompt_is_too_long(vendor: Vendor):
    async with vendor.standin() as standin:
        engine = await vendor.started(standin, model={"context_length": 1_000_000})
        error = await failure(engine, ask("word " * (CONTEXT + 1)))
        assert isinstance(error, ContextTooLong)
        assert str(CONTEXT) in str(error)
        await engine.close()


async def test_what_cannot_be_asked_of_a_chat_model(vendor: Vendor):
    async with vendor.standin() as standin:
        engine = await vendor.started(standin)
        for request in (GenerationRequest("m", prompt="Once upon a time"), ask(" \n")):
            assert isinstance(await failure(engine, request), Unsupported)
        assert isinstance(await failure(engine, GenerationRequest("other")), UnknownModel)
        with pytest.raises(Unsupported):
            await engine.embed("m", ["Hello"])
        await engine.close()


async def test_a_model_that_the_vendor_does_not_have(vendor: Vendor):
    async with vendor.standin() as standin:
        engine = await vendor.started(standin, model={"id": "no.such-model"})
        error = await failure(engine, ask())
        assert isinstance(error, UnknownModel) and "'m'" in str(error)
        await engine.close()


async def test_a_conversation_in_the_vendors_form(vendor: Vendor):
    """The stand-ins refuse what the vendors refuse: turns that do not alternate, blank text, results of no call."""
    talk = (
        Message(Role.SYSTEM, ("Be brief.",)),
        Message(Role.USER, ("What ", "is this?", Image(b"\x89PNG", "image/png"), " ")),
        Message(Role.USER, ("And that?",)),
        Message(Role.ASSISTANT, ("I look.",), (ToolCall("c1", "look", '{"at": "it"}'), ToolCall("c2", "smell", ""))),
        Message(Role.TOOL, ("a cat",), tool_call_id="c1"),
        Message(Role.TOOL, (), tool_call_id="c2")
        if vendor.name == "bedrock"
        else Message(Role.TOOL, ("fish",), tool_call_id="c2"),
        Message(Role.SYSTEM, ("Be kind.",)),
    )
    async with vendor.standin() as standin:
        engine = await vendor.started(standin)
        text, _, _ = await collect(engine, ask(messages=talk))  # no tools offered: those of the history are declared
        assert text.startswith("The tool says: a cat and")
        body = standin.bodies[-1]
        assert [message["role"] for message in body["messages"]] == ["user", "assistant", "user"]
        assert "Be brief.\n\nBe kind." in json.dumps(body["system"], ensure_ascii=False).encode().decode(
            "unicode_escape"
        )
        assert len(body["messages"][0]["content"]) == 3
        await engine.close()


# ------------------------------------------------------------------ faults ---

STATUSES = {
    401: CredentialsRejected,
    403: CredentialsRejected,
    429: RateLimited,
    500: EngineFailed,
    503: Busy,
}


@pytest.mark.parametrize("status", STATUSES)
async def test_a_status_is_told_once_and_without_secrets(vendor: Vendor, status: int):
    async with vendor.standin() as standin:
        engine = await vendor.started(standin)
        standin.fault = Fault("status", status, retry_after=7.0 if status in (429, 503) else None)
        error = await failure(engine, ask(SECRET))
        assert type(error) is STATUSES[status]
        assert getattr(error, "retry_after", 7.0) == 7.0
        assert not any(secret in str(error) for secret in (SECRET, "test-key", "AKIATEST", "aws-secret"))
        if status == 401:
            assert {"anthropic": "ANTHROPIC_API_KEY", "bedrock": "(env)"}[vendor.name] in str(error)
        asked = [request for request in standin.requests if standin.generates(request)]
        assert len(asked) == 1, "the SDK must not try again: the control plane does"
        standin.fault = None
        assert (await collect(engine, ask()))[0]
        await engine.close()


@pytest.mark.parametrize("kind", ["hang", "stall", "reset", "garbage"])
async def test_silence_and_rubbish_are_failures(vendor: Vendor, kind: Any):
    async with vendor.standin() as standin:
        engine = await vendor.started(standin, first_token_seconds=1.0, stall_seconds=1.0)
        standin.fault = Fault(kind)
        assert isinstance(await failure(engine, ask()), EngineFailed)
        await eventually(lambda: standin.connections == 0)
        assert engine.status().load.running == 0
        standin.fault = None
        assert (await collect(engine, ask()))[0]
        await engine.close()


@pytest.mark.parametrize("begun", [False, True])
async def test_leaving_an_answer_ends_its_connection_and_the_work(vendor: Vendor, begun: bool):
    async with vendor.standin(pace=0.005) as standin:
        engine = await vendor.started(standin)
        if not begun:
            standin.fault = Fault("hang")
        answer = engine.generate(ask(COUNT))
        first = asyncio.create_task(anext(answer))
        await eventually(lambda: standin.connections == 1 and (first.done() or not begun))
        if begun:
            await answer.aclose()
        else:
            first.cancel()
        await eventually(lambda: standin.connections == 0)
        assert standin.cancelled == 1
        assert standin.generated < 100
        load = engine.status().load
        assert (load.running, load.waiting) == (0, 0)
        await engine.close()


async def test_a_break_after_the_first_words_is_a_failure_whatever_its_kind(vendor: Vendor):
    async with vendor.standin() as standin:
        engine = await vendor.started(standin)
        standin.error_in_stream = {"anthropic": "overloaded_error", "bedrock": "throttlingException"}[vendor.name]
        got: list[Any] = []
        with pytest.raises(EngineFailed):
            async with aclosing(engine.generate(ask())) as items:
                async for item in items:
                    got.append(item)
        assert len(got) == 2
        await engine.close()


async def test_slots_go_in_order_of_arrival_and_beyond_the_waiting_room_it_is_busy(vendor: Vendor):
    async with vendor.standin() as standin:
        engine = await vendor.started(standin, slots=1, max_waiting=2)
        standin.fault = Fault("hang")
        holding = engine.generate(ask())
        held = asyncio.create_task(anext(holding))
        await eventually(lambda: standin.connections == 1)
        order: list[str] = []

        async def queue_up(name: str) -> None:
            await collect(engine, ask(name))
            order.append(name)

        waiting = []
        for name in ("first", "second"):
            waiting.append(asyncio.create_task(queue_up(name)))
            await eventually(lambda: engine.status().load.waiting == len(waiting))
        assert isinstance(await failure(engine, ask()), Busy)
        standin.fault = None
        held.cancel()
        await asyncio.gather(*waiting)
        assert order == ["first", "second"]
        await engine.close()


async def test_closing_fails_what_runs_and_what_waits(vendor: Vendor):
    async with vendor.standin() as standin:
        engine = await vendor.started(standin, slots=1)
        standin.fault = Fault("hang")
        tasks = [asyncio.create_task(failure(engine, ask())) for _ in range(2)]
        await eventually(lambda: standin.connections == 1 and engine.status().load.waiting == 1)
        await engine.close()
        await engine.close()
        assert [type(error) for error in await asyncio.gather(*tasks)] == [EngineFailed] * 2
        assert isinstance(await failure(engine, ask()), EngineFailed)
        await eventually(lambda: standin.connections == 0)
        assert engine.status().health is Health.UNHEALTHY


# ------------------------------------------------------------------ health ---


async def test_a_refused_key_is_told_and_recovered_from(vendor: Vendor):
    async with vendor.standin() as standin:
        good, standin.key = standin.key, "another"
        engine = await vendor.started(standin)
        status = engine.status()
        assert status.health is Health.UNHEALTHY
        assert {"anthropic": "ANTHROPIC_API_KEY", "bedrock": "(env)"}[vendor.name] in status.health_detail
        assert not any(secret in status.health_detail for secret in ("test-key", "AKIATEST", "aws-secret"))
        standin.key = good
        await eventually(lambda: engine.status().health is Health.READY)
        assert not standin.bodies, "looking costs nothing"
        standin.key = "another"  # revoked while it works
        assert isinstance(await failure(engine, ask()), CredentialsRejected)
        await eventually(lambda: engine.status().health is Health.UNHEALTHY)
        await engine.close()


async def test_a_vendor_that_is_gone_is_noticed_and_found_again(vendor: Vendor):
    async with vendor.standin() as standin:
        engine = await vendor.started(standin)
        assert (await collect(engine, ask()))[0]
    assert isinstance(await failure(engine, ask()), EngineFailed)
    await eventually(lambda: engine.status().health is Health.UNHEALTHY)
    async with vendor.standin(port=standin.port):
        await eventually(lambda: engine.status().health is Health.READY)
        assert (await collect(engine, ask()))[0]
        await engine.close()


async def test_one_failed_answer_does_not_make_it_unhealthy(vendor: Vendor):
    async with vendor.standin() as standin:
        engine = await vendor.started(standin)
        looks = len(standin.requests)
        standin.fault = Fault("status", 500)
        await failure(engine, ask())
        await eventually(lambda: len(standin.requests) >= looks + 2)  # the request, and a look
        assert engine.status().health is Health.READY
        await engine.close()


async def test_connections_are_reused_and_counted(vendor: Vendor):
    async with vendor.standin() as standin:
        engine = await vendor.started(standin, slots=2)
        for _ in range(5):
            await collect(engine, ask())
        await eventually(lambda: engine.status().pool.in_use == 0)
        pool = engine.status().pool
        assert (pool.size, pool.opened, pool.reused) == (6, 1, 5)
        await engine.close()


async def test_nothing_that_was_said_is_logged(vendor: Vendor, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.DEBUG)
    async with vendor.standin() as standin:
        engine = await vendor.started(standin)
        text, _, _ = await collect(engine, ask(SECRET))
        standin.fault = Fault("status", 500)
        await failure(engine, ask(SECRET))
        await engine.close()
    for secret in (SECRET, text, "test-key", "aws-secret"):
        assert secret not in caplog.text


def test_the_module_needs_no_library_and_says_which_extra_brings_it(vendor: Vendor):
    code = (
        "import sys\n"
        "for name in ('anthropic', 'httpx2', 'boto3', 'botocore', 'urllib3'): sys.modules[name] = None\n"
        "from model_servers import registry\n"
        f"plugin = registry.find({vendor.name!r})\n"
        "assert plugin.metered\n"
        "try: registry.create(plugin, registry.validate(plugin, {}))\n"
        "except registry.EngineUnavailable as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert f"modelyard[{vendor.name}]" in done.stdout
