"""The life of a model: PullModel, LoadModel, UnloadModel; or UNSUPPORTED where the engine manages none."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc.aio
import pytest
import pytest_asyncio

from modelyard.rpc.errors import Refusal
from modelyard.rpc.reasons import Reason
from modelyard.v1 import fleet_pb2, model_server_pb2
from tests.conformance.subject import (
    GREETING,
    PATIENCE,
    Subject,
    eventually,
    refusal_of,
    refused_with,
    says,
    unsupported,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")

_COLD, _WARM = fleet_pb2.MODEL_STATE_COLD, fleet_pb2.MODEL_STATE_WARM
_UNSPECIFIED = fleet_pb2.MODEL_STATE_UNSPECIFIED
_REQUESTS = {
    "Pull": model_server_pb2.ModelServerPullModelRequest,
    "Load": model_server_pb2.ModelServerLoadModelRequest,
    "Unload": model_server_pb2.ModelServerUnloadModelRequest,
}


async def _do(subject: Subject, step: str, model: str) -> list[fleet_pb2.ModelProgress]:
    """All progress of one step, checked. Raises Refusal."""
    method = getattr(subject.stub, f"{step}Model")
    try:
        steps = [answer.progress async for answer in method(_REQUESTS[step](model=model), timeout=PATIENCE)]
    except grpc.aio.AioRpcError as error:
        raise refusal_of(error) from error
    assert steps, "the last message says which state was reached"
    for progress in steps:
        assert progress.state != _UNSPECIFIED
        assert not progress.total_bytes or progress.completed_bytes <= progress.total_bytes
    return steps


async def _state(subject: Subject) -> int:
    report = await subject.describe()
    state = next(info.state for info in report.models if info.name == subject.model)
    return state or _WARM


async def _until(subject: Subject, state: int) -> None:
    async def reached() -> bool:
        return await _state(subject) == state

    await eventually(reached)


@pytest_asyncio.fixture(loop_scope="module")
async def managed(subject: Subject) -> AsyncIterator[Subject]:
    """The server, if it manages models; the model is warm before and after."""
    if not subject.report.engine.manages_models:
        pytest.skip("the engine does not manage its models")
    await _do(subject, "Load", subject.model)
    yield subject
    await _do(subject, "Load", subject.model)


@pytest.mark.parametrize("step", _REQUESTS)
async def test_an_engine_that_manages_no_models_says_so(subject: Subject, step: str) -> None:
    if subject.report.engine.manages_models:
        pytest.skip("the engine manages its models")
    await unsupported(_do(subject, step, subject.model))


async def test_a_model_is_unloaded_and_loaded(managed: Subject) -> None:
    assert await _state(managed) == _WARM
    assert (await _do(managed, "Unload", managed.model))[-1].state == _COLD
    await _until(managed, _COLD)
    assert (await _do(managed, "Unload", managed.model))[-1].state == _COLD, "unloading is idempotent"
    assert (await _do(managed, "Load", managed.model))[-1].state == _WARM
    await _until(managed, _WARM)
    assert (await _do(managed, "Load", managed.model))[-1].state == _WARM, "loading is idempotent"
    info = next(info for info in (await managed.describe()).models if info.name == managed.model)
    assert info.HasField("load_time"), "the load was measured"
    assert (await managed.generate(says(GREETING))).text


async def test_a_request_loads_a_cold_model(managed: Subject) -> None:
    before = (await managed.generate(says(GREETING))).usage.prompt_tokens
    await _do(managed, "Unload", managed.model)
    answer = await managed.generate(says(GREETING))
    assert answer.text
    assert answer.usage.prompt_tokens == before
    await _until(managed, _WARM)


async def test_a_cold_model_still_counts_embeds_and_is_listed(managed: Subject) -> None:
    await _do(managed, "Unload", managed.model)
    await _until(managed, _COLD)
    info = next(info for info in (await managed.describe()).models if info.name == managed.model)
    assert list(info.features) == list(managed.info().features), "what a model can do does not depend on its state"
    try:
        assert await managed.count(says(GREETING)) >= 1
    except Refusal as refusal:
        assert refusal.reason is Reason.UNSUPPORTED, repr(refusal)
    if managed.has("EMBEDDING"):
        assert (await managed.embed("Hello", model=managed.model)).embeddings


async def test_unloading_waits_for_running_requests(managed: Subject) -> None:
    answering = aiter(managed.start((await managed.long(200)).asked))
    await anext(answering)
    unloading = asyncio.create_task(_do(managed, "Unload", managed.model))
    answers = [answer async for answer in answering]
    assert answers[-1].HasField("result"), "the request that ran was not cut off"
    assert (await unloading)[-1].state == _COLD


async def test_two_that_load_at_once_join(managed: Subject) -> None:
    await _do(managed, "Unload", managed.model)
    both = await asyncio.gather(*(_do(managed, "Load", managed.model) for _ in range(2)))
    assert [steps[-1].state for steps in both] == [_WARM, _WARM]


async def test_a_model_that_is_here_need_not_be_pulled(managed: Subject) -> None:
    try:
        steps = await _do(managed, "Pull", managed.model)
    except Refusal as refusal:  # an engine may load and unload, but fetch nothing
        assert refusal.reason is Reason.UNSUPPORTED, repr(refusal)
    else:
        assert steps[-1].state in (_COLD, _WARM)


@pytest.mark.parametrize("step", ["Load", "Unload"])
async def test_unknown_and_missing_names_are_refused(managed: Subject, step: str) -> None:
    await refused_with(Reason.UNKNOWN_MODEL, _do(managed, step, "no-such-model-anywhere"))
    refusal = await refused_with(Reason.INVALID_REQUEST, _do(managed, step, ""))
    assert [violation.field for violation in refusal.violations] == ["model"]
