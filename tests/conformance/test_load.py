"""Many requests, callers that leave, are late or do not read: the slots come back, and nobody else suffers."""

from __future__ import annotations

import asyncio
import time

import pytest
from grpc.aio import AioRpcError

from modelyard.rpc.channels import channel
from modelyard.rpc.errors import Refusal
from modelyard.rpc.reasons import Reason
from modelyard.v1 import model_server_pb2, model_server_pb2_grpc
from tests.conformance.subject import GREETING, PATIENCE, Answer, Subject, refusal_of, refused, says

pytestmark = pytest.mark.asyncio(loop_scope="module")

_MOST = 12
"""More slots than that are not filled: hosted engines have many, and each answer may cost money."""


async def _generate(subject: Subject, number: int) -> Answer:
    """A request that comes back later where the server says that it is full."""
    async with asyncio.timeout(PATIENCE):
        while True:
            try:
                return await subject.generate(says(f"{GREETING} Question {number}.", sampling={"max_tokens": 24}))
            except Refusal as refusal:
                assert refusal.reason is Reason.SERVER_BUSY, repr(refusal)
                assert refusal.retry_after, "SERVER_BUSY says how long to wait"
                await asyncio.sleep(refusal.retry_after)


async def test_more_requests_than_slots_all_finish(subject: Subject) -> None:
    slots = min(subject.report.load.slots, _MOST)
    answers = await asyncio.gather(*(_generate(subject, number) for number in range(slots + 3)))
    assert all(answer.text for answer in answers)
    alone = await _generate(subject, 0)
    assert alone.usage.prompt_tokens == answers[0].usage.prompt_tokens
    await subject.until_idle()


async def test_a_full_server_says_when_to_come_back(subject: Subject) -> None:
    long = await subject.long()
    long.must_take(0.6)
    slots = min(subject.report.load.slots, _MOST)
    # Enough for slots and a waiting room of usual size. A server may also take them all.
    calls = [subject.start(long.asked) for _ in range(4 * slots + 4)]
    first = [asyncio.ensure_future(call.read()) for call in calls]
    try:
        done, _ = await asyncio.wait(first, timeout=long.noticeably_less, return_when=asyncio.FIRST_EXCEPTION)
        for refusal in [refusal_of(error) for task in done if isinstance(error := task.exception(), AioRpcError)]:
            assert refusal.reason is Reason.SERVER_BUSY, repr(refusal)
            assert refusal.retry_after, "SERVER_BUSY says how long to wait"
    finally:
        for call in calls:
            call.cancel()
        await asyncio.gather(*first, return_exceptions=True)
    await subject.until_idle()


async def test_load_is_reported_while_there_is_some(subject: Subject) -> None:
    long = await subject.long()
    long.must_take(0.2)
    call = subject.start(long.asked)
    try:
        await call.read()
        load = (await subject.describe()).load
        assert load.running + load.waiting == 1
        assert load.foreign == 1, "Describe counts everything as foreign"
    finally:
        call.cancel()
    await subject.until_idle()


async def test_callers_that_leave_free_their_slots(subject: Subject) -> None:
    long = await subject.long()
    long.must_take(0.6)
    slots = min(subject.report.load.slots, _MOST)
    calls = [subject.start(long.asked) for _ in range(slots + 1)]  # one of them may have to wait
    await calls[0].read()
    for call in calls:
        call.cancel()
    await subject.until_idle(long.noticeably_less)
    answer = await subject.generate(says(GREETING))
    # What comes next does not wait for answers that nobody wants.
    assert answer.result.timings.queued.ToNanoseconds() < long.noticeably_less * 1e9


async def test_a_passed_deadline_ends_the_work(subject: Subject) -> None:
    long = await subject.long()
    long.must_take(0.6)
    allowed = 0.25
    began = time.perf_counter()
    refusal = await refused(subject.generate(long.asked, timeout=allowed))
    assert refusal.reason is Reason.DEADLINE_EXCEEDED, repr(refusal)
    assert allowed <= time.perf_counter() - began < allowed + 1.0
    await subject.until_idle(long.noticeably_less)
    assert (await subject.generate(says(GREETING))).text


async def test_a_passed_deadline_ends_waiting_too(subject: Subject) -> None:
    long = await subject.long()
    long.must_take(0.2)
    slots = min(subject.report.load.slots, _MOST)
    calls = [subject.start(long.asked) for _ in range(slots)]
    try:
        await asyncio.gather(*(call.read() for call in calls))
        try:
            await subject.generate(long.asked, timeout=0.05)
        except Refusal as refusal:
            assert refusal.reason in (Reason.DEADLINE_EXCEEDED, Reason.SERVER_BUSY), repr(refusal)
    finally:
        for call in calls:
            call.cancel()
    await subject.until_idle()


async def test_slow_readers_do_not_hold_up_others(subject: Subject) -> None:
    if subject.report.load.slots < 2:
        pytest.skip("with one slot everyone waits for everyone")
    long = await subject.long(300)
    # A narrow window: what is not read soon stands still on the server's side.
    narrow = (("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0))
    async with channel(subject.address, options=narrow, own_connection=True) as connection:
        stub = model_server_pb2_grpc.ModelServerStub(connection)
        request = model_server_pb2.ModelServerGenerateRequest(model=subject.model, input=long.asked)
        slow = stub.Generate(request, timeout=PATIENCE)
        await slow.read()
        beside = await asyncio.wait_for(
            asyncio.gather(*(subject.generate(says(GREETING)) for _ in range(2))), PATIENCE / 2
        )
        assert all(answer.text for answer in beside)
        slow.cancel()
    await subject.until_idle()


async def test_a_connection_that_breaks_frees_its_slot(subject: Subject) -> None:
    long = await subject.long()
    long.must_take(0.6)
    async with channel(subject.address, own_connection=True) as connection:
        stub = model_server_pb2_grpc.ModelServerStub(connection)
        request = model_server_pb2.ModelServerGenerateRequest(model=subject.model, input=long.asked)
        await stub.Generate(request, timeout=PATIENCE).read()

    await subject.until_idle(long.noticeably_less)
    assert (await subject.generate(says(GREETING))).text
