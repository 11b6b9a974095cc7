"""Complete gives what Generate gives, as one message, and ends as Generate does."""

from __future__ import annotations

import asyncio
import time

import pytest

from modelyard.rpc.reasons import Reason
from modelyard.v1 import generation_pb2, model_server_pb2
from tests.conformance.subject import GREETING, Subject, refused, refused_with, says

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_a_whole_answer_is_that_of_the_stream(subject: Subject) -> None:
    streamed, repeats = await subject.greeting()
    whole = await subject.complete(says(GREETING))
    assert whole.text
    assert whole.usage.prompt_tokens == streamed.usage.prompt_tokens
    timings = whole.result.timings
    assert timings.HasField("ttft"), "only the server has seen the first token"
    if whole.usage.completion_tokens > 1 and timings.HasField("tpot"):
        decoding = timings.tpot.ToNanoseconds() * (sum(delta.tokens for delta in whole.deltas) - 1)
        assert timings.ttft.ToNanoseconds() + decoding <= timings.total.ToNanoseconds() * 1.01
    if not repeats:
        pytest.skip("this model does not repeat itself")
    assert (whole.text, whole.reason) == (streamed.text, streamed.reason)
    assert whole.usage.completion_tokens == streamed.usage.completion_tokens
    assert [delta.reasoning_text for delta in whole.deltas] == [
        "".join(delta.reasoning_text for delta in streamed.deltas)
    ]


async def test_a_whole_answer_is_cut_at_max_tokens(subject: Subject) -> None:
    whole = await subject.complete(says(GREETING, sampling={"max_tokens": 2}))
    assert whole.reason == "LENGTH" and whole.usage.completion_tokens <= 2


async def test_log_probabilities_of_a_whole_answer(subject: Subject) -> None:
    subject.needs("LOGPROBS")
    whole = await subject.complete(says(GREETING, sampling={"max_tokens": 12, "logprobs": True, "top_logprobs": 2}))
    assert len(whole.logprobs) == sum(delta.tokens for delta in whole.deltas) > 0
    assert all(len(entry.top) == 2 for entry in whole.logprobs)


async def test_a_tool_call_of_a_whole_answer_is_one_fragment(subject: Subject) -> None:
    subject.needs("FUNCTION_CALLING")
    schema = '{"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}'
    tool = generation_pb2.Tool(name="get_weather", description="Current weather of a city.", parameters_schema=schema)
    asked = says("What is the weather in Paris?", sampling={"max_tokens": 96}, tools=[tool])
    asked.tool_choice.mode = generation_pb2.TOOL_CHOICE_MODE_REQUIRED
    whole = await subject.complete(asked)
    assert whole.reason == "TOOL_CALLS" and whole.calls[0].name == "get_weather"
    fragments = [part.index for delta in whole.deltas for part in delta.tool_calls]
    assert fragments == list(range(len(whole.calls)))


async def test_a_caller_that_leaves_stops_a_whole_answer(subject: Subject) -> None:
    await subject.complete(says(GREETING, sampling={"max_tokens": 2}))  # skips where there is no such call
    long = await subject.long()
    long.must_take(0.6)
    request = model_server_pb2.ModelServerCompleteRequest(model=subject.model, input=long.asked)
    call = subject.stub.Complete(request, timeout=60)
    waiting = asyncio.ensure_future(call)

    async with asyncio.timeout(long.seconds):
        while not (load := (await subject.describe()).load).running + load.waiting:
            await asyncio.sleep(0.01)
    call.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    await subject.until_idle(long.noticeably_less)


async def test_a_passed_deadline_ends_a_whole_answer(subject: Subject) -> None:
    await subject.complete(says(GREETING, sampling={"max_tokens": 2}))
    long = await subject.long()
    long.must_take(0.6)
    allowed = 0.25
    began = time.perf_counter()
    refusal = await refused(subject.complete(long.asked, timeout=allowed))
    assert refusal.reason is Reason.DEADLINE_EXCEEDED, repr(refusal)
    assert time.perf_counter() - began < allowed + 1.0
    await subject.until_idle(long.noticeably_less)


async def test_what_is_refused_is_refused_alike(subject: Subject) -> None:
    await subject.complete(says(GREETING, sampling={"max_tokens": 2}))
    empty = generation_pb2.GenerationInput()
    told = await refused_with(Reason.INVALID_REQUEST, subject.complete(empty))
    streamed = await refused_with(Reason.INVALID_REQUEST, subject.generate(empty))
    assert [found.field for found in told.violations] == [found.field for found in streamed.violations]
    await refused_with(Reason.UNKNOWN_MODEL, subject.complete(says(GREETING), model="no-such-model"))
    context = subject.info().context_length
    if context <= 1_200_000:
        await refused_with(Reason.CONTEXT_TOO_LONG, subject.complete(says("word " * (context + 16))))
