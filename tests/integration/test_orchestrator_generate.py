"""Generate, Embed and ExplainSelection end to end: what comes back, in which order, and whether it is true."""

from __future__ import annotations

import time

import grpc.aio
import pytest

from modelyard.rpc.errors import Refusal
from modelyard.rpc.reasons import Reason
from modelyard.testing import FakeModelServer, model_info
from modelyard.v1 import fleet_pb2, generation_pb2, orchestrator_pb2, selection_pb2, task_pb2
from tests.harness.front_door import ask, attached, attempts_of, front_door
from tests.harness.model_servers import model_server

REQUEST_ID = "modelyard-request-id"


def scores(**by_kind: float) -> list[fleet_pb2.Capability]:
    return [
        fleet_pb2.Capability(task_type=task_pb2.TaskType.Value(f"TASK_TYPE_{kind.upper()}"), score=score)
        for kind, score in by_kind.items()
    ]


async def test_the_answer_is_deltas_and_one_summary():
    async with front_door() as door, attached(door, FakeModelServer("one")):
        reply = await door.generate()
        assert reply.events == ["delta", "delta", "delta", "summary"]
        assert reply.text == "Hello, world"
        summary = reply.done
        assert summary.finish_reason == generation_pb2.FINISH_REASON_STOP
        assert (summary.server_id, summary.model, summary.provider) == ("one", "fake", "fake")
        assert (summary.usage.prompt_tokens, summary.usage.completion_tokens) == (1, 3)
        assert attempts_of(summary) == [("one", "")]
        assert abs(summary.attempts[0].started_at.seconds - time.time()) < 60


async def test_the_decision_comes_first_and_only_if_asked_for():
    async with front_door() as door, attached(door, FakeModelServer("one"), FakeModelServer("two")):
        reply = await door.generate(ask(explain=True))
        assert reply.events == ["decision", "delta", "delta", "delta", "summary"]
        (decision,) = reply.decisions
        assert decision.verdict == selection_pb2.VERDICT_CHOSEN
        assert decision.server_id == reply.done.server_id
        assert {candidate.server_id for candidate in decision.candidates} == {"one", "two"}


async def test_timings_add_up():
    engine = {"instant": False, "decode_tokens_per_second": 200, "answer_tokens": 20, "slots": 1}
    async with front_door() as door, model_server(orchestrators=(door.address,), engine_settings=engine):
        await door.until_ready("tested")
        started = time.monotonic()
        first, second = door.stream(ask("first")), door.stream(ask("second"))
        replies = [await first.rest(), await second.rest()]
        elapsed = time.monotonic() - started
        queued = []
        for reply in replies:
            timings = reply.done.timings
            assert 0 <= timings.queued.ToNanoseconds() <= timings.ttft.ToNanoseconds() <= timings.total.ToNanoseconds()
            assert timings.total.ToNanoseconds() / 1e9 <= elapsed
            tokens = reply.done.usage.completion_tokens
            assert tokens == sum(delta.tokens for delta in reply.deltas) == 20
            decoding = timings.tpot.ToNanoseconds() / 1e9 * (tokens - 1)
            between = (timings.total.ToNanoseconds() - timings.ttft.ToNanoseconds()) / 1e9
            assert 0.05 < decoding <= between + 0.001
            queued.append(timings.queued.ToNanoseconds() / 1e9)
        # One slot: the later of the two has waited for about as long as the earlier one decoded.
        assert min(queued) < 0.05 < max(queued)


async def test_an_answer_without_tokens_has_no_ttft():
    async with front_door() as door, attached(door, FakeModelServer("one")) as (fake,):
        fake.answer()
        summary = (await door.generate()).done
        assert not summary.timings.HasField("ttft") and not summary.timings.HasField("tpot")
        assert summary.timings.HasField("total") and summary.timings.HasField("queued")


async def test_the_cost_is_usage_times_price():
    price = fleet_pb2.Price(prompt_usd_per_million_tokens=2.0, completion_usd_per_million_tokens=10.0)
    fake = FakeModelServer("one", [model_info(price=price)])
    async with front_door() as door, attached(door, fake):
        summary = (await door.generate(ask("x" * 400))).done
        assert summary.usage.prompt_tokens == 100
        assert summary.cost_nano_usd == 100 * 2_000 + 3 * 10_000


async def test_a_free_model_costs_nothing():
    async with front_door() as door, attached(door, FakeModelServer("one")):
        assert (await door.generate()).done.cost_nano_usd == 0


async def test_the_request_id_is_kept_or_made_up():
    async with front_door() as door, attached(door, FakeModelServer("one")) as (fake,):
        given = await door.generate(ask(request_id="order 7/a"))
        assert given.done.request_id == given.trailing[REQUEST_ID] == "order 7/a"
        made_up = [await door.generate() for _ in range(2)]
        ids = [reply.done.request_id for reply in made_up]
        assert all(ids) and ids[0] != ids[1]
        assert [reply.trailing[REQUEST_ID] for reply in made_up] == ids
        # The model server logs the same id.
        assert [call.request.request_id for call in fake.calls_of("Generate")] == ["order 7/a", *ids]


async def test_a_failed_request_has_its_id_too():
    async with front_door() as door, attached(door, FakeModelServer("one")):
        reply = await door.generate(ask(request_id="lost-1", model="nothing"))
        assert reply.reason == "UNKNOWN_MODEL"
        assert reply.trailing[REQUEST_ID] == "lost-1"


async def test_deltas_pass_byte_for_byte():
    deltas = [
        generation_pb2.GenerationDelta(text="päß 🦙\0", tokens=2),
        generation_pb2.GenerationDelta(reasoning_text="hm", tokens=1),
        generation_pb2.GenerationDelta(),
        generation_pb2.GenerationDelta(tool_calls=[generation_pb2.ToolCallDelta(index=1, id="c", name="f")]),
        generation_pb2.GenerationDelta(
            text="x" * 100_000, tokens=3, logprobs=[generation_pb2.TokenLogprob(token="x", logprob=-0.5)]
        ),
    ]
    # A field that this version does not know stays in the message.
    deltas[0].MergeFromString(deltas[0].SerializeToString() + b"\xfa\x3f\x03abc")
    async with front_door() as door, attached(door, FakeModelServer("one")) as (fake,):
        fake.answer(*deltas)
        raw = door.channel.unary_stream("/modelyard.v1.Orchestrator/Generate")
        pieces = [piece async for piece in raw(ask().SerializeToString())]
        expected = [orchestrator_pb2.GenerateResponse(delta=delta).SerializeToString() for delta in deltas]
        assert pieces[:-1] == expected
        assert b"abc" in pieces[0]
        assert orchestrator_pb2.GenerateResponse.FromString(pieces[-1]).HasField("summary")


async def test_the_input_arrives_as_it_was_sent():
    raw = ask(max_tokens=7, temperature=0.25, stop=["\n"], seed=9)
    raw.input.ClearField("messages")
    raw.input.prompt = "Once upon"
    talk = ask("Hi")
    talk.input.messages.add(role=generation_pb2.ROLE_ASSISTANT).content.add(text="Yes?")
    talk.input.messages.add(role=generation_pb2.ROLE_USER).content.add(text="Go on")
    async with front_door() as door, attached(door, FakeModelServer("one")) as (fake,):
        for request in (raw, talk):
            assert (await door.generate(request)).done
            received = fake.calls_of("Generate")[-1].request
            assert received.input == request.input
            assert received.model == "fake"
            assert received.orchestrator_id == fake.directives[-1].orchestrator_id != ""


async def test_a_large_request_is_whole_in_every_attempt():
    request = ask("x" * 100_000, request_id="large")
    inputs = ["y" * 60_000, "z" * 60_000]
    large = model_info(context_length=1_000_000)
    async with front_door() as door, attached(door, FakeModelServer("one", [large])) as (fake,):
        for method in ("Generate", "Embed"):
            fake.inject_error(method, Refusal(Reason.ENGINE_FAILED, "once"))
        assert len((await door.generate(request)).done.attempts) == 2
        for call in fake.calls_of("Generate"):
            assert call.request.input == request.input
            assert (call.request.model, call.request.request_id) == ("fake", "large")
        answer = await door.stub.Embed(orchestrator_pb2.EmbedRequest(inputs=inputs))
        assert len(answer.embeddings) == 2
        assert [list(call.request.inputs) for call in fake.calls_of("Embed")] == [inputs] * 2
        assert {call.request.model for call in fake.calls_of("Embed")} == {"fake"}


async def test_the_deadline_is_passed_on():
    async with front_door(limits={"max_generation": 50.0}) as door, attached(door, FakeModelServer("one")) as (fake,):
        await door.generate(timeout=20.0)
        await door.generate(timeout=500.0)
        await door.generate()
        remaining = [call.time_remaining for call in fake.calls_of("Generate")]
        # gRPC rounds deadlines up on their way.
        assert 10 < remaining[0] < 21
        assert 40 < remaining[1] < 51 and 40 < remaining[2] < 51


@pytest.mark.parametrize(
    ("conditions", "allowed"),
    [
        ({"model": "small"}, {("a", "small"), ("b", "small")}),
        ({"model": "acme/small"}, {("b", "small")}),
        ({"provider": "acme"}, {("b", "small"), ("b", "large")}),
        ({"model": "small", "server_id": "a"}, {("a", "small")}),
        ({"server_id": "c"}, {("c", "tiny")}),
        ({"excluded_server_ids": ["a", "c"]}, {("b", "small"), ("b", "large")}),
        ({"min_context_length": 100_000}, {("b", "large")}),
        ({"features": [fleet_pb2.MODEL_FEATURE_VISION]}, {("c", "tiny")}),
    ],
)
async def test_requirements_are_kept(conditions, allowed):
    plain = [fleet_pb2.MODEL_FEATURE_STREAMING]
    fakes = (
        FakeModelServer("a", [model_info("small", "local", features=plain)]),
        FakeModelServer(
            "b",
            [
                model_info("small", "acme", features=plain),
                model_info("large", "acme", context_length=200_000, features=plain),
            ],
        ),
        FakeModelServer("c", [model_info("tiny", "local", context_length=2048)]),
    )
    async with front_door() as door, attached(door, *fakes):
        for _ in range(3):
            summary = (await door.generate(ask(**conditions))).done
            assert (summary.server_id, summary.model) in allowed


async def test_the_kind_of_work_decides_and_a_missing_score_excludes():
    writer = FakeModelServer("writer", [model_info("w", capabilities=scores(chat=0.3, writing=0.95))])
    coder = FakeModelServer("coder", [model_info("c", capabilities=scores(chat=0.9, code_generation=0.9))])
    async with front_door() as door, attached(door, writer, coder):

        async def chosen(kind: int) -> str:
            return (await door.generate(ask(task_type=kind))).done.server_id

        assert await chosen(task_pb2.TASK_TYPE_WRITING) == "writer"
        assert await chosen(task_pb2.TASK_TYPE_CODE_GENERATION) == "coder"
        assert await chosen(task_pb2.TASK_TYPE_UNSPECIFIED) == await chosen(task_pb2.TASK_TYPE_CHAT) == "coder"


async def test_an_image_needs_a_model_that_sees():
    blind = FakeModelServer("blind", [model_info("a", features=[], capabilities=scores(chat=1.0))])
    seeing = FakeModelServer("seeing", [model_info("b", capabilities=scores(chat=0.1))])
    request = ask("What is this?")
    request.input.messages[0].content.add().image.CopyFrom(
        generation_pb2.Image(data=b"\x89PNG", media_type="image/png")
    )
    async with front_door() as door, attached(door, blind, seeing):
        assert (await door.generate(request)).done.server_id == "seeing"


async def test_embed_returns_one_vector_per_text_in_order():
    price = fleet_pb2.Price(prompt_usd_per_million_tokens=1.0)
    fake = FakeModelServer("one", [model_info("e5", "local", price=price)])
    async with front_door() as door, attached(door, fake):
        call = door.stub.Embed(orchestrator_pb2.EmbedRequest(inputs=["a", "bcd", ""], request_id="e-1"))
        answer = await call
        assert [list(vector.values) for vector in answer.embeddings] == [[1, 1], [3, 1], [0, 1]]
        assert (answer.server_id, answer.model, answer.provider) == ("one", "e5", "local")
        assert (answer.request_id, answer.usage.prompt_tokens, answer.cost_nano_usd) == ("e-1", 3, 3_000)
        assert dict(await call.trailing_metadata())[REQUEST_ID] == "e-1"
        await door.until_idle()


async def test_explain_selection_says_what_generate_then_does():
    fakes = [
        FakeModelServer(f"s{n}", [model_info(f"m{n}", capabilities=scores(chat=0.2 + n / 10, writing=0.9 - n / 10))])
        for n in range(6)
    ]
    async with front_door() as door, attached(door, *fakes):
        for kind in (task_pb2.TASK_TYPE_CHAT, task_pb2.TASK_TYPE_WRITING):
            for conditions in ({}, {"excluded_server_ids": ["s0", "s5"]}, {"model": "m3"}):
                request = ask(task_type=kind, **conditions)
                foretold = await door.explain(request)
                request.explain = True
                reply = await door.generate(request)
                assert foretold.verdict == selection_pb2.VERDICT_CHOSEN
                assert (foretold.server_id, foretold.model) == (reply.done.server_id, reply.done.model)
                assert [c.server_id for c in foretold.candidates] == [
                    c.server_id for c in reply.decisions[0].candidates
                ]


async def test_explain_selection_reserves_nothing_and_tells_of_the_impossible():
    async with front_door() as door, attached(door, FakeModelServer("one")) as (fake,):
        decision = await door.explain(ask(min_context_length=1_000_000))
        assert decision.verdict == selection_pb2.VERDICT_IMPOSSIBLE
        (candidate,) = decision.candidates
        (rejection,) = candidate.rejections
        assert rejection.reason == selection_pb2.REJECTION_REASON_CONTEXT_TOO_SHORT and rejection.permanent
        assert (await door.server("one")).in_flight == 0
        assert not fake.calls_of("Generate")


async def test_explain_selection_estimates_the_prompt():
    async with front_door() as door, attached(door, FakeModelServer("one")):
        wrapped = orchestrator_pb2.ExplainSelectionRequest(request=ask("x" * 4000))
        answer = await door.stub.ExplainSelection(wrapped)
        assert 900 <= answer.estimated_prompt_tokens <= 1100


async def test_many_at_once_are_all_answered_and_every_slot_returns():
    async with front_door() as door, attached(door, *(FakeModelServer(f"s{n}", slots=2) for n in range(3))):
        calls = [door.stream(ask(f"request {n}", request_id=str(n))) for n in range(60)]
        replies = [await call.rest() for call in calls]
        assert [reply.done.request_id for reply in replies] == [str(n) for n in range(60)]
        assert {reply.done.server_id for reply in replies} == {"s0", "s1", "s2"}
        await door.until_idle()
        async with grpc.aio.insecure_channel(door.address) as plain:  # no options of ours are needed to be served
            raw = plain.unary_stream("/modelyard.v1.Orchestrator/Generate")
            assert len([piece async for piece in raw(ask().SerializeToString())]) == 4
