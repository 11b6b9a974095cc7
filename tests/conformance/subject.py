"""The model server under test, seen by a client. Every answer that is read is held against the contract's wording."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import grpc.aio
import pytest

from modelyard.rpc.channels import channel
from modelyard.rpc.errors import Refusal, from_rpc_error
from modelyard.rpc.reasons import CODES, Reason
from modelyard.v1 import fleet_pb2, generation_pb2, model_server_pb2, model_server_pb2_grpc
from tests.conformance.target import Endpoint, Fault, Target

T = TypeVar("T")

SERVICE = "modelyard.v1.ModelServer"
PATIENCE = 60.0
"""Seconds that any one call may take: real models on small machines are slow."""
PROMPTLY = 5.0
"""Seconds within which a server notices what it must notice: a caller that left, a passed deadline."""

ENGINES_WITHOUT = {
    "anthropic": {"seed"},
    "bedrock": {"seed"},
}
"""What the contract asks of every engine, and these vendors' interfaces have no means to give. See README.md."""
LACKS = ("seed",)
"""What may be missing without being a feature that Describe tells of."""

GREETING = "What is modelyard?"
COUNTING = "Count from 1 to 1000. Write every number, and nothing else."
_ENDLESS = '{"type": "array", "items": {"type": "integer"}, "minItems": 400}'
_LONG_ENOUGH = 100


def says(
    *said: str | generation_pb2.Message, sampling: dict[str, Any] | None = None, **more: Any
) -> generation_pb2.GenerationInput:
    """A conversation: plain texts are the user's."""
    messages = [text if isinstance(text, generation_pb2.Message) else message(text) for text in said]
    content = generation_pb2.GenerationInput(messages=messages, **more)
    # Greedy and bounded where a test does not care: quick, and as repeatable as the model can be.
    content.sampling.CopyFrom(
        generation_pb2.SamplingParams(**{"max_tokens": 48, "temperature": 0.0, **(sampling or {})})
    )
    return content


def message(text: str = "", role: int = generation_pb2.ROLE_USER, **more: Any) -> generation_pb2.Message:
    parts = [generation_pb2.ContentPart(text=text)] if text else []
    return generation_pb2.Message(role=role, content=parts, **more)  # type: ignore[arg-type]


def schema_format(schema: dict[str, Any] | str) -> generation_pb2.ResponseFormat:
    text = schema if isinstance(schema, str) else json.dumps(schema)
    return generation_pb2.ResponseFormat(json_schema=generation_pb2.JsonSchemaFormat(schema=text, name="answer"))


@dataclass
class Answer:
    """A complete answer."""

    responses: list[model_server_pb2.ModelServerGenerateResponse | model_server_pb2.ModelServerCompleteResponse] = (
        field(default_factory=list)
    )
    arrivals: list[float] = field(default_factory=list)
    """Seconds from asking to each response."""

    @property
    def deltas(self) -> list[generation_pb2.GenerationDelta]:
        return [response.delta for response in self.responses if response.HasField("delta")]

    @property
    def result(self) -> generation_pb2.GenerationResult:
        return self.responses[-1].result

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self.deltas)

    @property
    def pieces(self) -> list[str]:
        return [delta.text for delta in self.deltas if delta.text]

    @property
    def logprobs(self) -> list[generation_pb2.TokenLogprob]:
        return [entry for delta in self.deltas for entry in delta.logprobs]

    @property
    def calls(self) -> list[generation_pb2.ToolCall]:
        """Fragments joined."""
        calls: list[generation_pb2.ToolCall] = []
        for delta in self.deltas:
            for part in delta.tool_calls:
                if part.index == len(calls):
                    assert part.id and part.name, "the first fragment of a call carries its id and name"
                    calls.append(generation_pb2.ToolCall(id=part.id, name=part.name))
                else:
                    assert part.index < len(calls), f"fragment of call {part.index}, but call {len(calls)} never began"
                    assert not part.id and not part.name, "only the first fragment of a call carries its id and name"
                calls[part.index].arguments_json += part.arguments_json
        return calls

    @property
    def usage(self) -> generation_pb2.Usage:
        return self.result.usage

    @property
    def reason(self) -> str:
        """Of the end, for example "STOP"."""
        return generation_pb2.FinishReason.Name(self.result.finish_reason).removeprefix("FINISH_REASON_")

    def check(self) -> None:
        """What holds for every answer."""
        assert self.responses, "a stream without a result has failed, and must not end with OK"
        for number, response in enumerate(self.responses):
            assert response.HasField("delta") or response.HasField("result"), "at least one field of a step is set"
            assert response.HasField("result") == (number == len(self.responses) - 1), (
                "the result comes once, in the last message"
            )
        assert self.result.finish_reason in (1, 2, 3, 4), f"finish_reason {self.result.finish_reason}"
        usage, calls = self.usage, self.calls
        assert usage.prompt_tokens >= 1
        assert usage.cached_prompt_tokens <= usage.prompt_tokens
        assert usage.reasoning_tokens <= usage.completion_tokens
        assert usage.completion_tokens >= 1 or not (self.text or calls), "text came out of no tokens"
        assert sum(delta.tokens for delta in self.deltas) <= usage.completion_tokens
        assert (self.reason == "TOOL_CALLS") <= bool(calls), "the answer ends with tool calls, but has none"
        assert len({call.id for call in calls}) == len(calls), "ids of calls are unique"
        timings = self.result.timings
        total = timings.total.ToNanoseconds()
        assert 0 < total <= self.arrivals[-1] * 1e9, "receipt to end, no longer than the caller saw"
        assert 0 <= timings.queued.ToNanoseconds() <= total
        if timings.HasField("ttft"):
            assert 0 <= timings.ttft.ToNanoseconds() <= total
        assert timings.HasField("ttft") or not self.deltas, "the first delta came, but not the time it took"


@dataclass(frozen=True)
class Long:
    """A request with a long answer."""

    asked: generation_pb2.GenerationInput
    answer: Answer
    """To the same with fewer tokens."""
    seconds: float
    """About what its answer takes when nothing else runs."""

    @property
    def noticeably_less(self) -> float:
        """Seconds: if it is over by then, somebody ended it."""
        return min(PROMPTLY, max(0.4, self.seconds * 2 / 3))

    def must_take(self, seconds: float) -> None:
        """Skips the test where the answer is there sooner."""
        if self.seconds < seconds:
            pytest.skip("the model is too quick for that")


class Subject:
    """The server of one target."""

    def __init__(
        self,
        target: Target,
        endpoint: Endpoint,
        connection: grpc.aio.Channel,
        report: fleet_pb2.ServerReport,
        lacks: frozenset[str],
    ) -> None:
        self.target = target
        self.address = endpoint.address
        self.channel = connection
        self.stub = model_server_pb2_grpc.ModelServerStub(connection)
        self.report = report
        """As it was at the beginning."""
        self.model = endpoint.model or (report.models[0].name if report.models else "")
        self.embedding_model = endpoint.embedding_model or self.model
        self.vision_model = endpoint.vision_model or self.model
        self._lacks = lacks
        self._endpoint = endpoint
        self._greeting: tuple[Answer, bool] | None = None

    # ------------------------------------------------------- what it says ---

    def info(self, model: str = "") -> fleet_pb2.ModelInfo:
        name = model or self.model
        found = next((info for info in self.report.models if info.name == name), None)
        assert found is not None, f"Describe does not list the model {name!r} that is to be tested"
        return found

    def has(self, feature: str, model: str = "") -> bool:
        return fleet_pb2.ModelFeature.Value(f"MODEL_FEATURE_{feature}") in self.info(model).features

    def needs(self, feature: str, model: str = "") -> None:
        """Skips the test where the feature is not advertised."""
        if not self.has(feature, model):
            pytest.skip(f"{feature} is not advertised")

    def needs_seeds(self) -> None:
        if "seed" in self._lacks:
            pytest.skip("the engine has no seeds")

    async def describe(self) -> fleet_pb2.ServerReport:
        return (await self.stub.Describe(model_server_pb2.DescribeRequest(), timeout=PATIENCE)).report

    async def until_idle(self, within: float = PROMPTLY) -> None:
        """Wait until nothing runs or waits any more."""

        async def idle() -> bool:
            load = (await self.describe()).load
            return load.running == load.waiting == 0

        await eventually(idle, within)

    # -------------------------------------------------------------- asking ---

    def start(
        self, asked: generation_pb2.GenerationInput, *, model: str = "", timeout: float = PATIENCE
    ) -> grpc.aio.UnaryStreamCall[Any, model_server_pb2.ModelServerGenerateResponse]:
        request = model_server_pb2.ModelServerGenerateRequest(
            model=model or self.model, input=asked, request_id="conformance"
        )
        return self.stub.Generate(request, timeout=timeout)

    async def generate(
        self, asked: generation_pb2.GenerationInput, *, model: str = "", timeout: float = PATIENCE
    ) -> Answer:
        """The whole answer, checked. Raises Refusal."""
        answer, began = Answer(), time.perf_counter()
        try:
            async for response in self.start(asked, model=model, timeout=timeout):
                answer.arrivals.append(time.perf_counter() - began)
                answer.responses.append(response)
        except grpc.aio.AioRpcError as error:
            raise refusal_of(error) from error
        answer.check()
        return answer

    async def complete(
        self, asked: generation_pb2.GenerationInput, *, model: str = "", timeout: float = PATIENCE
    ) -> Answer:
        """The whole answer as one message, checked. Raises Refusal; the test is skipped if there is no such call."""
        request = model_server_pb2.ModelServerCompleteRequest(
            model=model or self.model, input=asked, request_id="conformance"
        )
        began = time.perf_counter()
        try:
            response = await self.stub.Complete(request, timeout=timeout)
        except grpc.aio.AioRpcError as error:
            refusal = refusal_of(error)
            if refusal.transport and refusal.code is grpc.StatusCode.UNIMPLEMENTED:
                pytest.skip("the server has no Complete")
            raise refusal from error
        answer = Answer([response], [time.perf_counter() - began])
        answer.check()
        return answer

    async def embed(self, *inputs: str, model: str = "") -> model_server_pb2.ModelServerEmbedResponse:
        request = model_server_pb2.ModelServerEmbedRequest(model=model or self.embedding_model, inputs=inputs)
        return await call(self.stub.Embed(request, timeout=PATIENCE))

    async def count(self, asked: generation_pb2.GenerationInput, *, model: str = "") -> int:
        request = model_server_pb2.CountTokensRequest(model=model or self.model, input=asked)
        return (await call(self.stub.CountTokens(request, timeout=PATIENCE))).prompt_tokens

    async def greeting(self) -> tuple[Answer, bool]:
        """The greedy answer to GREETING, and whether the model gives the same one again."""
        if self._greeting is None:
            free, again = [await self.generate(says(GREETING)) for _ in range(2)]
            self._greeting = free, free.text == again.text
        return self._greeting

    async def long(self, max_tokens: int = 0) -> Long:
        """Something that this model answers at length; the test is skipped if nothing is found.

        `max_tokens` 0: as many as there is room for, at most 1,500.
        """
        if self.target.name not in _long:
            _long[self.target.name] = await self._find_long()
        found = _long[self.target.name]
        asked = generation_pb2.GenerationInput()
        asked.CopyFrom(found.asked)
        tokens = max_tokens or max(_LONG_ENOUGH, min(1500, self.info().context_length // 2))
        asked.sampling.max_tokens = tokens
        goes_on = found.answer.reason == "LENGTH"
        there = found.answer.usage.completion_tokens
        seconds = found.answer.arrivals[-1] / there * (tokens if goes_on else min(tokens, there))
        return Long(asked, found.answer, seconds)

    async def _find_long(self) -> Long:
        candidates = [says(COUNTING, sampling={"max_tokens": 300})]
        if self.has("JSON_SCHEMA"):
            # Whatever the model wants, this goes on.
            candidates.append(says(COUNTING, sampling={"max_tokens": 300}, response_format=schema_format(_ENDLESS)))
        best: Long | None = None
        for asked in candidates:
            try:
                answer = await self.generate(asked)
            except Refusal:  # a schema that this vendor does not take
                continue
            if best is None or answer.usage.completion_tokens > best.answer.usage.completion_tokens:
                best = Long(asked, answer, answer.arrivals[-1])
            if answer.reason == "LENGTH":
                break
        if best is None or best.answer.usage.completion_tokens < _LONG_ENOUGH:
            pytest.skip("the model gives no long answers")
        return best

    # -------------------------------------------------------------- faults ---

    def set_fault(self, fault: Fault | None) -> None:
        """Skips the test where the target cannot have that fault."""
        assert self.target.faults is not None
        try:
            self.target.faults(self._endpoint, fault)
        except NotImplementedError:
            pytest.skip("what stands behind the server cannot have this fault")


_long: dict[str, Long] = {}
"""By target: what was found to be answered at length."""


async def call(awaitable: Awaitable[T]) -> T:
    """A unary call. Raises Refusal."""
    try:
        return await awaitable
    except grpc.aio.AioRpcError as error:
        raise refusal_of(error) from error


def refusal_of(error: grpc.aio.AioRpcError) -> Refusal:
    refusal = from_rpc_error(error)
    if not refusal.transport:
        assert refusal.code is CODES[refusal.reason], f"{refusal.reason} belongs to {CODES[refusal.reason]}"
        assert refusal.message, "a refusal says for people why"
    return refusal


async def refused(awaitable: Awaitable[Any]) -> Refusal:
    """The refusal that the call ends with."""
    with pytest.raises(Refusal) as caught:
        await awaitable
    return caught.value


async def refused_with(reason: Reason, awaitable: Awaitable[Any]) -> Refusal:
    """The refusal, which must be the contract's own and have that reason."""
    refusal = await refused(awaitable)
    assert not refusal.transport, f"the status carries no google.rpc.ErrorInfo of modelyard: {refusal!r}"
    assert refusal.reason is reason, repr(refusal)
    return refusal


async def unsupported(awaitable: Awaitable[Any]) -> None:
    """The call is answered UNIMPLEMENTED. gRPC's own will do: a server may lack the whole method."""
    refusal = await refused(awaitable)
    assert refusal.code is grpc.StatusCode.UNIMPLEMENTED, repr(refusal)
    assert refusal.reason is Reason.UNSUPPORTED, repr(refusal)


async def eventually(condition: Callable[[], Awaitable[bool]], within: float = PROMPTLY) -> None:
    async with asyncio.timeout(within):
        while not await condition():
            await asyncio.sleep(0.02)


@asynccontextmanager
async def running(target: Target, lacks: frozenset[str]) -> AsyncIterator[Subject]:
    """Starts the target and connects to it."""
    async with target.start() as endpoint:
        async with channel(endpoint.address, own_connection=True) as connection:
            stub = model_server_pb2_grpc.ModelServerStub(connection)
            described = await stub.Describe(model_server_pb2.DescribeRequest(), timeout=PATIENCE, wait_for_ready=True)
            report = described.report
            lacks = lacks | ENGINES_WITHOUT.get(report.engine.name, set())
            yield Subject(target, endpoint, connection, report, lacks)
