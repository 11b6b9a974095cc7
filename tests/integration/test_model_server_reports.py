"""The report stream of a model server, against control planes that only hear reports."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
import pytest

from modelyard.rpc.errors import Refusal, Violation, from_rpc_error
from modelyard.rpc.reasons import Reason
from modelyard.rpc.validation import check_report
from modelyard.v1 import fleet_pb2
from tests.harness.model_servers import (
    ReportHearer,
    Running,
    eventually,
    model_server,
    report_hearer,
    request,
)

HANG = {"kind": "hang", "tokens": 1}
READY = fleet_pb2.SERVER_HEALTH_READY
DRAIN, SERVE = fleet_pb2.DESIRED_STATE_DRAIN, fleet_pb2.DESIRED_STATE_SERVE


@pytest.fixture
async def hearer() -> AsyncIterator[tuple[ReportHearer, str]]:
    async with report_hearer() as pair:
        yield pair


async def hanging(server: Running, sender: str) -> Any:
    call = server.stub.Generate(request(orchestrator_id=sender))
    await call.read()
    return call


async def test_reports_are_valid_whole_and_echo_the_epoch(hearer):
    heard, address = hearer
    async with model_server(orchestrators=(address,), labels={"rack": "7"}) as server:
        report = await heard.until(lambda report: report.health == READY and report.lease_epoch == 1)
        assert heard.reports[0].lease_epoch == 0
        assert not [check_report(report) for report in heard.reports if check_report(report)]
        assert report.identity.server_id == "tested" and report.identity.labels["rack"] == "7"
        assert report.identity.endpoint == server.address
        assert [model.name for model in report.models] == ["simulated"]
        count = len(heard.reports)
        await eventually(lambda: len(heard.reports) > count + 3)  # and on and on, at the interval


async def test_news_is_reported_at_once():
    async with report_hearer(interval=30.0) as (heard, address):
        settings = {"faults": [{"kind": "disconnect", "at_request": 1, "seconds": 0.3}]}
        async with model_server(orchestrators=(address,), engine_settings=settings) as server:
            await heard.until(lambda report: report.health == READY)
            with pytest.raises(grpc.aio.AioRpcError):
                await server.generate(request())
            broken = await heard.until(lambda report: report.health == fleet_pb2.SERVER_HEALTH_UNHEALTHY)
            assert broken.health_detail
            await eventually(lambda: heard.reports[-1].health == READY)
            server.stopping.set()
            await heard.until(lambda report: report.state == DRAIN)


async def test_foreign_load_differs_per_control_plane():
    async with (
        report_hearer(orchestrator_id="cp-1") as (first, first_address),
        report_hearer(orchestrator_id="cp-2") as (second, second_address),
        model_server(orchestrators=(first_address, second_address), engine_settings={"faults": [HANG]}) as server,
    ):
        calls = [await hanging(server, sender) for sender in ("cp-1", "cp-1", "cp-2", "")]
        await first.until(lambda report: (report.load.running, report.load.foreign) == (4, 2))
        await second.until(lambda report: (report.load.running, report.load.foreign) == (4, 3))
        for call in calls:
            call.cancel()


async def test_drain_order_and_its_undoing(hearer):
    heard, address = hearer
    settings = {"slots": 1, "faults": [{**HANG, "at_request": 1}]}
    async with model_server(orchestrators=(address,), engine_settings=settings) as server:
        await heard.until(lambda report: report.health == READY)
        running = await hanging(server, "")
        await heard.order(DRAIN)
        await heard.until(lambda report: report.state == DRAIN)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await server.generate(request())
        assert from_rpc_error(caught.value).reason is Reason.DRAINING
        assert (await server.report()).load.running == 1  # what runs is left alone
        running.cancel()
        await server.until_load(running=0)
        await heard.order(SERVE)
        await eventually(lambda: heard.reports[-1].state == SERVE)
        assert (await server.generate(request())).result is not None


async def test_attaches_to_a_control_plane_that_comes_late_and_comes_back():
    heard = ReportHearer()
    port = await heard.start()
    await heard.stop()
    async with model_server(orchestrators=(f"127.0.0.1:{port}",)) as server:
        assert (await server.generate(request())).result is not None  # serves without one
        await heard.start(port)
        await heard.until(lambda report: report.lease_epoch == 1)
        await heard.stop()
        again = ReportHearer(orchestrator_id="cp-2")
        await again.start(port)
        started = asyncio.get_running_loop().time()
        await again.until(lambda report: True)
        # Within one report interval of a second, with room for a busy machine.
        assert asyncio.get_running_loop().time() - started < 2
        assert again.reports[0].lease_epoch == 0
        await again.stop()


async def test_gives_up_a_control_plane_that_no_longer_answers(hearer):
    heard, address = hearer
    async with model_server(orchestrators=(address,)):
        await heard.until(lambda report: report.lease_epoch == 1)
        heard.silent = True
        await eventually(lambda: heard.streams >= 2)
        heard.silent = False
        await heard.until(lambda report: report.lease_epoch >= 2)


async def test_a_wrong_address_disturbs_nobody(hearer):
    heard, address = hearer
    async with model_server(orchestrators=("no-such-host.invalid:1", address)) as server:
        await heard.until(lambda report: report.health == READY and report.lease_epoch == 1)
        assert (await server.generate(request())).result is not None


async def test_superseded_by_the_only_control_plane_ends_the_process(hearer, caplog):
    heard, address = hearer
    heard.refusal = Refusal(Reason.SUPERSEDED, "a newer instance attached")
    async with model_server(orchestrators=(address,)) as server:
        assert await server.task == 1
    assert re.search("newer instance", caplog.text)


async def test_superseded_by_one_of_two_goes_on_with_the_other(hearer):
    heard, address = hearer
    async with report_hearer(orchestrator_id="cp-2") as (other, other_address):
        other.refusal = Refusal(Reason.SUPERSEDED, "a newer instance attached")
        async with model_server(orchestrators=(address, other_address)) as server:
            await eventually(lambda: other.reports)
            count = len(heard.reports)
            await eventually(lambda: len(heard.reports) > count + 2)
            assert len(other.reports) == 1
            assert (await server.generate(request())).result is not None


async def test_refused_reports_are_not_hammered(hearer, caplog):
    heard, address = hearer
    heard.refusal = Refusal(Reason.INVALID_REQUEST, "bad", (Violation("load.slots", "must be 1 or more"),))
    async with model_server(orchestrators=(address,)) as server:
        await eventually(lambda: "refuses the reports" in caplog.text)
        assert (await server.generate(request())).result is not None
        assert heard.streams == 1
