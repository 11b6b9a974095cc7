"""Answers in plain text: streaming, ends, stop strings, seeds, log-probabilities, usage."""

from __future__ import annotations

import asyncio
import uuid

import pytest

from modelyard.rpc.errors import Refusal
from modelyard.rpc.reasons import Reason
from modelyard.v1 import generation_pb2
from tests.conformance.subject import (
    GREETING,
    Answer,
    Subject,
    message,
    refused_with,
    says,
    unsupported,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")

_ASSISTANT, _SYSTEM = generation_pb2.ROLE_ASSISTANT, generation_pb2.ROLE_SYSTEM


# --------------------------------------------------------------- streaming ---


async def test_a_question_is_answered(subject: Subject) -> None:
    answer = await subject.generate(says(GREETING))
    assert answer.text.strip()
    assert answer.reason in ("STOP", "LENGTH")
    assert "\ufffd" not in answer.text


async def test_a_long_answer_arrives_as_it_is_made(subject: Subject) -> None:
    subject.needs("STREAMING")
    answer = await subject.generate((await subject.long(300)).asked)
    assert len(answer.deltas) >= 4, "a hundred tokens and more, in hardly any message"
    assert len(answer.pieces) >= 4
    timings = answer.result.timings
    assert timings.HasField("tpot") and timings.tpot.ToNanoseconds() > 0
    if answer.arrivals[-1] > 0.5:
        assert answer.arrivals[0] < 0.8 * answer.arrivals[-1], "the first piece came with the last ones"


async def test_a_conversation_with_instructions_and_names_is_accepted(subject: Subject) -> None:
    talk = says(
        message("Answer in one short sentence.", _SYSTEM),
        message("Hello, I am Ada.", name="ada"),
        message("Hello Ada.", _ASSISTANT),
        message("What is modelyard?", name="ada"),
    )
    answer = await subject.generate(talk)
    assert answer.usage.prompt_tokens > (await subject.generate(says("Hi"))).usage.prompt_tokens


async def test_parts_of_a_message_are_all_read(subject: Subject) -> None:
    whole = message()
    for text in ("What is ", "modelyard", "?"):
        whole.content.add(text=text)
    answer = await subject.generate(says(whole))
    first_part = message("What is ")
    assert answer.usage.prompt_tokens > (await subject.generate(says(first_part))).usage.prompt_tokens


async def test_a_raw_prompt_is_continued_or_unsupported(subject: Subject) -> None:
    sampling = generation_pb2.SamplingParams(max_tokens=8, temperature=0)
    raw = generation_pb2.GenerationInput(prompt="The fleet can mix", sampling=sampling)
    try:
        answer = await subject.generate(raw)
    except Refusal as refusal:
        assert refusal.reason is Reason.UNSUPPORTED
    else:
        assert answer.usage.completion_tokens <= 8


async def test_text_in_any_script_is_accepted(subject: Subject) -> None:
    text = "Zażółć gęślą jaźń · Ünïcödé · 日本語のテキスト · العربية · 👩‍👩‍👧‍👦🦊 · e\u0301 · \u200b\u202e · 𝕏"
    answer = await subject.generate(says(text, message(text, _ASSISTANT), message(text)))
    assert answer.usage.prompt_tokens > 10


# -------------------------------------------------------------------- ends ---


@pytest.mark.parametrize("limit", [1, 5])
async def test_max_tokens_ends_the_answer_with_length(subject: Subject, limit: int) -> None:
    answer = await subject.generate(says(GREETING, sampling={"max_tokens": limit}))
    assert answer.reason == "LENGTH"
    assert 1 <= answer.usage.completion_tokens <= limit


async def test_more_max_tokens_than_the_context_has_is_no_failure(subject: Subject) -> None:
    asked = says(GREETING, sampling={"max_tokens": subject.info().context_length, "stop": [" ", "e", "a"]})
    try:
        await subject.generate(asked)
    except Refusal as refusal:
        assert refusal.reason is Reason.CONTEXT_TOO_LONG, repr(refusal)


async def test_stop_strings_cut_the_text_wherever_pieces_end(subject: Subject) -> None:
    free, repeats = await subject.greeting()
    stops = _stop_strings(free)
    assert stops, f"the answer is too short to be cut: {free.text!r}"
    for stop in stops:
        stopped = await subject.generate(says(GREETING, sampling={"stop": ["\n@@never@@", stop]}))
        assert stop not in stopped.text
        if repeats:  # so what must come out is known
            assert stopped.text == free.text[: free.text.index(stop)]
            assert stopped.reason == "STOP"
            assert stopped.usage.completion_tokens <= free.usage.completion_tokens


async def test_what_only_begins_like_a_stop_string_is_still_said(subject: Subject) -> None:
    free, repeats = await subject.greeting()
    near = await subject.generate(says(GREETING, sampling={"stop": [free.text[-6:] + "@@never@@"]}))
    if repeats:
        assert near.text == free.text
        assert near.reason == free.reason


async def test_sixteen_stop_strings_are_accepted(subject: Subject) -> None:
    free, repeats = await subject.greeting()
    stop = _stop_strings(free)[0]
    # The one that matters comes last: no engine may take only the first few.
    stops = [f"@@never{number}@@" + "x" * 200 for number in range(15)] + [stop]
    stopped = await subject.generate(says(GREETING, sampling={"stop": stops}))
    assert stop not in stopped.text
    if repeats:
        assert stopped.reason == "STOP"


def _stop_strings(answer: Answer) -> list[str]:
    """Pieces of the answer to stop at: from its middle, and one from over each of a few borders between messages."""
    text = answer.text
    middle = len(text) // 2
    found = [text[middle : middle + 5]]
    end = 0
    for piece in answer.pieces[:-1]:
        end += len(piece)
        found.append(text[max(0, end - 2) : end + 2])
    # Not at the very beginning: an answer must be left. Vendors refuse stop strings of blanks alone.
    usable = [stop for stop in dict.fromkeys(found) if len(stop) > 2 and stop.strip() == stop and text.index(stop) > 3]
    return [*usable[:1], *usable[2::3]][:4]


# ------------------------------------------------------------ sampling ---


async def test_a_seed_repeats_the_answer_whatever_runs_beside_it(subject: Subject) -> None:
    subject.needs_seeds()
    hot = says(GREETING, sampling={"temperature": 1.0, "seed": 7})
    alone = await subject.generate(hot)
    beside, *_ = await asyncio.gather(
        subject.generate(hot),
        subject.generate(says("Something else.", sampling={"temperature": 1.0, "seed": 8})),
        subject.generate(says("And a third?", sampling={"temperature": 0.5})),
    )
    assert beside.text == alone.text
    greedy = says(GREETING, sampling={"seed": 7})
    assert (await subject.generate(greedy)).text == (await subject.generate(greedy)).text


async def test_other_seeds_give_other_answers(subject: Subject) -> None:
    subject.needs_seeds()
    texts = {
        (await subject.generate(says(GREETING, sampling={"temperature": 1.6, "seed": seed}))).text
        for seed in (0, 1, 2**32 + 5, 2**63 + 1)
    }
    assert len(texts) > 1


async def test_all_sampling_parameters_are_accepted_together(subject: Subject) -> None:
    sampling = {
        "max_tokens": 12,
        "temperature": 0.9,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.02,
        "frequency_penalty": 0.3,
        "presence_penalty": -0.2,
        "repetition_penalty": 1.1,
        "n": 1,
    }
    await subject.generate(says(GREETING, sampling=sampling))


async def test_logprobs_come_with_every_token_or_are_unsupported(subject: Subject) -> None:
    with_top = says(GREETING, sampling={"max_tokens": 12, "logprobs": True, "top_logprobs": 5})
    if not subject.has("LOGPROBS"):
        await unsupported(subject.generate(with_top))
        return
    answer = await subject.generate(with_top)
    assert answer.logprobs
    for delta in answer.deltas:
        assert len(delta.logprobs) == delta.tokens
    for entry in answer.logprobs:
        values = [top.logprob for top in entry.top]
        assert len(values) == 5
        assert values == sorted(values, reverse=True), "likeliest first"
        assert all(value <= 0 for value in [*values, entry.logprob])
        assert entry.logprob <= values[0] + 1e-6
    without_top = await subject.generate(says(GREETING, sampling={"max_tokens": 12, "logprobs": True}))
    assert without_top.logprobs and not any(entry.top for entry in without_top.logprobs)
    assert not (await subject.generate(says(GREETING, sampling={"max_tokens": 12}))).logprobs


# ------------------------------------------------------------------- usage ---


async def test_tokens_are_counted_as_generation_counts_them_or_not_at_all(subject: Subject) -> None:
    for asked in (
        says(GREETING),
        says(message("Be brief.", _SYSTEM), "Hi.", message("Hello.", _ASSISTANT), "A longer question, please?"),
    ):
        try:
            counted = await subject.count(asked)
        except Refusal as refusal:
            assert refusal.reason is Reason.UNSUPPORTED, repr(refusal)
            return
        assert counted == (await subject.generate(asked)).usage.prompt_tokens


async def test_a_prompt_seen_before_is_found_in_the_cache(subject: Subject) -> None:
    words = min(3000, subject.info().context_length // 4)
    # Longer than the blocks in which engines cache, and never seen by this server.
    asked = says(f"{uuid.uuid4().hex} " + "yard " * words, sampling={"max_tokens": 4})
    first, second = await subject.generate(asked), await subject.generate(asked)
    assert first.usage.prompt_tokens == second.usage.prompt_tokens
    if subject.has("PREFIX_CACHE"):
        assert second.usage.cached_prompt_tokens > first.usage.cached_prompt_tokens
    else:
        assert second.usage.cached_prompt_tokens == first.usage.cached_prompt_tokens == 0


async def test_a_prompt_that_does_not_fit_is_refused(subject: Subject) -> None:
    context = subject.info().context_length
    if context > 1_200_000:
        pytest.skip("no request can be as long as this context")
    asked = says("word " * (context + 16))
    refusal = await refused_with(Reason.CONTEXT_TOO_LONG, subject.generate(asked))
    assert refusal.message
    assert (await subject.generate(says(GREETING))).text
