"""What stands behind the model server fails: the reason is the contract's, and the server recovers.

Only for targets that can be made to fail.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import grpc.aio
import pytest
import pytest_asyncio

from modelyard.rpc.errors import Refusal
from modelyard.rpc.reasons import Reason
from modelyard.v1 import fleet_pb2
from tests.conformance.subject import GREETING, Subject, eventually, refusal_of, refused_with, says
from tests.conformance.target import Fault

pytestmark = pytest.mark.asyncio(loop_scope="module")
NEEDS_FAULTS = True
"""Read by conftest.py: these tests are for targets that have faults."""

_BOUND = 20.0
"""Seconds within which a silent engine is found out, and a server that can work again does."""

FAULTS: dict[str, tuple[Fault, set[Reason]]] = {
    "unauthorized": (Fault("status", 401), {Reason.CREDENTIALS_REJECTED}),
    "forbidden": (Fault("status", 403), {Reason.CREDENTIALS_REJECTED}),
    "rate limit": (Fault("status", 429, retry_after=2.0), {Reason.RATE_LIMITED}),
    "broken": (Fault("status", 500), {Reason.ENGINE_FAILED}),
    "unavailable": (Fault("status", 503), {Reason.ENGINE_FAILED, Reason.SERVER_BUSY}),
    "overloaded": (Fault("status", 529), {Reason.ENGINE_FAILED, Reason.SERVER_BUSY}),
    "hang": (Fault("hang"), {Reason.ENGINE_FAILED}),
    "stall": (Fault("stall"), {Reason.ENGINE_FAILED}),
    "reset": (Fault("reset"), {Reason.ENGINE_FAILED}),
    "garbage": (Fault("garbage"), {Reason.ENGINE_FAILED}),
}


@pytest_asyncio.fixture(autouse=True, loop_scope="module")
async def mended(subject: Subject) -> AsyncIterator[None]:
    """No fault is left behind."""
    yield
    subject.set_fault(None)
    await _recovered(subject)


async def _recovered(subject: Subject) -> None:
    """The server reports itself ready and answers."""
    async with asyncio.timeout(_BOUND):
        while True:
            if (await subject.describe()).health == fleet_pb2.SERVER_HEALTH_READY:
                try:
                    assert (await subject.generate(says(GREETING))).text
                    return
                except Refusal as refusal:  # it has not noticed yet
                    assert refusal.reason in (Reason.ENGINE_FAILED, Reason.SERVER_BUSY), repr(refusal)
            await asyncio.sleep(0.05)


@pytest.mark.parametrize("name", FAULTS)
async def test_a_fault_has_its_reason_and_passes(subject: Subject, name: str) -> None:
    fault, reasons = FAULTS[name]
    subject.set_fault(fault)
    began = time.perf_counter()
    with pytest.raises(Refusal) as caught:
        await subject.generate(says(GREETING), timeout=_BOUND + 5)
    refusal = caught.value
    assert not refusal.transport, repr(refusal)
    assert refusal.reason in reasons, repr(refusal)
    assert time.perf_counter() - began < _BOUND
    if refusal.reason in (Reason.RATE_LIMITED, Reason.SERVER_BUSY):
        assert refusal.retry_after, "where waiting helps, RetryInfo says how long"
        assert fault.retry_after in (None, refusal.retry_after)
    assert "Traceback" not in refusal.message
    await subject.until_idle()


@pytest.mark.parametrize("name", ["unauthorized", "rate limit", "broken", "stall", "reset"])
async def test_a_fault_of_a_whole_answer_has_the_same_reason(subject: Subject, name: str) -> None:
    await subject.complete(says(GREETING, sampling={"max_tokens": 2}))  # skips where there is no such call
    fault, reasons = FAULTS[name]
    subject.set_fault(fault)
    with pytest.raises(Refusal) as caught:
        await subject.complete(says(GREETING), timeout=_BOUND + 5)
    assert not caught.value.transport and caught.value.reason in reasons, repr(caught.value)
    await subject.until_idle()


async def test_pieces_that_came_before_the_fault_are_passed_on(subject: Subject) -> None:
    subject.set_fault(Fault("reset", pieces=3))
    text = ""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for response in subject.start(says(GREETING)):
            assert not response.HasField("result"), "an unfinished answer has no result"
            text += response.delta.text
    assert refusal_of(caught.value).reason is Reason.ENGINE_FAILED
    assert text


async def test_a_caller_that_leaves_a_silent_engine_frees_its_slot(subject: Subject) -> None:
    subject.set_fault(Fault("hang"))
    call = subject.start(says(GREETING))

    async def arrived() -> bool:
        load = (await subject.describe()).load
        return bool(load.running + load.waiting)

    await eventually(arrived)
    call.cancel()
    await subject.until_idle()


async def test_embedding_fails_like_generating(subject: Subject) -> None:
    subject.needs("EMBEDDING", subject.embedding_model)
    subject.set_fault(Fault("status", 500))
    await refused_with(Reason.ENGINE_FAILED, subject.embed("Hello"))
